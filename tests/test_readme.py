"""The README is true: its commands exist, its code runs, its files and tests are there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import crewlog
from crewlog.local import layout
from crewlog.process.liveness import Evidence
from crewlog_cli.main import COMMANDS
from crewlog_compactor import compact

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def blocks(language: str) -> list[str]:
    return [code for name, code in BLOCKS if name == language]


# What differs from run to run: times, pids, and who ran it.
VARYING = (
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "TIME"),
    (re.compile(r"\w+@crewlog\[\d+\]"), "WHO"),
    (re.compile(r"pid \d+|(?<=ready   )\d{2,}"), "PID"),
    (re.compile(r"\b\d+s\b|\b\d+ seconds?\b"), "AGE"),
    (re.compile(r"(?: +|-{2,})"), " "),
)


def plain(words: str) -> list[str]:
    """Return rows with placeholders for what varies."""
    for pattern, instead in VARYING:
        words = pattern.sub(instead, words)
    return [row.rstrip() for row in words.splitlines()]


def test_session_in_the_shell_prints_what_it_says(place: Path) -> None:
    """Each command of the console block, one after the other, with its output."""
    (session,) = blocks("console")
    script, said = [], []
    for row in session.splitlines():
        if row.startswith("$ "):
            wait = ""
            if row.endswith("&"):
                wait = "until pgrep -f '^sleep 601' >/dev/null; do sleep 0.1; done; sleep 0.3"
            elif "kill" in row:
                wait = "until crewlog -q history web-1 | grep -q crashed; do sleep 0.1; done"
            script.append(row[2:].replace("sleep 600", "sleep 601") + "\n" + wait)
        else:
            said.append(row)
    env = {**os.environ, "CREWLOG_DIR": str(place), "TZ": "UTC",
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], check=True, capture_output=True, text=True, env=env
    )
    assert plain(done.stdout) == plain("\n".join(said)), done.stderr


def test_python_prints_what_it_says(place: Path) -> None:
    """The block, and its output behind it."""
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[0]],
        check=True, capture_output=True, text=True, env={**os.environ, "CREWLOG_DIR": str(place)},
    )  # fmt: skip
    assert done.stdout == blocks("text")[0]


def test_readme_is_short() -> None:
    """A newcomer reads it to the end."""
    assert len(README.split()) <= 900


def test_guide_names_every_verb_of_a_registry() -> None:
    """And no registry offers what it does not name; asyncio has the same verbs."""
    table = (ROOT / "docs/guide.md").read_text().split("## All of it")[1].split("##")[0]
    offered = {name for name in dir(crewlog.Registry) if not name.startswith("_")}
    assert offered == set(re.findall(r"`(\w+)`", table)) - {"with"}
    plain = {"where", "path", "exists", "close", "awatch", "subscribe", "mirror", "usage"}
    tools = {"place", "id", "first_seq", "cursors", "sizes", "store", "author", "commit", "change"}
    tools |= {"become", "logs", "stop_left_behind", "runs"}
    plain |= tools | {"child", "foresee_stop", "unit_workers_max"}
    assert offered - plain <= set(dir(crewlog.AsyncRegistry))


def test_audit_explains_every_piece_of_evidence() -> None:
    """Whatever `explain` may show has its line."""
    page = (ROOT / "docs/audit.md").read_text()
    assert {name for name in Evidence._fields if f"`{name}`" not in page} == set()


def test_make_targets_and_named_files_exist() -> None:
    """Make demo, make test and every path that is named."""
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\((\w+/[\w/.]+)\)|`(tests/[\w/.]+)`", README):
        assert (ROOT / "".join(path)).exists(), path


def test_exit_codes_named_are_those_of_the_errors() -> None:
    """Each error's exit code stands in the docs, and each 6x and 7x there is one of an error."""
    page = (ROOT / "docs/commands.md").read_text()
    section = page.split("## Exit codes")[1]
    named = {int(code) for code in re.findall(r"\b(\d{1,3}) [a-z\"]", section)}
    used = {
        kind.exit_code
        for kind in vars(crewlog.errors).values()
        if isinstance(kind, type) and issubclass(kind, crewlog.CrewlogError)
    }
    assert used <= named
    assert {code for code in named if 65 <= code <= 78} <= used


def test_files_section_names_what_a_store_holds(place: Path) -> None:
    """A store that was used and compacted holds the files that the docs list, and no others."""
    with crewlog.open(place) as reg:
        for number in range(3):
            reg.register(f"w-{number}")
            compact(reg, gc=False)
    section = (ROOT / "docs/protocol.md").read_text().split("## The files")[1].split("##")[0]
    for path in place.iterdir():
        assert path.name in section, path
    assert layout.QUARANTINE in section


PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def page_blocks(name: str) -> list[tuple[str, str]]:
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)


@pytest.mark.parametrize("name", PAGES)
def test_python_of_a_page_runs_and_prints_what_it_says(name: str, tmp_path: Path) -> None:
    """Each block by itself, in a registry of its own; a text block behind it is its output."""
    pieces = page_blocks(name)
    for index, (language, code) in enumerate(pieces):
        if language != "python":
            continue
        env = {**os.environ, "CREWLOG_DIR": str(tmp_path / str(index))}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
        )
        assert done.returncode == 0, done.stderr
        if index + 1 < len(pieces) and pieces[index + 1][0] == "text":
            assert done.stdout == pieces[index + 1][1]


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_a_page_exist(name: str) -> None:
    """Every `crewlog …` line parses, up to its program."""
    for row in [r for lang, code in page_blocks(name) if lang == "sh" for r in code.splitlines()]:
        _parses(row)


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_exist(name: str) -> None:
    """Links, and tests by their path."""
    text = (ROOT / "docs" / name).read_text()
    for path in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / "docs" / path).exists(), path
    for path in re.findall(r"`(tests/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


def _parses(row: str) -> None:
    from click.testing import CliRunner

    from crewlog_cli.main import crewlog as group
    from crewlog_cli.shell import Shell

    words = shlex.split(row.split(" #", maxsplit=1)[0].rstrip(" &"))
    assert words[0] == "crewlog"
    own = words[1 : words.index("--")] if "--" in words else words[1:]
    assert {*own} & {*COMMANDS}, row
    result = CliRunner().invoke(group, [*own, "--help"], obj=Shell())
    assert result.exit_code == 0, row
