"""The fixtures that users get for their own suites do what they say."""

import errno
from datetime import timedelta

import psutil
import pytest

import crewlog
from crewlog.errors import StorageFull
from crewlog.registry import Registry
from crewlog.testing import BEGAN, Crash, FakeWorkers, FrozenClock
from crewlog_compactor import collect, verify


def test_registry_is_the_one_that_open_finds(crewlog_registry: Registry) -> None:
    """A program under test needs no argument."""
    crewlog_registry.register("a")
    with crewlog.open() as opened:
        assert [worker.sid for worker in opened.workers()] == ["a"]


def test_fake_workers_live_and_die(
    crewlog_registry: Registry, crewlog_workers: FakeWorkers
) -> None:
    """They are real processes, so a collection proves their death."""
    crewlog_workers.start("a", labels={"role": "web"})
    crewlog_workers.start("b")
    assert all(answers.alive for answers in crewlog_registry.judge(crewlog_registry.workers()))
    crewlog_workers.kill("a")
    assert collect(crewlog_registry).lost == ("a",)
    assert [worker.sid for worker in crewlog_registry.workers()] == ["b"]


def test_fake_worker_that_is_refused_leaves_no_process(
    crewlog_registry: Registry, crewlog_workers: FakeWorkers
) -> None:
    """And the one that lives under its sid is still known, and ends with the test."""
    first = crewlog_workers.start("a")
    before = psutil.Process().children()
    with pytest.raises(crewlog.WorkerExists):
        crewlog_workers.start("a")
    assert psutil.Process().children() == before
    crewlog_workers.kill("a")
    assert not psutil.pid_exists(first.pid)
    with pytest.raises(crewlog.WorkerNotFound):
        crewlog_workers.kill("a")


def test_frozen_clock_is_what_a_collection_goes_by(
    crewlog_registry: Registry, crewlog_clock: FrozenClock
) -> None:
    """What has just ended by it is kept, for as long as it stands still."""
    crewlog_registry.register("a")
    crewlog_registry.exited("a", code=0)
    assert collect(crewlog_registry).pruned == ()
    crewlog_clock.advance(days=400)
    assert collect(crewlog_registry).pruned == ("a",)


def test_frozen_clock_is_what_events_go_by(
    crewlog_registry: Registry, crewlog_clock: FrozenClock
) -> None:
    """It moves when it is told to, backwards too."""
    crewlog_registry.register("a")
    crewlog_clock.advance(hours=1)
    crewlog_registry.update("a", labels={"k": "v"})
    crewlog_clock.advance(minutes=-30)
    crewlog_registry.exited("a", code=0)
    times = [event.ts - BEGAN for event in crewlog_registry.history()]
    assert times == [timedelta(), timedelta(hours=1), timedelta(minutes=30)]


def test_crash_at_every_change_loses_nothing_acknowledged(
    crewlog_registry: Registry, crewlog_crash: Crash
) -> None:
    """As the guide says to use it."""
    crewlog_registry.register("before")
    step = 1
    while crewlog_crash.dies(lambda: crewlog_registry.register("during"), at=step):
        sids = [worker.sid for worker in crewlog_registry.workers()]
        assert sids[0] == "before"
        if "during" in sids:
            crewlog_registry.remove("during", reason="again")
        step += 1
    assert step > 3
    assert verify(crewlog_registry.path).ok


def test_failure_at_a_change_has_its_type(crewlog_registry: Registry, crewlog_crash: Crash) -> None:
    """A full disk, at the first change."""
    crewlog_registry.register("a")
    with crewlog_crash.at(1, errno.ENOSPC), pytest.raises(StorageFull):
        crewlog_registry.update("a", labels={"k": "v"})
    crewlog_registry.update("a", labels={"k": "w"})
    with (
        pytest.raises(AssertionError, match="there is no change 9999"),
        crewlog_crash.at(9999, errno.ENOSPC),
    ):
        crewlog_registry.update("a", labels={"k": "x"})
