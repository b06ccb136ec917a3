"""What befalls commands: signals, full disks, damage, strange words, a directory that is gone."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commands import CREWLOG, Cli
from crewlog.local import layout
from crewlog.registry import Registry
from crewlog_compactor import verify
from faults import empty_redo
from procs import Crew, files, until


def marked(word: str) -> list[int]:
    """Return the pids of the processes that have a word in their environment."""
    rows = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and word.encode() in (entry / "environ").read_bytes():
                rows.append(int(entry.name))
        except OSError:  # gone, or another's
            continue
    return rows


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("after", ["1. A manager", "2. Another", "3. A worker"])
def test_demo_that_is_interrupted_leaves_nothing(
    tmp_path: Path, number: signal.Signals, after: str
) -> None:
    """Neither a process nor a directory, whatever it was doing."""
    word = f"CREWLOG_TEST_{os.urandom(6).hex()}"
    demo = subprocess.Popen(
        [*CREWLOG, "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), word: "1"}, start_new_session=True,
    )  # fmt: skip
    assert demo.stdout is not None
    for row in demo.stdout:
        if row.startswith(after):
            break
    os.killpg(demo.pid, number)
    _, output = demo.communicate(timeout=30)
    assert demo.returncode == 128 + number
    assert "Traceback" not in output
    until(lambda: not marked(word))
    assert list(tmp_path.iterdir()) == []


def test_doctor_looks_at_a_damaged_store(cli: Cli, reg: Registry) -> None:
    """What one check stumbles over is a finding, and the others are made."""
    reg.register("a")
    reg.close()
    segment = cli.place / layout.LOG / layout.segment_name(1)
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    assert cli.json("doctor")["checks"], "the redo still holds what was lost"
    empty_redo(cli.place)
    checks = cli.json("doctor", code=1)["checks"]
    assert isinstance(checks, list)
    failed = {check["name"]: check["remedy"] for check in checks if check["status"] == "fail"}
    assert any(f"crewlog -d {cli.place} repair" in remedy for remedy in failed.values())
    assert {"versions", "place"} <= {check["name"] for check in checks}


def test_history_is_dropped_only_when_it_is_meant(cli: Cli, reg: Registry) -> None:
    """Without a terminal to ask on, --yes says so."""
    reg.register("a")
    assert "needs --yes" in cli("compact", "--keep-history", "0events", code=2).stderr
    cli("compact", "--keep-history", "0events", "--yes")
    cli("compact", "--keep-history", "all")


def test_metrics_tell_of_a_compaction_that_failed(cli: Cli, reg: Registry, tmp_path: Path) -> None:
    """The file of the last good one would hide it."""
    path = tmp_path / "crewlog.prom"
    reg.register("a")
    cli("compact", "-q", "--prometheus", path)
    assert "crewlog_compaction_success 1" in path.read_text()
    with contextlib.closing(files(reg).take_compact_lock()):
        cli("compact", "-q", "--prometheus", path, code=75)
    assert "crewlog_compaction_success 1" in path.read_text(), "another one runs: no failure"
    reg.update("a", state="ready")
    reg.close()
    segment = max((cli.place / layout.LOG).iterdir())
    data = segment.read_bytes()
    segment.write_bytes(data[:-20] + b"x" + data[-19:])
    empty_redo(cli.place)
    cli("compact", "-q", "--prometheus", path, code=65)
    assert "crewlog_compaction_success 0" in path.read_text()


def test_full_stderr_does_not_change_the_exit_code(cli: Cli, reg: Registry) -> None:
    """Nobody can read it; the code still tells."""
    reg.register("a")
    for words, code in ((["show", "nope"], 1), (["nosuch"], 2), (["history"], 0)):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [*CREWLOG, "--dir", cli.where, *words],
                check=False, stdout=subprocess.PIPE, stderr=full,
            )  # fmt: skip
        assert done.returncode == code, words


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["history", "--sid", b"\xff"], 0),
        (["history", "--type", b"\xff"], 0),
        (["export", "--sid", b"\xff"], 0),
        (["history", "-n", "9" * 20], 0),
        (["stop", "--all"], 2),
        (["watch", "--timeout", "²"], 2),
        (["stop", "a", "--grace", "²"], 2),
        (["ls", "--at", "9" * 5000], 2),
        (["gc", "--keep", "9" * 5000], 2),
        (["compact", "--keep-history", "9" * 5000 + "GiB"], 2),
        (["compact", "--keep-history", "9" * 5000 + "events"], 2),
        (["repair", "--accept-loss", "²..³"], 2),
    ],
)
def test_strange_words_are_no_fault_of_ours(
    cli: Cli, reg: Registry, words: list[str | bytes], code: int, crew: Crew
) -> None:
    """Not 70, also without stdin."""
    reg.register("a", pid=crew.sleeper().pid)
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *CREWLOG, "--dir", cli.where, *words],
        check=False, capture_output=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr


def test_working_directory_that_was_removed_is_told(tmp_path: Path) -> None:
    """A relative place leads nowhere then."""
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f'cd {gone}; rmdir {gone}; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", code, "sh", *CREWLOG, "--dir", "here", "ls"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 66
    assert "absolute path" in done.stderr


@pytest.mark.parametrize(
    "words", [("timeline", "--html"), ("compact", "--prometheus"), ("gc", "--plan")]
)
def test_pipe_in_place_of_a_file_is_not_replaced(
    cli: Cli, reg: Registry, tmp_path: Path, words: tuple[str, str]
) -> None:
    """Nor a device: /dev/null would be a file from then on."""
    reg.register("a")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "device or a pipe" in cli(*words, pipe, code=77).stderr
    assert pipe.is_fifo()


def test_copy_without_modes_is_mended_by_one_command(cli: Cli, reg: Registry) -> None:
    """The first refusal names it for all that is inside."""
    reg.register("a")
    for path in (cli.place, *cli.place.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    output = cli("ls", code=77).stderr
    command = output.partition("Run: ")[2].strip()
    subprocess.run(["sh", "-c", command], check=True)
    cli("update", "a", "--state", "ready")
    cli("compact", "-q")


def test_tables_as_json_are_refused(cli: Cli, reg: Registry) -> None:
    """What asks for JSON must not get CSV."""
    reg.register("a")
    cli("export", "--format", "csv", "--json", code=2)


def test_verify_of_what_is_no_registry_is_no_finding(cli: Cli, reg: Registry) -> None:
    """It is what every other command says of it; a damaged store.json is a finding."""
    reg.register("a")
    assert Cli("/etc/passwd")("verify", code=66).stderr
    cli.place.chmod(0o755)
    cli("verify", code=77)
    cli.place.chmod(0o700)
    (cli.place / "store.json").write_text("{")
    assert cli.json("verify", code=1)["findings"]


@pytest.mark.parametrize(
    "words", [("stop",), ("watch", "--sid"), ("timeline", "--sid"), ("gc", "--assume-dead")]
)
def test_sids_are_completed_wherever_one_is_asked_for(
    cli: Cli, reg: Registry, words: tuple[str, ...]
) -> None:
    """By the shell's own variables."""
    reg.register("web-1")
    asked = ["crewlog", "--dir", cli.where, *words, "we"]
    done = subprocess.run(
        CREWLOG, check=False, capture_output=True, text=True,
        env={**os.environ, "_CREWLOG_COMPLETE": "bash_complete",
             "COMP_WORDS": " ".join(asked), "COMP_CWORD": str(len(asked) - 1)},
    )  # fmt: skip
    assert "web-1" in done.stdout


def test_change_of_meta_is_shown_and_quiet_is_quiet(cli: Cli, reg: Registry, crew: Crew) -> None:
    """What changed stands beside the event, cut where it is long; gc -q says nothing."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    reg.update("a", meta={"step": 7, "long": "x" * 200})
    shown = cli("history", "--sid", "a").stdout
    assert "step=7" in shown
    assert "x" * 41 not in shown
    worker.kill()
    worker.wait()
    assert cli("gc", "-q").stdout == ""
    assert cli("gc", "-q").stderr == ""


def test_options_that_select_mean_any_of_these(cli: Cli, reg: Registry) -> None:
    """Repeated, and as words of their own: never silently the last one only."""
    for sid in ("a", "b", "c"):
        reg.register(sid)
    reg.update("b", state="draining")
    reg.exited("c", code=3)
    for words in (("--sid", "a", "--sid", "b"), ("a", "b"), ("a", "--sid", "b")):
        rows = cli("history", "-q", *words).stdout.splitlines()[1:]
        assert [row.split()[3] for row in rows] == ["a", "b", "b"]
    listed = cli("ls", "--sids", "--state", "failed", "--state", "draining").stdout.split()
    assert listed == ["b", "c"]
    assert [e.sid for e in reg.history(sids=["a", "c"])] == ["a", "c", "c"]
    assert [e.sid for e in reg.history(sid="a", sids=["c"])] == ["a", "c", "c"]
    assert "crashed" in cli("history", "c").stdout


@pytest.mark.parametrize("words", [["run", "--", "sleep", "1"], ["exec", "--", "true"]])
def test_forgotten_id_is_not_the_program(cli: Cli, words: list[str]) -> None:
    """`run -- sleep 1` would list a worker called sleep, for ever."""
    done = cli.any(*words)
    assert done.returncode == 2
    assert "missing" in done.stderr.lower()
    assert not cli.place.exists()


@pytest.mark.parametrize("given", ["90", "0", "5 events", "d"])
def test_bare_number_is_no_retention(cli: Cli, reg: Registry, given: str) -> None:
    """`90` for `90d` would have dropped nearly everything."""
    reg.register("a")
    assert "5000events" in cli("compact", "--keep-history", given, "--yes", code=2).stderr


def test_compaction_sums_up_and_doctor_warns_of_none(cli: Cli, reg: Registry) -> None:
    """One line however many were collected; names with -v."""
    for part in range(2):
        with reg.batch() as batch:
            for number in range(600):
                batch.register(f"w{part}-{number}")
    checks = cli.json("doctor")["checks"]
    assert isinstance(checks, list)
    assert [c["status"] for c in checks if c["name"] == "compaction"] == ["warn"]
    for part in range(2):
        with reg.batch() as batch:
            for number in range(600):
                batch.exited(f"w{part}-{number}", code=0)
    assert len(cli("compact").stdout.splitlines()) <= 2


def test_place_that_no_shell_has_made_whole_is_warned_of(tmp_path: Path) -> None:
    """A unit or a crontab in which `$` and `~` stand as they are."""
    for place in (tmp_path / "$HOME", tmp_path / "${X}" / "reg"):
        done = Cli(place)("ls", code=66)
        assert "that no shell has replaced" in done.stderr
    assert "no shell" not in Cli(tmp_path / "plain")("ls", code=66).stderr


@pytest.mark.parametrize(
    "argv",
    [
        ("timeline", "--html", "{}/store.json"), ("timeline", "--html", "{}/page.html"),
        ("stats", "--prometheus", "{}/m.prom"), ("compact", "--prometheus", "{}/log/m.prom"),
        ("gc", "--plan", "{}/plan.json"), ("backup", "{}/copy"), ("backup", "{}/archive/copy"),
        ("run", "x", "--log", "{}/x.log", "--", "true"),
        ("start", "x", "--log", "{}/x.log", "--", "true"),
    ],
)  # fmt: skip
def test_nothing_else_is_written_into_a_registry(
    cli: Cli, reg: Registry, place: Path, argv: tuple[str, ...]
) -> None:
    """Not over one of its files, and not beside them: verify would call it a stranger."""
    reg.register("a")
    identity = (place / layout.STORE).read_bytes()
    done = cli(*(word.format(place) for word in argv), code=66)
    assert f"it lies within the registry {place}" in done.stderr
    assert (place / layout.STORE).read_bytes() == identity
    assert verify(place).ok, "it reports strangers"


_LOOKS = """
import signal, sys
class Look:
    def find_spec(self, name, *_):
        if name in ("orjson", "crewlog_cli.commands.ls"):
            print(name, signal.getsignal(signal.SIGINT) is signal.SIG_DFL)
sys.meta_path.insert(0, Look())
sys.argv[1:] = ["ls"]
signal.signal(signal.SIGINT, signal.default_int_handler)
from crewlog_cli.entry import main
main()
"""


def test_ctrl_c_as_a_command_is_loaded_ends_it_at_once(cli: Cli, place: Path) -> None:
    """A module of C that is interrupted as it is loaded may crash."""
    cli("init")
    done = subprocess.run(
        [sys.executable, "-c", _LOOKS],
        env={**os.environ, "CREWLOG_DIR": str(place)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[:2] == ["orjson True", "crewlog_cli.commands.ls False"]
