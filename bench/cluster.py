"""Measure a registry on one etcd server of this machine: changes, sharing, batches, watching.

The floor is a bare client of the same gateway that sends the same transaction: a comparison, three
keys of the same size, and nothing else.
"""

import base64
import contextlib
import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import crewlog

Rows = list[dict[str, float]]
_BODY = {"line": 450, "record": 600, "head": 180}


@contextlib.contextmanager
def server(home: Path) -> Iterator[int]:
    """Start a server, and end it; yield its port."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, peer = one.getsockname()[1], two.getsockname()[1]
    urls = [f"http://127.0.0.1:{number}" for number in (port, peer)]
    words = ["--listen-client-urls", urls[0], "--advertise-client-urls", urls[0],
             "--listen-peer-urls", urls[1], "--initial-advertise-peer-urls", urls[1],
             "--initial-cluster", f"default={urls[1]}"]  # fmt: skip
    with (home / "etcd.log").open("wb") as log:
        process = subprocess.Popen(
            ["etcd", "--data-dir", str(home / "etcd"), *words], stdout=log, stderr=log
        )
    try:
        for _ in range(400):
            with contextlib.suppress(OSError):
                ask = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
                ask.request("POST", "/v3/kv/range", body='{"key":"YQ=="}')
                if ask.getresponse().status == http.client.OK:
                    break
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def installed() -> bool:
    """Say whether there is an etcd to start."""
    return shutil.which("etcd") is not None


def _floor(port: int, seconds: float) -> list[float]:
    client = http.client.HTTPConnection("127.0.0.1", port)
    values = {name: base64.b64encode(b"x" * size).decode() for name, size in _BODY.items()}
    head = {"key": "Zmxvb3I=", "value": values["head"]}
    body = json.dumps({
        "compare": [{**head, "target": "VALUE", "result": "EQUAL"}],
        "success": [
            {"requestPut": head},
            {"requestPut": {"key": "Zmxvb3Ix", "value": values["line"]}},
            {"requestPut": {"key": "Zmxvb3Iy", "value": values["record"]}},
        ],
        "failure": [{"requestPut": head}],
    })  # fmt: skip
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        client.request("POST", "/v3/kv/txn", body=body)
        client.getresponse().read()
        times.append(time.perf_counter() - began)
    return times


def _changes(reg: crewlog.Registry, sid: str, seconds: float) -> list[float]:
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        reg.update(sid, meta={"n": len(times)})
        times.append(time.perf_counter() - began)
    return times


def one_writer(port: int, *, seconds: float, rounds: int) -> tuple[Rows, dict[str, float]]:
    """Return changes a second by one process, and p99 in ms."""
    rows: Rows = []
    times: dict[str, list[float]] = {"crewlog": [], "floor": []}
    with crewlog.open(f"etcd://127.0.0.1:{port}/one") as reg:
        reg.register("w")
        for _ in range(rounds):
            took = {"crewlog": _changes(reg, "w", seconds), "floor": _floor(port, seconds)}
            rows.append({name: len(slices) / seconds for name, slices in took.items()})
            for name, slices in took.items():
                times[name] += slices
    return rows, {name: _p99(slices) for name, slices in times.items()}


def _p99(times: list[float]) -> float:
    return round(statistics.quantiles(times, n=100)[-1] * 1e3, 2) if len(times) > 1 else 0.0


def eight_writers(port: int, *, seconds: float, rounds: int) -> tuple[Rows, float]:
    """Return changes a second by 8 processes, and by 8 threads that share appends; p99 in ms."""
    rows: Rows = []
    slow: list[float] = []
    place = f"etcd://127.0.0.1:{port}/eight"
    with crewlog.open(place) as reg:
        for number in range(8):
            reg.register(f"w{number}")
        for _ in range(rounds):
            done, more = _processes(place, seconds)
            slow += more
            rows.append({"crewlog": done / seconds, "8 threads": _threads(reg, seconds) / seconds})
    return rows, _p99(slow)


def _processes(place: str, seconds: float) -> tuple[int, list[float]]:
    reading, writing = os.pipe()
    pids = []
    for number in range(8):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with crewlog.open(place) as reg, os.fdopen(writing, "w") as out:
                    out.write(" ".join(map(str, _changes(reg, f"w{number}", seconds))) + "\n")
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    os.close(writing)
    with os.fdopen(reading) as reports:
        times = [float(word) for word in reports.read().split()]
    for pid in pids:
        os.waitpid(pid, 0)
    return len(times), times


def _threads(reg: crewlog.Registry, seconds: float) -> int:
    done: list[int] = []

    def work(number: int) -> None:
        done.append(len(_changes(reg, f"w{number}", seconds)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done)


def batches(port: int, *, rounds: int) -> dict[str, float]:
    """Return events a second in batches of 100."""
    rates = []
    with crewlog.open(f"etcd://127.0.0.1:{port}/batches") as reg:
        reg.register("w")
        for turn in range(rounds):
            began = time.perf_counter()
            with reg.batch() as batch:
                for number in range(100):
                    batch.update("w", meta={"n": turn * 100 + number})
            rates.append(100 / (time.perf_counter() - began))
    return {"events a second": round(statistics.median(rates))}


def watching(port: int, *, count: int, watchers: int) -> dict[str, float]:
    """Return how soon a change is seen in another process, from the call, in ms."""
    place = f"etcd://127.0.0.1:{port}/watched"
    with crewlog.open(place) as reg:
        reg.register("w")
        return {
            **_seen(reg, place, count=count, watchers=1, name="one watcher"),
            **_seen(reg, place, count=count, watchers=watchers, name=f"{watchers} watchers"),
        }


def _seen(
    reg: crewlog.Registry, place: str, *, count: int, watchers: int, name: str
) -> dict[str, float]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _watch(place, writing, count, watchers)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as reports:
        reports.readline()
        for number in range(count):
            reg.update("w", meta={"at": time.monotonic_ns(), "n": number})
            time.sleep(0.02)
        late = [float(row) for row in reports.read().split()]
    os.waitpid(pid, 0)
    return {
        f"{name}, p50": round(statistics.median(late), 2),
        f"{name}, p99": _p99([t / 1e3 for t in late]),
    }


def _watch(place: str, report: int, count: int, watchers: int) -> None:
    with crewlog.open(place) as reg:
        watches = [reg.watch(after="now") for _ in range(watchers)]
        late: list[float] = []

        def take(items: crewlog.Watch) -> None:
            left = count
            while left:
                item = items.next()
                if item is not None and item.kind == "change":
                    at = item.event.data["meta"]["at"]  # type: ignore[call-overload,index]
                    late.append((time.monotonic_ns() - at) / 1e6)
                    left -= 1

        threads = [threading.Thread(target=take, args=(items,)) for items in watches]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        os.write(report, b"ready\n")
        for thread in threads:
            thread.join()
        os.write(report, " ".join(f"{t:.3f}" for t in late).encode())


def run(home: Path, figures: Callable[..., None], tell: Callable[..., None], *, seconds: float,
        rounds: int, smoke: bool) -> None:  # fmt: skip
    """Measure all of it."""
    with server(home) as port:
        rows, p99 = one_writer(port, seconds=seconds, rounds=rounds)
        figures("P12", "changes a second on etcd, one process", rows, p99_ms=p99)
        rows, slow = eight_writers(port, seconds=max(seconds, 0.1), rounds=min(rounds, 5))
        figures("P12b", "changes a second on etcd, 8 processes; 8 threads that share appends", rows,
                p99_of_processes_ms=slow)  # fmt: skip
        tell("P12c", "batches of 100 on etcd", batches(port, rounds=3 if smoke else 20))
        tell("P12d", "a change on etcd is seen in another process, from the call, ms",
             watching(port, count=5 if smoke else 150, watchers=3 if smoke else 100))  # fmt: skip
