"""Descriptors that a program closed under us: never written to, never closed a second time."""

import errno
import gc
import importlib
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest

import crewlog
from crewlog import host
from crewlog.registry import Registry
from crewlog.workers import reaper
from crewlog_compactor import verify
from procs import forked, joined, until
from stores import opened


@pytest.mark.parametrize("spread", [0, 20, 60])
def test_program_that_becomes_a_daemon_goes_on(place: Path, tmp_path: Path, spread: int) -> None:
    """It closes every number it does not know, and opens files of its own in their place."""

    def daemon() -> None:
        with opened(place) as reg:
            reg.register("svc")
            reg.update("svc", meta={"n": 0})
            os.closerange(3, 1000)
            own = [os.open(tmp_path / str(n), os.O_RDWR | os.O_CREAT) for n in range(spread)]
            for number in range(3):
                reg.update("svc", meta={"n": number + 1})
            assert [w.meta for w in reg.workers()] == [{"n": 3}]
            assert len(list(reg.history(sid="svc"))) == 5
        for fd in own:
            os.write(fd, b"mine")  # not closed by us
            assert os.pread(fd, 9, 0) == b"mine", "nothing of ours is in it"

    joined(forked(daemon))
    assert verify(place).ok
    with opened(place) as reg:
        assert [w.meta for w in reg.workers()] == [{"n": 3}]


def test_two_stores_that_change_their_numbers_are_not_mixed_up(place: Path, tmp_path: Path) -> None:
    """The numbers of one are those of the other by now."""

    def daemon() -> None:
        with opened(place) as one, opened(tmp_path / "other") as other:
            one.register("a")
            other.register("b")
            os.closerange(3, 1000)
            other.update("b", meta={"n": 1})
            one.update("a", meta={"n": 1})
            for _ in range(3):
                other.update("b", labels={"x": os.urandom(2).hex()})
                one.update("a", labels={"x": os.urandom(2).hex()})

    joined(forked(daemon))
    for where, sid in ((place, "a"), (tmp_path / "other", "b")):
        assert verify(where).ok
        with crewlog.open(where) as reg:
            assert [w.sid for w in reg.workers()] == [sid]


def test_registry_that_is_only_closed_closes_nothing_of_others(place: Path, tmp_path: Path) -> None:
    """Without a change in between, and forgotten as well as closed."""

    def daemon() -> None:
        one, forgotten = opened(place), opened(place)
        one.register("a")
        forgotten.workers()
        os.closerange(3, 1000)
        own = [os.open(tmp_path / str(n), os.O_RDWR | os.O_CREAT) for n in range(40)]
        one.close()
        del forgotten
        for fd in own:
            os.fstat(fd)

    joined(forked(daemon))
    shutil.rmtree(place)


@pytest.mark.skipif(sys.platform != "linux", reason="needs epoll")
def test_daemon_that_has_workers_hears_of_their_ends(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for them is closed, too: each is looked at, and no file of others is used."""
    monkeypatch.setattr(reaper, "_CLOSED_LOOK_S", 0.2)
    monkeypatch.setattr(reaper, "_LOOK_S", 0.1)

    def daemon() -> None:
        logging.disable()  # the runner's own log is a file that is closed here, too
        with opened(place) as reg:
            gate = tmp_path / "gate"
            wait = ["sh", "-c", f"until [ -e {gate} ]; do sleep 0.1; done; exit 5"]
            reg.spawn("job", wait)
            with reg.observe_all() as observer:
                assert observer.wait(20)
                os.closerange(3, 1000)
                names = [tmp_path / str(n) for n in range(60)]
                own = [os.open(name, os.O_RDWR | os.O_CREAT) for name in names]
                gate.touch()
                until(lambda: (w := reg.get("job")) is not None and w.final)
                reg.spawn("next", ["sh", "-c", "exit 6"])
                until(lambda: (w := reg.get("next")) is not None and w.final)
                until(lambda: observer.leads)
            ended = {w.sid: w.exit and w.exit.code for w in reg.workers(all=True)}
            assert ended == {"job": 5, "next": 6}
        for fd in own:
            os.write(fd, b"mine")  # not closed by us
            assert os.pread(fd, 9, 0) == b"mine", "nothing of ours is in it"

    joined(forked(daemon))
    assert verify(place).ok


def test_number_that_is_opened_anew_is_its_new_owners(tmp_path: Path) -> None:
    """The same file under the same number: who had it before must not close it."""
    path = tmp_path / "f"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    old = host.own(fd)
    os.close(fd)
    again = os.open(path, os.O_RDONLY)
    assert again == fd
    new = host.own(again)
    host.close_own(fd, old)
    assert host.is_still(again, new)
    host.close_own(again, new)
    assert not host.is_still(again, new)


@pytest.mark.parametrize("backend", ["watchdog", "inotify"])
def test_daemon_that_watches_hears_on_and_loses_no_file(
    place: Path, tmp_path: Path, backend: str
) -> None:
    """What wakes it is a library's, which closes by number: it is left alone, and polled."""
    if backend == "inotify":
        pytest.importorskip("inotify_simple")

    def daemon() -> None:
        logging.disable()  # as above
        with opened(place) as reg:
            reg.register("svc")
            with reg.watch(after="now", sids=["svc"], backend=backend) as items:  # type: ignore[arg-type] # either
                reg.register("another")  # looked at, and passed over
                items.drain()
                os.closerange(3, 1000)
                names = [tmp_path / str(n) for n in range(60)]
                own = [os.open(name, os.O_RDWR | os.O_CREAT) for name in names]
                reg.update("svc", meta={"n": 1})
                until(lambda: any(item.kind == "change" for item in items.drain()))
        for fd in own:
            os.write(fd, b"mine")  # not closed by us
            assert os.pread(fd, 9, 0) == b"mine", "nothing of ours is in it"

    joined(forked(daemon))
    assert verify(place).ok


@pytest.mark.parametrize("backend", ["watchdog", "inotify"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC])
def test_limits_that_leave_a_watch_polling_cost_no_descriptor(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, backend: str, number: int
) -> None:
    """Whatever was opened before the failure is given back."""
    if backend == "inotify":
        inotify = pytest.importorskip("inotify_simple")
        failing, name = inotify.INotify, "add_watch"
    else:
        emitters = importlib.import_module("watchdog.observers.inotify")
        failing, name = emitters.InotifyEmitter, "on_thread_start"  # where it asks the kernel

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    reg.register("a")
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(failing, name, fail)
    for _ in range(5):
        with reg.watch(after="now", backend=backend) as items:  # type: ignore[arg-type] # either
            assert items.stats()["source"] == "poll"
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
