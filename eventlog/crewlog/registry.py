"""Offer what users hold: a registry of workers, its changes, its reading and its history."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, TypeAlias, Unpack

from crewlog import changes, ending, follow, judging, layout, past, registering, starting
from crewlog.batch import Batch
from crewlog.changes import Redact
from crewlog.closing import Closing
from crewlog.events import FINAL, Event, Item, JsonValue, Past, State, Worker, worker_of
from crewlog.feed import After, OnCompacted
from crewlog.follow import WatchOptions
from crewlog.launch import NOWHERE, Stream, Words
from crewlog.liveness import Liveness
from crewlog.notify import Backend
from crewlog.place import DirectoryPlace, Place, locate, no_directory
from crewlog.registering import Wish
from crewlog.session import Session, Via
from crewlog.starting import SpawnOptions
from crewlog.subscribe import Mirror, OnError, Subscription
from crewlog.watch import Watch

if TYPE_CHECKING:
    from crewlog.awatch import AsyncWatch
    from crewlog.lives import Life

Where: TypeAlias = str | os.PathLike[str] | None


class Registry(Closing):
    """The workers of one store: change them durably, read them without a lock, see their history.

    *Guarantee*: a method that changes something returns once the event is durable; reading shows
    only durable events and writes nothing. Threads may share a registry; a forked child may go on
    using it. Use after `close` raises RegistryClosed.
    """

    def __init__(
        self,
        place: Place,
        *,
        lock_timeout_s: float = layout.LOCK_WAIT_S,
        actor: str | None = None,
        redact: Redact | None = None,
        via: Via = "api",
    ) -> None:
        """Use `crewlog.open`, which finds the place. `session` is for crewlog's own parts."""
        self.session = Session(place, wait_s=lock_timeout_s, actor=actor, redact=redact, via=via)

    def close(self) -> None:
        """Give every resource back; idempotent."""
        self.session.close()

    @property
    def where(self) -> str:
        """Return the place: a path, or a URL."""
        return self.session.where

    @property
    def path(self) -> Path:
        """Return the directory. *Raises* Unsupported where the store is in none."""
        place = self.session.place
        if isinstance(place, DirectoryPlace):
            return place.path
        raise no_directory(self.where, what="a path")

    @property
    def exists(self) -> bool:
        """Say whether there is a store at the place; reading creates none."""
        return self.session.found() is not None

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
        wish = Wish(sock, version, labels, meta, ready, owner, lease, heartbeat_s)
        return registering.register(self.session, sid, pid, wish)

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
        step = changes.updated(
            self.session.author(),
            sid,
            state=state,
            sock=sock,
            version=version,
            labels=labels,
            meta=meta,
            reason=reason,
            expect=expect,
            sock_of=self.session.sock_of,
        )
        return self.session.put([step])

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
        author = self.session.author()
        step = changes.exited(author, sid, code=code, signal=signal, source=source, expect=expect)
        return self.session.change(step)

    def remove(self, sid: str, *, reason: str, expect: int | None = None) -> Event:
        """Take a worker out of the registry and return the event; its process is left alone.

        *Raises* WorkerNotFound, InvalidTransition, StaleRevision.
        """
        step = changes.released(self.session.author(), sid, reason=reason, expect=expect)
        return self.session.change(step)

    def batch(self) -> Batch:
        """Collect changes in a `with` block; all of them become durable at its end, or none."""
        return Batch(self.session.author(), self.session.append, sock_of=self.session.sock_of)

    # -- start, hear, end -------------------------------------------------------------------

    def spawn(
        self,
        sid: str,
        argv: Words,
        *,
        sock: str = "",
        version: str = "",
        labels: Mapping[str, str] | None = None,
        meta: Mapping[str, JsonValue] | None = None,
        ready: bool = False,
        owner: int | None = None,
        lease: bool = False,
        heartbeat_s: float | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        stdout: Stream = NOWHERE,
        stderr: Stream = None,
    ) -> Worker:
        """Start a program as a worker, in a session of its own, and return it.

        Its stdin is empty and its stdout goes nowhere unless given: it may outlive what reads ours.

        *Guarantee*: the registration is durable before the program begins; killed at any moment,
        we leave no running program that is not listed. While this process lives, it records how the
        worker ends. *Args*: `owner` is a pid, by default ours; a `lease` is inherited by the
        program, which must then not close descriptors that it does not know. *Raises* WorkerExists;
        SpawnFailed, and the worker is then recorded as ended.
        """
        return starting.spawn(
            self.session,
            sid,
            argv,
            sock=sock,
            version=version,
            labels=labels,
            meta=meta,
            ready=ready,
            owner=owner,
            lease=lease,
            heartbeat_s=heartbeat_s,
            cwd=cwd,
            env=env,
            stdout=stdout,
            stderr=stderr,
        )

    def ensure(
        self,
        sid: str,
        argv: Words,
        *,
        timeout_s: float = layout.ENSURE_WAIT_S,
        **options: Unpack[SpawnOptions],
    ) -> Worker:
        """Return the living worker of that sid, or start it; see `spawn` for the arguments.

        *Guarantee*: of any number of callers, in any processes, one starts the program and all
        return its worker, once it has begun. One that is draining or stopping is waited for and
        started anew. *Raises* WorkerExists while it cannot be judged; WaitTimeout and LockBusy
        after `timeout_s`.
        """
        return starting.ensure(self.session, sid, argv, timeout_s=timeout_s, **options)

    def beat(self, sid: str) -> None:
        """Say that a worker is well, now; nothing is added to the log.

        For the worker itself, or whoever vouches for it. Without a beat for `heartbeat_s` it counts
        as stalled. *Raises* WorkerNotFound; LeaseMissing if it was registered without a lease.
        """
        judging.beat(self.session, sid)

    def stop(
        self,
        sid: str,
        *,
        grace_s: float = layout.GRACE_S,
        reason: str,
        signal: int = SIGTERM,
    ) -> Event:
        """End a worker: ask it by `signal`, after `grace_s` seconds kill it, and record its end.

        Returns the event of its end; of one that has ended already, the event that was recorded.
        *Guarantee*: the request is durable before the signal is sent; only the recorded process is
        ever signalled. *Raises* WorkerNotFound; StopRefused for ourselves, our ancestors, pid 1,
        another user's process and one of another pid namespace; IdentityMismatch where it cannot be
        proven to be the one; WaitTimeout if even SIGKILL does not end it: it stays `stopping`;
        StaleRevision if the sid is another worker's before the request is written.
        """
        return ending.stop(self.session, sid, grace_s=grace_s, reason=reason, signal=signal)

    def observe(self, sid: str, *, timeout_s: float | None = None) -> Event:
        """Wait for the end of a worker that need not be our child; record it, and how it ended.

        The kernel keeps the exit status for whoever holds the process when it is reaped: what its
        parent throws away is not lost (Linux ≥ 6.15; before, only while it is a zombie of ours).
        Returns the event of its end, also if the sid is another worker's by then. *Raises*
        WorkerNotFound; WaitTimeout after `timeout_s`; IdentityMismatch where it cannot be judged or
        waited for from here; StaleRevision if its end is no longer in the history.
        """
        return ending.observe(self.session, sid, timeout_s=timeout_s)

    # -- read -------------------------------------------------------------------------------

    def get(self, sid: str) -> Worker | None:
        """Return one worker, final ones included; None if the registry holds none of that sid."""
        return self.session.get(sid)

    def workers(self, *, all: bool = False) -> list[Worker]:  # noqa: A002 (the promised name)
        """Return the workers that are not final, in order of registration; with `all` every one."""
        store = self.session.found()
        if store is None:
            return []
        with store.state() as state:
            records = [r for r in state.records.values() if all or r["state"] not in FINAL]
        return [worker_of(record) for record in records]

    def state(self) -> State:
        """Return every worker that is not pruned, and the seq that this is the state of."""
        return self.session.state()

    @property
    def last_seq(self) -> int:
        """Return the seq of the last durable event, 0 where there is no store."""
        store = self.session.found()
        return 0 if store is None else store.last_seq()

    def totals(self) -> Mapping[str, int]:
        """Return how many events of each type there ever were."""
        store = self.session.found()
        if store is None:
            return {}
        with store.state() as state:
            return dict(state.totals)

    def compacted(self) -> tuple[int, datetime] | None:
        """Return what seq the last compaction covers and when it ended, None before the first."""
        store = self.session.found()
        return None if store is None else store.compacted()

    def liveness(self, sid: str) -> Liveness:
        """Judge whether one worker lives, now. *Raises* WorkerNotFound.

        Of one that lives on this host, its socket is asked too, where it has a Unix one: it sees a
        connection that ends at once.
        """
        return judging.liveness_of(self.session, sid)

    def judge(self, workers: Collection[Worker]) -> list[Liveness]:
        """Judge many workers, now, in their order; no lock is held and nothing is written."""
        return judging.judge(self.session, workers)

    # -- the past ---------------------------------------------------------------------------

    def history(
        self,
        *,
        sid: str | None = None,
        types: Collection[str] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: int | None = None,
        newest_first: bool = False,
    ) -> Iterator[Event]:
        """Yield the events that match, oldest first, through log and archive.

        The store's own events are left out unless `types` names them. *Args*: `since` and `until`
        are aware times, the first included, the last not; `after` is a seq. With `newest_first` the
        first ones come at once, however long the history is.
        *Raises* DataDamaged where the history is; CompactedError where `after` is no longer kept.
        """
        return past.history(
            self.session,
            sid=sid,
            types=types,
            since=since,
            until=until,
            after=after,
            newest_first=newest_first,
        )

    def at(self, when: datetime | int) -> Past:
        """Return the state as it was at a seq, or after the last event up to an aware time.

        Of a seq that is not reached yet, or a time to come, it is the state of now. It is folded
        from the nearest older state that is kept. *Raises* CompactedError where the history that
        it needs was dropped; DataDamaged.
        """
        return past.at(self.session, when)

    def lives(self, *, progress: Callable[[int, int], None] | None = None) -> "list[Life]":
        """Return every worker's life that the kept history tells of, in order of registration.

        `progress` is told how many of how many events are read. *Raises* DataDamaged.
        """
        return past.lives(self.session, progress)

    # -- follow -----------------------------------------------------------------------------

    def watch(
        self,
        *,
        after: After = None,
        sids: Collection[str] | None = None,
        types: Collection[str] | None = None,
        cursor: str | None = None,
        on_compacted: OnCompacted = "reset",
        backend: Backend = "auto",
    ) -> Watch:
        """Deliver events as they become durable.

        *Args*: `after` None begins with the state of now, carried by the first Synced; an int with
        the events after that seq; an aware datetime with the events since; "now" with those to
        come; "oldest" with all that is kept. `cursor` names a durable position: where it exists it
        is the beginning, and taking an item acknowledges the one before. `on_compacted`: a Reset,
        or CompactedError. `backend`: what wakes.
        *Guarantee*: in order, each once, none before it is durable, none left out but as a Reset
        says. *Raises* StoreMissing if there is no store yet; CursorBusy.
        """
        return follow.watch(
            self.session,
            after=after,
            sids=sids,
            types=types,
            cursor=cursor,
            on_compacted=on_compacted,
            backend=backend,
        )

    def awatch(self, **options: Unpack[WatchOptions]) -> "AsyncWatch":
        """Deliver events to asyncio, like `watch`; call it with a running loop."""
        return follow.awatch(self.session, **options)

    def subscribe(
        self,
        callback: Callable[[Item], object],
        *,
        on_error: OnError = "stop",
        **options: Unpack[WatchOptions],
    ) -> Subscription:
        """Call back for every item in a thread of its own; arguments as for `watch`."""
        return follow.subscribe(self.session, callback, on_error=on_error, **options)

    def mirror(self, *, backend: Backend = "auto") -> Mirror:
        """Return the state of now as an object that can be waited on."""
        return follow.mirror(self.session, backend=backend)

    def wait(self, sid: str, *, state: str, timeout_s: float | None = None) -> Worker:
        """Return the worker once it is in `state`; it need not be registered yet.

        *Raises* WaitTimeout after `timeout_s` seconds; WorkerEnded if it ends, from now on, as
        something else.
        """
        return follow.wait(self.session, sid, state=state, timeout_s=timeout_s)


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
    place = locate(where)
    return Registry(place, lock_timeout_s=lock_timeout_s, actor=actor, redact=redact)
