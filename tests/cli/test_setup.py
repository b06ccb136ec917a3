"""Setting crewlog up: doctor, schedules, completion, colour, jitter."""

import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import crewlog
from commands import CREWLOG, Cli
from crewlog import host
from crewlog.local import layout, listen
from crewlog.registry import Registry
from crewlog.store import Source
from crewlog_cli import text
from crewlog_cli.commands import setup
from crewlog_compactor import compact, health
from crewlog_compactor.local import health as local_health
from crewlog_compactor.reports import Check
from procs import Crew

# -- doctor ---------------------------------------------------------------------------------


def checks_of(reg: Registry) -> dict[str, Check]:
    return {check.name: check for check in health.checks(reg)}


def test_doctor_finds_a_sound_place_sound(cli: Cli, reg: Registry) -> None:
    """Every check is told, in a table and as JSON; nothing is changed."""
    reg.register("a")
    compact(reg, gc=False)
    before = reg.last_seq
    answer = cli.json("doctor")
    names = [check["name"] for check in answer["checks"]]  # type: ignore[attr-defined]
    assert answer["ok"] is True
    assert names == ["place", "room", "log", "wakes", "compaction", "collection", "clock",
                     "identity", "boot", "namespace", "hidepid", "versions"]  # fmt: skip
    assert "STATUS" in cli("doctor").stdout
    assert reg.last_seq == before


def test_doctor_without_a_registry_creates_none(cli: Cli) -> None:
    """It says so, and is content: the first change makes one."""
    answer = cli.json("doctor")
    assert answer["ok"] is True
    assert "no registry yet" in str(answer["checks"])
    assert not cli.place.exists()


@pytest.mark.parametrize(
    ("harm", "name", "remedy"),
    [("open", "place", "chmod -R go="), ("poisoned", "log", "then run: crewlog -d ")],
)
def test_doctor_says_what_to_do_and_ends_with_one(
    cli: Cli, reg: Registry, harm: str, name: str, remedy: str
) -> None:
    """A directory that is open to others; a sync that failed."""
    reg.register("a")
    if harm == "open":
        cli.place.chmod(0o755)
    else:
        (cli.place / layout.POISON).touch(mode=0o600)
    answer = cli.json("doctor", code=1)
    bad = [c for c in answer["checks"] if c["status"] == "fail"]  # type: ignore[attr-defined]
    assert [c["name"] for c in bad] == [name]
    assert remedy in bad[0]["remedy"]
    assert remedy in cli("doctor", code=1).stderr


def test_doctor_notices_the_clock_the_backlog_and_deaf_watchers(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its remedy."""
    ahead = datetime.now(UTC) + timedelta(hours=2)
    with monkeypatch.context() as patch:
        patch.setattr(host, "now", lambda: ahead)
        reg.register("a")
    assert checks_of(reg)["clock"].status == "warn"
    monkeypatch.setattr(health, "_BACKLOG", 0)
    monkeypatch.setattr(health, "_NEVER", 0)
    assert "crewlog schedule cron" in checks_of(reg)["compaction"].remedy

    def no_more(*_: object) -> Source:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(listen.HeadChannel, "source", no_more)
    assert "max_user_watches" in checks_of(reg)["wakes"].remedy
    monkeypatch.setattr(local_health, "_ROOM_BYTES", 1 << 60)
    assert checks_of(reg)["room"].status == "warn"
    (reg.path / layout.REDO).unlink()
    assert checks_of(reg)["redo"].status == "warn"


# -- schedules ------------------------------------------------------------------------------


def test_cron_line_runs_as_it_stands(cli: Cli, reg: Registry, crew: Crew) -> None:
    """By the shell that cron uses, with nothing in the environment; real paths."""
    reg.register("a", pid=crew.sleeper().pid)
    line = cli("schedule", "cron").stdout.strip()
    assert line.startswith("*/5 * * * * /")
    command = line.split(" ", 5)[5].replace("\\%", "%").replace("--jitter 30s", "--jitter 0s")
    done = subprocess.run(
        ["/bin/sh", "-c", command], env={}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert reg.compacted() is not None


def test_percent_and_spaces_in_a_path_are_escaped(tmp_path: Path) -> None:
    """Cron ends a command at a percent sign, systemd expands it."""
    place = tmp_path / "a 100%b"
    assert "a 100\\%b'" in setup.cron_line(str(place))
    for kind in ("systemd-user", "systemd-system"):
        service, _, observer = setup.units(kind, str(place), owner=0).values()
        for unit in (service, observer):
            assert "100%%b" in unit
            row = next(r for r in unit.splitlines() if r.startswith("ExecStart="))
            assert str(place).replace("%", "%%") in shlex.split(row.removeprefix("ExecStart="))


def test_place_cannot_add_to_a_schedule(cli: Cli) -> None:
    """Neither a line of its own, nor a variable that systemd would expand."""
    for kind in ("cron", "systemd-user", "systemd-system"):
        done = Cli("/x\n* * * * * touch /tmp/owned #")("schedule", kind, code=2)
        assert done.stdout == ""
        assert "control character" in done.stderr
    service, *_ = setup.units("systemd-user", '/a ${HOME}\\"b', owner=0).values()
    assert "ExecStart=" in service
    assert '--dir "/a $${HOME}\\\\\\"b" compact' in service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
@pytest.mark.parametrize("kind", ["systemd-user", "systemd-system"])
def test_units_satisfy_systemd(reg: Registry, tmp_path: Path, kind: setup.Kind) -> None:
    """systemd-analyze verify has nothing to say."""
    reg.register("a")
    for name, body in setup.units(kind, reg.where, owner=0).items():
        (tmp_path / Path(name).name).write_text(body)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "crewlog-compact.timer"),
         str(tmp_path / "crewlog-compact.service")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "crewlog" not in done.stderr, done.stderr


def test_unit_blinds_no_collection(reg: Registry) -> None:
    """Nothing that hides processes, users or sockets from who collects."""
    units = "".join(setup.units("systemd-system", reg.where, owner=0).values())
    mine = "".join(setup.units("systemd-user", reg.where, owner=0).values())
    for word in ("PrivatePIDs", "ProtectProc", "PrivateUsers", "PrivateTmp"):
        assert word not in units + mine
    assert "User=" in units
    assert "ProtectSystem" not in mine, "in a user's unit it implies PrivateUsers"


# -- completion -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_that_shell(cli: Cli, name: str) -> None:
    """Where the shell is installed, it reads the script without a word."""
    done = cli("completion", name)
    assert "_CREWLOG_COMPLETE" in done.stdout
    shell = shutil.which(name)
    if shell is not None:
        checked = subprocess.run(
            [shell, "-n"], input=done.stdout, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, "")


def test_commands_options_and_sids_are_completed(cli: Cli, reg: Registry, crew: Crew) -> None:
    """As a shell asks: commands, and the sids of the registry that --dir names."""
    for sid in ("web-1", "web-2", "job-1"):
        reg.register(sid, pid=crew.sleeper().pid)

    def asked(*words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", "from crewlog_cli.main import main; main()"],
            env={**os.environ, "_CREWLOG_COMPLETE": "bash_complete",
                 "COMP_WORDS": " ".join(["crewlog", *words]), "COMP_CWORD": str(len(words))},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stderr == ""
        return [row.split(",", 1)[1] for row in done.stdout.splitlines() if row]

    assert asked("hist") == ["history"]
    assert "--since" in asked("history", "--s")
    assert asked("--dir", str(cli.place), "show", "web") == ["web-1", "web-2"]
    assert asked("--dir", str(cli.place / "no"), "show", "web") == []


# -- colour and jitter ----------------------------------------------------------------------


def test_colour_is_asked_for_or_left_out(cli: Cli, reg: Registry, crew: Crew) -> None:
    """Never in a pipe unless asked for; the option wins over NO_COLOR; words stay the same."""
    reg.register("a", pid=crew.sleeper().pid, ready=True)
    plain = cli("ls").stdout
    assert "\x1b" not in plain
    assert "\x1b" not in cli("--color", "never", "ls", env={"FORCE_COLOR": "1"}).stdout
    forced = cli("ls", env={"FORCE_COLOR": "1"}).stdout
    assert "\x1b[32mready\x1b[0m" in forced
    assert "\x1b" not in cli("ls", env={"FORCE_COLOR": "1", "NO_COLOR": "1"}).stdout
    assert "\x1b" in cli("ls", "--color", "always", env={"NO_COLOR": "1"}).stdout
    words = forced.replace("\x1b[32m", "").replace("\x1b[33m", "").replace("\x1b[0m", "")
    assert words.split()[:7] == plain.split()[:7], "but for its age, which grows"
    assert json.loads(cli("--color", "always", "ls", "--json").stdout)["workers"]


def test_colour_on_a_terminal(place: Path, reg: Registry, crew: Crew) -> None:
    """There it needs no asking."""
    reg.register("a", pid=crew.sleeper().pid, ready=True)
    above, below = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "FORCE_COLOR"}}
    subprocess.run(
        [sys.executable, "-c", "from crewlog_cli.main import main; main()", "--dir", str(place),
         "ls"], stdout=below, env={**env, "TERM": "xterm"}, check=True,
    )  # fmt: skip
    os.close(below)
    assert b"\x1b[32mready" in os.read(above, 4096)
    os.close(above)


def test_only_whole_words_are_coloured() -> None:
    """A sid that reads "dead" is somebody's name in the first column, not a verdict."""
    assert text.coloured("deadline  1  ready  alive, stalled") == (
        "deadline  1  \x1b[32mready\x1b[0m  \x1b[32malive\x1b[0m, stalled"
    )


def test_jitter_waits_no_longer_than_it_may(
    cli: Cli, reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes before any lock, and is a duration like all others."""
    reg.register("a")
    began = time.monotonic()
    cli("compact", "-q", "--jitter", "200ms", code=2)
    cli("compact", "-q", "--jitter", "1s")
    assert time.monotonic() - began < 10
    with crewlog.open(cli.place) as fresh:
        assert fresh.compacted() is not None


def test_version_is_told_by_the_fast_way_and_the_slow_one_alike() -> None:
    """The same words; where stdout takes nothing, the exit codes of every command."""
    fast = Cli.bare("--version")
    slow = Cli.bare("-q", "--version")
    assert fast.stdout == slow.stdout == f"crewlog {crewlog.__version__}\n"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*CREWLOG, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (74, False)
