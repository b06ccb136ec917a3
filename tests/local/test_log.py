"""What a reader of a directory sees beside writers, recoveries and damage."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import (
    AppendUncertain,
    LogCorrupt,
    NotAStore,
    RegistryClosed,
    StorageFailed,
)
from crewlog.local import disk, layout, view
from crewlog.registry import Registry
from crewlog_compactor import compact, verify
from faults import EIO, FailingDisk, active_segment, another_boot, only, registry_on
from procs import tree, until
from stores import opened


def test_registry_closed_under_other_threads_writes_nowhere_else(place: Path) -> None:
    """A closed descriptor's number is reused at once: no change may reach another store."""
    for number in range(15):
        first = opened(place / f"{number}-a")
        first.register("w")
        acknowledged: list[str] = []

        def write(name: str, reg: Registry = first, done: list[str] = acknowledged) -> None:
            for change in range(20):
                try:
                    reg.register(f"{name}-{change}")
                except (RegistryClosed, AppendUncertain):
                    return
                done.append(f"{name}-{change}")

        threads = [threading.Thread(target=write, args=(f"t{n}",)) for n in range(6)]
        for thread in threads:
            thread.start()
        until(lambda done=acknowledged: len(done) > 3)  # type: ignore[misc]
        first.close()
        with opened(place / f"{number}-b") as second:
            second.register("only")
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive()
            assert [w.sid for w in second.workers()] == ["only"]
        with opened(place / f"{number}-a") as again:
            assert set(acknowledged) <= {w.sid for w in again.workers()}


def test_interrupted_reading_never_loses_a_line_from_the_state(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception between two steps of the fold: everything is read anew, not decided upon."""
    with opened(place) as reg, opened(place) as other:
        reg.register("a")
        other.register("x")
        real = view.View._apply

        def interrupted(self: view.View, *arguments: object) -> None:
            monkeypatch.setattr(view.View, "_apply", real)
            raise KeyboardInterrupt

        monkeypatch.setattr(view.View, "_apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reg.workers()
        assert [w.sid for w in reg.workers()] == ["a", "x"]
        with pytest.raises(crewlog.WorkerExists):
            reg.register("x")
        assert verify(place).ok


def test_reader_follows_a_head_that_was_removed_and_made_again(place: Path) -> None:
    """It is a cache: whoever has the old file open must not go on believing it."""
    reader, writer = opened(place), opened(place)
    writer.register("a")
    assert [w.sid for w in reader.workers()] == ["a"]
    (place / layout.HEAD / layout.HEAD_DURABLE).unlink()
    writer.register("b")
    assert [w.sid for w in reader.workers()] == ["a", "b"]
    reader.close()
    writer.close()


def test_reader_beside_a_recovery_never_shows_what_is_not_durable(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer recovers and writes between a reader's two looks: its pending line stays unseen."""
    with opened(place) as reg:
        reg.register("a")
    from crewlog.local import recovery

    real = recovery.judge
    with another_boot(), opened(place) as reader:
        disk = FailingDisk()
        writer = registry_on(place, disk)

        def judge_late(*arguments: object, **options: object) -> object:
            monkeypatch.setattr(recovery, "judge", real)
            writer.register("b")
            disk.fault = only("sync", EIO)
            with pytest.raises(StorageFailed):
                writer.register("pending")
            return real(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(recovery, "judge", judge_late)
        assert reader.last_seq == 3
        assert [w.sid for w in reader.workers()] == ["a", "b"]


def test_failed_read_is_storage_failed_never_damage(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO from the log is the system's failure, with a type."""
    reg.register("a")

    def fail(*_: object) -> bytes:
        raise OSError(EIO, os.strerror(EIO))

    with opened(reg.path) as fresh:
        monkeypatch.setattr(disk, "read_at", fail)
        for read in (fresh.workers, lambda: fresh.get("a"), lambda: list(fresh.history())):
            with pytest.raises(StorageFailed):
                read()


def test_empty_active_segment_is_damage(place: Path) -> None:
    """A segment's header is durable before its name: an empty one has lost it."""
    with opened(place) as reg:
        reg.register("a")
        compact(reg, gc=False)
    active_segment(place).write_bytes(b"")
    for remove in (False, True):
        if remove:
            (place / layout.HEAD / layout.HEAD_DURABLE).unlink()
        with opened(place) as reg:
            with pytest.raises(crewlog.errors.DataDamaged):
                reg.workers()
            with pytest.raises(crewlog.errors.DataDamaged):
                reg.register("b")


def test_read_only_store_can_be_read(place: Path) -> None:
    """Reading opens nothing for writing: a snapshot mounted read-only is enough."""
    with opened(place) as reg:
        reg.register("a")
    given: list[int] = []
    real = os.open

    def watched(path: str, flags: int, *rest: object, **options: object) -> int:
        given.append(flags)
        return real(path, flags, *rest, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, opened(place) as reg:
        patch.setattr(os, "open", watched)
        assert len(reg.workers()) == len(list(reg.history())) == 1
    assert given
    assert not any(flags & (os.O_RDWR | os.O_WRONLY) for flags in given)


def test_reader_before_a_recovery_sweeps_nothing(place: Path) -> None:
    """A temporary file may be a live rotator's; only a writer under the lock removes it."""
    with opened(place) as reg:
        reg.register("a")
    leftover = place / layout.LOG / ".tmp-1"
    leftover.write_bytes(b"x")
    leftover.chmod(0o600)
    before = tree(place)
    with another_boot(), opened(place) as reg:
        assert len(reg.workers()) == 1
    assert tree(place) == before


def test_impossible_line_with_a_right_crc_is_damage(place: Path) -> None:
    """A line that no correct writer can have written is LogCorrupt, not a traceback."""
    from crewlog.model import codec

    with opened(place) as reg:
        reg.register("a")
    segment = active_segment(place)
    data = segment.read_bytes()
    last = data.splitlines()[-1]
    part = codec.draft("worker.ready", "nobody", b"{}", {})
    line = codec.line(
        part, seq=3, ts="2026-11-24T00:00:00.000000Z", synced=0, prev=codec.digest(last), batch=None
    )
    segment.write_bytes(data + line)
    (place / layout.APPEND_STATE).unlink()
    (place / layout.HEAD / layout.HEAD_DURABLE).unlink()
    with opened(place) as reg, pytest.raises(LogCorrupt, match="nobody"):
        reg.workers()


def test_backup_without_what_is_empty_is_made_whole_by_what_the_errors_say(
    reg: Registry, tmp_path: Path
) -> None:
    """Many tools leave empty directories out; each error names the command that makes them."""
    reg.register("a")
    backup = tmp_path / "it's a backup"
    shutil.copytree(reg.path, backup)
    for name in (layout.LOCKS, layout.LEASES, layout.CURSORS, layout.QUARANTINE, layout.ARCHIVE):
        shutil.rmtree(backup / name)
    with crewlog.open(backup) as copy:
        for change in (copy.workers, lambda: copy.update("a", state="ready")):
            with pytest.raises(NotAStore, match="not a whole registry") as caught:
                change()
            command = caught.value.remedy.partition(": ")[2]
            subprocess.run(["sh", "-c", command], check=True)
        copy.update("a", state="ready")
        compact(copy)
        (backup / layout.LOCKS / layout.LOCK_COMPACT).unlink()
        with pytest.raises(NotAStore, match="not a whole registry"):
            compact(copy)
        assert verify(backup).ok
    shutil.rmtree(backup / layout.HEAD)
    with crewlog.open(backup) as copy, pytest.raises(NotAStore, match="Restore it from a backup"):
        copy.workers()


@pytest.mark.limits(segment_bytes=1500)
@pytest.mark.parametrize("how", ["history", "watch", "state", "compact"])
def test_empty_sealed_segment_is_damage_not_a_loop(place: Path, how: str) -> None:
    """Nothing spins over a segment that has lost everything."""
    with opened(place) as reg:
        for number in range(6):
            reg.register(f"w-{number}")
    sorted((place / layout.LOG).iterdir())[1].write_bytes(b"")
    with opened(place) as reg, pytest.raises(LogCorrupt, match="empty"):
        if how == "history":
            list(reg.history())
        elif how == "state":
            reg.workers()
        elif how == "compact":
            compact(reg, gc=False)
        else:
            with reg.watch(after="oldest", backend="poll") as items:
                items.drain()
