"""Stores that are created or opened for the first time."""

import os
import signal
from pathlib import Path

import pytest

from crewlog.errors import (
    CrewlogError,
)
from crewlog.registry import Registry
from faults import EIO, FailingDisk, only, registry_on
from procs import forked, joined, until
from stores import opened


def test_failed_creations_leak_no_descriptor(place: Path) -> None:
    """Each one closes what it had opened."""
    disk = FailingDisk()
    disk.fault = only("link", EIO)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        with pytest.raises(CrewlogError):
            registry_on(place / str(number), disk)
    assert len(os.listdir("/proc/self/fd")) == before


def test_child_forked_while_a_thread_opens_the_store_goes_on(place: Path) -> None:
    """No mutex of the parent holds the child up."""
    with opened(place) as reg:
        with reg._session._opening:
            child = forked(lambda: _register_in_child(reg))
            until(
                lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            )
        joined(child)


def _register_in_child(reg: Registry) -> None:
    signal.alarm(20)
    reg.register("a")
