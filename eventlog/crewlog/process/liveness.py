"""Judge from evidence whether a worker lives: a decision table, pure.

DEAD needs proof; whatever is not proven either way is UNKNOWN and never collected by itself.
The first row that matches wins; rows carry the numbers of the table in docs/protocol.md.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, NamedTuple, TypeAlias

from crewlog.model.events import Identity, JsonObject, StatusSource

RESERVED_S: Final = 60.0

# What opening a pidfd said: a descriptor, no such process, the pid is a thread, or not possible.
Opened: TypeAlias = Literal["yes", "no_such_process", "thread", "unsupported"]
LeaseState: TypeAlias = Literal["held", "free", "absent"]
Killed: TypeAlias = Literal["exists", "no_such_process"]


class LeaseSeen(NamedTuple):
    """What a look at a lease shows: who holds it, and its last beat.

    `beat_age_s` is None where it is not known; `beat_expired` says that the beat has run out by the
    clock of a server that tells no age. `said` is what the worker says of itself, JSON.
    """

    state: LeaseState
    beat_age_s: float | None = None
    beat_expired: bool = False
    said: bytes = b""


class Verdict(StrEnum):
    """What the evidence proves."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"


class Flag(StrEnum):
    """What else is known of a worker that lives; derived when it is looked at, never logged.

    `STALLED`: no beat within its heartbeat_s. `ORPHANED`: its owner is proven dead. `UNREACHABLE`:
    nothing listens on its socket. `PAUSED`: it was stopped by a signal, or its control group is
    frozen; it goes on when that ends.
    """

    STALLED = "stalled"
    ORPHANED = "orphaned"
    UNREACHABLE = "unreachable"
    PAUSED = "paused"


class Evidence(NamedTuple):
    """What was observed of one worker's process; None means: not looked at, or not to be had.

    A tuple, because one is made for each worker looked at, and a frozen dataclass takes five times
    as long to make.
    """

    platform: Literal["linux", "other"] = "linux"
    boot_id: str = ""
    host_id: str = ""
    pid_ns: str | None = None
    boot_began_after_record: bool = False
    log_of_this_boot_follows: bool | None = None
    local_file_system: bool = True
    owner_dead: bool = False
    record_age_s: float = 0.0
    lease: LeaseState | None = None
    beat_age_s: float | None = None
    beat_expired: bool = False
    heartbeat_s: float | None = None
    found_by_scan: bool | None = None
    scan_complete: bool = False
    opened: Opened | None = None
    pidfd_id: int | None = None
    ended: bool | None = None
    start_ticks: int | None = None
    task_state: str | None = None
    threads: int | None = None
    exit_code: int | None = None
    exit_signal: int | None = None
    exit_source: StatusSource | None = None
    killed: Killed | None = None
    access_denied: bool = False
    sock: Literal["answers", "refused", "absent"] | None = None
    paused: bool | None = None
    status: str | None = None
    note: str | None = None

    def seen(self) -> JsonObject:
        """Return what was really observed, as JSON for an event or a person."""
        return {k: v for k, v in self._asdict().items() if v != _NOTHING[k]}


_NOTHING: Final = Evidence()._asdict()


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """A verdict, its cause, and the evidence it rests on; flags of one that lives."""

    verdict: Verdict
    cause: str
    evidence: Evidence
    flags: frozenset[Flag] = frozenset()

    @property
    def alive(self) -> bool:
        """Say whether the worker is proven to live."""
        return self.verdict is Verdict.ALIVE

    @property
    def dead(self) -> bool:
        """Say whether the worker is proven to be dead."""
        return self.verdict is Verdict.DEAD

    @property
    def status(self) -> str | None:
        """Return what a living worker says it does: busy, idle, waiting; None if nothing."""
        return self.evidence.status if self.alive else None

    @property
    def note(self) -> str | None:
        """Return what a living worker says beside that, None if nothing."""
        return self.evidence.note if self.alive else None


def judge(identity: Identity | None, seen: Evidence, *, final: bool) -> Liveness:
    """Return the first matching row's verdict.

    Raises ValueError for an identity that no registration can have written (row 4).
    """
    verdict, cause = _row(identity, seen, final=final)
    flags = _flags(seen) if verdict is Verdict.ALIVE else _NO_FLAGS
    return Liveness(verdict=verdict, cause=cause, evidence=seen, flags=flags)


_NO_FLAGS: Final[frozenset[Flag]] = frozenset()


def _flags(seen: Evidence) -> frozenset[Flag]:
    if not (seen.owner_dead or seen.heartbeat_s is not None or seen.sock or seen.paused):
        return _NO_FLAGS
    late = seen.beat_expired or (
        seen.heartbeat_s is not None
        and seen.beat_age_s is not None
        and seen.beat_age_s > seen.heartbeat_s
    )
    flags = {
        Flag.STALLED: late,
        Flag.ORPHANED: seen.owner_dead,
        Flag.UNREACHABLE: seen.sock in {"refused", "absent"},
        Flag.PAUSED: seen.paused is True,
    }
    return frozenset(flag for flag, holds in flags.items() if holds)


_Row: TypeAlias = tuple[Verdict, str]
_ALIVE: Final = Verdict.ALIVE
_DEAD: Final = Verdict.DEAD
_UNKNOWN: Final = Verdict.UNKNOWN


def _row(identity: Identity | None, seen: Evidence, *, final: bool) -> _Row:
    if final:  # 1
        return _DEAD, "recorded"
    if identity is None:  # 2, 3
        if seen.owner_dead and seen.record_age_s > RESERVED_S:
            return _DEAD, "abandoned"
        return _UNKNOWN, "reserved"
    if type(identity.pid) is not int or identity.pid < 1:  # 4
        message = f"pid {identity.pid!r} is not a process id"
        raise ValueError(message)
    if identity.boot_id != seen.boot_id:
        return _other_boot(identity, seen)
    if seen.platform == "other":
        return _portable(identity, seen)
    if not same_scope(identity.pid_ns, seen.pid_ns):
        return _other_namespace(seen)
    return _same_namespace(identity, seen)


def same_scope(recorded: str | None, here: str | None) -> bool:
    """Compare namespaces as "inode:start ticks of its pid 1"; the ticks may be hidden from us."""
    if recorded == here:
        return True
    inode, _, ticks = (recorded or "").partition(":")
    inode_here, _, ticks_here = (here or "").partition(":")
    return inode == inode_here and (ticks == ticks_here or not ticks or not ticks_here)


def _other_boot(identity: Identity, seen: Evidence) -> _Row:
    same_host = identity.host_id == seen.host_id != ""
    older = seen.boot_began_after_record or seen.log_of_this_boot_follows is True
    if seen.lease == "held" and seen.local_file_system:  # 7: somebody holds it, whatever ids say
        return _UNKNOWN, "foreign_host"
    if same_host and older and seen.local_file_system:  # 5
        return _DEAD, "rebooted"
    if seen.lease == "free":  # 6
        return _DEAD, "lease_released"
    if seen.lease == "held" and not seen.local_file_system:  # 25: a server keeps it
        return _ALIVE, "lease"
    if same_host and seen.local_file_system:  # 26
        return _UNKNOWN, "clock_disputed"
    return _UNKNOWN, "foreign_host"  # 7


def _other_namespace(seen: Evidence) -> _Row:
    if seen.lease == "held":  # 8
        return _ALIVE, "lease"
    if seen.found_by_scan:  # 10, before a lease is believed: its file may have been replaced
        return _ALIVE, "found_in_namespace"
    if seen.lease == "free":  # 9
        return _DEAD, "lease_released"
    if seen.ended:  # 10, but what was found is a zombie
        return _DEAD, "exited"
    if seen.found_by_scan is False and seen.scan_complete:  # 11
        return _DEAD, "not_found"
    return _UNKNOWN, "foreign_pid_namespace"  # 12


def _same_namespace(identity: Identity, seen: Evidence) -> _Row:
    if seen.opened == "no_such_process":  # 13
        return _DEAD, "no_such_process"
    if seen.opened == "thread":  # 14
        return _DEAD, "pid_is_thread"
    if seen.opened == "yes" and identity.pidfd_id is not None and seen.pidfd_id is not None:
        if identity.pidfd_id != seen.pidfd_id:  # 15
            return _DEAD, "pid_reused"
        if seen.ended:  # 16
            return _DEAD, "exited"
        return _ALIVE, "identity"  # 17
    return _by_start_time(identity, seen)


def _by_start_time(identity: Identity, seen: Evidence) -> _Row:
    if identity.start_ticks is not None and seen.start_ticks is not None:
        if identity.start_ticks != seen.start_ticks:  # 18
            return _DEAD, "pid_reused"
        zombie = seen.task_state == "Z" and seen.threads == 1
        if seen.ended or zombie or seen.task_state == "X":  # 19
            return _DEAD, "exited"
        return _ALIVE, "start_time"  # 20
    if seen.killed == "no_such_process":  # 21
        return _DEAD, "no_such_process"
    return _UNKNOWN, "identity_unverifiable"  # 22


def _portable(identity: Identity, seen: Evidence) -> _Row:  # 24
    if seen.killed == "no_such_process":
        return _DEAD, "no_such_process"
    if seen.access_denied or identity.start_ticks is None or seen.start_ticks is None:
        return _UNKNOWN, "identity_unverifiable"
    if identity.start_ticks != seen.start_ticks:
        return _DEAD, "pid_reused"
    if seen.ended:
        return _DEAD, "exited"
    return _ALIVE, "start_time"
