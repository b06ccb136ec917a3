"""A program on gevent starts workers, hears of their ends, and its loop goes on."""

import subprocess
import sys
from pathlib import Path

import pytest

_HOST = """
from gevent import monkey
monkey.patch_all()
import time
import gevent
import crewlog, sys

pauses = []
def tick():
    last = time.perf_counter()
    while True:
        gevent.sleep(0.001)
        now = time.perf_counter()
        pauses.append(now - last)
        last = now

def longest(act):
    pauses.clear()
    act()
    gevent.sleep(0.01)
    return max(pauses)

with crewlog.open(sys.argv[1]) as reg:
    reg.register("first")  # the store is made, modules are loaded
    observer = reg.observe_all()
    gevent.spawn(tick)
    gevent.sleep(0.01)

    def ends():
        while not all(reg.get(sid).final for sid in ("a", "b")):
            gevent.sleep(0.01)

    def block():
        import ctypes
        ctypes.CDLL(None).usleep(400_000)  # what no patch of Python makes give way

    starts = longest(lambda: [reg.spawn(sid, ["sh", "-c", "sleep 0.5; exit 3"]) for sid in "ab"])
    told = longest(ends)
    assert [reg.get(sid).exit.code for sid in "ab"] == [3, 3]
    observer.close()
    assert longest(block) > 0.3, "the measure measures nothing"
    print(starts, told)
"""


@pytest.mark.alone
def test_loop_goes_on_while_workers_start_and_end(place: Path) -> None:
    """A pause of one sync or so, not of a worker's life; 0.2 s for a slow disk."""
    pytest.importorskip("gevent", reason="needs gevent: pip install '.[recipes]'")
    done = subprocess.run(
        [sys.executable, "-c", _HOST, str(place)], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    starts, times = map(float, done.stdout.split())
    assert starts < 0.2
    assert times < 0.2
