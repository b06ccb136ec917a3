"""Turn a position into items: every durable event after it, once, in order.

Level-triggered: arm the waker, read head/durable, deliver up to it, then wait. The log is the
buffer, so a slow watcher costs the writers nothing and itself no more than one read chunk.
"""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

from crewlog import layout, segments
from crewlog.codec import DurableHead
from crewlog.errors import SegmentMissing
from crewlog.events import Change, Item, Line, Reset, State, Synced, event_of
from crewlog.log import Log
from crewlog.notify import Waker
from crewlog.segments import Position, Reader

After: TypeAlias = int | Literal["now", "oldest"] | None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events a watcher wants; None: all of the workers' events."""

    sids: frozenset[str] | None = None
    types: frozenset[str] | None = None

    def wants(self, line: Line) -> bool:
        """Say whether the event is to be delivered; the store's own only where named by type."""
        kind = line["type"]
        if self.types is None:
            if kind.startswith("_"):
                return False
        elif kind not in self.types:
            return False
        return self.sids is None or line["sid"] in self.sids


class Watch:
    """An iterator over Change, Synced and Reset; also a context manager.

    One thread at a time may take items; `close` may come from any thread or a signal handler.
    """

    def __init__(
        self,
        log: Log,
        *,
        after: After,
        wanted: Filter,
        waker: Waker,
        state: Callable[[], State],
    ) -> None:
        """Begin after seq `after`; None: with the state of now, "now": with nothing before."""
        self._log = log
        self._wanted = wanted
        self._waker = waker
        self._state = state
        self._closed = False
        self._lines: Iterator[tuple[Line, bytes]] | None = None
        self._reader: Reader | None = None
        self._announced = False
        self._first: State | None = None
        self._position = self._begin(after)

    def _begin(self, after: After) -> int:
        match after:
            case None:
                self._first = self._state()
                return self._first.seq
            case "now":
                return self._log.last_seq()
            case "oldest":
                return segments.all_of(self._log.directory)[0] - 1
            case _:
                return min(after, self._log.last_seq())

    # -- taking items -----------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Return the seq up to which everything was delivered or filtered out."""
        return self._position

    @property
    def lag(self) -> int:
        """Return how many durable events lie ahead of the position, filtered ones included."""
        return max(0, self._log.last_seq() - self._position)

    def next(self, timeout_s: float | None = None) -> Item | None:
        """Return the next item; None after `timeout_s` without one, or once closed.

        *Raises* DataDamaged where the log is damaged, SegmentMissing where a part is gone that
        no snapshot covers.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._closed:
            item = self._look()
            if item is not None:
                return item
            left_s = layout.SAFETY_LOOK_S
            if deadline is not None:
                left_s = min(left_s, deadline - time.monotonic())
                if left_s <= 0:
                    return None
            self._waker.wait(left_s)
        return None

    def drain(self) -> list[Item]:
        """Return every item that is there now, without waiting."""
        items: list[Item] = []
        while (item := self.next(timeout_s=0)) is not None:
            items.append(item)
        return items

    def _look(self) -> Item | None:
        """Deliver from the read under way, else from what has become durable since."""
        try:
            while True:
                item = self._delivered()
                if item is not None:
                    return item
                head = self._log.head()
                if head.seq <= self._position:
                    return self._announce()
                self._lines = self._read(head)
        except SegmentMissing as error:
            return self._reset(error)

    def _delivered(self) -> Item | None:
        if self._lines is None:
            return None
        for line, raw in self._lines:
            if line["seq"] <= self._position:
                continue  # the segment began before the position
            self._position = line["seq"]
            if self._wanted.wants(line):
                return Change(event=event_of(line, raw))
        self._lines = None
        return None

    def _announce(self) -> Item | None:
        if self._announced:
            return None
        self._announced = True
        first, self._first = self._first, None
        return Synced(seq=self._position, state=first)

    def _read(self, head: DurableHead) -> Iterator[tuple[Line, bytes]]:
        if self._reader is None:
            self._reader = self._log.reader(self._position)
        return self._reader.read(Position(head.segment, head.end, head.seq))

    def _reset(self, error: SegmentMissing) -> Reset:
        """Go on from the state, where the snapshot makes good what is gone."""
        state = self._state()
        if state.seq < error.last:
            raise error
        lost = (self._position + 1, state.seq)
        self._position = state.seq
        self._reader = self._lines = None
        return Reset(seq=state.seq, reason="compacted", lost=lost, state=state)

    # -- life -------------------------------------------------------------------------------

    def close(self) -> None:
        """End the iteration; idempotent."""
        self._closed = True
        self._waker.wake()

    def _release(self) -> None:
        self.close()
        self._waker.close()
        if self._reader is not None:
            self._reader.close()

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> Item:
        """Wait for the next item; the iteration ends on `close`."""
        item = self.next()
        if item is None:
            self._release()
            raise StopIteration
        return item

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close, and give every resource back."""
        self._release()


EVERYTHING: Final = Filter()


def filter_of(sids: Collection[str] | None, types: Collection[str] | None) -> Filter:
    """Build a filter from what a caller gave."""
    return Filter(
        sids=None if sids is None else frozenset(sids),
        types=None if types is None else frozenset(types),
    )
