"""What a process knows of its store is what anyone would read there."""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from crewlog import host
from crewlog.errors import InvalidTransition, SegmentMissing, WorkerExists, WorkerNotFound
from crewlog.local import layout
from crewlog.local.disk import Disk
from crewlog.local.heads import AppendState
from crewlog.local.segments import Reader
from crewlog.local.view import View
from crewlog.model import codec
from crewlog.model.chain import Position
from crewlog.model.events import Line, Record
from crewlog.model.fold import Fold
from crewlog.model.steps import Wish
from crewlog.queue import Request
from crewlog.registry import Registry
from crewlog.workers.register import captured
from crewlog_compactor import compact, verify
from faults import active_segment, registry_on
from procs import files
from stores import opened


def _fold(reg: Registry) -> tuple[int, list[tuple[str, int, str]], dict[str, int]]:
    """Return what its readers know: seq, workers in order of registration, counts of events."""
    with files(reg).state() as state:
        records = [(sid, one["rev"], str(one["meta"])) for sid, one in state.records.items()]
        return state.seq, records, dict(state.totals)


def _change(reg: Registry, dice: random.Random) -> None:
    """Change something, or be refused."""
    sid = f"w{dice.randrange(12)}"
    match dice.randrange(7):
        case 0 | 1:
            reg.register(sid)
        case 2 | 3:
            reg.update(sid, meta={"n": dice.randrange(100)})
        case 4:
            reg.exited(sid, code=0)
        case 5:
            reg.remove(sid)
        case _:
            with reg.batch() as batch:
                batch.update(sid, meta={"n": dice.randrange(100)})
                batch.register(f"w{dice.randrange(12)}")


@pytest.mark.limits(own_lines=5, segment_bytes=4_000, recent_workers=6)
@pytest.mark.parametrize("seed", range(4))
def test_writers_know_what_a_fresh_reader_sees(place: Path, seed: int) -> None:
    """Whoever wrote, however it lies: beside each other, in runs, over rotations, compacted."""
    dice = random.Random(seed)
    with opened(place) as one, opened(place) as other:
        one.register("w0")
        for number in range(120):
            reg = dice.choice([one, other]) if number % 40 < 20 else one
            with suppress(WorkerExists, WorkerNotFound, InvalidTransition):
                _change(reg, dice)
            if number % 50 == 49:
                compact(one, gc=False)
            if dice.random() < 0.3:
                with opened(place) as fresh:
                    assert _fold(reg) == _fold(fresh)
    assert verify(place).findings == ()


def test_own_lines_are_folded_once(reg: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registration looks at all that is there, and reads nothing that this process wrote."""
    for number in range(3):
        reg.register(f"w{number}")
    read: list[bytes] = []
    folded: list[int] = []
    parse, apply = codec.parse, Fold.apply

    def parsed(raw: bytes) -> Line:
        read.append(raw)
        return parse(raw)

    def applied(state: Fold, line: Line) -> None:
        folded.append(line["seq"])
        apply(state, line)

    monkeypatch.setattr(codec, "parse", parsed)
    monkeypatch.setattr(Fold, "apply", applied)
    for number in range(3, 9):
        reg.register(f"w{number}")
        reg.update(f"w{number}", meta={"n": number})
    assert (read, folded) == ([], [])
    assert len(reg.workers()) == 9
    assert read, "readers do read"


class _Looking(Disk):
    """A disk in whose sync, where all is written and nothing durable yet, somebody looks."""

    reg: Registry | None = None
    seen: list[bool]

    def sync(self, fd: int) -> None:
        if self.reg is not None:
            self.seen.append(self.reg.get("late") is None)
        super().sync(fd)


def test_what_is_not_durable_yet_is_shown_to_nobody(place: Path) -> None:
    """Though another change of this process has asked for all that is written meanwhile."""
    via = _Looking()
    via.seen = []
    with registry_on(place, via) as reg:
        reg.register("a")
        log = files(reg)
        group = [_request(reg, "late"), _request(reg, "later")]
        log._appender.write(group[:1])
        taken, seq, _ = log._appender.write(group[1:])
        via.reg = reg
        assert reg.get("late") is None
        log._appender.make_durable(seq)
        via.reg = None
        assert taken == 1
        assert via.seen == [True]
        assert reg.get("late") is not None


class _Interrupted(Disk):
    """A disk whose next sync is interrupted by Ctrl-C."""

    armed = False

    def sync(self, fd: int) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        super().sync(fd)


@pytest.mark.parametrize("left", [0, 10], ids=["all of it", "but for half a line"])
def test_what_a_recovery_has_cut_is_not_decided_upon(place: Path, left: int) -> None:
    """It was never acknowledged, and a device that loses it takes it from this process, too."""
    via = _Interrupted()
    with registry_on(place, via) as reg:
        reg.register("a")
        size, redo = active_segment(place).stat().st_size, (place / layout.REDO).read_bytes()
        via.armed = True
        with pytest.raises(KeyboardInterrupt):
            reg.register("lost")
        os.truncate(active_segment(place), size + left)
        (place / layout.REDO).write_bytes(redo)
        assert reg.register("lost").sid == "lost"
        reg.register("after")
        reg.register("last")
        with opened(place) as fresh:
            assert _fold(reg) == _fold(fresh)
        assert [worker.sid for worker in reg.workers()] == ["a", "lost", "after", "last"]
    assert verify(place).findings == ()


def _request(reg: Registry, sid: str) -> Request:
    return Request(captured(reg._session.author(), sid, None, Wish()).decide, (sid,))


def test_other_history_of_the_same_length_is_read_anew(place: Path) -> None:
    """A store is put in place of ours: what we wrote to that one is no part of this one."""
    kept = place.with_name("kept")
    with opened(place) as reg:
        reg.register("a")
        shutil.copytree(place, kept)
        reg.register("ours")
        with opened(kept) as other:
            other.register("theirs")
        for path in (place / layout.LOG).iterdir():
            path.unlink()
        shutil.copytree(kept, place, dirs_exist_ok=True)
        for number in range(3):
            reg.register(f"w{number}")
        with opened(place) as fresh:
            assert _fold(reg) == _fold(fresh)
        assert [worker.sid for worker in reg.workers()][:2] == ["a", "theirs"]


def test_what_others_wrote_between_is_read_before_the_lock_is_taken(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However well this process knows the lines that it wrote after them."""
    with opened(place) as reg, opened(place) as other:
        reg.register("a")
        reg.register("b")
        for number in range(5):
            other.register(f"w{number}")
        reg.update("a", meta={"n": 1})
        reads: list[tuple[int, bool]] = []
        real, writer = Reader.read, files(reg)._appender.writer

        def read(reader: Reader, stop: Position) -> Iterator[tuple[Line, bytes]]:
            for line, raw in real(reader, stop):
                reads.append((line["seq"], host.is_mine(writer)))
                yield line, raw

        monkeypatch.setattr(Reader, "read", read)
        reg.register("c")
        assert [at for at, _ in reads if at > 3], "there was something to read"
        assert not any(held for _, held in reads)


def test_interrupt_while_own_lines_are_taken_over_loses_none(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes when one is about to be taken over: all is read anew."""
    reg.register("a")
    reg.register("b")

    def take(_: Fold, kind: str, sid: str, record: Record | None) -> None:
        raise KeyboardInterrupt(kind, sid, record)

    with monkeypatch.context() as patch:
        patch.setattr(Fold, "take", take)
        with pytest.raises(KeyboardInterrupt):
            reg.register("c")
    reg.register("c")
    assert [worker.sid for worker in reg.workers()] == ["a", "b", "c"]


def test_reader_skips_nothing_beyond_its_segment(reg: Registry) -> None:
    """What it holds may be several segments in one file, whose offsets are others."""
    reg.register("a")
    reader = files(reg)._view._load()[1]
    before = reader.position
    assert not reader.skip_to(Position(before.segment + 1, 900, before.seq + 1))
    assert reader.position == before


def test_own_lines_are_looked_at_under_the_mutex(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader in another thread may forget them at any moment."""
    reg.register("a")
    held: list[bool] = []
    real, mutex = View.reaches, files(reg)._appender.mutex

    def reaches(view: View, end: AppendState) -> bool:
        held.append(host.is_mine(mutex))
        return real(view, end)

    monkeypatch.setattr(View, "reaches", reaches)
    reg.register("b")
    assert held == [True]


def test_state_that_is_loaded_under_the_lock_may_be_compacted_away_meanwhile(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retention takes what the snapshot that was read leads on from: it is read once more."""
    reg.register("a")
    log, lost = files(reg), [True]
    log._view.forget()
    load = View._load

    def misses(view: View) -> tuple[Fold, Reader]:
        if lost:
            lost.clear()
            raise SegmentMissing("log", first=1, last=2)
        return load(view)

    monkeypatch.setattr(log._appender, "_prepare", lambda **_: None)
    monkeypatch.setattr(View, "_load", misses)
    assert reg.register("b").sid == "b"
