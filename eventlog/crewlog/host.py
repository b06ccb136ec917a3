"""Mind what a host process does to a library: forks, threads, signals, late imports, its clock.

A forked child has the locks and the descriptors of threads that it has not. So a fork waits while a
thread is in the middle of what a child could not go on with (`no_fork`: a module that is loaded
late, pipes that are being made), and in the child everything that could be half done begins anew,
in one order (`renew_in_child`). This is the only module that registers anything with fork.
"""

import _thread
import copy
import errno
import itertools
import os
import signal
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from types import BuiltinFunctionType, TracebackType
from typing import Final, NamedTuple, Protocol, Self, TypeAlias

# Who holds a lock that a signal handler asks for.
INTERRUPTED: Final = "this very thread, which a signal handler has interrupted"

# What begins anew in a forked child, first things first. Who we are comes first, because all that
# follows may ask. Descriptors and locks of the parent are let go before anything is reopened: a
# child that failed half way must not keep them. A store is renewed before the sessions that hold
# it, and before the readers that would look at it again.
SCOPE: Final = 0
DESCRIPTORS: Final = 1
LOCKS: Final = 2
STORES: Final = 3
SESSIONS: Final = 4
READERS: Final = 5


IsEnding: TypeAlias = Callable[[], bool]
# At the end of the interpreter modules lose their names, one by one: a `__del__` takes this one as
# its default, and does nothing then. The kernel gives back what a process held.
is_ending: Final[IsEnding] = sys.is_finalizing


class Renewed(Protocol):
    """Something that begins anew in a forked child."""

    def after_fork(self) -> None:
        """Begin anew: what other threads of the parent were in the middle of is of no use here."""
        ...


def locale_is_coerced() -> bool:
    """Say whether Python itself put LC_CTYPE into our environment: no program is to inherit that.

    Source: PEP 538, and proc_pid_environ(5), which keeps what we were started with.
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            given = file.read()
    except OSError:  # not Linux
        return False
    return "LC_CTYPE" in os.environ and b"\0LC_CTYPE=" not in b"\0" + given


# -- forks ----------------------------------------------------------------------------------

# Held by a thread that must not be forked meanwhile.
_forking = _thread.RLock()
_renewed: Final[list["weakref.WeakSet[Renewed]"]] = [weakref.WeakSet() for _ in range(READERS + 1)]
_functions: Final[list[list[Callable[[], None]]]] = [[] for _ in range(READERS + 1)]


def no_fork() -> "AbstractContextManager[object]":
    """Let every fork wait until the end of the block; a lock, for a generator's could stay held."""
    return _forking


def renew_in_child(one: Renewed, *, rank: int) -> None:
    """Call `one.after_fork` in every forked child, for as long as it is referenced elsewhere."""
    _renewed[rank].add(one)


def forget(one: Renewed, *, rank: int) -> None:
    """Renew it no longer: it was closed."""
    _renewed[rank].discard(one)


def call_in_child(function: Callable[[], None], *, rank: int) -> None:
    """Call a function in every forked child."""
    _functions[rank].append(function)


def _in_child() -> None:
    global _forking  # noqa: PLW0603 (held by the thread that forked, which is this one)
    _forking = _thread.RLock()
    for functions, renewed in zip(_functions, _renewed, strict=True):
        for function in functions:
            function()
        for one in list(renewed):
            one.after_fork()


os.register_at_fork(
    before=lambda: _forking.acquire(),  # noqa: PLW0108 (whichever it is then)
    after_in_parent=lambda: _forking.release(),  # noqa: PLW0108 (as above)
    after_in_child=_in_child,
)


# -- threads and signals --------------------------------------------------------------------


def is_green() -> bool:
    """Say whether threads are another library's (gevent, eventlet): then nothing may block.

    Such a library puts a sleep of its own in place of Python's.
    """
    return not isinstance(time.sleep, BuiltinFunctionType)


def start_thread(work: Callable[[], None], *, name: str) -> threading.Thread:
    """Start a daemon thread that has blocked every signal before its first instruction.

    A signal to a process goes to any thread that does not block it. One that went to ours would be
    lost to a program that waits for it with sigwait(3): `crewlog run` would not hear of the end of
    its child.

    Raises:
        OSError: the system's limit of threads is reached.

    """
    thread = threading.Thread(target=work, name=name, daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    except RuntimeError as error:  # that is how Python says EAGAIN
        raise OSError(errno.EAGAIN, str(error)) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread


def own_copy(error: Exception) -> Exception:
    """Return an error of its own for each thread that raises it: a traceback belongs to one."""
    same = copy.copy(error)
    same.__cause__ = error.__cause__
    return same


def is_mine(lock: "threading.RLock") -> bool:
    """Return whether this thread holds a lock."""
    return bool(lock._is_owned())  # type: ignore[attr-defined] # noqa: SLF001 (Condition asks so, too)


class Closable(ABC):
    """A context manager that gives itself, and closes itself at the end."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Release every resource; idempotent."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


# -- descriptors ----------------------------------------------------------------------------


class FileId(NamedTuple):
    """Which file a number of ours names: device and inode, and which of our opens it was."""

    device: int
    inode: int
    serial: int


NO_FILE: Final = FileId(0, 0, 0)
_serials: Final = itertools.count(1)
_owned: Final[dict[int, int]] = {}  # by number: the serial of who opened it last


def own(fd: int) -> FileId:
    """Take a number that was opened just now as the caller's own."""
    inode = os.fstat(fd)
    _owned[fd] = serial = next(_serials)
    return FileId(inode.st_dev, inode.st_ino, serial)


def is_still(fd: int, file: FileId) -> bool:
    """Say whether a number still names the file that its owner opened.

    A program that becomes a daemon closes every number it does not know; the next file that is
    opened has ours. That may also be our own, opened anew: then the number is the later owner's.
    """
    try:
        inode = os.fstat(fd)
    except OSError:  # EBADF
        return False
    mine = _owned.get(fd) == file.serial
    return mine and (inode.st_dev, inode.st_ino) == (file.device, file.inode)


def close_own(fd: int, file: FileId) -> None:
    """Close a number, unless it is another file's, or another owner's, by now."""
    if is_still(fd, file):
        os.close(fd)


# -- the clock ------------------------------------------------------------------------------


def now() -> datetime:
    """Return the time in UTC: the one clock of events, which a test may replace."""
    return datetime.now(UTC)
