"""One append: what it refuses, what it leaves behind, what it makes durable."""

import errno
import fcntl
import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from crewlog.errors import (
    AppendUncertain,
    HistoryRewound,
    InvalidTransition,
    LogCorrupt,
    StorageFailed,
    UnsafePermissions,
    WorkerExists,
)
from crewlog.local import disk, heads, layout, redo
from crewlog.local.disk import STAMP_SETTLED_NS, Disk
from crewlog.local.heads import StateFile
from crewlog.local.layout import Directory
from crewlog.model.steps import Tip, Wish, update_step
from crewlog.queue import Request
from crewlog.registry import Registry
from crewlog.workers.register import captured
from crewlog_compactor import repair, verify
from faults import FailingDisk, active_segment, another_boot, registry_on
from procs import files, until
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


def _settle(reg: Registry) -> None:
    """Let a writer know its places well, so that it goes straight on from here."""

    def settled() -> bool:
        reg.update("a", meta={"settled": True})
        reg.update("a", meta={"settled": False})
        return not files(reg)._appender._stamp.moved()

    until(settled)


def test_own_seal_stands_though_the_rotation_was_not_finished(place: Path) -> None:
    """The very process that sealed begins the next segment before it writes anything."""
    with opened(place) as reg:
        reg.register("a")
        _settle(reg)
        one = files(reg)._appender
        sealed = one._run(lambda: one._seal(*one._ready()))
        reg.update("a", meta={"n": 1})
        assert files(reg).head().segment == sealed.seq + 1
    assert verify(place).findings == ()


def test_segment_that_was_replaced_is_looked_at_until_that_has_succeeded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that fails, here at the redo, is made again at the next change."""
    with opened(place) as reg:
        reg.register("a")
        segment = active_segment(place)
        copy = place / "copy"
        copy.write_bytes(segment.read_bytes())
        copy.chmod(0o600)
        copy.rename(segment)
        until(lambda: time.time_ns() - segment.parent.stat().st_ctime_ns > STAMP_SETTLED_NS * 2)
        with monkeypatch.context() as patch:
            patch.setattr(redo, "read", _no_descriptor)
            with pytest.raises(StorageFailed):
                reg.update("a", meta={"n": 1})
        looks: list[Directory] = []
        real = redo.read

        def look(directory: Directory) -> bytes:
            looks.append(directory)
            return real(directory)

        monkeypatch.setattr(redo, "read", look)
        reg.update("a", meta={"n": 1})
        assert looks
    assert verify(place).findings == ()


def _no_descriptor(_: object) -> bytes:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_half_a_line_of_a_killed_writer_is_cut_by_a_writer_that_went_on(place: Path) -> None:
    """However well it knows the log: it writes nothing behind what nobody acknowledged."""
    with opened(place) as reg:
        reg.register("a")
        _settle(reg)
        with active_segment(place).open("ab") as file:
            file.write(b'{"v":1,"seq":')
        reg.update("a", meta={"n": 1})
        assert b'"seq":{' not in active_segment(place).read_bytes()
    assert verify(place).findings == ()


def _bytes_of(place: Path) -> dict[Path, bytes]:
    """Copy what a change writes."""
    head = place / layout.HEAD / layout.HEAD_DURABLE
    paths = (active_segment(place), place / layout.APPEND_STATE, place / layout.REDO, head)
    return {path: path.read_bytes() for path in paths}


def _put_back(before: dict[Path, bytes]) -> None:
    for path, data in before.items():
        path.write_bytes(data)


def test_store_that_is_put_back_in_place_is_refused(place: Path) -> None:
    """File by file, each still the same one, so that no directory tells of it."""
    with opened(place) as reg:
        reg.register("a")
        _settle(reg)
        before = _bytes_of(place)
        reg.update("a", meta={"n": 1})
        _put_back(before)
        with pytest.raises(HistoryRewound):
            reg.update("a", meta={"n": 2})


def test_other_history_put_in_place_is_what_counts(place: Path) -> None:
    """However far it has gone: what this writer knew of a worker, nobody else ever heard of."""
    with opened(place) as reg:
        reg.register("a")
        _settle(reg)
        before = _bytes_of(place)
        reg.update("a", meta={"lost": 1})
        _put_back(before)
        with opened(place) as other:
            for number in range(3):
                other.update("a", meta={"kept": number})
        assert reg.update("a", meta={"n": 1}).meta == {"settled": False, "kept": 2, "n": 1}
    assert verify(place).findings == ()


@pytest.mark.parametrize("change", [{"boot": b"x" * 16}, {"place": 7}])
def test_head_of_elsewhere_is_mended_by_a_writer_that_went_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    """One of another boot, or of another file, put back in place: recovery comes first."""
    with opened(place) as reg:
        reg.register("a")
        _settle(reg)
        path = place / layout.HEAD / layout.HEAD_DURABLE
        head = heads.decode_durable_head(path.read_bytes())
        assert head is not None
        strange = head._replace(**change)  # type: ignore[arg-type] # as the test gives it
        with path.open("r+b") as file:
            file.write(heads.encode_durable_head(strange))
        looks: list[object] = []
        writer = files(reg)._appender
        real = writer._recover

        def recover(head: heads.DurableHead | None) -> tuple[heads.AppendState, heads.DurableHead]:
            looks.append(head)
            return real(head)

        monkeypatch.setattr(writer, "_recover", recover)
        assert reg.update("a", meta={"n": 1}).meta["n"] == 1
        assert looks
    assert verify(place).findings == ()


def test_head_is_published_as_one_of_the_file_that_it_is_written_to(reg: Registry) -> None:
    """Encoded beforehand or not: the file may have been replaced since it was read."""
    reg.register("a")
    states = files(reg)._heads
    head = states.head()
    assert head is not None
    strange = head._replace(place=7)
    for data in (b"", heads.encode_durable_head(strange)):
        states.put_head(strange, data)
        states.published._kept = None
        assert states.head() == head


def test_request_is_decided_upon_what_those_before_it_write(reg: Registry) -> None:
    """In one group, of which nothing is on the disk yet: the record, and the seq."""
    reg.register("a")
    log, author = files(reg), reg._session.author()
    seen: list[object] = []

    def look(tip: Tip) -> tuple[()]:
        record = tip.get("a")
        assert record is not None
        seen.extend([tip.seq, record["rev"], record["meta"]])
        return ()

    first = Request(update_step(author, "a", {"meta": {"n": 1}}).decide, ("a",))
    taken, seq, _ = log._appender.write([first, Request(look, ("a",))])
    log._appender.make_durable(seq)
    assert (taken, seen) == (2, [seq, seq, {"n": 1}])


def test_draft_that_asked_for_nothing_is_folded_all_the_same(reg: Registry) -> None:
    """Upon the record as it stands, though this writer has forgotten it."""
    reg.register("a", meta={"k": 1})
    log = files(reg)
    part = reg._session.author().draft("worker.updated", "a", {"meta": {"n": 2}})
    log._view.forget_written()
    request = Request(lambda _: (part,), ())
    log._appender.make_durable(log._appender.write([request])[1])
    assert request.result is not None
    record = request.result.records["a"]
    assert record is not None
    assert record["meta"] == {"k": 1, "n": 2}


def _lose_the_last_line(place: Path) -> None:
    """Cut it off the segment, as a device does that was not synced; the redo still holds it."""
    segment = active_segment(place)
    data = segment.read_bytes()
    os.truncate(segment, data.rstrip(b"\n").rfind(b"\n") + 1)


@pytest.mark.parametrize("case", ["name moves", "straight on", "half a line", "far behind"])
@pytest.mark.limits(catch_up_lines=3)
def test_what_was_completed_for_a_reader_is_not_what_a_writer_decides_upon(
    place: Path, case: str
) -> None:
    """It has read before another process recovered and went on: what that wrote it knows."""
    with opened(place) as reg, opened(place) as other:
        reg.register("a")
        reg.register("b")
        _settle(reg)
        other.update("a", meta={"n": 1})
        other.close()
        _lose_the_last_line(place)
        assert reg.get("a") is not None  # completed from the redo, in memory
        assert files(reg).segments.completed
        with opened(place) as third:
            third.exited("b", code=0)
            if case == "far behind":
                for number in range(6):
                    third.update("a", meta={"n": number})
                files(reg)._appender._prepared_at = 0.0
            if case == "name moves":
                (place / "note").touch()
                (place / "note").unlink()
            if case == "half a line":
                with active_segment(place).open("ab") as file:
                    file.write(b'{"v":1,"seq":')
        with pytest.raises(InvalidTransition):
            reg.update("b", meta={"n": 2})
        reg.register("c")
        assert reg.get("c") is not None
    assert verify(place).findings == ()


def test_look_that_fails_in_a_group_takes_nothing_back_that_it_decided(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second registration of the same worker in that group is refused all the same."""
    reg.register("z")
    log, author = files(reg), reg._session.author()
    first, second = (Request(captured(author, "a", None, Wish()).decide, ("a",)) for _ in range(2))

    def fails(_: Tip) -> tuple[()]:
        log._view.forget()  # as a look does that finds no descriptor
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    broken = Request(fails, ("b",))
    group = [first, broken, second]
    with monkeypatch.context() as patch:
        patch.setattr(log._appender, "_prepare", lambda **_: None)
        while group:
            taken, seq, _ = log._appender.write(group)
            log._appender.make_durable(seq)
            group = group[taken:]
    assert first.result is not None
    assert isinstance(broken.error, OSError)
    assert isinstance(second.error, WorkerExists)


def test_stranger_among_the_segments_is_refused_until_it_is_gone(place: Path) -> None:
    """Not once only: a reader would take it for the log."""
    with opened(place) as reg:
        reg.register("a")
        _settle(reg)
        stranger = place / layout.LOG / layout.segment_name(500)
        stranger.write_bytes(b'{"hello":1}\n')
        stranger.chmod(0o600)
        until(lambda: time.time_ns() - stranger.parent.stat().st_ctime_ns > STAMP_SETTLED_NS * 2)
        for number in range(3):
            with pytest.raises(LogCorrupt):
                reg.update("a", meta={"n": number})
        stranger.unlink()
        assert reg.update("a", meta={"n": 4}).meta["n"] == 4
    assert verify(place).findings == ()


def test_leader_knows_how_many_lines_it_made_durable(reg: Registry) -> None:
    """So many may wait for it, and are woken."""
    reg.register("a")
    with reg.batch() as batch:
        for number in range(5):
            batch.update("a", meta={"n": number})
    assert files(reg)._appender.sync._served == 5


def test_lines_of_others_are_taken_over_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that looked at them before it took the lock does not fold them again under it."""
    with opened(place) as reg, opened(place) as other:
        reg.register("a")
        _settle(reg)
        writer = files(reg)._appender
        real = writer._prepare

        def prepare(*, knows: bool) -> None:
            other.update("a", state="ready")  # which may not happen twice
            writer._view.catch_up(writer._heads.append_state())  # type: ignore[arg-type]
            other.update("a", meta={"n": 1})
            real(knows=knows)

        monkeypatch.setattr(writer, "_prepare", prepare)
        writer._prepared_at = 0.0  # long ago
        assert reg.update("a", labels={"k": "v"}).meta["n"] == 1
        monkeypatch.undo()
        assert reg.update("a", labels={"k": "w"}).state == "ready"


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

        _, state = _fold(files(other))
        lock.close()
    assert state.last_seq < int(lost.stem)
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


def test_what_is_cut_off_is_kept_before_the_cut(place: Path) -> None:
    """Half a line that a killed writer left behind the written end: quarantined, then cut."""
    with opened(place) as reg:
        reg.register("a")
    with active_segment(place).open("ab") as file:
        file.write(b'{"v":1,"half a line')
    with opened(place) as reg:
        reg.update("a", meta={"n": 1})
    kept = [path.read_bytes() for path in (place / layout.QUARANTINE).glob("*.bytes")]
    assert kept == [b'{"v":1,"half a line']
    assert verify(place).ok


def test_repair_keeps_what_it_takes_out_durably_before_it_goes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name in quarantine is synced before the segment is replaced."""
    with opened(place) as reg:
        reg.register("a")
        seq = reg.update("a", meta={"n": 1}).rev
        log = files(reg)
        aside = os.fstat(log.directory[layout.QUARANTINE]).st_ino
    path = active_segment(place)
    path.write_bytes(path.read_bytes().replace(b'"n":1', b'"n":2'))
    (place / layout.REDO).write_bytes(bytes((place / layout.REDO).stat().st_size))
    order: list[str] = []
    real, renamed = Disk.sync_directory, Disk.rename

    def sync_directory(self: Disk, fd: int) -> None:
        order.append("kept" if os.fstat(fd).st_ino == aside else "other")
        real(self, fd)

    def rename(self: Disk, name: str, new: str, *, at: int) -> None:
        order.append(f"replaced {new}")
        renamed(self, name, new, at=at)

    monkeypatch.setattr(Disk, "sync_directory", sync_directory)
    monkeypatch.setattr(Disk, "rename", rename)
    assert repair(place, yes=True, accept_loss=[(seq, seq)]).done
    assert "kept" in order
    assert order.index("kept") < order.index(f"replaced {path.name}")


def test_whoever_gives_the_lock_back_wakes_who_waits(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the lock to append, and for the sync that serves others."""
    reg.register("a")
    woken: list[str] = []
    states = files(reg)._appender._heads

    def wake(self: object, _count: int) -> None:
        woken.append("lock" if self is states.written else "sync")

    monkeypatch.setattr(StateFile, "wake", wake)
    reg.update("a", meta={"n": 1})
    assert woken == []  # nobody was met who waits
    states.written.crowd = states.published.crowd = 1
    reg.update("a", meta={"n": 2})
    assert woken == ["lock", "sync"]


@pytest.mark.parametrize(("others", "yields"), [(3, 8), (40, 6)], ids=["few", "many"])
def test_whoever_gives_the_lock_back_yields_to_whom_it_woke(
    place: Path, monkeypatch: pytest.MonkeyPatch, others: int, yields: int
) -> None:
    """Always among few; where many take turns, not each time: a yield costs a turn."""
    with opened(place) as reg, opened(place) as other:
        reg.register("a")
        other.register("b")
        _settle(reg)
        yielded: list[bool] = []
        monkeypatch.setattr(os, "sched_yield", lambda: yielded.append(True))
        reg.update("a", meta={"n": -1})
        assert yielded == [], "nobody was met who waits"
        files(reg)._appender._heads.written.crowd = 9
        for turn in range(8):
            with other.batch() as batch:
                for number in range(others):
                    batch.update("b", meta={"n": turn * others + number})
            reg.update("a", meta={"n": turn})
        assert len(yielded) == yields
        yielded.clear()
        files(reg)._appender._heads.written.crowd = 9
        for turn in range(8):
            reg.update("a", meta={"n": -turn})
        assert len(yielded) == 8, "nobody wrote between"


@pytest.mark.parametrize(
    ("sync_s", "pause_s"), [(0.02, 0.000_3), (0.001, 0.000_15), (0.000_2, None)]
)
def test_leader_pauses_for_others_where_that_is_worth_it(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, *, sync_s: float, pause_s: float | None
) -> None:
    """After a long sync that served others: on a quick disk a pause takes longer than a sync."""
    reg.register("a")
    leader = files(reg)._appender.sync
    leader._sync_s, leader._shared = sync_s, False
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    reg.update("a", meta={"n": 1})
    assert pauses == [], "it served nobody else"
    leader._sync_s, leader._shared = sync_s, True
    reg.update("a", meta={"n": 2})
    assert pauses == ([] if pause_s is None else [pytest.approx(pause_s)])


def test_state_file_that_is_replaced_is_waited_on_anew(reg: Registry) -> None:
    """The map is one of the file that is open: nobody waits on what no longer changes."""
    reg.register("a")
    log = files(reg)
    published = log._heads.published
    published.wait(published.look() + 1, 0.001)
    word = published._word
    assert word is not None
    assert word._address
    path = log.directory.path / layout.HEAD / layout.HEAD_DURABLE
    path.with_name("copy").write_bytes(path.read_bytes())
    path.with_name("copy").chmod(0o600)
    path.with_name("copy").rename(path)
    published.renew()
    assert not word._address
    published.wait(published.look() + 1, 0.001)
    assert word._address


def test_state_file_that_is_not_open_wakes_nobody(place: Path) -> None:
    """It was removed, or let go of in an interrupt, among others who wait: the change stands."""
    with opened(place) as reg:
        reg.register("a", meta={"n": 1})
        written = files(reg)._appender._heads.written
        written.wait(written.look() + 1, 0.001)
        assert written.crowd
        (place / layout.APPEND_STATE).unlink()
        assert reg.update("a", meta={"n": 1}).rev == 2, "nothing to write, and nothing fails"
        written._drop()
        written.wait(0, 0.001)
        written.wake(1)
        assert reg.update("a", meta={"n": 2}).meta["n"] == 2


@pytest.mark.limits(sync_wait_s=0.4)
def test_sync_leader_that_does_not_finish_is_named_in_time(place: Path) -> None:
    """The change is written, and not known to be durable: "unknown", within the timeout."""
    with opened(place, lock_timeout_s=0.4) as reg:
        reg.register("a")
        with ExitStack() as leaders:
            for name in layout.LOCK_SYNC:
                leader = leaders.enter_context((place / layout.LOCKS / name).open("rb"))
                fcntl.flock(leader, fcntl.LOCK_EX)
            began = time.monotonic()
            with pytest.raises(AppendUncertain, match="does not finish"):
                reg.update("a", meta={"n": 1})
            assert time.monotonic() - began < 5
        reg.update("a", meta={"n": 2})


@pytest.mark.limits(recent_workers=5)
def test_writer_remembers_few_workers(reg: Registry) -> None:
    """However many it has changed: the rest is asked of the state when it is needed."""
    for number in range(20):
        reg.register(f"w{number}")
    assert len(files(reg)._view.recent) <= 5
    assert reg.update("w0", meta={"n": 1}).generation == 1


@pytest.mark.limits(recent_workers=40, segment_bytes=9_000)
def test_rotation_in_a_group_forgets_nothing_that_was_decided(place: Path) -> None:
    """However many workers are known: each is there for the next change, and registered once."""
    with opened(place) as reg:
        for first in range(0, 200, 5):
            sids = [f"w{number}" for number in range(first, first + 5)]
            with reg.batch() as batch:
                for sid in sids:
                    batch.register(sid)
            for sid in sids:
                with pytest.raises(WorkerExists):
                    reg.register(sid)
            with reg.batch() as batch:
                for sid in sids:
                    batch.exited(sid, code=0)
        assert all(worker.final for worker in reg.workers(all=True))
        assert len(list((place / layout.LOG).iterdir())) > 10, "it rotates"
    assert verify(place).ok
