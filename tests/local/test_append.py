"""One append: what it refuses, what it leaves behind, what it makes durable."""

import os
from pathlib import Path

import pytest

from crewlog.errors import (
    AppendUncertain,
    UnsafePermissions,
)
from crewlog.local import disk, layout
from crewlog.local.disk import Disk
from crewlog.registry import Registry
from crewlog_compactor import verify
from faults import FailingDisk, active_segment, another_boot, registry_on
from procs import files
from stores import opened


def test_half_line_behind_a_seal_does_not_undo_the_seal(place: Path) -> None:
    """A rotation was interrupted behind its seal, and bytes came after it: the seal stands."""
    with opened(place) as reg:
        reg.register("a")
        log = files(reg)
        sealed = log._appender._run(lambda: log._appender._seal(*log._appender._ready()))
        segment = place / layout.LOG / layout.segment_name(1)
        with segment.open("ab") as file:
            file.write(b'{"v":1,"seq":')
    with opened(place) as other:
        other.register("b")
        assert files(other).head().segment == sealed.seq + 1, "it went on in the next segment"
    assert verify(place).findings == ()


def test_snapshot_never_covers_more_than_durable_names(place: Path) -> None:
    """A rotator died between its link and its fsync of log/: no snapshot beyond the old segment."""

    class DiedError(BaseException):
        """Stands for a process that is no more."""

    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")

    def die(call: str) -> int | None:
        if call == "unlink":
            raise DiedError
        return None

    disk.fault = die
    with pytest.raises(DiedError):
        files(reg).rotate()
    lost = max((place / layout.LOG).glob("*.jsonl"))
    with opened(place) as other:
        lock = files(other).take_compact_lock()
        from crewlog_compactor.local.compact import _fold

        _, found = _fold(files(other))
        lock.close()
    assert found.last_seq < int(lost.stem)
    lost.unlink()  # the power cut takes the name away
    for leftover in (place / layout.LOG).glob(".tmp-*"):
        leftover.unlink()
    with another_boot(), opened(place) as reg:
        assert [w.sid for w in reg.workers()] == ["a"]
        reg.register("b")
    assert verify(place).ok


@pytest.mark.parametrize("how", ["missing", "mode", "descriptors"])
def test_failure_between_the_phases_is_uncertain(
    place: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Once a line is written, whatever goes wrong ends with the outcome "unknown"."""
    with opened(place) as reg:
        reg.register("a")
    with opened(place) as reg:
        reg.update("a", meta={"n": 0})
        syncs = [place / layout.LOCKS / name for name in layout.LOCK_SYNC]
        for one in files(reg)._appender.sync._locks:
            one.close()
        if how == "missing":
            for path in syncs:
                path.unlink()
        elif how == "mode":
            for path in syncs:
                path.chmod(0o644)
        else:
            real = disk.open_file

            def none_left(name: str, **options: object) -> int:
                if name in layout.LOCK_SYNC:
                    raise OSError(24, os.strerror(24))
                return real(name, **options)  # type: ignore[arg-type]

            monkeypatch.setattr(disk, "open_file", none_left)
        with pytest.raises(AppendUncertain) as caught:
            reg.update("a", meta={"n": 1})
        assert caught.value.outcome == "unknown"


def test_writer_that_never_reads_keeps_no_backlog(reg: Registry) -> None:
    """Memory does not grow with the number of changes."""
    reg.register("a")
    for number in range(300):
        reg.update("a", meta={"number": number})
    assert len(files(reg)._view.recent) == 1


def test_hard_link_to_the_active_segment_is_named_as_that(place: Path, tmp_path: Path) -> None:
    """Not "removed": it has a second name."""
    with opened(place) as reg:
        reg.register("a")
        os.link(active_segment(place), tmp_path / "second")
        with opened(place) as fresh, pytest.raises(UnsafePermissions, match="second name"):
            fresh.register("b")
        os.link(active_segment(place), place / layout.LOG / "second")
        with pytest.raises(UnsafePermissions, match="second name"):
            reg.register("b")


class TracingDisk(Disk):
    """Remembers which directories were synced, by inode."""

    def __init__(self) -> None:
        """Remember none yet."""
        self.synced: set[int] = set()

    def sync_directory(self, fd: int) -> None:
        super().sync_directory(fd)
        self.synced.add(os.fstat(fd).st_ino)


def test_names_left_by_a_killed_creator_are_synced_by_the_next(place: Path) -> None:
    """The store's own name, and that of store.json, before anything is acknowledged in it."""
    place.mkdir(0o700)  # the creator died after its mkdir
    disk = TracingDisk()
    reg = registry_on(place, disk)
    assert place.parent.stat().st_ino in disk.synced
    reg.register("a")
    disk = TracingDisk()  # the creator died after its link of store.json
    reg = registry_on(place, disk)
    assert place.stat().st_ino not in disk.synced
    reg.register("b")
    assert place.stat().st_ino in disk.synced
