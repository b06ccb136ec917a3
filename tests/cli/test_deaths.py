"""Deaths, their causes and last lines, as a person meets them on the command line."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from commands import CREWLOG, Cli
from crewlog import Flag
from crewlog.registry import Registry
from procs import Crew, kill, state_of, until

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs pidfds")


def running(cli: Cli, *words: str) -> subprocess.Popen[str]:
    """Run a command that goes on."""
    return subprocess.Popen(
        [*CREWLOG, "--dir", cli.where, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def final(reg: Registry, sid: str) -> bool:
    """Say whether a worker's end is on record."""
    worker = reg.get(sid)
    return worker is not None and worker.final


@LINUX
def test_observer_prints_each_death_and_ends_in_order(cli: Cli, reg: Registry) -> None:
    """`observe --all` in one terminal, kill -9 in another."""
    reg.register("first")
    observer = running(cli, "observe", "--all")
    assert observer.stderr is not None
    assert observer.stdout is not None
    assert "observing" in observer.stderr.readline()
    pid = int(cli("start", "a", "--", "sleep", "300").stdout)
    kill_at = time.monotonic() + 1.0
    until(lambda: time.monotonic() > kill_at)
    os.kill(pid, signal.SIGKILL)
    row = observer.stdout.readline()
    assert "crashed signal 9 (SIGKILL)" in row
    observer.terminate()
    assert observer.wait(20) == 0
    observer.communicate()


def test_observe_wants_a_worker_or_all(cli: Cli) -> None:
    """Not both, not neither; time that is up is 124."""
    assert "name a worker, or --all" in cli("observe", code=2).stderr
    assert "name a worker, or --all" in cli("observe", "a", "--all", code=2).stderr
    waits = cli("observe", "--all", "--timeout", "0.3s", code=124)
    assert "there is no registry in" in waits.stderr, "the place may be misspelt"


def test_start_leaves_it_running_and_finds_it_again(cli: Cli, reg: Registry) -> None:
    """Its pid, once; no owner, a session of its own; its output in the log."""
    log = cli.place.parent / "log"
    words = ("start", "a", "--log", log, "--", "sh", "-c", "echo hello; exec sleep 300")
    pid = int(cli(*words).stdout)
    again = cli(*words)
    assert (int(again.stdout), "lives already" in again.stderr) == (pid, True)
    until(lambda: log.read_text() == "hello\n")
    assert cli("logs", "a").stdout == "hello\n"
    assert cli("ls", "--json").stdout.count("orphaned") == 0
    worker = reg.get("a")
    assert worker is not None
    assert worker.owner is None
    assert worker.group is not None
    assert worker.group.session == pid
    cli("stop", "a")


def test_start_waits_until_it_listens(cli: Cli, reg: Registry, tmp_path: Path) -> None:
    """Then it is ready; of one that ends before, that is said; of one that never does, 124."""
    sock = tmp_path / "sock"
    serve = "import signal, socket; s = socket.socket(socket.AF_UNIX); "
    serve += f"s.bind({str(sock)!r}); s.listen(); signal.pause()"
    cli("start", "a", "--ready-when", sock, "--", sys.executable, "-c", serve)
    worker = reg.get("a")
    assert worker is not None
    assert worker.state.value == "ready"
    cli("stop", "a")
    assert "ended" in cli("start", "b", "--ready-when", sock, "--", "false", code=1).stderr
    other = tmp_path / "other"
    cli("start", "c", "--ready-when", other, "--timeout", "0.5s", "--", "sleep", "300", code=124)
    cli("stop", "c")


def test_start_of_what_is_not_there_says_why(cli: Cli) -> None:
    """As run does."""
    assert "ENOENT" in cli("start", "a", "--", "/no/such", code=127).stderr


def test_logs_follow_into_the_next_life(cli: Cli, reg: Registry, tmp_path: Path) -> None:
    """Also when the file is renamed meanwhile."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    words = f"echo one; until [ -e {gate} ]; do sleep 0.02; done; echo two"
    reg.spawn("a", ["sh", "-c", words], log=log)
    until(lambda: log.exists() and log.read_text() == "one\n")
    follower = running(cli, "logs", "-f", "a")
    assert follower.stdout is not None
    assert follower.stdout.readline() == "one\n"
    log.rename(tmp_path / "log.1")
    gate.touch()
    assert follower.stdout.readline() == "two\n"
    until(lambda: final(reg, "a"))
    reg.spawn("a", ["echo", "three"], log=log)
    assert follower.stdout.readline() == "three\n"
    follower.kill()
    follower.communicate()


def test_logs_of_a_worker_without_one_say_so(cli: Cli, reg: Registry, crew: Crew) -> None:
    """And of one that is gone."""
    reg.register("a", pid=crew.sleeper().pid)
    assert "--log FILE" in cli("logs", "a", code=2).stderr
    log = cli.place.parent / "log"
    reg.spawn("b", ["echo", "x"], log=log)
    until(lambda: final(reg, "b"))
    assert cli("logs", "b", "-n", "0").stdout == ""
    log.unlink()
    assert "its log is gone" in cli("logs", "b", code=1).stderr


def test_crash_is_told_in_a_sentence_with_its_last_lines(
    cli: Cli, reg: Registry, tmp_path: Path
) -> None:
    """By explain and show; hostile lines stay inert."""
    evil = "printf 'one\\ntwo \\033[31m\\n'; exit 3"
    reg.spawn("a", ["sh", "-c", evil], log=tmp_path / "log", labels={"role": "x"}, meta={"k": 1})
    until(lambda: final(reg, "a"))
    for command in ("explain", "show"):
        out = cli(command, "a").stdout
        assert "crashed: code 3" in out
        assert "after its start" in out
        assert "  | one\n  | two \\x1b[31m\n" in out
    shown = cli("show", "a").stdout
    assert "meta:     k=1" in shown
    (tmp_path / "log").rename(tmp_path / "log.1")
    assert "  | one" in cli("explain", "a").stdout, "also after logrotate"


def test_last_words_and_what_it_says_are_shown(cli: Cli, reg: Registry) -> None:
    """Of itself while it lives, and at its end."""
    reg.register("a", lease=True)
    cli("beat", "a", "--status", "waiting", "--note", "for approval")
    assert reg.liveness("a").status == "waiting"
    assert "It says: waiting: for approval." in cli("explain", "a").stdout
    assert "says:     waiting: for approval" in cli("show", "a").stdout
    assert cli.workers()[0]["status"] == "waiting"
    cli("beat", "a")
    assert reg.liveness("a").status == "waiting", "until it says something else"
    assert "'bored' is not one of" in cli("beat", "a", "--status", "bored", code=2).stderr
    assert reg.last_seq == 2, "the log does not grow"
    reg.exited("a", code=1, message="no more work")
    assert "saying: no more work" in cli("explain", "a").stdout


def test_ok_codes_and_owner_from_the_shell(cli: Cli, reg: Registry, crew: Crew) -> None:
    """For exec, run and start."""
    cli("run", "a", "--ok", "0,7", "--", "sh", "-c", "exit 7", code=7)
    worker = reg.get("a")
    assert worker is not None
    assert (worker.state.value, worker.ok_codes) == ("exited", (0, 7))
    assert "exit codes" in cli("run", "b", "--ok", "x", "--", "true", code=2).stderr
    owner = crew.sleeper()
    cli("start", "c", "--ends-with-owner", "--owner", owner.pid, "--", "sleep", "300")
    kill(owner)
    assert "c" in cli("gc").stdout + cli("history", "--sid", "c").stdout
    until(lambda: final(reg, "c"))


@LINUX
def test_orphans_are_listed_and_ended_with_their_trees(
    cli: Cli, reg: Registry, crew: Crew, tmp_path: Path
) -> None:
    """An agent that dies, its wrapper, the server in it, a child of that: all by proof."""
    pids = tmp_path / "pids"
    server = f"sleep 300 & echo $! >> {pids}; echo $$ >> {pids}; wait"
    session = """
import os, sys, crewlog
with crewlog.open(sys.argv[1]) as reg:
    print(reg.spawn("mcp", ["sh", "-c", sys.argv[2]]).pid, flush=True)
    os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", session, cli.where, f"sh -c '{server}' & wait"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    root = int(done.stdout)
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    others = [int(word) for word in pids.read_text().split()]
    reg.register("kept", pid=crew.sleeper().pid)
    listed = cli("stop", "--orphaned", "--tree", "--dry-run").stdout
    assert "mcp" in listed
    assert "kept" not in listed
    assert all(str(pid) in listed for pid in others)
    assert "--yes" in cli("stop", "--orphaned", code=2).stderr, "no terminal to ask on"
    cli("stop", "--orphaned", "--tree", "--yes", "--grace", "5s")
    until(lambda: all(state_of(pid) in {"", "Z"} for pid in [root, *others]))
    assert reg.liveness("kept").alive


def test_older_ones_can_be_chosen(cli: Cli, reg: Registry, crew: Crew) -> None:
    """By when they were started."""
    reg.register("a", pid=crew.sleeper().pid)
    assert "a" not in cli("stop", "--older", "1h", "--dry-run").stdout
    assert "a" in cli("stop", "--older", "0", "--dry-run").stdout
    assert "--older SPAN" in cli("stop", code=2).stderr


def test_what_a_stop_left_running_is_said(cli: Cli, reg: Registry, tmp_path: Path) -> None:
    """With the command that ends it."""
    pids = tmp_path / "pids"
    reg.spawn("a", ["sh", "-c", f"sleep 300 & echo $! > {pids}; wait"])
    until(lambda: pids.exists() and pids.read_text() != "")
    assert "crewlog" in (output := cli("stop", "a").stderr)
    assert pids.read_text().strip() in output
    assert "left processes running" in cli("explain", "a").stdout
    cli("stop", "--tree", "a")
    until(lambda: state_of(int(pids.read_text())) in {"", "Z"})


@LINUX
def test_watch_observes(cli: Cli, reg: Registry) -> None:
    """`watch --observe --crashed` hears of a death that nobody else records."""
    reg.register("first")
    pid = int(cli("start", "a", "--", "sleep", "300").stdout)
    watcher = running(cli, "watch", "--observe", "--now", "--crashed", "--count", "1")
    threading.Timer(1.5, lambda: os.kill(pid, signal.SIGKILL)).start()
    out, _ = watcher.communicate(timeout=30)
    assert "crashed signal 9 (SIGKILL)" in out


def test_crash_in_a_watch_comes_with_its_last_lines(
    cli: Cli, reg: Registry, tmp_path: Path
) -> None:
    """Where its log is; of an end that was asked for none are wanted."""
    reg.register("first")
    watcher = running(cli, "watch", "--now", "--crashed", "--count", "1")
    assert watcher.stderr is not None
    assert "in step" in watcher.stderr.readline()
    reg.spawn("a", ["sh", "-c", "echo why; exit 3"], log=tmp_path / "log")
    out, _ = watcher.communicate(timeout=30)
    assert out.endswith("last lines of its output:\n  | why\n")


def test_what_it_does_stands_beside_its_life(cli: Cli, reg: Registry, crew: Crew) -> None:
    """In ls: paused, busy."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    worker.send_signal(signal.SIGSTOP)
    until(lambda: "paused" in cli("ls").stdout)
    assert "paused: it was stopped by a signal" in cli("explain", "a").stdout
    worker.send_signal(signal.SIGCONT)
    reg.register("b", lease=True)
    reg.beat("b", status="busy")
    assert "starting 0s, busy" in cli("ls").stdout


@pytest.mark.long
@LINUX
@pytest.mark.skipif(os.geteuid() != 0, reason="needs a pid namespace")
def test_observer_in_a_container_leads_beside_one_on_the_host(
    cli: Cli, reg: Registry, crew: Crew, tmp_path: Path
) -> None:
    """Each records the deaths that it can judge; one event a death."""
    reg.register("outside", pid=(outside := crew.sleeper()).pid)
    main = "from crewlog_cli.entry import main; main()"
    inside = f"""
crewlog() {{ {sys.executable} -c '{main}' --dir {cli.where} "$@"; }}
crewlog observe --all -q & sleep 1.5
crewlog start boxed -- sleep 300 > {tmp_path}/pid; touch {tmp_path}/up
until [ -e {tmp_path}/go ]; do sleep 0.05; done
kill -9 $(cat {tmp_path}/pid); until [ -e {tmp_path}/over ]; do sleep 0.05; done
"""
    host = running(cli, "observe", "--all", "-q")
    box = subprocess.Popen(["unshare", "-pf", "--mount-proc", "--kill-child", "sh", "-c", inside])
    until(lambda: (tmp_path / "up").exists() or box.poll() is not None)
    if box.poll() is not None:
        host.kill()
        host.communicate()
        pytest.skip("no pid namespace can be made here")
    (tmp_path / "go").touch()
    kill(outside)
    until(lambda: final(reg, "boxed") and final(reg, "outside"))
    settled = time.monotonic() + 2.5  # looks afar of both
    until(lambda: time.monotonic() > settled)
    (tmp_path / "over").touch()
    box.wait(30)
    host.kill()
    host.communicate()
    ends = [(e.sid, e.type, e.data.get("signal")) for e in reg.history() if "exit" in e.type
            or "lost" in e.type]  # fmt: skip
    assert sorted(ends) == [
        ("boxed", "worker.exited", 9), ("outside", "worker.exited", 9),
    ]  # fmt: skip


@LINUX
@pytest.mark.parametrize("command", ["run", "exec", "start"])
def test_supervisor_that_died_is_followed_by_the_next(
    cli: Cli, reg: Registry, tmp_path: Path, command: str
) -> None:
    """--replace ends the same program, whose supervisor is dead; nobody else's, and no other."""
    words = [*CREWLOG, "--dir", cli.where, command, "web", "--replace", "--", "sleep", "300"]
    if command == "start":  # whose owner is nobody, unless that is said
        words.insert(-3, f"--owner={(owner := Crew().sleeper()).pid}")
    supervised = f"import subprocess; subprocess.run({words!r})"
    first = subprocess.Popen([sys.executable, "-c", supervised])
    until(lambda: (w := reg.get("web")) is not None and reg.runs(w, "/bin/sleep"))
    before = reg.get("web")
    assert before is not None
    if command == "start":
        assert "lives already" in cli(command, "web", "--replace", "--", "sleep", "300").stderr
        kill(owner)
    else:
        cli(command, "web", "--", "sleep", "300", code=1)
        cli(command, "web", "--replace", "--", "sleep", "300", code=1)
        os.kill(before.owner.pid if before.owner else 0, signal.SIGKILL)
        until(lambda: Flag.ORPHANED in reg.liveness("web").flags)
        cli(command, "web", "--replace", "--", "true", code=1)  # another program
        assert state_of(before.pid) not in {"", "Z"}
    next_one = running(cli, command, "web", "--replace", "--", "sleep", "300")
    until(lambda: (w := reg.get("web")) is not None and w.generation == 2 and not w.final)
    until(lambda: state_of(before.pid) in {"", "Z"})
    cli("stop", "web")
    next_one.kill()
    next_one.communicate()
    first.kill()
    first.wait()


def test_signal_that_is_meant_is_no_crash(cli: Cli, reg: Registry) -> None:
    """exec, an observer, a supervisor's TERM."""
    reg.register("first")
    with reg.observe_all() as observer:
        assert observer.wait(20)
        process = running(cli, "exec", "web", "--ends-on", "TERM", "--", "sleep", "300")
        until(lambda: (w := reg.get("web")) is not None and reg.runs(w, "/bin/sleep"))
        process.terminate()
        until(lambda: final(reg, "web"))
        process.communicate()
    worker = reg.get("web")
    assert worker is not None
    assert (worker.state.value, worker.ok_codes) == ("exited", (143,))
    assert "no signal" in cli("exec", "x", "--ends-on", "BYE", "--", "true", code=2).stderr
