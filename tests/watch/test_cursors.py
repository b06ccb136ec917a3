"""Positions with a name: who owns one, and what becomes of it."""

import threading
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import (
    CursorBusy,
    CursorCorrupt,
    RegistryClosed,
)
from crewlog.local import cursors, layout
from crewlog.model.items import Item
from crewlog.registry import Registry
from crewlog_compactor import compact
from procs import files, forked, joined, until


def test_refused_watch_leaves_its_cursor_free(reg: Registry) -> None:
    """A wrong argument takes nothing."""
    reg.register("a")
    with pytest.raises(ValueError, match="bogus"):
        reg.watch(cursor="c", backend="bogus")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_error"):
        reg.subscribe(print, cursor="c", on_error="bogus")  # type: ignore[arg-type]
    reg.watch(cursor="c").close()


@pytest.mark.parametrize("closed_by", ["another thread", "the callback"])
def test_the_callback_under_way_at_close_is_acknowledged(reg: Registry, closed_by: str) -> None:
    """Whoever goes on with the cursor does not hear of it again."""
    reg.register("a")
    called, may_return = threading.Event(), threading.Event()
    box: list[crewlog.Subscription] = []
    heard: list[int] = []

    def callback(item: Item) -> None:
        heard.append(item.seq)
        called.set()
        assert may_return.wait(20)
        if closed_by == "the callback":
            box[0].close()

    box.append(reg.subscribe(callback, cursor="c", after="oldest", on_error="retry"))
    assert called.wait(20)
    if closed_by == "the callback":
        may_return.set()
    else:
        threading.Timer(0.2, may_return.set).start()
        box[0].close()
    until(lambda: not box[0].alive)
    state = reg.cursors.read("c")
    assert state is not None
    assert [state.seq] == heard


def test_threads_create_the_same_cursor_at_once(reg: Registry) -> None:
    """One owns it, the others hear who; nothing else is raised."""
    reg.register("a")
    for number in range(10):
        results: list[object] = []

        def own(name: str = f"c-{number}", results: list[object] = results) -> None:
            try:
                results.append(reg.watch(after="oldest", cursor=name))
            except BaseException as error:
                results.append(error)

        threads = [threading.Thread(target=own) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        owners = [f for f in results if isinstance(f, crewlog.Watch)]
        assert len(owners) >= 1
        assert all(isinstance(f, crewlog.Watch | CursorBusy) for f in results), results
        for owner in owners:
            owner.close()


def test_damaged_cursor_hides_none_and_can_be_removed(
    reg: Registry, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It holds back everything, is listed, and goes with rm."""
    reg.register("a")
    reg.watch(cursor="good", after="oldest").close()
    bad = place / layout.CURSORS / "bad"
    bad.touch(0o600)
    for number in range(4):
        reg.update("a", meta={"number": number})
        compact(reg, gc=False)
    assert compact(reg, gc=False, keep_history=0).dropped is None
    assert "bad is damaged" in caplog.text
    places = cursors.every(files(reg).directory)
    assert [(p.name, p.damaged) for p in places] == [("bad", True), ("good", False)]
    with pytest.raises(CursorCorrupt):
        reg.watch(cursor="bad")
    assert cursors.remove(files(reg).directory, "bad")
    assert len(cursors.every(files(reg).directory)) == 1


def test_ack_after_close_is_refused_with_a_type(reg: Registry) -> None:
    """And a forked child cannot move its parent's cursor."""
    reg.register("a")
    items = reg.watch(cursor="c", after="oldest")
    item = items.next(5)
    assert item is not None

    def child() -> None:
        with pytest.raises(RegistryClosed):
            items.ack(item)

    joined(forked(child))
    items.close()
    with pytest.raises(RegistryClosed):
        items.ack(item)
