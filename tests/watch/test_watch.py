"""A watcher sees every durable event once, in order, whatever else goes on."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import LockBusy, StorageFailed, StoreMissing
from crewlog.local import layout
from crewlog.model.events import JsonObject, JsonValue
from crewlog.model.items import Change, Synced
from crewlog.model.state import State
from crewlog.registry import Registry
from crewlog.store import Backend
from crewlog.watch.callbacks import Mirror
from crewlog_compactor import compact, verify
from faults import EIO, FailingDisk, only, registry_on
from procs import Crew, forked, joined, until
from stores import opened

_WATCHER = """
import sys, crewlog
with crewlog.open(sys.argv[1]) as reg, reg.watch(after="oldest") as items:
    print("ready", flush=True)
    for item in items:
        if item.kind == "reset":
            print("reset", item, flush=True)
        if item.kind == "change":
            print(item.seq, item.sid, item.event.data.get("meta", {}).get("change", -1), flush=True)
            if item.sid == "end":
                break
"""


@pytest.mark.limits(segment_bytes=16 * 1024)
def test_watcher_sees_every_event_of_four_writers_once_while_compaction_runs(
    place: Path, crew: Crew
) -> None:
    """4 writers, rotation every 16 KiB, compaction every 100 ms, a watcher in its own process."""
    changes = 250

    def write(number: int) -> None:
        with opened(place) as mine:
            mine.register(f"w-{number}")
            for change in range(changes):
                mine.update(f"w-{number}", meta={"change": change})

    def compacting() -> None:
        with opened(place) as mine:
            while not stop.is_set():
                with contextlib.suppress(LockBusy):
                    compact(mine, gc=False)
                time.sleep(0.1)

    with opened(place) as reg:
        reg.register("begin")
        watcher = crew.python(_WATCHER, place)
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "ready\n"
        stop = threading.Event()
        pids = [forked(lambda n=n: write(n)) for n in range(4)]  # type: ignore[misc]
        compactor = threading.Thread(target=compacting)
        compactor.start()
        joined(*pids)
        stop.set()
        compactor.join()
        compact(reg, gc=False)
        reg.register("end")
        out = watcher.stdout.read()  # not communicate: it would drop what readline has buffered
        assert watcher.wait(60) == 0
        rows = [row.split() for row in out.splitlines()]
        truth = [[str(e.seq), e.sid, str(_change(e.data))] for e in reg.history()]
        assert rows == truth
        assert len(rows) == 4 * (changes + 1) + 2
        assert len(list((place / layout.ARCHIVE).iterdir())) > 5
    assert verify(place).findings == ()


def _change(data: JsonObject) -> JsonValue:
    meta = data.get("meta")
    return meta.get("change", -1) if isinstance(meta, dict) else -1


def test_watch_begins_with_the_state_and_goes_on_without_a_gap(reg: Registry) -> None:
    """State at S first, whatever came meanwhile, then S+1."""
    reg.register("a")
    with reg.watch() as items:
        reg.update("a", state="ready")
        synced, change = items.drain()
    assert isinstance(synced, Synced)
    assert synced.state is not None
    assert synced.state.workers["a"].state == "starting"
    assert isinstance(change, Change)
    assert (synced.seq, change.seq, change.type) == (2, 3, "worker.ready")


@pytest.mark.limits(safety_look_s=60.0)
@pytest.mark.parametrize("backend", ["watchdog", "poll", "inotify"])
def test_change_wakes_the_watcher(reg: Registry, backend: Backend) -> None:
    """A change arrives well before the safety look would find it."""
    reg.register("a")
    with reg.watch(after="now", backend=backend) as items:
        assert isinstance(items.next(5), Synced)
        threading.Timer(0.05, lambda: reg.update("a", state="ready")).start()
        began = time.monotonic()
        item = items.next(10)
        assert isinstance(item, Change)
        assert item.type == "worker.ready"
        assert time.monotonic() - began < 5, "woken, not at the end of the wait"


@pytest.mark.limits(segment_bytes=4000)
def test_resume_from_every_seq_delivers_exactly_the_rest(reg: Registry) -> None:
    """Through rotation, compaction and archive, from any position."""
    reg.register("a")
    for number in range(40):
        reg.update("a", meta={"number": number})
        if number in {10, 20, 30}:
            compact(reg, gc=False)
    truth = [e.seq for e in reg.history()]
    for after in range(reg.last_seq + 1):
        with reg.watch(after=after, backend="poll") as items:
            seen = [item.seq for item in items.drain() if item.kind == "change"]
        assert seen == [seq for seq in truth if seq > after]


def test_only_durable_events_are_seen(place: Path) -> None:
    """An event whose sync failed is written, and never shown."""
    disk = FailingDisk()
    reg = registry_on(place, disk)
    reg.register("a")
    with crewlog.open(place) as reader, reader.watch(after="oldest") as items:
        assert [i.kind for i in items.drain()] == ["change", "synced"]
        disk.fault = only("sync", EIO)
        with pytest.raises(StorageFailed):
            reg.register("b")
        assert b'"sid":"b"' in max((place / layout.LOG).iterdir()).read_bytes()
        assert items.next(0.2) is None
        assert [w.sid for w in reader.workers()] == ["a"]
        assert [e.sid for e in reader.history()] == ["a"]


def test_filters_deliver_only_what_was_asked_and_move_on(reg: Registry) -> None:
    """The position advances over filtered events too."""
    for sid in ("a", "b"):
        reg.register(sid)
        reg.update(sid, state="ready")
    with reg.watch(after="oldest", sids=["b"], types=["worker.ready"]) as items:
        changes = items.drain()
        assert [(i.kind, i.seq) for i in changes] == [("change", 5), ("synced", 5)]
        assert items.position == reg.last_seq
        assert items.lag == 0


@pytest.mark.limits(safety_look_s=60.0)
def test_close_from_another_thread_ends_the_iteration(reg: Registry) -> None:
    """A waiting watcher is let go at once."""
    reg.register("a")
    seen: list[str] = []
    with reg.watch(after="now") as items:
        thread = threading.Thread(target=lambda: seen.extend(i.kind for i in items))
        thread.start()
        until(lambda: seen == ["synced"])
        items.close()
        thread.join(20)
        assert not thread.is_alive()


def test_watch_without_a_store_says_so(reg: Registry) -> None:
    """Reading creates nothing, and there is nothing to watch."""
    with pytest.raises(StoreMissing):
        reg.watch()


@pytest.mark.parametrize("after", [-1, "later", 1.5, True])
def test_bad_position_is_refused(reg: Registry, after: object) -> None:
    """A position is a seq or a word."""
    reg.register("a")
    with pytest.raises(ValueError, match="after must be"):
        reg.watch(after=after)  # type: ignore[arg-type]


def test_watch_command_prints_json_lines(place: Path, reg: Registry, crew: Crew) -> None:
    """The command line's stream is one JSON object a line, flushed."""
    reg.register("a")
    watcher = crew.python(
        "from crewlog_cli.main import main; main()",
        "--dir", place, "watch", "--json", "--now", "--count", "2", "--timeout", "60s",
    )  # fmt: skip
    assert watcher.stdout is not None
    assert json.loads(watcher.stdout.readline())["kind"] == "synced"
    reg.update("a", state="ready")
    change = json.loads(watcher.stdout.readline())
    assert {"kind", "seq", "ts", "type", "sid", "actor", "data"} <= change.keys()
    assert change["actor"]["pid"] == os.getpid()
    reg.remove("a", reason="done")
    assert json.loads(watcher.stdout.readline())["type"] == "worker.released"
    assert watcher.wait(30) == 0


def test_mirror_returns_the_very_state_that_was_accepted(reg: Registry) -> None:
    """Also at the deadline, where another change may come right behind the last look."""
    reg.register("a")
    looks = 0

    def state() -> State:
        nonlocal looks
        looks += 1
        reg.update("a", labels={"look": str(looks)})
        return reg.state()

    with Mirror(reg.watch(after="now"), state) as now:
        accepted = now.wait(lambda seen: seen.workers["a"].labels["look"] == "2", timeout_s=0)
    assert accepted.workers["a"].labels["look"] == "2"
