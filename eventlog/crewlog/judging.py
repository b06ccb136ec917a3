"""Judge whether workers live, hear their beats, and put their ends on record."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Final

from crewlog import changes, endpoint, identity, layout, liveness
from crewlog.changes import Author, Step
from crewlog.errors import (
    CrewlogError,
    InvalidTransition,
    LeaseMissing,
    ProcessNotFound,
    StaleRevision,
    Unavailable,
    UnknownOutcome,
    WorkerNotFound,
)
from crewlog.events import Event, Worker, WorkerState
from crewlog.identity import Status
from crewlog.liveness import Evidence, Liveness
from crewlog.process import Process
from crewlog.store import Lease, Store
from crewlog.witness import witness

_NOTHING: Final = Evidence()


class Judging(ABC):
    """What a registry must tell of its workers, and the judgement of them."""

    @abstractmethod
    def get(self, sid: str) -> Worker | None:
        """Return one worker; None if there is none."""

    @abstractmethod
    def author(self) -> Author:
        """Return who we are."""

    @abstractmethod
    def log(self) -> Store:
        """Return the store's log. *Raises* StoreMissing."""

    @abstractmethod
    def created(self) -> Store:
        """Return the store's log, and create the store if there is none."""

    @abstractmethod
    def history(
        self,
        *,
        sid: str | None = None,
        types: Collection[str] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: int | None = None,
    ) -> Iterator[Event]:
        """Yield the events that match."""

    @abstractmethod
    def change(self, sid: str, step: Step) -> Event:
        """Write one step; return its event, or the worker's last one if nothing had to be."""

    def liveness(self, sid: str) -> Liveness:
        """Judge whether one worker lives, now. *Raises* WorkerNotFound.

        Of one that lives on this host, its socket is asked too, where it has a Unix one: it sees a
        connection that ends at once.
        """
        worker = self.known(sid)
        found = self.judge([worker])[0]
        if not found.alive or not worker.sock or not is_of_this_boot(worker):
            return found
        seen = found.evidence._replace(sock=endpoint.ask(worker.sock))
        return liveness.judge(worker.identity, seen, final=False)

    def judge(self, workers: Collection[Worker]) -> list[Liveness]:
        """Judge many workers, now, in their order; no lock is held and nothing is written."""
        names = [w.lease for w in workers if w.lease is not None and not w.final]
        living = names or any(not worker.final for worker in workers)
        log = self.log() if living else None
        look = witness(
            local_file_system=log is None or log.one_host,
            leases=log.leases.look(names) if log is not None and names else None,
        ).look
        return [
            liveness.judge(
                worker.identity,
                _NOTHING
                if worker.final
                else look(
                    worker.identity,
                    last_event_at=worker.updated_at,
                    owner=worker.owner,
                    lease=worker.lease,
                    heartbeat_s=worker.heartbeat_s,
                ),
                final=worker.final,
            )
            for worker in workers
        ]

    def burial(self, sid: str) -> list[Step]:
        """Return the step that records the death of a sid's holder; none if it is not proven."""
        worker = self.get(sid)
        if worker is None or worker.final:
            return []
        found = self.judge([worker])[0]
        return [death(self.author(), worker, found)] if found.dead else []

    def known(self, sid: str) -> Worker:
        """Return one worker. *Raises* WorkerNotFound."""
        worker = self.get(sid)
        if worker is None:
            raise WorkerNotFound(sid)
        return worker

    def beat(self, sid: str) -> None:
        """Say that a worker is well, now; nothing is added to the log.

        For the worker itself, or whoever vouches for it. Without a beat for `heartbeat_s` it counts
        as stalled. *Raises* WorkerNotFound; LeaseMissing if it was registered without a lease.
        """
        worker = self.known(sid)
        name, heartbeat_s = worker.lease, worker.heartbeat_s
        if name is None or not self.log().leases.beat(name, heartbeat_s=heartbeat_s):
            raise LeaseMissing(sid)

    @contextmanager
    def leasing(
        self, sid: str, *, wanted: bool, heartbeat_s: float | None
    ) -> Iterator[Lease | None]:
        """Make a lease, with its first beat, for a worker that is registered in this block.

        If the block raises, the worker is not registered and the lease goes.
        """
        changes.check_sid(sid)
        if not wanted:
            yield None
            return
        made = self.created().leases.make(sid, heartbeat_s=heartbeat_s)
        try:
            yield made
        except BaseException:
            made.drop()
            raise

    # -- ends -------------------------------------------------------------------------------

    def same(self, worker: Worker) -> Worker:
        """Return the worker as it is now. *Raises* StaleRevision if the sid is another's by now."""
        now = self.get(worker.sid)
        if now is None or now.generation != worker.generation:
            actual = None if now is None else now.rev
            raise StaleRevision(worker.sid, expected=worker.rev, actual=actual)
        return now

    def last_event(self, worker: Worker) -> Event:
        """Return the event that brought a worker to where it is."""
        return next(self.history(sid=worker.sid, after=worker.rev - 1))

    def record_end(
        self,
        worker: Worker,
        step: Callable[[int], Step],
        *,
        late: Callable[[CrewlogError], None] | None = None,
    ) -> bool:
        """Write a step, made for the worker's rev, about its end; False if the sid is another's.

        A worker that is recorded as ended already, in another way than lost, stays as it is. Where
        no server answers it is tried for END_WAIT_S, for nobody else knows how it ended; `late` is
        told once.
        """
        deadline = time.monotonic() + layout.END_WAIT_S
        while True:
            try:
                return self._record_end(worker, step)
            except (Unavailable, UnknownOutcome) as error:
                if time.monotonic() > deadline:
                    raise
                if late is not None:
                    late(error)
                    late = None
                time.sleep(layout.SAFETY_LOOK_S)

    def _record_end(self, worker: Worker, step: Callable[[int], Step]) -> bool:
        for _ in range(layout.CHANGE_TRIES):
            now = self.get(worker.sid)
            if now is None or now.generation != worker.generation:
                return False
            if now.final and now.state != WorkerState.LOST:
                return True
            try:
                self.change(worker.sid, step(now.rev))
            except (StaleRevision, InvalidTransition):
                continue
            return True
        return False


def runs_here(worker: Worker) -> bool:
    """Say whether the very process of a worker runs in this namespace, whatever is recorded."""
    seen = witness().look(worker.identity, last_event_at=worker.updated_at)
    found = liveness.judge(worker.identity, seen, final=False)
    return found.alive and found.cause in {"identity", "start_time"}


def is_of_this_boot(worker: Worker) -> bool:
    """Say whether a worker's pid and paths may be looked at: on another host they are others'."""
    return worker.identity is not None and worker.identity.boot_id == identity.scope().boot_id


def hold(worker: Worker) -> Process | None:
    """Hold a worker's process; None if it has ended, or is of another host."""
    if worker.identity is None or not is_of_this_boot(worker):
        return None
    try:
        return Process(worker.identity)
    except ProcessNotFound:
        return None


def exit_of(author: Author, sid: str, code: int, *, rev: int) -> Step:
    """Return the step that records what wait(2) said: an exit code, or minus a signal."""
    return changes.exited(
        author,
        sid,
        code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        source="wait",
        expect=rev,
    )


def death(author: Author, worker: Worker, found: Liveness, *, status: Status | None = None) -> Step:
    """Return the step that records a proven death, if the worker is still as it was judged."""
    return changes.buried(
        author,
        worker.sid,
        cause=found.cause,
        evidence=found.evidence.seen(),
        status=status or status_in(found),
        rev=worker.rev,
    )


def status_in(found: Liveness) -> Status | None:
    """Return how the process ended, if the evidence tells."""
    seen = found.evidence
    if seen.exit_code is None and seen.exit_signal is None:
        return None
    return Status(seen.exit_code, seen.exit_signal, "zombie")
