"""Be a worker: register this process, and record how it ends, in one line.

A block knows how it ends. Without one the end of the process is recorded as it is about to end, and
only what is known then: 1 where an error that nobody caught ends it, the code of a child of
multiprocessing, none where it may have been sys.exit. A process that is killed records nothing: an
observer or collector finds its end. A child that is forked from it is not the worker, and records
nothing either.
"""

import atexit
import contextlib
import os
import re
import signal as signals
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from crewlog.errors import CrewlogError
from crewlog.model.events import Worker

NAME: Final = "{program}-{pid}"
_PROGRAM_CHARS_MAX: Final = 100  # so there is room for a pid


def named(sid: str) -> str:
    """Put this process's own program and pid where a name asks for them."""
    path = Path(sys.argv[0] if sys.argv else "")  # none where Python is embedded
    name = path.parent.name if path.stem == "__main__" else path.stem  # python -m PACKAGE
    program = re.sub(r"[^A-Za-z0-9._+-]", "-", name).strip("-._+")[:_PROGRAM_CHARS_MAX]
    return sid.replace("{pid}", str(os.getpid())).replace("{program}", program or "python")


class Recorder(Protocol):
    """The registry that an end is recorded in."""

    def get(self, sid: str) -> Worker | None:
        """Return a worker."""
        ...

    def exited(self, sid: str, *, code: int | None, signal: int | None) -> object:
        """Record an end."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


# Of this process, for as long as it lives: an initializer of a pool keeps nothing itself.
_mine: "list[Own]" = []


class Own:
    """This process as a worker; at the end of the block, or of the process, its end is recorded."""

    def __init__(self, registry: Recorder, worker: Worker) -> None:
        """Own a registration of this process."""
        self._registry = registry
        self._pid = os.getpid()
        self.worker = worker
        _mine.append(self)
        atexit.register(self._end_unasked)
        pools = sys.modules.get("multiprocessing.util")
        if pools is not None:  # before Python 3.13 a child of a pool runs no atexit
            pools.Finalize(None, self._end_of_child, exitpriority=100)
        self._hook = sys.excepthook
        sys.excepthook = self._uncaught

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Record the end: 0, or 1 where an error ends the block, or sys.exit's code, or Ctrl-C."""
        self._end_by(error)

    def _uncaught(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Record the end by an error that nobody caught, and let it be shown as before."""
        try:
            self._hook(kind, error, trace)
        finally:
            if threading.current_thread() is threading.main_thread() and not _is_interactive():
                self._end_by(error)

    def _end_unasked(self) -> None:
        """Record that the process ends; with which code, nothing tells any more."""
        self.end(None)

    def _end_of_child(self) -> None:
        """Record the end of a child of multiprocessing, whose error is still at hand."""
        process = sys.modules.get("multiprocessing.process")
        is_child = process is not None and process.parent_process() is not None
        known = is_child and sys.version_info < (3, 13)
        if known:
            self._end_by(sys.exc_info()[1])
        else:
            self.end(None)

    def _end_by(self, error: BaseException | None) -> None:
        """Record the end of a process that an error ends, None: that ends by itself."""
        if isinstance(error, KeyboardInterrupt):  # Python then ends itself by the signal
            self.end(None, signal=signals.SIGINT)
        else:
            self.end(_code_of(error))

    def end(self, code: int | None = 0, *, signal: int | None = None) -> None:
        """Record that this process ends, with this exit code, None for an unknown one; once.

        Interrupted by a signal's handler that raises, it is recorded before that goes on.
        """
        if self._pid != os.getpid() or self not in _mine:
            return
        if sys.excepthook == self._uncaught:
            sys.excepthook = self._hook
        try:
            self._record(code, signal)
        except BaseException:
            self._record(code, signal)
            raise
        finally:
            if self in _mine:
                _mine.remove(self)
            atexit.unregister(self._end_unasked)
            self._registry.close()

    def _record(self, code: int | None, signal: int | None) -> None:
        """Record the end, if this is still the worker and it has not ended."""
        with contextlib.suppress(CrewlogError):  # a collector finds the end that cannot be written
            expect = self._registry.get(self.worker.sid)
            ours = expect is not None and expect.registered_seq == self.worker.registered_seq
            if expect is not None and ours and not expect.final:
                known = None if code is None else code & _CODE_BITS  # as the kernel keeps it
                self._registry.exited(self.worker.sid, code=known, signal=signal)


_CODE_BITS: Final = 0xFF


def _code_of(error: BaseException | None) -> int:
    """Return the exit code of a process that an error ends."""
    if isinstance(error, SystemExit):
        if error.code is None:
            return 0
        return error.code if isinstance(error.code, int) else 1
    return 0 if error is None else 1


def _is_interactive() -> bool:
    """Say whether a shell shows errors and goes on."""
    return bool(sys.flags.interactive) or hasattr(sys, "ps1")
