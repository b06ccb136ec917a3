"""Descriptors that a program closed under us: never written to, never closed a second time."""

import os
import shutil
from pathlib import Path

import pytest

import crewlog
from crewlog_compactor import verify
from procs import forked, joined
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
