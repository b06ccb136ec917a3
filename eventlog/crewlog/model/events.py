"""Define the facts: lines, records, identities, workers, events and what a watcher yields.

JSON shapes are `TypedDict`s, because the log, the snapshot and the fold work on plain JSON
objects; what users hold are frozen dataclasses built from them.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import (
    TYPE_CHECKING,
    Final,
    Literal,
    NamedTuple,
    NotRequired,
    TypeAlias,
    TypedDict,
    cast,
)

from crewlog.model.readonly import ReadOnly

JsonValue: TypeAlias = (
    "str | int | float | bool | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
)
JsonObject: TypeAlias = dict[str, JsonValue]

REGISTERED: Final = "worker.registered"
READY: Final = "worker.ready"
UPDATED: Final = "worker.updated"
DRAINING: Final = "worker.draining"
STOP_REQUESTED: Final = "worker.stop_requested"
EXITED: Final = "worker.exited"
LOST: Final = "worker.lost"
RELEASED: Final = "worker.released"
PRUNED: Final = "worker.pruned"
WORKER_TYPES: Final = (
    REGISTERED,
    READY,
    UPDATED,
    DRAINING,
    STOP_REQUESTED,
    EXITED,
    LOST,
    RELEASED,
    PRUNED,
)

# What callers write; of an event that is read, `known_type` is one of these or None.
EventType: TypeAlias = Literal[
    "worker.registered",
    "worker.ready",
    "worker.updated",
    "worker.draining",
    "worker.stop_requested",
    "worker.exited",
    "worker.lost",
    "worker.released",
    "worker.pruned",
    "_segment",
    "_seal",
    "_snapshot",
    "_recovered",
    "_gap",
    "_repaired",
    "_archive_dropped",
]
StateName: TypeAlias = Literal[
    "starting", "ready", "draining", "stopping", "exited", "failed", "lost", "released"
]
NextState: TypeAlias = Literal["ready", "draining", "stopping"]

ENDS: Final = (EXITED, LOST)
# What brings a worker to a final state.
ENDING: Final = frozenset[EventType]({EXITED, LOST, RELEASED})

# The store's own types; a reader skips an unknown `_x…` and refuses any other unknown `_…`.
SEGMENT: Final = "_segment"
SEAL: Final = "_seal"
SNAPSHOT: Final = "_snapshot"
RECOVERED: Final = "_recovered"
# It stands for the lost events data.first to data.last, the latter being its own seq.
GAP: Final = "_gap"
REPAIRED: Final = "_repaired"
DROPPED: Final = "_archive_dropped"
OWN_TYPES: Final = frozenset[EventType](
    {SEGMENT, SEAL, SNAPSHOT, RECOVERED, GAP, REPAIRED, DROPPED}
)


def is_failure(data: JsonObject) -> bool:
    """Say of an exit whether it was bad, by its code or a signal, and nobody had asked for it."""
    bad = data.get("signal") is not None or data.get("code") not in {None, 0}
    return bad and data.get("expected") is not True


def is_own(kind: str) -> bool:
    """Say whether a type of event is the store's own bookkeeping, not about a worker."""
    return kind.startswith("_")


class WorkerState(StrEnum):
    """State of a worker; the last four are final."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    EXITED = "exited"
    FAILED = "failed"
    LOST = "lost"
    RELEASED = "released"


FINAL = frozenset({WorkerState.EXITED, WorkerState.FAILED, WorkerState.LOST, WorkerState.RELEASED})
LIVING = frozenset(WorkerState) - FINAL


class IdentityRecord(TypedDict):
    """Identity of a process as JSON; see `Identity`."""

    pid: int
    pidfd_id: int | None
    start_ticks: int | None
    boot_id: str
    pid_ns: str | None
    host_id: str
    uid: int | None


class ExitRecord(TypedDict):
    """How a worker ended, as JSON; see `Exit`."""

    code: int | None
    signal: int | None
    source: str
    expected: bool
    cause: str | None


class GroupRecord(TypedDict):
    """What a process was in when it was registered, as JSON; see `Group`."""

    session: int
    pgid: int
    cgroup: str | None


class LogRecord(TypedDict):
    """Where a worker's output goes, as JSON; see `LogFile`."""

    path: str
    dev: int
    ino: int
    offset: int


# What is known of an end beside its code or signal, by its name in an event's data.
DETAILS: Final = ("ok", "core", "max_rss_bytes", "cpu_s", "error", "message", "oom", "tail")


class Record(TypedDict):
    """One worker in the state and in the snapshot; the first five fields are the old format's.

    The last ones are there only where they say something. `end` holds the DETAILS of an end, which
    are not in `exit` because version 0.1 knows all that may stand there.
    """

    sid: str
    pid: int
    sock: str
    version: str
    created_at: str
    state: str
    labels: dict[str, str]
    meta: JsonObject
    rev: int
    updated_at: str
    registered_seq: int
    generation: int
    identity: IdentityRecord | None
    owner: IdentityRecord | None
    exit: ExitRecord | None
    lease: str | None
    heartbeat_s: float | None
    sock_id: str | None
    ok_codes: NotRequired[list[int]]
    ends_with: NotRequired[str]
    log: NotRequired[LogRecord]
    group: NotRequired[GroupRecord]
    argv: NotRequired[list[str]]
    cwd: NotRequired[str]
    end: NotRequired[JsonObject]
    asked: NotRequired[int]  # the signal by which it was last asked to end


# The fields of a registration that a record takes over as they are, where they are there.
TAKEN_OVER: Final = ("ok_codes", "ends_with", "log", "group", "argv", "cwd")


class Line(TypedDict):
    """One line of the log, parsed."""

    v: int
    seq: int
    ts: str
    type: str
    sid: str
    actor: JsonObject
    data: JsonObject
    b: NotRequired[list[int]]
    synced: int
    prev: str
    crc: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Tell one process from every other that ever bore its pid.

    `pidfd_id` is the inode of a pidfd (unique for the life of a boot on Linux ≥ 6.9),
    `start_ticks` the start time in clock ticks since boot, `boot_id` the scope of both, `pid_ns`
    the scope of the pid, `host_id` a keyed hash of the machine id.
    """

    pid: int
    pidfd_id: int | None
    start_ticks: int | None
    boot_id: str
    pid_ns: str | None
    host_id: str
    uid: int | None

    def __str__(self) -> str:
        """Write the text form `pid:pidfd_id`, which kill(1) of util-linux reads too."""
        return f"{self.pid}:{self.pidfd_id}" if self.pidfd_id is not None else str(self.pid)

    def as_json(self) -> JsonObject:
        """Return it as JSON."""
        return {
            "pid": self.pid,
            "pidfd_id": self.pidfd_id,
            "start_ticks": self.start_ticks,
            "boot_id": self.boot_id,
            "pid_ns": self.pid_ns,
            "host_id": self.host_id,
            "uid": self.uid,
        }


# Where an exit status was read: by a pidfd held beyond the end, off the zombie, by its parent.
StatusSource: TypeAlias = Literal["pidfd", "zombie", "wait"]


class Status(NamedTuple):
    """How a process ended: with a code or by a signal, where that was read, whether with a core.

    Its parent also knows the most memory (bytes) and the processor time (seconds) it took.
    """

    code: int | None
    signal: int | None
    source: StatusSource
    core: bool = False
    max_rss_bytes: int | None = None
    cpu_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Oom:
    """What is known of a lack of memory about the time of an end.

    `kills` is how many processes of the control group `cgroup` the kernel killed for it then.
    `proven` says that the worker was one of them: the kernel's log names it, or the whole group
    goes at once (memory.oom.group). `limit_bytes` is None for no limit.
    """

    cgroup: str
    kills: int
    limit_bytes: int | None
    proven: bool

    def as_json(self) -> JsonObject:
        """Return it as JSON."""
        return {
            "cgroup": self.cgroup,
            "kills": self.kills,
            "limit_bytes": self.limit_bytes,
            "proven": self.proven,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a worker ended: at most one of `code` and `signal`; `source` says who saw it.

    `source` is wait (its parent), pidfd (held when it ended), zombie (read before it was reaped),
    self or import, or collect and owner where only the end is known; `cause` is the liveness cause
    of a loss or the reason of a release. `ok`: the code is one that is no crash for this worker.
    What else is known, each only where somebody could tell: `core` was dumped, the most memory and
    all processor time it took (its parent knows, of itself and of the children it waited for), the
    `error` for which its program never began (ENOENT), its own last words, a lack of memory, and
    the last of its output.
    """

    code: int | None
    signal: int | None
    source: str
    expected: bool
    cause: str | None
    ok: bool = False
    core: bool = False
    max_rss_bytes: int | None = None
    cpu_s: float | None = None
    error: str | None = None
    message: str | None = None
    oom: Oom | None = None
    tail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What a process was in when it was registered: session, process group, control group.

    A session or process group is its own where its number is the worker's pid; `cgroup` is a path
    as /proc/PID/cgroup says it, None where it does not.
    """

    session: int
    pgid: int
    cgroup: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFile:
    """The file that a worker's stdout and stderr go to; its own begin at `offset`.

    `dev` and `ino` say which file it was: one of that name may be another by now.
    """

    path: str
    dev: int
    ino: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Worker:
    """One worker as it was at `rev`, the seq of its last event; frozen, times aware and UTC.

    `registered_seq` tells it from every other worker of its sid; `generation` counts those, but for
    pruned ones.
    `lease` names what it holds while it lives, a file in leases/ or a key; it is stalled where
    `heartbeat_s` passed without a beat. `sock_id` (device:inode:mtime in ns) is the socket that was
    at `sock` when that was recorded. `ok_codes` are exit codes that are no crash, 128 + N standing
    for signal N. `ends_with` "owner": it is stopped once its owner is proven dead. `log` is where
    its output goes, where we opened that; `argv` and `cwd` are there where that was asked for.
    """

    sid: str
    pid: int
    sock: str
    version: str
    created_at: datetime
    state: WorkerState
    labels: Mapping[str, str]
    meta: Mapping[str, JsonValue]
    rev: int
    identity: Identity | None
    owner: Identity | None
    exit: Exit | None
    updated_at: datetime
    generation: int
    registered_seq: int
    lease: str | None = None
    heartbeat_s: float | None = None
    sock_id: str | None = None
    ok_codes: tuple[int, ...] = ()
    ends_with: str | None = None
    log: LogFile | None = None
    group: Group | None = None
    argv: tuple[str, ...] | None = None
    cwd: str | None = None

    def __repr__(self) -> str:
        """Say which worker it is, and as of when."""
        return f"<Worker {self.sid} {self.state.value} pid {self.pid} rev {self.rev}>"

    @property
    def final(self) -> bool:
        """Say whether the worker has ended as far as the registry knows."""
        return self.state in FINAL


class Views:
    """What an event's type and data say, each None where they do not."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def seq(self) -> int:
            """Return the event's seq."""

        @property
        def sid(self) -> str:
            """Return the sid of the worker that it is about."""

        @property
        def type(self) -> str:
            """Return the event's type."""

        @property
        def data(self) -> JsonObject:
            """Return what it says."""

    def __repr__(self) -> str:
        """Say which event it is."""
        name = type(self).__name__
        return f"<{name} {self.seq} {self.type}{' ' if self.sid else ''}{self.sid}>"

    @property
    def known_type(self) -> EventType | None:
        """Return its type where this version knows it: type checkers see what it can be."""
        known = self.type in WORKER_TYPES or self.type in OWN_TYPES
        return cast("EventType", self.type) if known else None

    @property
    def crashed(self) -> bool:
        """Return True if the worker ended without being asked to: failed or lost."""
        return self.type == LOST or (self.type == EXITED and is_failure(self.data))

    @property
    def code(self) -> int | None:
        """Return the exit code of a worker that ended."""
        value = self.data.get("code") if self.type == EXITED else None
        return value if isinstance(value, int) else None

    @property
    def signal(self) -> int | None:
        """Return the signal that ended a worker, or by which it was asked to end."""
        value = self.data.get("signal")
        return value if isinstance(value, int) else None

    @property
    def reason(self) -> str | None:
        """Return why, as who did it said."""
        value = self.data.get("reason")
        return value if isinstance(value, str) else None

    @property
    def expected(self) -> bool | None:
        """Return whether a worker that ended had been asked to."""
        value = self.data.get("expected")
        return value if isinstance(value, bool) else None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Event(Views):
    """One event of the log; `raw` is its line as it stands on disk, without the newline."""

    seq: int
    ts: datetime
    type: str
    sid: str
    actor: JsonObject
    data: JsonObject
    raw: bytes


@functools.lru_cache(maxsize=1024)  # a worker's times are asked for again and again
def utc(text: str) -> datetime:
    """Parse a time as the log writes it, RFC 3339 with `Z`; a ValueError names what is not one."""
    when = datetime.fromisoformat(text)
    if when.tzinfo is UTC:
        return when
    if when.utcoffset() != timedelta(0):
        message = f"not a UTC time: {text!r}"
        raise ValueError(message)
    return when.astimezone(UTC)


def timestamp(when: datetime) -> str:
    """Write an aware time as the log does: UTC, microseconds, `Z`."""
    if when.tzinfo is not UTC:
        when = when.astimezone(UTC)
    return when.isoformat(timespec="microseconds")[: -len("+00:00")] + "Z"


# Identities by the id of the JSON that they were built from, which is kept beside them: a worker is
# built anew at each of its changes, and its identity stays the very same.
_IDENTITIES_MAX: Final = 256
_identities: Final[dict[int, tuple[IdentityRecord, Identity]]] = {}


def identity_of(record: IdentityRecord | None) -> Identity | None:
    """Build the identity from its JSON, which nobody changes."""
    if record is None:
        return None
    kept = _identities.get(id(record))
    if kept is not None and kept[0] is record:
        return kept[1]
    if len(_identities) >= _IDENTITIES_MAX:
        _identities.clear()
    built = Identity(**record)
    _identities[id(record)] = record, built
    return built


_STATES: Final = {state.value: state for state in WorkerState}


def worker_of(record: Record) -> Worker:
    """Build the frozen worker from its record; later changes of the record do not reach it."""
    ended = record["exit"]
    meta = record["meta"]
    return Worker(
        sid=record["sid"],
        pid=record["pid"],
        sock=record["sock"],
        version=record["version"],
        created_at=utc(record["created_at"]),
        state=_STATES[record["state"]],
        labels=ReadOnly(record["labels"]),
        meta=ReadOnly(copy.deepcopy(meta) if meta else {}),
        rev=record["rev"],
        identity=identity_of(record["identity"]),
        owner=None if record["owner"] is None else identity_of(record["owner"]),
        exit=None if ended is None else _exit_of(ended, record.get("end", {})),
        updated_at=utc(record["updated_at"]),
        generation=record["generation"],
        registered_seq=record["registered_seq"],
        lease=record["lease"],
        heartbeat_s=record["heartbeat_s"],
        sock_id=record["sock_id"],
        **_more_of(record),
    )


class _More(TypedDict, total=False):
    """What only some workers have; see `Worker`."""

    ok_codes: tuple[int, ...]
    ends_with: str
    log: LogFile
    group: Group
    argv: tuple[str, ...]
    cwd: str


def _more_of(record: Record) -> _More:
    more: _More = {}
    if "group" in record:
        more["group"] = Group(**record["group"])
    if "log" in record:
        more["log"] = LogFile(**record["log"])
    if "ok_codes" in record:
        more["ok_codes"] = tuple(record["ok_codes"])
    if "ends_with" in record:
        more["ends_with"] = record["ends_with"]
    if "argv" in record:
        more["argv"] = tuple(record["argv"])
    if "cwd" in record:
        more["cwd"] = record["cwd"]
    return more


def _exit_of(ended: ExitRecord, details: JsonObject) -> Exit:
    """Build how a worker ended from its JSON; details that a newer version adds are left out."""
    if not details:
        return Exit(**ended)
    oom = details.get("oom")
    return Exit(
        **ended,
        ok=details.get("ok") is True,
        core=details.get("core") is True,
        max_rss_bytes=cast("int | None", details.get("max_rss_bytes")),
        cpu_s=cast("float | None", details.get("cpu_s")),
        error=cast("str | None", details.get("error")),
        message=cast("str | None", details.get("message")),
        oom=None if not isinstance(oom, dict) else Oom(**cast("_OomRecord", oom)),
        tail=cast("str | None", details.get("tail")),
    )


class _OomRecord(TypedDict):
    """A lack of memory, as JSON; see `Oom`."""

    cgroup: str
    kills: int
    limit_bytes: int | None
    proven: bool


def event_of(line: Line, raw: bytes) -> Event:
    """Build the frozen event from a parsed line and its bytes."""
    return Event(
        seq=line["seq"],
        ts=utc(line["ts"]),
        type=line["type"],
        sid=line["sid"],
        actor=line["actor"],
        data=line["data"],
        raw=raw,
    )


_LAST_TYPES = {
    WorkerState.STARTING: REGISTERED,
    WorkerState.READY: READY,
    WorkerState.DRAINING: DRAINING,
    WorkerState.STOPPING: STOP_REQUESTED,
    WorkerState.EXITED: EXITED,
    WorkerState.FAILED: EXITED,
    WorkerState.LOST: LOST,
    WorkerState.RELEASED: RELEASED,
}


def remembered(worker: Worker) -> Event:
    """Tell of a worker's last event by what it left; its line, and who wrote it, is not kept."""
    ended = worker.exit
    data: JsonObject = {}
    if ended is not None:
        data = {"code": ended.code, "signal": ended.signal, "source": ended.source}
        data["expected"] = ended.expected
    return Event(
        seq=worker.rev,
        ts=worker.updated_at,
        type=_LAST_TYPES[worker.state],
        sid=worker.sid,
        actor={},
        data=data,
        raw=b"",
    )
