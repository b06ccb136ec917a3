"""Make written lines durable: phase two of the append, shared by threads and processes.

Whoever finds its line not covered by head/durable waits for the sync leader or becomes it. Leader
g holds the lock g mod 2, so the leader after it takes the other one: with a single lock, the
process that was just served takes it again before the waiting ones wake up. There is one leader
at a time, because g is read from head/durable, which only the leader writes.

A failed sync is never repeated. The leader poisons the store before it gives up its lock, so that
nobody can be acknowledged after it; every later writer of any process refuses.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import NoReturn

from crewlog import codec, disk, events, layout, segments
from crewlog.codec import AppendState, DurableHead
from crewlog.directory import Directory
from crewlog.errors import AppendUncertain, StorageFailed, StorePoisoned
from crewlog.events import JsonObject
from crewlog.lock import Lock
from crewlog.segments import Source
from crewlog.states import States

_logger = logging.getLogger("crewlog.sync")


class Syncer:
    """Phase two of one process; threads queue on its turn, processes on the sync locks."""

    def __init__(self, directory: Directory, states: States, *, boot: bytes, wait_s: float) -> None:
        """Use an open store; nothing is opened yet."""
        self._directory = directory
        self._states = states
        self._boot = boot
        self._wait_s = wait_s
        self._locks = [
            Lock(name, at=directory[layout.LOCKS], where=directory.lock_path(name))
            for name in layout.LOCK_SYNC
        ]
        self._turn = threading.Lock()
        # All below is guarded by _turn.
        self._segment: Source | None = None
        self._sync_s = 0.0  # what a sync takes, on average
        self._shared = False  # the last sync served others too

    def make_durable(self, goal: int, generation: int | None = None) -> None:
        """Return once head/durable covers seq `goal`.

        `generation` is that of the last head the caller saw: a guess at whose turn it is, which
        is checked once the lock is held.
        *Raises* AppendUncertain where that cannot be known: the store is poisoned, or the leader
        does not finish; StorageFailed with the outcome "unknown" where our own sync failed.
        """
        with self._turn:
            deadline = time.monotonic() + self._wait_s
            pause_s = layout.LOCK_POLL_MIN_S
            while True:
                if generation is None:
                    head = self._head()
                    if head.seq >= goal:
                        return
                    generation = head.generation
                lock = self._locks[(generation + 1) % 2]
                if lock.try_acquire():
                    try:
                        if self._lead(generation, goal):
                            return
                    finally:
                        lock.release()
                    generation = None
                    continue
                generation = None
                if time.monotonic() > deadline:
                    raise AppendUncertain(
                        lock.where, why=f"the sync leader, {lock.holder()}, does not finish"
                    )
                time.sleep(pause_s)
                pause_s = min(pause_s * 1.5, layout.LOCK_POLL_MAX_S)

    def _head(self) -> DurableHead:
        head = self._states.head()
        if head is None or head.boot != self._boot:
            raise AppendUncertain(
                self._directory.where(layout.HEAD, layout.HEAD_DURABLE), why="it became unreadable"
            )
        if head.poisoned:
            raise AppendUncertain(
                str(self._directory.path), why=f"a sync failed: {os.strerror(head.errno)}"
            )
        return head

    def _lead(self, generation: int, goal: int) -> bool:
        """Sync what is written and publish it, unless another leader did; say if that covers.

        Held: the lock of this generation's successor.
        """
        head = self._head()
        if head.seq >= goal:
            return True
        if head.generation != generation:
            return False
        if self._shared:
            time.sleep(min(layout.SYNC_GATHER_SHARE * self._sync_s, layout.SYNC_GATHER_MAX_S))
        # Before the sync, and never by fstat: a killed writer's half line must not count.
        state = self._states.append_state()
        if state is None or state.boot != self._boot:
            raise AppendUncertain(
                self._directory.where(layout.APPEND_STATE), why="it became unreadable"
            )
        self._sync(state)
        self._shared = state.seq > goal
        fresh = DurableHead(
            generation + 1,
            self._boot,
            state.segment,
            state.end,
            state.seq,
            head.oldest,
            poisoned=False,
            errno=0,
        )
        try:
            self._states.put_head(fresh)
        except OSError as error:
            raise AppendUncertain(
                self._directory.where(layout.HEAD, layout.HEAD_DURABLE), why=str(error)
            ) from error
        return state.seq >= goal

    def _sync(self, state: AppendState) -> None:
        if self._segment is None or self._segment.first != state.segment:
            self._close_segment()
            self._segment = segments.open_active(self._directory, state.segment)
        began = time.perf_counter()
        try:
            self._directory.disk.sync(self._segment.fd)
        except OSError as error:
            self._failed(error)
        self._sync_s = 0.8 * self._sync_s + 0.2 * (time.perf_counter() - began)

    def _failed(self, error: OSError) -> NoReturn:
        number = error.errno or errno.EIO
        self.poison(number)
        raise StorageFailed(
            "the sync failed",
            where=str(self._directory.path),
            why=os.strerror(number),
            remedy="The store takes no more changes; check the disk before anything else",
            outcome="unknown",
        ) from error

    def poison(self, number: int) -> None:
        """Tell every process, of this boot and later ones, that nothing may be acknowledged."""
        head, state = self._states.head(), self._states.append_state()
        note: JsonObject = {
            "at": events.timestamp(datetime.now(UTC)),
            "errno": number,
            "error": os.strerror(number),
            "segment": None if state is None else state.segment,
            "suspect_from": None if head is None else head.end,
            "suspect_to": None if state is None else state.end,
        }
        try:
            if head is not None:
                self._states.put_head(replace(head, poisoned=True, errno=number))
        except OSError as error:  # the disk may take nothing any more; the note may still pass
            _logger.critical("cannot flag the store as poisoned: %s", error)
        try:
            self._leave_note(codec.dump(note) + b"\n")
        except OSError as error:  # the flag stands for this boot; after it, recovery judges anew
            _logger.critical("cannot make durable that a sync failed: %s", error)

    def _leave_note(self, note: bytes) -> None:
        """Write POISON.json; it stays in place even where its own sync fails."""
        via, root = self._directory.disk, self._directory.root
        if layout.POISON in disk.names(root):
            return
        fd = via.create(layout.POISON, at=root, append=True)
        try:
            disk.write_all(via, fd, note)
            via.sync(fd)
        finally:
            os.close(fd)
        via.sync_directory(root)

    def poisoned(self, number: int) -> StorePoisoned:
        """Return the error for a writer that finds the store poisoned."""
        where = self._directory.where(layout.POISON)
        return StorePoisoned(where, why=f"a sync failed: {os.strerror(number)}")

    @contextmanager
    def nobody_leads(self) -> Iterator[None]:
        """Hold off every leader, while the states are rebuilt. Held: append."""
        first, second = self._locks
        with self._turn, first.held(wait_s=self._wait_s), second.held(wait_s=self._wait_s):
            yield

    def after_fork(self) -> None:
        """Begin anew in a forked child."""
        self._turn = threading.Lock()
        self._close()

    def close(self) -> None:
        """Close every descriptor."""
        with self._turn:
            self._close()

    def _close(self) -> None:
        for lock in self._locks:
            lock.close()
        self._close_segment()

    def _close_segment(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None
