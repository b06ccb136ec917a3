"""A fork may come between any two steps of another thread; the child goes on all the same."""

import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from types import FrameType
from typing import Final

import pytest

import crewlog
from crewlog import Registry, layout
from crewlog_compactor.verify import verify
from procs import forked, joined

# What a thread that appends, seals and reads goes through, but for what only computes.
ROOMS: Final = {
    str(Path(crewlog.__file__).with_name(f"{name}.py")): name
    for name in (
        *("commit", "current", "directory", "disk", "lock", "log", "reader", "reading"),
        *("redo", "segments", "states", "sync", "tail", "writing"),
    )
}
FORKS_AT_ONCE: Final = 12  # they contend for the locks
QUIET_ROUNDS: Final = 4  # after so many that met no new line, nearly all were met
Place = tuple[str, int]


class Stops:
    """A trace function: its thread stops at each line that no thread has stopped at before."""

    def __init__(self, at: "Queue[Place | None]") -> None:
        """Tell `at` of each stop, and go on once released; None is for the end."""
        self.at = at
        self.on = threading.Semaphore(0)
        self.seen: set[Place] = set()
        self.left = 0  # how many more stops this round may have

    def __call__(self, frame: FrameType, event: str, _: object) -> "Stops | None":
        """Take one step; see sys.settrace."""
        file = frame.f_code.co_filename
        if file not in ROOMS:
            return None
        place = ROOMS[file], frame.f_lineno
        if event == "line" and self.left and place not in self.seen:
            self.seen.add(place)
            self.left -= 1
            self.at.put(place)
            self.on.acquire()
        return self

    def through(self, work: Callable[[], None]) -> None:
        """Do the work, with stops."""
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(None)
            self.at.put(None)


def test_child_forked_at_any_line_of_another_thread_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was half done in the parent leaves the child neither a lock nor a closed descriptor."""
    monkeypatch.setattr(layout, "SEGMENT_BYTES_MAX", 2000)
    monkeypatch.setattr(sys, "unraisablehook", _die)  # what fails in the hooks of the fork itself
    stops = Stops(Queue())
    quiet = 0
    with crewlog.open(place) as reg:
        reg.register("a")
        while quiet < QUIET_ROUNDS:
            before, stops.left = len(stops.seen), FORKS_AT_ONCE
            over, end = os.pipe()
            thread = threading.Thread(target=stops.through, args=(lambda: _work(reg, place),))
            thread.start()
            children = []
            while (at := stops.at.get()) is not None:
                sid = f"c{len(stops.seen)}"
                children.append(forked(_child(reg, sid, at, over=(over, end))))
                stops.on.release()
            thread.join()
            os.close(end)
            os.close(over)
            joined(*children)
            quiet = quiet + 1 if len(stops.seen) == before else 0
        assert len(stops.seen) > 600
        expected = {"a", *(f"c{n + 1}" for n in range(len(stops.seen)))}
        assert {worker.sid for worker in reg.workers()} == expected
    assert {name for name, _ in stops.seen} == set(ROOMS.values())
    assert verify(place).ok


def _work(reg: Registry, place: Path) -> None:
    """Append, seal, read; every file is another one than before, as after a restore."""
    for number in range(4):
        for name in (layout.APPEND_STATE, "head/durable", "locks/append", layout.REDO):
            shutil.copy2(place / name, place / "other")
            (place / "other").replace(place / name)
        reg.update("a", meta={"fill": str(number) * 300})
        reg.get("a")


def _child(reg: Registry, sid: str, at: Place, *, over: tuple[int, int]) -> Callable[[], None]:
    def child() -> None:
        sys.stderr.write(f"forked at {at}\n")  # shown if it fails
        os.close(over[1])
        os.read(over[0], 1)  # until the parent's thread is through, and holds no lock
        reg.register(sid)
        reg.update("a", meta={"fill": sid})
        assert reg.get(sid) is not None

    return child


def _die(failure: "sys.UnraisableHookArgs") -> None:
    sys.stderr.write(f"a hook failed: {failure.exc_value!r}\n")
    os._exit(1)
