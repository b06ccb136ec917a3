"""Time opening a registry, and compacting it beside a writer (P5, P7)."""

import os
import resource
import shutil
import sqlite3
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import orjson

import crewlog
from crewlog.local import layout
from crewlog.registry import Registry
from crewlog_compactor import compact

BATCH = 5000


def grown(place: Path, workers: int, events: int, *, snapshot: bool = True) -> Registry:
    """Make a store with so many workers in its snapshot and so many events after it."""
    reg = crewlog.open(place)
    for start in range(0, workers, BATCH):
        with reg.batch() as batch:
            for number in range(start, min(start + BATCH, workers)):
                batch.register(f"w{number:06d}", labels={"app": "bench"})
    if snapshot:
        compact(reg, gc=False)
    for start in range(0, events, BATCH):
        with reg.batch() as batch:
            for number in range(start, min(start + BATCH, events)):
                batch.update(f"w{number % workers:06d}", labels={"shard": str(number)})
    return reg


def timed(work: Callable[[], object]) -> float:
    """Return how long it took, in milliseconds."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def opening(
    home: Path, *, workers: int, events: int, rounds: int
) -> tuple[list[dict[str, float]], float]:
    """P5: open and read the state; and events a second of the tail."""
    place = home / "opened"
    reg = grown(place, workers, events)
    raws = [raw for path in sorted((place / layout.LOG).iterdir())
            for raw in path.read_bytes().splitlines()]  # fmt: skip
    database = sqlite3.connect(home / "opened.db")
    database.execute("create table workers (sid text primary key, record text)")
    state = reg.state()
    database.executemany(
        "insert into workers values (?, ?)", [(sid, str(w)) for sid, w in state.workers.items()]
    )
    database.commit()
    kept = (place / layout.SNAPSHOT).read_bytes()

    def ours() -> None:
        with crewlog.open(place) as fresh:
            assert len(fresh.state().workers) == workers

    def floor() -> None:
        orjson.loads(kept)
        for raw in raws:
            orjson.loads(raw)

    def sqlite() -> None:
        other = sqlite3.connect(home / "opened.db")
        assert len(other.execute("select * from workers").fetchall()) == workers
        other.close()

    rows = [
        {"crewlog": timed(ours), "orjson alone": timed(floor), "sqlite select": timed(sqlite)}
        for _ in range(rounds)
    ]
    alone = grown(home / "opened-without", workers, 0)
    alone.close()

    def short() -> None:
        with crewlog.open(home / "opened-without") as fresh:
            fresh.state()

    tail_ms = statistics.median(row["crewlog"] for row in rows) - timed(short)
    return rows, events / tail_ms * 1e3


def compaction(home: Path, *, events: int) -> dict[str, float]:
    """P7: fold and archive a long log; what a writer waits meanwhile, and the memory it takes."""
    place = home / "compacted"
    grown(place, 1000, events, snapshot=False).close()
    calm = _writer(place, 0.5, None)
    up, down = os.pipe()
    pid = os.fork()
    if pid == 0:
        with crewlog.open(place) as mine:
            began = time.perf_counter()
            report = compact(mine, gc=False)
            took = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(down, orjson.dumps([report.folded_events, took, peak]))
        os._exit(0)
    os.close(down)
    busy = _writer(place, 0.0, pid)
    with os.fdopen(up, "rb") as source:
        folded, took, peak = orjson.loads(source.read(4096))
    return {
        "events_per_s": round(folded / took),
        "peak_rss_mib": round(peak / 1024),
        "writer_p99_calm_ms": round(calm, 3),
        "writer_p99_meanwhile_ms": round(busy, 3),
    }


def _writer(place: Path, seconds: float, until: int | None) -> float:
    """Change a worker again and again; return the p99 in milliseconds."""
    took: list[float] = []
    with crewlog.open(place) as reg:
        reg.update("w000000", labels={"n": ""})  # opening a long log is P5's
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop or (until and os.waitpid(until, os.WNOHANG) == (0, 0)):
            took.append(timed(lambda: reg.update("w000000", labels={"n": str(len(took))})))
            time.sleep(0.001)
    return statistics.quantiles(took if len(took) > 1 else [0.0, 0.0], n=100)[-1]


def ages(home: Path, *, seconds: float, rounds: int, many: int) -> list[dict[str, float]]:
    """P1 again: changes a second with 100 and with many live workers, and behind a long history."""
    few = grown(home / "few", 100, 0)
    lots = grown(home / "lots", many, 0)
    old = grown(home / "old", 100, many)
    compact(old, gc=False)
    rows = [
        {name: _rate(reg, seconds) for name, reg in
         (("crewlog", few), (f"{many:,} workers", lots), (f"{many:,} events before", old))}
        for _ in range(rounds)
    ]  # fmt: skip
    for reg in (few, lots, old):
        reg.close()
        shutil.rmtree(reg.path)
    return rows


def _rate(reg: Registry, seconds: float) -> float:
    count, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        reg.update(f"w{count % 100:06d}", labels={"shard": str(time.monotonic_ns())})
        count += 1
    return count / seconds
