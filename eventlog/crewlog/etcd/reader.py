"""Read the lines of a store in a cluster: head first, so that nothing beyond it is asked for.

Lines are read by their keys, a page at a time, and checked as those of a directory are.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Generic, NamedTuple, TypeVar, cast

from crewlog import host
from crewlog.errors import (
    CompactedError,
    HistoryRewound,
    LogCorrupt,
    NotAStore,
    SegmentMissing,
    StoreMissing,
)
from crewlog.etcd import layout as keys
from crewlog.etcd.address import EtcdAddress
from crewlog.etcd.client import Client
from crewlog.etcd.layout import Keys, KeyValue, Room
from crewlog.model import chain, codec, events
from crewlog.model.codec import DocumentError, LineError
from crewlog.model.events import JsonObject, Line
from crewlog.model.limits import Limits
from crewlog.model.sieve import Sieve, type_needle
from crewlog.store import Kind

KEYS_A_PAGE: Final = 256
NEWEST_LINES_MAX: Final = 1000  # that watchers of one process share

_SEQ_AT = len(b'{"v":1,"seq":')

T = TypeVar("T")


class Head(NamedTuple):
    """How far the log goes; `raw` are the very bytes, which an append compares with."""

    raw: bytes
    store: str
    seq: int
    hash: bytes
    totals: dict[str, int]


def encode_head(store: str, seq: int, hash_: bytes, totals: dict[str, int]) -> Head:
    """Return a head as it is written."""
    raw = codec.dump({"store": store, "seq": seq, "hash": hash_.hex(), "totals": totals})
    return Head(raw, store, seq, hash_, totals)


class EtcdLines:
    """Head and lines of the store under one prefix."""

    def __init__(self, address: EtcdAddress, *, wait_s: float, limits: Limits) -> None:
        """Read nothing yet."""
        self.limits = limits
        self.where = str(address)
        self.address = address
        self.wait_s = wait_s
        self.client = Client(address, wait_s=wait_s)
        self.keys = Keys(address.prefix)
        self.id = ""
        self.digest = b""
        self._identity = b""
        self.unit_workers_max = keys.TXN_WORKERS_MAX
        self.kind: Kind = "etcd"
        self.one_host = False
        self.remote = True
        self.mutex = threading.RLock()  # guards all below
        self._heads: Rides[Head] = Rides()
        self._newest = Newest()
        self.seen: Head | None = None  # the newest that was read
        self.rewound = False  # another history is in place: whoever holds this one opens it again

    # -- head -------------------------------------------------------------------------------

    def identify(self) -> None:
        """Learn who the store is.

        Raises: StoreMissing, NotAStore, FormatTooNew.
        """
        identity, head = self.ask([keys.get(self.keys.store), keys.get(self.keys.head)])
        if not identity or not head:
            raise self._missing()
        where = f"{self.where}: key {self.keys.store.decode()}"
        try:
            self.id = codec.decode_identity(identity[0].value, where=where)
        except DocumentError as error:
            raise self._broken(self.keys.store, str(error)) from error
        self._identity, self.digest = identity[0].value, codec.digest(identity[0].value)
        self.saw(head, before=None)

    def _missing(self) -> StoreMissing:
        if self.ask([keys.get(self.keys.migration)])[0]:
            return StoreMissing(
                self.where,
                why="a migration into it has not been finished",
                remedy="Run the same `crewlog migrate` again: it begins anew",
            )
        return StoreMissing(self.where, why="there is none under this prefix")

    def _broken(self, key: bytes, why: str) -> NotAStore:
        return NotAStore(
            "not a registry",
            where=f"{self.where}: key {key.decode()}",
            why=why,
            remedy="Choose another prefix, or restore the cluster from a backup",
        )

    def ask(self, wanted: Sequence[JsonObject]) -> list[list[KeyValue]]:
        """Read several keys or ranges at one moment."""
        return keys.ranges(self.client.at_once(*wanted))

    def look(self, *wanted: JsonObject) -> tuple[Head, list[list[KeyValue]]]:
        """Read head and more at one moment.

        Raises: StoreMissing, HistoryRewound.
        """
        before = self.seen
        head_row, *more = self.ask([keys.get(self.keys.head), *wanted])
        return self.saw(head_row, before=before), more

    def saw(self, row: Sequence[KeyValue], *, before: Head | None) -> Head:
        """Take over a head that was read; `before` had been seen when it was asked for.

        Raises: StoreMissing, HistoryRewound.
        """
        if not row:
            raise StoreMissing(self.where, why="it was removed")
        head = self._decoded(row[0].value)
        if head.store != self.id or (before is not None and not _follows(before, head)):
            raise self.went_back(before.seq if before else 0, head.seq)
        self.seen = head
        return head

    def went_back(self, seen: int, now: int) -> HistoryRewound:
        """Note that this is not the history that was seen, and return the error."""
        self.rewound = True
        return HistoryRewound(self.where, seen=seen, found=now)

    def _decoded(self, raw: bytes) -> Head:
        try:
            fields = codec.load_object(raw)
            seq, totals = fields["seq"], fields["totals"]
            if type(seq) is not int or not isinstance(totals, dict):
                raise self._broken(self.keys.head, "a field has the wrong shape")
            hash_ = bytes.fromhex(str(fields["hash"]))
            return Head(raw, str(fields["store"]), seq, hash_, cast("dict[str, int]", totals))
        except (DocumentError, KeyError, ValueError) as error:
            raise self._broken(self.keys.head, str(error)) from error

    def head(self) -> Head:
        """Return how far events are durable, now."""
        return self._heads.ask(lambda: self.look()[0])

    def last_seq(self) -> int:
        """Return the seq of the last durable line."""
        return self.head().seq

    def first_seq(self) -> int:
        """Return the seq of the oldest line that is kept."""
        head, (first,) = self.look(keys.first_of(*self.keys.room(Room.EVENT)))
        return oldest_of(head, first)

    # -- lines ------------------------------------------------------------------------------

    def read(self, after: int, *, sieve: Sieve | None = None) -> Iterator[tuple[Line, bytes]]:
        """Yield the durable lines after seq `after` that the sieve holds, up to the last of now.

        Raises: CompactedError where the line after `after` is no longer kept.
        """
        head = self.head()
        if after < head.seq:
            yield from self.lines(after, head.seq, sieve=sieve)

    def lines(
        self, after: int, stop: int, *, sieve: Sieve | None = None
    ) -> Iterator[tuple[Line, bytes]]:
        """Yield the lines after seq `after` up to the durable seq `stop`."""
        due = after + 1
        for row in self.transactions(after, stop):
            data = lines_of(row)
            begin, last = _first_seq(data), int(row.name)
            if begin > due:
                raise self._gone(due, begin - 1)
            for line, raw in self._wanted(data, begin, last, sieve):
                if after < line["seq"] <= stop:
                    yield line, raw
            due = last + 1
        if due <= stop:
            raise self._gone(due, stop)

    def newest(self, after: int, stop: int, *, sieve: Sieve | None) -> Iterable[tuple[Line, bytes]]:
        """Return lines as `lines` does; the newest are read once for all watchers, unsieved."""
        if stop - after > NEWEST_LINES_MAX:
            return self.lines(after, stop, sieve=sieve)
        return self._newest.between(after, stop, lambda: list(self.lines(after, stop)))

    def transactions(self, after: int, stop: int) -> Iterator[KeyValue]:
        """Yield what was written together, from the line after seq `after` to that of `stop`."""
        for row in self._pages(self.keys.event(after + 1), self.keys.room(Room.EVENT)[1]):
            yield row
            if int(row.name) >= stop:
                return

    def all_keys(self, begin: bytes, end: bytes) -> Iterator[bytes]:
        """Yield the keys of a range."""
        return (row.key for row in self._pages(begin, end, keys_only=True))

    def _pages(self, begin: bytes, end: bytes, *, keys_only: bool = False) -> Iterator[KeyValue]:
        while True:
            page = keys.page(begin, end, limit=KEYS_A_PAGE)
            rows = keys.pairs(self.client.call("kv/range", {**page, "keysOnly": keys_only}))
            yield from rows
            if len(rows) < KEYS_A_PAGE:
                return
            begin = rows[-1].key + b"\0"

    def _wanted(
        self, data: bytes, begin: int, last: int, sieve: Sieve | None
    ) -> Iterator[tuple[Line, bytes]]:
        """Parse the lines of one transaction that the sieve holds."""
        seq = begin - 1
        for at, end in (sieve or Sieve()).lines(data):
            raw = data[at:end]
            line = self._parsed(raw, seq + 1)
            ordered = chain.follows(line, seq + 1) if sieve is None else line["seq"] > seq
            if not ordered or line["seq"] > last:
                raise self.corrupt(seq + 1, f"seq is {line['seq']}")
            seq = line["seq"]
            yield line, raw
        if sieve is None and seq != last:
            raise self.corrupt(seq + 1, f"its key says that seq {last} is the last")

    def _parsed(self, raw: bytes, seq: int) -> Line:
        try:
            return codec.parse(raw)
        except LineError as error:
            raise self.corrupt(seq, str(error)) from error

    def corrupt(
        self, seq: int, reason: str, *, proof: str = "these bytes were durable"
    ) -> LogCorrupt:
        """Return the error of a line that is not what was written."""
        where = f"{self.where}: key {self.keys.event(seq).decode()}"
        error = LogCorrupt(where, offset=0, seq=seq, reason=reason, proof=proof)
        error.remedy = "Restore a backup of the cluster; `crewlog verify` says what else is damaged"
        return error

    def _gone(self, due: int, last: int) -> CompactedError | SegmentMissing:
        """Return why lines are not there: retention took them, or nobody may have."""
        oldest = self.first_seq()
        if due < oldest:
            return CompactedError(requested=due, oldest=oldest)
        return SegmentMissing(self.where, first=due, last=last)

    def backwards(self, *, sieve: Sieve | None = None) -> Iterator[tuple[Line, bytes]]:
        """Yield the durable lines that the sieve holds, the newest first."""
        due = self.head().seq
        oldest = self.first_seq()
        while due >= oldest:
            page = keys.page(
                self.keys.event(oldest),
                self.keys.event(due) + b"\0",
                limit=KEYS_A_PAGE,
                newest_first=True,
            )
            for row in keys.pairs(self.client.call("kv/range", page)):
                data, last = lines_of(row), int(row.name)
                begin = _first_seq(data)
                if last != due:
                    raise SegmentMissing(self.where, first=last + 1, last=due)
                yield from reversed(list(self._wanted(data, begin, last, sieve)))
                due = begin - 1
            oldest = max(oldest, self.first_seq())

    def tail(self, after: int, *, sieve: Sieve | None = None) -> "EtcdTail":
        """Return what reads on from seq `after`.

        Raises: CompactedError as `read` does.
        """
        oldest = self.first_seq()
        if after + 1 < oldest:
            raise CompactedError(requested=after + 1, oldest=oldest)
        return EtcdTail(self, after, sieve)

    def mark(self) -> None:
        """Say that it is not known; this store is opened once, and lines can be compared."""

    def identity(self) -> bytes:
        """Return what says who the store is."""
        return self._identity

    def renew_mutex(self) -> None:
        """Begin with mutexes that nobody holds."""
        self.mutex = threading.RLock()
        self._heads = Rides()
        self._newest = Newest()

    @property
    def closed(self) -> bool:
        """Say whether it was closed."""
        return self.client.closed


class Newest:
    """The newest lines that watchers read, kept for those who come a moment later."""

    def __init__(self) -> None:
        """Keep none yet."""
        self._mutex = threading.Lock()
        self._kept: list[tuple[Line, bytes]] = []
        self._after = self._last = 0  # what is kept: the lines after the one seq, up to the other

    def between(
        self, after: int, stop: int, read: Callable[[], list[tuple[Line, bytes]]]
    ) -> list[tuple[Line, bytes]]:
        """Return the lines after a seq up to another one; `read` gets what is not kept."""
        with self._mutex:
            if not self._after <= after <= stop <= self._last:
                lines = read()
                if after != self._last or len(self._kept) > NEWEST_LINES_MAX:
                    self._kept, self._after = [], after
                self._kept += lines
                self._last = stop
                return lines
            return [(line, raw) for line, raw in self._kept if after < line["seq"] <= stop]


class EtcdTail:
    """Lines from a position on; see store.Tail."""

    __slots__ = ("_hash", "_log", "_sieve", "seq")

    def __init__(self, log: EtcdLines, after: int, sieve: Sieve | None) -> None:
        """Begin after a seq."""
        self._log = log
        self._sieve = sieve
        self._hash = ""  # of the line at `seq`, where that was read
        self.seq = after

    def read(self, head: int) -> Iterator[tuple[Line, bytes]]:
        """Yield the lines up to the durable seq `head`."""
        for line, raw in self._log.newest(self.seq, head, sieve=self._sieve):
            if self._hash and line["seq"] == self.seq + 1 and line["prev"] != self._hash:
                raise self._log.went_back(self.seq, head)  # a backup came back, and has grown since
            self.seq, self._hash = line["seq"], chain.hash_after(line, raw).hex()
            yield line, raw
        if self.seq < head:  # lines that the sieve let pass by
            self.seq, self._hash = head, ""

    def close(self) -> None:
        """Close nothing: nothing stays open."""


def _follows(before: Head, head: Head) -> bool:
    """Say whether a head may come after one that was seen."""
    return head.seq > before.seq or (head.seq == before.seq and head.hash == before.hash)


def lines_of(row: KeyValue) -> bytes:
    """Return the lines of a transaction, without the token behind them."""
    return row.value[: row.value.rfind(b"\n") + 1]


def oldest_of(head: Head, first: Sequence[KeyValue]) -> int:
    """Return the seq of the oldest line that is kept, by the first key of the lines."""
    return begin_of(first[0]) if first else head.seq + 1


def begin_of(row: KeyValue) -> int:
    """Return the first seq of a transaction; of a gap, the first that it stands for."""
    return _first_seq(lines_of(row))


def token_of(row: KeyValue) -> bytes:
    """Return the token of the attempt that wrote a transaction."""
    return row.value[row.value.rfind(b"\n") + 1 :]


def _first_seq(data: bytes) -> int:
    """Return the seq of the first line; of a gap, the first that it stands for."""
    first = data[: data.find(b"\n")]
    if type_needle(events.GAP) in first:
        seq = codec.parse(first)["data"].get("first")
        if isinstance(seq, int):
            return seq
    digits = first[_SEQ_AT : first.find(b",", _SEQ_AT)]
    return int(digits) if digits.isdigit() else 0


# -- many who ask at once ------------------------------------------------------------------


class Rides(Generic[T]):
    """One question, and its newest answer."""

    def __init__(self) -> None:
        """Begin without an answer."""
        self._asking = threading.Lock()
        self._counting = threading.Lock()
        self._begun = 0  # how many times it was asked
        self._answered = 0  # which time the answer is of
        self._answer: T | None = None
        self._error: Exception | None = None

    def ask(self, question: Callable[[], T]) -> T:
        """Return the answer to a question that is asked from now on; an error is shared, too."""
        with self._counting:
            came = self._begun
        with self._asking:
            if self._answered <= came:
                self._ask(question)
            if self._error is not None:
                raise host.own_copy(self._error)
            return self._answer  # type: ignore[return-value] # there is one, or an error

    def _ask(self, question: Callable[[], T]) -> None:
        with self._counting:
            self._begun += 1
            number = self._begun
        self._answer = self._error = None
        try:
            self._answer = question()
        except Exception as error:  # noqa: BLE001 (each rider raises it)
            self._error = error
        self._answered = number
