"""Listen to a directory: inotify or watchdog on head/, where every publication writes.

A wake only means: look again. This is the only module that uses watchdog and inotify_simple.
"""

import errno
import os
import select
from collections.abc import Hashable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from crewlog import host
from crewlog.host import no_fork
from crewlog.store import Backend, Rings, Source

_EVENTS_BYTES: Final = 4096  # read at once, and let go


class _Canary:
    """A descriptor beside those of a library that closes by number: it tells whose they are.

    A program that becomes a daemon closes every number that it does not know, ours and the
    library's at once; those are soon its own files.
    """

    def __init__(self) -> None:
        """Open it.

        Raises: OSError.
        """
        self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._file = host.own(self._fd)

    def lives(self) -> bool:
        """Say whether nobody has closed it."""
        return host.is_still(self._fd, self._file)

    def close(self) -> None:
        """Close it."""
        host.close_own(self._fd, self._file)


_abandoned: "list[object]" = []  # for as long as the process lives: their ends would close numbers


class WatchdogSource:
    """watchdog: one schedule, for modified files only, that rings and does nothing else.

    A handler that raised would kill watchdog's thread, one that opened the file would call itself,
    two schedules with different filters on one directory leave the first one deaf.
    Raises: OSError where the system's limits are reached.
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

        with ExitStack() as undo:
            self._canary = _Canary()
            undo.callback(self._canary.close)
            # First: where watchdog finds no thread to be had, it keeps what it has opened.
            host.start_thread(lambda: None, name="crewlog-watch").join()
            try:
                self._observer = Observer()
                undo.callback(self._observer.stop)  # it may have opened something, started or not
                self._observer.schedule(
                    Handler(), str(directory), recursive=False, event_filter=[FileModifiedEvent]
                )
                self._observer.start()
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, str(error)) from error
            undo.pop_all()

    def healthy(self) -> bool:
        """Say whether its threads run, and can hear."""
        runs = self._observer.is_alive() and all(e.is_alive() for e in self._observer.emitters)
        return runs and self._canary.lives()

    def close(self) -> None:
        """Stop its threads; where a host has closed all numbers under us, leave them alone."""
        if not self._canary.lives():
            _abandoned.append(self)  # watchdog closes by number alone, and those are others' now
            return
        self._canary.close()
        self._observer.stop()
        self._observer.join()


class InotifySource:
    """inotify directly: one thread that waits in the kernel and rings.

    Raises: OSError where the system's limits are reached, ImportError without inotify_simple.
    """

    name = "inotify"

    def __init__(self, directory: Path, rings: Rings) -> None:
        """Watch `directory`; changes from here on are not missed."""
        with no_fork():
            from inotify_simple import INotify, flags  # noqa: PLC0415 (an extra)

        self._rings = rings
        with ExitStack() as undo:
            self._canary = _Canary()
            undo.callback(self._canary.close)
            self._inotify = INotify(nonblocking=True)
            undo.callback(self._inotify.close)
            self._inotify.add_watch(str(directory), flags.MODIFY)
            # rung, not closed: a forked child would hold a pipe open, and the thread wait for ever
            self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._stop)
            self._thread = host.start_thread(self._run, name="crewlog-inotify")
            self._open = undo.pop_all()

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
                os.read(fd, _EVENTS_BYTES)
            except BlockingIOError:  # read already
                continue
            self._rings()

    def healthy(self) -> bool:
        """Say whether its thread runs, and can hear."""
        return self._thread.is_alive() and self._canary.lives()

    def close(self) -> None:
        """Stop its thread; where a host has closed all numbers under us, leave it alone."""
        if not self._canary.lives():
            _abandoned.append(self)
            return
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._open.close()


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
            inode = os.stat(self._directory)
        except FileNotFoundError:
            return None
        return inode.st_dev, inode.st_ino

    def unheard(self) -> str:
        """Return why it must be polled."""
        if host.is_green():  # watchdog does not run on them, and no thread of ours may block
            return "threads are another library's (gevent, eventlet)"
        return "" if self._local else "this is a network file system"

    def source(self, backend: Backend, rings: Rings) -> Source:
        """Listen by the best that there is.

        Raises: OSError at inotify's limits.
        """
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
