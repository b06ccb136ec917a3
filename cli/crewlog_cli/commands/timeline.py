"""Draw which worker lived when, and how it ended: in the terminal, or as a page."""

import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import click

from crewlog import Verdict
from crewlog.model import figures
from crewlog.model.choice import LabelTest
from crewlog.model.events import WorkerState, timestamp
from crewlog.model.lives import Life
from crewlog.registry import Registry
from crewlog_cli import choose, inputs, output, shell, text
from crewlog_cli.choose import Chosen
from crewlog_cli.pages import page
from crewlog_cli.pages.stories import stories
from crewlog_cli.shell import Shell, command
from crewlog_cli.story import Story

_COLUMNS: Final = 72  # where there is no terminal
_ROWS: Final = 40
_SURE, _SOMEWHERE, _NOTHING = "█", "░", " "
_MARKS: Final = {
    None: ">",
    WorkerState.EXITED: "|",
    WorkerState.FAILED: "x",
    WorkerState.LOST: "?",
    WorkerState.RELEASED: "|",
}
_LEGEND: Final = "█ lived  ░ died in here, or not known  > alive  | ended  x crashed  ? lost"


@command(
    "timeline",
    examples="""crewlog timeline
crewlog timeline -S 2d 'web-*' -l role=web
crewlog timeline --html timeline.html && xdg-open timeline.html""",
)
@click.option("--html", "html", metavar="FILE",
              help="Write a page that needs no network; - is stdout.")  # fmt: skip
@inputs.with_period
@choose.with_names
@click.option("--sid", "sids", multiple=True, shell_complete=shell.complete_sid,
              help="Only this worker; repeatable.")  # fmt: skip
@click.option("-n", "count", type=click.IntRange(min=1), default=_ROWS, show_default=True,
              help="Show the newest N workers in the terminal.")  # fmt: skip
def timeline(
    sh: Shell,
    *,
    html: str | None,
    since: str | None,
    until: str | None,
    names: tuple[str, ...],
    labels: tuple[LabelTest, ...],
    sids: tuple[str, ...],
    count: int,
) -> None:
    """Show which worker lived when, and how it ended.

    A bar is solid to the last proof of life; a lost worker died somewhere in the hatched part.
    """
    if html == "-" and sh.json:
        message = "--html - and --json both want stdout"
        raise click.UsageError(message)
    first, last = inputs.period(sh, since, until)
    reg = sh.existing()
    chosen = Chosen((*names, *sids), labels)
    meant = chosen.sids(reg, required=names)
    with output.progress("reading") as progress:
        lives = reg.lives(progress=progress)
    now = datetime.now(UTC)
    lives = [
        life
        for life in lives
        if (meant is None or life.sid in meant)
        and (first is None or (life.ended_at or now) >= first)
        and (last is None or life.began_at < last)
    ]
    unknown = _judge(reg, lives, now)
    if html is not None:
        made = page.page(
            lives,
            unknown=unknown,
            now=now,
            caption=f"{reg.where}, up to seq {reg.last_seq}.",
            stories=stories(reg.history(sids=meant), Story(sh)),
        )
        _write(sh, made, len(lives), html)
    elif sh.json:
        sh.document({"seq": reg.last_seq, "at": timestamp(now), "lives": _json(lives, unknown)})
    else:
        _draw(sh, lives, unknown, first, now, count)


def _judge(reg: Registry, lives: Sequence[Life], now: datetime) -> frozenset[int]:
    """Bring the lives that go on up to now; return the places of those nobody can judge."""
    places = {life.seq: index for index, life in enumerate(lives)}
    unknown = set()
    workers = [worker for worker in reg.workers() if worker.registered_seq in places]
    for worker, liveness in zip(workers, reg.judge(workers), strict=True):
        index = places[worker.registered_seq]
        life = lives[index]
        match liveness.verdict:
            case Verdict.ALIVE:
                life.seen_at = now
            case Verdict.DEAD:
                life.ended_at, life.end, life.cause = now, WorkerState.LOST, liveness.cause
            case _:
                unknown.add(index)
    return frozenset(unknown)


def _json(lives: Sequence[Life], unknown: frozenset[int]) -> list[dict[str, object]]:
    return [
        {
            "sid": life.sid,
            "generation": life.generation,
            "pid": life.pid,
            "version": life.version,
            "seq": life.seq,
            "began_at": timestamp(life.began_at),
            "seen_at": timestamp(life.seen_at),
            "ended_at": None if life.ended_at is None else timestamp(life.ended_at),
            "end": "unknown" if index in unknown else life.end.value if life.end else None,
            "code": life.code,
            "signal": life.signal,
            "cause": life.cause,
            "proven_s": life.proven.total_seconds(),
        }
        for index, life in enumerate(lives)
    ]


def _write(sh: Shell, made: bytes, count: int, html: str) -> None:
    if html == "-":
        output.put(made.decode())
        return
    path = Path(html)
    output.put_file(path, made, what="the page", option="--html")
    if sh.json:
        sh.document({"html": str(path), "lives": count, "bytes": len(made)})
    else:
        sh.note(f"{count} lives, {figures.size(len(made))}: {path}")


# -- in the terminal ------------------------------------------------------------------------


def _draw(
    sh: Shell,
    lives: Sequence[Life],
    unknown: frozenset[int],
    first: datetime | None,
    now: datetime,
    count: int,
) -> None:
    rows: dict[str, list[tuple[Life, bool]]] = defaultdict(list)
    for index, life in enumerate(lives):
        rows[life.sid].append((life, index in unknown))
    if not rows:
        sh.note("no worker lived then")
        return
    newest = sorted(rows, key=lambda sid: rows[sid][-1][0].seq)[-count:]
    shown = [sid for sid in rows if sid in newest]
    begin = min(life.began_at for sid in shown for life, _ in rows[sid])
    begin = begin if first is None else max(begin, first)
    label = min(text.SID_COLUMNS, max(text.width(text.visible(sid)) for sid in shown))
    whole = (os.get_terminal_size().columns if sys.stdout.isatty() else 0) or _COLUMNS
    columns = max(20, whole - label - 3)
    span = max(now - begin, timedelta(seconds=1))
    left, right = sh.when(begin), f"{sh.when(now)} {sh.offset()}"
    sh.line(f"{'':<{label}}  {left}{right:>{columns - len(left)}}")
    for sid in shown:
        name = text.clip(text.visible(sid), label)
        bar = _bar(rows[sid], begin, span, columns, now)
        output.put(f"{name}{' ' * (label - text.width(name))}  {bar}".rstrip())
    hidden = len(rows) - len(shown)
    sh.note(_LEGEND + (f"; {hidden} older workers not shown (-n)" if hidden else ""))


def _bar(
    lives: Iterable[tuple[Life, bool]],
    begin: datetime,
    span: timedelta,
    columns: int,
    now: datetime,
) -> str:
    cells = [_NOTHING] * (columns + 1)
    marks: dict[int, str] = {}  # they stand over the bar of who was started again at once

    def place(when: datetime) -> int:
        return min(columns - 1, max(0, int((when - begin) / span * columns)))

    for life, unknown in lives:
        end = life.ended_at or now
        if end < begin:
            continue
        unseen = unknown or life.end == WorkerState.LOST
        low, high = place(life.began_at), place(end)
        known = place(life.seen_at) if unseen else high
        for column in range(low, high + 1):
            cells[column] = _SURE if column <= known else _SOMEWHERE
        marks[high + 1 if high > low else high] = "?" if unknown else _MARKS[life.end]
    for column, mark in marks.items():
        cells[column] = mark
    return "".join(cells).rstrip()


COMMANDS: Final[dict[str, click.Command]] = {"timeline": timeline}
