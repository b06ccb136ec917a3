"""Deaths are news: recorded as they happen, by whoever observes, once."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import crewlog
from crewlog import host
from crewlog.process import identity
from crewlog.registry import Registry
from crewlog.workers import judge
from crewlog.workers.reaper import REAPER
from crewlog_compactor import collect
from procs import Crew, forked, joined, kill, slay, until
from stores import opened

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs pidfds")

_SPAWN = """
import os, sys, crewlog
with crewlog.open(sys.argv[1]) as reg:
    for number in range(int(sys.argv[2])):
        print(reg.spawn(f"w-{number}", sys.argv[3:]).pid, flush=True)
    os._exit(0)
"""


def left(place: Path, *program: str, count: int = 1) -> list[int]:
    """Start workers whose starter is gone; return their pids."""
    done = subprocess.run(
        [sys.executable, "-c", _SPAWN, str(place), str(count), *program],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [int(row) for row in done.stdout.split()]


def ends(reg: Registry) -> list[tuple[str, str, object]]:
    """Return every end that is on record: sid, type, code or signal."""
    return [
        (e.sid, e.type, e.data.get("signal") or e.data.get("code"))
        for e in reg.history(types=["worker.exited", "worker.lost"])
    ]


def test_death_is_told_at_once_whoever_started_the_worker(reg: Registry, place: Path) -> None:
    """Its starter is gone, the watcher is another process's: within a second, with the signal."""
    reg.register("first")
    with reg.observe_all() as observer, reg.watch(after="now") as items:
        assert observer.wait(20)
        (pid,) = left(place, "sleep", "300")
        items.drain()
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        until(lambda: any(i.kind == "change" and i.event.crashed for i in items.drain()))
        assert time.monotonic() - began < 1.0
    assert ends(reg) == [("w-0", "worker.exited", 9)]


def test_negative_control_nobody_tells_without_an_observer(reg: Registry, place: Path) -> None:
    """Until a collector comes."""
    (pid,) = left(place, "sleep", "300")
    os.kill(pid, signal.SIGKILL)
    time_over = time.monotonic() + 0.7
    until(lambda: time.monotonic() > time_over)
    assert ends(reg) == []
    collect(reg)
    assert len(ends(reg)) == 1


def test_worker_that_ended_before_it_was_observed_is_recorded(reg: Registry, crew: Crew) -> None:
    """The first look finds it."""
    gone = crew.sleeper()
    reg.register("gone", pid=gone.pid)
    kill(gone)
    with reg.observe_all():
        until(lambda: [e[:2] for e in ends(reg)] == [("gone", "worker.lost")])


def test_starter_observers_and_collectors_write_one_event_a_death(
    reg: Registry, place: Path
) -> None:
    """All of them at once, many deaths, in threads and processes."""

    def observe() -> None:
        with opened(place) as mine, mine.observe_all():
            signal.pause()

    def gather() -> None:
        with opened(place) as mine:
            while True:
                collect(mine)

    reg.register("first")
    others = [forked(observe) for _ in range(3)] + [forked(gather)]
    with reg.observe_all():
        for number in range(10):
            reg.spawn(f"mine-{number}", ["sh", "-c", f"exit {number}"])
        for pid in left(place, "sh", "-c", "exec sleep 300", count=10):
            os.kill(pid, signal.SIGKILL)
        until(lambda: all(w.final or w.sid == "first" for w in reg.workers(all=True)))
    for pid in others:
        slay(pid)
    exits = sorted(ends(reg))
    assert len(exits) == len({sid for sid, *_ in exits}) == 20
    codes = {sid: how for sid, _, how in exits if sid.startswith("mine")}
    assert codes == {f"mine-{n}": n for n in range(10)}, "whoever was first knew the code"


def test_stand_by_takes_over_when_the_leader_is_killed(
    reg: Registry, place: Path, tmp_path: Path
) -> None:
    """Within a second, and holds what lived before."""
    reg.register("first")

    def observe() -> None:
        with opened(place) as mine, mine.observe_all() as observer:
            assert observer.wait(20)
            (tmp_path / "leads").touch()
            signal.pause()

    leader = forked(observe)
    until((tmp_path / "leads").exists)
    with reg.observe_all() as observer:
        assert not observer.wait(1.5)
        (pid,) = left(place, "sleep", "300")
        slay(leader)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        until(lambda: ends(reg) == [("w-0", "worker.exited", 9)])
        assert time.monotonic() - began < 3.0
        assert observer.leads


def test_observer_waits_for_a_store(place: Path) -> None:
    """It makes none, and begins with the first registration."""
    with opened(place) as reg, reg.observe_all() as observer:
        assert not observer.wait(0.2)
        assert not place.exists()
        (pid,) = left(place, "sleep", "300")
        assert observer.wait(20)
        os.kill(pid, signal.SIGTERM)
        until(lambda: ends(reg) == [("w-0", "worker.exited", 15)])


def test_closed_observer_gives_everything_back(reg: Registry, crew: Crew) -> None:
    """Descriptors and threads; it records no more."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    until(lambda: threading.active_count() == 1)
    before = len(os.listdir("/proc/self/fd"))
    with reg.observe_all() as observer:
        assert observer.wait(20)
    until(lambda: threading.active_count() == 1)
    assert len(os.listdir("/proc/self/fd")) <= before
    kill(worker)
    assert ends(reg) == []


def test_watch_can_observe(reg: Registry, place: Path) -> None:
    """For as long as it is open."""
    reg.register("first")
    with reg.watch(after="now", types=["worker.exited"], observe=True) as items:
        (pid,) = left(place, "sh", "-c", "exec sleep 300")
        os.kill(pid, signal.SIGKILL)
        item = items.next(20)
        while item is not None and item.kind != "change":
            item = items.next(20)
        assert item is not None
        assert item.kind == "change"
        assert item.event.data["signal"] == 9


def test_asyncio_observes_too(reg: Registry, place: Path) -> None:
    """The same handle."""
    reg.register("first")

    async def main() -> None:
        async with crewlog.aopen(place) as mine:
            observer = await mine.observe_all()
            try:
                (pid,) = await asyncio.to_thread(left, place, "sleep", "300")
                os.kill(pid, signal.SIGKILL)
                worker = None
                while worker is None or not worker.final:
                    await asyncio.sleep(0.02)
                    worker = await mine.get("w-0")
            finally:
                await asyncio.to_thread(observer.close)

    asyncio.run(main())
    assert ends(reg) == [("w-0", "worker.exited", 9)]


def test_lease_of_another_namespace_that_is_given_back_is_recorded(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose pid means nothing here is looked at by its lease, twice."""
    code = "import signal, sys, crewlog\nreg = crewlog.open(sys.argv[1])\n"
    code += "reg.register('boxed', lease=True)\nprint('in', flush=True)\nsignal.pause()"
    process = crew.python(code, reg.path)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    here = identity.scope()
    elsewhere = identity.Scope(here.boot_id, here.host_id, "4026532999:77")
    monkeypatch.setattr(identity, "scope", lambda: elsewhere)
    monkeypatch.setattr(identity, "sees_every_process", lambda: False)
    with reg.observe_all() as observer:
        assert observer.wait(20)
        over = time.monotonic() + 1.2
        until(lambda: time.monotonic() > over)
        assert ends(reg) == [], "it lives"
        kill(process)
        until(lambda: ends(reg) == [("boxed", "worker.lost", None)])


@pytest.mark.parametrize("how", ["observer", "collector"])
def test_worker_ends_with_its_owner_where_that_was_asked_for(
    reg: Registry, crew: Crew, how: str
) -> None:
    """Once it is proven dead; who did not ask lives on."""
    owner, tied, free = crew.sleeper(), crew.sleeper(), crew.sleeper()
    reg.register("tied", pid=tied.pid, owner=owner.pid, ends_with="owner")
    reg.register("free", pid=free.pid, owner=owner.pid)
    if how == "observer":
        with reg.observe_all() as observer:
            assert observer.wait(20)
            kill(owner)
            until(lambda: tied.poll() is not None)
            until(lambda: (w := reg.get("tied")) is not None and w.final)
    else:
        assert collect(reg).stopped == ()
        kill(owner)
        threading.Thread(target=tied.wait, daemon=True).start()
        assert collect(reg).stopped == ("tied",)
    assert free.poll() is None
    asked = [e for e in reg.history(sid="tied") if e.type == "worker.stop_requested"]
    assert [e.data["reason"] for e in asked] == ["its owner has ended"]
    assert [e.crashed for e in reg.history(sid="tied")][-1] is False


def test_ends_with_owner_needs_one(reg: Registry) -> None:
    """And nothing but an owner is known."""
    with pytest.raises(ValueError, match="owner"):
        reg.register("a", ends_with="owner")
    with pytest.raises(ValueError, match="'owner' or None"):
        reg.register("a", owner=os.getpid(), ends_with="parent")  # type: ignore[arg-type] # wrong
    assert not reg.exists


def test_observer_of_a_forked_child_is_the_parents(reg: Registry) -> None:
    """Closed there, it does nothing to the parent's."""
    reg.register("first")
    with reg.observe_all() as observer:
        assert observer.wait(20)
        joined(forked(observer.close))
        assert observer.leads


def test_forked_child_has_no_descriptors_of_what_is_observed(reg: Registry, crew: Crew) -> None:
    """Nor does its parent lose one."""
    reg.register("a", pid=crew.sleeper().pid)

    def pidfds() -> int:
        names = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum("pidfd" in os.readlink(name) for name in names if os.path.lexists(name))

    with reg.observe_all() as observer:
        assert observer.wait(20)
        held = pidfds()
        assert held

        def child() -> None:
            assert pidfds() == 0

        joined(forked(child))
        assert pidfds() == held


def test_no_thread_to_be_had_loses_no_end_and_no_observer(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An owner's workers cannot be stopped then; those that end beside it are recorded."""
    owner, tied, other = crew.sleeper(), crew.sleeper(), crew.sleeper()
    reg.register("tied", pid=tied.pid, owner=owner.pid, ends_with="owner")
    reg.register("other", pid=other.pid)
    start = host.start_thread

    def scarce(work: Callable[[], None], *, name: str) -> threading.Thread:
        if name == "crewlog-left-behind":
            raise OSError(11, "no more threads")
        return start(work, name=name)

    with reg.observe_all() as observer:
        assert observer.wait(20)
        monkeypatch.setattr(host, "start_thread", scarce)
        kill(owner)
        until(lambda: "no more threads" in caplog.text)
        kill(other)
        until(lambda: (worker := reg.get("other")) is not None and worker.final)
        assert observer.leads
    assert reg.liveness("tied").alive
    monkeypatch.setattr(REAPER, "add", lambda *_: start_nothing())
    with reg.observe_all() as observer:
        until(lambda: "is interrupted" in caplog.text)
        monkeypatch.undo()
        assert observer.wait(20), "it tries again"


def start_nothing() -> None:
    """Refuse, as a system does at its limit of threads."""
    raise OSError(11, "no more threads")


def test_starter_that_lives_tells_the_end_itself(reg: Registry, place: Path, crew: Crew) -> None:
    """It knows what the worker took; an observer beside it gives it the time to say so."""
    code = """
import sys, threading, crewlog
from crewlog.workers.reaper import Scribe
record = Scribe._record
def slow(self, part):
    threading.Event().wait(0.2)
    record(self, part)
Scribe._record = slow
reg = crewlog.open(sys.argv[1])
print(reg.spawn("a", ["sleep", "300"]).pid, flush=True)
sys.stdin.read()
"""
    reg.register("first")
    starter = crew.python(code, place)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    with reg.observe_all() as observer:
        assert observer.wait(20)
        os.kill(pid, signal.SIGKILL)
        until(lambda: (worker := reg.get("a")) is not None and worker.final)
    worker = reg.get("a")
    assert worker is not None
    assert worker.exit is not None
    assert (worker.exit.signal, worker.exit.source) == (9, "wait")


def test_worker_of_another_namespace_that_seems_dead_once_is_left_alone(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can hold it is faster, and knows more: it is looked at twice."""
    reg.register("boxed", pid=crew.sleeper().pid)
    here = identity.scope()
    elsewhere = identity.Scope(here.boot_id, here.host_id, "4026532999:77")
    monkeypatch.setattr(identity, "scope", lambda: elsewhere)
    monkeypatch.setattr(identity, "sees_every_process", lambda: False)
    looks: list[str] = []

    def once(session: object, workers: list[crewlog.Worker]) -> list[crewlog.Liveness]:
        looks.extend(worker.sid for worker in workers)
        answers = judge.judge(session, workers)  # type: ignore[arg-type] # as it came
        dead = replace(answers[0], verdict=crewlog.Verdict.DEAD) if answers else None
        return [dead] if dead and len(looks) == 1 else answers

    monkeypatch.setattr("crewlog.observer.judge", once)
    with reg.observe_all():
        until(lambda: len(looks) >= 3)
    assert ends(reg) == []
