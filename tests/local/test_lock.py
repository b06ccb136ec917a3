"""Locks of the directory: replaced, inherited, waited for, interrupted."""

import contextlib
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crewlog.errors import (
    AppendUncertain,
    LockBusy,
)
from crewlog.local import layout, lock
from crewlog.local.disk import Stamp
from crewlog.registry import Registry
from crewlog_compactor import compact, verify
from procs import files, forked, slay
from stores import opened


def _replaced(path: Path) -> Path:
    """Put another file in a lock file's place."""
    path.unlink()
    path.touch(0o600)
    return path


def test_replaced_lock_file_is_noticed(place: Path) -> None:
    """A store restored under a running process: the lock that counts is the one in place."""
    with opened(place, lock_timeout_s=0.1) as reg:
        reg.register("a")
        with _replaced(place / layout.LOCKS / layout.LOCK_APPEND).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with opened(place, lock_timeout_s=0.1) as fresh, pytest.raises(LockBusy):
                fresh.register("b")
            with pytest.raises(LockBusy):
                reg.register("b")
        reg.register("b")
        assert verify(place).ok


@pytest.mark.limits(sync_wait_s=0.3)
def test_replaced_lock_of_the_sync_is_noticed(place: Path) -> None:
    """Else two would lead at once, each in the belief of being the only one."""
    with opened(place, lock_timeout_s=0.3) as reg, contextlib.ExitStack() as held:
        reg.register("a")
        reg.update("a", meta={"n": 1})  # both sync locks are open now
        for name in layout.LOCK_SYNC:
            file = held.enter_context(_replaced(place / layout.LOCKS / name).open("r+"))
            fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(AppendUncertain):
            reg.update("a", meta={"n": 2})
        held.close()
        assert reg.update("a", meta={"n": 3}).meta["n"] == 3
        assert verify(place).ok


def test_child_forked_during_a_compaction_does_not_keep_its_lock(
    place: Path,
) -> None:
    """Neither after the compaction has ended, nor after its process has."""
    with opened(place) as reg:
        reg.register("a")
        lock = files(reg).take_compact_lock()
        child = forked(signal.pause)
        lock.close()
        try:
            compact(reg, gc=False)
        finally:
            slay(child)


def test_deadline_is_one_for_all_threads(place: Path) -> None:
    """8 threads before a held lock: each hears after its own timeout, not after the others'."""
    import time

    with opened(place) as reg, opened(place, lock_timeout_s=1) as slow:
        reg.register("a")
        slow.workers()
        took: list[float] = []

        def wait() -> None:
            began = time.monotonic()
            with contextlib.suppress(LockBusy):
                slow.register("b")
            took.append(time.monotonic() - began)

        with files(reg)._appender.lock.held(wait_s=1):
            threads = [threading.Thread(target=wait) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert len(took) == 8
    assert max(took) < 5, "one after the other, they would take 8"


@pytest.mark.parametrize("taken", [False, True])
def test_interrupted_entry_gives_every_lock_back(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, *, taken: bool
) -> None:
    """Ctrl-C before the lock is taken, or just after: the next change, of any thread, goes on."""
    reg.register("a")
    real = lock.Lock.try_acquire

    def interrupted(self: lock.Lock) -> bool:
        monkeypatch.setattr(lock.Lock, "try_acquire", real)
        if taken:
            assert real(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(lock.Lock, "try_acquire", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reg.register("b")
    thread = threading.Thread(target=lambda: reg.register("c"), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert [w.sid for w in reg.workers()] == ["a", "c"]


def test_stamp_is_settled_by_the_time_of_the_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is held up behind its look must not take a second change for seen."""
    fd = os.open(tmp_path, os.O_RDONLY)
    stamp = Stamp(fd)
    now = os.fstat(fd).st_mtime_ns
    monkeypatch.setattr(time, "time_ns", lambda: now + 1)
    assert stamp.moved()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**12)
    stamp.settle()
    assert stamp.moved(), "when it was looked at, another change could have had the same time"
    stamp.settle()
    assert not stamp.moved()
    os.utime(fd, ns=(0, 5_000_000_000))  # a file system that counts in seconds
    monkeypatch.setattr(time, "time_ns", lambda: 6_000_000_000)
    assert stamp.moved()
    stamp.settle()
    assert stamp.moved()
    os.close(fd)


@pytest.fixture(autouse=True)
def _no_alarm_left() -> Iterator[None]:
    yield
    signal.alarm(0)
