"""THE OTHER COMMIT MODULE: append in one conditional transaction; the package has the argument."""

import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

from crewlog import host
from crewlog.errors import LockBusy, StoreMissing, UnknownOutcome, Unsupported
from crewlog.etcd import layout as keys
from crewlog.etcd.address import EtcdAddress
from crewlog.etcd.layout import KeyValue, Room
from crewlog.etcd.reader import Head, begin_of, encode_head, token_of
from crewlog.etcd.state import EtcdState
from crewlog.etcd.waiters import Place, Waiters
from crewlog.model import codec, events, fold
from crewlog.model.codec import Draft
from crewlog.model.events import JsonObject, Record
from crewlog.model.limits import DEFAULT, Limits
from crewlog.model.steps import Appended, Decide
from crewlog.queue import Commits, Done, Request, Start
from crewlog.store import new_identity

GROUP_EVENTS_MAX: Final = 40  # of callers that share a transaction

_logger = logging.getLogger("crewlog.etcd")
_VERSION: Final = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_TOKEN_BYTES: Final = 8

Version: TypeAlias = tuple[int, ...]
# Older ones lose or corrupt data. Source: etcd's CHANGELOG-3.4.md and CHANGELOG-3.5.md.
_SOUND: Final[dict[Version, int]] = {(3, 4): 20, (3, 5): 5}
# Older ones lack fixes that matter here.
_CURRENT: Final[dict[Version, int]] = {(3, 5): 33, (3, 6): 14, (3, 7): 1}


class Unit(NamedTuple):
    """What one request comes to: its lines and the records after them, or why it is refused."""

    request: Request
    lines: tuple[bytes, ...] = ()
    records: dict[str, Record | None] = {}  # noqa: RUF012 (never changed)
    seq: int = 0
    error: Exception | None = None


class Beaten(Exception):
    """What an attempt needs to be absent is there."""


class EtcdTip:
    """The state that a group decides upon: see model.steps.Tip."""

    def __init__(
        self,
        head: Head,
        records: dict[str, Record | None],
        fetch: Callable[[str], Record | None],
    ) -> None:
        """Look at everything up to `head`; what is asked for besides is fetched.

        A record that is fetched later may be younger than `head`: then head has moved, and the
        transaction that this state is for will not be carried out.
        """
        self.head = head
        self.seq = head.seq
        self.hash = head.hash
        self.totals = dict(head.totals)
        self.records = records
        self._fetch = fetch

    def get(self, sid: str) -> Record | None:
        """Return the record of that sid."""
        if sid not in self.records:
            self.records[sid] = self._fetch(sid)
        return self.records[sid]


class Attempt:
    """One transaction as it is being composed, upon one state."""

    def __init__(self, written: EtcdTip) -> None:
        """Begin empty."""
        self.written = written
        self.token = os.urandom(_TOKEN_BYTES).hex().encode()
        self.units: list[Unit] = []
        self.raws: list[bytes] = []
        self.ends: list[tuple[int, int]] = []  # a key of its own ends: its last seq, so many lines
        self.touched: set[str] = set()
        self.extra: list[JsonObject] = []
        self.absent: bytes | None = None  # a key that must not be there

    @property
    def doubtful(self) -> bool:
        """Say whether any of it rests on the state alone, and is not proven by its success."""
        return not self.raws or any(not unit.lines for unit in self.units)

    def size(self) -> int:
        """Return how many bytes its lines and the records that they change take."""
        records = (self.written.records[sid] for sid in self.touched)
        return sum(map(len, self.raws)) + sum(len(codec.dump(record)) for record in records)

    def size_with(self, drafts: Sequence[Draft]) -> int:
        """Return how many bytes it takes at most with more lines: each may grow its record, too."""
        more = sum(2 * len(part.body) + codec.LINE_OVERHEAD_BYTES for part in drafts)
        sids = {part.sid for part in drafts if part.sid} - self.touched
        return self.size() + more + sum(len(codec.dump(self.written.get(sid))) for sid in sids)

    def cut(self) -> None:
        """Let what follows begin a key of its own, so that retention may drop what is before."""
        self.ends.append((self.written.seq, len(self.raws)))

    def values(self) -> Iterator[tuple[int, bytes]]:
        """Yield the lines that share a key, with their token, by their last seq."""
        begun = 0
        for seq, end in [*self.ends, (self.written.seq, len(self.raws))]:
            yield seq, b"".join(self.raws[begun:end]) + self.token
            begun = end

    def add(self, drafts: Sequence[Draft], *, ts: str) -> None:
        """Compose lines that follow, as one unit, and fold them."""
        written = self.written
        count = len(drafts)
        for index, part in enumerate(drafts):
            place = (index, count) if count > 1 else None
            seq = written.seq + 1
            raw = codec.line(part, seq=seq, ts=ts, synced=0, prev=written.hash, batch=place)
            if part.type in events.WORKER_TYPES:
                line = codec.as_parsed(part, seq=seq, ts=ts)
                written.records[part.sid] = fold.after(line, written.get(part.sid))
                written.totals[part.type] = written.totals.get(part.type, 0) + 1
                self.touched.add(part.sid)
            written.seq, written.hash = seq, codec.digest(raw[:-1])
            self.raws.append(raw)


class EtcdLog(EtcdState):
    """The store under one prefix; threads may share it, and a forked child may go on using it."""

    def __init__(self, address: EtcdAddress, *, wait_s: float, limits: Limits = DEFAULT) -> None:
        """Use `EtcdPlace.open` or `.create`."""
        super().__init__(address, wait_s=wait_s, limits=limits)
        self.commits = Commits(self, where=self.where, wait_s=wait_s, limits=limits)
        # What the last append left, so that the next one need not look first. A look is due where
        # the answer would rest on it alone.
        self._left: tuple[Head, dict[str, Record | None]] | None = None
        self._waiters = Waiters(self.client, self.keys)  # of who leads a group: one thread
        host.renew_in_child(self, rank=host.STORES)

    # -- life -------------------------------------------------------------------------------

    def opened(self) -> "EtcdLog":
        """Check the server and the store.

        Raises: StoreMissing, Unsupported, AuthFailed.
        """
        self.check_version()
        self.identify()
        return self

    def created(self) -> "EtcdLog":
        """Create the store if there is none, and open it; durable on return."""
        version = self.check_version()
        try:
            self.identify()
        except StoreMissing:
            self._create()
            warning = outdated(version)
            if warning:
                _logger.warning("%s: %s", self.where, warning)
            self.identify()
        return self

    def check_version(self) -> str:
        """Return the server's version.

        Raises: Unsupported for one that loses data.
        """
        version = self.client.version()
        if not is_sound(version):
            raise Unsupported(
                "this version of etcd is not used",
                where=self.where,
                why=f"{version or 'an unknown one'} is known to lose or corrupt data",
                remedy="Upgrade to a current 3.5 or 3.6; 3.4.20 and 3.5.5 are the oldest",
            )
        return version

    def _create(self) -> None:
        """Write identity, first line and head at once, unless another was faster."""
        now = events.timestamp(host.now())
        identity = new_identity(now)
        store = str(codec.load_object(identity)["store"])
        part = codec.own_draft(events.SEGMENT, section_data(store, None))
        raw = codec.line(part, seq=1, ts=now, synced=0, prev=codec.digest(identity), batch=None)
        head = encode_head(store, 1, codec.digest(raw[:-1]), {})
        names = self.keys
        nothing = [keys.is_absent(names.head), keys.is_absent(names.migration)]
        token = os.urandom(_TOKEN_BYTES).hex().encode()
        then = [
            keys.put(names.store, identity),
            keys.put(names.event(1), raw + token),
            keys.put(names.head, head.raw),
        ]
        self.client.commit(keys.transaction(nothing, then))

    def close(self) -> None:
        """Give every resource back; idempotent."""
        host.forget(self, rank=host.STORES)
        self.client.close()

    def after_fork(self) -> None:
        """Begin anew in a forked child: another thread of the parent may have held a mutex."""
        self.renew_mutex()
        self._waiters.forget()
        self.commits.after_fork()

    # -- append -----------------------------------------------------------------------------

    def append(self, decide: Decide, *, about: Collection[str]) -> Appended:
        """Write what `decide` returns as one unit, all or nothing; durable on return.

        Raises: whatever `decide` raises; LockBusy where others were faster for `wait_s` seconds,
        Unavailable, QuotaExceeded, AuthFailed with nothing written; UnknownOutcome.
        """
        return self.commits.append(decide, about)

    def submit(self, decide: Decide, about: Collection[str], *, done: Done, start: Start) -> object:
        """Append without waiting; see queue.Commits.submit."""
        return self.commits.submit(decide, about, done=done, start=start)

    def make_durable(
        self,
        seq: int,  # noqa: ARG002 (what was written is durable, whatever it is)
        generation: int | None = None,  # noqa: ARG002 (as above)
        begun: Callable[[], None] | None = None,
    ) -> None:
        """Do nothing: what was written is durable. See queue.Phases."""
        if begun is not None:
            begun()

    def write(self, group: Sequence[Request]) -> tuple[int, int, int]:
        """Write for a group in one transaction; see queue.Phases."""
        about = set().union(*[request.about for request in group[: keys.TXN_WORKERS_MAX]])

        def compose(attempt: Attempt) -> None:
            for request in group:
                unit = _unit(attempt, request) if _fits(attempt, request) else None
                if unit is None:
                    return
                attempt.units.append(unit)

        attempt = self._transact(about, compose)
        _tell(attempt.units)
        return len(attempt.units), attempt.written.seq, 0

    def note(self, compose: Callable[[Attempt], None]) -> None:
        """Write lines of the store's own, and what goes with them; durable on return.

        Raises: Beaten where a key is there that must not be.
        """
        self._transact(set(), compose)

    def _transact(self, about: Collection[str], compose: Callable[[Attempt], None]) -> Attempt:
        """Look, compose, commit; again until no other writer comes between."""
        deadline = time.monotonic() + self.wait_s
        sids = sorted(about)[: keys.TXN_WORKERS_MAX]
        left, self._left = self._left, None
        if left is not None and not left[1].keys() >= set(sids):
            left = None  # one look tells all of them, where each would be asked for by itself
        attempt = None if left is None else self._composed(self._written(*left), compose)
        if attempt is None or attempt.doubtful:  # what was left over proves nothing: look
            attempt = self._composed(self._looked(sids), compose)
        place: Place | None = None
        lost = False
        try:
            while attempt.raws:
                try:
                    passed = self._commit(attempt, sids, place)
                except BaseException:
                    _tell(_refused_first(attempt.units))
                    raise
                if passed is None:
                    self._waiters.begin_turn(place)
                    place = None  # it went with the transaction
                    break
                _forget(attempt.units)
                self._waiters.end_turn()
                if time.monotonic() > deadline:
                    raise self._busy("other writers, who were first each time,")
                if lost or passed.head.raw == attempt.written.head.raw:  # or others stand before us
                    place = place or self._waiters.enter()
                    passed, place = self._first(place, sids, deadline)
                lost = True
                attempt = self._composed(passed, compose)
        finally:
            if place is not None:
                place.leave()
        self._keep(attempt)
        return attempt

    def _first(self, place: Place, sids: Sequence[str], deadline: float) -> tuple[EtcdTip, Place]:
        """Wait until nobody stands before us; return the state that was seen then, and our place.

        Raises: LockBusy.
        """
        place.give_way()
        while True:
            head, (queue, *rows) = self.look(place.look(), *self._records_of(sids))
            before = place.before(queue)
            if before == 0:
                return self._written(head, self._by_sid(sids, rows)), place
            if time.monotonic() > deadline:
                place.leave()
                count = "others" if before is None else f"{before} others"
                raise self._busy(f"{count}, who stand before us in the cluster's queue of writers,")
            if before is None:  # we were stopped, and our lease ran out
                place = self._waiters.enter()
            else:
                place.wait(before)
                while (before := place.peek()) and time.monotonic() <= deadline:
                    place.wait(before)

    def _busy(self, holder: str) -> LockBusy:
        return LockBusy(
            self.where,
            waited_s=self.wait_s,
            holder=holder,
            remedy="Try again, or wait longer (lock_timeout_s); a batch needs one turn",
        )

    def _composed(self, written: EtcdTip, compose: Callable[[Attempt], None]) -> Attempt:
        attempt = Attempt(written)
        compose(attempt)
        return attempt

    def _keep(self, attempt: Attempt) -> None:
        done = attempt.written
        if attempt.raws and len(done.records) < self.limits.recent_workers:
            head = encode_head(self.id, done.seq, done.hash, done.totals)
            self._left = head, done.records

    def _written(self, head: Head, records: dict[str, Record | None]) -> EtcdTip:
        return EtcdTip(head, records, self.record)

    def _looked(self, sids: Sequence[str]) -> EtcdTip:
        head, rows = self.look(*self._records_of(sids))
        return self._written(head, self._by_sid(sids, rows))

    def _records_of(self, sids: Sequence[str]) -> list[JsonObject]:
        return [keys.get(self.keys.named(Room.RECORD, sid)) for sid in sids]

    def _by_sid(
        self, sids: Sequence[str], rows: Sequence[Sequence[KeyValue]]
    ) -> dict[str, Record | None]:
        pairs = zip(sids, rows, strict=True)
        return {sid: self.decoded(row[0]) if row else None for sid, row in pairs}

    def _commit(self, attempt: Attempt, sids: Sequence[str], place: Place | None) -> EtcdTip | None:
        """Send the transaction; None if it is done, else the state that has passed it by for good.

        Raises: UnknownOutcome where that cannot be known; Beaten.
        """
        written, names = attempt.written, self.keys
        before = written.head
        head = encode_head(self.id, written.seq, written.hash, written.totals)
        then = [
            keys.put(names.head, head.raw),
            *(keys.put(names.event(seq), value) for seq, value in attempt.values()),
            *(self._record(sid, written.records[sid]) for sid in sorted(attempt.touched)),
            *attempt.extra,
            *([] if place is None else [keys.delete(place.key)]),
        ]
        passed: list[JsonObject] = [
            {
                "requestRange": keys.page(
                    names.event(before.seq + 1), names.room(Room.EVENT)[1], limit=1
                )
            },
            keys.get(names.head),
            *([] if attempt.absent is None else [keys.get(attempt.absent)]),
            *self._records_of(sids),
        ]
        for unit in attempt.units:
            unit.request.composed = bool(unit.lines)
        compare = [keys.is_value(names.head, before.raw), *self._waiters.let_pass(place)]
        if attempt.absent is not None:
            compare.append(keys.is_absent(attempt.absent))
        answer = self.client.commit(keys.transaction(compare, then, passed))
        if answer.get("succeeded") is True:
            self.seen = head
            return None
        next_, head_row, *rows = keys.ranges(answer)
        now = self.saw(head_row, before=before)
        if self._is_mine(attempt, next_, now):
            return None
        if attempt.absent is not None and rows.pop(0):
            raise Beaten
        return self._written(now, self._by_sid(sids, rows))

    def _is_mine(self, attempt: Attempt, next_: Sequence[KeyValue], now: Head) -> bool:
        """Say whether the line that followed the state of an attempt is of that attempt."""
        before = attempt.written.head
        if next_ and begin_of(next_[0]) <= before.seq + 1:
            return token_of(next_[0]) == attempt.token
        if now.raw == before.raw:  # others stand before us in the queue, or a key is there
            return False
        why = f"the history after seq {before.seq} went meanwhile; it is at {now.seq}"
        raise UnknownOutcome(self.where, why=why)

    def _record(self, sid: str, record: Record | None) -> JsonObject:
        key = self.keys.named(Room.RECORD, sid)
        return keys.delete(key) if record is None else keys.put(key, codec.dump(record))


def _fits(attempt: Attempt, request: Request) -> bool:
    """Say whether one more request may join a transaction: it is not full, or this is the first."""
    if not attempt.units:
        return True
    return (
        len(attempt.raws) < GROUP_EVENTS_MAX
        and len(attempt.touched | set(request.about)) <= keys.TXN_WORKERS_MAX
    )


def _unit(attempt: Attempt, request: Request) -> Unit | None:
    """Let one request decide on top of those before it; None if it does not fit beside them."""
    written = attempt.written
    try:
        drafts = request.decide(written)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is that request's own)
        return Unit(request, error=error)
    workers = {part.sid for part in drafts}
    much = len(attempt.touched | workers) > keys.TXN_WORKERS_MAX
    if drafts and (much or attempt.size_with(drafts) > keys.TXN_BYTES_MAX):
        return None if attempt.units else Unit(request, error=_too_much(drafts))
    if not drafts:
        return Unit(request, seq=written.seq)
    begun = len(attempt.raws)
    attempt.add(drafts, ts=events.timestamp(host.now()))
    records = {part.sid: written.records.get(part.sid) for part in drafts}
    lines = tuple(raw[:-1] for raw in attempt.raws[begun:])
    return Unit(request, lines, records, written.seq)


def _too_much(drafts: Sequence[Draft]) -> ValueError:
    if len(drafts) == 1:
        return ValueError(
            f"worker {drafts[0].sid!r} would take too much: on etcd a record and its event hold at "
            f"most {keys.TXN_BYTES_MAX} bytes together; take something out of its meta"
        )
    return ValueError(
        f"on etcd a batch holds at most {keys.TXN_WORKERS_MAX} workers "
        f"and {keys.TXN_BYTES_MAX} bytes, the records that it changes included"
    )


def _refused_first(units: Sequence[Unit]) -> list[Unit]:
    """Return the refusals that rest on nothing of their own attempt, which was not made."""
    made = next((n for n, unit in enumerate(units) if unit.lines), len(units))
    return [unit for unit in units[:made] if unit.error is not None]


def _tell(units: Sequence[Unit]) -> None:
    """Settle requests: as refused, or as written."""
    for unit in units:
        if unit.error is not None:
            unit.request.refuse(unit.error)
        else:
            unit.request.result = Appended(unit.lines, unit.records, unit.seq)


def _forget(units: Sequence[Unit]) -> None:
    """Note that nothing of these requests was written."""
    for unit in units:
        unit.request.composed = False


def section_data(store: str, previous: JsonObject | None) -> JsonObject:
    """Return what the first line of a part of the history says: whose it is, what was before."""
    return {"store": store, "format": codec.FORMAT, "boot": "", "previous": previous}


# -- versions -------------------------------------------------------------------------------


def is_sound(version: str) -> bool:
    """Say whether a version of etcd can be trusted with data."""
    match = _VERSION.match(version)
    if match is None:
        return False
    line, patch = (int(match[1]), int(match[2])), int(match[3])
    return line >= (3, 4) and patch >= _SOUND.get(line, 0)


def outdated(version: str) -> str:
    """Return what is to be said of a version that is sound but old, "" for nothing."""
    match = _VERSION.match(version)
    if match is None:
        return ""
    line, patch = (int(match[1]), int(match[2])), int(match[3])
    newest = max(_CURRENT)
    if line < min(_CURRENT) or (line <= newest and patch < _CURRENT.get(line, 0)):
        lines = ", ".join(f"{a}.{b}.{c}" for (a, b), c in _CURRENT.items())
        return f"etcd {version} is old: {lines} have fixes that it lacks"
    return ""
