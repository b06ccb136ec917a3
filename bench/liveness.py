"""Time the judgement of many workers, and how long a collection holds the append lock.

P9: 10,000 workers with processes of their own, as many as the machine gives; beyond that the same
processes stand for several workers. Beside it `os.kill(pid, 0)`, which proves nothing, and psutil's
start time, which is what others compare.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil

import crewlog
from crewlog.local.append import Appender
from crewlog.model.events import Worker
from crewlog.registry import Registry
from crewlog_compactor import collect

P = ParamSpec("P")
T = TypeVar("T")
PROCESSES = 1000
WORKERS = 10_000
DEAD = 1000


def processes(count: int) -> list[int]:
    """Start processes that wait."""
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        pids.append(pid)
    return pids


def end(pids: list[int]) -> None:
    """Kill and reap them."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def timed(work: Callable[[], object]) -> float:
    """Return how long it took, in milliseconds."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def judgement(home: Path, *, rounds: int) -> list[dict[str, float]]:
    """Judge 10,000 workers, in turn with its peers; milliseconds."""
    pids = processes(PROCESSES)
    try:
        with crewlog.open(home / "judged") as reg:
            with reg.batch() as batch:
                for number, pid in enumerate(pids):
                    batch.register(f"w-{number}", pid=pid)
            workers = reg.workers() * (WORKERS // PROCESSES)
            assert all(liveness.alive for liveness in reg.judge(workers))
            return [_round(reg, workers) for _ in range(rounds)]
    finally:
        end(pids)


def _round(reg: Registry, workers: list[Worker]) -> dict[str, float]:
    def psutils() -> None:
        for worker in workers:
            psutil.Process(worker.pid).create_time()

    def kills() -> None:
        for worker in workers:
            os.kill(worker.pid, 0)

    return {
        "crewlog": timed(lambda: reg.judge(workers)),
        "os.kill": timed(kills),
        "psutil": timed(psutils),
    }


def lock_time(home: Path, *, rounds: int) -> list[dict[str, float]]:
    """Collect 1,000 dead workers; how long writers were kept out, and the whole, in ms."""
    held: list[float] = []
    run = Appender._run

    def timed_run(self: Appender, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        def timed_work() -> T:
            began = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                held.append((time.perf_counter() - began) * 1e3)

        return run(self, timed_work)

    rows = []
    for number in range(rounds):
        pids = processes(DEAD)
        with crewlog.open(home / f"collected-{number}") as reg:
            with reg.batch() as batch:
                for index, pid in enumerate(pids):
                    batch.register(f"w-{index}", pid=pid)
            end(pids)
            held.clear()
            Appender._run = timed_run  # type: ignore[method-assign]
            try:
                whole = timed(lambda: collect(reg, force=True))
            finally:
                Appender._run = run  # type: ignore[method-assign]
            assert not reg.workers()
        rows.append({"crewlog": max(held), "whole collection": whole})
    return rows


def spawning(home: Path, *, rounds: int) -> list[dict[str, float]]:
    """Start `true` as a worker and wait for it, beside subprocess alone; milliseconds."""
    rows = []
    with crewlog.open(home / "spawned") as reg:
        reg.register("first")
        for number in range(rounds * 5):
            alone = timed(lambda: subprocess.run(["true"], check=True))
            ours = timed(lambda n=number: reg.spawn(f"s-{n}", ["true"]))  # type: ignore[misc]
            reg.observe(f"s-{number}", timeout_s=30)
            rows.append({"crewlog": ours, "subprocess": alone})
    return rows
