"""After a sync that failed nothing more is acknowledged, by nobody."""

import threading
from pathlib import Path

import pytest

from crewlog.errors import (
    CrewlogError,
    StorageFailed,
    StorePoisoned,
)
from crewlog.local import layout, lock
from faults import EIO, FailingDisk, only, registry_on
from procs import files
from stores import opened


def test_poison_is_not_undone_by_a_leader(place: Path) -> None:
    """A cut that fails poisons with no leader at work, and the flag stays."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    leading = files(reg)._appender.sync._locks[1]
    disk.short = True
    disk.fault = only("sync", EIO)
    refused: list[CrewlogError] = []

    def append() -> None:
        try:
            reg.register("b")
        except CrewlogError as error:
            refused.append(error)

    thread = threading.Thread(target=append)
    other = lock.Lock(layout.LOCK_SYNC[1], at=files(reg).directory[layout.LOCKS], where="x")
    assert other.try_acquire()
    thread.start()
    thread.join(0.2)
    assert thread.is_alive(), "it waits for the leader before it poisons"
    other.release()
    thread.join(30)
    assert isinstance(refused[0], StorePoisoned)
    assert refused[0].outcome == "unknown"
    assert leading is not None


@pytest.mark.parametrize("broken", ["overwrite", "create", "both"])
def test_failed_sync_poisons_even_where_a_mark_cannot_be_written(place: Path, broken: str) -> None:
    """The head's flag, POISON.json, our own memory: each is enough by itself."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    failed = False

    def fault(call: str) -> int | None:
        nonlocal failed
        if call == "sync":
            failed = True
            return EIO
        marks = {"overwrite", "create"} if broken == "both" else {broken}
        return EIO if failed and call in marks else None

    disk.fault = fault
    with pytest.raises(StorageFailed):
        reg.register("b")
    disk.fault = lambda _: None
    disk.calls.clear()
    with pytest.raises(StorePoisoned):
        reg.register("c")
    assert "sync" not in disk.calls
    if broken != "both":
        with opened(place) as other, pytest.raises(StorePoisoned):
            other.register("c")


def test_failed_sync_of_a_recovery_poisons(place: Path) -> None:
    """It is a sync like any other: the second one would lie."""
    with opened(place) as reg:
        reg.register("a")
    (place / layout.APPEND_STATE).unlink()
    disk = FailingDisk()
    reg = registry_on(place, disk)
    disk.fault = only("sync", EIO)
    with pytest.raises(StorageFailed):
        reg.register("b")
    disk.fault = lambda _: None
    with opened(place) as other, pytest.raises(StorePoisoned):
        other.register("c")


@pytest.mark.limits(segment_bytes=500)
def test_failed_directory_sync_of_a_rotation_poisons(place: Path) -> None:
    """Nothing may be acknowledged in a segment whose name may not be durable."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    disk.fault = only("sync_directory", EIO)
    with pytest.raises(CrewlogError):
        reg.register("b")
    disk.fault = lambda _: None
    with opened(place) as other, pytest.raises(StorePoisoned):
        other.register("c")
