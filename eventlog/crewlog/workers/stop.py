"""End workers: ask, wait, kill, wait, and learn how they ended.

The process is held by its pidfd and its identity checked; the request is durable; only then the
signal goes out, through that same pidfd. The entry stays until the end is proven.
"""

import logging
import os
import signal as signals
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Final, Literal, TypeAlias

from crewlog.errors import (
    CompactedError,
    CrewlogError,
    IdentityMismatch,
    InvalidTransition,
    RegistryClosed,
    StaleRevision,
    StopRefused,
    WaitTimeout,
)
from crewlog.model import arguments, events
from crewlog.model.events import Event, Identity, Status, Worker, WorkerState
from crewlog.model.sieve import Sieve, sid_needle
from crewlog.model.steps import stop_step
from crewlog.process import handle, identity
from crewlog.process.handle import Process
from crewlog.process.liveness import Liveness
from crewlog.session import Session
from crewlog.store import Store, retried
from crewlog.workers import tree
from crewlog.workers.judge import CHANGE_TRIES, death, hold, judge, runs_here, same, status_in
from crewlog.workers.tree import Member

GRACE_S: Final = 10.0

_KILL_WAIT_S: Final = 5.0
_logger = logging.getLogger("crewlog.stop")

_THERE: Final = "Stop it from there"


def stop(
    session: Session,
    sid: str,
    *,
    grace_s: float = GRACE_S,
    reason: str,
    signal: int = signals.SIGTERM,
    with_tree: bool = False,
) -> Event:
    """End a worker and record how it ended; see `Registry.stop`."""
    grace_s, reason = arguments.check_wait(grace_s), arguments.check_reason(reason)
    number = int(signal)
    if number not in signals.valid_signals():
        message = f"{number} is not a signal of this system"
        raise ValueError(message)
    worker = session.known(sid)
    known = tree.members([worker]).get(sid, ()) if with_tree else ()
    try:
        return _stop(session, worker, number, grace_s=grace_s, reason=reason)
    finally:  # also of one that has ended by itself, and left them
        if with_tree:
            _end_tree(worker, known, number, grace_s=grace_s)


def _stop(session: Session, worker: Worker, number: int, *, grace_s: float, reason: str) -> Event:
    held = hold_to_stop(session, worker)
    if not isinstance(held, Process):
        return _ended(session, worker, held)
    with held:
        if _ask(session, worker, number, grace_s=grace_s, reason=reason):
            wait_s = session.limits.kill_wait_s
            status = _end(worker, held, number, grace_s=grace_s, wait_s=wait_s)
        elif held.wait(0):
            status = held.status()
        else:  # handed off meanwhile
            return session.last_event(same(session, worker))
        try:
            return _ended(session, worker, status, proven=True)
        except CrewlogError as error:
            raise _unrecorded(error, worker, status) from error.__cause__


def _unrecorded(error: CrewlogError, worker: Worker, status: Status | None) -> CrewlogError:
    """Return the error of an end that came, and is not on record: nobody sees again how it was."""
    how = ""
    if status is not None:
        how = f" by code {status.code}" if status.signal is None else f" by signal {status.signal}"
    error.what = f"worker {worker.sid!r} has ended{how}, and that is not recorded: {error.what}"
    error.__post_init__()
    return error


Outlook: TypeAlias = Literal["signal", "record its end", "nothing"]


def foresee_stop(session: Session, worker: Worker) -> Outlook:
    """Return what `stop` would do with a worker.

    Raises: StopRefused, IdentityMismatch.
    """
    held = hold_to_stop(session, worker)
    if isinstance(held, Process):
        held.close()
        return "signal"
    return "nothing" if worker.final else "record its end"


def hold_to_stop(session: Session, worker: Worker) -> Process | Status | None:
    """Hold the process of a worker that may be stopped, as `_hold_living` does.

    Raises: StopRefused, IdentityMismatch.
    """
    held = _hold_living(session, worker)
    if isinstance(held, Process):
        try:
            _require_stoppable(worker, held)
        except BaseException:
            held.close()
            raise
    return held


def _hold_living(session: Session, worker: Worker) -> Process | Status | None:
    """Hold the worker's process; if it has ended, tell how: None where nobody does."""
    if worker.state is WorkerState.LOST and runs_here(worker):
        raise _refused(
            worker,
            "it is recorded as lost, and its process runs here",
            f"Register it again, then stop it: crewlog register {worker.sid} --pid {worker.pid}",
        )
    if worker.final:
        return None
    with ExitStack() as undo:
        held = hold(worker)  # before the look: how it ends, the kernel keeps for who holds it
        if held is not None:
            undo.enter_context(held)
        liveness = judge(session, [worker])[0]
        if liveness.dead:
            status = status_in(liveness)
            return held.status() if status is None and held is not None else status
        _require_here(worker, liveness)
        undo.pop_all()
    return held


def _require_here(worker: Worker, liveness: Liveness) -> None:
    """Refuse a worker that is not proven to live in this pid namespace."""
    if liveness.cause in {"foreign_pid_namespace", "foreign_host"}:
        raise _refused(worker, "it is of another host or pid namespace", _THERE)
    if worker.identity is None or not liveness.alive:
        raise IdentityMismatch(worker.sid, pid=worker.pid, cause=liveness.cause)
    if liveness.cause in {"lease", "found_in_namespace"}:
        raise _refused(worker, "it lives on another host or in another pid namespace", _THERE)


def _ask(session: Session, worker: Worker, number: int, *, grace_s: float, reason: str) -> bool:
    """Make the request durable; False if the worker's end is on record already."""
    step = stop_step(
        session.author(),
        worker.sid,
        signal=number,
        grace_s=grace_s,
        reason=reason,
        of=worker.registered_seq,
    )
    try:
        session.append([step])
    except InvalidTransition:
        return False
    return True


def _end(
    worker: Worker, held: Process, number: int, *, grace_s: float, wait_s: float
) -> Status | None:
    """Signal, wait, kill, wait `wait_s` seconds; return how it ended, if anybody can tell."""
    try:
        held.send(number)
        if not held.wait(grace_s):
            held.send(signals.SIGKILL)
            if not held.wait(wait_s):
                what = f"the end of worker {worker.sid!r} (pid {worker.pid}) by SIGKILL"
                raise WaitTimeout(what, waited_s=wait_s, outcome="written")
    except PermissionError as error:
        raise _refused(worker, "we may not signal it", "Stop it as its user") from error
    return held.status()


def _ended(
    session: Session, worker: Worker, status: Status | None, *, proven: bool = False
) -> Event:
    """Record the proven end of a worker, unless it is recorded as well as we could."""
    wait_s = handle.REAP_WAIT_S if status is None else 0.0
    tries = CHANGE_TRIES
    try:
        while True:
            now, liveness = _end_from_owner(session, worker, wait_s)
            if now.final and (status is None or now.state != WorkerState.LOST):
                return session.last_event(now)
            if liveness.alive or not (liveness.dead or proven or status is not None):
                raise IdentityMismatch(now.sid, pid=now.pid, cause=liveness.cause)
            try:
                return session.change(death(session.author(), now, liveness, status=status))
            except InvalidTransition:  # somebody else was faster: the next look shows it
                tries -= 1
                if not tries:
                    raise
    except StaleRevision:  # the sid is another worker's by now
        end = retried(lambda: _end_on_record(session.require(), worker), CompactedError)
        if end is None:
            raise
        return end


def _end_on_record(store: Store, worker: Worker) -> Event | None:
    """Return the end of a worker from the history; None if it is no longer kept."""
    first = max(worker.rev, store.first_seq())  # when its rev was read it lived, or had just ended
    end: Event | None = None
    for line, raw in store.read(first - 1, sieve=Sieve(needles=[sid_needle(worker.sid)])):
        if line["sid"] != worker.sid or line["seq"] == worker.registered_seq:
            continue
        if line["type"] == events.REGISTERED:
            break
        if line["type"] in events.ENDING:
            end = events.event_of(line, raw)
    return end


def _end_from_owner(session: Session, worker: Worker, wait_s: float) -> tuple[Worker, Liveness]:
    """Return the worker, and a look at it, once its owner, maybe its parent, had time to tell.

    It may be the last look that shows how it ended: its parent can reap it at any moment.
    """
    deadline = time.monotonic() + wait_s
    while True:
        now = same(session, worker)
        liveness = judge(session, [now])[0]
        over = now.final or now.owner is None or liveness.evidence.owner_dead
        if over or status_in(liveness) is not None or time.monotonic() >= deadline:
            return now, liveness
        time.sleep(handle.REAP_LOOK_S)


def observe(
    session: Session,
    sid: str,
    *,
    timeout_s: float | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Event:
    """Wait for the end of a worker and record it; see `Registry.observe`.

    Raises: RegistryClosed once nobody wants it any more.
    """
    limit_s = None if timeout_s is None else arguments.check_wait(timeout_s)
    worker = session.known(sid)
    held = _hold_living(session, worker)
    if not isinstance(held, Process):
        return _ended(session, worker, held)
    with held:
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while not held.wait(_step_s(deadline, session.limits.safety_look_s)):
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(f"the end of worker {sid!r}", waited_s=limit_s or 0.0)
            if not is_wanted():
                raise RegistryClosed(session.where)
        return _ended(session, worker, held.status(), proven=True)


def _step_s(deadline: float | None, look_s: float) -> float:
    left_s = look_s if deadline is None else deadline - time.monotonic()
    return min(look_s, max(0.0, left_s))


# -- who belongs to a worker, or was left behind ------------------------------------------


LEFT_BEHIND: Final = "its owner has ended"


def stop_left_behind(session: Session, *, owner: Identity | None = None) -> list[str]:
    """Stop the workers that are to end with their owner, which is proven dead; return their sids.

    `owner` is the one to look for, None: any. One that cannot be stopped stays as it is.
    """
    wanted = [
        worker
        for worker in session.state().workers.living()
        if worker.ends_with == "owner" and owner in {None, worker.owner}
    ]
    ended = []
    for worker, liveness in zip(wanted, judge(session, wanted), strict=True):
        if liveness.alive and liveness.evidence.owner_dead:
            try:
                stop(session, worker.sid, reason=LEFT_BEHIND, with_tree=True)
            except CrewlogError as error:
                _logger.warning("worker %s outlives its owner: %s", worker.sid, error)
            else:
                ended.append(worker.sid)
    return ended


def _end_tree(worker: Worker, known: Sequence[Member], number: int, *, grace_s: float) -> None:
    """Signal those that belong to a worker, wait, kill who is left; the worker itself has ended.

    Each is held by its pidfd, and was shown to belong before the signal.
    """
    deadline = time.monotonic() + grace_s
    asked: set[Member] = set()
    while left := _left(worker, known):
        over = time.monotonic() >= deadline
        for one in left:
            held = tree.hold(one) if over or one not in asked else None
            if held is not None:
                with held, suppress(PermissionError):
                    held.send(signals.SIGKILL if over else number)
                asked.add(one)
        if time.monotonic() >= deadline + _KILL_WAIT_S:
            _logger.warning("of the tree of worker %s, %d are left", worker.sid, len(left))
            return
        known = left
        time.sleep(handle.REAP_LOOK_S)


def _left(worker: Worker, known: Sequence[Member]) -> tuple[Member, ...]:
    """Return who of a worker's tree lives: while one that is known does, its session is its own."""
    return tree.members([worker], known={worker.sid: known}).get(worker.sid, ())


def _refused(worker: Worker, why: str, remedy: str) -> StopRefused:
    return StopRefused(worker.sid, pid=worker.pid, why=why, remedy=remedy)


def _require_stoppable(worker: Worker, held: Process) -> None:
    """Refuse what would end us or hit a stranger; its identity is proven already."""
    who = worker.identity
    assert who is not None  # held
    if who.pid == os.getpid():
        raise _refused(worker, "it is this process", "Let it end by itself, or ask another process")
    if who.pid == 1:
        raise _refused(worker, "it is pid 1", "Stop the machine or the container instead")
    if who.pid in identity.ancestors():
        raise _refused(worker, "this process descends from it", "Ask another process")
    try:
        held.send(0)  # the kernel knows who may
    except PermissionError:
        me = os.geteuid()
        known = f"it belongs to uid {who.uid}, we are {me}"
        why = known if who.uid != me else f"it runs as another user by now, we are uid {me}"
        raise _refused(worker, why, "Stop it as its user") from None
