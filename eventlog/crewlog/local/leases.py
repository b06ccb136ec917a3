"""Keep leases: a file that a worker holds locked for as long as it lives, with its last beat.

The lock is a flock, so the kernel gives it back with the last descriptor, however the worker
ends. It proves life and death where a pid proves nothing: in another pid namespace. A lease is
held by the worker itself, from inside, or inherited from who started it; its name is unique, so
it never speaks for an earlier or later worker of the same sid. Nothing here is synced: locks and
beats end with the boot.
"""

import contextlib
import os
import re
import struct
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Final, NamedTuple

from crewlog.errors import LockBusy, StorageFailed, StoreMissing
from crewlog.local import disk, layout
from crewlog.local.layout import Directory
from crewlog.local.lock import Lock, take
from crewlog.model import arguments
from crewlog.model.events import Worker
from crewlog.model.shape import TORN_READ_TRIES, Shape, with_crc
from crewlog.process import identity
from crewlog.process.liveness import LeaseSeen, LeaseState

LEASE_TRIES: Final = 8

_MARK: Final = "~"  # in no sid
_TOKEN: Final = re.compile(r"[0-9a-f]{8}(?:[0-9a-f]{16})?|turn")
_TOKEN_CHARS: Final = 24
_LENGTH: Final = struct.Struct("<H")
_CRC_BYTES: Final = 4
# Held until this process ends, whatever becomes of the registry that took them.
_kept: "list[Lease]" = []


class Beat(NamedTuple):
    """The last beat of a worker: when, by which monotonic clock (identity.clock_bytes)."""

    boot: bytes
    at_ns: int


_BEAT: Final = Shape(b"crewlogB", "16sQ")
LEASE_BYTES_MAX: Final = 4096  # of a lease file: a beat, and what the worker says of itself
encode_beat: Final[Callable[[Beat], bytes]] = _BEAT.pack


def decode_beat(data: bytes) -> Beat | None:
    """Read a lease file; None means no beat yet, torn or damaged."""
    fields = _BEAT.unpack(data[: _BEAT.size])
    return None if fields is None else Beat._make(fields)


def _encode_said(said: bytes) -> bytes:
    """Write what stands behind a beat: what the worker says of itself, its length and CRC-32."""
    return with_crc(_LENGTH.pack(len(said)) + said)


def _decode_said(data: bytes) -> bytes | None:
    """Read what a worker says of itself from a whole lease file; b"" for nothing, None if torn."""
    body = data[_BEAT.size :]
    if len(body) < _LENGTH.size:
        return b""
    end = _LENGTH.size + _LENGTH.unpack_from(body)[0]
    if body[: end + _CRC_BYTES] != with_crc(body[:end]):
        return None
    return body[_LENGTH.size : end]


class Lease:
    """A lease that this process holds, or hands to the process that it starts."""

    def __init__(self, directory: Directory, sid: str) -> None:
        """Create a lease for a worker that is about to be registered, and lock it."""
        for _ in range(LEASE_TRIES):
            made = _create(directory, sid)
            if made is not None:
                self._directory = directory
                self.name, self._lock = made
                return
        where = directory.where(layout.LEASES)
        message = "cannot make a lease"
        raise StorageFailed(message, where=where, why="it is swept again and again", remedy="Retry")

    @property
    def fd(self) -> int:
        """Return the descriptor whose last copy holds the lease."""
        return self._lock.share()

    def inherited(self) -> Sequence[int]:
        """Return the descriptors by which a program that is started holds it."""
        return (self.fd,)

    def keep(self, _worker: Worker) -> None:
        """Hold it until this process ends, also when it becomes another program."""
        os.set_inheritable(self.fd, True)  # noqa: FBT003 (its only argument)
        _kept.append(self)

    def hand_over(self, _worker: Worker) -> None:
        """Close our copy: from here on the process that inherited one holds the lease."""
        self._lock.abandon()

    def drop(self) -> None:
        """Give the lease back, and remove its file: the worker was not registered, or has ended."""
        via, at = self._directory.disk, self._directory[layout.LEASES]
        with contextlib.suppress(OSError):  # a sweep removes what stays: nobody holds or needs it
            via.unlink(self.name, at=at)
        self._lock.close()


@contextmanager
def turn(directory: Directory, sid: str, *, wait_s: float) -> Iterator[Lock]:
    """Hold the turn to start a worker of one sid; a waiting process of ours may inherit it.

    It ends with the last descriptor: when its holder was killed, once the process that waited to
    become the program has ended too.
    Raises: LockBusy after `wait_s` seconds.
    """
    at, name = directory[layout.LEASES], f"{sid}{_MARK}turn"
    where = directory.where(layout.LEASES, name)
    deadline = time.monotonic() + wait_s
    lock = Lock(name, at=at, where=where)
    with disk.failures("cannot take the turn to start", where=where):
        for _ in range(LEASE_TRIES):
            with contextlib.suppress(FileExistsError):
                os.close(directory.disk.create(name, at=at))
            try:
                lock.acquire(wait_s=max(0.0, deadline - time.monotonic()))
                break
            except (FileNotFoundError, StoreMissing):  # swept meanwhile
                lock.close()
    try:
        yield lock
    finally:
        lock.close()


def _create(directory: Directory, sid: str) -> tuple[str, Lock] | None:
    """Create and lock a lease, return its name and the lock; None if a sweep came between.

    The name tells which file it is (device and inode): another file of that name, in a copy or from
    a backup, is held by nobody, and that proves nothing.
    """
    via, at = directory.disk, directory[layout.LEASES]
    begun = f"{sid}{_MARK}{os.urandom(4).hex()}"
    where = directory.where(layout.LEASES, begun)
    try:
        with disk.failures("cannot make a lease", where=where):
            fd = via.create(begun, at=at)
            try:
                name = f"{begun}{disk.place_of(fd):016x}"
            finally:
                os.close(fd)
            via.rename(begun, name, at=at)
            return name, take(name, at=at, where=directory.where(layout.LEASES, name))
    except (FileNotFoundError, StoreMissing, LockBusy):
        return None


def _is_another(fd: int, name: str) -> bool:
    """Say whether the file of a lease is not the one that was locked; older names do not tell."""
    token = name.partition(_MARK)[2]
    return len(token) == _TOKEN_CHARS and int(token[8:], 16) != disk.place_of(fd)


def beat(directory: Directory, name: str, said: bytes | None = None) -> bool:
    """Write down that the worker is well, now, and what it says of itself, None: as before.

    False if there is no such lease.
    """
    at, where = directory[layout.LEASES], directory.where(layout.LEASES, name)
    with disk.failures("cannot beat", where=where):
        try:
            fd = disk.open_file(name, at=at, where=where, change=True)
        except FileNotFoundError:
            return False
        try:
            disk.require_one_name(fd, where=where)
            now = Beat(identity.clock_bytes(), time.monotonic_ns())
            more = b"" if said is None else _encode_said(said)
            directory.disk.overwrite(fd, encode_beat(now) + more)
        finally:
            os.close(fd)
    return True


def look(directory: Directory, name: str) -> LeaseSeen:
    """Say who holds a lease, and how old its last beat is in seconds, None if that is not known.

    The look takes the lock shared, for a moment, so that two who look never see each other.
    """
    at, where = directory[layout.LEASES], directory.where(layout.LEASES, name)
    with disk.failures("cannot look at the lease", where=where):
        try:
            fd = disk.open_file(name, at=at, where=where)
        except FileNotFoundError:
            return LeaseSeen("absent")
        try:
            if _is_another(fd, name):
                return LeaseSeen("absent")
            age_s, said = _last_beat(fd)
        finally:
            os.close(fd)
    lock = Lock(name, at=at, where=where)
    try:
        state: LeaseState = "free" if lock.try_acquire(shared=True) else "held"
        return LeaseSeen(state, age_s, said=said)
    except (FileNotFoundError, StoreMissing):  # swept since
        return LeaseSeen("absent")
    finally:
        lock.close()


def _last_beat(fd: int) -> tuple[float | None, bytes]:
    """Return how old the last beat is in seconds, None if unknown, and what the worker said."""
    for _ in range(TORN_READ_TRIES):
        data = disk.read_at(fd, 0, LEASE_BYTES_MAX)
        last, said = decode_beat(data), _decode_said(data)
        if last is not None and said is not None:
            if last.boot != identity.clock_bytes():
                return None, b""
            return max(0, time.monotonic_ns() - last.at_ns) / 1e9, said
        if not data:
            break
    return None, b""


def sweep(directory: Directory, *, needed: Callable[[str, str], bool]) -> int:
    """Remove the leases that nobody holds and no living worker needs; return how many."""
    at, swept = directory[layout.LEASES], 0
    for name in directory.names(layout.LEASES):
        if not is_lease(name):
            continue
        try:
            lock = take(name, at=at, where=directory.where(layout.LEASES, name))
        except (LockBusy, FileNotFoundError, StoreMissing):  # held, or gone already
            continue
        try:  # asked under the lock: a worker that is being registered holds it
            if not needed(name.partition(_MARK)[0], name):
                directory.disk.unlink(name, at=at)
                swept += 1
        finally:
            lock.close()
    return swept


def is_lease(name: str) -> bool:
    """Say whether a name is one that leases have: what is not ours stays where it is."""
    sid, mark, token = name.partition(_MARK)
    return bool(mark and arguments.SID.fullmatch(sid) and _TOKEN.fullmatch(token))


class Leases:
    """The leases of a directory; see store.Leases."""

    __slots__ = ("_directory",)

    def __init__(self, directory: Directory) -> None:
        """Look at nothing yet."""
        self._directory = directory

    def make(self, sid: str, *, heartbeat_s: float | None) -> Lease:  # noqa: ARG002 (who looks compares)
        """Make a lease, with its first beat."""
        made = Lease(self._directory, sid)
        try:
            beat(self._directory, made.name)
        except BaseException:
            made.drop()
            raise
        return made

    def look(self, names: Collection[str]) -> Callable[[str], LeaseSeen]:  # noqa: ARG002 (one by one)
        """Return what looks at a lease."""
        return partial(look, self._directory)

    def beat(
        self,
        name: str,
        *,
        heartbeat_s: float | None,  # noqa: ARG002 (as above)
        said: bytes | None = None,
    ) -> bool:
        """Note that the worker is well, and what it says of itself."""
        return beat(self._directory, name, said)

    def turn(self, sid: str, *, wait_s: float) -> AbstractContextManager[Lock]:
        """Hold the turn to start a worker of one sid."""
        return turn(self._directory, sid, wait_s=wait_s)

    def sweep(self, *, needed: Callable[[str, str], bool]) -> int:
        """Remove what nobody holds or needs."""
        return sweep(self._directory, needed=needed)
