"""Move sealed segments into the archive: compressed, checked, durable before the original goes.

Small archives, of frequent compactions, are put together in one. From the moment that it has its
name, durable and read back, nobody looks at those that it covers (segments.archives), and they go.
"""

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Final

from crewlog.errors import (
    ArchiveDamaged,
    DataDamaged,
    LogCorrupt,
    UnsafePermissions,
    Unsupported,
)
from crewlog.local import archive, disk, layout
from crewlog.local.archive import PackingError
from crewlog.local.layout import Directory
from crewlog.local.segments import (
    Archive,
    Segments,
    archives,
    covered_archives,
    own_archive,
    parts,
    unpacked,
)
from crewlog.model import chain, codec, events
from crewlog.model.arguments import Packing
from crewlog.model.codec import LineError
from crewlog.model.events import Line
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
    name = _name_of(segments.directory, first, wanted)
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
    scan = chain.scan(data, offset=0, seq=first - 1, prev=None)
    raise LogCorrupt(
        layout.segment_name(first),
        offset=scan.end,
        seq=scan.seq + 1,
        reason=scan.reason or "crc differs",
        proof="a snapshot covers it: it was whole",
    )


def _move(segments: Segments, first: int, wanted: Packing) -> None:
    directory = segments.directory
    via, log = directory.disk, directory[layout.LOG]
    data = _content(segments, first)
    _require_intact(data, first)
    _put(directory, _name_of(directory, first, wanted), data, first)
    via.unlink(layout.segment_name(first), at=log)
    via.sync_directory(log)


def _name_of(directory: Directory, first: int, wanted: Packing) -> str:
    """Name the archive of one segment: never a merged one, which holds others, too."""
    return own_archive(directory, first) or layout.archive_name(first, wanted)


def _put(directory: Directory, name: str, data: bytes, first: int) -> None:
    """Put an archive in place: durable, name and all, and read back, before it has that name.

    Raises: ArchiveDamaged where it does not read back as it was written.
    """
    via, shelf = directory.disk, directory[layout.ARCHIVE]
    temporary = f"{disk.TEMPORARY_PREFIX}{os.getpid()}"
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
            _logger.info("archives are not put together: %s", error)
            continue
        name = layout.merged_name(run[0].first, _last_line(data)[0]["seq"], packing)
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

    Raises: ArchiveDamaged, LogCorrupt where one is damaged, another store's, begins with a gap, or
    does not follow the one before it.
    """
    contents: list[bytes] = []
    prev: str | None = None
    for one in run:
        data = content(segments.directory, one.name) or b""
        _require_intact(data, one.first)
        try:
            begins, last = codec.parse(data[: data.find(b"\n")]), _last_line(data)
        except LineError as error:
            raise ArchiveDamaged(one.name, offset=0, seq=one.first, reason=str(error)) from error
        reason = None
        if begins["type"] != events.SEGMENT or begins["seq"] != one.first:
            reason = "it begins with no header of its name"
        elif begins["data"].get("store") != segments.directory.store:
            reason = "its first line does not name this store"
        elif prev not in {None, begins["prev"]}:
            reason = "it does not follow the one before it"
        if reason is not None:
            raise ArchiveDamaged(one.name, offset=0, seq=one.first, reason=reason)
        contents.append(data)
        prev = chain.hash_after(*last).hex()
    return b"".join(contents)


def _last_line(data: bytes) -> tuple[Line, bytes]:
    raw = data[data.rfind(b"\n", 0, -1) + 1 : -1]
    return codec.parse(raw), raw


def drop(directory: Directory, *, first: int, last: int) -> None:
    """Remove what archives hold from one seq to another, both ends of segments; the oldest first.

    One by one, so that a power cut leaves no hole behind an older one. The rest of a merged archive
    that goes on behind `last` is put in place before it goes, and stands in its shadow till then.
    Raises: ArchiveDamaged.
    """
    for one in archives(directory):
        if not first <= one.first <= last:
            continue
        if one.last > last:
            held = parts(content(directory, one.name) or b"")
            rest = b"".join(part for begin, part in held if begin > last)
            if not rest:
                raise ArchiveDamaged(one.name, offset=0, seq=last + 1, reason="it is unreadable")
            name = layout.merged_name(last + 1, one.last, archive.packing_of(one.name))
            _put(directory, name, rest, last + 1)
        _unlink(directory, [one.name])


def sweep_covered(directory: Directory) -> None:
    """Remove the archives that a merged one holds, after a merge was killed.

    Held: locks/compact. What it does not hold, though its name says so, stays: verify tells of it.
    """
    covered = covered_archives(directory)
    _unlink(directory, [name for name, large in covered if holds(directory, large, name)])


def holds(directory: Directory, large: Archive, name: str) -> bool:
    """Say whether a merged archive holds all that another archive does."""
    whole, part = (content(directory, one) for one in (large.name, name))
    return whole is not None and part is not None and part in whole


def strange(segments: Segments, *, known: int) -> list[str]:
    """Name the archives that are none of ours: they lie beyond the log, of which `known` is known.

    Where one stands for another and does not hold it, it is the one of the two that is not sound.
    """
    directory, log = segments.directory, segments.in_log()
    names: set[str] = set()
    if log:  # the active segment is behind every archive, whatever else is lost
        end = max(known, log[-1])
        names = {one.name for one in archives(directory) if one.last > end}
    for name, large in covered_archives(directory):
        if not holds(directory, large, name):
            names.add(name if _is_sound(directory, large) else large.name)
    return sorted(names)


def _is_sound(directory: Directory, one: Archive) -> bool:
    """Say whether a merged archive is whole, of this store, and what its name says."""
    data = content(directory, one.name)
    if data is None or not all(map(codec.is_intact, data.split(b"\n")[:-1])):
        return False
    try:
        begins, (ends, _) = codec.parse(data[: data.find(b"\n")]), _last_line(data)
    except LineError:
        return False
    seqs = (begins["seq"], ends["seq"])
    return begins["data"].get("store") == directory.store and seqs == (one.first, one.last)


def content(directory: Directory, name: str) -> bytes | None:
    """Return what an archive holds; None where that cannot be read, or is nothing."""
    try:
        return unpacked(directory, name) or None
    except (PackingError, UnsafePermissions, Unsupported):  # zstd may be installed elsewhere only
        return None


def _unlink(directory: Directory, names: Sequence[str]) -> None:
    for name in names:
        directory.disk.unlink(name, at=directory[layout.ARCHIVE])
    if names:
        directory.disk.sync_directory(directory[layout.ARCHIVE])
