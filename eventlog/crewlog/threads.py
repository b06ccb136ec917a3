"""Start threads, keep forks away from them, and say what this one is in the middle of.

The threads take no signals: a program may wait for its own with sigwait(3).

A signal to a process goes to any thread that does not block it. One that went to ours would be
lost to who waits for it: `crewlog run` would not hear of the end of its child.
"""

import copy
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Final

# Who holds a lock that a signal handler asks for.
INTERRUPTED: Final = "this very thread, which a signal handler has interrupted"


# Held by a thread that must not be forked meanwhile.
_forking = threading.RLock()


@contextmanager
def no_fork() -> Iterator[None]:
    """Let every fork wait until the end of the block.

    A child has the locks and the descriptors of threads that it has not. That of an import is
    released by none, and whoever imports the same module in the child would wait for ever.
    """
    with _forking:
        yield


def _renew_in_child() -> None:
    global _forking  # noqa: PLW0603 (held by the thread that forked, which is this one)
    _forking = threading.RLock()


os.register_at_fork(
    before=lambda: _forking.acquire(),  # noqa: PLW0108 (whichever it is then)
    after_in_parent=lambda: _forking.release(),  # noqa: PLW0108 (as above)
    after_in_child=_renew_in_child,
)


def start(work: Callable[[], None], *, name: str) -> threading.Thread:
    """Start a daemon thread that has blocked every signal before its first instruction.

    *Raises* OSError where the system's limit of threads is reached.
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
    """Say whether this thread holds a lock."""
    return bool(lock._is_owned())  # type: ignore[attr-defined] # noqa: SLF001 (Condition asks so, too)


def is_inside(code: CodeType, owner: object) -> bool:
    """Say whether this thread is inside a method of `owner` already, below its caller's caller."""
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 (documented, and there is no other way)
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is owner:
            return True
        frame = frame.f_back
    return False
