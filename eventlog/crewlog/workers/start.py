"""Start programs as workers.

A process waits while it is registered and becomes the program only then (launch.py), so a SIGKILL
of the starter at any moment leaves no running program that is not listed. Of many that start one
sid at once, one has the turn, a lock that its waiting process holds too: whoever comes next finds
either a program that has begun or nothing.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, TypedDict, Unpack, cast

from crewlog import place
from crewlog.errors import (
    CrewlogError,
    InvalidTransition,
    ProcessNotFound,
    SpawnFailed,
    StaleRevision,
    WaitTimeout,
    WorkerExists,
)
from crewlog.model import arguments
from crewlog.model.events import JsonObject, Oom, Status, Worker, WorkerState
from crewlog.model.steps import Step, Wish, WorkerOptions, update_step
from crewlog.process import launch
from crewlog.process.launch import Launch, LaunchOptions, Words
from crewlog.process.wait import Ended
from crewlog.session import Session
from crewlog.store import Turn
from crewlog.workers import output, register
from crewlog.workers.judge import exit_of, hold, is_exiting, judge, record_end, taken
from crewlog.workers.reaper import REAPER, Charge
from crewlog.workers.register import enter, lease_for

ENSURE_WAIT_S: Final = 30.0
DEATH_LOOK_S: Final = 0.05

_logger = logging.getLogger("crewlog.starting")
_LEAVING: Final = frozenset({WorkerState.DRAINING, WorkerState.STOPPING})


class LogOptions(TypedDict, total=False):
    """Where the output of a program goes, and what of it is kept.

    `log` is a file, appended to; before a life begins in one of more than `log_bytes_max` bytes it
    is set aside as NAME.1. The last `keep_tail` bytes stand in the event of a crash.
    """

    log: str | os.PathLike[str] | None
    log_bytes_max: int | None
    keep_tail: int


LOG_DEFAULTS: Final[LogOptions] = {"log": None, "log_bytes_max": None, "keep_tail": 0}


class SpawnOptions(WorkerOptions, LaunchOptions, LogOptions, total=False):
    """What `spawn` takes beside the sid and the program, and `ensure` too."""


class _Program(NamedTuple):
    """A program to start, in which surroundings, and what its worker is to be registered with."""

    argv: Words
    surroundings: LaunchOptions
    output: LogOptions
    wish: Wish


def _program(argv: Words, options: SpawnOptions) -> _Program:
    """Check what is to be started, before anything is written."""
    arguments.check_options(options, SpawnOptions.__annotations__, of="spawn")

    def part(known: type) -> dict[str, object]:
        return {key: options.get(key) for key in known.__annotations__ if key in options}

    wish = Wish(**cast("WorkerOptions", part(WorkerOptions)))
    register.check(wish)
    surroundings: LaunchOptions = {
        **launch.DEFAULTS, **cast("LaunchOptions", part(LaunchOptions))
    }  # fmt: skip
    launch.check(argv, surroundings)
    surroundings["env"] = place.inherited(surroundings["env"])
    written: LogOptions = {**LOG_DEFAULTS, **cast("LogOptions", part(LogOptions))}
    output.check(written["log"], bytes_max=written["log_bytes_max"], keep_tail=written["keep_tail"])
    ours = wish if "owner" in options else wish._replace(owner=os.getpid())
    return _Program(argv, surroundings, written, ours)


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
    with output.opened(program.output["log"], bytes_max=program.output["log_bytes_max"]) as log:
        surroundings = program.surroundings if log is None else log.taken(program.surroundings)

        def launched(keep: Sequence[int]) -> Launch:
            return Launch(program.argv, keep=keep, turn=mine.share(), **surroundings)

        seen: JsonObject = {} if log is None else {"log": log.record}
        if program.wish.record_argv:
            cwd = os.fspath(surroundings["cwd"] or os.getcwd())
            seen |= {"argv": launch.check_argv(program.argv), "cwd": os.path.abspath(cwd)}
        worker, started = entered(session, sid, program.wish, launched, seen=seen)
    return _begun(session, worker, started, keep_tail=program.output["keep_tail"])


def entered(
    session: Session,
    sid: str,
    wish: Wish,
    launched: Callable[[Sequence[int]], Launch],
    *,
    seen: JsonObject,
) -> tuple[Worker, Launch]:
    """Start a process that waits, and register it; it is told to begin by `go`. Held: the turn.

    `launched` starts it, and lets it inherit the descriptors that it is given; `seen` is what is
    known of it and is to be recorded.
    """
    with lease_for(session, sid, wish) as held:
        started = launched(() if held is None else held.inherited())
        try:
            worker = enter(session, sid, started.pid, wish, held=held, seen=seen)
        except ProcessNotFound as error:  # it has ended before it had to wait
            started.give_up()
            raise SpawnFailed(started.argv[0], why=launch.BROKEN) from error
        except BaseException:
            started.give_up()
            raise
    if held is not None:
        held.hand_over(worker)
    return worker, started


def _begun(session: Session, worker: Worker, started: Launch, *, keep_tail: int) -> Worker:
    charge = _Started(worker, started, keep_tail=keep_tail)
    try:
        started.go()
    except SpawnFailed as error:
        _record_failed_start(session, charge)
        error.outcome = "written"  # it was registered, and its end is on record
        raise
    try:
        REAPER.add(charge, session)
    except OSError as error:  # it runs and is listed; a collector finds its end
        _logger.warning("nobody waits for the end of worker %s: %s", worker.sid, error.strerror)
    return worker


class _Started(Charge):
    """A child that we started as a worker: nobody else can know as surely how it ended."""

    __slots__ = ("_ended", "_keep_tail", "_log", "_oom", "_started")

    def __init__(self, worker: Worker, started: Launch, *, keep_tail: int) -> None:
        super().__init__(worker.sid, worker.identity, of=worker.registered_seq)
        self._log = worker.log
        self._started = started
        self._keep_tail = keep_tail
        self._ended: Ended | None = None
        self._oom: Oom | None = None

    @property
    def fd(self) -> int:
        return self._started.pidfd

    def look(self) -> bool:
        self._ended = self._started.ended(wait=False)
        self.is_dying = self._started.is_gone
        status = None if self._ended is None else self._ended.status
        if status is not None and status.signal == signal.SIGKILL:
            self._oom = REAPER.lack(self)  # now: memory is no cause of what comes much later
        return self._ended is not None

    def wait(self) -> None:
        """Wait for its end, where nobody else does."""
        self._ended = self._started.ended()

    def step(self, session: Session) -> Step | None:
        status = None if self._ended is None else self._ended.status
        if status is None:
            why = "something else in this program waits for its children"
            _logger.warning("nobody tells how worker %s ended: %s", self.sid, why)
            return None
        details: JsonObject = {}
        if self._started.error is not None:
            details["error"] = self._started.error
        if self._oom is not None:
            details["oom"] = self._oom.as_json()
        if self._log is not None and self._keep_tail and (status.signal or status.code):
            details["tail"] = output.tail_of_event(self._log, self._keep_tail)
        return exit_of(session.author(), self.sid, status, of=self.of, details=details)

    def spare(self) -> None:
        self._started.let_go()

    def release(self) -> None:
        self._started.reap()


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

    def ended(self) -> Ended | None:
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

    def record(self, status: Status, *, late: Callable[[CrewlogError], None]) -> bool:
        """Record how it ended; False if the sid is another's by now. See `judge.record_end`."""
        author, of = self._session.author(), self.worker.registered_seq
        error = self._started.error
        details: JsonObject = {} if error is None else {"error": error}
        step = exit_of(author, self.worker.sid, status, of=of, details=details)
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
    log: LogOptions,
) -> Iterator[Child]:
    """Start a process that waits, in our own session, and register it. Holds the sid's turn.

    `before` is called before the process is there, `after` before it is registered.
    """
    register.check(wish)
    words = launch.check_argv(argv)
    written: LogOptions = {**LOG_DEFAULTS, **log}
    output.check(written["log"], bytes_max=written["log_bytes_max"], keep_tail=0)
    with (
        turn(session, sid) as mine,
        output.opened(written["log"], bytes_max=written["log_bytes_max"]) as into,
    ):

        def launched(keep: Sequence[int]) -> Launch:
            before()
            made = Launch(
                argv,
                env=place.inherited(None),
                stdin=None,
                stdout=None if into is None else into.fd,
                stderr=None if into is None else into.fd,
                own_session=False,
                keep=keep,
                turn=mine.share(),
            )
            after()
            return made

        seen: JsonObject = {} if into is None else {"log": into.record}
        if wish.record_argv:
            seen |= {"argv": words, "cwd": os.getcwd()}
        yield Child(session, *entered(session, sid, wish, launched, seen=seen))


def ensure(
    session: Session, sid: str, argv: Words, *, timeout_s: float, **options: Unpack[SpawnOptions]
) -> Worker:
    """Return the living worker of that sid, or start it; see `Registry.ensure`."""
    program = _program(argv, options)
    deadline = time.monotonic() + arguments.check_wait(timeout_s)
    while True:
        left_s = max(0.0, deadline - time.monotonic())
        with turn(session, sid, wait_s=left_s) as mine:
            worker = _running(session, sid)
            if worker is None:
                try:
                    return _spawn(session, sid, program, mine)
                except WorkerExists:  # it was made just now, or shows only now
                    if not left_s:
                        raise
        if worker is None:
            time.sleep(min(DEATH_LOOK_S, left_s))
            continue
        if worker.state not in _LEAVING and not is_exiting(worker):
            return worker
        if not left_s:
            what = f"the end of worker {sid!r}, which is leaving,"
            raise WaitTimeout(what, waited_s=timeout_s)
        _await_end(worker, min(DEATH_LOOK_S, left_s))


def _running(session: Session, sid: str) -> Worker | None:
    """Return the worker that lives under that sid, None if there is none."""
    worker = session.get(sid)
    if worker is None or worker.final:
        return None
    liveness = judge(session, [worker])[0]
    if liveness.alive:
        return worker
    if liveness.dead:
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


def _record_failed_start(session: Session, charge: _Started) -> None:
    """Record the end of what never became the program, before it is reaped."""
    charge.wait()
    try:
        step = charge.step(session)
        if step is not None:
            record_end(session.append, step, pause_s=session.limits.safety_look_s, passing=())
    except CrewlogError as error:
        _logger.warning("the end of worker %s is not recorded: %s", charge.sid, error)
    finally:
        charge.release()
