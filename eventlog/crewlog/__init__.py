"""Remember worker processes: who started, who lives, who ended, and who did it.

See `crewlog.open` for the registry; every error is a `CrewlogError`. Names are loaded when they are
first asked for, so that a command that needs few of them starts quickly.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Final

from crewlog.forks import no_fork

if TYPE_CHECKING:
    from crewlog.aregistry import AsyncRegistry, aopen
    from crewlog.awatch import AsyncWatch
    from crewlog.batch import Batch
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
    from crewlog.events import (
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
    from crewlog.liveness import Evidence, Flag, Liveness, Verdict
    from crewlog.lives import Life
    from crewlog.registry import Registry, open  # noqa: A004 (crewlog.open is the promised name)
    from crewlog.subscribe import Mirror, Subscription
    from crewlog.watch import Watch

logging.getLogger("crewlog").addHandler(logging.NullHandler())

__version__ = "0.1.0"

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
]

# module -> the public names that are not its errors
_ROOMS: Final = {
    "aregistry": ("AsyncRegistry", "aopen"),
    "awatch": ("AsyncWatch",),
    "batch": ("Batch",),
    "events": (
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
    "liveness": ("Evidence", "Flag", "Liveness", "Verdict"),
    "lives": ("Life",),
    "registry": ("Registry", "open"),
    "subscribe": ("Mirror", "Subscription"),
    "watch": ("Watch",),
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
