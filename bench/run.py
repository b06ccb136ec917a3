"""Measure crewlog beside the floor and its peers, interleaved in short slices of one run.

    python bench/run.py [--seconds 0.5] [--rounds 7] [--changes 150] [--dir PLACE]

Prints one JSON object a figure: the median of each contestant over the rounds, and the median of
the ratios that each round gives. An absolute figure says little; the ratio is the figure.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import append
import liveness
import watch


def figure(name: str, rounds: list[dict[str, float]], **more: object) -> None:
    """Print one figure: medians, and the ratios of crewlog to each other contestant."""
    names = rounds[0].keys()
    found = {
        "figure": name,
        "median": {n: round(statistics.median(r[n] for r in rounds), 1) for n in names},
        "crewlog_to": {
            n: round(statistics.median(r["crewlog"] / r[n] for r in rounds), 2)
            for n in names
            if n != "crewlog"
        },
        **more,
    }
    print(json.dumps(found), flush=True)


def one_process(home: Path, *, seconds: float, rounds: int) -> None:
    """P1: durable changes a second by one process, one at a time."""
    rates: list[dict[str, float]] = []
    p99: dict[str, list[float]] = {}
    for _ in range(rounds):
        found: dict[str, float] = {}
        for name, make in append.CONTESTANTS.items():
            took = append.alone(make, home, seconds)
            found[name] = len(took) / sum(took)
            p99.setdefault(name, []).append(statistics.quantiles(took, n=100)[-1] * 1e3)
        rates.append(found)
    tails = {name: round(statistics.median(values), 3) for name, values in p99.items()}
    figure("P1 changes/s, 1 process", rates, p99_ms=tails, slices=rounds)


def many_processes(home: Path, *, seconds: float, rounds: int, writers: int) -> None:
    """P2: durable changes a second by several processes at once."""
    rates: list[dict[str, float]] = []
    p99: dict[str, list[float]] = {}
    least: list[float] = []
    for _ in range(rounds):
        found: dict[str, float] = {}
        for name, make in append.CONTESTANTS.items():
            times = append.crowd(make, home, seconds, writers)
            every = [took for writer in times for took in writer]
            found[name] = len(every) / seconds
            p99.setdefault(name, []).append(statistics.quantiles(every, n=100)[-1] * 1e3)
            if name == "crewlog":
                counts = [len(writer) for writer in times]
                least.append(min(counts) / statistics.mean(counts))
        rates.append(found)
    tails = {name: round(statistics.median(values), 3) for name, values in p99.items()}
    figure(
        f"P2 changes/s, {writers} processes", rates, p99_ms=tails,
        slowest_writer_to_mean=round(min(least), 2), slices=rounds,
    )  # fmt: skip


def main() -> None:
    """Run every workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a slice")
    parser.add_argument("--rounds", type=int, default=7, help="slices of each contestant")
    parser.add_argument("--dir", type=Path, default=None, help="where to write; a real disk")
    parser.add_argument("--changes", type=int, default=150, help="changes a slice of P8")
    parser.add_argument("--soak", type=float, default=10.0, help="seconds of sustained load in P8")
    asked = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="crewlog-bench-", dir=asked.dir or Path.cwd()))
    try:
        one_process(home, seconds=asked.seconds, rounds=asked.rounds)
        many_processes(home, seconds=asked.seconds, rounds=asked.rounds, writers=8)
        figure("P9 10,000 workers judged, ms", liveness.judgement(home, rounds=asked.rounds))
        figure("P9 append lock held while 1,000 dead are collected, ms",
               liveness.lock_time(home, rounds=min(asked.rounds, 5)))  # fmt: skip
        figure("spawn until the program begins, ms", liveness.spawning(home, rounds=asked.rounds))
        watch.run(home, count=asked.changes, rounds=min(asked.rounds, 5), seconds=asked.soak)
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
