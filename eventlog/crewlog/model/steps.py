"""Turn a caller's wish into a step: arguments checked, JSON encoded, rules left for the lock.

A step looks at the state under the lock and returns the drafts to write, none where nothing is to
be changed; it may run more than once. Bad arguments raise ValueError or TypeError here, before
anything is written.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias, TypedDict

from crewlog.errors import InvalidTransition, StaleRevision, WorkerNotFound
from crewlog.model import arguments, codec, events, fold
from crewlog.model.codec import Draft
from crewlog.model.events import Identity, JsonObject, JsonValue, NextState, Record, Status

BATCH_EVENTS_MAX: Final = 10_000
BATCH_BYTES_MAX: Final = 16 * 1024 * 1024

# -- what an append is ----------------------------------------------------------------------


class Tip(Protocol):
    """The state that the next event will follow: every line written, durable or not."""

    @property
    def seq(self) -> int:
        """Return the seq of the last line written."""
        ...

    def get(self, sid: str) -> Record | None:
        """Return the record of that sid, None if there is none."""
        ...


class _Empty:
    """The state of a store that is not there yet."""

    seq = 0

    def get(self, _sid: str) -> None:
        """Return None: there is none."""


EMPTY: Final[Tip] = _Empty()

# Looks at the state and returns what to write, or raises. It may run more than once and must not
# do anything else.
Decide: TypeAlias = Callable[[Tip], Sequence[Draft]]


class Appended(NamedTuple):
    """What an append made durable: raw lines, and the state's records after it by sid."""

    lines: Sequence[bytes]
    records: dict[str, Record | None]
    seq: int


class Step(NamedTuple):
    """One change of one worker; where nothing needs to be changed it decides upon no draft."""

    sid: str
    decide: Decide


# -- steps ----------------------------------------------------------------------------------


# Takes an event's type and what its caller gave of _GIVEN, and returns what is to be written.
Redact: TypeAlias = Callable[[str, JsonObject], Mapping[str, JsonValue]]
_GIVEN: Final[tuple[str, ...]] = (
    *("sock", "version", "labels", "meta", "reason", "message", "tail", "argv"),
)


class Author(NamedTuple):
    """Who asks: the actor as JSON bytes, encoded once; and what must not be written."""

    actor: bytes
    redact: Redact | None = None

    def draft(self, kind: str, sid: str, data: JsonObject) -> Draft:
        """Encode an event, redacted."""
        if self.redact is not None:
            data = _redacted(self.redact, kind, data)
        return codec.draft(kind, sid, self.actor, data)


def _redacted(redact: Redact, kind: str, data: JsonObject) -> JsonObject:
    given: JsonObject = {key: copy.deepcopy(data[key]) for key in _GIVEN if key in data}
    if not given:
        return data
    kept = redact(kind, given)
    if not isinstance(kept, Mapping) or set(kept) != {key for key in _GIVEN if key in data}:
        message = "redact must return a mapping with the keys that it was given"
        raise ValueError(message)
    checks: dict[str, Callable[[object], JsonValue]] = {
        "sock": arguments.check_sock,
        "version": lambda value: arguments.check_text(value, name="version"),
        "labels": lambda value: arguments.check_labels(value, removing=kind != events.REGISTERED),
        "meta": lambda value: arguments.check_mapping(value, name="meta"),
        "reason": arguments.check_reason,
        "message": lambda value: arguments.check_text(value, name="message"),
        "tail": lambda value: arguments.check_text(value, name="tail", limit=TAIL_BYTES_MAX),
        "argv": arguments.check_words,
    }
    return {**data, **{key: checks[key](kept[key]) for key in given}}


SIGNAL_MAX: Final = 64
TAIL_BYTES_MAX: Final = 16 * 1024  # of a crashed worker's output, in its event


class WorkerOptions(TypedDict, total=False):
    """What a worker may be registered with, beside its sid and its process."""

    sock: str
    version: str
    labels: Mapping[str, str] | None
    meta: Mapping[str, JsonValue] | None
    ready: bool
    owner: int | None
    lease: bool
    heartbeat_s: float | None
    ok_codes: Collection[int]
    ends_with: Literal["owner"] | None
    record_argv: bool


def wish_of(options: WorkerOptions) -> "Wish":
    """Return the same, complete.

    Raises: TypeError for what is no option.
    """
    arguments.check_options(options, WorkerOptions.__annotations__, of="register")
    return Wish(**options)


class Wish(NamedTuple):
    """The same, complete: what is not given has its default."""

    sock: str = ""
    version: str = ""
    labels: Mapping[str, str] | None = None
    meta: Mapping[str, JsonValue] | None = None
    ready: bool = False
    owner: int | None = None
    lease: bool = False
    heartbeat_s: float | None = None
    ok_codes: Collection[int] = ()
    ends_with: Literal["owner"] | None = None
    record_argv: bool = False


def register_step(
    author: Author,
    sid: str,
    wish: Wish,
    *,
    who: Identity,
    owner: Identity | None,
    sock_id: str | None,
    lease: str | None = None,
    seen: JsonObject | None = None,
) -> Step:
    """Register a running process under a sid that nobody living holds.

    `who` and `owner` are captured identities, `sock_id` that of the socket at `wish.sock`;
    `lease` is the name of the lease that is held for it; `seen` is what else was seen of it
    (group, log, argv, cwd).
    """
    if wish.ends_with is not None and owner is None:
        message = "ends_with='owner' needs the pid of an owner"
        raise ValueError(message)
    more: JsonObject = {
        "lease": lease,
        "heartbeat_s": arguments.check_heartbeat(wish.heartbeat_s),
        "sock_id": sock_id,
        "ok_codes": arguments.check_codes(wish.ok_codes),
        "ends_with": arguments.check_ends_with(wish.ends_with),
        **(seen or {}),
    }
    data: JsonObject = {
        "pid": who.pid,
        "state": (events.WorkerState.READY if wish.ready else events.WorkerState.STARTING).value,
        **describe_worker(wish),
        "identity": who.as_json(),
        "owner": None if owner is None else owner.as_json(),
        **{key: value for key, value in more.items() if value is not None},
    }
    return _plain(author, events.REGISTERED, arguments.check_sid(sid), data, expect=None)


def describe_worker(wish: Wish) -> JsonObject:
    """Return what describes a worker, checked; a None in meta stands for nothing, as in an update.

    Raises: ValueError, TypeError.
    """
    meta = arguments.check_mapping(wish.meta, name="meta")
    return {
        "sock": arguments.check_sock(wish.sock),
        "version": arguments.check_text(wish.version, name="version"),
        "labels": arguments.check_labels(wish.labels, removing=False),
        "meta": {key: value for key, value in meta.items() if value is not None},
    }


def check_wish(wish: Wish) -> None:
    """Raise ValueError or TypeError for what cannot be written."""
    arguments.check_heartbeat(wish.heartbeat_s)
    arguments.check_codes(wish.ok_codes)
    arguments.check_ends_with(wish.ends_with)
    describe_worker(wish)


def import_step(
    author: Author,
    sid: str,
    *,
    pid: int,
    who: Identity | None,
    sock: str,
    version: str,
    created_at: str | None,
) -> Step:
    """Register a worker as an older registry knew it; `who` is None if its process is gone."""
    data: JsonObject = {
        "pid": pid,
        "state": events.WorkerState.READY.value,
        **describe_worker(Wish(sock=sock, version=version)),
        "identity": None if who is None else who.as_json(),
        "owner": None,
    }
    if created_at is not None:
        data["created_at"] = created_at
    return _plain(author, events.REGISTERED, arguments.check_sid(sid), data, expect=None)


_BY_STATE = {
    None: events.UPDATED,
    "ready": events.READY,
    "draining": events.DRAINING,
    "stopping": events.STOP_REQUESTED,
}


class UpdateOptions(TypedDict, total=False):
    """What an update may change, and on which condition."""

    state: NextState | None
    sock: str | None
    version: str | None
    labels: Mapping[str, str | None] | None
    meta: Mapping[str, JsonValue] | None
    reason: str | None
    expect: int | None


def update_step(
    author: Author,
    sid: str,
    options: UpdateOptions,
    *,
    of: int | None = None,
    seen: JsonObject | None = None,
) -> Step:
    """Move a worker on, or patch it; what would change nothing is not written.

    Labels and meta are merged key by key; None removes a key. `seen` is what the caller has seen of
    the worker's socket (`sock_id`). `expect`: only at this rev, `of`: only of the worker that was
    registered at this seq; else StaleRevision is raised.
    """
    arguments.check_options(options, UpdateOptions.__annotations__, of="update")
    state, reason = options.get("state"), options.get("reason")
    if state not in _BY_STATE:
        message = (
            f"state {state!r} cannot be set: ready, draining or stopping (ends: exited, remove)"
        )
        raise ValueError(message)
    data: JsonObject = {}
    if (sock := options.get("sock")) is not None:
        data["sock"] = arguments.check_sock(sock)
    data |= seen or {}
    if (version := options.get("version")) is not None:
        data["version"] = arguments.check_text(version, name="version")
    if (labels := options.get("labels")) is not None:
        data["labels"] = arguments.check_labels(labels, removing=True)
    if (meta := options.get("meta")) is not None:
        data["meta"] = arguments.check_mapping(meta, name="meta")
    if data and state in {"draining", "stopping"}:
        message = f"state {state!r} takes no patch beside it; update twice, or in a batch"
        raise ValueError(message)
    if not data and state is None:
        message = "nothing to update was given"
        raise ValueError(message)
    if reason is not None:
        data["reason"] = arguments.check_reason(reason)
    if (expect := options.get("expect")) is not None:
        arguments.check_expect(expect)
    return _plain(author, _BY_STATE[state], arguments.check_sid(sid), data, expect=expect, of=of)


class ExitOptions(TypedDict, total=False):
    """How a worker ended: at most one of `code` and `signal`; who saw it; on which condition.

    `message` is what it says about its end itself.
    """

    code: int | None
    signal: int | None
    source: str
    message: str | None
    expect: int | None


def exit_step(
    author: Author,
    sid: str,
    options: ExitOptions,
    *,
    of: int | None = None,
    evidence: JsonObject | None = None,
    details: JsonObject | None = None,
) -> Step:
    """Record the end of a worker, with its exit code or the signal that ended it.

    `expect` and `of` as for `update_step`; `details` is what else is known of the end, see
    events.DETAILS.
    """
    arguments.check_options(options, ExitOptions.__annotations__, of="exited")
    code, signal = options.get("code"), options.get("signal")
    if isinstance(code, int) and -SIGNAL_MAX <= code < 0 and signal is None:
        signal, code = -code, None  # as subprocess says it
    if code is not None and signal is not None:
        message = "a process ends with a code or by a signal, not both"
        raise ValueError(message)
    sid, expect = arguments.check_sid(sid), arguments.check_expect(options.get("expect"))
    data: JsonObject = {
        "code": arguments.check_small(code, name="code", low=-(2**31)),
        "signal": arguments.check_small(signal, name="signal", low=1),
        "source": arguments.check_text(options.get("source", "self"), name="source"),
        **(details or {}),
    }
    if (message_ := options.get("message")) is not None:
        data["message"] = arguments.check_text(message_, name="message")
    if evidence is not None:
        data["evidence"] = evidence

    def step(written: Tip) -> Sequence[Draft]:
        record = written.get(sid)
        _check(record, sid, expect, of)
        if fold.is_repeat(events.EXITED, record, data):
            return ()
        fold.refuse(events.EXITED, sid, record)
        assert record is not None  # refuse() would have raised
        verdict: JsonObject = {"expected": fold.expects_end(record, data)}
        if fold.is_ok(record, data):  # for this worker it is no crash: readers of 0.1 see that, too
            verdict = {"expected": True, "ok": True}
        return (author.draft(events.EXITED, sid, {**data, **verdict}),)

    return Step(sid, step)


def stop_step(
    author: Author, sid: str, *, signal: int, grace_s: float, reason: str, of: int
) -> Step:
    """Record that a signal is about to be sent; never left out, whatever the state."""
    data: JsonObject = {"signal": signal, "grace_s": grace_s, "reason": reason}
    return _plain(author, events.STOP_REQUESTED, sid, data, of=of)


def burial_step(
    author: Author,
    sid: str,
    *,
    cause: str,
    evidence: JsonObject,
    status: Status | None,
    details: JsonObject | None = None,
    expect: int | None = None,
    of: int | None = None,
) -> Step:
    """Record a proven death, with how it ended where that is known; see `updated` for when."""
    if status is None:
        return loss_step(author, sid, cause=cause, evidence=evidence, expect=expect, of=of)
    details = {**details_of(status), **(details or {})}
    ended: ExitOptions = {
        "code": status.code,
        "signal": status.signal,
        "source": status.source,
        "expect": expect,
    }
    return exit_step(author, sid, ended, of=of, evidence=evidence, details=details)


def details_of(status: Status) -> JsonObject:
    """Return what a status tells beside code and signal, as an event's data bear it."""
    usage: JsonObject = {"max_rss_bytes": status.max_rss_bytes, "cpu_s": status.cpu_s}
    core: JsonObject = {"core": True} if status.core else {}
    return core | {key: value for key, value in usage.items() if value is not None}


def loss_step(
    author: Author,
    sid: str,
    *,
    cause: str,
    evidence: JsonObject,
    expect: int | None = None,
    of: int | None = None,
) -> Step:
    """Record that a worker is proven dead and nobody knows how it ended."""
    data: JsonObject = {"cause": cause, "evidence": evidence}
    return _plain(author, events.LOST, sid, data, expect=expect, of=of)


def release_step(
    author: Author,
    sid: str,
    *,
    reason: str,
    expect: int | None,
    assumed: JsonObject | None = None,
) -> Step:
    """Take a worker out of the registry by decision: handed off, or assumed dead by a person.

    `assumed` is the evidence in spite of which it is assumed dead.
    """
    data: JsonObject = {"reason": arguments.check_reason(reason)}
    if assumed is not None:
        data |= {"cause": "assumed_dead", "evidence": assumed}
    return _plain(
        author,
        events.RELEASED,
        arguments.check_sid(sid),
        data,
        expect=arguments.check_expect(expect),
    )


def prune_step(author: Author, sid: str, *, expect: int) -> Step:
    """Drop an ended worker from the state; its history stays."""
    return _plain(author, events.PRUNED, sid, {}, expect=expect)


def _plain(
    author: Author,
    kind: str,
    sid: str,
    data: JsonObject,
    *,
    expect: int | None = None,
    of: int | None = None,
) -> Step:
    part = author.draft(kind, sid, data)
    drafts, given = (part,), part.data

    def step(written: Tip) -> Sequence[Draft]:
        record = written.get(sid)
        if expect is not None or of is not None:
            _check(record, sid, expect, of)
        if fold.is_repeat(kind, record, given):
            return ()
        fold.refuse(kind, sid, record)
        if record is not None and kind == events.UPDATED:
            _refuse_growth(record, given)
        return drafts

    return Step(sid, step)


META_BYTES_MAX: Final = 64 * 1024


def _refuse_growth(record: Record, data: JsonObject) -> None:
    """Refuse labels or meta that grow beyond what one worker may have; what is there may stay.

    Raises: ValueError.
    """
    labels, meta = data.get("labels"), data.get("meta")
    if isinstance(labels, dict):
        kept, now = len(record["labels"]), len(record["labels"]) + len(labels)
        if now > arguments.LABELS_MAX:
            now = len(_merged(record["labels"], labels))
        if now > max(kept, arguments.LABELS_MAX):
            message = f"{now} labels; at most {arguments.LABELS_MAX} are kept for one worker"
            raise ValueError(message)
    if isinstance(meta, dict):
        size = len(codec.dump(_merged(record["meta"], meta)))
        if size > max(META_BYTES_MAX, len(codec.dump({**record["meta"]}))):
            message = (
                f"{size} bytes of meta, and at most {META_BYTES_MAX} are kept for one worker: "
                "take something out of its meta"
            )
            raise ValueError(message)


def _merged(kept: Mapping[str, JsonValue], patch: JsonObject) -> JsonObject:
    return {key: value for key, value in {**kept, **patch}.items() if value is not None}


def _check(record: Record | None, sid: str, expect: int | None, of: int | None) -> None:
    actual, began = (None, None) if record is None else (record["rev"], record["registered_seq"])
    if expect is not None and actual != expect:
        raise StaleRevision(sid, expected=expect, actual=actual)
    if of is not None and began != of:
        raise StaleRevision(sid, expected=of, actual=actual)


# -- many steps as one ----------------------------------------------------------------------


@dataclass(slots=True)
class _Ahead:
    """The state as it will be after the drafts decided so far."""

    written: Tip
    seq: int
    records: dict[str, Record | None] = field(default_factory=dict)

    def get(self, sid: str) -> Record | None:
        return self.records[sid] if sid in self.records else self.written.get(sid)

    def take(self, part: Draft) -> None:
        self.seq += 1
        line = codec.as_parsed(part, seq=self.seq, ts="")
        self.records[part.sid] = fold.after(line, self.get(part.sid))


def decide_all(steps: Sequence[Step]) -> Decide:
    """Decide all steps on top of each other: all of them are written, or none."""
    if len(steps) == 1:
        return steps[0].decide

    def decide(written: Tip) -> list[Draft]:
        ahead = _Ahead(written, written.seq)
        drafts: list[Draft] = []
        for step in steps:
            for part in step.decide(ahead):
                ahead.take(part)
                drafts.append(part)
        return drafts

    return decide


def unless_changed(step: Step, conflicts: set[str] | None = None) -> Step:
    """Return a step that writes nothing of a worker that changed meanwhile, and notes the conflict.

    So one of many cannot keep the others from being written.
    """
    noted = set[str]() if conflicts is None else conflicts

    def decide(written: Tip) -> Sequence[Draft]:
        noted.discard(step.sid)  # it may be asked more than once
        try:
            return step.decide(written)
        except (StaleRevision, InvalidTransition, WorkerNotFound):
            noted.add(step.sid)
            return ()

    return Step(step.sid, decide)
