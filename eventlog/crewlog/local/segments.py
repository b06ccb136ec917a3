"""Find and open segments, wherever they are; put a new segment in place.

Segments move from log/ to archive/ when a compaction no longer needs them, and there small ones are
put together in one file; a reader follows them. From the moment that a merged archive has its name
nobody looks at the smaller ones that it covers; whoever asks for a segment within it gets just that
segment, so a list of segments stays good whatever happens meanwhile.
"""

import errno
import os
import re
from typing import Final, NamedTuple

from crewlog import host
from crewlog.errors import ArchiveDamaged, LogRegressed, SegmentMissing, from_oserror
from crewlog.host import Closing
from crewlog.local import archive, disk, layout
from crewlog.local.archive import PackingError
from crewlog.local.directory import Directory
from crewlog.model import codec
from crewlog.model.chain import Position
from crewlog.model.codec import LineError
from crewlog.model.snapshot import SNAPSHOT_BYTES_MAX

_OPEN_TRIES: Final = 8
HEADER_BYTES: Final = 1024  # a segment's first line ends within these


class Segment(Closing):
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
    found, covered = [], 0
    for one in _every_archive(directory):
        if one.first > covered:
            found.append(one)
            covered = one.last
    return found


def covered_archives(directory: Directory) -> list[tuple[str, Archive]]:
    """Name the archives that a merged one covers, and which: nobody looks at them any more."""
    found, large = [], None
    for one in _every_archive(directory):
        if large is not None and one.first <= large.last:
            found.append((one.name, large))
        elif one.last > one.first:
            large = one
    return found


def _every_archive(directory: Directory) -> list[Archive]:
    """List all archives in order, of those that begin alike the longest first."""
    found = []
    for name in directory.names(layout.ARCHIVE):
        first = layout.first_seq_of(name)
        seqs = layout.merged_seqs_of(name) if first is None else (first, first)
        if seqs is not None:
            found.append((seqs[0], -seqs[1], name))
    return [Archive(first, -last, name) for first, last, name in sorted(found)]


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
    found = list(_HEADER.finditer(data))
    ends = [*(header.start() for header in found[1:]), len(data)]
    return [
        (int(header[1]), data[header.start() : end])
        for header, end in zip(found, ends, strict=False)
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
