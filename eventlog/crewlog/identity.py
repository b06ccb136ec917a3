"""Say which process this is, and gather the evidence about its life.

On Linux the witness is the kernel: a pidfd is opened first, everything else is read, and the
pidfd is polled last, so whatever was read belongs to the process that the pidfd names. psutil
answers on other systems only: under hidepid it calls a living process of another user dead.
This is the only module that uses psutil.
"""

import errno
import hashlib
import hmac
import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Final, Literal

from crewlog import layout
from crewlog.errors import ProcessNotFound
from crewlog.events import Identity
from crewlog.liveness import Evidence, Killed, Opened, same_scope

_LINUX: Final = sys.platform == "linux"
_PLATFORM: Final[Literal["linux", "other"]] = "linux" if _LINUX else "other"
_HOST_KEY: Final = b"crewlog host 1"
# Room for a clock that was set while the machine booted.
_BOOT_SLACK: Final = timedelta(seconds=2)


@dataclass(frozen=True, slots=True)
class Stat:
    """What /proc/PID/stat says: state letter, thread count, start time in ticks, wait status."""

    state: str
    threads: int
    start_ticks: int
    wait_status: int


@dataclass(frozen=True, slots=True)
class Scope:
    """Where pids mean what they mean here: boot, host and pid namespace."""

    boot_id: str
    host_id: str
    pid_ns: str | None


# -- this process and its scope -------------------------------------------------------------


@cache
def boot_id() -> str:
    """Return the kernel's id of this boot.

    Source: Linux, Documentation/admin-guide/sysctl/kernel.rst (random/boot_id); macOS,
    kern.bootsessionuuid.
    """
    if _LINUX:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    import subprocess  # noqa: PLC0415 (never needed on Linux)

    command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
    return (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().lower()
    )


def boot_bytes() -> bytes:
    """Return the boot id as 16 bytes, as the state files carry it."""
    return bytes.fromhex(boot_id().replace("-", ""))


@cache
def _host_id() -> str:
    """Hash the machine id with a key of our own: it must not be published as it is."""
    for name in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            machine = Path(name).read_bytes().strip()
        except OSError:  # absent in many containers: then this host cannot be told from others
            continue
        if machine:
            return hmac.new(_HOST_KEY, machine, hashlib.sha256).hexdigest()[:32]
    return ""


def _pid_namespace() -> str | None:
    """Name our pid namespace by its inode and the start of its pid 1: inodes are recycled."""
    try:
        inode = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux, or no /proc
        return None
    first = read_stat(1)
    return f"{inode}:{'' if first is None else first.start_ticks}"


@cache
def scope() -> Scope:
    """Return the scope of this process; it survives a fork but not unshare(2)."""
    return Scope(boot_id(), _host_id(), _pid_namespace())


def booted_at() -> datetime:
    """Return when this boot began, by the wall clock of now."""
    if not _LINUX:
        import psutil  # noqa: PLC0415 (never needed on Linux)

        return datetime.fromtimestamp(psutil.boot_time(), UTC)
    return datetime.now(UTC) - timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME))


def started_at(identity: Identity) -> datetime | None:
    """Return when a process of this boot began, by the wall clock of now; None if unknown."""
    if identity.start_ticks is None:
        return None
    if not _LINUX:
        return datetime.fromtimestamp(identity.start_ticks / 100, UTC)
    return booted_at() + timedelta(seconds=identity.start_ticks / os.sysconf("SC_CLK_TCK"))


# -- reading one process --------------------------------------------------------------------


def read_stat(pid: int, *, proc: str = "/proc") -> Stat | None:
    """Read /proc/PID/stat; None where it is not to be had.

    The name may hold spaces and parentheses, so fields are counted after the last ")".
    Source: proc_pid_stat(5), fields 3, 20, 22 and 52.
    """
    try:
        with open(f"{proc}/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:  # gone, hidden, or no /proc: the caller has other witnesses
        return None
    fields = text[text.rfind(b")") + 2 :].split()
    if len(fields) < 50:  # noqa: PLR2004 (field 52 is the 50th after the name)
        return None
    return Stat(fields[0].decode(), int(fields[17]), int(fields[19]), int(fields[49]))


def _open(pid: int) -> tuple[Opened, int]:
    """Open a pidfd; the second value is the descriptor or -1. Source: pidfd_open(2)."""
    if not hasattr(os, "pidfd_open"):
        return "unsupported", -1
    try:
        return "yes", os.pidfd_open(pid)
    except OSError as error:
        match error.errno:
            case errno.ESRCH:
                return "no_such_process", -1
            case errno.ENOENT | errno.EINVAL:  # the pid of a thread, not of a process
                return "thread", -1
            case _:  # ENOSYS, EMFILE, EPERM: the start time must do
                return "unsupported", -1


@contextmanager
def _opened(pid: int) -> Iterator[tuple[Opened, int]]:
    opened, fd = _open(pid)
    try:
        yield opened, fd
    finally:
        if fd >= 0:
            os.close(fd)


def _ended(fd: int) -> bool:
    """A pidfd is readable once every thread of the process has ended."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


@cache
def _pidfds_have_inodes() -> bool:
    """Since pidfs each process has an inode of its own; before, all pidfds shared one."""
    other = 1 if os.getpid() != 1 else os.getppid() or 2
    with _opened(os.getpid()) as (_, mine), _opened(other) as (_, theirs):
        return mine >= 0 and theirs >= 0 and os.fstat(mine).st_ino != os.fstat(theirs).st_ino


def _uid_of(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:  # hidden from us, or no /proc: then no signal will be sent on its strength
        return None


def check_pid(pid: object) -> int:
    """Return `pid` if it can name a process, else raise TypeError or ValueError."""
    if type(pid) is not int:
        message = f"pid must be an integer, not {type(pid).__name__}"
        raise TypeError(message)
    if not 1 <= pid <= layout.PID_MAX:
        message = f"pid {pid} cannot name a process: a pid is 1 to {layout.PID_MAX}"
        raise ValueError(message)
    return pid


def capture(pid: int | None = None) -> Identity:
    """Take the identity of a living process, by default of this one.

    *Raises* ProcessNotFound if it has ended, or if the pid is a thread's.
    """
    number = os.getpid() if pid is None else check_pid(pid)
    if not _LINUX:
        return _capture_portable(number)
    here = scope()
    with _opened(number) as (opened, fd):
        if opened in {"no_such_process", "thread"}:
            raise ProcessNotFound(number)
        stat = read_stat(number)
        if fd < 0 and stat is None:
            _require_exists(number)
        inode = os.fstat(fd).st_ino if fd >= 0 and _pidfds_have_inodes() else None
        identity = Identity(
            pid=number,
            pidfd_id=inode,
            start_ticks=None if stat is None else stat.start_ticks,
            boot_id=here.boot_id,
            pid_ns=here.pid_ns,
            host_id=here.host_id,
            uid=_uid_of(number),
        )
        if fd >= 0 and _ended(fd):  # last, so that all of the above belongs to it
            raise ProcessNotFound(number)
    return identity


def _require_exists(pid: int) -> None:
    if _kill(pid) == "no_such_process":
        raise ProcessNotFound(pid)


def _kill(pid: int) -> Killed:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "no_such_process"
    except PermissionError:  # it exists and is another user's
        return "exists"
    return "exists"


# -- evidence -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Witness:
    """Look at processes from one place, at one time.

    `here`, `proc` and `began_at` are seams for tests; the defaults are this process's own.
    """

    here: Scope
    now: datetime
    began_at: datetime
    proc: str = "/proc"
    local_file_system: bool = True

    def look(self, identity: Identity | None, *, last_event_at: datetime) -> Evidence:
        """Gather what the decision table may need about one worker, and nothing more."""
        base = Evidence(
            platform=_PLATFORM,
            boot_id=self.here.boot_id,
            host_id=self.here.host_id,
            pid_ns=self.here.pid_ns,
            local_file_system=self.local_file_system,
            record_age_s=(self.now - last_event_at).total_seconds(),
            boot_began_after_record=self.began_at - _BOOT_SLACK > last_event_at,
        )
        if identity is None or identity.boot_id != self.here.boot_id:
            return base
        check_pid(identity.pid)
        if not _LINUX:
            return _look_portable(identity.pid, base)
        if not same_scope(identity.pid_ns, self.here.pid_ns):
            return base
        return self._look_here(identity, base)

    def _look_here(self, identity: Identity, base: Evidence) -> Evidence:
        with _opened(identity.pid) as (opened, fd):
            if opened in {"no_such_process", "thread"}:
                return replace(base, opened=opened)
            inode = None
            if fd >= 0 and identity.pidfd_id is not None and _pidfds_have_inodes():
                inode = os.fstat(fd).st_ino
                if inode != identity.pidfd_id or not _ended(fd):
                    return replace(base, opened=opened, pidfd_id=inode, ended=False)
            stat = read_stat(identity.pid, proc=self.proc)
            seen = replace(base, opened=opened, pidfd_id=inode)
            if stat is not None:
                seen = _with_stat(seen, stat, readable=_may_read_status(identity))
            if fd >= 0:
                return replace(seen, ended=_ended(fd), killed=_kill(identity.pid))
            return replace(seen, killed=_kill(identity.pid))


def witness(*, local_file_system: bool = True) -> Witness:
    """Return a witness for this process's own place and time."""
    return Witness(scope(), datetime.now(UTC), booted_at(), local_file_system=local_file_system)


def _may_read_status(identity: Identity) -> bool:
    """Field 52 reads 0 unless ptrace access is granted: then only to its user and to root."""
    return os.geteuid() in {0, identity.uid}


def _with_stat(seen: Evidence, stat: Stat, *, readable: bool) -> Evidence:
    code: int | None = None
    signal: int | None = None
    if readable and stat.state == "Z" and stat.threads == 1:
        status = os.waitstatus_to_exitcode(stat.wait_status)
        code, signal = (status, None) if status >= 0 else (None, -status)
    return replace(
        seen,
        start_ticks=stat.start_ticks,
        task_state=stat.state,
        threads=stat.threads,
        exit_code=code,
        exit_signal=signal,
    )


# -- other systems --------------------------------------------------------------------------


def _capture_portable(pid: int) -> Identity:
    import psutil  # noqa: PLC0415 (never needed on Linux)

    try:
        process = psutil.Process(pid)
        started, uid = process.create_time(), process.uids().effective
    except psutil.NoSuchProcess as error:
        raise ProcessNotFound(pid) from error
    except psutil.AccessDenied:
        started, uid = None, None
    here = scope()
    return Identity(
        pid=pid,
        pidfd_id=None,
        start_ticks=None if started is None else round(started * 100),
        boot_id=here.boot_id,
        pid_ns=here.pid_ns,
        host_id=here.host_id,
        uid=uid,
    )


def _look_portable(pid: int, base: Evidence) -> Evidence:
    import psutil  # noqa: PLC0415 (never needed on Linux)

    try:
        process = psutil.Process(pid)
        return replace(
            base,
            start_ticks=round(process.create_time() * 100),
            ended=process.status() == psutil.STATUS_ZOMBIE,
        )
    except psutil.NoSuchProcess:
        return replace(base, killed="no_such_process")
    except psutil.AccessDenied:
        return replace(base, access_denied=True)
