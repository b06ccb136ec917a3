"""Drop the oldest history by policy, and say so in the log; by default everything is kept.

Only archived segments that the previous snapshot covers are ever dropped; retention.py says which.
What goes is folded into archive/base.json first, and stays where damage forbids that, so that the
state at any time that is still kept can be told; then `_archive_dropped` is made durable, so that
verify can tell policy from loss; then the files go.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Final

from crewlog.errors import ArchiveDamaged, SnapshotCorrupt
from crewlog.local import layout, snapshot
from crewlog.local.layout import Directory
from crewlog.local.log import Log
from crewlog.local.segments import (
    Archive,
    Segments,
    archive_of,
    archives,
    covered_archives,
    first_line,
    parts,
    start_of,
    walk,
)
from crewlog.local.snapshot import refold
from crewlog.model import events
from crewlog.model.chain import Position
from crewlog.model.events import JsonObject
from crewlog.model.sieve import Sieve, type_needle
from crewlog.model.snapshot import Snapshot
from crewlog_compactor import retention
from crewlog_compactor.local.archive import content, drop, require_intact
from crewlog_compactor.retention import Keep, Part

_logger = logging.getLogger("crewlog.retain")


def retain(log: Log, keep: Keep) -> tuple[int, int] | None:
    """Drop what the policy no longer keeps; return the range of seqs that went, None for none.

    Held: locks/compact.
    """
    if keep is not None and covered_archives(log.directory):
        _logger.warning("no history goes: an archive stands for others that it does not hold")
        return None
    _finish(log)
    going = due(log, keep, last_seq=log.last_seq(), coming={})
    if not going:
        return None
    first, last = going[0].first, going[-1].last
    data: JsonObject = {"first": first, "last": last, "head": _hash_after(log, last)}
    base = base_at(log.segments, last)
    if base is not None:
        data["base"] = snapshot.put_base(log.directory, base)
    log.note(events.DROPPED, data)
    _drop(log, first, last)
    return first, last


def due(
    log: Log, keep: Keep, *, last_seq: int, coming: Mapping[int, Callable[[], int]]
) -> list[Part]:
    """Return the parts that the policy lets go when the log has come to `last_seq`.

    `coming` are segments that will be archived first: by first seq, what tells the bytes of each.
    """
    if keep is None:
        return []
    kept = _archive(log.segments, keep, coming, last_seq=last_seq)
    return retention.going(
        kept,
        keep,
        last_seq=last_seq,
        cursors=log.cursors.every(),
        hold_bytes=log.limits.cursor_hold_bytes,
    )


def _archive(
    segments: Segments, keep: Keep, coming: Mapping[int, Callable[[], int]], *, last_seq: int
) -> list[Part]:
    """Return the parts of the archive; of a merged one each segment, where some of them may go."""
    there = {one.first: one for one in archives(segments.directory)}
    firsts = sorted({*there, *coming})
    if not firsts:
        return []
    left = next((first for first in segments.in_log() if first > firsts[-1]), None)
    if left is None:
        name, reason = archive_of(segments.directory, firsts[-1]), "the log does not come so far"
        raise ArchiveDamaged(name, offset=0, seq=firsts[-1], reason=reason)
    following = [*firsts[1:], left]
    candidates = []
    young = not isinstance(keep, timedelta)  # else times are asked for, until the first is young
    for first, after in zip(firsts, following, strict=True):
        size = coming[first]() if first in coming else _bytes(segments.directory, there[first])
        newest = "" if young else _newest(segments, first)
        if isinstance(keep, timedelta) and newest >= retention.oldest_ts(keep):
            young = True
        candidates.append(Part(first, after - 1, size, newest))
    edge = retention.surplus(candidates, keep, last_seq=last_seq)
    for index in (edge, edge - 1):  # the first that stays, and the last that goes
        one = there.get(candidates[index].first) if 0 <= index < len(candidates) else None
        if one is not None and one.last > one.first:
            candidates[index : index + 1] = _within(segments.directory, one, candidates[index])
    return candidates


def _within(directory: Directory, one: Archive, part: Part) -> list[Part]:
    """Return the segments of a merged archive, the part as a whole where it cannot be read."""
    data = content(directory, one.name) or b""
    held = parts(data)
    ends = [*(first - 1 for first, _ in held[1:]), part.last]
    smaller = []
    for (first, lines), last in zip(held, ends[: len(held)], strict=True):
        newest = max(_TIME.findall(lines)).decode()
        smaller.append(Part(first, last, part.size * len(lines) // len(data), newest))
    return smaller or [part]


_TIME: Final = re.compile(rb'^\{"v":1,"seq":\d+,"ts":"([^"]*)"', re.MULTILINE)


def _bytes(directory: Directory, one: Archive) -> int:
    return os.stat(one.name, dir_fd=directory[layout.ARCHIVE], follow_symlinks=False).st_size


def _newest(segments: Segments, first: int) -> str:
    with segments.open(first) as source:
        steps = walk(source, start_of(first))
        return max((line["ts"] for line, *_ in steps if line is not None), default="")


def base_at(segments: Segments, last: int) -> Snapshot | None:
    """Return the state after what goes up to `last`: one that is kept, or folded from one before.

    Whatever goes is whole: of what is damaged nobody would hear any more. None where nobody can
    know the state: an older version dropped what leads to it, or a repair gave up events in
    between, and said so.
    Raises: DataDamaged.
    """
    firsts = segments.in_archive()
    for first in firsts:
        if first <= last:
            require_intact(segments, first)
    oldest = firsts[0]
    states = [s for s in snapshot.every(segments.directory) if oldest - 1 <= s.last_seq <= last]
    start = max(states, key=lambda state: state.last_seq, default=None)
    if start is None or start.last_seq == last:
        return start
    return retention.folded(lambda seen: refold(segments, start, Position(0, 0, last), seen=seen))


def _finish(log: Log) -> None:
    """Let go of what a retention that was killed had announced; the state after it is in place."""
    directory, firsts = log.directory, log.segments.in_archive()
    with suppress(SnapshotCorrupt):
        base = snapshot.read_base(directory)
        if base is None or not firsts or firsts[0] > base.last_seq:
            return
        drops = log.backwards(sieve=Sieve([type_needle(events.DROPPED)]))
        newest = next((line for line, _ in drops if line["type"] == events.DROPPED), None)
        if newest is None or newest["data"].get("last") != base.last_seq:
            return
        first = newest["data"].get("first")
        # version 0.1 sees no merged archives: what it drops may lie behind some, and they stay
        if isinstance(first, int) and first <= firsts[0]:
            _drop(log, first, base.last_seq)


def _drop(log: Log, first: int, last: int) -> None:
    snapshot.forget(log.directory, upto=last)
    drop(log.directory, first=first, last=last)


def _hash_after(log: Log, last: int) -> str:
    """Return the hash of the last line that goes, as the line after it tells."""
    line = first_line(log.segments, last + 1)
    return "" if line is None else line["prev"]
