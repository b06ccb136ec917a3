"""Who belongs to a worker: a wrapper's program, its children; nobody else is ever signalled."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crewlog.registry import Registry
from crewlog.workers import tree
from procs import Crew, kill, state_of, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def lines(path: Path, count: int) -> list[int]:
    """Return the pids that a program has written."""
    until(lambda: path.exists() and len(path.read_text().split()) >= count)
    return [int(word) for word in path.read_text().split()]


def wrapped(reg: Registry, into: Path, *, last: str = "wait") -> tuple[int, list[int]]:
    """Spawn a wrapper, whose server has a child: return the wrapper's pid and the others'."""
    server = f"sleep 300 & echo $! >> {into}; echo $$ >> {into}; wait"
    worker = reg.spawn("wrapper", ["sh", "-c", f"sh -c '{server}' & {last}"])
    return worker.pid, lines(into, 2)


def test_group_is_on_record_where_it_is_the_workers_own(reg: Registry, crew: Crew) -> None:
    """A session of its own, as spawn makes it; not that of whoever started us."""
    worker = reg.spawn("own", ["sleep", "300"])
    assert worker.group is not None
    assert (worker.group.session, worker.group.pgid) == (worker.pid, worker.pid)
    assert reg.register("others", pid=crew.sleeper().pid).group is None
    reg.stop("own", reason="done")


def test_tree_of_a_wrapper_is_shown_and_ended(reg: Registry, tmp_path: Path) -> None:
    """Three levels, all of the worker's session."""
    root, others = wrapped(reg, tmp_path / "pids")
    worker = reg.get("wrapper")
    assert worker is not None
    assert sorted(reg.trees([worker])["wrapper"]) == sorted(others)
    reg.stop("wrapper", reason="done", tree=True, grace_s=5)
    until(lambda: all(state_of(pid) in {"", "Z"} for pid in [root, *others]))


def test_wrapper_that_died_alone_leaves_a_tree_that_can_be_ended(
    reg: Registry, tmp_path: Path
) -> None:
    """Its end is on record; who is older than it keeps the session's number, and proves it."""
    root, others = wrapped(reg, tmp_path / "pids")
    os.kill(root, signal.SIGKILL)
    until(lambda: (w := reg.get("wrapper")) is not None and w.final)
    worker = reg.get("wrapper")
    assert worker is not None
    assert sorted(reg.trees([worker])["wrapper"]) == sorted(others)
    reg.stop("wrapper", reason="what it left", tree=True)
    until(lambda: all(state_of(pid) in {"", "Z"} for pid in others))
    assert reg.trees([worker]) == {}


def test_negative_control_without_tree_the_others_run_on(reg: Registry, tmp_path: Path) -> None:
    """As it always was."""
    _, others = wrapped(reg, tmp_path / "pids")
    reg.stop("wrapper", reason="done")
    assert [state_of(pid) in {"R", "S"} for pid in others] == [True, True]
    reg.stop("wrapper", reason="done", tree=True)
    until(lambda: all(state_of(pid) in {"", "Z"} for pid in others))


def test_stubborn_one_is_killed_after_the_grace(reg: Registry, tmp_path: Path) -> None:
    """As the worker itself."""
    path = tmp_path / "pids"
    stubborn = f'trap "" TERM; echo $$ >> {path}; while :; do sleep 0.05; done'
    reg.spawn("wrapper", ["sh", "-c", f"sh -c '{stubborn}' & wait"])
    (pid,) = lines(path, 1)
    reg.stop("wrapper", reason="done", tree=True, grace_s=0.3)
    until(lambda: state_of(pid) in {"", "Z"})


def test_session_of_a_stranger_with_the_same_number_is_not_ours(
    reg: Registry, tmp_path: Path
) -> None:
    """All of a worker's are gone and its pid went round: those who are younger prove nothing."""
    reg.spawn("a", ["true"])
    until(lambda: (w := reg.get("a")) is not None and w.final)
    over = time.monotonic() + 0.05
    until(lambda: time.monotonic() > over)
    stranger = subprocess.Popen(
        ["sh", "-c", "sleep 300 & echo $!; exit"], start_new_session=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert stranger.stdout is not None
    child = int(stranger.stdout.readline())
    stranger.stdout.close()
    stranger.wait()
    worker = reg.get("a")
    assert worker is not None
    assert worker.identity is not None
    assert worker.group is not None
    # as if the stranger's session had the number of our worker
    from dataclasses import replace

    earlier = (worker.identity.start_ticks or 0) - 1  # both may have begun within one tick
    same = replace(
        worker,
        identity=replace(worker.identity, pid=stranger.pid, start_ticks=earlier),
        group=replace(worker.group, session=stranger.pid, pgid=stranger.pid),
    )
    assert tree.members([same]) == {}
    os.kill(child, signal.SIGKILL)


def test_pid_that_is_anothers_now_owns_no_session_of_ours(reg: Registry) -> None:
    """The leader lives, and is not the one that was registered."""
    from dataclasses import replace

    from crewlog.process import identity

    stranger = subprocess.Popen(
        ["sh", "-c", "sleep 300 & wait"], start_new_session=True,
    )  # fmt: skip
    worker = reg.spawn("a", ["sleep", "300"])
    assert worker.identity is not None
    assert worker.group is not None
    stat = identity.read_stat(stranger.pid)
    assert stat is not None
    same = replace(
        worker,
        identity=replace(worker.identity, pid=stranger.pid, start_ticks=stat.start_ticks - 1),
        group=replace(worker.group, session=stranger.pid, pgid=stranger.pid),
    )
    assert tree.members([same]) == {}
    os.killpg(stranger.pid, signal.SIGKILL)
    stranger.wait()
    reg.stop("a", reason="done")


def test_member_that_ended_is_not_held(crew: Crew) -> None:
    """Nor a process that has its pid since."""
    sleeper = crew.sleeper()
    from crewlog.process import identity

    stat = identity.read_stat(sleeper.pid)
    assert stat is not None
    held = tree.hold(tree.Member(sleeper.pid, stat.start_ticks))
    assert held is not None
    held.close()
    assert tree.hold(tree.Member(sleeper.pid, stat.start_ticks - 1)) is None
    kill(sleeper)
    assert tree.hold(tree.Member(sleeper.pid, stat.start_ticks)) is None
