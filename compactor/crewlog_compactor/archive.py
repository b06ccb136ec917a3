"""Move sealed segments into the archive: compressed, checked, durable before the original goes."""

import itertools
import os

from crewlog import codec, disk, layout, packing, segments
from crewlog.directory import Directory
from crewlog.errors import ArchiveDamaged, LogCorrupt
from crewlog.packing import Packing, PackingError


def archive(directory: Directory, *, covered: int, packing: Packing) -> list[int]:
    """Archive every sealed segment whose last seq is at most `covered`; return their first seqs.

    Held: locks/compact. Interrupted anywhere, a segment is in log/, in archive/, or in both with
    the same content; the next call goes on from there.
    """
    coming = due(directory, covered=covered)
    for first in coming:
        _move(directory, first, packing)
    return coming


def due(directory: Directory, *, covered: int) -> list[int]:
    """Return the first seqs of the sealed segments whose last seq is at most `covered`."""
    pairs = itertools.pairwise(segments.active_and_sealed(directory))
    return [first for first, following in pairs if following - 1 <= covered]


def packed_bytes(directory: Directory, first: int, wanted: Packing) -> int:
    """Return how many bytes a segment would take in the archive."""
    name = segments.archive_name(directory, first, wanted)
    return len(packing.pack(_content(directory, first), packing.packing_of(name)))


def _content(directory: Directory, first: int) -> bytes:
    with segments.open_segment(directory, first) as source:
        return source.whole()


def require_intact(directory: Directory, first: int) -> None:
    """Raise LogCorrupt where a segment is not fit for the archive."""
    _require_intact(_content(directory, first), first)


def _require_intact(data: bytes, first: int) -> None:
    """Refuse to archive what is no longer as it was written: whoever keeps it must hear of it."""
    if all(map(codec.is_intact, data.split(b"\n")[:-1])):
        return
    found = segments.scan(data, offset=0, seq=first - 1, prev=None)
    raise LogCorrupt(
        layout.segment_name(first),
        offset=found.end,
        seq=found.seq + 1,
        reason=found.reason or "crc differs",
        proof="a snapshot covers it: it was whole",
    )


def _move(directory: Directory, first: int, wanted: Packing) -> None:
    via, log, shelf = directory.disk, directory[layout.LOG], directory[layout.ARCHIVE]
    data = _content(directory, first)
    _require_intact(data, first)
    temporary = f"{layout.TEMPORARY_PREFIX}{os.getpid()}"
    name = segments.archive_name(directory, first, wanted)
    disk.write_new(via, temporary, packing.pack(data, packing.packing_of(name)), at=shelf)
    where = directory.where(layout.ARCHIVE, temporary)
    packed = disk.read_all(temporary, at=shelf, where=where, limit=layout.SNAPSHOT_BYTES_MAX)
    try:
        same = packing.unpack(packed, name=name, where=where) == data
    except PackingError:
        same = False
    if not same:
        via.unlink(temporary, at=shelf)
        raise ArchiveDamaged(name, offset=0, seq=first, reason="it does not read back as written")
    via.rename(temporary, name, at=shelf)
    via.sync_directory(shelf)  # the archive's name is durable before the segment's goes
    via.unlink(layout.segment_name(first), at=log)
    via.sync_directory(log)
