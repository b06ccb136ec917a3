"""Who lives is judged right on real processes."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from crewlog import host
from crewlog.errors import ProcessNotFound, WorkerExists
from crewlog.model.events import Status
from crewlog.process import evidence, identity
from crewlog.process.handle import Process
from crewlog.process.liveness import judge
from crewlog.registry import Registry
from crewlog_compactor import compact
from procs import (
    LAST_PID,
    Crew,
    forked,
    kill,
    slay,
    stranger_with,
    until,
)
from stores import opened

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc and pidfd")
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be refused as another user")


@pytest.mark.parametrize("pid", [0, -1, 2**31, 2**64])
def test_impossible_pid_is_refused_before_anything_is_written(
    reg: Registry, place: Path, pid: int
) -> None:
    """Pid 0 would never die, a pid above 2^31 never live."""
    with pytest.raises(ValueError, match="cannot name a process"):
        reg.register("a", pid=pid)
    assert not place.exists()


def test_ended_process_cannot_be_registered(reg: Registry, crew: Crew) -> None:
    """A worker is registered while it runs."""
    worker = crew.sleeper()
    kill(worker)
    with pytest.raises(ProcessNotFound):
        reg.register("a", pid=worker.pid)
    with pytest.raises(ValueError, match="cannot be a sid"):  # what is wrong in itself comes first
        reg.register("a b", pid=worker.pid)


def test_living_sid_is_refused_and_a_dead_one_taken_over(reg: Registry, crew: Crew) -> None:
    """A sid is unique while its holder lives; a proven death frees it, and is recorded."""
    first, second = crew.sleeper(), crew.sleeper()
    reg.register("a", pid=first.pid)
    with pytest.raises(WorkerExists) as caught:
        reg.register("a", pid=second.pid)
    assert caught.value.pid == first.pid
    kill(first)
    worker = reg.register("a", pid=second.pid)
    assert worker.generation == 2
    assert [e.type for e in reg.history()] == [
        "worker.registered", "worker.lost", "worker.registered",
    ]  # fmt: skip


@LINUX
@ROOT
@pytest.mark.parametrize("way", ["pidfd", "stat", "kill"])
def test_process_of_another_user_is_alive(
    place: Path, crew: Crew, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EPERM is not death: a living worker that we may not signal lives, by whatever tells.

    Where pidfd_open is denied and /proc hides it, kill(2) alone is asked, and answers EPERM.
    """
    worker = crew.sleeper()
    who = identity.capture(worker.pid)
    os.chmod(place.parent, 0o755)  # noqa: S103 (the child must get there)
    if way != "pidfd":
        monkeypatch.setattr(identity, "open_pidfd", lambda _: ("unsupported", -1))
    if way == "kill":
        monkeypatch.setattr(identity, "read_stat", lambda _: None)

    def look_as_nobody(pid: int) -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with pytest.raises(PermissionError):
            os.kill(worker.pid, 0)
        asked = replace(who, pid=pid)
        seen = evidence.witness().look(asked, last_event_at=datetime.now(UTC))
        assert judge(asked, seen, final=False).dead == (pid == gone.pid)
        if pid == worker.pid and way == "kill":
            assert seen.killed == "exists"

    gone = crew.sleeper()
    kill(gone)
    for pid in (worker.pid, gone.pid):  # the second: that the look can tell at all
        child = forked(partial(look_as_nobody, pid))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@LINUX
def test_stopped_process_is_alive(reg: Registry, crew: Crew) -> None:
    """SIGSTOP is not death."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    worker.send_signal(signal.SIGSTOP)
    until(lambda: _state(worker.pid) == "T")
    assert reg.liveness("a").alive


def _ticks() -> int:
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def _state(pid: int) -> str:
    stat = identity.read_stat(pid)
    return "" if stat is None else stat.state


@LINUX
def test_zombie_is_dead_with_its_exit_status(reg: Registry, crew: Crew) -> None:
    """A process that nobody has waited for yet is dead, and its status can be read."""
    worker = crew.python("import sys; sys.stdin.read(1); sys.exit(7)")
    reg.register("a", pid=worker.pid)
    assert worker.stdin is not None
    worker.stdin.close()
    until(lambda: _state(worker.pid) == "Z")
    liveness = reg.liveness("a")
    assert liveness.dead
    assert liveness.cause == "exited"
    assert liveness.evidence.exit_code == 7


@LINUX
@pytest.mark.usefixtures("kept_statuses")
def test_code_of_one_that_is_reaped_during_the_look_is_kept(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone from /proc, it is still told by the pidfd that was opened before."""
    worker = crew.python("import sys; sys.stdin.read(1); sys.exit(7)")
    reg.register("a", pid=worker.pid)
    assert worker.stdin is not None
    worker.stdin.close()
    until(lambda: _state(worker.pid) == "Z")
    read = identity.read_stat

    def reaped_first(pid: int) -> identity.Stat | None:
        if pid == worker.pid:
            worker.wait()
        return read(pid)

    monkeypatch.setattr(identity, "read_stat", reaped_first)
    seen = reg.liveness("a").evidence
    assert (seen.task_state, seen.exit_code, seen.exit_source) == (None, 7, "pidfd")


@LINUX
@pytest.mark.skipif(not os.access(LAST_PID, os.W_OK), reason="needs to set ns_last_pid")
def test_code_of_a_stranger_is_not_the_workers(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pidfds have no inodes, the zombie with a worker's pid may be another process."""
    monkeypatch.setattr(identity, "pidfds_have_inodes", lambda: False)
    worker = crew.sleeper()
    started = reg.register("a", pid=worker.pid).identity
    assert started is not None
    until(lambda: _ticks() > (started.start_ticks or 0) + 1)  # it tells processes apart by ticks
    kill(worker)
    stranger = stranger_with(worker.pid)
    os.kill(stranger, signal.SIGKILL)
    try:
        until(lambda: _state(stranger) == "Z")
        liveness = reg.liveness("a")
        assert (liveness.cause, liveness.evidence.task_state) == ("pid_reused", "Z")
        assert reg.observe("a").type == "worker.lost"
    finally:
        os.waitpid(stranger, 0)


@LINUX
def test_zombie_that_came_after_it_under_its_pid_tells_nothing(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the kernel keeps no status for the pidfd: it says at least that it is gone."""
    worker = crew.sleeper()
    fd = os.pidfd_open(worker.pid)
    try:
        worker.kill()
        until(lambda: _state(worker.pid) == "Z")
        zombie = identity.read_stat(worker.pid)
        monkeypatch.setattr(identity, "kept_status", lambda _: None)
        monkeypatch.setattr(identity, "read_stat", lambda _: zombie)
        monkeypatch.setattr(identity, "_is_shown", lambda *_: True)
        assert identity.exit_status(worker.pid, fd) == Status(None, 9, "zombie")
        worker.wait()
        assert identity.exit_status(worker.pid, fd) is None
    finally:
        os.close(fd)


_MAIN_ENDED = """
import ctypes, sys, threading, time
threading.Thread(target=lambda: (print("up", flush=True), time.sleep(300))).start()
sys.stdin.readline()
ctypes.CDLL(None).pthread_exit(None)
"""


@LINUX
def test_process_whose_main_thread_ended_is_alive(reg: Registry, crew: Crew) -> None:
    """Its state reads Z like a zombie's, and other threads go on."""
    worker = crew.python(_MAIN_ENDED)
    assert worker.stdout is not None
    assert worker.stdin is not None
    worker.stdout.readline()
    reg.register("a", pid=worker.pid)
    worker.stdin.write("\n")
    worker.stdin.flush()
    until(lambda: _state(worker.pid) == "Z")
    assert reg.liveness("a").alive
    kill(worker)
    assert reg.liveness("a").dead


@LINUX
def test_thread_id_is_no_worker(reg: Registry) -> None:
    """A thread's id answers to kill(2) like a pid; it is none."""
    ready, done = threading.Event(), threading.Event()
    ids: list[int] = []

    def run() -> None:
        ids.append(threading.get_native_id())
        ready.set()
        done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        os.kill(ids[0], 0)
        with pytest.raises(ProcessNotFound):
            reg.register("a", pid=ids[0])
    finally:
        done.set()
        thread.join()


@LINUX
@pytest.mark.skipif(not os.access(LAST_PID, os.W_OK), reason="needs to set ns_last_pid")
def test_reused_pid_is_dead_and_the_stranger_untouched(reg: Registry, crew: Crew) -> None:
    """The process that got a dead worker's pid is not the worker."""
    from crewlog_compactor import collect

    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    kill(worker)
    stranger = stranger_with(worker.pid)
    try:
        liveness = reg.liveness("a")
        assert liveness.dead
        assert liveness.cause == "pid_reused"
        assert collect(reg).lost == ("a",)
        assert os.waitpid(stranger, os.WNOHANG) == (0, 0), "the stranger lives"
    finally:
        slay(stranger)


@LINUX
def test_identity_survives_exec(reg: Registry, crew: Crew) -> None:
    """A worker that becomes another program is the same process."""
    code = "import os, sys; sys.stdin.readline(); os.execvp('sleep', ['sleep', '300'])"
    worker = crew.python(code)
    reg.register("a", pid=worker.pid)
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.close()
    until(lambda: b"sleep" in Path(f"/proc/{worker.pid}/cmdline").read_bytes()[:8])
    assert reg.liveness("a").alive


@LINUX
def test_name_with_parentheses_is_parsed(crew: Crew) -> None:
    """/proc/PID/stat is read from the last parenthesis on."""
    code = """
import ctypes, sys, time
ctypes.CDLL(None).prctl(15, b") Z 1 (", 0, 0, 0)
print("named", flush=True)
time.sleep(300)
"""
    worker = crew.python(code)
    assert worker.stdout is not None
    worker.stdout.readline()
    stat = identity.read_stat(worker.pid)
    assert stat is not None
    assert stat.state in {"R", "S"}
    assert stat.threads == 1


@LINUX
def test_without_pidfd_the_start_time_decides(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 18 to 23: where no pidfd can be had, the start time must do."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    monkeypatch.setattr(identity, "open_pidfd", lambda _: ("unsupported", -1))
    liveness = reg.liveness("a")
    assert liveness.alive
    assert liveness.cause == "start_time"
    kill(worker)
    assert reg.liveness("a").cause == "no_such_process" or reg.liveness("a").dead


def test_reboot_is_told_by_the_order_of_the_log_where_the_clock_was_ahead(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered 400 days ahead, the clock set right, a reboot: two compactions settle it."""
    ahead = datetime.now(UTC) + timedelta(days=400)
    monkeypatch.setattr(host, "now", lambda: ahead)
    reg.register("a", pid=crew.sleeper().pid)
    monkeypatch.undo()
    here = identity.scope()
    boot = "11111111-0000-4000-8000-000000000000"
    monkeypatch.setattr(identity, "boot_id", lambda: boot)
    monkeypatch.setattr(
        identity, "scope", lambda: identity.Scope(boot, "the same host", here.pid_ns)
    )
    worker = reg.get("a")
    assert worker is not None
    assert worker.identity is not None
    same = replace(worker, identity=replace(worker.identity, host_id="the same host"))
    with opened(reg.path) as mine:
        assert mine.judge([same])[0].cause == "clock_disputed"
        compact(mine, gc=False)
        mine.register("b")
        assert mine.judge([same])[0].cause == "rebooted"
        assert mine.judge([same])[0].evidence.log_of_this_boot_follows is True


@LINUX
def test_short_way_says_what_the_table_says(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A living one, a zombie, one that is gone, one with another's pid; without a pidfd."""
    sleeper, zombie = crew.sleeper(), crew.sleeper()
    living, dead = identity.capture(sleeper.pid), identity.capture(zombie.pid)
    zombie.kill()
    until(lambda: (answers := identity.read_stat(zombie.pid)) is not None and answers.state == "Z")
    another = replace(living, pidfd_id=dead.pidfd_id, start_ticks=1)
    answers = [identity.look_once(who) for who in (living, dead, another)]
    assert answers == [False, True, True]
    with monkeypatch.context() as patch:
        patch.setattr(identity, "open_pidfd", lambda _: ("unsupported", -1))
        assert identity.look_once(living) is None
        with Process(living) as held:
            assert not held.wait(0)
        with pytest.raises(ProcessNotFound):
            Process(another)
    zombie.wait()
    assert identity.look_once(dead) is True
    assert identity.look_once(replace(living, pidfd_id=None)) is None


@LINUX
def test_zombie_has_ended_with_a_pidfd_and_without(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Process.wait`, stop and the table are of one mind."""
    process = crew.sleeper()
    who = identity.capture(process.pid)
    monkeypatch.setattr(identity, "open_pidfd", lambda _: ("unsupported", -1))
    with Process(who) as held:
        assert held.fd == -1
        process.kill()
        until(lambda: held.wait(0))
        seen = evidence.witness().look(who, last_event_at=datetime.now(UTC))
        assert judge(who, seen, final=False).dead
