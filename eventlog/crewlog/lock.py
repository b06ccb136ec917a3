"""Hold flock locks with a deadline and an honest message.

flock belongs to the open file, not to the process: two registries of one process exclude each
other, threads that share a descriptor do not (they queue on a mutex before they come here). The
kernel drops a dead holder's lock at once; a stopped holder keeps it. Lock files are never
unlinked; still, after taking one, the path must name the inode that is locked. Blocking flock
has no deadline, hence the poll. With disk.sync on macOS the only user of fcntl.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crewlog import disk, layout
from crewlog.errors import LockBusy, StoreMissing


class Lock:
    """One lock file, opened on first use."""

    __slots__ = ("_at", "_fd", "_name", "where")

    def __init__(self, name: str, *, at: int, where: str) -> None:
        """Name a lock file in the open directory `at`."""
        self._name = name
        self._at = at
        self._fd = -1
        self.where = where

    def try_acquire(self, *, shared: bool = False) -> bool:
        """Take the lock if it is free at this moment."""
        if self._fd < 0:
            self._fd = disk.open_file(self._name, at=self._at, where=self.where, change=True)
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:  # EWOULDBLOCK: held
            return False
        return True

    def acquire(self, *, wait_s: float, shared: bool = False) -> None:
        """Take the lock within `wait_s` seconds or raise LockBusy, which names the holder."""
        if self.try_acquire(shared=shared):
            return
        deadline = time.monotonic() + wait_s
        pause_s = layout.LOCK_POLL_MIN_S
        while not self.try_acquire(shared=shared):
            if time.monotonic() > deadline:
                raise LockBusy(self.where, waited_s=wait_s, holder=self.holder())
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, layout.LOCK_POLL_MAX_S)

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the descriptor, which also gives the lock back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextmanager
    def held(self, *, wait_s: float) -> Iterator[None]:
        """Hold the lock for a block of code."""
        self.acquire(wait_s=wait_s)
        try:
            yield
        finally:
            self.release()

    def require_in_place(self) -> None:
        """Raise StoreMissing if the path no longer names the file that is locked."""
        try:
            there = os.stat(self._name, dir_fd=self._at, follow_symlinks=False)
        except FileNotFoundError:
            there = None
        mine = os.fstat(self._fd)
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise StoreMissing(self.where, why="its lock file was removed or replaced")

    def holder(self) -> str:
        """Name the process that holds the lock, if the kernel tells. Source: proc_locks(5)."""
        if self._fd < 0:
            return "nobody known"
        inode = os.fstat(self._fd).st_ino
        try:
            table = Path("/proc/locks").read_text()
        except OSError:  # not Linux
            return "another process"
        for row in table.splitlines():
            fields = row.split()
            if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):  # noqa: PLR2004
                return f"pid {fields[4]}"
        return "another process"
