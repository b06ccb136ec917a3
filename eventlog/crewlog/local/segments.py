"""Find, open and read segments, wherever they are; put a new segment in place.

Segments move from log/ to archive/ when a compaction no longer needs them, and there small ones are
put together in one file; a reader follows them. From the moment that a merged archive has its name
nobody looks at the smaller ones that it covers; whoever asks for a segment within it gets just that
segment, so a list of segments stays good whatever happens meanwhile.

Every line that is handed out was checked by itself and for its seq; a sieve lets others pass by.
"""

import errno
import os
import re
from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

from crewlog import host
from crewlog.errors import ArchiveDamaged, LogCorrupt, LogRegressed, SegmentMissing, from_oserror
from crewlog.host import Closable
from crewlog.local import archive, disk, layout
from crewlog.local.archive import PackingError
from crewlog.local.disk import Stamp
from crewlog.local.layout import Directory
from crewlog.model import codec, events
from crewlog.model.chain import Position, follows, is_end
from crewlog.model.codec import LineError
from crewlog.model.events import Line
from crewlog.model.fold import FoldError
from crewlog.model.sieve import Sieve, type_needle
from crewlog.model.snapshot import SNAPSHOT_BYTES_MAX

_OPEN_TRIES: Final = 8
HEADER_BYTES: Final = 1024  # a segment's first line ends within these


class Segment(Closable):
    """The bytes of one segment: of log/, or in memory of archive/, or as the redo completes it."""

    __slots__ = ("_data", "_file", "archived", "fd", "first", "name")

    def __init__(
        self,
        first: int,
        name: str,
        *,
        fd: int = -1,
        data: bytes | None = None,
        archived: bool = False,
    ) -> None:
        """Wrap an open descriptor or bytes in memory; `archived`: it came from archive/."""
        self.first = first
        self.name = name
        self.archived = archived
        self.fd = fd  # -1 for one that is in memory
        self._file = host.NO_FILE if fd < 0 else host.own(fd)
        self._data = data

    def size(self) -> int:
        """Return how many bytes it has at this moment."""
        if self._data is not None:
            return len(self._data)
        try:
            return disk.size_of(self.fd)
        except OSError as error:
            raise from_oserror(error, "cannot read the log", where=self.name) from error

    def is_copy(self) -> bool:
        """Say whether it is a segment of log/ in memory: as the redo completes it."""
        return self._data is not None and not self.archived

    def is_gone(self) -> bool:
        """Say whether another file may bear its name: it was archived, repaired or recovered."""
        if self._data is None:
            return os.fstat(self.fd).st_nlink == 0
        return self.is_copy()

    def read(self, offset: int, size: int) -> bytes:
        """Read up to `size` bytes at `offset`.

        Raises: StorageFailed.
        """
        if self._data is not None:
            return self._data[offset : offset + size]
        try:
            return disk.read_at(self.fd, offset, size)
        except OSError as error:
            raise from_oserror(error, "cannot read the log", where=self.name) from error

    def whole(self) -> bytes:
        """Read all that it has at this moment."""
        return self.read(0, self.size())

    def close(self) -> None:
        """Close the descriptor."""
        fd, self.fd = self.fd, -1  # first: a child forked between must not close it again
        if fd >= 0:
            host.close_own(fd, self._file)


class Segments:
    """The segments of a store as one reader or one writer finds them, wherever they lie.

    `completed` holds the last segment as the redo completes it, by first seq, from the moment on at
    which its owner judged the end of the log after a power cut until a writer has recovered it.
    """

    __slots__ = ("completed", "directory")

    def __init__(self, directory: Directory) -> None:
        """Look into an open store; nothing is read yet."""
        self.directory = directory
        self.completed: dict[int, bytes] = {}

    def in_log(self) -> list[int]:
        """List the segments in log/ by first seq; the last one is active."""
        names = self.directory.names(layout.LOG)
        firsts = (layout.first_seq_of(name) for name in names)
        return [first for first in firsts if first is not None]

    def in_archive(self) -> list[int]:
        """List the archived segments by first seq."""
        return [one.first for one in archives(self.directory)]

    def is_merged(self, first: int) -> bool:
        """Say whether a segment lies within an archive that begins before it."""
        return any(one.first < first <= one.last for one in archives(self.directory))

    def all(self) -> list[int]:
        """List every segment, archived or not, by first seq; merged ones count as one."""
        # log/ last: a segment that moves meanwhile is then seen at least once
        before = set(self.in_archive())
        return sorted(before | set(self.in_log()) | set(self.in_archive()))

    def find(self, after: int) -> Position:
        """Return the start of the segment that holds the line after seq `after`.

        Raises: SegmentMissing if none does because it is gone.
        """
        firsts = self.all()
        fitting = [first for first in firsts if first <= after + 1]
        if not fitting:
            raise SegmentMissing(
                self.directory.where(layout.LOG),
                first=after + 1,
                last=firsts[0] - 1 if firsts else after + 1,
            )
        return start_of(fitting[-1])

    def open(self, first: int) -> Segment:
        """Open a segment wherever it is now.

        Raises: SegmentMissing if it is nowhere, ArchiveDamaged if its archive cannot be read.
        """
        directory, name = self.directory, layout.segment_name(first)
        completed = self.completed.get(first)
        if completed is not None:
            return Segment(first, name, data=completed)
        for _ in range(_OPEN_TRIES):
            where = directory.where(layout.LOG, name)
            with disk.failures("cannot read the log", where=where):
                try:
                    fd = disk.open_file(name, at=directory[layout.LOG], where=where)
                except FileNotFoundError:
                    pass  # archived meanwhile, or missing
                else:
                    return Segment(first, name, fd=fd)
                try:
                    packed_name, data = _archived(directory, first)
                    return Segment(first, packed_name, data=data, archived=True)
                except FileNotFoundError:
                    continue  # a reader may meet the moment between two directory reads
        later = [other for other in self.all() if other > first]
        last = later[0] - 1 if later else first
        raise SegmentMissing(directory.where(layout.LOG), first=first, last=last)

    def is_ours(self, first: int) -> bool:
        """Say whether a file under a segment's name begins with that header of this store.

        It does from the moment that it has its name: any other was put there by somebody else.
        """
        with self.open(first) as source:
            data = source.read(0, HEADER_BYTES)
        try:
            line = codec.parse(data[: data.find(b"\n")])
        except LineError:
            return False
        return line["seq"] == first and line["data"].get("store") == self.directory.store

    def open_to_append(self, first: int) -> Segment:
        """Open a segment for appending. Held: locks/append or a sync lock.

        Raises: LogRegressed if it is gone.
        """
        name, at = layout.segment_name(first), self.directory[layout.LOG]
        where = self.directory.where(layout.LOG, name)
        try:
            fd = disk.open_file(name, at=at, where=where, change=True, append=True)
        except FileNotFoundError as error:
            raise LogRegressed(where, why="the state files name this segment") from error
        return Segment(first, name, fd=fd)


class Archive(NamedTuple):
    """A file in archive/, and the seqs that it is named by: of one segment only the first."""

    first: int
    last: int
    name: str

    def holds(self, first: int) -> bool:
        """Say whether a segment that begins so is in it."""
        return self.first <= first <= self.last


def archives(directory: Directory) -> list[Archive]:
    """List the archives, but for those that a merged one covers."""
    outer, covered = [], 0
    for one in _every_archive(directory):
        if one.first > covered:
            outer.append(one)
            covered = one.last
    return outer


def covered_archives(directory: Directory) -> list[tuple[str, Archive]]:
    """Name the archives that a merged one covers, and which: nobody looks at them any more."""
    covered, large = [], None
    for one in _every_archive(directory):
        if large is not None and one.first <= large.last:
            covered.append((one.name, large))
        elif one.last > one.first:
            large = one
    return covered


def _every_archive(directory: Directory) -> list[Archive]:
    """List all archives in order, of those that begin alike the longest first."""
    ranks = []
    for name in directory.names(layout.ARCHIVE):
        first = layout.first_seq_of(name)
        seqs = layout.merged_seqs_of(name) if first is None else (first, first)
        if seqs is not None:
            ranks.append((seqs[0], -seqs[1], name))
    return [Archive(first, -last, name) for first, last, name in sorted(ranks)]


def own_archive(directory: Directory, first: int) -> str | None:
    """Name the file in archive/ that holds one segment alone, however it is packed."""
    for packing_ in layout.ARCHIVE_SUFFIXES:
        name = layout.archive_name(first, packing_)
        if disk.exists(name, at=directory[layout.ARCHIVE]):
            return name
    return None


def archive_file(directory: Directory, first: int) -> str | None:
    """Name the file in archive/ that a segment is in, alone or merged; None: there is none."""
    own = own_archive(directory, first)
    if own is not None:  # there may be very many, and nearly all are of one segment
        return own
    return next((one.name for one in archives(directory) if one.holds(first)), None)


def archive_of(directory: Directory, first: int) -> str:
    """Name the file in archive/ that a segment is in, or would be."""
    return archive_file(directory, first) or layout.archive_name(first)


def unpacked(directory: Directory, name: str) -> bytes:
    """Return what a packed file of archive/ holds.

    Raises: FileNotFoundError, PackingError, UnsafePermissions; Unsupported where zstd is missing.
    """
    where, at = directory.where(layout.ARCHIVE, name), directory[layout.ARCHIVE]
    packed = disk.read_all(name, at=at, where=where, limit=SNAPSHOT_BYTES_MAX)
    return archive.unpack(packed, name=name, where=where)


def _archived(directory: Directory, first: int) -> tuple[str, bytes]:
    """Return the name and the content of an archive, or of the one segment within it.

    Raises: FileNotFoundError where there is none; ArchiveDamaged.
    """
    name = archive_of(directory, first)
    try:
        data = unpacked(directory, name)
    except PackingError as error:
        raise ArchiveDamaged(name, offset=0, seq=first, reason=str(error)) from error
    seqs = layout.merged_seqs_of(name)
    if seqs is None or seqs[0] == first:
        return name, data
    for begin, content in parts(data):
        if begin == first:
            return name, content
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


# How a header line begins, whatever the texts of other lines say.
_HEADER: Final = re.compile(rb'^\{"v":1,"seq":(\d+),"ts":"[^"]*","type":"_segment"', re.MULTILINE)


def parts(data: bytes) -> list[tuple[int, bytes]]:
    """Cut a merged archive into its segments, each with its first seq."""
    headers = list(_HEADER.finditer(data))
    ends = [*(header.start() for header in headers[1:]), len(data)]
    return [
        (int(header[1]), data[header.start() : end])
        for header, end in zip(headers, ends, strict=False)
    ]


def start_of(first: int) -> Position:
    """Return the position before a segment's header line."""
    return Position(first, 0, first - 1)


def put(directory: Directory, first: int, header: bytes) -> None:
    """Put a new segment in place: durable with its header before it gets its name.

    The name is not durable before the caller has synced log/. Harmless to repeat after an
    interruption. Held by the caller: locks/append.
    """
    via, at = directory.disk, directory[layout.LOG]
    temporary = f"{disk.TEMPORARY_PREFIX}{os.getpid()}"
    sweep(directory, layout.LOG)
    disk.write_new(via, temporary, header, at=at)
    try:
        via.link(temporary, layout.segment_name(first), at=at, new_at=at)
    finally:
        via.unlink(temporary, at=at)


def sweep(directory: Directory, part: str) -> None:
    """Remove temporary files; the lock that the caller holds proves that no writer has one open."""
    for name in directory.names(part):
        if disk.is_temporary(name):
            directory.disk.unlink(name, at=directory[part])


# -- lines, forwards through segments, or the newest first ------------------------------------

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

    def skip_to(self, position: Position) -> bool:
        """Go on behind lines that need not be read; False, and nothing, in another segment."""
        if position.segment != self._segment:
            return False
        self.position = position
        return True

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
            completed = segment in self._segments.completed
            if not (completed or self._stamp.moved() or held.is_copy()):
                return held
            if not (completed or held.is_gone()):
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
        held, self._source = self._source, None  # first: an interrupt must not leave it closed
        if held is not None:
            held.close()


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
    headers: list[Line] = []
    begin, sieve = first, Sieve([type_needle(events.SEGMENT)])
    while begin < upto:
        with segments.open(begin) as source:
            archived, begins = source.archived, begin
            for line, _, _, seq in walk(source, start_of(begin), sieve=sieve if archived else None):
                if line is not None and (seq == begins or line["type"] == events.SEGMENT):
                    headers.append(line)
                begin = seq + 1
                if not archived:  # in log/ there is one header a file
                    return headers
            if begin == begins:
                raise damaged(source, 0, begin, "it is empty")
    return headers


def raw_between(segments: Segments, start: Position, end: Position) -> Iterator[bytes]:
    """Yield the bytes of whole lines between two positions, unchecked."""
    place = start
    while place.seq < end.seq:
        with segments.open(place.segment) as source:
            stop = end.offset if place.segment == end.segment else source.size()
            data = source.read(place.offset, stop - place.offset)
            if len(data) < stop - place.offset:
                at = place.offset + len(data)
                raise LogRegressed(source.name, why=f"it ends at byte {at}, {stop} were written")
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
