"""Have waiting processes at once: a bare interpreter, started once, forks them as children of ours.

To start an interpreter for every program takes most of the time of a spawn. The server is a process
of one thread that runs nothing of the host's. What it forks is our own child, not its own
(CLONE_PARENT), so we wait for it as for any other, and the server may end before it. A process is
born with what its parent has: limits, ids, umask, niceness, namespaces, control group, ignored
signals. So before each birth these are compared with what they were when the server began, and
where one differs a new one is begun. Where the system has no such fork, launch.py starts an
interpreter for each.
"""

import array
import atexit
import functools
import marshal
import os
import platform
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from crewlog import host

if TYPE_CHECKING:
    import socket
    import subprocess

ANSWER_WAIT_S: Final = 10.0
_LENGTH: Final = struct.Struct("=I")
# The numbers of clone(2), by machine, where the flags come first and a stack of 0 is a copy.
_CLONE: Final = {"x86_64": 56, "aarch64": 220}
# What a process is born with, of /proc/PID/status.
_STATUS: Final = (
    *(b"Umask", b"Uid", b"Gid", b"Groups", b"SigIgn", b"CapInh", b"CapPrm", b"CapEff", b"CapBnd"),
    *(b"CapAmb", b"NoNewPrivs", b"Seccomp", b"Seccomp_filters", b"Cpus_allowed", b"Mems_allowed"),
)
_NAMESPACES: Final = ("cgroup", "ipc", "mnt", "net", "pid_for_children", "time_for_children", "uts")
_IDLE_S: Final = 60  # a server that is not asked for so long ends

# Shared with launch.py: wait for the word, and become the program.
BECOME: Final = """
import os, signal
def become(argv, env, held, report, turn, locale):
    for fd in (report, turn):
        if fd >= 0:
            os.set_inheritable(fd, False)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.read(held, 1) != b".":
        os._exit(126)
    os.close(held)
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    if not locale:
        env.pop(b"LC_CTYPE", None)
    os.write(report, b"+")
    try:
        os.execvpe(argv[0], argv, env)
    except OSError as error:
        os.write(report, str(error.errno).encode())
        os._exit(127 if isinstance(error, (FileNotFoundError, NotADirectoryError)) else 126)
"""

_SERVE: Final = """
import array, ctypes, marshal, socket, struct, sys
number, flags, idle = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
clone = ctypes.CDLL(None, use_errno=True).syscall
clone.restype = ctypes.c_long
clone.argtypes = [ctypes.c_long, ctypes.c_ulong] + [ctypes.c_void_p] * 4
line = socket.socket(fileno=0)
line.settimeout(idle)

def receive():
    data, sent = b"", array.array("i")
    while len(data) < 4 or len(data) < 4 + struct.unpack("=I", data[:4])[0]:
        part, more, _, _ = line.recvmsg(1 << 16, 4096, socket.MSG_CMSG_CLOEXEC)
        if not part:
            os._exit(0)
        data += part
        for _, _, numbers in more:
            sent.frombytes(numbers)
    return marshal.loads(data[4:]), list(sent)

def be_born(order, sent):
    argv, env, cwd, streams, kept, turn, locale, mask = order
    held, report = sent[0], sent[1]
    os.setsid()
    nowhere = -1
    for standard, at in enumerate(streams):
        if at < 0 and nowhere < 0:
            nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(sent[at] if at >= 0 else nowhere, standard)
    if nowhere > 2:
        os.close(nowhere)
    try:
        os.chdir(cwd)
    except OSError as error:
        os.write(report, b"!%d" % error.errno)
        os._exit(126)
    for at in kept:
        os.set_inheritable(sent[at], True)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.write(report, b"=")
    become(argv, env, held, report, -1 if turn < 0 else sent[turn], locale)

while True:
    try:
        order, sent = receive()
    except TimeoutError:
        os._exit(0)
    pid = clone(number, flags, None, None, None, None)
    if pid == 0:
        try:
            be_born(order, sent)
        finally:
            os._exit(126)
    for fd in sent:
        os.close(fd)
    line.sendall(struct.pack("=q", pid if pid > 0 else -ctypes.get_errno()))
"""


class Order(NamedTuple):
    """What is to be born: the program that it becomes, and what it has until then.

    `streams` are its standard streams, -1 for nowhere; `kept` what the program inherits, `turn`
    what only the waiting process holds, -1 for none.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    streams: Sequence[int]
    held: int
    report: int
    kept: Sequence[int]
    turn: int
    locale: bool


class Refused(Exception):
    """There is no fork server, or it cannot do that: the caller starts an interpreter."""


class ForkServer:
    """The server of this process; one thread at a time asks it, under the host's `no_fork`."""

    def __init__(self) -> None:
        """Have no server yet; the last one ends with the process, and is not waited for."""
        atexit.register(self.leave)
        self._line: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._file = host.NO_FILE
        self._began_with: tuple[object, ...] = ()

    def fork(self, order: Order, interpreter: str) -> int:
        """Return the pid of a process that waits to become the program; it is a child of ours.

        Raises: Refused; OSError for its working directory.
        """
        now = (interpreter, *_born_with())
        line = self._line
        if line is None or now != self._began_with or not self._is_whole(line):
            line = self._begin(interpreter, now)
        try:
            return self._ask(line, order)
        except (OSError, EOFError):  # it was idle for long, or was killed: once more
            line = self._begin(interpreter, now)
            try:
                return self._ask(line, order)
            except (OSError, EOFError) as error:
                self.end()
                raise Refused(str(error)) from error

    def _begin(self, interpreter: str, born_with: tuple[object, ...]) -> "socket.socket":
        import socket  # noqa: PLC0415 (only who starts programs pays for the import)
        import subprocess  # noqa: PLC0415 (as above)

        number = _CLONE.get(platform.machine())
        if sys.platform != "linux" or number is None:
            raise Refused("no clone(2) that is known")
        self.end()
        flags = 0x8000 | signal.SIGCHLD  # CLONE_PARENT
        words = [interpreter, "-I", "-S", "-c", BECOME + _SERVE]
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with its:
            try:
                self._process = subprocess.Popen(
                    [*words, str(number), str(flags), str(_IDLE_S)],
                    stdin=its.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    cwd="/", start_new_session=True,
                )  # fmt: skip
            except BaseException:
                mine.close()
                raise
        mine.settimeout(ANSWER_WAIT_S)
        self._line, self._file, self._began_with = mine, host.own(mine.fileno()), born_with
        return mine

    def _ask(self, line: "socket.socket", order: Order) -> int:
        fds: list[int] = [order.held, order.report]

        def sent(fd: int) -> int:
            if fd < 0:
                return -1
            fds.append(fd)
            return len(fds) - 1

        body = marshal.dumps(
            (
                [os.fsencode(word) for word in order.argv],
                {os.fsencode(k): os.fsencode(v) for k, v in order.env.items()},
                os.fsencode(order.cwd),
                [sent(fd) for fd in order.streams],
                [sent(fd) for fd in order.kept],
                sent(order.turn),
                order.locale,
                [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            )
        )
        message = _LENGTH.pack(len(body)) + body
        rights = array.array("i", fds)
        import socket  # noqa: PLC0415 (as in _begin)

        taken = line.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        if taken < len(message):
            line.sendall(message[taken:])
        answer = b""
        while len(answer) < 8:  # noqa: PLR2004 (an int64)
            part = line.recv(8 - len(answer))
            if not part:
                raise EOFError
            answer += part
        pid: int = struct.unpack("=q", answer)[0]
        if pid <= 0:
            raise Refused(os.strerror(-pid))
        return pid

    def end(self) -> None:
        """Let the server end, and reap it."""
        process = self._process
        self._hang_up()
        self._process = None
        if process is not None:
            process.wait()

    def _is_whole(self, line: "socket.socket") -> bool:
        """Say whether the line is still ours: a host may have closed it."""
        return host.is_still(line.fileno(), self._file)

    def _hang_up(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            host.close_own(line.detach(), self._file)

    def leave(self) -> None:
        """Hang up, and forget it: at our end; in a forked child, where it is the parent's."""
        self._hang_up()
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0  # nobody asks for it any more


def _born_with() -> tuple[object, ...]:
    """Return what a child of ours has from us; what differs only seldom is left out."""
    with open("/proc/self/status", "rb") as file:
        rows = file.read().splitlines()
    with open("/proc/self/limits", "rb") as file:
        limits = file.read()
    with open("/proc/self/cgroup", "rb") as file:
        groups = file.read()
    with open("/proc/self/oom_score_adj", "rb") as file:
        score = file.read()
    return (
        tuple(row for row in rows if row.partition(b":")[0] in _STATUS),
        limits,
        groups,
        score,
        os.getpriority(os.PRIO_PROCESS, 0),
        os.sched_getscheduler(0),
        tuple(os.readlink(f"/proc/self/ns/{name}") for name in _present()),
        _root(),
    )


@functools.cache
def _present() -> tuple[str, ...]:
    return tuple(name for name in _NAMESPACES if os.path.lexists(f"/proc/self/ns/{name}"))


def _root() -> tuple[int, int]:
    inode = os.stat("/")
    return inode.st_dev, inode.st_ino
