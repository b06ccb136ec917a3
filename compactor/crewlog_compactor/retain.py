"""Drop the oldest history by policy, and say so in the log; by default everything is kept.

Only archived segments that the previous snapshot covers are ever dropped, oldest first, and none
that a cursor still needs, up to a cap: beyond it the history goes, and the cursor's owner hears
of the exact range when it comes back. What went is folded into archive/base.json first, so that
the state at any time that is still kept can be told; then `_archive_dropped` is made durable, so
that verify can tell policy from loss; then the files go.
"""

import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from crewlog import cursor, events, layout, segments, snapshot
from crewlog.directory import Directory
from crewlog.errors import DataDamaged
from crewlog.events import JsonObject
from crewlog.log import Log
from crewlog.reader import walk
from crewlog.refold import refold
from crewlog.segments import Position

_logger = logging.getLogger("crewlog.retain")


@dataclass(frozen=True, slots=True)
class KeepEvents:
    """Keep at least the newest so many events."""

    count: int


# None: everything; a timedelta: events of that age and younger; an int: bytes of archive.
Keep: TypeAlias = timedelta | int | KeepEvents | None


@dataclass(frozen=True, slots=True)
class _Archived:
    first: int
    last: int
    name: str
    size: int


def check_keep(keep: object) -> Keep:
    """Return a policy that can be carried out."""
    if keep is None or (isinstance(keep, timedelta) and keep >= timedelta(0)):
        return keep
    if type(keep) is int and keep >= 0:
        return keep
    if isinstance(keep, KeepEvents) and keep.count >= 0:
        return keep
    message = f"keep_history is a timedelta, a number of bytes, KeepEvents or None, not {keep!r}"
    raise ValueError(message)


def retain(log: Log, keep: Keep) -> tuple[int, int] | None:
    """Drop what the policy no longer keeps; return the range of seqs that went, None for none.

    Held: locks/compact.
    """
    if keep is None:
        return None
    kept = _archive(log.directory)
    surplus = _surplus(log, kept, keep)
    going = kept[: _held_back(log, kept, surplus)]
    if not going:
        return None
    first, last = going[0].first, going[-1].last
    told: JsonObject = {"first": first, "last": last, "head": _hash_after(log, last)}
    base = _base(log.directory, last)
    if base is not None:
        told["base"] = base
    log.note(events.DROPPED, told)
    via, shelf = log.directory.disk, log.directory[layout.ARCHIVE]
    for part in going:  # one by one, so that a power cut leaves no hole behind an older one
        via.unlink(part.name, at=shelf)
        via.sync_directory(shelf)
    return first, last


def _archive(directory: Directory) -> list[_Archived]:
    firsts = segments.archived(directory)
    if not firsts:
        return []
    following = [*firsts[1:], segments.active_and_sealed(directory)[0]]
    found = []
    for first, after in zip(firsts, following, strict=True):
        name = segments.archive_file(directory, first) or layout.archive_name(first)
        size = (directory.path / layout.ARCHIVE / name).stat().st_size
        found.append(_Archived(first, after - 1, name, size))
    return found


def _surplus(log: Log, kept: list[_Archived], keep: Keep) -> int:
    """Count how many of the oldest segments the policy does not keep."""
    if isinstance(keep, timedelta):
        oldest = events.timestamp(events.now() - keep)
        count = 0
        while count < len(kept) and _last_ts(log.directory, kept[count]) < oldest:
            count += 1
        return count
    if isinstance(keep, KeepEvents):
        newest = log.last_seq() - keep.count
        return sum(1 for part in kept if part.last <= newest)
    left = sum(part.size for part in kept)
    count = 0
    while count < len(kept) and left > (keep or 0):
        left -= kept[count].size
        count += 1
    return count


def _last_ts(directory: Directory, part: _Archived) -> str:
    source = segments.open_segment(directory, part.first)
    ts = ""
    for step in walk(source, segments.start_of(part.first)):
        ts = max(ts, step.line["ts"]) if step.line is not None else ts
    return ts


def _held_back(log: Log, kept: list[_Archived], surplus: int) -> int:
    """Return how many may go with regard to cursors: what they need stays, up to the cap."""
    places = cursor.every(log.directory)
    for place in places:
        if place.damaged:
            _logger.warning("cursor %s is damaged and holds back everything", place.name)
    needed = min((place.seq + 1 for place in places), default=None)
    if needed is None:
        return surplus
    free = sum(1 for part in kept[:surplus] if part.last < needed)
    held = sum(part.size for part in kept[free:surplus])
    while free < surplus and held > layout.CURSOR_HOLD_BYTES_MAX:
        held -= kept[free].size
        late = [place.name for place in places if place.seq < kept[free].last]
        _logger.warning("history up to seq %d goes although %s need it", kept[free].last, late)
        free += 1
    return free


def _base(directory: Directory, last: int) -> str | None:
    """Fold what goes into archive/base.json; return its hash, None where it cannot be folded."""
    try:
        start = snapshot.read_base(directory) or snapshot.empty(directory)
        if start.last_seq + 1 < segments.archived(directory)[0]:
            return None  # an older version dropped the history before this one without a base
        if start.last_seq >= last:  # it was folded before a retention that was killed
            return start.sha256
        return snapshot.put_base(directory, refold(directory, start, Position(0, 0, last)))
    except DataDamaged as error:
        _logger.warning("no state can be kept for the history after seq %d: %s", last, error)
        return None


def _hash_after(log: Log, last: int) -> str:
    """Return the hash of the last line that goes, as the line after it tells."""
    source = segments.open_segment(log.directory, last + 1)
    try:
        step = next(walk(source, segments.start_of(last + 1)))
    finally:
        source.close()
    return "" if step.line is None else step.line["prev"]
