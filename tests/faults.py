"""Fail on purpose at the disk seam, and pretend to have rebooted."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import stores
from crewlog.local import create, layout
from crewlog.local.disk import Disk
from crewlog.local.log import Log
from crewlog.process import identity
from crewlog.registry import Registry

Fault = Callable[[str], int | None]


class FailingDisk(Disk):
    """A disk on which chosen calls fail; `fault` maps a call's name to an errno or None."""

    def __init__(self) -> None:
        """Begin without faults."""
        self.fault: Fault = lambda _: None
        self.short = False
        self.calls: list[str] = []

    def _meet(self, call: str) -> None:
        self.calls.append(call)
        number = self.fault(call)
        if number is not None:
            raise OSError(number, os.strerror(number))

    def make_directory(self, name: str, *, at: int | None = None) -> None:
        self._meet("make_directory")
        super().make_directory(name, at=at)

    def create(self, name: str, *, at: int, append: bool = False) -> int:
        self._meet("create")
        return super().create(name, at=at, append=append)

    def write(self, fd: int, data: bytes) -> int:
        self._meet("write")
        return super().write(fd, data[: len(data) // 2] if self.short else data)

    def overwrite(self, fd: int, data: bytes, offset: int = 0) -> None:
        self._meet("overwrite")
        super().overwrite(fd, data, offset)

    def cut(self, fd: int, size: int) -> None:
        self._meet("cut")
        super().cut(fd, size)

    def sync(self, fd: int) -> None:
        self._meet("sync")
        super().sync(fd)

    def sync_directory(self, fd: int) -> None:
        self._meet("sync_directory")
        super().sync_directory(fd)

    def link(self, name: str, new: str, *, at: int, new_at: int) -> None:
        self._meet("link")
        super().link(name, new, at=at, new_at=new_at)

    def rename(self, name: str, new: str, *, at: int) -> None:
        self._meet("rename")
        super().rename(name, new, at=at)

    def unlink(self, name: str, *, at: int) -> None:
        self._meet("unlink")
        super().unlink(name, at=at)


def only(call: str, number: int) -> Fault:
    """Fail every call of one name."""
    return lambda met: number if met == call else None


def registry_on(place: Path, disk: Disk, *, wait_s: float = 5.0) -> Registry:
    """Open a registry whose store is created and changed through `disk`."""
    reg = stores.opened(place)
    made = create.open_or_create(place, via=disk, wait_s=wait_s, limits=stores.limits())
    reg._session._store = Log(made, wait_s=wait_s)
    return reg


@contextmanager
def another_boot(number: int = 1) -> Iterator[None]:
    """Pretend that the machine was rebooted."""
    real = identity.boot_id
    fake = f"00000000-0000-4000-8000-{number:012d}"
    identity.boot_id = lambda: fake  # type: ignore[assignment]
    identity.scope.cache_clear()
    try:
        yield
    finally:
        identity.boot_id = real
        identity.scope.cache_clear()


def active_segment(place: Path) -> Path:
    """Return the active segment's path."""
    return max((place / layout.LOG).glob("*.jsonl"))


def empty_redo(place: Path) -> None:
    """Let the redo hold nothing, as after a sync of the segment: damage is then past mending."""
    path = place / layout.REDO
    path.write_bytes(bytes(path.stat().st_size))


EIO = errno.EIO
ENOSPC = errno.ENOSPC
