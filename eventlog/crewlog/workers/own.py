"""Be a worker: register this process, and record how it ends, in one line.

A process that is killed records nothing: a collector finds its end. A child that is forked from it
is not the worker, and records nothing either.
"""

import atexit
import contextlib
import os
import sys
from types import TracebackType
from typing import Protocol, Self

from crewlog.errors import CrewlogError
from crewlog.model.events import Worker


class Recorder(Protocol):
    """The registry that an end is recorded in."""

    def get(self, sid: str) -> Worker | None:
        """Return a worker."""
        ...

    def exited(self, sid: str, *, code: int) -> object:
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
        atexit.register(self.end)
        pools = sys.modules.get("multiprocessing.util")
        if pools is not None:  # a child of a pool runs no atexit
            pools.Finalize(None, self.end, exitpriority=100)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Record the end: 0, or 1 where an exception ends the block, or the code of sys.exit."""
        code = 0 if kind is None else 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        self.end(code)

    def end(self, code: int = 0) -> None:
        """Record that this process ends, with this exit code; once."""
        if self._pid != os.getpid() or self not in _mine:
            return
        _mine.remove(self)
        atexit.unregister(self.end)
        with contextlib.suppress(CrewlogError):  # a collector finds the end that cannot be written
            expect = self._registry.get(self.worker.sid)
            if expect is not None and expect.registered_seq == self.worker.registered_seq:
                self._registry.exited(self.worker.sid, code=code)
        self._registry.close()
