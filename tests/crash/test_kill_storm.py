"""A writer, sync leader or compactor killed with -9 at any moment loses nothing acknowledged."""

import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import LockBusy
from crewlog.local import layout
from crewlog.registry import Registry
from crewlog_compactor import compact, verify
from procs import forked, slay, until
from stores import opened

pytestmark = pytest.mark.long

ACK = struct.Struct("<QQQ")  # writer, number, rev
Write = Callable[[Registry, int, int, int], None]


def honest(reg: Registry, writer: int, number: int, acks: int) -> None:
    """Change, then acknowledge."""
    worker = reg.update(f"w-{writer}", meta={"number": number})
    os.write(acks, ACK.pack(writer, number, worker.rev))


def hasty(reg: Registry, writer: int, number: int, acks: int) -> None:
    """Acknowledge, then change: the mistake that the storm must find."""
    worker = reg.get(f"w-{writer}")
    assert worker is not None
    os.write(acks, ACK.pack(writer, number, worker.rev + 1))
    reg.update(f"w-{writer}", meta={"number": number})


def write_on(place: Path, writer: int, acks: int, write: Write) -> None:
    with crewlog.open(place) as reg:
        reg.register(f"w-{writer}")
        number = 0
        while True:
            number += 1
            write(reg, writer, number, acks)


def compact_on(place: Path) -> None:
    with crewlog.open(place) as reg:
        while True:
            try:
                compact(reg, gc=False)
            except LockBusy:
                time.sleep(0.001)


def storm(
    place: Path, *, kills: int, seed: int, write: Write = honest, writers: int = 4
) -> dict[tuple[int, int], int]:
    """Kill writers, now and then a compactor, at random moments; return the acknowledged."""
    dice = random.Random(seed)
    with crewlog.open(place) as reg:
        reg.register("first")
    with (place.parent / "acks").open("ab", buffering=0) as acks:
        count = 0

        def start() -> int:
            nonlocal count
            count += 1
            number = count
            return forked(lambda: write_on(place, number, acks.fileno(), write))

        running = [start() for _ in range(writers)]
        compactor = forked(lambda: compact_on(place))
        for kill in range(kills):
            time.sleep(dice.expovariate(1 / 0.012))
            until(lambda n=kill: acks.tell() >= 4 * n * ACK.size)  # type: ignore[misc]
            if kill % 5 == 4:
                slay(compactor)
                compactor = forked(lambda: compact_on(place))
            else:
                index = dice.randrange(writers)
                slay(running[index])
                running[index] = start()
        for pid in (*running, compactor):
            slay(pid)
    data = (place.parent / "acks").read_bytes()
    return {(w, n): rev for w, n, rev in ACK.iter_unpack(data[: len(data) // 24 * 24])}


def lost(place: Path, acknowledged: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
    """Return every acknowledged change that the history does not hold at its seq."""
    with crewlog.open(place) as reg:
        held = {
            event.seq: (event.sid, event.data["meta"])
            for event in reg.history(types=["worker.updated"])
        }
    return [
        (writer, number)
        for (writer, number), rev in acknowledged.items()
        if held.get(rev) != (f"w-{writer}", {"number": number})
    ]


@pytest.mark.limits(segment_bytes=32 * 1024)
def test_killed_writers_and_compactors_lose_nothing_acknowledged(place: Path) -> None:
    """300 kills, segments of 32 KiB: everything acknowledged is there, and verify finds nothing."""
    acknowledged = storm(place, kills=300, seed=1)
    assert len(acknowledged) > 1000
    with opened(place) as reg:
        began = time.monotonic()
        reg.register("after")  # whatever was left behind is mended here
        assert time.monotonic() - began < 3, "no lock is waited for until it is given up"
    assert lost(place, acknowledged) == []
    report = verify(place)
    assert report.findings == ()
    archived = [path.name for path in (place / layout.ARCHIVE).iterdir()]
    merged = any(map(layout.merged_seqs_of, archived))
    assert merged or len(archived) > 3, "rotation and archive took part"


def test_storm_catches_an_acknowledgement_before_the_write(place: Path) -> None:
    """Negative control: the storm and its check find the mistake they are there for."""
    for seed in range(10):
        if lost(place, storm(place, kills=20, seed=seed, write=hasty)):
            return
    pytest.fail("the storm did not notice that writers acknowledged too early")


@pytest.mark.limits(segment_bytes=256 * 1024)
@pytest.mark.soak
def test_ten_thousand_kills_lose_nothing(place: Path) -> None:
    """The long form, by hand: pytest -m soak tests/crash/test_kill_storm.py."""
    acknowledged = storm(place, kills=10_000, seed=time.time_ns())
    assert lost(place, acknowledged) == []
    assert verify(place).ok
