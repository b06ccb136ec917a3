"""Look back: find the state at a time or seq, and say what it is the state of."""

from datetime import datetime
from typing import Final

from crewlog.events import Past, State, timestamp
from crewlog.registry import Registry
from crewlog_cli import shell, text
from crewlog_cli.shell import Shell
from crewlog_cli.words import instant

_EPOCHS: Final = 1_000_000_000  # so large a seq is a time that lacks its @


def at(sh: Shell, reg: Registry, words: str) -> Past:
    """Return the state at a time or seq given on the command line; say what it is the state of."""
    if words.isascii() and words.isdigit():
        seq = int(words)
        found = reg.at(seq)
        if seq > found.seq:
            hint = f"; for a time write @{words}" if seq >= _EPOCHS else ""
            sh.note(f"seq {seq} is not reached yet{hint}")
    else:
        found = reg.at(instant(words, sh))
    _tell(sh, found)
    return found


def moment_of(seen: State) -> datetime | None:
    """Return up to when a past state held, None where it holds still, or is the present one."""
    return seen.until if isinstance(seen, Past) else None


def _tell(sh: Shell, found: Past) -> None:
    unknown = "a time that is no longer kept" if found.seq else "the beginning"
    since = unknown if found.since is None else text.exact(found.since, utc=sh.utc)
    until = "now" if found.until is None else text.exact(found.until, utc=sh.utc)
    sh.note(f"as it was after seq {found.seq}, from {since} until {until}")
    if found.disputed is not None:
        first, last = found.disputed
        shell.warn(
            f"crewlog: the clock stepped back there: events {first} to {last} claim times "
            "on both sides; ask by seq to be exact"
        )


def window(found: Past) -> dict[str, object]:
    """Return what a past state is the state of, as JSON shows it."""
    return {
        "seq": found.seq,
        "since": None if found.since is None else timestamp(found.since),
        "until": None if found.until is None else timestamp(found.until),
        "disputed": found.disputed,
    }
