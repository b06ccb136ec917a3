"""Wait for items: arm the waker, look, then wait; look again at every wake and every second.

Level-triggered: a wake only means that it is worth looking. What makes a wait end, or fail to,
changes nothing about what is delivered.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Self

from crewlog.errors import HistoryRewound, RegistryClosed, StoreMissing, Unavailable
from crewlog.host import Closable
from crewlog.model.items import Item, Reset
from crewlog.store import Cursor, Store
from crewlog.watch import wake
from crewlog.watch.feed import Feed, digest_at, digest_of
from crewlog.watch.wake import Waker

_logger = logging.getLogger("crewlog.watch")


class Vigil:
    """What the waiting kinds of watcher share: cursor, safety look, a fork's aftermath."""

    def __init__(
        self,
        feed: Feed,
        *,
        waker: Waker,
        arm: Callable[[], Waker],
        current: Callable[[], Store | None],
        cursor: Cursor | None,
    ) -> None:
        """Watch a feed; `arm` makes another waker, `current` says which store is in place now."""
        self.feed = feed
        self.waker = waker
        self.cursor = cursor
        self.wakes = 0
        self.closed = False
        self._arm = arm
        self._current = current
        self._pid = os.getpid()
        self._looked_at = time.monotonic()
        self._last_look_for: float | None = None  # the deadline after which it was taken
        self._waiting: Reset | None = None
        self._unheard = False  # no server answers, and that was said
        self._unacknowledged: tuple[int, int] | None = None  # a seq, and which line stands there

    def begin(self) -> None:
        """Do what the next take has to do first: acknowledge the last item, mind a fork."""
        if self._pid != os.getpid():
            self._rearm()
        if self.cursor is not None and self._unacknowledged is not None:
            self.cursor.advance(*self._unacknowledged)
            self._unacknowledged = None

    def _rearm(self) -> None:
        """Listen anew in a forked child; a cursor stays with the parent, which owns it."""
        if self.cursor is not None:
            raise RegistryClosed(f"cursor {self.cursor.name} in a forked child")
        store = self._current()
        if store is not None:
            self.feed.rearm(store)
        self.waker = self._arm()
        self._pid = os.getpid()

    def look(self, lines_max: int | None = None) -> Item | None:
        """Return the next item that is there now."""
        try:
            item = self._look(lines_max)
        except Unavailable as error:  # it may come back, and nothing is lost until then
            if not self._unheard:
                _logger.warning("%s; the watch goes on when it answers", error)
            self._unheard = True
            return None
        self._unheard = False
        self._waiting = None
        if item is not None:
            self.waker.saw_change()
            self._unacknowledged = item.seq, digest_of(item)
        elif self.cursor is not None and not self.feed.unfinished:
            # Nothing is left that was not acknowledged.
            self.cursor.advance(self.feed.position, self.feed.digest)
        return item

    def _look(self, lines_max: int | None) -> Item | None:
        if self._waiting is not None:
            return self._waiting
        try:
            return self.feed.look(lines_max)
        except (StoreMissing, RegistryClosed, HistoryRewound):
            self.check_place()  # another store may be there already
            return self._waiting or self.feed.look(lines_max)

    def overdue(self) -> bool:
        """Say whether it is time for a safety look, and take it as done."""
        now = time.monotonic()
        if now - self._looked_at < 0.9 * self.feed.store.limits.safety_look_s:
            return False
        self._looked_at = now
        return True

    def patience_s(self, deadline: float | None) -> float | None:
        """Return how long to wait before the next look, None once a deadline has passed.

        Who only ever asks without waiting must hear of a replaced store too: where a look at the
        place is due, it is taken before giving up.
        """
        if deadline is None:
            return self.feed.store.limits.safety_look_s
        left_s = deadline - time.monotonic()
        if left_s > 0:
            return min(left_s, self.feed.store.limits.safety_look_s)
        if self._unheard or deadline == self._last_look_for or not self.overdue():
            return None
        self._last_look_for = deadline  # the next may be due again when this one is done
        self.check_place()
        return 0.0

    def moved_unseen(self) -> bool:
        """Say whether the head has moved on without a wake so far."""
        try:
            return self.waker.source != "poll" and self.feed.store.last_seq() > self.feed.seen_seq
        except (Unavailable, RegistryClosed):  # nothing is known; or another one is in place
            return False

    def distrust(self) -> None:
        """Take the missing wake as proof."""
        self.waker.distrust("the head moved on and no wake came")

    def check_place(self) -> None:
        """See whether the store in place is still the one that is watched."""
        self.waker.check()
        self.feed.store.renew()
        try:
            store = self._current()
        except Unavailable:  # the next look says so
            return
        if store is not None and store is not self.feed.store:
            self._waiting = self.feed.moved_to(store)
            if self.cursor is not None:  # it stands in the directory that is no longer in place
                name = self.cursor.name
                self.cursor.close()
                self.cursor = store.cursors.own(name, start=self.feed.position)
                self.cursor.set(self.feed.position, digest_at(store, self.feed.position))

    def stats(self) -> dict[str, int | str]:
        """Return counts for a person: items and wakes so far, position, lag, what wakes."""
        return {
            "delivered": self.feed.delivered,
            "wakes": self.wakes,
            "position": self.feed.position,
            "lag": self.lag(),
            "source": self.waker.source,
        }

    def lag(self) -> int:
        """Return how many durable lines lie ahead, filtered ones included."""
        return max(0, self.feed.store.last_seq() - self.feed.position)

    def acknowledge(self, item: Item) -> None:
        """Acknowledge everything up to this item now."""
        if self._pid != os.getpid():
            raise RegistryClosed("the cursor is the parent's, in a forked child")
        if self.cursor is None:
            message = "there is no cursor to acknowledge to: give watch(cursor=…)"
            raise ValueError(message)
        self.cursor.advance(item.seq, digest_of(item))

    def end(self) -> None:
        """Give every resource back."""
        self.waker.close()
        self.feed.close()
        if self.cursor is not None and self._pid == os.getpid():
            self.cursor.close()


class Watch(Closable):
    """An iterator over Change, Synced and Reset; also a context manager.

    One thread at a time may take items; `close` may come from any thread or a signal handler.
    """

    def __init__(self, vigil: Vigil) -> None:
        """Use `Registry.watch`."""
        self._vigil = vigil
        self._taking = threading.Lock()  # held while a thread is inside `next`
        self._pid = os.getpid()
        self._kept: list[Closable] = []
        weakref.finalize(self, vigil.end)  # who forgets to close gives it back all the same

    @property
    def position(self) -> int:
        """Return the seq up to which everything was delivered or filtered out."""
        return self._vigil.feed.position

    @property
    def lag(self) -> int:
        """Return how many durable lines lie ahead of the position, filtered ones included."""
        return self._vigil.lag()

    def next(self, timeout_s: float | None = None) -> Item | None:
        """Return the next item; None after `timeout_s` seconds without one, or once closed.

        Where no server of a cluster answers, it takes the registry's `lock_timeout_s` longer. With
        a cursor, taking an item acknowledges the one before.
        Raises: CompactedError if that was asked for; DataDamaged where the log is damaged.
        """
        self._mind_fork()
        try:
            with self._taking:
                return self._next(timeout_s)
        finally:
            if self._vigil.closed:
                self.close()  # whoever closed it could not let go while we were inside

    def _mind_fork(self) -> None:
        """Renew the mutex in a forked child: another thread of the parent may have held it."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._taking = threading.Lock()

    def _next(self, timeout_s: float | None) -> Item | None:
        vigil = self._vigil
        if not vigil.closed:
            vigil.begin()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not vigil.closed:
            item = vigil.look()
            if item is not None:
                return item
            wait_s = vigil.patience_s(deadline)
            if wait_s is None:
                return None
            if vigil.waker.wait(wait_s):
                vigil.wakes += 1
            elif vigil.overdue():
                self._safety_look()
        return None

    def _safety_look(self) -> None:
        vigil = self._vigil
        if vigil.moved_unseen() and not vigil.waker.wait(wake.WAKE_GRACE_S):
            vigil.distrust()
        vigil.check_place()

    def drain(self) -> list[Item]:
        """Return every item that is there now, without waiting."""
        items: list[Item] = []
        while (item := self.next(timeout_s=0)) is not None:
            items.append(item)
        return items

    @property
    def has_cursor(self) -> bool:
        """Say whether there is a cursor to acknowledge to."""
        return self._vigil.cursor is not None

    def ack(self, item: Item) -> None:
        """Acknowledge everything up to `item` to the cursor now, not at the next take."""
        self._vigil.acknowledge(item)

    def stats(self) -> dict[str, int | str]:
        """Return counts for a person: delivered, wakes, position, lag, source."""
        return self._vigil.stats()

    def keep(self, beside: Closable) -> None:
        """Close something else together with the watch."""
        self._kept.append(beside)

    def end(self) -> None:
        """End the iteration at once; an item in hand can still be acknowledged until `close`."""
        self._mind_fork()
        self._vigil.closed = True
        self._vigil.waker.wake()

    def close(self) -> None:
        """End the iteration at once; idempotent, from any thread or a signal handler.

        Everything is given back now, or by the thread that is inside `next` as it leaves.
        """
        self.end()
        if self._taking.acquire(blocking=False):
            try:
                self._vigil.end()
            finally:
                self._taking.release()
        while self._kept:
            self._kept.pop().close()

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> Item:
        """Wait for the next item; the iteration ends on `close`."""
        item = self.next()
        if item is None:
            raise StopIteration
        return item
