"""Mistakes of watching that were found once, each with the scenario that showed it."""

import asyncio
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import crewlog
from crewlog import cursor, layout, notify
from crewlog.errors import (
    CrewlogError,
    CursorBusy,
    CursorCorrupt,
    LogCorrupt,
    RegistryClosed,
    WaitTimeout,
)
from crewlog.events import Change, Reset, Synced
from crewlog.registry import Registry
from crewlog_compactor import compact, verify
from procs import Crew, files, forked, joined, until

CREWLOG = [sys.executable, "-c", "from crewlog_cli.main import main; main()"]


def test_run_never_records_its_exit_for_a_stranger(place: Path, crew: Crew) -> None:
    """The sid was given to another worker meanwhile: that one is not ours to end."""
    with crewlog.open(place) as reg:
        process = subprocess.Popen(
            [*CREWLOG, "--dir", str(place), "run", "job", "--", "sh", "-c", "read x; exit 7"],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        until(lambda: reg.get("job") is not None)
        reg.remove("job", reason="handed over")
        reg.register("job", pid=crew.sleeper().pid, ready=True)
        process.send_signal(signal.SIGHUP)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) in {7, 128 + signal.SIGHUP}
        assert process.stderr is not None
        assert b"no longer ours" in process.stderr.read()
        process.stderr.close()
        found = reg.get("job")
        assert found is not None
        assert found.state == "ready"


def test_run_ends_as_its_program_though_the_worker_is_gone(place: Path) -> None:
    """The exit code is the program's, whatever became of the record."""
    with crewlog.open(place) as reg:
        process = subprocess.Popen(
            [*CREWLOG, "--dir", str(place), "run", "job", "--", "sh", "-c", "read x; exit 7"],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until(lambda: reg.get("job") is not None)
        reg.remove("job", reason="x")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 7


@pytest.mark.parametrize("how", ["history", "watch", "state", "compact"])
def test_empty_sealed_segment_is_damage_not_a_loop(
    place: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing spins over a segment that has lost everything."""
    monkeypatch.setattr(layout, "SEGMENT_BYTES_MAX", 1500)
    with crewlog.open(place) as reg:
        for number in range(6):
            reg.register(f"w-{number}")
    sorted((place / layout.LOG).iterdir())[1].write_bytes(b"")
    with crewlog.open(place) as reg, pytest.raises(LogCorrupt, match="empty"):
        if how == "history":
            list(reg.history())
        elif how == "state":
            reg.workers()
        elif how == "compact":
            compact(reg, gc=False)
        else:
            with reg.watch(after="oldest", backend="poll") as items:
                items.drain()


def test_printed_changes_are_acknowledged(place: Path) -> None:
    """Watch --cursor --count 1, again and again: each time the next one."""
    with crewlog.open(place) as reg:
        for sid in "abc":
            reg.register(sid)
    seqs = []
    for _ in range(3):
        done = subprocess.run(
            [*CREWLOG, "--dir", str(place), "watch", "--from-start", "--cursor", "c",
             "--count", "1", "--json"], check=True, capture_output=True, text=True,
        )  # fmt: skip
        seqs.append(done.stdout.split('"seq":')[1].split(",")[0])
    assert seqs == ["2", "3", "4"]


def test_lost_range_is_told_though_a_program_is_run(place: Path) -> None:
    """--exec hands over changes; a loss is said on stderr, with -q too."""
    with crewlog.open(place) as reg:
        reg.register("a")
        with reg.watch(after=1, cursor="c"):
            pass
        for number in range(8):
            reg.update("a", meta={"number": number})
            compact(reg, gc=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "CURSOR_HOLD_BYTES_MAX", 0)
            compact(reg, gc=False, keep_history=0)
    done = subprocess.run(
        [*CREWLOG, "--dir", str(place), "watch", "-q", "--cursor", "c", "--timeout", "1s",
         "--exec", "--", "cat"], check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "events 2 to" in done.stderr


def replace_by(place: Path, other: Path) -> None:
    place.rename(place.with_name("gone"))
    other.rename(place)


def test_reset_is_not_lost_while_the_new_store_is_incomplete(place: Path, tmp_path: Path) -> None:
    """The state cannot be read yet: an error, and later the Reset all the same."""
    other = tmp_path / "other"
    with crewlog.open(place) as reg, crewlog.open(other) as filling:
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
    with crewlog.open(other) as filling:
        filling.register("new")
    with crewlog.open(place) as reg:
        reg.register("old")
        with reg.watch(after="oldest", cursor="c") as items:
            items.drain()
            replace_by(place, other)
            item = items.next(5)
            assert isinstance(item, Reset)
            items.next(0)
    with crewlog.open(place) as reg:
        assert [(p.name, p.seq) for p in cursor.every(files(reg).directory)] == [("c", 2)]


def test_store_removed_and_created_again_is_followed(place: Path) -> None:
    """Rm -rf under a watcher, then a new store: a Reset, and on."""
    with crewlog.open(place) as reg, reg_watch(reg) as items:
        items.drain()
        shutil.rmtree(place)
        with crewlog.open(place) as other:
            other.register("new")
        found = items.next(10)
        assert isinstance(found, Reset)
        assert list(found.state.workers) == ["new"]


def reg_watch(reg: Registry) -> crewlog.Watch:
    reg.register("old")
    return reg.watch(after="oldest")


def test_polling_consumer_hears_of_a_replaced_store(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """drain() and next(0) look at the place too, once a second."""
    monkeypatch.setattr(layout, "SAFETY_LOOK_S", 0.1)
    other = tmp_path / "other"
    with crewlog.open(other) as filling:
        filling.register("new")
    with crewlog.open(place) as reg:
        reg.register("old")
        with reg.watch(after="oldest") as items:
            items.drain()
            replace_by(place, other)
            until(lambda: bool(found := items.drain()) and isinstance(found[0], Reset))


def test_store_restored_from_a_backup_is_no_silent_gap(place: Path, tmp_path: Path) -> None:
    """The same store, but not the same history: a Reset, though its seqs are high enough."""
    with crewlog.open(place) as reg:
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
            found = items.next(5)
            assert isinstance(found, Reset)
            assert found.reason == "replaced"
        with reg.watch(after=500) as items:
            assert isinstance(items.next(5), Reset), "this store never was that far"


def test_idle_writer_survives_retention(place: Path) -> None:
    """What it had not read has gone; its next change goes through all the same."""
    with crewlog.open(place) as idle, crewlog.open(place) as other:
        idle.register("a")
        for number in range(5):
            other.register(f"w-{number}")
            compact(other, gc=False, keep_history=0)
        assert idle.update("a", state="ready").state == "ready"
        assert len(idle.workers()) == 6


def test_retention_killed_half_way_is_policy_not_loss(place: Path) -> None:
    """Some of what was announced is gone, some is still there."""
    with crewlog.open(place) as reg:
        reg.register("a")
        for number in range(6):
            reg.update("a", meta={"number": number})
            compact(reg, gc=False)
        kept = {p.name: p.read_bytes() for p in (place / layout.ARCHIVE).iterdir()}
        compact(reg, gc=False, keep_history=0)
    for name in sorted(kept)[2:]:
        path = place / layout.ARCHIVE / name
        path.write_bytes(kept[name])
        path.chmod(0o600)
    assert verify(place).findings == ()


def test_refused_watch_leaves_its_cursor_free(reg: Registry) -> None:
    """A wrong argument takes nothing."""
    reg.register("a")
    with pytest.raises(ValueError, match="bogus"):
        reg.watch(cursor="c", backend="bogus")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_error"):
        reg.subscribe(print, cursor="c", on_error="bogus")  # type: ignore[arg-type]
    reg.watch(cursor="c").close()


def test_closed_awatch_gives_everything_back(reg: Registry) -> None:
    """Also without `async with`."""
    reg.register("a")

    async def main() -> None:
        items = reg.awatch(cursor="c")
        await items.next(1)
        items.close()

    asyncio.run(main())
    reg.watch(cursor="c").close()
    assert notify._hubs.by_key == {}


def test_child_forked_while_a_thread_takes_is_not_held_up(reg: Registry) -> None:
    """The mutex that the thread holds is the parent's."""
    reg.register("a")
    with reg.watch(after="now") as items:
        items.drain()
        thread = threading.Thread(target=lambda: items.next(1.5))
        thread.start()
        until(items._taking.locked)

        def child() -> None:
            signal.alarm(10)
            items.next(0)
            items.close()

        joined(forked(child))
        thread.join()


def test_child_that_only_closes_leaves_the_parent_hearing(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watchdog's stop in a child would take the parent's schedule away."""
    monkeypatch.setattr(layout, "SAFETY_LOOK_S", 60.0)
    reg.register("a")
    with reg.watch(after="now", backend="watchdog") as items:
        items.drain()
        joined(forked(items.close))
        threading.Timer(0.05, lambda: reg.update("a", state="ready")).start()
        began = time.monotonic()
        assert isinstance(items.next(20), Change)
        assert time.monotonic() - began < 10, "woken, not at the end of the wait"
        assert items.stats()["source"] == "watchdog"


def test_forgotten_watches_are_given_back(reg: Registry) -> None:
    """No descriptor, no bell and no cursor stays with a watch that nobody holds."""
    reg.register("a")
    reg.watch(after=0).close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        items = reg.watch(after=0, cursor="c")
        items.next(0)
        del items
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert notify._hubs.by_key == {}


def test_signal_handler_may_close_one_watch_while_another_begins(place: Path, crew: Crew) -> None:
    """The handler never waits for a lock that the interrupted thread holds."""
    with crewlog.open(place) as reg:
        reg.register("a")
    code = """
import faulthandler, signal, sys, crewlog
faulthandler.dump_traceback_later(20, exit=True)
reg = crewlog.open(sys.argv[1])
idle = []
def handler(*_):
    if idle: idle.pop().close()
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for _ in range(60):
    idle.append(reg.watch(after="now"))
    reg.watch(after="now", backend="watchdog").close()
signal.setitimer(signal.ITIMER_REAL, 0)
print("done", flush=True)
"""
    process = crew.python(code, place)
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"


def test_threads_create_the_same_cursor_at_once(reg: Registry) -> None:
    """One owns it, the others hear who; nothing else is raised."""
    reg.register("a")
    for number in range(10):
        found: list[object] = []

        def own(name: str = f"c-{number}", found: list[object] = found) -> None:
            try:
                found.append(reg.watch(after="oldest", cursor=name))
            except BaseException as error:
                found.append(error)

        threads = [threading.Thread(target=own) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        owners = [f for f in found if isinstance(f, crewlog.Watch)]
        assert len(owners) >= 1
        assert all(isinstance(f, crewlog.Watch | CursorBusy) for f in found), found
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
    places = cursor.every(files(reg).directory)
    assert [(p.name, p.damaged) for p in places] == [("bad", True), ("good", False)]
    with pytest.raises(CursorCorrupt):
        reg.watch(cursor="bad")
    assert cursor.remove(files(reg).directory, "bad")
    assert len(cursor.every(files(reg).directory)) == 1


def test_mirror_keeps_its_deadline_behind_a_backlog(reg: Registry) -> None:
    """However much has happened since it was opened."""
    reg.register("a")
    with reg.mirror() as now:
        for _ in range(3):
            with reg.batch() as batch:
                for number in range(10_000):
                    batch.update("a", meta={"number": number})
        with pytest.raises(WaitTimeout):
            now.wait(lambda _: False, timeout_s=0.01)
        assert now._watch.position < reg.last_seq, "it did not go through all of it first"


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


def test_wait_looks_ahead_not_back(reg: Registry) -> None:
    """An older worker of the same sid has ended: the next one is waited for."""
    reg.register("a")
    reg.exited("a", code=1)
    threading.Timer(0.1, lambda: reg.register("a", ready=True)).start()
    assert reg.wait("a", state="ready", timeout_s=10).generation == 2


def test_state_first_comes_first_for_the_command_too(place: Path) -> None:
    """Only the workers that were asked for; null where none was looked at."""
    import json

    with crewlog.open(place) as reg:
        reg.register("a")
        reg.register("b")

    def first(*arguments: str) -> dict[str, object]:
        done = subprocess.run(
            [*CREWLOG, "--dir", str(place), "watch", "--json", "--timeout", "0.1s", *arguments],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        found: dict[str, object] = json.loads(done.stdout.splitlines()[0])
        return found

    workers = first("--sid", "b")["workers"]
    assert isinstance(workers, list)
    assert [w["sid"] for w in workers] == ["b"]
    assert first("--now")["workers"] is None


def test_synced_is_said_once(reg: Registry) -> None:
    """With the state first, or once the events that were asked for are delivered."""
    reg.register("a")
    for after in (None, 0, "now"):
        with reg.watch(after=after) as items:
            reg.update("a", meta={"t": time.time()})
            kinds = [item.kind for item in items.drain()]
            assert kinds.count("synced") == 1
            assert isinstance(items.next(0), Synced | None)
