"""Time the questions that an audit asks of a long history (P6, P11), and what the archive takes.

A history of 500 workers' updates; asked for one worker's events, for the last 20, for the state in
the middle. Beside it the floor (bytes.find over the same bytes), grep and jq over the same lines,
and SQLite with an index on the sid.
"""

import json
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import crewlog
from crewlog.local import layout
from crewlog.local.segments import Segments
from crewlog.model.arguments import Packing
from crewlog.registry import Registry
from crewlog_compactor import compact

WORKERS = 500
BATCH = 5000


def grown(home: Path, events: int) -> Registry:
    """Make a store with that many events."""
    reg = crewlog.open(home / "history")
    with reg.batch() as batch:
        for number in range(WORKERS):
            batch.register(f"worker-{number:04d}", labels={"app": "bench"})
    for start in range(0, events - WORKERS, BATCH):
        with reg.batch() as batch:
            for number in range(start, min(start + BATCH, events - WORKERS)):
                batch.update(f"worker-{number % WORKERS:04d}", labels={"shard": str(number)})
    return reg


def archived(home: Path, reg: Registry, packing: Packing) -> Registry:
    """Return a copy of the store with its history in the archive."""
    place = home / f"history-{packing}"
    shutil.copytree(reg.path, place)
    copy = crewlog.open(place)
    for number in range(2):
        compact(copy, gc=False, packing=packing)
        copy.update("worker-0000", labels={"again": str(number)})
    compact(copy, gc=False, packing=packing)
    return copy


def timed(work: Callable[[], object]) -> float:
    """Return how long it took, in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def of_one(reg: Registry) -> int:
    """Count one worker's events."""
    return sum(1 for _ in reg.history(sid="worker-0250"))


def run(home: Path, *, events: int, rounds: int) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """Yield each figure: million lines a second, milliseconds, bytes an event."""
    reg = grown(home, events)
    packed: dict[Packing, Registry] = {p: archived(home, reg, p) for p in ("gzip", "zstd")}
    lines = reg.last_seq
    plain = home / "all.jsonl"
    with plain.open("wb") as out:
        for path in sorted((reg.path / layout.LOG).iterdir()):
            out.write(path.read_bytes())
    data = plain.read_bytes()
    needle = b'"sid":"worker-0250"'
    database = _database(home, reg)
    wanted = of_one(reg)

    def floor() -> int:
        at, count = data.find(needle), 0
        while at >= 0:
            at, count = data.find(needle, at + 1), count + 1
        return count

    def sqlite() -> int:
        return len(database.execute("select * from events where sid = 'worker-0250'").fetchall())

    def grep() -> int:
        return len(subprocess.run(["grep", "-F", needle, plain], capture_output=True, check=True)
                   .stdout.splitlines())  # fmt: skip

    contestants: dict[str, Callable[[], int]] = {
        "crewlog": lambda: of_one(reg),
        "crewlog, gzip": lambda: of_one(packed["gzip"]),
        "crewlog, zstd": lambda: of_one(packed["zstd"]),
        "bytes.find": floor,
        "grep -F": grep,
        "sqlite, index": sqlite,
    }
    if shutil.which("jq"):
        contestants["jq"] = lambda: len(
            subprocess.run(["jq", "-c", 'select(.sid == "worker-0250")', plain],
                           capture_output=True, check=True).stdout.splitlines())  # fmt: skip
    for name, work in contestants.items():
        assert work() == wanted, name
    rates = [{n: lines / timed(w) / 1e6 for n, w in contestants.items()} for _ in range(rounds)]
    yield f"one worker's history of {lines:,} events, million lines/s", rates
    middle = lines // 2
    zstd = packed["zstd"]
    yield (
        "audit of the archive, ms",
        [
            {
                "crewlog": timed(lambda: _newest(zstd, 20)) * 1e3,
                "state at the middle": timed(lambda: zstd.at(middle)) * 1e3,
                "lives": timed(zstd.lives) * 1e3,
            }
            for _ in range(min(rounds, 3))
        ],
    )
    yield "bytes an event", [_sizes(home, reg, packed)]


def _newest(reg: Registry, count: int) -> list[object]:
    newest: list[object] = []
    for event in reg.history(newest_first=True):
        newest.append(event)
        if len(newest) == count:
            break
    return newest


def _database(home: Path, reg: Registry) -> sqlite3.Connection:
    database = sqlite3.connect(home / "history.db")
    database.execute(
        "create table events (seq integer primary key, ts text, type text, sid text, actor text,"
        " data text)"
    )
    database.executemany(
        "insert into events values (?, ?, ?, ?, ?, ?)",
        (
            (e.seq, e.ts.isoformat(), e.type, e.sid, json.dumps(e.actor), json.dumps(e.data))
            for e in reg.history()
        ),
    )
    database.execute("create index by_sid on events (sid)")
    database.commit()
    return database


def _sizes(home: Path, reg: Registry, packed: dict[Packing, Registry]) -> dict[str, float]:
    def archive(copy: Registry) -> float:
        total, last = 0, 0
        for path in (copy.path / layout.ARCHIVE).iterdir():
            if layout.first_seq_of(path.name) is not None:
                total += path.stat().st_size
        last = Segments(layout.open_existing(copy.path)).in_log()[0] - 1
        return total / last

    log = sum(path.stat().st_size for path in (reg.path / layout.LOG).iterdir())
    return {
        "crewlog": log / reg.last_seq,
        "archive, gzip": archive(packed["gzip"]),
        "archive, zstd": archive(packed["zstd"]),
        "sqlite": (home / "history.db").stat().st_size / reg.last_seq,
    }
