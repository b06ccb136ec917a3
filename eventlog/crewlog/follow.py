"""Offer every way to follow a registry: watch, awatch, subscribe, mirror, wait."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import ExitStack
from datetime import datetime
from typing import TYPE_CHECKING, Final, TypedDict

from crewlog import changes, feed, notify
from crewlog.errors import WorkerEnded, WorkerNotFound
from crewlog.events import FINAL, Item, State, Worker, WorkerState
from crewlog.feed import After, Feed, OnCompacted
from crewlog.notify import Backend, Bell, Waker
from crewlog.store import Cursor, Store
from crewlog.subscribe import Mirror, OnError, Subscription, check_on_error
from crewlog.watch import Vigil, Watch

if TYPE_CHECKING:
    from crewlog.awatch import AsyncWatch

_STATES: Final = frozenset(state.value for state in WorkerState)
_WORDS: Final = frozenset({"now", "oldest"})


class WatchOptions(TypedDict, total=False):
    """What `watch` takes."""

    after: After
    sids: Collection[str] | None
    types: Collection[str] | None
    cursor: str | None
    on_compacted: OnCompacted
    backend: Backend


class Following(ABC):
    """What a registry must tell, and all that follows from it."""

    @abstractmethod
    def log(self) -> Store:
        """Return the store's log. *Raises* StoreMissing."""

    @abstractmethod
    def log_in_place(self) -> Store | None:
        """Return the store that its place leads to now, reopened if it is another one."""

    @abstractmethod
    def state(self) -> State:
        """Return the durable state of now."""

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
        return Watch(
            self._vigil(after, sids, types, cursor, on_compacted, backend, bell=Bell),
        )

    def awatch(
        self,
        *,
        after: After = None,
        sids: Collection[str] | None = None,
        types: Collection[str] | None = None,
        cursor: str | None = None,
        on_compacted: OnCompacted = "reset",
        backend: Backend = "auto",
    ) -> "AsyncWatch":
        """Deliver events to asyncio, like `watch`; call it with a running loop."""
        from crewlog.awatch import AsyncWatch, LoopBell  # noqa: PLC0415 (asyncio is slow to load)

        bell = LoopBell()
        vigil = self._vigil(after, sids, types, cursor, on_compacted, backend, bell=lambda: bell)
        return AsyncWatch(vigil, bell)

    def subscribe(
        self,
        callback: Callable[[Item], object],
        *,
        after: After = None,
        sids: Collection[str] | None = None,
        types: Collection[str] | None = None,
        cursor: str | None = None,
        on_compacted: OnCompacted = "reset",
        backend: Backend = "auto",
        on_error: OnError = "stop",
    ) -> Subscription:
        """Call back for every item in a thread of its own; arguments as for `watch`."""
        check_on_error(on_error)
        items = self.watch(
            after=after,
            sids=sids,
            types=types,
            cursor=cursor,
            on_compacted=on_compacted,
            backend=backend,
        )
        return Subscription(items, callback, on_error=on_error)

    def mirror(self, *, backend: Backend = "auto") -> Mirror:
        """Return the state of now as an object that can be waited on."""
        return Mirror(self.watch(after="now", backend=backend), self.state)

    def wait(self, sid: str, *, state: str, timeout_s: float | None = None) -> Worker:
        """Return the worker once it is in `state`; it need not be registered yet.

        *Raises* WaitTimeout after `timeout_s` seconds; WorkerEnded if it ends, from now on, as
        something else.
        """
        arrived = self.arrival(sid, state)
        with self.mirror() as now:
            what = f"state {state} of worker {sid!r}"
            worker = now.wait(arrived, timeout_s=timeout_s, what=what).get(sid)
        if worker is None:
            raise WorkerNotFound(sid)
        return worker

    def arrival(self, sid: str, state: str) -> Callable[[State], bool]:
        """Return what says of a state whether the worker is in `state`; see `wait`."""
        changes.check_sid(sid)
        if state not in _STATES:
            message = f"state is one of {', '.join(sorted(_STATES))}, not {state!r}"
            raise ValueError(message)
        wanted = WorkerState(state)
        began = self.state().seq

        def arrived(now: State) -> bool:
            worker = now.get(sid)
            if worker is None or worker.state == wanted:
                return worker is not None
            if worker.state in FINAL and worker.rev > began:
                raise WorkerEnded(sid, state=worker.state.value, wanted=wanted.value)
            return False

        return arrived

    def _vigil(
        self,
        after: After,
        sids: Collection[str] | None,
        types: Collection[str] | None,
        cursor_name: str | None,
        on_compacted: OnCompacted,
        backend: Backend,
        *,
        bell: Callable[[], Bell],
    ) -> Vigil:
        _check_after(after)
        if on_compacted not in {"reset", "raise"}:
            message = f"on_compacted is reset or raise, not {on_compacted!r}"
            raise ValueError(message)
        backend = notify.check_backend(backend)
        wanted = feed.filter_of(sids, types)
        log = self.log()

        def arm() -> Waker:
            return Waker(log.changes, backend=backend, bell=bell())

        with ExitStack() as undo:
            owned = None if cursor_name is None else self._own(log, cursor_name, after)
            if owned is not None:
                undo.callback(owned[0].close)
            waker = arm()  # before the first look: what changes from here on wakes
            undo.callback(waker.close)
            items = Feed(
                log,
                after=after if owned is None else owned[1],
                wanted=wanted,
                on_compacted=on_compacted,
                state=self.state,
            )
            undo.pop_all()
        return Vigil(
            items,
            waker=waker,
            arm=arm,
            current=self.log_in_place,
            cursor=None if owned is None else owned[0],
        )

    def _own(self, log: Store, name: str, after: After) -> tuple[Cursor, After]:
        """Take a cursor; it begins where it stands, a new one where `after` says."""
        changes.check_sid(name, what="cursor")
        known = log.cursors.read(name)
        if known is not None:
            owned = log.cursors.own(name, start=known.seq)
            return owned, owned.seq
        begun = Feed(log, after=after, wanted=feed.Filter(), on_compacted="reset", state=self.state)
        owned = log.cursors.own(name, start=begun.position)
        return owned, after if after is None else owned.seq


def _check_after(after: object) -> None:
    if after is None or after in _WORDS or (type(after) is int and after >= 0):
        return
    if isinstance(after, datetime) and after.tzinfo is not None:
        return
    message = f"after must be a seq, an aware datetime, 'now', 'oldest' or None, not {after!r}"
    raise ValueError(message)
