"""Drop the oldest history by policy, and say so in the log; by default everything is kept.

Only archived segments that the previous snapshot covers are ever dropped, oldest first, and none
that a cursor still needs, up to a cap: beyond it the history goes, and the cursor's owner hears
of the exact range when it comes back. `_archive_dropped` is durable before the first file goes,
so that verify can tell policy from loss.
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from crewlog import cursor, events, layout, segments
from crewlog.directory import Directory
from crewlog.log import Log

_logger = logging.getLogger("crewlog.retain")
# None: everything; a timedelta: events of that age and younger; an int: bytes of archive.
Keep: TypeAlias = timedelta | int | None


@dataclass(frozen=True, slots=True)
class _Archived:
    first: int
    last: int
    size: int


def check_keep(keep: object) -> Keep:
    """Return a policy that can be carried out."""
    if keep is None or (isinstance(keep, timedelta) and keep >= timedelta(0)):
        return keep
    if type(keep) is int and keep >= 0:
        return keep
    message = f"keep_history is a timedelta, a number of bytes or None, not {keep!r}"
    raise ValueError(message)


def retain(log: Log, keep: Keep) -> tuple[int, int] | None:
    """Drop what the policy no longer keeps; return the range of seqs that went, None for none.

    Held: locks/compact.
    """
    if keep is None:
        return None
    kept = _archive(log.directory)
    surplus = _surplus(log.directory, kept, keep)
    going = kept[: _held_back(log, kept, surplus)]
    if not going:
        return None
    first, last = going[0].first, going[-1].last
    log.note(events.DROPPED, {"first": first, "last": last, "head": _hash_after(log, last)})
    via, shelf = log.directory.disk, log.directory[layout.ARCHIVE]
    for part in going:  # one by one, so that a power cut leaves no hole behind an older one
        via.unlink(layout.archive_name(part.first), at=shelf)
        via.sync_directory(shelf)
    return first, last


def _archive(directory: Directory) -> list[_Archived]:
    firsts = segments.archived(directory)
    if not firsts:
        return []
    following = [*firsts[1:], segments.active_and_sealed(directory)[0]]
    shelf = directory.path / layout.ARCHIVE
    return [
        _Archived(first, after - 1, (shelf / layout.archive_name(first)).stat().st_size)
        for first, after in zip(firsts, following, strict=True)
    ]


def _surplus(directory: Directory, kept: list[_Archived], keep: Keep) -> int:
    """Count how many of the oldest segments the policy does not keep."""
    if isinstance(keep, timedelta):
        oldest = events.timestamp(datetime.now(UTC) - keep)
        count = 0
        while count < len(kept) and _last_ts(directory, kept[count]) < oldest:
            count += 1
        return count
    left = sum(part.size for part in kept)
    count = 0
    while count < len(kept) and left > (keep or 0):
        left -= kept[count].size
        count += 1
    return count


def _last_ts(directory: Directory, part: _Archived) -> str:
    source = segments.open_segment(directory, part.first)
    ts = ""
    for step in segments.walk(source, segments.start_of(part.first)):
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


def _hash_after(log: Log, last: int) -> str:
    """Return the hash of the last line that goes, as the line after it tells."""
    source = segments.open_segment(log.directory, last + 1)
    try:
        step = next(segments.walk(source, segments.start_of(last + 1)))
    finally:
        source.close()
    return "" if step.line is None else step.line["prev"]
