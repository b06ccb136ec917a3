"""Compact: collect, seal, fold the sealed segments into registry.json, archive what is covered.

Writers never wait for a fold: it reads sealed, immutable segments. The commit point is the
durable rename in snapshot.replace; killed before it, the old snapshot and every segment that it
needs are in place, killed after it, the next compaction archives what this one had not.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final, TypedDict, cast

from crewlog.errors import SegmentMissing, SnapshotCorrupt
from crewlog.local import cursors, disk, layout, snapshot
from crewlog.local.log import Log
from crewlog.local.segments import Reader, start_of, sweep
from crewlog.local.snapshot import refold
from crewlog.model import events
from crewlog.model.arguments import Packing
from crewlog.model.chain import Position
from crewlog.model.snapshot import OnTheWay, Snapshot
from crewlog.store import Store, retried
from crewlog_compactor import retention
from crewlog_compactor.collect import Collect
from crewlog_compactor.local import archive, retain
from crewlog_compactor.reports import CompactReport
from crewlog_compactor.retention import Keep

_logger: Final = logging.getLogger("crewlog.compact")


def compact(
    store: Store,
    *,
    packing: Packing,
    collect: Collect,
    keep_history: Keep,
    dry_run: bool,
) -> CompactReport:
    """Do the job in a directory; see `crewlog_compactor.compact`."""
    log = cast("Log", store)  # its kind says so
    with disk.failures("cannot compact", where=log.directory.where()):
        if dry_run:
            return _foretold(log, packing, collect, keep_history)
        with log.take_compact_lock():
            return _compact(log, packing, collect, keep_history)


def _compact(log: Log, packing: Packing, collect: Collect, keep: Keep) -> CompactReport:
    """Do the whole job. Held: locks/compact."""
    _sweep(log)
    collected, refused = collect()
    if _has_events(log):
        log.rotate()
    folded, current = _fold(log)
    if folded:
        log.note(events.SNAPSHOT, {"last_seq": current.last_seq, "sha256": current.sha256})
    moved = _archive(log, packing)
    dropped = retain.retain(log, keep)
    archive.merge(log.segments, packing=packing)
    return CompactReport(
        folded_events=folded,
        snapshot_seq=current.last_seq,
        archived_segments=moved,
        dropped=dropped,
        collected=collected,
        refused=refused,
    )


def _foretold(log: Log, packing: Packing, collect: Collect, keep: Keep) -> CompactReport:
    """Say what the job would do. No lock is taken: where one is under way it looks again."""
    collected, refused = collect()
    report = CompactReport(
        folded_events=0,
        snapshot_seq=0,
        archived_segments=0,
        dropped=None,
        collected=collected,
        refused=refused,
        dry_run=True,
    )
    added = 0 if collected is None else collected.changed
    work = partial(_foreseen, log, packing, keep, added)
    return replace(report, **retried(work, SegmentMissing, FileNotFoundError))


class _Foreseen(TypedDict):
    """What a compaction would do to the files."""

    folded_events: int
    snapshot_seq: int
    archived_segments: int
    dropped: tuple[int, int] | None


def _foreseen(log: Log, packing: Packing, keep: Keep, added: int) -> _Foreseen:
    """Go the way of `_compact`, counting what it adds; `added` events come of the collection."""
    head, current = log.head(), snapshot.newest(log.directory)
    sealing = added > 0 or _has_events(log)
    if sealing:
        log.require_sound()
    sealed = head.seq + added + 1 if sealing else head.segment - 1  # its seal, too
    folding = sealed > current.last_seq
    last = head.seq + added + 2 * sealing + folding  # a seal and a header, a note of the snapshot
    before = current if folding else _previous(log)
    coming = archive.due(log.segments, covered=0 if before is None else before.last_seq)
    for first in coming:
        archive.require_intact(log.segments, first)
    sizes = {first: partial(archive.packed_bytes, log.segments, first, packing) for first in coming}
    going = retain.due(log, keep, last_seq=last, coming=sizes)
    if going and not coming:  # what is archived only then is whole, as was just seen
        retain.base_at(log.segments, going[-1].last)
    return {
        "folded_events": sealed - current.last_seq if folding else 0,
        "snapshot_seq": max(sealed, current.last_seq),
        "archived_segments": len(coming),
        "dropped": retention.span(going),
    }


def _sweep(log: Log) -> None:
    """Remove what a killed compaction left; the compact lock proves that no other one runs."""
    sweep(log.directory, "")
    sweep(log.directory, layout.ARCHIVE)
    archive.sweep_covered(log.directory)
    cursors.sweep(log.directory, now=time.time())


def _has_events(log: Log) -> bool:
    """Say whether the active segment holds more than the store's own lines."""
    head = log.head()
    reader = Reader(log.segments, start_of(head.segment))
    try:
        lines = reader.read(head.position)
        return any(not events.is_own(line["type"]) for line, _ in lines)
    finally:
        reader.close()


def _fold(log: Log) -> tuple[int, Snapshot]:
    """Fold the sealed segments onto the snapshot and replace it, if there is anything new."""
    directory = log.directory
    current = snapshot.newest(directory)
    last = log.head().segment - 1  # published once the segment's name was durable
    if last <= current.last_seq:
        return 0, current
    stop = Position(0, 0, last)
    fresh = refold(log.segments, current, stop, on_the_way=_keeper(log, last))
    return fresh.last_seq - current.last_seq, snapshot.replace(directory, fresh)


def _keeper(log: Log, last: int) -> OnTheWay:
    """Return what keeps states of the past, of some ends of segments up to `last`.

    Of many workers one is kept less often, so that states take no more room than what they save.
    """
    ends = {first - 1 for first in log.segments.in_log() if first - 1 < last} | {last}
    before = max([0, *(seq for seq in snapshot.kept(log.directory) if seq <= last)])

    def keep(seq: int, workers: int, state: Callable[[], Snapshot]) -> None:
        nonlocal before
        if seq in ends and seq - before >= max(log.limits.state_events, workers):
            snapshot.keep(log.directory, state())
            before = seq

    return keep


def _archive(log: Log, packing: Packing) -> int:
    """Archive what the previous snapshot covers too, so that two generations can be rebuilt."""
    previous = _previous(log)
    if previous is None:
        return 0
    return len(archive.archive_covered(log.segments, covered=previous.last_seq, packing=packing))


def _previous(log: Log) -> Snapshot | None:
    """Return the snapshot before the current one; of a damaged one nothing is archived."""
    try:
        return snapshot.read(log.directory, layout.SNAPSHOT_PREV)
    except SnapshotCorrupt as error:  # the next one that is folded takes its place
        _logger.warning("%s", error)
        return None
