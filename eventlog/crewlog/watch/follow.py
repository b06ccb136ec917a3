"""Follow a registry in every way that there is: watch, awatch, subscribe, mirror, wait."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Final, TypedDict, Unpack

from crewlog import host
from crewlog.errors import StoreMissing, WaitTimeout, WorkerEnded, WorkerNotFound
from crewlog.model import arguments
from crewlog.model.events import FINAL, EventType, StateName, Worker, WorkerState
from crewlog.model.items import Item
from crewlog.model.state import State
from crewlog.session import Session
from crewlog.store import Backend, Cursor, Store
from crewlog.watch import feed, wake
from crewlog.watch.callbacks import Mirror, OnError, Subscription, check_on_error
from crewlog.watch.feed import After, Feed, OnCompacted
from crewlog.watch.wake import Bell, Waker
from crewlog.watch.watch import Vigil, Watch

_STATES: Final = frozenset(state.value for state in WorkerState)
_WORDS: Final = frozenset({"now", "oldest"})


class WatchOptions(TypedDict, total=False):
    """What `watch` takes."""

    after: After | timedelta
    sids: Collection[str] | None
    types: Collection[EventType] | None
    cursor: str | None
    on_compacted: OnCompacted
    backend: Backend
    wait_for_store: bool | float


DEFAULTS: Final[WatchOptions] = {
    "after": None,
    "sids": None,
    "types": None,
    "cursor": None,
    "on_compacted": "reset",
    "backend": "auto",
    "wait_for_store": False,
}


def watch(session: Session, **options: Unpack[WatchOptions]) -> Watch:
    """Deliver events as they become durable; see `Registry.watch`."""
    return Watch(vigil(session, Bell, **options))


def subscribe(
    session: Session,
    callback: Callable[[Item], object],
    *,
    on_error: OnError,
    **options: Unpack[WatchOptions],
) -> Subscription:
    """Call back for every item in a thread of its own; see `Registry.subscribe`."""
    check_on_error(on_error)
    return Subscription(watch(session, **options), callback, on_error=on_error)


def mirror(
    session: Session, *, backend: Backend = "auto", wait_for_store: bool | float = False
) -> Mirror:
    """Return the state of now as an object that can be waited on."""
    items = watch(session, after="now", backend=backend, wait_for_store=wait_for_store)
    return Mirror(items, session.state)


def wait(session: Session, sid: str, *, state: StateName, timeout_s: float | None) -> Worker:
    """Return the worker once it is in `state`; see `Registry.wait`."""
    arrived = arrival(session, sid, state)
    what = f"state {state} of worker {sid!r}"
    began = time.monotonic()
    try:
        now = mirror(session, wait_for_store=True if timeout_s is None else timeout_s)
    except StoreMissing as error:
        raise WaitTimeout(what, waited_s=timeout_s or 0) from error
    with now:
        if timeout_s is not None:
            timeout_s = max(0.0, timeout_s - (time.monotonic() - began))
        worker = now.wait(arrived, timeout_s=timeout_s, what=what).get(sid)
    if worker is None:
        raise WorkerNotFound(sid)
    return worker


def awaited(session: Session, patience: bool | float) -> Iterator[float]:  # noqa: FBT001 (a value)
    """Yield pauses, in seconds, until there is a store; see `Registry.watch`.

    Raises: StoreMissing once patience is at its end.
    """
    arguments.check_patience(patience)
    deadline = None if patience is True else time.monotonic() + patience
    pause_s = wake.POLL_MIN_S
    while session.find() is None:
        left_s = pause_s if deadline is None else deadline - time.monotonic()
        if left_s <= 0:
            session.require()
        yield min(pause_s, max(left_s, 0.0))
        pause_s = min(pause_s * 2, wake.POLL_MAX_S)


def arrival(session: Session, sid: str, state: str) -> Callable[[State], bool]:
    """Return what says of a state whether the worker is in `state`; see `Registry.wait`."""
    arguments.check_sid(sid)
    if state not in _STATES:
        message = f"state is one of {', '.join(sorted(_STATES))}, not {state!r}"
        raise ValueError(message)
    wanted = WorkerState(state)
    began = session.state().seq

    def arrived(now: State) -> bool:
        worker = now.get(sid)
        if worker is None or worker.state == wanted:
            return worker is not None
        if worker.state in FINAL and worker.rev > began:
            raise WorkerEnded(sid, state=worker.state.value, wanted=wanted.value)
        return False

    return arrived


def vigil(
    session: Session,
    bell: Callable[[], Bell],
    *,
    after: After | timedelta = None,
    sids: Collection[str] | None = None,
    types: Collection[EventType] | None = None,
    cursor: str | None = None,
    on_compacted: OnCompacted = "reset",
    backend: Backend = "auto",
    wait_for_store: bool | float = False,
) -> Vigil:
    """Check the options, take the cursor, arm the waker, and find the beginning, in that order."""
    after = _checked(after)
    if on_compacted not in {"reset", "raise"}:
        message = f"on_compacted is reset or raise, not {on_compacted!r}"
        raise ValueError(message)
    backend = wake.check_backend(backend)
    wanted = feed.filter_of(sids, types)
    for pause_s in awaited(session, wait_for_store):
        after = "oldest" if after == "now" else after  # all of it is to come
        time.sleep(pause_s)
    store = session.require()

    def arm() -> Waker:
        return Waker(store.channel, backend=backend, bell=bell())

    with ExitStack() as undo:
        owned = None if cursor is None else _own(session, store, cursor, after)
        if owned is not None:
            undo.callback(owned[0].close)
        waker = arm()  # before the first look: what changes from here on wakes
        undo.callback(waker.close)
        items = Feed(
            store,
            after=after if owned is None else owned[1],
            wanted=wanted,
            on_compacted=on_compacted,
            state=session.state,
            digest=0 if owned is None else owned[0].digest,
        )
        undo.pop_all()
    return Vigil(
        items,
        waker=waker,
        arm=arm,
        current=lambda: session.find(fresh=True),
        cursor=None if owned is None else owned[0],
    )


def _own(session: Session, store: Store, name: str, after: After) -> tuple[Cursor, After]:
    """Take a cursor; it begins where it stands, a new one where `after` says."""
    arguments.check_sid(name, what="cursor")
    known = store.cursors.read(name)
    if known is not None:
        owned = store.cursors.own(name, start=known.seq)
        return owned, owned.seq
    begun = Feed(
        store, after=after, wanted=feed.Filter(), on_compacted="reset", state=session.state
    )
    digest = feed.digest_at(store, begun.position)
    owned = store.cursors.own(name, start=begun.position, digest=digest)
    return owned, after if after is None else owned.seq


def _checked(after: After | timedelta) -> After:
    """Return where to begin, a span before now as the time that it means."""
    if isinstance(after, timedelta):
        return host.now() - after
    if after is None or after in _WORDS or (type(after) is int and after >= 0):
        return after
    if isinstance(after, datetime) and after.tzinfo is not None:
        return after
    message = f"after must be a seq, an aware datetime, 'now', 'oldest' or None, not {after!r}"
    raise ValueError(message)
