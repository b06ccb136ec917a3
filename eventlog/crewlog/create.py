"""Create a store: everything else first and durable, store.json last.

The link that gives store.json its name, made durable, is the commit point: before it there is no
store, and whatever an interrupted creation left is swept and made again.
"""

import os
from datetime import UTC, datetime
from pathlib import Path

from crewlog import codec, disk, events, identity, layout, segments, tail
from crewlog.codec import AppendState, DurableHead
from crewlog.directory import Directory, new_identity, open_existing, require_newborn
from crewlog.disk import Disk
from crewlog.errors import NotAStore, StoreMissing, from_oserror
from crewlog.lock import Lock
from crewlog.states import States


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
    root = disk.open_directory(str(real), where=str(path))
    opened = [root]
    try:
        disk.check_ancestors(real)
        require_newborn(root, path)
        inside: dict[str, int] = {}
        for name in layout.DIRECTORIES:
            _make_inside(name, root, via)
            inside[name] = disk.open_directory(name, at=root, where=str(path / name))
            opened.append(inside[name])
        for name in layout.LOCK_NAMES:
            _touch(name, inside[layout.LOCKS], via)
        via.sync_directory(inside[layout.LOCKS])
        where = str(path / layout.LOCKS / layout.LOCK_APPEND)
        lock = Lock(layout.LOCK_APPEND, at=inside[layout.LOCKS], where=where)
        with lock.held(wait_s=wait_s):
            if layout.STORE not in disk.names(root):
                _fill(path, root, inside, via)
        lock.close()
    finally:
        for fd in opened:
            os.close(fd)


def _make_directories(real: Path, via: Disk) -> None:
    """Make the directory and the parents that are missing, each owner-only and durable."""
    missing = [real, *real.parents]
    missing = [place for place in missing if not place.exists()]
    for place in reversed(missing):
        try:
            via.make_directory(str(place))
        except FileExistsError:  # another process creates it too
            continue
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


def _fill(path: Path, root: int, inside: dict[str, int], via: Disk) -> None:
    """Write the first segment, the states and, last, store.json. Held: append."""
    _sweep_leftovers(root, inside, via)
    now = events.timestamp(datetime.now(UTC))
    data = new_identity(now)
    store = str(codec.load_object(data)["store"])
    newborn = Directory(path, root, inside, store, codec.digest(data), via, local=True)
    header, line = segments.own_line(
        events.SEGMENT,
        tail.header_data(newborn, identity.boot_id(), None),
        seq=1,
        ts=now,
        synced=0,
        prev=newborn.digest,
    )
    segments.put(newborn, 1, header)
    boot, end = identity.boot_bytes(), len(header)
    states = States(newborn)
    states.put_append_state(
        AppendState(boot, 1, end, line["seq"], codec.digest(header[:-1]), sealed=False)
    )
    states.put_head(DurableHead(0, boot, 1, end, line["seq"], oldest=1, poisoned=False, errno=0))
    states.close()
    via.sync_directory(root)
    temporary = f"{layout.TEMPORARY_PREFIX}store-{os.getpid()}"
    disk.write_new(via, temporary, data, at=root)
    via.link(temporary, layout.STORE, at=root, new_at=root)
    via.unlink(temporary, at=root)
    via.sync_directory(root)


def _sweep_leftovers(root: int, inside: dict[str, int], via: Disk) -> None:
    """Remove what an interrupted creation left; require_newborn made sure that it is only that."""
    for name in disk.names(root):
        if name == layout.APPEND_STATE or name.startswith(layout.TEMPORARY_PREFIX):
            via.unlink(name, at=root)
    for directory in (layout.LOG, layout.HEAD):
        for name in disk.names(inside[directory]):
            via.unlink(name, at=inside[directory])
