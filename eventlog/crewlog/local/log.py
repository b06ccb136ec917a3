"""The store of a directory: what an engine promises (store.Store), kept by files of this machine.

Reading takes no lock and changes nothing. The head is read before the log, else a busy writer would
look like a shortened log. After a reboot, and before the first write, the durable end is what a
recovery would find. What changes the log is in append.py, which argues why it is safe.
"""

import os
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TypeGuard

from crewlog import host
from crewlog.errors import CompactedError, SegmentMissing, StoreMissing, from_oserror
from crewlog.local import disk, heads, layout, recovery, snapshot
from crewlog.local.append import Appender
from crewlog.local.cursors import Cursors
from crewlog.local.heads import DurableHead, States
from crewlog.local.layout import Directory, incomplete
from crewlog.local.leases import Leases
from crewlog.local.listen import HeadChannel
from crewlog.local.lock import Lock, take
from crewlog.local.segments import Reader, Segments, backwards, first_line, segment_headers
from crewlog.local.view import View
from crewlog.model import events, steps
from crewlog.model.chain import Position
from crewlog.model.events import JsonObject, Line, Record
from crewlog.model.fold import Fold
from crewlog.model.limits import LOCK_WAIT_S, Limits
from crewlog.model.sieve import Sieve
from crewlog.model.snapshot import Snapshot
from crewlog.model.steps import Appended, Decide
from crewlog.process import identity
from crewlog.queue import Commits, Done, Start
from crewlog.store import Kind


class Log:
    """The store of one directory; threads may share it, and a forked child may go on using it."""

    def __init__(self, directory: Directory, *, wait_s: float = LOCK_WAIT_S) -> None:
        """Use an open directory; nothing is read yet."""
        self.directory = directory
        self.is_ours = directory.opened.are_ours  # a program may have closed its descriptors
        self.segments = Segments(directory)
        self.recovery_pending = False
        self.wait_s = wait_s
        self._boot = identity.boot_bytes()
        # Of readers: the generation of the last head that counted, and one that does not, for the
        # files beside it are of another age. A race of two threads only makes one look again.
        self._looked_at = -1
        self._aged: DurableHead | None = None
        self._heads = States(directory)
        self._files = Segments(directory)  # as they are: what the redo completes is for readers
        self._view = View(self.segments, self._files)
        self._appender = Appender(self._files, self._heads, self._view, wait_s=wait_s)
        self.commits = Commits(
            self._appender, where=str(directory.path), wait_s=wait_s, limits=directory.limits
        )
        host.renew_in_child(self, rank=host.STORES)

    # -- change -----------------------------------------------------------------------------

    def append(self, decide: Decide, *, about: Collection[str]) -> Appended:
        """Write what `decide` returns as one unit, all or nothing; durable on return.

        Raises: whatever `decide` raises; LockBusy, StorageFull, StorageFailed, StorePoisoned and
        all kinds of DataDamaged with nothing written; AppendUncertain, StorageFailed and
        StorePoisoned with the outcome "unknown" once lines were written. A refusal is durable too.
        """
        return self.commits.append(decide, about)

    def submit(self, decide: Decide, about: Collection[str], *, done: Done, start: Start) -> object:
        """Append without waiting; see queue.Commits.submit."""
        return self.commits.submit(decide, about, done=done, start=start)

    def note(self, kind: str, data: JsonObject) -> None:
        """Append one of the store's own lines; durable on return."""
        self._appender.note(kind, data)

    def rotate(self) -> None:
        """Seal the active segment and begin the next one; durable on return."""
        self._appender.rotate()

    def require_sound(self) -> None:
        """Raise StorePoisoned where a sync failed once: nothing more can be written."""
        self._appender.require_sound()

    def take_compact_lock(self) -> Lock:
        """Take locks/compact or raise LockBusy at once; the caller closes it."""
        name = layout.LOCK_COMPACT
        where = self.directory.lock_path(name)
        try:
            with disk.failures("cannot take the lock", where=where):
                return take(name, at=self.directory[layout.LOCKS], where=where)
        except FileNotFoundError as error:
            raise incomplete(error, root=self.directory.root, where=self.where) from error

    @contextmanager
    def alone(self) -> Iterator[States]:
        """Keep every writer and sync leader out, for a repair; yield the states. Held: compact."""
        one = self._appender
        mine = self._appender.lock.held(wait_s=self.wait_s)
        with one.writer, mine, one.mutex, one.sync.nobody_leads():
            yield self._heads

    # -- read -------------------------------------------------------------------------------

    def head(self) -> DurableHead:
        """Return how far events are durable.

        After a reboot, or where the files are of different ages (recovery.py), and before the first
        write, that is the valid prefix of the last segment, completed by the redo;
        `recovery_pending` is then set and nothing is changed.
        """
        try:
            head = self._heads.head()
            while not self._counts(head):
                judged, before = self._judged(head), head
                head = self._heads.head()  # a writer may have recovered, and gone on, meanwhile
                if head == before or head is None or head.boot != self._boot:
                    self.recovery_pending = True
                    return judged
        except OSError as error:
            raise from_oserror(error, "cannot read the registry", where=self.where) from error
        self.recovery_pending = False
        self.segments.completed.clear()
        return head

    def _counts(self, head: DurableHead | None) -> TypeGuard[DurableHead]:
        """Say whether a head tells of this log: of this boot, this file and the age of the rest.

        The last is looked at once, and again where a head goes backwards: a writer that goes on has
        looked itself.
        """
        if head is None or head.boot != self._boot or self._heads.is_elsewhere(head):
            return False
        if not 0 <= self._looked_at <= head.generation or head == self._aged:
            self._aged = head if recovery.proof(self._files, self._heads) else None
        self._looked_at = head.generation
        return self._aged is None

    def renew(self) -> None:
        """Let go of state files that were removed or replaced under a long-lived reader."""
        self._heads.renew()

    def _judged(self, head: DurableHead | None) -> DurableHead:
        """Return the head that a recovery would publish."""
        if os.fstat(self.directory.root).st_nlink == 0:
            raise StoreMissing(self.where, why="its directory was removed")
        with self._appender.mutex:
            self._view.load()
            snapshot_seq = self._view.snapshot_seq
        segment, scan, _ = recovery.judge(self.segments, head, snapshot_seq=snapshot_seq)
        state = recovery.recovered(self._boot, segment, scan)
        return heads.durable(state, base=scan.end, after=head)

    def last_seq(self) -> int:
        """Return the seq of the last durable line."""
        return self.head().seq

    def first_seq(self) -> int:
        """Return the seq of the oldest line that is kept."""
        return self.segments.all()[0]

    @property
    def where(self) -> str:
        """Return the place, for messages."""
        return str(self.directory.path)

    @property
    def id(self) -> str:
        """Return what no other store has."""
        return self.directory.store

    @property
    def kind(self) -> Kind:
        """Return "directory"."""
        return "directory"

    @property
    def limits(self) -> Limits:
        """Return the limits that it was opened with."""
        return self.directory.limits

    @property
    def unit_workers_max(self) -> int:
        """Return how many workers one unit may change: as many as it may have events."""
        return steps.BATCH_EVENTS_MAX

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
        self._heads.renew()
        head = self.head()  # before the log: else a busy writer looks like a shortened log
        with disk.failures("cannot read the log", where=self.where), self._appender.mutex:
            yield self._view.durable(head.position)

    def record(self, sid: str) -> Record | None:
        """Return one worker's durable record of now."""
        with self.state() as state:
            return state.get(sid)

    def read(self, after: int, *, sieve: Sieve | None = None) -> Iterator[tuple[Line, bytes]]:
        """Yield the durable lines after seq `after` that the sieve holds, up to the last of now.

        Raises: CompactedError where the line after `after` is no longer kept.
        """
        with disk.failures("cannot read the log", where=self.where):
            head = self.head()
            if after >= head.seq:
                return
            reader = self._reader(after, sieve=sieve)
            try:
                for line, raw in reader.read(head.position):
                    if line["seq"] > after:
                        yield line, raw
            except SegmentMissing as error:
                self._require_kept(error, after)
                raise
            finally:
                reader.close()

    def backwards(self, *, sieve: Sieve | None = None) -> Iterator[tuple[Line, bytes]]:
        """Yield the durable lines that the sieve holds, the newest first."""
        return backwards(self.segments, self.head().position, sieve=sieve)

    def tail(self, after: int, *, sieve: Sieve | None = None) -> "Tail":
        """Return what reads on from seq `after`; it may begin before, with its segment.

        Raises: CompactedError where that line is no longer kept.
        """
        return Tail(self, self._reader(after, sieve=sieve))

    def _reader(self, after: int, *, sieve: Sieve | None) -> Reader:
        oldest = self.first_seq()
        if after + 1 < oldest:
            raise CompactedError(requested=after + 1, oldest=oldest)
        try:
            return Reader(self.segments, self.segments.find(after), sieve=sieve)
        except SegmentMissing as error:
            self._require_kept(error, after)
            raise

    def _require_kept(self, error: SegmentMissing, after: int) -> None:
        """Raise CompactedError where a segment is missing because retention has dropped it."""
        oldest = self.first_seq()
        if error.first < oldest:
            raise CompactedError(requested=after + 1, oldest=oldest) from error

    def mark(self) -> Hashable:
        """Return which file store.json is, and since when: nobody can set that, nor copy it."""
        try:
            file = os.stat(layout.STORE, dir_fd=self.directory.root)
        except OSError:  # it was removed, or the number is no longer ours
            return None
        return file.st_dev, file.st_ino, file.st_ctime_ns

    def identity(self) -> bytes:
        """Return the bytes of store.json."""
        where = self.directory.where(layout.STORE)
        with disk.failures("cannot read the registry", where=where):
            return disk.read_all(
                layout.STORE, at=self.directory.root, where=where, limit=layout.SMALL_FILE_BYTES_MAX
            )

    def firsts(self) -> Sequence[int]:
        """Return the segments that hold something durable, by their first seqs."""
        head = self.head()
        return [first for first in self.segments.all() if first <= head.segment]

    def begins(self, first: int) -> str:
        """Return the time in a segment's header, "" where it cannot be read."""
        try:
            line = first_line(self.segments, first)
        except SegmentMissing as error:
            self._require_kept(error, first - 1)
            raise
        return "" if line is None else line["ts"]

    def since_boot(self, boot: str) -> int | None:
        """Return from which seq on all was written in a boot, as the headers say; None if none."""
        since: int | None = None
        upto = self.last_seq() + 1
        for first in reversed(self.firsts()):
            try:
                headers = segment_headers(self.segments, first, upto)
            except SegmentMissing:  # retention took it
                break
            for line in reversed(headers):
                if line["data"].get("boot") != boot:
                    return since
                since = line["seq"]
            if not headers:
                break
            upto = first
        return since

    def snapshots(self) -> Iterator[Snapshot]:
        """Yield every older state that is kept, the empty one too."""
        return snapshot.every(self.directory)

    def nearest(self, seq: int) -> Iterator[Snapshot]:
        """Yield the states at or before `seq` that lines lead on from, the nearest first."""
        return snapshot.nearest(self.segments, seq)

    def fold_to(self, start: Snapshot, seq: int, *, seen: Callable[[Line], None]) -> Snapshot:
        """Return the state at a durable seq from an older one; `seen` is told of each line."""
        head = self.head()
        stop = head.position if seq == head.seq else Position(0, 0, seq)
        try:
            return snapshot.refold(self.segments, start, stop, seen=seen)
        except SegmentMissing as error:
            self._require_kept(error, start.last_seq)
            raise

    def compacted(self) -> tuple[int, datetime] | None:
        """Return what seq registry.json covers, and when it was written."""
        newest = snapshot.load(self.directory).snapshot
        return None if newest is None else (newest.last_seq, events.utc(newest.written_at))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the log, the archive and the quarantine."""
        return {
            name: sum(self._bytes_in(name))
            for name in (layout.LOG, layout.ARCHIVE, layout.QUARANTINE)
        }

    def _bytes_in(self, part: str) -> Iterator[int]:
        for name in self.directory.names(part):
            with suppress(FileNotFoundError):  # archived, or dropped, meanwhile
                yield os.stat(name, dir_fd=self.directory[part], follow_symlinks=False).st_size

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

    # -- life -------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Return whether it was closed."""
        return self._appender.closed

    def after_fork(self) -> None:
        """Begin anew in a forked child: the state may be half moved; locks mind themselves."""
        self._appender.after_fork()
        self._heads.after_fork()
        self.commits.after_fork()
        self._view.forget()

    def close(self) -> None:
        """Release everything once no thread is inside; idempotent.

        The directory stays open for as long as a reader still holds it. From a signal handler that
        has interrupted a change, nothing is closed under it: that is done when this is forgotten.
        """
        one = self._appender
        if one.is_inside():
            one.closed = True
            return
        host.forget(self, rank=host.STORES)
        with one.writer, one.mutex:
            self._view.forget()
            one.close()
            self._heads.close()

    def __del__(self, is_ending: host.IsEnding = host.is_ending) -> None:
        """Close: who forgets a registry gives its descriptors back all the same."""
        if is_ending():
            return
        with suppress(AttributeError):  # interrupted while it was made
            self.close()


class Tail:
    """Lines of a directory from a position on; see store.Tail."""

    __slots__ = ("_log", "_reader")

    def __init__(self, log: Log, reader: Reader) -> None:
        """Read on with `reader`."""
        self._log = log
        self._reader = reader

    @property
    def seq(self) -> int:
        """Return the seq up to which it has read."""
        return self._reader.position.seq

    def read(self, head: int) -> Iterator[tuple[Line, bytes]]:  # noqa: ARG002 (the end of now is not before it)
        """Yield the lines up to the durable end of now, which is not before `head`."""
        return self._reader.read(self._log.head().position)

    def close(self) -> None:
        """Close the open segment."""
        self._reader.close()
