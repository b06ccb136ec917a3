"""Remember worker processes: who started, who lives, who ended, and who did it.

See `crewlog.open` for the registry; every error is a `CrewlogError`.
"""

import logging

from crewlog.batch import Batch
from crewlog.errors import (
    AppendUncertain,
    ArchiveDamaged,
    CollectRefused,
    CompactedError,
    CrewlogError,
    DataDamaged,
    FormatTooNew,
    HistoryDiverged,
    IdentityMismatch,
    InvalidTransition,
    LegacyCorrupt,
    LockBusy,
    LogCorrupt,
    LogRegressed,
    NotAStore,
    ProcessNotFound,
    RegistryClosed,
    SegmentMissing,
    SnapshotCorrupt,
    StaleRevision,
    StorageFailed,
    StorageFull,
    StoreMissing,
    StorePoisoned,
    UnsafePermissions,
    Unsupported,
    WorkerExists,
    WorkerNotFound,
)
from crewlog.events import (
    Change,
    Event,
    Exit,
    Identity,
    Reset,
    State,
    Synced,
    Worker,
    WorkerState,
)
from crewlog.liveness import Evidence, Liveness, Verdict
from crewlog.registry import Registry, open  # noqa: A004 (crewlog.open is the promised name)
from crewlog.watch import Watch

logging.getLogger("crewlog").addHandler(logging.NullHandler())

__version__ = "0.1.0"

__all__ = [
    "AppendUncertain",
    "ArchiveDamaged",
    "Batch",
    "Change",
    "CollectRefused",
    "CompactedError",
    "CrewlogError",
    "DataDamaged",
    "Event",
    "Evidence",
    "Exit",
    "FormatTooNew",
    "HistoryDiverged",
    "Identity",
    "IdentityMismatch",
    "InvalidTransition",
    "LegacyCorrupt",
    "Liveness",
    "LockBusy",
    "LogCorrupt",
    "LogRegressed",
    "NotAStore",
    "ProcessNotFound",
    "Registry",
    "RegistryClosed",
    "Reset",
    "SegmentMissing",
    "SnapshotCorrupt",
    "StaleRevision",
    "State",
    "StorageFailed",
    "StorageFull",
    "StoreMissing",
    "StorePoisoned",
    "Synced",
    "UnsafePermissions",
    "Unsupported",
    "Verdict",
    "Watch",
    "Worker",
    "WorkerExists",
    "WorkerNotFound",
    "WorkerState",
    "open",
]
