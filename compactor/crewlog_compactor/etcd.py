"""Do the job of cron on a cluster: seal, retain, verify.

There is no file to fold into: each append has brought the workers' records up to date. A compaction
collects, and seals the newest part of the history, so that retention has something to drop whole.
Retention keeps the state before what stays, in pieces, then tells of it in the log, then drops; the
last step removes only, so that it goes on working where the cluster's quota is full.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from crewlog import codec, events, fold, layout
from crewlog.codec import LineError, Snapshot
from crewlog.errors import (
    CompactedError,
    DataDamaged,
    QuotaExceeded,
    SegmentMissing,
    SnapshotCorrupt,
)
from crewlog.etcd import keys
from crewlog.etcd.engine import Attempt, Beaten, EtcdLog, section_data
from crewlog.etcd.lines import Head, lines_of
from crewlog.etcd.reading import Part
from crewlog.events import JsonObject, Line, Record
from crewlog.place import Place
from crewlog.refold import snapshot_of
from crewlog.registry import Registry
from crewlog.sieve import Sieve, type_needle
from crewlog.store import Store
from crewlog_compactor import policy
from crewlog_compactor.anchor import Anchor
from crewlog_compactor.collect import try_collect
from crewlog_compactor.findings import CompactReport, VerifyReport
from crewlog_compactor.history import History
from crewlog_compactor.policy import Keep

_logger = logging.getLogger("crewlog.retain")


def compact(
    reg: Registry, log: Store, *, gc: bool, force: bool, keep_history: Keep, dry_run: bool
) -> CompactReport:
    """Collect, seal, retain; see compact.compact."""
    assert isinstance(log, EtcdLog)  # there are two kinds, and it is not the other one
    none = None, None
    collected, refused = try_collect(reg, force=force, dry_run=dry_run) if gc else none
    if dry_run:
        added = 0 if collected is None else collected.changed
        sealed, last, going = _foretell(log, keep_history, added)
        return CompactReport(
            folded_events=sealed,
            snapshot_seq=last,
            archived_segments=0,
            dropped=(going[0].first, going[-1].last) if going else None,
            collected=collected,
            refused=refused,
            dry_run=True,
        )
    folded = 0
    full: QuotaExceeded | None = None
    try:
        folded = seal(log)
    except QuotaExceeded as error:
        if keep_history is None:  # then nothing is left that could be done
            raise
        full = error
    return CompactReport(
        folded_events=folded,
        snapshot_seq=log.last_seq(),
        archived_segments=0,
        dropped=retain(log, keep_history),
        collected=collected,
        refused=refused,
        full=full,
    )


def seal(log: EtcdLog) -> int:
    """Seal the newest part of the history, and begin the next; return how many events it holds.

    Nothing is written where it holds none of a worker. It is measured before the transaction, so
    that this is as short as any writer's: what others write meanwhile counts in no size.
    """
    while True:
        parts = log.parts()
        first = parts[-1].last + 1 if parts else log.first_seq()
        size, newest, count = _measure(log, first)
        if not count:
            return 0
        try:
            log.note(lambda attempt: _sealed(log, attempt, first, size, newest))  # noqa: B023 (now)
        except Beaten:  # by another compaction: see what that one left
            continue
        return count


def _foretell(log: EtcdLog, keep: Keep, added: int) -> tuple[int, int, list[Part]]:
    """Say how many events would be sealed, up to what seq the log comes, and what would go.

    `added` events come of the collection.
    """
    parts, last = log.parts(), log.last_seq() + added
    first = parts[-1].last + 1 if parts else log.first_seq()
    size, newest, count = _measure(log, first)
    count += added
    if count:
        at = events.timestamp(events.now())
        parts.append(Part(first, last + 1, size, max(newest, at), sealed_at=at))
        last += 2  # a seal, and a header
    return count, last, due(log, parts, keep, last_seq=last)


def _measure(log: EtcdLog, first: int) -> tuple[int, str, int]:
    """Return the bytes of a part so far, its newest time, and its events of workers."""
    size, newest, count = 0, "", 0
    for line, raw in log.read(first - 1):
        size += len(raw) + 1
        newest = max(newest, line["ts"])
        count += not events.is_own(line["type"])
    return size, newest, count


def _sealed(log: EtcdLog, attempt: Attempt, first: int, size: int, newest: str) -> None:
    at = events.timestamp(events.now())
    attempt.add([codec.own_draft(events.SEAL, {"first": first})], ts=at)
    attempt.cut()
    last, hash_ = attempt.written.seq, attempt.written.hash.hex()
    size += attempt.size()
    told: JsonObject = {"last": last, "size": size, "newest": max(newest, at), "at": at}
    attempt.absent = log.keys.part(first)
    attempt.extra = [keys.put(attempt.absent, codec.dump(told))]
    previous: JsonObject = {"first": first, "last": last, "size": size, "hash": hash_}
    header = section_data(log.id, previous)
    attempt.add([codec.own_draft(events.SEGMENT, header)], ts=at)


# -- retention ------------------------------------------------------------------------------


def retain(log: EtcdLog, keep: Keep) -> tuple[int, int] | None:
    """Drop what the policy no longer keeps; return the range of seqs that went, None for none."""
    going = due(log, log.parts(), keep, last_seq=log.last_seq())
    if not going:
        return None
    first, last = going[0].first, going[-1].last
    try:
        _tell(log, going)
    except QuotaExceeded:  # to drop is the way out of it; what cannot be told must wait
        _logger.warning("the quota is full: no state is kept for the history after seq %d", last)
    drop(log, going)
    return first, last


def due(log: EtcdLog, parts: list[Part], keep: Keep, *, last_seq: int) -> list[Part]:
    """Return the parts that the policy lets go when the log has come to `last_seq`."""
    if keep is None:
        return []
    kept = [policy.Part(part.first, part.last, part.size, part.newest) for part in parts]
    surplus = policy.surplus(kept, keep, last_seq=last_seq)
    return parts[: policy.held_back(kept, surplus, log.cursors.every())]


def _tell(log: EtcdLog, going: list[Part]) -> None:
    """Keep the state after what goes, and say in the log that it goes."""
    last = going[-1].last
    after = next(line for line, _ in log.lines(last, last + 1))
    told: JsonObject = {"first": going[0].first, "last": last, "head": after["prev"]}
    try:
        start = log.read_base() or log.empty()
        if start.last_seq < last:
            start = put_base(log, _folded(log, start, last))
        told["base"] = start.sha256
    except DataDamaged as error:
        _logger.warning("no state can be kept for the history after seq %d: %s", last, error)
    draft = codec.own_draft(events.DROPPED, told)
    at = events.timestamp(events.now())
    log.note(lambda attempt: attempt.add([draft], ts=at))


def _folded(log: EtcdLog, start: Snapshot, last: int) -> Snapshot:
    """Fold up to a seq; two retentions that do it at once come to the same bytes."""
    times: list[str] = []
    folded = log.fold_to(start, last, seen=lambda line: times.append(line["ts"]))
    return replace(folded, written_at=times[-1])


def put_base(log: EtcdLog, base: Snapshot) -> Snapshot:
    """Keep a state in pieces, and return it; an older one goes once the new one is whole."""
    data = codec.encode_snapshot(base)
    names = log.keys
    pieces = [data[at : at + layout.PIECE_BYTES] for at in range(0, len(data), layout.PIECE_BYTES)]
    for number, piece in reversed(list(enumerate(pieces))):
        put = keys.put(names.base(base.last_seq, number), piece)
        log.client.call("kv/txn", keys.transaction((), [put]))
    begin, _ = names.room("b")
    older = keys.delete(begin, names.base(base.last_seq, 0))
    log.client.call("kv/txn", keys.transaction((), [older]))
    return codec.decode_snapshot(data)


def drop(log: EtcdLog, going: list[Part]) -> None:
    """Remove parts of the history; harmless to repeat."""
    last = going[-1]
    names = log.keys
    for begin, end in (
        (names.event(0), names.event(last.last) + b"\0"),
        (names.part(0), names.part(last.first) + b"\0"),
    ):
        log.client.call("kv/deleterange", {"key": keys.text(begin), "range_end": keys.text(end)})


# -- verify ---------------------------------------------------------------------------------

_ROOMS: Final = frozenset({"e", "w", "s", "b", "l", "beat", "t", "c", "o"})


def verify(
    place: Place, *, anchor: Anchor | None, progress: Callable[[int, int], None] | None
) -> VerifyReport:
    """Check a whole store in a cluster; see verify.verify. *Raises* StoreMissing, Unavailable."""
    log = place.open(wait_s=layout.LOCK_WAIT_S)
    assert isinstance(log, EtcdLog)  # the caller looked at its address
    try:
        for _ in range(layout.VERIFY_TRIES):
            oldest = log.first_seq()
            try:
                report = _Check(log, anchor, progress).run()
            except (CompactedError, SegmentMissing):
                if log.first_seq() == oldest:
                    raise
                continue
            if report.ok or log.first_seq() == oldest:  # else a retention came between
                return report
        return _Check(log, anchor, progress).run()
    finally:
        log.close()


class _Check:
    """One verification of a cluster's store."""

    def __init__(
        self, log: EtcdLog, anchor: Anchor | None, progress: Callable[[int, int], None] | None
    ) -> None:
        self._log = log
        self._progress = progress
        self._found = History(where=self._where, log_name="e", anchor=anchor)
        self._told: dict[int, tuple[int, int]] = {}  # parts: their last seq and bytes, by first seq

    def _where(self, name: str) -> str:
        return f"{self._log.where}: {name}"

    def run(self) -> VerifyReport:
        """Read everything and return what was found."""
        log, found = self._log, self._found
        try:
            head, records, parts = self._still()
        except DataDamaged as error:
            found.report(error.code, "w, s", str(error))
            return self._report()
        state = fold.restored(head.seq, records, (), head.totals)
        now = snapshot_of(state, store=log.id, last_hash=head.hash.hex())
        found.checkpoints = {head.seq: None}
        found.hash = log.digest.hex()
        self._begin()
        self._walk(head.seq)
        if found.seq == head.seq:
            found.compare("w", now)
        self._parts(parts)
        found.hold_anchor()
        self._strays()
        return self._report()

    def _still(self) -> tuple[Head, list[Record], list[Part]]:
        """Read head, records and parts between which nothing was sealed."""
        while True:
            parts = self._log.parts()
            head, records = self._log.records()
            if self._log.parts() == parts:
                return head, records, parts

    def _report(self) -> VerifyReport:
        found = self._found
        return VerifyReport(
            events=found.events,
            last_seq=found.seq,
            findings=tuple(found.findings),
            gaps=tuple(found.gaps),
        )

    def _begin(self) -> None:
        """Begin with the oldest line, and the state before it if a line of the log tells of it."""
        log, found = self._log, self._found
        first = log.first_seq()
        if first == 1:
            return
        try:
            base = log.read_base()
        except SnapshotCorrupt as error:
            base = None
            found.report(error.code, "b", error.why)
        if base is not None:
            found.bases = {base.last_seq: base}
        for line, _ in log.read(first - 1, sieve=Sieve([type_needle(events.DROPPED)])):
            if line["type"] == events.DROPPED and found.is_told(line["data"], first):
                self._hold_base(base)
                return
        found.seq, found.hash, found.partial = first - 1, "", True
        found.rebase()
        # Dropped while the quota was full, nothing could be told; but parts go whole.
        oldest = next((line for line, _ in log.read(first - 1)), None)
        if oldest is None or oldest["type"] != events.SEGMENT:
            found.report("segment_missing", "e", f"events 1 to {first - 1} are gone", seq=1)
            found.hole = True

    def _hold_base(self, base: Snapshot | None) -> None:
        last, told = self._found.base_told
        if told is not None and (base is None or base.last_seq < last):
            self._found.report("snapshot_differs", "b", "it is missing", seq=last)
        elif base is not None and base.last_seq == last and told not in {None, base.sha256}:
            why = "it is not the one that the log tells of"
            self._found.report("snapshot_differs", "b", why, seq=last)

    def _walk(self, stop: int) -> None:
        """Check every line up to the durable end; after a bad one, go on at the next."""
        found, batch = self._found, (0, 0)
        begun = found.seq
        for row in self._log.transactions(begun, stop):
            name = f"e/{row.name}"
            offset = 0
            for raw in lines_of(row).split(b"\n")[:-1]:
                try:
                    line = codec.parse(raw)
                except LineError as error:
                    found.bad_line(name, offset, str(error))
                else:
                    batch = found.good_line(name, offset, line, raw, batch)
                    if line["type"] == events.SEGMENT:
                        self._begun(line)
                offset += len(raw) + 1
            if found.seq != int(row.name):
                why = f"its last line has seq {found.seq}"
                found.report("log_corrupt", name, why, seq=found.seq)
                found.seq, found.hash, found.hole = int(row.name), "", True
            if self._progress is not None:
                self._progress(found.seq - begun, stop - begun)
        if found.seq < stop:
            why = f"seq {stop} was durable, the log ends at {found.seq}"
            found.report("log_regressed", "head", why, seq=stop)

    def _begun(self, line: Line) -> None:
        """Note the part before, as the first line of the next one tells of it."""
        before = line["data"].get("previous")
        if isinstance(before, dict):
            first, last, size = (before.get(name) for name in ("first", "last", "size"))
            if isinstance(first, int) and isinstance(last, int) and isinstance(size, int):
                self._told[first] = last, size

    def _parts(self, parts: list[Part]) -> None:
        """Hold the sealed parts against what the log tells of them."""
        if self._found.hole:
            return
        there = {part.first: (part.last, part.size) for part in parts}
        begun = self._log.first_seq()
        for first in sorted({*there, *self._told}):
            found, told = there.get(first, (0, 0)), self._told.get(first, (0, 0))
            # where a repair gave lines up, the bytes that were told of are no longer there
            if first >= begun and (found[0] != told[0] or (found != told and not self._found.gaps)):
                why = f"up to seq {found[0]}, {found[1]} bytes; the log: {told[0]}, {told[1]}"
                self._found.report("state_differs", f"s/{first:016d}", why, seq=first)

    def _strays(self) -> None:
        """Report keys under the prefix that are none of the store's."""
        log = self._log
        known = {log.keys.head, log.keys.store}
        begin, end = log.keys.whole()
        for key in log.all_keys(begin, end):
            room = key[len(begin) :].split(b"/")[0].decode(errors="replace")
            if key not in known and room not in _ROOMS:
                name = key[len(begin) :].decode(errors="replace")
                self._found.report("stray", name, "it is no key of a store")
        for place in log.cursors.every():
            if place.damaged:
                self._found.report("cursor_corrupt", f"c/{place.name}", "it holds no seq")
