"""Show the living workers as they come, work and go; a screen of its own that is always left."""

import contextlib
import itertools
import os
import re
import select
import shlex
import signal
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Final, Self

import click

from crewlog import Liveness, host
from crewlog.errors import CrewlogError, Unsupported
from crewlog.model import figures
from crewlog.model.events import Event, Worker
from crewlog.model.figures import Usage
from crewlog.registry import Registry
from crewlog.watch.watch import Watch
from crewlog_cli import answers, inputs, render, text
from crewlog_cli.shell import Shell, command
from crewlog_cli.story import Story
from crewlog_cli.text import Column

if TYPE_CHECKING:
    from rich.console import ConsoleDimensions, Group, RenderableType

_KEY_LOOK_S: Final = 0.1
_HISTORY: Final = 40  # points of the sparkline
_USED_MAX: Final = 1000  # more workers than these are not asked what they use
_BARS: Final = " ▁▂▃▄▅▆▇█"
_SORTS: Final = {"cpu": "c", "mem": "m", "age": "a", "sid": "i"}
_UP: Final = ("k", "\x1b[A", "\x1bOA")
_DOWN: Final = ("j", "\x1b[B", "\x1bOB")
_PAGES: Final = {"\x1b[5~": -1, "\x1b[6~": 1, "\x02": -1, "\x06": 1}
_ENDS: Final = {"g": 0, "\x1b[H": 0, "G": -1, "\x1b[F": -1}
_LEAVE: Final = ("\x1b", "\r", "\n", "q")
_KEY: Final = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Z])|.", re.DOTALL)
_HEAD_ROWS: Final = 3
_STORY: Final = 20  # events of the worker that is looked at
_CHANGES_MAX: Final = 100_000
_LATE_EVENTS: Final = 1000


@dataclass(slots=True)
class _Row:
    worker: Worker
    liveness: Liveness
    cpu: float | None = None  # share of one processor since the last look
    rss_bytes: int | None = None


@dataclass(slots=True)
class _Top:
    """What is known between two pictures: of the workers, and of what a person looks at."""

    reg: Registry
    sort: str
    chosen: str = ""  # the sid of the row that is marked
    filter: str = ""
    types: bool = False  # what is typed goes to the filter
    detail: str = ""  # the sid of the worker that is looked at closely
    asked: str = ""  # the sid of the worker that is to be stopped, if the answer is yes
    said: str = ""  # what came of it
    population: deque[int] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    used: dict[str, tuple[float, Usage]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    last: dict[str, Event] = field(default_factory=dict)

    def look(self, *, measure: bool) -> list[_Row]:
        """Judge every worker that is listed, and measure it now and then."""
        workers = [w for w in self.reg.workers() if self._matches(w)]
        rows = [_Row(*pair) for pair in zip(workers, self.reg.judge(workers), strict=True)]
        if measure:
            self._measure(rows if len(rows) <= _USED_MAX else [])
            self.population.append(sum(row.liveness.alive for row in rows))
            living = {worker.sid for worker in workers}
            self.last = {sid: event for sid, event in self.last.items() if sid in living}
        for row in rows:
            row.cpu = self.shares.get(row.worker.sid)
            if row.worker.sid in self.used:
                row.rss_bytes = self.used[row.worker.sid][1].rss_bytes
        rows.sort(key=self._key)
        return rows

    def _matches(self, worker: Worker) -> bool:
        labels = (f"{key}={value}" for key, value in worker.labels.items())
        words = (worker.sid, worker.state.value, str(worker.pid), *labels)
        return all(any(part in word for word in words) for part in self.filter.split())

    def _measure(self, rows: Sequence[_Row]) -> None:
        before, self.used, self.shares = self.used, {}, {}
        for row in rows:
            sid = row.worker.sid
            usage = self.reg.usage(row.worker) if row.liveness.alive else None
            if usage is None:
                continue
            now = time.monotonic()
            self.used[sid] = now, usage
            then, old = before.get(sid, (now, usage))
            if now > then and usage.cpu_s >= old.cpu_s:
                self.shares[sid] = (usage.cpu_s - old.cpu_s) / (now - then)

    def _key(self, row: _Row) -> tuple[float, str]:
        match self.sort:
            case "cpu":
                return -(row.cpu or 0.0), row.worker.sid
            case "mem":
                return -(row.rss_bytes or 0), row.worker.sid
            case "age":
                return row.worker.created_at.timestamp(), row.worker.sid
            case _:
                return 0.0, row.worker.sid


@command("top", examples="crewlog top\ncrewlog top --sort mem --interval 5s")
@click.option("--interval", default="1s", show_default=True, metavar="SPAN",
              help="Measure this often; changes show at once.")  # fmt: skip
@click.option("--sort", type=click.Choice(list(_SORTS)), default="cpu", show_default=True,
              help="Sort by this.")  # fmt: skip
def top(sh: Shell, *, interval: str, sort: str) -> None:
    """Watch the living workers: state, age, processor, memory, last event.

    Keys: arrows or j and k move, Enter shows why and what happened, / filters by id, label, state
    or pid, s sorts by the next (c m a i: by processor, memory, age, id), x stops, q quits.
    """
    every_s = inputs.span_s(interval)
    if every_s < _KEY_LOOK_S:
        message = f"--interval is at least {_KEY_LOOK_S:g}s"
        raise click.UsageError(message)
    able = os.environ.get("TERM", "dumb") != "dumb"
    if not (able and sys.stdin.isatty() and sys.stdout.isatty()) or sh.json:
        message = "top needs a terminal; for programs there are `ls --json` and `watch --json`"
        raise click.UsageError(message)
    _require_rich()
    reg = sh.existing()
    state = _Top(reg, sort)
    with reg.watch(after="now") as items, _Keys() as keys, contextlib.suppress(KeyboardInterrupt):
        for event in itertools.islice(reg.history(newest_first=True), _LATE_EVENTS):
            state.last.setdefault(event.sid, event)  # what comes from now on, the watch brings
        _run(sh, state, items, keys, every_s)


def _require_rich() -> None:
    try:
        import rich  # noqa: F401, PLC0415 (an extra)
    except ImportError as error:
        raise Unsupported(
            "top needs rich",
            where="crewlog top",
            why="it is not installed",
            remedy="Run: pip install rich (the extra [tui] of crewlog)",
        ) from error


class _Keys:
    """Keys as they are pressed; the terminal is given back as it was, whatever ends us."""

    _SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)

    def __enter__(self) -> Self:
        """Take keys one by one, and let signals end us in order."""
        self.stopping = False
        self._fd = sys.stdin.fileno()
        self._saved = termios.tcgetattr(self._fd)
        self._handlers = {number: signal.getsignal(number) for number in self._SIGNALS}
        for number in self._SIGNALS:
            signal.signal(number, self._on_signal)
        tty.setcbreak(self._fd)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the terminal back."""
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGTSTP:
            self.stopping = True
        else:
            raise SystemExit(128 + number)

    def pressed(self) -> str:
        """Return what was pressed since the last look."""
        ready, _, _ = select.select([self._fd], [], [], 0)
        return os.read(self._fd, 64).decode(errors="replace") if ready else ""

    def stop(self) -> None:
        """Stop as Ctrl-Z asked, with the terminal as it was, and go on when we are continued."""
        self.stopping = False
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
        os.kill(os.getpid(), signal.SIGSTOP)
        tty.setcbreak(self._fd)


def _run(sh: Shell, state: _Top, items: Watch, keys: _Keys, every_s: float) -> None:
    from rich.console import Console  # noqa: PLC0415 (an extra)
    from rich.live import Live  # noqa: PLC0415

    console = Console(highlight=False, markup=False, emoji=False, no_color=not sh.colours())
    due = time.monotonic()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            now = time.monotonic()
            rows = state.look(measure=now >= due)
            due = now + every_s if now >= due else due
            live.update(_picture(sh, state, rows, console.size), refresh=True)
            while not _changed(state, items) and time.monotonic() < due:
                pressed = _KEY.findall(keys.pressed())
                for key in pressed:
                    if not _obey(state, rows, key, console.size.height):
                        return
                if pressed:
                    break
                if keys.stopping:
                    live.stop()
                    keys.stop()
                    live.start()
                    break


def _obey(state: _Top, rows: Sequence[_Row], key: str, height: int) -> bool:
    """Do what a key asks for; False to quit."""
    if state.types:
        _type(state, key)
    elif state.asked:
        _answer(state, key)
    elif state.detail:
        state.detail = "" if key in _LEAVE else state.detail
    elif key == "q":
        return False
    elif key == "/":
        state.types = True
    elif key == "\x1b":
        state.filter = ""
    elif key == "s":
        names = list(_SORTS)
        state.sort = names[(names.index(state.sort) + 1) % len(names)]
    elif key in _SORTS.values():
        state.sort = next(name for name, letter in _SORTS.items() if letter == key)
    elif rows:
        _move(state, rows, key, height)
    return True


def _type(state: _Top, key: str) -> None:
    """Take a key for the filter."""
    if key in {"\r", "\n", "\x1b"}:
        state.types = False
        state.filter = "" if key == "\x1b" else state.filter
    elif key in {"\x7f", "\x08"}:
        state.filter = state.filter[:-1]
    elif key.isprintable():
        state.filter += key


def _answer(state: _Top, key: str) -> None:
    """Stop the worker that was asked for, if the answer is yes; its end shows when it has come."""
    sid, state.asked = state.asked, ""
    state.said = f"{sid} was not stopped"
    if key not in {"y", "Y"}:
        return
    state.said = f"{sid} was asked to stop"

    def stop() -> None:
        try:
            state.reg.stop(sid, reason="crewlog top")
        except CrewlogError as error:
            state.said = str(error)

    host.start_thread(stop, name="crewlog-top-stop")


def _move(state: _Top, rows: Sequence[_Row], key: str, height: int) -> None:
    """Move the mark, or act on the worker that it stands at."""
    at = _marked(state, rows)
    page = max(1, height - _HEAD_ROWS - 1)
    if key in _UP:
        at -= 1
    elif key in _DOWN:
        at += 1
    elif key in _PAGES:
        at += _PAGES[key] * page
    elif key in _ENDS:
        at = _ENDS[key] % len(rows)
    elif key in {"\r", "\n"}:
        state.detail = rows[at].worker.sid
    elif key == "x":
        state.asked = rows[at].worker.sid
    state.chosen = rows[max(0, min(at, len(rows) - 1))].worker.sid


def _marked(state: _Top, rows: Sequence[_Row]) -> int:
    """Return the row that is marked; the first where its worker has gone."""
    return next((n for n, row in enumerate(rows) if row.worker.sid == state.chosen), 0)


def _changed(state: _Top, items: Watch) -> bool:
    """Wait a moment for changes, and take all that are there."""
    item, taken = items.next(_KEY_LOOK_S), 0
    while item is not None:
        taken += 1
        if item.kind == "change":
            state.last[item.sid] = item.event
        if taken >= _CHANGES_MAX:
            break
        item = items.next(0)
    return taken > 0


def _picture(sh: Shell, state: _Top, rows: Sequence[_Row], size: "ConsoleDimensions") -> "Group":
    from rich.console import Group  # noqa: PLC0415 (an extra)
    from rich.text import Text  # noqa: PLC0415

    alive = sum(row.liveness.alive for row in rows)
    title = f"crewlog top  {state.reg.where}  seq {state.reg.last_seq}"
    counts = f"{alive} alive, {len(rows) - alive} dead or unknown  {_spark(state.population)}"
    at, room = _marked(state, rows), max(1, size.height - _HEAD_ROWS - 1)
    first = max(0, min(at - room // 2, len(rows) - room))
    shown = rows[first : first + room]
    hidden = len(rows) - len(shown)
    more = f"  {hidden} more" if hidden else ""
    if state.types or state.filter:
        more += f"  filter: {state.filter}{'_' if state.types else ''}"
    body = _detail(sh, state) if state.detail else _table(sh, state, shown, size.width)
    return Group(
        Text(text.visible(title), style="bold", no_wrap=True, overflow="ellipsis"),
        Text(text.visible(f"{counts}  by {state.sort}{more}"), no_wrap=True, overflow="ellipsis"),
        Text(text.visible(_prompt(state)), style="dim", no_wrap=True, overflow="ellipsis"),
        body,
    )


def _prompt(state: _Top) -> str:
    if state.asked:
        return f"Stop {state.asked}? y stops it, any other key does not"
    if state.types:
        return "Type a filter; Enter keeps it, Esc drops it"
    if state.detail:
        return "Esc goes back"
    if state.said:
        return state.said
    return "q quit  Enter why  / filter  s sort  x stop  c m a i"


def _table(sh: Shell, state: _Top, shown: Sequence[_Row], width: int) -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415 (an extra)
    from rich.text import Text  # noqa: PLC0415

    now = datetime.now(UTC)
    heads = [
        Column("sid", shrinks_to=12), Column("status"), Column("pid", 5),
        Column("age", 8), Column("cpu", 7), Column("mem", 7), Column("last event", 3),
    ]  # fmt: skip
    recorded = any(row.worker.argv for row in shown)  # only who asked for it has its words there
    if recorded:
        heads.append(Column("command", 4, shrinks_to=20))
    rows = []
    for row in shown:
        worker, event = row.worker, state.last.get(row.worker.sid)
        rows.append(
            [
                worker.sid,
                render.status_text(worker, row.liveness, now),
                str(worker.pid),
                figures.brief(now - worker.created_at),
                "-" if row.cpu is None else f"{row.cpu:.0%}",
                "-" if row.rss_bytes is None else figures.size(row.rss_bytes),
                "" if event is None else f"{sh.when(event.ts)[11:19]} {event.type}",
                *([shlex.join(worker.argv or ())] if recorded else []),
            ]
        )
    head, *lines = text.table(heads, rows, columns=width)
    at = _marked(state, shown)
    styled = [Text(head, style="bold", no_wrap=True)]
    for number, (row, line) in enumerate(zip(shown, lines, strict=True)):
        style = "" if row.liveness.alive else "red" if row.liveness.dead else "yellow"
        mark = " reverse" if number == at and state.chosen else ""
        styled.append(Text(line, style=(style + mark).strip(), no_wrap=True))
    return Group(*styled)


def _detail(sh: Shell, state: _Top) -> "RenderableType":
    """Tell why a worker counts as it does, and what happened to it."""
    from rich.text import Text  # noqa: PLC0415 (an extra)

    worker = state.reg.get(state.detail)
    if worker is None:
        return Text(text.visible(f"{state.detail} is no longer listed"))
    liveness = state.reg.liveness(worker.sid)
    why = f"{worker.sid} is {liveness.verdict.value}: {answers.because(liveness.cause)}."
    rows = [why, *filter(None, (render.end_text(worker),)), ""]
    story = Story(sh).lines(answers.story_of(state.reg, worker.sid)[-_STORY:])
    return Text("\n".join([*map(text.visible, rows), *story]), no_wrap=True, overflow="ellipsis")


def _spark(population: Sequence[int]) -> str:
    """Draw the population of late, the newest last."""
    most = max(population, default=0) or 1
    return "".join(_BARS[round(count / most * (len(_BARS) - 1))] for count in population)


COMMANDS: Final[dict[str, click.Command]] = {"top": top}
