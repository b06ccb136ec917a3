"""A watched store that another one takes the place of."""

import shutil
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import (
    CrewlogError,
)
from crewlog.local import cursors, layout
from crewlog.model.items import Reset
from crewlog.registry import Registry
from crewlog_compactor import compact
from procs import files, until
from stores import opened


def replace_by(place: Path, other: Path) -> None:
    place.rename(place.with_name("gone"))
    other.rename(place)


def test_reset_is_not_lost_while_the_new_store_is_incomplete(place: Path, tmp_path: Path) -> None:
    """The state cannot be read yet: an error, and later the Reset all the same."""
    other = tmp_path / "other"
    with opened(place) as reg, opened(other) as filling:
        reg.register("old")
        for number in range(3):
            filling.register(f"n-{number}")
            compact(filling, gc=False)
        with reg.watch(after="oldest") as items:
            items.drain()
            missing = max((other / layout.LOG).iterdir())
            data = missing.read_bytes()
            missing.write_bytes(b"")
            replace_by(place, other)
            with pytest.raises(CrewlogError):
                items.next(5)
            (place / layout.LOG / missing.name).write_bytes(data)
            item = items.next(5)
            assert isinstance(item, Reset)
            assert len(item.state.workers) == 3


def test_cursor_moves_into_the_store_that_took_the_place(place: Path, tmp_path: Path) -> None:
    """It holds back retention there, and goes on there after a restart."""
    other = tmp_path / "other"
    with opened(other) as filling:
        filling.register("new")
    with opened(place) as reg:
        reg.register("old")
        with reg.watch(after="oldest", cursor="c") as items:
            items.drain()
            replace_by(place, other)
            item = items.next(5)
            assert isinstance(item, Reset)
            items.next(0)
    with opened(place) as reg:
        assert [(p.name, p.seq) for p in cursors.every(files(reg).directory)] == [("c", 2)]


def test_store_removed_and_created_again_is_followed(place: Path) -> None:
    """Rm -rf under a watcher, then a new store: a Reset, and on."""
    with opened(place) as reg, reg_watch(reg) as items:
        items.drain()
        shutil.rmtree(place)
        with opened(place) as other:
            other.register("new")
        item = items.next(10)
        assert isinstance(item, Reset)
        assert list(item.state.workers) == ["new"]


@pytest.mark.limits(safety_look_s=0.1)
def test_polling_consumer_hears_of_a_replaced_store(place: Path, tmp_path: Path) -> None:
    """drain() and next(0) look at the place too, once a second."""
    other = tmp_path / "other"
    with opened(other) as filling:
        filling.register("new")
    with opened(place) as reg:
        reg.register("old")
        with reg.watch(after="oldest") as items:
            items.drain()
            replace_by(place, other)
            until(lambda: bool(changes := items.drain()) and isinstance(changes[0], Reset))


def test_store_restored_from_a_backup_is_no_silent_gap(place: Path, tmp_path: Path) -> None:
    """The same store, but not the same history: a Reset, though its seqs are high enough."""
    with opened(place) as reg:
        reg.register("a")
        shutil.copytree(place, tmp_path / "backup")
        for number in range(4):
            reg.update("a", meta={"number": number})
        with reg.watch(after="oldest", backend="poll") as items:
            items.drain()
            with crewlog.open(tmp_path / "backup") as restored:
                for number in range(9):
                    restored.update("a", meta={"other": number})
            replace_by(place, tmp_path / "backup")
            item = items.next(5)
            assert isinstance(item, Reset)
            assert item.reason == "replaced"
        with reg.watch(after=500) as items:
            assert isinstance(items.next(5), Reset), "this store never was that far"


def test_cursor_is_newer_than_a_restored_store_that_has_grown(place: Path, tmp_path: Path) -> None:
    """It stood at an event that is no more, and another one has its seq: a Reset, no silent gap."""
    with opened(place) as reg:
        reg.register("a")
        shutil.copytree(place, tmp_path / "backup")
        for number in range(4):
            reg.update("a", meta={"number": number})
        with reg.watch(cursor="c", after="oldest") as items:
            items.drain()
            assert items.next(0) is None
    with crewlog.open(tmp_path / "backup") as restored:
        for number in range(9):
            restored.update("a", meta={"other": number})
    shutil.copy(place / "cursors" / "c", tmp_path / "backup" / "cursors" / "c")
    with crewlog.open(tmp_path / "backup") as reg, reg.watch(cursor="c") as items:
        item = items.next(5)
        assert isinstance(item, Reset)
        assert item.reason == "replaced"
        assert item.state.workers["a"].meta["other"] == 8


def reg_watch(reg: Registry) -> crewlog.Watch:
    reg.register("old")
    return reg.watch(after="oldest")
