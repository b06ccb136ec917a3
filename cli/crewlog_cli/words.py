"""Read what people type on the command line: times, durations, labels."""

from collections.abc import Iterable
from datetime import UTC, datetime

import click

from crewlog_cli import times
from crewlog_cli.shell import Shell


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
