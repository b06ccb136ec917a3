"""Workers are started so that none runs unlisted, and one sid once."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import crewlog
from crewlog import session
from crewlog.errors import SpawnFailed, WaitTimeout, WorkerExists
from crewlog.model.steps import prune_step
from crewlog.process import forkserver, identity
from crewlog.process.launch import Launch
from crewlog.registry import Registry
from crewlog.workers import judge, start
from procs import Crew, files, forked, joined, kill, state_of, until

# A program that leaves a mark as soon as it begins.
MARK = ["sh", "-c", 'echo $$ >> "$0"; exec sleep 300']


def marks(place: Path) -> list[int]:
    """Return the pids of the programs that began."""
    path = place.parent / "marks"
    return [int(row) for row in path.read_text().split()] if path.exists() else []


def marking(place: Path) -> list[str]:
    """Return the command that leaves its mark beside the store."""
    return [*MARK, str(place.parent / "marks")]


def final(reg: Registry, sid: str) -> bool:
    """Say whether the end of a worker is on record."""
    worker = reg.get(sid)
    return worker is not None and worker.final


def end_all(reg: Registry) -> None:
    """Kill the living workers of a test, and reap those that are our children."""
    for worker in reg.workers():
        if reg.liveness(worker.sid).alive and worker.pid != os.getpid():
            os.kill(worker.pid, signal.SIGKILL)


def test_spawned_worker_is_the_program_itself(reg: Registry, place: Path) -> None:
    """Its pid is the program's, in a session of its own, with nothing of ours open."""
    worker = reg.spawn("a", marking(place), labels={"x": "y"}, ready=True)
    until(lambda: marks(place) == [worker.pid])
    assert os.getsid(worker.pid) == worker.pid
    assert worker.owner is not None
    assert worker.owner.pid == os.getpid()
    until(lambda: b"sleep" in Path(f"/proc/{worker.pid}/cmdline").read_bytes())
    open_files = set()
    for number in os.listdir(f"/proc/{worker.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # the loader's, and closed meanwhile
            open_files.add(os.readlink(f"/proc/{worker.pid}/fd/{number}"))
    assert not any("pipe" in name or str(place) in name for name in open_files - _ours())
    end_all(reg)
    until(lambda: final(reg, "a"))


def _ours() -> set[str]:
    return {os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2)}


def test_end_of_a_spawned_worker_is_recorded_by_its_spawner(reg: Registry) -> None:
    """wait(2) is the best source; nobody has to ask for it."""
    reg.spawn("code", ["sh", "-c", "exit 7"])
    reg.spawn("signal", ["sh", "-c", "kill -9 $$"])
    reg.spawn("well", ["true"])
    for sid in ("code", "signal", "well"):
        until(lambda sid=sid: final(reg, sid))  # type: ignore[misc]
    ends = {worker.sid: worker.exit for worker in reg.workers(all=True)}
    kept = {sid: (end.code, end.signal, end.source) for sid, end in ends.items() if end}
    assert kept == {
        "code": (7, None, "wait"),
        "signal": (None, 9, "wait"),
        "well": (0, None, "wait"),
    }


def test_end_is_recorded_after_the_registry_was_closed(place: Path) -> None:
    """The witness has a registry of its own."""
    with crewlog.open(place, actor="me") as reg:
        worker = reg.spawn("a", ["sleep", "300"])
    os.kill(worker.pid, signal.SIGTERM)
    with crewlog.open(place) as again:
        until(lambda: final(again, "a"))
        assert [e.actor["name"] for e in again.history(sid="a")] == ["me", "me"]


@pytest.mark.parametrize(
    ("argv", "code", "why"),
    [
        (["no-such-program"], 127, "ENOENT"),
        (["/etc/passwd"], 126, "EACCES"),
        (["/"], 126, "EACCES"),
    ],
)
def test_program_that_cannot_start_is_an_error_and_on_record(
    reg: Registry, argv: list[str], code: int, why: str
) -> None:
    """SpawnFailed says why; the history says that it was tried."""
    with pytest.raises(SpawnFailed, match=why):
        reg.spawn("a", argv)
    worker = reg.get("a")
    assert worker is not None
    assert worker.exit is not None
    assert (worker.state, worker.exit.code) == ("failed", code)


def test_wrong_directory_or_arguments_start_nothing(reg: Registry, place: Path) -> None:
    """Typed errors, and nothing is registered."""
    with pytest.raises(SpawnFailed):
        reg.spawn("a", ["true"], cwd="/no/such/place")
    for argv in ([], [""], ["a\0b"], "true"):
        with pytest.raises((ValueError, TypeError)):
            reg.spawn("a", argv)
    with pytest.raises(ValueError, match="sid"):
        reg.spawn("no sid", marking(place))
    assert reg.workers(all=True) == []
    assert marks(place) == []


def test_sid_in_use_starts_nothing(reg: Registry, place: Path, crew: Crew) -> None:
    """The program of a refused spawn never begins."""
    reg.register("a", pid=crew.sleeper().pid)
    with pytest.raises(WorkerExists):
        reg.spawn("a", marking(place), cwd=place.parent)
    until(lambda: not _waiting(place))
    assert marks(place) == []


def test_environment_and_words_arrive_as_they_are(reg: Registry, tmp_path: Path) -> None:
    """Also names that no shell would keep, bytes that are no UTF-8, and no locale of our making."""
    out = tmp_path / "out"
    code = (
        "import os, sys; open(sys.argv[1], 'wb').write(repr((sorted(os.environb.items()),"
        " os.fsencode(sys.argv[2]), os.getcwdb())).encode())"
    )
    env = {"PATH": os.environ["PATH"], "a.b": "1", "x\udcff": "\udcfe", "PYTHONCOERCECLOCALE": "0"}
    with out.open("wb") as stream:
        reg.spawn(
            "a", [sys.executable, "-c", code, str(out), "\udcff"], env=env, cwd="/", stdout=stream
        )
    until(lambda: final(reg, "a"))
    expected = sorted((os.fsencode(k), os.fsencode(v)) for k, v in env.items())
    assert out.read_text() == repr((expected, b"\xff", b"/"))


# -- ensure ---------------------------------------------------------------------------------


def test_ensure_returns_the_living_and_starts_the_dead_anew(reg: Registry, place: Path) -> None:
    """One program for any number of calls; after its death another one."""
    first = reg.ensure("a", marking(place))
    assert reg.ensure("a", marking(place)) == first
    until(lambda: marks(place) == [first.pid])
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: reg.liveness("a").dead)
    second = reg.ensure("a", marking(place))
    assert (second.generation, second.pid != first.pid) == (2, True)
    until(lambda: marks(place) == [first.pid, second.pid])
    end_all(reg)
    until(lambda: final(reg, "a"))


@pytest.mark.parametrize("where", ["processes", "threads"])
def test_twenty_callers_at_once_start_one_program(place: Path, where: str) -> None:
    """All of them get the same worker; the program begins once."""
    argv, go = marking(place), threading.Event()
    gate = os.pipe()
    pids: list[int] = []

    def call() -> None:
        with crewlog.open(place) as mine:
            os.read(gate[0], 1) if where == "processes" else go.wait()
            worker = mine.ensure("one", argv, ready=True)
            assert worker.state == "ready"
            pids.append(worker.pid)
            (place.parent / f"got-{worker.pid}-{os.getpid()}-{threading.get_ident()}").touch()

    if where == "processes":
        callers = [forked(call) for _ in range(20)]
        os.write(gate[1], b"." * 20)
        joined(*callers)
    else:
        threads = [threading.Thread(target=call) for _ in range(20)]
        for thread in threads:
            thread.start()
        go.set()
        for thread in threads:
            thread.join()
    with crewlog.open(place) as reg:
        worker = reg.get("one")
        assert worker is not None
        got = [path.name for path in place.parent.glob("got-*")]
        assert len(got) == 20
        assert {name.split("-")[1] for name in got} == {str(worker.pid)}
        until(lambda: marks(place) == [worker.pid])
        assert [e.type for e in reg.history()] == ["worker.registered"]
        end_all(reg)
        until(lambda: reg.liveness("one").dead)
    for fd in gate:
        os.close(fd)


def test_ensure_never_returns_a_process_that_will_not_begin(place: Path) -> None:
    """A starter was killed, and its waiting process does not end yet: the turn is still its own."""
    with crewlog.open(place) as reg:
        reg.register("first")

        def work() -> None:
            def stop_and_die(self: Launch) -> None:
                os.kill(self.pid, signal.SIGSTOP)
                _die()

            with pytest.MonkeyPatch.context() as patch, crewlog.open(place) as mine:
                patch.setattr(Launch, "go", stop_and_die)
                mine.ensure("a", marking(place), cwd=place.parent)

        os.waitpid(forked(work), 0)
        waiting = reg.get("a")
        assert waiting is not None
        assert reg.liveness("a").alive
        with pytest.raises(crewlog.LockBusy):
            reg.ensure("a", marking(place), timeout_s=0.1)
        os.kill(waiting.pid, signal.SIGCONT)
        worker = reg.ensure("a", marking(place))
        assert worker.pid != waiting.pid
        until(lambda: marks(place) == [worker.pid])
        end_all(reg)
        until(lambda: final(reg, "a"))


def test_ensure_waits_for_one_that_is_on_its_way_out(
    reg: Registry, place: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process lets go of its turn before it counts as ended: it is not what was asked for."""
    old = crew.sleeper()
    reg.register("a", pid=old.pid, ready=True)
    asked = []

    def exiting(pid: int) -> bool:
        asked.append(pid)
        if len(asked) == 1:
            kill(old)
            return True
        return False

    monkeypatch.setattr(identity, "is_exiting", exiting)
    new = reg.ensure("a", marking(place))
    assert (asked[0], new.pid != old.pid, new.generation) == (old.pid, True, 2)
    end_all(reg)
    until(lambda: final(reg, "a"))


def test_process_that_ends_is_seen_to_exit_from_proc(crew: Crew) -> None:
    """By the flag that the kernel sets first; a living one has it not."""
    process = crew.sleeper()
    assert not identity.is_exiting(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie has it still
    assert identity.is_exiting(process.pid)


def test_ensure_waits_for_one_that_is_leaving(reg: Registry, place: Path, crew: Crew) -> None:
    """A draining worker is no worker to rely on: its end is waited for, then a new one starts."""
    old = crew.python("import sys; sys.stdin.read()")
    reg.register("a", pid=old.pid, ready=True)
    reg.update("a", state="draining")
    with pytest.raises(WaitTimeout):
        reg.ensure("a", marking(place), timeout_s=0.1)
    assert marks(place) == []
    ender = threading.Timer(0.1, old.kill)
    ender.start()
    new = reg.ensure("a", marking(place))
    ender.join()
    assert (new.generation, new.pid != old.pid) == (2, True)
    end_all(reg)
    until(lambda: final(reg, "a"))


# -- killed on the way ----------------------------------------------------------------------


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, _die)


def _after(owner: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    real = getattr(owner, name)

    def then_die(*arguments: object, **options: object) -> None:
        real(*arguments, **options)
        _die()

    return lambda patch: patch.setattr(owner, name, then_die)


STEPS = {
    "before the process": _before(Launch, "__init__"),
    "with a waiting process": _after(Launch, "__init__"),
    "before the registration": _before(start, "enter"),
    "while it registers": _before(session, "decide_all"),
    "once it is registered": _after(start, "enter"),
    "before the word": _before(Launch, "go"),
    "after the word": _after(Launch, "go"),
}


@pytest.mark.parametrize("step", STEPS)
def test_spawner_killed_at_a_step_leaves_no_unlisted_worker(
    place: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever began is listed; whatever is listed and never began is dead; the sid is free."""
    with crewlog.open(place) as reg:
        reg.register("first")

        def work() -> None:
            with pytest.MonkeyPatch.context() as patch, crewlog.open(place) as mine:
                STEPS[step](patch)
                mine.ensure("a", marking(place), cwd=place.parent)

        pid = forked(work)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        began = step == "after the word"
        until(lambda: len(marks(place)) == began)
        until(lambda: not _waiting(place), wait_s=10)
        assert set(marks(place)) <= {w.pid for w in reg.workers()}
        worker = reg.ensure("a", marking(place))
        until(lambda: marks(place)[-1:] == [worker.pid])
        assert len(marks(place)) == 1, "one program: it lived, or it had never begun"
        end_all(reg)
        until(lambda: reg.liveness("a").dead)


def _waiting(place: Path) -> list[str]:
    """Return the processes that wait to become the marking program, in the place's parent.

    One that the fork server has made has the server's words, and another stdin.
    """
    waiting = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            waits = forkserver.BECOME.encode() in words and "socket" not in os.readlink(
                f"/proc/{pid}/fd/0"
            )
            if waits and os.readlink(f"/proc/{pid}/cwd") == str(place.parent):
                waiting.append(pid)
    return waiting


def test_kill_storm_of_spawners(place: Path) -> None:
    """SIGKILL at random moments: every program that began is registered."""
    code = """
import sys, crewlog
reg = crewlog.open(sys.argv[1])
for n in range(1000):
    reg.spawn(f"{sys.argv[3]}-{n}", ["sh", "-c", 'echo $$ >> "$0"; exec sleep 300', sys.argv[2]])
"""
    crew = Crew()
    for turn in range(15):
        spawner = crew.python(code, place, place.parent / "marks", turn)
        until(lambda turn=turn: len(marks(place)) >= 2 * (turn + 1))  # type: ignore[misc]
        kill(spawner)
    until(lambda: not _waiting(place))
    crew.end()
    with crewlog.open(place) as reg:
        listed = {worker.pid for worker in reg.workers(all=True)}
        assert len(marks(place)) >= 30
        assert set(marks(place)) <= listed
        end_all(reg)
        until(lambda: all(answers.dead for answers in reg.judge(reg.workers())))


def test_negative_control_a_word_before_the_registration_is_caught(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: a spawner that lets the program begin too early is found out."""

    def work() -> None:
        with crewlog.open(place) as mine:
            mine.register("first")
            started = Launch(marking(place), cwd=place.parent)
            started.go()
            _die()
            mine.commit([prune_step(mine.author(), "a", expect=1)])

    pid = forked(work)
    os.waitpid(pid, 0)
    until(lambda: len(marks(place)) == 1)
    (unlisted,) = marks(place)
    with crewlog.open(place) as reg:
        assert unlisted not in {w.pid for w in reg.workers()}
    os.kill(unlisted, signal.SIGKILL)
    until(lambda: state_of(unlisted) in {"", "Z"})


def test_spawner_that_is_stopped_by_a_full_disk_starts_nothing(
    reg: Registry, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No registration, no program."""
    reg.register("first")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(files(reg).directory.disk), "write", full)
    with pytest.raises(crewlog.errors.StorageFull):
        reg.spawn("a", marking(place), cwd=place.parent)
    monkeypatch.undo()
    until(lambda: not _waiting(place))
    assert marks(place) == []
    assert reg.get("a") is None


def test_end_that_the_spawner_is_about_to_record_is_waited_for(reg: Registry) -> None:
    """Reaped and not yet recorded: an observer gets the code, not a loss, every time."""
    for number in range(15):
        reg.spawn(f"a-{number}", ["sh", "-c", "exit 7"])
        event = reg.observe(f"a-{number}", timeout_s=20)
        assert (event.type, event.data["code"]) == ("worker.exited", 7)


def test_frozen_host_program_is_not_taken_for_an_interpreter(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a frozen program sys.executable is that program: python3 is looked for instead."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    reg.spawn("a", ["true"])
    until(lambda: final(reg, "a"))
    worker = reg.get("a")
    assert worker is not None
    assert worker.state == "exited"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SpawnFailed, match="interpreter"):
        reg.spawn("b", ["true"])


@pytest.mark.parametrize("closed", [(0,), (0, 1, 2), (1, 2)])
def test_host_without_standard_streams_starts_programs(
    place: Path, crew: Crew, closed: tuple[int, ...]
) -> None:
    """The numbers 0 to 2 are free in it, and none of our descriptors may take them."""
    code = f"""
import os, sys, crewlog
for fd in {closed!r}:
    os.close(fd)
with crewlog.open(sys.argv[1]) as reg:
    reg.spawn("a", ["sh", "-c", "exit 7"], lease=True, stderr=-3)
    os._exit(reg.observe("a", timeout_s=20).data["code"])
"""
    assert crew.python(code, place).wait(30) == 7


def test_forgotten_launch_ends_its_waiting_process(place: Path) -> None:
    """An interrupt at the wrong moment leaves no process that waits for ever."""
    place.mkdir(mode=0o700)
    started = Launch(marking(place), cwd=place.parent)
    pid = started.pid
    assert _waiting(place) == [str(pid)]
    del started
    until(lambda: state_of(pid) in {"", "Z"})
    os.waitpid(pid, 0)
    assert marks(place) == []


def test_spawner_in_a_pipeline_does_not_hold_it_open(place: Path) -> None:
    """A worker outlives its manager; whoever reads the manager's output is not kept waiting."""
    code = "import sys, crewlog; print(crewlog.open(sys.argv[1]).spawn('a', ['sleep', '300']).pid)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE, timeout=60, check=True
    )
    os.kill(int(done.stdout), signal.SIGKILL)


def test_pid_of_another_namespace_is_no_sign_of_an_end(reg: Registry, crew: Crew) -> None:
    """Its number may be a zombie's here; whether it leaves cannot be seen from here."""
    process = crew.sleeper()
    worker = reg.register("a", pid=process.pid)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert judge.is_exiting(worker)
    assert worker.identity is not None
    who = worker.identity
    for far in (replace(who, pid_ns="pid:[1]"), replace(who, boot_id="another")):
        assert not judge.is_exiting(replace(worker, identity=far))


def test_program_is_started_from_a_directory_that_is_gone(tmp_path: Path) -> None:
    """As subprocess does: it has the directory, though nobody finds it any more."""

    def child() -> None:
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        made = Launch(["sh", "-c", "exit 3"])
        made.go()
        ended = made.ended()
        assert ended is not None
        assert ended.status is not None
        assert ended.status.code == 3

    joined(forked(child))


def test_program_that_ends_without_closing_is_not_warned(place: Path) -> None:
    """Python warns at its end of processes and sockets that are left open."""
    code = "import sys, crewlog; reg = crewlog.open(sys.argv[1]); reg.spawn('a', ['true'])"
    words = [sys.executable, "-W", "error", "-c", code, str(place)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
