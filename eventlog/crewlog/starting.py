"""Start programs as workers.

A process waits while it is registered and becomes the program only then (launch.py), so a SIGKILL
of the starter at any moment leaves no running program that is not listed. Of many that start one
sid at once, one has the turn, a lock that its waiting process holds too: whoever comes next finds
either a program that has begun or nothing.
"""

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, TypedDict, Unpack

from crewlog import arguments, launch, layout, registering, threads
from crewlog.changes import Step
from crewlog.errors import (
    AppendUncertain,
    CrewlogError,
    SpawnFailed,
    StorageFailed,
    StorageFull,
    WaitTimeout,
    WorkerExists,
)
from crewlog.events import JsonValue, Worker, WorkerState
from crewlog.judging import PASSING, exit_of, hold, is_exiting, judge, record_end
from crewlog.launch import Launch, Stream, Words
from crewlog.registering import Wish, enter, leasing
from crewlog.session import Session
from crewlog.store import Turn

_logger = logging.getLogger("crewlog.starting")
# A thread that nobody waits for can also wait for room, and for descriptors.
_PASSING: Final = (*PASSING, StorageFull, StorageFailed, AppendUncertain)
_LEAVING: Final = frozenset({WorkerState.DRAINING, WorkerState.STOPPING})


class SpawnOptions(TypedDict, total=False):
    """What `spawn` takes beside the sid and the program, and `ensure` too."""

    sock: str
    version: str
    labels: Mapping[str, str] | None
    meta: Mapping[str, JsonValue] | None
    ready: bool
    owner: int | None
    lease: bool
    heartbeat_s: float | None
    cwd: str | os.PathLike[str] | None
    env: Mapping[str, str] | None
    stdout: Stream
    stderr: Stream


class _Program(NamedTuple):
    """A program to start, in which surroundings, and what its worker is to be registered with."""

    argv: Words
    cwd: str | os.PathLike[str] | None
    env: Mapping[str, str] | None
    stdout: Stream
    stderr: Stream
    wish: Wish


def _program(
    argv: Words,
    *,
    sock: str = "",
    version: str = "",
    labels: Mapping[str, str] | None = None,
    meta: Mapping[str, JsonValue] | None = None,
    ready: bool = False,
    owner: int | None = None,
    lease: bool = False,
    heartbeat_s: float | None = None,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    stdout: Stream = launch.NOWHERE,
    stderr: Stream = None,
) -> _Program:
    """Check what is to be started, before anything is written."""
    wish = Wish(sock, version, labels, meta, ready, owner, lease, heartbeat_s)
    registering.check(wish)
    launch.check(argv, cwd=cwd, env=env, stdout=stdout, stderr=stderr)
    ours = wish._replace(owner=os.getpid() if owner is None else owner)
    return _Program(argv, cwd, env, stdout, stderr, ours)


def spawn(session: Session, sid: str, argv: Words, **options: Unpack[SpawnOptions]) -> Worker:
    """Start a program as a worker; see `Registry.spawn`."""
    program = _program(argv, **options)
    with turn(session, sid) as mine:
        return _spawn(session, sid, program, mine)


def turn(
    session: Session, sid: str, *, wait_s: float = layout.ENSURE_WAIT_S
) -> AbstractContextManager[Turn]:
    """Hold the turn to start a worker of that sid; see store.Leases."""
    arguments.check_sid(sid)
    return session.created().leases.turn(sid, wait_s=wait_s)


def _spawn(session: Session, sid: str, program: _Program, mine: Turn) -> Worker:
    """Start a process that waits, register it, let it begin. Held: the sid's turn."""

    def launched(keep: Sequence[int]) -> Launch:
        return Launch(
            program.argv,
            cwd=program.cwd,
            env=program.env,
            stdout=program.stdout,
            stderr=program.stderr,
            keep=keep,
            turn=mine.share(),
        )

    worker, started = entered(session, sid, program.wish, launched)
    return _begun(session, worker, started)


def entered(
    session: Session, sid: str, wish: Wish, launched: Callable[[Sequence[int]], Launch]
) -> tuple[Worker, Launch]:
    """Start a process that waits, and register it; it is told to begin by `go`. Held: the turn.

    `launched` starts it, and lets it inherit the descriptors that it is given.
    """
    with leasing(session, sid, wish) as held:
        started = launched(() if held is None else held.inherited())
        try:
            worker = enter(session, sid, started.pid, wish, held=held)
        except BaseException:
            started.give_up()
            raise
    if held is not None:
        held.hand_over(worker)
    return worker, started


def _begun(session: Session, worker: Worker, started: Launch) -> Worker:
    try:
        started.go()
    except SpawnFailed:
        _record_end(session, worker, started, session.append)
        raise
    tell = functools.partial(_tell_end, session.twin(), worker, started)
    try:
        threads.start(tell, name=f"crewlog-{worker.sid}")
    except OSError as error:  # it runs and is listed; a collector finds its end
        _logger.warning("nobody waits for the end of worker %s: %s", worker.sid, error.strerror)
    return worker


def ensure(
    session: Session, sid: str, argv: Words, *, timeout_s: float, **options: Unpack[SpawnOptions]
) -> Worker:
    """Return the living worker of that sid, or start it; see `Registry.ensure`."""
    program = _program(argv, **options)
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
            time.sleep(min(layout.DEATH_LOOK_S, left_s))
            continue
        if found.state not in _LEAVING and not is_exiting(found):
            return found
        if not left_s:
            what = f"the end of worker {sid!r}, which is leaving,"
            raise WaitTimeout(what, waited_s=timeout_s)
        _await_end(found, min(layout.DEATH_LOOK_S, left_s))


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
    raise WorkerExists(sid, pid=worker.pid, rev=worker.rev, state=worker.state.value)


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
            record_end(append, step, passing=passing)
    except CrewlogError as error:
        _logger.warning("the end of worker %s is not recorded: %s", worker.sid, error)
    finally:
        started.reap()
