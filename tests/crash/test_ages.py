"""Files of different ages in one boot: what was acknowledged is there, or the store refuses."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import crewlog
from crewlog import host
from crewlog.errors import CrewlogError, HistoryRewound, LogCorrupt, LogRegressed
from crewlog.local import layout, recovery, redo
from crewlog.local.heads import States
from crewlog.local.layout import Directory
from crewlog.local.segments import Segments
from crewlog.registry import Registry
from crewlog_compactor import compact, repair, verify
from faults import active_segment
from procs import files, forked, joined, slay, until
from stores import opened

STATE, HEAD = layout.APPEND_STATE, f"{layout.HEAD}/{layout.HEAD_DURABLE}"


def put_back(place: Path, copy: Path, *names: str) -> None:
    """Overwrite files in place with those of a copy: what a device that lost writes leaves."""
    for name in names:
        with (place / name).open("r+b") as file:
            file.truncate(0)
            file.write((copy / name).read_bytes())


def grown(place: Path, before: int, after: int) -> tuple[Path, str]:
    """Make changes, copy the store, make more; return the copy and the active segment's name."""
    with opened(place) as reg:
        reg.register("w")
        for number in range(before):
            reg.update("w", meta={"n": number})
        shutil.copytree(place, place.with_name("copy"))
        for number in range(after):
            reg.update("w", meta={"n": 1000 + number})
    return place.with_name("copy"), f"{layout.LOG}/{active_segment(place).name}"


def read(place: Path) -> int:
    """Return the last acknowledged number, as a reader that opens the store is shown it."""
    with opened(place) as reg:
        worker = reg.get("w")
        assert worker is not None
        return int(str(worker.meta["n"]))


def written(place: Path) -> int:
    """Return the same after another change went through."""
    with opened(place) as reg:
        reg.register("another")
    return read(place)


@pytest.mark.parametrize("look", [read, written])
@pytest.mark.parametrize("aged", [
    (STATE,), (HEAD,), (STATE, HEAD), ("SEGMENT",), ("SEGMENT", STATE), ("SEGMENT", HEAD),
    ("SEGMENT", STATE, HEAD),
])  # fmt: skip
def test_files_of_different_ages_lose_nothing_acknowledged(
    place: Path, aged: tuple[str, ...], look: Callable[[Path], int]
) -> None:
    """The redo still holds what the device lost: in the same boot as after another one."""
    copy, segment = grown(place, 1, 10)
    put_back(place, copy, *(segment if name == "SEGMENT" else name for name in aged))
    if look is read and aged == (HEAD,):
        return  # byte for byte a leader that was killed before it published: see recovery.py
    if look is read and aged == (STATE, HEAD):
        return  # as above
    assert look(place) == 1009
    assert verify(place).ok


@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.limits(redo_bytes=8192)
def test_redo_that_began_anew_completes_what_its_round_holds(place: Path, rounds: int) -> None:
    """However often it wrapped: what is not in it was synced in the segment."""
    with opened(place) as reg:
        reg.register("w")
        for number in range(rounds * 30 + 5):
            reg.update("w", meta={"n": number})
        last = rounds * 30 + 4
        head = files(reg).head()
    path = active_segment(place)
    path.write_bytes(path.read_bytes()[: head.base])  # all that was synced in place
    assert read(place) == last
    assert written(place) == last
    assert verify(place).ok


def test_head_of_a_copy_is_judged_as_after_a_reboot(place: Path, tmp_path: Path) -> None:
    """A snapshot of the device, looked at on the same machine, is another file."""
    grown(place, 1, 5)
    shutil.copytree(place, tmp_path / "taken")
    path = active_segment(tmp_path / "taken")
    with path.open("ab") as file:
        file.write(b'{"v":1,"half')
    with opened(tmp_path / "taken") as reg:
        assert files_pending(reg)
    assert read(tmp_path / "taken") == 1004
    assert written(tmp_path / "taken") == 1004
    with opened(tmp_path / "taken") as reg:
        assert not files_pending(reg)


def files_pending(reg: Registry) -> bool:
    """Say whether a reader waits for a writer to recover."""
    assert reg.last_seq
    return files(reg).recovery_pending


def test_backup_restored_under_an_open_writer_is_refused_by_it(place: Path) -> None:
    """It has acknowledged more than there is: it says so, and gives out no seq twice."""
    with opened(place) as reg:
        reg.register("w")
        shutil.copytree(place, place.with_name("copy"))
        for number in range(5):
            reg.update("w", meta={"n": number})
        names = (STATE, HEAD, layout.REDO, f"{layout.LOG}/{active_segment(place).name}")
        put_back(place, place.with_name("copy"), *names)
        for _ in range(2):
            with pytest.raises(HistoryRewound) as caught:
                reg.update("w", meta={"n": 99})
            assert caught.value.outcome == "not_written"
    with opened(place) as reg:
        reg.register("fresh")
        assert [w.sid for w in reg.workers()] == ["w", "fresh"]
    assert verify(place).ok


def test_backup_put_in_place_with_its_times_is_noticed_by_a_writer(place: Path) -> None:
    """`tar` and `rsync -a` set mtimes back; what a directory's change time tells they cannot."""
    with opened(place) as reg, opened(place) as other:
        reg.register("w")
        other.workers()
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 0.05)  # what is younger is never taken as seen
        reg.update("w", meta={"n": 1})
        shutil.copytree(place, place.with_name("copy"))
        for folder in ("", layout.HEAD, layout.LOG):
            for path in sorted((place / folder).iterdir()):
                if path.is_file():
                    times = path.stat()
                    path.unlink()
                    shutil.copy2(place.with_name("copy") / folder / path.name, path)
                    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            times = (place.with_name("copy") / folder).stat()
            os.utime(place / folder, ns=(times.st_atime_ns, times.st_mtime_ns))
        reg.update("w", meta={"n": 7})
    assert read(place) == 7


# -- no false proof -------------------------------------------------------------------------


def look(place: Path, rounds: int) -> int:
    """Look for a proof so often; return how many were claimed."""
    opened_ = layout.open_existing(place)
    states = States(opened_)
    try:
        return sum(recovery.proof(Segments(opened_), states) is not None for _ in range(rounds))
    finally:
        states.close()


def _write_for_ever(place: Path) -> None:
    with opened(place) as reg:
        reg.register(f"w-{os.getpid()}")
        while True:
            for _ in range(3):
                reg.update(f"w-{os.getpid()}", meta={"n": os.urandom(8).hex()})
            with reg.batch() as batch:
                for part in range(4):
                    batch.update(f"w-{os.getpid()}", meta={"part": part})


def _compact_for_ever(place: Path) -> None:
    with opened(place) as reg:
        while True:
            try:
                compact(reg, gc=False)
            except CrewlogError:
                continue


@pytest.mark.limits(redo_bytes=16384, segment_bytes=60_000)
def test_no_proof_is_claimed_beside_live_writers(place: Path) -> None:
    """Writers that go on and a compactor: thousands of looks, not one false proof."""
    pids = [forked(lambda: _write_for_ever(place)) for _ in range(3)]
    until((place / layout.STORE).exists)
    pids.append(forked(lambda: _compact_for_ever(place)))
    try:
        assert look(place, int(os.environ.get("LOOKS", "2000"))) == 0
    finally:
        for pid in pids:
            slay(pid)
    assert verify(place).ok


@pytest.mark.limits(redo_bytes=8192, segment_bytes=6000)
def test_no_proof_is_claimed_beside_a_writer_that_stopped_at_any_step(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each change of any file a reader looks: also between segment, redo and states."""
    from crewlog.local.disk import Disk

    claimed: list[str] = []
    looks = 0

    class Watched(Disk):
        """Looks for a proof after each call that changes a file."""

    def after(name: str) -> object:
        real = getattr(Disk, name)

        def call(self: Disk, *given: object, **options: object) -> object:
            nonlocal looks
            result = real(self, *given, **options)
            if (place / layout.STORE).exists():
                looks += 1
                if look(place, 1):
                    claimed.append(name)
            return result

        return call

    for name in ("write", "overwrite", "cut", "link", "unlink", "rename", "create"):
        setattr(Watched, name, after(name))
    from faults import registry_on

    with registry_on(place, Watched()) as reg:
        reg.register("w")
        for number in range(60):
            reg.update("w", meta={"n": number})
            if number % 20 == 0:
                compact(reg, gc=False)
    assert claimed == []
    assert looks > 200


def test_a_proof_is_found_where_there_is_one(place: Path) -> None:
    """Negative control of the two runs above."""
    copy, segment = grown(place, 1, 10)
    put_back(place, copy, segment, STATE, HEAD)
    assert look(place, 3) == 3


def _see(reg: Registry, seen: list[int]) -> None:
    seen.append(reg.last_seq)


@pytest.mark.parametrize("lost", [1, 10])
def test_threads_that_open_one_store_judge_alike(place: Path, lost: int) -> None:
    """Each looks by itself; what one recovers the others go on from."""
    copy, segment = grown(place, 1, lost)
    put_back(place, copy, segment, STATE, HEAD)
    interval_s = sys.getswitchinterval()
    for _ in range(20):
        seen: list[int] = []
        with crewlog.open(place) as reg:
            threads = [threading.Thread(target=_see, args=(reg, seen)) for _ in range(4)]
            sys.setswitchinterval(1e-5)
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            finally:
                sys.setswitchinterval(interval_s)
        assert len(set(seen)) == 1
        assert len(seen) == 4
    joined(forked(lambda: None))


@pytest.mark.parametrize("lost", [1, 10])
def test_thread_that_looks_later_judges_as_the_first_one_did(
    place: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """It looks at the files, not at what the other one has completed, which stays in place."""
    copy, segment = grown(place, 1, lost)
    put_back(place, copy, segment, STATE, HEAD)
    with crewlog.open(place) as reg:
        log, first = files(reg), reg.last_seq
        assert log.segments.completed
        log._looked_at, log._aged = -1, None  # as it was when the other thread began to look
        stood: list[bool] = []
        real = redo.read

        def look(directory: Directory) -> bytes:
            stood.append(bool(log.segments.completed))
            return real(directory)

        monkeypatch.setattr(redo, "read", look)
        assert reg.last_seq == first
        assert stood
        assert all(stood)


# -- what lies in the place of a segment, or is missing from one --------------------------------


@pytest.mark.parametrize("content", [b"", b"\n", b"something else\n", b'{"v":1,"seq":4}\n'])
def test_file_under_the_next_segments_name_is_named_and_taken_out(
    place: Path, content: bytes
) -> None:
    """The writer refuses before it acknowledges; verify names it; repair keeps it in quarantine."""
    with opened(place) as reg:
        reg.register("w")
    stranger = place / layout.LOG / layout.segment_name(4)
    stranger.touch(0o600)
    stranger.write_bytes(content)
    assert [f.path for f in verify(place).findings] == [str(stranger)]
    with opened(place) as reg:
        assert [w.sid for w in reg.workers()] == ["w"]
    with opened(place) as reg, pytest.raises(LogCorrupt) as caught:
        reg.register("v")
    assert caught.value.outcome == "not_written"
    assert repair(place).done is False
    report = repair(place, yes=True)
    assert report.done
    kept = [place / layout.QUARANTINE / name for name in report.quarantined]
    assert content in [path.read_bytes() for path in kept]
    with opened(place) as reg:
        compact(reg, gc=False)
        reg.register("v")
        assert [w.sid for w in reg.workers()] == ["w", "v"]
    assert verify(place).ok


def test_repair_keeps_what_the_redo_holds_behind_a_gap(place: Path) -> None:
    """Of a segment that was cut short only what is nowhere is lost; the redo goes aside."""
    with opened(place) as reg:
        reg.register("w")
        for number in range(300):
            reg.update("w", meta={"n": number, "fill": "x" * 1500})
    segment = active_segment(place)
    segment.write_bytes(segment.read_bytes()[: segment.stat().st_size // 3])
    losses = repair(place).losses
    (first, last) = losses[0]
    assert (len(losses), first < last < 301) == (1, True)
    report = repair(place, yes=True, accept_loss=losses)
    assert any(name.startswith(layout.REDO) for name in report.quarantined)
    assert read(place) == 299
    assert verify(place).ok
    assert written(place) == 299


def test_clock_that_was_ahead_for_whole_segments_hides_no_time(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments that begin late before others that begin early: the state of now is that of now."""
    now = datetime.now(UTC)
    clock = now - timedelta(hours=1)
    monkeypatch.setattr(host, "now", lambda clock=clock: clock)
    with opened(place) as reg:
        reg.register("w")
        for ahead in (0, 5, 5, 5, 0, 0):
            clock += timedelta(minutes=1)
            files(reg).rotate()
            shown = clock + timedelta(hours=ahead)
            monkeypatch.setattr(host, "now", lambda shown=shown: shown)
            reg.update("w", meta={"n": ahead, "at": str(clock)})
        past = reg.at(now)
        assert past.workers["w"].meta["at"] == str(clock)
        assert past.disputed is not None


def test_states_of_another_end_of_the_same_length_are_not_gone_on_from(place: Path) -> None:
    """Two copies went on differently, byte for byte as long: the chain tells them apart."""
    with opened(place) as reg:
        reg.register("w")
    shutil.copytree(place, place.with_name("copy"))
    for where in (place, place.with_name("copy")):
        with opened(where) as reg:
            reg.update("w", meta={"n": 1 if where == place else 2})
    put_back(place, place.with_name("copy"), STATE)
    with opened(place) as reg:
        reg.register("next")
        assert [w.sid for w in reg.workers()] == ["w", "next"]
    assert verify(place).ok


@pytest.mark.limits(redo_bytes=16_384)
def test_read_back_comes_from_the_device(place: Path) -> None:
    """Bytes that were read from a disk are counted, not calls: the page cache proves nothing."""

    def read_bytes() -> int:
        rows = Path("/proc/self/io").read_text().splitlines()
        return int(next(row for row in rows if row.startswith("read_bytes")).split()[1])

    with opened(place) as reg:
        reg.register("w")
        before = read_bytes()
        for number in range(200):
            reg.update("w", meta={"n": number, "fill": "x" * 300})
        read = read_bytes() - before
        head = files(reg).head()
    probe = place / "probe"
    probe.write_bytes(bytes(65_536))
    with probe.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = read_bytes()
        file.read()
    probe.unlink()
    if read_bytes() == before:
        pytest.skip("this file system reads from no device")
    assert head.base > 16_384, "the redo began anew"
    assert read >= 16_384


def test_stranger_under_an_open_writer_is_refused_at_once(place: Path) -> None:
    """Not only where a store is opened: the names in log/ have changed."""
    with opened(place) as reg:
        reg.register("w")
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 0.05)
        reg.update("w", meta={"n": 1})
        reg.update("w", meta={"n": 2})
        stranger = place / layout.LOG / layout.segment_name(9)
        stranger.touch(0o600)
        with pytest.raises(LogCorrupt, match="repair"):
            reg.update("w", meta={"n": 3})
        stranger.unlink()
        reg.update("w", meta={"n": 4})
    assert verify(place).ok


def test_writer_reads_anew_what_went_on_from_an_older_copy(place: Path) -> None:
    """A backup came back and others went further: the first line after ours has another prev."""
    with opened(place) as reg:
        reg.register("w")
        shutil.copytree(place, place.with_name("copy"))
        reg.register("only-here")
        names = (STATE, HEAD, layout.REDO, f"{layout.LOG}/{active_segment(place).name}")
        put_back(place, place.with_name("copy"), *names)
        with opened(place) as other:
            for number in range(5):
                other.update("w", meta={"n": number})
        reg.register("only-here")  # it is not there any more
        reg.update("w", labels={"by": "the first"})
        worker = reg.get("w")
        assert worker is not None
        assert worker.meta == {"n": 4}
    assert verify(place).ok


@pytest.mark.limits(segment_bytes=2000)
def test_successor_whose_predecessors_seal_is_not_durable_is_a_proof(place: Path) -> None:
    """I4 alone tells it: the new segment has no witness yet, and the states agree."""
    with opened(place) as reg:
        reg.register("w")
        for number in range(20):
            reg.update("w", meta={"n": number})
        log = files(reg)
        shutil.copy(place / HEAD, place.with_name("head"))
        before = log.directory.names(layout.LOG)
        log.rotate()
        assert len(log.directory.names(layout.LOG)) == len(before) + 1
    with (place / HEAD).open("r+b") as file:
        file.write(place.with_name("head").read_bytes())
    at = layout.open_existing(place)
    proof = recovery.proof(Segments(at), States(at))
    assert proof is not None
    assert "seal is not durable" in proof
    assert read(place) == 19
    assert verify(place).ok


def test_head_ahead_of_what_is_written_and_of_the_file_is_refused(place: Path) -> None:
    """Nothing holds the lines any more: no seq of theirs is given out a second time."""
    copy, segment = grown(place, 1, 10)
    put_back(place, copy, STATE, segment)
    (place / layout.REDO).write_bytes(bytes((place / layout.REDO).stat().st_size))
    with opened(place) as reg:
        with pytest.raises(LogRegressed, match="durable"):
            reg.update("w", meta={"n": 1})
        with pytest.raises(LogRegressed):
            reg.workers()


def test_writer_is_not_fooled_by_states_of_two_ages(place: Path) -> None:
    """Each state by itself fits the log; that they are of different ages is what is proven."""
    copy, _ = grown(place, 1, 10)
    put_back(place, copy, STATE)
    at = layout.open_existing(place)
    states, segments = States(at), Segments(at)
    state, head = states.append_state(), states.head()
    assert state is not None
    assert head is not None
    assert "is durable, and only" in str(recovery.proof_for_writer(segments, state, head))
