"""Decide how much of the oldest history goes: by policy, and by the cursors that need it.

The parts of a history go whole and oldest first; what a cursor has not read stays, up to a cap:
beyond it the history goes, and the cursor's owner hears of the exact range when it comes back.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeAlias, TypeVar

from crewlog import host
from crewlog.errors import LogCorrupt
from crewlog.model import events
from crewlog.model.events import Line
from crewlog.model.snapshot import Snapshot
from crewlog.store import CursorState

_logger = logging.getLogger("crewlog.retain")


@dataclass(frozen=True, slots=True)
class KeepEvents:
    """Keep at least the newest so many events."""

    count: int


# None: everything; a timedelta: events of that age and younger; an int: bytes of archive.
Keep: TypeAlias = timedelta | int | KeepEvents | None


class Parted(Protocol):
    """A sealed part of the history, of either engine."""

    @property
    def first(self) -> int:
        """Return its first seq."""
        ...

    @property
    def last(self) -> int:
        """Return its last seq."""
        ...

    @property
    def size(self) -> int:
        """Return how many bytes it takes."""
        ...

    @property
    def newest(self) -> str:
        """Return its newest time."""
        ...


P = TypeVar("P", bound=Parted)


@dataclass(frozen=True, slots=True)
class Part:
    """A segment of the archive, or one that is about to be; see Parted."""

    first: int
    last: int
    size: int
    newest: str


def check_keep(keep: object) -> None:
    """Raise ValueError for what is no policy."""
    if keep is None or (isinstance(keep, timedelta) and keep >= timedelta(0)):
        return
    if type(keep) is int and keep >= 0:
        return
    if isinstance(keep, KeepEvents) and keep.count >= 0:
        return
    message = f"keep_history is a timedelta, a number of bytes, KeepEvents or None, not {keep!r}"
    raise ValueError(message)


def oldest_ts(keep: timedelta) -> str:
    """Return the time before which nothing is kept."""
    try:
        return events.timestamp(host.now() - keep)
    except OverflowError:  # before all that a calendar knows
        return ""


def going(
    parts: Sequence[P],
    keep: Keep,
    *,
    last_seq: int,
    cursors: Sequence[CursorState],
    hold_bytes: int,
) -> list[P]:
    """Return the parts that go, oldest first, when the log has come to `last_seq`.

    Cursors that are behind hold back at most `hold_bytes`.
    """
    count = surplus(parts, keep, last_seq=last_seq)
    return list(parts[: held_back(parts, count, cursors, hold_bytes)])


def span(parts: Sequence[Parted]) -> tuple[int, int] | None:
    """Return the range of seqs of some parts, None for no parts."""
    return (parts[0].first, parts[-1].last) if parts else None


def surplus(parts: Sequence[Parted], keep: Keep, *, last_seq: int) -> int:
    """Count how many of the oldest parts the policy does not keep."""
    if keep is None:
        return 0
    if isinstance(keep, timedelta):
        oldest = oldest_ts(keep)
        return next((n for n, part in enumerate(parts) if part.newest >= oldest), len(parts))
    if isinstance(keep, KeepEvents):
        return sum(1 for part in parts if part.last <= last_seq - keep.count)
    left, count = sum(part.size for part in parts), 0
    while count < len(parts) and left > keep:
        left -= parts[count].size
        count += 1
    return count


def held_back(
    parts: Sequence[Parted], surplus: int, cursors: Sequence[CursorState], hold_bytes: int
) -> int:
    """Return how many may go with regard to cursors: what they need stays, up to the cap."""
    for cursor in cursors:
        if cursor.damaged:
            _logger.warning("cursor %s is damaged and holds back everything", cursor.name)
    needed = min((cursor.seq + 1 for cursor in cursors), default=None)
    if needed is None:
        return surplus
    free = sum(1 for part in parts[:surplus] if part.last < needed)
    held = sum(part.size for part in parts[free:surplus])
    while free < surplus and held > hold_bytes:
        held -= parts[free].size
        late = [cursor.name for cursor in cursors if cursor.seq < parts[free].last]
        _logger.warning("history up to seq %d goes although %s need it", parts[free].last, late)
        free += 1
    return free


def folded(fold: Callable[[Callable[[Line], None]], Snapshot]) -> Snapshot | None:
    """Fold; None if a gap makes the result unknowable."""
    gaps: list[int] = []

    def seen(line: Line) -> None:
        if line["type"] == events.GAP:
            gaps.append(line["seq"])

    try:
        state = fold(seen)
    except LogCorrupt:
        if gaps:  # behind it, events of workers whose registration was lost
            return None
        raise
    return None if gaps else state
