"""Offer what users hold: a registry of workers, its changes, its reading and its history."""

import copy
import os
import pwd
import sys
import threading
import weakref
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeAlias

from crewlog import (
    address,
    changes,
    codec,
    layout,
)
from crewlog.address import Address, DirectoryAddress, no_directory
from crewlog.appending import EMPTY, Appended, Decide
from crewlog.batch import Batch
from crewlog.changes import Author, Redact, Step
from crewlog.closing import Closing
from crewlog.ending import Ending
from crewlog.errors import (
    CrewlogError,
    RegistryClosed,
    StaleRevision,
    StoreMissing,
    WorkerExists,
    WorkerNotFound,
)
from crewlog.events import (
    FINAL,
    Event,
    JsonObject,
    JsonValue,
    Record,
    State,
    Worker,
    event_of,
    state_of,
    worker_of,
)
from crewlog.follow import Following
from crewlog.log import Log
from crewlog.past import Remembering
from crewlog.starting import Starting
from crewlog.store import Store

Where: TypeAlias = str | os.PathLike[str] | None
Via: TypeAlias = Literal["api", "cli", "gc"]


class Registry(Following, Remembering, Starting, Ending, Closing):
    """The workers of one store: change them durably, read them without a lock, see their history.

    *Guarantee*: a method that changes something returns once the event is durable; reading shows
    only durable events and writes nothing. Threads may share a registry; a forked child may go on
    using it. Use after `close` raises RegistryClosed.
    """

    def __init__(
        self,
        place: Address,
        *,
        lock_timeout_s: float = layout.LOCK_WAIT_S,
        actor: str | None = None,
        redact: Redact | None = None,
        via: Via = "api",
    ) -> None:
        """Use `crewlog.open`, which finds the place."""
        self._place = place
        self._wait_s = changes.check_wait(lock_timeout_s)
        self._name = None if actor is None else changes.check_reason(actor)
        self._redact = redact
        self._via: Via = via
        self._authors: dict[tuple[int, Via], Author] = {}
        self._opening = threading.Lock()
        _living.add(self)
        self._log: Store | None = None
        self._missing: StoreMissing | None = None  # why there was none at the last look
        self._closed = False

    # -- life -------------------------------------------------------------------------------

    def close(self) -> None:
        """Give every resource back; idempotent."""
        self._closed = True
        with self._opening:
            if self._log is not None:
                self._log.close()
                self._log = None

    @property
    def where(self) -> str:
        """Return the place: a path, or a URL."""
        return str(self._place)

    @property
    def path(self) -> Path:
        """Return the directory. *Raises* Unsupported where the store is in none."""
        if isinstance(self._place, DirectoryAddress):
            return self._place.path
        raise no_directory(self.where, what="a path")

    @property
    def exists(self) -> bool:
        """Say whether there is a store at the place; reading creates none."""
        return self._existing() is not None

    def log(self) -> Store:
        """Return the store, for the compactor. *Raises* StoreMissing if there is none."""
        log = self._existing()
        if log is None:
            raise copy.copy(self._missing) or StoreMissing(self.where)
        return log

    def files(self) -> Log:
        """Return the store where it is a directory. *Raises* StoreMissing, Unsupported."""
        log = self.log()
        if isinstance(log, Log):
            return log
        raise no_directory(self.where, what="this")

    def log_in_place(self) -> Store | None:
        """Return the store that the place leads to now, reopened if it is another one."""
        log = self._existing()
        if log is None or log.is_in_place():
            return log
        try:
            found = self._place.open(wait_s=self._wait_s)
        except CrewlogError:  # nothing whole is in its place yet
            return log
        with self._opening:
            self._log = found
        log.close()
        return self._log

    def _existing(self) -> Store | None:
        if self._closed:
            raise RegistryClosed(self.where)
        if self._log is None:
            with self._opening:
                if self._closed:
                    raise RegistryClosed(self.where)
                if self._log is None:
                    try:
                        self._log = self._place.open(wait_s=self._wait_s)
                    except StoreMissing as error:
                        self._missing = copy.copy(error)  # its traceback would keep us, and more
                        return None
        return self._log

    def created(self) -> Store:
        """Return the store, and create it if there is none."""
        log = self._existing()
        if log is not None:
            return log
        with self._opening:
            if self._closed:
                raise RegistryClosed(self.where)
            if self._log is None:
                self._log = self._place.create(wait_s=self._wait_s)
            return self._log

    def log_for(self, decide: Decide) -> Store:
        """Return the store, and create it if there is none, unless an empty one refuses this."""
        log = self._existing()
        if log is None:
            decide(EMPTY)
            log = self.created()
        return log

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

    def twin(self) -> "Registry":
        """Return a registry of its own for the same place, by the same author."""
        return Registry(
            self._place,
            lock_timeout_s=self._wait_s,
            actor=self._name,
            redact=self._redact,
            via=self._via,
        )

    def after_fork(self) -> None:
        """Renew the mutex in a forked child: another thread of the parent may have held it."""
        self._opening = threading.Lock()

    # -- change -----------------------------------------------------------------------------

    def register(
        self,
        sid: str,
        *,
        pid: int | None = None,
        sock: str = "",
        version: str = "",
        labels: Mapping[str, str] | None = None,
        meta: Mapping[str, JsonValue] | None = None,
        ready: bool = False,
        owner: int | None = None,
        lease: bool = False,
        heartbeat_s: float | None = None,
    ) -> Worker:
        """Register a running process, by default this one, and return it as a worker.

        A sid whose recorded holder is proven dead is taken over, and the loss recorded with it.
        *Args*: `owner` is the pid of the process that answers for the worker. With a `lease`, which
        only this process itself can take, it is judged rightly from other pid namespaces too; with
        `heartbeat_s` (seconds) it counts as stalled when it does not `beat` in time. *Raises*
        WorkerExists while a holder lives or cannot be judged; ProcessNotFound; ValueError and
        TypeError for bad arguments.
        """
        if (lease or heartbeat_s is not None) and pid not in {None, os.getpid()}:
            message = "a lease is held by the worker: register it from inside, or spawn it"
            raise ValueError(message)
        heartbeat_s = changes.check_heartbeat(heartbeat_s)
        wanted = lease or heartbeat_s is not None
        with self.leasing(sid, wanted=wanted, heartbeat_s=heartbeat_s) as held:
            step = changes.registered(
                self.author(),
                sid,
                pid=pid,
                sock=sock,
                version=version,
                labels=labels,
                meta=meta,
                ready=ready,
                owner=owner,
                lease=None if held is None else held.name,
                heartbeat_s=heartbeat_s,
            )
            worker = self.claim(sid, step)
        if held is not None:
            held.keep(worker)
        return worker

    def claim(self, sid: str, step: Step) -> Worker:
        """Write a registration, over a proven death if need be. *Raises* WorkerExists."""
        burial: list[Step] = []
        for _ in range(layout.CHANGE_TRIES):
            try:
                return self._worker(self._append([*burial, step]), sid)
            except WorkerExists:
                burial = self.burial(sid)
                if not burial:
                    raise
            except StaleRevision:  # the holder changed between the probe and the append
                burial = []
        return self._worker(self._append([step]), sid)

    def update(
        self,
        sid: str,
        *,
        state: str | None = None,
        sock: str | None = None,
        version: str | None = None,
        labels: Mapping[str, str | None] | None = None,
        meta: Mapping[str, JsonValue] | None = None,
        reason: str | None = None,
        expect: int | None = None,
    ) -> Worker:
        """Move a worker to ready, draining or stopping, or patch it, and return it.

        Labels and meta are merged key by key, None removes one. What would change nothing is not
        written. *Args*: `expect` is the rev that the caller read. *Raises* WorkerNotFound,
        InvalidTransition, StaleRevision; ValueError and TypeError for bad arguments.
        """
        step = self.updating(
            sid,
            state=state,
            sock=sock,
            version=version,
            labels=labels,
            meta=meta,
            reason=reason,
            expect=expect,
        )
        return self._worker(self._append([step]), sid)

    def updating(
        self,
        sid: str,
        *,
        state: str | None = None,
        sock: str | None = None,
        version: str | None = None,
        labels: Mapping[str, str | None] | None = None,
        meta: Mapping[str, JsonValue] | None = None,
        reason: str | None = None,
        expect: int | None = None,
    ) -> Step:
        """Return the step of an `update`."""
        return changes.updated(
            self.author(),
            sid,
            state=state,
            sock=sock,
            version=version,
            labels=labels,
            meta=meta,
            reason=reason,
            expect=expect,
            sock_known=self._sock_of(sid) if state == "ready" and sock is None else None,
        )

    def _sock_of(self, sid: str) -> str | None:
        known = self.get(sid)
        return None if known is None else known.sock or None

    def exited(
        self,
        sid: str,
        *,
        code: int | None = None,
        signal: int | None = None,
        source: str = "self",
        expect: int | None = None,
    ) -> Event:
        """Record that a worker ended, and return the event.

        The worker is then `exited`, or `failed` where nobody had asked it to end and the code is
        not 0 or a signal ended it. *Raises* WorkerNotFound, InvalidTransition, StaleRevision.
        """
        step = self.exiting(sid, code=code, signal=signal, source=source, expect=expect)
        return self._event(self._append([step]), sid)

    def exiting(
        self,
        sid: str,
        *,
        code: int | None = None,
        signal: int | None = None,
        source: str = "self",
        expect: int | None = None,
    ) -> Step:
        """Return the step of an `exited`."""
        return changes.exited(
            self.author(), sid, code=code, signal=signal, source=source, expect=expect
        )

    def remove(self, sid: str, *, reason: str, expect: int | None = None) -> Event:
        """Take a worker out of the registry and return the event; its process is left alone.

        *Raises* WorkerNotFound, InvalidTransition, StaleRevision.
        """
        step = changes.released(self.author(), sid, reason=reason, expect=expect)
        return self._event(self._append([step]), sid)

    def batch(self) -> Batch:
        """Collect changes in a `with` block; all of them become durable at its end, or none."""
        return Batch(self.author(), self.commit, sock_of=self._sock_of)

    def change(self, sid: str, step: Step) -> Event:
        """Write one step; return its event, or the worker's last one if nothing had to be."""
        return self._event(self._append([step]), sid)

    def _append(self, steps: list[Step]) -> Appended:
        about, decide = {step.sid for step in steps}, changes.together(steps)
        return self.log_for(decide).append(decide, about=about)

    def commit(self, steps: list[Step]) -> Appended:
        """Write steps as one unit, for the compactor; durable on return."""
        return self._append(steps)

    def _worker(self, appended: Appended, sid: str) -> Worker:
        record = appended.records.get(sid)
        if record is not None:
            return worker_of(record)
        worker = self.get(sid)  # nothing needed to be written
        if worker is None:
            raise WorkerNotFound(sid)
        return worker

    def _event(self, appended: Appended, sid: str) -> Event:
        if appended.lines:
            raw = appended.lines[-1]
            return event_of(codec.parse(raw), raw)
        worker = self.get(sid)  # it had been recorded before: return that event
        if worker is None:
            raise WorkerNotFound(sid)
        return next(self.history(after=worker.rev - 1))

    # -- read -------------------------------------------------------------------------------

    def get(self, sid: str) -> Worker | None:
        """Return one worker, final ones included; None if the registry holds none of that sid."""
        log = self._existing()
        record = None if log is None else log.record(sid)
        return None if record is None else worker_of(record)

    def workers(self, *, all: bool = False) -> list[Worker]:  # noqa: A002 (the promised name)
        """Return the workers that are not final, in order of registration; with `all` every one."""
        return [worker_of(record) for record in self._records(final=all)]

    def _records(self, *, final: bool) -> list[Record]:
        log = self._existing()
        if log is None:
            return []
        with log.state() as state:
            return [r for r in state.records.values() if final or r["state"] not in FINAL]

    def state(self) -> State:
        """Return every worker that is not pruned, and the seq that this is the state of."""
        log = self._existing()
        if log is None:
            return state_of(0, {})
        with log.state() as state:
            copied = state.copy()
        return state_of(copied.seq, copied.records)

    def totals(self) -> Mapping[str, int]:
        """Return how many events of each type there ever were."""
        log = self._existing()
        if log is None:
            return {}
        with log.state() as state:
            return dict(state.totals)

    def compacted(self) -> tuple[int, datetime] | None:
        """Return what seq the last compaction covers and when it ended, None before the first."""
        log = self._existing()
        return None if log is None else log.compacted()

    @property
    def last_seq(self) -> int:
        """Return the seq of the last durable event, 0 where there is no store."""
        log = self._existing()
        return 0 if log is None else log.last_seq()


def open(  # noqa: A001 (crewlog.open is the promised name)
    where: Where = None,
    *,
    lock_timeout_s: float = layout.LOCK_WAIT_S,
    actor: str | None = None,
    redact: Redact | None = None,
) -> Registry:
    """Open the registry at `where`: a directory, a file:// or etcd:// URL, None: the default place.

    Nothing is created before the first change. *Args*: `lock_timeout_s` is how long a change waits
    for other writers, in seconds; `actor` names who acts, for the history; `redact` is called with
    each event's type and what the caller gave (sock, version, labels, meta, reason) before anything
    is written, and returns what is to be written instead: a chain of hashes cannot forget.
    """
    place = address.locate(where)
    return Registry(place, lock_timeout_s=lock_timeout_s, actor=actor, redact=redact)


def _user() -> str:
    uid = os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # containers run under uids without a name
        return str(uid)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


_living: "weakref.WeakSet[Registry]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for registry in list(_living):
        registry.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
