"""Offer what users hold: a registry of workers, its changes, its reading and its history."""

import contextlib
import copy
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, ParamSpec, TypeAlias, TypeVar, Unpack

from crewlog import history
from crewlog.errors import CrewlogError
from crewlog.history import HistoryOptions, When
from crewlog.host import Closable, no_fork
from crewlog.model import choice
from crewlog.model.events import Event, StateName, Worker, worker_of
from crewlog.model.figures import Usage
from crewlog.model.items import Item
from crewlog.model.limits import DEFAULT, LOCK_WAIT_S, Limits
from crewlog.model.state import Past, State
from crewlog.model.steps import (
    Appended,
    Author,
    ExitOptions,
    Redact,
    Step,
    UpdateOptions,
    Wish,
    WorkerOptions,
    exit_step,
    release_step,
    update_step,
    wish_of,
)
from crewlog.observer import Observer
from crewlog.place import Place, locate
from crewlog.process import identity, launch
from crewlog.process.launch import Words
from crewlog.process.liveness import Liveness
from crewlog.session import Session, Via
from crewlog.store import Backend, Cursors, Store
from crewlog.watch import follow
from crewlog.watch.callbacks import Mirror, OnError, Subscription
from crewlog.watch.follow import WatchOptions
from crewlog.watch.watch import Watch
from crewlog.workers import judge, output, register, start, stop
from crewlog.workers import tree as process_tree
from crewlog.workers.batch import Batch
from crewlog.workers.output import Opened
from crewlog.workers.own import NAME, Own, named
from crewlog.workers.start import Child, LogOptions, SpawnOptions
from crewlog.workers.stop import Outlook

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from crewlog.aio.watch import AsyncWatch
    from crewlog.model.lives import Life

Where: TypeAlias = str | os.PathLike[str] | None
P = ParamSpec("P")
R = TypeVar("R")

# Options with their defaults, as help() shows them; their types stand in the TypedDicts.
_WISH: dict[str, object] = dict(Wish._field_defaults)
_SPAWN: dict[str, object] = {**_WISH, **launch.DEFAULTS, **start.LOG_DEFAULTS}
UPDATE_DEFAULTS: dict[str, object] = dict.fromkeys(UpdateOptions.__annotations__)
EXIT_DEFAULTS: dict[str, object] = {
    "code": None, "signal": None, "source": "self", "message": None, "expect": None,
}  # fmt: skip


def shows(
    defaults: Mapping[str, object], options: type
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let help() and inspect show the options of a verb one by one, each with type and default."""

    def spell_out(verb: Callable[P, R]) -> Callable[P, R]:
        plain = inspect.signature(verb)
        own = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=options.__annotations__[name],
            )
            for name, default in defaults.items()
        ]
        vars(verb)["__signature__"] = plain.replace(parameters=[*own, *more])
        return verb

    return spell_out


class Registry(Closable):
    """The workers of one store: change them durably, read them without a lock, see their history.

    Guarantee: a method that changes something returns once the event is durable; reading shows only
    durable events and writes nothing. Threads may share a registry; a forked child may go on using
    it. Use after `close` raises RegistryClosed.
    """

    def __init__(
        self,
        place: Place,
        *,
        lock_timeout_s: float = LOCK_WAIT_S,
        actor: str | None = None,
        redact: Redact | None = None,
        via: Via = "api",
        limits: Limits = DEFAULT,
    ) -> None:
        """Use `crewlog.open`, which finds the place."""
        self._session = Session(
            place, wait_s=lock_timeout_s, actor=actor, redact=redact, via=via, limits=limits
        )

    def close(self) -> None:
        """Give every resource back; idempotent."""
        self._session.close()

    def __repr__(self) -> str:
        """Say where it is, and how far, as it knows: nothing is opened or asked for that."""
        store, seq = self._session.opened, ""
        with contextlib.suppress(CrewlogError):
            if store is not None and not store.remote:
                seq = f", seq {store.last_seq()}"
        return f"<Registry {self.where}{seq}>"

    @property
    def where(self) -> str:
        """Return the place: a path, or a URL."""
        return self._session.where

    @property
    def path(self) -> Path:
        """Return the directory.

        Raises: Unsupported where the store is in none.
        """
        return self._session.place.path

    @property
    def place(self) -> Place:
        """Return the place, which says what kind of store is there."""
        return self._session.place

    @property
    def exists(self) -> bool:
        """Say whether there is a store at the place; reading creates none."""
        return self._session.find() is not None

    # -- change -----------------------------------------------------------------------------

    @shows(_WISH, WorkerOptions)
    def register(
        self, sid: str, *, pid: int | None = None, **options: Unpack[WorkerOptions]
    ) -> Worker:
        """Register a running process, by default this one, and return it as a worker.

        A sid whose recorded holder is proven dead is taken over, and the loss recorded with it.
        Args: `owner` is the pid of the process that answers for the worker. With a `lease`, which
        only this process itself can take, it is judged rightly from other pid namespaces too; with
        `heartbeat_s` (seconds) it counts as stalled when it does not `beat` in time. `ok_codes` are
        exit codes that are no crash for it (128 + N: signal N); `ends_with` "owner": an observer or
        the next collection stops it once its owner is proven dead; `record_argv` puts its words and
        working directory on record, which may hold secrets.
        Raises: WorkerExists while a holder lives or cannot be judged; ProcessNotFound; ValueError
        and TypeError for bad arguments.
        """
        return register.register(self._session, sid, pid, wish_of(options))

    @shows(UPDATE_DEFAULTS, UpdateOptions)
    def update(self, sid: str, **options: Unpack[UpdateOptions]) -> Worker:
        """Move a worker to ready, draining or stopping, or patch it, and return it.

        Labels and meta are merged key by key, None removes one. What would change nothing is not
        written.
        Args: `expect` is the rev that the caller read.
        Raises: WorkerNotFound, InvalidTransition, StaleRevision; ValueError and TypeError for bad
        arguments.
        """
        seen = register.seen_socket(sid, options, self._sock_of)
        return self._session.put([update_step(self._session.author(), sid, options, seen=seen)])

    def _sock_of(self, sid: str) -> str | None:
        return register.recorded_sock(self._session, sid)

    @shows(EXIT_DEFAULTS, ExitOptions)
    def exited(self, sid: str, **options: Unpack[ExitOptions]) -> Event:
        """Record that a worker ended, and return the event.

        The worker is then `exited`, or `failed` where nobody had asked it to end and the code is
        not 0, nor one of its `ok_codes`, or a signal ended it. `code` may be what subprocess and
        multiprocessing tell: -9 stands for `signal=9`. `message` is what it says itself about its
        end.
        Raises: WorkerNotFound, InvalidTransition, StaleRevision.
        """
        return self._session.change(exit_step(self._session.author(), sid, options))

    def remove(
        self, sid: str, *, reason: str = "crewlog.remove", expect: int | None = None
    ) -> Event:
        """Take a worker out of the registry and return the event; its process is left alone.

        Raises: WorkerNotFound, InvalidTransition, StaleRevision.
        """
        step = release_step(self._session.author(), sid, reason=reason, expect=expect)
        return self._session.change(step)

    def batch(self) -> Batch:
        """Collect changes in a `with` block; all of them become durable at its end, or none."""
        return Batch(self._session.author(), self._session.append, sock_of=self._sock_of)

    @shows(_WISH, WorkerOptions)
    def presence(self, sid: str = NAME, **options: Unpack[WorkerOptions]) -> Own:
        """Register this process as a worker that is ready, and record how it ends.

        A context manager, or one call for the life of the process; see `crewlog.worker`, which
        opens a registry for it.
        Raises: WorkerExists; ValueError and TypeError for bad arguments.
        """
        twin = copy.copy(self)  # which may be open for longer than this one
        twin._session = self._session.twin()  # noqa: SLF001 (another face of the same registry)
        return _present(twin, sid, options)

    # -- start, hear, end -------------------------------------------------------------------

    @shows(_SPAWN, SpawnOptions)
    def spawn(self, sid: str, argv: Words, **options: Unpack[SpawnOptions]) -> Worker:
        """Start a program as a worker, in a session of its own, and return it.

        Its stdin is empty, its stdout and stderr go nowhere unless given: it may outlive what reads
        ours. With `log` both are appended to that file (0600), which `crewlog logs` reads; one of
        more than `log_bytes_max` bytes is set aside first, as NAME.1. Of a crash, the last
        `keep_tail` bytes of it stand in the event.

        Guarantee: the registration is durable before the program begins; killed at any moment, we
        leave no running program that is not listed. While this process lives, it records how the
        worker ends.
        Args: `owner` is a pid, by default ours; a `lease` is inherited by the program, which must
        then not close descriptors that it does not know.
        Raises: WorkerExists; SpawnFailed, and a worker that was registered is recorded as ended.
        """
        return start.spawn(self._session, sid, argv, **options)

    @shows(_SPAWN, SpawnOptions)
    def ensure(
        self,
        sid: str,
        argv: Words,
        *,
        timeout_s: float = start.ENSURE_WAIT_S,
        **options: Unpack[SpawnOptions],
    ) -> Worker:
        """Return the living worker of that sid, or start it; see `spawn` for the arguments.

        Guarantee: of any number of callers, in any processes, one starts the program and all return
        its worker, once it has begun. One that is draining or stopping is waited for and started
        anew.
        Raises: WorkerExists while it cannot be judged; WaitTimeout and LockBusy after `timeout_s`.
        """
        return start.ensure(self._session, sid, argv, timeout_s=timeout_s, **options)

    def beat(
        self, sid: str, *, status: judge.BeatStatus | None = None, note: str | None = None
    ) -> None:
        """Say that a worker is well, now, and what it does; nothing is added to the log.

        For the worker itself, or whoever vouches for it. Without a beat for `heartbeat_s` it counts
        as stalled. What it does (`status` busy, idle or waiting, a `note` of at most 256
        characters) stands in its liveness until the next beat that says something.
        Raises: WorkerNotFound; LeaseMissing if it was registered without a lease; ValueError.
        """
        judge.beat(self._session, sid, status=status, note=note)

    def stop(
        self,
        sid: str,
        *,
        grace_s: float = stop.GRACE_S,
        reason: str = "crewlog.stop",
        signal: int = SIGTERM,
        tree: bool = False,
    ) -> Event:
        """End a worker: ask it by `signal`, after `grace_s` seconds kill it, and record its end.

        Returns the event of its end; of one that has ended already, the event that was recorded.
        With `tree` those who belong to it (see `trees`) are ended after it, also of one that has
        ended by itself.
        Guarantee: the request is durable before the signal is sent; only the recorded process, and
        with `tree` what is shown to belong to it, is ever signalled.
        Raises: WorkerNotFound; StopRefused for ourselves, our ancestors, pid 1, another user's
        process and one of another pid namespace; IdentityMismatch where it cannot be proven to be
        the one; WaitTimeout if even SIGKILL does not end it: it stays `stopping`; StaleRevision if
        the sid is another worker's before the request is written.
        """
        return stop.stop(
            self._session, sid, grace_s=grace_s, reason=reason, signal=signal, with_tree=tree
        )

    def trees(self, workers: Collection[Worker]) -> Mapping[str, Sequence[int]]:
        """Return by sid the pids of the living processes that belong to workers, beside their own.

        They are those of the worker's session or process group, where it was registered as the
        leader of one; also when the worker itself has ended, as long as one of them is older than
        its end. A worker without any is left out.
        """
        members = process_tree.members(workers)
        return {sid: [member.pid for member in every] for sid, every in members.items()}

    def stop_left_behind(self) -> list[str]:
        """Stop the workers that are to end with their owner, whose owner is proven dead.

        Returns their sids. One that cannot be stopped from here stays as it is.
        """
        return stop.stop_left_behind(self._session)

    def observe_all(self) -> Observer:
        """Record the end of every worker that can be judged from here, from now on.

        Returns a handle: a context manager with `close`. Of several observers of one boot, pid
        namespace and user one leads; the others take over within a second of its end.
        Guarantee: starter, observers and collectors together write one event a death.
        Raises: OSError where no thread is to be had.
        """
        return Observer(self._session)

    def logs(self, sid: str, *, lines: int | None = None) -> output.Follower:
        """Return what reads the output of a worker's last life, from its last `lines` lines on.

        Its `read` returns what is there, b"" for nothing new. Raises: WorkerNotFound.
        """
        worker = self._session.known(sid)
        return output.Follower(worker.log, lines=lines)

    def observe(self, sid: str, *, timeout_s: float | None = None) -> Event:
        """Wait for the end of a worker that need not be our child; record it, and how it ended.

        The kernel keeps the exit status for whoever holds the process when it is reaped: what its
        parent throws away is not lost (Linux ≥ 6.15; before, only while it is a zombie of ours).
        Returns the event of its end, also if the sid is another worker's by then.
        Raises: WorkerNotFound; WaitTimeout after `timeout_s`; IdentityMismatch where it cannot be
        judged or waited for from here; StaleRevision if its end is no longer in the history.
        """
        return stop.observe(self._session, sid, timeout_s=timeout_s)

    # -- read -------------------------------------------------------------------------------

    def get(self, sid: str) -> Worker | None:
        """Return one worker, final ones included; None if the registry holds none of that sid."""
        return self._session.get(sid)

    def workers(
        self,
        *,
        all: bool = False,  # noqa: A002 (the promised name)
        states: Collection[StateName] | None = None,
        labels: Mapping[str, str | None] | None = None,
        sids: Collection[str] | None = None,
    ) -> list[Worker]:
        """Return the workers that are not final, in order of registration; with `all` every one.

        Args: `states` are those wanted, final ones too; `labels` what they must have, None for any
        value; `sids` any of these, `*`, `?` and `[…]` as in names of files.
        """
        wish = choice.choice_of(all=all, states=states, labels=labels, sids=sids)
        store = self._session.find()
        if store is None:
            return []
        with store.state() as state:
            records = state.records.chosen(wish.wants, final=wish.final)
        return [worker_of(record) for record in records]

    def living(
        self,
        *,
        labels: Mapping[str, str | None] | None = None,
        sids: Collection[str] | None = None,
    ) -> list[Worker]:
        """Return the workers that are not proven dead, now, as `crewlog ls` does.

        One that cannot be judged from here is among them; `judge` tells which. Arguments as for
        `workers`.
        """
        there = self.workers(labels=labels, sids=sids)
        judged = self.judge(there)
        return [one for one, liveness in zip(there, judged, strict=True) if not liveness.dead]

    def state(self) -> State:
        """Return every worker that is not pruned, and the seq that this is the state of."""
        return self._session.state()

    @property
    def last_seq(self) -> int:
        """Return the seq of the last durable event, 0 where there is no store."""
        store = self._session.find()
        return 0 if store is None else store.last_seq()

    def totals(self) -> Mapping[str, int]:
        """Return how many events of each type there ever were."""
        store = self._session.find()
        if store is None:
            return {}
        with store.state() as state:
            return dict(state.totals)

    def compacted(self) -> tuple[int, datetime] | None:
        """Return what seq the last compaction covers and when it ended, None before the first."""
        store = self._session.find()
        return None if store is None else store.compacted()

    def liveness(self, sid: str) -> Liveness:
        """Judge whether one worker lives, now.

        Raises: WorkerNotFound.

        Of one that lives on this host, its socket is asked too, where it has a Unix one: it sees a
        connection that ends at once.
        """
        return judge.liveness_of(self._session, sid)

    def judge(self, workers: Collection[Worker]) -> list[Liveness]:
        """Judge many workers, now, in their order; no lock is held and nothing is written."""
        return judge.judge(self._session, workers)

    def usage(self, worker: Worker, *, tree: Collection[int] = ()) -> Usage | None:
        """Return what a worker's process uses, now, and the pids of `tree` (see `trees`) with it.

        None if it cannot be told from here.
        """
        return None if worker.identity is None else identity.usage(worker.identity, tree)

    def runs(self, worker: Worker, path: str) -> bool:
        """Say whether a worker's process runs that very program, as our own user."""
        return worker.identity is not None and identity.runs(worker.identity, path)

    def foresee_stop(self, worker: Worker) -> Outlook:
        """Return what `stop` would do with a worker.

        Raises: StopRefused, IdentityMismatch.
        """
        return stop.foresee_stop(self._session, worker)

    # -- the past ---------------------------------------------------------------------------

    @shows(history.DEFAULTS, HistoryOptions)
    def history(self, **options: Unpack[HistoryOptions]) -> Iterator[Event]:
        """Yield the events that match, oldest first, through log and archive.

        The store's own events are left out unless `types` names them.
        Args: `sid` is one worker, `sids` any of several; `since` and `until` are times, the first
        included, the last not: aware, or a timedelta before now, or the words of the command line
        ("15m", "yesterday"); `after` is a seq. With `newest_first` the first ones come at
        once, however long the history is.
        Raises: DataDamaged where the history is; CompactedError where `after` is no longer kept.
        """
        return history.history(self._session, **options)

    def at(self, when: When | int) -> Past:
        """Return the state as it was at a seq, or after the last event up to a time.

        Of a seq that is not reached yet, or a time to come, it is the state of now. It is folded
        from the nearest older state that is kept.
        Raises: CompactedError where the history that it needs was dropped; DataDamaged.
        """
        return history.at(self._session, when)

    def before_boot(self) -> Past:
        """Return the state as it was when this machine went down last.

        In a directory what this boot wrote is told by the log itself, else by the clock.
        Raises: CompactedError, DataDamaged.
        """
        return history.before_boot(self._session)

    def lives(self, *, progress: Callable[[int, int], None] | None = None) -> "list[Life]":
        """Return every worker's life that the kept history tells of, in order of registration.

        `progress` is told how many of how many events are read.
        Raises: DataDamaged.
        """
        return history.lives(self._session, progress)

    # -- follow -----------------------------------------------------------------------------

    @shows(follow.DEFAULTS, WatchOptions)
    def watch(self, *, observe: bool = False, **options: Unpack[WatchOptions]) -> Watch:
        """Deliver events as they become durable.

        Args: `after` None begins with the state of now, carried by the first Synced; an int with
        the events after that seq; an aware datetime with the events since; "now" with those to
        come; "oldest" with all that is kept. `cursor` names a durable position: where it exists it
        is the beginning, and taking an item acknowledges the one before. `on_compacted`: a Reset,
        or CompactedError. `backend`: what wakes. With `observe` deaths are recorded as they happen
        for as long as it is open, see `observe_all`; else whoever starts, observes or collects a
        worker tells of its death.
        Guarantee: in order, each once, none before it is durable, none left out but as a Reset
        says.
        Raises: StoreMissing if there is no store yet, or not within the seconds that
        `wait_for_store` gives (True: for ever); CursorBusy.
        """
        items = follow.watch(self._session, **options)
        if observe:
            items.keep(self.observe_all())
        return items

    @shows(follow.DEFAULTS, WatchOptions)
    def awatch(self, **options: Unpack[WatchOptions]) -> "AsyncWatch":
        """Deliver events to asyncio, like `watch`; call it with a running loop.

        It does not wait for a store, which would hold the loop up; `AsyncRegistry.watch` does.
        """
        if options.get("wait_for_store"):
            message = "awatch does not wait for a store: use crewlog.aopen(…).watch"
            raise ValueError(message)
        with no_fork():
            from crewlog.aio.watch import AsyncWatch, LoopBell  # noqa: PLC0415 (slow to import)

        bell = LoopBell()
        return AsyncWatch(follow.vigil(self._session, lambda: bell, **options), bell)

    @shows(follow.DEFAULTS, WatchOptions)
    def subscribe(
        self,
        callback: Callable[[Item], object],
        *,
        on_error: OnError = "stop",
        **options: Unpack[WatchOptions],
    ) -> Subscription:
        """Call back for every item in a thread of its own; arguments as for `watch`.

        With a cursor, an item is acknowledged as its callback returns.
        """
        return follow.subscribe(self._session, callback, on_error=on_error, **options)

    def mirror(self, *, backend: Backend = "auto", wait_for_store: bool | float = False) -> Mirror:
        """Return the state of now as an object that can be waited on."""
        return follow.mirror(self._session, backend=backend, wait_for_store=wait_for_store)

    def wait(self, sid: str, *, state: StateName, timeout_s: float | None = None) -> Worker:
        """Return the worker once it is in `state`; it, and the store, need not be there yet.

        Raises: WaitTimeout after `timeout_s` seconds; WorkerEnded if it ends, from now on, as
        something else.
        """
        return follow.wait(self._session, sid, state=state, timeout_s=timeout_s)

    # -- the store itself -------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Return what no other store has.

        Raises: StoreMissing.
        """
        return self.store().id

    @property
    def first_seq(self) -> int:
        """Return the seq of the oldest event that is kept.

        Raises: StoreMissing.
        """
        return self.store().first_seq()

    @property
    def cursors(self) -> Cursors:
        """Return the durable positions of subscribers.

        Raises: StoreMissing.
        """
        return self.store().cursors

    def sizes(self) -> Mapping[str, int]:
        """Return how many bytes the parts of the store take.

        Raises: StoreMissing.
        """
        return self.store().sizes()

    @property
    def unit_workers_max(self) -> int:
        """Return how many workers one unit may change; the store is created if there is none."""
        return self._session.make().unit_workers_max

    def store(self) -> Store:
        """Return the store, for what is done to a whole store.

        Raises: StoreMissing.
        """
        return self._session.require()

    def author(self, via: Via | None = None) -> Author:
        """Return who acts, for the steps that `commit` takes; `via` says through what."""
        return self._session.author(via)

    def commit(self, steps: Sequence[Step]) -> Appended:
        """Write steps as one unit, all or nothing; durable on return. Creates the store."""
        return self._session.append(steps)

    def change(self, step: Step) -> Event:
        """Write one step and return its event, or the worker's last one if nothing had to be."""
        return self._session.change(step)

    def become(self, sid: str, log: Opened | None, **options: Unpack[WorkerOptions]) -> Worker:
        """Register this process, whose output is to go to a log, as `crewlog exec` does."""
        seen = None if log is None else {"log": log.record}
        return register.register(self._session, sid, None, wish_of(options), seen=seen)

    def child(
        self,
        sid: str,
        argv: Words,
        *,
        before: Callable[[], None],
        after: Callable[[], None],
        log: LogOptions,
        **options: Unpack[WorkerOptions],
    ) -> "AbstractContextManager[Child]":
        """Start a program whose end the caller waits for and records itself, as `crewlog run` does.

        `before` is called before its process is there, `after` before it is registered.
        """
        wish = wish_of(options)
        return start.child(self._session, sid, argv, wish, before=before, after=after, log=log)


@shows(_WISH, WorkerOptions)
def worker(
    sid: str = NAME,
    *,
    where: str | os.PathLike[str] | None = None,
    **options: Unpack[WorkerOptions],
) -> Own:
    """Register this process as a worker that is ready, and record how it ends.

    A context manager, or one call for the life of the process, as an initializer of a pool:
    `ProcessPoolExecutor(initializer=crewlog.worker, initargs=("pool-{pid}",))`. In `sid`, `{pid}`
    and `{program}` stand for this process's.

    Guarantee: the registration is durable on return; where this process is killed, a collector
    finds its end.
    Raises: WorkerExists; ValueError and TypeError for bad arguments; all that writing raises.
    """
    return _present(open(where), sid, options)


def _present(registry: Registry, sid: str, options: WorkerOptions) -> Own:
    """Be a worker of a registry that is closed with it."""
    try:
        options.setdefault("ready", True)
        return Own(registry, registry.register(named(sid), **options))
    except BaseException:
        registry.close()
        raise


def open(  # noqa: A001 (crewlog.open is the promised name)
    where: Where = None,
    *,
    lock_timeout_s: float = LOCK_WAIT_S,
    actor: str | None = None,
    redact: Redact | None = None,
    create: bool = False,
) -> Registry:
    """Open the registry at `where`: a directory, a file:// or etcd:// URL, None: the default place.

    Nothing is created before the first change, unless `create` says so: then there is something to
    read and watch at once.
    Args: `lock_timeout_s` is how long a change waits for other writers, in seconds; `actor` names
    who acts, for the history; `redact` is called with each event's type and what the caller gave
    (sock, version, labels, meta, reason) before anything is written, and returns what is to be
    written instead: a chain of hashes cannot forget.
    """
    place = locate(where)
    registry = Registry(place, lock_timeout_s=lock_timeout_s, actor=actor, redact=redact)
    if create:
        try:
            registry._session.make()  # noqa: SLF001 (of its own module)
        except BaseException:
            registry.close()
            raise
    return registry
