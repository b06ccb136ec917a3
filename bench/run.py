"""Measure crewlog beside the floor and its peers, interleaved in short slices of one run.

    python bench/run.py [--only P1,P2] [--rounds 7] [--seconds 0.5] [--dir PLACE] [--out FILE]

Prints one JSON object a figure: the median of each contestant over the rounds, and the median of
the ratios that each round gives. An absolute figure says little; the ratio is the figure. Peers
that are not installed are left out and named. `--smoke` makes every figure once, from as little as
possible: it shows that all of it runs, and nothing else.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import append
import history
import liveness
import opening
import peers
import sharing
import start
from append import Contestant

import cluster
import watch

Rows = list[dict[str, float]]
MEMORY = Path("/dev/shm")  # noqa: S108 (a file system without a disk)


class Run:
    """What was asked for, and where figures go."""

    def __init__(self, asked: argparse.Namespace, home: Path) -> None:
        self.home = home
        self.smoke: bool = asked.smoke
        self.seconds: float = 0.02 if asked.smoke else asked.seconds
        self.rounds: int = 1 if asked.smoke else asked.rounds
        self.soak: float = 0.5 if asked.smoke else asked.soak
        self._out = asked.out

    def few(self, many: int, few: int) -> int:
        """Return how many of something, by whether this is but a smoke test."""
        return few if self.smoke else many

    def tell(self, key: str, name: str, fields: Mapping[str, object]) -> None:
        """Print a figure, and keep it."""
        row = json.dumps({"key": key, "figure": name, **fields})
        print(row, flush=True)
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(row + "\n")

    def figure(self, key: str, name: str, rows: Rows, **more: object) -> None:
        """Tell medians, and the ratios of crewlog to each other contestant."""
        names = list(rows[0])
        ratios = {n: statistics.median(r["crewlog"] / r[n] for r in rows) for n in names[1:]}
        self.tell(key, name, {
            "median": {n: round(statistics.median(r[n] for r in rows), 3) for n in names},
            "crewlog_to": {n: round(ratio, 3) for n, ratio in ratios.items()},
            "slices": len(rows), **more,
        })  # fmt: skip


def _contestants() -> dict[str, Callable[[Path, int], Contestant]]:
    return {**append.CONTESTANTS, **peers.installed()}


def _p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[-1] * 1e3 if len(times) > 1 else 0.0


def _in_turn(
    run: Run, key: str, figure: str, contestants: Mapping[str, Callable[[Path, int], Contestant]]
) -> None:
    rows: Rows = []
    tails: dict[str, list[float]] = {}
    for _ in range(run.rounds):
        row: dict[str, float] = {}
        for name, make in contestants.items():
            took = append.alone(make, run.home, run.seconds)
            row[name] = len(took) / sum(took)
            tails.setdefault(name, []).append(_p99(took))
        rows.append(row)
    p99 = {name: round(statistics.median(values), 3) for name, values in tails.items()}
    run.figure(key, figure, rows, p99_ms=p99)


def one_process(run: Run) -> None:
    """P1: durable changes a second by one process, one at a time; what one costs."""
    _in_turn(run, "P1", "changes/s, one process", _contestants())
    _in_turn(run, "P1a", "workers registered/s, one process", append.REGISTERING)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.exists() else run.home) as home:
        run.tell("P1c", "one change, without a disk", append.cost(Path(home), run.few(2000, 20)))
    many = run.few(100_000, 1000)
    rows = opening.ages(run.home, seconds=run.seconds, rounds=run.rounds, many=many)
    run.figure("P1b", "changes/s by size and age, one process", rows)


def many_processes(run: Run) -> None:
    """P2: durable changes a second by 8 and by 32 processes at once."""
    for writers in (8, run.few(32, 9)):
        rows: Rows = []
        tails: dict[str, list[float]] = {}
        shares: list[float] = []
        slow = ("predecessor, 1,000", "predecessor, 10,000")
        entrants = {n: m for n, m in _contestants().items() if not n.startswith(slow)}
        for _ in range(run.rounds):
            row: dict[str, float] = {}
            for name, make in entrants.items():
                times = append.crowd(make, run.home, run.seconds, writers)
                every = [took for writer in times for took in writer]
                row[name] = max(1, len(every)) / run.seconds
                tails.setdefault(name, []).append(_p99(every))
                if name == "crewlog":
                    counts = [len(writer) for writer in times]
                    shares.append(min(counts) / max(1, statistics.mean(counts)))
            rows.append(row)
        p99 = {name: round(statistics.median(values), 3) for name, values in tails.items()}
        key = "P2" if writers == 8 else "P2b"
        run.figure(key, f"changes/s, {writers} processes", rows, p99_ms=p99,
                   slowest_writer_to_mean=round(statistics.median(shares), 2),
                   in_its_worst_slice=round(min(shares), 2))  # fmt: skip


def shared(run: Run) -> None:
    """P3 and P4: threads, tasks, batches."""
    rows = sharing.sharing(run.home, seconds=run.seconds, rounds=run.rounds)
    run.figure("P3", "changes/s, 1 thread against 64", rows)
    run.figure("P4", "events/s in batches of 1,000", sharing.batches(run.home, rounds=run.rounds))


def opened(run: Run) -> None:
    """P5: open and state."""
    workers, events = run.few(10_000, 100), run.few(100_000, 500)
    rows, rate = opening.opening(run.home, workers=workers, events=events, rounds=run.rounds)
    name = f"open, {workers:,} workers and a tail of {events:,} events, ms"
    run.figure("P5", name, rows, tail_events_per_s=round(rate))


def asked_of_history(run: Run) -> None:
    """P6 and P11: one worker's history, sizes."""
    events = run.few(1_000_000, 20_000)
    figures = history.run(run.home, events=events, rounds=min(run.rounds, 5))
    for key, (name, rows) in zip(("P6", "P6b", "P11"), figures, strict=True):
        run.figure(key, name, rows)


def compacted(run: Run) -> None:
    """P7: a compaction beside a writer."""
    events = run.few(1_000_000, 5000)
    run.tell("P7", f"compaction of {events:,} events", opening.compaction(run.home, events=events))


def watched(run: Run) -> None:
    """P8: how soon a change is seen."""
    figures = watch.run(run.home, count=run.few(150, 5), rounds=min(run.rounds, 5),
                      seconds=run.soak, smoke=run.smoke)  # fmt: skip
    for key, (name, row) in zip(("P8", "P8b", "P8c", "P8d", "P8e"), figures, strict=True):
        run.tell(key, name, row)


def judged(run: Run) -> None:
    """P9: liveness, collection, starting."""
    if run.smoke:
        liveness.PROCESSES, liveness.WORKERS, liveness.DEAD = 20, 40, 20
    rounds = min(run.rounds, 5)
    run.figure("P9", f"{liveness.WORKERS:,} workers judged, ms",
               liveness.judgement(run.home, rounds=rounds))  # fmt: skip
    run.figure("P9b", "append lock held while 1,000 dead are collected, ms",
               liveness.lock_time(run.home, rounds=rounds))  # fmt: skip
    run.figure("P9c", "spawn until the program begins, ms",
               liveness.spawning(run.home, rounds=rounds))  # fmt: skip


def started(run: Run) -> None:
    """P10: commands as processes."""
    run.figure("P10", "a command from start to end, ms",
               start.commands(run.home, rounds=run.few(15, 1)))  # fmt: skip


def clustered(run: Run) -> None:
    """P12: a registry on one etcd server; left out where there is none."""
    if cluster.installed():
        cluster.run(run.home, run.figure, run.tell, seconds=run.seconds, rounds=run.rounds,
                    smoke=run.smoke)  # fmt: skip


FIGURES = {
    "P1": one_process, "P2": many_processes, "P3": shared, "P5": opened, "P6": asked_of_history,
    "P7": compacted, "P8": watched, "P9": judged, "P10": started,
    "P12": clustered,
}  # fmt: skip


def main() -> None:
    """Run the workloads that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(FIGURES), help="workloads, such as P1,P2")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a slice")
    parser.add_argument("--rounds", type=int, default=7, help="slices of each contestant")
    parser.add_argument("--dir", type=Path, default=None, help="where to write; a real disk")
    parser.add_argument("--soak", type=float, default=10.0, help="seconds of sustained load in P8")
    parser.add_argument("--out", type=Path, default=None, help="keep the figures here, too")
    parser.add_argument("--smoke", action="store_true", help="every figure, from next to nothing")
    asked = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="crewlog-bench-", dir=asked.dir or Path.cwd()))
    if asked.out is not None:
        asked.out.write_text("")
    run = Run(asked, home)
    try:
        release = platform.release().split("-")[0]
        run.tell("about", "what this was measured on", {
            "system": f"{platform.system()} {release}", "processors": os.cpu_count(),
            "python": platform.python_version(), "peers": sorted(peers.installed()),
        })  # fmt: skip
        for name in asked.only.split(","):
            part = home / name
            part.mkdir()
            run.home = part
            with (
                peers.redis_server(part)
                if "redis" in peers.installed()
                else contextlib.nullcontext()
            ):
                FIGURES[name](run)
            shutil.rmtree(part)
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
