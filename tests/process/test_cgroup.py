"""What control groups tell: frozen, out of memory; and what they do not prove."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import crewlog
from crewlog.process import cgroup, identity
from crewlog.process.cgroup import Memory
from crewlog.registry import Registry
from procs import Crew, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs control groups")

_EAT = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
x = [bytearray(1 << 20) for _ in range(400)]
"""
LIMIT = 64 << 20


@contextlib.contextmanager
def group(controller: str) -> Iterator[Path]:
    """Make a control group of a test's own, of whichever version counts memory here."""
    mounts = cgroup._mounts()
    where = mounts.get(controller) or mounts.get("")
    if where is None or os.geteuid() != 0:
        pytest.skip("no control group can be made here")
    made = Path(where) / f"crewlog-{os.getpid()}-{controller}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            until(lambda: not (made / "cgroup.procs").read_text(), wait_s=10)
        made.rmdir()


def limit(made: Path, size: int) -> None:
    """Give a group so much memory and no swap, or skip where that cannot be done."""
    for name, value in (
        ("memory.max", size), ("memory.swap.max", 0),
        ("memory.limit_in_bytes", size), ("memory.memsw.limit_in_bytes", size),
    ):  # fmt: skip
        with contextlib.suppress(OSError):
            (made / name).write_text(str(value))
    settings = [made / "memory.max", made / "memory.limit_in_bytes"]
    if not any(one.exists() and one.read_text().strip() == str(size) for one in settings):
        pytest.skip("memory is not counted here")


def ended(reg: Registry, sid: str) -> crewlog.Worker:
    """Return a worker once its end is on record."""
    until(lambda: (now := reg.get(sid)) is not None and now.final)
    worker = reg.get(sid)
    assert worker is not None
    return worker


def moving(made: Path, then: str) -> list[str]:
    """Return a program that enters a group, and goes on."""
    return ["sh", "-c", f"echo $$ > {made}/cgroup.procs; {then}"]


def test_out_of_memory_is_told_as_evidence(reg: Registry, tmp_path: Path) -> None:
    """In a real group: killed by the kernel, with limit and group."""
    gate = tmp_path / "gate"
    with group("memory") as made:
        limit(made, LIMIT)
        eat = f"until [ -e {gate} ]; do sleep 0.02; done; exec {sys.executable} -c '{_EAT}' {made}"
        reg.register("first")
        with reg.observe_all() as observer:
            worker = subprocess.Popen(moving(made, eat))
            until(lambda: str(worker.pid) in (made / "cgroup.procs").read_text())
            reg.register("hungry", pid=worker.pid)
            assert observer.wait(20)
            from crewlog.workers.reaper import REAPER

            until(lambda: REAPER.counts()[0] >= 2)
            gate.touch()
            end = ended(reg, "hungry").exit
            worker.wait()
    assert end is not None
    assert end.signal == signal.SIGKILL
    assert end.oom is not None
    assert (end.oom.kills, end.oom.limit_bytes) == (1, LIMIT)
    assert made.name in end.oom.cgroup
    assert end.oom.proven


def test_kill_beside_a_sibling_that_is_out_of_memory_is_not_called_that(
    reg: Registry, tmp_path: Path
) -> None:
    """The group has an oom kill; whose it was, the kernel's log tells, and not this worker's."""
    with group("memory") as made:
        limit(made, LIMIT)
        reg.register("first")
        with reg.observe_all() as observer:
            worker = subprocess.Popen(moving(made, "exec sleep 300"))
            until(lambda: str(worker.pid) in (made / "cgroup.procs").read_text())
            reg.register("victim", pid=worker.pid)
            assert observer.wait(20)
            eater = subprocess.Popen([sys.executable, "-c", _EAT, made])
            assert eater.wait() == -signal.SIGKILL
            worker.kill()
            end = ended(reg, "victim").exit
            worker.wait()
    assert end is not None
    assert end.signal == signal.SIGKILL
    assert end.oom is None or not end.oom.proven
    ooms = [e.data.get("oom") for e in reg.history(sid="victim", types=["worker.exited"])]
    assert all(one is None or one["proven"] is False for one in ooms)  # type: ignore[call-overload,index]


def test_count_that_rose_long_ago_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is near the end."""
    with group("memory") as made:
        limit(made, LIMIT)
        directory = str(made)
        events = made / "memory.events.local"
        memory = Memory(cgroup.Place(f"/{made.name}", directory, v2=events.exists()))
        try:
            eater = subprocess.Popen([sys.executable, "-c", _EAT, made])
            assert eater.wait() == -signal.SIGKILL
            memory.look()
            now = time.monotonic
            monkeypatch.setattr(time, "monotonic", lambda: now() + 60)
            assert memory.about(identity.capture()) is None
        finally:
            memory.close()


def test_process_that_was_stopped_is_paused_and_lives(reg: Registry, crew: Crew) -> None:
    """By a signal."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    assert reg.liveness("a").flags == frozenset()
    worker.send_signal(signal.SIGSTOP)
    until(lambda: crewlog.Flag.PAUSED in reg.liveness("a").flags)
    assert reg.liveness("a").alive
    worker.send_signal(signal.SIGCONT)
    until(lambda: reg.liveness("a").flags == frozenset())


def test_process_of_a_frozen_group_is_paused(reg: Registry, crew: Crew) -> None:
    """Nothing of it says so but its group."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    with group("freezer") as made:
        (made / "cgroup.procs").write_text(str(worker.pid))
        v1 = (made / "freezer.state").exists()
        file = made / ("freezer.state" if v1 else "cgroup.freeze")
        file.write_text("FROZEN" if v1 else "1")
        until(lambda: crewlog.Flag.PAUSED in reg.liveness("a").flags)
        assert reg.liveness("a").alive
        file.write_text("THAWED" if v1 else "0")
        until(lambda: reg.liveness("a").flags == frozenset())
        worker.kill()
        worker.wait()


def test_text_that_is_no_cgroup_file_says_nothing() -> None:
    """Old kernels, other systems."""
    assert cgroup.path_of(2**22 + 5) is None
    assert cgroup.is_frozen(b"") is False
    assert cgroup._kills(b"") == 0


def test_kill_counts_near_an_end_and_not_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As version 2 tells it, by the time of its word."""
    who = identity.capture()
    counts = tmp_path / "memory.events.local"
    counts.write_text("oom 0\noom_kill 0\n")
    memory = Memory(cgroup.Place("/job", str(tmp_path), v2=True))
    try:
        assert memory.about(who) is None
        counts.write_text("oom 1\noom_kill 2\n")
        memory.look()  # as the kernel bids
        evidence = memory.about(who)
        assert evidence is not None
        assert (evidence.kills, evidence.proven) == (2, False)
        now = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now() + 2 * cgroup.NEAR_S)
        assert memory.about(who) is None
        (tmp_path / "memory.oom.group").write_text("1\n")
    finally:
        memory.close()
    counts.write_text("oom 1\noom_kill 2\n")
    memory = Memory(cgroup.Place("/job", str(tmp_path), v2=True))
    try:
        counts.write_text("oom 2\noom_kill 3\n")
        evidence = memory.about(who)
        assert evidence is not None
        assert (evidence.kills, evidence.proven) == (1, True), "the whole group goes at once"
    finally:
        memory.close()
