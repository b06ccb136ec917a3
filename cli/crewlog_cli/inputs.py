"""Read what people type: times, spans, labels, types of event, past states, any text."""

import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Final, ParamSpec, TypeVar, cast

import click

from crewlog.model import events
from crewlog.model.events import EventType, timestamp
from crewlog.model.state import Past, State
from crewlog.model.times import TimeError, duration, read_time
from crewlog.registry import Registry
from crewlog_cli import output, text
from crewlog_cli.shell import Shell

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def tried(change: Callable[[], T]) -> T:
    """Make a change; an argument that the library refuses is a usage error (2)."""
    try:
        return change()
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error


def safe(given: str) -> str:
    """Make argv that is not UTF-8 fit for the log, without losing a byte."""
    return given.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def moment(words: str | None, sh: Shell) -> datetime | None:
    """Read a time given on the command line, None for none."""
    return None if words is None else instant(words, sh)


def period(
    sh: Shell, since: str | None, until: str | None
) -> tuple[datetime | None, datetime | None]:
    """Read --since and --until; what ends before it begins is a mistake."""
    first, last = moment(since, sh), moment(until, sh)
    if first is not None and last is not None and last <= first:
        ends = [text.exact(when, utc=sh.utc) for when in (first, last)]
        message = f"--until ({ends[1]}) is not after --since ({ends[0]})"
        raise click.UsageError(message)
    return first, last


def instant(words: str, sh: Shell) -> datetime:
    """Read a time given on the command line."""
    try:
        when, assumed = read_time(words, now=datetime.now(UTC))
    except TimeError as error:
        raise click.UsageError(str(error)) from error
    if assumed:
        sh.note(f"note: {assumed}")
    return when


def pairs(rows: Iterable[str]) -> dict[str, str]:
    """Read labels given as KEY=VALUE."""
    by_key: dict[str, str] = {}
    for row in rows:
        key, equals, value = row.partition("=")
        if not key or not equals:
            message = f"a label is KEY=VALUE, not {row!r}"
            raise click.UsageError(message)
        by_key[key] = value
    return by_key


_WHOLE: Final = re.compile(r"[0-9]{1,19}")
_SECONDS: Final = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")


def whole(words: str) -> int | None:
    """Read a whole number; None for what is none, or larger than any that is counted here."""
    return int(words) if _WHOLE.fullmatch(words) else None


def wait_s(words: str) -> float:
    """Read how long to wait, given on the command line; a bare number is seconds."""
    return float(words) if _SECONDS.fullmatch(words) else span_s(words)


def span_s(words: str) -> float:
    """Read a duration given on the command line, in seconds."""
    try:
        return duration(words).total_seconds()
    except TimeError as error:
        raise click.UsageError(str(error)) from error


def _complete_type(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    """Name the types of event that begin so, for a shell's completion."""
    return [
        kind for kind in (*events.WORKER_TYPES, *sorted(events.OWN_TYPES)) if kind.startswith(begun)
    ]


def _of_type(
    _ctx: click.Context, _param: click.Parameter, types: tuple[str, ...]
) -> tuple[EventType, ...]:
    """Warn of a type that this version does not know: a newer one may, or it is misspelt."""
    for kind in types:
        if kind not in events.OWN_TYPES and kind not in events.WORKER_TYPES:
            output.warn(
                f"no type of event is called {kind!r} here; known are "
                + ", ".join(events.WORKER_TYPES)
            )
    return cast("tuple[EventType, ...]", types)  # an unknown one is looked for, too


def ends(types: tuple[EventType, ...]) -> tuple[EventType, ...]:
    """Return the types of event that may tell of a crash, of those that are asked for."""
    if types and not set(types) <= set(events.ENDS):
        message = f"--crashed looks at {' and '.join(events.ENDS)} only"
        raise click.UsageError(message)
    return types or events.ENDS


def with_crashed(function: Callable[P, R]) -> Callable[P, R]:
    """Give a command the option that chooses the ends that nobody had asked for."""
    option = click.option(
        "--crashed", is_flag=True, help="Only ends that nobody had asked for: failed or lost."
    )
    return option(function)


def with_period(function: Callable[P, R]) -> Callable[P, R]:
    """Give a command the options that choose a period, with the short names of journalctl."""
    until = click.option("-U", "--until", metavar="TIME", help="Only what is before this time.")
    since = click.option("-S", "--since", metavar="TIME", help="Only what is from this time on.")
    return since(until(function))


def with_types(function: Callable[P, R]) -> Callable[P, R]:
    """Give a command the option that chooses types of event."""
    option = click.option(
        "--type",
        "types",
        multiple=True,
        callback=_of_type,
        shell_complete=_complete_type,
        help="Only this type of event, such as worker.lost; repeatable.",
    )
    return option(function)


_EPOCHS: Final = 1_000_000_000  # so large a seq is a time that lacks its @


def at(sh: Shell, reg: Registry, words: str) -> Past:
    """Return the state at a time or seq given on the command line; say what it is the state of."""
    seq = whole(words)
    if seq is not None:
        past = reg.at(seq)
        if seq > past.seq:
            hint = f"; for a time write @{words}" if seq >= _EPOCHS else ""
            sh.note(f"seq {seq} is not reached yet{hint}")
    else:
        past = reg.at(instant(words, sh))
    tell_window(sh, past)
    return past


def asked_at(words: str | None, seen: State) -> datetime | None:
    """Return as of when ages of a past state are told: as of the time that was asked for."""
    if words is None or not isinstance(seen, Past):
        return None
    if whole(words) is not None:
        return seen.since or seen.until
    return read_time(words, now=datetime.now(UTC))[0]


def moment_of(seen: State) -> datetime | None:
    """Return up to when a past state held, None where it holds still, or is the present one."""
    return seen.until if isinstance(seen, Past) else None


def tell_window(sh: Shell, past: Past) -> None:
    """Say what a past state is the state of."""
    unknown = "a time that is no longer kept" if past.seq else "the beginning"
    since = unknown if past.since is None else text.exact(past.since, utc=sh.utc)
    until = "now" if past.until is None else text.exact(past.until, utc=sh.utc)
    if not past.workers and past.since is None and not past.seq and past.until is not None:
        sh.note(f"the history begins at {until}: of the time before nothing is known")
        return
    sh.note(f"as it was after seq {past.seq}, from {since} until {until}")
    if past.disputed is not None:
        first, last = past.disputed
        output.warn(
            f"crewlog: the clock stepped back there: events {first} to {last} claim times "
            "on both sides; ask by seq to be exact"
        )


def window(past: Past) -> dict[str, object]:
    """Return what a past state is the state of, as JSON shows it."""
    return {
        "seq": past.seq,
        "since": None if past.since is None else timestamp(past.since),
        "until": None if past.until is None else timestamp(past.until),
        "disputed": past.disputed,
    }
