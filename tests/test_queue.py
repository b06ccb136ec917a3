"""The queue of an append: who leads, who rides along, and that nobody is left behind."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from crewlog import queue
from crewlog.errors import AppendUncertain, LockBusy, StaleRevision, StorageFull
from crewlog.model.limits import DEFAULT
from crewlog.model.steps import Appended
from crewlog.queue import Commits, Request

WAIT_S = 10.0


class Stage:
    """A log whose phases a test holds up, fails and interrupts."""

    def __init__(self) -> None:
        """Begin empty."""
        self.groups: list[int] = []
        self.seq = 0
        self.take = 1 << 30
        self.on_write: list[Callable[[], None]] = []
        self.on_written: list[Callable[[], None]] = []
        self.on_settle: list[Callable[[], None]] = []
        self.settled = 0
        self._turn = threading.Lock()

    def write(self, group: Sequence[Request]) -> tuple[int, int, int]:
        """Number the requests; one whose `about` says so is refused."""
        if self.on_write:
            self.on_write.pop(0)()
        group = group[: self.take]
        for request in group:
            if "stale" in request.about:
                request.refuse(StaleRevision("stale", expected=1, actual=2))
                continue
            self.seq += 1
            request.composed = True
            request.result = Appended([], {}, self.seq)
        self.groups.append(len(group))
        if self.on_written:
            self.on_written.pop(0)()
        return len(group), self.seq, 0

    def make_durable(
        self, seq: int, generation: int | None = None, begun: Callable[[], None] | None = None
    ) -> None:
        """One at a time."""
        with self._turn:
            if begun is not None:
                begun()
            if self.on_settle:
                self.on_settle.pop(0)()
            self.settled = max(self.settled, seq)


class Riders:
    """Threads that append, and what became of each."""

    def __init__(self, commits: Commits, stage: Stage) -> None:
        """Use this queue."""
        self.commits, self.stage = commits, stage
        self.results: list[object] = []
        self.threads: list[threading.Thread] = []

    def start(self, about: str = "") -> threading.Thread:
        """Let one more append."""
        thread = threading.Thread(target=self._run, args=(about,))
        thread.start()
        self.threads.append(thread)
        return thread

    def add(self, about: str = "") -> None:
        """Let one more append, and wait until it is in the queue."""
        before = len(self.commits._queue)
        thread = self.start(about)
        while len(self.commits._queue) == before:
            thread.join(0.001)

    def _run(self, about: str) -> None:
        try:
            self.results.append(self.commits.append(lambda _: [], [about]).seq)
        except Exception as error:
            self.results.append(error)

    def join(self) -> list[object]:
        for thread in self.threads:
            thread.join(WAIT_S)
            assert not thread.is_alive(), "left behind"
        assert self.commits._leader is None
        return self.results


@pytest.fixture
def stage() -> Stage:
    """Return phases that do nothing but count."""
    return Stage()


@pytest.fixture
def commits(stage: Stage) -> Commits:
    """Return an empty queue."""
    return Commits(stage, where="here", wait_s=WAIT_S, limits=DEFAULT)


def _held(
    stage: Stage, commits: Commits, **hooks: Callable[[], None]
) -> tuple[Riders, threading.Event]:
    """Start a leader that is held up inside its write."""
    inside, go = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go.wait(WAIT_S)

    stage.on_write.append(hold)
    riders = Riders(commits, stage)
    riders.start()
    assert inside.wait(WAIT_S)
    return riders, go


def test_lone_caller_leads_itself(stage: Stage, commits: Commits) -> None:
    """Without a thread, without waiting."""
    before = threading.active_count()
    assert commits.append(lambda _: [], []).seq == 1
    assert (stage.groups, stage.settled, threading.active_count()) == ([1], 1, before)


def test_those_who_come_during_a_write_share_the_next(stage: Stage, commits: Commits) -> None:
    """One group for all of them; each gets its own result."""
    riders, go = _held(stage, commits)
    for _ in range(10):
        riders.add()
    go.set()
    assert sorted(riders.join(), key=str) == sorted(range(1, 12), key=str)
    assert stage.groups == [1, 10]


def test_next_group_is_written_while_this_one_syncs(stage: Stage, commits: Commits) -> None:
    """The sync of the first does not end before the second was written."""
    second = threading.Event()
    stage.on_settle.append(lambda: pytest.fail("late") if not second.wait(WAIT_S) else None)
    riders, go = _held(stage, commits)
    riders.add()
    stage.on_write.append(second.set)
    go.set()
    assert sorted(riders.join(), key=str) == [1, 2]


def test_refusal_is_its_own(stage: Stage, commits: Commits) -> None:
    """The others of the group are appended."""
    riders, go = _held(stage, commits)
    for about in ("", "stale", ""):
        riders.add(about)
    go.set()
    results = riders.join()
    assert sum(isinstance(result, StaleRevision) for result in results) == 1
    assert sum(isinstance(result, int) for result in results) == 3


def _fail_full() -> None:
    raise StorageFull("here", why="full")


def test_failure_of_a_write_is_told_to_each_with_an_error_of_its_own(
    stage: Stage, commits: Commits
) -> None:
    """Not one exception for all: a traceback belongs to one raise."""
    riders, go = _held(stage, commits)
    for about in ("", "", "stale"):
        riders.add(about)
    stage.on_written += [lambda: None, _fail_full]
    go.set()
    failed = [result for result in riders.join() if isinstance(result, StorageFull)]
    assert len(failed) == 2, "who was refused was refused"
    assert failed[0] is not failed[1]
    assert str(failed[0]) == str(failed[1])
    assert commits.append(lambda _: [], []).seq > 0, "the next one goes on"


def test_failure_of_a_sync_is_told_to_each(stage: Stage, commits: Commits) -> None:
    """And to none of the group that was written meanwhile, whose own sync decides."""
    riders, go = _held(stage, commits)
    riders.add()

    def fail() -> None:
        raise AppendUncertain("here", why="no")

    stage.on_settle.append(fail)
    go.set()
    results = riders.join()
    assert sum(isinstance(result, AppendUncertain) for result in results) == 1
    assert sum(isinstance(result, int) for result in results) == 1


def test_group_that_does_not_fit_goes_on_in_the_next(stage: Stage, commits: Commits) -> None:
    """In order, and nobody is forgotten."""
    stage.take = 4
    riders, go = _held(stage, commits)
    for _ in range(10):
        riders.add()
    go.set()
    assert sorted(riders.join(), key=str) == sorted(range(1, 12), key=str)
    assert stage.groups == [1, 4, 4, 2]


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["on_write", "on_written", "on_settle"])
def test_interrupted_leader_leaves_nobody_behind(
    stage: Stage, commits: Commits, moment: str
) -> None:
    """Before the write the next one writes; inside it nobody can know; after it each syncs."""
    riders = Riders(commits, stage)
    own = Request(lambda _: [], [])
    commits._leader = Request(lambda _: (), ())
    for _ in range(3):
        riders.add()
    getattr(stage, moment).append(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        commits.lead(own)
    results = riders.join()
    if moment == "on_written":
        assert [type(result) for result in results] == [AppendUncertain] * 3
    else:
        assert sorted(results, key=str) in ([1, 2, 3], [2, 3, 4])
        assert stage.settled == max(map(int, map(str, results)))


@pytest.mark.parametrize("moment", ["on_write", "on_written", "on_settle"])
def test_rider_that_was_refused_hears_so_whatever_interrupts_its_leader(
    stage: Stage, commits: Commits, moment: str
) -> None:
    """Nothing of it was written: it is neither uncertain nor to be made durable."""
    riders = Riders(commits, stage)
    own = Request(lambda _: [], [])
    commits._leader = Request(lambda _: (), ())
    riders.add("stale")
    riders.add()
    getattr(stage, moment).append(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        commits.lead(own)
    results = riders.join()
    assert [type(result) for result in results].count(StaleRevision) == 1


def test_who_waits_for_too_long_hears_of_it(stage: Stage) -> None:
    """In the queue nothing was written; in a group nobody can know."""
    limits = replace(DEFAULT, sync_wait_s=0.1)
    commits = Commits(stage, where="here", wait_s=0.1, limits=limits)
    riders, go = _held(stage, commits)
    riders.add()
    riders.threads[1].join(WAIT_S)
    assert isinstance(riders.results[0], LockBusy)
    go.set()
    assert riders.join()[1:] == [1]


# -- callers that go away -------------------------------------------------------------------


def _gone(commits: Commits, stage: Stage) -> None:
    """Whoever comes next leads at once."""
    assert commits._leader is None
    assert commits.append(lambda _: [], []).seq == stage.seq


def test_rider_that_is_interrupted_in_the_queue_leaves_it(
    stage: Stage, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler raises where it waits: nobody asks it to lead later."""
    riders, go = _held(stage, commits)
    monkeypatch.setattr("crewlog.queue._Waiting.wait", lambda self, timeout_s: _interrupt())
    with pytest.raises(KeyboardInterrupt):
        commits.append(lambda _: [], [])
    monkeypatch.undo()
    assert not commits._queue
    go.set()
    riders.join()
    _gone(commits, stage)


@pytest.mark.parametrize("first", [True, False])
def test_leader_that_is_interrupted_before_it_leads_hands_on(
    stage: Stage, commits: Commits, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Between being told to lead and leading."""
    go = None
    if not first:
        riders, go = _held(stage, commits)

        def wait(self: object, timeout_s: float) -> bool:
            assert go is not None
            go.set()
            riders.threads[0].join(WAIT_S)
            return True

        monkeypatch.setattr("crewlog.queue._Waiting.wait", wait)
    monkeypatch.setattr(commits, "lead", lambda *_: _interrupt())
    if go is not None:
        monkeypatch.undo()
        monkeypatch.setattr("crewlog.queue._Waiting.wait", wait)
        lead = commits.lead
        mine = threading.get_ident()
        monkeypatch.setattr(
            commits, "lead",
            lambda *given: _interrupt() if threading.get_ident() == mine else lead(*given),
        )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        commits.append(lambda _: [], [])
    monkeypatch.undo()
    _gone(commits, stage)


def test_rider_that_gave_up_is_not_put_back(
    stage: Stage, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its leader takes fewer than it was given, after the rider stopped waiting."""
    own, rider = Request(lambda _: [], []), Request(lambda _: [], [])
    commits._leader = own
    commits._queue.append(rider)
    stage.take = 1
    stage.on_write.append(lambda: commits.leave(rider))
    commits.lead(own)
    assert not commits._queue
    stage.take = 9
    _gone(commits, stage)


def test_rider_that_may_be_written_is_not_decided_again(stage: Stage, commits: Commits) -> None:
    """The leader is interrupted behind the write, before it told anybody what became of it."""
    decided: list[str] = []
    own, rider = Request(lambda _: [], []), Request(lambda _: [], [])
    commits._leader = own
    commits._queue.append(rider)

    def write(group: Sequence[Request]) -> tuple[int, int, int]:
        for request in group:
            request.composed = True
            decided.append(str(request.about))
        own.result = Appended([], {}, 1)
        raise KeyboardInterrupt

    stage.write = write  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        commits.lead(own)
    assert (len(decided), rider.phase) == (2, "done")
    assert isinstance(rider.error, AppendUncertain)
    assert rider.error.outcome == "unknown"


def test_leader_that_was_not_told_finds_out(
    stage: Stage, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One interrupt after the other has come as the turn was handed on."""
    monkeypatch.setattr(queue, "LOOK_S", 0.02)
    monkeypatch.setattr(queue._Waiting, "advance", lambda *_: None)
    riders, go = _held(stage, commits)
    riders.add()
    go.set()
    assert sorted(riders.join(), key=str) == [1, 2]


@pytest.mark.parametrize("again", [False, True])
def test_queue_that_nobody_leads_is_led_by_who_waits(
    stage: Stage, commits: Commits, monkeypatch: pytest.MonkeyPatch, *, again: bool
) -> None:
    """The leader is interrupted again wherever it would hand on, and gone."""
    monkeypatch.setattr(queue, "LOOK_S", 0.02)
    riders, main = Riders(commits, stage), threading.get_ident()
    real, leave = commits._hand_on, commits.leave

    def interrupt() -> None:
        if threading.get_ident() == main:
            raise KeyboardInterrupt

    def begins_to_hand_on() -> None:
        interrupt()
        real()

    def begins_to_leave(request: Request) -> None:
        interrupt()
        leave(request)

    def interrupted() -> None:
        for _ in range(3):
            riders.add()
        raise KeyboardInterrupt

    monkeypatch.setattr(commits, "_hand_on", begins_to_hand_on)
    if again:
        monkeypatch.setattr(commits, "leave", begins_to_leave)
    stage.on_write.append(interrupted)
    with pytest.raises(KeyboardInterrupt):
        commits.append(lambda _: [], [])
    assert sorted(riders.join(), key=str) == [1, 2, 3]


@pytest.mark.parametrize(
    ("phase", "gone", "takes"),
    [
        ("waiting", False, False),
        ("lead", False, False),
        ("lead", True, True),
        ("written", False, True),
        ("done", False, True),
    ],
)
def test_whoever_waits_takes_over_from_who_does_not_lead(
    commits: Commits, phase: queue.Phase, gone: bool, takes: bool
) -> None:
    """It is gone, or what it asked for was done by another one: it hands on no more."""
    commits._leader = leader = Request(lambda _: [], ())
    leader.phase, leader.gone = phase, gone
    waits = queue._Waiting(lambda _: [], ())
    commits._queue.append(waits)
    assert commits._is_heir(waits) is takes
    assert (commits._leader is waits, waits in commits._queue) == (takes, not takes)


def test_whoever_is_served_meanwhile_does_not_lead(
    stage: Stage, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its group is being synced, and nobody leads the next one: it looks, and waits on."""
    monkeypatch.setattr(queue, "LOOK_S", 0.001)
    looks: list[bool] = []
    enough, real = threading.Event(), Commits._is_heir

    def look(one: Commits, request: queue._Waiting) -> bool:
        looks.append(leads := real(one, request))
        if len(looks) > 20:
            enough.set()
        return leads

    def sync_of_the_riders() -> None:  # before it, whoever is to lead may learn that by a look
        monkeypatch.setattr(Commits, "_is_heir", look)
        assert enough.wait(WAIT_S)

    riders, go = _held(stage, commits)
    for _ in range(3):
        riders.add()
    stage.on_settle += [lambda: None, sync_of_the_riders]
    go.set()
    assert sorted(riders.join(), key=str) == [1, 2, 3, 4]
    assert (stage.groups, any(looks)) == ([1, 3], False)
