"""Gather what the page tells of each life beside its bar: states, labels, who did what and why."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from crewlog.model import events
from crewlog.model.events import Event, JsonObject, JsonValue
from crewlog_cli import story, text
from crewlog_cli.story import Story

# What an event does to the bar: 0 nothing, 1 begins, 2 ready, 3 draining, 4 asked to stop, 5 ends.
_STEPS: Final = {
    events.REGISTERED: 1,
    events.READY: 2,
    events.DRAINING: 3,
    events.STOP_REQUESTED: 4,
    events.EXITED: 5,
    events.LOST: 5,
    events.RELEASED: 5,
}
_META_CHARS: Final = 400
_TAIL_CHARS: Final = 2000


@dataclass(slots=True)
class Account:
    """What is told of one life; `steps` are (when, what it does to the bar, words, who)."""

    labels: JsonObject = field(default_factory=dict)
    host: str = ""
    owner: str = ""
    meta: JsonObject = field(default_factory=dict)
    steps: list[tuple[datetime, int, str, str]] = field(default_factory=list)
    tail: str = ""
    evidence: str = ""

    @property
    def more(self) -> str:
        """Return the lines of the pane that are no events."""
        rows = [f"meta: {json.dumps(self.meta)[:_META_CHARS]}"] if self.meta else []
        rows += [f"evidence: {self.evidence}"] if self.evidence else []
        rows += ["last lines of its output:", *self.tail.splitlines()] if self.tail else []
        return "\n".join(map(text.visible, rows))


def stories(history: Iterable[Event], teller: Story) -> dict[int, Account]:
    """Return what is told of each life, by the seq of its registration; events oldest first."""
    lives: dict[int, Account] = {}
    current: dict[str, Account] = {}
    for event in history:
        if event.type == events.REGISTERED:
            current[event.sid] = lives[event.seq] = Account()
        account = current.get(event.sid)
        if account is None:
            continue  # its registration is no longer kept
        _take(account, event)
        who = text.visible(story.actor_text(event))
        step = (event.ts, _STEPS.get(event.type, 0), text.visible(teller.what(event)), who)
        if event.type == events.REGISTERED and event.data.get("state") == "ready":
            step = (step[0], 2, step[2], step[3])
        account.steps.append(step)
    return lives


def _take(account: Account, event: Event) -> None:
    data = event.data
    _merge(account.labels, data.get("labels"))
    _merge(account.meta, data.get("meta"))
    if event.type == events.REGISTERED:
        owner, host = data.get("owner"), event.actor.get("host")
        account.owner = f"pid {owner.get('pid')}" if isinstance(owner, dict) else ""
        account.host = text.visible(str(host or ""))
    elif event.type in events.ENDING:
        account.tail = str(data.get("tail") or "")[-_TAIL_CHARS:]
        account.evidence = _evidence(event)


def _merge(into: JsonObject, patch: JsonValue) -> None:
    for key, value in patch.items() if isinstance(patch, dict) else ():
        if value is None:
            into.pop(key, None)
        else:
            into[key] = value


def _evidence(event: Event) -> str:
    """Say what the recorded end rests on."""
    source, seen = event.data.get("source"), event.data.get("evidence")
    words = [f"source {source}"] if source else []
    if isinstance(seen, dict):
        words += [f"{key} {seen[key]}" for key in ("opened", "ended", "lease") if key in seen]
    cause = event.data.get("cause")
    return ", ".join([*([f"cause {cause}"] if cause else []), *words])
