"""Observe all workers of a store that can be judged from here, and record each end as it happens.

An observer hears of registrations by a watch and gives a charge for each living worker to the
reaper of this process; so a death is on record within milliseconds, whoever started the worker and
whether that still lives. Of several observers of one boot, pid namespace and user one leads, and
holds what only one can hold; the others stand by. Whoever leads also looks, each second, at workers
whose pid means nothing here, by their leases and by a scan, and records those that are proven dead
twice in a row: an observer beside them is faster and knows more. Every record is written on the
condition that it is still the same worker and has not ended, so that starter, observers and
collectors together write one event a death.
"""

import contextlib
import hashlib
import logging
import os
import threading
import time
from typing import Final

from crewlog import host
from crewlog.errors import CrewlogError, LockBusy, ProcessNotFound
from crewlog.host import Closable
from crewlog.model import arguments, events
from crewlog.model.events import Identity, JsonObject, Oom, Status, Worker
from crewlog.model.items import Item
from crewlog.model.steps import Step, unless_changed
from crewlog.process import handle, identity
from crewlog.process.handle import Process
from crewlog.session import Session
from crewlog.watch import follow
from crewlog.workers import stop
from crewlog.workers.judge import death, judge
from crewlog.workers.reaper import REAPER, Charge

_STAND_BY_S: Final = 0.5  # who stands by asks for the lead so often
_LOOK_S: Final = 1.0  # at workers whose pid means nothing here
_TYPES: Final[tuple[events.EventType, ...]] = (events.REGISTERED, *events.ENDING)
_SIGKILL: Final = 9

_logger = logging.getLogger("crewlog.observer")


class Observer(Closable):
    """Records the ends of all workers of a store, until it is closed; see `Registry.observe_all`.

    Its thread alone touches the fields that are not said to be another's.
    """

    def __init__(self, session: Session) -> None:
        """Begin to stand by.

        Raises: OSError where no thread is to be had.
        """
        self._session = session.twin()
        self._closed = threading.Event()
        self._leads = threading.Event()
        self._charges: dict[str, _Observed] = {}  # by sid
        self._owners: dict[Identity, _Owner] = {}
        self._afar: dict[str, Worker] = {}
        self._seen_dead: dict[str, int] = {}  # by sid: registered_seq, at the last look
        self._pid = os.getpid()
        self._thread = host.start_thread(self._run, name="crewlog-observer")

    @property
    def leads(self) -> bool:
        """Say whether it records at this moment, or stands by for one that does."""
        return self._leads.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it leads, and holds every worker that lives by then; False if it does not."""
        return self._leads.wait(None if timeout_s is None else arguments.check_wait(timeout_s))

    def close(self) -> None:
        """Hand the lead on, and give everything back; idempotent."""
        if self._pid != os.getpid():  # a forked child has no such thread
            return
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._session.close()

    # -- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                store = self._session.find()
                if store is not None:
                    with store.leases.turn(_name_of_the_lead(), wait_s=0):
                        self._lead()
            except LockBusy:  # another one leads
                pass
            except (CrewlogError, OSError) as error:  # OSError: no thread is to be had just now
                _logger.warning("observing %s is interrupted: %s", self._session.where, error)
            finally:
                self._let_go()
            self._closed.wait(_STAND_BY_S)

    def _lead(self) -> None:
        """Hold every living worker, follow the registrations, look afar each second."""
        look_at = 0.0
        with follow.watch(self._session, types=_TYPES) as items:
            while not self._closed.is_set():
                item = items.next(0 if not self._leads.is_set() else _LOOK_S)
                if item is not None:
                    self._follow(item)
                else:
                    self._leads.set()  # all that is durable was taken
                if self._leads.is_set() and time.monotonic() >= look_at:
                    self._look_afar()
                    look_at = time.monotonic() + _LOOK_S

    def _let_go(self) -> None:
        self._leads.clear()
        for charge in (*self._charges.values(), *self._owners.values()):
            REAPER.drop(charge)
        self._charges.clear()
        self._owners.clear()
        self._afar.clear()

    def _follow(self, item: Item) -> None:
        if item.kind == "change":
            if item.type == events.REGISTERED:
                worker = self._session.get(item.sid)
                if worker is not None:
                    self._take(worker)
            else:
                self._leave(item.sid)
            return
        if item.state is None:
            return
        living = {worker.sid: worker for worker in item.state.workers.living()}
        for sid in [*self._charges, *self._afar]:
            if sid not in living:
                self._leave(sid)
        for worker in living.values():
            self._take(worker)

    def _leave(self, sid: str) -> None:
        """Hold a worker no longer, whose end is on record."""
        self._afar.pop(sid, None)
        charge = self._charges.pop(sid, None)
        if charge is not None:
            REAPER.drop(charge)

    def _take(self, worker: Worker) -> None:
        """Hold a worker that lives; of one that has ended, let its end be recorded."""
        held = self._charges.get(worker.sid)
        if held is not None and held.worker.registered_seq == worker.registered_seq:
            return
        self._leave(worker.sid)
        if worker.final or REAPER.has(self._session, worker):  # we started it, and record its end
            return
        if not _is_here(worker.identity):
            self._afar[worker.sid] = worker
            return
        charge = _Observed(worker)
        self._hand(charge)
        self._charges[worker.sid] = charge
        owner = worker.owner if worker.ends_with == "owner" else None
        if owner is not None and _is_here(owner) and owner not in self._owners:
            tied = _Owner(owner)
            self._hand(tied)
            self._owners[owner] = tied

    def _hand(self, charge: "_Held") -> None:
        """Give a charge to the reaper, or let it go.

        Raises: OSError where no thread is to be had.
        """
        try:
            REAPER.add(charge, self._session)
        except OSError:
            charge.release()
            raise

    def _look_afar(self) -> None:
        """Record the ends of those that cannot be waited for, once they are seen dead twice."""
        afar = list(self._afar.values())
        dead: dict[str, int] = {}
        steps: list[Step] = []
        for worker, liveness in zip(afar, judge(self._session, afar), strict=True):
            if not liveness.dead:
                continue
            dead[worker.sid] = worker.registered_seq
            if self._seen_dead.get(worker.sid) == worker.registered_seq:
                steps.append(unless_changed(death(self._session.author(), worker, liveness)))
        self._seen_dead = dead
        for step in steps:
            self._session.append([step])


def _name_of_the_lead() -> str:
    """Return what is the same for all who can judge the same workers by their pids."""
    here = identity.scope()
    words = f"{here.boot_id} {here.pid_ns} {os.geteuid()}"
    return f"observer.{hashlib.sha256(words.encode()).hexdigest()[:16]}"


def _is_here(who: Identity | None) -> bool:
    here = identity.scope()
    return who is not None and (who.boot_id, who.pid_ns) == (here.boot_id, here.pid_ns)


class _Held(Charge):
    """A process that need not be our child, held by its pidfd; without one, it is judged."""

    __slots__ = ("_process",)

    def __init__(self, sid: str, who: Identity, *, of: int) -> None:
        super().__init__(sid, who, of=of)
        self._process: Process | None = None
        with contextlib.suppress(ProcessNotFound):
            self._process = Process(who)

    @property
    def fd(self) -> int:
        return -1 if self._process is None else self._process.fd

    def _has_ended(self) -> bool:
        return self._process is None or self._process.wait(0)

    def spare(self) -> None:
        if self._process is not None:
            self._process.spare()

    def release(self) -> None:
        if self._process is not None:
            self._process.close()


class _Observed(_Held):
    """A worker that is observed."""

    __slots__ = ("_gone_at", "_oom", "_status", "worker")

    def __init__(self, worker: Worker) -> None:
        assert worker.identity is not None  # it is here
        super().__init__(worker.sid, worker.identity, of=worker.registered_seq)
        self.worker = worker
        self._status: Status | None = None
        self._oom: Oom | None = None
        self._gone_at: float | None = None

    def look(self) -> bool:
        """Say whether it has ended and how is known; a starter that lives may tell it first.

        It knows more, and lets its child go only when the end is on record.
        """
        if not self._has_ended():
            return False
        if self._gone_at is None:
            self._gone_at = time.monotonic()
        over = time.monotonic() - self._gone_at >= handle.REAP_WAIT_S
        if self._process is not None and self._process.fd >= 0:
            if self._starter_lives() and not over:
                self._status = identity.kept_status(self._process.fd)
            else:
                self._status = identity.exit_status(self._process.who.pid, self._process.fd)
        else:
            over = True
        if self._status is None and not over:
            self.is_dying = True
            return False
        if self._status is not None and self._status.signal == _SIGKILL:
            self._oom = REAPER.lack(self)
        return True

    def _starter_lives(self) -> bool:
        owner = self.worker.owner
        if owner is None or not _is_here(owner):
            return False
        try:
            Process(owner).close()
        except ProcessNotFound:
            return False
        return True

    def step(self, session: Session) -> Step | None:
        liveness = judge(session, [self.worker])[0]
        if not liveness.dead:
            return None
        oom = self._oom
        details: JsonObject = {} if oom is None else {"oom": oom.as_json()}
        return death(session.author(), self.worker, liveness, status=self._status, details=details)


class _Owner(_Held):
    """The owner of workers that are to end with it."""

    __slots__ = ()

    def __init__(self, who: Identity) -> None:
        super().__init__(f"owner {who.pid}", who, of=0)

    def look(self) -> bool:
        return self._has_ended()

    def step(self, session: Session) -> Step | None:
        """Stop the workers, which takes a while; an owner's end is no event."""
        own, who = session.twin(), self.who

        def work() -> None:
            try:
                stop.stop_left_behind(own, owner=who)
            finally:
                own.close()

        host.start_thread(work, name="crewlog-left-behind")
        return None
