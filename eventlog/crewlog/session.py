"""Hold what a registry works with: its place, the store once there is one, and who acts."""

import copy
import os
import pwd
import sys
import threading
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from crewlog import host
from crewlog.errors import (
    CompactedError,
    CrewlogError,
    RegistryClosed,
    StoreMissing,
    WorkerNotFound,
)
from crewlog.model import arguments, codec, events
from crewlog.model.events import Event, JsonObject, Worker, event_of, worker_of
from crewlog.model.limits import DEFAULT, Limits
from crewlog.model.records import Records
from crewlog.model.state import State, state_of
from crewlog.model.steps import EMPTY, Appended, Author, Decide, Redact, Step, decide_all
from crewlog.place import Place
from crewlog.store import Store

Via: TypeAlias = Literal["api", "cli", "gc"]


class Session:
    """One user's way to one store: opened when it is first needed, created at the first change."""

    def __init__(
        self,
        place: Place,
        *,
        wait_s: float,
        actor: str | None,
        redact: Redact | None,
        via: Via,
        limits: Limits = DEFAULT,
    ) -> None:
        """Open nothing yet; see `crewlog.open` for the arguments."""
        self.place = place
        self.limits = limits
        self._wait_s = arguments.check_wait(wait_s)
        self._name = None if actor is None else arguments.check_reason(actor, name="actor")
        self._redact = redact
        self._via: Via = via
        self._authors: dict[tuple[int, Via], Author] = {}
        self._opening = threading.Lock()
        self._store: Store | None = None
        self._missing: StoreMissing | None = None  # why there was none at the last look
        self._closed = False
        host.renew_in_child(self, rank=host.SESSIONS)

    def twin(self) -> "Session":
        """Return a session of its own for the same place, for a thread that outlives this one."""
        return Session(
            self.place,
            wait_s=self._wait_s,
            actor=self._name,
            redact=self._redact,
            via=self._via,
            limits=self.limits,
        )

    @property
    def key(self) -> Hashable:
        """Return what is the same for sessions that write to one place, in the same way."""
        return str(self.place), self._wait_s, self._name, self._redact, self._via, self.limits

    def rest(self) -> None:
        """Give back what is open; the store is opened anew when it is needed."""
        with self._opening:
            if self._store is not None:
                store, self._store = self._store, None  # first: an interrupt must leave none closed
                store.close()

    def close(self) -> None:
        """Release every resource; idempotent."""
        self._closed = True
        self.rest()

    def after_fork(self) -> None:
        """Renew the mutex in a forked child: another thread of the parent may have held it."""
        self._opening = threading.Lock()

    # -- the store: there, or to be made ----------------------------------------------------

    @property
    def where(self) -> str:
        """Return the place: a path, or a URL."""
        return str(self.place)

    @property
    def opened(self) -> Store | None:
        """Return the store if it is open already."""
        store = None if self._closed else self._store
        return None if store is None or store.closed else store

    def find(self, *, fresh: bool = False) -> Store | None:
        """Return the store, None if there is none; `fresh`: the one that the place leads to now.

        Raises: RegistryClosed.
        """
        if self._closed:
            raise RegistryClosed(self.where)
        held = self._store
        if held is not None and not held.is_ours():
            self._drop(held)
        if self._store is None:
            with self._opening:
                if self._closed:
                    raise RegistryClosed(self.where)
                if self._store is None:
                    try:
                        self._store = self._open()
                    except StoreMissing as error:
                        # a stored traceback would keep every frame alive
                        self._missing = copy.copy(error)
                        return None
        return self._reopened(self._store) if fresh else self._store

    def _drop(self, held: Store) -> None:
        """Forget a store whose descriptors were closed under us; what is others' stays open."""
        with self._opening:
            if self._store is held:
                self._store = None
        held.close()

    def require(self) -> Store:
        """Return the store.

        Raises: StoreMissing if there is none.
        """
        store = self.find()
        if store is None:
            raise copy.copy(self._missing) or StoreMissing(self.where)
        return store

    def make(self, decide: Decide | None = None) -> Store:
        """Return the store; create it if there is none, unless an empty one refuses `decide`."""
        store = self.find()
        if store is not None:
            return store
        if decide is not None:
            decide(EMPTY)
        with self._opening:
            if self._closed:
                raise RegistryClosed(self.where)
            if self._store is None:
                self._store = self.place.create(wait_s=self._wait_s, limits=self.limits)
            return self._store

    def _open(self) -> Store:
        return self.place.open(wait_s=self._wait_s, limits=self.limits)

    def _reopened(self, held: Store) -> Store:
        """Return the store that the place leads to now: another one where this was replaced."""
        if held.is_in_place():
            return held
        try:
            fresh = self._open()
        except CrewlogError:  # nothing whole is in its place yet
            return held
        with self._opening:
            if self._store is not held:  # another thread was faster
                fresh.close()
                return self._store or held
            self._store = fresh  # who is in the middle of the other one goes on; it closes after
        return fresh

    # -- the state of now -------------------------------------------------------------------

    def get(self, sid: str) -> Worker | None:
        """Return one worker, final ones included; None if there is none of that sid."""
        store = self.find()
        record = None if store is None else store.record(sid)
        return None if record is None else worker_of(record)

    def state(self) -> State:
        """Return every worker that is not pruned, and the seq that this is the state of."""
        store = self.find()
        if store is None:
            return state_of(0, Records())
        with store.state() as state:
            copied = state.copy()
        return state_of(copied.seq, copied.records)

    def known(self, sid: str) -> Worker:
        """Return one worker.

        Raises: WorkerNotFound.
        """
        worker = self.get(sid)
        if worker is None:
            raise WorkerNotFound(sid)
        return worker

    def last_event(self, worker: Worker) -> Event:
        """Return the event that brought a worker to where it is.

        Where the history is no longer kept it is told from what that left, without author and raw.
        """
        try:
            return next(event_of(line, raw) for line, raw in self.require().read(worker.rev - 1))
        except CompactedError:
            return events.remembered(worker)

    # -- change -----------------------------------------------------------------------------

    def author(self, via: Via | None = None) -> Author:
        """Return who we are in this process, encoded; `via` says through what it acts."""
        key = (os.getpid(), via or self._via)
        if key not in self._authors:
            actor: JsonObject = {
                "pid": key[0],
                "uid": os.geteuid(),
                "user": _user(),
                "program": _printable(Path(sys.argv[0] if sys.argv else "").name) or "python",
                "via": key[1],
                "host": os.uname().nodename,
            }
            if self._name is not None:
                actor["name"] = self._name
            self._authors[key] = Author(actor=codec.dump(actor), redact=self._redact)
        return self._authors[key]

    def append(self, steps: Sequence[Step]) -> Appended:
        """Write steps as one unit; durable on return."""
        decide, store = decide_all(steps), self._store
        if store is None or not store.is_ours():
            store = self.make(decide)
        about = (steps[0].sid,) if len(steps) == 1 else {step.sid for step in steps}
        return store.append(decide, about=about)

    def put(self, steps: Sequence[Step]) -> Worker:
        """Write steps as one unit; return the worker of the last one as it is then."""
        sid = steps[-1].sid
        return worker_in(self.append(steps), sid) or self.known(sid)

    def change(self, step: Step) -> Event:
        """Write one step; return its event, or the worker's last one if nothing had to be."""
        return event_in(self.append([step])) or self.last_event(self.known(step.sid))


def worker_in(appended: Appended, sid: str) -> Worker | None:
    """Return the worker as an append left it; None if nothing needed to be written."""
    record = appended.records.get(sid)
    return None if record is None else worker_of(record)


def event_in(appended: Appended) -> Event | None:
    """Return the last event of an append; None if nothing needed to be written."""
    if not appended.lines:
        return None
    raw = appended.lines[-1]
    return event_of(codec.parse(raw), raw)


def _user() -> str:
    uid = os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # containers run under uids without a name
        return str(uid)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
