"""Look at what crewlog depends on: the place, the kernel, the clock, and the job of cron.

Each check says what was found, and what to do where that is not as it should be. Nothing is
changed, and nothing is created but a watch that ends at once.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import crewlog
from crewlog.errors import CrewlogError, StoreMissing
from crewlog.model.figures import duration
from crewlog.process import identity
from crewlog.registry import Registry
from crewlog_compactor.collect import collect
from crewlog_compactor.engines import maintenance
from crewlog_compactor.reports import Check

_COMPACTED: Final = timedelta(days=1)
_BACKLOG: Final = 10_000
_NEVER: Final = 1_000  # so many events, and no compaction yet: nobody has set cron up
_AHEAD: Final = timedelta(minutes=1)
_PACKAGES: Final = ("orjson", "watchdog", "psutil", "click")
_EXTRAS: Final = ("inotify_simple", "zstandard", "rich", "urllib3")


def checks(reg: Registry) -> Iterator[Check]:
    """Yield what a look at everything finds, the versions last."""
    engine = maintenance(reg.place.kind)
    try:
        store = reg.store()
    except StoreMissing:
        closed, more = engine.outlook(reg.place)
        yield Check(
            name="place",
            status="fail" if closed else "note",
            found=f"{reg.where}: there is no registry yet" + (closed and f", and {closed}"),
            remedy="The first registration creates one; check --dir and CREWLOG_DIR",
        )
        yield from more
    except CrewlogError as error:
        yield Check(
            name="place",
            status="fail",
            found=f"{error.where or reg.where}: {error.why or error.what}",
            remedy=error.remedy,
        )
        yield from engine.outlook(reg.place)[1]
    else:
        yield from _guarded("log", lambda: engine.checks(store))
        yield from _guarded("compaction", lambda: iter([_compaction(reg)]))
        yield from _guarded("collection", lambda: iter([_collection(reg)]))
        yield from _guarded("clock", lambda: iter([_clock(reg)]))
    yield from _kernel()
    yield _versions()


def _guarded(name: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Yield what a look finds; what it stumbles over is found, too."""
    try:
        yield from look()
    except CrewlogError as error:
        why = ": ".join(part for part in (error.what, error.where, error.why) if part)
        yield Check(name=name, status="fail", found=why, remedy=error.remedy)


# -- the store ------------------------------------------------------------------------------


def _compaction(reg: Registry) -> Check:
    compacted, last = reg.compacted(), reg.last_seq
    covered = 0 if compacted is None else compacted[0]
    when = "never" if compacted is None else _ago(compacted[1])
    age = f"{when}; {last - covered} events since"
    old = compacted is None or datetime.now(UTC) - compacted[1] > _COMPACTED
    if last - covered > (_BACKLOG if compacted is not None else _NEVER) and old:
        remedy = "Let cron run it: crewlog schedule cron"
        return Check(name="compaction", status="warn", found=age, remedy=remedy)
    return Check(name="compaction", status="ok", found=age)


def _collection(reg: Registry) -> Check:
    """See whether cron's job would record the dead, or refuse to believe in them."""
    refused = collect(reg, dry_run=True).refused
    if refused is None:
        return Check(name="collection", status="ok", found="the dead would be recorded")
    return Check(
        name="collection", status="warn", found=f"{refused.what}, and that is refused",
        remedy=refused.remedy,
    )  # fmt: skip


def _ago(when: datetime) -> str:
    return f"{duration(datetime.now(UTC) - when)} ago"


def _clock(reg: Registry) -> Check:
    newest = next(reg.history(newest_first=True), None)
    now = datetime.now(UTC)
    if newest is not None and newest.ts > now + _AHEAD:
        return Check(
            name="clock",
            status="warn",
            found=f"the newest event is {duration(newest.ts - now)} in the future",
            remedy="Set the clock; order is by seq, but questions about times mislead until then",
        )
    return Check(name="clock", status="ok", found="no event is in the future")


# -- the kernel -----------------------------------------------------------------------------


def _kernel() -> Iterator[Check]:
    if not identity.LINUX:
        yield Check(
            name="identity",
            status="note",
            found=f"{platform.system()}: processes are told apart by their start times",
        )
        return
    me = identity.capture(None)
    if me.pidfd_id is None:
        yield Check(
            name="identity",
            status="note",
            found="by start time, to a clock tick: this kernel's pidfds have no inodes",
            remedy="Linux 6.9 or newer tells any two processes apart",
        )
    else:
        yield Check(name="identity", status="ok", found=f"exact: {me}")
    up = _ago(identity.booted_at()).removesuffix(" ago")
    boot = f"boot {identity.boot_id()}, up {up}"
    if identity.scope().host_id:
        yield Check(name="boot", status="ok", found=boot)
    else:
        yield Check(
            name="boot",
            status="warn",
            found=f"{boot}; the machine has no id",
            remedy="Give it an /etc/machine-id: else who lived before a restart stays UNKNOWN",
        )
    yield _namespace()
    yield _hidepid()


def _namespace() -> Check:
    if identity.sees_every_process():
        return Check(name="namespace", status="ok", found="the first one: every process is seen")
    return Check(
        name="namespace",
        status="note",
        found="a pid namespace of its own, or not root: not every process is seen",
        remedy="Workers of other namespaces need a lease (register lease=True, run --lease)",
    )


def _hidepid() -> Check:
    try:
        table = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError as error:
        return Check(
            name="hidepid", status="warn", found=f"/proc cannot be read: {error.strerror}",
            remedy="Mount /proc: without it nothing is known of other processes",
        )  # fmt: skip
    rows = [row for row in table if row.split()[4] == "/proc"]
    hidden = any(f"hidepid={word}" in row for row in rows for word in ("1", "2", "4", "invisible"))
    if hidden and os.geteuid() != 0:
        return Check(
            name="hidepid",
            status="warn",
            found="/proc hides other users' processes",
            remedy="Pidfds still prove a death; their workers may stay UNKNOWN. Run as root to see",
        )
    return Check(name="hidepid", status="ok", found="/proc shows what it must")


def _versions() -> Check:
    versions = [f"crewlog {crewlog.__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    extras = [name for name in _EXTRAS if _installed(name)]
    text = ", ".join(versions) + (f"; extras: {', '.join(extras)}" if extras else "")
    return Check(name="versions", status="ok", found=f"{text}; {platform.platform()}")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
