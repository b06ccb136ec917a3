"""Look at what a store in a directory depends on: the directory, its file system, the wakes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast

from crewlog.local import disk, layout
from crewlog.local.log import Log
from crewlog.model.figures import size
from crewlog.place import Place
from crewlog.store import Store
from crewlog.watch.wake import Bell, Waker
from crewlog_compactor.reports import Check

_ROOM_BYTES: Final = 64 * 1024 * 1024


def checks(store: Store) -> Iterator[Check]:
    """Yield what a look at the directory, the log and the wakes finds."""
    log = cast("Log", store)  # its kind says so
    yield Check(name="place", status="ok", found=f"{log.where}: ours alone, on a local file system")
    yield _room(log)
    yield from _writing(log)
    yield _waking(log)


def _room(log: Log) -> Check:
    room = os.fstatvfs(log.directory.root)
    free = room.f_bavail * room.f_frsize
    free_text = f"{size(free)} free"
    if room.f_favail == 0 and room.f_files:
        return Check(name="room", status="fail", found="no inode is free", remedy="Remove files")
    if free < _ROOM_BYTES:
        return Check(
            name="room",
            status="warn",
            found=free_text,
            remedy="Make room: a compaction needs space for a second snapshot and an archive",
        )
    return Check(name="room", status="ok", found=free_text)


def _writing(log: Log) -> Iterator[Check]:
    head = log.head()
    if head.poisoned or disk.exists(layout.POISON, at=log.directory.root):
        yield Check(
            name="log",
            status="fail",
            found="a sync failed; no change is taken",
            remedy="Check the disk, then run: crewlog repair",
        )
    elif log.recovery_pending:
        yield Check(
            name="log",
            status="note",
            found=f"seq {head.seq}; the machine was restarted since, or files differ in age",
            remedy="The next change recovers what needs it",
        )
    else:
        yield Check(name="log", status="ok", found=f"seq {head.seq} is durable")
    if not disk.exists(layout.REDO, at=log.directory.root):
        yield Check(
            name="redo",
            status="warn",
            found="it is missing: each change syncs the log itself, which takes longer",
            remedy="It is made anew by the first change after a restart of the machine",
        )


def _waking(log: Log) -> Check:
    with Waker(log.channel, backend="auto", bell=Bell()) as waker:
        source = waker.source
    if source == "poll":
        return Check(
            name="wakes",
            status="warn",
            found="the system tells of no changes: watchers poll",
            remedy="Raise fs.inotify.max_user_instances and fs.inotify.max_user_watches (sysctl)",
        )
    limits = [_limit(name) for name in ("max_user_instances", "max_user_watches")]
    limited = ", ".join(limit for limit in limits if limit)
    return Check(
        name="wakes", status="ok", found=f"by {source}" + (f" ({limited})" if limited else "")
    )


def _limit(name: str) -> str:
    try:
        return f"{name} {Path('/proc/sys/fs/inotify', name).read_text().strip()}"
    except OSError:  # not Linux
        return ""


def outlook(place: Place) -> tuple[str, list[Check]]:
    """Return why no store can be made at a directory, "" where one can; there is no more to say."""
    path = place.path
    there = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
    if not os.path.isdir(there):
        return f"{there} is no directory", []
    allowed = os.access(there, os.W_OK | os.X_OK)
    return "" if allowed else f"we may not write in {there}", []
