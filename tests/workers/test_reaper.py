"""One thread waits for all ends, and what ends together is recorded together."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import crewlog
from crewlog.local.disk import Disk
from crewlog.model.events import JsonObject
from crewlog.model.steps import Appended, Step
from crewlog.process.wait import look
from crewlog.registry import Registry
from crewlog.session import Session
from crewlog.workers import reaper
from crewlog.workers.reaper import REAPER, Charge, Scribe
from procs import Crew, forked, joined, slay, state_of, until
from stores import opened

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs pidfds and epoll")


@contextlib.contextmanager
def syncs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the syncs of files in a block."""
    counted: list[int] = []
    sync = Disk.sync

    def count(self: Disk, fd: int) -> None:
        counted.append(fd)
        sync(self, fd)

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "sync", count)
        yield counted


@LINUX
def test_many_children_are_waited_for_by_one_thread(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one descriptor each; killed at once, their ends are a few units with a few syncs."""
    until(lambda: threading.active_count() == 1)
    workers = [reg.spawn(f"w-{n}", ["sleep", "300"]) for n in range(40)]
    assert {t.name for t in threading.enumerate()} - {"MainThread"} == {"crewlog-reaper"}
    assert REAPER.counts() == (40, 0)
    with syncs(monkeypatch) as counted:
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        until(lambda: all(w.final for w in reg.workers(all=True)))
    assert len(counted) <= 10
    assert {(w.exit.signal, w.exit.source) for w in reg.workers(all=True) if w.exit} == {
        (9, "wait")
    }
    until(lambda: threading.active_count() == 1)
    assert REAPER.counts() == (0, 0)


@LINUX
def test_busy_store_holds_up_no_ends_of_another(
    reg: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each store has a scribe of its own."""
    go_on, append = threading.Event(), Session.append

    def slow(self: Session, steps: object) -> object:
        if self.where == reg.where:
            assert go_on.wait(60)
        return append(self, steps)  # type: ignore[arg-type] # as it came

    with opened(tmp_path / "other") as other:
        gate = tmp_path / "gate"
        wait = ["sh", "-c", f"until [ -e {gate} ]; do sleep 0.02; done; exit 4"]
        reg.spawn("slow", wait)
        other.spawn("quick", wait)
        monkeypatch.setattr(Session, "append", slow)
        gate.touch()
        until(lambda: (worker := other.get("quick")) is not None and worker.final)
        assert not reg.get("slow").final  # type: ignore[union-attr] # it is there
        go_on.set()
        until(lambda: (worker := reg.get("slow")) is not None and worker.final)


def _redact(_: str, given: JsonObject) -> JsonObject:
    if "SECRET" in str(given.get("tail")):
        message = "a secret"
        raise RuntimeError(message)
    return given


@LINUX
@pytest.mark.parametrize("words", ["SECRET", "\\033" * 16_000])
def test_end_that_cannot_be_written_holds_up_no_other(
    place: Path, tmp_path: Path, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller's own code raises for it; an output that is long as JSON is cut to what fits."""
    gate = tmp_path / "gate"
    wait = f"until [ -e {gate} ]; do sleep 0.02; done; exit 3"
    with opened(place, redact=_redact) as reg:
        argv = ["sh", "-c", f"printf '{words}'; {wait}"]
        reg.spawn("speaks", argv, log=tmp_path / "log", keep_tail=16_384)
        for number in range(10):
            reg.spawn(f"w-{number}", ["sh", "-c", wait])
        gate.touch()
        until(lambda: sum(w.final for w in reg.workers(all=True)) >= 10 + (words != "SECRET"))
        until(lambda: REAPER.counts() == (0, 0))
        speaks = reg.get("speaks")
        assert speaks is not None
        assert speaks.final is (words != "SECRET")
        assert ("the end of worker speaks is not recorded: a secret" in caplog.text) is (
            words == "SECRET"
        )
        assert state_of(speaks.pid) == "", "it is reaped all the same"
        if speaks.exit is not None:
            assert 4000 < len(speaks.exit.tail or "") < 16_384


@LINUX
def test_ends_that_are_too_long_for_one_unit_are_written_in_several(
    reg: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many tails at once."""
    gate = tmp_path / "gate"
    wait = ["sh", "-c", f"until [ -e {gate} ]; do sleep 0.02; done; exit 3"]
    for number in range(20):
        reg.spawn(f"w-{number}", wait)
    monkeypatch.setattr("crewlog.model.steps.BATCH_BYTES_MAX", 3000)
    gate.touch()
    until(lambda: all(w.final for w in reg.workers(all=True)))


@LINUX
def test_without_descriptors_children_are_looked_at(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the budget each gives its descriptor back, and its end is recorded all the same."""
    monkeypatch.setattr(reaper, "_budget", lambda: 2)
    monkeypatch.setattr(reaper, "_LOOK_S", 0.05)
    reg.spawn("first", ["sleep", "0.5"])
    before = len(os.listdir("/proc/self/fd"))
    for number in range(8):
        reg.spawn(f"w-{number}", ["sh", "-c", "sleep 0.3; exit 5"])
    assert len(os.listdir("/proc/self/fd")) < before + 8
    until(lambda: all(w.final for w in reg.workers(all=True)))
    assert {w.exit.code for w in reg.workers(all=True) if w.exit} == {0, 5}


@LINUX
def test_what_a_child_took_is_told_by_its_parent(reg: Registry) -> None:
    """Memory and processor time of the program, not of what waited in its place."""
    big = "x = bytearray(200_000_000); import time; t = time.process_time()\n"
    big += "while time.process_time() - t < 0.3: pass"
    ballast = bytearray(300_000_000)  # the fork server's children have nothing of ours
    reg.spawn("big", [sys.executable, "-c", big])
    assert ballast
    reg.spawn("small", ["true"])
    until(lambda: all(w.final for w in reg.workers(all=True)))
    ended = {w.sid: w.exit for w in reg.workers(all=True)}
    assert ended["big"] is not None
    assert ended["small"] is not None
    assert (ended["big"].max_rss_bytes or 0) > 150_000_000
    assert (ended["big"].cpu_s or 0) >= 0.3
    assert ended["small"].max_rss_bytes is None, "less than the interpreter that waited for it"
    assert (ended["small"].cpu_s or 0) < 0.1


@LINUX
def test_look_leaves_a_child_to_be_reaped(crew: Crew) -> None:
    """It tells how it ended as often as it is asked; of a stranger it says so."""
    child = subprocess.Popen(["sh", "-c", "exit 6"])
    pidfd = os.pidfd_open(child.pid)
    end = look(child.pid, pidfd, wait=True)
    assert end is not None
    assert end.status is not None
    assert (end.status.code, end.status.signal) == (6, None)
    assert look(child.pid, -1) is not None
    assert child.wait() == 6
    with pytest.raises(ChildProcessError):
        look(child.pid, pidfd)
    os.close(pidfd)
    assert look(crew.sleeper().pid, -1) is None


@LINUX
def test_core_that_was_dumped_is_told(tmp_path: Path) -> None:
    """Where the system lets it."""
    code = "import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))"
    child = subprocess.Popen([sys.executable, "-c", code + "; os.abort()"], cwd=tmp_path)
    end = look(child.pid, -1, wait=True)
    dumped = os.WCOREDUMP(os.waitpid(child.pid, 0)[1])
    child.returncode = -6
    assert end is not None
    assert end.status is not None
    assert (end.status.signal, end.status.core) == (6, dumped)


def test_program_that_never_began_is_told_by_its_error(reg: Registry) -> None:
    """In the history, not in the caller's exception alone."""
    with pytest.raises(crewlog.SpawnFailed, match="ENOENT"):
        reg.spawn("a", ["/no/such/program"])
    worker = reg.get("a")
    assert worker is not None
    assert worker.exit is not None
    assert (worker.exit.code, worker.exit.error) == (127, "ENOENT")


@pytest.mark.parametrize(
    ("how", "state"),
    [("exit 3", "exited"), ("kill -TERM $$", "exited"), ("exit 4", "failed")],
)
def test_codes_that_are_no_crash(reg: Registry, how: str, state: str) -> None:
    """For this worker, by its registration; 128 + N is signal N."""
    reg.spawn("a", ["sh", "-c", how], ok_codes=(3, 143))
    until(lambda: (now := reg.get("a")) is not None and now.final)
    worker = reg.get("a")
    assert worker is not None
    assert worker.exit is not None
    assert (worker.state.value, worker.exit.ok) == (state, state == "exited")
    crashed = [e.crashed for e in reg.history(types=["worker.exited"])]
    assert crashed == [state == "failed"]


@pytest.mark.parametrize("wrong", ["3", (256,), (-1,), ("x",), 3, {1: 2}])
def test_wrong_codes_are_refused_before_anything_is_written(reg: Registry, wrong: object) -> None:
    """They say what an exit code is."""
    with pytest.raises((TypeError, ValueError), match="ok_codes"):
        reg.register("a", ok_codes=wrong)  # type: ignore[arg-type] # wrong
    assert not reg.exists


def test_last_words_of_a_worker_are_kept(reg: Registry) -> None:
    """At most 4096 characters; redact sees them."""
    reg.register("a")
    reg.exited("a", code=1, message="the queue is gone")
    worker = reg.get("a")
    assert worker is not None
    assert worker.exit is not None
    assert worker.exit.message == "the queue is gone"
    reg.register("b")
    with pytest.raises(ValueError, match="4096"):
        reg.exited("b", code=1, message="x" * 5000)

    def redact(_kind: str, given: dict[str, object]) -> dict[str, object]:
        return {key: "***" if key == "message" else value for key, value in given.items()}

    with opened(reg.path, redact=redact) as mine:  # type: ignore[arg-type] # JSON
        assert mine.exited("b", code=1, message="secret").data["message"] == "***"


@LINUX
def test_forked_child_has_a_reaper_of_its_own(reg: Registry) -> None:
    """The parent's charges are the parent's."""
    reg.spawn("parents", ["sleep", "300"])

    def child() -> None:
        assert REAPER.counts() == (0, 0)
        with opened(reg.path) as mine:
            mine.spawn("childs", ["sh", "-c", "exit 2"])
            until(lambda: (worker := mine.get("childs")) is not None and worker.final)

    joined(forked(child))
    reg.stop("parents", reason="done")


@LINUX
def test_spawner_that_is_forked_in_every_moment_of_a_spawn(reg: Registry) -> None:
    """A child that is forked beside a spawn can spawn, too: no lock of the reaper is left held."""
    done = threading.Event()

    def spawn() -> None:
        number = 0
        while not done.is_set():
            number += 1
            reg.spawn(f"t-{number}", ["true"])

    thread = threading.Thread(target=spawn)
    thread.start()
    try:
        for number in range(15):

            def child(number: int = number) -> None:
                signal.alarm(30)
                with opened(reg.path) as mine:
                    mine.spawn(f"c-{number}", ["true"])
                    until(lambda: (w := mine.get(f"c-{number}")) is not None and w.final)

            joined(forked(child))
    finally:
        done.set()
        thread.join()
    until(lambda: all(w.final for w in reg.workers(all=True)))


def test_no_thread_to_be_had_is_said_and_stops_nothing(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker runs and is listed; a collector finds its end."""
    until(lambda: threading.active_count() == 1)

    def none(*_: object, **__: object) -> object:
        raise OSError(11, "no more threads")

    with monkeypatch.context() as patch:
        patch.setattr("crewlog.host.start_thread", none)
        worker = reg.spawn("a", ["sleep", "300"])
    assert "nobody waits for the end of worker a" in caplog.text
    assert reg.liveness("a").alive
    slay(worker.pid)
    reg.spawn("b", ["true"])
    until(lambda: (now := reg.get("b")) is not None and now.final)


def test_launch_without_a_pidfd_is_looked_at(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel without pidfds, or no descriptor left at that moment."""
    monkeypatch.setattr("crewlog.process.launch._pidfd", lambda _: -1)
    monkeypatch.setattr(reaper, "_LOOK_S", 0.05)
    reg.spawn("a", ["sh", "-c", "exit 9"])
    until(lambda: (now := reg.get("a")) is not None and now.final)
    worker = reg.get("a")
    assert worker is not None
    assert worker.exit is not None
    assert worker.exit.code == 9


@pytest.mark.parametrize(("number", "state"), [(11, "failed"), (15, "exited"), (9, "exited")])
def test_fault_of_one_that_survived_a_request_to_end_is_a_crash(
    reg: Registry, number: int, state: str
) -> None:
    """A TERM that it lived through is no reason of a SEGV later; what was asked for is none."""
    reg.spawn("a", ["sh", "-c", "trap '' TERM; exec sleep 300"])
    reg.update("a", state="stopping", reason="SIGTERM passed on")
    reg.exited("a", signal=number, source="wait")
    assert reg.get("a").state.value == state  # type: ignore[union-attr] # it is there
    os.kill(reg.get("a").pid, signal.SIGKILL)  # type: ignore[union-attr] # as above


def test_fault_that_was_asked_for_is_no_crash(reg: Registry) -> None:
    """stop(signal=ABRT)."""
    reg.spawn("a", ["sleep", "300"])
    assert not reg.stop("a", reason="a core, please", signal=signal.SIGABRT).crashed


def test_child_is_let_go_only_when_its_end_is_durable(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is being written whoever looks sees the zombie, and how it ended."""
    worker = reg.spawn("a", ["sh", "-c", "sleep 0.2; exit 7"])
    append, seen = Session.append, []

    def look_first(self: Session, steps: Sequence[Step]) -> Appended:
        seen.append(state_of(worker.pid))
        return append(self, steps)

    monkeypatch.setattr(Session, "append", look_first)
    until(lambda: (now := reg.get("a")) is not None and now.final)
    assert seen == ["Z"]
    until(lambda: state_of(worker.pid) == "")


def test_end_that_others_have_recorded_is_no_matter_to_those_beside_it(
    reg: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One unit for the rest; nobody is told that an end is not recorded."""
    gate, go_on, record = tmp_path / "gate", threading.Event(), Scribe._record

    def wait(self: Scribe, part: list[Charge]) -> None:
        assert go_on.wait(60)
        record(self, part)

    monkeypatch.setattr(Scribe, "_record", wait)
    for sid in "abc":
        reg.spawn(sid, ["sh", "-c", f"until [ -e {gate} ]; do sleep 0.02; done; exit 5"])
    gate.touch()
    until(lambda: all(state_of(worker.pid) == "Z" for worker in reg.workers()))
    reg.exited("b", code=9)
    go_on.set()
    until(lambda: all(worker.final for worker in reg.workers(all=True)))
    until(lambda: {state_of(w.pid) for w in reg.workers(all=True)} == {""})  # it is done with all
    codes = {w.sid: w.exit and w.exit.code for w in reg.workers(all=True)}
    assert codes == {"a": 5, "b": 9, "c": 5}
    assert "not recorded" not in caplog.text
