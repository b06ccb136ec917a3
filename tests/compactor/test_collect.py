"""Collection: one event a death, and nobody is collected who should not be."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import CollectRefused, LockBusy, PlanInvalid, StorageFailed
from crewlog.local import archive, layout
from crewlog.local.lock import Lock
from crewlog.local.log import Log
from crewlog.model.events import EventType
from crewlog.registry import Registry
from crewlog_compactor import apply_plan, collect, compact, make_plan, verify
from crewlog_compactor import collect as collect_function
from crewlog_compactor import plan as planning
from crewlog_compactor import retention as policy
from crewlog_compactor.local.archive import due
from procs import Crew, files, forked, joined, kill
from stores import opened


def test_three_collectors_at_once_write_one_event_a_death(place: Path, crew: Crew) -> None:
    """20 dead workers, 3 collectors that all saw them: 20 events."""
    with crewlog.open(place) as reg:
        dead = [crew.sleeper() for _ in range(20)]
        for number, worker in enumerate(dead):
            reg.register(f"dead-{number}", pid=worker.pid)
        for worker in dead:
            kill(worker)
    entered, go = os.pipe(), os.pipe()

    def collect_with_the_others() -> None:
        """Probe, wait until all have probed, then append."""
        real = planning.make

        def make(*arguments: object, **options: object) -> planning.Plan:
            result = real(*arguments, **options)  # type: ignore[arg-type]
            os.write(entered[1], b".")
            os.read(go[0], 1)
            return result

        planning.make = make
        with crewlog.open(place) as mine:
            report = collect(mine, force=True)
            assert len(report.lost) + len(report.conflicts) == 20

    pids = [forked(collect_with_the_others) for _ in range(3)]
    for _ in pids:
        os.read(entered[0], 1)
    os.write(go[1], b"...")
    joined(*pids)
    with crewlog.open(place) as reg:
        buried = [event.sid for event in reg.history(types=["worker.lost"])]
        assert sorted(buried) == sorted(f"dead-{n}" for n in range(20))
        assert reg.workers() == []


def test_worker_registered_again_between_probe_and_append_survives(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event is written only if the worker is still at the rev that was judged."""
    first, second = crew.sleeper(), crew.sleeper()
    reg.register("a", pid=first.pid)
    kill(first)
    real = planning.make

    def make_and_register(*arguments: object, **options: object) -> planning.Plan:
        result = real(*arguments, **options)  # type: ignore[arg-type]
        reg.register("a", pid=second.pid)
        return result

    monkeypatch.setattr(planning, "make", make_and_register)
    report = collect_function(reg)
    assert report.conflicts == ("a",)
    assert report.lost == ()
    worker = reg.get("a")
    assert worker is not None
    assert (worker.pid, worker.final) == (second.pid, False)


def test_dry_run_writes_nothing(reg: Registry, crew: Crew) -> None:
    """It says what would be done."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    kill(worker)
    before = reg.last_seq
    report = collect(reg, dry_run=True)
    assert report.lost == ("a",)
    assert report.dry_run
    assert reg.last_seq == before


def test_many_deaths_at_once_are_doubted(reg: Registry, crew: Crew) -> None:
    """More than half of the living, and more than ten: refused without force."""
    workers = [crew.sleeper() for _ in range(11)]
    for number, worker in enumerate(workers):
        reg.register(f"w-{number}", pid=worker.pid)
    for worker in workers:
        kill(worker)
    with pytest.raises(CollectRefused) as caught:
        collect(reg)
    assert (caught.value.deaths, caught.value.living) == (11, 11)
    report = compact(reg)
    assert report.refused is not None
    assert report.snapshot_seq > 0, "folding goes on all the same"
    assert len(collect(reg, force=True).lost) == 11


# -- plans ----------------------------------------------------------------------------------


def test_plan_is_carried_out_later_where_nothing_changed(reg: Registry, crew: Crew) -> None:
    """Deaths, with their evidence, and prunings, out of a file; conflicts are counted."""
    dead, back, old = crew.sleeper(), crew.sleeper(), crew.sleeper()
    for sid, process in (("dead", dead), ("back", back), ("old", old)):
        reg.register(sid, pid=process.pid)
    reg.exited("old", code=0)
    kill(dead)
    kill(back)
    made = make_plan(reg, keep=timedelta(0))
    again = planning.decode(made.encode(), where="memory")
    assert again == made
    assert [(s.action, s.sid) for s in again.tasks] == [
        ("bury", "dead"), ("bury", "back"), ("prune", "old"),
    ]  # fmt: skip
    reg.register("back", pid=crew.sleeper().pid)
    report = apply_plan(reg, again)
    assert (report.lost, report.pruned, report.conflicts) == (("dead",), ("old",), ("back",))
    assert reg.liveness("back").alive
    lost = next(e for e in reg.history(types=["worker.lost"], sid="dead"))
    assert lost.data["cause"] == made.tasks[0].cause
    repeated = apply_plan(reg, again)
    assert (repeated.lost, repeated.pruned) == ((), ())
    assert repeated.conflicts == ("back", "dead", "old")


def test_plan_that_lies_buries_nobody_who_lives(reg: Registry, crew: Crew) -> None:
    """A step for a living worker, with its right rev, is a conflict."""
    from dataclasses import replace

    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    kill(worker)
    made = make_plan(reg)
    alive = reg.register("a", pid=crew.sleeper().pid)
    forged = replace(made, tasks=(replace(made.tasks[0], rev=alive.rev),))
    assert apply_plan(reg, forged).conflicts == ("a",)
    assert reg.workers()[0].rev == alive.rev


def test_plan_of_another_store_is_refused(reg: Registry, crew: Crew, tmp_path: Path) -> None:
    """A rev means something in its own store only."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    kill(worker)
    with crewlog.open(tmp_path / "other") as other:
        other.register("a", pid=crew.sleeper().pid)
        with pytest.raises(PlanInvalid):
            apply_plan(other, make_plan(reg))


HEAD = b'{"crewlog_plan":1,"store":"s","made_at":"","living":1,"unknown":[],"steps":['


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"{}", b'{"crewlog_plan":2}', b'{"crewlog_plan":1,"steps":[],"unknown":[]}',
     HEAD + b"7]}",
     HEAD + b'{"action":"kill","sid":"a","rev":1,"cause":"","evidence":{}}]}',
     HEAD + b'{"action":"bury","sid":"a","rev":"1","cause":"","evidence":{}}]}'],
)  # fmt: skip
def test_what_is_no_plan_is_a_typed_error(data: bytes) -> None:
    """Nothing is guessed."""
    with pytest.raises(PlanInvalid, match="a-file"):
        planning.decode(data, where="a-file")


def test_many_deaths_of_a_plan_are_doubted_too(reg: Registry, crew: Crew) -> None:
    """The circuit breaker stands before every collection."""
    workers = [crew.sleeper() for _ in range(11)]
    for number, worker in enumerate(workers):
        reg.register(f"w-{number}", pid=worker.pid)
    for worker in workers:
        kill(worker)
    made = make_plan(reg)
    with pytest.raises(CollectRefused):
        apply_plan(reg, made)
    assert len(apply_plan(reg, made, force=True).lost) == 11


def test_ended_worker_is_pruned_after_keep_and_its_history_stays(reg: Registry, crew: Crew) -> None:
    """What ended long ago leaves the state, never the history."""
    worker = crew.sleeper()
    reg.register("a", pid=worker.pid)
    reg.exited("a", code=0)
    assert collect(reg).pruned == ()
    assert collect(reg, keep=timedelta(0)).pruned == ("a",)
    assert reg.get("a") is None
    assert [e.type for e in reg.history(sid="a")] == [
        "worker.registered", "worker.exited", "worker.pruned",
    ]  # fmt: skip


def test_two_compactions_exclude_each_other(reg: Registry, place: Path) -> None:
    """The second one is told at once."""
    reg.register("a")
    lock = files(reg).take_compact_lock()
    with crewlog.open(place) as other, pytest.raises(LockBusy) as caught:
        compact(other)
    assert f"pid {os.getpid()}" in caught.value.holder
    lock.close()
    compact(reg)


def test_compaction_keeps_the_whole_history(reg: Registry, place: Path) -> None:
    """Through ten compactions every event stays readable, in order, and verify finds nothing."""
    reg.register("a")
    for number in range(40):
        reg.update("a", meta={"number": number})
        if number % 4 == 3:
            compact(reg, gc=False)
    seen = [e.data["meta"] for e in reg.history(types=["worker.updated"])]
    assert seen == [{"number": n} for n in range(40)]
    assert len(list((place / "archive").iterdir())) == 9
    every = [e.seq for e in reg.history(types=_every_type(reg))]
    assert every == list(range(1, reg.last_seq + 1))
    assert verify(place).findings == ()
    with crewlog.open(place) as fresh:
        assert fresh.workers() == reg.workers()


def _every_type(reg: Registry) -> list[EventType]:
    return ["_segment", "_seal", "_snapshot", "worker.registered", "worker.updated"]


def test_compaction_with_nothing_new_changes_nothing(reg: Registry, place: Path) -> None:
    """A cron that finds nothing to do leaves the store as it is."""
    from procs import tree

    reg.register("a")
    compact(reg, gc=False)
    before = tree(place)
    report = compact(reg, gc=False)
    assert report.folded_events == 0
    assert tree(place) == before


def test_compact_where_nothing_can_be_written_is_a_typed_error(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only file system: the job is refused, and the dry run, which needs no lock, is not."""
    reg.register("a")

    def refused(_: object) -> Lock:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Log, "take_compact_lock", refused)
    with pytest.raises(StorageFailed, match="Read-only"):
        compact(reg)
    assert compact(reg, dry_run=True).folded_events > 0


@pytest.mark.parametrize("spare", range(-600, 601, 200))
def test_dry_run_sizes_an_archive_as_an_interrupted_move_named_it(
    place: Path, reg: Registry, spare: int
) -> None:
    """It is packed as its name says, whatever is wanted now; a policy by bytes hangs on it."""
    for number in range(3):
        for turn in range(40):
            reg.register(f"w{number}-{turn}", meta={"n": turn})
        if number < 2:
            compact(reg, gc=False)
    covered, _ = reg.compacted() or (0, None)
    (sealed,) = due(files(reg).segments, covered=covered)
    data = (place / layout.LOG / layout.segment_name(sealed)).read_bytes()
    packed = archive.pack(data, "gzip")
    left = place / layout.ARCHIVE / layout.archive_name(sealed, "gzip")
    left.touch(0o600)
    left.write_bytes(packed)
    keep = len(packed) + spare
    report = compact(reg, gc=False, keep_history=keep, packing="zstd", dry_run=True)
    done = compact(reg, gc=False, keep_history=keep, packing="zstd")
    assert replace(report, dry_run=False) == done


@pytest.mark.limits(segment_bytes=2000)
def test_dry_run_beside_a_compaction_looks_again(
    place: Path, reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no lock, so an archive may go between its listing and its sizing."""
    for number in range(40):
        reg.register(f"w{number}")
    for turn in range(3):
        reg.register(f"more{turn}")
        compact(reg, gc=False)
    real, left = policy.oldest_ts, [1]

    def beaten(keep: timedelta) -> str:
        if left:
            left.pop()
            with opened(place) as other:
                assert compact(other, gc=False, keep_history=0).dropped is not None
        return real(keep)

    monkeypatch.setattr(policy, "oldest_ts", beaten)
    report = compact(reg, gc=False, keep_history=timedelta(0), dry_run=True)
    assert not left
    assert replace(report, dry_run=False) == compact(reg, gc=False, keep_history=timedelta(0))


def test_ended_workers_are_kept_by_number_or_by_time(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest so many, or for so long; by default a day, and not without a bound."""
    for number in range(6):
        reg.register(f"w{number}")
        reg.exited(f"w{number}", code=0)
    assert collect(reg).pruned == ()
    assert collect(reg, keep=4).pruned == ("w0", "w1")
    assert compact(reg, keep_ended=3).collected.pruned == ("w2",)  # type: ignore[union-attr]
    monkeypatch.setattr(sys.modules["crewlog_compactor.collect"], "ENDED_MAX", 2)
    assert compact(reg).collected.pruned == ("w3",)  # type: ignore[union-attr]
    assert compact(reg, keep_ended=timedelta(0)).collected.pruned == ("w4", "w5")  # type: ignore[union-attr]
    assert len(list(reg.history(types=["worker.pruned"]))) == 6, "their history stays"
    with pytest.raises(ValueError, match="negative"):
        compact(reg, keep_ended=-1)
    with pytest.raises(TypeError, match="a number of workers"):
        compact(reg, keep_ended="2d")  # type: ignore[arg-type]


_COMPACTED = """
import sys
from pathlib import Path
import crewlog
from crewlog_compactor import compact

report = compact(crewlog.open(sys.argv[1])) if sys.argv[2:] else None
with crewlog.open(sys.argv[1]) as reg:
    ended = reg.state().workers
peak = next(row for row in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in row)
print(len(ended), int(peak.split()[1]) // 1024)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is asked of /proc")
def test_many_short_jobs_take_little_memory(place: Path) -> None:
    """20,000 of them ended since the last compaction: it, and whoever opens the store after it."""
    with crewlog.open(place) as reg:
        for first in range(0, 20_000, 1000):
            names = [f"job-{number:06d}" for number in range(first, first + 1000)]
            with reg.batch() as batch:
                for name in names:
                    batch.register(name, pid=os.getpid(), labels={"queue": "mail", "name": name})
            with reg.batch() as batch:
                for name in names:
                    batch.exited(name, code=0)

    def used(*more: str) -> tuple[int, int]:
        run = [sys.executable, "-c", _COMPACTED, str(place), *more]
        said = subprocess.run(run, check=True, capture_output=True, text=True).stdout
        ended, mib = map(int, said.split())
        return ended, mib

    ended, mib = used("compact")
    assert ended == 10_000, "the bound that is kept by default"
    assert mib < 120  # 78; where each is kept as objects, 168
    ended, mib = used()
    assert ended == 10_000
    assert mib < 60  # 39; as objects, 70
