"""Watches that are closed, forgotten, forked or interrupted."""

import asyncio
import gc
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from crewlog.errors import (
    WaitTimeout,
)
from crewlog.model.items import Change, Synced
from crewlog.registry import Registry
from crewlog.watch import wake
from procs import Crew, forked, joined, until
from stores import opened


def test_closed_awatch_gives_everything_back(reg: Registry) -> None:
    """Also without `async with`."""
    reg.register("a")

    async def main() -> None:
        items = reg.awatch(cursor="c")
        await items.next(1)
        items.close()

    asyncio.run(main())
    reg.watch(cursor="c").close()
    assert wake._hubs.by_key == {}


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


@pytest.mark.limits(safety_look_s=60.0)
def test_child_that_only_closes_leaves_the_parent_hearing(reg: Registry) -> None:
    """Watchdog's stop in a child would take the parent's schedule away."""
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
    assert wake._hubs.by_key == {}


def test_signal_handler_may_close_one_watch_while_another_begins(place: Path, crew: Crew) -> None:
    """The handler never waits for a lock that the interrupted thread holds."""
    with opened(place) as reg:
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


def test_wait_looks_ahead_not_back(reg: Registry) -> None:
    """An older worker of the same sid has ended: the next one is waited for."""
    reg.register("a")
    reg.exited("a", code=1)
    threading.Timer(0.1, lambda: reg.register("a", ready=True)).start()
    assert reg.wait("a", state="ready", timeout_s=10).generation == 2


def test_synced_is_said_once(reg: Registry) -> None:
    """With the state first, or once the events that were asked for are delivered."""
    reg.register("a")
    for after in (None, 0, "now"):
        with reg.watch(after=after) as items:
            reg.update("a", meta={"t": time.time()})
            kinds = [item.kind for item in items.drain()]
            assert kinds.count("synced") == 1
            assert isinstance(items.next(0), Synced | None)
