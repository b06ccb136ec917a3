"""Commit events: the two-phase append, group sync, rotation, and reading what is durable.

Format
    A store's history is a chain of checked lines (codec.py) in segments under log/. The last
    segment is active, every other one ends with a seal. append.state tells how far lines are
    *written*, head/durable how far they are *durable*; both are caches of what the segments say.

Valid if and only if
    A line counts once head/durable, written in this boot, covers it. After a reboot a line counts
    if it lies in the valid prefix of the last segment as recovery.decide judges it.

Writer
    Phase one, under locks/append: read both states (recover first if they are not of this boot);
    adopt or cut what a dead writer left beyond the written end; fold what others wrote; let the
    caller decide; write all lines with one write(2); write append.state; unlock.
    Phase two (sync.py), no append lock: until head/durable covers my last line, wait for the sync
    leader or become it. The leader reads append.state, syncs that segment, publishes
    head/durable. **The commit point is the write of head/durable.**

Reader
    Reads head/durable, then the segments up to it. Takes no lock, changes nothing.

Lock order
    compact, append, sync. In a process: writer, append lock, mutex, turn, sync lock. A sync
    leader never takes the append lock; nobody holds a lock while a caller's probe runs.

Crash argument
    kill -9 before the write: nothing happened. During or after it, before append.state: bytes
    beyond the written end; nobody was told, and readers never see beyond head/durable; the next
    writer adopts whole lines and batches and quarantines the rest. After append.state: the next
    leader syncs the lines; their caller never heard. Before the publication: synced or not, not
    acknowledged. The kernel frees a dead holder's locks. Power cut: a line was acknowledged only
    after a sync that followed its write, on a segment whose name was durable before its first
    line; `synced` in later lines and head/durable bear witness to that, so recovery can tell a
    torn tail (never acknowledged, cut) from damage (acknowledged, refused). A failed sync is
    never repeated: it poisons the store for every process before anyone can append after it.
"""

import errno
import logging
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Final

from crewlog import codec, disk, events, identity, layout, segments, tail
from crewlog.codec import AppendState, Draft, DurableHead
from crewlog.current import Current
from crewlog.directory import Directory
from crewlog.errors import (
    LockBusy,
    LogCorrupt,
    LogRegressed,
    StorageFull,
    StoreMissing,
    from_oserror,
)
from crewlog.events import JsonObject, Line
from crewlog.fold import Fold
from crewlog.lock import Lock
from crewlog.recovery import Found
from crewlog.segments import Position, Reader, Source
from crewlog.states import States
from crewlog.store import Appended, Decide
from crewlog.sync import Syncer

_logger = logging.getLogger("crewlog.log")
_LINE_OVERHEAD: Final = 256  # more than seq, ts, place, synced, prev and crc take


class Log:
    """The store of one directory; threads may share it, and a forked child may go on using it."""

    def __init__(self, directory: Directory, *, wait_s: float = layout.LOCK_WAIT_S) -> None:
        """Use an open directory; nothing is read yet."""
        self.directory = directory
        self.recovery_pending = False
        self.wait_s = wait_s
        self._boot = identity.boot_bytes()
        self._states = States(directory)
        self.append_lock = self._lock(layout.LOCK_APPEND)
        self._sync = Syncer(directory, self._states, boot=self._boot, wait_s=wait_s)
        self._new_mutexes()
        self._active: Source | None = None  # guarded by _mutex
        self._current = Current(directory)
        self._phase_one = _PhaseOne(self)
        _living.add(self)

    def _new_mutexes(self) -> None:
        """Make the mutexes; they are taken in this order."""
        self.writer = threading.Lock()  # one thread at a time writes
        self.mutex = threading.RLock()  # the state, and what phase one has open

    def _lock(self, name: str) -> Lock:
        where = self.directory.lock_path(name)
        return Lock(name, at=self.directory[layout.LOCKS], where=where)

    # -- reading ----------------------------------------------------------------------------

    def head(self) -> DurableHead:
        """Return how far events are durable.

        After a reboot, and before the first write, that is the valid prefix of the last segment;
        `recovery_pending` is then set and nothing is changed.
        """
        head = self._states.head()
        if head is not None and head.boot == self._boot:
            self.recovery_pending = False
            return head
        with self.mutex:
            self._current.state()
        self.recovery_pending = True
        source, found, _ = tail.judge(self.directory, head, snapshot_seq=self._current.snapshot_seq)
        source.close()
        return DurableHead(
            generation=0,
            boot=self._boot,
            segment=source.first,
            end=found.end,
            seq=found.seq,
            oldest=1 if head is None else head.oldest,
            poisoned=False,
            errno=0,
        )

    def last_seq(self) -> int:
        """Return the seq of the last durable line."""
        return self.head().seq

    def first_seq(self) -> int:
        """Return the seq of the oldest line that is kept."""
        return segments.all_of(self.directory)[0]

    def state(self) -> Fold:
        """Return the durable state of now; the caller must not change it."""
        head = self.head()  # before the log: else a busy writer looks like a shortened log
        with self.mutex:
            tentative = self._current.state()
            if head.seq > tentative.durable.seq:
                self._current.read_to(Position(head.segment, head.end, head.seq))
                tentative.settle(head.seq)
            return tentative.durable

    @contextmanager
    def frozen(self) -> Iterator[Fold]:
        """Hold the durable state still while it is copied out."""
        with self.mutex:
            yield self.state()

    def read(self, after: int) -> Iterator[tuple[Line, bytes]]:
        """Yield every durable line after seq `after`, up to the last one of now."""
        head = self.head()
        if after >= head.seq:
            return
        reader = self.reader(after)
        try:
            for line, raw in reader.read(Position(head.segment, head.end, head.seq)):
                if line["seq"] > after:
                    yield line, raw
        finally:
            reader.close()

    def reader(self, after: int) -> Reader:
        """Return a reader whose segment holds the line after seq `after`; it may begin before."""
        return Reader(self.directory, segments.find(self.directory, after))

    # -- phase one: write -------------------------------------------------------------------

    def append(self, decide: Decide) -> Appended:
        """Write what `decide` returns as one unit, all or nothing; durable on return.

        *Raises* whatever `decide` raises; LockBusy, StorageFull, StorageFailed, StorePoisoned and
        all kinds of DataDamaged with nothing written; AppendUncertain, and StorageFailed after a
        failed sync, with the outcome "unknown".
        """
        with self._phase_one:
            state, head = self._ready()
            tentative = self._current.state()
            drafts = decide(tentative)
            raws = self._write(drafts, state, head) if drafts else []
            result = Appended(raws, {d.sid: tentative.get(d.sid) for d in drafts}, tentative.seq)
        self._sync.make_durable(result.seq, head.generation)
        return result

    def note(self, kind: str, data: JsonObject) -> None:
        """Append one of the store's own lines; durable on return."""
        with self._phase_one:
            state, head = self._ready()
            state = self._put_own(kind, data, state, head)
        self._sync.make_durable(state.seq)

    def rotate(self) -> None:
        """Seal the active segment and begin the next one; durable on return."""
        with self._phase_one:
            state, head = self._ready()
            self._begin_next(self._seal(state, head))

    def _ready(self) -> tuple[AppendState, DurableHead]:
        """Bring log and states into the order that an append starts from. Held: append."""
        state, head = self._states.append_state(), self._states.head()
        if state is None or head is None or {state.boot, head.boot} != {self._boot}:
            state, head = self._recover(head)
        if head.poisoned:
            raise self._sync.poisoned(head.errno)
        active = self._open_active(state.segment)
        found = os.fstat(active.fd)
        if found.st_nlink != 1:
            self.append_lock.require_in_place()
            raise StoreMissing(
                self.directory.where(layout.LOG, active.name), why="the active segment was removed"
            )
        if found.st_size < state.end:
            raise LogRegressed(
                self.directory.where(layout.LOG, active.name),
                why=f"it has {found.st_size} bytes, {state.end} were written",
            )
        if found.st_size > state.end:
            state = self._adopt(active, state, head)
        if state.sealed:
            state = self._begin_next(state)
            head = self._states.head() or head
        self._current.read_to(Position(state.segment, state.end, state.seq))
        return state, head

    def _open_active(self, segment: int) -> Source:
        if self._active is None or self._active.first != segment:
            if self._active is not None:
                self._active.close()
                self._active = None
            self._active = segments.open_active(self.directory, segment)
        return self._active

    def _adopt(self, active: Source, state: AppendState, head: DurableHead) -> AppendState:
        state, found = tail.adopt(self.directory, active, state)
        self._states.put_append_state(state)
        if found.reason is not None and not state.sealed:
            state = self._write_recovered(state, head, found)
        return state

    def _write(self, drafts: Sequence[Draft], state: AppendState, head: DurableHead) -> list[bytes]:
        """Write the lines of `drafts` as one unit, rotating first if they would not fit."""
        size = sum(len(part.body) for part in drafts) + _LINE_OVERHEAD * len(drafts)
        if len(drafts) > layout.BATCH_EVENTS_MAX or size > layout.BATCH_BYTES_MAX:
            message = (
                f"a batch holds at most {layout.BATCH_EVENTS_MAX} events "
                f"and {layout.BATCH_BYTES_MAX} bytes"
            )
            raise ValueError(message)
        if state.end + size > layout.SEGMENT_BYTES_MAX and state.seq > state.segment:
            state = self._begin_next(self._seal(state, head))
            head = self._states.head() or head
        raws: list[bytes] = []
        lines: list[Line] = []
        seq, prev = state.seq, state.hash
        synced = head.end if head.segment == state.segment else 0
        ts = events.timestamp(datetime.now(UTC))
        count = len(drafts)
        for index, part in enumerate(drafts):
            seq += 1
            place = (index, count) if count > 1 else None
            raw = codec.line(part, seq=seq, ts=ts, synced=synced, prev=prev, batch=place)
            prev = codec.digest(raw[:-1])
            raws.append(raw)
            lines.append(codec.as_parsed(part, seq=seq, ts=ts))
        data = b"".join(raws)
        after = AppendState(
            state.boot, state.segment, state.end + len(data), seq, prev, sealed=False
        )
        self._put(data, state, after)
        self._current.advance(lines, Position(after.segment, after.end, after.seq))
        return [raw[:-1] for raw in raws]

    def _put(self, data: bytes, state: AppendState, after: AppendState) -> None:
        """Write bytes and state, or cut the log back to where it was.

        An interrupt (Ctrl-C) is no reason to cut: once append.state is out, a sync leader may have
        made the lines durable. What it leaves, the next writer adopts.
        """
        active = self._open_active(state.segment)
        via = self.directory.disk
        try:
            if via.write(active.fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._states.put_append_state(after)
        except OSError as error:
            try:
                via.cut(active.fd, state.end)
                self._states.put_append_state(state)
            except OSError as second:
                self._sync.poison(second.errno or errno.EIO)
                raise self._sync.poisoned(second.errno or errno.EIO) from error
            if error.errno in disk.FULL:
                where = self.directory.where(layout.LOG, active.name)
                raise StorageFull(where, why=error.strerror or "no space") from error
            raise

    def _put_own(
        self, kind: str, data: JsonObject, state: AppendState, head: DurableHead
    ) -> AppendState:
        """Append one of the store's own lines."""
        raw, line = segments.own_line(
            kind,
            data,
            seq=state.seq + 1,
            ts=events.timestamp(datetime.now(UTC)),
            synced=head.end if head.segment == state.segment else 0,
            prev=state.hash,
        )
        after = replace(
            state,
            end=state.end + len(raw),
            seq=line["seq"],
            hash=codec.digest(raw[:-1]),
            sealed=kind == events.SEAL,
        )
        self._current.read_to(Position(state.segment, state.end, state.seq))
        self._put(raw, state, after)
        self._current.advance([line], Position(after.segment, after.end, after.seq))
        return after

    # -- rotation ---------------------------------------------------------------------------

    def _seal(self, state: AppendState, head: DurableHead) -> AppendState:
        """Write the seal and make it durable: only then may a successor exist."""
        sealed = self._put_own(events.SEAL, {"first": state.segment}, state, head)
        self._sync.make_durable(sealed.seq)
        return sealed

    def _begin_next(self, sealed: AppendState) -> AppendState:
        """Put the successor of a sealed segment in place, or find the one that is there.

        An interrupted rotation is finished here by whoever holds the append lock next: each step
        follows from what the one before it left.
        """
        self._sync.make_durable(sealed.seq)
        first = sealed.seq + 1
        if first not in segments.active_and_sealed(self.directory):
            boot = identity.boot_id()
            raw, _ = segments.own_line(
                events.SEGMENT,
                tail.header_data(self.directory, boot, sealed),
                seq=first,
                ts=events.timestamp(datetime.now(UTC)),
                synced=0,
                prev=sealed.hash,
            )
            segments.put(self.directory, first, raw)
        begun = replace(sealed, segment=first, end=0, sealed=False)
        active = self._open_active(first)
        data = active.read(0, active.size())
        found = segments.scan(data, offset=0, seq=sealed.seq, prev=sealed.hash)
        if found.reason is not None or found.end == 0:
            raise LogCorrupt(
                active.name,
                offset=found.end,
                seq=found.seq + 1,
                reason=found.reason or "it is empty",
                proof="it follows a durable seal",
            )
        begun = replace(begun, end=found.end, seq=found.seq, hash=found.hash)
        self.directory.disk.sync_directory(self.directory[layout.LOG])
        self._states.put_append_state(begun)
        self._current.read_to(Position(begun.segment, begun.end, begun.seq))
        self._sync.make_durable(begun.seq)
        return begun

    # -- recovery ---------------------------------------------------------------------------

    def _recover(self, head: DurableHead | None) -> tuple[AppendState, DurableHead]:
        """Rebuild both states from the segments. Held: append."""
        with self._sync.nobody_leads():
            if layout.POISON in disk.names(self.directory.root):
                raise self._sync.poisoned(head.errno if head and head.errno else errno.EIO)
            self._current.state()
            state, fresh, cut = tail.rebuild(
                self.directory, head, boot=self._boot, snapshot_seq=self._current.snapshot_seq
            )
            self._states.put_append_state(state)
            self._states.put_head(fresh)
        self.recovery_pending = False
        if cut is not None:
            _logger.warning("cut %d unacknowledged bytes off the log", cut.size - cut.end)
            if not state.sealed:
                state = self._write_recovered(state, fresh, cut)
        return state, fresh

    def _write_recovered(self, state: AppendState, head: DurableHead, cut: Found) -> AppendState:
        data = tail.recovered_data(state.segment, cut)
        return self._put_own(events.RECOVERED, data, state, head)

    # -- life of the object -----------------------------------------------------------------

    def try_compact_lock(self) -> Lock:
        """Take locks/compact or raise LockBusy at once; the caller closes it."""
        lock = self._lock(layout.LOCK_COMPACT)
        if not lock.try_acquire():
            holder = lock.holder()
            lock.close()
            raise LockBusy(self.directory.lock_path(layout.LOCK_COMPACT), waited_s=0, holder=holder)
        return lock

    def after_fork(self) -> None:
        """Begin anew in a forked child: locks are the parent's, the state may be half moved."""
        self.append_lock.close()
        self._sync.after_fork()
        self._new_mutexes()
        self._close_segments()

    def close(self) -> None:
        """Close every descriptor; idempotent."""
        if self not in _living:
            return
        _living.discard(self)
        with self.writer, self.mutex:
            self._close_segments()
            self.append_lock.close()
            self._sync.close()
            self._states.close()
            self.directory.close()

    def _close_segments(self) -> None:
        self._current.forget()
        if self._active is not None:
            self._active.close()
            self._active = None


class _PhaseOne:
    """Hold everything that phase one needs, and give its failures their types.

    Readers of this process wait for the mutex only, never for another process's lock.
    """

    __slots__ = ("_log",)

    def __init__(self, log: Log) -> None:
        self._log = log

    def __enter__(self) -> None:
        log = self._log
        log.writer.acquire()
        try:
            log.append_lock.acquire(wait_s=log.wait_s)
            log.mutex.acquire()
        except BaseException as error:
            log.append_lock.release()
            log.writer.release()
            self._translate(error)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        log = self._log
        log.mutex.release()
        log.append_lock.release()
        log.writer.release()
        if error is not None:
            self._translate(error)

    def _translate(self, error: BaseException) -> None:
        where = str(self._log.directory.path)
        if isinstance(error, FileNotFoundError):
            raise StoreMissing(where, why=f"{error.filename} was removed") from error
        if isinstance(error, OSError):
            raise from_oserror(error, "cannot write to the registry", where=where) from error


_living: "weakref.WeakSet[Log]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for log in list(_living):
        log.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
