"""Start a program in two steps: a process that waits, then, on a word, the program in it.

Between the two its pid is known and can be registered, so there is no moment at which the program
runs and is not listed. The waiting process is a bare interpreter, not a fork of ours: hooks,
threads and locks of the host never come into it. When its starter dies before the word, it reads
the end of the pipe and ends without having begun.
"""

import contextlib
import errno
import functools
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Final, TypeAlias, TypedDict

from crewlog import host
from crewlog.errors import SpawnFailed, not_started
from crewlog.host import no_fork
from crewlog.model.events import Status
from crewlog.process import handle, identity
from crewlog.process.forkserver import BECOME, ForkServer, Order, Refused
from crewlog.process.wait import Ended, look

if TYPE_CHECKING:
    import subprocess

LAUNCH_WAIT_S: Final = 30.0

Stream: TypeAlias = int | IO[bytes] | IO[str] | None
Words: TypeAlias = Sequence[str | os.PathLike[str]]
PIPE: Final = -1  # as subprocess has them
AS_STDOUT: Final = -2
NOWHERE: Final = -3
_SPECIAL: Final = (PIPE, AS_STDOUT, NOWHERE)
_STDERR: Final = 2

# Signals that Python ignores are given back to the program, and the variable that Python sets in
# the C locale is taken away again (PEP 538).
_WAITING: Final = (
    BECOME
    + """
import sys
held, report, locale, turn = map(int, sys.argv[1:5])
become(sys.argv[5:], dict(os.environb), held, report, turn, locale)
"""
)


# Our ends of pipes to waiting processes, and our pidfds. A child that another thread forks must not
# have them: the waiting process would never read the end, nor we its word. So a fork waits while
# some are made.
_ours: dict[int, host.FileId] = {}


def _let_go_in_child() -> None:
    for fd, file in _ours.items():
        host.close_own(fd, file)
    _ours.clear()


def _own(fd: int) -> int:
    """Note a descriptor as one of ours that no child may have."""
    if fd >= 0:
        _ours[fd] = host.own(fd)
    return fd


def _release(fd: int) -> None:
    """Close a descriptor of ours, if it is still that: in a forked child it is not."""
    file = _ours.pop(fd, None)
    if file is not None:
        host.close_own(fd, file)


host.call_in_child(_let_go_in_child, rank=host.DESCRIPTORS)


_LOOK_S: Final = 0.05  # where a wait must let others go on
# Why a program may not begin although it is there.
BROKEN: Final = "the Python that starts it ended by itself (sys.executable, LD_LIBRARY_PATH?)"


class Launch:
    """A process that waits for the word to become the program."""

    __slots__ = (
        *("_before", "_child", "_go", "_gone_at", "_pidfd", "_report", "argv", "error", "pid"),
    )

    def __init__(
        self,
        argv: Words,
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        stdin: Stream = NOWHERE,
        stdout: Stream = None,
        stderr: Stream = None,
        own_session: bool = True,
        keep: Sequence[int] = (),
        turn: int = -1,
    ) -> None:
        """Start it, by default in a session of its own and with nothing on stdin.

        `keep` are descriptors that the program inherits; `turn` is one that only the waiting
        process holds.
        Raises: SpawnFailed.
        """
        self._go = self._report = self._pidfd = -1
        self._before = (0, 0.0)  # the memory and time that the waiting process took
        self.error: str | None = None  # why the program did not begin: ENOENT
        self._gone_at: float | None = None  # when others were seen to have reaped it
        self.argv = check_argv(argv)
        variables = os.environ if env is None else env
        locale = "LC_CTYPE" in variables and not (env is None and host.locale_is_coerced())
        passed: list[int] = []  # what the child is to have, and we are not
        with no_fork():
            try:
                held, self._go = _pipe()
                passed.append(held)
                _own(self._go)
                self._report, report = _pipe()
                passed.append(report)
                _own(self._report)
                kept = [_above_standard(os.dup(fd)) for fd in keep]
                passed.extend(kept)
                if turn >= 0:
                    turn = _above_standard(os.dup(turn))
                    passed.append(turn)
                where, streams = _directory(cwd), (stdin, stdout, stderr)
                order = Order(self.argv, variables, where, (), held, report, kept, turn, locale)
                self._child = self._made(order, streams, passed, own_session=own_session)
                self._pidfd = _own(_pidfd(self._child.pid))
            except OSError as error:
                self._close()
                raise not_started(self.argv[0], error) from error
            except BaseException:
                self._close()
                raise
            finally:
                for fd in passed:
                    os.close(fd)
        self.pid = self._child.pid

    def _made(
        self, order: Order, streams: Sequence[Stream], passed: Sequence[int], *, own_session: bool
    ) -> "_Born | subprocess.Popen[bytes]":
        """Have it forked by the server; else start an interpreter for it."""
        numbers = _numbers(*streams) if own_session else None
        child = None if numbers is None else self._born(order._replace(streams=numbers))
        if child is not None:
            return child
        arguments = [order.held, order.report, int(order.locale), order.turn]
        words = [_interpreter(), "-I", "-S", "-c", _WAITING, *map(str, arguments)]
        return _child_class()(
            [*words, *order.argv],
            cwd=order.cwd,
            env=dict(order.env),
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            pass_fds=passed,
            start_new_session=own_session,
        )

    def _born(self, order: Order) -> "_Born | None":
        """Let the fork server make it; None where an interpreter must be started for it.

        Raises: OSError where it cannot go to its directory.
        """
        try:
            pid = _server.fork(order, _interpreter())
        except Refused:
            return None
        child = _Born(pid)
        said = self._next_word(time.monotonic() + LAUNCH_WAIT_S)
        if said.startswith(b"!"):
            child.wait()
            number = int(said[1:])
            raise OSError(number, os.strerror(number), order.cwd)
        if said != b"=":
            child.kill()
            child.wait()
            return None
        return child

    def go(self) -> None:
        """Start the program.

        Raises: SpawnFailed if it cannot.

        Returns once the program is in place of the waiting process, or after LAUNCH_WAIT_S if that
        hangs; it is listed by then.
        """
        self._before = identity.taken(self.pid, had_ours=not isinstance(self._child, _Born))
        try:
            with contextlib.suppress(BrokenPipeError):  # killed meanwhile: told by how it ended
                os.write(self._go, b".")
            said = self._said()
        finally:
            self._close()  # interrupted before the word, it ends without having begun
        if not said.startswith(b"+"):  # what waits did not come as far as the program
            raise SpawnFailed(self.argv[0], why=BROKEN)
        if reason := said[1:]:
            number = int(reason)
            self.error = errno.errorcode.get(number, str(number))
            raise not_started(
                self.argv[0], OSError(number, f"{os.strerror(number)} ({self.error})")
            )

    def _said(self) -> bytes:
        """Read what the waiting process says: "+", then nothing more, or why it could not go on."""
        said, deadline = b"", time.monotonic() + LAUNCH_WAIT_S
        while time.monotonic() < deadline:
            more = self._next_word(deadline)
            if not more:
                break
            said += more
        return said or b"+" if time.monotonic() >= deadline else said

    def _next_word(self, deadline: float) -> bytes:
        """Read what the waiting process says next, b"" at the end or once time is up."""
        poll = select.poll()
        poll.register(self._report, select.POLLIN)
        if poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return os.read(self._report, 64)
        return b""

    def __del__(self, is_ending: host.IsEnding = host.is_ending) -> None:
        """Let a waiting process end that was forgotten, by an interrupt at the wrong moment."""
        if not is_ending():
            self._close()
            self.let_go()

    def give_up(self) -> None:
        """End the waiting process before it starts the program."""
        self._close()
        self._child.kill()  # it has not begun, and need not read the end of the pipe
        self.reap()

    @property
    def is_gone(self) -> bool:
        """Say whether others were seen to have reaped it, and the kernel is asked how it ended."""
        return self._gone_at is not None

    @property
    def pidfd(self) -> int:
        """Return the descriptor that is readable once it has ended, -1 where there is none."""
        return self._pidfd

    def ended(self, *, wait: bool = True) -> Ended | None:
        """Return how it ended, and leave it to be reaped; None if it has not, and we do not wait.

        Until `reap` it is a zombie, so that whoever looks at it meanwhile sees how it ended, too
        (not where there is no waitid: on macOS before Python 3.13).
        """
        while True:
            file = _ours.get(self._pidfd)
            if self._pidfd >= 0 and (file is None or not host.is_still(self._pidfd, file)):
                self.let_go()  # the host has closed it: the pid is our child's until it is reaped
            try:
                end = look(self.pid, self._pidfd, wait=wait and not host.is_green())
            except ChildProcessError:  # the host ignores SIGCHLD, or waits for every child itself
                end = self._end_from_kernel()
            if end is not None:  # many that end at once must not keep each other from descriptors
                self.let_go()
                return Ended(self._of_program(end.status))
            if not wait:
                return None
            time.sleep(_LOOK_S if self._gone_at is None else handle.REAP_LOOK_S)

    def _of_program(self, status: Status | None) -> Status | None:
        """Leave out what the process took while it waited, and had not become the program."""
        if status is None or status.cpu_s is None:
            return status
        peak, cpu_s = self._before
        more = status.max_rss_bytes is not None and status.max_rss_bytes > peak
        return status._replace(
            max_rss_bytes=status.max_rss_bytes if more else None,
            cpu_s=round(max(0.0, status.cpu_s - cpu_s), 3),
        )

    def _end_from_kernel(self) -> Ended | None:
        """Return what the pidfd of a process that others reaped says; a moment later, maybe."""
        self._child.returncode = 0  # so that nobody waits for whoever has its pid by now
        status = identity.kept_status(self._pidfd)
        if self._gone_at is None:
            self._gone_at = time.monotonic()
        over = self._pidfd < 0 or time.monotonic() > self._gone_at + handle.REAP_WAIT_S
        return Ended(status) if status is not None or over else None

    def reap(self) -> None:
        """Wait for its end, and let it go."""
        self._child.wait()
        self.let_go()

    def let_go(self) -> None:
        """Close its pidfd: it is still our child, and can be looked at by its pid."""
        with no_fork():
            _release(self._pidfd)
            self._pidfd = -1

    def _close(self) -> None:
        with no_fork():
            for fd in (self._go, self._report):
                _release(fd)
            self._go = self._report = -1


class _Born:
    """A child that the fork server has made: as little of Popen as is needed here."""

    __slots__ = ("pid", "returncode")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self) -> int:
        """Wait for its end, and reap it; 0 where others have."""
        if self.returncode is None:
            try:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            except ChildProcessError:
                self.returncode = 0
        return self.returncode

    def kill(self) -> None:
        """Kill it; it is not reaped yet, so the pid is its own."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _directory(cwd: str | os.PathLike[str] | None) -> str:
    """Return the absolute path of a working directory; ours may have been removed."""
    try:
        return os.path.abspath(cwd or os.curdir)
    except FileNotFoundError:
        return f"/proc/{os.getpid()}/cwd"


_server: Final = ForkServer()
host.call_in_child(_server.leave, rank=host.DESCRIPTORS)


def _numbers(*streams: Stream) -> list[int] | None:
    """Return the descriptors of standard streams, -1 for nowhere; None where a pipe is wanted."""
    numbers: list[int] = []
    for standard, stream in enumerate(streams):
        if stream is None:
            numbers.append(standard)
        elif isinstance(stream, int):
            if stream in {_SPECIAL[0], _SPECIAL[1]} and not (
                stream == _SPECIAL[1] and standard == _STDERR
            ):
                return None
            numbers.append(-1 if stream == NOWHERE else numbers[1] if stream < 0 else stream)
        else:
            numbers.append(stream.fileno())
    for number in numbers:
        if number >= 0:
            try:
                os.fstat(number)
            except OSError:  # a host may have closed its standard streams
                return None
    return numbers


@functools.cache
def _child_class() -> "type[subprocess.Popen[bytes]]":
    """Return the class of a child that outlives us on purpose; readers need none of this."""
    import subprocess  # noqa: PLC0415 (slow to import)

    class Child(subprocess.Popen[bytes]):
        def __del__(self) -> None:
            """Give no warning that it is still running."""

    return Child


def _pipe() -> tuple[int, int]:
    """Make a pipe whose ends no standard stream of the program can replace."""
    reading, writing = os.pipe()
    return _above_standard(reading), _above_standard(writing)


def _pidfd(pid: int) -> int:
    """Hold a child that cannot be reaped yet; -1 where that is not to be had."""
    with contextlib.suppress(OSError):  # out of descriptors
        return _above_standard(identity.open_pidfd(pid)[1])
    return -1


def _above_standard(fd: int) -> int:
    """Return the descriptor under a number above 2: a host may have closed its standard streams."""
    low: list[int] = []
    try:
        while 0 <= fd <= _STDERR:
            low.append(fd)
            fd = os.dup(fd)
    finally:
        for number in low:
            os.close(number)
    return fd


def check_argv(argv: Words) -> list[str]:
    """Return a program and its arguments as strings; TypeError and ValueError for what is none."""
    if isinstance(argv, str | bytes) or not isinstance(argv, Sequence):
        message = "argv must be a sequence of strings: the program, then its arguments"
        raise TypeError(message)
    words = [os.fspath(word) for word in argv]
    if not words or not words[0]:
        message = "argv names no program"
        raise ValueError(message)
    for word in words:
        if not isinstance(word, str):
            message = f"argv must be strings, not {type(word).__name__}"
            raise TypeError(message)
        if "\0" in word:
            message = f"{word!r} holds a NUL"
            raise ValueError(message)
    return words


class LaunchOptions(TypedDict, total=False):
    """The surroundings that a program is started in."""

    cwd: str | os.PathLike[str] | None
    env: Mapping[str, str] | None
    stdout: Stream
    stderr: Stream


DEFAULTS: Final[LaunchOptions] = {"cwd": None, "env": None, "stdout": NOWHERE, "stderr": NOWHERE}


def check(argv: Words, options: LaunchOptions) -> None:
    """Raise TypeError or ValueError for what cannot be started at all."""
    check_argv(argv)
    cwd, env = options.get("cwd"), options.get("env")
    if cwd is not None and b"\0" in os.fsencode(cwd):
        message = f"cwd {cwd!r} holds a NUL"
        raise ValueError(message)
    if env is not None and not isinstance(env, Mapping):
        message = f"env must be a mapping, not {type(env).__name__}"
        raise TypeError(message)
    for key, value in (env or {}).items():
        if b"=" in os.fsencode(key) or b"\0" in os.fsencode(key) + os.fsencode(value):
            message = f"env holds {key!r}, which no process can be given"
            raise ValueError(message)
    for stream in (options.get("stdout"), options.get("stderr")):
        _check_stream(stream)


def _check_stream(stream: Stream) -> None:
    if stream is None or (isinstance(stream, int) and stream in _SPECIAL):
        return
    if not (isinstance(stream, int) or hasattr(stream, "fileno")):
        message = f"stdout and stderr are files or descriptors, not {stream!r}"
        raise TypeError(message)
    try:
        os.fstat(stream if isinstance(stream, int) else stream.fileno())
    except (OSError, OverflowError, ValueError) as error:
        message = f"{stream!r} is not open"
        raise ValueError(message) from error


def _interpreter() -> str:
    """Return a bare Python; in a frozen program sys.executable is that program."""
    own = "" if getattr(sys, "frozen", False) else sys.executable
    import shutil  # noqa: PLC0415 (as child)

    path = own or shutil.which("python3")
    if not path:
        raise SpawnFailed("python3", why="no interpreter to start from is known")
    return path
