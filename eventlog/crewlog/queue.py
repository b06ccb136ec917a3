"""Group commit inside one process: the first caller leads, later callers join its next append.

A leader takes everybody who waits, writes all their lines with one write, and syncs once for all.
As soon as its sync begins, the next one leads: it writes while this one syncs. So there is at most
one group in each phase, and everybody who comes meanwhile waits for the next. A lone caller leads
itself at once: no timer, no thread, nothing to wait for.

Each request is decided by itself, on top of those before it in its group: its refusal is its own,
and what it writes is one unit. A failure of the write or the sync is told to all it concerns.
Whatever interrupts a leader (Ctrl-C), those who ride along are not left behind: what was not
written goes back into the queue, what was written is made durable by those who wait for it.

Order in a process: this mutex is held for a few instructions only, and nothing is taken under it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Final, Literal, Protocol, TypeAlias

from crewlog import host
from crewlog.errors import AppendUncertain, LockBusy, RegistryClosed
from crewlog.model.limits import Limits
from crewlog.model.steps import Appended, Decide

# waiting; to lead; written, to be made durable by whoever waits; done
Phase: TypeAlias = Literal["waiting", "lead", "written", "done"]


class Request:
    """One append that is asked for, and what becomes of it."""

    __slots__ = ("about", "composed", "decide", "error", "gone", "phase", "refused", "result")

    def __init__(self, decide: Decide, about: Collection[str]) -> None:
        """Ask for what `decide` returns, about these workers."""
        self.decide = decide
        self.about = about
        self.phase: Phase = "waiting"
        self.result: Appended | None = None
        self.error: Exception | None = None
        self.refused = False  # the error is the request's own: nothing of it was written
        self.composed = False  # it was decided: from here on it may be on the disk
        self.gone = False  # its caller waits no longer, and must not be asked to lead

    def refuse(self, error: Exception) -> None:
        """Settle it as refused; nothing of it is written."""
        self.error, self.refused = error, True

    def fail(self, error: Exception) -> None:
        """Tell it of a failure, unless it was refused by itself."""
        if not self.refused:
            self.result, self.error = None, error

    def outcome(self) -> Appended:
        """Return what was appended, or raise."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None  # a stored traceback would keep every frame alive
        assert self.result is not None  # it is settled: a result or an error
        return self.result

    def advance(self, phase: Phase) -> None:
        """Go on to a phase, and wake whoever waits for that."""
        self.phase = phase


LOOK_S: Final = 1.0  # who waits looks after so long whether anybody leads

# Called once a request is settled; runs work in another thread.
Done: TypeAlias = Callable[[Request], None]
Start: TypeAlias = Callable[[Callable[[], None]], object]


class _Waiting(Request):
    """A request whose caller is a thread that waits for it."""

    __slots__ = ("_wake",)

    def __init__(self, decide: Decide, about: Collection[str]) -> None:
        super().__init__(decide, about)
        self._wake = threading.Lock()
        self._wake.acquire()

    def advance(self, phase: Phase) -> None:
        self.phase = phase
        if self._wake.locked():  # else it was woken, and did not come yet
            self._wake.release()

    def wait(self, timeout_s: float) -> bool:
        return self._wake.acquire(timeout=timeout_s)


class Phases(Protocol):
    """What an engine does for a group of requests."""

    def write(self, group: Sequence[Request]) -> tuple[int, int, int]:
        """Write what a group asks for with one write; settle each request as written or refused.

        Returns how many were taken, the seq of the last line, and the generation of the head that
        was seen.
        Raises: with the outcome of all that were not refused.
        """
        ...

    def make_durable(
        self, seq: int, generation: int | None = None, begun: Callable[[], None] | None = None
    ) -> None:
        """Return once everything up to `seq` is durable; call `begun` when that is under way."""
        ...


class Commits:
    """The queue of one log."""

    def __init__(self, phases: Phases, *, where: str, wait_s: float, limits: Limits) -> None:
        """Begin with nobody waiting; `phases` does the work for a group."""
        self._phases = phases
        self._limits = limits
        self._where = where
        self._wait_s = wait_s
        self._mutex = threading.Lock()
        self._queue: deque[Request] = deque()
        self._leader: Request | None = None  # who writes, or is about to
        self._inside: set[int] = set()  # threads in `append`; a handler that interrupts one is too

    def after_fork(self) -> None:
        """Begin anew in a forked child: who waited is in the parent."""
        self._mutex = threading.Lock()
        self._queue = deque()
        self._leader = None
        self._inside = set()

    def append(self, decide: Decide, about: Collection[str]) -> Appended:
        """Append, or ride along with others who do; durable on return."""
        request: Request | None = None
        thread = threading.get_ident()
        if thread in self._inside:
            raise LockBusy(self._where, waited_s=0, holder=host.INTERRUPTED)
        try:
            self._inside.add(thread)
            waiting = None
            with self._mutex:
                if self._leader is None:
                    request = self._leader = Request(decide, about)
                else:
                    request = waiting = _Waiting(decide, about)
                    self._queue.append(waiting)
            if waiting is not None:
                self._await(waiting)
            if request.phase == "written":
                self._phases.make_durable(_seq(request))
            elif request.phase != "done":
                self.lead(request)
        except BaseException:  # a signal handler raised, or the wait was too long
            if request is not None:
                request.gone = True  # here: another interrupt may come as a function begins
                self.leave(request)
            raise
        finally:
            self._inside.discard(thread)
        return request.outcome()

    def _await(self, request: _Waiting) -> None:
        """Wait until it is settled, or its turn to lead has come."""
        deadline = time.monotonic() + self._wait_s + 2 * self._limits.sync_wait_s
        while (left_s := deadline - time.monotonic()) > 0:
            if request.wait(min(left_s, LOOK_S)) or self._is_heir(request):
                return
        with self._mutex:
            if request in self._queue:
                raise LockBusy(self._where, waited_s=self._wait_s, holder="another thread")
            if request.phase == "waiting":
                raise AppendUncertain(self._where, why="another thread's append does not finish")

    def _is_heir(self, request: Request) -> bool:
        """Say whether it is to lead, and was not told; or let it, where it is queued for nobody.

        One interrupt after the other may come wherever somebody hands on.
        """
        with self._mutex:
            leader = self._leader
            leads = leader is not None and not leader.gone and leader.phase in {"waiting", "lead"}
            if request in self._queue and not leads:
                self._queue.remove(request)
                self._leader = leader = request
            return leader is request

    def leave(self, request: Request) -> None:
        """Let its caller wait no longer, and another lead if it was to."""
        with self._mutex:
            request.gone = True
            if request in self._queue:
                self._queue.remove(request)
            led = self._leader is request
        if led:
            self._hand_on()

    def submit(
        self, decide: Decide, about: Collection[str], *, done: Done, start: Start
    ) -> Request:
        """Append without waiting: `done` is called with the request once it is settled.

        It is called from any thread, and must not block. `start` runs what is left to do in a
        thread that may block, and raises RuntimeError once there is none to be had.
        """
        request = _Deferred(self, decide, about, done, start)
        with self._mutex:
            leads = self._leader is None
            if leads:
                self._leader = request
            else:
                self._queue.append(request)
        if leads:
            request.advance("lead")
        return request

    def lead(self, own: Request) -> None:
        """Append for everybody who waits, the leader's own request first."""
        group, written = [own], False
        rest: Sequence[Request] = ()  # of the group: not taken, and to be put back
        try:
            with self._mutex:
                if self._queue:
                    group += [request for request in self._queue if request is not own]
                    self._queue.clear()
                self._leader = own
            count, seq, generation = self._phases.write(group)
            rest, group, written = group[count:], group[:count], True
            if rest:
                self._put_back(rest)
                rest = ()
            self._phases.make_durable(seq, generation, self._hand_on)
        except Exception as error:  # noqa: BLE001 (each caller raises it)
            try:
                _fail(group, own, error)
            except BaseException:  # an interrupt: all of it again
                _fail(group, own, error)
                raise
        except BaseException:
            self._put_back(rest)
            self._interrupted(own, group, written=written)
            group = []
            raise
        finally:
            try:
                if self._leader is own:
                    self._hand_on()
            finally:
                try:
                    _finish(group, own)
                except BaseException:  # as above
                    _finish(group, own)
                    raise

    def _hand_on(self) -> None:
        """Make the next waiting caller the leader."""
        heir: Request | None = None
        try:
            with self._mutex:
                heir = self._queue[0] if self._queue else None
                self._leader = heir
                if heir is not None:
                    self._queue.popleft()
            if heir is not None:
                heir.advance("lead")
        except BaseException:  # an interrupt: whoever leads now hears of it all the same
            if heir is not None and self._leader is heir:
                heir.advance("lead")
            raise

    def _put_back(self, requests: Sequence[Request]) -> None:
        with self._mutex:
            waits = [r for r in requests if not (r.gone or r in self._queue)]
            self._queue.extendleft(reversed(waits))

    def _interrupted(self, own: Request, group: Sequence[Request], *, written: bool) -> None:
        """Leave nobody behind where the leader is interrupted.

        What is written, its callers make durable. Inside the write, what was decided may be on the
        disk or not, and what was not goes back into the queue.
        """
        others = [request for request in group if request is not own]
        self._put_back([r for r in others if not r.composed and not r.refused])
        error = AppendUncertain(self._where, why="the thread that wrote it was interrupted")
        for request in others:
            if request.error is not None:
                request.advance("done")
            elif written:
                request.advance("written")
            elif request.composed:
                request.fail(host.own_copy(error))
                request.advance("done")

    def finish(self, request: "_Deferred") -> None:
        """Do what is left to do for a request that nobody waits for; returns once it is settled."""
        try:
            if request.phase == "lead":
                self.lead(request)
            else:
                self._phases.make_durable(_seq(request))
        except Exception as error:  # noqa: BLE001 (its caller raises it)
            request.fail(error)
        request.advance("done")

    @property
    def where(self) -> str:
        """Return the place of the store, for messages."""
        return self._where


class _Deferred(Request):
    """A request whose caller is called back: no thread waits for it."""

    __slots__ = ("_done", "_queue", "_start")

    def __init__(
        self, queue: Commits, decide: Decide, about: Collection[str], done: Done, start: Start
    ) -> None:
        super().__init__(decide, about)
        self._queue = queue
        self._done = done
        self._start = start

    def advance(self, phase: Phase) -> None:
        if self.phase == phase:  # told again, after an interrupt
            return
        self.phase = phase
        if phase == "done":
            self._done(self)
            return
        try:
            self._start(lambda: self._queue.finish(self))
        except RuntimeError:  # no thread is to be had: the registry was closed meanwhile
            where = self._queue.where
            self.fail(
                AppendUncertain(where, why="the registry was closed meanwhile")
                if phase == "written"
                else RegistryClosed(where)
            )
            self._done(self)
            self._queue.leave(self)


def _fail(group: Sequence[Request], own: Request, error: Exception) -> None:
    for request in group:
        request.fail(error if request is own else host.own_copy(error))


def _finish(group: Sequence[Request], own: Request) -> None:
    for request in group:
        if request is not own:
            request.advance("done")


def _seq(request: Request) -> int:
    assert request.result is not None  # it was written
    return request.result.seq
