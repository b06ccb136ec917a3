"""What a registry promises, wherever its store is: the public API on a directory and on etcd.

Nothing here knows how either keeps its events.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crewlog
from commands import Cli
from crewlog.errors import CrewlogError
from crewlog.model.events import EventType
from crewlog.registry import Registry
from crewlog_compactor import (
    KeepEvents,
    anchor,
    apply_plan,
    collect,
    compact,
    make_plan,
    verify,
)
from procs import Crew, forked, joined, kill, until


def seqs(reg: Registry, *, after: int = 0) -> list[int]:
    """Return the seqs of every line that is kept, the store's own too."""
    own = ["_segment", "_seal", "_snapshot", "_recovered", "_gap", "_repaired", "_archive_dropped"]
    kinds = [
        *own,
        *("worker." + word for word in (
            "registered", "ready", "updated", "draining", "stop_requested", "exited", "lost",
            "released", "pruned")),
    ]  # fmt: skip
    return [event.seq for event in reg.history(types=cast("list[EventType]", kinds), after=after)]


def refolded(reg: Registry) -> dict[str, tuple[str, int]]:
    """Fold the events by the rules, anew: state and rev by sid."""
    after = {
        "worker.ready": "ready",
        "worker.draining": "draining",
        "worker.stop_requested": "stopping",
        "worker.lost": "lost",
        "worker.released": "released",
    }
    states: dict[str, tuple[str, int]] = {}
    for event in reg.history():
        match event.type:
            case "worker.registered":
                states[event.sid] = str(event.data["state"]), event.seq
            case "worker.pruned":
                del states[event.sid]
            case "worker.exited":
                bad = event.data["signal"] is not None or event.data["code"] not in {None, 0}
                failed = bad and event.data["expected"] is not True
                states[event.sid] = "failed" if failed else "exited", event.seq
            case kind:
                states[event.sid] = after.get(kind, states[event.sid][0]), event.seq
    return states


def shown(reg: Registry) -> dict[str, tuple[str, int]]:
    """Return state and rev by sid, as the registry shows them."""
    return {sid: (w.state.value, w.rev) for sid, w in reg.state().workers.items()}


# -- change ---------------------------------------------------------------------------------


def test_nothing_is_created_by_reading(reg: Registry, where: str) -> None:
    """No store: empty answers, and still no store."""
    assert reg.workers() == []
    assert reg.get("a") is None
    assert reg.last_seq == 0
    assert list(reg.history()) == []
    assert not reg.exists
    with crewlog.open(where) as other:
        assert not other.exists
    with pytest.raises(crewlog.StoreMissing):
        reg.watch()


def test_nothing_is_created_by_a_change_that_an_empty_store_refuses(
    reg: Registry, where: str
) -> None:
    """A typo in a sid, or in the place, leaves no store behind."""
    changes: list[Callable[[], object]] = [
        lambda: reg.update("typo", state="ready"),
        lambda: reg.exited("typo", code=0),
        lambda: reg.remove("typo", reason="none"),
    ]
    for change in changes:
        with pytest.raises(crewlog.WorkerNotFound):
            change()
    with pytest.raises(crewlog.WorkerNotFound), reg.batch() as batch:
        batch.update("typo", state="ready")

    async def later() -> None:
        async with crewlog.aopen(where) as mine:
            await mine.update("typo", state="ready")

    with pytest.raises(crewlog.WorkerNotFound):
        asyncio.run(later())
    assert not reg.exists
    with reg.batch() as batch:
        batch.register("a")
        batch.update("a", state="ready")
    assert reg.exists


def test_bad_questions_are_refused_at_once_and_say_what_is_right(reg: Registry) -> None:
    """Before anything is read, and not as an AttributeError of the first item."""
    reg.register("a")
    with pytest.raises(TypeError, match="since must be a datetime, a timedelta or words, not int"):
        reg.history(since=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'soon' is no time"):
        reg.history(since="soon")
    with pytest.raises(ValueError, match="after must be a seq, not 'x'"):
        reg.history(after="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"state is one of draining, exited, .*, not 'bogus'"):
        reg.wait("a", state="bogus")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a wait must be a number of seconds"):
        reg.wait("a", state="ready", timeout_s="1")  # type: ignore[arg-type]
    with pytest.raises(crewlog.WaitTimeout, match="state ready of worker 'a' did not happen"):
        reg.wait("a", state="ready", timeout_s=0.01)


def test_register_returns_the_worker_and_everybody_sees_it(reg: Registry, where: str) -> None:
    """Durable on return, with all that was given."""
    worker = reg.register(
        "a", sock="/run/a", version="1", labels={"x": "y"}, meta={"n": [1, None]}, ready=True
    )
    assert (worker.state, worker.pid, worker.rev) == ("ready", os.getpid(), reg.last_seq)
    assert worker.rev == 2, "the first line is the store's own"
    with crewlog.open(where) as other:
        assert other.get("a") == worker
        assert other.workers() == [worker]
        assert other.liveness("a").alive


def test_register_of_a_living_sid_is_refused(reg: Registry, crew: Crew) -> None:
    """The conflict names the holder; nothing is written."""
    reg.register("a", pid=crew.sleeper().pid)
    last = reg.last_seq
    with pytest.raises(crewlog.WorkerExists) as caught:
        reg.register("a")
    assert (caught.value.sid, caught.value.outcome) == ("a", "not_written")
    assert reg.last_seq == last


def test_register_over_a_dead_holder_records_the_loss_with_it(reg: Registry, crew: Crew) -> None:
    """Loss and registration are one unit, and the generation grows."""
    process = crew.sleeper()
    reg.register("a", pid=process.pid)
    kill(process)
    assert reg.register("a").generation == 2
    kinds = [event.type for event in reg.history(sid="a")]
    assert kinds == ["worker.registered", "worker.lost", "worker.registered"]


def test_update_merges_and_what_changes_nothing_is_not_written(reg: Registry) -> None:
    """Labels and meta key by key; None removes one."""
    reg.register("a", labels={"x": "1", "y": "2"}, meta={"n": 1})
    worker = reg.update("a", labels={"x": None, "z": "3"}, meta={"n": 2}, state="ready")
    assert (worker.labels, worker.meta, worker.state) == ({"y": "2", "z": "3"}, {"n": 2}, "ready")
    assert reg.update("a", labels={"z": "3"}).rev == worker.rev == reg.last_seq


def test_expect_guards_every_change(reg: Registry) -> None:
    """A stale rev is refused, and says which one is there."""
    old = reg.register("a").rev
    new = reg.update("a", meta={"n": 1}).rev
    for change in (
        lambda: reg.update("a", meta={"n": 2}, expect=old),
        lambda: reg.exited("a", code=0, expect=old),
        lambda: reg.remove("a", reason="r", expect=old),
    ):
        with pytest.raises(crewlog.StaleRevision) as caught:
            change()
        assert (caught.value.expected, caught.value.actual) == (old, new)
    assert reg.remove("a", reason="r", expect=new).type == "worker.released"


def test_ends_are_recorded_once_and_rules_hold(reg: Registry) -> None:
    """A second end of the same kind returns the first; what the rules forbid is refused."""
    reg.register("a")
    event = reg.exited("a", code=3)
    assert reg.exited("a", code=3) == event
    worker = reg.get("a")
    assert worker is not None
    assert worker.state == "failed"
    with pytest.raises(crewlog.InvalidTransition):
        reg.update("a", state="ready")
    with pytest.raises(crewlog.WorkerNotFound):
        reg.update("nobody", state="ready")
    assert [w.sid for w in reg.workers()] == []
    assert [w.sid for w in reg.workers(all=True)] == ["a"]


@pytest.mark.parametrize("bad", ["", "-a", "a/b", "a b", "ä", "x" * 129])
def test_bad_arguments_are_refused_before_anything_is_written(reg: Registry, bad: str) -> None:
    """ValueError, and no store."""
    with pytest.raises(ValueError, match="sid"):
        reg.register(bad)
    with pytest.raises(ValueError, match=r"NaN|nan"):
        reg.register("a", meta={"n": float("nan")})
    assert not reg.exists


def test_batch_is_written_whole_or_not_at_all(reg: Registry) -> None:
    """One refusal takes all of it back; seqs of a batch are dense."""
    with reg.batch() as batch:
        batch.register("a")
        batch.update("a", state="ready")
        batch.register("b")
    assert batch.last_seq == reg.last_seq == 4
    with pytest.raises(crewlog.WorkerNotFound), reg.batch() as batch:
        batch.register("c")
        batch.update("nobody", state="ready")
    assert reg.last_seq == 4
    assert shown(reg) == {"a": ("ready", 3), "b": ("starting", 4)}


def test_batch_of_many_events_is_one_unit(reg: Registry) -> None:
    """A hundred workers, three events each."""
    with reg.batch() as batch:
        for number in range(100):
            batch.register(f"w{number}")
            batch.update(f"w{number}", state="ready")
            batch.exited(f"w{number}", code=0)
    assert reg.last_seq == 301
    assert shown(reg) == refolded(reg)


def test_redacted_words_are_nowhere(where: str) -> None:
    """What `redact` takes out is in no event and no state."""

    def redact(_kind: str, given: dict[str, object]) -> dict[str, object]:
        return {key: {"gone": True} if key == "meta" else value for key, value in given.items()}

    with crewlog.open(where, redact=redact) as reg:  # type: ignore[arg-type]
        reg.register("a", meta={"token": "geheim"})
        assert b"geheim" not in b"".join(event.raw for event in reg.history())
        worker = reg.get("a")
        assert worker is not None
        assert worker.meta == {"gone": True}


def test_what_another_changed_meanwhile_is_never_missed(reg: Registry, where: str) -> None:
    """Neither a refusal nor "nothing to do" rests on what was known from the change before."""
    with crewlog.open(where) as other:
        reg.register("a", meta={"n": 1})
        other.exited("a", code=0)
        assert reg.register("a", meta={"n": 1}).generation == 2
        other.update("a", meta={"n": 2})
        assert reg.update("a", meta={"n": 1}).meta == {"n": 1}
        other.remove("a", reason="r")
        with pytest.raises(crewlog.InvalidTransition):
            reg.update("a", meta={"n": 3})


# -- order ----------------------------------------------------------------------------------


def test_seqs_of_many_writers_are_dense_and_each_once(where: str) -> None:
    """Processes and threads that write at once: one order, no gap, no event twice."""

    def work(number: int) -> None:
        with crewlog.open(where) as mine:
            for turn in range(10):
                mine.register(f"p{number}-{turn}")

    pids = [forked(lambda n=n: work(n)) for n in range(4)]  # type: ignore[misc]
    with crewlog.open(where) as reg:
        threads = [
            threading.Thread(target=lambda n=n: [reg.register(f"t{n}-{i}") for i in range(10)])
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        joined(*pids)
        assert seqs(reg) == list(range(1, 82))
        assert len(reg.workers()) == 80
        assert shown(reg) == refolded(reg)
    assert verify(where).ok


def test_one_of_many_that_register_one_sid_wins(where: str, crew: Crew) -> None:
    """Exactly one; the others hear of a conflict."""
    pid = crew.sleeper().pid
    with crewlog.open(where) as reg:
        reg.register("first")

    def work() -> None:
        with crewlog.open(where) as mine:
            try:
                mine.register("a", pid=pid)
            except crewlog.WorkerExists:
                os._exit(7)

    pids = [forked(work) for _ in range(8)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in pids]
    assert sorted(codes) == [0] + [7] * 7
    with crewlog.open(where) as reg:
        assert [event.type for event in reg.history(sid="a")] == ["worker.registered"]


def test_counter_loses_no_increment(where: str) -> None:
    """Read, then write with `expect`: what two do at once is never lost."""
    with crewlog.open(where) as reg:
        reg.register("a", meta={"n": 0})

    def work() -> None:
        with crewlog.open(where) as mine:
            done = 0
            while done < 10:
                worker = mine.get("a")
                assert worker is not None
                number = worker.meta["n"]
                assert isinstance(number, int)
                try:
                    mine.update("a", meta={"n": number + 1}, expect=worker.rev)
                except crewlog.StaleRevision:
                    continue
                done += 1

    joined(*[forked(work) for _ in range(4)])
    with crewlog.open(where) as reg:
        worker = reg.get("a")
        assert worker is not None
        assert worker.meta == {"n": 40}


def test_forked_child_goes_on_with_the_registry(reg: Registry) -> None:
    """Parent and children write and read with what was one object."""
    reg.register("parent")

    def work(number: int) -> None:
        for turn in range(5):
            reg.register(f"c{number}-{turn}")
            assert reg.get(f"c{number}-{turn}") is not None

    pids = [forked(lambda n=n: work(n)) for n in range(4)]  # type: ignore[misc]
    for turn in range(10):
        reg.update("parent", meta={"turn": turn})
    joined(*pids)
    assert seqs(reg) == list(range(1, 2 + 1 + 20 + 10))
    assert len(reg.workers()) == 21


_WRITER = """
import sys, crewlog
with crewlog.open(sys.argv[1]) as reg:
    number = 0
    while True:
        reg.register(f"{sys.argv[2]}-{number}")
        print(number, flush=True)
        number += 1
"""


def test_writer_killed_with_9_loses_nothing_acknowledged(where: str, crew: Crew) -> None:
    """Every registration that was printed is there, once, and writing goes on."""
    acknowledged: dict[str, int] = {}
    for turn in range(6):
        writer = crew.python(_WRITER, where, f"k{turn}")
        assert writer.stdout is not None
        for _ in range(3 + 2 * turn):
            acknowledged[f"k{turn}"] = int(writer.stdout.readline())
        kill(writer)
        rest = writer.stdout.read().split("\n")
        numbers = [int(row) for row in rest[:-1] if row]  # a torn last line tells nothing
        acknowledged[f"k{turn}"] = max([acknowledged[f"k{turn}"], *numbers])
    with crewlog.open(where) as reg:
        reg.register("after")
        there = [event.sid for event in reg.history()]
        assert len(there) == len(set(there))
        for name, last in acknowledged.items():
            assert {f"{name}-{n}" for n in range(last + 1)} <= set(there)
        assert seqs(reg) == list(range(1, reg.last_seq + 1))
        assert shown(reg) == refolded(reg)
    assert verify(where).ok


# -- history --------------------------------------------------------------------------------


def test_history_filters_and_runs_both_ways(reg: Registry) -> None:
    """By sid, type, seq and time; newest first is the reverse."""
    for number in range(5):
        reg.register(f"w{number}")
        reg.update(f"w{number}", state="ready")
    whole = list(reg.history())
    assert [event.seq for event in whole] == list(range(2, 12))
    assert list(reg.history(newest_first=True)) == whole[::-1]
    assert [event.seq for event in reg.history(sid="w2")] == [6, 7]
    assert [event.seq for event in reg.history(types=["worker.ready"])] == [3, 5, 7, 9, 11]
    assert list(reg.history(after=8)) == whole[7:]
    assert list(reg.history(since=whole[4].ts, until=whole[7].ts)) == whole[4:7]
    assert list(reg.history(newest_first=True, after=8)) == whole[:6:-1]
    assert whole[0].actor["pid"] == os.getpid()


def test_state_at_every_seq_is_the_fold_of_the_events_up_to_it(reg: Registry) -> None:
    """By seq and by time, before and after compactions."""
    expected: dict[int, dict[str, tuple[str, int]]] = {}
    for number in range(6):
        reg.register(f"w{number}", ready=number % 2 == 0)
        expected[reg.last_seq] = shown(reg)
        if number % 3 == 2:
            reg.exited(f"w{number}", code=number)
            expected[reg.last_seq] = shown(reg)
            compact(reg)
    for seq, workers in expected.items():
        past = reg.at(seq)
        assert {sid: (w.state.value, w.rev) for sid, w in past.workers.items()} == workers
        assert past.since is not None
        assert {s: (w.state.value, w.rev) for s, w in reg.at(past.since).workers.items()} == workers
    assert reg.at(0).workers == {}
    assert reg.at(datetime(2020, 1, 1, tzinfo=UTC)).workers == {}
    assert reg.at(10**9).seq == reg.last_seq


def test_lives_and_totals_are_told(reg: Registry) -> None:
    """A worker's life by its ends; counts never step back."""
    reg.register("a", ready=True)
    reg.exited("a", code=0)
    reg.register("a")
    compact(reg)
    assert [(life.sid, life.generation) for life in reg.lives()] == [("a", 1), ("a", 2)]
    assert reg.totals() == {"worker.registered": 2, "worker.exited": 1}


def test_anchor_proves_a_history(reg: Registry, where: str) -> None:
    """One that was kept holds; one of another history does not."""
    reg.register("a")
    kept = anchor(reg)
    reg.update("a", state="ready")
    assert verify(where, anchor=kept).ok
    other = type(kept)(kept.seq, "0" * 64)
    assert [f.code for f in verify(where, anchor=other).findings] == ["history_diverged"]


# -- watch ----------------------------------------------------------------------------------


def test_watch_resumes_after_every_seq(reg: Registry) -> None:
    """Whatever seq it begins after: the rest, once, in order, then Synced."""
    with reg.batch() as batch:
        batch.register("a")
        batch.register("b")
        batch.update("a", state="ready")
    compact(reg)
    for number in range(3):
        reg.update("b", meta={"n": number})
    last = reg.last_seq
    every = [event.seq for event in reg.history()]
    for after in range(last + 1):
        with reg.watch(after=after) as items:
            changes = items.drain()
        assert [item.seq for item in changes[:-1]] == [seq for seq in every if seq > after], after
        assert (changes[-1].kind, changes[-1].seq) == ("synced", last)


def test_watch_wakes_for_what_another_process_writes(reg: Registry, where: str) -> None:
    """Begun with the state; each change in order, soon."""
    reg.register("a")

    def work() -> None:
        with crewlog.open(where) as mine:
            for number in range(20):
                mine.update("a", meta={"n": number})

    with reg.watch() as items:
        first = items.next(5)
        assert first is not None
        assert first.kind == "synced"
        assert first.state is not None
        assert list(first.state.workers) == ["a"]
        pid = forked(work)
        changes = [items.next(10) for _ in range(20)]
        joined(pid)
    assert [item.seq for item in changes if item is not None] == list(range(3, 23))
    assert items.next(0) is None


def test_watch_filters_by_sid_and_type(reg: Registry) -> None:
    """Only what was asked for."""
    for sid in ("a", "b"):
        reg.register(sid)
        reg.update(sid, state="ready")
    with reg.watch(after=0, sids=["b"]) as items:
        assert [i.seq for i in items.drain() if i.kind == "change"] == [4, 5]
    with reg.watch(after=0, types=["worker.ready"]) as items:
        assert [i.seq for i in items.drain() if i.kind == "change"] == [3, 5]


def test_many_watchers_each_get_everything(reg: Registry) -> None:
    """Ten of one process, and asyncio beside them."""
    reg.register("a")
    watches = [reg.watch(after="now") for _ in range(10)]
    for number in range(10):
        reg.update("a", meta={"n": number})
    for items in watches:
        got: list[int] = []
        while len(got) < 10:
            item = items.next(5)
            assert item is not None
            if item.kind == "change":
                got.append(item.seq)
        assert got == list(range(3, 13))
        items.close()


def test_subscribe_wait_and_mirror_follow(reg: Registry) -> None:
    """A thread that calls back; a wait without a race."""
    reg.register("a")
    got: list[int] = []
    with reg.subscribe(lambda item: got.append(item.seq), after="now"):
        threading.Timer(0.05, lambda: reg.update("a", state="ready")).start()
        assert reg.wait("a", state="ready", timeout_s=10).state == "ready"
        until(lambda: 3 in got)
    with reg.mirror() as now, pytest.raises(crewlog.WaitTimeout):
        now.wait(lambda state: len(state.workers) > 1, timeout_s=0.05)


def test_asyncio_shares_the_store(where: str) -> None:
    """Fifty tasks, one loop; and a watch beside them."""

    async def work() -> list[int]:
        async with crewlog.aopen(where) as reg:
            await reg.register("a")
            async with reg.watch(after="now") as items:
                await asyncio.gather(*[reg.update("a", meta={f"k{n}": n}) for n in range(50)])
                seen: list[int] = []
                while len(seen) < 50:
                    item = await items.next(10)
                    assert item is not None
                    if item.kind == "change":
                        seen.append(item.seq)
                return seen

    assert asyncio.run(work()) == list(range(3, 53))


def test_cursor_goes_on_where_it_stood(reg: Registry) -> None:
    """Taking an item acknowledges the one before; a second owner is refused."""
    reg.register("a")
    for number in range(4):
        reg.update("a", meta={"n": number})
    with reg.watch(cursor="mailer", after=0) as items:
        assert [items.next(1).seq for _ in range(3)] == [2, 3, 4]  # type: ignore[union-attr]
        with pytest.raises(crewlog.errors.CursorBusy):
            reg.watch(cursor="mailer")
    with reg.watch(cursor="mailer") as items:
        assert [i.seq for i in items.drain() if i.kind == "change"] == [4, 5, 6]
    assert [(c.name, c.seq) for c in reg.store().cursors.every()] == [("mailer", 6)]
    assert reg.store().cursors.remove("mailer")
    assert not reg.store().cursors.remove("mailer")


# -- retention ------------------------------------------------------------------------------


def aged(reg: Registry) -> int:
    """Make a history of several sealed parts, drop the older half, return the oldest seq kept."""
    for number in range(12):
        reg.register(f"w{number}")
        reg.exited(f"w{number}", code=0)
        compact(reg)
    report = compact(reg, keep_history=KeepEvents(12))
    assert report.dropped is not None
    assert report.dropped[0] == 1
    return report.dropped[1] + 1


def test_history_that_was_dropped_is_compacted_error(reg: Registry, where: str) -> None:
    """Never an empty answer: the error says what is kept. The state is whole."""
    oldest = aged(reg)
    assert reg.store().first_seq() == oldest
    assert [w.sid for w in reg.workers(all=True)] == [f"w{n}" for n in range(12)]

    def watch() -> None:
        with reg.watch(after=0, on_compacted="raise") as items:
            items.next(1)

    for ask in (
        lambda: list(reg.history(after=0)),
        lambda: reg.at(oldest - 2),
        lambda: reg.at(datetime(2020, 1, 1, tzinfo=UTC)),
        watch,
    ):
        with pytest.raises(crewlog.errors.CompactedError) as caught:
            ask()
        assert (caught.value.oldest, caught.value.snapshot_seq) == (oldest, oldest - 1)
    assert next(iter(reg.history())).seq >= oldest
    for seq in range(oldest, reg.last_seq + 1):
        assert reg.at(seq).seq == seq
    assert verify(where).ok


def test_watcher_of_dropped_history_gets_a_reset_and_the_exact_loss(reg: Registry) -> None:
    """It goes on from the state before what is kept, with all of that."""
    reg.register("early")
    oldest = aged(reg)
    with reg.watch(after=2) as items:
        item = items.next(5)
        assert item is not None
        assert item.kind == "reset"
        assert (item.reason, item.lost) == ("compacted", (3, oldest - 1))
        assert oldest > 3
        assert dict(item.state.workers) == dict(reg.at(oldest - 1).workers)
        kept = [event.seq for event in reg.history()]
        reg.register("later")
        rest = [i.seq for i in items.drain() if i.kind == "change"]
        assert rest == [*kept, reg.last_seq]


def test_cursor_knows_the_line_it_stood_at(reg: Registry) -> None:
    """A restored store that has grown past it since is another: nothing is passed over."""
    reg.register("a")
    for n in range(3):
        reg.update("a", meta={"n": n})
    last = reg.last_seq
    with reg.watch(cursor="c", after=0) as items:
        items.drain()
        assert items.next(0) is None  # the last one is acknowledged

    def stand(digest: int) -> str:
        owned = reg.store().cursors.own("c", start=0)
        owned.set(last, digest)
        owned.close()
        with reg.watch(cursor="c") as items:
            item = items.next(5)
        return item.reason if isinstance(item, crewlog.Reset) else type(item).__name__

    state = reg.store().cursors.read("c")
    assert state is not None
    assert (state.seq, state.damaged) == (last, False)
    assert state.digest != 0
    reg.update("a", meta={"n": 3})
    assert stand(state.digest) == "Change"
    assert stand(state.digest ^ 2) == "replaced"  # what it saw there was another line
    assert stand(0) == "Change"  # as version 0.1 left it: not known


def test_cursor_holds_retention_back(reg: Registry) -> None:
    """What it has not read stays."""
    reg.register("a")
    with reg.watch(cursor="slow", after=0) as items:
        items.next(1)
        for number in range(5):
            reg.update("a", meta={"n": number})
            compact(reg)
        assert compact(reg, keep_history=KeepEvents(0)).dropped is None
        assert [i.seq for i in items.drain() if i.kind == "change"]
    assert compact(reg, keep_history=KeepEvents(0)).dropped is not None


def test_keep_history_by_age_and_by_bytes(reg: Registry) -> None:
    """Nothing young goes; a budget of no bytes keeps what is not sealed long enough."""
    reg.register("a")
    for number in range(5):
        reg.update("a", meta={"n": number})
        compact(reg)
    assert compact(reg, keep_history=timedelta(hours=1)).dropped is None
    assert compact(reg, keep_history=10**9).dropped is None
    assert compact(reg, keep_history=0).dropped is not None
    assert list(shown(reg)) == ["a"]


KEEPS = [None, *map(KeepEvents, range(12)), 0, timedelta(0), timedelta(hours=1)]


@pytest.mark.parametrize("keep", KEEPS)
def test_dry_run_foretells_a_compaction_and_changes_nothing(
    reg: Registry, where: str, crew: Crew, keep: timedelta | int | KeepEvents | None
) -> None:
    """Whom it would collect, what it would fold, archive and drop: then it does just that."""
    for number in range(12):
        reg.register(f"w{number}")
        compact(reg)
    doomed = crew.sleeper()
    reg.register("doomed", pid=doomed.pid)
    kill(doomed)
    before = seqs(reg), shown(reg), reg.compacted(), contents(where)
    report = compact(reg, keep_history=keep, dry_run=True)
    assert (seqs(reg), shown(reg), reg.compacted(), contents(where)) == before
    done = compact(reg, keep_history=keep)
    assert report.collected is not None
    assert done.collected is not None
    assert report.collected.lost == ("doomed",)
    foreseen = replace(report, dry_run=False, collected=replace(report.collected, dry_run=False))
    assert foreseen == done
    assert verify(where).ok


def contents(where: str) -> dict[str, bytes]:
    """Return every file of a store in a directory; elsewhere nothing."""
    paths = [path for path in Path(where).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths}


def test_end_whose_history_was_dropped_is_told_from_the_state(reg: Registry) -> None:
    """A second, equal one is no event, and no error either; nor is a stop of who has ended."""
    reg.register("a")
    ended = reg.exited("a", code=3)
    for _ in range(2):
        compact(reg)
        reg.register("b")
        reg.exited("b", code=0)
    compact(reg, keep_history=KeepEvents(0))
    assert all(event.seq > ended.seq for event in reg.history())
    for again in (reg.exited("a", code=3), reg.stop("a", reason="r"), reg.observe("a")):
        assert (again.seq, again.ts, again.type) == (ended.seq, ended.ts, ended.type)
        assert (again.data["code"], again.actor, again.raw) == (3, {}, b"")


def test_dry_run_foretells_a_refused_collection(reg: Registry, crew: Crew) -> None:
    """As the compaction itself would tell it."""
    doomed = [crew.sleeper() for _ in range(12)]
    for number, process in enumerate(doomed):
        reg.register(f"d{number}", pid=process.pid)
    for process in doomed:
        kill(process)
    report = compact(reg, dry_run=True)
    assert (report.collected, type(report.refused)) == (None, crewlog.errors.CollectRefused)
    forced = compact(reg, dry_run=True, force=True).collected
    assert forced is not None
    assert len(forced.lost) == 12
    assert len(reg.workers()) == 12


# -- liveness -------------------------------------------------------------------------------


def test_dead_worker_is_lost_once_however_many_collect(where: str, crew: Crew) -> None:
    """One event a death; who lives is left alone."""
    with crewlog.open(where) as reg:
        doomed = [crew.sleeper() for _ in range(5)]
        for number, process in enumerate(doomed):
            reg.register(f"d{number}", pid=process.pid)
        reg.register("alive", pid=crew.sleeper().pid)
        for process in doomed:
            kill(process)

    def work() -> None:
        with crewlog.open(where) as mine:
            collect(mine)

    joined(*[forked(work) for _ in range(6)])
    with crewlog.open(where) as reg:
        lost = [event.sid for event in reg.history(types=["worker.lost"])]
        assert sorted(lost) == [f"d{n}" for n in range(5)]
        assert [w.sid for w in reg.workers()] == ["alive"]


def test_plan_is_carried_out_only_where_nothing_changed(reg: Registry, crew: Crew) -> None:
    """Who registered again since is a conflict."""
    processes = [crew.sleeper() for _ in range(3)]
    for number, process in enumerate(processes):
        reg.register(f"w{number}", pid=process.pid)
        kill(process)
    made = make_plan(reg)
    reg.register("w1")
    report = apply_plan(reg, made)
    assert (report.lost, report.conflicts) == (("w0", "w2"), ("w1",))
    assert [w.sid for w in reg.workers()] == ["w1"]


def test_ended_workers_are_pruned_and_their_history_stays(reg: Registry) -> None:
    """After `keep`."""
    for number in range(130):  # more than fits into one transaction
        reg.register(f"w{number}")
        reg.exited(f"w{number}", code=0)
    report = collect(reg, keep=timedelta(0))
    assert len(report.pruned) == 130
    assert reg.workers(all=True) == []
    assert len(list(reg.history(sid="w7"))) == 3


def test_spawn_ensure_stop_go_the_whole_way(reg: Registry) -> None:
    """Started once, found again, ended, with how it ended."""
    worker = reg.spawn("s", ["sleep", "300"], ready=True)
    assert reg.ensure("s", ["sleep", "300"]) == worker
    assert reg.liveness("s").alive
    event = reg.stop("s", reason="test")
    assert (event.type, event.data["signal"]) == ("worker.exited", signal.SIGTERM)
    kinds = [e.type for e in reg.history(sid="s")]
    assert kinds == ["worker.registered", "worker.stop_requested", "worker.exited"]
    with pytest.raises(crewlog.SpawnFailed):
        reg.spawn("t", ["/no/such/program"])


def test_one_of_many_that_ensure_one_sid_starts_it(where: str) -> None:
    """All return the same worker."""
    children = Crew()

    def work() -> None:
        with crewlog.open(where) as mine:
            mine.ensure("e", ["sleep", "300"])

    try:
        joined(*[forked(work) for _ in range(8)])
        with crewlog.open(where) as reg:
            assert [e.type for e in reg.history(sid="e")] == ["worker.registered"]
            reg.stop("e", reason="test")
    finally:
        children.end()


def test_lease_is_held_while_the_worker_lives_and_beats_flag_it(reg: Registry) -> None:
    """A beat is asked for; without a lease there is none."""
    reg.register("a", heartbeat_s=60)
    assert reg.liveness("a").flags == frozenset()
    reg.beat("a")
    reg.register("b")
    with pytest.raises(crewlog.errors.LeaseMissing):
        reg.beat("b")


# -- the whole ------------------------------------------------------------------------------


def test_use_after_close_is_refused(reg: Registry) -> None:
    """Closing is idempotent."""
    reg.register("a")
    reg.close()
    reg.close()
    for use in (lambda: reg.get("a"), lambda: reg.register("b"), lambda: reg.last_seq):
        with pytest.raises(crewlog.errors.RegistryClosed):
            use()


def test_run_hears_of_the_end_of_its_program_each_time(where: str) -> None:
    """However soon it ends, and whatever threads the store has: no signal goes astray."""
    cli = Cli(where)
    for number in range(12):
        cli("run", f"job{number}", "--", "sh", "-c", f"exit {number}", code=number)
    with crewlog.open(where) as reg:
        assert [w.exit.code for w in reg.workers(all=True) if w.exit] == list(range(12))


def test_command_line_works_on_it(where: str) -> None:
    """The commands of every day, with their JSON and exit codes."""
    cli = Cli(where)
    cli("ls", code=66)
    cli("register", "a", "--pid", os.getpid(), "-l", "role=web")
    assert [w["sid"] for w in cli.workers()] == ["a"]
    assert "a" in str(cli.json("show", "a"))
    cli("alive", "a")
    cli("update", "a", "--state", "ready")
    assert '"worker.ready"' in cli("history", "--sid", "a", "--json").stdout
    assert cli.json("verify")["ok"] is True
    assert cli.json("compact")["folded_events"]
    assert cli.json("gc")["lost"] == []
    assert cli("path").stdout.strip() == where
    assert "  ready  " in cli("watch", "--after", "0", "--count", "2").stdout
    cli("cursor", "set", "mailer", "2")
    assert "mailer" in cli("cursor", "ls").stdout
    cli("cursor", "rm", "mailer")
    cli("stats")
    cli("diff", "--from", "1h")
    cli("export")
    cli("explain", "a")
    cli("timeline")
    assert "compact -q" in cli("schedule", "cron").stdout
    assert "ExecStart=" in cli("schedule", "systemd-user").stdout
    assert cli.json("doctor")["ok"] is True
    assert ":" in cli("anchor").stdout
    cli("run", "job", "--", "true")
    cli("run", "job2", "--", "false", code=1)
    cli("remove", "a", "--reason", "done")
    cli("show", "nobody", code=1)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["register", "ready", "drain", "exit", "remove", "meta", "compact"]),
        st.sampled_from("abc"),
    ),
    max_size=25,
)


@pytest.fixture
def numbers() -> Iterator[int]:
    """Number the examples of one test."""
    return iter(range(10**6))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(operations=OPERATIONS)
def test_state_is_the_fold_of_the_events_whatever_happens(
    where: str, numbers: Iterator[int], operations: list[tuple[str, str]]
) -> None:
    """Random changes and compactions: what is shown is what the history comes to."""
    place = f"{where}-{next(numbers)}"
    with crewlog.open(place) as reg:
        for operation, sid in operations:
            try:
                match operation:
                    case "register":
                        reg.register(sid)
                    case "ready":
                        reg.update(sid, state="ready")
                    case "drain":
                        reg.update(sid, state="draining")
                    case "exit":
                        reg.exited(sid, code=1)
                    case "remove":
                        reg.remove(sid, reason="r")
                    case "meta":
                        reg.update(sid, meta={"n": reg.last_seq})
                    case _:
                        if reg.exists:
                            compact(reg)
            except CrewlogError as error:
                assert error.outcome == "not_written"  # noqa: PT017 (refusals are part of it)
        assert shown(reg) == refolded(reg)
        if reg.exists:
            assert verify(place).ok
