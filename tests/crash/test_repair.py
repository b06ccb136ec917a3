"""A repair loses nothing unsaid: quarantine first, no renumbering, and the chain goes on."""

import errno
import functools
import gzip
import os
import random
import shutil
from pathlib import Path

import pytest

import crewlog
import stores
from crewlog.errors import (
    CrewlogError,
    DataDamaged,
    HistoryDiverged,
    LossRefused,
    StorageFailed,
    StorePoisoned,
)
from crewlog.local import layout
from crewlog.model import codec
from crewlog.model.items import Reset
from crewlog_compactor import Anchor, RepairReport, anchor, compact, repair, verify
from faults import EIO, FailingDisk, active_segment, another_boot, empty_redo, only, registry_on
from procs import files, forked, tree
from stores import opened

pytestmark = pytest.mark.long


def grown(place: Path, *, compactions: int = 2) -> None:
    """Make a store of several segments in log/, and with compactions in archive/ too."""
    stores.limit(segment_bytes=2500)
    with opened(place) as reg:
        for turn in range(compactions + 1):
            for number in range(6):
                reg.register(f"w-{turn}-{number}")
            if turn < compactions:
                compact(reg, gc=False)
        files(reg).rotate()  # so that the redo holds nothing that could mend a damage
    stores.unlimit()


def lines(place: Path) -> dict[int, bytes]:
    """Return every line of a store by its seq, read off the files."""
    by_seq: dict[int, bytes] = {}
    for folder in (layout.ARCHIVE, layout.LOG):
        for path in sorted((place / folder).iterdir()):
            data = path.read_bytes()
            for raw in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines():
                line = codec.parse(raw)
                by_seq[line["seq"]] = raw
    return by_seq


def damage(path: Path, at: int, *, size: int = 1) -> None:
    """Change bytes of a segment, inside the compression of an archived one."""
    packed, data = path.suffix == ".gz", bytearray(path.read_bytes())
    try:
        data = bytearray(gzip.decompress(data)) if packed else data
    except EOFError:  # cut before
        packed = False
    for index in range(at, min(at + size, len(data))):
        data[index] ^= 1
    path.write_bytes(gzip.compress(bytes(data), mtime=0) if packed else bytes(data))


def repaired(place: Path) -> RepairReport:
    """Repair, and give up what the plan says is lost."""
    planned = repair(place)
    return repair(place, yes=True, accept_loss=planned.losses)


def sound(place: Path, before: dict[int, bytes], losses: tuple[tuple[int, int], ...]) -> None:
    """Every line that is not lost stands as it was; the store works and verifies."""
    lost = {seq for first, last in losses for seq in range(first, last + 1)}
    after = lines(place)
    assert {seq: raw for seq, raw in after.items() if seq in before and seq not in lost} == {
        seq: raw for seq, raw in before.items() if seq not in lost
    }
    report = verify(place)
    assert report.findings == (), report.findings
    with opened(place) as reg:
        seq = reg.register("after").rev
        compact(reg, gc=False)
        reg.update("after", meta={"n": 1})
        compact(reg, gc=False)
        seen = {event.seq for event in reg.history()}
        assert seq in seen
        assert not seen & lost
    report = verify(place)
    assert report.findings == (), report.findings
    assert set(losses) <= {(f, la) for f, la in report.gaps} | set(_joined(report.gaps))


def _joined(gaps: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, last in gaps:
        if joined and joined[-1][1] + 1 == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


def test_sound_store_needs_no_repair_and_is_not_touched(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing to do, with or without yes."""
    grown(place)
    before = tree(place)
    assert not repair(place).needed
    assert not repair(place, yes=True).done
    assert tree(place) == before


# -- a failed sync --------------------------------------------------------------------------


@pytest.mark.parametrize("rebooted", [False, True])
def test_poisoned_store_is_repaired_to_what_was_acknowledged(place: Path, rebooted: bool) -> None:
    """The unacknowledged line goes to quarantine, the mark is lifted, everybody writes again."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    other = opened(place)
    assert other.get("a") is not None
    disk.fault = only("sync", EIO)
    with pytest.raises(StorageFailed):
        reg.register("b")
    disk.fault = lambda _: None
    before = tree(place)
    planned = repair(place)
    assert (planned.needed, planned.poisoned, planned.losses) == (True, True, ())
    assert tree(place) == before, "without yes nothing is touched"
    with another_boot(5) if rebooted else _same_boot():
        done = repair(place, yes=True)
        assert done.done
        with opened(place) as fresh:
            held = [w.sid for w in fresh.workers()]
            assert held == (["a", "b"] if rebooted else ["a"]), "b was on the disk after all"
            fresh.register("c")
        assert verify(place).ok
        assert not (place / layout.POISON).exists()
        kept = [(place / layout.QUARANTINE / name) for name in done.quarantined]
        assert any(b'"sid":"b"' in path.read_bytes() for path in kept)
        if not rebooted:
            assert other.register("d").rev > 0, "who was open before goes on"
    with opened(place) as again, pytest.raises(StorePoisoned):
        reg.register("e")
    again.close()


def _same_boot() -> "_Same":
    return _Same()


class _Same:
    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        return


def test_watcher_of_a_poisoned_store_never_sees_what_a_repair_takes_out(place: Path) -> None:
    """It has the old file open, and reads on in the new one."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    with opened(place) as reader, reader.watch(after="oldest") as items:
        seen = [item.event.sid for item in items.drain() if item.kind == "change"]
        disk.fault = only("sync", EIO)
        with pytest.raises(StorageFailed):
            reg.register("b")
        disk.fault = lambda _: None
        repair(place, yes=True)
        with opened(place) as fresh:
            fresh.register("c")
        while seen[-1] != "c":
            item = items.next(timeout_s=10)
            assert item is not None
            if item.kind == "change":
                seen.append(item.event.sid)
    assert seen == ["a", "c"]


def test_mark_of_a_failed_sync_goes_last(place: Path, tmp_path: Path) -> None:
    """Killed at any call of a repair: while the unacknowledged line is there, so is the mark."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    synced = disk.calls.count("sync")

    def failing(call: str) -> int | None:
        """Fail the sync, and the flag in head/durable after it: the note alone is left."""
        late = call == "overwrite" and disk.calls.count("sync") > synced
        return EIO if call == "sync" or late else None

    disk.fault = failing
    with pytest.raises(StorageFailed):
        reg.register("b")
    lifted = 0
    for k in range(60):
        here = tmp_path / f"copy-{k}"
        shutil.copytree(place, here)

        def work(here: Path = here, k: int = k) -> None:
            deadly = FailingDisk()
            deadly.fault = lambda _: os.kill(os.getpid(), 9) if len(deadly.calls) > k else None
            with pytest.MonkeyPatch.context() as patch:
                opening = functools.partial(layout.open_existing, via=deadly)
                patch.setattr(layout, "open_existing", opening)
                repair(here, yes=True)

        code = os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
        unacknowledged = any(
            b'"sid":"b"' in path.read_bytes() for path in (here / layout.LOG).iterdir()
        )
        if unacknowledged:
            with opened(here) as fresh, pytest.raises(StorePoisoned):
                fresh.register("c")
        else:
            lifted += 1
        if code == 0:
            break
    assert code == 0
    assert lifted > 3


# -- damage ---------------------------------------------------------------------------------


def test_damage_needs_a_word_for_each_loss_and_keeps_all_else(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line of a whole store in turn: exactly that one is lost, and only if it is agreed to."""
    grown(place)
    pristine = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    before = lines(place)
    count = 0
    for folder in (layout.ARCHIVE, layout.LOG):
        for path in sorted((place / folder).iterdir()):
            data = pristine[path]
            plain = gzip.decompress(data) if path.suffix == ".gz" else data
            at = 0
            for raw in plain.splitlines(keepends=True):
                damage(path, at + 60)
                at += len(raw)
                (loss,) = repair(place).losses
                assert loss[0] == loss[1]
                assert before[loss[0]] == raw.rstrip()
                untouched = tree(place)
                with pytest.raises(LossRefused) as caught:
                    repair(place, yes=True)
                assert caught.value.losses == (loss,)
                assert tree(place) == untouched
                done = repair(place, yes=True, accept_loss=[loss])
                assert done.losses == (loss,)
                sound(place, before, (loss,))
                count += 1
                _restore(place, pristine)
    assert count == len(before)


def _restore(place: Path, pristine: dict[Path, bytes]) -> None:
    for path in [p for p in place.rglob("*") if p.is_file()]:
        if path not in pristine:
            path.unlink()
    for path, data in pristine.items():
        if not path.exists():
            path.touch(mode=0o600)
        path.write_bytes(data)


def test_any_damage_is_repaired(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of bytes, cut ends, missing segments, several at once: what is left is all kept."""
    grown(place)
    pristine = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    before = lines(place)
    for seed in range(300):
        dice = random.Random(seed)
        for _ in range(dice.randint(1, 3)):
            paths = [p for f in (layout.ARCHIVE, layout.LOG) for p in sorted((place / f).iterdir())]
            path = dice.choice(paths)
            kind = dice.choice(["bytes", "bytes", "cut", "gone"])
            if kind == "bytes":
                damage(path, dice.randrange(2000), size=dice.choice([1, 40, 700, 1500]))
            elif kind == "cut":
                path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])
            elif len(paths) > 2 and path != paths[-1]:
                path.unlink()
        try:
            done = repaired(place)
        except DataDamaged as error:
            pytest.fail(f"seed {seed}: {error}")
        try:
            if done.done:
                sound(place, before, tuple(_joined(done.losses)))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {done}") from error
        _restore(place, pristine)


def test_state_after_a_gap_is_what_is_left(place: Path) -> None:
    """A lost registration leaves its worker unknown; the others are as they were."""
    with opened(place) as reg:
        for sid in ("a", "b"):
            reg.register(sid)
        reg.update("a", labels={"k": "v"})
        reg.update("b", state="ready")
    empty_redo(place)
    segment = active_segment(place)
    damage(segment, segment.read_bytes().index(b'"sid":"a"'))
    with opened(place) as broken, pytest.raises(DataDamaged):
        broken.workers()
    done = repaired(place)
    assert done.losses == ((2, 2),)
    with opened(place) as reg:
        assert [(w.sid, w.state) for w in reg.workers()] == [("b", "ready")]
        assert reg.register("a").generation == 1
        compact(reg, gc=False)
        with opened(place) as again:
            assert [w.sid for w in again.workers()] == ["b", "a"]
    assert verify(place).gaps == ((2, 2),)


def test_watcher_hears_of_a_gap(place: Path) -> None:
    """A Reset that names what is lost; or an error, if asked for."""
    with opened(place) as reg:
        for sid in ("a", "b", "c"):
            reg.register(sid)
    empty_redo(place)
    segment = active_segment(place)
    damage(segment, segment.read_bytes().index(b'"sid":"b"'))
    repaired(place)
    with opened(place) as reg:
        with reg.watch(after="oldest") as items:
            changes = [items.next(timeout_s=5), items.next(timeout_s=5)]
            assert [item.kind for item in changes if item is not None] == ["change", "reset"]
            reset = changes[1]
            assert reset is not None
            assert reset.kind == "reset"
            assert reset.reason == "lost"
            assert reset.lost is not None
            assert reset.lost[0] == 3
            assert list(reset.state.workers) == ["a", "c"]
        with reg.watch(after="oldest", on_compacted="raise") as items:
            items.next(timeout_s=5)
            with pytest.raises(crewlog.errors.CompactedError) as caught:
                items.next(timeout_s=5)
            assert (caught.value.requested, caught.value.oldest) == (3, 4)
        assert [e.sid for e in reg.history(sid="c")] == ["c"]


def test_filtered_reading_counts_a_gap_for_all_that_it_stands_for(place: Path) -> None:
    """Lines that nobody wants are passed over unparsed; a gap of three is not one of them."""
    with opened(place) as reg:
        for sid in ("a", "b", "c", "d", "e"):
            reg.register(sid)
    empty_redo(place)
    segment = active_segment(place)
    for name in (b"b", b"c", b"d"):
        data = segment.read_bytes()
        segment.write_bytes(data.replace(b'"sid":"%b"' % name, b'"sid":"?"'))
    assert repaired(place).losses == ((3, 5),)
    with opened(place) as reg:
        assert [(e.seq, e.sid) for e in reg.history(sid="e")] == [(6, "e")]
        reg.update("e", state="ready")
        assert [e.type for e in reg.history(sid="e")] == ["worker.registered", "worker.ready"]


def test_lines_that_contradict_each_other_are_never_repaired(place: Path) -> None:
    """A substituted line with a right crc: nobody can know which is true."""
    with opened(place) as reg:
        reg.register("a")
        reg.update("a", labels={"k": "v"})
        reg.update("a", labels={"k": "w"})
    segment = active_segment(place)
    rows = segment.read_bytes().split(b"\n")
    line = codec.parse(rows[2])
    part = codec.draft("worker.updated", "a", b"{}", {"labels": {"k": "x"}})
    rows[2] = codec.line(
        part, seq=3, ts=line["ts"], synced=line["synced"], prev=bytes.fromhex(line["prev"]),
        batch=None,
    ).rstrip(b"\n")  # fmt: skip
    segment.write_bytes(b"\n".join(rows))
    with pytest.raises(HistoryDiverged):
        repair(place, yes=True, accept_loss=[(1, 100)])


@pytest.mark.parametrize("number", [EIO, errno.ENOSPC])
def test_repair_that_fails_at_any_call_is_simply_run_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """EIO or a full disk at call k, for every k: typed, and the next run finishes."""
    grown(place)
    before = lines(place)
    for path in (
        sorted((place / layout.LOG).iterdir())[:1] + sorted((place / layout.ARCHIVE).iterdir())[:1]
    ):
        damage(path, 700)
    (place / layout.POISON).write_bytes(b"{}\n")
    (place / layout.POISON).chmod(0o600)
    fired = 0
    for k in range(200):
        here = tmp_path / f"copy-{k}"
        shutil.copytree(place, here)
        disk, count = FailingDisk(), 0

        def at_k(_: str, k: int = k) -> int | None:
            nonlocal count
            count += 1
            return number if count == k + 1 else None

        disk.fault = at_k
        losses = repair(here).losses
        with pytest.MonkeyPatch.context() as patch:
            opening = functools.partial(layout.open_existing, via=disk)
            patch.setattr(layout, "open_existing", opening)
            try:
                done = repair(here, yes=True, accept_loss=losses)
            except CrewlogError:
                fired += 1
                done = None
        if done is None:
            repair(here, yes=True, accept_loss=losses)
        sound(here, before, tuple(_joined(losses)))
        shutil.rmtree(here)
        if done is not None and count <= k:
            break
    assert fired > 15


# -- anchors --------------------------------------------------------------------------------


def test_anchor_shows_what_no_store_can_show_of_itself(place: Path, tmp_path: Path) -> None:
    """A history that was rewritten by somebody who may write it, or cut at a line's end."""
    with opened(place) as reg:
        reg.register("a")
        first = anchor(reg)
        reg.register("b")
        second = anchor(reg)
    assert Anchor.parse(str(second)) == second
    assert verify(place, anchor=first).ok
    assert verify(place, anchor=second).ok
    forged = Anchor(second.seq, first.hash)
    assert [f.code for f in verify(place, anchor=forged).findings] == ["history_diverged"]
    later = Anchor(99, first.hash)
    assert [f.code for f in verify(place, anchor=later).findings] == ["anchor_ahead"]
    another = tmp_path / "another"
    with opened(another) as reg:
        reg.register("a")
        reg.register("c")
    assert not verify(another, anchor=second).ok
    segment = active_segment(place)
    rows = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(rows[:-1]))
    empty_redo(place)
    shutil.rmtree(place / layout.HEAD)
    (place / layout.HEAD).mkdir(mode=0o700)
    (place / layout.APPEND_STATE).unlink()
    with opened(place) as reg:
        reg.register("d")  # the store knows nothing of what was cut off
    assert verify(place).ok
    assert not verify(place, anchor=second).ok, "the anchor does"


@pytest.mark.parametrize(
    "text", ["", "7", "7:", "x:" + "0" * 64, "7:" + "0" * 63, "-1:" + "0" * 64]
)
def test_what_is_no_anchor_is_refused(text: str) -> None:
    """With a word on what one looks like."""
    with pytest.raises(ValueError, match="SEQ:HASH"):
        Anchor.parse(text)


def test_retention_goes_on_behind_a_gap_and_tells_no_false_state(place: Path) -> None:
    """Who was registered in what a repair gave up lives on, and late watchers hear of it."""
    with opened(place) as reg:
        reg.register("a")
        compact(reg, gc=False)
        reg.register("b")
        for number in range(5):
            compact(reg, gc=False)
            reg.update("a", meta={"n": number})
    archived = sorted(path for path in (place / layout.ARCHIVE).iterdir() if ".gz" in path.name)
    archived[1].unlink()
    repair(place, yes=True, accept_loss=repair(place).losses)
    with opened(place) as reg:
        for number in range(3):
            reg.update("b", meta={"n": number})
            compact(reg, gc=False)
        assert verify(place).ok
        dropped = compact(reg, gc=False, keep_history=0, dry_run=True).dropped
        assert compact(reg, gc=False, keep_history=0).dropped == dropped
        assert dropped is not None
        assert verify(place).ok
        with reg.watch(after=1) as items:
            item = items.next(5)
            assert isinstance(item, Reset)
            assert item.lost == (2, dropped[1])
            assert sorted(item.state.workers) == ["a", "b"]
        reg.update("b", meta={"n": 9})
        compact(reg, gc=False, keep_history=0)
    assert verify(place).ok
