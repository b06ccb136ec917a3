"""The timeline: honest bars in the terminal; a page that a real browser shows and nobody abuses."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from browser import CHROMIUM, Browser
from commands import Cli
from crewlog.model.events import WorkerState
from crewlog.model.lives import Life
from crewlog.registry import Registry
from crewlog_cli.pages import page
from crewlog_compactor import collect
from procs import Crew, kill, until

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def lives(count: int, *, sid: str = "worker", version: str = "1.2") -> list[Life]:
    """Return lives of every kind, two to a sid."""
    ends = [WorkerState.EXITED, WorkerState.FAILED, WorkerState.LOST, WorkerState.RELEASED, None]
    found = []
    for number in range(count):
        end = ends[number % 5]
        began = NOW - timedelta(seconds=60 * (count - number))
        found.append(
            Life(
                sid=f"{sid}-{number // 2:05d}",
                generation=number % 2 + 1,
                pid=1000 + number,
                version=version,
                seq=number + 1,
                began_at=began,
                seen_at=NOW if end is None else began + timedelta(seconds=20),
                ended_at=None if end is None else began + timedelta(seconds=50),
                end=end,
                code=3 if end == WorkerState.FAILED else None,
                cause="no_process" if end == WorkerState.LOST else None,
            )
        )
    return found


def written(path: Path, found: list[Life], **options: object) -> Path:
    """Write a page of these lives."""
    given = {"unknown": frozenset[int](), "now": NOW, "told": "a test", **options}
    path.write_bytes(page.page(found, **given))  # type: ignore[arg-type]
    return path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """Start a browser, and end it."""
    started = Browser(tmp_path / "profile")
    yield started
    started.close()


@needs_chromium
def test_page_renders_filters_and_asks_for_nothing(tmp_path: Path, browser: Browser) -> None:
    """No console message, no request but itself; the filter narrows picture and table."""
    path = written(tmp_path / "page.html", lives(2000), unknown=frozenset({4}))
    assert path.stat().st_size <= 200 * 1024
    assert browser.open(path) < 5000
    assert browser.run("document.getElementById('count').textContent") == (
        "1000 of 1000 workers, 2000 of 2000 lives"
    )
    drawn = "document.getElementById('lives').toDataURL().length"
    whole = browser.run(drawn)
    browser.run("document.getElementById('filter').focus()")
    browser.type("worker-0001")
    assert browser.run("document.getElementById('count').textContent") == (
        "10 of 1000 workers, 20 of 2000 lives"
    )
    assert browser.run("document.getElementById('rows').children.length") == 20
    until(lambda: browser.run(drawn) != whole)  # drawn with the next frame
    browser.run("document.querySelectorAll('#kinds input')[2].click()")
    assert browser.run("document.getElementById('count').textContent") == (
        "10 of 1000 workers, 16 of 2000 lives"
    )
    assert browser.complaints == []
    assert browser.requests == [path.as_uri()]


@needs_chromium
def test_page_is_used_by_keyboard(tmp_path: Path, browser: Browser) -> None:
    """Arrow keys choose a life and tell of it; plus and minus zoom; a slash finds the filter."""
    browser.open(written(tmp_path / "page.html", lives(40)))
    browser.run("document.getElementById('frame').focus()")
    browser.press("ArrowDown")
    detail = "document.getElementById('detail').textContent"
    assert "worker-00000 1.2, pid 1000" in str(browser.run(detail))
    browser.press("ArrowDown")
    browser.press("ArrowDown")
    told = str(browser.run(detail))
    assert "worker-00001 1.2, pid 1002" in told
    assert "died between" in told, "of a loss nobody knows the moment"
    for key in ("+", "-", "0", "ArrowLeft", "End"):
        browser.press(key)
    assert "worker-00019" in str(browser.run(detail))
    browser.press("/")
    assert browser.run("document.activeElement.id") == "filter"
    assert browser.complaints == []


_HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;\u202e\x1b"
)


@needs_chromium
def test_hostile_names_are_inert(tmp_path: Path, browser: Browser) -> None:
    """Whatever a sid, a version or a cause says, it is shown as text; the page stays whole."""
    found = lives(10, sid=_HOSTILE, version=_HOSTILE)
    for life in found:
        life.cause = _HOSTILE
    path = written(tmp_path / "page.html", found, told=_HOSTILE)
    browser.open(path)
    assert browser.run("document.title") == "crewlog timeline"
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.images.length") == 0
    shown = str(browser.run("document.querySelector('#rows td').textContent"))
    assert shown.startswith("</script><script>")
    assert "\\u202e" in shown
    assert "\\x1b" in shown
    assert browser.complaints == []
    assert browser.requests == [path.as_uri()]


@needs_chromium
def test_policy_stops_a_script_that_is_not_ours(tmp_path: Path, browser: Browser) -> None:
    """The control: a page with one more script or one more request is caught."""
    path = written(tmp_path / "page.html", lives(4))
    more = "<script>document.title='owned'</script><img src='http://127.0.0.1:9/x.png'>"
    path.write_text(path.read_text().replace("<header>", more + "<header>"))
    browser.open(path)
    assert browser.run("document.title") == "crewlog timeline"
    assert browser.complaints, "the policy complains"


@needs_chromium
def test_page_of_a_hundred_thousand_lives_is_usable(tmp_path: Path, browser: Browser) -> None:
    """It draws what is in sight, and filters while one types."""
    assert browser.open(written(tmp_path / "page.html", lives(100_000))) < 15_000
    browser.run("document.getElementById('filter').focus()")
    browser.type("worker-49999")
    assert str(browser.run("document.getElementById('count').textContent")).startswith("1 of 50000")
    assert browser.complaints == []


def test_page_without_a_browser(cli: Cli, reg: Registry, tmp_path: Path) -> None:
    """Owner-only, whole or not at all; a wrong place is a usage error; an empty history a page."""
    reg.register("a", pid=os.getpid())
    reg.remove("a", reason="done")
    path = tmp_path / "page.html"
    done = cli("timeline", "--html", path)
    assert done.stdout == ""
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().count("<script") == 2
    cli("timeline", "--html", tmp_path / "nowhere" / "page.html", code=2)
    cli("timeline", "--html", tmp_path, code=2)
    assert cli.json("timeline", "--html", path)["lives"] == 1


def test_terminal_tells_how_each_ended(cli: Cli, reg: Registry, crew: Crew) -> None:
    """Alive, orderly, crashed, lost: each has its mark, and a loss its hatching."""
    dead = crew.sleeper()
    reg.register("lost", pid=dead.pid)
    kill(dead)
    reg.register("alive", pid=os.getpid())
    for sid, code in (("done", 0), ("crashed", 3)):
        reg.register(sid, pid=os.getpid())
        reg.exited(sid, code=code)
    rows = {row.split()[0]: row for row in cli("timeline").stdout.splitlines()[1:]}
    assert rows["alive"].endswith(">")
    assert rows["done"].rstrip("█ ").endswith("|")
    assert rows["crashed"].endswith("x")
    assert rows["lost"].endswith("?")
    assert "░" in rows["lost"]
    assert "░" not in rows["alive"]
    found = cli.json("timeline")["lives"]
    assert isinstance(found, list)
    assert {life["sid"]: life["end"] for life in found} == {
        "lost": "lost", "alive": None, "done": "exited", "crashed": "failed",
    }  # fmt: skip


def test_life_that_goes_on_is_not_taken_for_one_that_was_pruned(
    cli: Cli, reg: Registry, crew: Crew
) -> None:
    """Both are the first of their sid as far as the state can tell."""
    first = crew.sleeper()
    reg.register("a", pid=first.pid)
    kill(first)
    for _ in range(2):
        collect(reg, keep=timedelta(0))
    worker = reg.register("a", pid=crew.sleeper().pid)
    lives = cli.json("timeline")["lives"]
    assert isinstance(lives, list)
    old, new = lives
    assert (old["end"], new["end"], new["seq"]) == ("lost", None, worker.registered_seq)
    assert old["seen_at"] < new["began_at"] < new["seen_at"]


def test_terminal_shows_a_part(cli: Cli, reg: Registry) -> None:
    """By sid, by time, and the newest N; nothing at all is said, not drawn."""
    for number in range(5):
        reg.register(f"w{number}", pid=os.getpid())
    assert len(cli("timeline", "-n", 2).stdout.splitlines()) == 3
    assert cli("timeline", "--sid", "w3").stdout.splitlines()[1].startswith("w3")
    assert cli("timeline", "--until", "1h").stdout == ""
