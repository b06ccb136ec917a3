"""Tell events in words: what happened, to whom, by whom; a crash never reads like a stop."""

from collections.abc import Callable, Iterable
from datetime import date
from typing import Final

from crewlog.model import events
from crewlog.model.events import Event
from crewlog_cli import output, text
from crewlog_cli.render import ended_word, signal_name
from crewlog_cli.shell import Shell
from crewlog_cli.text import Column

_VALUE_CHARS: Final = 40
_ROOMY: Final = 100  # columns


def actor_text(event: Event) -> str:
    """Name who did it: a given name, else user and program; and its process, for there are many.

    On a narrow terminal the process is left out.
    """
    who = _name(event)
    if event.actor.get("user") is None or 0 < output.columns() < _ROOMY:
        return who
    return f"{who}[{event.actor.get('pid')}]"


def _name(event: Event) -> str:
    actor = event.actor
    name, user, program = actor.get("name"), actor.get("user"), actor.get("program")
    if isinstance(name, str):
        return name
    return "crewlog" if user is None else f"{user}@{program}"


class Story:
    """Events in the order in which they happened: an end is told with who had asked for it."""

    def __init__(self, shell: Shell) -> None:
        """Begin with nothing known."""
        self._shell = shell
        self._asked: dict[str, Event] = {}
        self._day: date | None = None

    def what(self, event: Event) -> str:
        """Say what happened in a few words."""
        if event.type == events.STOP_REQUESTED:
            self._asked[event.sid] = event
        elif event.type == events.REGISTERED:
            self._asked.pop(event.sid, None)
        tell = _TOLD.get(event.type)
        if tell is None:
            return " ".join(filter(None, (event.type.removeprefix("worker."), data_text(event))))
        words = self._ended(event) if event.type == events.EXITED else tell(event)
        return " ".join(filter(None, words))

    def _ended(self, event: Event) -> tuple[str, ...]:
        data, word = event.data, ended_word(event)
        number, code, error = data.get("signal"), data.get("code"), data.get("error")
        how = "" if code is None else str(code)
        if isinstance(number, int):
            how = f"signal {number} ({signal_name(number)})"
        more = (_oom(event), str(data.get("message") or ""))
        if error is not None:
            return ("crashed", f"its program did not start: {error}", *more)
        if word == "crashed":
            return (word, how if number is not None else f"code {how}", *more)
        if word == "stopped":
            asked = self._asked.pop(event.sid, None)
            by = "" if asked is None else f"by {_name(asked)}"
            why = "" if asked is None else str(asked.data.get("reason") or "")
            what = f"{word} {by}".strip() + (f": {why}" if why else "")
            how = signal_name(number) if isinstance(number, int) else how
            return (what, f"({how})" if how else "", *more)
        return (word, how, *more)

    # -- printed ----------------------------------------------------------------------------

    def tell(self, history: Iterable[Event], *, paged: bool = True) -> None:
        """Print events as a table; on a terminal the date once a day, `paged` if it is long."""
        lines = self.lines(history)
        if paged:
            self._shell.page(lines)
            return
        for line in lines:
            output.put(line)

    def lines(self, history: Iterable[Event]) -> list[str]:
        """Return the lines of a table; the events are in either order."""
        listed = list(history)
        ordered = sorted(listed, key=lambda event: event.seq)
        said = {event.seq: self.what(event) for event in ordered}
        short = output.columns() > 0
        rows = [self._row(event, said[event.seq], short=short) for event in listed]
        title, *lines = self._shell.laid_out(_heads(self._shell, short=short), rows)
        if not short:
            return [title, *lines]
        days: list[str] = [title]
        for event, line in zip(listed, lines, strict=True):
            days += [*self._rule(event), line]
        return days

    def line(self, event: Event) -> None:
        """Print one event as a line of a stream, flushed."""
        short = output.columns() > 0
        for rule in self._rule(event) if short else ():
            self._shell.line(rule)
        row = self._row(event, self.what(event), short=short)
        line = "  ".join(text.visible(part) for part in row if part)
        output.put(text.coloured(line) if self._shell.colours() else line, flush=True)

    def _row(self, event: Event, what: str, *, short: bool) -> list[str]:
        when = self._shell.when(event.ts)
        row = [str(event.seq), when[11:] if short else when, event.sid, what, actor_text(event)]
        return [*row[:2], event.type, *row[2:]] if self._shell.verbose else row

    def _rule(self, event: Event) -> list[str]:
        """Return the line that a new day begins with."""
        day = (event.ts if self._shell.utc else event.ts.astimezone()).date()
        if day == self._day:
            return []
        self._day = day
        return [f"-- {day.isoformat()} ({text.offset(event.ts, utc=self._shell.utc)}) --"]


def _heads(shell: Shell, *, short: bool) -> list[Column]:
    heads = [
        Column("seq", 5),
        Column("time" if short else f"time ({shell.offset()})"),
        Column("sid", shrinks_to=12),
        Column("what", shrinks_to=20),
        Column("by", shrinks_to=12),
    ]
    return [*heads[:2], Column("event", 4), *heads[2:]] if shell.verbose else heads


def _registered(event: Event) -> tuple[str, ...]:
    data = event.data
    state = data.get("state")
    ready = ", ready" if state == "ready" else ""
    return (
        f"registered pid {data.get('pid')}{ready}",
        data_text(event, ("labels", "version", "sock")),
    )


def _asked(event: Event) -> tuple[str, ...]:
    number, reason = event.data.get("signal"), event.data.get("reason")
    by = f" with {signal_name(number)}" if isinstance(number, int) else ""
    return (f"asked to stop{by}" + (f": {reason}" if reason else ""),)


def _reasoned(word: str) -> Callable[[Event], tuple[str, ...]]:
    def tell(event: Event) -> tuple[str, ...]:
        why = event.data.get("reason", event.data.get("cause"))
        return (f"{word}: {why}" if why else word,)

    return tell


_TOLD: Final[dict[str, Callable[[Event], tuple[str, ...]]]] = {
    events.REGISTERED: _registered,
    events.STOP_REQUESTED: _asked,
    events.EXITED: lambda _: (),  # by the story: it knows who had asked
    events.LOST: _reasoned("lost"),
    events.RELEASED: _reasoned("removed"),
    events.PRUNED: _reasoned("pruned"),
}

_TELLING: Final = (
    *("pid", "code", "signal", "cause", "reason", "state", "labels", "version", "sock", "meta"),
    *("error", "message"),
)


def data_text(event: Event, keys: Iterable[str] = _TELLING) -> str:
    """Say the telling part of an event's data in a few words."""
    words = []
    for key in keys:
        value = event.data.get(key)
        if value is None or value in ("", {}):
            continue
        if isinstance(value, dict):
            words += [f"-{k}" if v is None else f"{k}={_short(v)}" for k, v in value.items()]
        else:
            words.append(f"{key}={value}")
    return " ".join(words)


def _oom(event: Event) -> str:
    oom = event.data.get("oom")
    if not isinstance(oom, dict):
        return ""
    return "out of memory" if oom.get("proven") else "oom kills in its cgroup"


def _short(value: object) -> str:
    """Write a value of labels or meta, cut where it is long: --json has all of it."""
    words = str(value)
    return words if len(words) <= _VALUE_CHARS else f"{words[: _VALUE_CHARS - 1]}…"
