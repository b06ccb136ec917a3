"""Do what append.py does, by the means that people use for it today.

Each keeps the event and updates the worker's record, atomically and durably: a return means that
the disk has it. A peer whose package or server is not installed is left out, and said so.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from append import Contestant

SOCKET = "redis.sock"


def _event(number: int) -> str:
    return json.dumps({"ts": time.time(), "type": "worker.updated", "pid": os.getpid(),
                       "data": {"labels": {"shard": str(number)}}, "pad": "x" * 120})  # fmt: skip


def _record(number: int) -> str:
    return json.dumps({"labels": {"app": "bench", "shard": str(number)}})


class Lmdb:
    """LMDB with sync and metasync: both values in one transaction."""

    def __init__(self, home: Path, writer: int) -> None:
        import lmdb

        (home / "lmdb").mkdir(exist_ok=True)
        self._env = lmdb.open(str(home / "lmdb"), map_size=1 << 30, max_dbs=2)
        self._events = self._env.open_db(b"events")
        self._workers = self._env.open_db(b"workers")
        self._sid = f"worker-{writer}-{os.getpid()}".encode()

    def change(self, number: int) -> None:
        with self._env.begin(write=True) as txn:
            last = txn.cursor(self._events)
            seq = int.from_bytes(last.key(), "big") + 1 if last.last() else 1
            txn.put(seq.to_bytes(8, "big"), _event(number).encode(), db=self._events)
            txn.put(self._sid, _record(number).encode(), db=self._workers)

    def close(self) -> None:
        self._env.close()


class Redis:
    """Redis with appendfsync always, over a Unix socket: both in one MULTI."""

    def __init__(self, home: Path, writer: int) -> None:
        import redis

        self._client = redis.Redis(unix_socket_path=str(home / SOCKET))
        self._sid = f"worker-{writer}-{os.getpid()}"

    def change(self, number: int) -> None:
        with self._client.pipeline(transaction=True) as pipe:
            pipe.xadd("events", {"sid": self._sid, "event": _event(number)})
            pipe.hset("workers", self._sid, _record(number))
            pipe.execute()

    def close(self) -> None:
        self._client.close()


@contextmanager
def redis_server(home: Path) -> Iterator[None]:
    """Run a server that acknowledges after its fsync; ends with the block."""
    import redis

    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(home / SOCKET), "--appendonly", "yes",
         "--appendfsync", "always", "--save", "", "--dir", str(home)],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        client = redis.Redis(unix_socket_path=str(home / SOCKET))
        for _ in range(500):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.02)
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


class Diskcache:
    """diskcache with synchronous FULL: both values in one transaction."""

    def __init__(self, home: Path, writer: int) -> None:
        import diskcache

        self._cache = diskcache.Cache(str(home / "diskcache"), sqlite_synchronous=2, timeout=60)
        self._sid = f"worker-{writer}-{os.getpid()}"

    def change(self, number: int) -> None:
        with self._cache.transact():
            seq = self._cache.incr("seq", default=0)
            self._cache[f"event-{seq}"] = _event(number)
            self._cache[self._sid] = _record(number)

    def close(self) -> None:
        self._cache.close()


@functools.cache
def _aggregate() -> type:
    """Return the aggregate's class; the library wants each to be defined once."""
    from eventsourcing.domain import Aggregate, event

    class Worker(Aggregate):
        @event("Registered")
        def __init__(self, sid: str) -> None:
            self.sid = sid
            self.shard = ""

        @event("Updated")
        def update(self, shard: str, pad: str) -> None:
            self.shard = shard

    return Worker


class Eventsourcing:
    """The eventsourcing library on SQLite: an aggregate whose event is saved."""

    def __init__(self, home: Path, writer: int) -> None:
        from eventsourcing.application import Application

        place = str(home / "eventsourcing.db")
        self._app = Application[object](
            env={"PERSISTENCE_MODULE": "eventsourcing.sqlite", "SQLITE_DBNAME": place,
                 "SQLITE_LOCK_TIMEOUT": "60"}
        )  # fmt: skip
        self._worker = _aggregate()(sid=f"worker-{writer}-{os.getpid()}")
        self._app.save(self._worker)

    def change(self, number: int) -> None:
        self._worker.update(shard=str(number), pad="x" * 120)
        self._app.save(self._worker)

    def close(self) -> None:
        self._app.close()


class Predecessor:
    """One JSON file, rewritten whole: lock, load, change, write, fsync, rename."""

    workers = 100

    def __init__(self, home: Path, writer: int) -> None:
        import fcntl

        self._flock = fcntl.flock
        self._path = home / f"predecessor-{self.workers}.json"
        self._lock = os.open(home / "predecessor.lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._sid = f"worker-{writer % self.workers}"
        self._flock(self._lock, 2)
        if not self._path.exists():
            row = {"pid": 1, "sock": "/run/w.sock", "version": "1.0", "created_at": "2026-11-24"}
            rows = [{"sid": f"worker-{n}", **row} for n in range(self.workers)]
            self._path.write_text(json.dumps({"sessions": rows}))
        self._flock(self._lock, 8)

    def change(self, number: int) -> None:
        import orjson

        self._flock(self._lock, 2)
        try:
            state = orjson.loads(self._path.read_bytes())
            for row in state["sessions"]:
                if row["sid"] == self._sid:
                    row["version"] = str(number)
            temporary = self._path.with_suffix(f".{os.getpid()}")
            with temporary.open("wb") as file:
                file.write(orjson.dumps(state))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._path)
        finally:
            self._flock(self._lock, 8)

    def close(self) -> None:
        os.close(self._lock)


def _predecessor(workers: int) -> Callable[[Path, int], Contestant]:
    return type(f"Predecessor{workers}", (Predecessor,), {"workers": workers})


def installed() -> dict[str, Callable[[Path, int], Contestant]]:
    """Return the peers that can take part here."""
    peers: dict[str, Callable[[Path, int], Contestant]] = {}
    if find_spec("lmdb"):
        peers["lmdb"] = Lmdb
    if find_spec("redis") and shutil.which("redis-server"):
        peers["redis"] = Redis
    if find_spec("diskcache"):
        peers["diskcache"] = Diskcache
    if find_spec("eventsourcing"):
        peers["eventsourcing"] = Eventsourcing
    for workers in (100, 1000, 10_000):
        peers[f"predecessor, {workers:,} workers"] = _predecessor(workers)
    return peers
