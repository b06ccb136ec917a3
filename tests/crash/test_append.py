"""Every failure of an append ends as its outcome says."""

import errno
import os
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import (
    AppendUncertain,
    CrewlogError,
    DataDamaged,
    StorageFailed,
    StorageFull,
    StoreMissing,
    StorePoisoned,
    WorkerExists,
)
from crewlog.local import layout
from crewlog_compactor import verify
from faults import EIO, ENOSPC, FailingDisk, active_segment, empty_redo, only, registry_on
from procs import files


@pytest.mark.parametrize("number", [ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_write_without_room_leaves_the_log_as_it_was(place: Path, number: int) -> None:
    """Not written, and the next change goes through."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    before = active_segment(place).read_bytes()
    disk.fault = only("write", number)
    with pytest.raises(StorageFull) as caught:
        reg.register("b")
    assert caught.value.outcome == "not_written"
    assert active_segment(place).read_bytes() == before
    disk.fault = lambda _: None
    assert reg.register("b").rev == 3
    assert verify(place).ok


def test_short_write_is_cut_back(place: Path) -> None:
    """Half a line never stays."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    before = active_segment(place).read_bytes()
    disk.short = True
    with pytest.raises(StorageFull):
        reg.register("b")
    assert active_segment(place).read_bytes() == before
    disk.short = False
    reg.register("b")
    assert verify(place).ok


def test_failed_sync_poisons_the_store_for_everyone(place: Path) -> None:
    """Nobody, opened before or after, is acknowledged again; the acknowledged stays readable."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    before = crewlog.open(place)
    assert before.get("a") is not None
    disk.fault = only("sync", EIO)
    with pytest.raises(StorageFailed) as caught:
        reg.register("b")
    assert caught.value.outcome == "unknown"
    disk.fault = lambda _: None
    for registry in (reg, before, crewlog.open(place)):
        with pytest.raises(StorePoisoned) as refused:
            registry.register("c")
        assert refused.value.outcome == "not_written"
        assert [w.sid for w in registry.workers()] == ["a"]
    assert (place / layout.POISON).exists()
    assert [f.code for f in verify(place).findings] == ["store_poisoned"]


def test_failed_sync_is_never_tried_again(place: Path) -> None:
    """A second fdatasync would return success although the data are gone."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    disk.calls.clear()
    failed: list[str] = []

    def once(call: str) -> int | None:
        if call == "sync" and not failed:
            failed.append(call)
            return EIO
        return None

    disk.fault = once
    with pytest.raises(StorageFailed):
        reg.register("b")
    with pytest.raises(StorePoisoned):
        reg.register("c")
    assert disk.calls[: disk.calls.index("sync") + 1].count("sync") == 1
    assert reg.last_seq == 2


def test_waiting_writer_of_a_poisoned_store_is_told_that_nothing_is_known(place: Path) -> None:
    """Who had written before the sync failed hears: unknown."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    log = files(reg)
    disk.fault = only("sync", EIO)
    with pytest.raises(StorageFailed):
        reg.register("b")
    disk.fault = lambda _: None
    with pytest.raises(AppendUncertain) as caught:
        log._appender.sync.make_durable(3)
    assert caught.value.outcome == "unknown"


def test_refusal_stays_a_refusal_where_a_sync_fails(place: Path) -> None:
    """Nothing of it was written: not "unknown", whatever becomes of what it was decided upon."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    disk.fault = only("sync", EIO)
    with pytest.raises(StorageFailed):
        reg.register("b")
    disk.fault = lambda _: None
    log = files(reg)
    log._appender.sync._failed = 0
    (place / layout.POISON).unlink()
    log._heads.put_head(log.head()._replace(poisoned=False))
    disk.fault = only("sync", EIO)
    with pytest.raises(WorkerExists) as caught:
        reg.register("b")
    assert caught.value.outcome == "not_written"


def test_half_line_that_cannot_be_cut_is_known_to_nobody(place: Path) -> None:
    """The outcome is unknown, and the next writer cuts it: nothing is poisoned."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    disk.short = True
    disk.fault = only("cut", EIO)
    with pytest.raises(StorageFailed) as caught:
        reg.register("b")
    assert caught.value.outcome == "unknown"
    with crewlog.open(place) as other:
        other.register("c")
        assert [w.sid for w in other.workers()] == ["a", "c"]
    assert verify(place).ok


def test_sync_of_a_cut_that_fails_poisons_before_anyone_can_append(place: Path) -> None:
    """What was refused may come back after a power cut: that must stop everyone."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    disk.short = True
    disk.fault = only("sync", EIO)
    with pytest.raises(StorePoisoned):
        reg.register("b")
    with pytest.raises(StorePoisoned):
        crewlog.open(place).register("c")


def test_every_call_failing_in_turn_ends_as_promised(place: Path) -> None:
    """EIO at call k of an append, for every k: the outcome is true, and reading goes on."""
    fired = 0
    for k in range(100):
        disk = FailingDisk()
        here = place / str(k)
        reg = registry_on(here, disk)
        reg.register("a")
        count = 0

        def at_k(_: str, k: int = k) -> int | None:
            nonlocal count
            count += 1
            return EIO if count - 1 == k else None

        disk.fault = at_k
        error: CrewlogError | None = None
        try:
            reg.register("b")
        except CrewlogError as caught:
            error = caught
        disk.fault = lambda _: None
        with crewlog.open(here) as fresh:
            there = [w.sid for w in fresh.workers()]
            if error is None:
                assert there == ["a", "b"]
            elif error.outcome == "not_written":
                assert b'"sid":"b"' not in active_segment(here).read_bytes()
                assert there == ["a"]
            else:
                assert there[0] == "a"
        if count <= k:
            break
        fired += 1
    assert fired >= 4, "write, append.state, sync and head/durable each failed once"


def test_log_shorter_than_written_is_refused(place: Path) -> None:
    """A cut log is never taken for a young one."""
    reg = crewlog.open(place)
    reg.register("a")
    reg.register("b")
    segment = active_segment(place)
    os.truncate(segment, segment.stat().st_size - 10)
    empty_redo(place)  # which would complete it
    with pytest.raises(DataDamaged):
        reg.register("c")
    with pytest.raises(DataDamaged):
        crewlog.open(place).register("c")
    assert not verify(place).ok


def test_store_removed_under_a_writer_is_missing(place: Path) -> None:
    """Nothing is acknowledged into a directory that is gone."""
    import shutil

    reg = crewlog.open(place)
    reg.register("a")
    shutil.rmtree(place)
    with pytest.raises(StoreMissing):
        reg.register("b")


def test_interrupt_between_write_and_state_leaves_a_line_for_the_next_writer(place: Path) -> None:
    """Ctrl-C inside the append: never shown before the next writer has adopted it."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")

    def interrupt(call: str) -> int | None:
        if call == "overwrite":
            disk.fault = lambda _: None
            raise KeyboardInterrupt
        return None

    disk.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        reg.register("b")
    assert [w.sid for w in reg.workers()] == ["a"]
    reg.register("c")
    assert [w.sid for w in reg.workers()] == ["a", "b", "c"]
    assert verify(place).ok


def test_compaction_without_room_at_any_call_is_typed_and_harmless(place: Path) -> None:
    """ENOSPC at call k of a compaction and of a cursor: a typed error, nothing lost."""
    from crewlog_compactor import compact

    fired = 0
    for k in range(100):
        here, disk = place / str(k), FailingDisk()
        reg = registry_on(here, disk)
        for sid in "abc":
            reg.register(sid)
            compact(reg, gc=False)
        reg.register("d")
        left = k

        def at_k(call: str) -> int | None:
            nonlocal left
            left -= call in {"create", "write", "overwrite", "link", "rename"}
            return ENOSPC if left == -1 and call in {"create", "write", "overwrite"} else None

        disk.fault = at_k
        try:
            compact(reg, gc=False)
            reg.watch(cursor="c", after="oldest").close()
        except CrewlogError:
            fired += 1
        disk.fault = lambda _: None
        with crewlog.open(here) as fresh:
            assert [w.sid for w in fresh.workers()] == ["a", "b", "c", "d"]
            fresh.register("e")
            compact(fresh, gc=False)
        assert verify(here).findings == ()
        if left >= 0:
            break
    assert fired >= 8, fired
