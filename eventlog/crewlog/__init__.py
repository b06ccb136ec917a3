"""Remember worker processes: who started, who lives, who ended, and who did it.

    with crewlog.open() as reg:
        reg.ensure("web-1", ["python", "-m", "http.server"], labels={"role": "web"})
        for worker in reg.living(labels={"role": "web"}):
            print(worker.sid, worker.pid, worker.state)

find the living     living, workers, get, liveness
be in the list      crewlog.worker, presence, register, update, exited, beat
start, find again   ensure, spawn, stop
hear of it          watch, subscribe, wait, mirror, observe_all
ask the past        history, at, lives

All are methods of `Registry`, which `open` returns, and of `AsyncRegistry`, which `aopen` returns.
Every error is a `CrewlogError`; the ten that programs catch stand here, all of them in
`crewlog.errors`. `help(crewlog.Registry.watch)` says what a verb takes, promises and raises.
"""
# Names are loaded when they are first asked for: a command that needs few of them starts quickly.
# General layout, from the face down; each room imports only what stands below it.
#   registry.py   what users hold, one verb a method; aio/ is the same for asyncio
#   history.py    what was, and what the state was then
#   workers/      register, start, judge, stop         watch/  readers that wait for changes
#   session.py    a place, its store once it is there, and who acts
#   place.py      what a path or URL means, and which engine keeps it
#   local/        the engine of a directory            etcd/   the engine of a cluster
#   store.py      what both engines promise            queue.py  callers that share an append
#   process/      what the kernel says of a process    model/  pure: events, codec, chain, fold
#   host.py       forks, threads, signals, the clock   errors.py  every error
# docs/ARCHITECTURE.md has the picture, and the walk of one append from here to the disk.

import importlib
import logging
import warnings
from typing import TYPE_CHECKING, Final

from crewlog.host import no_fork

if TYPE_CHECKING:
    from crewlog import errors
    from crewlog.aio.registry import AsyncRegistry, aopen
    from crewlog.aio.watch import AsyncWatch
    from crewlog.errors import (
        CrewlogError,
        InvalidTransition,
        LockBusy,
        SpawnFailed,
        StaleRevision,
        StopRefused,
        StoreMissing,
        WaitTimeout,
        WorkerExists,
        WorkerNotFound,
    )
    from crewlog.model.events import (
        Event,
        EventType,
        Exit,
        Identity,
        StateName,
        Worker,
        WorkerState,
    )
    from crewlog.model.items import Change, Diff, Reset, Synced
    from crewlog.model.lives import Life
    from crewlog.model.state import Past, State
    from crewlog.process.liveness import Evidence, Flag, Liveness, Verdict
    from crewlog.registry import Registry, open, worker  # noqa: A004 (crewlog.open is promised)
    from crewlog.watch.callbacks import Mirror, Subscription
    from crewlog.watch.watch import Watch
    from crewlog.workers.batch import Batch

    __all__ = [
        "AsyncRegistry",
        "AsyncWatch",
        "Batch",
        "Change",
        "CrewlogError",
        "Diff",
        "Event",
        "EventType",
        "Evidence",
        "Exit",
        "Flag",
        "Identity",
        "InvalidTransition",
        "Life",
        "Liveness",
        "LockBusy",
        "Mirror",
        "Past",
        "Registry",
        "Reset",
        "SpawnFailed",
        "StaleRevision",
        "State",
        "StateName",
        "StopRefused",
        "StoreMissing",
        "Subscription",
        "Synced",
        "Verdict",
        "WaitTimeout",
        "Watch",
        "Worker",
        "WorkerExists",
        "WorkerNotFound",
        "WorkerState",
        "aopen",
        "errors",
        "open",
        "worker",
    ]
else:
    # What `help(crewlog)` shows in full; `dir(crewlog)` lists all that is offered.
    __all__ = ["aopen", "open", "worker"]  # they are loaded when they are asked for

logging.getLogger("crewlog").addHandler(logging.NullHandler())

__version__ = "0.2.0"

# module -> the public names in it
_ROOMS: Final = {
    "aio.registry": ("AsyncRegistry", "aopen"),
    "aio.watch": ("AsyncWatch",),
    "workers.batch": ("Batch",),
    "model.events": (
        "Event",
        "EventType",
        "Exit",
        "Identity",
        "StateName",
        "Worker",
        "WorkerState",
    ),
    "model.state": ("Past", "State"),
    "model.items": ("Change", "Diff", "Reset", "Synced"),
    "process.liveness": ("Evidence", "Flag", "Liveness", "Verdict"),
    "model.lives": ("Life",),
    "errors": (
        "CrewlogError",
        "InvalidTransition",
        "LockBusy",
        "SpawnFailed",
        "StaleRevision",
        "StopRefused",
        "StoreMissing",
        "WaitTimeout",
        "WorkerExists",
        "WorkerNotFound",
    ),
    "registry": ("Registry", "open", "worker"),
    "watch.callbacks": ("Mirror", "Subscription"),
    "watch.watch": ("Watch",),
}

_ROOM_OF: Final = {name: room for room, names in _ROOMS.items() for name in names}
# What version 0.1 had here too.
_MOVED: Final = frozenset(
    {
        "AppendUncertain",
        "ArchiveDamaged",
        "AuthFailed",
        "CollectRefused",
        "CompactedError",
        "CursorBusy",
        "CursorCorrupt",
        "DataDamaged",
        "FormatTooNew",
        "HistoryDiverged",
        "HistoryRewound",
        "IdentityMismatch",
        "LeaseMissing",
        "LegacyCorrupt",
        "LogCorrupt",
        "LogRegressed",
        "LossRefused",
        "NotAStore",
        "PlanInvalid",
        "ProcessNotFound",
        "QuotaExceeded",
        "RegistryClosed",
        "SegmentMissing",
        "SnapshotCorrupt",
        "StorageFailed",
        "StorageFull",
        "StorePoisoned",
        "Unavailable",
        "UnknownOutcome",
        "UnsafePermissions",
        "Unsupported",
        "WorkerEnded",
    }
)


def __getattr__(name: str) -> object:
    """Load a public name; from then on it is an attribute like any other."""
    if name == "errors":
        return importlib.import_module("crewlog.errors")
    room = "errors" if name in _MOVED else _ROOM_OF.get(name)
    if room is None:
        message = f"module 'crewlog' has no attribute {name!r}"
        raise AttributeError(message)
    with no_fork():
        value: object = getattr(importlib.import_module(f"crewlog.{room}"), name)
    if name in _MOVED:
        message = f"crewlog.{name} is crewlog.errors.{name} now"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
    else:
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return [*_ROOM_OF, "__version__", "errors"]
