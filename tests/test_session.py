"""Interrupts, forks, forgetting and limits: whatever befalls a program, nothing stays taken."""

import asyncio
import contextlib
import ctypes
import functools
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

import crewlog
from crewlog import Registry
from crewlog.errors import LockBusy, RegistryClosed, Unsupported
from crewlog.local import leases
from crewlog.process.launch import Launch
from crewlog_compactor import collect
from crewlog_compactor.verify import verify
from procs import files, forked, joined, slay, until

INTERRUPTS = 1500
NEW_PID_NAMESPACE = 0x20000000


def _in_another_thread(work: Callable[[], object]) -> object:
    """Return what the work returns; fail if it hangs."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(30)
    assert results, "it hangs, or raised"
    return results[0]


def test_interrupts_leave_nothing_taken(place: Path) -> None:
    """Ctrl-C at any moment of a change; then another thread reads and changes at once."""

    def child() -> None:
        armed, number, moments = False, 0, random.Random(20261126)

        def interrupt(*_: object) -> None:
            nonlocal armed
            if armed:
                armed = False
                raise KeyboardInterrupt

        def change_until_interrupted(reg: Registry) -> None:  # 3.13.0: no loop right inside a with
            nonlocal armed, number
            armed = True
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.00002, 0.0012))
            while armed:
                number += 1
                reg.update("a", meta={"n": number})

        signal.signal(signal.SIGALRM, interrupt)
        with crewlog.open(place, lock_timeout_s=1) as reg:
            reg.register("a")
            for _ in range(INTERRUPTS):
                with contextlib.suppress(KeyboardInterrupt):
                    change_until_interrupted(reg)
                armed = False
                assert _in_another_thread(functools.partial(reg.get, "a"))
                change = functools.partial(reg.update, "a", labels={"n": str(number)})
                assert _in_another_thread(change)

    joined(forked(child))
    assert verify(place).ok


@contextlib.contextmanager
def _interrupted_in(
    monkeypatch: pytest.MonkeyPatch,
    step: tuple[object, str],
    handler: Callable[[int, FrameType | None], object],
) -> Iterator[None]:
    """Let a signal come as a step begins: an object and the name of its method."""
    owner, name = step
    real = getattr(owner, name)

    def interrupted(*arguments: object, **options: object) -> object:
        signal.raise_signal(signal.SIGUSR1)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("phase", ["write", "settle"])
def test_change_from_a_signal_handler_within_a_change_is_refused_at_once(
    reg: Registry, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could only wait for what it has interrupted; nothing of it is written."""
    reg.register("a")
    refusals: list[str] = []

    def handler(*_: object) -> None:
        with pytest.raises(LockBusy, match="this very thread") as caught:
            reg.update("a", labels={"by": "handler"})
        refusals.append(caught.value.outcome)

    log = files(reg)
    step = (log._appender, "_ready") if phase == "write" else (log._appender.sync, "_share")
    with _interrupted_in(monkeypatch, step, handler):
        assert reg.update("a", meta={"n": 1}).labels == {}
    assert refusals == ["not_written"]


@pytest.mark.parametrize("phase", ["write", "settle"])
def test_registry_closed_by_a_handler_within_a_change_breaks_nothing(
    place: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor is closed under the change, which would have looked like a broken disk."""
    reg = crewlog.open(place)
    reg.register("a")
    log = files(reg)
    step = (log._appender, "_put") if phase == "write" else (log._appender.sync, "certain")
    closing = _interrupted_in(monkeypatch, step, lambda *_: reg.close())
    with closing, contextlib.suppress(crewlog.errors.RegistryClosed):
        reg.update("a", meta={"n": 1})
    with crewlog.open(place) as other:
        assert other.update("a", meta={"n": 2}).meta == {"n": 2}
    assert verify(place).ok


def test_watch_closed_by_a_handler_that_raises_gives_its_cursor_back(reg: Registry) -> None:
    """The thread inside `next` gives everything back, however it leaves."""
    reg.register("a")
    items = reg.watch(cursor="mailer", after="now")
    items.drain()

    def handler(*_: object) -> None:
        items.close()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, handler)
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            items.next(30)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    with reg.watch(cursor="mailer") as again:
        assert again.has_cursor


@pytest.mark.parametrize("backend", ["inotify", "watchdog", "poll"])
def test_watch_is_closed_while_a_forked_child_lives(reg: Registry, backend: str) -> None:
    """What wakes its thread must not hang on a descriptor that the child has, too."""
    if backend == "inotify":
        pytest.importorskip("inotify_simple")
    reg.register("a")
    items = reg.watch(after="now", backend=backend)  # type: ignore[arg-type]
    child = forked(signal.pause)
    try:
        _in_another_thread(functools.partial(items.close))
    finally:
        slay(child)


def test_registry_that_is_forgotten_gives_its_descriptors_back(place: Path) -> None:
    """As a watch does."""
    with crewlog.open(place) as reg:
        reg.register("a")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        crewlog.open(place).update("a", meta={"n": number})
        crewlog.open(place).workers()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("extra", ["inotify_simple", "watchdog alone"])
def test_limit_of_threads_lets_a_watch_poll_and_a_spawn_go_on(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, extra: str
) -> None:
    """What was started is returned; what cannot be had without a thread is refused, typed."""
    reg.register("a")
    if extra == "watchdog alone":
        monkeypatch.setitem(sys.modules, "inotify_simple", None)

    def none(self: threading.Thread) -> None:
        message = "can't start new thread"
        raise RuntimeError(message)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with reg.watch(after="now") as items:
                assert items.stats()["source"] == "poll"
                reg.update("a", meta={"n": os.urandom(4).hex()})
                assert items.next(5) is not None
        with pytest.raises(Unsupported, match="no thread"):
            reg.subscribe(print)
        assert len(os.listdir("/proc/self/fd")) <= before

        def child() -> None:  # where no reaper is left of another test
            worker = reg.spawn("b", ["sleep", "300"])
            assert reg.liveness("b").alive
            assert "nobody waits for the end of worker b" in caplog.text
            os.kill(worker.pid, signal.SIGKILL)
            until(lambda: reg.liveness("b").dead)

        joined(forked(child))


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root, to make a pid namespace"
)
def test_child_in_a_pid_namespace_of_its_own_neither_buries_nor_is_buried(reg: Registry) -> None:
    """Its pids mean something else: what the parent knew of its scope is not the child's."""
    reg.register("outside")
    registered, tell = os.pipe()
    over, end = os.pipe()

    def inner() -> None:
        reg.register("inside")
        assert collect(reg).lost == ()
        os.write(tell, b".")
        os.read(over, 1)

    def outer() -> None:
        os.close(end)
        assert ctypes.CDLL(None).unshare(NEW_PID_NAMESPACE) == 0
        joined(forked(inner))

    child = forked(outer)
    try:
        assert os.read(registered, 1) == b"."
        assert not reg.liveness("inside").dead
        assert collect(reg).lost == ()
        assert {worker.sid for worker in reg.workers()} == {"outside", "inside"}
    finally:
        for fd in (registered, tell, over, end):
            os.close(fd)
        joined(child)


def test_cancelled_waits_of_tasks_keep_no_thread(reg: Registry) -> None:
    """However many are cancelled, other verbs go on, and so does closing."""
    reg.register("a")

    async def main() -> None:
        async with crewlog.aopen(reg.path) as mine:
            for _ in range(70):  # more than there are threads for calls
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(mine.wait("nobody", state="ready"), 0.01)
            worker = await asyncio.wait_for(mine.get("a"), 5)
            assert worker is not None
            with pytest.raises(crewlog.WaitTimeout, match="state ready of worker 'a'"):
                await mine.wait("a", state="ready", timeout_s=0.01)
            waiting = asyncio.create_task(mine.wait("a", state="ready", timeout_s=10))
            await mine.update("a", state="ready")
            assert (await waiting).state == "ready"

    asyncio.run(asyncio.wait_for(main(), 30))


def test_cancelled_observation_does_not_hold_the_program_up(place: Path) -> None:
    """It would have been joined at the end: for as long as the worker lives."""
    code = (
        "import asyncio, sys, crewlog\n"
        "async def main():\n"
        "    async with crewlog.aopen(sys.argv[1]) as reg:\n"
        "        worker = await reg.spawn('w', ['sleep', '60'])\n"
        "        try:\n"
        "            await asyncio.wait_for(reg.observe('w'), 0.2)\n"
        "        except TimeoutError:\n"
        "            print(worker.pid)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)],
        check=True, stdout=subprocess.PIPE, text=True, timeout=20,
    )  # fmt: skip
    os.kill(int(done.stdout), signal.SIGKILL)


@pytest.mark.parametrize("ends", ["cancelled", "closed"])
def test_observation_that_nobody_wants_ends_within_a_second(place: Path, ends: str) -> None:
    """Its thread, too, and the descriptor of the process: the worker may live for ever."""
    until(lambda: threading.active_count() == 1)
    held = len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        async with crewlog.aopen(place) as mine:
            await mine.register("a", pid=os.getppid())
            tasks = [asyncio.create_task(mine.observe("a")) for _ in range(10)]
            await asyncio.sleep(0.3)
            if ends == "cancelled":
                for task in tasks:
                    task.cancel()
        raised = await asyncio.gather(*tasks, return_exceptions=True)
        kind = asyncio.CancelledError if ends == "cancelled" else RegistryClosed
        assert all(isinstance(one, kind) for one in raised)

    asyncio.run(asyncio.wait_for(main(), 30))
    until(lambda: threading.active_count() == 1)
    until(lambda: len(os.listdir("/proc/self/fd")) <= held, wait_s=10)


def test_registry_of_tasks_goes_on_in_a_forked_child(place: Path) -> None:
    """Its pools are new there: the threads are the parent's."""
    mine = crewlog.aopen(place)

    async def use(sid: str) -> None:
        await mine.register(sid)
        await mine.update(sid, meta={"sid": sid})
        assert await mine.get(sid) is not None

    asyncio.run(use("parent"))
    joined(forked(lambda: asyncio.run(asyncio.wait_for(use("child"), 10))))
    asyncio.run(use("again"))
    asyncio.run(mine.aclose())
    assert verify(place).ok


def test_child_forked_during_a_spawn_holds_nothing_up(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waiting process reads the end of its pipe, and we its word, all the same."""
    reg.register("lives")
    real, children = Launch.__init__, []

    def forking(self: Launch, *arguments: object, **options: object) -> None:
        real(self, *arguments, **options)  # type: ignore[arg-type]
        thread = threading.Thread(target=lambda: children.append(forked(signal.pause)))
        thread.start()
        thread.join()

    monkeypatch.setattr(Launch, "__init__", forking)
    try:
        began = time.monotonic()
        with pytest.raises(crewlog.WorkerExists):
            reg.spawn("lives", ["sleep", "300"])
        worker = reg.spawn("new", ["sleep", "300"], lease=True)
        assert time.monotonic() - began < 5
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda: reg.liveness("new").dead)
        assert worker.lease is not None
        name = worker.lease
        at = files(reg).directory
        until(lambda: leases.look(at, name).state in {"free", "absent"})
    finally:
        for child in children:
            slay(child)


def test_forks_beside_spawns_wait_for_each_other(reg: Registry) -> None:
    """Without a seam: one thread forks children that live on, another starts a sid that lives."""
    reg.register("lives")
    children: list[int] = []
    over = threading.Event()

    def fork() -> None:
        while not over.is_set() and len(children) < 60:
            children.append(forked(signal.pause))

    thread = threading.Thread(target=fork)
    thread.start()
    try:
        for _ in range(25):
            began = time.monotonic()
            with pytest.raises(crewlog.WorkerExists):
                reg.spawn("lives", ["true"])
            assert time.monotonic() - began < 5
    finally:
        over.set()
        thread.join()
        for child in children:
            slay(child)


def test_registry_that_nobody_closed_says_nothing_at_the_end(place: Path) -> None:
    """Whatever of its modules is gone by then: here another module holds it until the last."""
    code = (
        "import sys, crewlog\n"
        "from crewlog import host\n"
        "reg = crewlog.open(sys.argv[1])\n"
        "reg.register('a')\n"
        "host.now = lambda now=host.now: now()\n"
        "host.held = sys.modules['time'].held = reg\n"
        "reg.spawn('b', ['true'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)], check=True, capture_output=True, text=True
    )
    assert done.stderr == ""
