"""Remember worker processes: who started, who lives, who ended, and who did it.

See `crewlog.open` for the registry; every error is a `CrewlogError`.
"""

import logging
from typing import TYPE_CHECKING

from crewlog.batch import Batch
from crewlog.errors import (
    AppendUncertain,
    ArchiveDamaged,
    CollectRefused,
    CompactedError,
    CrewlogError,
    CursorBusy,
    CursorCorrupt,
    DataDamaged,
    FormatTooNew,
    HistoryDiverged,
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

if TYPE_CHECKING:
    from crewlog.aregistry import AsyncRegistry, aopen
    from crewlog.awatch import AsyncWatch

logging.getLogger("crewlog").addHandler(logging.NullHandler())

__version__ = "0.1.0"

__all__ = [
    "AppendUncertain",
    "ArchiveDamaged",
    "AsyncRegistry",
    "AsyncWatch",
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


def __getattr__(name: str) -> object:
    """Load what brings asyncio with it only when it is asked for."""
    if name in {"AsyncRegistry", "aopen"}:
        from crewlog import aregistry  # noqa: PLC0415

        found: object = getattr(aregistry, name)
        return found
    if name == "AsyncWatch":
        from crewlog.awatch import AsyncWatch  # noqa: PLC0415

        return AsyncWatch
    message = f"module 'crewlog' has no attribute {name!r}"
    raise AttributeError(message)
