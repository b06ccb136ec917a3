"""Turn a caller's wish into a step: arguments checked, JSON encoded, rules left for the lock.

A step looks at the state under the lock and returns the draft to write, or None where nothing is
to be changed; it may run more than once. Bad arguments raise ValueError or TypeError here, before
anything is written.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from crewlog import arguments, codec, endpoint, events, fold, identity
from crewlog.appending import Decide, Written
from crewlog.codec import Draft
from crewlog.errors import StaleRevision
from crewlog.events import Identity, JsonObject, JsonValue, Record
from crewlog.identity import Status


class Step(NamedTuple):
    """One change of one worker: looks at the state, and returns the draft or None."""

    sid: str
    decide: Callable[[Written], Draft | None]


# -- steps ----------------------------------------------------------------------------------


# Takes an event's type and what its caller gave of _GIVEN, and returns what is to be written.
Redact: TypeAlias = Callable[[str, JsonObject], Mapping[str, JsonValue]]
_GIVEN: Final[tuple[str, ...]] = ("sock", "version", "labels", "meta", "reason")


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
    }
    return {**data, **{key: checks[key](kept[key]) for key in given}}


def registered(
    author: Author,
    sid: str,
    *,
    pid: int | None,
    sock: str,
    version: str,
    labels: Mapping[str, str] | None,
    meta: Mapping[str, JsonValue] | None,
    ready: bool,
    owner: int | None,
    lease: str | None = None,
    heartbeat_s: float | None = None,
) -> Step:
    """Register a running process, None: this one, under a sid that nobody living holds.

    *Raises* ProcessNotFound if it, or the owner, has ended.
    """
    who = identity.capture(pid)
    told = description(sock=sock, version=version, labels=labels, meta=meta)
    more: JsonObject = {
        "lease": lease,
        "heartbeat_s": heartbeat_s,
        "sock_id": endpoint.socket_id(sock),
    }
    data: JsonObject = {
        "pid": who.pid,
        "state": (events.WorkerState.READY if ready else events.WorkerState.STARTING).value,
        **told,
        "identity": who.as_json(),
        "owner": None if owner is None else identity.capture(owner).as_json(),
        **{key: value for key, value in more.items() if value is not None},
    }
    return _plain(author, events.REGISTERED, arguments.check_sid(sid), data, expect=None)


def description(
    *,
    sock: str,
    version: str,
    labels: Mapping[str, str] | None,
    meta: Mapping[str, JsonValue] | None,
) -> JsonObject:
    """Return what describes a worker, checked. *Raises* ValueError, TypeError."""
    return {
        "sock": arguments.check_sock(sock),
        "version": arguments.check_text(version, name="version"),
        "labels": arguments.check_labels(labels, removing=False),
        "meta": arguments.check_mapping(meta, name="meta"),
    }


def imported(
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
        **description(sock=sock, version=version, labels=None, meta=None),
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


def updated(
    author: Author,
    sid: str,
    *,
    state: str | None = None,
    sock: str | None = None,
    version: str | None = None,
    labels: Mapping[str, str | None] | None = None,
    meta: Mapping[str, JsonValue] | None = None,
    reason: str | None = None,
    expect: int | None = None,
    of: int | None = None,
    sock_of: Callable[[str], str | None] = lambda _: None,
) -> Step:
    """Move a worker on, or patch it; what would change nothing is not written.

    Labels and meta are merged key by key; None removes a key. `sock_of` tells the recorded sock of
    a worker, which is there once that becomes ready. `expect`: only at this rev, `of`: only of the
    worker that was registered at this seq; else StaleRevision is raised.
    """
    if state not in _BY_STATE:
        message = (
            f"state {state!r} cannot be set: ready, draining or stopping (ends: exited, remove)"
        )
        raise ValueError(message)
    data: JsonObject = {}
    if sock is not None:
        data["sock"] = arguments.check_sock(sock)
    there = sock_of(sid) if sock is None and state == "ready" else sock
    if there is not None:
        data["sock_id"] = endpoint.socket_id(there)
    if version is not None:
        data["version"] = arguments.check_text(version, name="version")
    if labels is not None:
        data["labels"] = arguments.check_labels(labels, removing=True)
    if meta is not None:
        data["meta"] = arguments.check_mapping(meta, name="meta")
    if data and state in {"draining", "stopping"}:
        message = f"state {state!r} takes no patch beside it; update twice, or in a batch"
        raise ValueError(message)
    if not data and state is None:
        message = "nothing to update was given"
        raise ValueError(message)
    if reason is not None:
        data["reason"] = arguments.check_reason(reason)
    return _plain(
        author,
        _BY_STATE[state],
        arguments.check_sid(sid),
        data,
        expect=arguments.check_expect(expect),
        of=of,
    )


def exited(
    author: Author,
    sid: str,
    *,
    code: int | None = None,
    signal: int | None = None,
    source: str = "self",
    expect: int | None = None,
    of: int | None = None,
    evidence: JsonObject | None = None,
) -> Step:
    """Record the end of a worker, with its exit code or the signal that ended it.

    `expect` and `of` as for `updated`.
    """
    if code is not None and signal is not None:
        message = "a process ends with a code or by a signal, not both"
        raise ValueError(message)
    sid, expect = arguments.check_sid(sid), arguments.check_expect(expect)
    data: JsonObject = {
        "code": arguments.check_small(code, name="code", low=-(2**31)),
        "signal": arguments.check_small(signal, name="signal", low=1),
        "source": arguments.check_text(source, name="source"),
    }
    if evidence is not None:
        data["evidence"] = evidence

    def step(written: Written) -> Draft | None:
        record = written.get(sid)
        _check(record, sid, expect, of)
        if fold.is_repeat(events.EXITED, record, data):
            return None
        fold.refuse(events.EXITED, sid, record)
        assert record is not None  # refuse() would have raised
        expected = fold.expects_end(record)
        return author.draft(events.EXITED, sid, {**data, "expected": expected})

    return Step(sid, step)


def stop_requested(
    author: Author, sid: str, *, signal: int, grace_s: float, reason: str, of: int
) -> Step:
    """Record that a signal is about to be sent; never left out, whatever the state."""
    data: JsonObject = {"signal": signal, "grace_s": grace_s, "reason": reason}
    return _plain(author, events.STOP_REQUESTED, sid, data, of=of)


def buried(
    author: Author,
    sid: str,
    *,
    cause: str,
    evidence: JsonObject,
    status: Status | None,
    expect: int | None = None,
    of: int | None = None,
) -> Step:
    """Record a proven death, with how it ended where that is known; see `updated` for when."""
    if status is None:
        return lost(author, sid, cause=cause, evidence=evidence, expect=expect, of=of)
    return exited(
        author,
        sid,
        code=status.code,
        signal=status.signal,
        source=status.source,
        expect=expect,
        of=of,
        evidence=evidence,
    )


def lost(
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


def released(
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


def pruned(author: Author, sid: str, *, expect: int) -> Step:
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

    def step(written: Written) -> Draft | None:
        record = written.get(sid)
        _check(record, sid, expect, of)
        if fold.is_repeat(kind, record, part.data):
            return None
        fold.refuse(kind, sid, record)
        return part

    return Step(sid, step)


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

    written: Written
    seq: int
    records: dict[str, Record | None] = field(default_factory=dict)

    def get(self, sid: str) -> Record | None:
        return self.records[sid] if sid in self.records else self.written.get(sid)

    def take(self, part: Draft) -> None:
        self.seq += 1
        line = codec.as_parsed(part, seq=self.seq, ts="")
        self.records[part.sid] = fold.after(line, self.get(part.sid))


def together(steps: Sequence[Step]) -> Decide:
    """Decide all steps on top of each other: all of them are written, or none."""
    if len(steps) == 1:
        only = steps[0].decide

        def decide_one(written: Written) -> Sequence[Draft]:
            part = only(written)
            return () if part is None else (part,)

        return decide_one

    def decide(written: Written) -> list[Draft]:
        ahead = _Ahead(written, written.seq)
        drafts: list[Draft] = []
        for step in steps:
            part = step.decide(ahead)
            if part is not None:
                ahead.take(part)
                drafts.append(part)
        return drafts

    return decide
