"""A fork may come between any two steps of another thread; the child goes on all the same."""

import functools
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
from crewlog import Registry
from crewlog.local import layout
from crewlog_compactor.verify import verify
from procs import forked, joined
from stores import opened

# What a thread goes through that opens or creates, and one that appends, seals and reads; but for
# what only computes.
OPENING: Final = (
    *("local/create", "local/disk", "local/layout", "local/place", "registry"),
    "session",
)
WORKING: Final = (
    "queue",
    *("local/append", "local/disk", "local/heads", "local/layout", "local/lock", "local/log"),
    *("local/redo", "local/segments", "local/sync", "local/view"),
)
FORKS_AT_ONCE: Final = 12  # they contend for the locks
QUIET_ROUNDS: Final = 4  # after so many that met no new line, nearly all were met
Spot = tuple[str, int]


class Stops:
    """A trace function: its thread stops at each line that no thread has stopped at before."""

    def __init__(self, *rooms: str) -> None:
        """Watch over these modules."""
        home = Path(crewlog.__file__).parent
        self.rooms = {str(home / f"{name}.py"): name for name in rooms}
        self.seen: set[Spot] = set()
        self._at: Queue[Spot | None] = Queue()  # where it stopped; None: it is through
        self._on = threading.Semaphore(0)
        self._left = 0  # how many more stops this round may have

    def __call__(self, frame: FrameType, event: str, _: object) -> "Stops | None":
        """Take one step; see sys.settrace."""
        room = self.rooms.get(frame.f_code.co_filename)
        if room is None:
            return None
        place = room, frame.f_lineno
        if event == "line" and self._left and place not in self.seen:
            self.seen.add(place)
            self._left -= 1
            self._at.put(place)
            self._on.acquire()
        return self

    def _through(self, work: Callable[[], object]) -> None:
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(None)
            self._at.put(None)

    def round(self, work: Callable[[], object], child: Callable[[str], object]) -> set[str]:
        """Let a thread work, and fork at its stops; each child is told its sid once that is over.

        Return the sids.
        """
        self._left = FORKS_AT_ONCE
        over, end = os.pipe()
        thread = threading.Thread(target=self._through, args=(work,))
        thread.start()
        children = {}
        while (at := self._at.get()) is not None:
            sid = f"c{len(self.seen)}"

            def forked_here(at: Spot = at, sid: str = sid) -> None:
                sys.stderr.write(f"forked at {at}\n")  # shown if it fails
                os.close(end)
                os.read(over, 1)  # until the thread is through, and holds no lock
                child(sid)

            children[sid] = forked(forked_here)
            self._on.release()
        thread.join()
        os.close(end)
        os.close(over)
        joined(*children.values())
        return set(children)


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a child end where a hook of the fork itself fails."""

    def end(failure: "sys.UnraisableHookArgs") -> None:
        sys.stderr.write(f"a hook failed: {failure.exc_value!r}\n")
        os._exit(1)

    monkeypatch.setattr(sys, "unraisablehook", end)


@pytest.mark.long
@pytest.mark.limits(segment_bytes=2000)
def test_child_forked_at_any_line_of_another_thread_goes_on(place: Path) -> None:
    """What was half done in the parent leaves the child neither a lock nor a closed descriptor."""
    stops, sids, quiet = Stops(*WORKING), {"a"}, 0
    with opened(place) as reg:

        def child(sid: str) -> None:
            reg.register(sid)
            reg.update("a", meta={"fill": sid})
            assert reg.get(sid) is not None

        reg.register("a")
        while quiet < QUIET_ROUNDS:
            new = stops.round(lambda: _work(reg, place), child)
            quiet = 0 if new else quiet + 1
            sids |= new
        assert {worker.sid for worker in reg.workers()} == sids
    assert len(sids) > 600
    assert {name for name, _ in stops.seen} == set(WORKING)
    assert verify(place).ok


def _work(reg: Registry, place: Path) -> None:
    """Append, seal, read; every file is another one than before, as after a restore."""
    for number in range(4):
        for name in (layout.APPEND_STATE, "head/durable", "locks/append", layout.REDO):
            shutil.copy2(place / name, place / "other")
            (place / "other").replace(place / name)
        reg.update("a", meta={"fill": str(number) * 300})
        reg.get("a")


@pytest.mark.long
def test_child_forked_while_another_thread_opens_goes_on(place: Path) -> None:
    """The store is there only in part, and whoever opens it holds a mutex."""
    stops = Stops(*OPENING)
    for number in range(1000):
        where = place / str(number)
        with crewlog.open(where) as reg:
            sids = stops.round(functools.partial(reg.register, "a"), reg.register)
            assert {worker.sid for worker in reg.workers()} == {"a", *sids}
        assert verify(where).ok
        if not sids:
            break
    assert len(stops.seen) > 150
    assert {name for name, _ in stops.seen} == set(OPENING)
