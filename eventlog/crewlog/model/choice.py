"""Choose workers by state, labels and names, as callers and people say it."""

import re
from collections.abc import Collection, Mapping
from fnmatch import translate
from typing import NamedTuple

from crewlog.model import arguments
from crewlog.model.events import FINAL, Record, StateName, WorkerState


class Choice(NamedTuple):
    """Which workers are wanted; None: whatever it is."""

    states: frozenset[str] | None
    labels: Mapping[str, str | None]
    sids: re.Pattern[str] | None

    def wants(self, record: Record) -> bool:
        """Say whether a worker is among them."""
        if self.states is not None and record["state"] not in self.states:
            return False
        if self.sids is not None and self.sids.fullmatch(record["sid"]) is None:
            return False
        have = record["labels"]
        return all(k in have and v in {None, have[k]} for k, v in self.labels.items())


def choice_of(
    *,
    all: bool,  # noqa: A002 (as the library's verb calls it)
    states: Collection[StateName] | None,
    labels: Mapping[str, str | None] | None,
    sids: Collection[str] | None,
) -> Choice:
    """Check what a caller asks for.

    Raises: ValueError, TypeError.
    """
    wanted = None if all else frozenset(state.value for state in WorkerState if state not in FINAL)
    if states is not None:
        wanted = frozenset(WorkerState(state).value for state in _several(states, name="states"))
    pattern = None
    if sids is not None:
        globs = [translate(glob) for glob in _several(sids, name="sids")]
        pattern = re.compile("|".join(globs) or "(?!)")  # of none: nothing
    return Choice(wanted, arguments.check_wanted(labels), pattern)


def _several(given: Collection[str], *, name: str) -> Collection[str]:
    if isinstance(given, str):
        message = f"{name} is a collection of strings: give a list"
        raise TypeError(message)
    return given
