"""Wake a reader when head/durable may have changed. A wake only means: look again.

Late, lost, doubled and early wakes change nothing about what is delivered; the reader looks by
itself once a second anyway. This is the only module that uses watchdog.
"""

import logging
import threading
from pathlib import Path
from typing import Protocol

from crewlog import layout

_logger = logging.getLogger("crewlog.notify")


class Waker(Protocol):
    """Something that ends a wait early."""

    def wait(self, timeout_s: float) -> None:
        """Return after a wake, or after `timeout_s`; a wake since the last wait counts."""
        ...

    def wake(self) -> None:
        """End the current or the next wait; callable from any thread."""
        ...

    def close(self) -> None:
        """Give every resource back; idempotent."""
        ...


class Poll:
    """Look again after a short while, where the system cannot tell of changes."""

    def __init__(self) -> None:
        """Begin without a wake."""
        self._event = threading.Event()

    def wait(self, timeout_s: float) -> None:
        """Wait for `wake`, at most one polling interval."""
        self._event.wait(min(timeout_s, layout.POLL_S))
        self._event.clear()

    def wake(self) -> None:
        """End the wait."""
        self._event.set()

    def close(self) -> None:
        """Hold nothing, so give nothing back."""


class Watchdog:
    """Be woken by watchdog: one schedule on one directory, for modified files only.

    The handler does nothing but set an event: one that raised would kill watchdog's thread, one
    that opened the file would call itself. *Raises* OSError where the system's limits are reached.
    """

    def __init__(self, directory: Path) -> None:
        """Watch `directory`; changes from here on are not missed."""
        from watchdog.events import (  # noqa: PLC0415 (reading does not need watchdog)
            FileModifiedEvent,
            FileSystemEvent,
            FileSystemEventHandler,
        )
        from watchdog.observers import Observer  # noqa: PLC0415 (as above)

        event = threading.Event()

        class Handler(FileSystemEventHandler):
            def on_any_event(self, _: FileSystemEvent) -> None:
                event.set()

        self._event = event
        self._observer = Observer()
        self._observer.schedule(
            Handler(), str(directory), recursive=False, event_filter=[FileModifiedEvent]
        )
        self._observer.start()

    def wait(self, timeout_s: float) -> None:
        """Wait for a change or `wake`."""
        self._event.wait(timeout_s)
        self._event.clear()

    def wake(self) -> None:
        """End the wait."""
        self._event.set()

    def close(self) -> None:
        """Stop the observer's threads."""
        if self._observer.is_alive():
            self._observer.stop()
            self._observer.join()


def waker(directory: Path) -> Waker:
    """Return the best waker that this system allows."""
    try:
        return Watchdog(directory)
    except OSError as error:  # EMFILE or ENOSPC: inotify's limits
        _logger.warning("cannot be notified of changes (%s); polling instead", error)
        return Poll()
