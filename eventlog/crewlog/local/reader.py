"""Read the log: walk the lines of a segment, forwards through segments, or the newest first.

Every line that is handed out was checked by itself and for its seq; a sieve lets others pass by.
"""

from collections.abc import Iterator
from typing import Final, TypeAlias

from crewlog.errors import ArchiveDamaged, LogCorrupt, LogRegressed, SegmentMissing
from crewlog.local import layout
from crewlog.local.directory import Directory
from crewlog.local.disk import Stamp
from crewlog.local.segments import HEADER_BYTES, Segment, Segments, start_of
from crewlog.model import codec, events
from crewlog.model.chain import Position, follows, is_end
from crewlog.model.codec import LineError
from crewlog.model.events import Line
from crewlog.model.fold import FoldError
from crewlog.model.sieve import Sieve, type_needle

READ_BYTES: Final = 256 * 1024
SIEVE_BYTES: Final = 1024 * 1024


# A line (None: passed over), its bytes, and where it ends: offset and seq. A plain tuple: there may
# be millions of them.
Walked: TypeAlias = tuple[Line | None, bytes, int, int]


def walk(
    source: Segment, start: Position, *, end: int | None = None, sieve: Sieve | None = None
) -> Iterator[Walked]:
    """Walk from a position up to `end` bytes, or to the end of the segment.

    Lines that the `sieve` does not hold back are passed over unparsed.
    Raises: LogCorrupt or ArchiveDamaged at the first line that fails, LogRegressed where the file
    ends before `end`: the caller has proof that these bytes were durable.
    """
    offset, seq = start.offset, start.seq
    stop = source.size() if end is None else end
    step = READ_BYTES if sieve is None else SIEVE_BYTES
    while offset < stop:
        data = _whole_lines(source, offset, stop, step, seq)
        if sieve is None:
            for raw in data.split(b"\n")[:-1]:
                line = _parsed(source, raw, offset, seq + 1)
                offset, seq = offset + len(raw) + 1, line["seq"]
                yield line, raw, offset, seq
        else:
            passed = 0
            for begin, newline in sieve.lines(data):
                due = seq + 1 + data.count(b"\n", passed, begin)
                raw = data[begin:newline]
                line = _parsed(source, raw, offset + begin, due)
                seq, passed = line["seq"], newline + 1
                yield line, raw, offset + passed, seq
            offset, seq = offset + len(data), seq + data.count(b"\n", passed)
            if passed < len(data):
                yield None, b"", offset, seq


def _whole_lines(source: Segment, offset: int, stop: int, step: int, seq: int) -> bytes:
    """Read on to the last newline within `step` bytes, or to the first one after them."""
    while True:
        size = min(step, stop - offset)
        data = source.read(offset, size)
        if len(data) < size:
            at = offset + len(data)
            raise LogRegressed(source.name, why=f"it ends at byte {at}, {stop} were durable")
        whole = data.rfind(b"\n") + 1
        if whole:
            return data if whole == size else data[:whole]
        if offset + size == stop:
            raise damaged(source, offset, seq + 1, "no newline at the end of a durable line")
        if size > codec.LINE_BYTES_CEILING:
            raise damaged(source, offset, seq + 1, "no newline where one must be")
        step *= 2


def _parsed(source: Segment, raw: bytes, offset: int, seq: int) -> Line:
    try:
        line = codec.parse(raw)
    except LineError as error:
        raise damaged(source, offset, seq, str(error)) from error
    if not follows(line, seq):
        raise damaged(source, offset, seq, f"seq is {line['seq']}")
    return line


def damaged(source: Segment, offset: int, seq: int, reason: str) -> LogCorrupt | ArchiveDamaged:
    """Return the error of a damaged line, by where its segment lies."""
    if source.archived:
        return ArchiveDamaged(source.name, offset=offset, seq=seq, reason=reason)
    return LogCorrupt(
        source.name, offset=offset, seq=seq, reason=reason, proof="these bytes were durable"
    )


class Reader:
    """Read on from a position, through rotations and the archive, one segment open at a time."""

    __slots__ = (
        "_offset", "_segment", "_segments", "_seq", "_sieve", "_skip", "_source", "_stamp",
    )  # fmt: skip

    def __init__(
        self, segments: Segments, position: Position, *, sieve: Sieve | None = None
    ) -> None:
        """Begin at `position`; lines that the `sieve` does not hold back are passed over."""
        self._segments = segments
        self._source: Segment | None = None
        self._sieve = sieve
        self._stamp = Stamp(segments.directory[layout.LOG])
        self._skip = 0  # lines up to this seq were read in a file that was replaced since
        self.position = position

    @property
    def position(self) -> Position:
        """Return the position after the last line that was read."""
        return Position(self._segment, self._offset, self._seq)

    @position.setter
    def position(self, position: Position) -> None:
        self._segment, self._offset, self._seq = position

    def read(self, stop: Position) -> Iterator[tuple[Line, bytes]]:
        """Yield (line, raw) up to the durable position `stop`; `position` moves along.

        Raises: LogCorrupt, ArchiveDamaged, SegmentMissing; the position stays before the damage.
        """
        while self._seq < stop.seq:
            segment = self._segment
            end = stop.offset if segment == stop.segment else None
            ended = True
            source = self._open(segment)
            begun = self.position
            for line, raw, offset, seq in walk(source, begun, end=end, sieve=self._sieve):
                if seq > stop.seq:  # in one file with what comes after it
                    return
                self._offset, self._seq = offset, seq
                ended = line is None or is_end(line)
                if line is not None and seq > self._skip:
                    yield line, raw
            if self._seq >= stop.seq:
                return
            if self.position == begun and begun.offset == 0:
                raise damaged(self._open(segment), 0, segment, "it is empty")
            if not ended:
                raise self._unsealed()
            self.position = start_of(self._seq + 1)

    def _unsealed(self) -> LogCorrupt:
        return LogCorrupt(
            layout.segment_name(self.position.segment),
            offset=self.position.offset,
            seq=self.position.seq + 1,
            reason="the segment ends without a seal",
            proof="a later segment exists",
        )

    def _open(self, segment: int) -> Segment:
        held = self._source
        if held is not None and held.first == segment:
            if not self._stamp.moved() and not held.is_copy():
                return held
            if not held.is_gone():
                self._stamp.settle()
                return held
            try:
                fresh = self._segments.open(segment)
            except SegmentMissing:  # nothing took its place: what we hold is what there was
                return held
            self._skip = self.position.seq  # offsets may differ in what took its place
            self.position = start_of(segment)
        else:
            fresh = self._segments.open(segment)
            if fresh.archived and fresh.size() < self._offset:  # merged, and that with still more
                fresh.close()
                self._skip = self._seq
                self.position = self._segments.find(self._seq)
                fresh = self._segments.open(self._segment)
        self.close()
        self._source = fresh
        _require_ours(self._segments.directory, fresh)
        return fresh

    def close(self) -> None:
        """Close the open segment."""
        if self._source is not None:
            self._source.close()
            self._source = None


def _require_ours(directory: Directory, source: Segment) -> None:
    """Refuse a segment that another store's was put in the place of."""
    first = source.read(0, HEADER_BYTES)
    if first and directory.store.encode() not in first:
        raise damaged(source, 0, source.first, "its first line does not name this store")


def backwards(
    segments: Segments, head: Position, *, sieve: Sieve | None = None
) -> Iterator[tuple[Line, bytes]]:
    """Yield (line, raw) from the durable `head` back to the oldest that is kept.

    One segment is in memory at a time.
    Raises: LogCorrupt, ArchiveDamaged, SegmentMissing.
    """
    due = head.seq  # the last seq of the segment that comes next
    for first in reversed([f for f in segments.all() if f <= head.segment]):
        try:
            steps = list(_forwards(segments, first, due, head, sieve))
        except SegmentMissing:
            if first < segments.all()[0]:
                return  # a retention took it, and what was before it, meanwhile
            raise
        yield from ((line, raw) for line, raw, _, _ in reversed(steps) if line is not None)
        due = first - 1


def _forwards(
    segments: Segments, first: int, due: int, head: Position, sieve: Sieve | None
) -> Iterator[Walked]:
    """Walk from a segment's first line to seq `due`, its last one when segments were listed.

    Archives may be put together meanwhile: then it ends sooner, or later.
    """
    seq = first - 1
    while seq < due:
        begin = seq + 1
        with segments.open(begin) as source:
            _require_ours(segments.directory, source)
            end = head.offset if begin == head.segment else None
            for step in walk(source, start_of(begin), end=end, sieve=sieve):
                if step[-1] > due:
                    break
                seq = step[-1]
                yield step
            else:
                if seq < begin:
                    raise damaged(source, 0, begin, "it is empty")
                continue
            seq = due


def first_line(segments: Segments, first: int) -> Line | None:
    """Return the first whole line of a segment; None if it has none."""
    with segments.open(first) as source:
        return next((line for line, *_ in walk(source, start_of(first)) if line), None)


def segment_headers(segments: Segments, first: int, upto: int) -> list[Line]:
    """Return the first line of a segment, and of those that are merged with it, before seq `upto`.

    Archives may be put together since the segments were listed, as for `_forwards`.
    """
    found: list[Line] = []
    begin, sieve = first, Sieve([type_needle(events.SEGMENT)])
    while begin < upto:
        with segments.open(begin) as source:
            archived, begins = source.archived, begin
            for line, _, _, seq in walk(source, start_of(begin), sieve=sieve if archived else None):
                if line is not None and (seq == begins or line["type"] == events.SEGMENT):
                    found.append(line)
                begin = seq + 1
                if not archived:  # in log/ there is one header a file
                    return found
            if begin == begins:
                raise damaged(source, 0, begin, "it is empty")
    return found


def raw_between(segments: Segments, start: Position, end: Position) -> Iterator[bytes]:
    """Yield the bytes of whole lines between two positions, unchecked."""
    place = start
    while place.seq < end.seq:
        with segments.open(place.segment) as source:
            stop = end.offset if place.segment == end.segment else source.size()
            data = source.read(place.offset, stop - place.offset)
            last = _last_seq(source, data, place)
        yield data
        if place.segment == end.segment:
            return
        place = start_of(last + 1)  # no list of segments: it might be of another moment


def _last_seq(source: Segment, data: bytes, before: Position) -> int:
    """Return the seq of the last of some whole lines that follow a position."""
    if not data and before.offset == 0:
        raise damaged(source, 0, before.seq + 1, "it is empty")
    if not data:
        return before.seq
    try:
        return codec.parse(data[data.rfind(b"\n", 0, -1) + 1 : -1])["seq"]
    except LineError as error:
        raise damaged(source, before.offset, before.seq + 1, str(error)) from error


def corrupt(place: Position, line: Line, raw: bytes, error: FoldError) -> LogCorrupt:
    """Return the error of a whole line that no correct writer can have written."""
    return LogCorrupt(
        layout.segment_name(place.segment),
        offset=place.offset - len(raw) - 1,
        seq=line["seq"],
        reason=str(error),
        proof="its crc is right",
    )
