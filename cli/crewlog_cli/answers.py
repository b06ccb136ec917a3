"""Answer as JSON what people and agents ask: the documents of show, explain and history."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final

from crewlog import Liveness
from crewlog.model.events import Event, Worker, timestamp
from crewlog.model.state import Past, State
from crewlog.registry import Registry
from crewlog_cli import inputs, render

_LAST_EVENTS: Final = 10
_EVENTS: Final = 50

_CAUSES: Final = {
    "recorded": "its end is on record",
    "abandoned": "it was announced and never started, and who announced it is dead",
    "reserved": "it was announced and has no process yet",
    "rebooted": "the machine has booted since its last event",
    "lease_released": "nobody holds its lease any more; the kernel took it back at its end",
    "foreign_host": "it was registered in another boot or on another host, and nothing of it is "
    "to be seen from here",
    "clock_disputed": "it was registered in another boot of this host, and by the clock that was "
    "later than this one began: the clock was set since",
    "lease": "its lease is held, and only it can hold it",
    "found_in_namespace": "its very process was found among all that run, under another pid",
    "not_found": "its process is not among all that run, and from here all can be seen",
    "foreign_pid_namespace": "it lives in another pid namespace, and from here that cannot be "
    "looked into",
    "no_such_process": "no process has its pid",
    "pid_is_thread": "its pid is a thread's now",
    "pid_reused": "its pid belongs to another process now",
    "exited": "its process has ended and waits to be reaped by its parent",
    "identity": "the process with its pid is the very one that was registered",
    "start_time": "the process with its pid began at the very time that was recorded",
    "identity_unverifiable": "a process has its pid, and nothing tells whether it is the one",
}


def because(cause: str) -> str:
    """Say a cause in words."""
    return _CAUSES.get(cause, cause)


def last_events(reg: Registry, sid: str, seen: Past | None) -> list[Event]:
    """Return the last events of a worker, as of a past state if one is asked for; oldest first."""
    newest = reg.history(sid=sid, newest_first=True)
    wanted = (event for event in newest if seen is None or event.seq <= seen.seq)
    return list(itertools.islice(wanted, _LAST_EVENTS))[::-1]


def story_of(reg: Registry, sid: str) -> list[Event]:
    """Return the last of all events of a sid, oldest first."""
    return list(deque(reg.history(sid=sid), maxlen=_EVENTS))


def listed(
    seen: State, workers: Iterable[tuple[Worker, Liveness | None]], now: datetime
) -> dict[str, object]:
    """Return what ls says of workers, as of a past state or of now."""
    return {
        "seq": seen.seq,
        "at": timestamp(now),
        **(inputs.window(seen) if isinstance(seen, Past) else {}),
        "workers": [render.worker_json(worker, liveness) for worker, liveness in workers],
    }


def shown(
    worker: Worker, liveness: Liveness | None, seen: Past | None, last: Iterable[Event]
) -> dict[str, object]:
    """Return what show says of a worker."""
    return {
        **({} if seen is None else inputs.window(seen)),
        "worker": render.worker_json(worker, liveness),
        "events": [render.event_json(event) for event in last],
    }


def explained(
    reg: Registry, worker: Worker, liveness: Liveness, story: Iterable[Event]
) -> dict[str, object]:
    """Return what explain says of a worker."""
    return {
        "seq": reg.last_seq,
        "sid": worker.sid,
        "verdict": liveness.verdict.value,
        "liveness": liveness.verdict.value,  # as every other command calls it
        "cause": liveness.cause,
        "because": because(liveness.cause),
        "flags": sorted(flag.value for flag in liveness.flags),
        "tree": [] if liveness.alive else list(reg.trees([worker]).get(worker.sid, ())),
        "recorded": None if worker.identity is None else worker.identity.as_json(),
        "evidence": liveness.evidence.seen(),
        "worker": render.worker_json(worker, liveness),
        "events": [render.event_json(event) for event in story],
    }


def chosen_events(events: Iterable[Event], actor: str | None, *, crashed: bool) -> Iterator[Event]:
    """Pass on the events that somebody did, or that tell of a crash."""
    keys = ("name", "user", "program", "via", "pid")
    for event in events:
        if crashed and not event.crashed:
            continue
        if actor is None or actor in {str(event.actor[k]) for k in keys if k in event.actor}:
            yield event
