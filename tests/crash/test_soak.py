"""An hour of everything at once: writers that are killed, watchers, a compaction every second.

By hand: `SOAK_SECONDS=3600 python -m pytest -m soak tests/crash/test_soak.py`. Four writers count
up and are killed and replaced; four watchers check every seq and every count, keep a running hash
of every line, and note it now and then with their memory; history is dropped all the time.
"""

import hashlib
import json
import os
import random
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

import crewlog
from crewlog.errors import LockBusy
from crewlog.model.events import EventType
from crewlog_compactor import compact, verify
from procs import forked, joined, slay
from stores import opened

SECONDS = float(os.environ.get("SOAK_SECONDS", "3600"))
HISTORY_BYTES = 32 * 1024 * 1024
EVERY = 1000
TYPES: list[EventType] = ["_segment", "_seal", "_snapshot", "_recovered", "_archive_dropped",
         "worker.registered", "worker.updated", "worker.released"]  # fmt: skip
PAUSE_S = 0.001


def _write(place: Path, sid: str, acks: Path) -> None:
    """Count up for ever, and note each count once it is acknowledged."""
    with crewlog.open(place) as reg, acks.open("ab", buffering=0) as file:
        reg.register(sid)
        for number in range(1 << 60):
            reg.update(sid, meta={"n": number})
            file.write(b"%d\n" % number)
            time.sleep(PAUSE_S)


def _compact(place: Path, until_s: float) -> None:
    with crewlog.open(place) as reg:
        while time.monotonic() < until_s:
            try:
                compact(reg, gc=False, keep_history=HISTORY_BYTES)
            except LockBusy:
                continue
            time.sleep(1)


def _watch(place: Path, out: Path) -> None:
    """Check order and counts, and note the running hash and our memory."""
    counts: dict[str, int] = {}
    last, digest = 1, hashlib.sha256()
    me = psutil.Process()
    with (
        crewlog.open(place) as reg,
        reg.watch(after=1, types=TYPES) as items,
        out.open("w") as file,
    ):
        for item in items:
            if item.kind == "synced":
                continue
            assert item.kind == "change", f"a reset: {item}"
            event = item.event
            assert event.seq == last + 1, f"{last} is followed by {event.seq}"
            last = event.seq
            digest.update(event.raw)
            if event.type == "worker.updated":
                meta = event.data["meta"]
                assert isinstance(meta, dict)
                assert meta["n"] == counts.get(event.sid, -1) + 1, f"{event.sid}: {meta}"
                counts[event.sid] = int(str(meta["n"]))
            if last % EVERY == 0 or event.sid == "last":
                row = {"seq": last, "hash": digest.hexdigest(), "rss": me.memory_info().rss}
                file.write(json.dumps(row) + "\n")
            if event.sid == "last":
                file.write(json.dumps({"counts": counts}) + "\n")
                return


@pytest.mark.limits(segment_bytes=256 * 1024)
@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_soak_has_no_gaps_duplicates_or_ghosts_and_flat_memory(place: Path) -> None:
    """Every watcher sees the same history, all that was acknowledged, and grows by nothing."""
    with opened(place) as reg:
        reg.register("first")
        reg.remove("first", reason="only to begin")
    outs = [place.parent / f"watcher-{n}" for n in range(4)]
    watchers = [forked(partial(_watch, place, out)) for out in outs]
    deadline = time.monotonic() + SECONDS
    compactor = forked(partial(_compact, place, deadline))
    dice, count, kills = random.Random(5), 0, 0
    running: dict[int, str] = {}
    while time.monotonic() < deadline:
        while len(running) < 4:
            sid = f"w-{count}"
            running[forked(partial(_write, place, sid, place.parent / f"acks-{sid}"))] = sid
            count += 1
        time.sleep(dice.uniform(0.2, 1.0))
        victim = dice.choice(list(running))
        slay(victim)
        del running[victim]
        kills += 1
    for pid in running:
        slay(pid)
    joined(compactor)
    with opened(place) as reg:
        reg.register("last")
    joined(*watchers)
    _judge(place, outs)
    assert kills > SECONDS / 2
    with opened(place) as reg:
        compact(reg, gc=False)
        with opened(place) as fresh, reg.mirror() as now:
            assert now.state.workers == fresh.state().workers
    assert verify(place).findings == ()


def _judge(place: Path, outs: list[Path]) -> None:
    watched = [[json.loads(row) for row in out.read_text().splitlines()] for out in outs]
    hashes = [{row["seq"]: row["hash"] for row in rows[:-1]} for rows in watched]
    assert all(other == hashes[0] for other in hashes), "two watchers saw two histories"
    counts = watched[0][-1]["counts"]
    for path in place.parent.glob("acks-*"):
        acknowledged = path.read_bytes().splitlines()
        if acknowledged:
            assert counts[path.name.removeprefix("acks-")] >= int(acknowledged[-1])
    for rows in watched:
        memory = [row["rss"] for row in rows[:-1]]
        early, late = memory[len(memory) // 5], memory[-1]
        assert late - early < 16 * 1024 * 1024, f"grown from {early} to {late}"
