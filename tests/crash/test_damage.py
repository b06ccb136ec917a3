"""Whatever happens to the bytes of a store, verify finds it, and nobody is shown anything else.

A small store with an archive, two snapshots, sealed and active segments and a cursor is damaged in
every way: each byte, each truncation, each block zeroed; lines and files swapped, dropped, doubled,
taken from another store; snapshots that are older or newer than the log.
"""

import gzip
import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crewlog.errors import CrewlogError, DataDamaged, LogCorrupt
from crewlog.local import heads, layout
from crewlog.model import codec
from crewlog_compactor import compact, verify
from faults import active_segment, empty_redo
from stores import opened

pytestmark = [pytest.mark.long, pytest.mark.limits(redo_bytes=4096)]

# What tells of nothing that must be kept: locks are empty, a beat is a beat.
NOT_DATA = {layout.LOCKS, layout.LEASES}


def small(place: Path, *, sids: str = "ab") -> None:
    """Make a store that has one of everything."""
    with opened(place) as reg:
        for turn in range(3):
            for sid in sids:
                reg.register(f"{sid}{turn}")
            if turn < 2:
                compact(reg, gc=False)
        with reg.batch() as batch:
            for sid in sids:
                batch.update(f"{sid}2", state="ready")
        with reg.watch(cursor="c", after="oldest"):
            pass


def files(place: Path) -> list[Path]:
    """Return the files that hold data."""
    return [
        path
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.relative_to(place).parts[0] not in NOT_DATA
    ]


class Story:
    """What a sound store tells: its events, by seq."""

    def __init__(self, place: Path) -> None:
        """Read it."""
        with opened(place) as reg:
            self.events = {event.seq: event.raw for event in reg.history()}
            self.workers = [(w.sid, w.state, w.rev) for w in reg.workers()]

    def holds_against(self, place: Path) -> None:
        """Hold what a damaged store shows against it: the same, a beginning of it, or an error."""
        try:
            with opened(place) as reg:
                for event in reg.history():
                    assert self.events[event.seq] == event.raw, "an event that never was"
                shown = [(w.sid, w.state, w.rev) for w in reg.workers()]
        except CrewlogError:
            return
        assert shown == self.workers or len(shown) < len(self.workers), "another state is shown"


def is_reported(place: Path) -> bool:
    """Say whether verify reports anything, in whatever way."""
    try:
        report = verify(place)
        return not report.ok or bool(report.notes)  # a note: the next change mends it by itself
    except CrewlogError:
        return True


def _tolerated(path: Path, place: Path, data: bytes) -> bool:
    """Say whether nothing is lost: bits that gzip does not use, the older slot of a cursor."""
    if path.suffix == ".gz":
        try:
            return gzip.decompress(path.read_bytes()) == gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return False
    if path.name == layout.REDO:
        return path.read_bytes()[: live(place)] == data[: live(place)] != b""
    if path.relative_to(place).parts[0] != layout.CURSORS:
        return False
    half = len(data) // 2
    now = path.read_bytes()
    return now[:half] == data[:half] or now[half:] == data[half:]


def live(place: Path) -> int:
    """Return how many bytes of the redo hold anything."""
    state = heads.decode_append_state((place / layout.APPEND_STATE).read_bytes())
    assert state is not None
    return state.kept - state.base


def each_byte(place: Path, values: Callable[[int], Iterator[int]]) -> int:
    """Set every byte to every given value; return how many cases there were."""
    story, cases = Story(place), 0
    for path in files(place):
        data = path.read_bytes()
        for index, old in enumerate(data):
            for value in values(old):
                changed = data[:index] + bytes([value]) + data[index + 1 :]
                path.write_bytes(changed)
                if not _tolerated(path, place, data):
                    assert is_reported(place), (path, index, old, value)
                cases += 1
                if cases % 97 == 0:
                    story.holds_against(place)
        path.write_bytes(data)
    assert not is_reported(place)
    return cases


def test_every_byte_flipped_is_found(fast: Path) -> None:
    """One bit of each byte, which bit depends on the byte."""
    place = fast / "store"
    small(place)
    assert each_byte(place, lambda old: iter([old ^ (1 << old % 8)])) > 5000


@pytest.mark.soak
def test_every_byte_to_every_value_is_found(fast: Path) -> None:
    """Over a hundred thousand cases, by hand (more than an hour)."""
    place = fast / "store"
    small(place, sids="a")
    cases = each_byte(place, lambda old: (value for value in range(256) if value != old))
    assert cases > 100_000


def test_every_truncation_and_zeroed_block_is_found(fast: Path) -> None:
    """Each length of each file; each 512-byte block of zeros, as a lost page leaves it."""
    place = fast / "store"
    small(place)
    story = Story(place)
    for path in files(place):
        data = path.read_bytes()
        for length in range(len(data)):
            path.write_bytes(data[:length])
            assert is_reported(place) or _tolerated(path, place, data), (path, length)
        for at in range(0, len(data), 512):
            size = min(512, len(data) - at)
            if data[at : at + size] == b"\0" * size:
                continue
            path.write_bytes(data[:at] + b"\0" * size + data[at + size :])
            assert is_reported(place) or _tolerated(path, place, data), (path, at)
            story.holds_against(place)
        path.write_bytes(data)
    assert not is_reported(place)


def rows_of(path: Path) -> list[bytes]:
    """Return a segment's lines."""
    data = path.read_bytes()
    plain = gzip.decompress(data) if path.suffix == ".gz" else data
    return plain.splitlines(keepends=True)


def put_rows(path: Path, rows: list[bytes]) -> None:
    """Write a segment's lines."""
    data = b"".join(rows)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def segments_of(place: Path) -> list[Path]:
    """Return every segment, archived first."""
    return [p for f in (layout.ARCHIVE, layout.LOG) for p in sorted((place / f).iterdir())]


def test_lines_swapped_dropped_and_doubled_are_found(fast: Path) -> None:
    """Each line with each other one of its segment; each without, each twice."""
    place = fast / "store"
    small(place)
    story = Story(place)
    for path in segments_of(place):
        rows, data = rows_of(path), path.read_bytes()
        for one, other in itertools.combinations(range(len(rows)), 2):
            swapped = rows.copy()
            swapped[one], swapped[other] = rows[other], rows[one]
            put_rows(path, swapped)
            assert is_reported(place), (path, one, other)
            story.holds_against(place)
        for index in range(len(rows)):
            put_rows(path, rows[:index] + rows[index + 1 :])
            assert is_reported(place), (path, index)
            story.holds_against(place)
            put_rows(path, rows[: index + 1] + rows[index:])
            tail = path == active_segment(place) and index == len(rows) - 1
            assert is_reported(place) or tail, "behind the durable end it is a tail, to be cut"
            story.holds_against(place)
        path.write_bytes(data)


def test_files_removed_swapped_and_taken_from_another_store_are_found(
    fast: Path, tmp_path: Path
) -> None:
    """Each file without, each with each other one's content, each with another store's."""
    place, other = fast / "store", fast / "other"
    small(place)
    small(other, sids="xy")
    story = Story(place)
    kept = files(place)
    contents = {path: path.read_bytes() for path in kept}
    for path in kept:
        if path.relative_to(place).parts[0] == layout.CURSORS:
            continue  # a cursor is its subscriber's, not the history's
        path.rename(fast / "aside")
        if path.name != layout.SNAPSHOT_PREV:  # before the second compaction there is none
            assert is_reported(place), path
        story.holds_against(place)
        (fast / "aside").rename(path)  # the same file: head/durable tells where it was written
        for stranger in kept:
            if contents[stranger] != contents[path]:
                path.write_bytes(contents[stranger])
                # a compaction that is killed between its two renames leaves both the same
                both = (path.name, stranger.name) == (layout.SNAPSHOT_PREV, layout.SNAPSHOT)
                assert is_reported(place) != both, (path, stranger)
                story.holds_against(place)
        theirs = other / path.relative_to(place)
        if theirs.exists() and theirs.read_bytes() != contents[path]:
            path.write_bytes(theirs.read_bytes())
            assert is_reported(place), path
            story.holds_against(place)
        path.write_bytes(contents[path])
    assert not is_reported(place)


def test_snapshot_older_or_newer_than_the_log(fast: Path) -> None:
    """An older one is what two generations are for; a newer one proves that the log was cut."""
    place = fast / "store"
    small(place)
    story = Story(place)
    newer, older = place / layout.SNAPSHOT, place / layout.SNAPSHOT_PREV
    kept = newer.read_bytes()
    newer.write_bytes(older.read_bytes())
    with opened(place) as reg:
        assert [(w.sid, w.state, w.rev) for w in reg.workers()] == story.workers
    newer.write_bytes(kept)
    for path in segments_of(place)[-2:]:
        path.unlink()
    assert is_reported(place)
    with opened(place) as reg, pytest.raises(DataDamaged):
        reg.register("after")


def test_verdict_on_a_byte_follows_what_was_durable(fast: Path) -> None:
    """Each byte of the active segment: damage before the durable end, a torn tail behind it."""
    place = fast / "store"
    with opened(place) as reg:
        reg.register("a")
        reg.register("b")
    empty_redo(place)  # which would mend it
    segment = active_segment(place)
    durable = segment.read_bytes()
    tail = b'{"v":1,"seq":4,"ts":"2026-11-24T07:26:36.000000Z","half'
    for index in range(len(durable)):
        segment.write_bytes(durable[:index] + bytes([durable[index] ^ 1]) + durable[index + 1 :])
        with opened(place) as reg, pytest.raises(DataDamaged):
            reg.workers()
    for length in range(1, len(tail)):
        segment.write_bytes(durable + tail[:length])
        with opened(place) as reg:
            assert [w.sid for w in reg.workers()] == ["a", "b"]
    with opened(place) as reg:
        assert reg.register("c").rev == 5, "seq 4 tells of the cut"
    assert verify(place).ok


def test_line_with_a_right_crc_and_a_wrong_shape_is_damage_never_a_traceback(fast: Path) -> None:
    """Deep, long, doubled, huge, NUL, invalid UTF-8, wrong types: each under a valid checksum."""
    place = fast / "store"
    with opened(place) as reg:
        reg.register("a")
        reg.register("b")
    empty_redo(place)  # which would mend it
    segment = active_segment(place)
    rows = segment.read_bytes().splitlines(keepends=True)
    body, tail = rows[1].rsplit(b',"prev":', 1)
    prev = tail.split(b'"')[1]
    deep = b'"data":' + b'{"a":' * 100 + b"1" + b"}" * 100
    hostile = [
        body.replace(b'"data":{', b'"data":' + b"[" * 2000 + b"{"),
        body.replace(b'"data":{', deep + b',"x":{'),
        body.replace(b'"seq":2', b'"seq":2,"seq":2'),
        body.replace(b'"seq":2', b'"seq":' + b"9" * 40),
        body.replace(b'"seq":2', b'"seq":2.0'),
        body.replace(b'"seq":2', b'"seq":true'),
        body.replace(b'"sid":"a"', b'"sid":"\x00"'),
        body.replace(b'"sid":"a"', b'"sid":"\xff\xfe"'),
        body.replace(b'"sid":"a"', b'"sid":["a"]'),
        body.replace(b'"sid":"a"', b'"sid":"\\ud800"'),
        body.replace(b'"type":"worker.registered"', b'"type":"_unheard"'),
        body.replace(b'"pid":', b'"pid":"x","was":'),
        body.replace(b'"pid":', b'"pid":-1,"was":'),
        body.replace(b'"labels":{}', b'"labels":7'),
        body.replace(b'"state":"starting"', b'"state":"asleep"'),
        body.replace(b'"data":{', b'"data":{"pad":"' + b"x" * (2 << 20) + b'",'),
        b"null", b"[]", b"{}", b'"', b"",
    ]  # fmt: skip
    for part in hostile:
        checked = part + b',"prev":"' + prev + b'"'
        crc = f"{zlib.crc32(checked):08x}".encode()
        forged = checked + b',"crc":"' + crc + b'"}\n'
        after = codec.parse(rows[2].rstrip())
        assert after["seq"] == 3
        segment.write_bytes(rows[0] + forged + rows[2])
        with opened(place) as reg, pytest.raises(CrewlogError):
            reg.workers()
        assert is_reported(place), part[:200]


def test_compaction_tells_of_damage_that_it_was_about_to_archive(place: Path) -> None:
    """The snapshot covers it, so nobody reads it any more; but it must not be packed unsaid."""
    with opened(place) as reg:
        for number in range(3):
            reg.register(f"w{number}", meta={"n": number})
            if number < 2:
                compact(reg, gc=False)
        before = reg.workers()
        names = sorted((place / layout.LOG).iterdir())
        damaged = next(path for path in names if b'"w1"' in path.read_bytes())
        data = damaged.read_bytes()
        damaged.write_bytes(data.replace(b'"n":1', b'"n":9'))
        for _ in range(2):
            with pytest.raises(LogCorrupt, match="it was whole"):
                compact(reg, gc=False)
            assert reg.compacted()[0] > before[-1].rev  # type: ignore[index]
        assert damaged.exists(), "it is not moved"
        assert reg.workers() == before, "the state is whole"
        damaged.write_bytes(data)
        compact(reg, gc=False)
        assert not damaged.exists()
    assert verify(place).ok


def test_retention_does_not_drop_what_it_cannot_fold(place: Path) -> None:
    """A damaged archive stays for repair, or a backup: its loss would be silent otherwise."""
    with opened(place) as reg:
        for number in range(4):
            reg.register(f"w{number}")
            compact(reg, gc=False)
        archived = sorted((place / layout.ARCHIVE).iterdir())
        whole = archived[0].read_bytes()
        archived[0].write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        before = sorted(path.name for path in (place / layout.ARCHIVE).iterdir())
        with pytest.raises(DataDamaged):
            compact(reg, gc=False, keep_history=0)
        assert sorted(path.name for path in (place / layout.ARCHIVE).iterdir()) == before
        archived[0].write_bytes(whole)
        assert compact(reg, gc=False, keep_history=0).dropped is not None
    assert verify(place).ok
