"""Collect: find the dead, record their deaths, prune those that ended long ago, tidy up after them.

Probes run with no lock. Each event is written only if its worker is still at the rev that was
judged, so collectors may run side by side, and a worker that registered again between the probe
and the append survives. Sockets and leases come last, when the deaths are durable.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final, TypeAlias

from crewlog import host
from crewlog.errors import (
    CollectRefused,
    PlanInvalid,
    WorkerExists,
    WorkerNotFound,
)
from crewlog.model.events import Event, worker_of
from crewlog.model.steps import (
    Author,
    Step,
    burial_step,
    prune_step,
    release_step,
    unless_changed,
)
from crewlog.registry import Registry
from crewlog.workers import judge
from crewlog_compactor import plan
from crewlog_compactor import sockets as orphans
from crewlog_compactor.plan import Plan, Task

KEEP: Final = timedelta(days=1)
ENDED_MAX: Final = 10_000  # unless the caller says how many: all of them stand in registry.json
Ended: TypeAlias = timedelta | int | None
_STEPS_A_COMMIT: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectReport:
    """What a collection did, or with `dry_run` would do; the first five fields hold sids.

    `lost` and `exited` are the deaths recorded, `pruned` left the state, `unknown` cannot be
    judged and stay, `conflicts` changed between the probe and the append and stay too.
    `stopped` were to end with their owner, and were ended.
    `sockets` are the paths that were removed, `sockets_kept` those that stay, each with the reason.
    `refused` is the error with which a dry run foretells that nobody would be collected.
    """

    lost: tuple[str, ...] = ()
    exited: tuple[str, ...] = ()
    pruned: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    stopped: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()
    sockets_kept: tuple[tuple[str, str], ...] = ()
    dry_run: bool = False
    refused: CollectRefused | None = None

    @property
    def changed(self) -> int:
        """Return how many workers' states changed, or would."""
        return len(self.lost) + len(self.exited) + len(self.pruned)


def collect(
    reg: Registry, *, dry_run: bool = False, keep: Ended = None, force: bool = False
) -> CollectReport:
    """Record the death of every worker that is proven dead, and prune what ended before `keep`.

    `keep`: a timedelta keeps the ended listed for so long, an int the newest so many; None for a
    day, and not more than ENDED_MAX. Their history stays.
    Guarantee: durable on return; who cannot be judged is left alone; one event a death however many
    collectors run.
    Raises: CollectRefused where more than half of the living, and more than ten, seem dead for
    another cause than a reboot, unless `force`.
    """
    if dry_run:
        return _foretold(make_plan(reg, keep=keep), force=force)
    stopped = tuple(reg.stop_left_behind())
    decided = make_plan(reg, keep=keep)
    return replace(_carry_out(reg, decided, alive=(), force=force), stopped=stopped)


def _foretold(decided: Plan, *, force: bool) -> CollectReport:
    """Report what a plan would do."""
    report = _report(decided, conflicts=set(), tidied=orphans.Tidied(), dry_run=True)
    return replace(report, refused=None if force else plan.refusal(decided))


Collected: TypeAlias = tuple[CollectReport | None, CollectRefused | None]
Collect: TypeAlias = Callable[[], Collected]


def collect_nobody() -> Collected:
    """Collect where that is not asked for."""
    return None, None


def try_collect(reg: Registry, *, force: bool, keep: Ended, dry_run: bool) -> Collected:
    """Collect as a part of a larger job, which goes on where this is refused, and tells."""
    try:
        report = collect(reg, force=force, keep=keep, dry_run=dry_run)
    except CollectRefused as error:
        return None, error
    return (None, report.refused) if report.refused else (report, None)


def check_ended(keep: Ended) -> Ended:
    """Return how many ended workers are kept, or how long.

    Raises: TypeError, ValueError.
    """
    if keep is not None and (type(keep) is not int and not isinstance(keep, timedelta)):
        message = f"keep is a timedelta, a number of workers or None, not {keep!r}"
        raise TypeError(message)
    if keep is not None and (keep < 0 if isinstance(keep, int) else keep < timedelta(0)):
        message = "keep must not be negative"
        raise ValueError(message)
    return keep


def make_plan(reg: Registry, *, keep: Ended = None) -> Plan:
    """Probe every worker and say what `collect` would do; nothing is written."""
    check_ended(keep)
    span = keep if isinstance(keep, timedelta) else KEEP if keep is None else None
    most = keep if isinstance(keep, int) else ENDED_MAX if keep is None else None
    if not reg.exists:
        return plan.make((), (), (), store="", now=host.now(), keep=span, most=most)
    store = reg.store()
    with store.state() as state:
        records = state.records.copy()
    living = [worker_of(record) for record in records.living()]
    return plan.make(
        living,
        reg.judge(living),
        records.ended(),
        store=store.id,
        now=host.now(),
        keep=span,
        most=most,
    )


def apply_plan(reg: Registry, decided: Plan, *, force: bool = False) -> CollectReport:
    """Carry a plan out, however old it is; as `collect` does otherwise.

    Workers that changed since it was made are conflicts, and so are those that live in spite of it.
    Raises: PlanInvalid for another store's plan; CollectRefused.
    """
    if reg.store().id != decided.store:
        raise PlanInvalid(reg.where, why=f"it was made for store {decided.store or '(none)'}")
    revs = {task.sid: task.rev for task in decided.tasks if task.action == "bury"}
    same = [w for w in reg.workers() if revs.get(w.sid) == w.rev]
    pairs = zip(same, reg.judge(same), strict=True)
    alive = [worker.sid for worker, now in pairs if now.alive]
    return _carry_out(reg, decided, alive=alive, force=force)


def assume_dead(reg: Registry, sid: str, *, reason: str) -> Event:
    """Remove a worker whose liveness cannot be determined, on a person's word; durable.

    One that is proven dead is recorded as such.
    Raises: WorkerExists if it is proven to live; WorkerNotFound, InvalidTransition, StaleRevision.
    """
    worker = reg.get(sid)
    if worker is None:
        raise WorkerNotFound(sid)
    liveness = reg.judge([worker])[0]
    if liveness.alive:
        raise WorkerExists(sid, pid=worker.pid, rev=worker.rev, state=worker.state.value)
    if liveness.dead:
        return reg.change(judge.death(reg.author(), worker, liveness))
    step = release_step(
        reg.author(), sid, reason=reason, expect=worker.rev, assumed=liveness.evidence.seen()
    )
    return reg.change(step)


def _carry_out(
    reg: Registry, decided: Plan, *, alive: Collection[str], force: bool
) -> CollectReport:
    """Write the plan's events, each on its condition, then tidy up."""
    refused = None if force else plan.refusal(decided)
    if refused is not None:
        raise refused
    author = reg.author("gc")
    conflicts = set(alive)
    tasks = [task for task in decided.tasks if task.action == "prune" or task.sid not in conflicts]
    size = min(_STEPS_A_COMMIT, reg.store().unit_workers_max) if tasks else 1
    for first in range(0, len(tasks), size):
        part = tasks[first : first + size]
        reg.commit([unless_changed(_step(author, task), conflicts) for task in part])
    tidied = orphans.tidy(reg) if reg.exists else orphans.Tidied()
    return _report(decided, conflicts=conflicts, tidied=tidied, dry_run=False)


def _step(author: Author, task: Task) -> Step:
    if task.action == "prune":
        return prune_step(author, task.sid, expect=task.rev)
    return burial_step(
        author,
        task.sid,
        cause=task.cause,
        evidence=task.evidence,
        status=task.status,
        expect=task.rev,
    )


def _report(
    decided: Plan, *, conflicts: set[str], tidied: orphans.Tidied, dry_run: bool
) -> CollectReport:
    done = [task for task in decided.tasks if task.sid not in conflicts]
    buried = [task for task in done if task.action == "bury"]
    return CollectReport(
        lost=tuple(task.sid for task in buried if not task.witnessed),
        exited=tuple(task.sid for task in buried if task.witnessed),
        pruned=tuple(task.sid for task in done if task.action == "prune"),
        unknown=decided.unknown,
        conflicts=tuple(sorted(conflicts)),
        sockets=tidied.sockets,
        sockets_kept=tidied.kept,
        dry_run=dry_run,
    )
