"""Wake readers when a store may have changed. A wake only means: look again.

Late, lost, doubled and early wakes change nothing about what is delivered; a reader looks by
itself once a second anyway. One hub per process, store and backend holds one schedule with the
system, however many readers listen. Where the system cannot tell (its limits are reached, the file
system is a network one), or is proven not to (the head moved on and no wake came), the hub falls
back to polling, with one warning. This is the only module that uses watchdog and inotify_simple.
"""

import logging
import os
import threading
from collections.abc import Hashable
from typing import Final, cast

from crewlog import host
from crewlog.host import Closable, no_fork
from crewlog.store import Backend, Channel, Source

# Polling: this soon after a change, then doubling.
POLL_MIN_S: Final = 0.01
POLL_MAX_S: Final = 0.25
# A wake may be this late before it counts as never sent.
WAKE_GRACE_S: Final = 0.1

_logger = logging.getLogger("crewlog.notify")

BACKENDS: Final = frozenset({"auto", "inotify", "watchdog", "poll"})


class Bell:
    """A wake for one reader: any number of rings before a wait count as one.

    A plain lock used as a binary semaphore, so that a signal handler may ring while the very
    thread that it interrupts is waiting; threading.Event would deadlock there.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        """Begin without a ring."""
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """End the current or the next wait."""
        try:
            self._lock.release()
        except RuntimeError:  # it was rung already
            return

    def wait(self, timeout_s: float) -> bool:
        """Return True after a ring, False after `timeout_s`."""
        return self._lock.acquire(timeout=max(0.0, timeout_s))


class Hub:
    """One schedule for all readers of one store in one process."""

    def __init__(self, changes: Channel, backend: Backend) -> None:
        """Choose the best source there is, or fall back to polling."""
        self.where = changes.where
        self.identity = changes.identity()
        self.bells: set[Bell] = set()
        self.source: Source | None = None
        self._warned = False
        if backend == "poll":
            return
        unheard = changes.unheard()
        if unheard:
            self.fall_back(unheard)
            return
        try:
            self.source = changes.source(backend, self.ring)
        except OSError as error:
            self.fall_back(error.strerror or str(error))

    def ring(self) -> None:
        """Wake every reader."""
        for bell in tuple(self.bells):
            bell.ring()

    def fall_back(self, why: str) -> None:
        """Poll from now on; said once."""
        source, self.source = self.source, None
        if not self._warned:
            self._warned = True
            _logger.warning("no word of changes in %s: %s; polling instead", self.where, why)
        if source is not None:
            source.close()
        self.ring()

    def close(self) -> None:
        """Give the source back."""
        source, self.source = self.source, None
        if source is not None:
            source.close()


class _Hubs:
    """The hubs of this process, counted by their readers.

    The lock is held for the bookkeeping only, and never waited for when leaving: a signal handler
    that closes a watch may have interrupted a thread that holds it. Who comes next clears up.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_key: dict[tuple[Hashable, Backend], Hub] = {}

    def join(self, changes: Channel, backend: Backend, bell: Bell) -> Hub:
        key = (changes.identity(), backend)
        with self.lock:
            hub = self.by_key.get(key)
            if hub is not None:
                hub.bells.add(bell)
                return hub
        made = Hub(changes, backend)
        with self.lock:
            hub = self.by_key.setdefault(key, made)
            hub.bells.add(bell)
            empty = self._empty()
        if hub is not made:
            made.close()
        for other in empty:
            other.close()
        return hub

    def leave(self, hub: Hub, bell: Bell) -> None:
        hub.bells.discard(bell)
        if not self.lock.acquire(blocking=False):
            return
        try:
            empty = self._empty()
        finally:
            self.lock.release()
        for other in empty:
            other.close()

    def _empty(self) -> list[Hub]:
        """Take out the hubs that nobody listens to any more."""
        keys = [key for key, hub in self.by_key.items() if not hub.bells]
        return [self.by_key.pop(key) for key in keys]


_hubs = _Hubs()


def _forget_hubs() -> None:
    """In a forked child: the parent's threads are not here, and its schedules are its own."""
    global _hubs  # noqa: PLW0603 (one process, one set of hubs)
    _hubs = _Hubs()


host.call_in_child(_forget_hubs, rank=host.READERS)


def check_backend(backend: object) -> Backend:
    """Return a backend that exists and is installed; ValueError or ImportError if not."""
    if backend not in BACKENDS:
        message = f"backend {backend!r} is none of {', '.join(sorted(BACKENDS))}"
        raise ValueError(message)
    if backend == "inotify":
        with no_fork():
            import inotify_simple  # noqa: F401, PLC0415 (only to hear now whether it is there)
    return cast("Backend", backend)


class Waker(Closable):
    """One reader's place at a hub."""

    def __init__(self, changes: Channel, *, backend: Backend, bell: Bell) -> None:
        """Listen to the changes of a store from here on."""
        self._changes = changes
        self._backend = backend
        self.bell = bell
        self._poll_s = POLL_MIN_S
        self._closed = False
        self._pid = os.getpid()
        self._hub = _hubs.join(changes, backend, self.bell)

    @property
    def source(self) -> str:
        """Name what wakes: inotify, watchdog, etcd or poll."""
        source = self._hub.source
        return "poll" if source is None else source.name

    def wait(self, timeout_s: float) -> bool:
        """Return True after a wake, False after `timeout_s`, or sooner where it must poll."""
        return self.bell.wait(self.pause_s(timeout_s))

    def pause_s(self, timeout_s: float) -> float:
        """Return how long to wait at most, for who waits by other means than `wait`."""
        if self._hub.source is not None:
            return timeout_s
        pause_s, self._poll_s = self._poll_s, min(self._poll_s * 2, POLL_MAX_S)
        return min(timeout_s, pause_s)

    def saw_change(self) -> None:
        """Poll fast again: something happened."""
        self._poll_s = POLL_MIN_S

    def wake(self) -> None:
        """End the wait; from any thread or a signal handler."""
        self.bell.ring()

    def distrust(self, why: str) -> None:
        """Poll from now on: the source is proven not to tell."""
        if self._hub.source is not None:
            self._hub.fall_back(why)

    def check(self) -> None:
        """Listen anew if the store was replaced; poll if the source has died."""
        if self._hub.source is None:
            return
        if not self._hub.source.healthy():
            self._hub.fall_back(f"{self._hub.source.name} has stopped")
        elif self._changes.identity() not in {None, self._hub.identity}:
            _hubs.leave(self._hub, self.bell)
            self._hub = _hubs.join(self._changes, self._backend, self.bell)

    def close(self) -> None:
        """Leave the hub; idempotent. In a forked child the hub is the parent's, and left alone."""
        if not self._closed and self._pid == os.getpid():
            self._closed = True
            _hubs.leave(self._hub, self.bell)
