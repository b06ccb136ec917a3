"""Say what the control group of a process tells: who is in it, is it frozen, did memory run out.

That memory ran out is evidence only near to the end of a process, so what is counted is told by
its time. And it may have ended another one, who came and went between two looks: that this very
process was killed for it is said only where the kernel's log names it, or its group goes as one.
The file is held open: whoever runs the group may remove it with the last process.
Source: Linux, Documentation/admin-guide/cgroup-v2.rst (memory.events.local, memory.oom.group,
cgroup.freeze), cgroup-v1/memory.rst (memory.oom_control), and ABI/testing/dev-kmsg.
"""

import contextlib
import os
import re
import time
from collections import deque
from functools import cache
from typing import Final, NamedTuple

from crewlog import host
from crewlog.model.events import Identity, Oom
from crewlog.process import identity

NEAR_S: Final = 5.0  # so long before an end, at most, memory ran out if that ended it
_LOOKS_MAX: Final = 64
_RECORD_BYTES: Final = 8192
_KILLED: Final = re.compile(rb"[Kk]illed process (\d+)")
_FREEZERS: Final = (
    ("", "cgroup.events", "frozen 1"),
    ("freezer", "freezer.state", "FROZEN"),
)
_MANY: Final = 1 << 62  # bytes: what no machine has is no limit


class Place(NamedTuple):
    """The control group that counts a process's memory: its directory, and of which version."""

    path: str
    directory: str
    v2: bool


def path_of(pid: int) -> str | None:
    """Return the control group of a process as its own namespace calls it; None if not told."""
    paths = _paths(rows_of(pid))
    return paths.get("", paths.get("memory"))


def rows_of(pid: int) -> bytes:
    """Return what /proc/PID/cgroup says, empty where it is gone or hidden."""
    return identity.read_small(f"/proc/{pid}/cgroup")


def _paths(text: bytes) -> dict[str, str]:
    """Return the path in each hierarchy by controller, "" for that of version 2."""
    rows: dict[str, str] = {}
    for row in text.decode(errors="surrogateescape").splitlines():
        _, _, rest = row.partition(":")
        names, _, path = rest.partition(":")
        rows.update(dict.fromkeys(names.split(","), path))
    return rows


@cache
def _mounts() -> dict[str, str]:
    """Return where each hierarchy is mounted, by controller, "" for that of version 2."""
    mounts: dict[str, str] = {}
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
            rows = [row.split() for row in file]
    except OSError:
        return {}
    for _, where, kind, options, *_ in rows:
        if kind == "cgroup2":
            mounts.setdefault("", where)
        elif kind == "cgroup":
            for name in options.split(","):
                mounts.setdefault(name, where)
    return mounts


def place_of(pid: int) -> Place | None:
    """Return where the memory of a process is counted; None where that is not to be seen."""
    rows, mounts = _paths(rows_of(pid)), _mounts()
    for name in ("memory", ""):  # where both are mounted, memory is in one of them
        path, mount = rows.get(name), mounts.get(name)
        if path is None or mount is None:
            continue
        directory = f"{mount}{path}".rstrip("/")
        counted = "memory.events.local" if name == "" else "memory.oom_control"
        if os.path.exists(f"{directory}/{counted}"):
            return Place(path, directory, v2=name == "")
    return None


def is_frozen(text: bytes) -> bool:
    """Say whether a control group is frozen, by what `rows_of` returned; False if not told."""
    rows, mounts = _paths(text), _mounts()
    for name, file, frozen in _FREEZERS:
        path, mount = rows.get(name), mounts.get(name)
        if path is not None and mount is not None:
            with contextlib.suppress(OSError):
                if frozen in _text(f"{mount}{path}/{file}").splitlines():
                    return True
    return False


class Memory:
    """How often memory ran out in one control group, by the time of each look."""

    def __init__(self, place: Place) -> None:
        """Look for the first time.

        Raises: OSError.
        """
        self.place = place
        name = "memory.events.local" if place.v2 else "memory.oom_control"
        self.fd = os.open(f"{place.directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        self._file = host.own(self.fd)
        self._looks: deque[tuple[float, int]] = deque(maxlen=_LOOKS_MAX)
        self._group = place.v2 and _number(f"{place.directory}/memory.oom.group") == 1
        self._looked_at = 0.0
        self._limit = _limit(place)
        self.look()

    def look(self) -> None:
        """Count once more; the kernel tells by EPOLLPRI on `fd` (version 2) that it is time to."""
        self._looked_at = time.monotonic()
        with contextlib.suppress(OSError):  # it is gone, and the last look stands
            counted = _kills(os.pread(self.fd, _RECORD_BYTES, 0))
            if not self._looks or self._looks[-1][1] != counted:
                self._looks.append((self._looked_at, counted))

    def about(self, who: Identity) -> Oom | None:
        """Return what is known of a lack of memory, of a process that SIGKILL has just ended."""
        # version 1 does not say when: what happened since a look long ago is no evidence
        timely = self.place.v2 or time.monotonic() - self._looked_at < NEAR_S
        self.look()
        before = [count for at, count in self._looks if at < self._looked_at - NEAR_S]
        kills = self._looks[-1][1] - (before[-1] if before else self._looks[0][1])
        named = kills > 0 and _log_names(who)
        if kills <= 0 or not (timely or named):
            return None
        proven = named or self._group
        return Oom(cgroup=self.place.path, kills=kills, limit_bytes=self._limit, proven=proven)

    def close(self) -> None:
        """Let go of it."""
        host.close_own(self.fd, self._file)


def _kills(text: bytes) -> int:
    for row in text.splitlines():
        name, _, count = row.partition(b" ")
        if name == b"oom_kill":
            return int(count)
    return 0


def _limit(place: Place) -> int | None:
    limit = _number(f"{place.directory}/{'memory.max' if place.v2 else 'memory.limit_in_bytes'}")
    return None if limit is None or limit >= _MANY else limit


def _number(path: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(_text(path))
    return None


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _log_names(who: Identity) -> bool:
    """Say whether the kernel's log tells that it killed this very process for want of memory.

    It counts pids as the first namespace does, so it says nothing to any other.
    """
    if who.start_ticks is None or not identity.is_in_first_namespace():
        return False
    began_us = who.start_ticks * 1_000_000 // os.sysconf("SC_CLK_TCK")
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        while True:
            try:
                record = os.read(fd, _RECORD_BYTES)
            except BrokenPipeError:  # overwritten while we read: the next one is there
                continue
            except OSError:  # BlockingIOError: that is all
                return False
            head, _, words = record.partition(b";")
            named = _KILLED.search(words)
            if named and int(named[1]) == who.pid and int(head.split(b",")[2]) >= began_us:
                return True
    finally:
        os.close(fd)
