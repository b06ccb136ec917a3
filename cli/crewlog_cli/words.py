"""Read what people type on the command line: times, durations, labels, types of event, any text."""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import ParamSpec, TypeVar

import click

from crewlog import events
from crewlog_cli import shell, times
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


def instant(words: str, sh: Shell) -> datetime:
    """Read a time given on the command line."""
    try:
        found, assumed = times.moment(words, now=datetime.now(UTC))
    except times.TimeError as error:
        raise click.UsageError(str(error)) from error
    if assumed:
        sh.note(f"note: {assumed}")
    return found


def pairs(rows: Iterable[str]) -> dict[str, str]:
    """Read labels given as KEY=VALUE."""
    found: dict[str, str] = {}
    for row in rows:
        key, equals, value = row.partition("=")
        if not key or not equals:
            message = f"a label is KEY=VALUE, not {row!r}"
            raise click.UsageError(message)
        found[key] = value
    return found


def span_s(words: str) -> float:
    """Read a duration given on the command line, in seconds."""
    try:
        return times.duration(words).total_seconds()
    except times.TimeError as error:
        raise click.UsageError(str(error)) from error


def _complete_type(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    """Name the types of event that begin so, for a shell's completion."""
    return [
        kind for kind in (*events.WORKER_TYPES, *sorted(events.OWN_TYPES)) if kind.startswith(begun)
    ]


def _of_type(
    _ctx: click.Context, _param: click.Parameter, types: tuple[str, ...]
) -> tuple[str, ...]:
    """Warn of a type that this version does not know: a newer one may, or it is misspelt."""
    for kind in types:
        if kind not in events.OWN_TYPES and kind not in events.WORKER_TYPES:
            shell.warn(
                f"no type of event is called {kind!r} here; known are "
                + ", ".join(events.WORKER_TYPES)
            )
    return types


def ends(types: tuple[str, ...]) -> tuple[str, ...]:
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
