"""Collect: find the dead, record their deaths, prune those that ended long ago.

Probes run with no lock. Each event is written only if its worker is still at the rev that was
judged, so collectors may run side by side, and a worker that registered again between the probe
and the append survives.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from crewlog import changes, registry
from crewlog.changes import Author
from crewlog.codec import Draft
from crewlog.errors import InvalidTransition, StaleRevision, WorkerNotFound
from crewlog.registry import Registry
from crewlog.store import Written
from crewlog_compactor import plan
from crewlog_compactor.plan import Plan, Step

KEEP: Final = timedelta(days=1)
_STEPS_A_COMMIT: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectReport:
    """What a collection did, or with `dry_run` would do; each field holds sids.

    `lost` and `exited` are the deaths recorded, `pruned` left the state, `unknown` cannot be
    judged and stay, `conflicts` changed between the probe and the append and stay too.
    """

    lost: tuple[str, ...] = ()
    exited: tuple[str, ...] = ()
    pruned: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    dry_run: bool = False


def collect(
    reg: Registry, *, dry_run: bool = False, keep: timedelta = KEEP, force: bool = False
) -> CollectReport:
    """Record the death of every worker that is proven dead, and prune what ended before `keep`.

    *Guarantee*: durable on return; who cannot be judged is left alone; one event a death however
    many collectors run. *Raises* CollectRefused where more than half of the living, and more than
    ten, seem dead for another cause than a reboot, unless `force`.
    """
    if keep < timedelta(0):
        message = "keep must not be negative"
        raise ValueError(message)
    workers = list(reg.state().workers.values())
    judged = reg.judge(workers)
    decided = plan.make(workers, judged, now=datetime.now(UTC), keep=keep)
    if dry_run:
        return _report(decided, conflicts=set(), dry_run=True)
    if not force:
        plan.require_plausible(decided)
    return _report(decided, conflicts=_carry_out(reg, decided), dry_run=False)


def _carry_out(reg: Registry, decided: Plan) -> set[str]:
    """Write the plan's events, each on its condition; return the sids that had changed."""
    author = reg.author("gc")
    conflicts: set[str] = set()
    for first in range(0, len(decided.steps), _STEPS_A_COMMIT):
        part = decided.steps[first : first + _STEPS_A_COMMIT]
        reg.commit([_conditional(_event(author, step), step, conflicts) for step in part])
    return conflicts


def _event(author: Author, step: Step) -> changes.Step:
    if step.action == "prune":
        return changes.pruned(author, step.worker.sid, expect=step.worker.rev)
    return registry.death(author, step.worker, step.found)


def _conditional(event: changes.Step, step: Step, conflicts: set[str]) -> changes.Step:
    """Let a worker that changed meanwhile be: note the conflict and write nothing."""
    sid = step.worker.sid

    def decide(written: Written) -> Draft | None:
        conflicts.discard(sid)  # it may be asked more than once
        try:
            return event.decide(written)
        except (StaleRevision, InvalidTransition, WorkerNotFound):
            conflicts.add(sid)
            return None

    return changes.Step(sid, decide)


def _report(decided: Plan, *, conflicts: set[str], dry_run: bool) -> CollectReport:
    done = [step for step in decided.steps if step.worker.sid not in conflicts]
    buried = [step for step in done if step.action == "bury"]
    witnessed = {s.worker.sid for s in buried if registry.is_exit(s.found)}
    return CollectReport(
        lost=tuple(s.worker.sid for s in buried if s.worker.sid not in witnessed),
        exited=tuple(s.worker.sid for s in buried if s.worker.sid in witnessed),
        pruned=tuple(s.worker.sid for s in done if s.action == "prune"),
        unknown=tuple(worker.sid for worker in decided.unknown),
        conflicts=tuple(sorted(conflicts)),
        dry_run=dry_run,
    )
