"""Fold a stretch of history onto an older state, checking that each line follows the one before."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from crewlog import events, fold, layout, segments
from crewlog.codec import Snapshot
from crewlog.directory import Directory
from crewlog.errors import CrewlogError, HistoryDiverged, LogCorrupt
from crewlog.events import Line
from crewlog.fold import Fold, FoldError
from crewlog.reader import Reader
from crewlog.segments import Position
from crewlog.store import Store

T = TypeVar("T")


def refold(
    directory: Directory,
    start: Snapshot,
    stop: Position,
    *,
    seen: Callable[[Line], None] | None = None,
) -> Snapshot:
    """Return the state at `stop`, which is durable, from that of `start`, which is not after it.

    `seen` is told of each line in between. *Raises* HistoryDiverged, LogCorrupt, ArchiveDamaged,
    SegmentMissing.
    """
    reader = Reader(directory, segments.find(directory, start.last_seq))

    def wrong(line: Line, raw: bytes, error: FoldError) -> LogCorrupt:
        return corrupt(reader.position, line, raw, error)

    try:
        lines = reader.read(stop)
        where = directory.where(layout.LOG)
        return refold_lines(lines, start, stop.seq, where=where, seen=seen, wrong=wrong)
    finally:
        reader.close()


def refold_lines(
    lines: Iterator[tuple[Line, bytes]],
    start: Snapshot,
    stop: int,
    *,
    where: str,
    wrong: Callable[[Line, bytes, FoldError], LogCorrupt],
    seen: Callable[[Line], None] | None = None,
) -> Snapshot:
    """Return the state at seq `stop`, from lines that may begin before that of `start`.

    `wrong` makes the error of a whole line that no correct writer can have written. *Raises* it,
    and HistoryDiverged.
    """
    state, prev = fold_of(start), start.last_hash

    def diverged(seq: int) -> HistoryDiverged:
        return HistoryDiverged(where, seq=seq)

    for line, raw in lines:
        if line["seq"] <= start.last_seq:
            continue
        if line["seq"] > stop:  # a gap stands for more than was asked for
            break
        prev = follow(state, line, raw, prev, diverged=diverged, wrong=wrong)
        if seen is not None:
            seen(line)
        if state.seq == stop:
            break
    return snapshot_of(state, store=start.store, last_hash=prev)


def follow(
    state: Fold,
    line: Line,
    raw: bytes,
    prev: str,
    *,
    diverged: Callable[[int], CrewlogError],
    wrong: Callable[[Line, bytes, FoldError], CrewlogError],
) -> str:
    """Fold a line that must follow the one with the hash `prev`, and return its own hash.

    *Raises* what `diverged` makes of the last seq that both have, where it follows another one;
    what `wrong` makes of a line that no correct writer can have written.
    """
    if line["prev"] != prev:
        raise diverged(line["seq"] - 1)
    try:
        state.apply(line)
    except FoldError as error:
        raise wrong(line, raw, error) from error
    return segments.hash_after(line, raw).hex()


def oldest_state(store: Store, first: int) -> Snapshot | None:
    """Return the oldest state that all lines after it are kept of, where `first` is the oldest.

    Beside a retention, or after one that was killed, it may lie within what is to go next.
    """
    fitting = [kept for kept in store.snapshots() if kept.last_seq >= first - 1]
    return min(fitting, key=lambda kept: kept.last_seq, default=None)


def state_before(store: Store, first: int) -> Snapshot | None:
    """Return the state that the line `first` leads on from; None where none of it is kept."""
    return next((kept for kept in store.snapshots() if kept.last_seq == first - 1), None)


def retried(work: Callable[[], T], *errors: type[Exception]) -> T:
    """Do the work, again where one of these says that a compaction took what it was to read."""
    for _ in range(layout.SEGMENT_OPEN_TRIES - 1):
        with contextlib.suppress(*errors):
            return work()
    return work()


def fold_of(snapshot: Snapshot) -> Fold:
    """Begin a fold where a snapshot was taken."""
    return fold.restored(snapshot.last_seq, snapshot.sessions, snapshot.ended, snapshot.totals)


def snapshot_of(state: Fold, *, store: str, last_hash: str) -> Snapshot:
    """Copy a state out of a fold; `last_hash` is the hex digest of the last line it has seen."""
    return Snapshot(
        store=store,
        last_seq=state.seq,
        last_hash=last_hash,
        written_at=events.timestamp(events.now()),
        sessions=list(state.sessions()),
        ended=list(state.ended()),
        totals=state.totals.copy(),
    )


def corrupt(place: Position, line: Line, raw: bytes, error: FoldError) -> LogCorrupt:
    """Return the error of a whole line that no correct writer can have written."""
    return LogCorrupt(
        layout.segment_name(place.segment),
        offset=place.offset - len(raw) - 1,
        seq=line["seq"],
        reason=str(error),
        proof="its crc is right",
    )
