"""Turn a position into items: every durable event after it, once, in order. Waits for nothing.

The log is the buffer: a feed holds a position and one read chunk, so a slow reader costs the
writers nothing and itself no more than that. What is delivered is durable.
"""

from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from typing import Literal, NamedTuple, TypeAlias

from crewlog.errors import CompactedError, SegmentMissing
from crewlog.model import codec, events
from crewlog.model.events import Line, event_of
from crewlog.model.items import Change, Item, Reset, Synced, diff_of
from crewlog.model.sieve import Sieve, sid_needle
from crewlog.model.state import State, state_of
from crewlog.store import Store, Tail, oldest_state, retried

After: TypeAlias = int | Literal["now", "oldest"] | datetime | None
OnCompacted: TypeAlias = Literal["reset", "raise"]


class Filter(NamedTuple):
    """Which events a reader wants; None: all of the workers' events."""

    sids: frozenset[str] | None = None
    types: frozenset[str] | None = None

    def wants(self, line: Line) -> bool:
        """Say whether the event is to be delivered; the store's own only where named by type."""
        kind = line["type"]
        if self.types is None:
            if events.is_own(kind):
                return False
        elif kind not in self.types:
            return False
        return self.sids is None or line["sid"] in self.sids

    def sieve(self, since: str = "") -> Sieve | None:
        """Return what a wanted line must have, so that the others need not be parsed."""
        needles = None
        if self.sids is not None:
            needles = [sid_needle(sid) for sid in sorted(self.sids)]
        elif self.types is not None:
            needles = [b'"type":"%b"' % _bytes(kind) for kind in sorted(self.types)]
        return None if needles is None and not since else Sieve(needles, since.encode())


def filter_of(sids: Collection[str] | None, types: Collection[str] | None) -> Filter:
    """Build a filter from what a caller gave; a single string is a mistake, not a collection."""
    if isinstance(sids, str) or isinstance(types, str):
        message = "sids and types are collections of strings: give a list"
        raise TypeError(message)
    for one in (*(sids or ()), *(types or ())):
        if not isinstance(one, str):
            message = f"sids and types are strings, not {type(one).__name__}: {one!r}"
            raise TypeError(message)
    return Filter(
        sids=None if sids is None else frozenset(sids),
        types=None if types is None else frozenset(types),
    )


class Feed:
    """Items from a position on; one thread at a time may look."""

    def __init__(
        self,
        store: Store,
        *,
        after: After,
        wanted: Filter,
        on_compacted: OnCompacted,
        state: Callable[[], State],
        digest: int = 0,
    ) -> None:
        """Begin after seq `after`; None: with the state of now, "now": with nothing before.

        `digest` says which line a cursor saw at `after`; another one there is another store's.
        """
        self.store = store
        self.seen_seq = 0  # the newest head that was looked at
        self.delivered = 0
        self.unfinished = False  # the last look stopped early, with more to read
        self._wanted = wanted
        self._on_compacted = on_compacted
        self._state = state
        self._lines: Iterator[tuple[Line, bytes]] | None = None
        self._tail: Tail | None = None
        self._first: State | None = None
        self._revs: dict[str, int] | None = None
        self._announced = False
        self._replaced = False
        self._passed: tuple[int, bytes] | None = None  # the last line that was looked at
        self._mark = store.mark()
        self.position = self._begin(after, digest)

    def _begin(self, after: After, digest: int) -> int:
        match after:
            case None:
                self._first = self._state()
                self._revs = self._first.workers.revs()
                return self._first.seq
            case "now":
                return self.store.last_seq()
            case "oldest":
                return self.store.first_seq() - 1
            case datetime():
                return self._before(events.timestamp(after))
            case _:
                last = self.store.last_seq()
                # this store never was that far, or has another past: a backup came back
                self._replaced = after > last or not self._saw(after, digest)
                return min(after, last)

    def _saw(self, seq: int, digest: int) -> bool:
        return not digest or digest_at(self.store, seq) in {0, digest}

    @property
    def digest(self) -> int:
        """Return which line stands at the position; 0 where it was not looked at."""
        if self._passed is None or self._passed[0] != self.position:
            return 0
        return codec.short_digest(self._passed[1])

    def _before(self, ts: str) -> int:
        sieve = Sieve(None, ts.encode())  # where the clock stepped back, the first is meant

        def first() -> int | None:
            lines = self.store.read(self.store.first_seq() - 1, sieve=sieve)
            return next((line["seq"] - 1 for line, _ in lines if line["ts"] >= ts), None)

        before = retried(first, CompactedError)
        return self.store.last_seq() if before is None else before

    def look(self, lines_max: int | None = None) -> Item | None:
        """Return the next item that is there now, None if there is none.

        With `lines_max` it stops after so many lines that were not wanted, and says so in
        `unfinished`.
        Raises: CompactedError if asked to; DataDamaged where the log is damaged.
        """
        self.unfinished = False
        if self._replaced:
            self._replaced = False
            return self._reset("replaced")
        if self._first is not None:  # before anything that came after it
            first, self._first, self._announced = self._first, None, True
            return Synced(seq=first.seq, state=first)
        try:
            while True:
                item = self._delivered(lines_max)
                if item is not None or self.unfinished:
                    return item
                head = self.seen_seq = self.store.last_seq()
                if head <= self.position:
                    return self._announce()
                if self._tail is None:
                    self._tail = self.store.tail(self.position, sieve=self._wanted.sieve())
                self._lines = self._tail.read(head)
        except CompactedError as error:
            return self._compacted(error)
        except SegmentMissing as error:
            oldest = self.store.first_seq()
            if oldest <= error.first:
                raise  # a hole, not the beginning
            return self._compacted(CompactedError(requested=self.position + 1, oldest=oldest))

    def _delivered(self, lines_max: int | None) -> Item | None:
        if self._lines is None or self._tail is None:
            return None
        passed = 0
        for line, raw in self._lines:
            if line["seq"] <= self.position:
                continue  # the segment began before the position
            self.position = line["seq"]
            self._passed = (self.position, raw)
            if line["type"] == events.GAP:
                return self._gap(line)
            if self._revs is not None:
                self._remember(line)
            if self._wanted.wants(line):
                self.delivered += 1
                return Change(event=event_of(line, raw))
            passed += 1
            if passed == lines_max:
                self.unfinished = True
                return None
        self._lines = None
        self.position = max(self.position, self._tail.seq)
        return None

    def _remember(self, line: Line) -> None:
        assert self._revs is not None  # the caller looked
        if line["type"] == events.PRUNED:
            self._revs.pop(line["sid"], None)
        elif line["type"] in events.WORKER_TYPES:  # another one, of a newer version, tells nothing
            self._revs[line["sid"]] = line["seq"]

    def _announce(self) -> Item | None:
        if self._announced:
            return None
        self._announced = True
        return Synced(seq=self.position, state=None)

    # -- what cannot be delivered -----------------------------------------------------------

    def _compacted(self, error: CompactedError) -> Reset:
        self._drop_tail()
        if self._on_compacted == "raise":
            raise error
        return self._reset("compacted", self._before_oldest())

    def _before_oldest(self) -> State | None:
        """Return the oldest state that what is kept leads on from; None if there is none."""
        oldest = oldest_state(self.store, max(self.store.first_seq(), self.position + 1))
        return None if oldest is None else state_of(oldest.last_seq, oldest.records())

    def _gap(self, line: Line) -> Reset:
        """Tell of events that a repair gave up."""
        first = line["data"].get("first")
        self.position = first - 1 if isinstance(first, int) else line["seq"] - 1
        self._drop_tail()
        if self._on_compacted == "raise":
            raise CompactedError(requested=self.position + 1, oldest=line["seq"] + 1)
        return self._reset("lost")

    def _reset(
        self, reason: Literal["compacted", "lost", "replaced"], state: State | None = None
    ) -> Reset:
        """Go on from a state, by default that of now; it makes good what cannot be delivered."""
        state = state or self._state()
        before, self._revs = self._revs, self._revs and state.workers.revs()
        self._passed = None
        lost = None if reason == "replaced" else (self.position + 1, state.seq)
        self.position = state.seq
        self._first = None
        return Reset(
            seq=state.seq,
            reason=reason,
            lost=lost,
            state=state,
            diff=None if before is None else diff_of(before, state.workers.revs()),
        )

    def moved_to(self, store: Store) -> Reset | None:
        """Go on with the store that is in place now; a Reset unless it continues this one."""
        continues = self._is_continued_by(store)
        reset = None if continues else self._reset("replaced")  # may raise: then nothing has moved
        self.store, self._mark = store, store.mark()
        self._drop_tail()
        return reset

    def _is_continued_by(self, store: Store) -> bool:
        """Say whether it is the same, opened anew, or has the last line that was looked at."""
        if self._mark is not None and store.mark() == self._mark:
            return store.last_seq() >= self.position
        if store.id != self.store.id or self._passed is None:
            return False
        seq, raw = self._passed
        if seq != self.position or store.last_seq() < seq or store.first_seq() > seq:
            return False
        return next((there == raw for _, there in store.read(seq - 1)), False)

    def _drop_tail(self) -> None:
        self._lines = None
        if self._tail is not None:
            tail, self._tail = self._tail, None  # first: an interrupt must not leave it closed
            tail.close()

    def rearm(self, store: Store) -> None:
        """Begin anew at the same position, in a forked child."""
        self.store = store
        self._drop_tail()

    def close(self) -> None:
        """Close what is open."""
        self._drop_tail()


def digest_at(store: Store, seq: int) -> int:
    """Return which line stands at a seq; 0 where there is none any more, or a gap in its place."""
    if seq < max(store.first_seq(), 1) or seq > store.last_seq():
        return 0
    try:
        line, raw = next(store.read(seq - 1), (None, b""))
    except (CompactedError, SegmentMissing):  # dropped meanwhile
        return 0
    return 0 if line is None or line["type"] == events.GAP else codec.short_digest(raw)


def digest_of(item: Item) -> int:
    """Return which line an item is; 0 for a state."""
    return codec.short_digest(item.event.raw) if item.kind == "change" else 0


def _bytes(name: str) -> bytes:
    """Return a name as the log has it; what none can have (a lone surrogate) finds nothing."""
    return name.encode(errors="backslashreplace")
