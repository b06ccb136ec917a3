"""Time changes that share commits: threads, asyncio tasks, batches (P3, P4)."""

import asyncio
import json
import sqlite3
import threading
import time
from pathlib import Path

import crewlog

SIZE = 1000


def _filled(place: Path, count: int) -> None:
    with crewlog.open(place) as reg, reg.batch() as batch:
        for number in range(count):
            batch.register(f"w{number}", labels={"app": "bench"})


def threads(home: Path, count: int, seconds: float) -> float:
    """Return changes a second of so many threads that share a registry."""
    place = home / f"threads-{count}-{time.monotonic_ns()}"
    _filled(place, count)
    done = [0] * count
    with crewlog.open(place) as reg:
        stop = time.perf_counter() + seconds

        def work(number: int) -> None:
            while time.perf_counter() < stop:
                reg.update(f"w{number}", labels={"shard": str(done[number])})
                done[number] += 1

        crowd = [threading.Thread(target=work, args=(n,)) for n in range(count)]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
    return sum(done) / seconds


def tasks(home: Path, count: int, seconds: float) -> float:
    """Return changes a second of so many asyncio tasks that share a registry."""
    place = home / f"tasks-{count}-{time.monotonic_ns()}"
    _filled(place, count)
    done = [0] * count

    async def main() -> None:
        async with crewlog.aopen(place) as reg:
            stop = time.perf_counter() + seconds

            async def work(number: int) -> None:
                while time.perf_counter() < stop:
                    await reg.update(f"w{number}", labels={"shard": str(done[number])})
                    done[number] += 1

            await asyncio.gather(*(work(number) for number in range(count)))

    asyncio.run(main())
    return sum(done) / seconds


def sharing(home: Path, *, seconds: float, rounds: int) -> list[dict[str, float]]:
    """P3: one thread, 64 threads, 64 tasks, in turn."""
    return [
        {
            "crewlog": threads(home, 1, seconds),
            "64 threads": threads(home, 64, seconds),
            "64 tasks": tasks(home, 64, seconds),
        }
        for _ in range(rounds)
    ]


def batches(home: Path, *, rounds: int) -> list[dict[str, float]]:
    """P4: events a second in batches of 1,000, beside SQLite's executemany."""
    speeds = []
    database = sqlite3.connect(home / "batches.db", isolation_level=None)
    database.execute("pragma journal_mode=wal")
    database.execute("pragma synchronous=full")
    database.execute("create table events (seq integer primary key, ts text, sid text, data text)")
    database.execute("create table workers (sid text primary key, record text)")
    with crewlog.open(home / "batches") as reg:
        reg.register("w")
        for turn in range(rounds):
            began = time.perf_counter()
            with reg.batch() as batch:
                for number in range(SIZE):
                    batch.update("w", labels={"shard": str(turn * SIZE + number)})
            ours = time.perf_counter() - began
            began = time.perf_counter()
            rows = [(str(time.time()), "w", json.dumps({"labels": {"shard": str(number)}}))
                    for number in range(SIZE)]  # fmt: skip
            database.execute("begin immediate")
            database.executemany("insert into events (ts, sid, data) values (?, ?, ?)", rows)
            database.executemany("insert or replace into workers values (?, ?)",
                                 [(sid, data) for _, sid, data in rows])  # fmt: skip
            database.execute("commit")
            theirs = time.perf_counter() - began
            speeds.append({"crewlog": SIZE / ours, "sqlite, executemany": SIZE / theirs})
    return speeds
