"""Say which processes belong to a worker beside its own: those of its session or process group.

A worker is often a wrapper (npx, uv, a shell) whose program goes on without it. Only a session or
process group that is the worker's own tells: its number is the worker's pid, and the kernel gives
that pid to nobody else while a process is left in it. So every process in it belongs to the worker
while the worker itself is there; and also later, as long as one is left that began before the
worker's end. Where that cannot be shown, nobody belongs to it.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from crewlog.errors import ProcessNotFound
from crewlog.model.events import JsonObject, Worker
from crewlog.process import cgroup, identity
from crewlog.process.handle import Process
from crewlog.process.identity import Stat

_DEAD: Final = frozenset({"Z", "X"})
_SLACK_TICKS: Final = 1  # the kernel's clocks are read one after the other


class Member(NamedTuple):
    """A process of a worker's tree."""

    pid: int
    start_ticks: int


def described(pid: int, stat: Stat | None) -> JsonObject:
    """Return what a registration says of a process's group: nothing where none is its own."""
    if stat is None or pid not in {stat.session, stat.pgid}:
        return {}
    return {
        "group": {
            "session": stat.session,
            "pgid": stat.pgid,
            "cgroup": cgroup.path_of(pid),
        }
    }


def members(
    workers: Collection[Worker], *, known: Mapping[str, Sequence[Member]] | None = None
) -> dict[str, tuple[Member, ...]]:
    """Return by sid who belongs to the workers, beside their own processes; one look at /proc.

    A worker to whom nobody is shown to belong is left out. `known` are those who were shown to
    belong at an earlier look.
    """
    shown = known or {}
    here = identity.scope()
    wanted = {
        w.identity.pid: w
        for w in workers
        if w.group is not None
        and w.identity is not None
        and (w.identity.boot_id, w.identity.pid_ns) == (here.boot_id, here.pid_ns)
    }
    if not wanted:
        return {}
    rows: dict[int, list[tuple[int, Stat]]] = {}
    for pid, stat in _every():
        for number in {stat.session, stat.pgid} & wanted.keys():
            group = wanted[number].group
            assert group is not None  # wanted
            if (stat.session == number == group.session) or (stat.pgid == number == group.pgid):
                rows.setdefault(number, []).append((pid, stat))
    proven = {
        wanted[n].sid: _proven(wanted[n], every, shown.get(wanted[n].sid, ()))
        for n, every in rows.items()
    }
    return {sid: kept for sid, kept in proven.items() if kept}


def _every() -> Iterable[tuple[int, Stat]]:
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdecimal():
            stat = identity.read_stat(int(name))
            if stat is not None:
                yield int(name), stat


def _proven(
    worker: Worker, rows: list[tuple[int, Stat]], known: Sequence[Member]
) -> tuple[Member, ...]:
    """Keep those of a session that are shown to be of this worker's, not of a later one's."""
    who = worker.identity
    assert who is not None  # wanted
    living = [(pid, stat) for pid, stat in rows if stat.state not in _DEAD]
    others = tuple(Member(pid, stat.start_ticks) for pid, stat in living if pid != who.pid)
    root = identity.read_stat(who.pid)
    if root is not None:
        shown = (
            root.start_ticks == who.start_ticks
        )  # else its pid, and so its session, is another's
    else:
        over_s = (worker.updated_at - identity.booted_at()).total_seconds()
        over_ticks = over_s * os.sysconf("SC_CLK_TCK") + _SLACK_TICKS
        shown = any(one in known or one.start_ticks <= over_ticks for one in others)
    return others if shown else ()


def hold(who: Member) -> Process | None:
    """Hold a member's process; None if it has ended."""
    try:
        now = identity.capture(who.pid)
        held = Process(now)
    except ProcessNotFound:
        return None
    if now.start_ticks != who.start_ticks:
        held.close()
        return None
    return held
