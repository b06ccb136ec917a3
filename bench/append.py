"""Time one durable change: ours, the floor (write + fdatasync of the same bytes), and SQLite.

Every contestant keeps the event and updates the worker's record, atomically and durably: a return
means fdatasync has returned. SQLite runs in WAL mode with synchronous=FULL, both rows in one
transaction.
"""

import functools
import itertools
import json
import os
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import crewlog


class Contestant(Protocol):
    """Something that makes one change durable."""

    def change(self, number: int) -> None:
        """Make change `number` durable."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Ours:
    """crewlog: one update of one worker."""

    def __init__(self, home: Path, writer: int) -> None:
        """Register this writer's worker."""
        self._reg = crewlog.open(home / "crewlog")
        self._sid = f"worker-{writer}-{os.getpid()}"
        self._reg.register(self._sid, labels={"app": "bench"})

    def change(self, number: int) -> None:
        """Update one label, as a heartbeat or a move to another shard would."""
        self._reg.update(self._sid, labels={"shard": str(number)})

    def close(self) -> None:
        """Give the sid back and close the registry."""
        self._reg.remove(self._sid, reason="the slice is over")
        self._reg.close()


class Floor:
    """What the disk allows: the same number of bytes, appended and synced, and nothing else."""

    def __init__(self, home: Path, writer: int) -> None:
        """Open one file, shared by all writers, without any lock."""
        self._fd = os.open(home / "floor", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._line = b"x" * (line_bytes(home) - 1) + b"\n"

    def change(self, number: int) -> None:
        """Write and sync."""
        os.write(self._fd, self._line)
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class Sqlite:
    """SQLite: an event row and the worker's row in one transaction."""

    def __init__(self, home: Path, writer: int) -> None:
        """Open the database, shared by all writers."""
        self._db = sqlite3.connect(home / "sqlite.db", isolation_level=None, timeout=60)
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=full")
        self._db.execute(
            "create table if not exists events"
            " (seq integer primary key, ts text, type text, sid text, actor text, data text)"
        )
        self._db.execute(
            "create table if not exists workers (sid text primary key, rev integer, record text)"
        )
        self._sid = f"worker-{writer}-{os.getpid()}"
        self._actor = json.dumps({"pid": os.getpid(), "uid": os.geteuid(), "program": "bench"})

    def change(self, number: int) -> None:
        """Insert the event and replace the record."""
        self._put("worker.updated", self._sid, json.dumps({"labels": {"shard": str(number)}}))

    def _put(self, kind: str, sid: str, data: str) -> None:
        self._db.execute("begin immediate")
        row = self._db.execute(
            "insert into events (ts, type, sid, actor, data) values (?, ?, ?, ?, ?)",
            (str(time.time()), kind, sid, self._actor, data),
        )
        self._db.execute(
            "insert or replace into workers values (?, ?, ?)", (sid, row.lastrowid, data)
        )
        self._db.execute("commit")

    def close(self) -> None:
        """Close the database."""
        self._db.close()


CONTESTANTS: dict[str, Callable[[Path, int], Contestant]] = {
    "crewlog": Ours,
    "floor": Floor,
    "sqlite": Sqlite,
}


_numbers = itertools.count()  # no sid is registered twice


class Registering(Ours):
    """crewlog: one more worker."""

    def change(self, number: int) -> None:
        """Register this very process under another sid."""
        self._reg.register(f"{self._sid}-{next(_numbers)}", labels={"app": "bench"})


class SqliteRegistering(Sqlite):
    """SQLite: the event and the record of one more worker, as long as ours."""

    RECORD = json.dumps({"labels": {"app": "bench"}, "pad": "x" * 500})

    def change(self, number: int) -> None:
        """Insert both."""
        self._put("worker.registered", f"{self._sid}-{next(_numbers)}", self.RECORD)


REGISTERING: dict[str, Callable[[Path, int], Contestant]] = {
    "crewlog": Registering,
    "sqlite": SqliteRegistering,
}


def cost(home: Path, count: int) -> dict[str, object]:
    """Return what a change costs where a sync costs nothing: processor time, calls of Python."""
    row: dict[str, object] = {}
    for name, make in (("update", Ours), ("register", Registering)):
        contestant = make(home, 0)
        for number in range(200):
            contestant.change(number)
        slices = []
        for first in range(200, 200 + 5 * count, count):
            began = time.process_time()
            for number in range(first, first + count):
                contestant.change(number)
            slices.append((time.process_time() - began) / count * 1e6)
        row[f"{name}, µs of processor time"] = round(min(slices), 1)
        row[f"{name}, calls of Python"] = _calls_of(functools.partial(contestant.change, -2)) - 1
        contestant.close()
    return row


def _calls_of(work: Callable[[], None]) -> int:
    calls = 0

    def count(_frame: object, event: str, _what: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@functools.cache
def line_bytes(home: Path) -> int:
    """Return the size of one of our lines, for the floor to write as much."""
    with crewlog.open(home / f"sample-{os.getpid()}") as reg:
        reg.register("worker-0-00000", labels={"app": "bench"})
        reg.update("worker-0-00000", labels={"shard": "00000"})
        return len(list(reg.history())[-1].raw) + 1


def alone(make: Callable[[Path, int], Contestant], home: Path, seconds: float) -> list[float]:
    """Make changes one after the other for a while; return what each took, in seconds."""
    contestant = make(home, 0)
    took: list[float] = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        contestant.change(len(took))
        took.append(time.perf_counter() - began)
    contestant.close()
    return took


def crowd(
    make: Callable[[Path, int], Contestant], home: Path, seconds: float, writers: int
) -> list[list[float]]:
    """Make changes in several processes at once; return what each change of each writer took."""
    make(home, 0).close()  # what the first one must create, such as a journal mode
    go, started = os.pipe(), os.pipe()
    readers, pids = [], []
    for writer in range(writers):
        end, result = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(end)
            code = 1
            try:
                contestant = make(home, writer)
                contestant.change(-1)
                os.write(started[1], b".")
                os.read(go[0], 1)
                took: list[float] = []
                stop = time.perf_counter() + seconds
                while (began := time.perf_counter()) < stop:
                    contestant.change(len(took))
                    took.append(time.perf_counter() - began)
                with os.fdopen(result, "w") as out:
                    json.dump(took, out)
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                    os.write(started[1], b"x")
                os._exit(code)
        os.close(result)
        readers.append(end)
        pids.append(pid)
    for _ in range(writers):
        if os.read(started[0], 1) != b".":  # nobody may be left waiting for the others
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            raise RuntimeError(f"a writer of {make} failed")
    os.write(go[1], b"." * writers)
    times = []
    for end in readers:
        with os.fdopen(end) as source:
            times.append(json.load(source))
    for _ in range(writers):
        os.wait()
    for fd in (*go, *started):
        os.close(fd)
    return times
