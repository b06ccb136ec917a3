"""Define what a watcher yields: changes, where it caught up, and what it missed."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

from crewlog.model.events import Event, JsonObject, Views
from crewlog.model.state import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """How a state differs from the one that a watcher had last, by sid."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Change(Views):
    """A watcher's item: one durable event, whose fields it has, too."""

    kind: Literal["change"] = "change"
    event: Event

    @property
    def seq(self) -> int:
        """Return the event's seq, the position after this item."""
        return self.event.seq

    @property
    def type(self) -> str:
        """Return the event's type."""
        return self.event.type

    @property
    def sid(self) -> str:
        """Return the sid of the worker that the event is about."""
        return self.event.sid

    @property
    def ts(self) -> datetime:
        """Return when it was written."""
        return self.event.ts

    @property
    def actor(self) -> JsonObject:
        """Return who wrote it."""
        return self.event.actor

    @property
    def data(self) -> JsonObject:
        """Return what it says."""
        return self.event.data


@dataclass(frozen=True, slots=True, kw_only=True)
class Synced:
    """A watcher's item: everything up to `seq` was delivered; `state` where it began with one."""

    kind: Literal["synced"] = "synced"
    seq: int
    state: State | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """A watcher's item: events were not delivered and will not be; go on from `state`.

    Their reason: `compacted` by retention, `lost` to damage that a repair gave up, or `replaced` by
    another store. `lost` is their exact range (first, last), None where another store took the
    place of this one. `diff` compares with what the watcher had, None where it had not begun with a
    state.
    """

    kind: Literal["reset"] = "reset"
    seq: int
    reason: Literal["compacted", "lost", "replaced"]
    lost: tuple[int, int] | None
    state: State
    diff: Diff | None


Item: TypeAlias = Change | Synced | Reset


def diff_of(before: Mapping[str, int], after: Mapping[str, int]) -> Diff:
    """Compare two states by the revs of their workers."""
    return Diff(
        added=tuple(sid for sid in after if sid not in before),
        changed=tuple(sid for sid in after if sid in before and before[sid] != after[sid]),
        removed=tuple(sid for sid in before if sid not in after),
    )
