"""Read a store in a cluster: its head, its lines, its records, and the past of them.

Head is read before the lines, so that nothing beyond it is asked for; lines are read by their keys,
a page at a time, and checked as those of a directory are.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import NamedTuple, cast

from crewlog import codec, events, fold, layout, segments
from crewlog.codec import DocumentError, LineError, Snapshot
from crewlog.errors import (
    CompactedError,
    FormatTooNew,
    HistoryRewound,
    LogCorrupt,
    NotAStore,
    SegmentMissing,
    SnapshotCorrupt,
    StoreMissing,
)
from crewlog.etcd import keys
from crewlog.etcd.address import EtcdAddress
from crewlog.etcd.changes import EtcdChanges
from crewlog.etcd.client import Client, Refused
from crewlog.etcd.cursors import EtcdCursors
from crewlog.etcd.keys import Keys, KeyValue
from crewlog.etcd.leases import EtcdLeases
from crewlog.etcd.rides import Rides
from crewlog.events import JsonObject, Line, Record
from crewlog.fold import Fold, FoldError
from crewlog.refold import refold_lines
from crewlog.sieve import Sieve

_SEQ_AT = len(b'{"v":1,"seq":')


class Head(NamedTuple):
    """How far the log goes; `raw` are the very bytes, which an append compares with."""

    raw: bytes
    store: str
    seq: int
    hash: bytes
    totals: dict[str, int]


def encode_head(store: str, seq: int, hash_: bytes, totals: dict[str, int]) -> Head:
    """Return a head as it is written."""
    raw = codec.dump({"store": store, "seq": seq, "hash": hash_.hex(), "totals": totals})
    return Head(raw, store, seq, hash_, totals)


class Part(NamedTuple):
    """A sealed part of the history: its seqs, bytes, newest time, and when it was sealed."""

    first: int
    last: int
    size: int
    newest: str
    sealed_at: str


class EtcdReading:
    """The reading half of the store."""

    def __init__(self, address: EtcdAddress, *, wait_s: float) -> None:
        """Read nothing yet."""
        self.where = str(address)
        self.address = address
        self.wait_s = wait_s
        self.client = Client(address, wait_s=wait_s)
        self.keys = Keys(address.prefix)
        self.id = ""
        self.digest = b""
        self._identity = b""
        self.unit_workers_max = layout.TXN_WORKERS_MAX
        self.one_host = False
        self.remote = True
        self.mutex = threading.RLock()  # guards all below
        self._heads: Rides[Head] = Rides()
        self._newest = Newest()
        self._fold: Fold | None = None
        self._folded: Head | None = None
        self.seen: Head | None = None  # the newest that was read

    # -- head -------------------------------------------------------------------------------

    def identify(self) -> None:
        """Learn who the store is. *Raises* StoreMissing, NotAStore, FormatTooNew."""
        identity, head = self.ask([keys.get(self.keys.store), keys.get(self.keys.head)])
        if not identity or not head:
            raise self._missing()
        try:
            found = codec.load_object(identity[0].value)
        except DocumentError as error:
            raise self._broken(self.keys.store, str(error)) from error
        if found.get("format") != layout.FORMAT:
            raise FormatTooNew(self.where, why=f"it has format {found.get('format')!r}")
        if found.get("incompat"):
            raise FormatTooNew(self.where, why=f"it needs {found['incompat']!r}")
        store = found.get("store")
        if not isinstance(store, str) or not store:
            raise self._broken(self.keys.store, "it names no store")
        self._identity = identity[0].value
        self.id, self.digest = store, codec.digest(identity[0].value)
        self.saw(head, before=None)

    def _missing(self) -> StoreMissing:
        if self.ask([keys.get(self.keys.migration)])[0]:
            return StoreMissing(self.where, why="a migration into it has not been finished")
        return StoreMissing(self.where, why="there is none under this prefix")

    def _broken(self, key: bytes, why: str) -> NotAStore:
        return NotAStore(
            "not a registry",
            where=f"{self.where}: key {key.decode()}",
            why=why,
            remedy="Choose another prefix, or restore the cluster from a backup",
        )

    def ask(self, wanted: Sequence[JsonObject]) -> list[list[KeyValue]]:
        """Read several keys or ranges at one moment."""
        return keys.ranges(self.client.call("kv/txn", keys.transaction((), wanted)))

    def look(self, *wanted: JsonObject) -> tuple[Head, list[list[KeyValue]]]:
        """Read head and more at one moment. *Raises* StoreMissing, HistoryRewound."""
        before = self.seen
        found, *more = self.ask([keys.get(self.keys.head), *wanted])
        return self.saw(found, before=before), more

    def saw(self, found: Sequence[KeyValue], *, before: Head | None) -> Head:
        """Take over a head that was read; `before` had been seen when it was asked for.

        *Raises* StoreMissing, HistoryRewound.
        """
        if not found:
            raise StoreMissing(self.where, why="it was removed")
        head = self._decoded(found[0].value)
        if head.store != self.id or (before is not None and not _follows(before, head)):
            raise HistoryRewound(self.where, seen=before.seq if before else 0, found=head.seq)
        self.seen = head
        return head

    def _decoded(self, raw: bytes) -> Head:
        try:
            found = codec.load_object(raw)
            totals = cast("dict[str, int]", found["totals"])
            seq, hash_ = cast("int", found["seq"]), bytes.fromhex(str(found["hash"]))
            return Head(raw, str(found["store"]), seq, hash_, totals)
        except (DocumentError, KeyError, ValueError) as error:
            raise self._broken(self.keys.head, str(error)) from error

    def head(self) -> Head:
        """Return how far events are durable, now."""
        return self._heads.ask(lambda: self.look()[0])

    def last_seq(self) -> int:
        """Return the seq of the last durable line."""
        return self.head().seq

    def first_seq(self) -> int:
        """Return the seq of the oldest line that is kept."""
        head, (first,) = self.look(keys.first_of(*self.keys.room("e")))
        return begin_of(first[0]) if first else head.seq + 1

    # -- the state --------------------------------------------------------------------------

    @contextmanager
    def state(self) -> Iterator[Fold]:
        """Hold the durable state of now still, while something is copied out of it."""
        with self.mutex:
            yield self._current()

    def _current(self) -> Fold:
        head = self.head()
        state, folded = self._fold, self._folded
        if state is None or folded is None or folded.seq > head.seq:
            return self._loaded()
        if folded.seq < head.seq:
            try:
                self._catch_up(state, folded, head)
            except CompactedError:  # retention took what we had not read
                return self._loaded()
            except BaseException:
                self._fold = None
                raise
            self._folded = head
        return state

    def _catch_up(self, state: Fold, folded: Head, head: Head) -> None:
        prev = folded.hash
        for line, raw in self.lines(folded.seq, head.seq):
            if line["prev"] != prev.hex():  # a backup came back, and has gone on since
                raise HistoryRewound(self.where, seen=line["seq"] - 1, found=head.seq)
            prev = segments.hash_after(line, raw)
            try:
                state.apply(line)
            except FoldError as error:
                raise self._unwritable(line, raw, error) from error

    def _unwritable(self, line: Line, _raw: bytes, error: FoldError) -> LogCorrupt:
        return self.corrupt(line["seq"], str(error), proof="its crc is right")

    def _loaded(self) -> Fold:
        """Read every record, at one revision."""
        for _ in range(layout.SEGMENT_OPEN_TRIES):
            try:
                head, records = self.records()
            except Refused as error:
                if not error.compacted:  # the cluster forgot that revision under us: again
                    raise
            else:
                self._fold = fold.restored(head.seq, records, (), head.totals)
                self._folded = head
                return self._fold
        raise LogCorrupt(
            self.where,
            offset=0,
            seq=0,
            reason="the cluster compacts faster than its records can be read",
            proof="each reading of a revision was refused",
        )

    def records(self) -> tuple[Head, list[Record]]:
        """Read head and every record of one moment. *Raises* Refused if it is compacted away."""
        begin, end = self.keys.room("w")
        page = keys.page(begin, end, limit=layout.RECORDS_A_PAGE)
        before = self.seen
        answer = self.client.call(
            "kv/txn", keys.transaction((), [keys.get(self.keys.head), {"requestRange": page}])
        )
        found, rows = keys.ranges(answer)
        head = self.saw(found, before=before)
        revision = keys.number(cast("JsonObject", answer["header"]), "revision")
        records: list[Record] = []
        while rows:
            records += [self.decoded(row) for row in rows]
            if len(rows) < layout.RECORDS_A_PAGE:
                break
            page = keys.page(
                rows[-1].key + b"\0", end, limit=layout.RECORDS_A_PAGE, revision=revision
            )
            rows = keys.pairs(self.client.call("kv/range", page))
        return head, records

    def decoded(self, row: KeyValue) -> Record:
        """Check and parse a record."""
        try:
            return codec.decode_record(row.value)
        except DocumentError as error:
            raise SnapshotCorrupt(
                f"{self.where}: key {row.key.decode()}", why=str(error)
            ) from error

    def record(self, sid: str) -> Record | None:
        """Return one worker's durable record of now."""
        _, (row,) = self.look(keys.get(self.keys.named("w", sid)))
        return self.decoded(row[0]) if row else None

    # -- lines ------------------------------------------------------------------------------

    def read(self, after: int, *, sieve: Sieve | None = None) -> Iterator[tuple[Line, bytes]]:
        """Yield the durable lines after seq `after` that the sieve holds, up to the last of now.

        *Raises* CompactedError where the line after `after` is no longer kept.
        """
        head = self.head()
        if after < head.seq:
            yield from self.lines(after, head.seq, sieve=sieve)

    def lines(
        self, after: int, stop: int, *, sieve: Sieve | None = None
    ) -> Iterator[tuple[Line, bytes]]:
        """Yield the lines after seq `after` up to the durable seq `stop`."""
        due = after + 1
        for row in self.transactions(after, stop):
            data = lines_of(row)
            begin, last = _first_seq(data), int(row.name)
            if begin > due:
                raise self._gone(due, begin - 1)
            for line, raw in self._wanted(data, begin, last, sieve):
                if after < line["seq"] <= stop:
                    yield line, raw
            due = last + 1
        if due <= stop:
            raise self._gone(due, stop)

    def newest(self, after: int, stop: int, *, sieve: Sieve | None) -> Iterable[tuple[Line, bytes]]:
        """Return lines as `lines` does; the newest are read once for all watchers, unsieved."""
        if stop - after > layout.NEWEST_LINES_MAX:
            return self.lines(after, stop, sieve=sieve)
        return self._newest.between(after, stop, lambda: list(self.lines(after, stop)))

    def transactions(self, after: int, stop: int) -> Iterator[KeyValue]:
        """Yield what was written together, from the line after seq `after` to that of `stop`."""
        for row in self._pages(self.keys.event(after + 1), self.keys.room("e")[1]):
            yield row
            if int(row.name) >= stop:
                return

    def all_keys(self, begin: bytes, end: bytes) -> Iterator[bytes]:
        """Yield the keys of a range."""
        return (row.key for row in self._pages(begin, end, keys_only=True))

    def _pages(self, begin: bytes, end: bytes, *, keys_only: bool = False) -> Iterator[KeyValue]:
        while True:
            page = keys.page(begin, end, limit=layout.KEYS_A_PAGE)
            rows = keys.pairs(self.client.call("kv/range", {**page, "keysOnly": keys_only}))
            yield from rows
            if len(rows) < layout.KEYS_A_PAGE:
                return
            begin = rows[-1].key + b"\0"

    def _wanted(
        self, data: bytes, begin: int, last: int, sieve: Sieve | None
    ) -> Iterator[tuple[Line, bytes]]:
        """Parse the lines of one transaction that the sieve holds."""
        seq = begin - 1
        for at, end in (sieve or Sieve()).lines(data):
            raw = data[at:end]
            line = self._parsed(raw, seq + 1)
            ordered = segments.follows(line, seq + 1) if sieve is None else line["seq"] > seq
            if not ordered or line["seq"] > last:
                raise self.corrupt(seq + 1, f"seq is {line['seq']}")
            seq = line["seq"]
            yield line, raw
        if sieve is None and seq != last:
            raise self.corrupt(seq + 1, f"its key says that seq {last} is the last")

    def _parsed(self, raw: bytes, seq: int) -> Line:
        try:
            return codec.parse(raw)
        except LineError as error:
            raise self.corrupt(seq, str(error)) from error

    def corrupt(
        self, seq: int, reason: str, *, proof: str = "these bytes were durable"
    ) -> LogCorrupt:
        """Return the error of a line that is not what was written."""
        where = f"{self.where}: key {self.keys.event(seq).decode()}"
        return LogCorrupt(where, offset=0, seq=seq, reason=reason, proof=proof)

    def _gone(self, due: int, last: int) -> CompactedError | SegmentMissing:
        """Return why lines are not there: retention took them, or nobody may have."""
        oldest = self.first_seq()
        if due < oldest:
            return CompactedError(requested=due, oldest=oldest, snapshot_seq=self.last_seq())
        return SegmentMissing(self.where, first=due, last=last)

    def backwards(self, *, sieve: Sieve | None = None) -> Iterator[tuple[Line, bytes]]:
        """Yield the durable lines that the sieve holds, the newest first."""
        due = self.head().seq
        oldest = self.first_seq()
        while due >= oldest:
            page = keys.page(
                self.keys.event(oldest),
                self.keys.event(due) + b"\0",
                limit=layout.KEYS_A_PAGE,
                newest_first=True,
            )
            for row in keys.pairs(self.client.call("kv/range", page)):
                data, last = lines_of(row), int(row.name)
                begin = _first_seq(data)
                if last != due:
                    raise SegmentMissing(self.where, first=last + 1, last=due)
                yield from reversed(list(self._wanted(data, begin, last, sieve)))
                due = begin - 1
            oldest = max(oldest, self.first_seq())

    def tail(self, after: int, *, sieve: Sieve | None = None) -> "EtcdTail":
        """Return what reads on from seq `after`. *Raises* CompactedError as `read` does."""
        oldest = self.first_seq()
        if after + 1 < oldest:
            snapshot_seq = self.last_seq()
            raise CompactedError(requested=after + 1, oldest=oldest, snapshot_seq=snapshot_seq)
        return EtcdTail(self, after, sieve)

    def identity(self) -> bytes:
        """Return what says who the store is."""
        return self._identity

    # -- the past ---------------------------------------------------------------------------

    def parts(self) -> list[Part]:
        """Return the sealed parts of the history that are kept, oldest first."""
        rows = keys.pairs(self.client.call("kv/range", keys.page(*self.keys.room("s"), limit=0)))
        oldest = self.first_seq()
        found = []
        for row in rows:
            told = codec.load_object(row.value)
            part = Part(
                int(row.name),
                cast("int", told["last"]),
                cast("int", told["size"]),
                str(told["newest"]),
                str(told["at"]),
            )
            if part.first >= oldest:
                found.append(part)
        return found

    def firsts(self) -> Sequence[int]:
        """Return the first seqs of the parts of the history; all but the last are sealed."""
        parts = self.parts()
        return [*(p.first for p in parts), parts[-1].last + 1 if parts else self.first_seq()]

    def begins(self, first: int) -> str:
        """Return the time of a part's first line, as the log writes it."""
        return next((line["ts"] for line, _ in self.lines(first - 1, first)), "")

    def states(self) -> Iterator[Snapshot]:
        """Yield every older state that is kept, the empty one too, and that of now."""
        yield self.empty()
        base = self.read_base()
        if base is not None:
            yield base
        yield self.snapshot()

    def empty(self) -> Snapshot:
        """Return the state before the first event."""
        return Snapshot(
            store=self.id,
            last_seq=0,
            last_hash=self.digest.hex(),
            written_at="",
            sessions=(),
            ended=(),
            totals={},
        )

    def snapshot(self) -> Snapshot:
        """Return the state of now."""
        with self.state() as state:
            head = self._folded
            assert head is not None  # the state was just read
            return Snapshot(
                store=self.id,
                last_seq=head.seq,
                last_hash=head.hash.hex(),
                written_at=events.timestamp(events.now()),
                sessions=list(state.sessions()),
                ended=list(state.ended()),
                totals=state.totals.copy(),
            )

    def read_base(self) -> Snapshot | None:
        """Return the state before the oldest event that is kept; None if no retention left one.

        *Raises* SnapshotCorrupt.
        """
        begin, end = self.keys.room("b")
        page = keys.page(begin, end, limit=layout.PIECES_MAX)
        rows = keys.pairs(self.client.call("kv/range", page))
        newest = max((row.key.rpartition(b"/")[0] for row in rows), default=None)
        if newest is None:
            return None
        data = b"".join(row.value for row in rows if row.key.startswith(newest + b"/"))
        try:
            found = codec.decode_snapshot(data)
        except DocumentError as error:
            raise SnapshotCorrupt(f"{self.where}: {newest.decode()}", why=str(error)) from error
        if found.store != self.id:
            raise SnapshotCorrupt(f"{self.where}: {newest.decode()}", why="it is another store's")
        return found

    def fold_to(self, start: Snapshot, seq: int, *, seen: Callable[[Line], None]) -> Snapshot:
        """Return the state at a durable seq from an older one; `seen` is told of each line."""
        lines = self.lines(start.last_seq, seq)
        return refold_lines(lines, start, seq, where=self.where, seen=seen, wrong=self._unwritable)

    def compacted(self) -> tuple[int, datetime] | None:
        """Return what seq the last compaction sealed, and when; None before the first."""
        parts = self.parts()
        return (parts[-1].last, events.utc(parts[-1].sealed_at)) if parts else None

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the sealed history, and of the cluster's whole database."""
        database = keys.number(self.client.call("maintenance/status", {}), "dbSize")
        return {"history": sum(part.size for part in self.parts()), "database": database}

    # -- its readers and workers ------------------------------------------------------------

    @property
    def changes(self) -> EtcdChanges:
        """Return what tells of changes."""
        return EtcdChanges(self.address, self.keys.head, self.id)

    @property
    def cursors(self) -> EtcdCursors:
        """Return the durable positions of subscribers."""
        return EtcdCursors(self.client, self.keys)

    @property
    def leases(self) -> EtcdLeases:
        """Return what workers hold while they live."""
        return EtcdLeases(self.client, self.keys)

    def is_in_place(self) -> bool:
        """Say whether this store is still under the prefix; True where nothing is there."""
        try:
            self.head()
        except StoreMissing:
            return True
        except HistoryRewound:
            return False
        return True

    def renew_mutex(self) -> None:
        """Begin with a mutex that nobody holds, and nothing half folded."""
        self.mutex = threading.RLock()
        self._heads = Rides()
        self._newest = Newest()
        self._fold = self._folded = None

    @property
    def closed(self) -> bool:
        """Say whether it was closed."""
        return self.client.closed

    def renew(self) -> None:
        """Do nothing: whatever is read is read anew."""


class Newest:
    """The newest lines that watchers read, kept for those who come a moment later."""

    def __init__(self) -> None:
        """Keep none yet."""
        self._mutex = threading.Lock()
        self._kept: list[tuple[Line, bytes]] = []
        self._after = self._last = 0  # what is kept: the lines after the one seq, up to the other

    def between(
        self, after: int, stop: int, read: Callable[[], list[tuple[Line, bytes]]]
    ) -> list[tuple[Line, bytes]]:
        """Return the lines after a seq up to another one; `read` gets what is not kept."""
        with self._mutex:
            if not self._after <= after <= stop <= self._last:
                found = read()
                if after != self._last or len(self._kept) > layout.NEWEST_LINES_MAX:
                    self._kept, self._after = [], after
                self._kept += found
                self._last = stop
                return found
            return [(line, raw) for line, raw in self._kept if after < line["seq"] <= stop]


class EtcdTail:
    """Lines from a position on; see store.Tail."""

    __slots__ = ("_log", "_sieve", "seq")

    def __init__(self, log: EtcdReading, after: int, sieve: Sieve | None) -> None:
        """Begin after a seq."""
        self._log = log
        self._sieve = sieve
        self.seq = after

    def read(self, head: int) -> Iterator[tuple[Line, bytes]]:
        """Yield the lines up to the durable seq `head`."""
        for line, raw in self._log.newest(self.seq, head, sieve=self._sieve):
            self.seq = line["seq"]
            yield line, raw
        self.seq = max(self.seq, head)

    def close(self) -> None:
        """Close nothing: nothing stays open."""


def _follows(before: Head, head: Head) -> bool:
    """Say whether a head may come after one that was seen."""
    return head.seq > before.seq or (head.seq == before.seq and head.hash == before.hash)


def lines_of(row: KeyValue) -> bytes:
    """Return the lines of a transaction, without the token behind them."""
    return row.value[: row.value.rfind(b"\n") + 1]


def begin_of(row: KeyValue) -> int:
    """Return the first seq of a transaction; of a gap, the first that it stands for."""
    return _first_seq(lines_of(row))


def token_of(row: KeyValue) -> bytes:
    """Return the token of the attempt that wrote a transaction."""
    return row.value[row.value.rfind(b"\n") + 1 :]


def _first_seq(data: bytes) -> int:
    """Return the seq of the first line; of a gap, the first that it stands for."""
    first = data[: data.find(b"\n")]
    if b'"type":"_gap"' in first:
        told = codec.parse(first)["data"].get("first")
        if isinstance(told, int):
            return told
    digits = first[_SEQ_AT : first.find(b",", _SEQ_AT)]
    return int(digits) if digits.isdigit() else 0
