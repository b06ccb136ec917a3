"""Time how soon a change is seen, in another process, beside the floor and its peers.

`publish` figures run from the write that makes a change visible to the moment a reader has it: ours
by each waker, a bare watchdog callback, and a bare inotify read. `call` figures run from the call
that makes a change to the moment a reader has it, so the sync is in it: ours, Redis (XADD with
appendfsync always, XREAD BLOCK) and SQLite (WAL, synchronous=FULL, data_version looked at every
millisecond). Writer and reader are two processes with one clock.
"""

import array
import json
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import crewlog
from crewlog.local.heads import DurableHead, States

PAUSE_S = 0.004
Stamps = dict[int, int]


@contextmanager
def reader(work: Callable[[int, Callable[[int], None]], None], count: int) -> Iterator[int]:
    """Fork a reader that notes when it has each number; yields the pipe that it reports to."""
    up, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(up)
            seen: Stamps = {}

            def note(number: int) -> None:
                if number < 0:
                    os.write(tell, b"\n")
                else:
                    seen.setdefault(number, time.monotonic_ns())

            work(count, note)
            with os.fdopen(tell, "w") as out:
                json.dump(seen, out)
            code = 0
        finally:
            os._exit(code)
    os.close(tell)
    try:
        assert os.read(up, 1) == b"\n"
        yield up
    finally:
        os.waitpid(pid, 0)


def delays(sent: Stamps, up: int) -> list[float]:
    """Return what lay between sending and seeing, in microseconds."""
    with os.fdopen(up) as source:
        seen = {int(number): at for number, at in json.load(source).items()}
    return [(seen[number] - at) / 1e3 for number, at in sent.items() if number in seen]


# -- ours -----------------------------------------------------------------------------------


def ours(home: Path, backend: str, count: int) -> tuple[list[float], list[float]]:
    """Return the delays from publication and from the call."""
    place = home / f"watch-{backend}"
    shutil.rmtree(place, ignore_errors=True)
    with crewlog.open(place) as reg:
        reg.register("w")

    def work(count: int, note: Callable[[int], None]) -> None:
        with crewlog.open(place) as mine, mine.watch(after="now", backend=backend) as items:  # type: ignore[arg-type]
            items.next(5)
            note(-1)
            for item in items:
                note(item.seq)
                if item.seq >= 2 + count:
                    return

    published: Stamps = {}
    called: Stamps = {}
    real = States.put_head

    def stamped(self: States, head: DurableHead, data: bytes = b"") -> None:
        published[head.seq] = time.monotonic_ns()
        real(self, head, data)

    with reader(work, count) as up, crewlog.open(place) as reg:
        States.put_head = stamped  # type: ignore[method-assign]
        try:
            for number in range(count):
                called[3 + number] = time.monotonic_ns()
                reg.update("w", labels={"n": str(number)})
                time.sleep(PAUSE_S)
        finally:
            States.put_head = real  # type: ignore[method-assign]
        with os.fdopen(os.dup(up)) as source:
            seen = {int(n): at for n, at in json.load(source).items()}
        os.close(up)
    return (
        [(seen[n] - at) / 1e3 for n, at in published.items() if n in seen],
        [(seen[n] - at) / 1e3 for n, at in called.items() if n in seen],
    )


# -- the floor ------------------------------------------------------------------------------


def bare(home: Path, how: str, count: int) -> list[float]:
    """Write a file and be told: by watchdog's callback, or by a read of an inotify descriptor."""
    place = home / f"bare-{how}"
    place.mkdir(exist_ok=True)
    path = place / "file"
    path.write_bytes(b"0" * 80)

    def by_watchdog(count: int, note: Callable[[int], None]) -> None:
        from watchdog.events import FileModifiedEvent, FileSystemEvent, FileSystemEventHandler
        from watchdog.observers import Observer

        done = threading.Event()
        met = 0

        class Handler(FileSystemEventHandler):
            def on_any_event(self, event: FileSystemEvent) -> None:
                nonlocal met
                note(met)
                met += 1
                if met >= count:
                    done.set()

        observer = Observer()
        observer.schedule(Handler(), str(place), event_filter=[FileModifiedEvent])
        observer.start()
        note(-1)
        done.wait(30)
        observer.stop()
        observer.join()

    def by_inotify(count: int, note: Callable[[int], None]) -> None:
        from inotify_simple import INotify, flags

        inotify = INotify()
        inotify.add_watch(str(place), flags.MODIFY)
        note(-1)
        for number in range(count):
            os.read(inotify.fileno(), 4096)
            note(number)

    sent: Stamps = {}
    with reader(by_watchdog if how == "watchdog" else by_inotify, count) as up:
        fd = os.open(path, os.O_WRONLY)
        for number in range(count):
            sent[number] = time.monotonic_ns()
            os.pwrite(fd, b"1" * 80, 0)
            time.sleep(PAUSE_S)
        os.close(fd)
        return delays(sent, up)


# -- peers ----------------------------------------------------------------------------------


def sqlite(home: Path, count: int) -> list[float]:
    """Insert and commit; the reader looks at data_version every millisecond."""
    place = home / "watch.db"
    place.unlink(missing_ok=True)

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(place, isolation_level=None, timeout=30)
        connection.execute("pragma journal_mode=wal")
        connection.execute("pragma synchronous=full")
        return connection

    writer = connect()
    writer.execute("create table events (seq integer primary key, data text)")

    def work(count: int, note: Callable[[int], None]) -> None:
        mine = connect()
        version, last = -1, 0
        note(-1)
        while last < count:
            now = mine.execute("pragma data_version").fetchone()[0]
            if now == version:
                time.sleep(0.001)
                continue
            version = now
            for (seq,) in mine.execute("select seq from events where seq > ?", (last,)):
                last = seq
                note(seq)

    sent: Stamps = {}
    with reader(work, count) as up:
        for number in range(1, count + 1):
            sent[number] = time.monotonic_ns()
            writer.execute("insert into events values (?, ?)", (number, "x" * 230))
            time.sleep(PAUSE_S)
        times = delays(sent, up)
    writer.close()
    return times


def redis(home: Path, count: int) -> list[float]:
    """XADD with appendfsync always; the reader blocks in XREAD."""
    import redis as client

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--appendonly", "yes",
         "--appendfsync", "always", "--save", "", "--dir", str(home)],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        writer = client.Redis(port=port)
        for _ in range(200):
            try:
                writer.ping()
                break
            except client.ConnectionError:
                time.sleep(0.02)
        writer.delete("events")

        def work(count: int, note: Callable[[int], None]) -> None:
            mine = client.Redis(port=port)
            last, met = "0", 0
            note(-1)
            while met < count:
                for _, rows in mine.xread({"events": last}, block=5000):
                    for key, row in rows:
                        last = key
                        note(int(row[b"n"]))
                        met += 1

        sent: Stamps = {}
        with reader(work, count) as up:
            for number in range(count):
                sent[number] = time.monotonic_ns()
                writer.xadd("events", {"n": number, "data": "x" * 230})
                time.sleep(PAUSE_S)
            return delays(sent, up)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


# -- load -----------------------------------------------------------------------------------


def idle_cpu(home: Path, backend: str, seconds: float) -> float:
    """Return the share of one processor that a watcher with nothing to do takes, in percent."""
    place = home / f"watch-{backend}"
    pid = os.fork()
    if pid == 0:
        with crewlog.open(place) as mine, mine.watch(after="now", backend=backend) as items:  # type: ignore[arg-type]
            items.next(1)
            before = time.process_time()
            items.next(seconds)
            used = time.process_time() - before
        os._exit(min(255, round(used / seconds * 1e5)))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) / 1e3


def sustained(home: Path, seconds: float) -> dict[str, float]:
    """Return how far a watcher lags behind 5,000 changes a second, and what it grows by."""
    place = home / "sustained"
    with crewlog.open(place) as reg:
        reg.register("w")

    def work(tell: int) -> None:
        with crewlog.open(place) as mine, mine.watch(after="now") as items:
            items.next(5)
            os.write(tell, b"\n")
            began, lags = 0, array.array("f")  # compact, so as not to grow by itself
            for item in items:
                if item.kind == "change":
                    meta = item.event.data["meta"]
                    assert isinstance(meta, dict)
                    lags.append((time.monotonic_ns() - int(str(meta["at"]))) / 1e6)
                    if len(lags) == 5000:
                        began = _rss()
                    if meta.get("last"):
                        break
            results[2] = _rss() - began - lags.itemsize * len(lags)
            results[1] = round(statistics.quantiles(lags, n=100)[-1] * 1000)

    results: Stamps = {}
    up, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        work(tell)
        os.write(tell, json.dumps(results).encode())
        os._exit(0)
    os.close(tell)
    assert os.read(up, 1) == b"\n"
    with crewlog.open(place) as reg:
        end = time.monotonic() + seconds
        due = time.monotonic()
        while time.monotonic() < end:
            with reg.batch() as batch:
                for _ in range(10):
                    batch.update("w", meta={"at": str(time.monotonic_ns())})
            due += 0.002
            time.sleep(max(0.0, due - time.monotonic()))
        reg.update("w", meta={"at": str(time.monotonic_ns()), "last": True})
    with os.fdopen(up) as source:
        figures = json.load(source)
    os.waitpid(pid, 0)
    return {"lag_p99_ms": figures["1"] / 1000, "rss_growth_bytes": figures["2"]}


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def replay(home: Path, events: int) -> dict[str, float]:
    """Return lines a second: read whole, one worker of 500, and orjson alone on the same lines."""
    import orjson

    place = home / "replay"
    with crewlog.open(place) as reg:
        with reg.batch() as batch:
            for worker in range(500):
                batch.register(f"w-{worker}")
        for _ in range(events // 5000):
            with reg.batch() as batch:
                for number in range(5000):
                    batch.update(f"w-{number % 500}", meta={"number": number})
        began = time.perf_counter()
        seen = sum(1 for _ in reg.history())
        whole = seen / (time.perf_counter() - began)
        began = time.perf_counter()
        assert sum(1 for _ in reg.history(sid="w-7")) == events // 500 + 1
        one = seen / (time.perf_counter() - began)
        raws = [event.raw for event in reg.history()]
    began = time.perf_counter()
    for raw in raws:
        orjson.loads(raw)
    return {
        "all": round(whole),
        "one_of_500": round(one),
        "orjson_alone": round(len(raws) / (time.perf_counter() - began)),
    }


def run(
    home: Path, *, count: int, rounds: int, seconds: float, smoke: bool
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the figures of P8, interleaved."""
    delays_of: dict[str, list[float]] = {}

    def keep(name: str, values: list[float]) -> None:
        delays_of.setdefault(name, []).append(statistics.median(values))

    for _ in range(rounds):
        for backend in ("inotify", "watchdog", "poll"):
            publish, call = ours(home, backend, count)
            keep(f"publish: crewlog by {backend}", publish)
            keep(f"call: crewlog by {backend}", call)
        keep("publish: bare watchdog callback", bare(home, "watchdog", count))
        keep("publish: bare inotify read", bare(home, "inotify", count))
        keep("call: sqlite data_version", sqlite(home, count))
        if shutil.which("redis-server") and find_spec("redis"):
            keep("call: redis XREAD BLOCK", redis(home, count))
    medians = {name: round(statistics.median(values)) for name, values in sorted(delays_of.items())}
    yield "delay of a change, p50 in microseconds", medians
    pairs = {
        "watchdog to its bare callback": ("publish: crewlog by watchdog",
                                          "publish: bare watchdog callback"),
        "inotify to its bare read": ("publish: crewlog by inotify", "publish: bare inotify read"),
    }  # fmt: skip
    yield (
        "ratio to the floor",
        {
            name: round(
                statistics.median(a / b for a, b in zip(delays_of[x], delays_of[y], strict=True)), 2
            )
            for name, (x, y) in pairs.items()
        },
    )
    idle_s = 1.0 if smoke else 5.0
    idle = {b: idle_cpu(home, b, idle_s) for b in ("inotify", "watchdog", "poll")}
    yield "idle processor, percent", idle
    yield "at 5,000 changes/s", sustained(home, seconds)
    yield "replay, lines/s", replay(home, 5000 if smoke else 100_000)
