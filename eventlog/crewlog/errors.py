"""Hold every error of crewlog: what failed, where, why, what became of the change, what to do.

`outcome` is the promise about the change that was asked for:

- ``"not_written"``: nothing of it is in the log, and nothing ever will be;
- ``"unknown"``: it may or may not become durable; read the registry before trying again.

A return value means durable. Errors of reading carry ``"not_written"`` too.
"""

import errno
from collections.abc import Sequence
from typing import ClassVar, Final, Literal, TypeAlias

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
Outcome: TypeAlias = Literal["not_written", "unknown"]


class CrewlogError(Exception):
    """Base of every error that crewlog raises on purpose; abstract, never raised itself.

    The message reads: what failed, where: why. What to do.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 70

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        why: str = "",
        remedy: str = "",
        outcome: Outcome = "not_written",
    ) -> None:
        """Compose the message; every part stays readable as an attribute."""
        self.what = what
        self.where = where
        self.why = why
        self.remedy = remedy
        self.outcome: Outcome = outcome
        text = what + (f", {where}" if where else "") + (f": {why}" if why else "")
        super().__init__(f"{text}. {remedy}" if remedy else text)

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


# -- the honest "no" ------------------------------------------------------------------------


class WorkerNotFound(CrewlogError):
    """No worker of that sid is in the registry."""

    code = "worker_not_found"
    exit_code = 1

    def __init__(self, sid: str) -> None:
        """Name the sid that was asked for."""
        self.sid = sid
        super().__init__(
            f"no worker {sid!r}", remedy="`crewlog ls --all` lists every sid the registry holds"
        )


class WorkerExists(CrewlogError):
    """A worker of that sid is not final and not proven dead."""

    code = "worker_exists"
    exit_code = 1

    def __init__(self, sid: str, *, pid: int, rev: int, state: str) -> None:
        """Name the holder of the sid."""
        self.sid = sid
        self.pid = pid
        self.rev = rev
        self.state = state
        super().__init__(
            f"worker {sid!r} exists",
            why=f"pid {pid} holds this sid in state {state!r} (rev {rev})",
            remedy="Choose another sid, or end that worker first",
        )


class StaleRevision(CrewlogError):
    """The worker changed since the caller read it."""

    code = "stale_revision"
    exit_code = 1

    def __init__(self, sid: str, *, expected: int, actual: int | None) -> None:
        """Name the revision that was expected and the one that is there (None: no such worker)."""
        self.sid = sid
        self.expected = expected
        self.actual = actual
        super().__init__(
            f"worker {sid!r} changed since it was read",
            why=f"expected rev {expected}, found {'none' if actual is None else actual}",
            remedy="Read it again and decide anew",
        )


class InvalidTransition(CrewlogError):
    """The rules of states do not allow this event in the worker's present state."""

    code = "invalid_transition"
    exit_code = 1

    def __init__(self, sid: str, *, event: str, state: str) -> None:
        """Name the event that was refused and the state it met."""
        self.sid = sid
        self.event = event
        self.state = state
        super().__init__(
            f"worker {sid!r} cannot take {event}",
            why=f"its state is {state!r}",
            remedy=f"`crewlog history --sid {sid}` shows how it came there",
        )


class ProcessNotFound(CrewlogError):
    """There is no such process to register."""

    code = "process_not_found"
    exit_code = 1

    def __init__(self, pid: int) -> None:
        """Name the pid."""
        self.pid = pid
        super().__init__(
            f"no process {pid}",
            why="it has ended or never was",
            remedy="Register a worker while it runs",
        )


class IdentityMismatch(CrewlogError):
    """The process that bears the recorded pid is not the recorded process."""

    code = "identity_mismatch"
    exit_code = 1

    def __init__(self, sid: str, *, pid: int, cause: str) -> None:
        """Name the worker and what gave the stranger away."""
        self.sid = sid
        self.pid = pid
        self.cause = cause
        super().__init__(
            f"pid {pid} is not worker {sid!r}", why=cause, remedy="Nothing was sent to it"
        )


class StopRefused(CrewlogError):
    """A worker that must not be signalled from here; nothing was sent."""

    code = "stop_refused"
    exit_code = 1

    def __init__(self, sid: str, *, pid: int, why: str, remedy: str) -> None:
        """Name the worker and the rule that protects it."""
        self.sid = sid
        self.pid = pid
        super().__init__(f"worker {sid!r} is not stopped from here", why=why, remedy=remedy)


class SpawnFailed(CrewlogError):
    """The program of a worker could not be started; the registry records that it ended."""

    code = "spawn_failed"
    exit_code = 127

    def __init__(self, program: str, *, why: str) -> None:
        """Name the program and the system's reason."""
        self.program = program
        super().__init__(
            f"cannot start {program!r}", why=why, remedy="Check the name, PATH, cwd and its mode"
        )


class LeaseMissing(CrewlogError):
    """The worker has no lease to beat on."""

    code = "lease_missing"
    exit_code = 1

    def __init__(self, sid: str) -> None:
        """Name the worker."""
        self.sid = sid
        super().__init__(
            f"worker {sid!r} has no lease",
            why="it was registered without one, or has ended",
            remedy="Give it one: lease=True or heartbeat_s=SECONDS, or `crewlog run --lease`",
        )


class PlanInvalid(CrewlogError):
    """A saved plan of a collection cannot be carried out on this store."""

    code = "plan_invalid"
    exit_code = 65

    def __init__(self, where: str, *, why: str) -> None:
        """Name the plan and what is wrong with it."""
        super().__init__(
            "cannot carry out this plan",
            where=where,
            why=why,
            remedy="Make a new one: crewlog gc --plan FILE",
        )


class CompactedError(CrewlogError):
    """The history that was asked for is no longer kept."""

    code = "compacted"
    exit_code = 1

    def __init__(self, *, requested: int, oldest: int) -> None:
        """Name what was asked for and what is still there; `snapshot_seq` is the state's before."""
        self.requested = requested
        self.oldest = oldest
        self.snapshot_seq = oldest - 1
        super().__init__(
            f"events before seq {oldest} are no longer kept",
            why=f"seq {requested} was asked for; up to seq {oldest - 1} only the state is kept",
            remedy=f"Start from the state, or from seq {oldest - 1}",
        )


class CollectRefused(CrewlogError):
    """So many workers seem dead at once that the observer is to be doubted first."""

    code = "collect_refused"
    exit_code = 1

    def __init__(self, *, deaths: int, living: int) -> None:
        """Name how many of the living would be declared dead."""
        self.deaths = deaths
        self.living = living
        super().__init__(
            f"{deaths} of {living} workers seem dead at once",
            why="this looks like a fault of the observer (namespace, /proc, wrong machine)",
            remedy="Look with `crewlog gc --dry-run`; if it is true: crewlog gc --force",
        )


class CursorBusy(CrewlogError):
    """Another subscriber owns the cursor."""

    code = "cursor_busy"
    exit_code = 75

    def __init__(self, name: str, *, holder: str) -> None:
        """Name the cursor and, where the kernel tells, its owner."""
        self.name = name
        self.holder = holder
        super().__init__(
            f"cursor {name!r} is in use",
            why=f"{holder} owns it",
            remedy="One subscriber at a time: end the other one, or use another name",
        )


class WaitTimeout(CrewlogError):
    """What was waited for did not happen in time."""

    code = "wait_timeout"
    exit_code = 124

    def __init__(self, what: str, *, waited_s: float) -> None:
        """Say what was waited for and how long, in seconds."""
        self.waited_s = waited_s
        super().__init__(
            f"{what} did not happen",
            why=f"within {waited_s:g} s",
            remedy="Wait longer, or see `crewlog history` for what happened instead",
        )


class WorkerEnded(CrewlogError):
    """A worker ended while its being something else was waited for."""

    code = "worker_ended"
    exit_code = 1

    def __init__(self, sid: str, *, state: str, wanted: str) -> None:
        """Name the worker, how it ended, and what it should have become."""
        self.sid = sid
        self.state = state
        self.wanted = wanted
        super().__init__(
            f"worker {sid!r} will not become {wanted!r}",
            why=f"it has ended as {state!r}",
            remedy=f"See `crewlog history --sid {sid}`",
        )


# -- the store is not usable as asked -------------------------------------------------------


class RegistryClosed(CrewlogError):
    """The registry object was closed."""

    code = "closed"

    def __init__(self, where: str) -> None:
        """Name the store."""
        super().__init__(
            "the registry is closed", where=where, remedy="Open it again with crewlog.open()"
        )


class StoreMissing(CrewlogError):
    """There is no store at this place, or it was removed while in use."""

    code = "store_missing"
    exit_code = 66

    def __init__(
        self,
        where: str,
        *,
        why: str = "there is no store.json",
        remedy: str = "The first registration creates one; check --dir and CREWLOG_DIR",
    ) -> None:
        """Name the place."""
        super().__init__("no registry", where=where, why=why, remedy=remedy)


class NotAStore(CrewlogError):
    """The directory holds files, but not those of a store."""

    code = "not_a_store"
    exit_code = 66


class FormatTooNew(CrewlogError):
    """A newer crewlog wrote what this one must not guess at."""

    code = "format_too_new"
    exit_code = 78

    def __init__(self, where: str, *, why: str) -> None:
        """Name the file and the unknown feature."""
        super().__init__(
            "this store needs a newer crewlog", where=where, why=why, remedy="Upgrade crewlog"
        )


class UnsafePermissions(CrewlogError):
    """A file or directory of the store could be read or replaced by others."""

    code = "unsafe_permissions"
    exit_code = 77


class Unsupported(CrewlogError):
    """The place is of a kind on which the guarantees do not hold."""

    code = "unsupported"
    exit_code = 69


class LockBusy(CrewlogError):
    """Another process held a lock for longer than the caller would wait."""

    code = "lock_busy"
    exit_code = 75

    def __init__(self, where: str, *, waited_s: float, holder: str) -> None:
        """Name the lock and, where the kernel tells, its holder."""
        self.waited_s = waited_s
        self.holder = holder
        super().__init__(
            "the store is locked",
            where=where,
            why=f"held by {holder} for {waited_s:.1f} s",
            remedy="Try again; a stopped holder keeps its lock until it goes on or ends",
        )


# -- the operating system failed ------------------------------------------------------------


class StorageFull(CrewlogError):
    """There was no room; nothing of the change was written."""

    code = "storage_full"
    exit_code = 74

    def __init__(self, where: str, *, why: str) -> None:
        """Name the file and the system's reason."""
        super().__init__(
            "no room for the change", where=where, why=why, remedy="Make room, then try again"
        )


class StorageFailed(CrewlogError):
    """The operating system refused or failed a file operation; this is never about content."""

    code = "storage_failed"
    exit_code = 74


class StorePoisoned(CrewlogError):
    """An earlier sync failed, so nothing may be acknowledged any more."""

    code = "store_poisoned"
    exit_code = 74

    def __init__(self, where: str, *, why: str, outcome: Outcome = "not_written") -> None:
        """Name the store and the recorded failure."""
        super().__init__(
            "the store takes no more changes",
            where=where,
            why=why,
            remedy="What was acknowledged stays readable; check the disk, then: crewlog repair",
            outcome=outcome,
        )


class AppendUncertain(CrewlogError):
    """The change was written but its durability could not be confirmed."""

    code = "append_uncertain"
    exit_code = 74

    def __init__(self, where: str, *, why: str) -> None:
        """Say why nobody can know."""
        super().__init__(
            "the change was written but is not known to be durable",
            where=where,
            why=why,
            remedy="Read the registry before trying again",
            outcome="unknown",
        )


# -- a server failed ------------------------------------------------------------------------


class Unavailable(CrewlogError):
    """No server answered in time; nothing of the change was sent."""

    code = "unavailable"
    exit_code = 69

    def __init__(
        self, where: str, *, why: str, what: str = "no quorum of the servers answers"
    ) -> None:
        """Name the servers and what the last of them said."""
        remedy = "Check the address, and start the servers; then try again (crewlog doctor)"
        super().__init__(what, where=where, why=why, remedy=remedy)


class UnknownOutcome(CrewlogError):
    """The change was sent and no answer came."""

    code = "unknown_outcome"
    exit_code = 74

    def __init__(self, where: str, *, why: str) -> None:
        """Say why nobody can know."""
        super().__init__(
            "the change was sent and may yet be made",
            where=where,
            why=why,
            remedy="Read the registry before trying again",
            outcome="unknown",
        )


class QuotaExceeded(CrewlogError):
    """The server has no room left for any change; history can still be dropped."""

    code = "quota_exceeded"
    exit_code = 74

    def __init__(self, where: str) -> None:
        """Name the server."""
        super().__init__(
            "the server's quota is full",
            where=where,
            why="it takes no change but removals until its alarm is disarmed",
            remedy="Drop history: crewlog compact --keep-history 30d --yes; then see docs/etcd.md",
        )


class AuthFailed(CrewlogError):
    """The server does not let us in, or not that far."""

    code = "auth_failed"
    exit_code = 77

    def __init__(self, where: str, *, why: str, remedy: str = "") -> None:
        """Name the server and what it said."""
        super().__init__(
            "the server refuses us",
            where=where,
            why=why,
            remedy=remedy or "Check the user, its password and roles, and the certificates",
        )


# -- the data are damaged -------------------------------------------------------------------


class DataDamaged(CrewlogError):
    """Base of all findings of damage: bytes on disk are not what was written."""

    code = "data_damaged"
    exit_code = 65


class LogCorrupt(DataDamaged):
    """Acknowledged lines of the log are damaged."""

    code = "log_corrupt"

    def __init__(self, segment: str, *, offset: int, seq: int, reason: str, proof: str) -> None:
        """Name the place (bytes), the seq expected there, what is wrong, and the proof."""
        self.segment = segment
        self.offset = offset
        self.seq = seq
        self.reason = reason
        self.proof = proof
        super().__init__(
            "the log is damaged",
            where=f"{segment} at byte {offset}, where seq {seq} should stand",
            why=f"{reason} ({proof})",
            remedy="`crewlog repair` says what can be saved, and changes nothing by itself",
        )


class ArchiveDamaged(DataDamaged):
    """An archived segment is damaged: the registry is usable, the history is not whole."""

    code = "archive_damaged"

    def __init__(self, segment: str, *, offset: int, seq: int, reason: str) -> None:
        """Name the place (bytes of the uncompressed segment) and what is wrong there."""
        self.segment = segment
        self.offset = offset
        self.seq = seq
        self.reason = reason
        super().__init__(
            "the archive is damaged",
            where=f"{segment} at byte {offset}, where seq {seq} should stand",
            why=reason,
            remedy="The registry stays usable; restore this file from a backup",
        )


class SegmentMissing(DataDamaged):
    """A segment that the others prove to have existed is gone."""

    code = "segment_missing"

    def __init__(self, where: str, *, first: int, last: int) -> None:
        """Name the missing range of seqs, both ends included."""
        self.first = first
        self.last = last
        super().__init__(
            "part of the log is missing",
            where=where,
            why=f"events {first} to {last} are in no segment",
            remedy="Restore the missing file from a backup",
        )


class LogRegressed(DataDamaged):
    """The log ends before a place that is known to have been durable."""

    code = "log_regressed"

    def __init__(self, where: str, *, why: str) -> None:
        """Name the file and what proves that it was longer."""
        super().__init__(
            "the log is shorter than it was",
            where=where,
            why=why,
            remedy="Nothing was changed; restore the missing part from a backup",
        )


class HistoryDiverged(DataDamaged):
    """Log and snapshot tell different histories."""

    code = "history_diverged"

    def __init__(self, where: str, *, seq: int) -> None:
        """Name the seq at which their hashes differ."""
        self.seq = seq
        super().__init__(
            "log and snapshot disagree",
            where=where,
            why=f"the hash of event {seq} differs",
            remedy="Nothing was changed; one of them is from another store or time",
        )


class LossRefused(DataDamaged):
    """A repair would give up acknowledged events that nobody has agreed to lose."""

    code = "loss_refused"

    def __init__(self, where: str, *, losses: Sequence[tuple[int, int]]) -> None:
        """Name the ranges of seqs, both ends included."""
        self.losses = tuple(losses)
        ranges = " ".join(f"--accept-loss {first}..{last}" for first, last in losses)
        super().__init__(
            "events would be lost for good",
            where=where,
            why=", ".join(f"{first} to {last}" for first, last in losses),
            remedy=f"Restore a backup; or, if there is none: crewlog repair --yes {ranges}",
        )


class HistoryRewound(DataDamaged):
    """The store is another one, or an older state of itself, than it was: a backup came back."""

    code = "history_rewound"

    def __init__(self, where: str, *, seen: int, found: int) -> None:
        """Name the seqs that were seen before and that are there now."""
        self.seen = seen
        self.found = found
        super().__init__(
            "the store is not the one that it was",
            where=where,
            why=f"seq {seen} was seen, and what is there now, up to {found}, does not hold it",
            remedy="If a backup was restored on purpose, open the registry again",
        )


class SnapshotCorrupt(DataDamaged):
    """A snapshot is damaged and could not be rebuilt from its predecessor and the log."""

    code = "snapshot_corrupt"

    def __init__(self, where: str, *, why: str) -> None:
        """Name the file and what is wrong with it."""
        super().__init__(
            "the snapshot is damaged",
            where=where,
            why=why,
            remedy="Nothing was changed; run `crewlog verify` for the whole picture",
        )


class CursorCorrupt(DataDamaged):
    """A cursor's file is damaged."""

    code = "cursor_corrupt"

    def __init__(self, where: str) -> None:
        """Name the file."""
        super().__init__(
            "the cursor is damaged",
            where=where,
            why="neither of its slots is whole",
            remedy="Set it anew: crewlog cursor rm NAME, then crewlog cursor set NAME SEQ",
        )


class LegacyCorrupt(DataDamaged):
    """A file that should be an older registry.json is not one."""

    code = "legacy_corrupt"

    def __init__(self, where: str, *, why: str) -> None:
        """Name the file and what is wrong with it."""
        super().__init__(
            "not an older registry", where=where, why=why, remedy="Nothing was imported"
        )


def from_oserror(error: OSError, what: str, *, where: str) -> CrewlogError:
    """Wrap a failure of the operating system; it is never reported as damage."""
    why = error.strerror or type(error).__name__
    if error.errno in FULL:
        return StorageFull(where, why=why)
    if isinstance(error, PermissionError):
        return UnsafePermissions(what, where=where, why=why, remedy="Check its owner and mode")
    return StorageFailed(what, where=where, why=why, remedy="Check the disk, then try again")
