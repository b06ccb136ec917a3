"""A signal handler that raises where a lock, a file or a turn changes hands: nobody is left."""

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest

from crewlog.errors import StorageFull
from crewlog.local.heads import AppendState
from crewlog.queue import Request
from crewlog.registry import Registry
from faults import active_segment
from procs import files, until
from stores import opened


class InterruptError(BaseException):
    """What the handler raises."""


Spot = Callable[[FrameType, str, object], bool]


def _interrupted(spot: Spot, work: Callable[[], object]) -> None:
    """Do some work, and raise once it comes to a spot."""
    met = False

    def look(frame: FrameType, event: str, what: object) -> None:
        nonlocal met
        if not met and spot(frame, event, what):
            met = True
            raise InterruptError

    sys.setprofile(look)
    try:
        with suppress(InterruptError):
            work()
    finally:
        sys.setprofile(None)
    assert met


def _enters(name: str, *, within: str, room: str = "") -> Spot:
    """At the entry of a function of Python that another one, of that room, calls."""

    def spot(frame: FrameType, event: str, _: object) -> bool:
        caller = frame.f_back
        return (
            event == "call"
            and frame.f_code.co_name == name
            and caller is not None
            and caller.f_code.co_name == within
            and caller.f_code.co_filename.endswith(room)
        )

    return spot


def _returns(name: str, *, below: str) -> Spot:
    """As a function of C returns, somewhere below a function of Python."""

    def spot(frame: FrameType | None, event: str, what: object) -> bool:
        if event != "c_return" or getattr(what, "__name__", "") != name:
            return False
        while frame is not None and frame.f_code.co_name != below:
            frame = frame.f_back
        return frame is not None

    return spot


def test_lock_file_that_was_opened_can_be_given_back(place: Path) -> None:
    """At the very first change: this process and every other goes on."""
    with opened(place, lock_timeout_s=1) as other, opened(place, lock_timeout_s=1) as reg:
        other.register("a")
        _interrupted(
            _enters("own", within="_open", room="lock.py"), lambda: reg.update("a", meta={"n": 1})
        )
        for number, one in enumerate((reg, other, reg)):
            assert one.update("a", meta={"n": number}).meta["n"] == number


def test_segment_that_was_closed_is_opened_anew(place: Path) -> None:
    """Another has rotated, and the handler comes as the file before is closed."""
    with opened(place) as other, opened(place) as reg:
        other.register("a")
        reg.update("a", meta={"n": 0})
        files(other).rotate()
        _interrupted(
            _returns("close", below="_close_active"), lambda: reg.update("a", meta={"n": 1})
        )
        for number in range(3):
            assert reg.update("a", meta={"n": number}).meta["n"] == number


def _replace(segment: Path) -> None:
    """Put a copy in its place, as a tool does that copies."""
    copy = segment.with_name("copy")
    copy.write_bytes(segment.read_bytes())
    copy.chmod(0o600)
    copy.rename(segment)


def test_segment_that_a_reader_closed_is_opened_anew(place: Path) -> None:
    """The file was replaced, and the handler comes as the reader closes the one before."""
    with opened(place) as other, opened(place) as reg:
        other.register("a")
        tail = files(reg).tail(0)
        seen = len(list(tail.read(0)))
        _replace(active_segment(place))
        other.update("a", meta={"n": 1})
        _interrupted(_returns("close", below="_open"), lambda: list(tail.read(0)))
        assert len(list(tail.read(0))) > 0
        assert tail.seq == reg.last_seq > seen
        tail.close()


@pytest.mark.limits(redo_bytes=4096)
def test_segment_that_a_sync_leader_closed_is_opened_anew(place: Path) -> None:
    """The same of a leader: lines that the redo cannot hold are synced in the segment."""
    with opened(place) as reg:
        reg.register("a")
        reg.update("a", meta={"pad": "x" * 6000})
        _replace(active_segment(place))
        _interrupted(
            _returns("close", below="_close_segment"),
            lambda: reg.update("a", meta={"pad": "y" * 6000}),
        )
        for number in range(3):
            pad = str(number) * 6000
            assert reg.update("a", meta={"pad": pad}).meta["pad"] == pad


def test_session_that_came_to_rest_opens_its_store_anew(reg: Registry) -> None:
    """The handler comes as its store is closed, and knows that it is."""
    reg.register("a")
    _interrupted(_returns("close", below="_close_files"), reg._session.rest)
    assert reg.update("a", meta={"n": 1}).meta["n"] == 1


@pytest.mark.parametrize(
    "spot",
    [
        _enters("advance", within="_hand_on"),
        _returns("popleft", below="_hand_on"),
        _returns("__exit__", below="_hand_on"),
    ],
    ids=["advance", "popleft", "exit"],
)
def test_next_leader_hears_of_it(reg: Registry, spot: Spot) -> None:
    """The leader is interrupted as it hands on: those who wait lead, and are served."""
    reg.register("a")
    queue, appender = files(reg).commits, files(reg)._appender
    enters, goes = threading.Event(), threading.Event()

    class Slow:
        """Lets others come while the first one writes."""

        make_durable = staticmethod(appender.make_durable)

        @staticmethod
        def write(group: Sequence[Request]) -> tuple[int, int, int]:
            enters.set()
            assert goes.wait(10)
            return appender.write(group)

    queue._phases = Slow()
    riders = [
        threading.Thread(target=reg.update, args=("a",), kwargs={"meta": {f"k{n}": 1}})
        for n in range(3)
    ]

    def feed() -> None:
        assert enters.wait(10)
        for rider in riders:
            rider.start()
        until(lambda: len(queue._queue) == len(riders))
        goes.set()

    feeder = threading.Thread(target=feed)
    feeder.start()
    _interrupted(spot, lambda: reg.update("a", meta={"n": 1}))
    for thread in (feeder, *riders):
        thread.join(10)
        assert not thread.is_alive()
    worker = reg.get("a")
    assert worker is not None
    assert worker.meta.keys() >= {"k0", "k1", "k2"}


@pytest.mark.parametrize(
    "spot",
    [
        _enters("_put_back", within="lead"),
        _returns("extendleft", below="_put_back"),
        _enters("_share", within="make_durable"),
    ],
    ids=["before", "after", "later"],
)
def test_requests_that_had_no_room_are_put_back_once(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, spot: Spot
) -> None:
    """The leader is interrupted as it does so, or later: each is still served, and once."""
    reg.register("a")
    queue, appender = files(reg).commits, files(reg)._appender
    real = appender.write

    def one_at_a_time(group: Sequence[Request]) -> tuple[int, int, int]:
        _, seq, generation = real(group[:1])
        return 1, seq, generation

    class Narrow:
        """Takes one of a group."""

        make_durable = staticmethod(appender.make_durable)
        write = staticmethod(one_at_a_time)

    own, *riders = _requests(reg, 3)
    monkeypatch.setattr(queue, "_phases", Narrow())
    queue._leader = own
    queue._queue.extend(riders)
    _interrupted(spot, lambda: queue.lead(own))
    assert [rider.phase for rider in riders] == ["lead", "waiting"]
    assert list(queue._queue) == riders[1:]
    queue.lead(riders[0])
    assert riders[0].result is not None


def _requests(reg: Registry, count: int) -> list[Request]:
    """Ask for so many changes of one worker."""
    author = reg._session.author()
    parts = [author.draft("worker.updated", "a", {"meta": {f"k{n}": 1}}) for n in range(count)]
    return [Request(lambda _, part=part: (part,), ("a",)) for part in parts]  # type: ignore[misc]


def test_whoever_rode_along_hears_what_became_of_it(reg: Registry) -> None:
    """The leader is interrupted as it begins to tell them."""
    reg.register("a")
    queue = files(reg).commits
    own, *riders = _requests(reg, 3)
    queue._leader = own
    queue._queue.extend(riders)
    _interrupted(_enters("_finish", within="lead"), lambda: queue.lead(own))
    assert [rider.phase for rider in riders] == ["done", "done"]
    assert [rider.result is not None for rider in riders] == [True, True]


def test_failure_is_told_to_all_it_concerns(reg: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader is interrupted as it begins to: nobody takes it for done."""
    reg.register("a")
    queue, appender = files(reg).commits, files(reg)._appender

    def fails(*_: object, **__: object) -> AppendState:
        raise StorageFull("/x", why="no room")

    monkeypatch.setattr(appender, "_put", fails)
    own, *riders = _requests(reg, 3)
    queue._leader = own
    queue._queue.extend(riders)
    _interrupted(_enters("_fail", within="lead"), lambda: queue.lead(own))
    assert [rider.phase for rider in riders] == ["done", "done"]
    assert all(isinstance(rider.error, StorageFull) for rider in riders)
