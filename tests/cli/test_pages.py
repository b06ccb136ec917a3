"""Pages as a person sees them at 60, 80 and 120 columns, kept in golden/ to be looked at.

To write them anew: GOLDEN_PAGES=write pytest tests/cli/test_pages.py
"""

import contextlib
import io
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import pytest

import crewlog
from crewlog import host
from crewlog.model.events import Identity, Worker
from crewlog.model.steps import Author
from crewlog.process import identity
from crewlog.process.liveness import Evidence, Flag, Liveness, Verdict
from crewlog.registry import Registry
from crewlog.session import Session
from crewlog_cli import main, output, render, text
from crewlog_cli.commands import look, ls

GOLDEN = Path(__file__).parent / "golden"
BEGAN = datetime(2026, 3, 4, 23, 50, 0, tzinfo=UTC)
NOW = BEGAN + timedelta(hours=1)
BOOT = "11111111-2222-3333-4444-555555555555"
WIDTHS = (60, 80, 120)
PAGES = {
    "help": ("--help",),
    "ls": ("ls",),
    "ls-a": ("ls", "-a"),
    "ls-wide": ("ls", "-o", "wide"),
    "history": ("history",),
    "show": ("show", "job-7"),
    "explain": ("explain", "web-1"),
    "stats": ("stats",),
    "diff": ("diff", "--from", "4"),
}


class _Now(datetime):
    """The clock of the pages."""

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return NOW


def _who(pid: int | None = None) -> Identity:
    return Identity(
        pid=pid or 77, pidfd_id=9000 + (pid or 77), start_ticks=100, boot_id=BOOT,
        pid_ns="4026531836:1", host_id="ab" * 16, uid=1000,
    )  # fmt: skip


def _judged(worker: Worker) -> Liveness:
    here = Evidence(platform="linux", boot_id=BOOT, host_id="ab" * 16, pid_ns="4026531836:1")
    if worker.final:
        return Liveness(verdict=Verdict.DEAD, cause="recorded", evidence=here, flags=frozenset())
    if worker.sid == "batch-of-the-night":
        return Liveness(
            verdict=Verdict.UNKNOWN, cause="foreign_host", evidence=here, flags=frozenset()
        )
    flags = frozenset({Flag.PAUSED} if worker.sid == "web-2" else set())
    return Liveness(verdict=Verdict.ALIVE, cause="identity", evidence=here, flags=flags)


class Scene:
    """A store whose every time, pid and author is fixed."""

    AUTHORS: ClassVar = {"ann": ("ann", "deploy"), "cron": ("root", "crewlog")}

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Begin at BEGAN, as ann."""
        self.now, self.who = BEGAN, "ann"
        self.reg = crewlog.open(place)
        monkeypatch.setattr(host, "now", lambda: self.now)
        monkeypatch.setattr(identity, "look", lambda pid=None: (_who(pid), None))
        monkeypatch.setattr(Session, "author", lambda *_: Author(actor=self._actor()))

    def _actor(self) -> bytes:
        user, program = self.AUTHORS[self.who]
        return (
            f'{{"pid":4711,"uid":1000,"user":"{user}","program":"{program}","via":"cli",'
            f'"host":"here"}}'
        ).encode()

    def after(self, **span: float) -> Registry:
        """Let time pass."""
        self.now += timedelta(**span)
        return self.reg


@pytest.fixture
def scene(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Write workers in every condition."""
    job = Scene(place, monkeypatch)
    reg = job.reg
    reg.register("web-1", pid=4801, ready=True, labels={"role": "web", "tier": "a"}, version="1.4")
    job.after(seconds=2).register("web-2", pid=4802, ready=True, labels={"role": "web"})
    job.after(seconds=5).register("job-7", pid=4803, labels={"queue": "mail"}, meta={"try": 1})
    job.after(seconds=1).update("job-7", state="ready")
    job.after(minutes=12).exited("job-7", code=1, message="disk quota exceeded")
    job.after(minutes=3).register("job-7", pid=4903, ready=True, labels={"queue": "mail"})
    job.after(minutes=4).exited("job-7", signal=11)
    job.after(minutes=1).register("batch-of-the-night", pid=4950, ready=True)
    job.after(minutes=2).register("old", pid=4960, ready=True)
    job.after(minutes=1).update("old", state="stopping", reason="deploy of 1.4")
    job.after(seconds=4).exited("old", signal=15)
    job.who = "cron"
    job.after(minutes=30).register("new", pid=5001)
    for module in (ls, look):
        monkeypatch.setattr(module, "datetime", _Now)
    monkeypatch.setattr(Registry, "judge", lambda _, workers: list(map(_judged, workers)))
    monkeypatch.setattr(Registry, "liveness", lambda reg, sid: _judged(render.known(reg, sid)))
    monkeypatch.setattr(Registry, "usage", lambda *_, **__: None)
    monkeypatch.setattr(Registry, "trees", lambda *_: {})
    monkeypatch.setattr(text, "offset", lambda *_, **__: "+00:00")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("NO_COLOR", "1")
    yield job
    reg.close()


def shown(place: Path, words: tuple[str, ...], columns: int, patch: pytest.MonkeyPatch) -> str:
    """Return what a command prints on a terminal of that width."""
    out, err = io.StringIO(), io.StringIO()
    patch.setattr(output, "columns", lambda: columns)
    patch.setattr(output, "height", lambda: 0)
    patch.setattr(output, "prepare", lambda: None)
    patch.setenv("COLUMNS", str(columns))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main.run([*words[:1], "--utc", *words[1:], "--dir", str(place)]
                        if words[0] != "--help" else ["--help"]) == 0, err.getvalue()  # fmt: skip
    return "".join(f"{row}\n" for row in out.getvalue().splitlines())


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_page_is_as_it_was_looked_at(
    scene: Scene, place: Path, page: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wider than the terminal, and what the product is for is there."""
    picture = shown(place, PAGES[page], columns, monkeypatch)
    if page != "ls-wide":  # what was asked for stays, whatever it takes
        assert all(text.width(row) <= columns for row in picture.splitlines())
    held(GOLDEN / f"{page}-{columns}.txt", picture)


def held(path: Path, picture: str) -> None:
    """Hold a page against the one that was looked at, or write it anew."""
    if os.environ.get("GOLDEN_PAGES") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(picture)
    assert picture == path.read_text()


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("asked", ["", "job", "web-1"])
def test_picture_of_top_is_as_it_was_looked_at(
    scene: Scene, columns: int, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list, a filter that finds nobody, and what Enter shows."""
    rich = pytest.importorskip("rich.console")
    from crewlog_cli.commands import top
    from crewlog_cli.shell import Shell

    monkeypatch.setattr(top, "datetime", _Now)
    monkeypatch.setattr(Registry, "where", "/var/lib/crewlog")
    monkeypatch.setattr(output, "columns", lambda: columns)
    state = top._Top(scene.reg, "sid")
    state.chosen = "web-1"
    if asked == "web-1":
        state.detail = asked
    else:
        state.filter = asked
    out = io.StringIO()
    console = rich.Console(width=columns, height=14, file=out, color_system=None, highlight=False)
    rows = state.look(measure=True)
    console.print(top._picture(Shell(utc=True), state, rows, console.size))
    picture = "".join(f"{row.rstrip()}\n" for row in out.getvalue().splitlines())
    assert all(text.width(row) <= columns for row in picture.splitlines())
    held(GOLDEN / f"top{'-' + asked if asked else ''}-{columns}.txt", picture)


@pytest.mark.parametrize("columns", WIDTHS)
def test_what_the_product_is_for_is_there_at_every_width(
    scene: Scene, place: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who lives, since when; how it ended; who did it."""
    living = shown(place, ("ls", "-a"), columns, monkeypatch)
    assert "web-1" in living
    assert "AGE" in living
    assert "crashed (SIGSEGV)" in living
    picture = shown(place, ("history",), columns, monkeypatch)
    assert "crashed code 1" in picture
    assert "stopped by ann" in picture
    assert "ann@depl" in picture
    assert "-- 2026-03-05" in picture
