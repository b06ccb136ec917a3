"""Move sealed segments into the archive: compressed, checked, durable before the original goes.

Small archives, of frequent compactions, are put together in one. From the moment that it has its
name, durable and read back, nobody looks at those that it covers (segments.archives), and they go.
"""

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Final

from crewlog.errors import ArchiveDamaged, DataDamaged, LogCorrupt, UnsafePermissions
from crewlog.local import archive, disk, layout
from crewlog.local.archive import PackingError
from crewlog.local.directory import Directory
from crewlog.local.segments import Archive, Segments, archive_of, archives, covered_archives
from crewlog.model import chain, codec, events
from crewlog.model.arguments import Packing
from crewlog.model.snapshot import SNAPSHOT_BYTES_MAX

_logger: Final = logging.getLogger("crewlog.compact")


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
    via, log = directory.disk, directory[layout.LOG]
    data = _content(segments, first)
    _require_intact(data, first)
    _put(directory, archive_of(directory, first, wanted), data, first)
    via.unlink(layout.segment_name(first), at=log)
    via.sync_directory(log)


def _put(directory: Directory, name: str, data: bytes, first: int) -> None:
    """Put an archive in place: durable, name and all, and read back, before it has that name.

    Raises: ArchiveDamaged where it does not read back as it was written.
    """
    via, shelf = directory.disk, directory[layout.ARCHIVE]
    temporary = f"{layout.TEMPORARY_PREFIX}{os.getpid()}"
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
    via.sync_directory(shelf)  # the archive's name is durable before that of what it holds goes


# -- merging --------------------------------------------------------------------------------


def merge(segments: Segments, *, packing: Packing) -> None:
    """Put small archives that lie beside each other together.

    Held: locks/compact. Killed anywhere, the history is whole, and the next call goes on.
    """
    for run in list(_runs(segments)):
        try:
            data = _joined(segments, run)
        except (DataDamaged, UnsafePermissions) as error:  # verify says so too; the others go on
            _logger.warning("archives are not put together: %s", error)
            continue
        name = layout.merged_name(run[0].first, _last_seq(data), packing)
        _put(segments.directory, name, data, run[0].first)
        _unlink(segments.directory, [one.name for one in run])


def _runs(segments: Segments) -> Iterator[Sequence[Archive]]:
    """Yield the archives to be put together, run by run, the oldest first."""
    limits, shelf = segments.directory.limits, segments.directory[layout.ARCHIVE]
    every = archives(segments.directory)
    following = [*(one.first for one in every[1:]), *segments.in_log()[:1]]
    run: list[Archive] = []
    size = lines = 0
    for one, after in zip(every, following, strict=False):
        more = os.stat(one.name, dir_fd=shelf, follow_symlinks=False).st_size
        large = more > limits.archive_bytes // 2
        full = (
            size + more > limits.archive_bytes or lines + after - one.first > limits.archive_lines
        )
        if full or large or len(run) >= limits.archives_small:
            if len(run) > 1 and not large:
                yield run
            run, size, lines = [], 0, 0
        if not large:
            run.append(one)
            size, lines = size + more, lines + after - one.first
    if len(run) >= limits.archives_small:
        yield run


def _joined(segments: Segments, run: Sequence[Archive]) -> bytes:
    """Return the content of archives that follow each other.

    Raises: ArchiveDamaged, LogCorrupt where one is damaged, begins with a gap, or is missing.
    """
    parts: list[bytes] = []
    for one in run:
        data = _content(segments, one.first)
        _require_intact(data, one.first)
        begins = codec.parse(data[: data.index(b"\n")])
        if begins["type"] != events.SEGMENT:
            raise ArchiveDamaged(one.name, offset=0, seq=one.first, reason="it begins with a gap")
        if parts and _last_seq(parts[-1]) + 1 != one.first:
            reason = "the one before it is missing"
            raise ArchiveDamaged(one.name, offset=0, seq=one.first, reason=reason)
        parts.append(data)
    return b"".join(parts)


def _last_seq(data: bytes) -> int:
    return codec.parse(data[data.rfind(b"\n", 0, -1) + 1 : -1])["seq"]


def sweep_covered(directory: Directory) -> None:
    """Remove the archives that a merged one holds, after a merge was killed.

    Held: locks/compact. What it does not hold, though its name says so, stays: verify tells of it.
    """
    covered = covered_archives(directory)
    _unlink(directory, [name for name, large in covered if holds(directory, large, name)])


def holds(directory: Directory, large: Archive, name: str) -> bool:
    """Say whether a merged archive holds all that another archive does."""
    whole, part = (_unpacked(directory, one) for one in (large.name, name))
    return whole is not None and part is not None and part in whole


def _unpacked(directory: Directory, name: str) -> bytes | None:
    where = directory.where(layout.ARCHIVE, name)
    at = directory[layout.ARCHIVE]
    packed = disk.read_all(name, at=at, where=where, limit=SNAPSHOT_BYTES_MAX)
    try:
        return archive.unpack(packed, name=name, where=where)
    except PackingError:
        return None


def _unlink(directory: Directory, names: Sequence[str]) -> None:
    for name in names:
        directory.disk.unlink(name, at=directory[layout.ARCHIVE])
    if names:
        directory.disk.sync_directory(directory[layout.ARCHIVE])
