"""What a crash leaves behind is mended by the next writer, exactly as the table says."""

import os
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import (
    CrewlogError,
    HistoryDiverged,
    LogCorrupt,
    LogRegressed,
    NotAStore,
    SegmentMissing,
    SnapshotCorrupt,
)
from crewlog.local import disk, layout
from crewlog_compactor import compact, verify
from faults import FailingDisk, active_segment, another_boot, empty_redo, registry_on
from procs import files, tree
from stores import opened


def filled(place: Path, count: int = 3) -> None:
    with opened(place) as reg:
        for number in range(count):
            reg.register(f"w-{number}")


def add(place: Path, data: bytes) -> None:
    with active_segment(place).open("ab") as file:
        file.write(data)


TAILS = {
    "half a line": b'{"v":1,"seq":5,"ts":"2026-',
    "a line without newline": b'{"v":1}',
    "zeros": b"\0" * 700,
    "noise": b"\xff\xfe\n\n\n",
    "a newline": b"\n",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
@pytest.mark.parametrize("rebooted", [False, True])
def test_torn_tail_is_quarantined_and_cut(place: Path, tail: bytes, rebooted: bool) -> None:
    """Bytes that nobody was told about are kept aside, and the log goes on."""
    filled(place)
    add(place, tail)
    with another_boot() if rebooted else another_boot(0):
        if not rebooted:
            (place / layout.APPEND_STATE).unlink()
        with crewlog.open(place) as reg:
            assert [w.sid for w in reg.workers()] == ["w-0", "w-1", "w-2"]
            reg.register("next")
            assert [e.data["bytes"] for e in reg.history(types=["_recovered"])] == [len(tail)]
        kept = [p for p in (place / layout.QUARANTINE).iterdir() if p.suffix == ".bytes"]
        assert [p.read_bytes() for p in kept] == [tail]
        assert verify(place).ok


def test_torn_tail_of_a_dead_writer_of_this_boot_is_cut(place: Path) -> None:
    """The same without a reboot: append.state tells how far lines were written."""
    filled(place)
    add(place, TAILS["half a line"])
    with crewlog.open(place) as reg:
        reg.register("next")
        assert len(list(reg.history(types=["_recovered"]))) == 1
    assert verify(place).ok


def test_whole_line_of_a_dead_writer_is_adopted(place: Path) -> None:
    """It was written, its caller never heard; it is taken over, not lost and not doubled."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    state = (place / layout.APPEND_STATE).read_bytes()
    head = (place / layout.HEAD / layout.HEAD_DURABLE).read_bytes()
    reg.register("b")
    (place / layout.APPEND_STATE).write_bytes(state)
    (place / layout.HEAD / layout.HEAD_DURABLE).write_bytes(head)
    with crewlog.open(place) as other:
        assert [w.sid for w in other.workers()] == ["a"], "not durable as far as anyone knows"
        other.register("c")
        assert [w.sid for w in other.workers()] == ["a", "b", "c"]
    assert verify(place).ok


def test_reader_after_a_reboot_changes_nothing(place: Path) -> None:
    """Reading takes the valid prefix and leaves every byte as it is."""
    filled(place)
    add(place, TAILS["half a line"])
    before = tree(place)
    with another_boot(), crewlog.open(place) as reg:
        assert len(reg.workers()) == 3
        assert files(reg).recovery_pending
    assert tree(place) == before


def test_damage_below_what_was_durable_is_refused(place: Path) -> None:
    """Acknowledged data that are damaged are never cut, by no writer and after no reboot."""
    filled(place)
    empty_redo(place)
    segment = active_segment(place)
    data = bytearray(segment.read_bytes())
    data[-200] ^= 1
    segment.write_bytes(bytes(data))
    before = tree(place)
    for number in (0, 1):
        with another_boot(number), crewlog.open(place) as reg:
            with pytest.raises(LogCorrupt):
                reg.workers()
            with pytest.raises(LogCorrupt) as caught:
                reg.register("next")
            assert caught.value.outcome == "not_written"
    assert tree(place) == before
    assert [f.code for f in verify(place).findings] == ["log_corrupt"]


def test_later_line_bears_witness_when_the_states_are_gone(place: Path) -> None:
    """`synced` in a whole line behind the damage proves that the damaged bytes were durable."""
    filled(place, 4)
    empty_redo(place)
    (place / layout.APPEND_STATE).unlink()
    (place / layout.HEAD / layout.HEAD_DURABLE).unlink()
    segment = active_segment(place)
    lines = segment.read_bytes().split(b"\n")
    lines[2] = lines[2][:50] + b"X" + lines[2][51:]
    segment.write_bytes(b"\n".join(lines))
    with crewlog.open(place) as reg, pytest.raises(LogCorrupt) as caught:
        reg.register("next")
    assert "bears witness" in caught.value.proof


def test_log_cut_at_a_line_end_is_noticed(place: Path) -> None:
    """head/durable is the anchor against a truncation that leaves whole lines."""
    filled(place)
    empty_redo(place)
    segment = active_segment(place)
    data = segment.read_bytes()
    segment.write_bytes(data[: data.rstrip(b"\n").rfind(b"\n") + 1])
    with another_boot(), crewlog.open(place) as reg, pytest.raises(LogRegressed):
        reg.register("next")


@pytest.mark.parametrize("missing", ["both", "append", "head"])
def test_lost_states_are_rebuilt_from_the_segments(place: Path, missing: str) -> None:
    """They are caches: nothing depends on them alone."""
    filled(place)
    if missing in {"both", "append"}:
        (place / layout.APPEND_STATE).unlink()
    if missing in {"both", "head"}:
        (place / layout.HEAD / layout.HEAD_DURABLE).unlink()
    with crewlog.open(place) as reg:
        assert len(reg.workers()) == 3
        reg.register("next")
        assert len(reg.workers()) == 4
    assert verify(place).ok


def test_batch_that_is_not_whole_is_cut_as_one(place: Path) -> None:
    """A batch is committed, shown and cut together."""
    with crewlog.open(place) as reg:
        reg.register("a")
        with reg.batch() as batch:
            for number in range(5):
                batch.update("a", meta={"number": number})
    empty_redo(place)
    segment = active_segment(place)
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(lines[:-2]))
    (place / layout.APPEND_STATE).unlink()
    (place / layout.HEAD / layout.HEAD_DURABLE).unlink()
    with crewlog.open(place) as reg:
        worker = reg.get("a")
        assert worker is not None
        assert worker.meta == {}
        reg.register("b")
        assert [e.type for e in reg.history()] == ["worker.registered"] * 2
    assert verify(place).ok


CALLS = ("create", "write", "overwrite", "sync", "sync_directory", "link", "unlink")


@pytest.mark.limits(segment_bytes=1500)
def test_rotation_interrupted_anywhere_is_finished_by_the_next_writer(place: Path) -> None:
    """The process dies at call k of a rotation, for every k; the next one goes on."""

    class DiedError(BaseException):
        """Stands for a process that is no more."""

    stages = set()
    for k in range(60):
        here = place / str(k)
        disk = FailingDisk()
        reg = registry_on(here, disk)
        reg.register("a")
        left = k

        def die(call: str, disk: FailingDisk = disk) -> int | None:
            nonlocal left
            if left == 0:
                disk.fault = dead
                stages.add(call)
                raise DiedError
            left -= 1
            return None

        def dead(_: str) -> int | None:
            raise DiedError

        disk.fault = die
        try:
            for number in range(3):
                reg.update("a", meta={"number": number})
        except DiedError:
            for lock in (files(reg)._appender.lock, *files(reg)._appender.sync._locks):
                lock.close()
        else:
            break
        with opened(here) as other:
            other.update("a", state="ready")
            assert verify(here).findings == ()
            worker = other.get("a")
            assert worker is not None
            assert worker.state == "ready"
    else:
        pytest.fail("the rotation never ended")
    assert stages >= set(CALLS), "every kind of call was met"


def test_creation_interrupted_anywhere_is_begun_again(place: Path) -> None:
    """The process dies at call k of a creation; the next one creates the store."""

    class DiedError(BaseException):
        """Stands for a process that is no more."""

    for k in range(60):
        here = place / str(k)
        disk = FailingDisk()
        left = k

        def die(_: str) -> int | None:
            nonlocal left
            left -= 1
            if left < 0:
                raise DiedError
            return None

        disk.fault = die
        try:
            registry_on(here, disk).close()
        except DiedError:
            pass
        else:
            break
        with crewlog.open(here) as other:
            assert other.workers() == []
            other.register("a")
        assert verify(here).findings == ()
    else:
        pytest.fail("the creation never ended")
    assert k > 8


def test_damaged_snapshot_is_rebuilt_from_the_one_before(place: Path) -> None:
    """Never "empty": two generations can always be rebuilt, and the bad one is kept aside."""
    with crewlog.open(place) as reg:
        for number in range(3):
            reg.register(f"w-{number}")
            compact(reg, gc=False)
        before = reg.workers()
    (place / layout.SNAPSHOT).write_bytes(b'{"sessions":[')
    assert [f.code for f in verify(place).findings] == ["snapshot_corrupt"]
    with crewlog.open(place) as reg:
        assert reg.workers() == before
        reg.register("next")
        compact(reg, gc=False)
        assert len(reg.workers()) == 4
    assert verify(place).ok
    kept = [p for p in (place / layout.QUARANTINE).iterdir() if "registry.json" in p.name]
    assert [p.read_bytes() for p in kept] == [b'{"sessions":[']


def test_both_snapshots_damaged_are_refolded_from_the_archive(place: Path) -> None:
    """The history is the truth; snapshots only make it quick."""
    with crewlog.open(place) as reg:
        for number in range(4):
            reg.register(f"w-{number}")
            compact(reg, gc=False)
        before = reg.workers()
    (place / layout.SNAPSHOT).write_bytes(b"{}")
    (place / layout.SNAPSHOT_PREV).write_bytes(b"")
    with crewlog.open(place) as reg:
        assert reg.workers() == before
        for _ in range(3):  # the older one takes a compaction more to come back
            compact(reg, gc=False)
            reg.update("w-0", meta={"again": reg.last_seq})
    assert verify(place).ok
    (place / layout.SNAPSHOT).write_bytes(b"{}")
    (place / layout.SNAPSHOT_PREV).write_bytes(b"")
    for archived in (place / layout.ARCHIVE).iterdir():
        archived.unlink()
    with crewlog.open(place) as reg, pytest.raises(CrewlogError) as caught:
        reg.workers()
    assert isinstance(caught.value, SegmentMissing | SnapshotCorrupt)


def test_snapshot_of_another_history_is_refused(place: Path) -> None:
    """A snapshot must join the log that follows it."""
    with crewlog.open(place) as reg:
        reg.register("a")
        compact(reg, gc=False)
        reg.register("b")
    from crewlog.model.snapshot import decode_snapshot, encode_snapshot

    snapshot = place / layout.SNAPSHOT

    state = decode_snapshot(snapshot.read_bytes())
    import dataclasses

    other = dataclasses.replace(state, last_hash="0" * 64)
    snapshot.write_bytes(encode_snapshot(other))
    with crewlog.open(place) as reg, pytest.raises(HistoryDiverged):
        reg.workers()
    assert "history_diverged" in {f.code for f in verify(place).findings}


def test_store_without_identity_is_refused(place: Path) -> None:
    """store.json missing beside other files is no new store."""
    filled(place)
    (place / layout.STORE).unlink()
    with crewlog.open(place) as reg:
        with pytest.raises(NotAStore):
            reg.workers()
        with pytest.raises(NotAStore):
            reg.register("next")


@pytest.mark.limits(segment_bytes=2000)
def test_segment_missing_between_two_is_named(place: Path) -> None:
    """A gap in the log is never stepped over."""
    filled(place, 8)
    names = sorted((place / layout.LOG).iterdir())
    assert len(names) >= 3
    names[1].unlink()
    with opened(place) as reg, pytest.raises(SegmentMissing):
        reg.workers()
    assert "segment_missing" in {f.code for f in verify(place).findings}


@pytest.mark.limits(segment_bytes=2000)
def test_damaged_byte_in_a_sealed_segment_is_found(place: Path) -> None:
    """Verify reads all of it, not only the end."""
    filled(place, 8)
    first = min((place / layout.LOG).iterdir())
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 0x20
    first.write_bytes(bytes(data))
    report = verify(place)
    assert not report.ok
    assert {f.path for f in report.findings} == {str(first)}
    with opened(place) as reg, pytest.raises(LogCorrupt):
        list(reg.history())


def test_leftover_temporaries_never_block(place: Path) -> None:
    """What a killed process left under a temporary name is swept."""
    filled(place)
    for folder in (".", layout.LOG, layout.ARCHIVE):
        path = place / folder / f"{disk.TEMPORARY_PREFIX}{os.getpid()}"
        path.write_bytes(b"x")
        path.chmod(0o600)
    with crewlog.open(place) as reg:
        compact(reg, gc=False)
        compact(reg, gc=False)
    assert not list(place.rglob(f"{disk.TEMPORARY_PREFIX}*"))
    assert verify(place).ok


def test_substituted_line_is_never_folded_into_a_snapshot(place: Path) -> None:
    """Right by itself, of the right seq, but not the line that the next one was chained to."""
    from crewlog.model import codec

    with crewlog.open(place) as reg:
        reg.register("a")
        reg.update("a", meta={"number": 1})
        reg.update("a", meta={"number": 2})
        files(reg).rotate()
    first = min((place / layout.LOG).iterdir())
    lines = first.read_bytes().split(b"\n")
    line = codec.parse(lines[2])
    part = codec.draft("worker.updated", "a", b"{}", {"meta": {"number": 7}})
    lines[2] = codec.line(
        part, seq=line["seq"], ts=line["ts"], synced=line["synced"],
        prev=bytes.fromhex(line["prev"]), batch=None,
    )[:-1]  # fmt: skip
    first.write_bytes(b"\n".join(lines))
    with crewlog.open(place) as reg, pytest.raises(CrewlogError) as caught:
        compact(reg, gc=False)
    assert isinstance(caught.value, HistoryDiverged | LogCorrupt)
    assert not (place / layout.SNAPSHOT).exists()
    assert not verify(place).ok
