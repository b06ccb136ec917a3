"""Commit events: the two-phase append, group sync, rotation and recovery.

Format
    A store's history is a chain of checked lines (codec.py) in segments under log/. The last
    segment is active, every other one ends with a seal. append.state tells how far lines are
    *written*, head/durable how far they are *durable*; both are caches of what the segments say.

Valid if and only if
    A line counts once head/durable, written in this boot, covers it. After a reboot a line counts
    if it lies in the valid prefix of the last segment, as the redo completes it (redo.py) and
    recovery.decide judges it.

Writer
    One thread of a process writes for all that wait (commit.py).
    Phase one, under locks/append: read both states (recover first if they are not of this boot);
    adopt or cut what a dead writer left beyond the written end; look at what others wrote; let
    the callers decide; write all lines with one write(2); copy them into the redo; write
    append.state; unlock.
    Phase two (sync.py), no append lock: until head/durable covers my last line, wait for the sync
    leader or become it. The leader reads append.state, syncs the redo (or, where that does not hold
    all of it, the segment), publishes head/durable. **The commit point is the write of
    head/durable.**

Reader
    reading.py: reads head/durable, then the segments up to it. Takes no lock, changes nothing.

Lock order
    compact, append, sync. In a process: writer, append lock, mutex, turn, sync lock. A sync
    leader never takes the append lock; nobody holds a lock while a caller's probe runs.

Crash argument
    kill -9 before the write: nothing happened. During or after it, before append.state: bytes
    beyond the written end; nobody was told, and readers never see beyond head/durable; the next
    writer adopts whole lines and batches and quarantines the rest. After append.state: the next
    leader syncs the lines; their caller never heard. Before the publication: synced or not, not
    acknowledged. The kernel frees a dead holder's locks. Power cut: a line was acknowledged only
    after a sync of its copy in the redo, which is not overwritten before the segment was synced
    and read back, or of the segment, whose name was durable before its first line; `synced` in
    later lines and head/durable bear witness to that, so recovery can tell a torn tail (never
    acknowledged, cut) from damage (acknowledged, refused). A failed sync is never repeated: it
    poisons the store for every process before anyone can append after it.
"""

import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress

from crewlog import codec, disk, events, identity, layout, segments, structs, tail, threads, writing
from crewlog.appending import Appended, Decide
from crewlog.commit import Commits, Request
from crewlog.current import Written
from crewlog.directory import Directory, incomplete
from crewlog.disk import Stamp
from crewlog.errors import (
    LogCorrupt,
    LogRegressed,
    RegistryClosed,
    StoreMissing,
    from_oserror,
)
from crewlog.events import JsonObject
from crewlog.lock import Lock, take
from crewlog.reading import Reading
from crewlog.recovery import Found
from crewlog.redo import Redo
from crewlog.states import States
from crewlog.structs import AppendState, DurableHead
from crewlog.sync import Syncer
from crewlog.writing import Unit, Writing

_logger = logging.getLogger("crewlog.log")


class Log(Reading):
    """The store of one directory; threads may share it, and a forked child may go on using it."""

    def __init__(self, directory: Directory, *, wait_s: float = layout.LOCK_WAIT_S) -> None:
        """Use an open directory; nothing is read yet."""
        super().__init__(directory)
        self.closed = False
        self.wait_s = wait_s
        self.append_lock = self._lock(layout.LOCK_APPEND)
        self._sync = Syncer(directory, self._states, boot=self._boot, wait_s=wait_s)
        self.commits = Commits(where=str(directory.path), wait_s=wait_s)
        self.make_durable = self._sync.make_durable  # phase two
        self._new_turn()
        # All below is guarded by the mutex.
        self._active: segments.Source | None = None
        self._redo = Redo(directory)
        self._root, self._head = Stamp(directory.root), Stamp(directory[layout.HEAD])
        self._names = Stamp(directory[layout.LOG])
        self._names_durable = False
        self._prepared_at = 0.0
        _living.add(self)

    def _new_turn(self) -> None:
        self.writer = threading.RLock()  # one thread at a time writes; taken before the mutex
        mine = self.writer, self.append_lock, self.mutex
        self._writing = Writing(*mine, wait_s=self.wait_s, directory=self.directory)

    def _lock(self, name: str) -> Lock:
        where = self.directory.lock_path(name)
        return Lock(name, at=self.directory[layout.LOCKS], where=where)

    # -- phase one: write -------------------------------------------------------------------

    def append(self, decide: Decide, *, about: Collection[str]) -> Appended:
        """Write what `decide` returns as one unit, all or nothing; durable on return.

        *Raises* whatever `decide` raises; LockBusy, StorageFull, StorageFailed, StorePoisoned and
        all kinds of DataDamaged with nothing written; AppendUncertain, StorageFailed and
        StorePoisoned with the outcome "unknown" once lines were written. A refusal is durable too.
        """
        return self.commits.append(self, decide, about)

    def write(self, group: Sequence[Request]) -> tuple[int, int, int]:
        """Do phase one for a group; see commit.Phases."""
        about = group[0].about if len(group) == 1 else set().union(*[r.about for r in group])
        self._prepare(about)

        def work() -> tuple[int, int, int]:
            state, head = self._ready()
            try:
                taken, seq = self._write(group, state, head)
            except BaseException:
                self._current.forget_written()  # it holds lines that may never be
                raise
            return taken, seq, head.generation

        return self._writing.run(work)

    def note(self, kind: str, data: JsonObject) -> None:
        """Append one of the store's own lines; durable on return."""
        state = self._writing.run(lambda: self._put_own(kind, data, *self._ready()))
        self._sync.make_durable(state.seq)

    def rotate(self) -> None:
        """Seal the active segment and begin the next one; durable on return."""
        self._writing.run(lambda: self._begin_next(self._seal(*self._ready())))

    def _prepare(self, about: Collection[str]) -> None:
        """Read, before the lock is taken, what would take long under it."""
        knows = self._current.knows(about)
        now = time.monotonic()
        if knows and now - self._prepared_at < layout.CATCH_UP_IDLE_S:
            return
        self._prepared_at = now
        with disk.failures("cannot read the registry", where=self.where):
            state = self._states.append_state()
        if state is None or state.boot != self._boot:
            return  # recovery comes first
        if not knows:
            with self.state():
                return
        if self._current.lag(state.seq) > layout.CATCH_UP_LINES_MAX:
            with disk.failures("cannot read the log", where=self.where), self.mutex:
                self._current.catch_up(segments.written_end(state))

    def _ready(self) -> tuple[AppendState, DurableHead]:
        """Bring log and states into the order that an append starts from. Held: append."""
        if self.closed:
            raise RegistryClosed(self.where)
        self._mind_places()
        state, head = self._states.append_state(), self._states.head()
        self._sync.require_sound(head)
        if state is None or head is None or state.boot != self._boot or head.boot != self._boot:
            state, head = self._recover(head)
        if not self._names_durable:  # who created the store may have died before it synced them
            self._sync.certain_directory(self.directory.root)
            self._names_durable = True
        active = self._open_active(state.segment)
        size = disk.size_of(active.fd)
        if size < state.end:
            raise LogRegressed(
                self.directory.where(layout.LOG, active.name),
                why=f"it has {size} bytes, {state.end} were written",
            )
        if size > state.end:
            state = self._adopt(active, state, head)
        if state.sealed:
            state = self._begin_next(state)
            head = self._states.head() or head
        if self._current.written_seq != state.seq:
            self._current.catch_up(segments.written_end(state), self._active)
        return state, head

    def _mind_places(self) -> None:
        """Let go of files that are no longer in place, where a name in the store has changed."""
        moved, head_moved = self._root.moved(), self._head.moved()
        if moved or head_moved:
            self._states.renew()
            self._sync.look_for_mark()
            self._redo.reopen()
            self._root.settle()
            self._head.settle()

    def _require_one_name(self, active: segments.Source) -> None:
        """Refuse a segment that was removed or linked elsewhere; a dead rotator's name goes."""
        where = self.directory.where(layout.LOG, active.name)
        segments.sweep(self.directory, self.directory[layout.LOG])
        if os.fstat(active.fd).st_nlink == 0:
            raise StoreMissing(where, why="the active segment was removed")
        disk.require_one_name(active.fd, where=where)

    def _open_active(self, segment: int) -> segments.Source:
        if self._active is None or self._active.first != segment:
            self._close_active()
            self._active = segments.open_active(self.directory, segment)
        if self._names.moved():
            self._require_one_name(self._active)
            self._names.settle()
        return self._active

    def _adopt(self, active: segments.Source, state: AppendState, head: DurableHead) -> AppendState:
        state, found = tail.adopt(self.directory, active, state)
        self._states.put_append_state(state)
        if found.reason is not None and not state.sealed:
            state = self._write_recovered(state, head, found)
        return state

    def _write(
        self, group: Sequence[Request], state: AppendState, head: DurableHead
    ) -> tuple[int, int]:
        """Decide one after the other, write all at once; return how many, and the last seq."""
        base = state  # what is on disk; the lines beyond it are in `data`
        written = Written(self._current, state=base, head=head)
        data: list[bytes] = []
        unit: Unit | None = None  # the last one composed, not yet accounted for
        for index, request in enumerate(group):
            if unit is not None:
                self._account(unit, written)
                unit = None
            try:
                drafts = request.decide(written)
                size = writing.size_of(drafts)
            except Exception as error:  # noqa: BLE001 (whatever it is, it is that request's own)
                request.refuse(error)
                continue
            full = state.end + size > layout.SEGMENT_BYTES_MAX
            if data and (full or state.end + size - base.end > layout.GROUP_BYTES_MAX):
                self._put(b"".join(data), base, state, head)
                return index, state.seq
            if full and state.seq > state.segment:
                base = state = self._begin_next(self._seal(state, head))
                head = self._states.head() or head
                written = Written(self._current, state=base, head=head)
            request.composed = True
            if not drafts:
                request.result = Appended((), {}, state.seq)
                continue
            synced = head.end if head.segment == state.segment else 0
            unit = writing.compose(request, drafts, state, synced=synced)
            state = unit.after
            data += unit.raws
        if data:
            self._put(b"".join(data), base, state, head)
        if unit is not None:  # the last of all only now: its bytes are on their way meanwhile
            self._account(unit, written)
        return len(group), state.seq

    def _account(self, unit: Unit, written: Written) -> None:
        """Take over what a unit changes, and tell who asked for it."""
        after = unit.after
        self._current.advance(unit.lines, segments.written_end(after))
        written.seq = after.seq
        records = {line["sid"]: written.get(line["sid"]) for line in unit.lines}
        unit.request.result = Appended([raw[:-1] for raw in unit.raws], records, after.seq)

    def _put(
        self, data: bytes, state: AppendState, after: AppendState, head: DurableHead
    ) -> AppendState:
        """Write bytes and state, or cut the log back to where it was.

        An interrupt (Ctrl-C) is no reason to cut: once append.state is out, a sync leader may have
        made the lines durable. What it leaves, the next writer adopts.
        """
        active = self._active
        if active is None or active.first != state.segment:
            active = self._open_active(state.segment)
        via = self.directory.disk
        try:
            if via.write(active.fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            after = self._redo.keep(data, after, head=head, source=active)
            self._states.put_append_state(after)
        except OSError as error:
            try:
                via.cut(active.fd, state.end)
                via.sync(active.fd)  # else a power cut may bring back what was "not written"
                self._redo.take_back(state)
                self._states.put_append_state(state)
            except OSError as second:
                raise self._sync.poison_alone(second.errno or errno.EIO) from error
            raise from_oserror(error, "cannot append", where=active.name) from error
        return after

    def _put_own(
        self, kind: str, data: JsonObject, state: AppendState, head: DurableHead
    ) -> AppendState:
        """Append one of the store's own lines."""
        raw, line = segments.own_line(
            kind,
            data,
            seq=state.seq + 1,
            ts=events.timestamp(events.now()),
            synced=head.end if head.segment == state.segment else 0,
            prev=state.hash,
        )
        after = state._replace(
            end=state.end + len(raw),
            seq=line["seq"],
            hash=codec.digest(raw[:-1]),
            sealed=kind == events.SEAL,
        )
        self._current.catch_up(segments.written_end(state))
        after = self._put(raw, state, after, head)
        self._current.advance([line], segments.written_end(after))
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
            raw, _ = segments.own_line(
                events.SEGMENT,
                tail.header_data(self.directory, identity.boot_id(), sealed),
                seq=first,
                ts=events.timestamp(events.now()),
                synced=0,
                prev=sealed.hash,
            )
            segments.put(self.directory, first, raw)
        self._sync.certain_directory(self.directory[layout.LOG])
        active = self._open_active(first)
        self._require_one_name(active)
        data = active.whole()
        found = segments.scan(data, offset=0, seq=sealed.seq, prev=sealed.hash)
        if found.reason is not None or found.end == 0:
            raise LogCorrupt(
                active.name,
                offset=found.end,
                seq=found.seq + 1,
                reason=found.reason or "it is empty",
                proof="it follows a durable seal",
            )
        begun = structs.written(sealed.boot, first, found.end, found.seq, found.hash)
        self._states.put_append_state(begun)
        self._current.catch_up(segments.written_end(begun))
        self._sync.make_durable(begun.seq)
        return begun

    # -- recovery ---------------------------------------------------------------------------

    def _recover(self, head: DurableHead | None) -> tuple[AppendState, DurableHead]:
        """Rebuild both states from the segments. Held: append."""
        with self._sync.nobody_leads():
            head = self._states.head() or head  # a leader may have published meanwhile
            self._current.load()
            state, fresh, cut = tail.rebuild(
                self.directory,
                head,
                boot=self._boot,
                snapshot_seq=self._current.snapshot_seq,
                sync=lambda fd: self._sync.certain(self.directory.disk.sync, fd),
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

    def require_sound(self) -> None:
        """Raise StorePoisoned where a sync failed once: nothing more can be written."""
        self._sync.look_for_mark()
        self._sync.require_sound(self._states.head())

    def take_compact_lock(self) -> Lock:
        """Take locks/compact or raise LockBusy at once; the caller closes it."""
        name = layout.LOCK_COMPACT
        where = self.directory.lock_path(name)
        try:
            return take(name, at=self.directory[layout.LOCKS], where=where)
        except FileNotFoundError as error:
            raise incomplete(error, root=self.directory.root, where=self.where) from error

    @contextmanager
    def alone(self) -> Iterator[States]:
        """Keep every writer and sync leader out, for a repair; yield the states. Held: compact."""
        mine = self.append_lock.held(wait_s=self.wait_s)
        with self.writer, mine, self.mutex, self._sync.nobody_leads():
            yield self._states

    def after_fork(self) -> None:
        """Begin anew in a forked child: the state may be half moved; locks mind themselves."""
        self.mutex = threading.RLock()
        self._new_turn()
        self._states.after_fork()
        self._sync.after_fork()
        self.commits.after_fork()
        self._current.forget()
        self._close_active()
        self._redo.close()
        self._root, self._head = Stamp(self.directory.root), Stamp(self.directory[layout.HEAD])

    def close(self) -> None:
        """Let go of everything once no thread is inside; idempotent.

        The directory stays open for as long as a reader still holds it. From a signal handler that
        has interrupted a change, nothing is closed under it: that is done when this is forgotten.
        """
        if any(map(threads.is_mine, (self.writer, self.mutex, self._sync.turn))):
            self.closed = True
            return
        _living.discard(self)
        with self.writer, self.mutex:
            self.closed = True
            self._current.forget()
            self._close_active()
            self._redo.close()
            self.append_lock.close()
            self._sync.close()
            self._states.close()

    def __del__(self) -> None:
        """Close: who forgets a registry gives its descriptors back all the same."""
        with suppress(AttributeError):  # interrupted while it was made
            self.close()

    def _close_active(self) -> None:
        if self._active is not None:
            self._active.close()
            self._active = None


_living: "weakref.WeakSet[Log]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for log in list(_living):
        log.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
