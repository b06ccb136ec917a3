"""How a worker ended is learnt by whoever asks, whatever else its starter's program does."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import CrewlogError, InvalidTransition
from crewlog.model.events import ENDING
from crewlog.model.steps import Step
from crewlog.process.handle import Process
from crewlog.process.launch import Launch, _server
from crewlog.registry import Registry
from crewlog.session import Session
from crewlog.workers import judge, start, stop
from crewlog.workers.reaper import Charge, Scribe
from crewlog_compactor import collect, compact
from procs import Crew, files, forked, joined, kill, state_of, until
from stores import opened

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs pidfds")
LIMIT = resource.RLIMIT_NOFILE
SEVEN = ["sh", "-c", "exit 7"]


def ends(reg: Registry, sid: str) -> list[tuple[str, object]]:
    """Return the ends of a sid's workers, each with its code."""
    return [(e.type, e.data.get("code")) for e in reg.history(sid=sid, types=ENDING)]


@contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """Leave so many numbers for descriptors: gaps in what is open are filled meanwhile."""
    before, filling = resource.getrlimit(LIMIT), [os.open(os.devnull, os.O_RDONLY)]
    top = 1 + max(int(fd) for fd in os.listdir("/proc/self/fd"))
    while filling[-1] < top:
        filling.append(os.open(os.devnull, os.O_RDONLY))
    os.close(filling.pop())
    resource.setrlimit(LIMIT, (top + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(LIMIT, before)
        for fd in filling:
            os.close(fd)


@contextmanager
def slow_record(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let the thread that waits for a child stand before its record, until the event is set."""
    go_on, recorded = threading.Event(), Scribe._record

    def record(self: Scribe, part: list[Charge]) -> None:
        assert go_on.wait(60)
        recorded(self, part)

    monkeypatch.setattr(Scribe, "_record", record)
    try:
        yield go_on
    finally:
        go_on.set()


# -- what the host does with its children ---------------------------------------------------

_HOSTS = {
    "ignores": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "reaps in a handler": "signal.signal(signal.SIGCHLD, lambda *_: reap(os.WNOHANG))",
    "reaps in a thread": "threading.Thread(target=reap, args=(0,), daemon=True).start()",
}
_HOST = """
import os, signal, sys, threading, crewlog
def reap(how):
    while True:
        try:
            if os.waitpid(-1, how)[0] == 0: return
        except ChildProcessError:
            if how: return
with crewlog.open(sys.argv[1]) as reg:
    exec(sys.argv[2])
    for number in range(8):
        reg.spawn(str(number), ["sh", "-c", "exit 7"])
        print(reg.observe(str(number), timeout_s=30).data.get("code"), flush=True)
"""


@LINUX
@pytest.mark.parametrize("host", _HOSTS)
@pytest.mark.usefixtures("kept_statuses")
def test_host_that_reaps_our_children_makes_no_code_up(
    reg: Registry, place: Path, crew: Crew, host: str
) -> None:
    """wait(2) finds no child then, which is not the same as exit code 0."""
    output, _ = crew.python(_HOST, place, _HOSTS[host]).communicate(timeout=60)
    assert output.split() == ["7"] * 8
    assert {end for number in range(8) for end in ends(reg, str(number))} == {("worker.exited", 7)}


@LINUX
def test_end_that_nobody_tells_is_not_recorded_as_one(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Reaped by others, and the kernel keeps nothing: lost, by a collector."""
    monkeypatch.setattr(crewlog.process.identity, "kept_status", lambda _: None)
    with slow_reaper(monkeypatch):
        reg.spawn("a", SEVEN)
        until(lambda: "nobody tells how worker a ended" in caplog.text)
    assert ends(reg, "a") == []
    assert collect(reg).lost == ("a",)


@contextmanager
def slow_reaper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reap every child of the launches before they can ask how it ended."""
    asked = Launch.ended

    def ended(self: Launch, **options: bool) -> object:
        with contextlib.suppress(ChildProcessError):  # it is asked again and again
            os.waitpid(self.pid, 0)
        return asked(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "ended", ended)
        yield


@LINUX
@pytest.mark.usefixtures("kept_statuses")
def test_kernel_that_tells_a_moment_later_is_asked_again(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that others reap is gone for wait(2) before its pidfd says how it ended."""
    kept, asked = crewlog.process.identity.kept_status, []

    def not_yet(fd: int) -> object:
        asked.append(fd)
        return kept(fd) if len(asked) > 2 else None

    monkeypatch.setattr(crewlog.process.identity, "kept_status", not_yet)
    with slow_reaper(monkeypatch):
        reg.spawn("a", SEVEN)
        until(lambda: ends(reg, "a") == [("worker.exited", 7)])


@pytest.mark.long
@LINUX
def test_run_keeps_the_exit_code_when_it_is_asked_to_end_behind_a_busy_lock(
    reg: Registry, place: Path, tmp_path: Path
) -> None:
    """The signal that came while it waited ends the waiting, not the command."""
    gate = tmp_path / "gate"
    reg.register("first")
    words = ["-c", "from crewlog_cli.entry import main; main()", "-d", str(place), "run", "a", "--"]
    wait = ["sh", "-c", f"until [ -e {gate} ]; do sleep 0.05; done; exit 7"]
    running = subprocess.Popen([sys.executable, *words, *wait], stderr=subprocess.PIPE, text=True)
    until(lambda: reg.get("a") is not None)
    worker = reg.get("a")
    assert worker is not None
    with files(reg)._appender.lock.held(wait_s=5):
        gate.touch()
        until(lambda: state_of(worker.pid) == "Z")
        until(lambda: not _is_pending(running.pid, signal.SIGCHLD))  # it knows
        running.send_signal(signal.SIGTERM)
        _, output = running.communicate(timeout=30)
    assert (running.returncode, "not recorded" in output) == (7, True)


def _is_pending(pid: int, number: int) -> bool:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    waiting = next(row for row in rows if row.startswith("ShdPnd:")).split()[1]
    return bool(int(waiting, 16) & 1 << (number - 1))


def test_run_hears_of_the_end_where_its_starter_ignores_children(place: Path) -> None:
    """What is ignored stays ignored through exec, and no signal would ever come."""
    code = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
words = ["-c", "from crewlog_cli.entry import main; main()", "-d", sys.argv[1], "run", "a"]
os.execv(sys.executable, [sys.executable, *words, "--", "sh", "-c", "exit 7"])
"""
    done = subprocess.run([sys.executable, "-c", code, str(place)], timeout=30, check=False)
    assert done.returncode == 7


# -- between the end and its record ---------------------------------------------------------


@pytest.mark.parametrize("how", ["collect", "observe", "stop", "ensure", "register"])
def test_no_moment_between_end_and_record_hides_the_code(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The child is reaped once its end is on record; until then whoever looks sees it."""
    with slow_record(monkeypatch) as go_on:
        worker = reg.spawn("a", SEVEN)
        until(lambda: state_of(worker.pid) == "Z")
        match how:
            case "collect":
                assert collect(reg).exited == ("a",)
            case "observe":
                assert reg.observe("a", timeout_s=20).data["code"] == 7
            case "stop":
                assert reg.stop("a", reason="r").data["code"] == 7
            case "ensure":
                assert reg.ensure("a", ["sleep", "300"]).pid != worker.pid
            case _:
                assert reg.register("a", pid=crew.sleeper().pid).pid != worker.pid
        assert state_of(worker.pid) == "Z"
        assert ends(reg, "a") == [("worker.exited", 7)]
        go_on.set()
        until(lambda: state_of(worker.pid) == "")
    assert ends(reg, "a") == [("worker.exited", 7)]
    if how in {"ensure", "register"}:
        assert [w.sid for w in reg.workers()] == ["a"]
        reg.stop("a", reason="done")


@pytest.mark.limits(safety_look_s=0.01)
@pytest.mark.parametrize("why", ["lock", "room"])
def test_spawner_waits_for_a_lock_and_for_room(
    reg: Registry, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """It alone knows how its child ended, and tries again."""
    gate, append = tmp_path / "gate", Session.append
    refused: list[str] = []

    def appended(self: Session, steps: list[Step]) -> object:
        try:
            if why == "room" and len(refused) < 2:
                raise crewlog.errors.StorageFull(str(place), why="ENOSPC")
            return append(self, steps)
        except CrewlogError as error:
            refused.append(error.code)
            raise

    with opened(place, lock_timeout_s=0.05) as mine:
        mine.spawn("a", ["sh", "-c", f"until [ -e {gate} ]; do sleep 0.01; done; exit 7"])
        assert reg.last_seq
        monkeypatch.setattr(Session, "append", appended)
        with files(reg)._appender.lock.held(wait_s=5):
            gate.touch()
            until(lambda: len(refused) >= 2)
        until(lambda: ends(reg, "a") == [("worker.exited", 7)])
    assert set(refused) == {"lock_busy" if why == "lock" else "storage_full"}


def test_spawner_records_the_end_of_one_that_others_keep_changing(reg: Registry) -> None:
    """What counts is whose registration it is, not at which rev it stands."""
    done = threading.Event()

    def change() -> None:
        number = 0
        while not done.is_set():
            number += 1
            with contextlib.suppress(InvalidTransition):
                reg.update("a", meta={"number": number})

    worker = reg.spawn("a", ["sh", "-c", "sleep 0.2; exit 7"])
    threads = [threading.Thread(target=change) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: state_of(worker.pid) == "")
    done.set()
    for thread in threads:
        thread.join()
    assert ends(reg, "a") == [("worker.exited", 7)]


# -- another worker of the sid --------------------------------------------------------------


def test_late_record_ends_no_worker_that_came_after_a_prune(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are the first of their sid as far as the state can tell; they are not the same."""
    with slow_record(monkeypatch):
        first = reg.spawn("a", SEVEN)
        until(lambda: state_of(first.pid) == "Z")
        assert collect(reg, keep=timedelta(0)).exited == ("a",)
        assert collect(reg, keep=timedelta(0)).pruned == ("a",)
        second = reg.spawn("a", ["sleep", "300"])
        assert (first.generation, second.generation) == (1, 1)
    until(lambda: state_of(first.pid) == "")
    assert [(w.sid, w.pid) for w in reg.workers()] == [("a", second.pid)]
    assert reg.liveness("a").alive
    reg.stop("a", reason="done")


@contextmanager
def started_again(reg: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a supervisor be faster than who waits for the end of worker a, which is pruned, too."""
    wait = Process.wait
    again: list[crewlog.Worker] = []

    def wait_and_see(self: Process, wait_s: float) -> bool:
        over = wait(self, wait_s)
        if over and not again:
            until(lambda: ends(reg, "a") != [])
            collect(reg, keep=timedelta(0))
            again.append(reg.spawn("a", ["sleep", "300"]))
        return over

    with monkeypatch.context() as patch:
        patch.setattr(Process, "wait", wait_and_see)
        yield
    assert again


@pytest.mark.parametrize("verb", ["observe", "stop"])
def test_one_that_is_started_again_at_once_is_told_by_its_own_end(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """A supervisor was faster than who waited: the end is in the history, and is returned."""
    reg.spawn("a", ["sh", "-c", "sleep 0.1; exit 7"] if verb == "observe" else ["sleep", "300"])
    with started_again(reg, monkeypatch):
        event = reg.observe("a") if verb == "observe" else reg.stop("a", reason="r")
    assert (event.type, event.data["code"]) == ("worker.exited", 7 if verb == "observe" else None)
    assert reg.liveness("a").alive
    reg.stop("a", reason="done")


def test_end_is_found_behind_a_registration_that_is_no_longer_kept(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention dropped how it began; how it ended is kept, and the sid is another's by now."""
    worker = reg.spawn("a", ["sleep", "300"])
    for number in range(4):
        reg.update("a", meta={"n": number})
        files(reg).rotate()
        compact(reg, gc=False, keep_history=1)
    assert files(reg).first_seq() > worker.registered_seq
    with started_again(reg, monkeypatch):
        assert reg.stop("a", reason="r").data["signal"] == 15
    assert files(reg).first_seq() > worker.rev, "nor is what was read of it when it began"
    end = stop._end_on_record(files(reg), worker)
    assert end is not None
    assert end.data["signal"] == 15
    reg.stop("a", reason="done")


@LINUX
@pytest.mark.usefixtures("kept_statuses")
def test_stop_knows_better_than_a_collector_that_saw_no_more(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It held the process when that ended; that it was recorded as lost meanwhile is not all."""
    process = crew.sleeper()
    reg.register("a", pid=process.pid)
    ask = stop._ask

    def dies_first(*arguments: object, **options: object) -> bool:
        kill(process)
        assert collect(reg).lost == ("a",)
        return ask(*arguments, **options)  # type: ignore[arg-type] # as they came

    monkeypatch.setattr(stop, "_ask", dies_first)
    event = reg.stop("a", reason="r")
    assert (event.type, event.data["signal"]) == ("worker.exited", 9)


@LINUX
@pytest.mark.usefixtures("kept_statuses")
def test_one_that_ends_between_the_look_and_the_grip_is_told_by_the_grip(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held first and looked at second: there is no in-between in which nobody has it."""
    process = crew.sleeper()
    reg.register("a", pid=process.pid)
    look = judge.judge

    def dies_first(session: Session, workers: list[crewlog.Worker]) -> list[crewlog.Liveness]:
        kill(process)
        return look(session, workers)

    monkeypatch.setattr("crewlog.workers.stop.judge", dies_first)
    event = reg.observe("a", timeout_s=20)
    assert (event.type, event.data.get("signal")) == ("worker.exited", 9)


def test_ensure_takes_the_worker_that_was_registered_just_now(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one look did not show yet, the next one does."""
    worker = reg.register("a", pid=crew.sleeper().pid)
    running, looks = start._running, []

    def first_nothing(session: Session, sid: str) -> crewlog.Worker | None:
        looks.append(sid)
        return None if len(looks) == 1 else running(session, sid)

    monkeypatch.setattr(start, "_running", first_nothing)
    assert reg.ensure("a", ["sleep", "300"]).pid == worker.pid
    assert len(looks) == 2


# -- without descriptors, and beside forks --------------------------------------------------


def test_spawn_without_descriptors_is_refused_by_type_and_leaks_none(place: Path) -> None:
    """However many are left when it begins."""

    def few() -> None:
        with opened(place) as reg:
            reg.spawn("first", ["true"])
            reg.observe("first", timeout_s=20)
            until(lambda: threading.active_count() == 1)
            codes = set()
            for spare in range(14):
                _server.end()
                before = len(os.listdir("/proc/self/fd"))
                try:
                    with few_descriptors(spare):
                        reg.spawn(f"w-{spare}", ["true"])
                except CrewlogError as error:
                    codes.add(error.code)
                until(lambda: threading.active_count() == 1)
                _server.end()  # which may be there since
                assert len(os.listdir("/proc/self/fd")) <= before
            assert "spawn_failed" in codes
            until(lambda: all(w.final for w in reg.workers(all=True)))

    joined(forked(few))


@pytest.mark.limits(safety_look_s=0.5)
def test_many_that_end_at_once_do_not_keep_each_other_from_descriptors(place: Path) -> None:
    """What holds a worker is given back before its end is written, which takes some itself."""

    def few() -> None:
        gate = place.parent / "gate"
        wait = ["sh", "-c", f"until [ -e {gate} ]; do sleep 0.05; done; exit 7"]
        with opened(place) as reg:
            reg.register("first")
            for number in range(20):
                reg.spawn(f"w-{number}", wait)
            with few_descriptors(2):
                gate.touch(mode=0o600)
                until(lambda: threading.active_count() == 1)
            exits = {(w.exit.code, w.exit.source) for w in reg.workers(all=True) if w.exit}
            assert exits == {(7, "wait")}

    joined(forked(few))


def test_forked_child_has_no_descriptors_of_our_workers(reg: Registry) -> None:
    """They are of use to nobody there, and a pool of children would run out of them."""
    for number in range(3):
        reg.spawn(str(number), ["sleep", "300"])

    def child() -> None:
        held = set()
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # that of the listing
                held.add(os.readlink(f"/proc/self/fd/{fd}"))
        assert held
        assert not any("pidfd" in name for name in held)

    joined(forked(child))
    for number in range(3):
        reg.stop(str(number), reason="done")


def test_change_without_descriptors_is_refused_by_type(place: Path) -> None:
    """However many are left when the registry is opened for it."""

    def few() -> None:
        with opened(place) as reg:
            reg.register("a")
        refused = 0
        for spare in range(32):
            with opened(place) as reg:
                try:
                    with few_descriptors(spare):
                        reg.update("a", meta={"spare": spare})
                except CrewlogError:
                    refused += 1
        assert 5 < refused < 32

    joined(forked(few))


_FIRST_USE = """
import importlib, importlib.abc, os, signal, sys, threading, time
import crewlog

class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[2]:
            begun.set()
            time.sleep(0.3)

begun = threading.Event()
sys.meta_path.insert(0, Slow())
if sys.argv[2] != "crewlog.registry":
    reg = crewlog.open(sys.argv[1])
    reg.register("first")

def use():
    if sys.argv[2] == "crewlog.process.launch":
        reg.spawn(f"w-{os.getpid()}", ["true"])
    elif sys.argv[2] == "watchdog.observers":
        reg.watch(backend="watchdog").close()
    elif sys.argv[2] == "crewlog.model.lives":
        reg.lives()
    else:
        crewlog.open(sys.argv[1]).close()

thread = threading.Thread(target=use)
thread.start()
begun.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    use()
    os._exit(0)
thread.join()
print(os.waitpid(pid, 0)[1])
"""


@pytest.mark.parametrize(
    "module",
    ["crewlog.process.launch", "watchdog.observers", "crewlog.model.lives", "crewlog.registry"],
)
def test_child_forked_while_a_thread_loads_a_module_can_load_it(
    place: Path, crew: Crew, module: str
) -> None:
    """The lock of that import has no owner in the child; so the fork waits for it."""
    output, _ = crew.python(_FIRST_USE, place, module).communicate(timeout=60)
    assert output == "0\n"
