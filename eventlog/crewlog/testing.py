"""Fixtures for the tests of programs that use crewlog: `pytest_plugins = ["crewlog.testing"]`.

- `crewlog_registry`: a registry of its own, which `crewlog.open()` finds too;
- `crewlog_workers`: starts real processes and registers them, and ends them all;
- `crewlog_clock`: a clock of events that stands still until it is moved;
- `crewlog_crash`: lets a block of code die, or fail, at its k-th change of a file.

Needs pytest, which crewlog itself does not.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import pytest

import crewlog
from crewlog import host
from crewlog.errors import WorkerNotFound
from crewlog.local.disk import Disk
from crewlog.model.events import Worker
from crewlog.place import ENVIRONMENT
from crewlog.registry import Registry

BEGAN: Final = datetime(2026, 1, 1, tzinfo=UTC)
CALLS: Final = (
    "make_directory", "create", "write", "overwrite", "cut", "sync", "sync_directory", "link",
    "rename", "unlink",
)  # fmt: skip


@pytest.fixture
def crewlog_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """Give a registry in a temporary place, and let CREWLOG_DIR name it."""
    place = tmp_path / "crewlog"
    monkeypatch.setenv(ENVIRONMENT, str(place))
    with crewlog.open(place) as registry:
        yield registry


class FakeWorkers:
    """Real processes that do nothing, registered as workers."""

    def __init__(self, registry: Registry) -> None:
        """Begin with none."""
        self._registry = registry
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self, sid: str, *, ready: bool = True, labels: Mapping[str, str] | None = None
    ) -> Worker:
        """Start a process and register it."""
        process = subprocess.Popen(["sleep", "3600"])
        try:
            worker = self._registry.register(sid, pid=process.pid, ready=ready, labels=labels)
        except BaseException:
            process.kill()
            process.wait()
            raise
        self._processes[sid] = process
        return worker

    def kill(self, sid: str, number: int = signal.SIGKILL) -> None:
        """End a process behind the registry's back, and reap it: what a crash leaves.

        Raises: WorkerNotFound for one that was not started here, or has been ended.
        """
        if sid not in self._processes:
            raise WorkerNotFound(sid)
        process = self._processes.pop(sid)
        process.send_signal(number)
        process.wait()

    def end(self) -> None:
        """End them all."""
        for sid in list(self._processes):
            self.kill(sid)


@pytest.fixture
def crewlog_workers(crewlog_registry: Registry) -> Iterator[FakeWorkers]:
    """Start real processes as workers of the registry; they end with the test."""
    workers = FakeWorkers(crewlog_registry)
    yield workers
    workers.end()


class FrozenClock:
    """The time that events get."""

    def __init__(self) -> None:
        """Begin at a fixed time."""
        self.now = BEGAN

    def advance(self, **span: float) -> datetime:
        """Move on, by the arguments of a timedelta; a negative one steps back, as clocks do."""
        self.now += timedelta(**span)
        return self.now


@pytest.fixture
def crewlog_clock(monkeypatch: pytest.MonkeyPatch) -> FrozenClock:
    """Freeze the clock of events until the test moves it."""
    clock = FrozenClock()
    monkeypatch.setattr(host, "now", lambda: clock.now)
    return clock


class Crash:
    """Counts what crewlog changes on disk, and strikes at a chosen change."""

    def __init__(self) -> None:
        """Strike nothing yet."""
        self.changes = 0
        self._at = 0
        self._strike: Callable[[], None] | None = None

    def met(self) -> None:
        """Be told of a change that is about to be made."""
        self.changes += 1
        if self._strike is not None and self.changes == self._at:
            self._strike()

    @contextmanager
    def at(self, change: int, number: int | None = None) -> Iterator[None]:
        """Strike at the change-th change of the block: kill this process, or fail with an errno.

        Killing is meant for a forked child: see `dies`.
        Raises: AssertionError where the block made fewer changes: a test that strikes nothing shows
        nothing.
        """

        def fail() -> None:
            raise OSError(number, os.strerror(number or 0))

        with self._armed(change, _die if number is None else fail):
            yield
        if self.changes < change:
            message = f"the block made {self.changes} changes: there is no change {change}"
            raise AssertionError(message)

    @contextmanager
    def _armed(self, change: int, strike: Callable[[], None]) -> Iterator[None]:
        self.changes, self._at, self._strike = 0, change, strike
        try:
            yield
        finally:
            self._strike = None

    def dies(self, work: Callable[[], object], *, at: int) -> bool:
        """Run `work` in a forked child that is killed at its at-th change; False if it ended first.

        Try at = 1, 2, 3 … until it does: then `work` was killed at every step that it has.
        """
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with self._armed(at, _die):
                    work()
                code = 0
            finally:
                os._exit(code)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if ended not in {0, -signal.SIGKILL}:
            message = "the work itself failed in the child"
            raise AssertionError(message)
        return ended != 0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


P = ParamSpec("P")
R = TypeVar("R")


@pytest.fixture
def crewlog_crash(monkeypatch: pytest.MonkeyPatch) -> Crash:
    """Let code die or fail at its k-th change of a file of any registry."""
    crash = Crash()
    for name in CALLS:
        monkeypatch.setattr(Disk, name, _struck(crash, getattr(Disk, name)))
    return crash


def _struck(crash: Crash, real: Callable[P, R]) -> Callable[P, R]:
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        crash.met()
        return real(*arguments, **options)

    return call
