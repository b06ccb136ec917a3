"""Fold a stretch of history onto an older state, checking that each line follows the one before."""

from collections.abc import Callable

from crewlog import events, fold, layout, segments
from crewlog.codec import Snapshot
from crewlog.directory import Directory
from crewlog.errors import HistoryDiverged, LogCorrupt
from crewlog.events import Line
from crewlog.fold import FoldError
from crewlog.reader import Reader
from crewlog.segments import Position


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
    state = fold.restored(start.last_seq, start.sessions, start.ended, start.totals)
    reader = Reader(directory, segments.find(directory, start.last_seq))
    prev = start.last_hash
    try:
        for line, raw in reader.read(stop):
            if line["seq"] <= start.last_seq:
                continue
            if line["seq"] > stop.seq:  # a gap stands for more than was asked for
                break
            if line["prev"] != prev:
                name = layout.segment_name(reader.position.segment)
                raise HistoryDiverged(directory.where(layout.LOG, name), seq=line["seq"] - 1)
            prev = segments.hash_after(line, raw).hex()
            try:
                state.apply(line)
            except FoldError as error:
                raise corrupt(reader.position, line, raw, error) from error
            if seen is not None:
                seen(line)
            if state.seq == stop.seq:
                break
    finally:
        reader.close()
    return Snapshot(
        store=directory.store,
        last_seq=state.seq,
        last_hash=prev,
        written_at=events.timestamp(events.now()),
        sessions=list(state.sessions()),
        ended=list(state.ended()),
        totals=state.totals,
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
