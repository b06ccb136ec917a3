"""Archives that are put together: the history is the same, for whoever began to read it before."""

import contextlib
import errno
import gzip
import itertools
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from crewlog import host
from crewlog.errors import (
    ArchiveDamaged,
    CrewlogError,
    DataDamaged,
    SegmentMissing,
    StorageFailed,
)
from crewlog.local import layout, segments
from crewlog.local.layout import Directory
from crewlog.model.chain import Position
from crewlog.model.events import Event
from crewlog.process import identity
from crewlog.registry import Registry
from crewlog_compactor import KeepEvents, compact, repair, verify
from crewlog_compactor.local import archive
from crewlog_compactor.retention import Keep
from faults import FailingDisk, Fault, another_boot, only, registry_on
from procs import files
from stores import limit, opened

pytestmark = pytest.mark.limits(archives_small=4)
HOSTILE = {"type": "_segment", "x": '{"v":1,"seq":9,"ts":"","type":"_segment"'}


def compacted(reg: Registry, times: int) -> None:
    """Make so many changes, each with a compaction of its own."""
    for _ in range(times):
        reg.update("a", meta={"n": reg.last_seq, **HOSTILE})
        compact(reg, gc=False)


def archived(place: Path) -> list[str]:
    """Name the files of archived segments."""
    return sorted(path.name for path in (place / layout.ARCHIVE).glob("*.jsonl.*"))


def lines_of(history: Iterator[Event]) -> list[tuple[int, bytes]]:
    """Return events by seq, with their lines."""
    return [(event.seq, event.raw) for event in history]


def test_the_history_is_the_same_and_the_files_are_few(place: Path) -> None:
    """Forwards, backwards, from each seq on, the state at each seq, and at the time of each."""
    limit(archives_small=10_000)
    with opened(place) as reg:
        reg.register("a")
        compacted(reg, 20)
        last = reg.last_seq
        before = (
            lines_of(reg.history()),
            lines_of(reg.history(newest_first=True)),
            {seq: dict(reg.at(seq).workers) for seq in range(1, last)},
            {event.seq: reg.at(event.ts).seq for event in reg.history()},
            {seq: lines_of(reg.history(after=seq))[:3] for seq in range(last - 3)},
        )
        assert len(archived(place)) == 19
    limit(archives_small=4)
    with opened(place) as reg:
        compact(reg, gc=False)
        names = archived(place)
        assert len(names) < 8
        assert any(layout.merged_seqs_of(name) for name in names)
        assert before == (
            [one for one in lines_of(reg.history()) if one[0] <= last],
            [one for one in lines_of(reg.history(newest_first=True)) if one[0] <= last],
            {seq: dict(reg.at(seq).workers) for seq in range(1, last)},
            {event.seq: reg.at(event.ts).seq for event in reg.history() if event.seq <= last},
            {seq: lines_of(reg.history(after=seq))[:3] for seq in range(last - 3)},
        )
        assert verify(place).findings == ()
        compacted(reg, 200)
        assert len(archived(place)) < 8
    assert verify(place).findings == ()


def test_large_archives_stay_as_they_are(reg: Registry, place: Path) -> None:
    """Neither by bytes nor by lines one grows beyond what is read at once."""
    limit(archives_small=4, archive_bytes=3000, archive_lines=10_000)
    with opened(place) as other:
        other.register("a")
        compacted(other, 60)
        sizes = [path.stat().st_size for path in (place / layout.ARCHIVE).glob("*-*")]
        assert len(sizes) > 3
        assert max(sizes) <= 3000
    limit(archives_small=4, archive_lines=20)
    with opened(place) as other:
        compacted(other, 40)
        seqs = [layout.merged_seqs_of(path.name) for path in (place / layout.ARCHIVE).iterdir()]
        newest = sorted(order for order in seqs if order)[-2:]
        assert all(last - first < 20 for first, last in newest)
    assert verify(place).findings == ()


def test_readers_that_began_before_go_on(reg: Registry, place: Path) -> None:
    """At every line, forwards and backwards, and a watch that stood within."""
    reg.register("a")
    limit(archives_small=10_000)
    with opened(place) as other:
        compacted(other, 8)
    length = len(lines_of(reg.history()))
    for at in range(0, length, 3):
        limit(archives_small=10_000)
        with opened(place) as other:
            compacted(other, 5)
        whole = lines_of(reg.history())
        forwards, backwards = reg.history(), reg.history(newest_first=True)
        begun = [list(itertools.islice(lines, at)) for lines in (forwards, backwards)]
        with reg.watch(after=whole[at][0] - 1) as items:
            assert items.next(0) is not None
            limit(archives_small=4)
            with opened(place) as other:
                names = archived(place)
                compact(other, gc=False)
                assert archived(place) != names
            rest = [item.seq for item in items.drain() if item.kind == "change"]
        assert lines_of(iter([*begun[0], *forwards])) == whole
        assert lines_of(iter([*begun[1], *backwards])) == whole[::-1]
        assert rest == [seq for seq, _ in whole[at + 1 :]]


def test_a_segment_within_is_found_by_its_first_seq(reg: Registry) -> None:
    """Just it, from its header to its seal; what is none is missing."""
    reg.register("a")
    log = files(reg)
    firsts: list[int] = []
    contents: dict[int, bytes] = {}
    for _ in range(6):
        compacted(reg, 1)
        for first in log.segments.all():
            with log.segments.open(first) as source:
                if layout.merged_seqs_of(source.name) is None:
                    contents[first] = source.whole()
        firsts = sorted({*firsts, *log.segments.all()})
    merged = [first for first in firsts if log.segments.is_merged(first)]
    assert len(merged) >= 3
    for first in merged:
        with log.segments.open(first) as source:
            assert source.whole() == contents[first]
    with pytest.raises(SegmentMissing):
        log.segments.open(merged[0] + 1)


def test_writers_look_through_what_was_merged_meanwhile(reg: Registry) -> None:
    """Between two segments that a writer reads, the next one moves into a merged archive."""
    reg.register("a")
    compacted(reg, 3)
    log = files(reg)
    head = log.head()
    whole = b"".join(segments.raw_between(log.segments, Position(1, 0, 0), head.position))
    parts = segments.raw_between(log.segments, Position(1, 0, 0), head.position)
    lines = [next(parts)]
    compacted(reg, 4)
    assert any("-" in one.name for one in segments.archives(log.directory))
    assert b"".join([*lines, *parts]) == whole


@pytest.mark.parametrize("call", ["unlink", "rename", "sync_directory"])
def test_a_merge_that_ends_in_the_middle_is_finished(place: Path, call: str) -> None:
    """What it covers is looked at by nobody; the next compaction takes it away."""
    disk = FailingDisk()
    limit(archives_small=10_000)
    with opened(place) as reg:
        reg.register("a")
        compacted(reg, 8)
    limit(archives_small=4)
    reg = registry_on(place, disk)
    whole = lines_of(reg.history())
    log = files(reg)
    disk.fault = only(call, 5)
    with pytest.raises((StorageFailed, OSError)):
        archive.merge(log.segments, packing="gzip")
    disk.fault = lambda _: None
    assert lines_of(reg.history()) == whole
    assert lines_of(reg.history(newest_first=True)) == whole[::-1]
    assert verify(place).findings == ()
    compact(reg, gc=False)
    assert segments.covered_archives(log.directory) == []
    assert [one for one in lines_of(reg.history()) if one[0] <= whole[-1][0]] == whole
    assert verify(place).findings == ()
    reg.close()


def test_a_damaged_one_stays_apart(reg: Registry, place: Path) -> None:
    """The compaction goes on, verify names it, and its bytes are not touched."""
    reg.register("a")
    compacted(reg, 3)
    harmed = place / layout.ARCHIVE / archived(place)[1]
    data = bytearray(harmed.read_bytes())
    data[len(data) // 2] ^= 1
    harmed.write_bytes(data)
    compacted(reg, 5)
    assert harmed.read_bytes() == data
    assert {finding.code for finding in verify(place).findings} == {"archive_damaged"}


def test_a_stray_one_makes_nothing_go(place: Path, tmp_path: Path) -> None:
    """Another store's merged archive, copied in by mistake: told, and nothing of ours goes."""
    with opened(tmp_path / "other") as other:
        other.register("a")
        compacted(other, 12)
    stray = next(name for name in archived(tmp_path / "other") if "-" in name)
    limit(archives_small=10_000)
    with opened(place) as reg:
        reg.register("a")
        compacted(reg, 12)
        before = archived(place)
        whole = lines_of(reg.history())
        shutil.copyfile(tmp_path / "other" / layout.ARCHIVE / stray, place / layout.ARCHIVE / stray)
        (place / layout.ARCHIVE / stray).chmod(0o600)
        codes = {finding.code for finding in verify(place).findings}
        assert "archive_foreign" in codes
        with contextlib.suppress(DataDamaged):
            compacted(reg, 1)
        (place / layout.ARCHIVE / stray).unlink()
        assert set(before) <= set(archived(place))
        assert [one for one in lines_of(reg.history()) if one[0] <= whole[-1][0]] == whole
    assert verify(place).findings == ()


def test_a_copy_that_took_nothing_away_loses_nothing(place: Path, tmp_path: Path) -> None:
    """`cp -a` again and again: segments lie in log/ that a merged archive holds as well."""
    copy = tmp_path / "copy"
    with opened(place) as reg:
        reg.register("a")
        for _ in range(12):
            compacted(reg, 1)
            shutil.copytree(place, copy, dirs_exist_ok=True)
        whole = lines_of(reg.history())
    assert verify(copy).findings == ()
    with opened(copy) as there:
        compacted(there, 2)
        assert [one for one in lines_of(there.history()) if one[0] <= whole[-1][0]] == whole
    assert verify(copy).findings == ()


def test_a_name_that_covers_more_than_there_is_hides_nothing_for_good(
    place: Path, tmp_path: Path
) -> None:
    """A stray archive beyond our last one: what is archived beside it is in a file of its own."""
    with opened(tmp_path / "other") as other:
        other.register("a")
        compacted(other, 60)
    stray = next(name for name in archived(tmp_path / "other") if "-" in name)
    with opened(place) as reg:
        reg.register("a")
        compacted(reg, 5)
    shutil.copyfile(tmp_path / "other" / layout.ARCHIVE / stray, place / layout.ARCHIVE / stray)
    (place / layout.ARCHIVE / stray).chmod(0o600)
    with opened(place) as reg:
        compacted(reg, 8)
        assert verify(place).findings != ()
        with contextlib.suppress(DataDamaged):
            compact(reg, gc=False, keep_history=KeepEvents(0))
        assert repair(place, yes=True).losses == ()
        assert reg.first_seq == 1
        seqs = [event.seq for event in reg.history()]
        assert seqs == sorted(set(seqs))
        assert len(seqs) == 14
    assert verify(place).findings == ()


@pytest.mark.parametrize(
    "harm",
    [
        "empty", "cut", "another's place", "another history's",
        "another store's", "another store's first",
    ],
)  # fmt: skip
def test_what_does_not_join_stays_apart(place: Path, tmp_path: Path, harm: str) -> None:
    """It is told by verify, harms no compaction, and is put back from a backup as a file."""
    limit(archives_small=10_000)
    for where in (place, tmp_path / "other"):
        with opened(where) as reg:
            reg.register("a")
            compacted(reg, 8)
    other = tmp_path / "other"
    if harm == "another history's":  # the same store, which went another way from its second change
        shutil.rmtree(other)
        shutil.rmtree(place)
        with opened(place) as reg:
            reg.register("a")
            compacted(reg, 1)
        shutil.copytree(place, other)
        for where in (place, other):
            with opened(where) as reg:
                compacted(reg, 7)
    names = archived(place)
    harmed = place / layout.ARCHIVE / names[0 if harm.endswith("first") else 3]
    right = harmed.read_bytes()
    match harm:
        case "empty":
            harmed.write_bytes(b"")
        case "cut":
            harmed.write_bytes(gzip.compress(gzip.decompress(right)[:300]))
        case "another store's" | "another store's first" | "another history's":
            shutil.copyfile(other / layout.ARCHIVE / harmed.name, harmed)
        case _:
            shutil.copyfile(place / layout.ARCHIVE / names[2], harmed)
    harmed.chmod(0o600)
    limit(archives_small=4)
    with opened(place) as reg:
        compacted(reg, 3)
        assert verify(place).findings != ()
        assert harmed.exists()
        harmed.write_bytes(right)
        assert verify(place).findings == ()
        compacted(reg, 4)
        assert len(archived(place)) < 8
    assert verify(place).findings == ()


def test_an_empty_archive_ends_a_writers_look(reg: Registry, place: Path) -> None:
    """It is damage, and no reason to look for ever."""
    limit(archives_small=10_000)
    reg.register("a")
    with opened(place) as other:
        compacted(other, 4)
    (place / layout.ARCHIVE / archived(place)[1]).write_bytes(b"")
    log = files(reg)
    with pytest.raises(ArchiveDamaged, match="empty"):
        list(segments.raw_between(log.segments, Position(1, 0, 0), log.head().position))


@pytest.mark.parametrize("kind", ["link", "directory", "garbage", "mode"])
@pytest.mark.parametrize(
    "seqs", [(5, 10**20 - 1), (1, 3), (10**20 - 1, None)], ids=["from 5", "to 3", "far"]
)
def test_files_of_strange_names_are_told_and_block_nothing(
    reg: Registry, place: Path, seqs: tuple[int, int | None], kind: str
) -> None:
    """Compactions, verify and repair go on, typed; the history is whole once the file is away."""
    limit(archives_small=10_000)
    reg.register("a")
    with opened(place) as other:
        compacted(other, 6)
        whole = lines_of(other.history())
    first, last = seqs
    name = layout.archive_name(first) if last is None else layout.merged_name(first, last, "gzip")
    stray = place / layout.ARCHIVE / name
    match kind:
        case "link":
            stray.symlink_to("/etc/passwd")
        case "directory":
            stray.mkdir()
        case _:
            stray.write_bytes(b"garbage")
            stray.chmod(0o644 if kind == "mode" else 0o600)
    limit(archives_small=4)
    with opened(place) as other:
        for keep in (None, KeepEvents(0)):
            with contextlib.suppress(CrewlogError):
                compact(other, gc=False, keep_history=keep)
    assert verify(place).findings != ()
    with contextlib.suppress(CrewlogError):
        repair(place, yes=True)
    with contextlib.suppress(FileNotFoundError):  # where repair has set it aside
        stray.rmdir() if kind == "directory" else stray.unlink()
    with opened(place) as other:
        assert [one for one in lines_of(other.history()) if one[0] <= whole[-1][0]] == whole
    assert verify(place).findings == ()


@pytest.mark.parametrize("kind", ["events", "time", "bytes"])
def test_retention_goes_within_merged_ones(
    place: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much goes as would where none is merged; the dry run says so; what stays is as it was."""
    kept: dict[int, list[int]] = {}
    for few in (4, 10_000):
        where = place / str(few)
        limit(archives_small=few)
        with opened(where) as reg:
            reg.register("a")
            compacted(reg, 40)
            moment = datetime.now(UTC)
            compacted(reg, 15)
            whole = lines_of(reg.history())
            size = sum(path.stat().st_size for path in (where / layout.ARCHIVE).glob("*.jsonl.*"))
            asked_at = datetime.now(UTC)
            choices: dict[str, Keep] = {
                "events": KeepEvents(70), "time": asked_at - moment, "bytes": size // 2,
            }  # fmt: skip
            keep = choices[kind]
            with monkeypatch.context() as clock:  # it stands while the policy is asked
                clock.setattr(host, "now", lambda asked_at=asked_at: asked_at)
                foretold = compact(reg, gc=False, keep_history=keep, dry_run=True).dropped
                dropped = compact(reg, gc=False, keep_history=keep).dropped
            assert dropped is not None
            assert foretold == dropped
            assert reg.first_seq == dropped[1] + 1
            left = lines_of(reg.history())
            assert left == [one for one in whole if one[0] > dropped[1]]
            assert set(reg.at(reg.first_seq).workers) == {"a"}
            assert verify(where).findings == ()
            kept[few] = [seq for seq, _ in left]
            compacted(reg, 6)
            assert verify(where).findings == ()
    if kind == "bytes":  # a merged one packs better, and is measured as a whole
        assert len(kept[4]) > 10
    else:
        assert abs(len(kept[4]) - len(kept[10_000])) <= 2


def test_steady_retention_keeps_as_much_as_it_says(place: Path) -> None:
    """Round by round, merges and all: neither more and more, nor too little."""
    with opened(place) as reg:
        reg.register("a")
        lines = []
        for _ in range(60):
            reg.update("a", meta={"n": reg.last_seq})
            compact(reg, gc=False, keep_history=KeepEvents(50))
            lines.append(reg.last_seq - reg.first_seq + 1)
        assert max(lines[20:]) <= 60
        assert min(lines[20:]) >= 50
    assert verify(place).findings == ()


@pytest.mark.parametrize("lost", ["head", "snapshots", "both"])
def test_repair_takes_no_archive_for_a_stray(reg: Registry, place: Path, lost: str) -> None:
    """However little is known of how far the log came."""
    reg.register("a")
    compacted(reg, 12)
    whole = lines_of(reg.history())
    reg.close()
    if lost in {"head", "both"}:
        (place / layout.HEAD / layout.HEAD_DURABLE).unlink()
    if lost in {"snapshots", "both"}:
        (place / layout.SNAPSHOT).unlink()
        (place / layout.SNAPSHOT_PREV).unlink()
    before = archived(place)
    report = repair(place, yes=True)
    assert (report.losses, report.aside) == ((), ())
    assert archived(place) == before
    with opened(place) as fresh:
        assert lines_of(fresh.history()) == whole
        compacted(fresh, 2)
    assert {finding.code for finding in verify(place).findings} <= {"snapshot_regressed"}


def test_without_zstd_a_compaction_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives that cannot be unpacked here stay as they are."""
    pytest.importorskip("zstandard")
    limit(archives_small=10_000)
    with opened(place) as reg:
        reg.register("a")
        for _ in range(8):
            reg.update("a", meta={"n": reg.last_seq})
            compact(reg, gc=False, packing="zstd")
    limit(archives_small=4)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with opened(place) as reg:
        compacted(reg, 8)
        assert sum(name.endswith(".zst") for name in archived(place)) == 7
    monkeypatch.undo()
    with opened(place) as reg:
        compact(reg, gc=False)
        assert len(lines_of(reg.history())) == 17
        assert len(archived(place)) < 8
    assert verify(place).findings == ()


def _after(count: int, call: str) -> Fault:
    """Fail every call of one name but for the first ones."""
    met = itertools.count()
    return lambda name: errno.EIO if name == call and next(met) >= count else None


def test_a_drop_that_was_killed_is_finished(place: Path) -> None:
    """The rest of a merged archive is in place, and the whole of it, too: nothing twice."""
    for call in ("rename", "unlink"):
        disk = FailingDisk()
        where = place / call
        with opened(where) as reg:
            reg.register("a")
            compacted(reg, 30)
        reg = registry_on(where, disk)
        disk.fault = _after(3 if call == "rename" else 2, call)
        with contextlib.suppress(CrewlogError):
            compact(reg, gc=False, keep_history=KeepEvents(60))
        disk.fault = lambda _: None
        seqs = [seq for seq, _ in lines_of(reg.history())]
        assert seqs == sorted(set(seqs))
        compact(reg, gc=False)
        assert verify(where).findings == ()
        assert segments.covered_archives(files(reg).directory) == []
        reg.close()


def test_archives_that_changed_places_end_a_verification(place: Path) -> None:
    """Each holds what the other's name says: that is told, and it does not go round for ever."""
    limit(archives_small=4, archive_lines=20)
    with opened(place) as reg:
        reg.register("a")
        compacted(reg, 30)
    one, other = [place / layout.ARCHIVE / name for name in archived(place) if "-" in name][:2]
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert verify(place).findings != ()


def test_many_archives_are_opened_without_a_look_at_all(
    reg: Registry, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens one asks for its name: a list of all for each would take for ever."""
    limit(archives_small=10_000)
    reg.register("a")
    with opened(place) as other:
        compacted(other, 30)
    listed: list[int] = []
    real = segments.archives

    def counted(directory: Directory) -> list[segments.Archive]:
        listed.append(1)
        return real(directory)

    monkeypatch.setattr(segments, "archives", counted)
    assert len(lines_of(reg.history())) == 31
    assert len(listed) < 15


def test_a_damaged_merged_one_is_given_up_as_a_whole(reg: Registry, place: Path) -> None:
    """And only it: what is before and after it stays, and the next change goes on."""
    reg.register("a")
    limit(archives_small=4, archive_lines=20)
    with opened(place) as other:
        compacted(other, 30)
    names = [name for name in archived(place) if "-" in name]
    lost = layout.merged_seqs_of(names[1])
    assert lost is not None
    (place / layout.ARCHIVE / names[1]).write_bytes(b"not an archive")
    assert repair(place, yes=False).losses == (lost,)
    assert repair(place, yes=True, accept_loss=[lost]).done
    assert verify(place).findings == ()
    with opened(place) as fresh:
        fresh.update("a", meta={})
        left = [event.seq for event in fresh.history()]
        assert not {*range(lost[0], lost[1] + 1)} & {*left}
        assert min(left) < lost[0] < lost[1] < max(left)
        compacted(fresh, 10)
    assert verify(place).findings == ()


def test_a_boot_is_told_by_the_headers_within(reg: Registry, place: Path) -> None:
    """Since which seq all was written in this boot: also where a merged archive spans two."""
    reg.register("a")
    compacted(reg, 2)
    before = reg.last_seq
    with another_boot(3):
        boot = identity.boot_id()
        with opened(place) as later:
            compacted(later, 1)
            since = files(later).since_boot(boot)
            assert since is not None
            assert since > before
            compacted(later, 5)
            (merged,) = [name for name in archived(place) if "-" in name]
            assert since <= (layout.merged_seqs_of(merged) or (0, 0))[1]
            assert files(later).since_boot(boot) == since
