"""Start threads, and say what this one is in the middle of.

The threads take no signals: a program may wait for its own with sigwait(3).

A signal to a process goes to any thread that does not block it. One that went to ours would be
lost to who waits for it: `crewlog run` would not hear of the end of its child.
"""

import copy
import errno
import signal
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Final

# Who holds a lock that a signal handler asks for.
INTERRUPTED: Final = "this very thread, which a signal handler has interrupted"


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
