"""Look at a worker's Unix socket: which one it is, and whether anybody listens on it.

This is the only module that uses sockets. A path that is not absolute is no business of ours: it
may be a TCP address, or relative to a directory that only the worker knows.
"""

import errno
import os
import stat
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from crewlog.host import no_fork

if TYPE_CHECKING:
    import socket

CONNECT_WAIT_S: Final = 1.0

Answer: TypeAlias = Literal["answers", "refused", "absent"]
_BUSY: Final = {errno.EAGAIN, errno.EINPROGRESS, errno.ETIMEDOUT}


def socket_id(path: str) -> str | None:
    """Return device, inode and mtime (ns) of the socket at an absolute path, None for none.

    An inode number is used again at once by some file systems; the time of its making is not.
    """
    if not path.startswith("/") or "\0" in path:
        return None
    try:
        inode = os.lstat(path)
    except OSError:  # not there yet, or not for our eyes: then it is never removed either
        return None
    return id_of(inode) if stat.S_ISSOCK(inode.st_mode) else None


def id_of(inode: os.stat_result) -> str:
    """Write the identity of a socket's file."""
    return f"{inode.st_dev}:{inode.st_ino}:{inode.st_mtime_ns}"


def ask(path: str) -> Answer | None:
    """Connect to a stream socket and close again; None where that proves nothing.

    The worker sees a connection that ends at once.
    """
    with no_fork():
        import socket  # noqa: PLC0415 (slow to load, and seldom asked)

    if not path.startswith("/") or "\0" in path:
        return None
    if not os.path.lexists(path):
        return "absent"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_WAIT_S)
        try:
            _connect(probe, path)
        except ConnectionRefusedError:
            return "refused"
        except FileNotFoundError:
            return "absent"
        except OSError as error:
            return "answers" if error.errno in _BUSY else None
    return "answers"


def _connect(probe: "socket.socket", path: str) -> None:
    """Connect, also where the path is longer than an address may be (108 bytes)."""
    try:
        probe.connect(path)
    except OSError as error:
        if error.errno is not None:  # "AF_UNIX path too long" comes from Python, without a number
            raise
        parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            probe.connect(f"/proc/self/fd/{parent}/{os.path.basename(path)}")
        finally:
            os.close(parent)
