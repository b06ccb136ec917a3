"""Decide what a collection would do: from workers and verdicts to a plan. Pure.

A plan carries all it needs to be carried out later: each step's worker by sid and rev, and the
evidence of its death. A rev names one state of one worker, so a step whose worker has changed
since is never carried out, however old the plan is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Final, Literal, TypeGuard, cast

from crewlog.errors import CollectRefused, PlanInvalid
from crewlog.model import codec
from crewlog.model.codec import DocumentError
from crewlog.model.events import (
    JsonObject,
    JsonValue,
    Record,
    Status,
    StatusSource,
    Worker,
    timestamp,
)
from crewlog.process import liveness
from crewlog.process.liveness import Liveness
from crewlog.workers import judge

_DEATHS_NEVER_DOUBTED: Final = 10
_CERTAIN: Final = frozenset({"rebooted"})
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One worker to be buried or pruned, if its rev is still the same when it is carried out."""

    action: Literal["bury", "prune"]
    sid: str
    rev: int
    cause: str
    evidence: JsonObject
    status: Status | None

    @property
    def witnessed(self) -> bool:
        """Say whether it is known how the process ended."""
        return self.status is not None

    def as_json(self) -> JsonObject:
        """Return it as JSON."""
        status = self.status
        return {
            "action": self.action,
            "sid": self.sid,
            "rev": self.rev,
            "cause": self.cause,
            "evidence": self.evidence,
            "code": None if status is None else status.code,
            "signal": None if status is None else status.signal,
            "source": None if status is None else status.source,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a collection would do in one store, and whom it cannot judge."""

    store: str
    made_at: str
    living: int
    tasks: tuple[Task, ...]
    unknown: tuple[str, ...]

    def encode(self) -> bytes:
        """Write it as one JSON object, for `decode`."""
        return codec.dump(
            {
                "crewlog_plan": _FORMAT,
                "store": self.store,
                "made_at": self.made_at,
                "living": self.living,
                "steps": [task.as_json() for task in self.tasks],
                "unknown": list(self.unknown),
            }
        )


def make(
    living: Sequence[Worker],
    judged: Sequence[Liveness],
    ended: Iterable[Record],
    *,
    store: str,
    now: datetime,
    keep: timedelta | None,
    most: int | None = None,
) -> Plan:
    """Plan: the dead are buried; who ended more than `keep` ago, or before the newest `most`, goes.

    None for no such bound. Tasks stand in order of registration. The ended may be very many: each
    is looked at once.
    """
    tasks: list[tuple[int, Task]] = []  # each behind the seq of its worker's registration
    unknown: list[str] = []
    for worker, answer in zip(living, judged, strict=True):
        if answer.dead:
            bury = Task(
                action="bury",
                sid=worker.sid,
                rev=worker.rev,
                cause=answer.cause,
                evidence=answer.evidence.seen(),
                status=judge.status_in(answer),
            )
            tasks.append((worker.registered_seq, bury))
        elif not answer.alive:
            unknown.append(worker.sid)
    over = [(one["rev"], one["registered_seq"], one["updated_at"], one["sid"]) for one in ended]
    oldest = sorted(rev for rev, *_ in over)[-most] if most and most < len(over) else 0
    late = "" if keep is None else _before(now, keep)
    for rev, seq, ended_at, sid in over:
        if ended_at < late or rev < oldest or most == 0:
            tasks.append((seq, _prune(sid, rev)))
    return Plan(
        store=store,
        made_at=timestamp(now),
        living=len(living),
        tasks=tuple(task for _, task in sorted(tasks, key=itemgetter(0))),
        unknown=tuple(unknown),
    )


def _before(now: datetime, keep: timedelta) -> str:
    """Return the time before which who has ended goes, as records write it."""
    try:
        return timestamp(now - keep)
    except OverflowError:  # before all that a calendar knows
        return ""


_OVER: Final = liveness.judge(None, liveness.Evidence(), final=True)
_SEEN: Final = _OVER.evidence.seen()


def _prune(sid: str, rev: int) -> Task:
    return Task(action="prune", sid=sid, rev=rev, cause=_OVER.cause, evidence=_SEEN, status=None)


def refusal(plan: Plan) -> CollectRefused | None:
    """Return what forbids a plan: more than half of the living, and more than ten, seem dead.

    A reboot explains any number of deaths; they do not count.
    """
    deaths = [task for task in plan.tasks if task.action == "bury"]
    doubtful = [task for task in deaths if task.cause not in _CERTAIN]
    if len(doubtful) > max(_DEATHS_NEVER_DOUBTED, plan.living / 2):
        return CollectRefused(deaths=len(doubtful), living=plan.living)
    return None


# -- reading one back -----------------------------------------------------------------------


def decode(data: bytes, *, where: str) -> Plan:
    """Read a plan that `encode` wrote.

    Raises: PlanInvalid for anything else.
    """
    try:
        return _plan(codec.load_object(data))
    except (DocumentError, ValueError) as error:
        raise PlanInvalid(where, why=str(error)) from error


def _plan(fields: JsonObject) -> Plan:
    if fields.get("crewlog_plan") != _FORMAT:
        message = f"it is no plan of format {_FORMAT}"
        raise ValueError(message)
    steps, unknown = fields.get("steps"), fields.get("unknown")
    if not isinstance(steps, list) or not isinstance(unknown, list):
        message = "its steps are missing"
        raise ValueError(message)  # noqa: TRY004 (a plan of a wrong shape, not a wrong argument)
    return Plan(
        store=_text(fields, "store"),
        made_at=_text(fields, "made_at"),
        living=_number(fields, "living"),
        tasks=tuple(_task_of(row) for row in steps),
        unknown=tuple(str(sid) for sid in unknown),
    )


def _task_of(row: JsonValue) -> Task:
    if not isinstance(row, dict):
        message = "a step is not an object"
        raise ValueError(message)  # noqa: TRY004 (as above)
    fields = cast("JsonObject", row)
    action, evidence, source = fields.get("action"), fields.get("evidence"), fields.get("source")
    if not _is_action(action) or not isinstance(evidence, dict):
        message = f"a step has the action {action!r}"
        raise ValueError(message)
    code = None if fields.get("code") is None else _number(fields, "code")
    signal = None if fields.get("signal") is None else _number(fields, "signal")
    status = None
    if _is_source(source):
        status = Status(code, signal, source)
    elif source is not None:
        message = f"a step has the source {source!r}"
        raise ValueError(message)
    return Task(
        action=action,
        sid=_text(fields, "sid"),
        rev=_number(fields, "rev"),
        cause=_text(fields, "cause"),
        evidence=cast("JsonObject", evidence),
        status=status,
    )


def _is_action(value: JsonValue) -> TypeGuard[Literal["bury", "prune"]]:
    return value in {"bury", "prune"}


def _is_source(value: JsonValue) -> TypeGuard[StatusSource]:
    return value in {"pidfd", "zombie"}


def _text(fields: JsonObject, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        message = f"{name!r} is missing or no string"
        raise ValueError(message)  # noqa: TRY004 (as above)
    return value


def _number(fields: JsonObject, name: str) -> int:
    value = fields.get(name)
    if type(value) is not int:
        message = f"{name!r} is missing or no integer"
        raise ValueError(message)
    return value
