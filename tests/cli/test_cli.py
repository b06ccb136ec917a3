"""What scripts and people rely on: stdout, exit codes, errors, pipes, hostile text."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import crewlog
from commands import CREWLOG, Cli
from crewlog.local import layout
from crewlog.registry import Registry
from faults import empty_redo
from procs import Crew, files, kill, until


def test_worker_from_registration_to_end(cli: Cli, crew: Crew) -> None:
    """register, ls, update, show, alive, remove, history: each prints what scripts rely on."""
    worker = crew.sleeper()
    assert cli("register", "web-1", "--pid", worker.pid, "-l", "role=web").stdout == "2\n"
    (listed,) = cli.workers()
    assert listed["sid"] == "web-1"
    assert (listed["state"], listed["liveness"], listed["rev"]) == ("starting", "alive", 2)
    assert cli.json("update", "web-1", "--state", "ready", "--expect", 2)["seq"] == 3
    assert "3" in cli("update", "web-1", "--state", "ready").stdout, "an equal update is no event"
    assert cli("alive", "web-1").stdout == "alive (identity)\n"
    assert "role=web" in cli("show", "web-1").stdout
    assert cli("ls", "--sids").stdout == "web-1\n"
    assert cli("remove", "web-1", "--reason", "handed over").stdout == "4\n"
    assert cli("ls", "--sids").stdout == ""
    rows = cli("history", "--json").stdout.splitlines()
    assert [json.loads(row)["type"] for row in rows] == [
        "worker.registered", "worker.ready", "worker.released",
    ]  # fmt: skip
    assert [json.loads(row)["actor"]["via"] for row in rows] == ["cli"] * 3


@pytest.mark.long
def test_commands_print_one_json_object(cli: Cli, crew: Crew) -> None:
    """Every finite command with --json: one object, one line, a schema."""
    cli("register", "a", "--pid", crew.sleeper().pid)
    for command in (
        ("ls",), ("show", "a"), ("alive", "a"), ("stats",), ("path",), ("gc",), ("gc", "--dry-run"),
        ("compact",), ("verify",), ("repair",), ("anchor",), ("explain", "a"),
        ("update", "a", "--state", "ready"),
        ("remove", "a", "--reason", "x"),
    ):  # fmt: skip
        cli.json(*command)
    assert cli.json("verify") == {
        "schema": 1, "ok": True, "events": cli.json("stats")["last_seq"],
        "last_seq": cli.json("stats")["last_seq"], "findings": [], "gaps": [], "notes": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "slug"),
    [
        (("ls",), 66, "store_missing"),
        (("history",), 66, "store_missing"),
        (("verify",), 66, "store_missing"),
        (("compact",), 66, "store_missing"),
        (("watch",), 66, "store_missing"),
        (("register", "a", "--pid", "0"), 2, "usage"),
        (("register", "-a!", "--pid", "1"), 2, "usage"),
        (("register", "a b", "--pid", "1"), 2, "usage"),
        (("register", "a", "--pid", "1", "-l", "x"), 2, "usage"),
        (("register", "a", "--pid", "1", "--meta", '{"a":1,"a":2}'), 2, "usage"),
        (("register", "a", "--pid", "1", "--meta", "[]"), 2, "usage"),
        (("nonsense",), 2, "usage"),
        (("history", "--since", "soonish"), 2, "usage"),
        (("gc", "--keep", "long"), 2, "usage"),
    ],
)
def test_refusal_has_its_exit_code_and_creates_nothing(
    cli: Cli, arguments: tuple[str, ...], code: int, slug: str
) -> None:
    """Usage is 2, no registry 66; three lines for people, one object for programs."""
    output = cli(*arguments, code=code)
    assert output.stdout == ""
    assert output.stderr.startswith("crewlog: ")
    assert 2 <= len(output.stderr.splitlines()) <= 3
    if slug != "usage" or arguments[0] != "nonsense":
        answer = json.loads(cli(*arguments, "--json", code=code).stderr)["error"]
        assert (answer["code"], answer["exit"]) == (slug, code)
        assert answer["message"]
        assert answer["hint"]
    assert not cli.place.exists()


def test_unknown_sid_is_one_and_names_the_nearest(cli: Cli, crew: Crew) -> None:
    """The honest no."""
    cli("register", "worker-17", "--pid", crew.sleeper().pid)
    for command in (("show", "worker-71"), ("alive", "worker-71"),
                    ("update", "worker-71", "--state", "ready"),
                    ("remove", "worker-71", "--reason", "x")):  # fmt: skip
        assert "worker-17" in cli(*command, code=1).stderr


def test_dead_worker_is_not_alive_and_not_listed(cli: Cli, crew: Crew) -> None:
    """It is not alive (1) and not listed without --all; looking collects nothing."""
    worker = crew.sleeper()
    cli("register", "a", "--pid", worker.pid)
    kill(worker)
    assert cli("alive", "a", code=1).stdout == "dead (no_such_process)\n"
    done = cli("ls", "--sids")
    assert done.stdout == ""
    assert "dead (no_such_process)" in cli("ls", "--all").stdout
    assert cli.json("stats")["last_seq"] == 2
    assert cli.json("gc")["lost"] == ["a"]


def test_conflicts_and_stale_revisions_are_one(cli: Cli, crew: Crew) -> None:
    """A living sid, a stale rev, a forbidden transition."""
    worker = crew.sleeper()
    cli("register", "a", "--pid", worker.pid)
    assert "exists" in cli("register", "a", "--pid", worker.pid, code=1).stderr
    assert "changed" in cli("update", "a", "--state", "ready", "--expect", 1, code=1).stderr
    cli("update", "a", "--state", "stopping")
    assert "cannot take" in cli("update", "a", "--state", "ready", code=1).stderr


def test_compact_is_75_while_another_runs_and_silent_with_q(cli: Cli, reg: Registry) -> None:
    """What cron sees."""
    reg.register("a")
    lock = files(reg).take_compact_lock()
    assert "locked" in cli("compact", "-q", code=75).stderr
    lock.close()
    done = cli("compact", "-q")
    assert (done.stdout, done.stderr) == ("", "")


def test_verify_of_a_damaged_store_is_one_with_every_finding(cli: Cli, reg: Registry) -> None:
    """Findings on stdout, exit 1; reading the damaged log is 65."""
    for sid in ("a", "b", "c"):
        reg.register(sid)
    (segment,) = (cli.place / layout.LOG).iterdir()
    data = bytearray(segment.read_bytes())
    lines = data.split(b"\n")
    for number in (1, 3):
        data[data.index(lines[number]) + 40] ^= 1
    segment.write_bytes(bytes(data))
    empty_redo(cli.place)
    answer = cli.json("verify", code=1)
    assert answer["ok"] is False
    codes = [f["code"] for f in answer["findings"]]  # type: ignore[attr-defined]
    assert codes == ["log_corrupt", "log_corrupt"]
    assert "damaged" in cli("ls", code=65).stderr


def test_repair_says_then_does_and_history_tells(cli: Cli, reg: Registry, crew: Crew) -> None:
    """The plan is 1 and changes nothing; a loss must be named; afterwards everything works."""
    for sid in ("a", "b"):
        reg.register(sid, pid=crew.sleeper().pid)
    kept = cli("anchor").stdout.strip()
    assert cli("verify", "--anchor", kept).stdout == ""
    assert "nothing to repair" in cli("repair").stderr
    cli("verify", "--anchor", "nonsense", code=2)
    cli("repair", "--yes", "--accept-loss", "5", code=2)
    segment = next((cli.place / layout.LOG).iterdir())
    data = segment.read_bytes()
    segment.write_bytes(data.replace(b'"sid":"a"', b'"sid":"x"', 1))
    empty_redo(cli.place)
    assert "repairable" not in cli("verify", code=1).stdout
    answer = cli.json("repair", code=1)
    assert (answer["needed"], answer["done"], answer["losses"]) == (True, False, [[2, 2]])
    assert "--accept-loss 2..2" in cli("repair", "--yes", code=65).stderr
    assert "gave" not in cli("repair", code=1).stdout
    assert "kept in quarantine" in cli("repair", "--yes", "--accept-loss", "2..2").stdout
    assert cli("ls", "--sids").stdout == "b\n"
    assert "events 2 to 2 are lost" in cli("history").stderr
    assert cli.json("verify")["gaps"] == [[2, 2]]
    assert cli("verify", "--anchor", kept).stdout == "", "what is left is still the one history"


def test_newer_format_is_78_and_open_permissions_77(cli: Cli, reg: Registry) -> None:
    """A store of the future, and one that others can read."""
    reg.register("a")
    store = cli.place / layout.STORE
    good = store.read_bytes()
    store.write_bytes(good.replace(b'"format":1', b'"format":9'))
    cli("ls", code=78)
    store.write_bytes(good)
    cli.place.chmod(0o755)
    assert "chmod -R go=" in cli("ls", code=77).stderr


def test_closed_pipe_is_141_without_a_word(cli: Cli, reg: Registry) -> None:
    """Crewlog history | head -1."""
    reg.register("a")
    with reg.batch() as batch:
        for number in range(3000):
            batch.update("a", meta={"number": number, "text": "x" * 50})
    for arguments in (["history", "--json"], ["history"]):
        process = subprocess.Popen(
            [*CREWLOG, "--dir", str(cli.place), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141
        process.stderr.close()


def test_full_output_is_74(cli: Cli, reg: Registry) -> None:
    """Crewlog history > /dev/full."""
    reg.register("a")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*CREWLOG, "--dir", str(cli.place), "history"],
            check=False, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 74
    assert "cannot write the output" in done.stderr
    assert "Traceback" not in done.stderr


def test_full_disk_is_74_and_nothing_is_written(cli: Cli, reg: Registry, crew: Crew) -> None:
    """RLIMIT_FSIZE stands for a disk that takes no more."""
    import resource

    reg.register("a")
    (segment,) = (cli.place / layout.LOG).iterdir()
    before = segment.read_bytes()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, len(before) + 50))

    done = cli("update", "a", "--state", "ready", code=74, preexec_fn=limit)
    assert "no room" in done.stderr
    assert segment.read_bytes() == before
    cli("update", "a", "--state", "ready")


def test_interrupt_is_130(cli: Cli, reg: Registry) -> None:
    """Ctrl-C ends a watch without a traceback."""
    reg.register("a")
    process = subprocess.Popen(
        [*CREWLOG, "--dir", str(cli.place), "watch", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(  # noqa: PLW1509 (no thread runs here)
            signal.SIGINT, signal.SIG_DFL
        ),  # as in a terminal
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (130, "")
    finally:
        process.kill()


def test_exec_keeps_the_pid(cli: Cli, reg: Registry) -> None:
    """The program that crewlog becomes is the registered worker."""
    process = subprocess.Popen(
        [*CREWLOG, "--dir", str(cli.place), "exec", "a", "-l", "k=v", "--", "sleep", "300"]
    )
    try:
        until(lambda: reg.get("a") is not None)
        worker = reg.get("a")
        assert worker is not None
        assert worker.pid == process.pid
        assert worker.labels == {"k": "v"}
        until(lambda: b"300" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
        assert reg.liveness("a").alive
    finally:
        process.kill()
        process.wait()
    assert reg.liveness("a").dead


def test_exec_of_nothing_is_127_and_recorded(cli: Cli, reg: Registry, tmp_path: Path) -> None:
    """As env(1): 127 not found, 126 not runnable."""
    assert "not found" in cli("exec", "a", "--", "no-such-program", code=127).stderr
    plain = tmp_path / "plain"
    plain.write_text("x")
    cli("exec", "b", "--", plain, code=126)
    ended = [reg.get("a"), reg.get("b")]
    assert [w.exit.code for w in ended if w is not None and w.exit is not None] == [127, 126]


@pytest.mark.parametrize(
    ("script", "code", "state"),
    [("exit 0", 0, "exited"), ("exit 3", 3, "failed"), ("kill -9 $$", 137, "failed")],
)
def test_run_ends_as_its_worker_does(
    cli: Cli, reg: Registry, script: str, code: int, state: str
) -> None:
    """The exit code or the signal is recorded, by the parent that waited for it."""
    cli("run", "a", "--", "sh", "-c", script, code=code)
    worker = reg.get("a")
    assert worker is not None
    assert worker.state == state
    assert worker.exit is not None
    assert worker.exit.source == "wait"
    assert worker.exit.code == (code if code < 128 else None)
    assert worker.exit.signal == (None if code < 128 else code - 128)
    assert worker.owner is not None


def test_run_passes_signals_on_and_records_the_request(cli: Cli, reg: Registry) -> None:
    """SIGTERM to crewlog run is SIGTERM to the worker; its end is then an expected one."""
    process = subprocess.Popen(
        [*CREWLOG, "--dir", str(cli.place), "run", "a", "--", "sleep", "300"]
    )
    until(lambda: reg.get("a") is not None)
    worker = reg.get("a")
    assert worker is not None
    until(lambda: b"300" in Path(f"/proc/{worker.pid}/cmdline").read_bytes())
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    types = [e.type for e in reg.history(sid="a")]
    assert types == ["worker.registered", "worker.stop_requested", "worker.exited"]
    ended = reg.get("a")
    assert ended is not None
    assert ended.exit is not None
    assert (ended.state, ended.exit.expected, ended.exit.signal) == ("exited", True, 15)


def test_run_refused_starts_nothing(cli: Cli, reg: Registry, crew: Crew, tmp_path: Path) -> None:
    """A sid that is taken: the program never begins."""
    reg.register("a", pid=crew.sleeper().pid)
    mark = tmp_path / "mark"
    cli("run", "a", "--", "touch", mark, code=1)
    assert not mark.exists()


def test_run_killed_before_it_registered_leaves_no_worker(
    cli: Cli, reg: Registry, crew: Crew, tmp_path: Path
) -> None:
    """The child waits for its registration; if its parent dies first, it gives up."""
    reg.register("other", pid=crew.sleeper().pid)
    lock = files(reg)._appender.lock
    mark = tmp_path / "mark"
    with lock.held(wait_s=5):
        process = subprocess.Popen(
            [*CREWLOG, "--dir", str(cli.place), "run", "a", "--", "touch", str(mark)]
        )
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda: children.read_text().strip() != "")
        child = int(children.read_text().split()[0])
        kill(process)  # type: ignore[arg-type]
        until(lambda: not Path(f"/proc/{child}").exists() or _is_zombie(child))
    assert not mark.exists()
    assert reg.get("a") is None


def _is_zombie(pid: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


HOSTILE = "\x1b[2J\x1b]52;c;eA==\x07\u202egnp.exe\x9b\u200b\ue000"


def test_hostile_text_is_shown_and_not_obeyed(cli: Cli, reg: Registry) -> None:
    """No control, bidi or private character reaches a terminal, on stdout or stderr."""
    reg.register(
        "a", sock=HOSTILE.replace("\0", ""), version=HOSTILE, labels={HOSTILE: HOSTILE},
        meta={"m": HOSTILE},
    )  # fmt: skip
    reg.update("a", state="draining", reason=HOSTILE)
    shown = [cli("ls"), cli("show", "a"), cli("history"), cli("stats"), cli("ls", "--all")]
    shown.append(cli("watch", "--after", 0, "--count", 2, "--timeout", "30s"))
    shown.append(cli("show", HOSTILE, code=1))
    for done in shown:
        for stream in (done.stdout, done.stderr):
            assert not set(stream) & set(HOSTILE) - set("[2J]52;c;eA==gnp.exe")
    assert "\\x1b[2J" in cli("show", "a").stdout
    (listed,) = cli.workers()
    assert listed["labels"] == {HOSTILE: HOSTILE}


def test_argument_that_is_not_utf8_is_kept_visible(cli: Cli, reg: Registry, crew: Crew) -> None:
    """Bytes that are no text are escaped before the append, none is lost."""
    worker = crew.sleeper()
    subprocess.run(
        [*CREWLOG, "--dir", str(cli.place), "register", "a", "--pid", str(worker.pid), "--sock",
         b"/run/\xff.sock"], check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    now = reg.get("a")
    assert now is not None
    assert now.sock == "/run/\\xff.sock"


def test_place_is_found_as_the_order_says(tmp_path: Path) -> None:
    """--dir, CREWLOG_DIR, XDG_STATE_HOME if absolute, ~/.local/state."""

    def path(*arguments: str, **environment: str) -> str:
        base = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "CREWLOG"))}
        done = subprocess.run(
            [*CREWLOG, *arguments, "path"], check=True, capture_output=True, text=True,
            env=base | environment,
        )  # fmt: skip
        return done.stdout.strip()

    home = str(tmp_path)
    assert path("--dir", "/x", HOME=home, CREWLOG_DIR="/y", XDG_STATE_HOME="/z") == "/x"
    assert path("--dir", "file:///x%20y", HOME=home) == "/x y"
    assert path(HOME=home, CREWLOG_DIR="/y", XDG_STATE_HOME="/z") == "/y"
    assert path(HOME=home, XDG_STATE_HOME="/z") == "/z/crewlog"
    assert path(HOME=home, XDG_STATE_HOME="z") == f"{home}/.local/state/crewlog"
    assert path(HOME=home) == f"{home}/.local/state/crewlog"


def test_global_options_stand_on_either_side(place: Path, reg: Registry) -> None:
    """Before or after the subcommand."""
    reg.register("a")
    for arguments in (
        ["--dir", str(place), "--json", "ls"],
        ["ls", "--json", "--dir", str(place)],
        ["--json", "ls", "-d", str(place)],
    ):
        done = subprocess.run([*CREWLOG, *arguments], check=True, capture_output=True, text=True)
        assert json.loads(done.stdout)["workers"][0]["sid"] == "a"


@pytest.mark.long
def test_every_command_has_help_with_examples() -> None:
    """--help of each command ends with examples that begin with its name."""
    from crewlog_cli.main import COMMANDS

    for name in COMMANDS:
        done = subprocess.run(
            [*CREWLOG, name, "--help"], check=True, capture_output=True, text=True
        )
        assert "Examples:\n  " in done.stdout, name
        assert f"crewlog {name}" in done.stdout or name in {"path", "import"}, name


def test_quick_commands_load_nothing_slow_that_they_do_not_use(cli: Cli, reg: Registry) -> None:
    """Ls and --version must not pay for what other commands need."""
    reg.register("a")
    slow = "{'psutil', 'watchdog', 'asyncio', 'subprocess', 'shutil', 'difflib', 'gzip', 'urllib3'}"
    for command in ("['--version']", f"['--dir', {str(cli.place)!r}, 'ls']"):
        code = (
            "import sys\nfrom crewlog_cli.main import run\n"
            f"run({command})\n"
            f"assert not {slow} & set(sys.modules), {slow} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_history_covers_says_since_when(cli: Cli, reg: Registry) -> None:
    """Silence is not peace: the answer says which period it covers."""
    reg.register("a")
    done = cli("history", "--type", "worker.lost")
    assert "history covers everything since" in done.stderr
    assert cli("history", "-q").stderr == ""


def test_history_filters(cli: Cli, reg: Registry) -> None:
    """By sid, type, actor, seq, count and order."""
    with crewlog.open(cli.place, actor="alice") as other:
        other.register("a")
    reg.register("b")
    reg.update("b", state="ready")

    def seqs(*arguments: object) -> list[int]:
        rows = cli("history", "--json", *arguments).stdout.splitlines()
        return [json.loads(row)["seq"] for row in rows]

    assert seqs() == [2, 3, 4]
    assert seqs("--sid", "b") == [3, 4]
    assert seqs("--type", "worker.ready") == [4]
    assert seqs("--actor", "alice") == [2]
    assert seqs("--after", 3) == [4]
    assert seqs("-n", 2) == [3, 4]
    assert seqs("-r") == [4, 3, 2]
    assert seqs("--since", "1h") == [2, 3, 4]
    assert seqs("--until", "1h") == []


def test_import_takes_over_an_older_file(cli: Cli, crew: Crew, tmp_path: Path) -> None:
    """Living and lost are counted, broken files refused with 65."""
    old = tmp_path / "old.json"
    entry = {"sid": "a", "pid": crew.sleeper().pid, "sock": "", "version": "", "created_at": ""}
    old.write_text(json.dumps({"sessions": [entry]}))
    assert cli.json("import", old)["living"] == ["a"]
    old.write_text("{")
    cli("import", old, code=65)
    cli("import", tmp_path / "none", code=2)


def test_demo_asserts_its_claims() -> None:
    """The demo runs without a terminal, says what holds, and leaves nothing behind."""
    done = subprocess.run(
        [*CREWLOG, "demo"], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.count("   ok  ") == 12
    assert "Every claim held" in done.stdout
    assert done.stderr == ""
    refused = subprocess.run(
        [*CREWLOG, "demo", "--dir", "x"], check=False, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "--keep" in refused.stderr


def test_demo_tells_its_claims_as_one_object() -> None:
    """With --json, for a script that tries an installation out."""
    done = subprocess.run(
        [*CREWLOG, "--json", "demo"], check=True, capture_output=True, text=True, timeout=60
    )
    answer = json.loads(done.stdout)
    assert (answer["schema"], answer["ok"], answer["broken"], len(answer["held"])) == (
        1,
        True,
        None,
        12,
    )
    assert done.stdout.count("\n") == 1
    assert answer["dir"] is None


def test_version_is_told_in_json_too(cli: Cli) -> None:
    """Before and after other global options."""
    answer = {"schema": 1, "version": crewlog.__version__}
    for words in (("--json", "--version"), ("--version", "--json")):
        assert json.loads(cli(*words).stdout) == answer
    assert cli("-q", "--version").stdout == f"crewlog {crewlog.__version__}\n"


def test_home_that_is_no_place_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A relative one would be another registry in every directory; an unknown user has none."""
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("CREWLOG_DIR", raising=False)
    for words in (("path",), ("-d", "~/x", "path"), ("-d", "~nobody-of-that-name/x", "ls")):
        done = subprocess.run(
            [*CREWLOG, *words], check=False, capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "HOME": "relative"},
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "--dir" in done.stderr or "means no directory" in done.stderr


@pytest.mark.parametrize("command", ["history", "export", "watch"])
def test_a_misspelt_type_of_event_is_not_met_with_silence(
    cli: Cli, reg: Registry, command: str
) -> None:
    """Nothing matches it, as a newer version may write it; a person is told what is known."""
    reg.register("a")
    more = ("--from-start", "--timeout", "0s") if command == "watch" else ()
    output = cli(command, "--type", "worker.dead", *more)
    assert "registered" not in output.stdout
    assert "'worker.dead'" in output.stderr
    assert "worker.lost" in output.stderr
    assert "no type" not in cli(command, "--type", "worker.lost", "--type", "_gap", *more).stderr


def test_watch_hands_each_change_to_a_program_and_acknowledges_after_success(
    cli: Cli, reg: Registry, tmp_path: Path
) -> None:
    """No shell, in order, the event on stdin; what failed comes again, what succeeded does not."""
    reg.register("a")
    for number in range(3):
        reg.update("a", meta={"number": number, "text": "$(touch pwned); `touch pwned`"})
    taken = tmp_path / "taken"
    script = tmp_path / "take"
    script.write_text(
        "#!/bin/sh\n"
        f"n=$(cat {taken} 2>/dev/null | wc -l)\n"
        f"cat >> {taken}\n"
        '[ "$n" != 1 ]\n'  # the second hand-over fails, once
    )
    script.chmod(0o700)
    common = ("watch", "--cursor", "c", "--from-start", "--exec", "--timeout", "30s")
    cli(*common, "--count", 2, "--retries", 0, "--", script, code=1)
    cli(*common, "--count", 3, "--", script)
    seqs = [json.loads(row)["seq"] for row in taken.read_text().splitlines()]
    assert seqs == [2, 3, 3, 4, 5], "the third was not acknowledged, and came again"
    assert not list(tmp_path.glob("**/pwned"))
    assert cli.json("cursor", "show", "c")["cursors"] == [
        {"name": "c", "seq": 5, "lag": 0, "lost": False, "owned": False}
    ]


def test_cursor_commands(cli: Cli, reg: Registry) -> None:
    """ls, show, set, rm; one owner at a time; unknown names are the honest no."""
    reg.register("a")
    output = cli("cursor", "show", "c", "--json", code=1).stderr
    assert json.loads(output)["error"]["code"] == "cursor_not_found"
    cli("cursor", "show", "c", code=1)
    assert cli.json("cursor", "set", "c", 1)["cursors"] == [
        {"name": "c", "seq": 1, "lag": 1, "lost": False, "owned": False}
    ]
    with reg.watch(cursor="c"):
        assert "in use" in cli("cursor", "ls").stdout
        assert "in use" in cli("cursor", "set", "c", 2, code=75).stderr
        cli("watch", "--cursor", "c", "--count", 1, code=75)
    cli("cursor", "rm", "c")
    assert cli.json("cursor", "ls")["cursors"] == []
    for wrong in (("cursor", "ls", "x"), ("cursor", "show"), ("cursor", "set", "x"),
                  ("cursor", "set", "../x", "1"), ("cursor", "set", "c", "99")):  # fmt: skip
        cli(*wrong, code=2)


def test_watch_exec_of_nothing_is_a_usage_error(cli: Cli, reg: Registry) -> None:
    """--exec and CMD go together, and CMD must be there."""
    reg.register("a")
    cli("watch", "--exec", code=2)
    cli("watch", "--", "true", code=2)
    cli("watch", "--from-start", "--exec", "--", "no-such-program", code=127)


def test_watch_timeout_is_124_only_where_a_count_was_missed(cli: Cli, reg: Registry) -> None:
    """--timeout alone is an ordinary end."""
    reg.register("a")
    cli("watch", "--now", "--timeout", "0.1s")
    cli("watch", "--now", "--count", 1, "--timeout", "0.1s", code=124)
    rows = cli("watch", "--since", "1h", "--json", "--timeout", "0.1s").stdout.splitlines()
    assert [json.loads(row)["kind"] for row in rows] == ["change", "synced"]


def test_alive_waits_until_it_is_true(cli: Cli, reg: Registry, crew: Crew) -> None:
    """Registered, ready, dead: each is waited for; 124 if it does not come."""
    cli("alive", "a", "--timeout", "0.1s", code=66)
    reg.register("other")
    assert cli("alive", "a", "--timeout", "0.1s", code=124).stdout == "not registered\n"
    worker = crew.sleeper()
    waiting = subprocess.Popen(
        [*CREWLOG, "--dir", str(cli.place), "alive", "a", "--for", "ready", "--timeout", "30s"],
        stdout=subprocess.DEVNULL,
    )
    reg.register("a", pid=worker.pid)
    reg.update("a", state="ready")
    assert waiting.wait(30) == 0
    cli("alive", "a", "--for", "dead", code=1)
    waiting = subprocess.Popen(
        [*CREWLOG, "--dir", str(cli.place), "alive", "a", "--for", "dead", "--timeout", "30s"],
        stdout=subprocess.DEVNULL,
    )
    kill(worker)
    assert waiting.wait(30) == 0


def test_compact_dry_run_needs_no_yes_and_does_nothing(cli: Cli, reg: Registry) -> None:
    """It only says what it would do, also with -q."""
    reg.register("a")
    cli("compact", "-q")
    covered = reg.compacted()
    reg.update("a", version="2")
    output = cli("compact", "--dry-run", "-q", "--keep-history", "0s").stdout
    assert "would fold" in output
    assert "archive 1 segments" in output
    assert "would drop history: events 1 to" in output
    answer = cli.json("compact", "--dry-run")
    assert (answer["dry_run"], answer["dropped"]) == (True, None)
    assert covered is not None
    assert reg.compacted() == covered
    cli("compact", "--dry-run", "--prometheus", "x", code=2)


def test_compact_keeps_history_as_told(cli: Cli, reg: Registry) -> None:
    """--keep-history by age, size, or all; verify knows policy from loss."""
    reg.register("a")
    for number in range(6):
        reg.update("a", meta={"number": number})
        cli("compact", "-q")
    assert cli.json("compact", "--yes", "--keep-history", "90d")["dropped"] is None
    assert cli.json("compact", "--yes", "--keep-history", "1GiB")["dropped"] is None
    assert cli.json("compact", "--yes", "--keep-history", "0s")["dropped"] is not None
    assert "what is kept: from seq" in cli("history").stderr
    assert cli.json("verify")["findings"] == []
    cli("compact", "--keep-history", "much", code=2)
