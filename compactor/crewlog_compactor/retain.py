"""Drop the oldest history by policy, and say so in the log; by default everything is kept.

Only archived segments that the previous snapshot covers are ever dropped; policy.py says which.
What goes is folded into archive/base.json first, and stays where damage forbids that, so that the
state at any time that is still kept can be told; then `_archive_dropped` is made durable, so that
verify can tell policy from loss; then the files go.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta

from crewlog import events, layout, segments, snapshot
from crewlog.directory import Directory
from crewlog.events import JsonObject
from crewlog.log import Log
from crewlog.reader import first_line, walk
from crewlog.refold import refold
from crewlog.segments import Position
from crewlog_compactor import policy
from crewlog_compactor.policy import Keep, Part


def retain(log: Log, keep: Keep) -> tuple[int, int] | None:
    """Drop what the policy no longer keeps; return the range of seqs that went, None for none.

    Held: locks/compact.
    """
    going = due(log, keep, last_seq=log.last_seq(), coming={})
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
        via.unlink(segments.archive_name(log.directory, part.first), at=shelf)
        via.sync_directory(shelf)
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


def _base(directory: Directory, last: int) -> str | None:
    """Fold what goes into archive/base.json, and return its hash. *Raises* DataDamaged.

    None where nothing leads to it: an older version dropped what was before without a base.
    """
    start = snapshot.read_base(directory) or snapshot.empty(directory)
    if start.last_seq + 1 < segments.archived(directory)[0]:
        return None
    if start.last_seq >= last:  # it was folded before a retention that was killed
        return start.sha256
    return snapshot.put_base(directory, refold(directory, start, Position(0, 0, last)))


def _hash_after(log: Log, last: int) -> str:
    """Return the hash of the last line that goes, as the line after it tells."""
    line = first_line(log.directory, last + 1)
    return "" if line is None else line["prev"]
