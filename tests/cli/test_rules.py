"""The rules of the command line, each over everything that it is a rule of."""

import contextlib
import inspect
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import unicodedata
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_type_hints
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crewlog
from commands import Cli
from crewlog import errors
from crewlog.errors import CrewlogError
from crewlog.model import times
from crewlog.registry import Registry
from crewlog_cli import main, output, shell
from crewlog_cli.shell import Shell
from procs import Crew, until

# -- JSON of every command ------------------------------------------------------------------

FINITE: dict[str, tuple[str, ...]] = {
    "ls": (), "show": ("a",), "alive": ("a",), "stats": (), "path": (), "doctor": (),
    "register": ("b", "--pid", "{pid}"), "update": ("a", "--state", "ready"),
    "beat": ("leased",), "explain": ("a",), "gc": (), "compact": (), "verify": (), "repair": (),
    "anchor": (), "diff": ("--from", "2"), "timeline": (), "schedule": ("cron",),
    "stop": ("c", "--grace", "1s"), "observe": ("d",), "import": ("{old}",),
    "remove": ("a", "--reason", "x"), "completion": ("bash",), "init": (),
}  # fmt: skip
STREAMS: dict[str, tuple[str, ...]] = {
    "history": (), "watch": ("--from-start", "--count", "2", "--timeout", "20s"), "export": (),
    "logs": ("logged",),
}  # fmt: skip
# A program of its own, a screen, positions, and a move: tested where they are.
OTHERS = {"exec", "run", "start", "top", "demo", "cursor", "migrate", "backup", "mcp"} | {"help"}


def test_every_command_tells_in_json(cli: Cli, reg: Registry, crew: Crew, tmp_path: Path) -> None:
    """Finite ones one object on one line, streams an object a line; ASCII, and nothing else."""
    old = tmp_path / "old.json"
    old.write_text('{"sessions": []}')
    for sid in "ac":
        reg.register(sid, pid=crew.sleeper().pid)
    reg.register("d", pid=crew.sleeper().pid)
    reg.exited("d", code=0)
    reg.register("leased", lease=True, heartbeat_s=60)
    reg.spawn("logged", ["echo", "a line"], log=tmp_path / "log")
    until(lambda: (tmp_path / "log").read_text() != "")
    values = {"pid": str(crew.sleeper().pid), "old": str(old)}
    assert {*FINITE, *STREAMS} | OTHERS == {*main.COMMANDS}, "a new command needs its place here"
    for name, words in FINITE.items():
        answer = cli.json(name, *(word.format(**values) for word in words))
        assert len(answer) > 1, name
    assert set(cli.json("ls", "--sids")) == {"schema", "seq", "sids"}
    for name, words in STREAMS.items():
        rows = cli(name, *words, "--json").stdout.splitlines()
        assert len(rows) >= (1 if name == "logs" else 2)
        assert all(isinstance(json.loads(row), dict) and row.isascii() for row in rows), name


# -- errors ---------------------------------------------------------------------------------


def samples() -> list[CrewlogError]:
    """Make one of every error there is, from what its signature asks for."""
    given_: dict[str, object] = {
        "str": "words", "int": 7, "float": 1.5, "bool": True, "int | None": None,
        "collections.abc.Sequence[tuple[int, int]]": [(1, 2)],
    }  # fmt: skip
    every: list[CrewlogError] = []
    for kind in vars(errors).values():
        if not (isinstance(kind, type) and issubclass(kind, CrewlogError)):
            continue
        if kind.code in {"error", "data_damaged"} and kind in {CrewlogError, errors.DataDamaged}:
            continue  # abstract: never raised themselves
        hints = get_type_hints(kind.__init__)
        asked = [
            p
            for p in inspect.signature(kind.__init__).parameters.values()
            if p.default is p.empty and p.name != "self" and p.kind is not p.VAR_KEYWORD
        ]
        values = {
            p.name: given_[getattr(hints[p.name], "__name__", "") if isinstance(hints[p.name], type)
                           else str(hints[p.name])]
            for p in asked
        }  # fmt: skip
        if "remedy" in inspect.signature(kind.__init__).parameters:
            values["remedy"] = "Do something"  # test_tidy.py sees to it that each place gives one
        every.append(kind(**values))
    return every


def test_every_error_is_three_lines_or_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    """What; where and why; what to do: with --json as an object. Each says what to do."""
    made = samples()
    assert len(made) > 30
    for error in made:
        assert error.remedy, f"{type(error).__name__} does not say what to do"
        with pytest.raises(SystemExit) as ended:
            shell.fail(Shell(), error)
        assert ended.value.code == error.exit_code
        printed = capsys.readouterr()
        assert printed.out == ""
        rows = printed.err.splitlines()
        assert 2 <= len(rows) <= 3, rows
        assert rows[0].startswith("crewlog: ")
        with pytest.raises(SystemExit):
            shell.fail(Shell(json=True), error)
        body = json.loads(capsys.readouterr().err)["error"]
        assert {*body} == {"code", "exit", "message", "hint"}
        assert (body["code"], body["exit"]) == (error.code, error.exit_code)
        assert body["hint"]


def test_advice_means_the_registry_that_dir_named(tmp_path: Path) -> None:
    """The command that a hint names can be run as it stands, wherever the registry is."""
    place = tmp_path / "it's a place"
    Cli.bare("-d", place, "register", "a", "--pid", os.getpid())
    missed = Cli.bare("show", "b", "-d", place, "--json", code=1)
    advised = json.loads(missed.stderr)["error"]["hint"].split("`")[1]
    words = shlex.split(advised)
    assert words == ["crewlog", "-d", str(place), "ls", "--all"]
    assert "a " in Cli.bare(*words[1:]).stdout
    env = {**os.environ, "CREWLOG_DIR": str(place)}
    missed = Cli.bare("show", "b", code=1, env=env)
    assert "See `crewlog ls --all`" in missed.stderr, "the environment names it then, too"


# -- what a terminal would obey -------------------------------------------------------------

OBEYED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
        st.sampled_from("\x1b\x07\x9b\x85\u202e\u2066\u2028\ue000\r\n\t\x7f"),
    ),
    min_size=1, max_size=30,
)  # fmt: skip
COMMANDS = [
    "ls", "ls --all", "ls --at 2", "show a", "explain a", "alive a", "history", "history -r",
    "history --type _segment", "diff --from 1", "timeline", "stats", "gc --dry-run", "verify",
    "watch --from-start --count 2 --timeout 20s", "show {text}", "ls --at {text}",
    "register {text} --pid 1", "history --since {text}", "--dir {text} ls", "compact --pack {text}",
    "{text}", "update a --state {text}", "gc --apply {text}", "cursor ls",
]  # fmt: skip


def spoken(place: Path, words: list[str]) -> str:
    """Run a command in this process; return all that it tells, on both streams."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main.run(["--dir", str(place), *words])
    assert "Traceback" not in err.getvalue()
    return out.getvalue() + err.getvalue()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=TEXT, actor=TEXT)
def test_no_stream_for_people_holds_what_a_terminal_obeys(
    monkeypatch: pytest.MonkeyPatch, text: str, actor: str
) -> None:
    """Whatever workers are labelled, whoever acts, whatever is typed; in every command."""
    monkeypatch.setattr(output, "lose_stdout", lambda: None)
    with tempfile.TemporaryDirectory() as home:
        place = Path(home) / "store"
        named = actor if actor.strip() else None
        with crewlog.open(place, actor=named) as reg:
            reg.register("a", version=text, labels={text: text}, meta={text: text})
            reg.update("a", state="draining", reason=text if text.strip() else "x")
        for line in COMMANDS:
            typed = text.replace("/", "_")
            words = [word.format(text=typed) if "{" in word else word for word in shlex.split(line)]
            if typed.startswith("-") and "{text}" in line:
                continue  # an option, and a usage error of click's own words
            for char in spoken(place, words).replace("\n", ""):
                assert unicodedata.category(char) not in OBEYED, (line, char)


# -- times ----------------------------------------------------------------------------------

NOW = datetime(2026, 11, 24, 12, 30, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("words", "moment"),
    [
        ("now", NOW),
        ("today", datetime(2026, 11, 23, 23, tzinfo=UTC)),
        ("yesterday", datetime(2026, 11, 22, 23, tzinfo=UTC)),
        ("@1764000000", datetime(2025, 11, 24, 16, tzinfo=UTC)),
        ("2026-11-24", datetime(2026, 11, 23, 23, tzinfo=UTC)),
        ("2026-11-24T07:26:36+01:00", datetime(2026, 11, 24, 6, 26, 36, tzinfo=UTC)),
        ("2026-07-01T12:00", datetime(2026, 7, 1, 10, tzinfo=UTC)),
        ("90s", NOW - timedelta(seconds=90)),
        ("1h30m", NOW - timedelta(minutes=90)),
        ("1w", NOW - timedelta(days=7)),
        ("2 hours ago", NOW - timedelta(hours=2)),
        ("1 day ago", NOW - timedelta(days=1)),
    ],
)
def test_times_are_read_as_people_type_them(words: str, moment: datetime) -> None:
    """In the zone of the machine where they name none."""
    assert times.read_time(words, now=NOW, zone=BERLIN) == (moment, "")


@pytest.mark.parametrize(
    "words",
    ["", "soon", "yesterdayy", "12", "2026-13-01", "2026-02-30", "25:00", "--5m", "7:5", "5 m",
     "1h 30m", "2 fortnights ago", "@", "@x", "@1e400", "tomorrow", "2026-11-24T99:00"],
)  # fmt: skip
def test_what_is_no_time_is_refused_with_examples(words: str) -> None:
    """Never guessed."""
    with pytest.raises(times.TimeError, match=r"a (time|duration) is: "):
        times.read_time(words, now=NOW, zone=BERLIN)


def test_today_begins_with_its_first_moment_where_midnight_is_skipped() -> None:
    """In Santiago the clock goes from 24:00 to 01:00."""
    zone, noon = ZoneInfo("America/Santiago"), datetime(2026, 9, 6, 15, tzinfo=UTC)
    first = datetime(2026, 9, 6, 4, tzinfo=UTC)
    assert times.read_time("today", now=noon, zone=zone) == (first, "")
    assert times.read_time("yesterday", now=noon + timedelta(days=1), zone=zone) == (first, "")


def test_local_time_that_a_clock_change_skips_or_repeats() -> None:
    """The skipped one is refused, of the repeated one the earlier is taken, and said."""
    with pytest.raises(times.TimeError, match="does not exist"):
        times.read_time("2026-03-29T02:30", now=NOW, zone=BERLIN)
    moment, said = times.read_time("2026-10-25T02:30", now=NOW, zone=BERLIN)
    assert moment == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    assert "came twice" in said


def test_time_from_before_a_change_of_the_clock_bears_its_own_offset() -> None:
    """The header's is that of now."""
    winter, summer = datetime(2026, 1, 15, 12, tzinfo=UTC), datetime(2026, 7, 15, 12, tzinfo=UTC)
    code = (
        "import sys; from datetime import datetime; from crewlog_cli.shell import Shell\n"
        "sh = Shell()\n"
        "for word in sys.argv[1:]: print(sh.when(datetime.fromisoformat(word)), sh.offset())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, winter.isoformat(), summer.isoformat()],
        check=True, capture_output=True, text=True, env={**os.environ, "TZ": "Europe/Berlin"},
    )  # fmt: skip
    rows = {row.rpartition(" ")[0] for row in done.stdout.splitlines()}
    now = done.stdout.split()[-1]
    other = {"+01:00": "2026-07-15 14:00:00 +02:00", "+02:00": "2026-01-15 13:00:00 +01:00"}
    same = {"+01:00": "2026-01-15 13:00:00", "+02:00": "2026-07-15 14:00:00"}
    assert rows == {other[now], same[now]}


def test_tables_are_local_with_the_offset_in_the_header(cli: Cli, reg: Registry) -> None:
    """And UTC on request; JSON is UTC always."""
    reg.register("a")
    env = {"TZ": "Asia/Kolkata", "PATH": os.environ["PATH"]}
    assert "STARTED (+05:30)" in cli("ls", "--absolute", env=env).stdout
    assert "STARTED (UTC)" in cli("ls", "--utc", "-o", "wide", env=env).stdout
    (row,) = json.loads(cli("ls", "--json", env=env).stdout)["workers"]
    assert row["created_at"].endswith("Z")


# -- questions and tables -------------------------------------------------------------------


def test_questions_are_asked_only_on_a_terminal(cli: Cli, reg: Registry, crew: Crew) -> None:
    """Without one, `stop --all` wants --yes, and nobody is stopped."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    assert "--yes" in cli("stop", "--all", code=2).stderr
    assert worker.poll() is None


def test_tables_are_straight_and_never_clipped_in_a_pipe(cli: Cli, reg: Registry) -> None:
    """Wide characters count twice; columns begin where the header does."""
    reg.register("a", version="1.0", labels={"名前": "値" * 60, "z": "é"})
    reg.register("b", version="2.0")
    header, *rows = cli("ls").stdout.splitlines()
    at = header.index("VERSION")
    assert [row[at : at + 3] for row in rows] == ["1.0", "2.0"]
    assert "…" not in rows[0]


def test_every_command_is_named_by_help_and_alone() -> None:
    """The list of commands is the list of commands."""
    done = io.StringIO()
    with contextlib.redirect_stdout(done):
        main.run(["--help"])
    for name in main.COMMANDS:
        assert f"  {name} " in done.getvalue()
