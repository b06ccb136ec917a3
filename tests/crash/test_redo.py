"""The redo completes the end of a segment that a power cut took, and is never believed too much."""

import errno
import os
from pathlib import Path

import pytest

import stores
from crewlog.errors import DataDamaged, StorageFailed, StorageFull, StorePoisoned
from crewlog.local import layout, redo
from crewlog.local.disk import Disk
from crewlog.model import chain, codec
from crewlog.model.steps import decide_all, update_step
from crewlog.queue import Request
from crewlog_compactor import compact, repair, verify
from faults import active_segment, another_boot, empty_redo, registry_on
from procs import files, tree
from recording import RecordingDisk
from stores import opened

pytestmark = pytest.mark.limits(redo_bytes=4096)

SIDS = ["a", "b", "c", "d"]


def filled(place: Path) -> bytes:
    """Register four workers, and return the segment; all but its header is synced in the redo."""
    with opened(place) as reg:
        for sid in SIDS:
            reg.register(sid)
    return active_segment(place).read_bytes()


def sids(place: Path) -> list[str]:
    with opened(place) as reg:
        return [worker.sid for worker in reg.workers()]


def test_segment_that_lost_its_end_is_completed(place: Path) -> None:
    """Cut anywhere behind its header: readers see all of it at once, a writer puts it back."""
    data = filled(place)
    segment = active_segment(place)
    for size in range(data.index(b"\n") + 1, len(data), 37):
        segment.write_bytes(data[:size])
        before = tree(place)
        with another_boot(size):
            assert sids(place) == SIDS
            assert tree(place) == before, "reading changes nothing"
            with opened(place) as reg, reg.watch(after="oldest") as items:
                seen = [item.sid for item in items.drain() if item.kind == "change"]
                assert seen == SIDS
                reg.register("next")
                assert [i.sid for i in items.drain() if i.kind == "change"] == ["next"]
                reg.remove("next", reason="seen")
            assert segment.read_bytes().startswith(data)
            assert verify(place).findings == ()
        segment.write_bytes(data)
        (place / layout.APPEND_STATE).unlink()
        with opened(place) as reg:
            reg.register("again")
            reg.remove("again", reason="so that the redo begins anew")
        _begin_anew(place, data)


def _begin_anew(place: Path, data: bytes) -> None:
    """Bring the store back to where `data` is the segment, and the redo holds all of it."""
    head = len(data[: data.index(b"\n") + 1])
    active_segment(place).write_bytes(data)
    kept = data[head:]
    (place / layout.REDO).write_bytes(kept + bytes(stores.limits().redo_bytes - len(kept)))
    (place / layout.APPEND_STATE).unlink()
    (place / layout.HEAD / layout.HEAD_DURABLE).unlink()


def test_hole_and_flipped_bytes_are_mended_after_a_power_cut(place: Path) -> None:
    """Zeros before whole lines, as pages arrive in any order; what lay there is kept aside."""
    data = filled(place)
    segment = active_segment(place)
    holed = bytearray(data)
    at = data.index(b'"sid":"b"')
    holed[at : at + 100] = bytes(100)
    segment.write_bytes(bytes(holed))
    with another_boot():
        assert sids(place) == SIDS
        with opened(place) as reg:
            reg.register("next")
        assert segment.read_bytes().startswith(data)
        kept = [p for p in (place / layout.QUARANTINE).iterdir() if p.suffix == ".bytes"]
        assert len(kept) == 1
        assert verify(place).ok


def test_damage_of_this_boot_is_refused_and_repaired_without_a_loss(place: Path) -> None:
    """Nobody guesses while the machine is up; the repair takes from the redo what it needs."""
    data = filled(place)
    segment = active_segment(place)
    holed = bytearray(data)
    holed[data.index(b'"sid":"b"') + 7] ^= 1
    segment.write_bytes(bytes(holed))
    with opened(place) as reg, pytest.raises(DataDamaged):
        reg.workers()
    assert not verify(place).ok
    done = repair(place, yes=True)
    assert (done.done, done.losses) == (True, ())
    assert sids(place) == SIDS
    assert verify(place).findings == ()


def test_page_that_the_kernel_dropped_is_noticed_before_the_redo_goes(place: Path) -> None:
    """The segment is read back when it is synced; what is lost there is still in the redo."""
    with opened(place) as reg:
        reg.register("a")
        for number in range(3):
            reg.update("a", meta={"n": number})
        segment = active_segment(place)
        data = segment.read_bytes()
        with segment.open("r+b") as file:
            file.seek(data.index(b'{"v":1,"seq":3'))
            file.write(bytes(50))
        with pytest.raises(StorageFailed) as caught:
            for number in range(20):
                reg.update("a", meta={"n": number, "pad": "x" * 500})
        assert caught.value.outcome == "unknown"
        with pytest.raises(StorePoisoned):
            reg.update("a", meta={"n": 99})
        acknowledged = reg.last_seq
    assert repair(place, yes=True).losses == ()
    with opened(place) as reg:
        assert [e.seq for e in reg.history()][: acknowledged - 1] == list(
            range(2, acknowledged + 1)
        )
    assert verify(place).findings == ()


class Syncs(Disk):
    """Notes which file each sync is of."""

    def __init__(self) -> None:
        """Begin with none."""
        self.files: list[int] = []

    def sync(self, fd: int) -> None:
        self.files.append(os.fstat(fd).st_ino)
        super().sync(fd)


def test_segment_is_synced_only_once_a_round(place: Path) -> None:
    """A change syncs the redo, and the segment where the redo is full or at a rotation."""
    disk = Syncs()
    with registry_on(place, disk) as reg:
        reg.register("a")
        mine = (place / layout.REDO).stat().st_ino
        log = active_segment(place).stat().st_ino
        disk.files.clear()
        sizes = [active_segment(place).stat().st_size]
        for number in range(40):
            reg.update("a", meta={"n": number})
            sizes.append(active_segment(place).stat().st_size)
        rounds = (sizes[-1] - sizes[0]) / stores.limits().redo_bytes
        assert rounds - 1 <= disk.files.count(log) <= rounds + 1
        assert disk.files.count(mine) + disk.files.count(log) == len(disk.files) == 40
        disk.files.clear()
        compact(reg, gc=False)
        assert disk.files[0] == log, "the sealed segment itself is synced"


def test_without_a_redo_the_segment_is_synced_and_a_recovery_makes_one(place: Path) -> None:
    """An older store, or a removed file: slower, and as safe."""
    filled(place)
    (place / layout.REDO).unlink()
    assert [f.code for f in verify(place).findings] == ["redo_differs"]
    disk = Syncs()
    with registry_on(place, disk) as reg:
        reg.update("a", meta={"n": 1})
        reg.update("a", meta={"n": 2})
        assert disk.files == [active_segment(place).stat().st_ino] * 2
    with another_boot():
        with opened(place) as reg:
            reg.update("a", meta={"n": 3})
        assert (place / layout.REDO).stat().st_size == stores.limits().redo_bytes
        assert verify(place).findings == ()


def test_redo_in_another_place_is_left_alone(place: Path) -> None:
    """Removed or replaced under a writer that has it open: what is in place is used."""
    with opened(place) as reg:
        reg.register("a")
        data = (place / layout.REDO).read_bytes()
        (place / layout.REDO).unlink()
        reg.update("a", meta={"n": 1})
        os.close(os.open(place / layout.REDO, os.O_CREAT | os.O_EXCL, 0o600))
        (place / layout.REDO).write_bytes(data)
        reg.update("a", meta={"n": 2})
        reg.update("a", meta={"n": 3})
    assert verify(place).findings == ()


def test_redo_that_does_not_follow_completes_nothing(place: Path, tmp_path: Path) -> None:
    """Zeros, noise, an older round, another store's lines: the segment stays as it is."""
    data = filled(place)
    rows = data.splitlines(keepends=True)
    other = filled(tmp_path / "other").splitlines(keepends=True)
    short = b"".join(rows[:3])
    assert redo.completed(short, 1, b"".join(rows[1:])) == data
    assert redo.completed(short, 1, b"".join(rows[3:])) == data
    assert redo.completed(short + b"torn", 1, b"".join(rows[2:4])) == b"".join(rows[:4])
    assert redo.completed(short, 1, b"".join(rows[3:4]) + rows[4][:50]) == b"".join(rows[:4])
    for kept in (b"", bytes(999), b"\n" * 9, rows[1] + rows[2], b"".join(other[3:]), rows[4]):
        assert redo.completed(short, 1, kept) == short
    assert redo.completed(b"", 1, data) == b""


def test_what_a_sealed_segment_has_is_all_there_is(place: Path) -> None:
    """Nothing follows a seal, whatever the redo holds."""
    with opened(place) as reg:
        reg.register("a")
        files(reg).rotate()
    first = (place / layout.LOG / layout.segment_name(1)).read_bytes()
    sealed = chain.scan(first, offset=0, seq=0, prev=None)
    assert sealed.sealed
    part = codec.draft("worker.updated", "a", b"{}", {})
    more = codec.line(
        part, seq=sealed.seq + 1, ts="t", synced=0, prev=sealed.hash, batch=None
    )  # fmt: skip
    assert redo.completed(first, 1, more) == first


def test_damage_that_the_redo_does_not_hold_is_refused(place: Path) -> None:
    """An emptied redo is no proof that there was nothing."""
    data = filled(place)
    active_segment(place).write_bytes(data[:-100])
    empty_redo(place)
    with another_boot(), opened(place) as reg, pytest.raises(DataDamaged):
        reg.register("next")


# -- what was not written does not come back ------------------------------------------------


class Moody(Disk):
    """Fails as a test says."""

    def __init__(self) -> None:
        """Begin in a good mood."""
        self.start_fails = self.full = self.state_fails = False

    def start(self, fd: int, offset: int, size: int) -> None:
        if self.start_fails:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        super().start(fd, offset, size)

    def overwrite(self, fd: int, data: bytes, offset: int = 0) -> None:
        if self.state_fails and data.startswith(b"crewlogA"):
            self.state_fails = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.full and data.startswith(b"{"):
            os.pwrite(fd, data[: data.index(b"\n") + 100], offset)
            self.state_fails = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().overwrite(fd, data, offset)


def test_hint_that_fails_fails_nothing(place: Path) -> None:
    """It is only a hint."""
    disk = Moody()
    with registry_on(place, disk) as reg:
        reg.register("a")
        disk.start_fails = True
        reg.register("b")
    with another_boot():
        assert sids(place) == ["a", "b"]


def test_copy_of_what_was_cut_off_again_is_taken_back(place: Path) -> None:
    """Copied in part, then append.state fails: not written, and not there after a power cut."""
    disk = Moody()
    with registry_on(place, disk) as reg:
        reg.register("a")
        disk.full = True
        with pytest.raises(StorageFull) as caught, reg.batch() as batch:
            batch.register("b")
            batch.register("c")
        assert caught.value.outcome == "not_written"
    assert b'"sid":"b"' not in (place / layout.REDO).read_bytes()
    with another_boot():
        assert sids(place) == ["a"]


def test_redo_that_was_made_anew_under_the_same_inode_is_not_gone_on_with(place: Path) -> None:
    """File systems use an inode number again at once; its bytes are compared before they count."""
    filled(place)
    path = place / layout.REDO
    number = path.stat().st_ino
    for _ in range(50):
        path.unlink()
        path.touch(mode=0o600)
        path.write_bytes(bytes(stores.limits().redo_bytes))
        if path.stat().st_ino == number:
            break
    disk = Syncs()
    with registry_on(place, disk) as reg:
        reg.register("next")
        assert disk.files == [active_segment(place).stat().st_ino], "the segment itself"
    assert verify(place).findings == ()


def test_cut_is_durable_before_anybody_hears_that_nothing_was_written(fast: Path) -> None:
    """Two share a write that is short behind the first line: no crash state brings that back."""
    live = fast / "live"
    live.mkdir(mode=0o700)

    class Full(RecordingDisk):
        armed = False

        def write(self, fd: int, data: bytes) -> int:
            short = self.armed and data.startswith(b'{"v":1')
            return super().write(fd, data[: data.index(b"\n") + 40] if short else data)

    disk = Full(live)
    with registry_on(live / "store", disk) as reg:
        for sid in ("y", "z"):
            reg.register(sid)
        disk.armed = True
        log, author = files(reg), reg.author()
        own, rider = (
            Request(decide_all([update_step(author, sid, {"meta": {"n": 1}})]), {sid})
            for sid in ("y", "z")
        )
        log.commits._leader = own
        log.commits._queue.append(rider)
        log.commits.lead(own)
        for request in (own, rider):
            assert isinstance(request.error, StorageFull)
            assert request.error.outcome == "not_written"
        disk.armed = False
        for number, state in enumerate(disk.states()):
            target = fast / f"crashed-{number}"
            target.mkdir(mode=0o700)
            disk.materialise(state, target)
            with another_boot(), opened(target / "store") as after:
                assert [w.meta for w in after.workers()] == [{}, {}], state


def test_lines_that_do_not_fit_leave_the_redo_as_it_is_told_of(place: Path) -> None:
    """However far the segment itself was synced: append.state says what the redo does hold."""
    with opened(place) as reg:
        reg.register("a")
        for size in (100, 6000, 101, 6001, 6002, 102):
            reg.update("a", meta={"pad": "x" * size})
            state = files(reg)._heads.append_state()
            assert state is not None
            assert state.base <= state.kept
            held = (place / layout.REDO).read_bytes()[: state.kept - state.base]
            assert held == active_segment(place).read_bytes()[state.base : state.kept]
    assert verify(place).ok
