"""Drop the oldest history by policy, and say so in the log; by default everything is kept.

Only archived segments that the previous snapshot covers are ever dropped; policy.py says which.
What goes is folded into archive/base.json first, and stays where damage forbids that, so that the
state at any time that is still kept can be told; then `_archive_dropped` is made durable, so that
verify can tell policy from loss; then the files go.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta

from crewlog import events, layout, segments, snapshot
from crewlog.codec import Snapshot
from crewlog.directory import Directory
from crewlog.errors import LogCorrupt, SnapshotCorrupt
from crewlog.events import JsonObject, Line
from crewlog.log import Log
from crewlog.reader import first_line, walk
from crewlog.refold import refold
from crewlog.segments import Position
from crewlog.sieve import Sieve, type_needle
from crewlog_compactor import policy
from crewlog_compactor.archive import require_intact
from crewlog_compactor.policy import Keep, Part


def retain(log: Log, keep: Keep) -> tuple[int, int] | None:
    """Drop what the policy no longer keeps; return the range of seqs that went, None for none.

    Held: locks/compact.
    """
    _finish(log)
    going = due(log, keep, last_seq=log.last_seq(), coming={})
    if not going:
        return None
    first, last = going[0].first, going[-1].last
    told: JsonObject = {"first": first, "last": last, "head": _hash_after(log, last)}
    base = base_at(log.directory, last)
    if base is not None:
        told["base"] = snapshot.put_base(log.directory, base)
    log.note(events.DROPPED, told)
    _drop(log, [part.first for part in going])
    return first, last


def due(
    log: Log, keep: Keep, *, last_seq: int, coming: Mapping[int, Callable[[], int]]
) -> list[Part]:
    """Return the parts that the policy lets go when the log has come to `last_seq`.

    `coming` are segments that will be archived first: by first seq, what tells the bytes of each.
    """
    if keep is None:
        return []
    kept = _archive(log.directory, keep, coming)
    return policy.going(kept, keep, last_seq=last_seq, cursors=log.cursors.every())


def _archive(
    directory: Directory, keep: Keep, coming: Mapping[int, Callable[[], int]]
) -> list[Part]:
    firsts = sorted({*segments.archived(directory), *coming})
    if not firsts:
        return []
    left = next(first for first in segments.active_and_sealed(directory) if first > firsts[-1])
    following = [*firsts[1:], left]
    found = []
    young = not isinstance(keep, timedelta)  # else times are asked for, until the first is young
    for first, after in zip(firsts, following, strict=True):
        size = coming[first]() if first in coming else _bytes(directory, first)
        newest = "" if young else _newest(directory, first)
        if isinstance(keep, timedelta) and newest >= policy.oldest_ts(keep):
            young = True
        found.append(Part(first, after - 1, size, newest))
    return found


def _bytes(directory: Directory, first: int) -> int:
    name = segments.archive_name(directory, first)
    return (directory.path / layout.ARCHIVE / name).stat().st_size


def _newest(directory: Directory, first: int) -> str:
    with segments.open_segment(directory, first) as source:
        steps = walk(source, segments.start_of(first))
        return max((step.line["ts"] for step in steps if step.line is not None), default="")


def base_at(directory: Directory, last: int) -> Snapshot | None:
    """Return the state after what goes up to `last`: one that is kept, or folded from one before.

    Whatever goes is whole: of what is damaged nobody would hear any more. None where nobody can
    know the state: an older version dropped what leads to it, or a repair gave up events in
    between, and said so. *Raises* DataDamaged.
    """
    firsts = segments.archived(directory)
    for first in firsts:
        if first <= last:
            require_intact(directory, first)
    oldest = firsts[0]
    states = [s for s in snapshot.every(directory) if oldest - 1 <= s.last_seq <= last]
    start = max(states, key=lambda state: state.last_seq, default=None)
    if start is None or start.last_seq == last:
        return start
    return folded(lambda seen: refold(directory, start, Position(0, 0, last), seen=seen))


def folded(fold: Callable[[Callable[[Line], None]], Snapshot]) -> Snapshot | None:
    """Fold; None where that leads across a gap, whose other side nobody knows."""
    gaps: list[int] = []

    def seen(line: Line) -> None:
        if line["type"] == events.GAP:
            gaps.append(line["seq"])

    try:
        found = fold(seen)
    except LogCorrupt:
        if gaps:  # behind it, events of workers whose registration was lost
            return None
        raise
    return None if gaps else found


def _finish(log: Log) -> None:
    """Let go of what a retention that was killed had announced; the state after it is in place."""
    directory, firsts = log.directory, segments.archived(log.directory)
    with suppress(SnapshotCorrupt):
        base = snapshot.read_base(directory)
        if base is None or not firsts or firsts[0] > base.last_seq:
            return
        told = log.backwards(sieve=Sieve([type_needle(events.DROPPED)]))
        newest = next((line for line, _ in told if line["type"] == events.DROPPED), None)
        if newest is not None and newest["data"].get("last") == base.last_seq:
            _drop(log, [first for first in firsts if first <= base.last_seq])


def _drop(log: Log, firsts: Iterable[int]) -> None:
    """Remove archives one by one, so that a power cut leaves no hole behind an older one."""
    via, shelf = log.directory.disk, log.directory[layout.ARCHIVE]
    for first in firsts:
        via.unlink(segments.archive_name(log.directory, first), at=shelf)
        via.sync_directory(shelf)


def _hash_after(log: Log, last: int) -> str:
    """Return the hash of the last line that goes, as the line after it tells."""
    line = first_line(log.directory, last + 1)
    return "" if line is None else line["prev"]
