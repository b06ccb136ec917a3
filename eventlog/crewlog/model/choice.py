"""Choose workers by state, labels and names, as callers and people say it."""

import re
from collections.abc import Callable, Collection, Mapping
from fnmatch import translate
from typing import Final, NamedTuple

from crewlog.model import arguments
from crewlog.model.events import LIVING, Record, StateName, WorkerState

GLOB: Final = re.compile(r"[*?\[]")  # a name with one of these is a glob


class LabelTest(NamedTuple):
    """What a worker's labels must say: `k`, `!k`, `k=v`, or `k!=v`, which holds without a `k`."""

    key: str
    value: str | None
    negated: bool = False

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Say whether labels are so."""
        has = self.key in labels and self.value in {None, labels[self.key]}
        return has != self.negated

    def __str__(self) -> str:
        """Write it as people do."""
        if self.value is None:
            return f"{'!' if self.negated else ''}{self.key}"
        return f"{self.key}{'!' if self.negated else ''}={self.value}"


_SETS: Final = re.compile(r"\s(in|notin)\s*\(")


def read_labels(words: str) -> list[LabelTest]:
    """Read tests of labels as kubectl writes them: k=v,k2!=v2; `==` is `=`.

    A comma parts tests only where each part is one with an equals sign: values may have commas.
    Raises: ValueError.
    """
    parts = words.split(",")
    whole = parts if all("=" in part for part in parts) else [words]
    return [_read_label(part) for part in whole]


def _read_label(words: str) -> LabelTest:
    key, equals, value = words.partition("=")
    value = value.removeprefix("=")
    negated = key.endswith("!") if equals else key.startswith("!")
    key = key.removesuffix("!") if equals else key.removeprefix("!")
    if not key.strip() or _SETS.search(words):
        message = f"a label is K=V, K!=V, K or !K, not {words!r}"
        raise ValueError(message)
    return LabelTest(key, value if equals else None, negated)


class Choice(NamedTuple):
    """Which workers are wanted; None: whatever it is."""

    states: frozenset[str] | None
    labels: Mapping[str, str | None]
    sids: Callable[[str], object] | None

    @property
    def final(self) -> bool:
        """Say whether a final worker may be among them."""
        return self.states is None or not self.states <= LIVING

    def wants(self, record: Record) -> bool:
        """Say whether a worker is among them."""
        if self.states is not None and record["state"] not in self.states:
            return False
        if self.sids is not None and not self.sids(record["sid"]):
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
    wanted: frozenset[str] | None = None if all else LIVING
    if states is not None:
        wanted = frozenset(map(_state, _several(states, name="states")))
    matches = None if sids is None else matcher(_several(sids, name="sids"))
    return Choice(wanted, arguments.check_wanted(labels), matches)


def _state(name: str) -> WorkerState:
    try:
        return WorkerState(name)
    except ValueError as error:
        message = f"{name!r} is no state of a worker: {', '.join(WorkerState)}"
        raise ValueError(message) from error


def matcher(sids: Collection[str]) -> Callable[[str], object]:
    """Return what says of a sid whether it is one of these names or globs."""
    return re.compile("|".join(map(translate, sids)) or "(?!)").fullmatch  # of none: nothing


def _several(given: Collection[str], *, name: str) -> Collection[str]:
    if isinstance(given, str):
        message = f"{name} is a collection of strings: give a list"
        raise TypeError(message)
    return given
