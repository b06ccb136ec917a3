"""Open a store's directory once and for all; find it, check it, know its identity."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from crewlog import host
from crewlog.errors import (
    CrewlogError,
    NotAStore,
    StoreMissing,
    UnsafePermissions,
    Unsupported,
)
from crewlog.local import disk, layout
from crewlog.local.disk import Disk
from crewlog.model import codec
from crewlog.model.limits import DEFAULT, Limits
from crewlog.model.snapshot import SNAPSHOT_BYTES_MAX

FORCE_NETWORK: Final = "CREWLOG_FORCE_NETWORK_FS"


@dataclass(frozen=True, slots=True)
class Directory:
    """An open store: descriptors of its directories, and who it is.

    `digest` is the SHA-256 of store.json, the `prev` of the first line.
    """

    path: Path
    opened: "Descriptors" = field(repr=False)
    store: str
    digest: bytes
    disk: Disk
    local: bool
    limits: Limits = DEFAULT

    @property
    def root(self) -> int:
        """Return the descriptor of the store's directory itself."""
        return self.opened.fds[""]

    def __getitem__(self, name: str) -> int:
        """Return the descriptor of one of the directories in it, "" for the store itself."""
        return self.opened.fds[name]

    def where(self, *names: str) -> str:
        """Return the full name of a file of the store, for messages."""
        return str(self.path.joinpath(*names))

    def names(self, name: str) -> list[str]:
        """List one of the directories in it, sorted."""
        return disk.names(self[name], where=self.where(name))

    def is_at(self, path: Path) -> bool:
        """Say whether the directory at `path` is this one; True where nothing is there."""
        try:
            there, mine = os.stat(path), os.fstat(self.root)
        except FileNotFoundError:
            return True
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def lock_path(self, name: str) -> str:
        """Return the full name of a lock file, for messages."""
        return self.where(layout.LOCKS, name)


class Descriptors:
    """Descriptors that are closed when their last user lets go of them.

    Not before: a number that was closed may at once be another file's, and a thread in the middle
    of something would write there.
    """

    __slots__ = ("fds", "files")

    def __init__(self) -> None:
        """Hold none yet."""
        self.fds: dict[str, int] = {}
        self.files: dict[str, host.FileId] = {}

    def add(self, name: str, fd: int) -> None:
        """Hold one more."""
        self.fds[name], self.files[name] = fd, host.own(fd)

    def are_ours(self) -> bool:
        """Say whether the store's own number still names it; the others go the same way."""
        return host.is_still(self.fds[""], self.files[""])

    def __del__(self) -> None:
        """Close them."""
        for name, fd in self.fds.items():
            host.close_own(fd, self.files[name])


def open_existing(path: Path, *, via: Disk | None = None, limits: Limits = DEFAULT) -> Directory:
    """Open the store at `path`; this creates and changes nothing.

    Raises: StoreMissing if there is none; NotAStore, FormatTooNew, UnsafePermissions or Unsupported
    if it must not be used.
    """
    real = disk.resolved(path)
    with disk.failures("cannot open the registry", where=str(path)):
        try:
            root = disk.open_directory(str(real), where=str(path))
        except FileNotFoundError as error:
            raise StoreMissing(str(path), why="there is no such directory") from error
        except NotADirectoryError as error:
            raise NotAStore(
                "not a registry", where=str(path), why="it is not a directory", remedy="Check --dir"
            ) from error
        except UnsafePermissions as error:
            raise unsafe(real, error, where=str(path)) from error
        opened = Descriptors()
        opened.add("", root)
        disk.check_ancestors(real)
        digest, store = _identity(root, path)
        try:
            for name in layout.DIRECTORIES:
                opened.add(name, disk.open_directory(name, at=root, where=str(path / name)))
        except FileNotFoundError as error:
            raise incomplete(error, root=root, where=str(path)) from error
        local = _require_local(root, path)
    return Directory(path, opened, store, digest, via or Disk(), local, limits)


# What a backup may leave out because it is empty.
_EMPTY: Final = frozenset(
    {layout.LOCKS, layout.ARCHIVE, layout.CURSORS, layout.LEASES, layout.QUARANTINE}
)


def incomplete(error: FileNotFoundError, *, root: int, where: str) -> CrewlogError:
    """Return what to say of a file that is missing: the store was removed, or is not whole."""
    if os.fstat(root).st_nlink == 0 or not disk.exists(layout.STORE, at=root):
        return StoreMissing(where, why=f"{error.filename} was removed")
    from shlex import quote  # noqa: PLC0415 (start-up)

    missing = Path(error.filename)
    gone = [name for name in layout.DIRECTORIES if not disk.exists(name, at=root)]
    remedy = "Restore it from a backup"
    if gone and _EMPTY.issuperset(gone):
        names = " ".join(quote(str(Path(where, name))) for name in gone)
        remedy = f"If nothing was in it: mkdir -m 700 {names}"
    elif missing.parent.name == layout.LOCKS:
        names = " ".join(quote(str(missing.with_name(name))) for name in layout.LOCK_NAMES)
        remedy = f"Once no process uses the registry: (umask 77; touch {names})"
    return NotAStore("not a whole registry", where=str(missing), why="it is missing", remedy=remedy)


def unsafe(real: Path, error: UnsafePermissions, *, where: str) -> CrewlogError:
    """Return what to say of a directory that is open to others: nobody must close /etc for us."""
    try:
        found = os.listdir(real)
    except OSError:  # not even that is allowed
        return error
    strangers = sorted(set(found) - {*layout.DIRECTORIES, *layout.NEWBORN})
    if layout.STORE in found or not strangers:
        return error
    return NotAStore(
        "not a registry",
        where=where,
        why=f"there is no {layout.STORE}, but {', '.join(strangers[:3])}",
        remedy="Choose an empty or a new directory",
    )


def _identity(root: int, path: Path) -> tuple[bytes, str]:
    where = str(path / layout.STORE)
    try:
        data = disk.read_all(layout.STORE, at=root, where=where, limit=layout.SMALL_FILE_BYTES_MAX)
    except FileNotFoundError as error:
        require_newborn(root, path)
        raise StoreMissing(str(path)) from error
    try:
        return codec.digest(data), codec.decode_identity(data, where=where)
    except codec.DocumentError as error:
        raise NotAStore(
            "not a registry", where=where, why=str(error), remedy="Restore this file from a backup"
        ) from error


# What an interrupted creation may leave in each directory of the store.
_NEWBORN: Final = {
    layout.LOCKS: frozenset(layout.LOCK_NAMES),
    layout.HEAD: frozenset({layout.HEAD_DURABLE}),
    layout.LOG: frozenset({layout.segment_name(1)}),
}


def require_newborn(root: int, path: Path) -> None:
    """Refuse a directory that holds anything but what an interrupted creation leaves."""
    found = disk.names(root, where=str(path))
    known = {*layout.DIRECTORIES, *layout.NEWBORN}
    strangers = [name for name in found if name not in known and not disk.is_temporary(name)]
    for name in layout.DIRECTORIES:
        if name in found:
            strangers += _strangers(root, path, name)
    # Looked for last: another process may have finished its creation since the listing.
    if not strangers or layout.STORE in disk.names(root, where=str(path)):
        return
    remedy = "Choose an empty or a new directory"
    if layout.SNAPSHOT in strangers:
        remedy = (
            f"To take over an older registry: crewlog --dir NEW import {path}/{layout.SNAPSHOT}"
        )
    raise NotAStore(
        "not a registry",
        where=str(path),
        why=f"there is no {layout.STORE}, but {', '.join(strangers[:3])}",
        remedy=remedy,
    )


def _strangers(root: int, path: Path, name: str) -> list[str]:
    fd = disk.open_directory(name, at=root, where=str(path / name))
    try:
        allowed, there = _NEWBORN.get(name, frozenset()), disk.names(fd, where=str(path / name))
        found = [n for n in there if n not in allowed and not disk.is_temporary(n)]
        first = layout.segment_name(1)
        if name == layout.LOG and first in there:
            where = str(path / name / first)
            data = disk.read_all(first, at=fd, where=where, limit=SNAPSHOT_BYTES_MAX)
            if data.count(b"\n") > 1:  # more than its header: it was a store once
                found.append(first)
    finally:
        os.close(fd)
    return [f"{name}/{n}" for n in found]


def _require_local(root: int, path: Path) -> bool:
    if not disk.is_network_file_system(root):
        return True
    if os.environ.get(FORCE_NETWORK) != "1":
        raise Unsupported(
            "not on a network file system",
            where=str(path),
            why="locks, appends and wake-ups do not hold there",
            remedy=f"Use a local directory, or set {FORCE_NETWORK}=1 at your own risk",
        )
    return False
