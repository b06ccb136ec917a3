"""Hold flock locks with a deadline and an honest message.

flock belongs to the open file, not to the process: two registries of one process exclude each
other, threads that share a descriptor do not (they queue on a mutex before they come here). The
kernel drops a dead holder's lock at once; a stopped holder keeps it. The files of locks/ are never
unlinked, those of leases and cursors are, and a store may be restored under us: so after taking a
lock the path must name the file that is locked. Blocking flock has no deadline, hence the poll.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from crewlog import host
from crewlog.errors import LockBusy, StoreMissing
from crewlog.host import Closable
from crewlog.local import disk
from crewlog.local.disk import Stamp

LOCK_PAUSE_MAX_S: Final = 0.01  # of the usual waits that a first pause goes by
LOCK_POLL_MIN_S: Final = 0.000_02
LOCK_POLL_MAX_S: Final = 0.000_5
# Growing faster cost half of the p99 of 8 writers (5.3 against 3.1 ms).
LOCK_POLL_GROWTH: Final = 1.1

_CLOSED: Final = -1
_REPLACED_TRIES: Final = 3


class Bell(Protocol):
    """What changes when it is worth trying again; see heads.StateFile."""

    def look(self) -> int:
        """Return what it is now."""
        ...

    def wait(self, value: int, wait_s: float) -> None:
        """Wait until it is another, or a short while."""
        ...


class Lock(Closable):
    """One lock file, opened on first use."""

    __slots__ = (
        "__weakref__",
        "_at",
        "_fd",
        "_file",
        "_inode",
        "_name",
        "_stamp",
        "_usual_s",
        "release",
        "where",
    )

    def __init__(self, name: str, *, at: int, where: str) -> None:
        """Name a lock file in the open directory `at`."""
        self._name = name
        self._at = at
        self._fd = _CLOSED
        self._file = host.NO_FILE
        self._inode = 0
        # Gives the lock back, harmless when it is not held. A call of C: no signal handler comes
        # into it, as one may before the first instruction of a function.
        self.release: Callable[[], object] = bool
        self._stamp = Stamp(at)
        self._usual_s = 0.0  # what a wait has taken lately
        self.where = where
        host.renew_in_child(self, rank=host.LOCKS)

    def try_acquire(self, *, shared: bool = False) -> bool:
        """Take the lock if it is free at this moment."""
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        for _ in range(_REPLACED_TRIES):
            if self._fd == _CLOSED:
                self._open(change=not shared)
            try:
                fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:  # EWOULDBLOCK: held by another
                return False
            if not self._stamp.moved() or self._in_place():
                return True
            self.close()  # the file was replaced: lock the one that others will lock
        raise StoreMissing(self.where, why="its lock file is replaced again and again")

    def _open(self, *, change: bool) -> None:
        with disk.failures("cannot take the lock", where=self.where):
            fd = disk.open_file(self._name, at=self._at, where=self.where, change=change)
        try:
            self._file = host.own(fd)
            self._inode = self._file[1]
            self.release = partial(fcntl.flock, fd, fcntl.LOCK_UN)
        except BaseException:  # an interrupt
            os.close(fd)
            raise
        self._fd = fd  # last: whoever locks it can give it back

    def _in_place(self) -> bool:
        """Say whether the path still names the file that is locked."""
        try:
            inode = os.stat(self._name, dir_fd=self._at, follow_symlinks=False)
        except FileNotFoundError as error:
            self.close()
            raise StoreMissing(self.where, why="its lock file was removed") from error
        if inode.st_ino != self._inode:
            return False
        self._stamp.settle()
        return True

    def wait(self, bell: Bell, deadline: float) -> None:
        """Take the lock, which is held now, before a time of the monotonic clock.

        Its holder rings the bell when it gives the lock back.
        Raises: LockBusy, which names the holder.
        """
        began = time.monotonic()
        while True:
            before = bell.look()  # first: what rings between here and the wait ends that at once
            if self.try_acquire():
                return
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                waited_s = round(max(0.0, deadline - began), 3)
                raise LockBusy(self.where, waited_s=waited_s, holder=self.holder())
            bell.wait(before, left_s)
            if self.try_acquire():
                return

    def acquire(self, *, wait_s: float) -> None:
        """Take the lock within `wait_s` seconds; where it has no bell, it is tried again and again.

        Raises: LockBusy, which names the holder.
        """
        if self.try_acquire():
            return
        began = time.monotonic()
        for pause_s in pauses(self._usual_s / 2):
            if time.monotonic() > began + wait_s:
                raise LockBusy(self.where, waited_s=wait_s, holder=self.holder())
            time.sleep(min(pause_s, wait_s))
            if self.try_acquire():
                waited_s = time.monotonic() - began
                self._usual_s += 0.2 * (min(waited_s, LOCK_PAUSE_MAX_S) - self._usual_s)
                return

    def close(self) -> None:
        """Give the lock back, also for children that inherited its descriptor, and close."""
        if self._fd != _CLOSED:
            if host.is_still(self._fd, self._file):
                self.release()
            self.abandon()

    def abandon(self) -> None:
        """Close the descriptor and leave the lock to those who share it: for a forked child."""
        if self._fd != _CLOSED:
            fd, self._fd = self._fd, _CLOSED  # first: a child forked between must not do it again
            self.release = bool
            self._stamp = Stamp(self._at)
            host.close_own(fd, self._file)

    def after_fork(self) -> None:
        """Leave the lock to the parent: a child that kept it open would hold it for ever."""
        self.abandon()

    def __del__(self, is_ending: host.IsEnding = host.is_ending) -> None:
        """Close: who is interrupted between taking a lock and keeping it must not hold it on."""
        if is_ending():
            return
        with suppress(AttributeError):  # interrupted while it was made
            self.abandon()  # which forgets it, too: others of a cycle may come after this one

    @contextmanager
    def held(self, *, wait_s: float) -> Iterator[None]:
        """Hold the lock for a block of code."""
        try:
            self.acquire(wait_s=wait_s)
            yield
        finally:
            self.release()

    def share(self) -> int:
        """Return the descriptor, to be inherited by a process that is to hold the lock too."""
        return self._fd

    def holder(self) -> str:
        """Name the process that holds the lock, if the kernel tells. Source: proc_locks(5)."""
        if self._fd == _CLOSED:
            return "nobody known"
        try:
            table = Path("/proc/locks").read_text()
        except OSError:  # not Linux
            return "another process"
        for row in table.splitlines():
            fields = row.split()
            if fields[1] == "FLOCK" and fields[5].endswith(f":{self._inode}"):
                return f"pid {fields[4]}"
        return "another process"


def take(name: str, *, at: int, where: str) -> Lock:
    """Open a lock file and take the lock at once; the caller closes it.

    Raises: LockBusy.
    """
    lock = Lock(name, at=at, where=where)
    try:
        if not lock.try_acquire():
            raise LockBusy(where, waited_s=0, holder=lock.holder())
    except BaseException:
        lock.close()
        raise
    return lock


def pauses(first_s: float = 0.0) -> Iterator[float]:
    """Yield how long to wait between tries, in seconds: `first_s`, then short, soon longer.

    With many waiters, early retries only take CPU from the lock holder:
    so the first try comes after half the usual wait.
    """
    if first_s > LOCK_POLL_MIN_S:
        yield first_s
    pause_s = LOCK_POLL_MIN_S
    while True:
        yield pause_s
        pause_s = min(pause_s * LOCK_POLL_GROWTH, LOCK_POLL_MAX_S)
