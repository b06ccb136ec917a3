"""What a newcomer stumbled over stays mended: streams, endings, words, the past."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from datetime import timedelta
from pathlib import Path

import pytest

import crewlog
from commands import CREWLOG, Cli
from crewlog.errors import CompactedError
from crewlog.registry import Registry
from crewlog_compactor import KeepEvents, compact, health
from procs import Crew, kill


def shell(place: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which $C is crewlog on that store."""
    env = {**os.environ, "CREWLOG_DIR": str(place), "P": sys.executable,
           "M": "from crewlog_cli.main import main; main()"}  # fmt: skip
    done: subprocess.CompletedProcess[str] = subprocess.run(
        ["bash", "-c", f'C() {{ "$P" -c "$M" "$@"; }}; {line}'],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done


@pytest.mark.limits(segment_bytes=1500)
def test_past_before_what_is_kept_is_an_honest_no(reg: Registry, cli: Cli) -> None:
    """After a retention nobody knows what was then; the state that is left is not it."""
    for number in range(12):
        reg.register(f"w{number}")
        compact(reg, gc=False)
    assert compact(reg, gc=False, keep_history=KeepEvents(1)).dropped is not None
    with pytest.raises(CompactedError):
        reg.at(next(reg.history()).ts.replace(year=2020))
    for words in (("ls", "--at", "2020-01-01"), ("show", "w0", "--at", "@0"),
                  ("diff", "--from", "2020-01-01")):  # fmt: skip
        assert "no longer kept" in cli(*words, code=1).stderr


@pytest.mark.parametrize("words", ["ls", "history", "stats", "--help", "register b --pid $$"])
def test_closed_stdout_is_no_fault(reg: Registry, words: str) -> None:
    """Who closes it wants to hear nothing; the command does its work."""
    reg.register("a")
    done = shell(reg.path, f"C {words} >&-")
    assert done.returncode == 0
    assert "fault" not in done.stderr
    assert "Traceback" not in done.stderr


def test_help_into_a_closed_pipe_and_a_full_disk(place: Path) -> None:
    """As every other output: 141 and 74."""
    done = shell(place, "C --help | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) in {(141, ""), (0, "")}, "or it was read before"
    done = shell(place, "C --help >/dev/full")
    assert done.returncode == 74
    assert "fault" not in done.stderr


def test_no_words_show_what_there_is(place: Path) -> None:
    """Readable, on stderr, and 2."""
    done = shell(place, "C")
    assert done.returncode == 2
    assert "\\x0a" not in done.stderr
    assert "\n  history " in done.stderr
    assert "\\x0a" not in shell(place, "C schedule").stderr


@pytest.mark.parametrize("command", ["run", "exec"])
def test_program_without_dashes_is_refused(place: Path, command: str) -> None:
    """Else its options would be taken for ours, without a word."""
    done = shell(place, f"C {command} x ls --json /")
    assert done.returncode == 2
    assert "put -- between" in done.stderr
    assert not place.exists()


def test_output_in_an_encoding_that_lacks_a_letter(reg: Registry) -> None:
    """It is escaped; nothing is cut in half."""
    reg.register("a", labels={"a": "ü"})
    for line in ("ls", "timeline", "run --help"):
        done = shell(
            reg.path, f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii C {line}"
        )
        assert done.returncode == 0, done.stderr
    assert "a=\\xfc" in shell(reg.path, "PYTHONIOENCODING=ascii C ls").stdout


def test_signals_by_every_name_and_number(cli: Cli, reg: Registry, crew: Crew) -> None:
    """TERM, SIGTERM, sigterm, 15."""
    for number, name in enumerate(("TERM", "SIGINT", "sigterm", "15")):
        reg.register(f"w{number}", pid=crew.sleeper().pid)
        cli("stop", f"w{number}", "--signal", name, "--grace", "5s")
    assert "is no signal" in cli("stop", "w0", "--signal", "NOISE", code=2).stderr
    asked = [e.data["signal"] for e in reg.history(types=["worker.stop_requested"])]
    assert asked == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGTERM]


def test_place_that_is_no_registry_is_not_damage(tmp_path: Path) -> None:
    """66: there is none; 65 is for damaged data."""
    (tmp_path / "file").write_text("x")
    for place in ("/etc", str(tmp_path / "file")):
        assert shell(Path(place), "C ls").returncode == 66


def test_positions_that_are_not_reached_are_said(cli: Cli, reg: Registry) -> None:
    """A seq to come, a time that lacks its @."""
    reg.register("a")
    assert "seq 99 is not reached yet" in cli("ls", "--at", "99").stderr
    assert "@1764124574" in cli("ls", "--at", "1764124574").stderr
    reset = cli("watch", "--after", "99", "--count", "1", "--timeout", "1s", code=124)
    assert "the position is wrong" in reset.stderr


def test_ages_of_the_past_are_as_of_then(cli: Cli, reg: Registry) -> None:
    """Not as of now."""
    reg.register("a")
    first = reg.last_seq
    reg.register("b")
    row = cli("ls", "--at", first).stdout.splitlines()[1]
    assert " 0s " in row


def test_table_on_a_narrow_terminal_keeps_what_matters(place: Path, crew: Crew) -> None:
    """A long sid is cut, the data of an event are not."""
    with crewlog.open(place) as reg:
        reg.register("x" * 128, pid=crew.sleeper().pid)
        reg.exited("x" * 128, code=3)
    above, below = pty.openpty()
    fcntl.ioctl(below, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run(
        [*CREWLOG, "--dir", str(place), "history"], stdout=below, check=True,
        stderr=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"},
    )  # fmt: skip
    os.close(below)
    assert b"crashed code 3" in os.read(above, 8192)
    os.close(above)


def test_word_about_a_living_worker_says_what_to_do(cli: Cli, reg: Registry, crew: Crew) -> None:
    """Not to choose another sid."""
    reg.register("a", pid=crew.sleeper().pid)
    output = cli("gc", "--assume-dead", "a", "--reason", "x", code=1).stderr
    assert f"crewlog -d {cli.place} stop a" in output


def test_keep_history_says_what_it_takes(cli: Cli, reg: Registry) -> None:
    """Ages, sizes, counts."""
    reg.register("a")
    assert "1GiB" in cli("compact", "--keep-history", "foo", code=2).stderr


def test_metrics_path_is_looked_at_before_anything_is_done(
    cli: Cli, reg: Registry, tmp_path: Path
) -> None:
    """A compaction whose metrics have no place is not made."""
    reg.register("a")
    assert (
        "no directory"
        in cli("compact", "--prometheus", tmp_path / "none" / "x.prom", code=2).stderr
    )
    assert "it is a directory" in cli("compact", "--prometheus", tmp_path, code=2).stderr
    assert reg.compacted() is None


def test_spans_that_no_calendar_knows_are_refused(cli: Cli, reg: Registry) -> None:
    """As usage, not as a fault of ours."""
    reg.register("a")
    assert "thousand years" in cli("compact", "--jitter", "99999999w", code=2).stderr
    cli("compact", "--keep-history", "999999w", "--dry-run", code=2)
    assert compact(reg, keep_history=timedelta.max).dropped is None


def test_dry_run_of_gc_says_that_it_would_be_refused(cli: Cli, reg: Registry, crew: Crew) -> None:
    """With the list of who seems dead; doctor says so, too."""
    doomed = [crew.sleeper() for _ in range(12)]
    for number, process in enumerate(doomed):
        reg.register(f"d{number}", pid=process.pid)
    for process in doomed:
        kill(process)
    output = cli("gc", "--dry-run")
    assert len(output.stdout.splitlines()) == 12
    assert "would be refused: 12 of 12 workers seem dead at once" in output.stderr
    assert "would be refused" in cli("compact", "--dry-run").stderr
    assert "would be refused" in cli("gc", "--plan", cli.place.parent / "plan").stderr
    assert "12 of 12" in str(cli.json("gc", "--dry-run")["refused"])
    assert cli.json("gc", "--dry-run", "--force")["refused"] is None
    checks = {c["name"]: c for c in cli.json("doctor")["checks"]}  # type: ignore[attr-defined]
    assert checks["collection"]["status"] == "warn"
    assert "--force" in checks["collection"]["remedy"]


def test_worker_that_was_registered_later_is_not_guessed_at(cli: Cli, reg: Registry) -> None:
    """Nor is one that is no longer listed forgotten."""
    reg.register("first")
    reg.register("live")
    assert "not listed then" in cli("show", "live", "--at", "2", code=1).stderr
    assert f"crewlog -d {cli.place} history --sid" in cli("show", "gone", code=1).stderr
    assert "history" not in cli("history", "gone", code=1).stderr, "it was looked for there"


def test_timeline_shows_the_newest_workers(cli: Cli, reg: Registry) -> None:
    """One that was started again is newer than who was first registered after it."""
    reg.register("old")
    reg.exited("old", code=0)
    reg.register("between")
    reg.exited("between", code=0)
    reg.register("old")
    drawn = cli("timeline", "-n", "1").stdout.splitlines()[1:]
    assert [row.split()[0] for row in drawn] == ["old"]
    assert cli("timeline", "--html", "-").stdout.startswith("<!doctype html>")


def test_place_that_cannot_be_made_fails_in_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not `ok` until the first change is refused."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with crewlog.open(tmp_path / "new" / "crew") as reg:
        place = next(iter(health.checks(reg)))
    assert (place.status, f"we may not write in {tmp_path}" in place.found) == ("fail", True)


def test_mistyped_names_are_told(cli: Cli, reg: Registry, tmp_path: Path) -> None:
    """An empty answer, or a cron line, must not pass for all being well."""
    reg.register("a")
    assert "no event of 'typo' is kept" in cli("history", "--sid", "typo").stderr
    assert "is kept" not in cli("history", "--sid", "a", "--since", "now").stderr.splitlines()[0]
    output = Cli(tmp_path / "nowhere")("schedule", "cron").stderr
    assert "no registry at" in output
    assert "no registry" not in cli("schedule", "cron").stderr


def test_contradictions_are_usage_errors(cli: Cli, reg: Registry) -> None:
    """Nothing is written, and no empty answer given."""
    reg.register("a", labels={"k": "v"})
    before = reg.last_seq
    for words in (
        ("history", "--crashed", "--type", "worker.registered"),
        ("watch", "--crashed", "--type", "worker.ready"),
        ("update", "a", "-l", "k=w", "--unlabel", "k"),
        ("compact", "--keep-history", "\u00b2GiB", "--dry-run"),
        ("compact", "--dry-run", "--jitter", "52000w"),
        ("timeline", "--html", "-", "--json"),
    ):
        cli(*words, code=2)
    assert reg.last_seq == before
    cli("update", "a", "--unlabel", "k")
    assert "  updated -k  " in cli("history").stdout


def test_watch_that_runs_a_program_minds_its_time(cli: Cli, reg: Registry) -> None:
    """A program that always fails is not tried for ever."""
    reg.register("a")
    cli("watch", "--from-start", "--timeout", "0.5s", "--exec", "--", "false", code=124)


def test_history_backwards_tells_what_is_no_longer_kept(cli: Cli, reg: Registry) -> None:
    """As it does forwards; and a state whose beginning is not known says so."""
    for number in range(4):
        reg.register(f"w{number}")
        compact(reg, gc=False)
    assert compact(reg, gc=False, keep_history=KeepEvents(4)).dropped is not None
    for words in (("--after", "1"), ("--after", "1", "-r"), ("--after", "1", "-n", "2")):
        assert "no longer kept" in cli("history", *words, code=1).stderr
    oldest = next(reg.history(types=["_segment"])).seq
    assert "a time that is no longer kept" in cli("ls", "--at", oldest - 1).stderr


def test_grace_beyond_what_poll_counts(reg: Registry, crew: Crew) -> None:
    """Thirty days are more milliseconds than an int of C holds."""
    process = crew.sleeper()
    reg.register("a", pid=process.pid)
    assert reg.stop("a", grace_s=30 * 86_400, reason="r").data["signal"] == 15


def test_names_and_globs_choose_what_ls_and_watch_show(cli: Cli, crew: Crew) -> None:
    """One that is named is shown, ended or not; of one that is not there, the nearest is."""
    cli("register", "web-1", "--pid", crew.sleeper().pid)
    cli("register", "web-2", "--pid", crew.sleeper().pid)
    cli("run", "job", "--", "true")
    assert cli("ls", "web-*", "--sids").stdout.split() == ["web-1", "web-2"]
    assert cli("ls", "web-1", "job", "--sids").stdout.split() == ["web-1", "job"]
    assert cli("ls", "j*", "--sids").stdout == "", "it has ended, and was not named"
    assert cli("ls", "j*", "-a", "--sids").stdout.split() == ["job"]
    assert "Did you mean" in cli("ls", "web1", code=1).stderr
    rows = cli("watch", "web-2", "--from-start", "--count", "1", "--json").stdout.splitlines()
    assert [json.loads(row)["sid"] for row in rows if '"sid"' in row] == ["web-2"]
    script = "cat >/dev/null; echo heard"
    heard = cli(
        "watch", "web-2", "--from-start", "--count", "1", "--exec", "--", "sh", "-c", script
    )
    assert heard.stdout.count("heard") == 1


def test_cron_before_the_first_worker_sends_no_mail(tmp_path: Path) -> None:
    """Quiet with -q; without it, a place where there is nothing is said to be that."""
    nowhere = Cli(tmp_path / "store")
    done = nowhere("compact", "-q")
    assert (done.stdout, done.stderr) == ("", "")
    assert not nowhere.place.exists()
    assert "no registry" in nowhere("compact", code=66).stderr
