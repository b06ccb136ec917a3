"""Read what is durable: the head, the state, the lines. Takes no lock, changes nothing.

The head is read before the log, else a busy writer would look like a shortened log. After a reboot,
and before the first write, the durable end is what a recovery would find.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from crewlog import disk, events, identity, layout, segments, snapshot, structs, tail
from crewlog.codec import Snapshot
from crewlog.current import Current
from crewlog.cursor import Cursors
from crewlog.directory import Directory
from crewlog.errors import CompactedError, SegmentMissing, StoreMissing, from_oserror
from crewlog.events import Line, Record
from crewlog.fold import Fold
from crewlog.lease import Leases
from crewlog.notify import HeadChannel
from crewlog.reader import Reader, backwards, first_line
from crewlog.refold import refold
from crewlog.segments import Position
from crewlog.sieve import Sieve
from crewlog.states import States
from crewlog.structs import DurableHead


class Reading:
    """The reading half of a log."""

    def __init__(self, directory: Directory) -> None:
        """Use an open directory; nothing is read yet."""
        self.directory = directory
        self.recovery_pending = False
        self.mutex = threading.RLock()  # guards the state, and what a writer has open
        self._boot = identity.boot_bytes()
        self._states = States(directory)
        self._current = Current(directory)

    def head(self) -> DurableHead:
        """Return how far events are durable.

        After a reboot, and before the first write, that is the valid prefix of the last segment;
        `recovery_pending` is then set and nothing is changed.
        """
        try:
            head = self._states.head()
            if head is None or head.boot != self._boot:
                judged = self._judged(head)
                head = self._states.head()  # a writer may have recovered, and gone on, meanwhile
                if head is None or head.boot != self._boot:
                    self.recovery_pending = True
                    return judged
        except OSError as error:
            raise from_oserror(error, "cannot read the registry", where=self.where) from error
        self.recovery_pending = False
        self.directory.completed.clear()
        return head

    def renew(self) -> None:
        """Let go of state files that were removed or replaced under a long-lived reader."""
        self._states.renew()

    def _judged(self, head: DurableHead | None) -> DurableHead:
        """Return the head that a recovery would publish."""
        if os.fstat(self.directory.root).st_nlink == 0:
            raise StoreMissing(self.where, why="its directory was removed")
        with self.mutex:
            self._current.load()
            snapshot_seq = self._current.snapshot_seq
        segment, found, _ = tail.judge(self.directory, head, snapshot_seq=snapshot_seq)
        state = tail.recovered(self._boot, segment, found)
        return structs.durable(state, base=found.end, after=head)

    def last_seq(self) -> int:
        """Return the seq of the last durable line."""
        return self.head().seq

    def first_seq(self) -> int:
        """Return the seq of the oldest line that is kept."""
        return segments.all_of(self.directory)[0]

    @property
    def where(self) -> str:
        """Return the place, for messages."""
        return str(self.directory.path)

    @property
    def id(self) -> str:
        """Return what no other store has."""
        return self.directory.store

    @property
    def unit_workers_max(self) -> int:
        """Return how many workers one unit may change: as many as it may have events."""
        return layout.BATCH_EVENTS_MAX

    @property
    def remote(self) -> bool:
        """Say that a look takes microseconds."""
        return False

    @property
    def one_host(self) -> bool:
        """Say whether all its workers are of this host: not on a network file system."""
        return self.directory.local

    def is_in_place(self) -> bool:
        """Say whether the directory at the path is this one; True where nothing is there."""
        return self.directory.is_at(self.directory.path)

    @contextmanager
    def state(self) -> Iterator[Fold]:
        """Hold the durable state of now still, while something is copied out of it."""
        self._states.renew()
        head = self.head()  # before the log: else a busy writer looks like a shortened log
        with disk.failures("cannot read the log", where=self.where), self.mutex:
            yield self._current.durable(segments.durable_end(head))

    def record(self, sid: str) -> Record | None:
        """Return one worker's durable record of now."""
        with self.state() as state:
            return state.get(sid)

    def read(self, after: int, *, sieve: Sieve | None = None) -> Iterator[tuple[Line, bytes]]:
        """Yield the durable lines after seq `after` that the sieve holds, up to the last of now.

        *Raises* CompactedError where the line after `after` is no longer kept.
        """
        with disk.failures("cannot read the log", where=self.where):
            head = self.head()
            if after >= head.seq:
                return
            reader = self._reader(after, sieve=sieve)
            try:
                for line, raw in reader.read(segments.durable_end(head)):
                    if line["seq"] > after:
                        yield line, raw
            except SegmentMissing as error:
                self._require_kept(error, after)
                raise
            finally:
                reader.close()

    def backwards(self, *, sieve: Sieve | None = None) -> Iterator[tuple[Line, bytes]]:
        """Yield the durable lines that the sieve holds, the newest first."""
        return backwards(self.directory, segments.durable_end(self.head()), sieve=sieve)

    def tail(self, after: int, *, sieve: Sieve | None = None) -> "Tail":
        """Return what reads on from seq `after`; it may begin before, with its segment.

        *Raises* CompactedError where that line is no longer kept.
        """
        return Tail(self, self._reader(after, sieve=sieve))

    def _reader(self, after: int, *, sieve: Sieve | None) -> Reader:
        oldest = self.first_seq()
        if after + 1 < oldest:
            raise CompactedError(requested=after + 1, oldest=oldest)
        try:
            return Reader(self.directory, segments.find(self.directory, after), sieve=sieve)
        except SegmentMissing as error:
            self._require_kept(error, after)
            raise

    def _require_kept(self, error: SegmentMissing, after: int) -> None:
        """Raise CompactedError where a segment is missing because retention has dropped it."""
        oldest = self.first_seq()
        if error.first < oldest:
            raise CompactedError(requested=after + 1, oldest=oldest) from error

    def identity(self) -> bytes:
        """Return the bytes of store.json."""
        where = self.directory.where(layout.STORE)
        with disk.failures("cannot read the registry", where=where):
            return disk.read_all(
                layout.STORE, at=self.directory.root, where=where, limit=layout.SMALL_FILE_BYTES_MAX
            )

    # -- the past ---------------------------------------------------------------------------

    def firsts(self) -> Sequence[int]:
        """Return the segments that hold something durable, by their first seqs."""
        head = self.head()
        return [first for first in segments.all_of(self.directory) if first <= head.segment]

    def begins(self, first: int) -> str:
        """Return the time in a segment's header, "" where it cannot be read."""
        try:
            line = first_line(self.directory, first)
        except SegmentMissing as error:
            self._require_kept(error, first - 1)
            raise
        return "" if line is None else line["ts"]

    def snapshots(self) -> Iterator[Snapshot]:
        """Yield every older state that is kept, the empty one too."""
        return snapshot.every(self.directory)

    def fold_to(self, start: Snapshot, seq: int, *, seen: Callable[[Line], None]) -> Snapshot:
        """Return the state at a durable seq from an older one; `seen` is told of each line."""
        head = self.head()
        stop = segments.durable_end(head) if seq == head.seq else Position(0, 0, seq)
        try:
            return refold(self.directory, start, stop, seen=seen)
        except SegmentMissing as error:
            self._require_kept(error, start.last_seq)
            raise

    def compacted(self) -> tuple[int, datetime] | None:
        """Return what seq registry.json covers, and when it was written."""
        found = snapshot.load(self.directory).snapshot
        return None if found is None else (found.last_seq, events.utc(found.written_at))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the log, the archive and the quarantine."""
        found = {}
        for name in (layout.LOG, layout.ARCHIVE, layout.QUARANTINE):
            found[name] = 0
            for entry in (self.directory.path / name).iterdir():
                try:
                    found[name] += entry.stat().st_size
                except FileNotFoundError:  # archived, or dropped, meanwhile
                    continue
        return found

    # -- its readers and workers ------------------------------------------------------------

    @property
    def channel(self) -> HeadChannel:
        """Return what tells of changes: the directory of head/durable."""
        return HeadChannel(self.directory.path / layout.HEAD, local=self.directory.local)

    @property
    def cursors(self) -> Cursors:
        """Return the durable positions of subscribers."""
        return Cursors(self.directory)

    @property
    def leases(self) -> Leases:
        """Return what workers hold while they live."""
        return Leases(self.directory)


class Tail:
    """Lines of a directory from a position on; see store.Tail."""

    __slots__ = ("_log", "_reader")

    def __init__(self, log: Reading, reader: Reader) -> None:
        """Read on with `reader`."""
        self._log = log
        self._reader = reader

    @property
    def seq(self) -> int:
        """Return the seq up to which it has read."""
        return self._reader.position.seq

    def read(self, head: int) -> Iterator[tuple[Line, bytes]]:  # noqa: ARG002 (the end of now is not before it)
        """Yield the lines up to the durable end of now, which is not before `head`."""
        return self._reader.read(segments.durable_end(self._log.head()))

    def close(self) -> None:
        """Close the open segment."""
        self._reader.close()
