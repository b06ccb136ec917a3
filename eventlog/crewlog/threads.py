"""Start threads that take no signals: a program may wait for its own with sigwait(3).

A signal to a process goes to any thread that does not block it. One that went to ours would be
lost to who waits for it: `crewlog run` would not hear of the end of its child.
"""

import signal
import threading
from collections.abc import Callable


def start(work: Callable[[], None], *, name: str) -> threading.Thread:
    """Start a daemon thread that has blocked every signal before its first instruction."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread
