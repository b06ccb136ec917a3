"""The past: what happened, and what the state was, at every seq and at any time."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from crewlog import host
from crewlog.errors import ArchiveDamaged, CompactedError, SnapshotCorrupt, Unsupported
from crewlog.local import layout, snapshot
from crewlog.local.layout import Directory
from crewlog.local.segments import Segment, Segments
from crewlog.model import events
from crewlog.model.arguments import Packing
from crewlog.model.snapshot import Snapshot
from crewlog.registry import Registry
from crewlog_compactor import KeepEvents, compact, repair, verify
from procs import files
from stores import opened

BEGAN = datetime(2026, 11, 24, 7, 0, tzinfo=UTC)


class Clock:
    """A clock that a test sets."""

    at = BEGAN


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let the log tell the time that the test sets."""
    clock = Clock()
    monkeypatch.setattr(host, "now", lambda: clock.at)
    return clock


def _change(reg: Registry, number: int) -> None:
    """Make one change after the other: come, be patched, end, come again, be released."""
    sid = f"w{number // 5 % 4}"
    match number % 5:
        case 0:
            reg.register(sid, labels={"n": str(number)})
        case 1:
            reg.update(sid, state="ready")
        case 2:
            reg.update(sid, labels={"n": str(number)})
        case 3:
            reg.exited(sid, code=number % 3)
        case _:
            reg.register(sid)
            reg.remove(sid, reason="handed over")


def _grown(reg: Registry, changes: int) -> dict[int, dict[str, object]]:
    """Change a store; return the state after each seq that was seen."""
    seen: dict[int, dict[str, object]] = {}
    for number in range(changes):
        _change(reg, number)
        state = reg.state()
        seen[state.seq] = dict(state.workers)
    return seen


@pytest.mark.limits(segment_bytes=4096)
def test_state_at_every_seq_is_what_it_was(reg: Registry) -> None:
    """Through segments, two snapshots and the archive."""
    seen = _grown(reg, 60)
    compact(reg, gc=False)
    seen |= _grown(reg, 40)
    compact(reg, gc=False)
    seen |= _grown(reg, 20)
    for seq, workers in seen.items():
        past = reg.at(seq)
        assert (past.seq, dict(past.workers)) == (seq, workers)
        assert list(past.workers) == list(workers), "in order of registration"
    assert reg.at(0).workers == {}
    assert reg.at(10**9).seq == reg.last_seq


@pytest.mark.limits(segment_bytes=4096)
@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_state_is_known_for_as_long_as_history_is_kept(reg: Registry, packing: Packing) -> None:
    """Retention folds what goes into the state that the archive begins with."""
    seen: dict[int, dict[str, object]] = {}
    for _ in range(4):
        seen |= _grown(reg, 40)
        compact(reg, gc=False, packing=packing)
    dropped = compact(reg, gc=False, keep_history=KeepEvents(60)).dropped
    assert dropped is not None
    oldest = dropped[1] + 1
    assert reg.last_seq - oldest >= 60, "at least as many as were asked for are kept"
    for seq, workers in seen.items():
        if seq >= oldest - 1:
            assert dict(reg.at(seq).workers) == workers
        else:
            with pytest.raises(CompactedError):
                reg.at(seq)
    assert verify(reg.path).findings == ()
    lives = reg.lives()
    assert {life.sid for life in lives} <= {"w0", "w1", "w2", "w3"}


@pytest.mark.limits(segment_bytes=4096)
def test_second_retention_goes_on_from_the_state_of_the_first(reg: Registry) -> None:
    """The state that the archive begins with moves along."""
    for _ in range(3):
        _grown(reg, 40)
        compact(reg, gc=False)
    compact(reg, gc=False, keep_history=KeepEvents(80))
    first = snapshot.read_base(files(reg).directory)
    _grown(reg, 40)
    compact(reg, gc=False)
    compact(reg, gc=False)
    assert compact(reg, gc=False, keep_history=0).dropped is not None
    second = snapshot.read_base(files(reg).directory)
    assert first is not None
    assert second is not None
    assert first.last_seq < second.last_seq
    assert reg.at(second.last_seq).seq == second.last_seq
    assert verify(reg.path).findings == ()


@pytest.mark.limits(segment_bytes=4096)
@pytest.mark.parametrize("harm", ["removed", "flipped", "older"])
def test_verify_finds_a_wrong_beginning_of_the_archive(reg: Registry, harm: str) -> None:
    """archive/base.json is held against what its retention told of it."""
    older = b""
    for keep in (80, 30):
        _grown(reg, 60)
        compact(reg, gc=False)
        _grown(reg, 60)
        compact(reg, gc=False, keep_history=KeepEvents(keep))
        path = reg.path / layout.ARCHIVE / layout.BASE
        older, data = (older or path.read_bytes()), path.read_bytes()
    assert older != data
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes(older if harm == "older" else data.replace(b"w1", b"w7", 1))
    codes = {finding.code for finding in verify(reg.path).findings}
    assert codes == {"snapshot_corrupt" if harm == "flipped" else "snapshot_differs"}
    if harm == "flipped":
        with pytest.raises(SnapshotCorrupt):
            snapshot.read_base(files(reg).directory)


@pytest.mark.limits(segment_bytes=4096)
def test_verify_beside_a_retention_takes_its_word(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """archive/base.json was read, then a retention replaced it and told of that: no false alarm."""
    for keep in (80, 30):
        _grown(reg, 60)
        compact(reg, gc=False)
        _grown(reg, 60)
        if keep == 80:
            compact(reg, gc=False, keep_history=KeepEvents(keep))
    before = snapshot.read_base(files(reg).directory)
    real = snapshot.read_base
    read: list[Snapshot | None] = []

    def read_base(directory: Directory) -> Snapshot | None:
        result = real(directory)
        read.append(result)
        if len(read) == 2:  # the first look was where the history begins
            compact(reg, gc=False, keep_history=KeepEvents(30))
        return result

    monkeypatch.setattr(snapshot, "read_base", read_base)
    report = verify(reg.path)
    after = real(files(reg).directory)
    assert before is not None
    assert after is not None
    assert read[1] == before
    assert before.last_seq < after.last_seq, "the retention must have come between"
    assert report.findings == ()


@pytest.mark.limits(segment_bytes=4096)
def test_time_finds_the_state_of_that_time(reg: Registry, clock: Clock) -> None:
    """The last event up to a time decides; the answer says from when to when it holds."""
    for number in range(60):
        clock.at = BEGAN + timedelta(minutes=number)
        _change(reg, number)
    for number in (0, 1, 17, 33, 58):
        past = reg.at(BEGAN + timedelta(minutes=number, seconds=30))
        assert past.since == BEGAN + timedelta(minutes=number)
        assert past.until == BEGAN + timedelta(minutes=number + 1)
        assert past.disputed is None
        assert dict(past.workers) == dict(reg.at(past.seq).workers)
    early = reg.at(BEGAN - timedelta(hours=1))
    assert (early.seq, len(early.workers)) == (0, 0)
    late = reg.at(BEGAN + timedelta(days=1))
    assert (late.seq, late.until) == (reg.last_seq, None)


def test_clock_that_stepped_back_is_named(reg: Registry, clock: Clock) -> None:
    """Events on both sides of the step claim the same time: the answer says which."""
    for minute in (0, 10, 20, 12, 14, 30):
        clock.at = BEGAN + timedelta(minutes=minute)
        reg.register(f"at-{minute}")
    past = reg.at(BEGAN + timedelta(minutes=15))
    events_ = {event.sid: event.seq for event in reg.history()}
    assert past.seq == events_["at-14"]
    assert past.disputed == (events_["at-20"], events_["at-14"])
    assert reg.at(BEGAN + timedelta(minutes=5)).disputed is None


def _hold_against_each_line(reg: Registry, when: datetime) -> None:
    """Hold the answer for a time against every line: the last one up to it, a later one before."""
    stamps = {line["seq"]: line["ts"] for line, _ in reg.store().read(0)}
    stamp = events.timestamp(when)
    last = max((seq for seq, ts in stamps.items() if ts <= stamp), default=0)
    later = {seq for seq, ts in stamps.items() if ts > stamp and seq < last}
    past = reg.at(when)
    assert past.seq == last
    assert (past.disputed is not None) == bool(later)
    if past.disputed is not None:
        assert past.disputed[0] in later
        assert past.disputed[1] == last


@pytest.mark.parametrize("rounds", [1, 3, 8])
@pytest.mark.parametrize("before", ["part", "ahead"])
def test_clock_that_steps_back_within_a_part_hides_nothing(
    reg: Registry, clock: Clock, before: str, rounds: int
) -> None:
    """The part begins later than its lines, so its beginning does not tell of them."""
    if before == "part":
        reg.register("a")
    for _ in range(rounds):
        clock.at += timedelta(hours=1)
        reg.register(f"ahead-{clock.at.hour}")
        compact(reg, gc=False)
    clock.at = BEGAN + timedelta(minutes=5)
    reg.register("set-right")
    for minutes in (20, 300):
        clock.at = BEGAN + timedelta(minutes=minutes)
        reg.register(f"at-{minutes}")
        compact(reg, gc=False)
    for minutes in (-10, 2, 10, 30, 70, 200, 400, 600):
        _hold_against_each_line(reg, BEGAN + timedelta(minutes=minutes))


def test_clock_that_steps_back_within_the_newest_part_hides_nothing(
    reg: Registry, clock: Clock
) -> None:
    """Nothing follows it yet that would begin earlier."""
    reg.register("a")
    for hour in (1, 2, 3):
        clock.at = BEGAN + timedelta(hours=hour)
        reg.register(f"ahead-{hour}")
        compact(reg, gc=False)
    clock.at = BEGAN + timedelta(minutes=5)
    reg.register("set-right")
    for minutes in (2, 10, 70, 200):
        _hold_against_each_line(reg, BEGAN + timedelta(minutes=minutes))


def test_step_back_that_is_shorter_than_a_part_hides_nothing(reg: Registry, clock: Clock) -> None:
    """No part begins before its predecessor: the one that follows the time is looked into."""
    reg.register("a")
    clock.at = BEGAN + timedelta(minutes=5)
    compact(reg, gc=False)
    clock.at = BEGAN + timedelta(minutes=5, seconds=-0.6)
    reg.register("b")
    clock.at = BEGAN + timedelta(minutes=10)
    reg.register("c")
    compact(reg, gc=False)
    when = BEGAN + timedelta(minutes=5, seconds=-0.5)
    assert "b" in reg.at(when).workers
    _hold_against_each_line(reg, when)


@pytest.mark.limits(segment_bytes=4096)
def test_newest_first_is_the_history_backwards(reg: Registry) -> None:
    """Through segments and archive, with every filter."""
    _grown(reg, 60)
    compact(reg, gc=False)
    _grown(reg, 30)
    compact(reg, gc=False, packing="zstd")
    _grown(reg, 10)
    middle = list(reg.history())[40]
    for options in (
        {}, {"sid": "w1"}, {"types": ["worker.exited", "_segment"]}, {"after": 50},
        {"since": middle.ts}, {"until": middle.ts}, {"sid": "w2", "since": middle.ts},
    ):  # fmt: skip
        forwards = list(reg.history(**options))
        assert forwards, "the filter must hold something back, or the test shows nothing"
        assert list(reg.history(**options, newest_first=True)) == forwards[::-1]


@pytest.mark.limits(segment_bytes=4096)
def test_newest_first_reads_no_more_than_it_must(reg: Registry) -> None:
    """The last ten events of a long history come from its last segments."""
    _grown(reg, 100)
    compact(reg, gc=False)
    _grown(reg, 10)
    compact(reg, gc=False)
    archived = sorted((reg.path / layout.ARCHIVE).glob("*.gz"))
    archived[0].write_bytes(b"this is no gzip")
    newest = reg.history(newest_first=True)
    assert len([next(newest) for _ in range(10)]) == 10
    with pytest.raises(ArchiveDamaged):
        list(newest)


@pytest.mark.limits(segment_bytes=4096)
def test_zstd_archive_is_verified_repaired_and_read(reg: Registry) -> None:
    """Beside gzip ones: the history is one."""
    _grown(reg, 60)
    compact(reg, gc=False)
    _grown(reg, 60)
    compact(reg, gc=False, packing="zstd")
    _grown(reg, 5)
    compact(reg, gc=False, packing="zstd")
    before = [event.seq for event in reg.history()]
    packed = sorted((reg.path / layout.ARCHIVE).glob("*.zst"))
    assert len(packed) > 1
    assert list((reg.path / layout.ARCHIVE).glob("*.gz")) == []
    assert verify(reg.path).findings == ()
    data = packed[0].read_bytes()
    for at in (10, len(data) // 2, len(data) - 1):
        packed[0].write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        assert not verify(reg.path).ok
    packed[0].write_bytes(data + b"\0")
    assert not verify(reg.path).ok
    packed[0].write_bytes(data[:-20])
    lost = repair(reg.path).losses
    assert lost
    done = repair(reg.path, yes=True, accept_loss=lost)
    assert done.done
    assert verify(reg.path).ok
    with opened(reg.path) as again:
        after = [event.seq for event in again.history()]
    assert set(after) - {done.seq} == {
        seq for seq in before if not any(a <= seq <= b for a, b in lost)
    }


@pytest.mark.limits(segment_bytes=4096)
def test_zstd_without_its_library_is_a_clear_refusal(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is packed, nothing is called damaged, and the error says what to install."""
    for _ in range(3):
        _grown(reg, 20)
        compact(reg, gc=False, packing="zstd")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(Unsupported, match="pip install zstandard"):
        list(reg.history())
    with pytest.raises(Unsupported):
        compact(reg, gc=False, packing="zstd")
    assert reg.workers(all=True), "the state needs no archive"
    _grown(reg, 20)
    assert compact(reg, gc=False).archived_segments


def test_redaction_happens_before_the_append(place: Path) -> None:
    """What the hook takes out is nowhere in the store; what it must not do is refused."""

    def redact(kind: str, given: events.JsonObject) -> events.JsonObject:
        assert kind.startswith("worker.")
        meta = given.get("meta")
        if isinstance(meta, dict):
            given["meta"] = {k: "***" if k == "token" else v for k, v in meta.items()}
        if "reason" in given:
            given["reason"] = "redacted"
        return given

    with opened(place, redact=redact) as reg:
        reg.register("a", meta={"token": "hunter2", "kept": 1})
        reg.update("a", meta={"token": "hunter3"})
        reg.update("a", state="draining", reason="hunter4")
        with reg.batch() as batch:
            batch.remove("a", reason="hunter5")
        worker = reg.get("a")
    assert worker is not None
    assert worker.meta == {"token": "***", "kept": 1}
    whole = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert b"hunter" not in whole
    with opened(place, redact=lambda _kind, _given: {}) as reg:
        before = reg.last_seq
        with pytest.raises(ValueError, match="keys"):
            reg.register("b")
        assert reg.last_seq == before


@pytest.mark.limits(segment_bytes=2000)
@pytest.mark.parametrize("verb", ["history", "lives", "watch", "at a time", "at a seq"])
def test_reader_beside_retention_is_not_told_of_damage(
    reg: Registry, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes between the listing and the opening was dropped on purpose: go on, or say so."""
    reg.register("a")
    for number in range(40):
        reg.update("a", meta={"fill": f"{number}" * 200})
    compact(reg)
    when = next(reg.history(newest_first=True)).ts
    real, left = Segments.open, [1]

    def meanwhile(self: Segments, first: int) -> Segment:
        if left:
            left.pop()
            with opened(reg.path) as other:
                other.update("a", labels={"more": "1"})
                assert compact(other, keep_history=0).dropped is not None
        return real(self, first)

    monkeypatch.setattr(Segments, "open", meanwhile)

    def watched() -> object:
        with reg.watch(after=datetime(2020, 1, 1, tzinfo=UTC)) as items:
            return items.next(1)

    asked: dict[str, Callable[[], object]] = {
        "history": lambda: list(reg.history()),
        "lives": reg.lives,
        "watch": watched,
        "at a time": lambda: reg.at(when),
        "at a seq": lambda: reg.at(20),
    }
    if verb.startswith("at "):  # honestly no longer known
        with pytest.raises(CompactedError):
            asked[verb]()
    else:
        assert asked[verb]()
    assert not left
