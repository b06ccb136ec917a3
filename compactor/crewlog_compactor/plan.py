"""Decide what a collection would do: from workers and verdicts to a plan. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

from crewlog.errors import CollectRefused
from crewlog.events import Worker
from crewlog.liveness import Liveness

_DEATHS_NEVER_DOUBTED: Final = 10
_CERTAIN: Final = frozenset({"rebooted"})


@dataclass(frozen=True, slots=True)
class Step:
    """One worker to be buried or pruned, if its rev is still the same when it is carried out."""

    action: Literal["bury", "prune"]
    worker: Worker
    found: Liveness


@dataclass(frozen=True, slots=True)
class Plan:
    """What a collection would do, and whom it cannot judge."""

    steps: tuple[Step, ...]
    unknown: tuple[Worker, ...]
    living: int


def make(
    workers: Sequence[Worker], judged: Sequence[Liveness], *, now: datetime, keep: timedelta
) -> Plan:
    """Plan: the dead are buried, those that ended more than `keep` ago pruned, the rest stays."""
    steps: list[Step] = []
    unknown: list[Worker] = []
    living = 0
    for worker, found in zip(workers, judged, strict=True):
        if worker.final:
            if now - worker.updated_at > keep:
                steps.append(Step("prune", worker, found))
            continue
        living += 1
        if found.dead:
            steps.append(Step("bury", worker, found))
        elif not found.alive:
            unknown.append(worker)
    return Plan(tuple(steps), tuple(unknown), living)


def require_plausible(plan: Plan) -> None:
    """Raise CollectRefused if more than half of the living, and more than ten, seem dead.

    A reboot explains any number of deaths; they do not count.
    """
    doubtful = [s for s in plan.steps if s.action == "bury" and s.found.cause not in _CERTAIN]
    if len(doubtful) > max(_DEATHS_NEVER_DOUBTED, plan.living / 2):
        raise CollectRefused(deaths=len(doubtful), living=plan.living)
