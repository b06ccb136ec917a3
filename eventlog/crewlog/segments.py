"""Find and open segments, wherever they are; scan a tail; put a new segment in place.

A position is (segment, offset, seq): the segment by its first seq, the offset in bytes after the
last line read there, the seq of that line. Segments move from log/ to archive/ when a compaction
no longer needs them; a reader follows them there.
"""

import os
from typing import NamedTuple

from crewlog import codec, disk, events, layout, packing
from crewlog.closing import Closing
from crewlog.codec import LineError
from crewlog.directory import Directory
from crewlog.errors import ArchiveDamaged, LogRegressed, SegmentMissing
from crewlog.events import JsonObject, Line
from crewlog.packing import Packing, PackingError
from crewlog.recovery import Found
from crewlog.structs import AppendState, DurableHead


class Position(NamedTuple):
    """A place between two lines: everything up to `seq` was read."""

    segment: int
    offset: int
    seq: int


def durable_end(head: DurableHead) -> Position:
    """Return the position up to which events are durable."""
    return Position(head.segment, head.end, head.seq)


def written_end(state: AppendState) -> Position:
    """Return the position up to which lines are written."""
    return Position(state.segment, state.end, state.seq)


# -- finding --------------------------------------------------------------------------------


def active_and_sealed(directory: Directory) -> list[int]:
    """List the segments in log/ by first seq; the last one is active."""
    found = (layout.first_seq_of(name) for name in disk.names(directory[layout.LOG]))
    return [first for first in found if first is not None]


def archived(directory: Directory) -> list[int]:
    """List the archived segments by first seq."""
    found = (layout.first_seq_of(name) for name in disk.names(directory[layout.ARCHIVE]))
    return sorted({first for first in found if first is not None})


def all_of(directory: Directory) -> list[int]:
    """List every segment, archived or not, by first seq."""
    # log/ last: a segment that moves meanwhile is then seen at least once
    before = set(archived(directory))
    return sorted(before | set(active_and_sealed(directory)) | set(archived(directory)))


class Source(Closing):
    """The bytes of one segment: of log/, or in memory of archive/, or as the redo completes it."""

    __slots__ = ("_data", "_fd", "archived", "first", "name")

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
        self._fd = fd
        self._data = data

    @property
    def fd(self) -> int:
        """Return the descriptor, -1 for one that is in memory."""
        return self._fd

    def size(self) -> int:
        """Return how many bytes it has at this moment."""
        return disk.size_of(self._fd) if self._data is None else len(self._data)

    def is_copy(self) -> bool:
        """Say whether it is a segment of log/ in memory: as the redo completes it."""
        return self._data is not None and not self.archived

    def is_gone(self) -> bool:
        """Say whether another file may bear its name: it was archived, repaired or recovered."""
        if self._data is None:
            return os.fstat(self._fd).st_nlink == 0
        return self.is_copy()

    def read(self, offset: int, size: int) -> bytes:
        """Read up to `size` bytes at `offset`."""
        if self._data is None:
            return disk.read_at(self._fd, offset, size)
        return self._data[offset : offset + size]

    def whole(self) -> bytes:
        """Read all that it has at this moment."""
        return self.read(0, self.size())

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1  # first: a child forked between must not close it again
        if fd >= 0:
            os.close(fd)


def open_segment(directory: Directory, first: int) -> Source:
    """Open a segment wherever it is now.

    *Raises* SegmentMissing if it is nowhere, ArchiveDamaged if its archive cannot be read.
    """
    completed = directory.completed.get(first)
    if completed is not None:
        return Source(first, layout.segment_name(first), data=completed)
    for _ in range(layout.SEGMENT_OPEN_TRIES):
        name = layout.segment_name(first)
        where = directory.where(layout.LOG, name)
        with disk.failures("cannot read the log", where=where):
            try:
                fd = disk.open_file(name, at=directory[layout.LOG], where=where)
            except FileNotFoundError:
                pass  # archived meanwhile, or missing
            else:
                return Source(first, name, fd=fd)
            try:
                name, data = _unpacked(directory, first)
                return Source(first, name, data=data, archived=True)
            except FileNotFoundError:
                continue  # a reader may meet the moment between two directory reads
    raise SegmentMissing(
        directory.where(layout.LOG), first=first, last=_before_next(directory, first)
    )


def open_active(directory: Directory, first: int) -> Source:
    """Open a segment for appending. Held: locks/append or a sync lock.

    *Raises* LogRegressed if it is gone.
    """
    name = layout.segment_name(first)
    where = directory.where(layout.LOG, name)
    try:
        fd = disk.open_file(name, at=directory[layout.LOG], where=where, change=True, append=True)
    except FileNotFoundError as error:
        raise LogRegressed(where, why="the state files name this segment") from error
    return Source(first, name, fd=fd)


def _before_next(directory: Directory, first: int) -> int:
    later = [other for other in all_of(directory) if other > first]
    return later[0] - 1 if later else first


def archive_file(directory: Directory, first: int) -> str | None:
    """Name the file in archive/ that holds a segment, however it is packed; None: there is none."""
    for packing_ in layout.ARCHIVE_SUFFIXES:
        name = layout.archive_name(first, packing_)
        if disk.exists(name, at=directory[layout.ARCHIVE]):
            return name
    return None


def archive_name(directory: Directory, first: int, wanted: Packing = "gzip") -> str:
    """Name the archive of a segment: the one that is there, else one that is packed as wanted."""
    return archive_file(directory, first) or layout.archive_name(first, wanted)


def _unpacked(directory: Directory, first: int) -> tuple[str, bytes]:
    name = archive_name(directory, first)
    where = directory.where(layout.ARCHIVE, name)
    packed = disk.read_all(
        name, at=directory[layout.ARCHIVE], where=where, limit=layout.SNAPSHOT_BYTES_MAX
    )
    try:
        return name, packing.unpack(packed, name=name, where=where)
    except PackingError as error:
        raise ArchiveDamaged(name, offset=0, seq=first, reason=str(error)) from error


# -- following ------------------------------------------------------------------------------


def follows(line: Line, seq: int) -> bool:
    """Say whether a line may stand where `seq` is due; a gap stands for all that it names."""
    if line["type"] != events.GAP:
        return line["seq"] == seq
    told = line["data"]
    return told.get("first") == seq and told.get("last") == line["seq"] >= seq


def is_end(line: Line) -> bool:
    """Say whether a line ends its segment: a seal, or a gap that stands for one."""
    kind = line["type"]
    return kind == events.SEAL or (kind == events.GAP and line["data"].get("sealed") is True)


def hash_after(line: Line, raw: bytes) -> bytes:
    """Return the `prev` that the next line must have; behind a gap the lost line's is kept."""
    kept = line["data"].get("next_prev") if line["type"] == events.GAP else None
    return bytes.fromhex(kept) if isinstance(kept, str) else codec.digest(raw)


def start_of(first: int) -> Position:
    """Return the position before a segment's header line."""
    return Position(first, 0, first - 1)


def find(directory: Directory, after: int) -> Position:
    """Return the start of the segment that holds the line after seq `after`.

    *Raises* SegmentMissing if none does because it is gone.
    """
    firsts = all_of(directory)
    fitting = [first for first in firsts if first <= after + 1]
    if not fitting:
        raise SegmentMissing(
            directory.where(layout.LOG),
            first=after + 1,
            last=firsts[0] - 1 if firsts else after + 1,
        )
    return start_of(fitting[-1])


# -- scanning a tail ------------------------------------------------------------------------


def scan(data: bytes, *, offset: int, seq: int, prev: bytes | None, sealed: bool = False) -> Found:
    """Check lines one after the other, chain and batches included, and stop at the first failure.

    `data` begins at `offset` of its segment, after the line `seq` with the hash `prev` (None:
    trust the first line's own).
    """
    good = Found(
        end=offset,
        size=offset + len(data),
        seq=seq,
        hash=prev or b"",
        sealed=sealed,
        reason=None,
        synced=0,
    )
    at, end, last, hashed = 0, offset, seq, prev
    synced, reason = 0, None
    batch = (0, 0)  # the place that the next line must have in an open batch
    while at < len(data) and reason is None:
        newline = data.find(b"\n", at)
        raw = data[at : newline if newline >= 0 else len(data)]
        line, reason = _try(raw, last + 1, hashed, batch, whole=newline >= 0, sealed=good.sealed)
        if line is None:
            break
        at, end, last = newline + 1, end + len(raw) + 1, line["seq"]
        hashed = hash_after(line, raw)
        synced = max(synced, line["synced"])
        index, count = line.get("b", (0, 1))
        batch = (index + 1, count) if index + 1 < count else (0, 0)
        if batch == (0, 0):
            good = good._replace(end=end, seq=last, hash=hashed, sealed=is_end(line))
    if reason is None and batch != (0, 0):
        reason = "the batch is not complete"
    if reason is not None:
        synced = max(synced, _witnessed(data[good.end - offset :]))
    return good._replace(reason=reason, synced=synced)


def is_whole(data: bytes) -> bool:
    """Say whether bytes are whole lines that follow each other."""
    first = data[: data.find(b"\n")]
    try:
        seq = codec.parse(first)["seq"]
    except LineError:
        return False
    return scan(data, offset=0, seq=seq - 1, prev=None).reason is None


def _try(
    raw: bytes, seq: int, prev: bytes | None, batch: tuple[int, int], *, whole: bool, sealed: bool
) -> tuple[Line | None, str | None]:
    """Parse a line that must follow; the second value says why it does not."""
    if not whole:
        return None, "NUL bytes" if b"\0" in raw else "half a line"
    try:
        line = codec.parse(raw)
    except LineError as error:
        return None, str(error)
    if sealed:
        return None, "a line stands after the seal"
    if not follows(line, seq):
        return None, f"seq is {line['seq']}"
    if prev is not None and line["prev"] != prev.hex():
        return None, "prev differs from the hash of the line before"
    place = tuple(line.get("b", (0, 1)))
    if (place != batch) if batch != (0, 0) else (place[0] != 0):
        return None, "it is out of place in its batch"
    return line, None


def _witnessed(data: bytes) -> int:
    """Return the largest `synced` that any whole line in a damaged tail bears witness to."""
    synced = 0
    for raw in data.split(b"\n"):
        try:
            synced = max(synced, codec.parse(raw)["synced"])
        except LineError:  # part of the damage
            continue
    return synced


# -- the store's own lines ------------------------------------------------------------------


def own_line(
    kind: str, data: JsonObject, *, seq: int, ts: str, synced: int, prev: bytes
) -> tuple[bytes, Line]:
    """Write one of the store's own lines, and return it parsed as well."""
    part = codec.own_draft(kind, data)
    raw = codec.line(part, seq=seq, ts=ts, synced=synced, prev=prev, batch=None)
    return raw, codec.parse(raw[:-1])


def put(directory: Directory, first: int, header: bytes) -> None:
    """Put a new segment in place: durable with its header before it gets its name.

    The name is not durable before the caller has synced log/. Harmless to repeat after an
    interruption. Held by the caller: locks/append.
    """
    via, at = directory.disk, directory[layout.LOG]
    temporary = f"{layout.TEMPORARY_PREFIX}{os.getpid()}"
    sweep(directory, at)
    disk.write_new(via, temporary, header, at=at)
    try:
        via.link(temporary, layout.segment_name(first), at=at, new_at=at)
    finally:
        via.unlink(temporary, at=at)


def sweep(directory: Directory, at: int) -> None:
    """Remove temporary files; the lock that the caller holds proves that no writer has one open."""
    for name in disk.names(at):
        if layout.is_temporary(name):
            directory.disk.unlink(name, at=at)
