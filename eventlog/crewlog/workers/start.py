"""Start programs as workers.

A process waits while it is registered and becomes the program only then (launch.py), so a SIGKILL
of the starter at any moment leaves no running program that is not listed. Of many that start one
sid at once, one has the turn, a lock that its waiting process holds too: whoever comes next finds
either a program that has begun or nothing.
"""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, Unpack, cast

from crewlog import host, place
from crewlog.errors import (
    AppendUncertain,
    CrewlogError,
    InvalidTransition,
    ProcessNotFound,
    SpawnFailed,
    StaleRevision,
    StorageFailed,
    StorageFull,
    WaitTimeout,
    WorkerExists,
)
from crewlog.model import arguments
from crewlog.model.events import Worker, WorkerState
from crewlog.model.steps import Step, Wish, WorkerOptions, update_step
from crewlog.process import launch
from crewlog.process.launch import End, Launch, LaunchOptions, Words
from crewlog.session import Session
from crewlog.store import Turn
from crewlog.workers import register
from crewlog.workers.judge import PASSING, exit_of, hold, is_exiting, judge, record_end, taken
from crewlog.workers.register import enter, lease_for

ENSURE_WAIT_S: Final = 30.0
DEATH_LOOK_S: Final = 0.05

_logger = logging.getLogger("crewlog.starting")
# A thread that nobody waits for can also wait for room, and for descriptors.
_PASSING: Final = (*PASSING, StorageFull, StorageFailed, AppendUncertain)
_LEAVING: Final = frozenset({WorkerState.DRAINING, WorkerState.STOPPING})


class SpawnOptions(WorkerOptions, LaunchOptions, total=False):
    """What `spawn` takes beside the sid and the program, and `ensure` too."""


class _Program(NamedTuple):
    """A program to start, in which surroundings, and what its worker is to be registered with."""

    argv: Words
    surroundings: LaunchOptions
    wish: Wish


def _program(argv: Words, options: SpawnOptions) -> _Program:
    """Check what is to be started, before anything is written."""
    known = WorkerOptions.__annotations__.keys()
    arguments.check_options(options, SpawnOptions.__annotations__, of="spawn")
    given = {key: value for key, value in options.items() if key in known}
    rest = {key: value for key, value in options.items() if key not in known}
    wish = Wish(**cast("WorkerOptions", given))
    register.check(wish)
    surroundings: LaunchOptions = {**launch.DEFAULTS, **cast("LaunchOptions", rest)}
    launch.check(argv, surroundings)
    surroundings["env"] = place.inherited(surroundings["env"])
    ours = wish._replace(owner=os.getpid() if wish.owner is None else wish.owner)
    return _Program(argv, surroundings, ours)


def spawn(session: Session, sid: str, argv: Words, **options: Unpack[SpawnOptions]) -> Worker:
    """Start a program as a worker; see `Registry.spawn`."""
    program = _program(argv, options)
    with turn(session, sid) as mine:
        return _spawn(session, sid, program, mine)


def turn(
    session: Session, sid: str, *, wait_s: float = ENSURE_WAIT_S
) -> AbstractContextManager[Turn]:
    """Hold the turn to start a worker of that sid; see store.Leases."""
    arguments.check_sid(sid)
    return session.make().leases.turn(sid, wait_s=wait_s)


def _spawn(session: Session, sid: str, program: _Program, mine: Turn) -> Worker:
    """Start a process that waits, register it, let it begin. Held: the sid's turn."""

    def launched(keep: Sequence[int]) -> Launch:
        return Launch(program.argv, keep=keep, turn=mine.share(), **program.surroundings)

    worker, started = entered(session, sid, program.wish, launched)
    return _begun(session, worker, started)


def entered(
    session: Session, sid: str, wish: Wish, launched: Callable[[Sequence[int]], Launch]
) -> tuple[Worker, Launch]:
    """Start a process that waits, and register it; it is told to begin by `go`. Held: the turn.

    `launched` starts it, and lets it inherit the descriptors that it is given.
    """
    with lease_for(session, sid, wish) as held:
        started = launched(() if held is None else held.inherited())
        try:
            worker = enter(session, sid, started.pid, wish, held=held)
        except ProcessNotFound as error:  # it has ended before it had to wait
            started.give_up()
            raise SpawnFailed(started.argv[0], why=launch.BROKEN) from error
        except BaseException:
            started.give_up()
            raise
    if held is not None:
        held.hand_over(worker)
    return worker, started


def _begun(session: Session, worker: Worker, started: Launch) -> Worker:
    try:
        started.go()
    except SpawnFailed as error:
        _record_end(session, worker, started, session.append)
        error.outcome = "written"  # it was registered, and its end is on record
        raise
    tell = functools.partial(_tell_end, session.twin(), worker, started)
    try:
        host.start_thread(tell, name=f"crewlog-{worker.sid}")
    except OSError as error:  # it runs and is listed; a collector finds its end
        _logger.warning("nobody waits for the end of worker %s: %s", worker.sid, error.strerror)
    return worker


class Child:
    """A program that was started as a worker for a caller who waits for its end and records it."""

    def __init__(self, session: Session, worker: Worker, started: Launch) -> None:
        """Use `start_child`."""
        self.worker = worker
        self._session = session
        self._started = started

    def begin(self) -> bool:
        """Start the program; False if it cannot run: its exit code then says why."""
        try:
            self._started.go()
        except SpawnFailed:
            return False
        return True

    def ended(self) -> End | None:
        """Return how it ended; None while it has not."""
        return self._started.ended(wait=False)

    def send(self, number: int) -> None:
        """Send it a signal; it is not waited for yet, so the pid is still its own."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.worker.pid, number)

    def asked_to_stop(self, reason: str) -> None:
        """Record that somebody asked it to end, as long as the sid is still its own."""
        of, author = self.worker.registered_seq, self._session.author()
        step = update_step(author, self.worker.sid, {"state": "stopping", "reason": reason}, of=of)
        with contextlib.suppress(StaleRevision, InvalidTransition):  # another's by now, or ended
            self._session.append([step])

    def record(self, code: int, *, late: Callable[[CrewlogError], None]) -> bool:
        """Record how it ended; False if the sid is another's by now. See `judge.record_end`."""
        step = exit_of(self._session.author(), self.worker, code)
        pause_s = self._session.limits.safety_look_s
        return record_end(self._session.append, step, pause_s=pause_s, late=late)

    def reap(self) -> None:
        """Let it go: until then it is a zombie, and whoever looks sees how it ended."""
        self._started.reap()


@contextlib.contextmanager
def child(
    session: Session,
    sid: str,
    argv: Words,
    wish: Wish,
    *,
    before: Callable[[], None],
    after: Callable[[], None],
) -> Iterator[Child]:
    """Start a process that waits, in our own session, and register it. Holds the sid's turn.

    `before` is called before the process is there, `after` before it is registered.
    """
    register.check(wish)
    launch.check_argv(argv)
    with turn(session, sid) as mine:

        def launched(keep: Sequence[int]) -> Launch:
            before()
            made = Launch(
                argv,
                env=place.inherited(None),
                stdin=None,
                own_session=False,
                keep=keep,
                turn=mine.share(),
            )
            after()
            return made

        yield Child(session, *entered(session, sid, wish, launched))


def ensure(
    session: Session, sid: str, argv: Words, *, timeout_s: float, **options: Unpack[SpawnOptions]
) -> Worker:
    """Return the living worker of that sid, or start it; see `Registry.ensure`."""
    program = _program(argv, options)
    deadline = time.monotonic() + arguments.check_wait(timeout_s)
    while True:
        left_s = max(0.0, deadline - time.monotonic())
        with turn(session, sid, wait_s=left_s) as mine:
            found = _running(session, sid)
            if found is None:
                try:
                    return _spawn(session, sid, program, mine)
                except WorkerExists:  # it was made just now, or shows only now
                    if not left_s:
                        raise
        if found is None:
            time.sleep(min(DEATH_LOOK_S, left_s))
            continue
        if found.state not in _LEAVING and not is_exiting(found):
            return found
        if not left_s:
            what = f"the end of worker {sid!r}, which is leaving,"
            raise WaitTimeout(what, waited_s=timeout_s)
        _await_end(found, min(DEATH_LOOK_S, left_s))


def _running(session: Session, sid: str) -> Worker | None:
    """Return the worker that lives under that sid, None if there is none."""
    worker = session.get(sid)
    if worker is None or worker.final:
        return None
    found = judge(session, [worker])[0]
    if found.alive:
        return worker
    if found.dead:
        return None
    held = WorkerExists(sid, pid=worker.pid, rev=worker.rev, state=worker.state.value)
    raise taken(session, held)


def _await_end(worker: Worker, wait_s: float) -> None:
    held = hold(worker)
    if held is None:  # it has just ended, or is on another host
        time.sleep(max(0.0, wait_s))
        return
    with held:
        held.wait(max(0.0, wait_s))


def _tell_end(own: Session, worker: Worker, started: Launch) -> None:
    """Wait for a child and record how it ended; nobody else can know as surely."""

    def append(steps: list[Step]) -> None:
        twin = own.twin()  # between two tries it holds nothing that others may need
        try:
            twin.append(steps)
        finally:
            twin.close()

    _record_end(own, worker, started, append, passing=_PASSING)


def _record_end(
    session: Session,
    worker: Worker,
    started: Launch,
    append: Callable[[list[Step]], object],
    *,
    passing: tuple[type[CrewlogError], ...] = (),
) -> None:
    """Record how a child ends, before it is reaped: at no moment is it unknown how it ended."""
    end = started.ended()
    try:
        if end is None or end.code is None:
            why = "something else in this program waits for its children"
            _logger.warning("nobody tells how worker %s ended: %s", worker.sid, why)
        else:
            step = exit_of(session.author(), worker, end.code)
            record_end(append, step, pause_s=session.limits.safety_look_s, passing=passing)
    except CrewlogError as error:
        _logger.warning("the end of worker %s is not recorded: %s", worker.sid, error)
    finally:
        started.reap()
