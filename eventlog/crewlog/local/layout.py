"""Name every file of a store; open its directory once and for all, check it, know its identity.

A store is a directory::

    DIR/                     0700
      store.json             the store's identity; its existence means "initialised"
      locks/append           flock: who may write lines
      locks/sync.0 .1        flock: who runs the current fdatasync
      locks/compact          flock: who compacts, repairs or migrates
      append.state           how far lines have been written (a cache, never the truth)
      redo                   what was committed since its segment was synced, a second time
      head/durable           how far lines are durable (what readers watch)
      log/<first seq>.jsonl  segments; the last one is active, the others end with a seal
      registry.json          the snapshot; registry.prev.json is the one before it
      archive/               sealed segments, compressed: the audit history; and states on the way
      leases/<sid>~<token>   held by flock for as long as a worker lives; carries its last beat
      cursors/ quarantine/   positions of subscribers; bytes taken out of the log
"""

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
from crewlog.local import disk
from crewlog.local.disk import Disk
from crewlog.model import codec
from crewlog.model.limits import DEFAULT, Limits
from crewlog.model.snapshot import SNAPSHOT_BYTES_MAX

STORE: Final = "store.json"
SNAPSHOT: Final = "registry.json"
SNAPSHOT_PREV: Final = "registry.prev.json"
APPEND_STATE: Final = "append.state"
REDO: Final = "redo"
POISON: Final = "POISON.json"
LOCKS: Final = "locks"
HEAD: Final = "head"
LOG: Final = "log"
ARCHIVE: Final = "archive"
CURSORS: Final = "cursors"
LEASES: Final = "leases"
QUARANTINE: Final = "quarantine"
# Files that a creation makes before store.json says that there is a store.
NEWBORN: Final = (APPEND_STATE, REDO)
DIRECTORIES: Final = (LOCKS, HEAD, LOG, ARCHIVE, CURSORS, LEASES, QUARANTINE)

HEAD_DURABLE: Final = "durable"
LOCK_APPEND: Final = "append"
LOCK_SYNC: Final = ("sync.0", "sync.1")
LOCK_COMPACT: Final = "compact"
LOCK_NAMES: Final = (LOCK_APPEND, *LOCK_SYNC, LOCK_COMPACT)

SEGMENT_SUFFIX: Final = ".jsonl"
ARCHIVE_SUFFIXES: Final = {"gzip": ".jsonl.gz", "zstd": ".jsonl.zst"}
ZSTD_SUFFIX: Final = ".zst"
# In archive/: the state before its oldest segment, once retention dropped what was before.
BASE: Final = "base.json"
SEGMENT_DIGITS: Final = 20
# In archive/: the state after the event of that seq, compressed, so that a past one is soon told.
STATE_PREFIX: Final = "state-"
STATE_SUFFIX: Final = ".json.gz"

SMALL_FILE_BYTES_MAX: Final = 4096


def segment_name(first_seq: int) -> str:
    """Name the segment whose header line carries `first_seq`."""
    return f"{first_seq:0{SEGMENT_DIGITS}d}{SEGMENT_SUFFIX}"


def archive_name(first_seq: int, packing: str = "gzip") -> str:
    """Name the archived form of that segment."""
    return f"{first_seq:0{SEGMENT_DIGITS}d}{ARCHIVE_SUFFIXES[packing]}"


def merged_name(first_seq: int, last_seq: int, packing: str) -> str:
    """Name the archive that holds all segments from one seq to another."""
    digits = f"{first_seq:0{SEGMENT_DIGITS}d}-{last_seq:0{SEGMENT_DIGITS}d}"
    return f"{digits}{ARCHIVE_SUFFIXES[packing]}"


def first_seq_of(name: str) -> int | None:
    """Read the first seq out of a segment's or an archived segment's name, None for other names."""
    digits, dot, rest = name.partition(".")
    if dot + rest not in {SEGMENT_SUFFIX, *ARCHIVE_SUFFIXES.values()}:
        return None
    return _seq(digits)


def merged_seqs_of(name: str) -> tuple[int, int] | None:
    """Read the first and the last seq out of the name of a merged archive, None for other names."""
    digits, dot, rest = name.partition(".")
    begin, dash, end = digits.partition("-")
    if not dash or dot + rest not in ARCHIVE_SUFFIXES.values():
        return None
    first, last = _seq(begin), _seq(end)
    return None if first is None or last is None or last < first else (first, last)


def _seq(digits: str) -> int | None:
    if len(digits) != SEGMENT_DIGITS or not digits.isascii() or not digits.isdigit():
        return None
    return int(digits)


def state_name(seq: int) -> str:
    """Name the state that is kept as of `seq`."""
    return f"{STATE_PREFIX}{seq:0{SEGMENT_DIGITS}d}{STATE_SUFFIX}"


def state_seq_of(name: str) -> int | None:
    """Read the seq out of the name of a kept state, None for other names."""
    digits = name.removeprefix(STATE_PREFIX).removesuffix(STATE_SUFFIX)
    if not digits.isascii() or not digits.isdigit() or name != state_name(int(digits)):
        return None
    return int(digits)


FORCE_NETWORK: Final = "CREWLOG_FORCE_NETWORK_FS"


# -- the open directory -----------------------------------------------------------------------


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
        return self.where(LOCKS, name)


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

    def __del__(self, is_ending: host.IsEnding = host.is_ending) -> None:
        """Close them."""
        if is_ending():
            return
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
            for name in DIRECTORIES:
                opened.add(name, disk.open_directory(name, at=root, where=str(path / name)))
        except FileNotFoundError as error:
            raise incomplete(error, root=root, where=str(path)) from error
        local = _require_local(root, path)
    return Directory(path, opened, store, digest, via or Disk(), local, limits)


# What a backup may leave out because it is empty.
_EMPTY: Final = frozenset({LOCKS, ARCHIVE, CURSORS, LEASES, QUARANTINE})


def incomplete(error: FileNotFoundError, *, root: int, where: str) -> CrewlogError:
    """Return what to say of a file that is missing: the store was removed, or is not whole."""
    if os.fstat(root).st_nlink == 0 or not disk.exists(STORE, at=root):
        return StoreMissing(where, why=f"{error.filename} was removed")
    from shlex import quote  # noqa: PLC0415 (start-up)

    missing = Path(error.filename)
    gone = [name for name in DIRECTORIES if not disk.exists(name, at=root)]
    remedy = "Restore it from a backup"
    if gone and _EMPTY.issuperset(gone):
        names = " ".join(quote(str(Path(where, name))) for name in gone)
        remedy = f"If nothing was in it: mkdir -m 700 {names}"
    elif missing.parent.name == LOCKS:
        names = " ".join(quote(str(missing.with_name(name))) for name in LOCK_NAMES)
        remedy = f"Once no process uses the registry: (umask 77; touch {names})"
    return NotAStore("not a whole registry", where=str(missing), why="it is missing", remedy=remedy)


def unsafe(real: Path, error: UnsafePermissions, *, where: str) -> CrewlogError:
    """Return what to say of a directory that is open to others: nobody must close /etc for us."""
    try:
        names = os.listdir(real)
    except OSError:  # not even that is allowed
        return error
    strangers = sorted(set(names) - {*DIRECTORIES, *NEWBORN})
    if STORE in names or not strangers:
        return error
    return NotAStore(
        "not a registry",
        where=where,
        why=f"there is no {STORE}, but {', '.join(strangers[:3])}",
        remedy="Choose an empty or a new directory",
    )


def _identity(root: int, path: Path) -> tuple[bytes, str]:
    where = str(path / STORE)
    try:
        data = disk.read_all(STORE, at=root, where=where, limit=SMALL_FILE_BYTES_MAX)
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
    LOCKS: frozenset(LOCK_NAMES),
    HEAD: frozenset({HEAD_DURABLE}),
    LOG: frozenset({segment_name(1)}),
}


def require_outside(path: Path) -> None:
    """Refuse a place within the directory of a registry: what lies there is its own.

    Raises: NotAStore.
    """
    for parent in Path(os.path.realpath(path)).parents:
        if all(os.path.lexists(parent / name) for name in (STORE, LOCKS, HEAD, LOG)):
            raise NotAStore(
                "this is no place for other files",
                where=str(path),
                why=f"it lies within the registry {parent}",
                remedy="Choose a path outside of it",
            )


def require_newborn(root: int, path: Path) -> None:
    """Refuse a directory that holds anything but what an interrupted creation leaves."""
    names = disk.names(root, where=str(path))
    known = {*DIRECTORIES, *NEWBORN}
    strangers = [name for name in names if name not in known and not disk.is_temporary(name)]
    for name in DIRECTORIES:
        if name in names:
            strangers += _strangers(root, path, name)
    # Looked for last: another process may have finished its creation since the listing.
    if not strangers or STORE in disk.names(root, where=str(path)):
        return
    remedy = "Choose an empty or a new directory"
    if SNAPSHOT in strangers:
        remedy = f"To take over an older registry: crewlog --dir NEW import {path}/{SNAPSHOT}"
    raise NotAStore(
        "not a registry",
        where=str(path),
        why=f"there is no {STORE}, but {', '.join(strangers[:3])}",
        remedy=remedy,
    )


def _strangers(root: int, path: Path, name: str) -> list[str]:
    fd = disk.open_directory(name, at=root, where=str(path / name))
    try:
        allowed, there = _NEWBORN.get(name, frozenset()), disk.names(fd, where=str(path / name))
        strangers = [n for n in there if n not in allowed and not disk.is_temporary(n)]
        first = segment_name(1)
        if name == LOG and first in there:
            where = str(path / name / first)
            data = disk.read_all(first, at=fd, where=where, limit=SNAPSHOT_BYTES_MAX)
            if data.count(b"\n") > 1:  # more than its header: it was a store once
                strangers.append(first)
    finally:
        os.close(fd)
    return [f"{name}/{n}" for n in strangers]


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
