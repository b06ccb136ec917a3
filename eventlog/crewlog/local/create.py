"""Create a store: everything else first and durable, store.json last.

The link that gives store.json its name, made durable, is the commit point: before it there is no
store, and whatever an interrupted creation left is swept and made again.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from crewlog import host
from crewlog.errors import LogCorrupt, NotAStore, StoreMissing, UnsafePermissions, from_oserror
from crewlog.local import disk, heads, layout, recovery, redo, snapshot
from crewlog.local.disk import Disk
from crewlog.local.heads import States
from crewlog.local.layout import Descriptors, Directory, open_existing, require_newborn, unsafe
from crewlog.local.lock import Lock
from crewlog.local.segments import put
from crewlog.model import chain, codec, events
from crewlog.model.limits import DEFAULT, Limits
from crewlog.model.snapshot import Snapshot
from crewlog.process import identity
from crewlog.store import new_identity


def open_or_create(
    path: Path, *, via: Disk | None = None, wait_s: float, limits: Limits = DEFAULT
) -> Directory:
    """Open the store at `path`, creating it if there is none; durable on return.

    Raises: what open_existing raises, and LockBusy.
    """
    try:
        return open_existing(path, via=via, limits=limits)
    except StoreMissing:
        pass
    return _created(path, via or Disk(), _first_segment, wait_s=wait_s, limits=limits)


class Content(NamedTuple):
    """What a store that is made from another one's history holds.

    `segments` are (first seq, bytes), in order, each but the last sealed; `base` is the state
    before the first of them, None where that is the empty one. `snapshot` is asked for after the
    last segment: the state after the last sealed one, None where none is.
    """

    identity: bytes
    segments: Iterator[tuple[int, bytes]]
    base: Snapshot | None
    snapshot: Callable[[], Snapshot | None]


def create_with(path: Path, content: Content, *, wait_s: float) -> Directory:
    """Create the store at `path` with a history; durable on return.

    Raises: NotAStore where there is a store already, or anything else.
    """
    with contextlib.suppress(StoreMissing):
        there = open_existing(path)
        raise NotAStore(
            "the target is not empty",
            where=str(path),
            why=f"there is store {there.store}",
            remedy="Choose an empty or a new directory",
        )

    def fill(newborn: "Blank") -> Newborn:
        return _filled_with(content, newborn)

    return _created(path, Disk(), fill, wait_s=wait_s, limits=DEFAULT)


class Newborn(NamedTuple):
    """A store that lacks only its store.json, and the bytes of that."""

    directory: Directory
    identity: bytes
    first: int
    end: int
    seq: int
    hash: bytes
    sealed: bool


class Blank(NamedTuple):
    """A directory that is to become a store."""

    path: Path
    opened: Descriptors
    via: Disk
    limits: Limits

    def known_as(self, identity_: bytes) -> Directory:
        """Return it as the store of that identity."""
        store, digest = str(codec.load_object(identity_)["store"]), codec.digest(identity_)
        return Directory(
            self.path, self.opened, store, digest, self.via, local=True, limits=self.limits
        )


Fill: TypeAlias = Callable[[Blank], Newborn]


def _created(path: Path, via: Disk, fill: Fill, *, wait_s: float, limits: Limits) -> Directory:
    try:
        _create(Blank(path, Descriptors(), via, limits), fill, wait_s=wait_s)
    except OSError as error:
        raise from_oserror(error, "cannot create the registry", where=str(path)) from error
    return open_existing(path, via=via, limits=limits)


def _create(blank: Blank, fill: Fill, *, wait_s: float) -> None:
    path, opened, via = blank.path, blank.opened, blank.via
    real = disk.resolved(path)
    layout.require_outside(real)
    _make_directories(real, via)
    try:
        root = disk.open_directory(str(real), where=str(path))
        opened.add("", root)
    except UnsafePermissions as error:
        raise unsafe(real, error, where=str(path)) from error
    disk.check_ancestors(real)
    require_newborn(root, path)
    for name in layout.DIRECTORIES:
        _make_inside(name, root, via)
        opened.add(name, disk.open_directory(name, at=root, where=str(path / name)))
    locks = opened.fds[layout.LOCKS]
    for name in layout.LOCK_NAMES:
        _touch(name, locks, via)
    via.sync_directory(locks)
    where = str(path / layout.LOCKS / layout.LOCK_APPEND)
    lock = Lock(layout.LOCK_APPEND, at=locks, where=where)
    try:
        lock.acquire(wait_s=wait_s)
        if not disk.exists(layout.STORE, at=root):
            _sweep_leftovers(opened, via, where=str(path))
            _finish(fill(blank), opened, via)
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


def _first_segment(blank: Blank) -> Newborn:
    """Write a first segment that holds its header. Held: append."""
    now = events.timestamp(host.now())
    data = new_identity(now)
    newborn = blank.known_as(data)
    header, line = chain.own_line(
        events.SEGMENT,
        recovery.header_data(newborn, identity.boot_id(), None),
        seq=1,
        ts=now,
        synced=0,
        prev=newborn.digest,
    )
    put(newborn, 1, header)
    hash_ = codec.digest(header[:-1])
    return Newborn(newborn, data, 1, len(header), line["seq"], hash_, sealed=False)


def _filled_with(content: Content, blank: Blank) -> Newborn:
    """Write all segments of a history, and the state that it begins with. Held: append."""
    newborn = blank.known_as(content.identity)
    first, data, seq = 0, b"", 0
    for first, data in content.segments:
        put(newborn, first, data)
    scan = chain.scan(data, offset=0, seq=first - 1, prev=None)
    if scan.reason is not None or not data:
        raise LogCorrupt(
            layout.segment_name(first),
            offset=scan.end,
            seq=scan.seq + 1,
            reason=scan.reason or "it is empty",
            proof="it was read from a whole history",
        )
    seq = scan.seq
    if content.base is not None:
        snapshot.put_base(newborn, content.base)
        snapshot.replace(newborn, content.base)
    folded = content.snapshot()
    if folded is not None:
        snapshot.replace(newborn, folded)
    return Newborn(newborn, content.identity, first, len(data), seq, scan.hash, scan.sealed)


def _finish(made: Newborn, opened: Descriptors, via: Disk) -> None:
    """Write the states and, last, store.json. Held: append."""
    root, newborn = opened.fds[""], made.directory
    via.sync_directory(newborn[layout.LOG])
    state = heads.written(
        identity.boot_bytes(), made.first, made.end, made.seq, made.hash, sealed=made.sealed
    )
    states = States(newborn)
    states.put_append_state(state)
    states.put_head(heads.durable(state, base=made.end, after=None))
    states.close()
    redo.make(newborn)
    via.sync_directory(root)
    temporary = f"{disk.TEMPORARY_PREFIX}store-{os.getpid()}"
    disk.write_new(via, temporary, made.identity, at=root)
    via.link(temporary, layout.STORE, at=root, new_at=root)
    via.unlink(temporary, at=root)
    via.sync_directory(root)


def _sweep_leftovers(opened: Descriptors, via: Disk, *, where: str) -> None:
    """Remove what an interrupted creation left; require_newborn made sure that it is only that."""
    root = opened.fds[""]
    for name in disk.names(root, where=where):
        if name in layout.NEWBORN or disk.is_temporary(name):
            via.unlink(name, at=root)
    for directory in (layout.LOG, layout.HEAD):
        for name in disk.names(opened.fds[directory], where=where):
            via.unlink(name, at=opened.fds[directory])
