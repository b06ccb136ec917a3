"""What the commands that start, stop, judge and collect workers promise."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import CREWLOG, Cli
from crewlog.local import layout, leases
from crewlog.registry import Registry
from procs import Crew, files, kill, state_of, until


@pytest.fixture
def started(cli: Cli) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep commands that run beside the test, and end them."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def types(reg: Registry, sid: str) -> list[str]:
    """Return the types of a worker's events."""
    return [event.type.removeprefix("worker.") for event in reg.history(sid=sid)]


def test_stop_ends_workers_and_prints_how(cli: Cli, reg: Registry, crew: Crew) -> None:
    """One line a worker; with --json one object; those that ended already too."""
    for sid in ("a", "b", "c"):
        reg.register(sid, pid=crew.sleeper().pid)
    out = cli("stop", "a", "b", "--reason", "deploy").stdout
    assert [row.split("  ")[2] for row in out.splitlines()] == ["a", "b"]
    assert out.count("stopped (SIGTERM)") == 2
    answer = cli.json("stop", "c", "a", "c")
    assert [event["sid"] for event in answer["stopped"]] == ["c", "a"]  # type: ignore[attr-defined]
    assert answer["failed"] == []
    asked = next(reg.history(sid="a", types=["worker.stop_requested"]))
    assert (asked.data["reason"], asked.actor["via"]) == ("deploy", "cli")


def test_stop_dry_run_says_whom_and_signals_nobody(cli: Cli, reg: Registry, crew: Crew) -> None:
    """Nothing is written either."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    before = reg.last_seq
    assert cli("stop", "--all", "--dry-run").stdout.splitlines()[1].split() == [
        "a", str(worker.pid), "starting", "alive", "signal",
    ]  # fmt: skip
    row = json.loads(cli("stop", "a", "--dry-run", "--json").stdout)["workers"][0]
    assert row["liveness"] == "alive"
    assert (worker.poll(), reg.last_seq) == (None, before)


def test_stop_dry_run_says_what_would_become_of_each(cli: Cli, reg: Registry, crew: Crew) -> None:
    """Who is dead, has ended, or must not be stopped; and --all counts the living."""
    dead = crew.sleeper()
    reg.register("dead", pid=dead.pid)
    kill(dead)
    reg.register("me")
    reg.register("ended")
    reg.exited("ended", code=0)
    workers = cli.json("stop", "dead", "me", "ended", "--dry-run")["workers"]
    assert {row["sid"]: row["would"] for row in workers} == {  # type: ignore[attr-defined]
        "dead": "record its end", "me": "refuse", "ended": "nothing",
    }  # fmt: skip
    reg.register("living", pid=crew.sleeper().pid)
    assert "would stop 1 workers" in cli("stop", "--all", code=2).stderr


def test_refused_stops_are_one_error_object(cli: Cli, reg: Registry) -> None:
    """The document names them all."""
    reg.register("a")
    reg.register("b")
    done = cli("stop", "a", "b", "--json", code=1)
    assert len(json.loads(done.stdout)["failed"]) == 2
    assert len(done.stderr.splitlines()) == 1


def test_ctrl_c_ends_a_stop_at_once(reg: Registry, crew: Crew, place: Path) -> None:
    """Nobody waits for the grace period, and the worker is not killed behind one's back."""
    stubborn = crew.python(
        "import signal, sys; signal.signal(15, signal.SIG_IGN); print(1, flush=True); "
        "sys.stdin.read()"
    )
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    reg.register("a", pid=stubborn.pid)
    stop = subprocess.Popen([*CREWLOG, "-d", str(place), "stop", "a", "--grace", "60s"])
    until(lambda: reg.workers()[0].state == "stopping")
    began = time.monotonic()
    stop.send_signal(signal.SIGINT)
    assert stop.wait(20) == 130
    assert time.monotonic() - began < 5
    assert stubborn.poll() is None


@pytest.mark.parametrize(
    "words",
    [("stop",), ("stop", "a", "--all"), ("stop", "--all"), ("stop", "a", "--grace", "soon"),
     ("stop", "a", "--signal", "NONE"), ("stop", "a", "--reason", " "),
     ("gc", "--plan", "f", "--dry-run"), ("gc", "--assume-dead", "a"), ("gc", "--reason", "r"),
     ("gc", "--apply", "no-such-file"), ("gc", "--plan", "/no/such/place/f"),
     ("run", "a", "--heartbeat", "soon", "--", "true"),
     ("exec", "a", "--heartbeat", "99999d", "--", "true"), ("run", "no sid", "--", "true")],
)  # fmt: skip
def test_wrong_words_are_2_and_touch_nothing(
    cli: Cli, reg: Registry, crew: Crew, words: tuple[str, ...]
) -> None:
    """Usage errors; --all without a terminal needs --yes."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    before = reg.last_seq
    cli(*words, code=2)
    assert (worker.poll(), reg.last_seq) == (None, before)


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_stop_all_asks_on_a_terminal(
    cli: Cli, reg: Registry, crew: Crew, answer: bytes, code: int
) -> None:
    """Only a yes is a yes."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*CREWLOG, "--dir", str(cli.place), "stop", "--all"], stdin=theirs,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.write(ours, answer)
    assert process.wait(30) == code
    os.close(ours)
    os.close(theirs)
    assert (worker.poll() is None) == (code != 0)


def test_stop_of_what_may_not_be_stopped_is_1_and_tells_all(
    cli: Cli, reg: Registry, crew: Crew
) -> None:
    """Those that can be stopped are; the others are named, each with its reason."""
    reg.register("a", pid=crew.sleeper().pid)
    words = " ".join(f"'{word}'" for word in [*CREWLOG, "--dir", str(cli.place)])
    stop = f"{words} register me --pid $$ >/dev/null && {words} stop me a $0; echo $?"
    done = subprocess.run(["sh", "-c", stop, "-q"], capture_output=True, text=True, check=True)
    assert "stopped (SIGTERM)" in done.stdout
    assert done.stdout.endswith("1\n")
    assert "descends from it" in done.stderr
    done = subprocess.run(["sh", "-c", stop, "--json"], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[0])
    assert [row["code"] for row in answer["failed"]] == ["stop_refused"]
    reg.register("me", pid=crew.sleeper().pid)
    assert cli("stop", "mee", code=1).stderr.count("Did you mean me") == 1


def test_explain_tells_verdict_evidence_and_story(cli: Cli, reg: Registry, crew: Crew) -> None:
    """In words, and as one object."""
    owner, worker = crew.sleeper(), crew.sleeper()
    reg.register("a", pid=worker.pid, owner=owner.pid, sock="/no/such.sock")
    kill(owner)
    out = cli("explain", "a").stdout
    assert out.startswith("a is alive (identity): the process with its pid is the very one")
    assert "orphaned" in out
    assert "unreachable" in out
    assert "EVIDENCE" not in out
    assert "EVIDENCE" in cli("explain", "-v", "a").stdout
    assert "registered pid" in out
    kill(worker)
    assert cli("explain", "a").stdout.startswith("a is dead (no_such_process): no process has its")
    answer = cli.json("explain", "a")
    assert (answer["verdict"], answer["cause"]) == ("dead", "no_such_process")
    assert answer["evidence"]["opened"] == "no_such_process"  # type: ignore[index]
    assert [e["type"] for e in answer["events"]] == ["worker.registered"]  # type: ignore[attr-defined]
    reg.exited("a", signal=9, source="wait")
    assert "It crashed: signal 9 (SIGKILL), " in cli("explain", "a").stdout
    cli("explain", "b", code=1)


def test_every_cause_is_explained() -> None:
    """No verdict of the table is left without words."""
    import re

    from crewlog.process import liveness
    from crewlog_cli import answers

    source = Path(liveness.__file__).read_text()
    causes = set(re.findall(r"return _(?:ALIVE|DEAD|UNKNOWN), \"(\w+)\"", source))
    assert causes == set(answers._CAUSES)


def test_gc_plans_and_applies(cli: Cli, reg: Registry, crew: Crew, tmp_path: Path) -> None:
    """A plan is a file of ours alone; applied, it does what it says."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    kill(worker)
    path = tmp_path / "plan.json"
    before = reg.last_seq
    assert "1 steps for 1 workers that are not ended" in cli("gc", "--plan", path).stderr
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["steps"][0]["cause"] == "no_such_process"
    assert reg.last_seq == before
    assert cli("gc", "--apply", path).stdout == "lost  a\n"
    answer = cli.json("gc", "--apply", path)
    assert (answer["lost"], answer["conflicts"]) == ([], ["a"])
    path.write_text("{}")
    assert "cannot carry out this plan" in cli("gc", "--apply", path, code=65).stderr


def test_gc_takes_one_out_on_a_persons_word(cli: Cli, reg: Registry, crew: Crew) -> None:
    """The living are refused, the dead buried, the unknown sid named."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    assert "exists" in cli("gc", "--assume-dead", "a", "--reason", "r", code=1).stderr
    cli("gc", "--assume-dead", "b", "--reason", "r", code=1)
    kill(worker)
    assert "lost: " in cli("gc", "--assume-dead", "a", "--reason", "r").stdout


@pytest.mark.parametrize("command", ["run", "exec"])
def test_lease_is_inherited_by_the_program(
    cli: Cli, reg: Registry, started: list[subprocess.Popen[bytes]], command: str
) -> None:
    """The program that knows nothing of crewlog holds it, and beats by command."""
    started.append(
        subprocess.Popen(
            [*CREWLOG, "--dir", str(cli.place), command, "a", "--heartbeat", "0.1s", "--",
             "sleep", "300"]
        )
    )  # fmt: skip
    until(lambda: reg.get("a") is not None)
    worker = reg.get("a")
    assert worker is not None
    assert worker.lease is not None
    assert worker.heartbeat_s == 0.1
    until(lambda: b"sleep\0" in Path(f"/proc/{worker.pid}/cmdline").read_bytes()[:6])
    at = files(reg).directory
    assert leases.look(at, worker.lease)[0] == "held"
    until(lambda: "stalled" in reg.liveness("a").flags)
    seq = reg.last_seq
    assert cli("beat", "a").stdout == ""
    assert reg.last_seq == seq
    if command == "run":  # its runner killed: the program holds it all the same
        started[0].kill()
        started[0].wait()
        assert leases.look(at, worker.lease)[0] == "held"
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: leases.look(at, str(worker.lease))[0] == "free")
    assert worker.lease in os.listdir(cli.place / layout.LEASES)
    cli("gc")
    until(lambda: os.listdir(cli.place / layout.LEASES) == [])


def test_run_of_nothing_is_127_and_recorded(cli: Cli, reg: Registry) -> None:
    """As env(1), with three lines and the code on record."""
    assert "not found" in cli("run", "a", "--", "no-such-program", code=127).stderr
    assert "cannot be run" in cli("run", "b", "--", "/etc/passwd", code=126).stderr
    codes = [w.exit.code for w in reg.workers(all=True) if w.exit is not None]
    assert codes == [127, 126]


def test_run_passes_its_pipes_on(cli: Cli) -> None:
    """stdin, stdout and stderr are the program's."""
    done = cli("run", "a", "--", "sh", "-c", "cat; echo bad >&2", input="hello\n")
    assert (done.stdout, done.stderr) == ("hello\n", "bad\n")


def test_run_whose_worker_is_stopped_by_another_says_nothing(
    cli: Cli, reg: Registry, started: list[subprocess.Popen[bytes]]
) -> None:
    """Stopper and parent record one end."""
    process = subprocess.Popen(
        [*CREWLOG, "--dir", str(cli.place), "run", "a", "--", "sleep", "300"],
        stderr=subprocess.PIPE,
    )
    started.append(process)
    until(lambda: reg.get("a") is not None)
    cli("stop", "a")
    _out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, b"")
    assert types(reg, "a") == ["registered", "stop_requested", "exited"]


def test_observe_records_what_the_parent_throws_away(
    cli: Cli, reg: Registry, crew: Crew, started: list[subprocess.Popen[bytes]]
) -> None:
    """From a process that has nothing to do with the worker."""
    worker = crew.python("import sys; sys.stdin.read(); sys.exit(5)")
    reg.register("a", pid=worker.pid)
    cli("observe", "a", "--timeout", "0.05s", code=124)
    watching = subprocess.Popen(
        [*CREWLOG, "--dir", str(cli.place), "observe", "a", "--json"], stdout=subprocess.PIPE
    )
    started.append(watching)
    assert worker.stdin is not None
    until(lambda: state_of(watching.pid) == "S" and _holds_a_pidfd(watching.pid))
    worker.stdin.close()
    worker.wait()
    out, _ = watching.communicate(timeout=30)
    event = json.loads(out)
    assert (event["type"], event["data"]["code"]) == ("worker.exited", 5)


def _holds_a_pidfd(pid: int) -> bool:
    where = f"/proc/{pid}/fd"
    names: list[str] = []
    for fd in os.listdir(where):
        try:
            names.append(os.readlink(f"{where}/{fd}"))
        except FileNotFoundError:
            continue
    return any("pidfd" in name for name in names)


def test_commands_of_this_page_have_json(cli: Cli, reg: Registry, crew: Crew) -> None:
    """One object with a schema."""
    reg.register("a", lease=True)
    reg.register("b", pid=crew.sleeper().pid)
    for words in (
        ("beat", "a"),
        ("explain", "a"),
        ("gc",),
        ("gc", "--plan", cli.place.parent / "p"),
    ):
        cli.json(*words)
    assert cli.json("ls")["workers"][0]["flags"] == []  # type: ignore[index]


def test_module_runs_without_the_current_directory_on_its_path(
    cli: Cli, reg: Registry, tmp_path: Path
) -> None:
    """A spawned program's launcher takes nothing from a hostile directory."""
    for name in ("signal.py", "os.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit('hijacked')")
    reg.spawn("a", [sys.executable, "-I", "-c", "print(1)"], cwd=tmp_path)
    until(lambda: (worker := reg.get("a")) is not None and worker.final)
    worker = reg.get("a")
    assert worker is not None
    assert worker.state == "exited"
