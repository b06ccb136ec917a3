"""Every error of crewlog: what failed, where, why, what became of the change, what to do.

`outcome` is the promise about the change that was asked for:

- ``"not_written"``: nothing of it is in the log, and nothing ever will be;
- ``"unknown"``: it may or may not become durable; read the registry before trying again;
- ``"written"``: it is in the log; what failed came after it.

A return value means durable. Errors of reading carry ``"not_written"`` too.

A class gives its texts as class attributes (WHAT, WHERE, WHY, REMEDY), with its own fields in
braces, and names those fields; the one constructor fills them in.
"""

import errno
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Final, Literal, TypeAlias

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
Outcome: TypeAlias = Literal["not_written", "unknown", "written"]
# What helps where the system refuses for want of something.
_HELP: Final = {
    errno.EMFILE: "Close files, or raise the limit (ulimit -n), then try again",
    errno.EAGAIN: "Raise the limit of processes (ulimit -u), or end some, then try again",
    errno.ENOMEM: "Free memory, then try again",
    errno.EROFS: "Mount it writable, or choose another place",
}


@dataclass(eq=False, repr=False)
class CrewlogError(Exception):
    """Base of every error that crewlog raises on purpose; abstract, never raised itself.

    The message reads: what failed, where: why. What to do.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 70
    WHAT: ClassVar[str] = ""
    WHERE: ClassVar[str] = ""
    WHY: ClassVar[str] = ""
    REMEDY: ClassVar[str] = ""
    OUTCOME: ClassVar[Outcome] = "not_written"

    what: str = field(init=False)
    where: str = field(init=False)
    why: str = field(init=False)
    remedy: str = field(init=False)
    outcome: Outcome = field(init=False)

    def __post_init__(self) -> None:
        """Compose the parts that were not given, and the message."""
        given = vars(self)
        for part in ("what", "where", "why", "remedy", "outcome"):
            if part not in given:
                text: str = getattr(type(self), part.upper())
                given[part] = text.format_map(given)
        text = self.what + (f", {self.where}" if self.where else "")
        text += f": {self.why}" if self.why else ""
        self.args = (f"{text}. {self.remedy}" if self.remedy else text,)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by attributes, so that subclasses may have signatures of their own."""
        return _restore, (type(self), self.args, self.__dict__)


def _restore(
    cls: type[CrewlogError], args: tuple[object, ...], fields: dict[str, object]
) -> CrewlogError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(fields)
    return error


@dataclass(eq=False, repr=False)
class _Described(CrewlogError):
    """An error whose every text is given where it is raised."""

    what: str
    _: KW_ONLY
    where: str = ""
    why: str = ""
    remedy: str = ""
    outcome: Outcome = "not_written"


# -- the honest "no" ------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class WorkerNotFound(CrewlogError):
    """No worker of that sid is in the registry."""

    code = "worker_not_found"
    exit_code = 1
    WHAT = "no worker {sid!r}"
    REMEDY = "`crewlog ls --all` lists every sid the registry holds"

    sid: str


@dataclass(eq=False, repr=False)
class WorkerExists(CrewlogError):
    """A worker of that sid is not final and not proven dead."""

    code = "worker_exists"
    exit_code = 1
    WHAT = "worker {sid!r} exists"
    WHY = "pid {pid} holds this sid in state {state!r} (rev {rev})"

    sid: str
    _: KW_ONLY
    pid: int
    rev: int
    state: str
    remedy: str = "Choose another sid, or end that worker first"


@dataclass(eq=False, repr=False)
class StaleRevision(CrewlogError):
    """The worker changed since the caller read it; `actual` is None where it is gone."""

    code = "stale_revision"
    exit_code = 1
    WHAT = "worker {sid!r} changed since it was read"
    REMEDY = "Read it again and decide anew"

    sid: str
    _: KW_ONLY
    expected: int
    actual: int | None

    def __post_init__(self) -> None:
        """Say "none" where there is no such worker."""
        there = "none" if self.actual is None else self.actual
        self.why = f"expected rev {self.expected}, found {there}"
        super().__post_init__()


@dataclass(eq=False, repr=False)
class InvalidTransition(CrewlogError):
    """The rules of states do not allow this event in the worker's present state."""

    code = "invalid_transition"
    exit_code = 1
    WHAT = "worker {sid!r} cannot take {event}"
    WHY = "its state is {state!r}"
    REMEDY = "`crewlog history --sid {sid}` shows how it came there"

    sid: str
    _: KW_ONLY
    event: str
    state: str


@dataclass(eq=False, repr=False)
class ProcessNotFound(CrewlogError):
    """There is no such process to register."""

    code = "process_not_found"
    exit_code = 1
    WHAT = "no process {pid}"
    WHY = "it has ended or never was"
    REMEDY = "Register a worker while it runs"

    pid: int


@dataclass(eq=False, repr=False)
class IdentityMismatch(CrewlogError):
    """The process that bears the recorded pid is not the recorded process."""

    code = "identity_mismatch"
    exit_code = 1
    WHAT = "pid {pid} is not worker {sid!r}"
    WHY = "{cause}"
    REMEDY = "Nothing was sent to it"

    sid: str
    _: KW_ONLY
    pid: int
    cause: str


@dataclass(eq=False, repr=False)
class StopRefused(CrewlogError):
    """A worker that must not be signalled from here; nothing was sent."""

    code = "stop_refused"
    exit_code = 1
    WHAT = "worker {sid!r} is not stopped from here"

    sid: str
    _: KW_ONLY
    pid: int
    why: str
    remedy: str


@dataclass(eq=False, repr=False)
class SpawnFailed(CrewlogError):
    """The program of a worker could not be started; the registry records that it ended."""

    code = "spawn_failed"
    exit_code = 127
    WHAT = "cannot start {program!r}"

    program: str
    _: KW_ONLY
    why: str
    remedy: str = "Check the name, PATH, cwd and its mode"
    outcome: Outcome = "not_written"


@dataclass(eq=False, repr=False)
class LeaseMissing(CrewlogError):
    """The worker has no lease to beat on."""

    code = "lease_missing"
    exit_code = 1
    WHAT = "worker {sid!r} has no lease"
    WHY = "it was registered without one, or has ended"
    REMEDY = "Give it one: lease=True or heartbeat_s=SECONDS, or `crewlog run --lease`"

    sid: str


@dataclass(eq=False, repr=False)
class PlanInvalid(CrewlogError):
    """A saved plan of a collection cannot be carried out on this store."""

    code = "plan_invalid"
    exit_code = 65
    WHAT = "cannot carry out this plan"
    REMEDY = "Make a new one: crewlog gc --plan FILE"

    where: str
    _: KW_ONLY
    why: str


@dataclass(eq=False, repr=False)
class CompactedError(CrewlogError):
    """The history that was asked for is no longer kept; up to `snapshot_seq` only the state is."""

    code = "compacted"
    exit_code = 1
    WHAT = "events before seq {oldest} are no longer kept"
    WHY = "seq {requested} was asked for; up to seq {snapshot_seq} only the state is kept"
    REMEDY = "Start from the state, or from seq {snapshot_seq}"

    _: KW_ONLY
    requested: int
    oldest: int
    snapshot_seq: int = field(init=False)

    def __post_init__(self) -> None:
        """The state is the one just before the oldest event."""
        self.snapshot_seq = self.oldest - 1
        super().__post_init__()


@dataclass(eq=False, repr=False)
class CollectRefused(CrewlogError):
    """So many workers seem dead at once that the observer is to be doubted first."""

    code = "collect_refused"
    exit_code = 1
    WHAT = "{deaths} of {living} workers seem dead at once"
    WHY = "this looks like a fault of the observer (namespace, /proc, wrong machine)"
    REMEDY = "Look with `crewlog gc --dry-run`; if it is true: crewlog gc --force"

    _: KW_ONLY
    deaths: int
    living: int


@dataclass(eq=False, repr=False)
class CursorBusy(CrewlogError):
    """Another subscriber owns the cursor."""

    code = "cursor_busy"
    exit_code = 75
    WHAT = "cursor {name!r} is in use"
    WHY = "{holder} owns it"
    REMEDY = "One subscriber at a time: end the other one, or use another name"

    name: str
    _: KW_ONLY
    holder: str


@dataclass(eq=False, repr=False)
class WaitTimeout(CrewlogError):
    """What was waited for did not happen in `waited_s` seconds."""

    code = "wait_timeout"
    exit_code = 124
    WHAT = "{awaited} did not happen"
    WHY = "within {waited_s:g} s"
    REMEDY = "Wait longer, or see `crewlog history` for what happened instead"

    awaited: str
    _: KW_ONLY
    waited_s: float
    outcome: Outcome = "not_written"


@dataclass(eq=False, repr=False)
class WorkerEnded(CrewlogError):
    """The worker ended while the caller was waiting for another state."""

    code = "worker_ended"
    exit_code = 1
    WHAT = "worker {sid!r} will not become {wanted!r}"
    WHY = "it has ended as {state!r}"
    REMEDY = "See `crewlog history --sid {sid}`"

    sid: str
    _: KW_ONLY
    state: str
    wanted: str


# -- the store is not usable as asked -------------------------------------------------------


@dataclass(eq=False, repr=False)
class RegistryClosed(CrewlogError):
    """The registry object was closed."""

    code = "closed"
    WHAT = "the registry is closed"
    REMEDY = "Open it again with crewlog.open()"

    where: str


@dataclass(eq=False, repr=False)
class StoreMissing(CrewlogError):
    """There is no store at this place, or it was removed while in use."""

    code = "store_missing"
    exit_code = 66
    WHAT = "no registry"

    where: str
    _: KW_ONLY
    why: str = "there is no store.json"
    remedy: str = "The first registration creates one; check --dir and CREWLOG_DIR"


@dataclass(eq=False, repr=False)
class NotAStore(_Described):
    """The directory holds files, but not those of a store."""

    code = "not_a_store"
    exit_code = 66


@dataclass(eq=False, repr=False)
class FormatTooNew(CrewlogError):
    """A newer crewlog wrote what this one must not guess at."""

    code = "format_too_new"
    exit_code = 78
    WHAT = "this store needs a newer crewlog"
    REMEDY = "Upgrade crewlog"

    where: str
    _: KW_ONLY
    why: str


@dataclass(eq=False, repr=False)
class UnsafePermissions(_Described):
    """A file or directory of the store could be read or replaced by others."""

    code = "unsafe_permissions"
    exit_code = 77


@dataclass(eq=False, repr=False)
class Unsupported(_Described):
    """The place is of a kind on which the guarantees do not hold."""

    code = "unsupported"
    exit_code = 69


@dataclass(eq=False, repr=False)
class LockBusy(CrewlogError):
    """Another process held a lock for longer than the caller would wait."""

    code = "lock_busy"
    exit_code = 75
    WHAT = "the store is locked"
    WHY = "held by {holder} for {waited_s:.1f} s"

    where: str
    _: KW_ONLY
    waited_s: float
    holder: str
    remedy: str = "Try again; a stopped holder keeps its lock until it goes on or ends"


# -- the operating system failed ------------------------------------------------------------


@dataclass(eq=False, repr=False)
class StorageFull(CrewlogError):
    """There was no room; nothing of the change was written."""

    code = "storage_full"
    exit_code = 74
    WHAT = "no room for the change"
    REMEDY = "Make room, then try again"

    where: str
    _: KW_ONLY
    why: str


@dataclass(eq=False, repr=False)
class StorageFailed(_Described):
    """The operating system refused or failed a file operation; this is never about content."""

    code = "storage_failed"
    exit_code = 74


@dataclass(eq=False, repr=False)
class StorePoisoned(CrewlogError):
    """An earlier sync failed, so nothing may be acknowledged any more."""

    code = "store_poisoned"
    exit_code = 74
    WHAT = "the store takes no more changes"
    REMEDY = "What was acknowledged stays readable; check the disk, then: crewlog repair"

    where: str
    _: KW_ONLY
    why: str
    outcome: Outcome = "not_written"


@dataclass(eq=False, repr=False)
class AppendUncertain(CrewlogError):
    """The change was written but its durability could not be confirmed."""

    code = "append_uncertain"
    exit_code = 74
    WHAT = "the change was written but is not known to be durable"
    REMEDY = "Read the registry before trying again"
    OUTCOME = "unknown"

    where: str
    _: KW_ONLY
    why: str


# -- a server failed ------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Unavailable(CrewlogError):
    """No server answered in time; nothing of the change was sent."""

    code = "unavailable"
    exit_code = 69

    where: str
    _: KW_ONLY
    why: str
    what: str = "no quorum of the servers answers"
    remedy: str = "Check the address, and start the servers; then try again (crewlog doctor)"


@dataclass(eq=False, repr=False)
class UnknownOutcome(CrewlogError):
    """The change was sent and no answer came."""

    code = "unknown_outcome"
    exit_code = 74
    WHAT = "the change was sent and may yet be made"
    REMEDY = "Read the registry before trying again"
    OUTCOME = "unknown"

    where: str
    _: KW_ONLY
    why: str


@dataclass(eq=False, repr=False)
class QuotaExceeded(CrewlogError):
    """The server has no room left for any change; history can still be dropped."""

    code = "quota_exceeded"
    exit_code = 74
    WHAT = "the server's quota is full"
    WHY = "it takes no change but removals until its alarm is disarmed"
    REMEDY = "Drop history: crewlog compact --keep-history 30d --yes; then see docs/etcd.md"

    where: str


@dataclass(eq=False, repr=False)
class AuthFailed(CrewlogError):
    """The server does not let us in, or not that far."""

    code = "auth_failed"
    exit_code = 77
    WHAT = "the server refuses us"

    where: str
    _: KW_ONLY
    why: str
    remedy: str = "Check the user, its password and roles, and the certificates"


# -- the data are damaged -------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class DataDamaged(CrewlogError):
    """Base of all findings of damage: bytes on disk are not what was written."""

    code = "data_damaged"
    exit_code = 65


@dataclass(eq=False, repr=False)
class LogCorrupt(DataDamaged):
    """Acknowledged lines of the log are damaged at `offset` bytes, which `proof` proves."""

    code = "log_corrupt"
    WHAT = "the log is damaged"
    WHERE = "{segment} at byte {offset}, where seq {seq} should stand"
    WHY = "{reason} ({proof})"
    REMEDY = "`crewlog repair` says what can be saved, and changes nothing by itself"

    segment: str
    _: KW_ONLY
    offset: int
    seq: int
    reason: str
    proof: str


@dataclass(eq=False, repr=False)
class ArchiveDamaged(DataDamaged):
    """An archived segment is damaged, at `offset` bytes of its uncompressed content."""

    code = "archive_damaged"
    WHAT = "the archive is damaged"
    WHERE = "{segment} at byte {offset}, where seq {seq} should stand"
    WHY = "{reason}"
    REMEDY = "The registry stays usable; restore this file from a backup"

    segment: str
    _: KW_ONLY
    offset: int
    seq: int
    reason: str


@dataclass(eq=False, repr=False)
class SegmentMissing(DataDamaged):
    """A segment that the others prove to have existed is gone: events `first` to `last`."""

    code = "segment_missing"
    WHAT = "part of the log is missing"
    WHY = "events {first} to {last} are in no segment"
    REMEDY = "Restore the missing file from a backup"

    where: str
    _: KW_ONLY
    first: int
    last: int


@dataclass(eq=False, repr=False)
class LogRegressed(DataDamaged):
    """The log ends before a place that is known to have been durable."""

    code = "log_regressed"
    WHAT = "the log is shorter than it was"
    REMEDY = "Nothing was changed; restore the missing part from a backup"

    where: str
    _: KW_ONLY
    why: str


@dataclass(eq=False, repr=False)
class HistoryDiverged(DataDamaged):
    """Log and snapshot tell different histories."""

    code = "history_diverged"
    WHAT = "log and snapshot disagree"
    WHY = "the hash of event {seq} differs"
    REMEDY = "Nothing was changed; one of them is from another store or time"

    where: str
    _: KW_ONLY
    seq: int


@dataclass(eq=False, repr=False)
class LossRefused(DataDamaged):
    """A repair would give up acknowledged events that nobody has agreed to lose."""

    code = "loss_refused"
    WHAT = "events would be lost for good"

    where: str
    _: KW_ONLY
    losses: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        """Name the ranges of seqs, both ends included."""
        self.losses = tuple(self.losses)
        self.why = ", ".join(f"{first} to {last}" for first, last in self.losses)
        ranges = " ".join(f"--accept-loss {first}..{last}" for first, last in self.losses)
        self.remedy = f"Restore a backup; or, if there is none: crewlog repair --yes {ranges}"
        super().__post_init__()


@dataclass(eq=False, repr=False)
class HistoryRewound(DataDamaged):
    """The store is another one, or an older state of itself, than it was: a backup came back."""

    code = "history_rewound"
    WHAT = "the store is not the one that it was"
    WHY = "seq {seen} was seen, and what is there now, up to {found}, does not hold it"
    REMEDY = "If a backup was restored on purpose, open the registry again"

    where: str
    _: KW_ONLY
    seen: int
    found: int


@dataclass(eq=False, repr=False)
class SnapshotCorrupt(DataDamaged):
    """A snapshot is damaged and could not be rebuilt from its predecessor and the log."""

    code = "snapshot_corrupt"
    WHAT = "the snapshot is damaged"
    REMEDY = "Nothing was changed; run `crewlog verify` for the whole picture"

    where: str
    _: KW_ONLY
    why: str


@dataclass(eq=False, repr=False)
class CursorCorrupt(DataDamaged):
    """A cursor's file is damaged."""

    code = "cursor_corrupt"
    WHAT = "the cursor is damaged"
    WHY = "neither of its slots is whole"
    REMEDY = "Set it anew: crewlog cursor rm {name}, then crewlog cursor set {name} SEQ"

    where: str
    name: str = "NAME"


@dataclass(eq=False, repr=False)
class LegacyCorrupt(DataDamaged):
    """A file that should be an older registry.json is not one."""

    code = "legacy_corrupt"
    WHAT = "not an older registry"
    REMEDY = "Nothing was imported"

    where: str
    _: KW_ONLY
    why: str


def from_oserror(error: OSError, what: str, *, where: str) -> CrewlogError:
    """Wrap a failure of the operating system; it is never reported as damage."""
    why = error.strerror or type(error).__name__
    if error.errno in FULL:
        return StorageFull(where, why=why)
    if isinstance(error, PermissionError):
        return UnsafePermissions(what, where=where, why=why, remedy="Check its owner and mode")
    remedy = _HELP.get(error.errno or 0, "Check the disk, then try again")
    return StorageFailed(what, where=where, why=why, remedy=remedy)


def not_started(program: str, error: OSError) -> SpawnFailed:
    """Wrap what the system said when it was to start a program."""
    named = "" if error.filename is None else f": {error.filename}"
    why = (error.strerror or type(error).__name__) + named
    return SpawnFailed(program, why=why, remedy=_HELP.get(error.errno or 0, SpawnFailed.remedy))
