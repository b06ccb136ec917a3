"""Whatever the system refuses, at any call of any verb, is an error of crewlog's, with advice."""

import contextlib
import errno
import gc
import itertools
import logging
import os
import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

import crewlog
import crewlog.model.lives  # it is loaded at its first use, which takes a descriptor
import crewlog_compactor
from crewlog.errors import CrewlogError, not_started
from crewlog.local import disk
from crewlog.registry import Registry
from crewlog_compactor import KeepEvents
from procs import Crew, forked, joined, until
from stores import opened

pytestmark = [pytest.mark.limits(segment_bytes=1500), pytest.mark.long]
_count = itertools.count()


def _sid() -> str:
    return f"w{next(_count)}"


def _watch(reg: Registry, _: Path) -> None:
    with reg.watch() as watch:
        reg.update("a", meta={"n": next(_count)})
        next(iter(watch))


def _open(_: Registry, place: Path) -> None:
    with opened(place) as reg:
        reg.workers()


def _presence(reg: Registry, _: Path) -> None:
    with reg.presence(_sid()):
        pass


def _batch(reg: Registry, _: Path) -> None:
    with reg.batch() as batch:
        batch.update("a", meta={"n": next(_count)})


VERBS: dict[str, Callable[[Registry, Path], object]] = {
    "update": lambda reg, _: reg.update("a", meta={"n": next(_count)}),
    "register": lambda reg, _: reg.register(_sid()),
    "register with a lease": lambda reg, _: reg.register(_sid(), lease=True),
    "spawn": lambda reg, _: reg.spawn(_sid(), ["true"]),
    "ensure": lambda reg, _: reg.ensure(_sid(), ["true"]),
    "presence": _presence,
    "batch": _batch,
    "stop": lambda reg, _: reg.stop("gone", grace_s=0.1),
    "remove": lambda reg, _: reg.remove("gone"),
    "workers": lambda reg, _: reg.workers(),
    "living": lambda reg, _: reg.living(),
    "get": lambda reg, _: reg.get("a"),
    "liveness": lambda reg, _: reg.liveness("a"),
    "history": lambda reg, _: list(reg.history()),
    "history, the newest first": lambda reg, _: list(reg.history(newest_first=True)),
    "lives": lambda reg, _: reg.lives(),
    "at": lambda reg, _: reg.at(100),
    "watch": _watch,
    "sizes": lambda reg, _: reg.sizes(),
    "totals": lambda reg, _: reg.totals(),
    "open": _open,
    "create": lambda _, place: crewlog.open(place.parent / _sid(), create=True).close(),
    "compact": lambda reg, _: crewlog_compactor.compact(reg),
    "retain": lambda reg, _: crewlog_compactor.compact(reg, keep_history=KeepEvents(20)),
    "collect": lambda reg, _: crewlog_compactor.collect(reg),
    "verify": lambda _, place: crewlog_compactor.verify(place),
    "anchor": lambda reg, _: crewlog_compactor.anchor(reg),
    "backup": lambda _, place: crewlog_compactor.backup(place, place.parent / _sid()),
    "plan of a repair": lambda _, place: crewlog_compactor.repair(place),
    "import": lambda reg, place: crewlog_compactor.import_legacy(reg, place / "none"),
}


@pytest.fixture
def grown(place: Path) -> Path:
    """Return a store with an archive, a snapshot before it, and a tail."""
    with opened(place) as reg:
        reg.register("a")
        for _ in range(2):
            for n in range(40):
                reg.update("a", meta={"n": n})
            crewlog_compactor.compact(reg)
    return place


def _descriptors() -> int:
    gc.collect()  # what a traceback holds
    return len(os.listdir("/dev/fd"))


@contextlib.contextmanager
def _free(count: int) -> Iterator[None]:
    """Leave so many free descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(map(int, os.listdir("/dev/fd"))) + 40
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(2))
        for _ in range(count):
            os.close(held.pop())
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("verb", VERBS)
def test_few_descriptors_are_a_typed_error_that_says_so(grown: Path, verb: str) -> None:
    """Nothing is lost, and what helps is named: it is no fault of the disk, nor of a name."""
    joined(forked(partial(_meet_the_limit, grown, verb)))
    assert not crewlog_compactor.verify(grown).findings


def _meet_the_limit(grown: Path, verb: str) -> None:
    logging.getLogger("crewlog").setLevel(logging.CRITICAL)  # a record keeps its error, and more
    refused, there = 0, _descriptors()
    for count in range(20):
        for warm in (False, True):
            with opened(grown) as reg:
                if warm:
                    reg.update("a", meta={})
                    reg.workers()
                try:
                    with _free(count):
                        VERBS[verb](reg, grown)
                except CrewlogError as error:
                    met = os.strerror(errno.EMFILE) in error.why
                    refused += met
                    helps = "ulimit -n" in error.remedy or error.outcome == "unknown"
                    assert helps or not met, error  # noqa: PT017 (not every count is refused)
    assert refused or verb in {"get", "import", "remove", "stop"}
    if verb != "register with a lease":  # it holds its lease
        until(lambda: _descriptors() <= there + 4)  # the fork server's, and a reaper's


class _FailingCalls:
    """The os module, of which one call in reading fails, the nth."""

    READS = frozenset({"open", "pread", "fstat", "stat", "listdir", "lseek"})

    def __init__(self, at: int) -> None:
        self.left = at

    def __getattr__(self, name: str) -> object:
        value = getattr(os, name)
        if name not in self.READS:
            return value

        def meet(*args: object, **options: object) -> object:
            self.left -= 1
            if self.left == -1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return value(*args, **options)

        return meet


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "import"])
def test_failed_read_is_a_typed_error(grown: Path, verb: str) -> None:
    """A disk that cannot be read is never taken for damage, nor for nothing."""
    joined(forked(partial(_meet_a_failed_read, grown, verb)))
    assert not crewlog_compactor.verify(grown).findings


def _meet_a_failed_read(grown: Path, verb: str) -> None:
    refused = 0
    for number in range(400):
        calls = _FailingCalls(number)
        with opened(grown) as reg, mock.patch.object(disk, "os", calls):
            try:
                VERBS[verb](reg, grown)
            except CrewlogError:
                refused += 1
        if calls.left >= 0:
            break
    assert refused


def test_advice_fits_what_was_scarce() -> None:
    """A name that is wrong is another thing than a limit that was met."""
    assert "ulimit -u" in not_started("x", OSError(errno.EAGAIN, "no")).remedy
    assert "PATH" in not_started("x", OSError(errno.ENOENT, "no")).remedy


def test_retention_of_a_store_that_was_moved(grown: Path) -> None:
    """An open store is where its directory is, whatever that is called by now."""
    with opened(grown) as reg:
        reg.workers()
        moved = grown.rename(grown.parent / "moved")
        assert crewlog_compactor.compact(reg, keep_history=KeepEvents(5)).dropped is not None
        assert reg.sizes()["log"] > 0
    assert not crewlog_compactor.verify(moved).findings


def test_living_writer_after_a_repair_gave_up_what_it_knew(place: Path, crew: Crew) -> None:
    """It knew a worker that is no more: every verb says so, and the sid is free again."""
    worker = crew.sleeper()
    with opened(place) as reg:
        reg.register("a")
        seq = reg.register("b", pid=worker.pid).rev
        for path in (place / "log").iterdir():
            path.write_bytes(path.read_bytes().replace(b'"sid":"b"', b'"sid":"X"'))
        redo = place / "redo"
        redo.write_bytes(redo.read_bytes().replace(b'"sid":"b"', b'"sid":"X"'))
        done = crewlog_compactor.repair(place, yes=True, accept_loss=[(seq, seq)])
        assert done.done
        verbs: list[Callable[[], object]] = [
            lambda: reg.update("b", meta={"n": 1}),
            lambda: reg.exited("b"),
            lambda: reg.remove("b"),
            lambda: reg.liveness("b"),
        ]
        for verb in verbs:
            with pytest.raises(crewlog.WorkerNotFound):
                verb()
        assert reg.get("b") is None
        assert [worker.sid for worker in reg.workers()] == ["a"]
        reg.register("b", pid=worker.pid)
    assert not crewlog_compactor.verify(place).findings
