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
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, Final, ParamSpec, Self, TypeVar, Unpack, cast

from crewlog import arguments, changes, follow, layout, threads
from crewlog.appending import Appended, Decide
from crewlog.awatch import AsyncWatch, LoopBell
from crewlog.batch import Batch
from crewlog.changes import Redact, Step
from crewlog.commit import Phase, Request
from crewlog.errors import AppendUncertain, RegistryClosed, WaitTimeout
from crewlog.events import Event, JsonValue, Worker
from crewlog.follow import WatchOptions
from crewlog.past import HistoryOptions
from crewlog.place import locate
from crewlog.registry import Registry, Where
from crewlog.session import Session, event_in, worker_in
from crewlog.store import Store
from crewlog.watch import Vigil

P = ParamSpec("P")
R = TypeVar("R")

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


def _aside(
    method: Callable[Concatenate[Registry, P], R],
) -> Callable[Concatenate["AsyncRegistry", P], Awaitable[R]]:
    """Make a verb that may take for ever a coroutine, in a thread of its own that nobody joins."""

    @functools.wraps(method)
    async def call(self: "AsyncRegistry", /, *args: P.args, **kwargs: P.kwargs) -> R:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def settle(found: R | None, error: Exception | None) -> None:
            if future.done():  # its task was cancelled
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(cast("R", found))

        def work() -> None:
            found, failed = None, None
            try:
                found = method(self.registry, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 (the task raises it)
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, found, failed)

        threads.start(work, name="crewlog-aside")
        return await future

    return call


class AsyncRegistry:
    """A registry for asyncio; see `Registry` for what each verb promises. Use `crewlog.aopen`."""

    def __init__(self, registry: Registry) -> None:
        """Take over a registry, which is closed with this one."""
        self.registry = registry
        self._session = registry.session
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
        """Run something that may block in a thread. *Raises* RegistryClosed after `aclose`."""
        return await self._begun(work)

    def _begun(self, work: Callable[[], R]) -> asyncio.Future[R]:
        """Begin something in a thread."""
        self._mind_fork()
        if self._closed:
            raise RegistryClosed(self._session.where)
        return asyncio.get_running_loop().run_in_executor(self._calls, work)

    # -- change -----------------------------------------------------------------------------

    async def update(
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
        """Move a worker on, or patch it, and return it; see `Registry.update`."""
        step_of = functools.partial(
            changes.updated,
            self._session.author(),
            sid,
            state=state,
            sock=sock,
            version=version,
            labels=labels,
            meta=meta,
            reason=reason,
            expect=expect,
        )
        if sock is not None or state == "ready":
            # the socket is looked at, and may lie where a look takes long
            step = await self.call(lambda: step_of(sock_of=self._session.sock_of))
        else:
            step = step_of()
        worker = worker_in(await self._append([step]), sid)
        if worker is None:
            return await self.call(lambda: self._session.known(sid))
        return worker

    async def exited(
        self,
        sid: str,
        *,
        code: int | None = None,
        signal: int | None = None,
        source: str = "self",
        expect: int | None = None,
    ) -> Event:
        """Record that a worker ended, and return the event; see `Registry.exited`."""
        author = self._session.author()
        return await self._event(
            changes.exited(author, sid, code=code, signal=signal, source=source, expect=expect)
        )

    async def remove(self, sid: str, *, reason: str, expect: int | None = None) -> Event:
        """Take a worker out of the registry; see `Registry.remove`."""
        author = self._session.author()
        return await self._event(changes.released(author, sid, reason=reason, expect=expect))

    def batch(self) -> "AsyncBatch":
        """Collect changes in an `async with` block; durable at its end together, or none."""
        return AsyncBatch(self._session, self._append)

    async def _event(self, step: Step) -> Event:
        found, session = event_in(await self._append([step])), self._session
        if found is None:  # it had been recorded before
            return await self.call(lambda: session.last_event(session.known(step.sid)))
        return found

    async def _append(self, steps: Sequence[Step]) -> Appended:
        self._mind_fork()
        decide = changes.together(steps)
        store = self._session.held()  # it may be another one by now
        if store is None or store.closed:
            store = await self.call(lambda: self._session.store_for(decide))
        loop = asyncio.get_running_loop()
        if self._inbox is None or self._inbox.loop is not loop:
            self._inbox = _Inbox(loop)
        about = {step.sid for step in steps}
        request = _Awaited(decide, about, store, self._inbox, self._leaders)
        store.commits.submit(request)
        await request.future
        return request.outcome()

    register = _threaded(Registry.register)
    spawn = _threaded(Registry.spawn)
    ensure = _threaded(Registry.ensure)
    stop = _threaded(Registry.stop)
    observe = _aside(Registry.observe)
    beat = _threaded(Registry.beat)

    # -- read -------------------------------------------------------------------------------

    get = _threaded(Registry.get)
    workers = _threaded(Registry.workers)
    state = _threaded(Registry.state)
    totals = _threaded(Registry.totals)
    compacted = _threaded(Registry.compacted)
    liveness = _threaded(Registry.liveness)
    judge = _threaded(Registry.judge)
    at = _threaded(Registry.at)
    lives = _threaded(Registry.lives)

    async def last_seq(self) -> int:
        """Return the seq of the last durable event, 0 where there is no store."""
        return await self.call(lambda: self.registry.last_seq)

    async def history(self, **options: Unpack[HistoryOptions]) -> AsyncIterator[Event]:
        """Yield the events that match; see `Registry.history`."""
        found = self.registry.history(**options)
        while True:
            part = await self.call(lambda: list(itertools.islice(found, _EVENTS_A_STEP)))
            for event in part:
                yield event
            if len(part) < _EVENTS_A_STEP:
                return

    async def wait(self, sid: str, *, state: str, timeout_s: float | None = None) -> Worker:
        """Return the worker once it is in `state`; see `Registry.wait`. No thread waits with it."""
        arrived = await self.call(lambda: follow.arrival(self._session, sid, state))
        deadline = None if timeout_s is None else time.monotonic() + arguments.check_wait(timeout_s)
        async with self.watch(after="now") as items:
            over = False
            while True:
                now = await self.state()
                worker = now.get(sid)
                if arrived(now) and worker is not None:
                    return worker
                if over:
                    what = f"state {state} of worker {sid!r}"
                    raise WaitTimeout(what, waited_s=timeout_s or 0)
                left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                over = await items.next(left_s) is None

    @contextlib.asynccontextmanager
    async def watch(self, **options: Unpack[WatchOptions]) -> AsyncIterator[AsyncWatch]:
        """Deliver events as they become durable; see `Registry.watch`.

        `async with reg.watch() as items`, then `async for item in items`. It is opened in a thread,
        for a server may not answer, and a large state takes a while to read.
        """
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
        """Return itself."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close."""
        await self.aclose()


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
    """Results on their way back to one loop: many, in one call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._settled: deque[_Awaited] = deque()
        self._called = False

    def put(self, request: "_Awaited") -> None:
        self._settled.append(request)
        if not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._called = False  # before the look: who puts from now on calls again
        while self._settled:
            future = self._settled.popleft().future
            if not future.done():  # else its task was cancelled
                future.set_result(None)


class _Awaited(Request):
    """A request whose caller is a task."""

    __slots__ = ("_inbox", "_leaders", "_store", "future")

    def __init__(
        self,
        decide: Decide,
        about: Collection[str],
        store: Store,
        inbox: _Inbox,
        leaders: ThreadPoolExecutor,
    ) -> None:
        super().__init__(decide, about)
        self._store = store
        self._inbox = inbox
        self._leaders = leaders
        self.future: asyncio.Future[None] = inbox.loop.create_future()

    def advance(self, phase: Phase) -> None:
        self.phase = phase
        if phase == "done":
            self._inbox.put(self)
            return
        try:
            self._leaders.submit(self._go_on)
        except RuntimeError:  # the pool is gone: the registry was closed meanwhile
            where = self._store.where
            self.fail(
                AppendUncertain(where, why="the registry was closed meanwhile")
                if phase == "written"
                else RegistryClosed(where)
            )
            self._inbox.put(self)
            self._store.commits.leave(self)

    def _go_on(self) -> None:
        """Do what is left to do, in a thread."""
        try:
            if self.phase == "lead":
                self._store.commits.lead(self._store, self)
            else:
                self._store.make_durable(0 if self.result is None else self.result.seq)
        except Exception as error:  # noqa: BLE001 (the task raises it)
            self.fail(error)
        self.advance("done")


def aopen(
    where: Where = None,
    *,
    lock_timeout_s: float = layout.LOCK_WAIT_S,
    actor: str | None = None,
    redact: Redact | None = None,
) -> AsyncRegistry:
    """Open the registry at `where` for asyncio: `async with crewlog.aopen() as reg`.

    Arguments as for `crewlog.open`.
    """
    place = locate(where)
    return AsyncRegistry(Registry(place, lock_timeout_s=lock_timeout_s, actor=actor, redact=redact))
