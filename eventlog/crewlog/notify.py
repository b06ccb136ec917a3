"""Wake readers when a store may have changed. A wake only means: look again.

Late, lost, doubled and early wakes change nothing about what is delivered; a reader looks by
itself once a second anyway. One hub per process, store and backend holds one schedule with the
system, however many readers listen. Where the system cannot tell (its limits are reached, the file
system is a network one), or is proven not to (the head moved on and no wake came), the hub falls
back to polling, with one warning. This is the only module that uses watchdog and inotify_simple.
"""

import errno
import logging
import os
import select
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias, cast

from crewlog import layout, threads
from crewlog.closing import Closing
from crewlog.forks import no_fork

_logger = logging.getLogger("crewlog.notify")

Backend: TypeAlias = Literal["auto", "inotify", "watchdog", "poll"]
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


class Rings(Protocol):
    """What a source rings: every reader of a hub."""

    def __call__(self) -> None:
        """Ring them all; never raises and never touches a file."""
        ...


class Source(Protocol):
    """Something that tells of the changes of one store."""

    name: str

    def healthy(self) -> bool:
        """Say whether it can still tell."""
        ...

    def close(self) -> None:
        """Give every resource back."""
        ...


class Channel(Protocol):
    """Where the changes of a store can be heard."""

    @property
    def where(self) -> str:
        """Return the place, for messages."""
        ...

    def identity(self) -> Hashable:
        """Return what changes when something else takes its place; None where it is gone."""
        ...

    def unheard(self) -> str:
        """Return why nothing can be heard and it must be polled, "" if it can be."""
        ...

    def source(self, backend: Backend, rings: Rings) -> Source:
        """Listen from here on. *Raises* OSError where the system cannot tell."""
        ...


class WatchdogSource:
    """watchdog: one schedule, for modified files only, that rings and does nothing else.

    A handler that raised would kill watchdog's thread, one that opened the file would call
    itself, two schedules with different filters on one directory leave the first one deaf.
    *Raises* OSError where the system's limits are reached.
    """

    name = "watchdog"

    def __init__(self, directory: Path, rings: Rings) -> None:
        """Watch `directory`; changes from here on are not missed."""
        with no_fork():
            from watchdog.events import (  # noqa: PLC0415 (reading does not need watchdog)
                FileModifiedEvent,
                FileSystemEvent,
                FileSystemEventHandler,
            )
            from watchdog.observers import Observer  # noqa: PLC0415 (as above)

        class Handler(FileSystemEventHandler):
            def on_any_event(self, _: FileSystemEvent) -> None:
                rings()

        self._observer = Observer()
        self._observer.schedule(
            Handler(), str(directory), recursive=False, event_filter=[FileModifiedEvent]
        )
        try:
            self._observer.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from error

    def healthy(self) -> bool:
        """Say whether its threads run."""
        return self._observer.is_alive() and all(e.is_alive() for e in self._observer.emitters)

    def close(self) -> None:
        """Stop its threads."""
        self._observer.stop()
        self._observer.join()


class InotifySource:
    """inotify directly: one thread that waits in the kernel and rings.

    *Raises* OSError where the system's limits are reached, ImportError without inotify_simple.
    """

    name = "inotify"

    def __init__(self, directory: Path, rings: Rings) -> None:
        """Watch `directory`; changes from here on are not missed."""
        with no_fork():
            from inotify_simple import INotify, flags  # noqa: PLC0415 (an extra)

        self._inotify = INotify(nonblocking=True)
        try:
            self._inotify.add_watch(str(directory), flags.MODIFY)
        except BaseException:
            self._inotify.close()
            raise
        self._rings = rings
        # rung, not closed: a forked child would hold a pipe open, and the thread wait for ever
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._thread = threads.start(self._run, name="crewlog-inotify")
        except BaseException:
            self._let_go()
            raise

    def _run(self) -> None:
        poll = select.poll()
        fd = self._inotify.fileno()
        poll.register(fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            ready = [number for number, _ in poll.poll()]
            if self._stop in ready:
                return
            try:  # what happened does not matter, that it did
                os.read(fd, layout.SMALL_FILE_BYTES_MAX)
            except BlockingIOError:  # read already
                continue
            self._rings()

    def healthy(self) -> bool:
        """Say whether its thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop its thread."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._let_go()

    def _let_go(self) -> None:
        os.close(self._stop)
        self._inotify.close()


class HeadChannel:
    """The changes of a directory store: head/ of it, where every publication writes."""

    __slots__ = ("_directory", "_local")

    def __init__(self, directory: Path, *, local: bool) -> None:
        """Listen to nothing yet; `local`: not on a network file system."""
        self._directory = directory
        self._local = local

    @property
    def where(self) -> str:
        """Return the directory."""
        return str(self._directory)

    def identity(self) -> Hashable:
        """Return the device and inode of the directory, None where it is gone."""
        try:
            found = os.stat(self._directory)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def unheard(self) -> str:
        """Return why it must be polled."""
        return "" if self._local else "this is a network file system"

    def source(self, backend: Backend, rings: Rings) -> Source:
        """Listen by the best that there is. *Raises* OSError at inotify's limits."""
        try:
            if backend in {"auto", "inotify"}:
                try:
                    return InotifySource(self._directory, rings)
                except ImportError:  # not Linux, or the extra is not installed
                    if backend == "inotify":
                        raise
            return WatchdogSource(self._directory, rings)
        except OSError as error:  # EMFILE or ENOSPC
            raise OSError(error.errno, f"{error.strerror} (see fs.inotify in sysctl)") from error


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


os.register_at_fork(after_in_child=_forget_hubs)


def check_backend(backend: object) -> Backend:
    """Return a backend that exists and is installed; ValueError or ImportError if not."""
    if backend not in BACKENDS:
        message = f"backend {backend!r} is none of {', '.join(sorted(BACKENDS))}"
        raise ValueError(message)
    if backend == "inotify":
        with no_fork():
            import inotify_simple  # noqa: F401, PLC0415 (only to hear now whether it is there)
    return cast("Backend", backend)


class Waker(Closing):
    """One reader's place at a hub."""

    def __init__(self, changes: Channel, *, backend: Backend, bell: Bell) -> None:
        """Listen to the changes of a store from here on."""
        self._changes = changes
        self._backend = backend
        self.bell = bell
        self._poll_s = layout.POLL_MIN_S
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
        pause_s, self._poll_s = self._poll_s, min(self._poll_s * 2, layout.POLL_MAX_S)
        return min(timeout_s, pause_s)

    def saw_change(self) -> None:
        """Poll fast again: something happened."""
        self._poll_s = layout.POLL_MIN_S

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
