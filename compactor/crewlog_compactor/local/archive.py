"""Move sealed segments into the archive: compressed, checked, durable before the original goes."""

import itertools
import os

from crewlog.errors import ArchiveDamaged, LogCorrupt
from crewlog.local import archive, disk, layout
from crewlog.local.archive import PackingError
from crewlog.local.segments import Segments, archive_of
from crewlog.model import chain, codec
from crewlog.model.arguments import Packing
from crewlog.model.snapshot import SNAPSHOT_BYTES_MAX


def archive_covered(segments: Segments, *, covered: int, packing: Packing) -> list[int]:
    """Archive every sealed segment whose last seq is at most `covered`; return their first seqs.

    Held: locks/compact. Interrupted anywhere, a segment is in log/, in archive/, or in both with
    the same content; the next call goes on from there.
    """
    coming = due(segments, covered=covered)
    for first in coming:
        _move(segments, first, packing)
    return coming


def due(segments: Segments, *, covered: int) -> list[int]:
    """Return the first seqs of the sealed segments whose last seq is at most `covered`."""
    pairs = itertools.pairwise(segments.in_log())
    return [first for first, following in pairs if following - 1 <= covered]


def packed_bytes(segments: Segments, first: int, wanted: Packing) -> int:
    """Return how many bytes a segment would take in the archive."""
    name = archive_of(segments.directory, first, wanted)
    return len(archive.pack(_content(segments, first), archive.packing_of(name)))


def _content(segments: Segments, first: int) -> bytes:
    with segments.open(first) as source:
        return source.whole()


def require_intact(segments: Segments, first: int) -> None:
    """Raise LogCorrupt where a segment is not fit for the archive."""
    _require_intact(_content(segments, first), first)


def _require_intact(data: bytes, first: int) -> None:
    """Refuse to archive what is no longer as it was written: whoever keeps it must hear of it."""
    if all(map(codec.is_intact, data.split(b"\n")[:-1])):
        return
    found = chain.scan(data, offset=0, seq=first - 1, prev=None)
    raise LogCorrupt(
        layout.segment_name(first),
        offset=found.end,
        seq=found.seq + 1,
        reason=found.reason or "crc differs",
        proof="a snapshot covers it: it was whole",
    )


def _move(segments: Segments, first: int, wanted: Packing) -> None:
    directory = segments.directory
    via, log, shelf = directory.disk, directory[layout.LOG], directory[layout.ARCHIVE]
    data = _content(segments, first)
    _require_intact(data, first)
    temporary = f"{layout.TEMPORARY_PREFIX}{os.getpid()}"
    name = archive_of(segments.directory, first, wanted)
    disk.write_new(via, temporary, archive.pack(data, archive.packing_of(name)), at=shelf)
    where = directory.where(layout.ARCHIVE, temporary)
    packed = disk.read_all(temporary, at=shelf, where=where, limit=SNAPSHOT_BYTES_MAX)
    try:
        same = archive.unpack(packed, name=name, where=where) == data
    except PackingError:
        same = False
    if not same:
        via.unlink(temporary, at=shelf)
        raise ArchiveDamaged(name, offset=0, seq=first, reason="it does not read back as written")
    via.rename(temporary, name, at=shelf)
    via.sync_directory(shelf)  # the archive's name is durable before the segment's goes
    via.unlink(layout.segment_name(first), at=log)
    via.sync_directory(log)
