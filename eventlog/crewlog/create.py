"""Create a store: everything else first and durable, store.json last.

The link that gives store.json its name, made durable, is the commit point: before it there is no
store, and whatever an interrupted creation left is swept and made again.
"""

import os
from pathlib import Path

from crewlog import codec, disk, events, identity, layout, redo, segments, structs, tail
from crewlog.directory import (
    Descriptors,
    Directory,
    new_identity,
    open_existing,
    require_newborn,
    unsafe,
)
from crewlog.disk import Disk
from crewlog.errors import NotAStore, StoreMissing, UnsafePermissions, from_oserror
from crewlog.lock import Lock
from crewlog.states import States
from crewlog.structs import DurableHead


def open_or_create(path: Path, *, via: Disk | None = None, wait_s: float) -> Directory:
    """Open the store at `path`, creating it if there is none; durable on return.

    *Raises* what open_existing raises, and LockBusy.
    """
    try:
        return open_existing(path, via=via)
    except StoreMissing:
        pass
    try:
        _create(path, via or Disk(), wait_s=wait_s)
    except OSError as error:
        raise from_oserror(error, "cannot create the registry", where=str(path)) from error
    return open_existing(path, via=via)


def _create(path: Path, via: Disk, *, wait_s: float) -> None:
    real = path.resolve()
    _make_directories(real, via)
    opened = Descriptors()
    try:
        root = opened.fds[""] = disk.open_directory(str(real), where=str(path))
    except UnsafePermissions as error:
        raise unsafe(real, error, where=str(path)) from error
    disk.check_ancestors(real)
    require_newborn(root, path)
    for name in layout.DIRECTORIES:
        _make_inside(name, root, via)
        opened.fds[name] = disk.open_directory(name, at=root, where=str(path / name))
    locks = opened.fds[layout.LOCKS]
    for name in layout.LOCK_NAMES:
        _touch(name, locks, via)
    via.sync_directory(locks)
    where = str(path / layout.LOCKS / layout.LOCK_APPEND)
    lock = Lock(layout.LOCK_APPEND, at=locks, where=where)
    try:
        lock.acquire(wait_s=wait_s)
        if not disk.exists(layout.STORE, at=root):
            _fill(path, opened, via)
    finally:
        lock.close()


def _make_directories(real: Path, via: Disk) -> None:
    """Make the directory and the parents that are missing, each owner-only.

    Every name on the way is made durable, also those that are there already: who made them may
    have died before it did that.
    """
    for place in reversed([real, *real.parents]):
        if not place.exists():
            try:
                via.make_directory(str(place))
            except FileExistsError:  # another process creates it too
                continue
    for place in (real, *real.parents):
        if place.parent.stat().st_uid == os.geteuid():
            parent = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                via.sync_directory(parent)
            finally:
                os.close(parent)
    if not real.is_dir():
        raise NotAStore(
            "not a registry", where=str(real), why="it is not a directory", remedy="Check --dir"
        )


def _make_inside(name: str, root: int, via: Disk) -> None:
    try:
        via.make_directory(name, at=root)
    except FileExistsError:  # another process creates it too, or did and was interrupted
        return


def _touch(name: str, at: int, via: Disk) -> None:
    try:
        os.close(via.create(name, at=at))
    except FileExistsError:  # as above
        return


def _fill(path: Path, opened: Descriptors, via: Disk) -> None:
    """Write the first segment, the states and, last, store.json. Held: append."""
    root = opened.fds[""]
    _sweep_leftovers(opened, via)
    now = events.timestamp(events.now())
    data = new_identity(now)
    store = str(codec.load_object(data)["store"])
    newborn = Directory(path, opened, store, codec.digest(data), via, local=True)
    header, line = segments.own_line(
        events.SEGMENT,
        tail.header_data(newborn, identity.boot_id(), None),
        seq=1,
        ts=now,
        synced=0,
        prev=newborn.digest,
    )
    segments.put(newborn, 1, header)
    via.sync_directory(newborn[layout.LOG])
    boot, end = identity.boot_bytes(), len(header)
    states = States(newborn)
    states.put_append_state(structs.written(boot, 1, end, line["seq"], codec.digest(header[:-1])))
    states.put_head(
        DurableHead(0, boot, 1, end, end, line["seq"], oldest=1, poisoned=False, errno=0)
    )
    states.close()
    redo.make(newborn)
    via.sync_directory(root)
    temporary = f"{layout.TEMPORARY_PREFIX}store-{os.getpid()}"
    disk.write_new(via, temporary, data, at=root)
    via.link(temporary, layout.STORE, at=root, new_at=root)
    via.unlink(temporary, at=root)
    via.sync_directory(root)


def _sweep_leftovers(opened: Descriptors, via: Disk) -> None:
    """Remove what an interrupted creation left; require_newborn made sure that it is only that."""
    root = opened.fds[""]
    for name in disk.names(root):
        if name in layout.NEWBORN or layout.is_temporary(name):
            via.unlink(name, at=root)
    for directory in (layout.LOG, layout.HEAD):
        for name in disk.names(opened.fds[directory]):
            via.unlink(name, at=opened.fds[directory])
