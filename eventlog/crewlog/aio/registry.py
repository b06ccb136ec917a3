"""Offer the registry to asyncio: the same verbs as coroutines, sharing commits.

Changes go straight into the queue of the log, from the loop's own thread; one of two threads leads
for all that wait, and hands the results back to the loop in one call. Whatever may block for longer
(opening, probing, starting, reading) runs in a thread.

A task that is cancelled stops waiting, not writing: like an error with the outcome "unknown".
"""

import asyncio
import contextlib
import functools
import itertools
import os
import time
import warnings
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, Final, Generic, ParamSpec, Self, TypeVar, Unpack, cast

from crewlog import host
from crewlog.aio.watch import AsyncWatch, LoopBell
from crewlog.errors import RegistryClosed, StoreMissing, WaitTimeout
from crewlog.history import HistoryOptions
from crewlog.model import arguments
from crewlog.model.events import Event, JsonObject, StateName, Worker
from crewlog.model.limits import LOCK_WAIT_S
from crewlog.model.steps import (
    Appended,
    ExitOptions,
    Redact,
    Step,
    UpdateOptions,
    WorkerOptions,
    decide_all,
    exit_step,
    release_step,
    update_step,
)
from crewlog.place import locate
from crewlog.queue import Request
from crewlog.registry import EXIT_DEFAULTS, UPDATE_DEFAULTS, Registry, Where, shows
from crewlog.session import Session, event_in, worker_in
from crewlog.watch import follow
from crewlog.watch.follow import WatchOptions
from crewlog.watch.watch import Vigil
from crewlog.workers import register, stop
from crewlog.workers.batch import Batch
from crewlog.workers.own import NAME, Own

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_LEADERS: Final = 2  # one writes while the other syncs
_CALLS_MAX: Final = 64
_EVENTS_A_STEP: Final = 256


def _threaded(
    method: Callable[Concatenate[Registry, P], R],
) -> Callable[Concatenate["AsyncRegistry", P], Awaitable[R]]:
    """Make a verb a coroutine that runs in a thread."""

    @functools.wraps(method)
    async def call(self: "AsyncRegistry", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self.call(functools.partial(method, self.registry, *args, **kwargs))

    return call


class AsyncRegistry:
    """A registry for asyncio; see `Registry` for what each verb promises. Use `crewlog.aopen`."""

    def __init__(self, registry: Registry, *, create: bool = False) -> None:
        """Take over a registry, which is closed with this one."""
        self._create = create
        self.registry = registry
        self._session = registry._session  # noqa: SLF001 (another face of the same registry)
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        """Have pools without a thread yet."""
        self._pid = os.getpid()
        self._leaders = ThreadPoolExecutor(_LEADERS, thread_name_prefix="crewlog-lead")
        self._calls = ThreadPoolExecutor(_CALLS_MAX, thread_name_prefix="crewlog-call")
        self._inbox: _Inbox | None = None

    def _mind_fork(self) -> None:
        """Begin anew in a forked child: the threads of the pools are the parent's."""
        if self._pid != os.getpid():
            self._begin()

    async def call(self, work: Callable[[], R]) -> R:
        """Run something that may block in a thread.

        Raises: RegistryClosed after `aclose`.
        """
        return await self._begun(work)

    def _begun(self, work: Callable[[], R]) -> asyncio.Future[R]:
        """Begin something in a thread."""
        self._mind_fork()
        if self._closed:
            raise RegistryClosed(self._session.where)
        return asyncio.get_running_loop().run_in_executor(self._calls, work)

    # -- change -----------------------------------------------------------------------------

    @shows(UPDATE_DEFAULTS, UpdateOptions)
    async def update(self, sid: str, **options: Unpack[UpdateOptions]) -> Worker:
        """Move a worker on, or patch it, and return it; see `Registry.update`."""
        session = self._session
        seen: JsonObject = {}
        if options.get("sock") is not None or options.get("state") == "ready":
            # the socket is looked at, and may lie where a look takes long
            seen = await self.call(
                lambda: register.seen_socket(
                    sid, options, lambda known: register.recorded_sock(session, known)
                )
            )
        step = update_step(session.author(), sid, options, seen=seen)
        worker = worker_in(await self._append([step]), sid)
        if worker is None:
            return await self.call(lambda: self._session.known(sid))
        return worker

    @shows(EXIT_DEFAULTS, ExitOptions)
    async def exited(self, sid: str, **options: Unpack[ExitOptions]) -> Event:
        """Record that a worker ended, and return the event; see `Registry.exited`."""
        return await self._event(exit_step(self._session.author(), sid, options))

    async def remove(
        self, sid: str, *, reason: str = "crewlog.remove", expect: int | None = None
    ) -> Event:
        """Take a worker out of the registry; see `Registry.remove`."""
        author = self._session.author()
        return await self._event(release_step(author, sid, reason=reason, expect=expect))

    def batch(self) -> "AsyncBatch":
        """Collect changes in an `async with` block; durable at its end together, or none."""
        return AsyncBatch(self._session, self._append)

    async def _event(self, step: Step) -> Event:
        event, session = event_in(await self._append([step])), self._session
        if event is None:  # it had been recorded before
            return await self.call(lambda: session.last_event(session.known(step.sid)))
        return event

    async def _append(self, steps: Sequence[Step]) -> Appended:
        self._mind_fork()
        decide = decide_all(steps)
        store = self._session.opened  # it may be another one by now
        if store is None:
            store = await self.call(lambda: self._session.make(decide))
        loop = asyncio.get_running_loop()
        if self._inbox is None or self._inbox.loop is not loop:
            self._inbox = _Inbox(loop)
        settled: asyncio.Future[Request] = loop.create_future()
        inbox, about = self._inbox, {step.sid for step in steps}
        store.submit(
            decide,
            about,
            done=lambda request: inbox.put(settled, request),
            start=self._leaders.submit,
        )
        return (await settled).outcome()

    register = _threaded(Registry.register)
    spawn = _threaded(Registry.spawn)
    ensure = _threaded(Registry.ensure)
    stop = _threaded(Registry.stop)
    beat = _threaded(Registry.beat)
    observe_all = _threaded(Registry.observe_all)

    async def observe(self, sid: str, *, timeout_s: float | None = None) -> Event:
        """Do as `Registry.observe` does, in a thread of its own: it may take for ever.

        That ends within a second where the task is cancelled, or the registry closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Event] = loop.create_future()

        def settle(event: Event | None, error: Exception | None) -> None:
            if future.done():  # its task was cancelled
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(cast("Event", event))

        def is_wanted() -> bool:
            return not (future.done() or self._closed)

        def work() -> None:
            event, failed = None, None
            try:
                event = stop.observe(self._session, sid, timeout_s=timeout_s, is_wanted=is_wanted)
            except Exception as error:  # noqa: BLE001 (the task raises it)
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, event, failed)

        host.start_thread(work, name="crewlog-observe")
        return await future

    # -- read -------------------------------------------------------------------------------

    get = _threaded(Registry.get)
    workers = _threaded(Registry.workers)
    state = _threaded(Registry.state)
    totals = _threaded(Registry.totals)
    compacted = _threaded(Registry.compacted)
    liveness = _threaded(Registry.liveness)
    judge = _threaded(Registry.judge)
    trees = _threaded(Registry.trees)
    at = _threaded(Registry.at)
    before_boot = _threaded(Registry.before_boot)
    lives = _threaded(Registry.lives)

    living = _threaded(Registry.living)

    @property
    def last_seq(self) -> "Asked[int]":
        """Return the seq of the last durable event, 0 where there is no store: await it."""
        return Asked(self, lambda: self.registry.last_seq)

    @property
    def exists(self) -> "Asked[bool]":
        """Say whether there is a store at the place; reading creates none: await it."""
        return Asked(self, lambda: self.registry.exists)

    @property
    def where(self) -> str:
        """Return the place: a path, or a URL."""
        return self.registry.where

    @property
    def path(self) -> Path:
        """Return the directory.

        Raises: Unsupported where the store is in none.
        """
        return self.registry.path

    def __repr__(self) -> str:
        """Say where it is."""
        return f"<AsyncRegistry {self.where}>"

    async def history(self, **options: Unpack[HistoryOptions]) -> AsyncIterator[Event]:
        """Yield the events that match; see `Registry.history`."""
        events = self.registry.history(**options)
        while True:
            part = await self.call(lambda: list(itertools.islice(events, _EVENTS_A_STEP)))
            for event in part:
                yield event
            if len(part) < _EVENTS_A_STEP:
                return

    async def wait(self, sid: str, *, state: StateName, timeout_s: float | None = None) -> Worker:
        """Return the worker once it is in `state`; see `Registry.wait`. No thread waits with it."""
        arrived = await self.call(lambda: follow.arrival(self._session, sid, state))
        deadline = None if timeout_s is None else time.monotonic() + arguments.check_wait(timeout_s)
        what = f"state {state} of worker {sid!r}"
        try:
            await self._await_store(True if timeout_s is None else timeout_s)
        except StoreMissing as error:
            raise WaitTimeout(what, waited_s=timeout_s or 0) from error
        async with self.watch(after="now") as items:
            over = False
            while True:
                now = await self.state()
                worker = now.get(sid)
                if arrived(now) and worker is not None:
                    return worker
                if over:
                    raise WaitTimeout(what, waited_s=timeout_s or 0)
                left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                over = await items.next(left_s) is None

    async def _await_store(self, patience: bool | float) -> bool:  # noqa: FBT001 (a value)
        """Wait, without a thread, until there is a store; say whether there was none at first."""
        pauses = follow.awaited(self._session, patience)
        waited = False
        while (pause_s := await self.call(lambda: next(pauses, None))) is not None:
            waited = True
            await asyncio.sleep(pause_s)
        return waited

    @contextlib.asynccontextmanager
    async def presence(
        self, sid: str = NAME, **options: Unpack[WorkerOptions]
    ) -> AsyncIterator[Own]:
        """Be a worker for the length of an `async with` block; see `Registry.presence`."""
        mine = await self.call(lambda: self.registry.presence(sid, **options))
        try:
            yield mine
        except BaseException as error:
            await self.call(functools.partial(mine.__exit__, type(error), error, None))
            raise
        await self.call(mine.end)

    @contextlib.asynccontextmanager
    async def watch(self, **options: Unpack[WatchOptions]) -> AsyncIterator[AsyncWatch]:
        """Deliver events as they become durable; see `Registry.watch`.

        `async with reg.watch() as items`, then `async for item in items`. It is opened in a thread,
        for a server may not answer, and a large state takes a while to read.
        """
        patience = options.pop("wait_for_store", False)
        waited = patience is not False and await self._await_store(patience)
        if waited and options.get("after") == "now":
            options["after"] = "oldest"  # all of it is to come
        bell, session = LoopBell(), self._session
        opening = self._begun(lambda: follow.vigil(session, lambda: bell, **options))
        try:
            items = AsyncWatch(await asyncio.shield(opening), bell)
        except asyncio.CancelledError:  # the thread goes on: what it opens nobody will close
            opening.add_done_callback(self._never_taken)
            raise
        try:
            yield items
        finally:
            items.close()

    def _never_taken(self, opened: asyncio.Future[Vigil]) -> None:
        """Give back, in a thread again, what was opened for a task that was cancelled."""
        if opened.cancelled() or opened.exception() is not None:
            return
        vigil = opened.result()
        try:
            self._calls.submit(vigil.end)
        except RuntimeError:  # the pool is gone
            vigil.end()

    # -- life -------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Give every resource back; idempotent."""
        if self._closed:
            return
        await self.call(self.registry.close)
        self._closed = True
        self._leaders.shutdown(wait=False)
        self._calls.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        """Return itself; create the store if that was asked for."""
        if self._create:
            await self.call(self._session.make)
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close."""
        await self.aclose()


class Asked(Generic[T]):
    """What a property of a `Registry` would say; it may take long, so it is awaited."""

    def __init__(self, registry: AsyncRegistry, ask: Callable[[], T]) -> None:
        """Ask nothing yet."""
        self._registry = registry
        self._ask = ask

    def __await__(self) -> Generator[object, None, T]:
        """Ask in a thread."""
        return self._registry.call(self._ask).__await__()

    def __bool__(self) -> bool:
        """Refuse: it is not known yet."""
        message = "await it"
        raise TypeError(message)

    def __call__(self) -> Self:
        """Return itself: it was a method in version 0.1."""
        message = "await reg.last_seq, without a call"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return self


class AsyncBatch(Batch):
    """Changes that become durable together at the end of an `async with` block, or not at all.

    The socket of a worker that gets ready is not looked at, which may take long; `update` does.
    """

    def __init__(
        self, session: Session, commit: Callable[[Sequence[Step]], Awaitable[Appended]]
    ) -> None:
        """Begin empty."""
        super().__init__(session.author(), session.append, sock_of=lambda _: None)
        self._acommit = commit

    def __enter__(self) -> Self:
        """Refuse: it would hold the loop up."""
        message = "a batch of an AsyncRegistry is an `async with`"
        raise TypeError(message)

    async def __aenter__(self) -> Self:
        """Begin to collect."""
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        """Write all of it, durable on return; nothing at all if the block raised."""
        if error is None and self._steps:
            self.last_seq = (await self._acommit(self._steps)).seq


class _Inbox:
    """Settled requests on their way back to one loop: many, in one call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._settled: deque[tuple[asyncio.Future[Request], Request]] = deque()
        self._called = False

    def put(self, future: asyncio.Future[Request], request: Request) -> None:
        self._settled.append((future, request))
        if not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._called = False  # before the look: who puts from now on calls again
        while self._settled:
            future, request = self._settled.popleft()
            if not future.done():  # else its task was cancelled
                future.set_result(request)


def aopen(
    where: Where = None,
    *,
    lock_timeout_s: float = LOCK_WAIT_S,
    actor: str | None = None,
    redact: Redact | None = None,
    create: bool = False,
) -> AsyncRegistry:
    """Open the registry at `where` for asyncio: `async with crewlog.aopen() as reg`.

    Arguments as for `crewlog.open`; with `create` the store is there when the block begins.
    """
    place = locate(where)
    registry = Registry(place, lock_timeout_s=lock_timeout_s, actor=actor, redact=redact)
    return AsyncRegistry(registry, create=create)
