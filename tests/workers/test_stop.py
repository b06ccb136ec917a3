"""Workers are stopped without ever signalling a stranger, and how they ended is learnt."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import (
    IdentityMismatch,
    StaleRevision,
    StopRefused,
    StorageFull,
    StoreMissing,
    WaitTimeout,
    WorkerNotFound,
)
from crewlog.model.events import Event
from crewlog.model.steps import Step
from crewlog.process import identity
from crewlog.process.handle import Process
from crewlog.process.liveness import Liveness
from crewlog.registry import Registry
from crewlog.session import Session
from crewlog.workers import judge
from procs import (
    LAST_PID,
    Crew,
    forked,
    joined,
    kill,
    slay,
    state_of,
    stranger_with,
    until,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs pidfds")
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
STUBBORN = (
    "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
)


def types(reg: Registry, sid: str) -> list[str]:
    """Return the types of a worker's events."""
    return [event.type for event in reg.history(sid=sid)]


def orphan(place: Path, sid: str, program: str) -> int:
    """Start a worker that is not our child: its parent waits for it and throws its status away."""
    code = """
import subprocess, sys, crewlog
worker = subprocess.Popen(sys.argv[3:])
with crewlog.open(sys.argv[1]) as reg:
    reg.register(sys.argv[2], pid=worker.pid)
print(worker.pid, flush=True)
worker.wait()
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(place), sid, sys.executable, "-c", program],
        stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True,
    )  # fmt: skip
    _parents.append(parent)
    assert parent.stdout is not None
    return int(parent.stdout.readline())


_parents: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _end_parents() -> object:
    """Reap the parents of orphans."""
    yield
    while _parents:
        parent = _parents.pop()
        parent.kill()
        parent.communicate()


def test_stop_asks_and_records_how_it_ended(reg: Registry, place: Path) -> None:
    """The request first, then the end with its signal, though we are not its parent."""
    pid = orphan(place, "a", "import signal; signal.pause()")
    event = reg.stop("a", reason="deploy")
    assert event.type == "worker.exited"
    assert (event.data["signal"], event.data["expected"]) == (15, True)
    assert event.data["source"] in {"pidfd", "zombie"}
    assert types(reg, "a") == ["worker.registered", "worker.stop_requested", "worker.exited"]
    asked = next(reg.history(types=["worker.stop_requested"]))
    assert asked.data == {"signal": 15, "grace_s": 10.0, "reason": "deploy"}
    until(lambda: state_of(pid) in {"", "Z"})
    worker = reg.get("a")
    assert worker is not None
    assert worker.state == "exited"


def test_stubborn_worker_is_killed_after_the_grace(reg: Registry, crew: Crew) -> None:
    """SIGTERM is ignored; SIGKILL through the same pidfd is not."""
    worker = crew.python(STUBBORN)
    assert worker.stdout is not None
    worker.stdout.readline()
    reg.register("a", pid=worker.pid)
    began = time.monotonic()
    event = reg.stop("a", reason="r", grace_s=0.2)
    assert 0.2 <= time.monotonic() - began < 5
    assert event.data["signal"] == 9


def test_stop_with_another_signal_and_an_orderly_code(reg: Registry, crew: Crew) -> None:
    """The worker's own way out is respected."""
    code = "import signal, sys; signal.signal(10, lambda *_: sys.exit(3)); print(1, flush=True)"
    worker = crew.python(code + "; signal.pause()")
    assert worker.stdout is not None
    worker.stdout.readline()
    reg.register("a", pid=worker.pid)
    event = reg.stop("a", reason="r", signal=signal.SIGUSR1)
    assert (event.data["code"], event.data["source"]) == (3, "zombie")


def test_stop_of_one_that_ended_returns_its_end(reg: Registry, crew: Crew) -> None:
    """Dead and not recorded: recorded now. Recorded: the event that was."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    kill(worker)
    event = reg.stop("a", reason="r")
    assert event.type == "worker.lost"
    assert reg.stop("a", reason="again") == event
    assert types(reg, "a") == ["worker.registered", "worker.lost"]
    with pytest.raises(WorkerNotFound):
        reg.stop("b", reason="r")


@LINUX
@pytest.mark.skipif(not os.access(LAST_PID, os.W_OK), reason="needs to set ns_last_pid")
def test_stranger_with_the_workers_pid_gets_no_signal(reg: Registry, crew: Crew) -> None:
    """The worker is recorded as lost; who has its pid now lives on."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    kill(worker)
    stranger = stranger_with(worker.pid)
    try:
        assert reg.stop("a", reason="r").data["cause"] == "pid_reused"
        assert os.waitpid(stranger, os.WNOHANG) == (0, 0), "the stranger lives"
    finally:
        slay(stranger)


@LINUX
def test_worker_replaced_between_the_look_and_the_request_gets_no_signal(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sid that was registered anew meanwhile is another worker."""
    first, second = crew.sleeper(), crew.sleeper()
    reg.register("a", pid=first.pid)
    real = Process.__init__

    def replaced(self: Process, who: crewlog.Identity) -> None:
        real(self, who)
        monkeypatch.undo()
        reg.remove("a", reason="handed over")
        reg.register("a", pid=second.pid)

    monkeypatch.setattr(Process, "__init__", replaced)
    with pytest.raises(StaleRevision):
        reg.stop("a", reason="r")
    assert first.poll() is None
    assert second.poll() is None
    assert "worker.stop_requested" not in types(reg, "a")


def test_pidfd_of_another_process_is_not_held(reg: Registry, crew: Crew) -> None:
    """The identity is checked on the pidfd that would carry the signal."""
    one, other = crew.sleeper(), crew.sleeper()
    mine, theirs = identity.capture(one.pid), identity.capture(other.pid)
    from dataclasses import replace

    with pytest.raises(crewlog.errors.ProcessNotFound):
        Process(replace(mine, pidfd_id=theirs.pidfd_id))
    with pytest.raises(crewlog.errors.ProcessNotFound):
        Process(replace(mine, pidfd_id=None, start_ticks=1))


def test_refused_before_anything_is_written(reg: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ourselves, our ancestors, pid 1: no event, no signal."""
    monkeypatch.setattr(Process, "send", lambda *_: pytest.fail("a signal was sent"))
    for sid, pid in (("self", os.getpid()), ("parent", os.getppid()), ("init", 1)):
        reg.register(sid, pid=pid)
        before = reg.last_seq
        with pytest.raises(StopRefused):
            reg.stop(sid, reason="r", grace_s=0)
        assert reg.last_seq == before


@LINUX
@ROOT
def test_process_of_another_user_is_refused(crew: Crew) -> None:
    """Whoever may not signal it learns that before the request is written."""
    worker = crew.sleeper()
    theirs = Path(tempfile.mkdtemp(prefix="crewlog-test-"))  # pytest's own is closed to others
    os.chown(theirs, 65534, 65534)

    def as_nobody() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with crewlog.open(theirs / "store") as mine:
            mine.register("a", pid=worker.pid)
            with pytest.raises(StopRefused, match="uid 0"):
                mine.stop("a", reason="r")
            assert mine.last_seq == 2

    try:
        joined(forked(as_nobody))
    finally:
        shutil.rmtree(theirs)
    assert worker.poll() is None


def test_worker_that_cannot_be_proven_gets_no_signal(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing to compare with: IdentityMismatch, and nothing is written."""
    worker = crew.sleeper()
    monkeypatch.setattr(identity, "open_pidfd", lambda _: ("unsupported", -1))
    monkeypatch.setattr(identity, "read_stat", lambda *_, **__: None)
    reg.register("a", pid=worker.pid)
    before = reg.last_seq
    with pytest.raises(IdentityMismatch):
        reg.stop("a", reason="r")
    assert reg.last_seq == before
    assert worker.poll() is None


def test_request_is_durable_before_the_signal(
    reg: Registry, place: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever receives the signal finds who sent it, and why."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    seen: list[str] = []
    real = Process.send

    def send(self: Process, number: int) -> bool:
        with crewlog.open(place) as other:
            seen.extend(types(other, "a") if number else ())  # 0 only asks whether it may
        return real(self, number)

    monkeypatch.setattr(Process, "send", send)
    reg.stop("a", reason="r")
    assert seen == ["worker.registered", "worker.stop_requested"]


@pytest.mark.limits(kill_wait_s=0.05)
def test_unkillable_worker_stays_listed(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predecessor dropped the entry although its signal had failed."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    monkeypatch.setattr(Process, "send", lambda *_: True)
    with pytest.raises(WaitTimeout):
        reg.stop("a", reason="r", grace_s=0.01)
    now = reg.get("a")
    assert now is not None
    assert now.state == "stopping"


def test_each_stop_is_on_record_even_of_one_that_is_stopping(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two operators, two requests, one end."""
    worker = crew.python(STUBBORN)
    assert worker.stdout is not None
    worker.stdout.readline()
    reg.register("a", pid=worker.pid)
    ends: list[crewlog.Event] = []
    wait = Process.wait

    def wait_for_all(self: Process, wait_s: float) -> bool:
        until(lambda: types(reg, "a").count("worker.stop_requested") == 4)
        return wait(self, wait_s)

    monkeypatch.setattr(Process, "wait", wait_for_all)
    threads = [
        threading.Thread(target=lambda: ends.append(reg.stop("a", reason="r", grace_s=0.3)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({event.seq for event in ends}) == 1
    assert types(reg, "a").count("worker.exited") == 1
    assert types(reg, "a").count("worker.stop_requested") == 4


def test_stop_of_our_own_spawned_child_keeps_one_end(reg: Registry) -> None:
    """The spawner's witness and the stopper agree, whoever comes first."""
    for number in range(10):
        sid = f"a-{number}"
        reg.spawn(sid, ["sleep", "300"], ready=True)
        event = reg.stop(sid, reason="r")
        assert event.data["signal"] == 15
        assert types(reg, sid).count("worker.exited") == 1


# -- observing ------------------------------------------------------------------------------


@LINUX
@pytest.mark.usefixtures("kept_statuses")
def test_observer_learns_the_code_that_the_parent_throws_away(
    reg: Registry, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held before the end, read after it was reaped: the kernel keeps it for the holder."""
    pid = orphan(place, "a", "import signal, sys; signal.signal(10, lambda *_: sys.exit(42)); "
                 "signal.pause()")  # fmt: skip
    ends: list[crewlog.Event] = []
    holding, wait = threading.Event(), Process.wait

    def waits(self: Process, wait_s: float) -> bool:
        holding.set()
        return wait(self, wait_s)

    monkeypatch.setattr(Process, "wait", waits)
    observer = threading.Thread(target=lambda: ends.append(reg.observe("a")))
    observer.start()
    assert holding.wait(20)
    until(lambda: b"\0-c\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
    until(
        lambda: (
            int(Path(f"/proc/{pid}/status").read_text().split("SigCgt:\t")[1][:16], 16) & 512 != 0
        )
    )
    os.kill(pid, signal.SIGUSR1)
    observer.join()
    (event,) = ends
    assert (event.data["code"], event.type) == (42, "worker.exited")
    assert event.data["source"] in {"pidfd", "zombie"}
    until(lambda: state_of(pid) == "")
    worker = reg.get("a")
    assert worker is not None
    assert worker.state == "failed"


def test_parent_that_reaps_between_two_looks_hides_no_code(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one look has shown is recorded, though the next would show nothing."""
    worker = crew.python("import sys; sys.stdin.read(1); sys.exit(7)")
    reg.register("a", pid=worker.pid, owner=os.getpid())
    assert worker.stdin is not None
    worker.stdin.close()
    until(lambda: state_of(worker.pid) == "Z")

    def looks_then_reaps(session: Session, workers: list[crewlog.Worker]) -> list[Liveness]:
        answers = judge.judge(session, workers)
        if answers[0].evidence.exit_code is not None and len(shown) < 2:
            shown.append(answers)
            if len(shown) == 2:
                worker.wait()
        return answers

    shown: list[list[Liveness]] = []
    monkeypatch.setattr("crewlog.workers.stop.judge", looks_then_reaps)
    event = reg.observe("a", timeout_s=20)
    assert (event.type, event.data.get("code")) == ("worker.exited", 7)


def test_observer_gives_up_after_its_time(reg: Registry, crew: Crew) -> None:
    """124 on the command line; nothing is written."""
    reg.register("a", pid=crew.sleeper().pid)
    before = reg.last_seq
    with pytest.raises(WaitTimeout):
        reg.observe("a", timeout_s=0.05)
    assert reg.last_seq == before


def test_no_store_is_said_and_none_created(reg: Registry, place: Path) -> None:
    """There is nothing to stop."""
    for act in (lambda: reg.stop("a", reason="r"), lambda: reg.observe("a"), lambda: reg.beat("a")):
        with pytest.raises((WorkerNotFound, StoreMissing)):
            act()
    assert not place.exists()


def test_end_that_finds_no_room_is_said(reg: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was signalled and is gone: nobody else sees how it ended."""
    worker = reg.spawn("a", ["sleep", "300"], owner=None)
    real = Session.change

    def full(self: Session, step: Step) -> Event:
        monkeypatch.setattr(Session, "change", real)
        raise StorageFull("here", why="no space left")

    monkeypatch.setattr(Session, "change", full)
    with pytest.raises(StorageFull) as caught:
        reg.stop("a", reason="x")
    assert str(caught.value).startswith("worker 'a' has ended by signal 15, and that is not rec")
    assert state_of(worker.pid) in {"", "Z"}
    until(lambda: (now := reg.get("a")) is not None and now.final)  # we started it
