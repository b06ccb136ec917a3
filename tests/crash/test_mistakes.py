"""Mistakes that were found once, each with the interleaving or the fault that showed it."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import crewlog
from crewlog import current, layout
from crewlog import disk as disks
from crewlog import lock as locking
from crewlog.disk import Disk, Stamp
from crewlog.errors import (
    AppendUncertain,
    CrewlogError,
    LockBusy,
    LogCorrupt,
    NotAStore,
    RegistryClosed,
    StorageFailed,
    StorePoisoned,
    UnsafePermissions,
)
from crewlog.registry import Registry
from crewlog_compactor import compact, verify
from faults import EIO, FailingDisk, active_segment, another_boot, only, registry_on
from procs import files, forked, joined, slay, tree, until


def test_registry_closed_under_other_threads_writes_nowhere_else(place: Path) -> None:
    """A closed descriptor's number is reused at once: no change may reach another store."""
    for number in range(15):
        first = crewlog.open(place / f"{number}-a")
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
        with crewlog.open(place / f"{number}-b") as second:
            second.register("only")
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive()
            assert [w.sid for w in second.workers()] == ["only"]
        with crewlog.open(place / f"{number}-a") as again:
            assert set(acknowledged) <= {w.sid for w in again.workers()}


def test_interrupted_reading_never_loses_a_line_from_the_state(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception between two steps of the fold: everything is read anew, not decided upon."""
    with crewlog.open(place) as reg, crewlog.open(place) as other:
        reg.register("a")
        other.register("x")
        real = current.Current._apply

        def interrupted(self: current.Current, *arguments: object) -> None:
            monkeypatch.setattr(current.Current, "_apply", real)
            raise KeyboardInterrupt

        monkeypatch.setattr(current.Current, "_apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reg.workers()
        assert [w.sid for w in reg.workers()] == ["a", "x"]
        with pytest.raises(crewlog.WorkerExists):
            reg.register("x")
        assert verify(place).ok


@pytest.mark.parametrize("name", [layout.LOCK_APPEND, *layout.LOCK_SYNC])
def test_replaced_lock_file_is_noticed(place: Path, name: str) -> None:
    """A store restored under a running process: the lock that counts is the one in place."""
    with crewlog.open(place) as reg:
        reg.register("a")
        reg.update("a", meta={"n": 1})  # both sync locks are open now
        path = place / layout.LOCKS / name
        path.unlink()
        path.touch(0o600)
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with crewlog.open(place, lock_timeout_s=0.1) as fresh:
                if name == layout.LOCK_APPEND:
                    with pytest.raises(LockBusy):
                        fresh.register("b")
                    files(reg).wait_s = 0.1
                    files(reg)._new_turn()
                    with pytest.raises(LockBusy):
                        reg.register("b")
        reg.register("b")
        assert verify(place).ok


def test_half_line_behind_a_seal_does_not_undo_the_seal(place: Path) -> None:
    """A rotation was interrupted behind its seal, and bytes came after it: the seal stands."""
    with crewlog.open(place) as reg:
        reg.register("a")
        log = files(reg)
        sealed = log._writing.run(lambda: log._seal(*log._ready()))
        segment = place / layout.LOG / layout.segment_name(1)
        with segment.open("ab") as file:
            file.write(b'{"v":1,"seq":')
    with crewlog.open(place) as other:
        other.register("b")
        assert files(other).head().segment == sealed.seq + 1, "it went on in the next segment"
    assert verify(place).findings == ()


def test_reader_follows_a_head_that_was_removed_and_made_again(place: Path) -> None:
    """It is a cache: whoever has the old file open must not go on believing it."""
    reader, writer = crewlog.open(place), crewlog.open(place)
    writer.register("a")
    assert [w.sid for w in reader.workers()] == ["a"]
    (place / layout.HEAD / layout.HEAD_DURABLE).unlink()
    writer.register("b")
    assert [w.sid for w in reader.workers()] == ["a", "b"]
    reader.close()
    writer.close()


def test_poison_is_not_undone_by_a_leader(place: Path) -> None:
    """A cut that fails poisons with no leader at work, and the flag stays."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    lock = files(reg)._sync._locks[1]
    disk.short = True
    disk.fault = only("cut", EIO)
    refused: list[CrewlogError] = []

    def append() -> None:
        try:
            reg.register("b")
        except CrewlogError as error:
            refused.append(error)

    thread = threading.Thread(target=append)
    other = locking.Lock(layout.LOCK_SYNC[1], at=files(reg).directory[layout.LOCKS], where="x")
    assert other.try_acquire()
    thread.start()
    thread.join(0.2)
    assert thread.is_alive(), "it waits for the leader before it poisons"
    other.release()
    thread.join(30)
    assert isinstance(refused[0], StorePoisoned)
    assert refused[0].outcome == "unknown"
    assert lock is not None


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
        with crewlog.open(place) as other, pytest.raises(StorePoisoned):
            other.register("c")


def test_failed_sync_of_a_recovery_poisons(place: Path) -> None:
    """It is a sync like any other: the second one would lie."""
    with crewlog.open(place) as reg:
        reg.register("a")
    (place / layout.APPEND_STATE).unlink()
    disk = FailingDisk()
    reg = registry_on(place, disk)
    disk.fault = only("sync", EIO)
    with pytest.raises(StorageFailed):
        reg.register("b")
    disk.fault = lambda _: None
    with crewlog.open(place) as other, pytest.raises(StorePoisoned):
        other.register("c")


def test_failed_directory_sync_of_a_rotation_poisons(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing may be acknowledged in a segment whose name may not be durable."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    monkeypatch.setattr(layout, "SEGMENT_BYTES_MAX", 500)
    disk.fault = only("sync_directory", EIO)
    with pytest.raises(CrewlogError):
        reg.register("b")
    disk.fault = lambda _: None
    with crewlog.open(place) as other, pytest.raises(StorePoisoned):
        other.register("c")


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
    with crewlog.open(place) as other:
        lock = files(other).take_compact_lock()
        from crewlog_compactor.compact import _fold

        _, found = _fold(files(other))
        lock.close()
    assert found.last_seq < int(lost.stem)
    lost.unlink()  # the power cut takes the name away
    for leftover in (place / layout.LOG).glob(".tmp-*"):
        leftover.unlink()
    with another_boot(), crewlog.open(place) as reg:
        assert [w.sid for w in reg.workers()] == ["a"]
        reg.register("b")
    assert verify(place).ok


def test_reader_beside_a_recovery_never_shows_what_is_not_durable(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer recovers and writes between a reader's two looks: its pending line stays unseen."""
    with crewlog.open(place) as reg:
        reg.register("a")
    from crewlog import tail

    real = tail.judge
    with another_boot(), crewlog.open(place) as reader:
        disk = FailingDisk()
        writer = registry_on(place, disk)

        def judge_late(*arguments: object, **options: object) -> object:
            monkeypatch.setattr(tail, "judge", real)
            writer.register("b")
            disk.fault = only("sync", EIO)
            with pytest.raises(StorageFailed):
                writer.register("pending")
            return real(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(tail, "judge", judge_late)
        assert reader.last_seq == 3
        assert [w.sid for w in reader.workers()] == ["a", "b"]


@pytest.mark.parametrize("how", ["missing", "mode", "descriptors"])
def test_failure_between_the_phases_is_uncertain(
    place: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Once a line is written, whatever goes wrong ends with the outcome "unknown"."""
    with crewlog.open(place) as reg:
        reg.register("a")
    with crewlog.open(place) as reg:
        reg.update("a", meta={"n": 0})
        syncs = [place / layout.LOCKS / name for name in layout.LOCK_SYNC]
        for lock in files(reg)._sync._locks:
            lock.close()
        if how == "missing":
            for path in syncs:
                path.unlink()
        elif how == "mode":
            for path in syncs:
                path.chmod(0o644)
        else:
            from crewlog import disk as disks

            real = disks.open_file

            def none_left(name: str, **options: object) -> int:
                if name in layout.LOCK_SYNC:
                    raise OSError(24, os.strerror(24))
                return real(name, **options)  # type: ignore[arg-type]

            monkeypatch.setattr(disks, "open_file", none_left)
        with pytest.raises(AppendUncertain) as caught:
            reg.update("a", meta={"n": 1})
        assert caught.value.outcome == "unknown"


def test_failed_read_is_storage_failed_never_damage(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO from the log is the system's failure, with a type."""
    reg.register("a")

    def fail(*_: object) -> bytes:
        raise OSError(EIO, os.strerror(EIO))

    with crewlog.open(reg.path) as fresh:
        monkeypatch.setattr(disks, "read_at", fail)
        for read in (fresh.workers, lambda: fresh.get("a"), lambda: list(fresh.history())):
            with pytest.raises(StorageFailed):
                read()


def test_empty_active_segment_is_damage(place: Path) -> None:
    """A segment's header is durable before its name: an empty one has lost it."""
    with crewlog.open(place) as reg:
        reg.register("a")
        compact(reg, gc=False)
    active_segment(place).write_bytes(b"")
    for remove in (False, True):
        if remove:
            (place / layout.HEAD / layout.HEAD_DURABLE).unlink()
        with crewlog.open(place) as reg:
            with pytest.raises(crewlog.DataDamaged):
                reg.workers()
            with pytest.raises(crewlog.DataDamaged):
                reg.register("b")


def test_read_only_store_can_be_read(place: Path) -> None:
    """Reading opens nothing for writing: a snapshot mounted read-only is enough."""
    with crewlog.open(place) as reg:
        reg.register("a")
    opened: list[int] = []
    real = os.open

    def watched(path: str, flags: int, *rest: object, **options: object) -> int:
        opened.append(flags)
        return real(path, flags, *rest, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, crewlog.open(place) as reg:
        patch.setattr(os, "open", watched)
        assert len(reg.workers()) == len(list(reg.history())) == 1
    assert opened
    assert not any(flags & (os.O_RDWR | os.O_WRONLY) for flags in opened)


def test_child_forked_during_a_compaction_does_not_keep_its_lock(
    place: Path,
) -> None:
    """Neither after the compaction has ended, nor after its process has."""
    with crewlog.open(place) as reg:
        reg.register("a")
        lock = files(reg).take_compact_lock()
        child = forked(signal.pause)
        lock.close()
        try:
            compact(reg, gc=False)
        finally:
            slay(child)


def test_child_forked_while_a_thread_opens_the_store_goes_on(place: Path) -> None:
    """No mutex of the parent holds the child up."""
    with crewlog.open(place) as reg:
        with reg.session._opening:
            child = forked(lambda: _register_in_child(reg))
            until(
                lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            )
        joined(child)


def _register_in_child(reg: Registry) -> None:
    signal.alarm(20)
    reg.register("a")


def test_deadline_is_one_for_all_threads(place: Path) -> None:
    """8 threads before a held lock: each hears after its own timeout, not after the others'."""
    import time

    with crewlog.open(place) as reg, crewlog.open(place, lock_timeout_s=1) as slow:
        reg.register("a")
        slow.workers()
        took: list[float] = []

        def wait() -> None:
            began = time.monotonic()
            with contextlib.suppress(LockBusy):
                slow.register("b")
            took.append(time.monotonic() - began)

        with files(reg).append_lock.held(wait_s=1):
            threads = [threading.Thread(target=wait) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert len(took) == 8
    assert max(took) < 5, "one after the other, they would take 8"


def test_writer_that_never_reads_keeps_no_backlog(reg: Registry) -> None:
    """Memory does not grow with the number of changes."""
    reg.register("a")
    for number in range(300):
        reg.update("a", meta={"number": number})
    assert len(files(reg)._current.recent) == 1


def test_interrupted_entry_gives_every_lock_back(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while waiting for the lock: the next change, of any thread, goes through."""
    reg.register("a")
    real = locking.Lock.acquire

    def interrupted(self: locking.Lock, **options: object) -> None:
        monkeypatch.setattr(locking.Lock, "acquire", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(locking.Lock, "acquire", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reg.register("b")
    thread = threading.Thread(target=lambda: reg.register("c"), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert [w.sid for w in reg.workers()] == ["a", "c"]


def test_failed_creations_leak_no_descriptor(place: Path) -> None:
    """Each one closes what it had opened."""
    disk = FailingDisk()
    disk.fault = only("link", EIO)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        with pytest.raises(CrewlogError):
            registry_on(place / str(number), disk)
    assert len(os.listdir("/proc/self/fd")) == before


def test_reader_before_a_recovery_sweeps_nothing(place: Path) -> None:
    """A temporary file may be a live rotator's; only a writer under the lock removes it."""
    with crewlog.open(place) as reg:
        reg.register("a")
    leftover = place / layout.LOG / ".tmp-1"
    leftover.write_bytes(b"x")
    leftover.chmod(0o600)
    before = tree(place)
    with another_boot(), crewlog.open(place) as reg:
        assert len(reg.workers()) == 1
    assert tree(place) == before


def test_hard_link_to_the_active_segment_is_named_as_that(place: Path, tmp_path: Path) -> None:
    """Not "removed": it has a second name."""
    with crewlog.open(place) as reg:
        reg.register("a")
        os.link(active_segment(place), tmp_path / "second")
        with crewlog.open(place) as fresh, pytest.raises(UnsafePermissions, match="second name"):
            fresh.register("b")
        os.link(active_segment(place), place / layout.LOG / "second")
        with pytest.raises(UnsafePermissions, match="second name"):
            reg.register("b")


def test_impossible_line_with_a_right_crc_is_damage(place: Path) -> None:
    """A line that no correct writer can have written is LogCorrupt, not a traceback."""
    from crewlog import codec

    with crewlog.open(place) as reg:
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
    with crewlog.open(place) as reg, pytest.raises(LogCorrupt, match="nobody"):
        reg.workers()


@pytest.fixture(autouse=True)
def _no_alarm_left() -> Iterator[None]:
    yield
    signal.alarm(0)


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
