"""Make written lines durable: phase two of the append, shared by threads and processes.

Whoever finds its line not covered by head/durable waits for the sync leader or becomes it. Leader
g holds the lock g mod 2, so the leader after it takes the other one: with a single lock, the
process that was just served takes it again before the waiting ones wake up. There is one leader
at a time, because g is read from head/durable, which only the leader writes.

What is synced is the redo (redo.py) where it holds all that was written, which takes two thirds of
the time; else, and at a rotation, the segment itself, which is then read back.

A failed sync is never repeated. The leader poisons the store before it gives up its lock, so that
nobody can be acknowledged after it; every later writer of any process refuses.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from crewlog import host
from crewlog.errors import AppendUncertain, CrewlogError, Outcome, StorageFailed, StorePoisoned
from crewlog.local import disk, heads, layout, redo
from crewlog.local.heads import AppendState, DurableHead, States
from crewlog.local.lock import Lock
from crewlog.local.redo import Redo
from crewlog.local.segments import Segment, Segments
from crewlog.model import chain, codec, events
from crewlog.model.events import JsonObject

SYNC_GATHER_MIN_S: Final = 0.000_1  # a shorter pause takes longer than it is worth
SYNC_GATHER_MAX_S: Final = 0.000_3
SYNC_GATHER_SHARE: Final = 0.15  # of what a sync takes

_logger = logging.getLogger("crewlog.sync")


class Syncer:
    """Phase two of one process; threads queue on its turn, processes on the sync locks."""

    def __init__(self, segments: Segments, states: States, *, boot: bytes, wait_s: float) -> None:
        """Use an open store; nothing is opened yet."""
        self._segments = segments
        self._directory = directory = segments.directory
        self._states = states
        self._boot = boot
        self._wait_s = max(wait_s, directory.limits.sync_wait_s)
        self._locks = [
            Lock(name, at=directory[layout.LOCKS], where=directory.lock_path(name))
            for name in layout.LOCK_SYNC
        ]
        self._noted = False
        self._failed = 0  # errno of a failure that this process knows of
        self.turn = threading.RLock()
        # All below is guarded by the turn.
        self._closed = False
        self._segment: Segment | None = None
        self._redo = Redo(directory)
        self._sync_s = 0.0  # what a sync takes, on average
        self._shared = False  # the last sync served others too
        self._served = 1  # so many lines it made durable, ours among them

    def make_durable(
        self,
        seq: int,
        generation: int | None = None,
        begun: Callable[[], None] | None = None,
    ) -> None:
        """Return once head/durable covers `seq`; `begun` is called when our turn has come.

        `generation` is that of the last head the caller saw: a guess at whose turn it is, which is
        checked once the lock is held.
        Raises: AppendUncertain where it cannot be known whether the lines are or will be durable,
        StorageFailed where our own sync failed; the outcome is "unknown" in every case, because the
        lines are written.
        """
        deadline = time.monotonic() + self._wait_s
        if host.is_mine(self.turn):
            raise AppendUncertain(self._where(), why=f"its sync waits for {host.INTERRUPTED}")
        try:  # of what is taken inside, nothing may stay taken after an interrupt; see append.py
            if not self.turn.acquire(timeout=self._wait_s):
                raise AppendUncertain(self._where(), why="another thread's sync does not finish")
            if begun is not None:
                begun()
            self._share(seq, generation, deadline)
        except OSError as error:
            raise AppendUncertain(self._where(), why=error.strerror or str(error)) from error
        except CrewlogError as error:
            if error.outcome == "unknown":
                raise
            raise AppendUncertain(error.where or self._where(), why=str(error)) from error
        finally:
            try:  # noqa: SIM105 (suppress is a call of Python)
                self.turn.release()
            except RuntimeError:  # it was never ours
                pass

    def _where(self) -> str:
        return str(self._directory.path)

    def _share(self, goal: int, generation: int | None, deadline: float) -> None:
        """Wait for the leader or become it, turn by turn. Held: the turn."""
        while True:
            if self._closed:
                raise AppendUncertain(self._where(), why="the registry was closed meanwhile")
            if generation is None:
                head = self._usable_head()
                if head.seq >= goal:
                    return
                generation = head.generation
            lock, led = self._locks[(generation + 1) % 2], False
            try:
                led = lock.try_acquire()
                if led and self._lead(generation, goal):
                    return
            finally:
                lock.release()
                if led and self._states.published.crowd:
                    # whoever has waited longest first: all that are served, and a next leader
                    self._states.published.wake(self._served)
            if time.monotonic() > deadline:
                raise AppendUncertain(
                    lock.where, why=f"the sync leader, {lock.holder()}, does not finish"
                )
            if not led:
                self._states.published.wait(generation & 0xFFFF_FFFF, deadline - time.monotonic())
            generation = None

    def _usable_head(self) -> DurableHead:
        """Return the head.

        Raises: AppendUncertain if it is unreadable or the store poisoned.
        """
        head = self._states.head()
        if head is None or head.boot != self._boot:
            raise AppendUncertain(
                self._directory.where(layout.HEAD, layout.HEAD_DURABLE), why="it became unreadable"
            )
        if head.poisoned or self._failed:
            why = f"a sync failed: {os.strerror(head.errno or self._failed)}"
            raise AppendUncertain(self._where(), why=why)
        return head

    def _lead(self, generation: int, goal: int) -> bool:
        """Sync what is written and publish it, unless another leader did; say if that covers.

        Held: the lock of this generation's successor.
        """
        # 1. is it still our turn?
        head = self._usable_head()
        if head.seq >= goal:
            return True
        if head.generation != generation:
            return False
        # 2. where the last sync took long and served others too, a pause lets all of them come
        pause_s = SYNC_GATHER_SHARE * self._sync_s
        if self._shared and pause_s >= SYNC_GATHER_MIN_S:
            time.sleep(min(pause_s, SYNC_GATHER_MAX_S))
        # 3. how far lines are written: before the sync, and never by fstat, for a killed writer's
        #    half line must not count
        state = self._states.append_state()
        if state is None or state.boot != self._boot or state.seq < goal:
            raise AppendUncertain(
                self._directory.where(layout.APPEND_STATE), why="it became unreadable"
            )
        # 4. what will be published; the disk is at work already, so this costs no time
        via, kept = self._directory.disk, self._redo.descriptor(state)
        fresh = heads.durable(state, base=head.base if kept >= 0 else state.end, after=head)
        data = heads.encode_durable_head(fresh)
        # 5. sync the redo, where that holds all of it; else the segment, which is then read back
        began = time.perf_counter()
        if kept >= 0:
            self.certain(via.sync, kept)
        else:
            source = self._open_segment(state.segment)
            self.certain(via.sync, source.fd)
            if head.segment != state.segment or head.base < state.kept:
                self._read_back(state, source)
        self._sync_s = 0.8 * self._sync_s + 0.2 * (time.perf_counter() - began)
        # 6. publish: the commit point
        self._shared = state.seq > goal
        self._served = state.seq - head.seq
        self._states.put_head(fresh, data)
        return True

    def _open_segment(self, first: int) -> Segment:
        held = self._segment
        if held is None or held.first != first or held.is_gone():
            self._close_segment()
            held = self._segment = self._segments.open_to_append(first)
        return held

    def _read_back(self, state: AppendState, source: Segment) -> None:
        """Read what only the redo held so far from the segment, before the redo begins anew.

        Between its writing and its sync the kernel may have failed to write a page, told nobody who
        asks now, and dropped it.
        """
        size = state.kept - state.base
        data = disk.read_from_device(source.fd, state.base, size)
        if data != redo.read(self._directory)[:size] and not chain.is_whole(data):
            self.poison(errno.EIO)
            raise StorageFailed(
                "the log lost what was written to it",
                where=self._directory.where(layout.LOG, source.name),
                why=f"bytes {state.base} to {state.kept} are not what was committed",
                remedy="The store takes no more changes; check the disk, then run: crewlog repair",
                outcome="unknown",
            )

    def certain(self, sync: Callable[[int], None], fd: int) -> None:
        """Sync; if that fails, poison the store and raise StorageFailed, outcome "unknown"."""
        try:
            sync(fd)
        except OSError as error:
            number = error.errno or errno.EIO
            self.poison(number)
            raise StorageFailed(
                "the sync failed",
                where=self._where(),
                why=os.strerror(number),
                remedy="The store takes no more changes; check the disk before anything else",
                outcome="unknown",
            ) from error

    def certain_directory(self, fd: int) -> None:
        """Sync a directory while nobody leads. Held: append."""
        with self.nobody_leads():
            self.certain(self._directory.disk.sync_directory, fd)

    def certain_alone(self, fd: int) -> None:
        """Sync; if that fails, poison while nobody leads, and raise StorePoisoned. Held: append."""
        try:
            self._directory.disk.sync(fd)
        except OSError as error:
            number = error.errno or errno.EIO
            with self.nobody_leads():
                self.poison(number)
            raise self.poisoned(number, outcome="unknown") from error

    def poison(self, number: int) -> None:
        """Tell every process, of this boot and later ones, that nothing may be acknowledged.

        Held: the sync lock whose turn it is, or both; else a leader's head could undo the flag.
        Each of the three marks is enough: the head's flag, the note, and our own memory.
        """
        self._failed = number
        try:
            self._leave_note(number)
        except (OSError, CrewlogError) as error:
            _logger.critical("cannot make durable that a sync failed: %s", error)
        try:
            head = self._states.head()
            if head is not None:
                self._states.put_head(head._replace(poisoned=True, errno=number))
        except (OSError, CrewlogError) as error:
            _logger.critical("cannot flag the store as poisoned: %s", error)

    def _leave_note(self, number: int) -> None:
        """Write POISON.json; it stays in place even where its own sync fails."""
        via, root = self._directory.disk, self._directory.root
        if disk.exists(layout.POISON, at=root):
            return
        note: JsonObject = {
            "at": events.timestamp(host.now()),
            "errno": number,
            "error": os.strerror(number),
        }
        fd = via.create(layout.POISON, at=root, append=True)
        try:
            disk.write_all(via, fd, codec.dump(note) + b"\n")
            via.sync(fd)
        finally:
            os.close(fd)
        via.sync_directory(root)

    def look_for_mark(self) -> None:
        """See whether a failed sync was noted; it need not be looked for while no name changes."""
        self._noted = disk.exists(layout.POISON, at=self._directory.root)

    def require_sound(self, head: DurableHead | None) -> None:
        """Raise StorePoisoned if any mark says that a sync failed. Nothing is written then."""
        if self._noted or self._failed or (head is not None and head.poisoned):
            raise self.poisoned(self._failed or (head.errno if head is not None else 0))

    def poisoned(self, number: int, *, outcome: Outcome = "not_written") -> StorePoisoned:
        """Return the error for a writer that finds the store poisoned."""
        where = self._directory.where(layout.POISON)
        why = f"a sync failed: {os.strerror(number or errno.EIO)}"
        return StorePoisoned(where, why=why, outcome=outcome)

    @contextmanager
    def nobody_leads(self) -> Iterator[None]:
        """Hold off every leader, while the states are rebuilt. Held: append."""
        first, second = self._locks
        with self.turn, first.held(wait_s=self._wait_s), second.held(wait_s=self._wait_s):
            yield

    def after_fork(self) -> None:
        """Begin anew in a forked child; the locks look after themselves."""
        self.turn = threading.RLock()
        self._close_files()

    def close(self) -> None:
        """Fail waiting callers with AppendUncertain, and close every descriptor."""
        with self.turn:
            self._closed = True
            for lock in self._locks:
                lock.close()
            self._close_files()

    def _close_files(self) -> None:
        self._close_segment()
        self._redo.close()

    def _close_segment(self) -> None:
        held, self._segment = self._segment, None  # first: an interrupt must not leave it closed
        if held is not None:
            held.close()
