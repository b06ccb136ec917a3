"""G1 to G12, each by its name and for every waker; the traps; the stress."""

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import crewlog
import stores
from crewlog.errors import (
    CompactedError,
    CursorBusy,
    LockBusy,
    RegistryClosed,
    StorageFailed,
    WaitTimeout,
    WorkerEnded,
)
from crewlog.local import cursors, layout, listen, snapshot
from crewlog.local.disk import Disk
from crewlog.model import events
from crewlog.model.events import EventType
from crewlog.model.items import Change, Diff, Item, Reset, Synced
from crewlog.registry import Registry
from crewlog.store import Backend
from crewlog.watch import wake
from crewlog.watch.watch import Watch
from crewlog_compactor import compact, verify
from faults import EIO, FailingDisk, only, registry_on
from procs import Crew, files, forked, joined, slay, until
from stores import opened

pytestmark = pytest.mark.long

BACKENDS: list[Backend] = ["watchdog", "poll", "inotify"]
every_waker = pytest.mark.parametrize("backend", BACKENDS)


def changes(items: list[Item]) -> list[int]:
    return [item.seq for item in items if item.kind == "change"]


def take(watch: Watch, count: int, *, wait_s: float = 20) -> list[Item]:
    """Take so many changes."""
    taken: list[Item] = []
    while len(changes(taken)) < count:
        item = watch.next(wait_s)
        assert item is not None, f"only {len(changes(taken))} of {count} came"
        taken.append(item)
    return taken


def write(place: Path, sid: str, count: int) -> None:
    with crewlog.open(place) as mine:
        mine.register(sid)
        for number in range(count):
            mine.update(sid, meta={"number": number})


@every_waker
def test_g1_order_g2_gap_free_g4_no_duplicates(place: Path, backend: Backend) -> None:
    """Strictly increasing, nothing left out, nothing twice, from three writers at once."""
    with crewlog.open(place) as reg:
        reg.register("first")
        with reg.watch(after="oldest", backend=backend) as items:
            pids = [forked(lambda n=n: write(place, f"w-{n}", 60)) for n in range(3)]  # type: ignore[misc]
            seen = changes(take(items, 1 + 3 * 61))
            joined(*pids)
            assert items.next(0) is None or items.drain() == []
        assert seen == [event.seq for event in reg.history()]
        assert seen == sorted(set(seen))


@every_waker
def test_g3_durable_only(place: Path, backend: Backend) -> None:
    """A line that is written and not durable is not delivered, whatever wakes the watcher."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    with crewlog.open(place) as reader, reader.watch(after="now", backend=backend) as items:
        items.drain()
        disk.fault = only("sync", EIO)
        with pytest.raises(StorageFailed):
            reg.register("b")
        assert items.next(0.3) is None


@every_waker
def test_g5_batches_are_never_split(place: Path, backend: Backend) -> None:
    """Once one event of a batch is there, all of them are."""
    with crewlog.open(place) as reg:
        reg.register("a")

        def batches() -> None:
            with crewlog.open(place) as mine:
                for number in range(40):
                    with mine.batch() as batch:
                        for part in range(5):
                            batch.update("a", meta={"n": number, "part": part})

        pid = forked(batches)
        with reg.watch(after=2, backend=backend) as items:
            seen: list[Item] = []
            while len(changes(seen)) < 200:
                seen += [i for i in [items.next(20), *items.drain()] if i is not None]
                assert len(changes(seen)) % 5 == 0
        joined(pid)


@every_waker
def test_g6_race_free_start(place: Path, backend: Backend) -> None:
    """State at S, Synced(S), then S+1, while writers go on."""
    with crewlog.open(place) as reg:
        reg.register("a")
        pid = forked(lambda: write(place, "b", 150))
        for _ in range(8):
            with reg.watch(backend=backend) as items:
                until(lambda items=items: items.lag > 0 or reg.last_seq > 151)  # type: ignore[misc]
                synced, *later = items.drain()
                assert isinstance(synced, Synced)
                assert synced.state is not None
                begin = synced.seq
                assert synced.state.seq == begin
                got = changes(later)
                assert got == list(range(begin + 1, begin + 1 + len(got)))
                for worker in synced.state.workers.values():
                    assert worker.rev <= begin
        joined(pid)


@pytest.mark.limits(segment_bytes=3000)
@every_waker
def test_g7_resume_from_any_retained_seq(reg: Registry, backend: Backend) -> None:
    """Through rotation, compaction and archive, and a reopened registry."""
    reg.register("a")
    for number in range(24):
        reg.update("a", meta={"number": number})
        if number % 8 == 7:
            compact(reg, gc=False)
    truth = [event.seq for event in reg.history()]
    with opened(reg.path) as again:
        for after in range(0, reg.last_seq, 3):
            with again.watch(after=after, backend=backend) as items:
                assert changes(items.drain()) == [seq for seq in truth if seq > after]


@every_waker
def test_g8_bounded_memory(place: Path, backend: Backend) -> None:
    """A backlog of 100,000 events grows a slow watcher by no more than a read chunk or two."""
    with crewlog.open(place) as reg:
        reg.register("a")
        for _ in range(10):
            with reg.batch() as batch:
                for number in range(10_000):
                    batch.update("a", meta={"number": number, "pad": "x" * 100})
        with reg.watch(after=1, backend=backend) as items:
            take(items, 2000)
            before = _rss()
            for _ in range(60_000):
                items.next(1)
            assert _rss() - before < 4 * 1024 * 1024
            assert items.lag > 30_000


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@every_waker
def test_g9_writers_never_wait(place: Path, crew: Crew, backend: Backend) -> None:
    """A watcher that is stopped for good costs the writers nothing."""
    with crewlog.open(place) as reg:
        reg.register("a")
        code = (
            "import sys, crewlog\n"
            "reg = crewlog.open(sys.argv[1])\n"
            "items = reg.watch(after=0, backend=sys.argv[2])\n"
            "items.next(5); print('up', flush=True)\n"
            "while True: items.next()\n"
        )
        watcher = crew.python(code, place, backend)
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "up\n"
        watcher.send_signal(signal.SIGSTOP)
        slowest = 0.0
        for number in range(200):
            began = time.monotonic()
            reg.update("a", meta={"number": number})
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 4.0, "nobody waits for a watcher; a lock would be given up after 5"


@every_waker
def test_g10_seen_within_a_second_in_every_failure(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    """Wakes that never come cost a second at most."""
    monkeypatch.setattr(wake.Hub, "ring", lambda _: None)
    reg.register("a")
    with reg.watch(after="now", backend=backend) as items:
        items.drain()
        timer = threading.Timer(0.1, lambda: reg.update("a", state="ready"))
        began = time.monotonic()
        timer.start()  # the wait is under way by then
        assert isinstance(items.next(10), Change)
        assert time.monotonic() - began < 5, "by the look a second, not at the end of the wait"
        timer.join()


@every_waker
def test_g11_another_store_under_the_same_path_is_a_reset(
    place: Path, tmp_path: Path, backend: Backend
) -> None:
    """The path is what was asked for: a store that took its place is told of, then followed."""
    with crewlog.open(place) as reg:
        reg.register("old")
        with reg.watch(backend=backend) as items:
            items.drain()
            with crewlog.open(tmp_path / "other") as other:
                other.register("new")
            shutil.move(place, tmp_path / "gone")
            shutil.move(tmp_path / "other", place)
            item = items.next(10)
            assert isinstance(item, Reset)
            assert item.reason == "replaced"
            assert list(item.state.workers) == ["new"]
            assert item.diff == Diff(added=("new",), changed=(), removed=("old",))
            with crewlog.open(place) as other:
                other.update("new", state="ready")
            assert changes([i for i in [items.next(10)] if i is not None]) == [3]
        reg.update("new", state="draining")


@every_waker
def test_g12_at_least_once_with_a_cursor(reg: Registry, backend: Backend) -> None:
    """What was taken and not yet acknowledged comes again; what was acknowledged does not."""
    reg.register("a")
    for number in range(6):
        reg.update("a", meta={"number": number})
    seen: list[int] = []
    with reg.watch(after=1, cursor="c", backend=backend) as items:
        seen += changes(take(items, 3))  # the third is not acknowledged: nothing was taken after it
    with reg.watch(cursor="c", backend=backend) as items:
        seen += changes(take(items, 2))
        item = items.next(5)
        assert item is not None
        items.ack(item)
        seen.append(item.seq)
    with reg.watch(cursor="c", backend=backend) as items:
        seen += changes(items.drain())
    assert seen == [2, 3, 4, 4, 5, 6, 7, 8]


def test_g12_cursor_survives_kill_and_delivers_all(place: Path, crew: Crew) -> None:
    """A consumer killed with -9 again and again: every event at least once, in order of seq."""
    with crewlog.open(place) as reg:
        reg.register("a")
        with reg.batch() as batch:
            for number in range(400):
                batch.update("a", meta={"number": number})
    log = place.parent / "consumed"
    code = (
        "import sys, os, crewlog\n"
        "out = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)\n"
        "with crewlog.open(sys.argv[1]) as reg, reg.watch(after='oldest', cursor='c') as items:\n"
        "    for item in items:\n"
        "        if item.kind == 'change': os.write(out, b'%d\\n' % item.seq)\n"
    )
    dice = random.Random(7)
    for _ in range(12):
        consumer = crew.python(code, place, log)
        time.sleep(dice.uniform(0.1, 0.2))
        consumer.kill()
        consumer.wait()
    consumer = crew.python(code, place, log)
    until(lambda: log.exists() and log.read_text().endswith("402\n"))
    seen = [int(row) for row in log.read_text().split()]
    assert set(seen) == set(range(2, 403))
    assert all(after <= before + 1 for before, after in itertools.pairwise(seen))


# -- positions, losses, cursors -------------------------------------------------------------


@pytest.fixture
def shortened(reg: Registry) -> Registry:
    """Return a registry whose oldest history retention has dropped."""
    reg.register("a")
    for number in range(10):
        reg.update("a", meta={"number": number})
        compact(reg, gc=False)
    report = compact(reg, gc=False, keep_history=0)
    assert report.dropped is not None
    assert report.dropped[0] == 1
    assert verify(reg.path).findings == ()
    return reg


def test_position_compacted_away_is_a_reset_with_the_exact_range(shortened: Registry) -> None:
    """The lost range, the state that makes it good, what changed, and then all that is kept."""
    kept = [event.seq for event in shortened.history()]
    with shortened.watch(after=3) as items:
        item = items.next(5)
        assert isinstance(item, Reset)
        assert item.reason == "compacted"
        assert item.lost == (4, item.seq)
        assert item.state.seq == item.seq == shortened.at(item.seq).seq
        assert dict(item.state.workers) == dict(shortened.at(item.seq).workers)
        assert kept
        assert item.seq < kept[0]
        shortened.update("a", state="ready")
        assert changes(take(items, len(kept) + 1)) == [*kept, shortened.last_seq]


def test_position_compacted_away_is_an_error_where_asked(shortened: Registry) -> None:
    """CompactedError names what was asked for and what is there."""
    oldest = next(shortened.history(types=["_segment"])).seq
    with shortened.watch(after=3, on_compacted="raise") as items:
        with pytest.raises(CompactedError) as caught:
            items.next(5)
        assert (caught.value.requested, caught.value.oldest) == (4, oldest)
    with pytest.raises(CompactedError):
        list(shortened.history(after=3))
    assert [e.seq for e in shortened.history(after=oldest)] == [
        e.seq for e in shortened.history() if e.seq > oldest
    ]


@pytest.mark.limits(segment_bytes=2000)
def test_delivered_and_announced_losses_are_everything(reg: Registry) -> None:
    """A slow watcher beside a retention that keeps nothing: events plus lost ranges have no gap."""
    reg.register("a")
    covered: list[tuple[int, int]] = []
    kinds: list[EventType] = [*events.OWN_TYPES, "worker.registered", "worker.updated"]
    with reg.watch(after="oldest", types=kinds, backend="poll") as items:
        for number in range(60):
            reg.update("a", meta={"number": number})
            if number % 5 == 4:
                compact(reg, gc=False, keep_history=0)
            if number % 7 == 0:
                item = items.next(5)
                assert item is not None
                covered.append(_range(item))
        covered += [_range(item) for item in items.drain()]
    position = 0
    for first, last in covered:
        assert first == position + 1
        position = last
    assert position == reg.last_seq
    assert any(last > first for first, last in covered), "there were losses"


def _range(item: Item) -> tuple[int, int]:
    if isinstance(item, Reset) and item.lost is not None:
        return item.lost
    return (item.seq, item.seq) if isinstance(item, Change) else (item.seq + 1, item.seq)


def test_cursor_holds_back_retention_up_to_the_cap(
    reg: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """What a cursor needs stays; beyond the cap it goes, loudly, and its owner hears the range."""
    reg.register("a")
    with reg.watch(after=2, cursor="slow"):
        pass
    for number in range(8):
        reg.update("a", meta={"number": number})
        compact(reg, gc=False)
    compact(reg, gc=False, keep_history=0)
    with reg.watch(cursor="slow") as items:
        assert changes([i for i in [items.next(5)] if i is not None])[0] > 2
    assert reg.store().first_seq() <= 3
    stores.limit(cursor_hold_bytes=0)
    with caplog.at_level(logging.WARNING), opened(reg.path) as tight:
        compact(tight, gc=False, keep_history=0)
    assert "slow" in caplog.text
    with reg.watch(cursor="slow") as items:
        item = items.next(5)
        assert isinstance(item, Reset)
        assert item.lost is not None
        assert item.lost[0] == 3
    assert verify(reg.path).ok


def test_cursor_has_one_owner(reg: Registry) -> None:
    """The second one is told who owns it; after close it may have it."""
    reg.register("a")
    with reg.watch(cursor="c"):
        with pytest.raises(CursorBusy) as caught:
            reg.watch(cursor="c")
        assert f"pid {os.getpid()}" in caught.value.holder
    reg.watch(cursor="c").close()


def test_cursor_torn_in_one_slot_keeps_the_other(reg: Registry, place: Path) -> None:
    """A position half written is the position before."""
    reg.register("a")
    directory = files(reg).directory
    owned = cursors.Cursor(directory, "c", start=5)
    for seq in (6, 7, 8):
        owned.advance(seq)
    owned.close()
    path = place / layout.CURSORS / "c"
    data = path.read_bytes()
    for index in range(len(data)):
        broken = bytearray(data)
        broken[index] ^= 1
        path.write_bytes(bytes(broken))
        state = cursors.read(directory, "c")
        assert state is not None
        assert state.seq in {7, 8}
    path.write_bytes(b"\0" * len(data))
    with pytest.raises(crewlog.errors.CursorCorrupt):
        cursors.read(directory, "c")


def test_datetime_position_begins_with_that_event(reg: Registry) -> None:
    """The first event at or after a time."""
    reg.register("a")
    reg.update("a", meta={"n": 1})
    third = reg.update("a", meta={"n": 2})
    with reg.watch(after=third.updated_at) as items:
        assert changes(items.drain()) == [third.rev]


def test_filters_pass_over_without_parsing_and_move_on(reg: Registry) -> None:
    """A label that looks like a sid fools nobody."""
    reg.register("a", labels={"sid": "b"}, meta={"sid": "b"})
    reg.register("b")
    with reg.watch(after="oldest", sids=["b"]) as items:
        assert changes(items.drain()) == [3]
        assert items.position == 3
    with pytest.raises(TypeError, match="list"):
        reg.watch(sids="b")
    assert [e.seq for e in reg.history(sid="b")] == [3]


# -- async, callbacks, mirrors, wait --------------------------------------------------------


@every_waker
def test_awatch_delivers_like_watch(place: Path, backend: Backend) -> None:
    """The same items, from asyncio, beside other tasks."""

    async def main() -> list[int]:
        with crewlog.open(place) as reg:
            reg.register("a")
            seen: list[int] = []
            async with reg.awatch(after="oldest", backend=backend) as items:
                pid = forked(lambda: write(place, "b", 50))
                async for item in items:
                    if item.kind == "change":
                        seen.append(item.seq)
                    if len(seen) == 52:
                        items.close()
                joined(pid)
            return seen

    assert asyncio.run(main()) == list(range(2, 54))


def test_awatch_cancelled_anywhere_loses_nothing(place: Path) -> None:
    """Cancel after ever other times: each event comes exactly once all the same."""

    async def main() -> list[int]:
        with crewlog.open(place) as reg:
            reg.register("a")
            seen: list[int] = []
            pid = forked(lambda: write(place, "b", 120))
            async with reg.awatch(after="oldest") as items:
                dice = random.Random(3)
                while len(seen) < 122:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(dice.uniform(0, 0.004)):
                            while len(seen) < 122:
                                item = await items.next()
                                if item is not None and item.kind == "change":
                                    seen.append(item.seq)
            joined(pid)
            return seen

    assert asyncio.run(main()) == list(range(2, 124))


def test_subscribers_do_not_affect_each_other(reg: Registry) -> None:
    """One that raises, one that sleeps and one that is quick, side by side."""
    reg.register("a")
    quick: list[int] = []
    skipped: list[int] = []
    slow_may_go_on = threading.Event()

    def raising(item: Item) -> None:
        raise RuntimeError(item.seq)

    def skipping(item: Item) -> None:
        skipped.append(item.seq)
        raise RuntimeError(item.seq)

    with (
        pytest.raises(RuntimeError, match="2"),  # told again at the end of the block
        reg.subscribe(raising, after="now") as stopped,
        reg.subscribe(skipping, after="now", on_error="skip"),
        reg.subscribe(lambda _: slow_may_go_on.wait(20), after="now") as slow,
        reg.subscribe(lambda item: quick.append(item.seq), after="now"),
    ):
        for number in range(5):
            reg.update("a", meta={"number": number})
        until(lambda: len(quick) == 6)
        until(lambda: len(skipped) == 6)
        until(lambda: not stopped.alive)
        assert isinstance(stopped.error, RuntimeError)
        assert slow.alive
        slow_may_go_on.set()


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_callback_that_would_end_the_program_raises_an_error(
    reg: Registry, raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """The sys.exit of a library in it: logged, skipped or kept, as every other error is."""
    seen: list[int] = []

    def callback(item: Item) -> None:
        seen.append(item.seq)
        if len(seen) == 1:
            raise raised

    reg.register("a")
    with reg.subscribe(callback, after="oldest", on_error="skip"):
        reg.register("b")
        until(lambda: len(seen) > 1)
    assert "a subscriber raised on seq" in caplog.text
    seen.clear()
    stopped = reg.subscribe(callback, after="oldest")
    until(lambda: not stopped.alive)
    with pytest.raises(RuntimeError, match=type(raised).__name__):
        stopped.close()


def test_subscriber_retries_until_it_works(reg: Registry) -> None:
    """The same item again, then the next, in order."""
    reg.register("a")
    tries: list[int] = []

    def callback(item: Item) -> None:
        if item.kind == "change":
            tries.append(item.seq)
            if tries.count(item.seq) < 3:
                raise RuntimeError

    with reg.subscribe(callback, after=1, on_error="retry") as subscription:
        until(lambda: tries == [2, 2, 2])
        assert subscription.error is None or tries


def test_subscription_closed_from_its_own_callback_ends(reg: Registry) -> None:
    """No thread waits for itself."""
    reg.register("a")
    box: list[crewlog.Subscription] = []
    ready = threading.Event()

    def callback(_: Item) -> None:
        ready.wait(10)
        box[0].close()

    box.append(reg.subscribe(callback, after=1))
    ready.set()
    until(lambda: not box[0].alive)


def test_mirror_is_the_truth_and_waits_for_it(place: Path) -> None:
    """Equal to a fresh fold at every look, and woken when the wish comes true."""
    with crewlog.open(place) as reg:
        reg.register("a")
        pid = forked(lambda: write(place, "b", 80))
        with reg.mirror() as now:
            state = now.wait(
                lambda s: (w := s.get("b")) is not None and w.meta.get("number") == 79,
                timeout_s=20,
            )
            with crewlog.open(place) as fresh:
                assert state.workers == fresh.state().workers
            with pytest.raises(WaitTimeout):
                now.wait(lambda _: False, timeout_s=0.05)
        joined(pid)


def test_wait_until_a_worker_is_ready(reg: Registry, crew: Crew) -> None:
    """Before it is registered, after, and if it ends instead."""
    reg.register("other")
    threading.Timer(0.05, lambda: reg.register("a", pid=crew.sleeper().pid)).start()
    assert reg.wait("a", state="starting", timeout_s=10).sid == "a"
    threading.Timer(0.05, lambda: reg.update("a", state="ready")).start()
    assert reg.wait("a", state="ready", timeout_s=10).state == "ready"
    with pytest.raises(WaitTimeout) as caught:
        reg.wait("a", state="stopping", timeout_s=0.05)
    assert caught.value.exit_code == 124
    threading.Timer(0.05, lambda: reg.exited("a", code=1)).start()
    with pytest.raises(WorkerEnded):
        reg.wait("a", state="draining", timeout_s=10)


# -- closing, threads, forks ----------------------------------------------------------------


@every_waker
def test_close_ends_a_wait_within_milliseconds(reg: Registry, backend: Backend) -> None:
    """From another thread, 20 times: the median is far below 5 ms."""
    reg.register("a")
    took: list[float] = []
    for _ in range(20):
        items = reg.watch(after="now", backend=backend)
        items.drain()
        ended = threading.Event()

        def run(items: Watch = items, ended: threading.Event = ended) -> None:
            for _ in items:
                pass
            ended.set()

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.01)
        began = time.monotonic()
        items.close()
        took.append(time.monotonic() - began)
        assert ended.wait(5)
        thread.join()
    assert sorted(took)[10] < 0.005


def test_close_from_a_signal_handler_does_not_deadlock(place: Path, crew: Crew) -> None:
    """The handler interrupts the very thread that waits."""
    with crewlog.open(place) as reg:
        reg.register("a")
    code = (
        "import signal, sys, crewlog\n"
        "reg = crewlog.open(sys.argv[1])\n"
        "items = reg.watch(after='now')\n"
        "signal.signal(signal.SIGUSR1, lambda *_: items.close())\n"
        "for item in items: print(item.kind, flush=True)\n"
        "print('ended', flush=True)\n"
    )
    for _ in range(5):
        watcher = crew.python(code, place)
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "synced\n"
        watcher.send_signal(signal.SIGUSR1)
        assert watcher.stdout.readline() == "ended\n"
        assert watcher.wait(10) == 0


@pytest.mark.limits(safety_look_s=60.0)
@every_waker
def test_forked_child_watches_on_and_the_parent_is_not_deafened(
    place: Path, backend: Backend
) -> None:
    """The child re-arms for itself; its end takes nothing from the parent."""
    with opened(place) as reg:
        reg.register("a")
        with reg.watch(after="now", backend=backend) as items:
            items.drain()

            def child() -> None:
                reg.update("a", meta={"from": "child"})
                first = take(items, 1)
                assert changes(first) == [3]
                items.close()
                items.__exit__(None, None, None)

            joined(forked(child))
            assert changes(take(items, 1)) == [3]
            threading.Timer(0.05, lambda: reg.update("a", state="ready")).start()
            began = time.monotonic()
            assert changes(take(items, 1)) == [4]
            assert time.monotonic() - began < 10, "woken, not at the end of the wait"


def test_cursor_watch_is_refused_in_a_forked_child(reg: Registry) -> None:
    """The cursor has one owner, and that is the parent."""
    reg.register("a")
    with reg.watch(cursor="c", after="oldest") as items:

        def child() -> None:
            with pytest.raises(RegistryClosed):
                items.next(0)

        joined(forked(child))
        assert changes(items.drain()) == [2]


def test_registry_closed_under_a_watch_ends_it_with_a_word(reg: Registry) -> None:
    """Never a wait for ever."""
    reg.register("a")
    with reg.watch(after="now") as items:
        items.drain()
        reg.close()
        with pytest.raises(RegistryClosed):
            items.next(5)


# -- traps of notification ------------------------------------------------------------------


@pytest.mark.limits(safety_look_s=60.0)
def test_two_watches_with_different_filters_both_hear(reg: Registry) -> None:
    """One schedule a store: a second one would leave the first deaf."""
    reg.register("a")
    reg.register("b")
    for backend in BACKENDS:
        with (
            reg.watch(after="now", sids=["a"], backend=backend) as first,
            reg.watch(after="now", types=["worker.updated"], backend=backend) as second,
        ):
            first.drain()
            second.drain()
            timer = threading.Timer(0.05, lambda: reg.update("a", meta={"t": time.time()}))
            timer.start()
            began = time.monotonic()
            take(first, 1)
            take(second, 1)
            assert time.monotonic() - began < 10, "woken, not at the end of the wait"
            timer.join()
    assert wake._hubs.by_key == {}, "the last one to leave closes the hub"


def test_watchers_of_one_store_share_one_schedule(reg: Registry) -> None:
    """However many listen."""
    reg.register("a")
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(reg.watch(after="now", backend="watchdog"))
        assert len(wake._hubs.by_key) == 1
        threads = [t for t in threading.enumerate() if "Inotify" in type(t).__name__]
        assert len(threads) == 3, "those of one observer"
    assert wake._hubs.by_key == {}


@pytest.mark.parametrize("backend", ["watchdog", "inotify"])
def test_inotify_limit_reached_falls_back_to_polling_with_one_warning(
    place: Path, crew: Crew, backend: str
) -> None:
    """No instance is left: the watcher polls, says so once, and misses nothing.

    What another program of the user gives back in between is taken as well.
    """
    with crewlog.open(place) as reg:
        reg.register("a")
        code = """
import logging, sys, crewlog
from inotify_simple import INotify
logging.basicConfig(level=logging.WARNING, format="%(message)s")
taken = []
reg = crewlog.open(sys.argv[1])
how = {"after": "now", "backend": sys.argv[2]}
for _ in range(100):
    try:
        while True:
            taken.append(INotify())
    except OSError:
        pass
    with reg.watch(**how) as items, reg.watch(**how):
        kind, source = items.next(5).kind, items.stats()["source"]
        if source != sys.argv[2]:
            print(kind, source, flush=True)
            print(items.next(20).seq, flush=True)
            break
"""
        watcher = crew.python(code, place, backend)
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "synced poll\n"
        reg.update("a", state="ready")
        assert watcher.stdout.readline() == "3\n"
        assert watcher.stderr is not None
        assert watcher.wait(20) == 0
        assert watcher.stderr.read().count("polling instead") == 1


@pytest.mark.limits(safety_look_s=0.2)
@pytest.mark.parametrize("backend", ["watchdog", "inotify"])
def test_wakes_that_never_come_are_proof_for_polling(
    reg: Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    backend: Backend,
) -> None:
    """The head moved on and no wake came: from then on it polls, and is quick again."""
    monkeypatch.setattr(wake.Hub, "ring", lambda _: None)
    reg.register("a")
    with reg.watch(after="now", backend=backend) as items:
        items.drain()
        wait = wake.Waker.wait

        def change_and_wait(self: wake.Waker, timeout_s: float) -> bool:
            if reg.last_seq == 2:
                reg.update("a", meta={"n": 1})
            return wait(self, timeout_s)

        monkeypatch.setattr(wake.Waker, "wait", change_and_wait)
        take(items, 1)
        assert items.stats()["source"] == "poll"
        assert caplog.text.count("polling instead") == 1
        reg.update("a", meta={"n": 2})
        assert changes(take(items, 1)) == [4]


def test_network_file_system_is_polled(reg: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inotify tells nothing of what other hosts write."""
    from dataclasses import replace

    reg.register("a")
    log = files(reg)
    log.directory = replace(log.directory, local=False)
    with reg.watch(after="now") as items:
        assert items.stats()["source"] == "poll"


@pytest.mark.limits(safety_look_s=0.1)
def test_stopped_observer_is_noticed(reg: Registry) -> None:
    """A watchdog thread that has died is replaced by polling."""
    reg.register("a")
    with reg.watch(after="now", backend="watchdog") as items:
        items.drain()
        source = items._vigil.waker._hub.source
        assert isinstance(source, listen.WatchdogSource)
        source._observer.stop()
        source._observer.join()
        assert items.next(0.5) is None
        assert items.stats()["source"] == "poll"
        reg.update("a", state="ready")
        assert changes(take(items, 1)) == [3]


@every_waker
def test_renamed_head_is_survived(place: Path, backend: Backend) -> None:
    """head/ moved aside and back: nothing is lost, nothing is doubled."""
    with crewlog.open(place) as reg, crewlog.open(place) as writer:
        reg.register("a")
        writer.workers()
        with reg.watch(after="now", backend=backend) as items:
            items.drain()
            (place / layout.HEAD).rename(place / "aside")
            writer.update("a", meta={"n": 1})
            assert changes(take(items, 1)) == [3]
            (place / "aside").rename(place / layout.HEAD)
            writer.update("a", meta={"n": 2})
            assert changes(take(items, 1)) == [4]


def test_deleted_head_ends_in_a_typed_error_or_silence(place: Path) -> None:
    """head/ deleted: the watcher neither crashes nor invents; the rebuilt one is followed."""
    with crewlog.open(place) as reg:
        reg.register("a")
        with reg.watch(after="now") as items:
            items.drain()
            (place / layout.HEAD / layout.HEAD_DURABLE).unlink()
            with crewlog.open(place) as other:
                other.update("a", state="ready")  # rebuilds the file
            assert changes(take(items, 1)) == [3]


# -- stress ---------------------------------------------------------------------------------


@pytest.mark.limits(segment_bytes=8 * 1024)
@pytest.mark.parametrize("backend", ["watchdog", "inotify"])
def test_stress_delivers_everything_to_everyone(place: Path, backend: Backend) -> None:
    """Writers killed with -9, torn tails, tiny segments, compaction all the time, slow readers."""
    with opened(place) as reg:
        reg.register("first")
    stop = threading.Event()

    def compacting() -> None:
        with opened(place) as mine:
            while not stop.is_set():
                with contextlib.suppress(LockBusy):
                    compact(mine, gc=False)
                stop.wait(0.05)

    def endless(sid: str) -> None:
        write(place, sid, 10**9)

    dice = random.Random(11)
    seen: dict[str, list[int]] = {"quick": [], "slow": [], "restarted": []}
    failures: list[BaseException] = []

    def reader(name: str, pause_s: float) -> None:
        try:
            with opened(place) as mine:
                while not (stop.is_set() and seen[name] and seen[name][-1] >= end[0]):
                    with mine.watch(after="oldest", cursor=name, backend=backend) as items:
                        for _ in range(200 if name == "restarted" else 10**9):
                            item = items.next(0.2)
                            if item is None and stop.is_set():
                                break
                            if isinstance(item, Change):
                                seen[name].append(item.seq)
                                items.ack(item)
                            elif isinstance(item, Reset):
                                pytest.fail(str(item))
                            if pause_s:
                                time.sleep(pause_s)
        except BaseException as error:
            failures.append(error)

    end = [10**9]
    threads = [threading.Thread(target=compacting)]
    threads += [
        threading.Thread(target=reader, args=(name, pause))
        for name, pause in (("quick", 0.0), ("slow", 0.001), ("restarted", 0.0))
    ]
    for thread in threads:
        thread.start()
    consumed = place.parent / "consumed"
    stopped = forked(lambda: _consume(place, consumed, backend))
    count = 0
    running: list[int] = []
    for kill in range(40):
        while len(running) < 4:
            count += 1
            running.append(forked(lambda n=count: endless(f"w-{n}")))  # type: ignore[misc]
        time.sleep(dice.uniform(0.01, 0.05))
        until(lambda n=kill: _last_seq(place) > 15 * n)  # type: ignore[misc] # however slow it is
        slay(running.pop(dice.randrange(4)))
        if kill % 5 == 0:
            _tear(place)
        if kill == 10:
            os.kill(stopped, signal.SIGSTOP)
        if kill == 30:
            os.kill(stopped, signal.SIGCONT)
    for pid in running:
        slay(pid)
    with opened(place) as reg:
        end[0] = reg.register("last").rev
        stop.set()
        for thread in threads:
            thread.join(60)
        assert failures == []
        truth = [event.seq for event in reg.history()]
        joined(stopped)
        seen["stopped"] = [int(row) for row in consumed.read_text().split()]
        for name, got in seen.items():
            assert got == truth, name
        assert list(reg.history(types=["_recovered"])), "tails were torn"
        with reg.mirror() as now, opened(place) as fresh:
            assert now.state.workers == fresh.state().workers
    assert len(truth) > 500
    assert verify(place).findings == ()


def _last_seq(place: Path) -> int:
    with crewlog.open(place) as reg:
        return reg.last_seq


def _tear(place: Path) -> None:
    """Leave half a line, as a writer that dies inside its write does."""
    with crewlog.open(place) as mine, files(mine)._appender.lock.held(wait_s=5):
        state = files(mine)._heads.append_state()
        assert state is not None
        path = place / layout.LOG / layout.segment_name(state.segment)
        with path.open("ab") as file:
            file.write(b'{"v":1,"seq":')


def _consume(place: Path, out: Path, backend: Backend) -> None:
    """Note every seq until the last worker registers."""
    with (
        crewlog.open(place) as mine,
        out.open("w") as file,
        mine.watch(after="oldest", backend=backend) as items,
    ):
        for item in items:
            if isinstance(item, Change):
                file.write(f"{item.seq}\n")
                if item.sid == "last":
                    return


@pytest.mark.soak
def test_memory_stays_flat_with_a_backlog_of_a_million(place: Path) -> None:
    """By hand: pytest -m soak tests/watch/test_guarantees.py."""
    with crewlog.open(place) as reg:
        reg.register("a")
        for _ in range(100):
            with reg.batch() as batch:
                for number in range(10_000):
                    batch.update("a", meta={"number": number})
        with reg.watch(after=1, backend="poll") as items:
            take(items, 1000)
            before = _rss()
            seen = 1000
            while items.next(0.1) is not None:
                seen += 1
            assert seen >= 1_000_000
            assert _rss() - before < 8 * 1024 * 1024


@pytest.fixture(autouse=True)
def _no_hub_is_left() -> Iterator[None]:
    yield
    assert wake._hubs.by_key == {}


def test_retention_that_was_killed_hides_nothing_that_comes_after_it(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state before what stays is in place, and some that was to go is still there."""
    reg.register("a")
    for number in range(8):
        reg.update("a", meta={"number": number})
        compact(reg, gc=False)
    unlink, done = Disk.unlink, []

    def once(self: Disk, name: str, *, at: int) -> None:
        if name.endswith(".gz"):
            done.append(name)
            if len(done) > 1:
                raise OSError(errno.EIO, "killed here")
        unlink(self, name, at=at)

    with monkeypatch.context() as patch, pytest.raises(StorageFailed):
        patch.setattr(Disk, "unlink", once)
        compact(reg, gc=False, keep_history=0)
    base = snapshot.read_base(files(reg).directory)
    assert base is not None
    assert files(reg).first_seq() < base.last_seq
    with reg.watch(after=1) as items:
        item = items.next(5)
        assert isinstance(item, Reset)
        assert (item.lost, item.state.seq) == ((2, base.last_seq), base.last_seq)
        later = [event.seq for event in reg.history() if event.seq > base.last_seq]
        assert later
        assert changes(take(items, len(later))) == later
    assert [life.sid for life in reg.lives()] == ["a"]
    compact(reg, gc=False)  # finishes what was announced
    assert files(reg).first_seq() == base.last_seq + 1
    assert verify(reg.path).ok


@every_waker
def test_replaced_store_is_a_reset_for_every_watcher_of_a_registry(
    place: Path, tmp_path: Path, backend: Backend
) -> None:
    """Who sees it first opens it for all, and takes nothing away from the others."""
    with crewlog.open(tmp_path / "other") as other:
        other.register("other")
    with crewlog.open(place) as reg:
        reg.register("a")
        kinds: list[str] = []
        watches = [reg.watch(after="now", backend=backend) for _ in range(4)]

        def look(items: Watch) -> None:
            with items:
                while (item := items.next(20)) is not None:
                    kinds.append(item.kind)
                    if item.kind == "reset":
                        assert item.reason == "replaced"
                        return

        threads = [threading.Thread(target=look, args=(items,)) for items in watches]
        for thread in threads:
            thread.start()
        place.rename(tmp_path / "old")
        (tmp_path / "other").rename(place)
        for thread in threads:
            thread.join(30)
        assert kinds.count("reset") == 4
        assert [worker.sid for worker in reg.workers()] == ["other"]
