"""Wait until another process has written a state file, without polling it.

The word that is waited on is part of what that process writes anyway: the low half of the
generation in head/durable, of the seq in append.state. Whoever wrote it wakes those who wait. No
wake-up is needed for anything to be right: every wait ends after a short while by itself, and where
the system has no futex, a wait is a sleep.

The file is mapped for reading, and only the kernel looks at the map: Python reads the file by
pread, because to read a map of a file that was cut would end the process. Source: futex(2),
mmap(2).
"""

import ctypes
import errno
import os
import platform
import struct
import sys
import time
from typing import Final

from crewlog import host

WAIT_MAX_S: Final = 0.002  # a publisher that was killed costs those who wait no more than that
_WAIT: Final = 0  # shared between processes: not FUTEX_PRIVATE_FLAG
_WAKE: Final = 1
_PAGE: Final = 4096
_SLEEP_S: Final = 0.0005
_FAILED: Final = ctypes.c_void_p(-1).value
# The number of futex(2), by machine, where a pointer has 64 bits.
_NUMBERS: Final = {"x86_64": 202, "aarch64": 98}


class _Span(ctypes.Structure):
    """A struct timespec of two longs."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_LONGEST: Final = _Span(0, int(WAIT_MAX_S * 1e9))


class _Calls:
    """The system calls; None in their place where there are none."""

    def __init__(self) -> None:
        self.number = 0
        if sys.platform != "linux" or struct.calcsize("P") != 8:  # noqa: PLR2004 (64 bits)
            return
        self.number = _NUMBERS.get(platform.machine(), 0)
        libc = ctypes.CDLL(None, use_errno=True)
        self.call = libc.syscall
        self.call.restype = ctypes.c_long
        self.call.argtypes = (
            *(ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32),
            *(ctypes.POINTER(_Span), ctypes.c_void_p, ctypes.c_int),
        )
        self.map = libc.mmap
        self.map.restype = ctypes.c_void_p
        self.map.argtypes = (
            *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
            ctypes.c_long,
        )
        self.unmap = libc.munmap
        self.unmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


_calls = _Calls()


class Word:
    """32 bits of a state file, at an offset; one thread at a time."""

    __slots__ = ("_address", "_offset")

    def __init__(self, offset: int) -> None:
        """Map nothing yet."""
        self._offset = offset
        self._address = 0  # of the word; 0: not mapped

    def map(self, fd: int) -> None:
        """Map the file that is open now, where there is a futex and that was not done yet."""
        if self._address or not _calls.number or os.fstat(fd).st_size < self._offset + 4:
            return
        address = _calls.map(None, _PAGE, 1, 1, fd, 0)  # PROT_READ, MAP_SHARED
        if address not in {None, _FAILED}:
            self._address = address + self._offset

    def wait(self, value: int, wait_s: float) -> None:
        """Return once it has another value and somebody says so, or after a short while."""
        wait_s = min(wait_s, WAIT_MAX_S)
        address = self._address
        if not address or host.is_green():
            time.sleep(min(wait_s, _SLEEP_S))  # or another's, that lets green threads run
            return
        span = _LONGEST if wait_s == WAIT_MAX_S else _Span(0, max(1, int(wait_s * 1e9)))
        if _calls.call(_calls.number, address, _WAIT, value, span, None, 0) == -1:
            number = ctypes.get_errno()
            if number not in {errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT}:
                time.sleep(min(wait_s, _SLEEP_S))  # cut under us (EFAULT), or forbidden

    def wake(self, count: int) -> None:
        """Wake so many of those who wait."""
        if self._address:
            _calls.call(_calls.number, self._address, _WAKE, count, None, None, 0)

    def close(self) -> None:
        """Unmap it: the file is closed, and another one may be opened."""
        address, self._address = self._address, 0
        if address:
            _calls.unmap(address - self._offset, _PAGE)

    def __del__(self, is_ending: host.IsEnding = host.is_ending) -> None:
        """Unmap it."""
        if not is_ending():
            self.close()
