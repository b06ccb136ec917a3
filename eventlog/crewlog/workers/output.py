"""Write and find the output of workers: the file that a life of one appends to, and where it began.

No store of logs: a file of the user's, opened as carefully as our own (no link is followed, nobody
else's file and no pipe is written to), of which the registration notes device, inode and the
offset where this life begins. So its lines are found again after the file was renamed, and where it
was copied and cut they begin anew at its start.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from crewlog.errors import StorageFailed
from crewlog.local import disk, layout
from crewlog.model import codec
from crewlog.model.events import JsonValue, LogFile
from crewlog.model.steps import TAIL_BYTES_MAX
from crewlog.process.launch import LaunchOptions

_READ_BYTES: Final = 64 * 1024
_SET_ASIDE: Final = ".1"
# Of the 64 KiB of a line. As JSON a control character takes six bytes.
_TAIL_JSON_BYTES_MAX: Final = 32 * 1024


class Opened(NamedTuple):
    """A file that is open for a worker's output, and what its registration says of it."""

    fd: int
    record: JsonValue

    def taken(self, surroundings: LaunchOptions) -> LaunchOptions:
        """Return the surroundings with stdout and stderr in the file."""
        return {**surroundings, "stdout": self.fd, "stderr": self.fd}


def check(path: object, *, bytes_max: object, keep_tail: object) -> None:
    """Raise TypeError or ValueError for what cannot be written to or kept."""
    if path is not None and (not isinstance(path, str | os.PathLike) or "\0" in os.fspath(path)):
        message = f"log must be the path of a file, not {path!r}"
        raise TypeError(message)
    try:
        os.fspath(path or "").encode()
    except UnicodeEncodeError as error:
        message = f"log {path!r} is not UTF-8, and could not be written down"
        raise ValueError(message) from error
    if bytes_max is not None and (type(bytes_max) is not int or bytes_max < 1):
        message = f"log_bytes_max must be a number of bytes, not {bytes_max!r}"
        raise ValueError(message)
    if type(keep_tail) is not int or not 0 <= keep_tail <= TAIL_BYTES_MAX:
        message = f"keep_tail is 0 to {TAIL_BYTES_MAX} bytes, not {keep_tail!r}"
        raise ValueError(message)
    if path is None and (bytes_max is not None or keep_tail):
        message = "log_bytes_max and keep_tail are of a log: say log=PATH"
        raise ValueError(message)


@contextlib.contextmanager
def opened(
    path: str | os.PathLike[str] | None, *, bytes_max: int | None
) -> Iterator[Opened | None]:
    """Open a file for the output of a life that begins; None without a path.

    A file of more than `bytes_max` bytes is set aside first.
    Raises: UnsafePermissions, StorageFailed; NotAStore within a registry.
    """
    if path is None:
        yield None
        return
    where = os.path.abspath(path)
    layout.require_outside(Path(where))
    try:
        with disk.failures("cannot open the log", where=where):
            fd = disk.open_log(Path(where), bytes_max=bytes_max, aside=_SET_ASIDE)
    except FileNotFoundError as error:
        raise StorageFailed(
            "cannot open the log",
            where=where,
            why="its directory is not there",
            remedy=f"Make it: mkdir -p {os.path.dirname(where)}",
        ) from error
    try:
        inode = os.fstat(fd)
        place = {"dev": inode.st_dev, "ino": inode.st_ino, "offset": inode.st_size}
        yield Opened(fd, {"path": where, **place})
    finally:
        os.close(fd)


# -- reading --------------------------------------------------------------------------------


class Lines(NamedTuple):
    """Where the output of a life is now: a path, and the offset where it begins."""

    path: Path
    offset: int


def find(log: LogFile) -> Lines | None:
    """Return where the output of a life is now; None where it is gone."""
    path = Path(log.path)
    beside: list[Path] = []
    with contextlib.suppress(OSError):
        beside = sorted(p for p in path.parent.iterdir() if p.name.startswith(path.name))
    for one in (path, *(p for p in beside if p != path)):
        with contextlib.suppress(OSError):
            inode = one.lstat()
            if (inode.st_dev, inode.st_ino) == (log.dev, log.ino):
                cut = inode.st_size < log.offset  # it was copied and cut: what is there came after
                return Lines(one, 0 if cut else log.offset)
    return None


def tail(log: LogFile, size: int) -> str:
    """Return the last `size` bytes of a life's output as text, "" where it is gone."""
    lines = find(log)
    if lines is None:
        return ""
    with contextlib.suppress(OSError), lines.path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(lines.offset, end - size))
        return file.read(size).decode(errors="replace").replace("\0", "\ufffd")
    return ""


def tail_of_event(log: LogFile, size: int) -> str:
    """Return the last `size` bytes of a life's output, or as many as its event has room for."""
    text = tail(log, size)
    while (over := len(codec.dump(text)) - _TAIL_JSON_BYTES_MAX) > 0:
        text = text[-(-over // 6) :]
    return text


def last_lines(log: LogFile, count: int) -> list[str]:
    """Return the last lines of a life's output, without their ends; what is longest is cut."""
    size = _READ_BYTES
    text = tail(log, size)
    rows = text.splitlines()
    if len(text) >= size and len(rows) > 1:
        rows = rows[1:]  # the first one may have begun before
    return rows[-count:] if count else []


class Follower:
    """Reads on in a life's output, also when the file is renamed, or copied and cut."""

    def __init__(self, log: LogFile | None, *, lines: int | None) -> None:
        """Begin with its last `lines`, None: with the first one."""
        self._fd = -1
        place = None if log is None else find(log)
        if place is None:
            return
        self._fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._at = place.offset if lines is None else self._back(place.offset, lines)

    @property
    def is_there(self) -> bool:
        """Say whether the file was there at all."""
        return self._fd >= 0

    def _back(self, first: int, lines: int) -> int:
        """Return the offset of the last `lines` lines, not before `first`."""
        at = end = os.lseek(self._fd, 0, os.SEEK_END)
        while at > first and lines:
            begin = max(first, at - _READ_BYTES)
            part = os.pread(self._fd, at - begin, begin)
            if at == end:
                part = part.removesuffix(b"\n")  # it ends the last line, and begins none
            while (index := part.rfind(b"\n")) >= 0:
                lines -= 1
                if not lines:
                    return begin + index + 1
                part = part[:index]
            at = begin
        return first if lines else end

    def read(self) -> bytes:
        """Return what came since the last time, or a part of that; empty for nothing."""
        if self._fd < 0:
            return b""
        if os.fstat(self._fd).st_size < self._at:  # it was copied and cut
            self._at = 0
        part = os.pread(self._fd, _READ_BYTES, self._at)
        self._at += len(part)
        return part

    def close(self) -> None:
        """Let go of the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
