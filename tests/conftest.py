"""Give tests a store of their own, real workers, and nothing of the user's."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import stores
from cluster import MISSING, Cluster
from commands import Cli
from crewlog.registry import Registry
from crewlog.workers.reaper import REAPER
from crewlog.workers.start import _Started
from procs import Crew, kernel_keeps_status, until

pytest_plugins = ["crewlog.testing"]
# A machine that pauses makes no property false.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")
# A shell without job control starts what is in its background with Ctrl-C ignored, and whatever
# that starts would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _nothing_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the user's registry and settings out of every test."""
    for name in list(os.environ):
        if name.startswith("CREWLOG_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def kept_statuses() -> None:
    """Skip where a reaped process's exit status is nowhere to be had."""
    if not kernel_keeps_status():
        pytest.skip("the kernel keeps no exit status for a pidfd (before Linux 6.15)")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Name a place where there is no store yet."""
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def _limits(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let what `opened` opens have the limits that the test's markers name; the nearest counts."""
    stores.unlimit()
    for marker in reversed(list(request.node.iter_markers("limits"))):
        stores.limit(**marker.kwargs)
    yield
    stores.unlimit()


@pytest.fixture
def reg(place: Path) -> Iterator[Registry]:
    """Open a registry; its store does not exist yet."""
    with stores.opened(place) as registry:
        yield registry


@pytest.fixture
def cli(place: Path) -> Cli:
    """Run the command line on the test's store."""
    return Cli(place)


@pytest.fixture
def fast() -> Iterator[Path]:
    """Give a directory in memory, for tests that make thousands of stores."""
    memory = Path("/dev/shm")  # noqa: S108 (only for speed)
    home = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    yield home
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start one etcd server for all tests."""
    if MISSING:
        pytest.skip(MISSING)
    with Cluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture
def crew() -> Iterator[Crew]:
    """Start real processes, and end them all."""
    started = Crew()
    yield started
    started.end()


def pytest_sessionfinish() -> None:
    """Fail loudly if a test left a zombie behind: later ones would misjudge it."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            continue
    except ChildProcessError:
        return


@pytest.fixture(autouse=True)
def _no_worker_left() -> Iterator[None]:
    """End the workers that a test has started and left: what waits for them is the process's."""
    yield
    for charge in list(REAPER._owners):
        if charge.who is not None and isinstance(charge, _Started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(charge.who.pid, signal.SIGKILL)
    until(lambda: REAPER.counts() == (0, 0))
