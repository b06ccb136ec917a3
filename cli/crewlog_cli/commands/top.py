"""Show the living workers as they come, work and go; a screen of its own that is always left."""

import contextlib
import itertools
import os
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

from crewlog import Liveness
from crewlog.errors import Unsupported
from crewlog.model import figures
from crewlog.model.events import Event, Worker
from crewlog.model.figures import Usage
from crewlog.registry import Registry
from crewlog.watch.watch import Watch
from crewlog_cli import inputs, render, text
from crewlog_cli.shell import Shell, command

if TYPE_CHECKING:
    from rich.console import Group

_KEY_LOOK_S: Final = 0.1
_HISTORY: Final = 40  # points of the sparkline
_USED_MAX: Final = 1000  # more workers than these are not asked what they use
_BARS: Final = " ▁▂▃▄▅▆▇█"
_SORTS: Final = {"cpu": "c", "mem": "m", "age": "a", "sid": "s"}
_CHANGES_MAX: Final = 100_000
_LATE_EVENTS: Final = 1000


@dataclass(slots=True)
class _Row:
    worker: Worker
    found: Liveness
    cpu: float | None = None  # share of one processor since the last look
    rss_bytes: int | None = None


@dataclass(slots=True)
class _Top:
    """What is known between two pictures."""

    reg: Registry
    sort: str
    population: deque[int] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    used: dict[str, tuple[float, Usage]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    last: dict[str, Event] = field(default_factory=dict)

    def look(self, *, measure: bool) -> list[_Row]:
        """Judge every worker that is listed, and measure it now and then."""
        workers = self.reg.workers()
        rows = [_Row(*pair) for pair in zip(workers, self.reg.judge(workers), strict=True)]
        if measure:
            self._measure(rows if len(rows) <= _USED_MAX else [])
            self.population.append(sum(row.found.alive for row in rows))
            living = {worker.sid for worker in workers}
            self.last = {sid: event for sid, event in self.last.items() if sid in living}
        for row in rows:
            row.cpu = self.shares.get(row.worker.sid)
            if row.worker.sid in self.used:
                row.rss_bytes = self.used[row.worker.sid][1].rss_bytes
        rows.sort(key=self._key)
        return rows

    def _measure(self, rows: Sequence[_Row]) -> None:
        before, self.used, self.shares = self.used, {}, {}
        for row in rows:
            sid = row.worker.sid
            found = self.reg.usage(row.worker) if row.found.alive else None
            if found is None:
                continue
            now = time.monotonic()
            self.used[sid] = now, found
            then, old = before.get(sid, (now, found))
            if now > then and found.cpu_s >= old.cpu_s:
                self.shares[sid] = (found.cpu_s - old.cpu_s) / (now - then)

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
              help="What stands first.")  # fmt: skip
def top(sh: Shell, *, interval: str, sort: str) -> None:
    """Watch the living workers: state, age, processor, memory, last event.

    Keys: q quits; c, m, a and s sort by processor, memory, age and sid.
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
    for event in itertools.islice(reg.history(newest_first=True), _LATE_EVENTS):
        state.last.setdefault(event.sid, event)
    with reg.watch(after="now") as items, _Keys() as keys, contextlib.suppress(KeyboardInterrupt):
        _run(sh, state, items, keys, every_s)


def _require_rich() -> None:
    try:
        import rich  # noqa: F401, PLC0415 (an extra)
    except ImportError as error:
        raise Unsupported(
            "top needs rich",
            where="crewlog top",
            why="it is not installed",
            remedy="Run: pip install 'crewlog[tui]'",
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
            live.update(_picture(sh, state, rows, console.size.height), refresh=True)
            while not _changed(state, items) and time.monotonic() < due:
                pressed = keys.pressed()
                if "q" in pressed:
                    return
                chosen = [name for name, key in _SORTS.items() if key in pressed]
                if chosen:
                    state.sort = chosen[-1]
                    break
                if keys.stopping:
                    live.stop()
                    keys.stop()
                    live.start()
                    break


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


def _picture(sh: Shell, state: _Top, rows: Sequence[_Row], height: int) -> "Group":
    from rich.console import Group  # noqa: PLC0415 (an extra)
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    now = datetime.now(UTC)
    alive = sum(row.found.alive for row in rows)
    told = f"crewlog top  {state.reg.where}  seq {state.reg.last_seq}"
    counts = f"{alive} alive, {len(rows) - alive} dead or unknown  {_spark(state.population)}"
    table = Table(box=None, expand=True, pad_edge=False, header_style="bold")
    for title in ("SID", "PID", "STATE", "LIVENESS"):
        table.add_column(title, no_wrap=True, overflow="ellipsis")
    for title in ("AGE", "CPU", "MEM"):
        table.add_column(title, no_wrap=True, justify="right")
    table.add_column("LAST EVENT", no_wrap=True, overflow="ellipsis", ratio=1)
    shown = rows[: max(1, height - 4)]
    recorded = any(row.worker.argv for row in shown)  # only who asked for it has its words there
    if recorded:
        table.add_column("COMMAND", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in shown:
        worker = row.worker
        event = state.last.get(worker.sid)
        cells = [
            worker.sid,
            str(worker.pid),
            worker.state.value,
            render.liveness_text(row.found),
            figures.duration(now - worker.created_at),
            "-" if row.cpu is None else f"{row.cpu:.0%}",
            "-" if row.rss_bytes is None else figures.size(row.rss_bytes),
            "" if event is None else f"{sh.when(event.ts)[11:19]} {event.type}",
            *([shlex.join(worker.argv or ())] if recorded else []),
        ]
        style = "" if row.found.alive else "red" if row.found.dead else "yellow"
        table.add_row(*(Text(text.visible(cell)) for cell in cells), style=style)
    keys = "q quit  c cpu  m mem  a age  s sid"
    hidden = max(0, len(rows) - (height - 4))
    more = f"  {hidden} more" if hidden else ""
    return Group(
        Text(text.visible(told), style="bold", no_wrap=True, overflow="ellipsis"),
        Text(f"{counts}  sorted by {state.sort}{more}  {keys}", no_wrap=True, overflow="ellipsis"),
        table,
    )


def _spark(population: Sequence[int]) -> str:
    """Draw the population of late, the newest last."""
    most = max(population, default=0) or 1
    return "".join(_BARS[round(count / most * (len(_BARS) - 1))] for count in population)


COMMANDS: Final[dict[str, click.Command]] = {"top": top}
