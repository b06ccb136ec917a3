"""Append events: the two-phase commit of a directory, its rotation and recovery; the argument.

Format
    A store's history is a chain of checked lines (model/codec.py) in segments under log/. The last
    segment is active, every other one ends with a seal. append.state tells how far lines are
    *written*, head/durable how far they are *durable*; both are caches of what the segments say.
    redo holds the bytes of the last segment that were committed since it was synced itself.

Valid if and only if
    A line counts once head/durable covers it, if that was written in this boot, to this file, and
    the files are of one age (recovery.py). Else a line counts if it lies in the valid prefix of the
    last segment, as the redo completes it (redo.py) and recovery.decide judges it.

Order of changes
    Writer, under locks/append: segment, redo, append.state. Sync leader: sync, then head/durable.
    Whoever takes lines away first zeroes their copy in the redo and syncs that, then shortens the
    segment and syncs that, then writes the states.

Writer
    One thread of a process writes for all that wait (queue.py).
    Phase one, under locks/append: read both states. Where they are what this process left, go
    straight on. Where others wrote since, their first line must follow the hash that this process
    knew. Else, and at the first use: recover if the states are not of this boot, file and age;
    adopt or cut what a dead writer left beyond the written end; put back what the redo knows to
    follow. Then let the callers decide; write all lines with one write(2); copy them into the redo;
    write append.state; unlock.
    Phase two (sync.py), no append lock: until head/durable covers my last line, wait for the sync
    leader or become it. The leader reads append.state, syncs the redo (or, where that does not hold
    all of it, the segment, which is then read back from the device), publishes head/durable.
    **The commit point is the write of head/durable.**

Reader (log.py)
    Reads head/durable, then the segments up to it. Takes no lock, changes nothing.

Lock order
    compact, append, sync. In a process: writer, append lock, mutex, turn, sync lock. A sync
    leader never takes the append lock; nobody holds a lock while a caller's probe runs.

Crash argument
    kill -9 before the write: nothing happened. During or after it, before append.state: bytes
    beyond the written end; nobody was told, and readers never see beyond head/durable; the next
    writer adopts whole lines and batches and quarantines the rest. After append.state: the next
    leader syncs the lines; their caller never heard. Before the publication: synced or not, not
    acknowledged. The kernel frees a dead holder's locks.
    A device that loses what was not synced (a power cut; also, in the same boot, a file system
    that shut down and is mounted again, a detached volume, a snapshot of the device): a line was
    acknowledged only after a sync of its copy in the redo, which is not overwritten before the
    segment was synced and read back, or of the segment, whose name was durable before its first
    line. So every acknowledged line is in the segment's durable prefix or chains on in the redo,
    whatever the ages of the files; `synced` in later lines and head/durable bear witness, so
    recovery can tell a torn tail (never acknowledged, cut) from damage (acknowledged, refused). An
    open file pins its file system, so only a new open can meet files of different ages.
    A failed sync is never repeated: it poisons the store for every process before anyone can append
    after it. Any other failure is taken back, or told as "unknown" where it may come back.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, ParamSpec, TypeGuard, TypeVar

from crewlog import host
from crewlog.errors import (
    CrewlogError,
    DataDamaged,
    HistoryRewound,
    LockBusy,
    LogCorrupt,
    RegistryClosed,
    SegmentMissing,
    StorageFailed,
    StoreMissing,
    from_oserror,
)
from crewlog.local import disk, heads, layout, recovery, redo
from crewlog.local.disk import Stamp
from crewlog.local.heads import AppendState, DurableHead, States
from crewlog.local.layout import Directory, incomplete
from crewlog.local.lock import Lock
from crewlog.local.redo import Redo
from crewlog.local.segments import Segment, Segments, put, sweep
from crewlog.local.sync import Syncer
from crewlog.local.view import LocalTip, Own, View
from crewlog.model import chain, codec, events, steps
from crewlog.model.chain import Scan
from crewlog.model.codec import Draft
from crewlog.model.events import JsonObject
from crewlog.model.steps import Appended
from crewlog.process import identity
from crewlog.queue import Request

_logger = logging.getLogger("crewlog.log")
_CATCH_UP_IDLE_S: Final = 0.05
_MANY: Final = 16  # lines of others between two changes of ours: about so many take turns
_GO_ON: Final = 4  # where there are many, one yield of so many is left out
P = ParamSpec("P")
T = TypeVar("T")


def size_of(drafts: Sequence[Draft]) -> int:
    """Return how many bytes the lines will take at most.

    Raises: ValueError for too much.
    """
    if len(drafts) == 1:  # a draft is shorter than a line may be, and that than a batch
        return len(drafts[0].body) + codec.LINE_OVERHEAD_BYTES
    size = sum(len(part.body) for part in drafts) + codec.LINE_OVERHEAD_BYTES * len(drafts)
    if len(drafts) > steps.BATCH_EVENTS_MAX or size > steps.BATCH_BYTES_MAX:
        message = (
            f"a batch holds at most {steps.BATCH_EVENTS_MAX} events "
            f"and {steps.BATCH_BYTES_MAX} bytes"
        )
        raise ValueError(message)
    return size


def _begins_behind(left: AppendState, data: bytes) -> bool:
    """Say whether the first of some lines names the last one of a state as that before it."""
    return left.hash.hex().encode() in data[: data.find(b"\n") + 1]


def _stamp(directory: Directory) -> Stamp:
    """Stamp the directories in which a file that a writer has open may be replaced."""
    return Stamp(directory.root, directory[layout.HEAD], directory[layout.LOG])


class Appender:
    """Phase one of one process, and what it needs of phase two; threads queue on its mutexes."""

    def __init__(self, segments: Segments, states: States, view: View, *, wait_s: float) -> None:
        """Use an open store; nothing is opened yet."""
        self.directory = directory = segments.directory
        self.segments = segments
        self.closed = False
        self.wait_s = wait_s
        self.limits = directory.limits
        self.lock = Lock(
            layout.LOCK_APPEND,
            at=directory[layout.LOCKS],
            where=directory.lock_path(layout.LOCK_APPEND),
        )
        self.writer = threading.RLock()  # one thread at a time writes; taken before the mutex
        self.mutex = threading.RLock()  # guards the view, and all that a writer has open
        self._where = str(directory.path)
        self._boot = identity.boot_bytes()
        self._heads = states
        self._view = view
        self.sync = Syncer(segments, states, boot=self._boot, wait_s=wait_s)
        self.make_durable = self.sync.make_durable  # phase two
        # All below is guarded by the mutex.
        self._left: AppendState | None = None  # how far the log was when we last wrote or looked
        self._between = 0  # lines that others wrote between our last two changes
        self._active: Segment | None = None
        self._redo = Redo(directory)
        self._stamp = _stamp(directory)
        self._replaced = False  # the active segment is another file than the one we wrote to
        self._names_durable = False
        self._prepared_at = 0.0

    def write(self, group: Sequence[Request]) -> tuple[int, int, int]:
        """Do phase one for a group; see queue.Phases."""
        about = set(group[0].about)
        for request in group[1:]:
            about.update(request.about)
        now, knows = time.monotonic(), about <= self._view.recent.keys()
        if not knows or now - self._prepared_at >= _CATCH_UP_IDLE_S:
            self._prepared_at = now
            self._prepare(knows=knows)
        return self._run(self._write, group)

    def note(self, kind: str, data: JsonObject) -> None:
        """Append one of the store's own lines; durable on return."""
        state = self._run(lambda: self._put_own(kind, data, *self._ready()))
        self.sync.make_durable(state.seq)

    def rotate(self) -> None:
        """Seal the active segment and begin the next one; durable on return."""
        self._run(lambda: self._begin_next(self._seal(*self._ready())))

    def _prepare(self, *, knows: bool) -> None:
        """Read, before the lock is taken, what would take long under it.

        `knows`: the records that are asked for are at hand, as of when this process looked last.
        """
        with disk.failures("cannot read the registry", where=self._where):
            state = self._heads.append_state()
        if state is None or state.boot != self._boot:
            return  # recovery comes first
        head = None
        if not knows:
            with self.mutex:
                if self._view.reaches(state):
                    return
            self._heads.renew()
            with disk.failures("cannot read the registry", where=self._where):
                head = self._heads.head()
                if self._left is None and recovery.proof(self.segments, self._heads):
                    return  # recovery comes first
        # What is damaged, or was lost, is judged under the lock.
        failures = disk.failures("cannot read the log", where=self._where)
        with failures, suppress(DataDamaged), self.mutex:
            if knows and self._view.lag(state.seq) > self.limits.catch_up_lines:
                self._view.catch_up(state)
            elif not knows and self._is_here(head):
                self._view.durable(head.position)

    def _ready(self) -> tuple[AppendState, DurableHead]:
        """Bring log and states into the order that an append starts from. Held: append."""
        if self.closed:
            raise RegistryClosed(self._where)
        moved, active, left = self._stamp.moved(), self._active, self._left
        if moved:
            self._mind_places()
        state, head = self._heads.append_state(), self._heads.head()
        self.sync.require_sound(head)
        if (
            not (moved or state is None or left is None or active is None)
            and self._is_here(head)
            and state.boot == self._boot
            and not state.sealed
            and self._view.written is left
            and os.lseek(active.fd, 0, os.SEEK_END) == state.end
        ):
            # Nobody has written since we did: there is nothing to do.
            if state is left:
                self._between = 0
                return state, head
            # Others have, in this segment, for a next one moves log/: their first line must follow
            # our last one.
            if state.seq > left.seq:
                data = active.read(left.end, state.end - left.end)
                if _begins_behind(left, data):
                    self._view.catch_up(state, data)
                    self._left, self._between = state, state.seq - left.seq
                    return state, head
        return self._put_in_order(state, head, moved=moved)

    def _put_in_order(
        self, state: AppendState | None, head: DurableHead | None, *, moved: bool
    ) -> tuple[AppendState, DurableHead]:
        """Recover, adopt, look at strangers, go on in the next segment: what the log needs now."""
        known = state is not None and not self._replaced and self._goes_on(state)
        if state is None or head is None or not self._counts(state, head, known=known):
            state, head = self._recover(head)
        if not self._names_durable:  # who created the store may have died before it synced them
            self.sync.certain_directory(self.directory.root)
            self._names_durable = True
        active = self._open_active(state.segment)
        size = disk.size_of(active.fd)
        if size < state.end:
            state, head = self._recover(head)
        elif size > state.end:
            state = self._adopt(active, state, head)
        if moved:
            self._require_no_strangers(state)
        if not known:
            state, head = self._meet(state, head)
        if state.sealed:
            state = self._begin_next(state)
            head = self._heads.head() or head
        self._view.catch_up(state)
        self._left = state
        if moved:
            self._stamp.settle()  # last: what was refused is looked at again
        return state, head

    def _is_here(self, head: DurableHead | None) -> TypeGuard[DurableHead]:
        """Say whether a head was written in this boot, to this file."""
        return head is not None and head.boot == self._boot and not self._heads.is_elsewhere(head)

    def _goes_on(self, state: AppendState) -> bool:
        """Say whether a state is the one that this process left, moved forward along the chain."""
        left = self._left
        if left is None or state.seq <= left.seq:
            return left is not None and (state.seq, state.hash) == (left.seq, left.hash)
        try:
            with self.segments.open(left.segment) as source:
                data = source.read(left.end, codec.LINE_BYTES_CEILING)
        except SegmentMissing:  # retention took what we had not read
            return False
        return _begins_behind(left, data)

    def _counts(self, state: AppendState, head: DurableHead, *, known: bool) -> bool:
        """Say whether the states tell of this log: of this boot, this file, one age."""
        if state.boot != self._boot or not self._is_here(head):
            return False
        return known or recovery.proof_for_writer(self.segments, state, head) is None

    def _meet(self, state: AppendState, head: DurableHead) -> tuple[AppendState, DurableHead]:
        """Go on from states that this process has not left so: what it knew is read anew.

        What the redo knows to follow the last whole line is put back first.
        Raises: HistoryRewound where this process has seen more than there is: a backup was restored
        under it.
        """
        kept = redo.read(self.directory)
        if not state.sealed and redo.line_after(kept, state.seq, state.hash):
            state, head = self._recover(head)
        if self._left is not None:
            if state.seq < self._left.seq:
                raise HistoryRewound(self._where, seen=self._left.seq, found=state.seq)
            self._view.forget()
        self._left, self._replaced = state, False
        return state, head

    def _require_no_strangers(self, state: AppendState) -> None:
        """Refuse before anything is acknowledged: a reader would take such a file for the log.

        Raises: LogCorrupt for a file behind the last segment that is none of this log.
        """
        for first in self.segments.in_log():
            if first > state.segment and not self.segments.is_ours(first):
                raise LogCorrupt(
                    layout.segment_name(first),
                    offset=0,
                    seq=first,
                    reason="it has no header of this store",
                    proof="no line of the log leads to it",
                )

    def _mind_places(self) -> None:
        """Reopen files that were replaced: a directory entry has changed."""
        active = self._active
        if active is not None and os.fstat(active.fd).st_nlink == 0:
            self._close_active()  # another file took its place, as a tool that copies does
            self._replaced = True
        elif active is not None:
            self._require_one_name(active)
        self._heads.renew()
        self.sync.look_for_mark()
        self._redo.reopen()

    def _require_one_name(self, active: Segment) -> None:
        """Refuse a segment that was removed or linked elsewhere; a dead rotator's name goes."""
        where = self.directory.where(layout.LOG, active.name)
        sweep(self.directory, layout.LOG)
        if os.fstat(active.fd).st_nlink == 0:
            raise StoreMissing(where, why="the active segment was removed")
        disk.require_one_name(active.fd, where=where)

    def _open_active(self, segment: int) -> Segment:
        if self._active is None or self._active.first != segment:
            self._close_active()
            self._active = self.segments.open_to_append(segment)
            self._require_one_name(self._active)
        return self._active

    def _adopt(self, active: Segment, state: AppendState, head: DurableHead) -> AppendState:
        state, scan = recovery.adopt(self.directory, active, state)
        self._heads.put_append_state(state)
        if scan.reason is not None and not state.sealed:
            state = self._write_recovered(state, head, scan)
        return state

    def _write(  # noqa: C901, PLR0912, PLR0915 (a protocol: the page is the unit)
        self, group: Sequence[Request]
    ) -> tuple[int, int, int]:
        """Decide one request after the other, upon the newest record; write all lines at once.

        Returns how many requests were taken, the seq of the last line, and the generation of the
        head that was seen. Held: append.
        """
        # 1. log and states are in order: recovered, adopted, rotated, looked at, if need be
        state, head = self._ready()
        view, limits, base = self._view, self.limits, state
        if len(view.recent) >= limits.recent_workers:  # now: soon lines are known here alone
            view.recent = {}
        try:
            tip = LocalTip(view, state=state, head=head)
            raws: list[bytes] = []  # what is decided, and not on the disk yet
            own: list[Own] = []  # the same, folded
            taken, now, recent = 0, "", view.recent
            segment, end, seq, prev = state.segment, state.end, state.seq, state.hash
            for request in group:
                # 2. decide; a refusal is that request's own, and the others go on
                try:
                    drafts = request.decide(tip)
                    size, count = size_of(drafts), len(drafts)
                except Exception as error:  # noqa: BLE001 (whatever it is)
                    if raws and view.recent is not recent:
                        break  # as below
                    request.refuse(error)
                    taken += 1
                    continue
                if raws and view.recent is not recent:
                    break  # what those before it write was forgotten: it is decided anew after that
                # 3. room: what does not fit waits for the next write, or the next segment
                full = end + size > limits.segment_bytes
                if raws and (full or end + size - base.end > limits.group_bytes):
                    break
                if full and seq > segment:
                    base = self._begin_next(self._seal(base, head))
                    head = self._heads.head() or head
                    tip = LocalTip(view, state=base, head=head)
                    segment, end, seq, prev = base.segment, base.end, base.seq, base.hash
                recent = view.recent
                # 4. compose its lines and fold them: the next request is decided upon that
                taken += 1
                request.composed = True
                if not drafts:
                    request.result = Appended((), {}, seq)
                    continue
                now, mine, records = now or events.timestamp(host.now()), [], {}
                synced = head.end if head.segment == segment else 0
                for index, part in enumerate(drafts):
                    seq += 1
                    place = (index, count) if count > 1 else None
                    raw = codec.line(part, seq=seq, ts=now, synced=synced, prev=prev, batch=place)
                    mine.append(raw[:-1])
                    prev = codec.digest(raw[:-1])
                    end += len(raw)
                    raws.append(raw)
                    records[part.sid] = record = tip.take(part, seq=seq, ts=now)
                    own.append((segment, end, seq, part.type, part.sid, record))
                request.result = Appended(mine, records, seq)
            # 5. one write, the copy in the redo, append.state: all of it or nothing
            if raws:
                after = self._put(b"".join(raws), base, head, seq=seq, hash_=prev)
                view.keep(own)
                if view.recent is recent:
                    view.written = after
                else:
                    view.forget_written()
        except BaseException:
            view.forget_written()  # it holds lines that may never be
            raise
        return taken, seq, head.generation

    def _put(
        self,
        data: bytes,
        state: AppendState,
        head: DurableHead,
        *,
        seq: int,
        hash_: bytes,
        sealed: bool = False,
    ) -> AppendState:
        """Write lines behind `state`, up to line `seq`, or cut the log back to where it was.

        An interrupt (Ctrl-C) is no reason to cut: once append.state is out, a sync leader may have
        made the lines durable. What it leaves, the next writer adopts.
        """
        active = self._active
        if active is None or active.first != state.segment:
            active = self._open_active(state.segment)
        boot, segment, end = state.boot, state.segment, state.end + len(data)
        try:
            if self.directory.disk.write(active.fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            inode, base, kept = self._redo.keep(data, state, head=head, source=active)
            after = AppendState(boot, segment, inode, base, kept, end, seq, hash_, sealed)
            self._heads.put_append_state(after)
        except OSError as error:
            self._take_back(active, state)
            disk.require_length(end, where=self._where)
            raise from_oserror(error, "cannot append", where=active.name) from error
        except CrewlogError:
            self._take_back(active, state)
            raise
        self._left = after
        return after

    def _take_back(self, active: Segment, state: AppendState) -> None:
        """Cut the log back to `state`; durable, so that no power cut brings back what was refused.

        The copy in the redo goes first: as long as it is there, the lines may come back. A state
        file that cannot be put back (no room) is a cache: the next writer rebuilds it.
        Raises: StorePoisoned where a sync fails, StorageFailed where a line may come back; both
        "unknown".
        """
        via = self.directory.disk
        try:
            self._redo.take_back(state)
            via.cut(active.fd, state.end)
            self.sync.certain_alone(active.fd)
        except OSError as error:
            raise StorageFailed(
                "a change that failed may come back",
                where=self.directory.where(layout.LOG, active.name),
                why=error.strerror or str(error),
                remedy="Make room, then read the registry before trying again",
                outcome="unknown",
            ) from error
        try:
            self._heads.put_append_state(state)
        except OSError as error:
            _logger.warning("append.state will be rebuilt: %s", error)

    def _put_own(
        self, kind: str, data: JsonObject, state: AppendState, head: DurableHead
    ) -> AppendState:
        """Append one of the store's own lines."""
        raw, line = chain.own_line(
            kind,
            data,
            seq=state.seq + 1,
            ts=events.timestamp(host.now()),
            synced=head.end if head.segment == state.segment else 0,
            prev=state.hash,
        )
        self._view.catch_up(state)
        self._view.written = after = self._put(
            raw,
            state,
            head,
            seq=line["seq"],
            hash_=codec.digest(raw[:-1]),
            sealed=kind == events.SEAL,
        )
        return after

    def _seal(self, state: AppendState, head: DurableHead) -> AppendState:
        """Write the seal; `_begin_next` makes it durable before a successor may exist."""
        return self._put_own(events.SEAL, {"first": state.segment}, state, head)

    def _begin_next(self, sealed: AppendState) -> AppendState:
        """Put the successor of a sealed segment in place, or find the one that is there.

        An interrupted rotation is finished here by whoever holds the append lock next: each step
        follows from what the one before it left.
        """
        self.sync.make_durable(sealed.seq)
        first = sealed.seq + 1
        if first not in self.segments.in_log():
            raw, _ = chain.own_line(
                events.SEGMENT,
                recovery.header_data(self.directory, identity.boot_id(), sealed),
                seq=first,
                ts=events.timestamp(host.now()),
                synced=0,
                prev=sealed.hash,
            )
            put(self.directory, first, raw)
        self.sync.certain_directory(self.directory[layout.LOG])
        active = self._open_active(first)
        self._require_one_name(active)
        data = active.whole()
        scan = chain.scan(data, offset=0, seq=sealed.seq, prev=sealed.hash)
        if scan.reason is not None or scan.end == 0:
            raise LogCorrupt(
                active.name,
                offset=scan.end,
                seq=scan.seq + 1,
                reason=scan.reason or "it is empty",
                proof="it follows a durable seal",
            )
        begun = heads.written(sealed.boot, first, scan.end, scan.seq, scan.hash)
        self._heads.put_append_state(begun)
        self._view.catch_up(begun)
        self.sync.make_durable(begun.seq)
        return begun

    def _recover(self, head: DurableHead | None) -> tuple[AppendState, DurableHead]:
        """Rebuild both states from the segments. Held: append."""
        with self.sync.nobody_leads():
            head = self._heads.head() or head  # a leader may have published meanwhile
            self._view.load()
            self._view.forget_written()  # a line of it may be gone
            state, fresh, cut = recovery.rebuild(
                self.segments,
                head,
                boot=self._boot,
                snapshot_seq=self._view.snapshot_seq,
                sync=lambda fd: self.sync.certain(self.directory.disk.sync, fd),
            )
            self._heads.put_append_state(state)
            self._heads.put_head(fresh)
        if cut is not None:
            _logger.warning("cut %d unacknowledged bytes off the log", cut.size - cut.end)
            if not state.sealed:
                state = self._write_recovered(state, fresh, cut)
        return state, fresh

    def _write_recovered(self, state: AppendState, head: DurableHead, cut: Scan) -> AppendState:
        data = recovery.recovered_data(state.segment, cut)
        return self._put_own(events.RECOVERED, data, state, head)

    def _run(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Do the work under the writer mutex, locks/append and the state mutex, in this order.

        The mutex comes last, so readers of this process never wait for another process's lock. An
        interrupt (Ctrl-C) may come wherever a function of Python begins or a call has returned, and
        must leave nothing taken: so all of it is given back by calls of C alone, each in a
        `finally` of its own.
        Raises: LockBusy after `wait_s`; what the work raises, typed.
        """
        if host.is_mine(self.writer):
            raise LockBusy(self.lock.where, waited_s=0, holder=host.INTERRUPTED)
        deadline = time.monotonic() + self.wait_s
        try:
            if not self.writer.acquire(timeout=self.wait_s):
                raise LockBusy(self.lock.where, waited_s=self.wait_s, holder="another thread")
            try:
                if not self.lock.try_acquire():
                    self.lock.wait(self._heads.written, deadline)
                with self.mutex:
                    return work(*args, **options)
            finally:
                self.lock.release()
                if self._heads.written.crowd:
                    self._heads.written.wake(1)
                    # Yield to whom was woken: all wait for what is done under the lock. It costs a
                    # turn of the scheduler; among many that adds up to whole turns without a change
                    if self._between < _MANY or self._heads.written.crowd % _GO_ON:
                        os.sched_yield()
        except OSError as error:
            raise self._typed(error) from error
        finally:
            try:  # noqa: SIM105 (suppress is a call of Python)
                self.writer.release()
            except RuntimeError:  # it was never ours
                pass

    def _typed(self, error: OSError) -> CrewlogError:
        root, where = self.directory.root, str(self.directory.path)
        if isinstance(error, FileNotFoundError):
            return incomplete(error, root=root, where=where)
        return from_oserror(error, "cannot write to the registry", where=where)

    # -- life -------------------------------------------------------------------------------

    def require_sound(self) -> None:
        """Raise StorePoisoned where a sync failed once: nothing more can be written."""
        self.sync.look_for_mark()
        self.sync.require_sound(self._heads.head())

    def after_fork(self) -> None:
        """Begin anew in a forked child: the state may be half moved; locks mind themselves."""
        self.writer, self.mutex = threading.RLock(), threading.RLock()
        self.sync.after_fork()
        self._close_files()
        self._left = None
        self._stamp = _stamp(self.directory)

    def is_inside(self) -> bool:
        """Return whether this very thread is in the middle of a change."""
        return any(map(host.is_mine, (self.writer, self.mutex, self.sync.turn)))

    def close(self) -> None:
        """Close every file and lock. Held: the writer mutex and the mutex."""
        self.closed = True
        self._close_files()
        self.lock.close()
        self.sync.close()

    def _close_files(self) -> None:
        self._close_active()
        self._redo.close()

    def _close_active(self) -> None:
        active, self._active = self._active, None  # first: an interrupt must not leave it closed
        if active is not None:
            active.close()
