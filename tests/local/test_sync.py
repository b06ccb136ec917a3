"""Threads and tasks of one process share commits, and every promise holds for each of them."""

import asyncio
import errno
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import pytest

import crewlog
from crewlog.aio.registry import AsyncRegistry
from crewlog.errors import (
    AppendUncertain,
    StaleRevision,
    StorageFailed,
    StorageFull,
    StorePoisoned,
    WorkerExists,
)
from crewlog.local import layout
from crewlog.local.disk import Disk
from crewlog.registry import Registry
from crewlog.session import Session
from crewlog.watch import follow
from crewlog.watch.follow import WatchOptions, vigil
from crewlog.watch.wake import Bell
from crewlog.watch.watch import Vigil
from crewlog_compactor import verify
from procs import files, forked, joined


def _threads(count: int, work: "object") -> list[object]:
    """Run it in that many threads at once; return what became of each."""
    results: list[object] = [None] * count
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = work(number)  # type: ignore[operator]
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count syncs, and make them as slow as on a disk that is busy."""
    counted: Counter[str] = Counter()
    real, slow = Disk.sync, threading.Event()

    def sync(self: Disk, fd: int) -> None:
        counted["sync"] += 1
        slow.wait(0.005)
        real(self, fd)

    monkeypatch.setattr(Disk, "sync", sync)
    return counted


def test_threads_share_syncs(reg: Registry, syncs: Counter[str]) -> None:
    """32 threads, 10 changes each: a sync serves many, and every change is there, once."""
    for number in range(32):
        reg.register(f"w{number}")
    syncs.clear()

    def change(number: int) -> list[int]:
        return [reg.update(f"w{number}", meta={"n": n}).rev for n in range(10)]

    revs = [rev for own in _threads(32, change) for rev in own]  # type: ignore[attr-defined]
    assert len(set(revs)) == 320
    assert syncs["sync"] <= 320 / 8
    assert [event.seq for event in reg.history(types=["worker.updated"])] == sorted(revs)
    assert verify(reg.path).ok


def test_of_those_who_expect_one_rev_one_wins(reg: Registry, syncs: Counter[str]) -> None:
    """Each is decided on top of those before it in its group."""
    for round_ in range(10):
        sid = f"w{round_}"
        rev = reg.register(sid).rev
        results = _threads(
            16, lambda n, sid=sid, rev=rev: reg.update(sid, meta={"n": n}, expect=rev)
        )
        assert sum(isinstance(result, StaleRevision) for result in results) == 15
    claimed = _threads(16, lambda _: reg.register("same"))
    assert sum(isinstance(result, WorkerExists) for result in claimed) == 15


def test_full_disk_is_told_to_each_and_nothing_is_written(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, syncs: Counter[str]
) -> None:
    """Outcome not_written for all of a group; the next one finds the state as it was."""
    for number in range(8):
        reg.register(f"w{number}")
    before = reg.last_seq
    real = Disk.write

    def write(self: Disk, fd: int, data: bytes) -> int:
        if data.startswith(b'{"v":1'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, fd, data)

    monkeypatch.setattr(Disk, "write", write)
    failed = _threads(8, lambda n: reg.update(f"w{n}", meta={"n": n}))
    assert {type(error) for error in failed} == {StorageFull}
    assert len({id(error) for error in failed}) == 8
    monkeypatch.setattr(Disk, "write", real)
    assert reg.last_seq == before
    assert [reg.update(f"w{n}", meta={"n": n}).rev for n in range(8)] == [
        before + n for n in range(1, 9)
    ]
    assert verify(reg.path).ok


def test_failed_sync_is_told_to_each_and_poisons(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody of the group, nor of the next one, is acknowledged."""
    for number in range(8):
        reg.register(f"w{number}")
    before = reg.last_seq

    def sync(_self: Disk, _fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Disk, "sync", sync)
    failed = _threads(8, lambda n: reg.update(f"w{n}", meta={"n": n}))
    assert {type(error) for error in failed} <= {StorageFailed, StorePoisoned, AppendUncertain}
    assert reg.last_seq == before


@pytest.mark.limits(segment_bytes=4096, group_bytes=3000)
def test_group_goes_on_behind_a_rotation(reg: Registry, syncs: Counter[str]) -> None:
    """Segments of a few lines: every group meets their ends."""
    for number in range(16):
        reg.register(f"w{number}")
    results = _threads(16, lambda n: [reg.update(f"w{n}", meta={"n": k}).rev for k in range(10)])
    assert len({rev for own in results for rev in own}) == 160  # type: ignore[attr-defined]
    assert verify(reg.path).ok
    assert len(list((reg.path / layout.LOG).iterdir())) > 5


@pytest.mark.limits(recent_workers=4)
def test_workers_that_are_forgotten_meanwhile_are_decided_rightly(
    reg: Registry, syncs: Counter[str]
) -> None:
    """A writer keeps few workers at hand; what a group has decided is never among the forgotten."""
    for number in range(12):
        reg.register(f"w{number}")

    def change(number: int) -> int:
        return sum(
            bool(reg.update(f"w{(number + k) % 12}", labels={f"t{number}": str(k)}))
            for k in range(12)
        )

    assert _threads(12, change) == [12] * 12
    for worker in reg.workers():
        assert len(worker.labels) == 12
    assert verify(reg.path).ok


def test_child_that_is_forked_while_threads_share_goes_on(place: Path, reg: Registry) -> None:
    """Whoever leads in the parent does not lead in the child."""
    for number in range(4):
        reg.register(f"w{number}")
    done = threading.Event()

    def change(number: int) -> None:
        count = 0
        while not done.is_set():
            reg.update(f"w{number}", meta={"n": (count := count + 1)})

    threads = [threading.Thread(target=change, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()

    def child(number: int) -> None:
        reg.register(f"child-{number}")

    try:
        for number in range(5):
            joined(forked(lambda n=number: child(n)))  # type: ignore[misc]
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert {worker.sid for worker in reg.workers()} >= {f"child-{n}" for n in range(5)}
    assert verify(reg.path).ok


# -- asyncio --------------------------------------------------------------------------------


def test_tasks_share_syncs(place: Path, syncs: Counter[str]) -> None:
    """64 tasks, 5 changes each; the verbs are those of the registry."""

    async def change(reg: crewlog.AsyncRegistry, number: int) -> list[int]:
        return [(await reg.update(f"w{number}", meta={"n": n})).rev for n in range(5)]

    async def main() -> None:
        async with crewlog.aopen(place, actor="tasks") as reg:
            async with reg.batch() as batch:
                for number in range(64):
                    batch.register(f"w{number}")
            assert batch.last_seq == 65
            syncs.clear()
            revs = await asyncio.gather(*(change(reg, number) for number in range(64)))
            assert len({rev for own in revs for rev in own}) == 320
            assert syncs["sync"] <= 320 / 16
            assert await reg.last_seq == 385

    asyncio.run(main())
    assert verify(place).ok


def test_every_verb_is_there_for_tasks(place: Path) -> None:
    """Register, ready, exit, history, state at a seq, watch, errors."""

    async def main() -> None:
        async with crewlog.aopen(place) as reg:
            assert await reg.get("a") is None
            worker = await reg.register("a", labels={"k": "v"})
            with pytest.raises(WorkerExists):
                await reg.register("a")
            async with reg.watch(after="now") as items:
                changed = await reg.update("a", state="ready", expect=worker.rev)
                with pytest.raises(StaleRevision):
                    await reg.update("a", labels={"x": "y"}, expect=worker.rev)
                kinds = [(await items.next()) for _ in range(2)]
                assert [item.kind for item in kinds if item is not None] == ["change", "synced"]
            assert (await reg.update("a", labels={"k": "v"})).rev == changed.rev, "no change"
            assert (await reg.liveness("a")).alive
            ended = await reg.exited("a", code=0)
            assert (await reg.exited("a", code=0)).seq == ended.seq, "told before"
            await reg.register("b")
            assert (await reg.remove("b", reason="done")).type == "worker.released"
            assert [event.sid async for event in reg.history(types=["worker.exited"])] == ["a"]
            assert len([event async for event in reg.history()]) == 5
            assert (await reg.at(worker.rev)).workers["a"].state == "starting"
            with pytest.raises(RuntimeError, match="inside"):
                async with reg.batch() as batch:
                    batch.register("c")
                    raise RuntimeError("inside")
            assert await reg.get("c") is None
        await reg.aclose()

    asyncio.run(main())


def test_cancelled_task_disturbs_nobody(place: Path, syncs: Counter[str]) -> None:
    """It stops waiting; the others of its group are served."""

    async def main() -> None:
        async with crewlog.aopen(place) as reg:
            for number in range(8):
                await reg.register(f"w{number}")
            tasks = [asyncio.ensure_future(reg.update(f"w{n}", meta={"n": n})) for n in range(8)]
            await asyncio.sleep(0)
            tasks[3].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[3], asyncio.CancelledError)
            assert sum(isinstance(result, crewlog.Worker) for result in results) == 7
            assert (await reg.update("w3", meta={"again": 1})).meta["again"] == 1

    asyncio.run(main())


def test_two_loops_one_after_the_other_use_one_registry(place: Path) -> None:
    """What belongs to a loop is made anew."""
    reg = crewlog.aopen(place)

    async def change(sid: str) -> None:
        await reg.register(sid)
        await reg.update(sid, labels={"k": "v"})

    asyncio.run(change("a"))
    asyncio.run(change("b"))
    asyncio.run(reg.aclose())
    with crewlog.open(place) as opened:
        assert [worker.sid for worker in opened.workers()] == ["a", "b"]


def test_closed_registry_says_so_to_tasks(place: Path) -> None:
    """Whatever is asked of it; a second close is none."""

    async def main() -> None:
        areg = crewlog.aopen(place)
        await areg.register("a")
        await areg.aclose()
        await areg.aclose()
        for use in (
            areg.get("a"), areg.workers(), areg.last_seq, areg.living(),
            areg.update("a", state="ready"), areg.exited("a", code=0),
            areg.remove("a", reason="x"), areg.register("b"),
            areg.wait("a", state="ready"), areg.observe("a"), areg.watch().__aenter__(),
            anext(areg.history()),
        ):  # fmt: skip
            with pytest.raises(crewlog.errors.RegistryClosed):
                await use
        with pytest.raises(crewlog.errors.RegistryClosed):
            async with areg.batch() as batch:
                batch.update("a", state="ready")

    asyncio.run(main())


def test_watch_that_is_slow_to_open_holds_no_loop_up(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tasks go on meanwhile; what is opened for a task that was cancelled is given back."""
    may_go_on, opened, ended = threading.Event(), list[Vigil](), set[Vigil]()
    real = Vigil.end

    def end(self: Vigil) -> None:
        ended.add(self)
        real(self)

    def slow(session: Session, bell: Callable[[], Bell], **options: Unpack[WatchOptions]) -> Vigil:
        assert may_go_on.wait(20)
        opened.append(vigil(session, bell, **options))
        return opened[-1]

    async def look(areg: AsyncRegistry) -> str:
        async with areg.watch(after="oldest") as items:
            item = await items.next(5)
        return "" if item is None else item.kind

    async def main() -> None:
        async with crewlog.aopen(place) as areg:
            await areg.register("a")
            monkeypatch.setattr(follow, "vigil", slow)
            monkeypatch.setattr(Vigil, "end", end)
            cancelled, looking = (asyncio.create_task(look(areg)) for _ in range(2))
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            may_go_on.set()
            assert await looking == "change"
            while len(ended) < 2:
                await asyncio.sleep(0)

    asyncio.run(main())


def test_lead_that_is_handed_to_a_closed_registry_goes_on(place: Path) -> None:
    """Its task hears that the registry is closed; the next one leads."""

    async def main() -> list[BaseException | None]:
        areg = crewlog.aopen(place)
        await areg.register("a")
        log = files(areg.registry)
        areg._leaders.shutdown()
        results = await asyncio.gather(
            *(areg.update("a", meta={"n": n}) for n in range(3)), return_exceptions=True
        )
        assert log.commits._leader is None
        await areg.aclose()
        return [one if isinstance(one, BaseException) else None for one in results]

    assert {type(error) for error in asyncio.run(main())} == {crewlog.errors.RegistryClosed}
