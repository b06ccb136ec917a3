"""End workers: ask, wait, kill, wait, and learn how they ended.

The process is held by its pidfd and its identity checked; the request is durable; only then the
signal goes out, through that same pidfd. The entry stays until the end is proven.
"""

import os
import signal as signals
import time
from typing import Final

from crewlog import changes, identity, layout
from crewlog.errors import (
    IdentityMismatch,
    InvalidTransition,
    StaleRevision,
    StopRefused,
    WaitTimeout,
)
from crewlog.events import Event, Worker, WorkerState
from crewlog.identity import Status
from crewlog.judging import Judging, death, hold, runs_here, status_in
from crewlog.process import Process

_THERE: Final = "Stop it from there"


class Ending(Judging):
    """The ending of workers, by us or before our eyes."""

    def stop(
        self,
        sid: str,
        *,
        grace_s: float = layout.GRACE_S,
        reason: str,
        signal: int = signals.SIGTERM,
    ) -> Event:
        """End a worker: ask it by `signal`, after `grace_s` seconds kill it, and record its end.

        Returns the event of its end; of one that has ended already, the event that was recorded.
        *Guarantee*: the request is durable before the signal is sent; only the recorded process is
        ever signalled. *Raises* WorkerNotFound; StopRefused for ourselves, our ancestors, pid 1,
        another user's process and one of another pid namespace; IdentityMismatch where it cannot be
        proven to be the one; WaitTimeout if even SIGKILL does not end it: it stays `stopping`.
        """
        grace_s, reason = changes.check_wait(grace_s), changes.check_reason(reason)
        number = signals.Signals(signal)
        worker = self.known(sid)
        held = self._hold_living(worker)
        if held is None:
            return self._ended(worker, None)
        with held:
            _require_stoppable(worker)
            asked = self._ask(worker, number, grace_s=grace_s, reason=reason)
            if asked is not None:
                return asked
            status = self._end(worker, held, number, grace_s=grace_s)
            return self._ended(worker, status, proven=True)

    def _hold_living(self, worker: Worker) -> Process | None:
        """Hold the worker's process; None if it has ended, or is proven dead."""
        if worker.state is WorkerState.LOST and runs_here(worker):
            raise _refused(
                worker,
                "it is recorded as lost, and its process runs here",
                f"Register it again, then stop it: crewlog register {worker.sid} "
                f"--pid {worker.pid}",
            )
        if worker.final:
            return None
        found = self.judge([worker])[0]
        if found.dead:
            return None
        who = worker.identity
        if found.cause in {"foreign_pid_namespace", "foreign_host"}:
            raise _refused(worker, "it is of another host or pid namespace", _THERE)
        if who is None or not found.alive:
            raise IdentityMismatch(worker.sid, pid=worker.pid, cause=found.cause)
        if found.cause in {"lease", "found_in_namespace"}:
            raise _refused(worker, "it lives on another host or in another pid namespace", _THERE)
        return hold(worker)

    def _ask(self, worker: Worker, number: int, *, grace_s: float, reason: str) -> Event | None:
        """Make the request durable; the event of its end if the worker ended meanwhile."""
        sid = worker.sid
        for _ in range(layout.CHANGE_TRIES):
            now = self.same(worker)
            if now.final:
                return self.last_event(now)
            step = changes.stop_requested(
                self.author(), sid, signal=number, grace_s=grace_s, reason=reason, expect=now.rev
            )
            try:
                self.change(sid, step)
            except StaleRevision:
                continue
            return None
        raise StaleRevision(sid, expected=worker.rev, actual=self.same(worker).rev)

    def _end(self, worker: Worker, held: Process, number: int, *, grace_s: float) -> Status | None:
        """Signal, wait, kill, wait; return how it ended, if anybody can tell."""
        try:
            held.send(number)
            if not held.wait(grace_s):
                held.send(signals.SIGKILL)
                if not held.wait(layout.KILL_WAIT_S):
                    what = f"the end of worker {worker.sid!r} (pid {worker.pid}) by SIGKILL"
                    raise WaitTimeout(what, waited_s=layout.KILL_WAIT_S)
        except PermissionError as error:
            raise _refused(worker, "we may not signal it", "Stop it as its user") from error
        return held.status()

    def _ended(self, worker: Worker, status: Status | None, *, proven: bool = False) -> Event:
        """Record the proven end of a worker, unless it is recorded as well as we could."""
        for _ in range(layout.CHANGE_TRIES):
            now = self.same(worker) if status is not None else self._told_by_owner(worker)
            if now.final and (status is None or now.state != WorkerState.LOST):
                return self.last_event(now)
            found = self.judge([now])[0]
            if not (found.dead or proven):
                raise IdentityMismatch(now.sid, pid=now.pid, cause=found.cause)
            try:
                return self.change(now.sid, death(self.author(), now, found, status=status))
            except (StaleRevision, InvalidTransition):
                continue
        raise StaleRevision(worker.sid, expected=worker.rev, actual=self.same(worker).rev)

    def _told_by_owner(self, worker: Worker) -> Worker:
        """Return the worker as it is once its owner, who may be its parent, had time to tell."""
        deadline = time.monotonic() + layout.REAP_WAIT_S
        while True:
            now = self.same(worker)
            if now.final or now.owner is None or time.monotonic() > deadline:
                return now
            found = self.judge([now])[0]
            if found.evidence.owner_dead or status_in(found) is not None:
                return now
            time.sleep(layout.REAP_LOOK_S)

    def observe(self, sid: str, *, timeout_s: float | None = None) -> Event:
        """Wait for the end of a worker that need not be our child; record it, and how it ended.

        The kernel keeps the exit status for whoever holds the process when it is reaped: what its
        parent throws away is not lost (Linux ≥ 6.15; before, only while it is a zombie of ours).
        Returns the event of its end. *Raises* WorkerNotFound; WaitTimeout after `timeout_s`;
        IdentityMismatch where it cannot be judged or waited for from here.
        """
        limit_s = None if timeout_s is None else changes.check_wait(timeout_s)
        worker = self.known(sid)
        held = self._hold_living(worker)
        if held is None:
            return self._ended(worker, None)
        with held:
            deadline = None if limit_s is None else time.monotonic() + limit_s
            while not held.wait(_step_s(deadline)):
                if deadline is not None and time.monotonic() >= deadline:
                    raise WaitTimeout(f"the end of worker {sid!r}", waited_s=limit_s or 0.0)
            return self._ended(worker, held.status(), proven=True)


def _step_s(deadline: float | None) -> float:
    left_s = layout.SAFETY_LOOK_S if deadline is None else deadline - time.monotonic()
    return min(layout.SAFETY_LOOK_S, max(0.0, left_s))


def _refused(worker: Worker, why: str, remedy: str) -> StopRefused:
    return StopRefused(worker.sid, pid=worker.pid, why=why, remedy=remedy)


def _require_stoppable(worker: Worker) -> None:
    """Refuse what would end us or hit a stranger; its identity is proven already."""
    who = worker.identity
    assert who is not None  # held
    if who.pid == os.getpid():
        raise _refused(worker, "it is this process", "Let it end by itself, or ask another process")
    if who.pid == 1:
        raise _refused(worker, "it is pid 1", "Stop the machine or the container instead")
    if who.pid in identity.ancestors():
        raise _refused(worker, "this process descends from it", "Ask another process")
    me = os.geteuid()
    if me not in {who.uid, 0}:
        raise _refused(worker, f"it belongs to uid {who.uid}, we are {me}", "Stop it as its user")
