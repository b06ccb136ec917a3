"""Say which process this is, and read what the kernel tells of one.

On Linux a pidfd is opened first, everything else is read, and the pidfd is polled last, so
whatever was read belongs to the process that the pidfd names. psutil answers on other systems
only: under hidepid it calls a living process of another user dead. This is the only module that
uses psutil.
"""

import errno
import fcntl
import hashlib
import hmac
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from crewlog import host
from crewlog.errors import ProcessNotFound, Unsupported
from crewlog.host import no_fork
from crewlog.model import arguments
from crewlog.model.events import Identity, JsonObject, Status, StatusSource
from crewlog.model.figures import Usage
from crewlog.process.liveness import Killed, Opened

LINUX: Final = sys.platform == "linux"
_HOST_KEY: Final = b"crewlog host 1"
# The inodes of the first namespaces. Source: include/uapi/linux/nsfs.h
_FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC
_FIRST_USER_NAMESPACE: Final = 0xEFFFFFFD
_FIRST_TIME_NAMESPACE: Final = 0xEFFFFFFA
# _IOWR(0xFF, 11, struct pidfd_info), 64 bytes; bit 3 of `mask` asks for and announces exit_code,
# the last field, a wait status. Source: include/uapi/linux/pidfd.h, Linux ≥ 6.15
_PIDFD_GET_INFO: Final = 0xC040FF0B
_PIDFD_INFO_EXIT: Final = 1 << 3
_PIDFD_INFO: Final = struct.Struct("=Q52xi")

_PF_EXITING: Final = 0x4
_POLL_MAX_S: Final = 86_400.0


class Stat(NamedTuple):
    """What /proc/PID/stat says: state letter, parent, threads, start in ticks, wait status.

    `exiting` is set from the moment on at which the thread has begun to end.
    """

    state: str
    parent: int
    pgid: int
    session: int
    exiting: bool
    threads: int
    start_ticks: int
    wait_status: int


_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"


class Scope(NamedTuple):
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

    Raises: Unsupported where there is no /proc.
    """
    if LINUX:
        try:
            return Path(_BOOT_ID).read_text().strip()
        except OSError as error:
            raise Unsupported(
                "the kernel tells no boot id",
                where=_BOOT_ID,
                why=error.strerror or str(error),
                remedy="Mount /proc: who lives, and what was durable before a reboot, rest on it",
            ) from error
    import subprocess  # noqa: PLC0415 (never needed on Linux)

    command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
    return (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().lower()
    )


def boot_bytes() -> bytes:
    """Return the boot id as 16 bytes, as the state files carry it."""
    return bytes.fromhex(boot_id().replace("-", ""))


def clock_bytes() -> bytes:
    """Name the monotonic clock that we read: the boot's own, or that of a time namespace.

    Source: time_namespaces(7).
    """
    try:
        inode = os.stat("/proc/self/ns/time").st_ino
    except OSError:  # before Linux 5.6, or not Linux
        return boot_bytes()
    if inode == _FIRST_TIME_NAMESPACE:
        return boot_bytes()
    return hashlib.sha256(boot_bytes() + b"%d" % inode).digest()[:16]


@cache
def _host_id() -> str:
    """Hash the machine id with a key of our own: it must not be published as it is."""
    for name in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            machine = Path(name).read_bytes().strip()
        except OSError:  # absent in many containers: then this host cannot be told from others
            continue
        if machine not in {b"", b"uninitialized"}:  # an image that was not booted yet has none
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
    """Return the scope of this process.

    Only a fork can change it: what unshare(2) makes is for children.
    """
    return Scope(boot_id(), _host_id(), _pid_namespace())


host.call_in_child(scope.cache_clear, rank=host.SCOPE)


def booted_at() -> datetime:
    """Return when this boot began, by the wall clock of now."""
    if not LINUX:
        import psutil  # noqa: PLC0415 (never needed on Linux)

        return datetime.fromtimestamp(psutil.boot_time(), UTC)
    return datetime.now(UTC) - timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME))


def started_at(identity: Identity) -> datetime | None:
    """Return when a process of this boot began, by the wall clock of now; None if unknown."""
    if identity.start_ticks is None:
        return None
    if not LINUX:
        return datetime.fromtimestamp(identity.start_ticks / 100, UTC)
    return booted_at() + timedelta(seconds=identity.start_ticks / os.sysconf("SC_CLK_TCK"))


# -- reading one process --------------------------------------------------------------------


def read_stat(pid: int) -> Stat | None:
    """Read /proc/PID/stat; None where it is not to be had.

    The name may hold spaces and parentheses, so fields are counted after the last ")".
    Source: proc_pid_stat(5), fields 3 to 6, 9, 20, 22 and 52; PF_EXITING of linux/sched.h.
    """
    text = read_small(f"/proc/{pid}/stat")
    fields = text[text.rfind(b")") + 2 :].split()
    if len(fields) < 50:  # noqa: PLR2004 (field 52 is the 50th after the name)
        return None  # gone, hidden, or no /proc: the caller has other witnesses
    return Stat(
        state=fields[0].decode(),
        parent=int(fields[1]),
        pgid=int(fields[2]),
        session=int(fields[3]),
        exiting=bool(int(fields[6]) & _PF_EXITING),
        threads=int(fields[17]),
        start_ticks=int(fields[19]),
        wait_status=int(fields[49]),
    )


def task_state(pid: int) -> str | None:
    """Return the state of a process's first task (R, S, T, Z …), None where it is not to be had."""
    text = read_small(f"/proc/{pid}/stat")
    return text[text.rfind(b")") + 2 :][:1].decode() or None


def read_small(path: str) -> bytes:
    """Read up to 16 KB of a file of /proc, empty where that is not to be had; for very many."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # gone, hidden, or not Linux
        return b""
    try:
        return os.read(fd, 16_384)
    except OSError:  # it ended meanwhile
        return b""
    finally:
        os.close(fd)


_BEFORE_EXEC_KIB: Final = 8 * 1024


def taken(pid: int, *, had_ours: bool) -> tuple[int, float]:
    """Return the most memory in bytes and the processor seconds of a child until now; 0 unknown.

    `had_ours`: it was forked from us, and the kernel counts what a child has of its parent's memory
    before its exec as its own. So the memory is then never less than ours.
    Source: proc_pid_status(5), VmHWM; Documentation/scheduler/sched-stats.rst, schedstat.
    """
    peak, cpu_s = 0, 0.0
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            rows = file.read().splitlines()
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = next((int(row.split()[1]) for row in rows if row.startswith(b"VmHWM:")), 0)
        # what it takes between here and its exec is not the program's either
        peak = max(peak + _BEFORE_EXEC_KIB, own if had_ours else 0) * 1024
        with open(f"/proc/{pid}/schedstat", "rb") as file:
            cpu_s = int(file.read().split()[0]) / 1e9
    except OSError:  # gone, or not Linux, or not counted
        pass
    return peak, cpu_s


def command(pid: int) -> JsonObject:
    """Return the words and the working directory of a process (argv, cwd); empty where not told.

    Source: proc_pid_cmdline(5), proc_pid_cwd(5).
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().rstrip(b"\0").split(b"\0")
        cwd = os.readlink(f"/proc/{pid}/cwd")
    except OSError:  # gone, another user's, or not Linux
        return {}
    return {
        "argv": [word.decode(errors="backslashreplace") for word in words],
        "cwd": cwd.encode(errors="surrogateescape").decode(errors="backslashreplace"),
    }


def runs(who: Identity, path: str) -> bool:
    """Say whether a process of this scope runs the program of that file, as our user.

    A script is run by its interpreter: then the file that is its first word is compared.
    """
    here = scope()
    ours = _uid_of(who.pid) == os.geteuid()  # asked now: it was recorded as its namespace counts
    if (who.boot_id, who.pid_ns) != (here.boot_id, here.pid_ns) or not ours:
        return False
    words = command(who.pid).get("argv")
    try:
        same = os.path.samefile(f"/proc/{who.pid}/exe", path)
        if not same and isinstance(words, list):
            same = any(_is_file(word, path) for word in words[:2])
        return same and capture(who.pid).start_ticks == who.start_ticks
    except (OSError, ProcessNotFound):  # gone, or hidden
        return False


def _is_file(word: object, path: str) -> bool:
    return isinstance(word, str) and os.path.isabs(word) and os.path.samefile(word, path)


def is_exiting(pid: int) -> bool:
    """Say whether a process is on its way out, though not ended yet; where /proc tells."""
    stat = read_stat(pid)
    return stat is not None and stat.exiting and stat.threads <= 1


def open_pidfd(pid: int) -> tuple[Opened, int]:
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
def opened_pidfd(pid: int) -> Iterator[tuple[Opened, int]]:
    """Open a pidfd for a block of code; see open_pidfd."""
    opened, fd = open_pidfd(pid)
    try:
        yield opened, fd
    finally:
        if fd >= 0:
            os.close(fd)


def ended(fd: int, *, wait_s: float = 0.0) -> bool:
    """Say whether the process has ended: a pidfd is readable once all its threads have."""
    poll, deadline = select.poll(), time.monotonic() + wait_s
    poll.register(fd, select.POLLIN)
    while not poll.poll(min(wait_s, _POLL_MAX_S) * 1000):  # its limit is an int of milliseconds
        wait_s = deadline - time.monotonic()
        if wait_s <= 0:
            return False
    return True


def look_once(who: Identity) -> bool | None:
    """Say whether a process of this scope has ended, by a pidfd for a moment; None if not told.

    The shortest way through the table of liveness: its rows 13 to 17.
    """
    if who.pidfd_id is None or not pidfds_have_inodes():
        return None
    opened, fd = open_pidfd(who.pid)
    if fd < 0:
        return True if opened in {"no_such_process", "thread"} else None
    try:
        return os.fstat(fd).st_ino != who.pidfd_id or bool(select.select([fd], (), (), 0)[0])
    except ValueError:  # its number is too large for select(2)
        return ended(fd)
    finally:
        os.close(fd)


def exit_status(pid: int, fd: int) -> Status | None:
    """Return how the process that has ended on this pidfd did so; None if nobody tells.

    The kernel keeps a reaped process's status for whoever held its pidfd; before it is reaped, a
    zombie's stat tells, to its user and to root. -1 stands for a pidfd that is not to be had.
    """
    status = kept_status(fd)
    if status is not None:
        return status
    stat = read_stat(pid)
    if stat is None or stat.state != "Z" or not _is_shown(stat.wait_status, pid):
        return kept_status(fd)
    if _is_reaped(fd):  # the pid may be another's by now
        return kept_status(fd)
    return _status(stat.wait_status, "zombie")


def _is_reaped(fd: int) -> bool:
    """Say whether the process of a pidfd has ended and is gone; a zombie is there."""
    try:
        if fd >= 0:
            signal.pidfd_send_signal(fd, 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def kept_status(fd: int) -> Status | None:
    """Return how the process of this pidfd ended, once it is reaped; from Linux 6.15 on."""
    if fd < 0:
        return None
    info = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, 0))
    try:
        fcntl.ioctl(fd, _PIDFD_GET_INFO, info)
    except OSError:  # not reaped yet, or an older kernel (ENOTTY, EINVAL, ESRCH)
        return None
    mask, wait_status = _PIDFD_INFO.unpack(info)
    return _status(wait_status, "pidfd") if mask & _PIDFD_INFO_EXIT else None


def _status(wait_status: int, source: StatusSource) -> Status:
    code = os.waitstatus_to_exitcode(wait_status)
    if code >= 0:
        return Status(code, None, source)
    return Status(None, -code, source, core=os.WCOREDUMP(wait_status))


def _is_shown(wait_status: int, pid: int) -> bool:
    """Say whether a zombie's status is its own: field 52 also reads 0 where we may not see it.

    Source: proc_pid_stat(5), and ptrace(2), "Ptrace access mode checking": all its user and group
    ids must be ours, and it may have no capability that we have not.
    """
    if wait_status != 0 or os.geteuid() == 0:
        return True
    try:
        rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    fields = {name: rest.split() for name, _, rest in (row.partition(":") for row in rows)}
    uids, gids = fields.get("Uid", [])[:3], fields.get("Gid", [])[:3]
    capable = int(fields.get("CapPrm", ["f"])[0], 16)
    return (
        uids == [str(os.geteuid())] * 3  # real, effective, saved
        and gids == [str(os.getegid())] * 3
        and capable == 0
    )


@cache
def pidfds_have_inodes() -> bool:
    """Since pidfs each process has an inode of its own; before, all anonymous files shared one.

    Compared with an eventfd rather than with another process, because pid 1 of a container may be
    the only process in it.
    """
    with opened_pidfd(os.getpid()) as (_, fd):
        if fd < 0:
            return False
        other = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            mine, shared = os.fstat(fd), os.fstat(other)
        finally:
            os.close(other)
    return (mine.st_dev, mine.st_ino) != (shared.st_dev, shared.st_ino)


def ancestors() -> set[int]:
    """Return the pids that this process descends from, itself included."""
    pids: set[int] = set()
    pid = os.getpid()
    while pid > 0 and pid not in pids:
        pids.add(pid)
        stat = read_stat(pid)
        pid = 0 if stat is None else stat.parent
    return pids | {os.getppid()}


def is_in_first_namespace() -> bool:
    """Say whether pids here are what the kernel's log calls processes by."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE
    except OSError:
        return False


def sees_every_process() -> bool:
    """Say whether /proc shows us every process there is: root, in the first namespaces."""
    try:
        first = (
            is_in_first_namespace()
            and os.stat("/proc/self/ns/user").st_ino == _FIRST_USER_NAMESPACE
            and os.readlink("/proc/self") == str(os.getpid())
        )
    except OSError:  # no /proc, or another namespace's
        return False
    return first and os.geteuid() == 0


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
    if not 1 <= pid <= arguments.PID_MAX:
        message = f"pid {pid} cannot name a process: a pid is 1 to {arguments.PID_MAX}"
        raise ValueError(message)
    return pid


def capture(pid: int | None = None) -> Identity:
    """Take the identity of a living process, by default of this one.

    Raises: ProcessNotFound if it has ended, or if the pid is a thread's.
    """
    return look(pid)[0]


def look(pid: int | None = None) -> tuple[Identity, Stat | None]:
    """Take the identity of a living process, and what its stat said then; see capture."""
    number = os.getpid() if pid is None else check_pid(pid)
    if not LINUX:
        return _capture_portable(number), None
    here = scope()
    with opened_pidfd(number) as (opened, fd):
        if opened in {"no_such_process", "thread"}:
            raise ProcessNotFound(number)
        stat = read_stat(number)
        if fd < 0 and stat is None:
            _require_exists(number)
        inode = os.fstat(fd).st_ino if fd >= 0 and pidfds_have_inodes() else None
        identity = Identity(
            pid=number,
            pidfd_id=inode,
            start_ticks=None if stat is None else stat.start_ticks,
            boot_id=here.boot_id,
            pid_ns=here.pid_ns,
            host_id=here.host_id,
            uid=_uid_of(number),
        )
        if fd >= 0 and ended(fd):  # last, so that all of the above belongs to it
            raise ProcessNotFound(number)
    return identity, stat


def _require_exists(pid: int) -> None:
    if killed(pid) == "no_such_process":
        raise ProcessNotFound(pid)


def killed(pid: int) -> Killed:
    """Ask kill(2) whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "no_such_process"
    except PermissionError:  # it exists and is another user's
        return "exists"
    return "exists"


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


class Portable(NamedTuple):
    """What psutil tells of a process; `denied` where it may not look."""

    exists: bool = True
    denied: bool = False
    start_ticks: int | None = None
    ended: bool | None = None


def look_portable(pid: int) -> Portable:
    """Ask psutil about one process."""
    import psutil  # noqa: PLC0415 (never needed on Linux)

    try:
        process = psutil.Process(pid)
        return Portable(
            start_ticks=round(process.create_time() * 100),
            ended=process.status() == psutil.STATUS_ZOMBIE,
        )
    except psutil.NoSuchProcess:
        return Portable(exists=False)
    except psutil.AccessDenied:
        return Portable(denied=True)


def usage(who: Identity, also: Collection[int] = ()) -> Usage | None:
    """Return what a process of this boot and pid namespace uses; None if it cannot be told.

    `also` are pids of those who belong to it: what they use is added, as far as they are there.

    The process is named again after the look, so that no stranger's figures are taken for its own.
    """
    with no_fork():
        import psutil  # noqa: PLC0415 (only who asks for figures pays for the import)

    here = scope()
    if (who.boot_id, who.pid_ns, who.host_id) != (here.boot_id, here.pid_ns, here.host_id):
        return None
    try:
        cpu_s, rss_bytes = _used(who.pid)
        if capture(who.pid).start_ticks != who.start_ticks:
            return None
    except (psutil.Error, ProcessNotFound):
        return None
    for pid in also:
        with suppress(psutil.Error):
            more_s, more_bytes = _used(pid)
            cpu_s, rss_bytes = cpu_s + more_s, rss_bytes + more_bytes
    return Usage(cpu_s=cpu_s, rss_bytes=rss_bytes)


def _used(pid: int) -> tuple[float, int]:
    """Return the seconds of processor that a process has taken, and the bytes that it holds."""
    import psutil  # noqa: PLC0415 (as above)

    process = psutil.Process(pid)
    with process.oneshot():
        times, memory = process.cpu_times(), process.memory_info()
    return times.user + times.system, memory.rss
