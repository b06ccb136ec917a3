"""Read what the lines of a store in a cluster come to: its workers, now and in the past."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Final, NamedTuple, cast

from crewlog import host
from crewlog.errors import (
    CompactedError,
    HistoryRewound,
    LogCorrupt,
    SnapshotCorrupt,
    StoreMissing,
    Unavailable,
)
from crewlog.etcd import layout as keys
from crewlog.etcd.address import EtcdAddress
from crewlog.etcd.client import Refused
from crewlog.etcd.cursors import EtcdCursors
from crewlog.etcd.layout import KeyValue, Room
from crewlog.etcd.leases import EtcdLeases
from crewlog.etcd.listen import EtcdChannel
from crewlog.etcd.reader import EtcdLines, Head, oldest_of
from crewlog.model import codec, events, fold
from crewlog.model.chain import follow
from crewlog.model.codec import DocumentError
from crewlog.model.events import JsonObject, Line, Record
from crewlog.model.fold import Fold, FoldError
from crewlog.model.limits import Limits
from crewlog.model.records import decode_record
from crewlog.model.snapshot import (
    Snapshot,
    decode_snapshot,
    empty_snapshot,
    refold_lines,
    snapshot_of,
    states_before,
)

RECORDS_A_PAGE: Final = 1000
PIECES_MAX: Final = 10_000
_TRIES: Final = 8


class Part(NamedTuple):
    """A sealed part of the history: its seqs, bytes, newest time, and when it was sealed."""

    first: int
    last: int
    size: int
    newest: str
    sealed_at: str


class EtcdState(EtcdLines):
    """The reading half of the store."""

    def __init__(self, address: EtcdAddress, *, wait_s: float, limits: Limits) -> None:
        """Read nothing yet."""
        super().__init__(address, wait_s=wait_s, limits=limits)
        self._fold: Fold | None = None
        self._folded: Head | None = None

    # -- the state --------------------------------------------------------------------------

    @contextmanager
    def state(self) -> Iterator[Fold]:
        """Hold the durable state of now still, while something is copied out of it."""
        with self.mutex:
            yield self._current()

    def _current(self) -> Fold:
        head = self.head()
        state, folded = self._fold, self._folded
        if state is None or folded is None or folded.seq > head.seq:
            return self._loaded()
        if folded.seq < head.seq:
            try:
                self._catch_up(state, folded, head)
            except CompactedError:  # retention took what we had not read
                return self._loaded()
            except BaseException:
                self._fold = None
                raise
            self._folded = head
        return state

    def _catch_up(self, state: Fold, folded: Head, head: Head) -> None:
        prev = folded.hash.hex()

        def diverged(seq: int) -> HistoryRewound:  # a backup came back, and has gone on since
            return self.went_back(seq, head.seq)

        for line, raw in self.lines(folded.seq, head.seq):
            prev = follow(state, line, raw, prev, diverged=diverged, wrong=self._unwritable)

    def _unwritable(self, line: Line, _raw: bytes, error: FoldError) -> LogCorrupt:
        return self.corrupt(line["seq"], str(error), proof="its crc is right")

    def _loaded(self) -> Fold:
        """Read every record, at one revision."""
        for _ in range(_TRIES):
            try:
                head, records = self.records()
            except Refused as error:
                if not error.compacted:  # the cluster forgot that revision under us: again
                    raise
            else:
                self._fold = fold.restored(head.seq, records, (), head.totals)
                self._folded = head
                return self._fold
        why = "the cluster forgot every revision before all of it was read"
        raise Unavailable(self.where, what="the records cannot be read", why=why)

    def records(self) -> tuple[Head, list[Record]]:
        """Read head and every record of one moment.

        Raises: Refused if it is compacted away.
        """
        begin, end = self.keys.room(Room.RECORD)
        page = keys.page(begin, end, limit=RECORDS_A_PAGE)
        before = self.seen
        answer = self.client.at_once(keys.get(self.keys.head), {"requestRange": page})
        head_row, rows = keys.ranges(answer)
        head = self.saw(head_row, before=before)
        revision = keys.number(cast("JsonObject", answer["header"]), "revision")
        records: list[Record] = []
        while rows:
            records += [self.decoded(row) for row in rows]
            if len(rows) < RECORDS_A_PAGE:
                break
            page = keys.page(rows[-1].key + b"\0", end, limit=RECORDS_A_PAGE, revision=revision)
            rows = keys.pairs(self.client.call("kv/range", page))
        return head, records

    def decoded(self, row: KeyValue) -> Record:
        """Check and parse a record."""
        try:
            return decode_record(row.value)
        except DocumentError as error:
            raise SnapshotCorrupt(
                f"{self.where}: key {row.key.decode()}", why=str(error)
            ) from error

    def record(self, sid: str) -> Record | None:
        """Return one worker's durable record of now."""
        _, (row,) = self.look(keys.get(self.keys.named(Room.RECORD, sid)))
        return self.decoded(row[0]) if row else None

    # -- the past ---------------------------------------------------------------------------

    def parts(self) -> list[Part]:
        """Return the sealed parts of the history that are kept, oldest first."""
        sealed: JsonObject = {"requestRange": keys.page(*self.keys.room(Room.PART), limit=0)}
        head, (rows, first) = self.look(sealed, keys.first_of(*self.keys.room(Room.EVENT)))
        oldest = oldest_of(head, first)
        return [part for part in map(self._part, rows) if part.first >= oldest]

    def _part(self, row: KeyValue) -> Part:
        try:
            fields = codec.load_object(row.value)
            last, size, newest, at = (fields[name] for name in ("last", "size", "newest", "at"))
            if type(last) is not int or type(size) is not int:
                raise DocumentError("a field has the wrong shape")
            events.utc(str(at))
            return Part(int(row.name), last, size, str(newest), str(at))
        except (DocumentError, KeyError, ValueError) as error:
            where = f"{self.where}: key {row.key.decode(errors='replace')}"
            raise SnapshotCorrupt(where, why=str(error)) from error

    def firsts(self) -> Sequence[int]:
        """Return the first seqs of the parts of the history; all but the last are sealed."""
        parts = self.parts()
        return [*(p.first for p in parts), parts[-1].last + 1 if parts else self.first_seq()]

    def since_boot(self, boot: str) -> int | None:  # noqa: ARG002 (it is of many hosts)
        """Return None: the history of many hosts tells nothing of the boots of one."""
        return None

    def begins(self, first: int) -> str:
        """Return the time of a part's first line, as the log writes it."""
        return next((line["ts"] for line, _ in self.lines(first - 1, first)), "")

    def snapshots(self) -> Iterator[Snapshot]:
        """Yield every older state that is kept whole, the empty one too, and that of now."""
        yield self.empty()
        with contextlib.suppress(SnapshotCorrupt):  # retention was killed while it wrote it
            base = self.read_base()
            if base is not None:
                yield base
        yield self.snapshot()

    def nearest(self, seq: int) -> Iterator[Snapshot]:
        """Return the states at or before `seq` that lines lead on from, the nearest first."""
        return iter(states_before(self.snapshots(), seq, oldest=self.first_seq()))

    def empty(self) -> Snapshot:
        """Return the state before the first event."""
        return empty_snapshot(self.id, self.digest)

    def snapshot(self) -> Snapshot:
        """Return the state of now."""
        with self.state() as state:
            head = self._folded
            assert head is not None  # the state was just read
            at = events.timestamp(host.now())
            return snapshot_of(state, store=self.id, last_hash=head.hash.hex(), written_at=at)

    def read_base(self) -> Snapshot | None:
        """Return the state before the oldest event that is kept; None if no retention left one.

        Raises: SnapshotCorrupt.
        """
        page = keys.page(*self.keys.room(Room.BASE), limit=PIECES_MAX)
        groups: dict[bytes, list[bytes]] = {}
        firsts: set[bytes] = set()
        for row in keys.pairs(self.client.call("kv/range", page)):
            groups.setdefault(row.key.rpartition(b"/")[0], []).append(row.value)
            firsts.add(row.key)
        worst: SnapshotCorrupt | None = None
        whole = [key for key in groups if key + b"/0000" in firsts]  # piece 0 is written last
        for key in sorted(whole, reverse=True):
            try:
                return self._base_of(b"".join(groups[key]))
            except DocumentError as error:
                worst = SnapshotCorrupt(f"{self.where}: {key.decode()}", why=str(error))
        if worst is not None:
            raise worst
        return None

    def _base_of(self, data: bytes) -> Snapshot:
        base = decode_snapshot(data)
        if base.store != self.id:
            raise DocumentError("it is another store's")
        return base

    def fold_to(self, start: Snapshot, seq: int, *, seen: Callable[[Line], None]) -> Snapshot:
        """Return the state at a durable seq from an older one; `seen` is told of each line."""
        lines = self.lines(start.last_seq, seq)
        return refold_lines(
            lines,
            start,
            seq,
            where=self.where,
            wrong=self._unwritable,
            written_at=events.timestamp(host.now()),
            seen=seen,
        )

    def compacted(self) -> tuple[int, datetime] | None:
        """Return what seq the last compaction sealed, and when; None before the first."""
        parts = self.parts()
        return (parts[-1].last, events.utc(parts[-1].sealed_at)) if parts else None

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the sealed history, and of the cluster's whole database."""
        database = keys.number(self.client.call("maintenance/status", {}), "dbSize")
        return {"history": sum(part.size for part in self.parts()), "database": database}

    # -- its readers and workers ------------------------------------------------------------

    @property
    def channel(self) -> EtcdChannel:
        """Return what tells of changes."""
        return EtcdChannel(self.address, self.keys.head, self.id, self.limits.safety_look_s)

    @property
    def cursors(self) -> EtcdCursors:
        """Return the durable positions of subscribers."""
        return EtcdCursors(self.client, self.keys, self.limits)

    @property
    def leases(self) -> EtcdLeases:
        """Return what workers hold while they live."""
        return EtcdLeases(self.client, self.keys, self.limits)

    def is_ours(self) -> bool:
        """Say yes: a connection that was closed is made anew."""
        return True

    def is_in_place(self) -> bool:
        """Say whether this store is still under the prefix; True where nothing is there."""
        if self.rewound:
            return False
        try:
            self.head()
        except StoreMissing:
            return True
        except HistoryRewound:
            return False
        return True

    def renew_mutex(self) -> None:
        """Begin with mutexes that nobody holds, and nothing half folded."""
        super().renew_mutex()
        self._fold = self._folded = None

    def renew(self) -> None:
        """Do nothing: whatever is read is read anew."""
