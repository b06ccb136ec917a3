"""Remember worker processes: who started, who lives, who ended, and who did it.

See `crewlog.open` for the registry; every error is a `CrewlogError`. Names are loaded when they are
first asked for, so that a command that needs few of them starts quickly.
"""
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
from typing import TYPE_CHECKING, Final

from crewlog.host import no_fork

if TYPE_CHECKING:
    from crewlog.aio.registry import AsyncRegistry, aopen
    from crewlog.aio.watch import AsyncWatch
    from crewlog.errors import (
        AppendUncertain,
        ArchiveDamaged,
        AuthFailed,
        CollectRefused,
        CompactedError,
        CrewlogError,
        CursorBusy,
        CursorCorrupt,
        DataDamaged,
        FormatTooNew,
        HistoryDiverged,
        HistoryRewound,
        IdentityMismatch,
        InvalidTransition,
        LeaseMissing,
        LegacyCorrupt,
        LockBusy,
        LogCorrupt,
        LogRegressed,
        LossRefused,
        NotAStore,
        PlanInvalid,
        ProcessNotFound,
        QuotaExceeded,
        RegistryClosed,
        SegmentMissing,
        SnapshotCorrupt,
        SpawnFailed,
        StaleRevision,
        StopRefused,
        StorageFailed,
        StorageFull,
        StoreMissing,
        StorePoisoned,
        Unavailable,
        UnknownOutcome,
        UnsafePermissions,
        Unsupported,
        WaitTimeout,
        WorkerEnded,
        WorkerExists,
        WorkerNotFound,
    )
    from crewlog.model.events import (
        Change,
        Diff,
        Event,
        Exit,
        Identity,
        Past,
        Reset,
        State,
        Synced,
        Worker,
        WorkerState,
    )
    from crewlog.model.lives import Life
    from crewlog.process.liveness import Evidence, Flag, Liveness, Verdict
    from crewlog.registry import Registry, open, worker  # noqa: A004 (crewlog.open is promised)
    from crewlog.watch.callbacks import Mirror, Subscription
    from crewlog.watch.watch import Watch
    from crewlog.workers.batch import Batch

logging.getLogger("crewlog").addHandler(logging.NullHandler())

__version__ = "0.2.0"

__all__ = [
    "AppendUncertain",
    "ArchiveDamaged",
    "AsyncRegistry",
    "AsyncWatch",
    "AuthFailed",
    "Batch",
    "Change",
    "CollectRefused",
    "CompactedError",
    "CrewlogError",
    "CursorBusy",
    "CursorCorrupt",
    "DataDamaged",
    "Diff",
    "Event",
    "Evidence",
    "Exit",
    "Flag",
    "FormatTooNew",
    "HistoryDiverged",
    "HistoryRewound",
    "Identity",
    "IdentityMismatch",
    "InvalidTransition",
    "LeaseMissing",
    "LegacyCorrupt",
    "Life",
    "Liveness",
    "LockBusy",
    "LogCorrupt",
    "LogRegressed",
    "LossRefused",
    "Mirror",
    "NotAStore",
    "Past",
    "PlanInvalid",
    "ProcessNotFound",
    "QuotaExceeded",
    "Registry",
    "RegistryClosed",
    "Reset",
    "SegmentMissing",
    "SnapshotCorrupt",
    "SpawnFailed",
    "StaleRevision",
    "State",
    "StopRefused",
    "StorageFailed",
    "StorageFull",
    "StoreMissing",
    "StorePoisoned",
    "Subscription",
    "Synced",
    "Unavailable",
    "UnknownOutcome",
    "UnsafePermissions",
    "Unsupported",
    "Verdict",
    "WaitTimeout",
    "Watch",
    "Worker",
    "WorkerEnded",
    "WorkerExists",
    "WorkerNotFound",
    "WorkerState",
    "aopen",
    "open",
    "worker",
]

# module -> the public names that are not its errors
_ROOMS: Final = {
    "aio.registry": ("AsyncRegistry", "aopen"),
    "aio.watch": ("AsyncWatch",),
    "workers.batch": ("Batch",),
    "model.events": (
        "Change",
        "Diff",
        "Event",
        "Exit",
        "Identity",
        "Past",
        "Reset",
        "State",
        "Synced",
        "Worker",
        "WorkerState",
    ),
    "process.liveness": ("Evidence", "Flag", "Liveness", "Verdict"),
    "model.lives": ("Life",),
    "registry": ("Registry", "open", "worker"),
    "watch.callbacks": ("Mirror", "Subscription"),
    "watch.watch": ("Watch",),
}


def __getattr__(name: str) -> object:
    """Load a public name; from then on it is an attribute like any other."""
    room = next((room for room, names in _ROOMS.items() if name in names), "errors")
    if name not in __all__:
        message = f"module 'crewlog' has no attribute {name!r}"
        raise AttributeError(message)
    with no_fork():
        found: object = getattr(importlib.import_module(f"crewlog.{room}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return [*__all__, "__version__"]
