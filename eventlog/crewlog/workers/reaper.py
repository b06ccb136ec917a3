"""Wait for the ends of many processes with one thread, and put what ended on record together.

A charge is a process whose end somebody here is to record: a child that was started as a worker,
or any process that is observed. The reaper's thread sleeps until one of them has ended (epoll on
their pidfds), and hands it to a scribe, one for each store: whatever has ended by then is one unit,
with one sync. A slow store so holds up nobody else's ends. A child is let go only when its end is
durable: at no moment is it unknown how it ended. Where a charge has no descriptor, or descriptors
become few, it is looked at instead, at intervals that keep the processor idle.
"""

import contextlib
import logging
import os
import resource
import select
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Final

from crewlog import host
from crewlog.errors import (
    AppendUncertain,
    CrewlogError,
    LockBusy,
    StorageFailed,
    StorageFull,
    Unavailable,
    UnknownOutcome,
)
from crewlog.model.events import Identity, Oom, Worker
from crewlog.model.steps import BATCH_EVENTS_MAX, Step, unless_changed
from crewlog.process import cgroup
from crewlog.process.cgroup import Memory
from crewlog.session import Session

END_WAIT_S: Final = 600.0  # so long the end of a process is tried to be recorded, wherever
# What may be over soon, whoever waits: a lock that is held, servers that do not answer.
PASSING: Final = (LockBusy, Unavailable, UnknownOutcome)
# A scribe, whom nobody waits for, can also wait for room, and for descriptors.
_PASSING: Final = (*PASSING, StorageFull, StorageFailed, AppendUncertain)

_LOOK_S: Final = 1.0  # at charges without a descriptor
_LOOK_SHARE: Final = 70  # a look at all of them is followed by so many times its own time
_SOON_S: Final = 0.01  # an end is known, but not yet how
_GREEN_S: Final = 0.05  # where a wait must let other tasks of the thread go on
_IDLE_S: Final = 0.5  # a thread without a charge ends after so long
_RESERVE: Final = 4  # of the descriptors that we may have, one in so many is left to the program
_EVENTS: Final = 1024
_CLOSED_LOOK_S: Final = 10.0  # so often, at least, it is asked whether a host closed all under us
_abandoned: "list[select.epoll]" = []

_logger = logging.getLogger("crewlog.ends")


class Charge(ABC):
    """A process whose end is to be recorded once."""

    __slots__ = ("is_dying", "memory", "of", "polled", "sid", "tried_at", "who")

    def __init__(self, sid: str, who: Identity | None, *, of: int) -> None:
        """Have not ended yet; `of` is the seq of the worker's registration."""
        self.sid = sid
        self.of = of
        self.who = who
        self.polled = -1  # the descriptor that the reaper waits for; under its lock
        self.memory: str | None = None  # its control group, where that counts; set by `Reaper.add`
        self.is_dying = False  # it has ended, and how is not known yet; set by `look`
        self.tried_at: float | None = (
            None  # when its end was first tried to be recorded; a scribe's
        )

    @property
    @abstractmethod
    def fd(self) -> int:
        """Return the descriptor that is readable once it has ended; -1: it is looked at."""

    @abstractmethod
    def look(self) -> bool:
        """Say, without waiting, whether it has ended and how is known, or never will be."""

    @abstractmethod
    def step(self, session: Session) -> Step | None:
        """Return the step that records the end; None if there is nothing to record."""

    @abstractmethod
    def spare(self) -> None:
        """Close the descriptor, for they are few; it is looked at from then on."""

    @abstractmethod
    def release(self) -> None:
        """Let it go: its end is durable, or cannot be recorded."""


class Reaper:
    """The charges of this process, and the thread that waits for them while there are any."""

    def __init__(self) -> None:
        """Have no charge."""
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()  # over all that follows; a signal handler may add, too
        self._running = False
        self._poll: select.epoll | None = None  # None: everything is looked at
        self._bell = -1
        self._files = (host.NO_FILE, host.NO_FILE)  # of both
        self._polled: dict[int, Charge] = {}  # by descriptor
        self._looked: set[Charge] = set()  # without one
        self._dying: set[Charge] = set()  # ended, and how is not known yet
        self._scribes: dict[Hashable, Scribe] = {}  # by store
        self._owners: dict[Charge, Scribe] = {}
        self._names: set[tuple[str, str, int]] = set()  # place, sid, registration of each charge
        self._memories: dict[int, Memory] = {}  # by descriptor
        self._groups: dict[str, Memory | None] = {}  # by control group

    def add(self, charge: Charge, session: Session) -> None:
        """Take a charge, whose end is recorded through a twin of that session.

        Raises: OSError where no thread is to be had; nobody then waits for it.
        """
        with self._lock:
            if not self._running:
                self._start()
            scribe = self._scribes.get(session.key)
            if scribe is None:
                scribe = self._scribes[session.key] = Scribe(session.twin(), self._forget)
            self._owners[charge] = scribe
            scribe.due += 1
            self._names.add((session.where, charge.sid, charge.of))
            charge.memory = None if charge.who is None else self._minded(charge.who.pid)
            if len(self._polled) + len(self._memories) >= _budget():
                charge.spare()
            self._put(charge)

    def _start(self) -> None:
        self._running = True
        if not host.is_green() and hasattr(select, "epoll"):
            self._poll, self._bell = select.epoll(), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._files = (host.own(self._poll.fileno()), host.own(self._bell))
            self._poll.register(self._bell, select.EPOLLIN)
        try:
            host.start_thread(self._run, name="crewlog-reaper")
        except OSError:
            self._stop()
            raise

    def _put(self, charge: Charge) -> None:
        fd = charge.fd
        if self._poll is not None and fd >= 0:
            with contextlib.suppress(OSError):  # the system has no more watches
                self._poll.register(fd, select.EPOLLIN)
                self._polled[fd] = charge
                charge.polled = fd
                return
        self._looked.add(charge)
        self._ring()

    def _ring(self) -> None:
        """End the thread's wait: what it waits for is another than before. Held: the lock."""
        if self._poll is not None and host.is_still(self._bell, self._files[1]):
            os.eventfd_write(self._bell, 1)

    def _take(self, charge: Charge, scribe: "Scribe") -> None:
        """Wait for a charge no longer, which is no scribe's any more. Held: the lock."""
        scribe.due -= 1
        self._names.discard((scribe.session.where, charge.sid, charge.of))
        self._unpoll(charge)

    def _unpoll(self, charge: Charge) -> None:
        self._looked.discard(charge)
        self._dying.discard(charge)
        fd, charge.polled = charge.polled, -1
        if self._polled.get(fd) is charge:
            del self._polled[fd]
            if self._poll is not None:
                with contextlib.suppress(OSError):  # it was closed, and is forgotten with that
                    self._poll.unregister(fd)

    def has(self, session: Session, worker: Worker) -> bool:
        """Say whether a worker's end is waited for here already."""
        with self._lock:
            return (session.where, worker.sid, worker.registered_seq) in self._names

    def drop(self, charge: Charge) -> None:
        """Forget a charge whose end is not to be recorded any more."""
        with self._lock:
            scribe = self._owners.pop(charge, None)
            if scribe is None:
                return  # it has ended, and a scribe has it
            self._take(charge, scribe)
            if not self._owners:
                self._ring()
        charge.release()

    def counts(self) -> tuple[int, int]:
        """Return how many charges are waited for by a descriptor, and how many are looked at."""
        with self._lock:
            return len(self._polled), len(self._looked) + len(self._dying)

    # -- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        """Wait, and hand on what has ended; end once there is nothing to wait for."""
        pause_s = _GREEN_S if self._poll is None else _LOOK_S
        look_at = time.monotonic() + pause_s
        while True:
            ready = self._wait(look_at)
            began, spent = time.monotonic(), time.thread_time()
            with self._lock:
                if began >= look_at:
                    ready += self._looked
                ready += self._dying
            ended = [charge for charge in ready if self._has_ended(charge)]
            self._hand_on(ended)
            if began >= look_at:
                took_s = 0.0 if host.is_green() else time.thread_time() - spent
                look_at = time.monotonic() + max(pause_s, took_s * _LOOK_SHARE)
            with self._lock:
                if not (ready or self._owners):
                    self._stop()
                    return

    def _wait(self, look_at: float) -> list[Charge]:
        """Return charges that are ready, once there are any, or it is time to look at others."""
        with self._lock:
            poll = self._poll
            wait_s = -1.0
            if self._dying:
                wait_s = _SOON_S
            elif self._looked:
                wait_s = max(0.0, look_at - time.monotonic())
            elif not self._polled:
                wait_s = _IDLE_S
        if poll is None:
            time.sleep(min(wait_s, _GREEN_S))
            return []
        ready = self._polled_by(poll, wait_s)
        with self._lock:
            for fd, _ in ready:
                if fd in self._memories:
                    self._memories[fd].look()
                elif fd == self._bell:
                    os.eventfd_read(fd)
            return [self._polled[fd] for fd, _ in ready if fd in self._polled]

    def _polled_by(self, poll: "select.epoll", wait_s: float) -> list[tuple[int, int]]:
        """Wait; where a host has closed our descriptors, look at all charges from here on."""
        try:
            if host.is_still(poll.fileno(), self._files[0]):
                return poll.poll(_CLOSED_LOOK_S if wait_s < 0 else wait_s, _EVENTS)
        except OSError:
            pass
        with self._lock:
            self._looked |= set(self._polled.values())
            self._polled.clear()
            self._unpoll_all()
        return []

    def _has_ended(self, charge: Charge) -> bool:
        if charge.look():
            return True
        with self._lock:
            if charge in self._owners and charge.is_dying and charge not in self._dying:
                self._unpoll(charge)  # it is readable from now on
                self._dying.add(charge)
        return False

    def _hand_on(self, ended: Sequence[Charge]) -> None:
        """Give each store's scribe what has ended."""
        begin: set[Scribe] = set()
        with self._lock:
            for charge in ended:
                scribe = self._owners.pop(charge, None)
                if scribe is not None:
                    self._take(charge, scribe)
                    scribe.put(charge)
                    begin.add(scribe)
        for scribe in begin:
            scribe.begin()

    def _stop(self) -> None:
        """Give back what the thread had. Held: the lock."""
        self._running = False
        for memory in self._memories.values():
            memory.close()
        self._memories.clear()
        self._groups.clear()
        self._unpoll_all()
        for scribe in list(self._scribes.values()):
            self._forget(scribe)

    def _unpoll_all(self) -> None:
        """Close what is waited with; what a host has closed under us is others'. Held: the lock."""
        poll, bell, files = self._poll, self._bell, self._files
        self._poll, self._bell = None, -1
        if poll is not None:
            if host.is_still(poll.fileno(), files[0]):
                poll.close()
            else:
                _abandoned.append(poll)  # its own close would take the number from its new owner
            host.close_own(bell, files[1])

    def _forget(self, scribe: "Scribe") -> None:
        """Close the session of a scribe that has no work and will get none."""
        with self._lock:
            if scribe.is_idle() and not scribe.due:
                if self._scribes.get(scribe.session.key) is scribe:
                    del self._scribes[scribe.session.key]
                scribe.session.close()

    # -- memory -----------------------------------------------------------------------------

    def _minded(self, pid: int) -> str | None:
        """Watch for a lack of memory in the control group of a process; return which that is."""
        place = cgroup.place_of(pid)
        if place is None:
            return None
        if place.directory not in self._groups:
            self._groups[place.directory] = self._watched(place)
        return place.directory

    def _watched(self, place: cgroup.Place) -> Memory | None:
        try:
            memory = Memory(place)
        except OSError:
            return None
        if self._poll is not None and place.v2:
            with contextlib.suppress(OSError):
                self._poll.register(memory.fd, select.EPOLLPRI)
        self._memories[memory.fd] = memory
        return memory

    def lack(self, charge: Charge) -> Oom | None:
        """Return what is known of a lack of memory, of a process that SIGKILL has just ended."""
        with self._lock:
            memory = None if charge.memory is None else self._groups.get(charge.memory)
            return None if memory is None or charge.who is None else memory.about(charge.who)

    def after_fork(self) -> None:
        """Begin anew in a forked child: the charges are the parent's, and so is the thread."""
        memories, charges = list(self._memories.values()), list(self._owners)
        self._unpoll_all()
        self._begin()
        for charge in charges:
            charge.spare()
        for memory in memories:
            memory.close()


class Scribe:
    """Records the ends of one store's charges: a thread while there are any."""

    def __init__(self, session: Session, done: "Callable[[Scribe], None]") -> None:
        """Have nothing to write."""
        self.session = session
        self.due = 0  # charges that have not ended; under the reaper's lock
        self._done = done
        self._lock = threading.RLock()  # over the fields that follow
        self._ended: list[Charge] = []
        self._writes = False

    def put(self, charge: Charge) -> None:
        """Take one that has ended."""
        with self._lock:
            self._ended.append(charge)

    def has_work(self) -> bool:
        """Say whether somebody has to begin."""
        with self._lock:
            return bool(self._ended) and not self._writes

    def is_idle(self) -> bool:
        """Say whether nothing is left to write."""
        with self._lock:
            return not self._ended and not self._writes

    def begin(self) -> None:
        """Write in a thread; in this one where none is to be had."""
        with self._lock:
            if self._writes:
                return
            self._writes = True
        try:
            host.start_thread(self._run, name="crewlog-ends")
        except OSError:
            self._run()

    def _run(self) -> None:
        while True:
            with self._lock:
                part, self._ended = self._ended[:BATCH_EVENTS_MAX], self._ended[BATCH_EVENTS_MAX:]
                if not part:
                    self._writes = False
                    break
            try:
                self._record(part)
            except BaseException:
                with self._lock:  # not even that may stop all that come after
                    self._writes = False
                raise
        self._done(self)

    def _record(self, part: list[Charge]) -> None:
        """Write ends as few units; those that cannot be written yet are put back."""
        steps: dict[Charge, Step] = {}
        for charge in part:
            step = self._step(charge)
            if step is None:
                charge.release()
            else:
                steps[charge] = unless_changed(step)
        todo = list(steps)
        try:
            size = min(BATCH_EVENTS_MAX, self.session.make().unit_workers_max) if todo else 1
            for first in range(0, len(todo), size):
                self._write(todo[first : first + size], steps)
        except _PASSING as error:
            self._put_back([*steps], error)
        except Exception as error:  # noqa: BLE001 (nobody is there to hear of it)
            self._give_up([*steps], error)

    def _step(self, charge: Charge) -> Step | None:
        try:
            return charge.step(self.session)
        except Exception as error:  # noqa: BLE001 (no thread, no descriptor: the others go on)
            _logger.warning("the end of worker %s is not recorded: %s", charge.sid, error)
            return None

    def _write(self, charges: list[Charge], steps: dict[Charge, Step]) -> None:
        """Write the ends of these as one unit, and take them out of `steps`.

        Whatever is wrong with one of them (a `redact` that raises), or with all in one unit (they
        are too long), the others must not suffer: then each half is written by itself.
        Raises: what may pass; what is left in `steps` was not written.
        """
        try:
            self.session.append([steps[charge] for charge in charges])
        except _PASSING:
            raise
        except Exception as error:  # noqa: BLE001 (the caller's own code may be in it)
            middle = len(charges) // 2
            if not middle:
                self._give_up(charges, error)
                steps.pop(charges[0])
                return
            self._write(charges[:middle], steps)
            self._write(charges[middle:], steps)
            return
        for charge in charges:
            charge.release()
            steps.pop(charge)

    def _put_back(self, charges: list[Charge], error: CrewlogError) -> None:
        """Try again later what may be written then; hold nothing that others need meanwhile."""
        now = time.monotonic()
        late = [c for c in charges if c.tried_at is not None and now - c.tried_at > END_WAIT_S]
        self._give_up(late, error)
        for charge in charges:
            charge.tried_at = now if charge.tried_at is None else charge.tried_at
        self.session.rest()
        # Many processes that found it busy must not meet again.
        time.sleep(self.session.limits.safety_look_s * (0.5 + os.urandom(1)[0] / 256))
        with self._lock:
            self._ended = [*(c for c in charges if c not in late), *self._ended]

    def _give_up(self, charges: list[Charge], error: Exception) -> None:
        for charge in charges:
            _logger.warning("the end of worker %s is not recorded: %s", charge.sid, error)
            charge.release()


def _budget() -> int:
    """Return how many descriptors we may hold: the rest is for whoever runs us."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return 1 << 30
    return soft - soft // _RESERVE


REAPER: Final = Reaper()  # of this process
host.call_in_child(REAPER.after_fork, rank=host.DESCRIPTORS)
