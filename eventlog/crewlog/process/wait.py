"""Ask how a child ended and what it took, and leave it to be reaped.

os.waitid tells neither what a child used nor, before Python has it, whether it dumped core without
reaping it; the system call does both. Source: waitid(2), whose fifth argument glibc hides, and
asm-generic/siginfo.h.
"""

import os
import platform
import struct
import sys
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple

from crewlog.host import no_fork
from crewlog.model.events import Status

if TYPE_CHECKING:
    from collections.abc import Callable

_P_PID: Final = 1
_P_PIDFD: Final = 3
_EXITED: Final = 4  # WEXITED
_LEAVE: Final = 0x01000000  # WNOWAIT
_AT_ONCE: Final = 1  # WNOHANG
_CODES: Final = {1: "exited", 2: "killed", 3: "dumped"}  # si_code
# si_signo, si_errno, si_code, padding, si_pid, si_uid, si_status; 128 bytes in all
_SIGINFO: Final = struct.Struct("=iii4xiii100x")
# user and system time (seconds, microseconds), ru_maxrss in KiB, thirteen longs more
_RUSAGE: Final = struct.Struct("=qqqqq104x")
_NUMBERS: Final = {"x86_64": 247, "aarch64": 95}


class Ended(NamedTuple):
    """How a child ended; `status` is None where nobody tells."""

    status: Status | None


def look(pid: int, pidfd: int, *, wait: bool = False) -> Ended | None:
    """Return how our child ended, None while it has not; it stays to be reaped.

    `pidfd` is -1 where there is none. On return from a wait it has ended.
    Raises: ChildProcessError where it is no child of ours any more.
    """
    call = _call()
    if call is None:
        return _look_plainly(pid, pidfd, wait=wait)
    info, usage = bytearray(_SIGINFO.size), bytearray(_RUSAGE.size)
    kind, number = (_P_PIDFD, pidfd) if pidfd >= 0 else (_P_PID, pid)
    call(kind, number, info, _EXITED | _LEAVE | (0 if wait else _AT_ONCE), usage)
    _, _, how, ended_pid, _, status = _SIGINFO.unpack(info)
    if not ended_pid:
        return None
    user_s, user_us, system_s, system_us, peak_kib = _RUSAGE.unpack(usage)
    exited = _CODES.get(how) == "exited"
    return Ended(
        Status(
            status if exited else None,
            None if exited else status,
            "wait",
            core=_CODES.get(how) == "dumped",
            max_rss_bytes=peak_kib * 1024,
            cpu_s=round(user_s + system_s + (user_us + system_us) / 1e6, 6),
        )
    )


def _look_plainly(pid: int, pidfd: int, *, wait: bool) -> Ended | None:
    how = 0 if wait else os.WNOHANG
    if not hasattr(os, "waitid"):  # macOS before Python 3.13: it is reaped by the look
        ended_pid, wait_status = os.waitpid(pid, how)
        return Ended(_status(os.waitstatus_to_exitcode(wait_status))) if ended_pid else None
    kind, number = (os.P_PIDFD, pidfd) if pidfd >= 0 else (os.P_PID, pid)
    seen = os.waitid(kind, number, os.WEXITED | os.WNOWAIT | how)
    if seen is None:
        return None
    exited = seen.si_code == os.CLD_EXITED
    return Ended(_status(seen.si_status if exited else -seen.si_status))


def _status(code: int) -> Status:
    return Status(code, None, "wait") if code >= 0 else Status(None, -code, "wait")


@cache
def _call() -> "Callable[[int, int, bytearray, int, bytearray], None] | None":
    """Return the system call; None where its number or shapes are not known."""
    number = _NUMBERS.get(platform.machine())
    if sys.platform != "linux" or number is None or struct.calcsize("P") != 8:  # noqa: PLR2004 (64 bits)
        return None
    with no_fork():
        import ctypes  # noqa: PLC0415 (only who has children pays for the import)

    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    syscall.argtypes = (
        *(ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int),
        ctypes.c_void_p,
    )

    def call(kind: int, id_: int, info: bytearray, how: int, usage: bytearray) -> None:
        at_info = (ctypes.c_char * len(info)).from_buffer(info)
        at_usage = (ctypes.c_char * len(usage)).from_buffer(usage)
        while syscall(number, kind, id_, ctypes.addressof(at_info), how,
                      ctypes.addressof(at_usage)) < 0:  # fmt: skip
            code = ctypes.get_errno()
            if code != _EINTR:
                raise OSError(code, os.strerror(code))

    return call


_EINTR: Final = 4
