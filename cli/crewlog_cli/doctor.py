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

import click

import crewlog
from crewlog import disk, identity, layout
from crewlog.errors import CrewlogError, StoreMissing
from crewlog.log import Log
from crewlog.notify import Bell, Waker
from crewlog.place import DirectoryPlace
from crewlog.registry import Registry
from crewlog.store import Store
from crewlog_cli import shell, text
from crewlog_cli.looking import Check
from crewlog_cli.shell import Shell, command
from crewlog_compactor import collect

_ROOM_BYTES: Final = 64 * 1024 * 1024
_COMPACTED: Final = timedelta(days=1)
_BACKLOG: Final = 10_000
_AHEAD: Final = timedelta(minutes=1)
_PACKAGES: Final = ("orjson", "watchdog", "psutil", "click")
_EXTRAS: Final = ("inotify_simple", "zstandard", "rich", "urllib3")


def checks(reg: Registry) -> Iterator[Check]:
    """Yield what a look at everything finds, the versions last."""
    try:
        log = reg.session.store()
    except StoreMissing:
        closed = _closed_parent(reg)
        yield Check(
            name="place",
            status="fail" if closed else "note",
            found=f"{reg.where}: there is no registry yet" + (closed and f", and {closed}"),
            remedy="The first registration creates one; check --dir and CREWLOG_DIR",
        )
        yield from _servers(reg)
    except CrewlogError as error:
        yield Check(
            name="place",
            status="fail",
            found=f"{error.where or reg.where}: {error.why or error.what}",
            remedy=error.remedy,
        )
        yield from _servers(reg)
    else:
        yield from _whole(reg, log)
        yield from _told("compaction", lambda: iter([_compaction(reg)]))
        yield from _told("collection", lambda: iter([_collection(reg)]))
        yield from _told("clock", lambda: iter([_clock(reg)]))
    yield from _kernel()
    yield _versions()


def _whole(reg: Registry, log: Store) -> Iterator[Check]:
    if isinstance(log, Log):
        yield from _told("log", lambda: _store(reg, log))
        return
    from crewlog_cli import cluster  # noqa: PLC0415 (few need it)

    yield from _told("log", lambda: cluster.checks(log))


def _told(name: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Yield what a look finds; what it stumbles over is found, too."""
    try:
        yield from look()
    except CrewlogError as error:
        found = ": ".join(part for part in (error.what, error.where, error.why) if part)
        yield Check(name=name, status="fail", found=found, remedy=error.remedy)


def _closed_parent(reg: Registry) -> str:
    """Say why no registry can be created at a directory; "" where one can."""
    place = reg.session.place
    if not isinstance(place, DirectoryPlace):
        return ""
    there = next(path for path in (place.path, *place.path.parents) if os.path.exists(path))
    if not os.path.isdir(there):
        return f"{there} is no directory"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"we may not write in {there}"


def _servers(reg: Registry) -> Iterator[Check]:
    """Look at each server of a cluster that is no registry yet, or does not answer."""
    place = reg.session.place
    if isinstance(place, DirectoryPlace):
        return
    from crewlog_cli import cluster  # noqa: PLC0415 (few need it)

    yield from cluster.servers(place)


# -- the store ------------------------------------------------------------------------------


def _store(reg: Registry, log: Log) -> Iterator[Check]:
    yield Check(name="place", status="ok", found=f"{reg.where}: ours alone, on a local file system")
    yield _room(log)
    yield from _writing(log)
    yield _waking(log)


def _room(log: Log) -> Check:
    found = os.fstatvfs(log.directory.root)
    free = found.f_bavail * found.f_frsize
    told = f"{text.size(free)} free"
    if found.f_favail == 0 and found.f_files:
        return Check(name="room", status="fail", found="no inode is free", remedy="Remove files")
    if free < _ROOM_BYTES:
        return Check(
            name="room",
            status="warn",
            found=told,
            remedy="Make room: a compaction needs space for a second snapshot and an archive",
        )
    return Check(name="room", status="ok", found=told)


def _writing(log: Log) -> Iterator[Check]:
    head = log.head()
    if head.poisoned or disk.exists(layout.POISON, at=log.directory.root):
        yield Check(
            name="log",
            status="fail",
            found="a sync failed; no change is taken",
            remedy="Check the disk, then run: crewlog repair",
        )
    elif log.recovery_pending:
        yield Check(
            name="log",
            status="note",
            found=f"seq {head.seq}; the machine was restarted since the last change",
            remedy="The next change recovers what needs it",
        )
    else:
        yield Check(name="log", status="ok", found=f"seq {head.seq} is durable")
    if not disk.exists(layout.REDO, at=log.directory.root):
        yield Check(
            name="redo",
            status="warn",
            found="it is missing: each change syncs the log itself, which takes longer",
            remedy="It is made anew by the first change after a restart of the machine",
        )


def _compaction(reg: Registry) -> Check:
    compacted, last = reg.compacted(), reg.last_seq
    covered = 0 if compacted is None else compacted[0]
    when = "never" if compacted is None else _ago(compacted[1])
    told = f"{when}; {last - covered} events since"
    old = compacted is None or datetime.now(UTC) - compacted[1] > _COMPACTED
    if old and last - covered > _BACKLOG:
        remedy = "Let cron run it: crewlog schedule cron"
        return Check(name="compaction", status="warn", found=told, remedy=remedy)
    return Check(name="compaction", status="ok", found=told)


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
    return f"{text.duration(datetime.now(UTC) - when)} ago"


def _clock(reg: Registry) -> Check:
    newest = next(reg.history(newest_first=True), None)
    now = datetime.now(UTC)
    if newest is not None and newest.ts > now + _AHEAD:
        return Check(
            name="clock",
            status="warn",
            found=f"the newest event is {text.duration(newest.ts - now)} in the future",
            remedy="Set the clock; order is by seq, but questions about times mislead until then",
        )
    return Check(name="clock", status="ok", found="no event is in the future")


def _waking(log: Log) -> Check:
    with Waker(log.channel, backend="auto", bell=Bell()) as waker:
        source = waker.source
    if source == "poll":
        return Check(
            name="wakes",
            status="warn",
            found="the system tells of no changes: watchers poll",
            remedy="Raise fs.inotify.max_user_instances and fs.inotify.max_user_watches (sysctl)",
        )
    limits = [_limit(name) for name in ("max_user_instances", "max_user_watches")]
    told = ", ".join(limit for limit in limits if limit)
    return Check(name="wakes", status="ok", found=f"by {source}" + (f" ({told})" if told else ""))


def _limit(name: str) -> str:
    try:
        return f"{name} {Path('/proc/sys/fs/inotify', name).read_text().strip()}"
    except OSError:  # not Linux
        return ""


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
    told = f"boot {identity.boot_id()}, up {up}"
    if identity.scope().host_id:
        yield Check(name="boot", status="ok", found=told)
    else:
        yield Check(
            name="boot",
            status="warn",
            found=f"{told}; the machine has no id",
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
    found = [f"crewlog {crewlog.__version__}", f"Python {platform.python_version()}"]
    found += [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    extras = [name for name in _EXTRAS if _installed(name)]
    told = ", ".join(found) + (f"; extras: {', '.join(extras)}" if extras else "")
    return Check(name="versions", status="ok", found=f"{told}; {platform.platform()}")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# -- the command ----------------------------------------------------------------------------


@command(
    "doctor",
    examples="""crewlog doctor
crewlog doctor --json | jq -r '.checks[] | select(.status != "ok") | .remedy'""",
)
def doctor(sh: Shell) -> None:
    """Look at what crewlog depends on, and say what to do; 1 if something must be done."""
    found = list(checks(sh.registry()))
    bad = [check for check in found if check.status == "fail"]
    if sh.json:
        rows = [
            {"name": c.name, "status": c.status, "found": c.found, "remedy": sh.advice(c.remedy)}
            for c in found
        ]
        sh.document({"ok": not bad, "checks": rows})
    else:
        rows_ = [[c.status, c.name, c.found] for c in found]
        sh.table(["status", "check", "found"], rows_)
        for check in found:
            if check.remedy:
                sh.note(f"{check.name}: {check.remedy}")
    if bad:
        raise SystemExit(shell.EXIT_NO)


COMMANDS: Final[dict[str, click.Command]] = {"doctor": doctor}
