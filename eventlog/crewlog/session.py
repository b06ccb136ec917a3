"""Hold what a registry works with: its place, the store once there is one, and who acts."""

import copy
import os
import pwd
import sys
import threading
import weakref
from pathlib import Path
from typing import Literal, TypeAlias

from crewlog import arguments, changes, codec, events
from crewlog.appending import EMPTY, Appended, Decide
from crewlog.changes import Author, Redact, Step
from crewlog.errors import (
    CompactedError,
    CrewlogError,
    RegistryClosed,
    StoreMissing,
    WorkerNotFound,
)
from crewlog.events import Event, JsonObject, State, Worker, event_of, state_of, worker_of
from crewlog.place import Place
from crewlog.store import Store

Via: TypeAlias = Literal["api", "cli", "gc"]


class Session:
    """One user's way to one store: opened when it is first needed, created at the first change."""

    def __init__(
        self, place: Place, *, wait_s: float, actor: str | None, redact: Redact | None, via: Via
    ) -> None:
        """Open nothing yet; see `crewlog.open` for the arguments."""
        self.place = place
        self._wait_s = arguments.check_wait(wait_s)
        self._name = None if actor is None else arguments.check_reason(actor)
        self._redact = redact
        self._via: Via = via
        self._authors: dict[tuple[int, Via], Author] = {}
        self._opening = threading.Lock()
        _living.add(self)
        self._store: Store | None = None
        self._missing: StoreMissing | None = None  # why there was none at the last look
        self._closed = False

    def twin(self) -> "Session":
        """Return a session of its own for the same place, for a thread that outlives this one."""
        return Session(
            self.place, wait_s=self._wait_s, actor=self._name, redact=self._redact, via=self._via
        )

    def close(self) -> None:
        """Give every resource back; idempotent."""
        self._closed = True
        with self._opening:
            if self._store is not None:
                self._store.close()
                self._store = None

    def after_fork(self) -> None:
        """Renew the mutex in a forked child: another thread of the parent may have held it."""
        self._opening = threading.Lock()

    # -- the store --------------------------------------------------------------------------

    @property
    def where(self) -> str:
        """Return the place: a path, or a URL."""
        return str(self.place)

    def found(self) -> Store | None:
        """Return the store; None if there is none. *Raises* RegistryClosed."""
        if self._closed:
            raise RegistryClosed(self.where)
        if self._store is None:
            with self._opening:
                if self._closed:
                    raise RegistryClosed(self.where)
                if self._store is None:
                    try:
                        self._store = self.place.open(wait_s=self._wait_s)
                    except StoreMissing as error:
                        self._missing = copy.copy(error)  # its traceback would keep us, and more
                        return None
        return self._store

    def held(self) -> Store | None:
        """Return the store if it is open already."""
        return None if self._closed else self._store

    def store(self) -> Store:
        """Return the store. *Raises* StoreMissing if there is none."""
        found = self.found()
        if found is None:
            raise copy.copy(self._missing) or StoreMissing(self.where)
        return found

    def created(self) -> Store:
        """Return the store, and create it if there is none."""
        found = self.found()
        if found is not None:
            return found
        with self._opening:
            if self._closed:
                raise RegistryClosed(self.where)
            if self._store is None:
                self._store = self.place.create(wait_s=self._wait_s)
            return self._store

    def store_for(self, decide: Decide) -> Store:
        """Return the store, and create it if there is none, unless an empty one refuses this."""
        found = self.found()
        if found is None:
            decide(EMPTY)
            found = self.created()
        return found

    def store_in_place(self) -> Store | None:
        """Return the store that the place leads to now, reopened if it is another one."""
        held = self.found()
        if held is None or held.is_in_place():
            return held
        try:
            fresh = self.place.open(wait_s=self._wait_s)
        except CrewlogError:  # nothing whole is in its place yet
            return held
        with self._opening:
            if self._store is not held:  # another thread was faster
                fresh.close()
                return self._store
            self._store = fresh  # who is in the middle of the other one goes on; it closes after
        return fresh

    # -- the state of now -----------------------------------------------------------------------

    def get(self, sid: str) -> Worker | None:
        """Return one worker, final ones included; None if there is none of that sid."""
        store = self.found()
        record = None if store is None else store.record(sid)
        return None if record is None else worker_of(record)

    def state(self) -> State:
        """Return every worker that is not pruned, and the seq that this is the state of."""
        store = self.found()
        if store is None:
            return state_of(0, {})
        with store.state() as state:
            copied = state.copy()
        return state_of(copied.seq, copied.records)

    def known(self, sid: str) -> Worker:
        """Return one worker. *Raises* WorkerNotFound."""
        worker = self.get(sid)
        if worker is None:
            raise WorkerNotFound(sid)
        return worker

    def sock_of(self, sid: str) -> str | None:
        """Return the recorded socket of a worker; None if it has none, or there is no such one."""
        worker = self.get(sid)
        return None if worker is None else worker.sock or None

    def last_event(self, worker: Worker) -> Event:
        """Return the event that brought a worker to where it is.

        Where the history is no longer kept it is told from what that left, without author and raw.
        """
        try:
            return next(event_of(line, raw) for line, raw in self.store().read(worker.rev - 1))
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

    def append(self, steps: list[Step]) -> Appended:
        """Write steps as one unit; durable on return."""
        about, decide = {step.sid for step in steps}, changes.together(steps)
        return self.store_for(decide).append(decide, about=about)

    def put(self, steps: list[Step]) -> Worker:
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


_living: "weakref.WeakSet[Session]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for session in list(_living):
        session.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
