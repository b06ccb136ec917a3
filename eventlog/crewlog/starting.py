"""Start programs as workers.

A process waits while it is registered and becomes the program only then (launch.py), so a SIGKILL
of the starter at any moment leaves no running program that is not listed. Of many that start one
sid at once, one has the turn, a lock that its waiting process holds too: whoever comes next finds
either a program that has begun or nothing.
"""

import logging
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Final, TypedDict, Unpack

from crewlog import changes, launch, layout
from crewlog.changes import Step
from crewlog.errors import CrewlogError, SpawnFailed, WaitTimeout, WorkerExists
from crewlog.events import JsonValue, Worker, WorkerState
from crewlog.judging import Judging, exit_of, hold
from crewlog.launch import Launch, Stream, Words
from crewlog.store import Turn

_logger = logging.getLogger("crewlog.starting")
_LEAVING: Final = frozenset({WorkerState.DRAINING, WorkerState.STOPPING})


class SpawnOptions(TypedDict, total=False):
    """The optional arguments of `spawn`, which `ensure` passes on."""

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


class Starting(Judging):
    """What a registry must do beside judging, and the starting of workers."""

    @abstractmethod
    def claim(self, sid: str, step: Step) -> Worker:
        """Write a registration, over a proven death if need be. *Raises* WorkerExists."""

    @abstractmethod
    def twin(self) -> "Starting":
        """Return a registry of its own for the same place, for a thread that outlives this one."""

    @abstractmethod
    def close(self) -> None:
        """Give every resource back."""

    def spawn(
        self,
        sid: str,
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
    ) -> Worker:
        """Start a program as a worker, in a session of its own, and return it.

        Its stdin is empty and its stdout goes nowhere unless given: it may outlive what reads ours.

        *Guarantee*: the registration is durable before the program begins; killed at any moment,
        we leave no running program that is not listed. While this process lives, it records how the
        worker ends. *Args*: `owner` is a pid, by default ours; a `lease` is inherited by the
        program, which must then not close descriptors that it does not know. *Raises* WorkerExists;
        SpawnFailed, and the worker is then recorded as ended.
        """
        launch.check_argv(argv)
        changes.check_heartbeat(heartbeat_s)
        with self.turn(sid) as turn:
            return self._spawn(
                sid,
                argv,
                turn,
                sock=sock,
                version=version,
                labels=labels,
                meta=meta,
                ready=ready,
                owner=owner,
                lease=lease,
                heartbeat_s=heartbeat_s,
                cwd=cwd,
                env=env,
                stdout=stdout,
                stderr=stderr,
            )

    def turn(
        self, sid: str, *, wait_s: float = layout.ENSURE_WAIT_S
    ) -> AbstractContextManager[Turn]:
        """Hold the turn to start a worker of that sid; see store.Leases."""
        changes.check_sid(sid)
        return self.created().leases.turn(sid, wait_s=wait_s)

    def _spawn(self, sid: str, argv: Words, turn: Turn, **options: Unpack[SpawnOptions]) -> Worker:
        """Start a process that waits, register it, let it begin. Held: the sid's turn."""
        heartbeat_s = changes.check_heartbeat(options.get("heartbeat_s"))
        wanted = options.get("lease", False) or heartbeat_s is not None
        with self.leasing(sid, wanted=wanted, heartbeat_s=heartbeat_s) as held:
            started = Launch(
                argv,
                cwd=options.get("cwd"),
                env=options.get("env"),
                stdout=options.get("stdout", launch.NOWHERE),
                stderr=options.get("stderr"),
                keep=() if held is None else held.inherited(),
                turn=turn.share(),
            )
            owner = options.get("owner")
            try:
                step = changes.registered(
                    self.author(),
                    sid,
                    pid=started.pid,
                    sock=options.get("sock", ""),
                    version=options.get("version", ""),
                    labels=options.get("labels"),
                    meta=options.get("meta"),
                    ready=options.get("ready", False),
                    owner=os.getpid() if owner is None else owner,
                    lease=None if held is None else held.name,
                    heartbeat_s=heartbeat_s,
                )
                worker = self.claim(sid, step)
            except BaseException:
                started.give_up()
                raise
        if held is not None:
            held.hand_over(worker)
        return self._begun(worker, started)

    def _begun(self, worker: Worker, started: Launch) -> Worker:
        try:
            started.go()
        except SpawnFailed:
            code = started.wait()
            self.record_end(worker, lambda rev: exit_of(self.author(), worker.sid, code, rev=rev))
            raise
        tell = threading.Thread(
            target=_tell_end,
            args=(self.twin(), worker, started),
            name=f"crewlog-{worker.sid}",
            daemon=True,
        )
        try:
            tell.start()
        except RuntimeError as error:  # EAGAIN: it runs and is listed; a collector finds its end
            _logger.warning("nobody waits for the end of worker %s: %s", worker.sid, error)
        return worker

    def ensure(
        self,
        sid: str,
        argv: Words,
        *,
        timeout_s: float = layout.ENSURE_WAIT_S,
        **options: Unpack[SpawnOptions],
    ) -> Worker:
        """Return the living worker of that sid, or start it; see `spawn` for the arguments.

        *Guarantee*: of any number of callers, in any processes, one starts the program and all
        return its worker, once it has begun. One that is draining or stopping is waited for and
        started anew. *Raises* WorkerExists while it cannot be judged; WaitTimeout and LockBusy
        after `timeout_s`.
        """
        launch.check_argv(argv)
        changes.check_heartbeat(options.get("heartbeat_s"))
        deadline = time.monotonic() + changes.check_wait(timeout_s)
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            with self.turn(sid, wait_s=left_s) as turn:
                found = self._running(sid)
                if found is None:
                    return self._spawn(sid, argv, turn, **options)
            if found.state not in _LEAVING:
                return found
            if not left_s:
                what = f"the end of worker {sid!r}, which is leaving,"
                raise WaitTimeout(what, waited_s=timeout_s)
            _await_end(found, min(layout.DEATH_LOOK_S, left_s))

    def _running(self, sid: str) -> Worker | None:
        """Return the worker that lives under that sid, None if there is none."""
        changes.check_sid(sid)
        worker = self.get(sid)
        if worker is None or worker.final:
            return None
        found = self.judge([worker])[0]
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


def _tell_end(own: Starting, worker: Worker, started: Launch) -> None:
    """Wait for a child and record how it ended; nobody else can know as surely."""
    code = started.wait()
    try:
        own.record_end(worker, lambda rev: exit_of(own.author(), worker.sid, code, rev=rev))
    except CrewlogError as error:
        _logger.warning("the end of worker %s is not recorded: %s", worker.sid, error)
    finally:
        own.close()
