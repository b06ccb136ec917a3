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
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Final, NamedTuple, TypeAlias, TypedDict

from crewlog import host
from crewlog.errors import SpawnFailed
from crewlog.host import no_fork
from crewlog.process import handle, identity

if TYPE_CHECKING:
    import subprocess

LAUNCH_WAIT_S: Final = 30.0

Stream: TypeAlias = int | IO[bytes] | IO[str] | None
Words: TypeAlias = Sequence[str | os.PathLike[str]]
NOWHERE: Final = -3  # subprocess.DEVNULL
_SPECIAL: Final = (-1, -2, NOWHERE)  # PIPE and STDOUT too
_STDERR: Final = 2

# Signals that Python ignores are given back to the program, and the variable that Python sets in
# the C locale is taken away again (PEP 538).
_WAITING: Final = """
import os, signal, sys
held, told, locale, turn = map(int, sys.argv[1:5])
os.set_inheritable(told, False)
if turn >= 0:
    os.set_inheritable(turn, False)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if os.read(held, 1) != b".":
    os._exit(126)
os.close(held)
for name in ("SIGPIPE", "SIGXFSZ"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
if not locale:
    os.environ.pop("LC_CTYPE", None)
os.write(told, b"+")
try:
    os.execvp(sys.argv[5], sys.argv[5:])
except OSError as error:
    os.write(told, str(error.errno).encode())
    os._exit(127 if isinstance(error, (FileNotFoundError, NotADirectoryError)) else 126)
"""


# Our ends of pipes to waiting processes, and our pidfds. A child that another thread forks must not
# have them: the waiting process would never read the end, nor we its word. So a fork waits while
# some are made.
_ours: set[int] = set()


def _let_go_in_child() -> None:
    for fd in _ours:
        os.close(fd)
    _ours.clear()


host.call_in_child(_let_go_in_child, rank=host.DESCRIPTORS)


# Why a program may not begin although it is there.
_GREEN_LOOK_S: Final = 0.05
BROKEN: Final = "the Python that starts it ended by itself (sys.executable, LD_LIBRARY_PATH?)"


class End(NamedTuple):
    """How a child ended: its exit code, or minus the signal; None where nobody tells."""

    code: int | None


class Launch:
    """A process that waits for the word to become the program."""

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
        self._go = self._told = self._pidfd = -1
        self.argv = check_argv(argv)
        variables = os.environ if env is None else env
        given = "LC_CTYPE" in variables and not (env is None and host.locale_is_coerced())
        locale = "1" if given else "0"
        passed: list[int] = []  # what the child is to have, and we are not
        with no_fork():
            child = _child_class()
            try:
                held, self._go = _pipe()
                passed.append(held)
                _ours.add(self._go)
                self._told, told = _pipe()
                passed.append(told)
                _ours.add(self._told)
                wanted = (*keep, turn) if turn >= 0 else keep
                passed.extend(_above_standard(os.dup(fd)) for fd in wanted)
                mine = str(passed[-1] if turn >= 0 else -1)
                numbers = [str(held), str(told), locale, mine]
                words = [_interpreter(), "-I", "-S", "-c", _WAITING, *numbers]
                self._child = child(
                    [*words, *self.argv],
                    cwd=cwd,
                    env=env,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    pass_fds=passed,
                    start_new_session=own_session,
                )
                self._pidfd = _pidfd(self._child.pid)
                _ours.update({self._pidfd} - {-1})
            except OSError as error:
                self._close()
                raise SpawnFailed(self.argv[0], why=str(error)) from error
            except BaseException:
                self._close()
                raise
            finally:
                for fd in passed:
                    os.close(fd)
        self.pid = self._child.pid

    def go(self) -> None:
        """Start the program.

        Raises: SpawnFailed if it cannot.

        Returns once the program is in place of the waiting process, or after LAUNCH_WAIT_S if that
        hangs; it is listed by then.
        """
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
            why = f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
            raise SpawnFailed(self.argv[0], why=why)

    def _said(self) -> bytes:
        """Read what the waiting process says: "+", then nothing more, or why it could not go on."""
        said, deadline = b"", time.monotonic() + LAUNCH_WAIT_S
        poll = select.poll()
        poll.register(self._told, select.POLLIN)
        while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            more = os.read(self._told, 64)
            if not more:
                return said
            said += more
        return said or b"+"  # it hangs: on a slow file system, say, and is listed

    def __del__(self) -> None:
        """Let a waiting process end that was forgotten, by an interrupt at the wrong moment."""
        self._close()
        self._let_go()

    def give_up(self) -> None:
        """End the waiting process before it starts the program."""
        self._close()
        self._child.kill()  # it has not begun, and need not read the end of the pipe
        self.reap()

    def ended(self, *, wait: bool = True) -> End | None:
        """Return how it ended, and leave it to be reaped; None if it has not, and we do not wait.

        Until `reap` it is a zombie, so that whoever looks at it meanwhile sees how it ended, too
        (not where there is no waitid: on macOS before Python 3.13).
        """
        green = wait and host.is_green()
        found = self._ended(wait=wait and not green)
        while found is None and green:
            time.sleep(_GREEN_LOOK_S)  # which lets the others go on
            found = self._ended(wait=False)
        if found is not None:  # many that end at once must not keep each other from descriptors
            self._let_go()
        return found

    def _ended(self, *, wait: bool) -> End | None:
        how = 0 if wait else os.WNOHANG
        try:
            if not hasattr(os, "waitid"):
                pid, status = os.waitpid(self.pid, how)
                if not pid:
                    return None
                self._child.returncode = os.waitstatus_to_exitcode(status)
                return End(self._child.returncode)
            kind, number = (os.P_PIDFD, self._pidfd) if self._pidfd >= 0 else (os.P_PID, self.pid)
            found = os.waitid(kind, number, os.WEXITED | os.WNOWAIT | how)
        except ChildProcessError:  # the host ignores SIGCHLD, or waits for every child itself
            return self._told_by_kernel()
        if found is None:
            return None
        return End(found.si_status if found.si_code == os.CLD_EXITED else -found.si_status)

    def _told_by_kernel(self) -> End:
        """Return what the pidfd of a process that others reaped says; a moment later, maybe."""
        self._child.returncode = 0  # so that nobody waits for whoever has its pid by now
        deadline = time.monotonic() + handle.REAP_WAIT_S
        while True:
            status = identity.kept_status(self._pidfd)
            if status is not None:
                return End(-status.signal if status.signal is not None else status.code)
            if self._pidfd < 0 or time.monotonic() > deadline:
                return End(None)
            time.sleep(handle.REAP_LOOK_S)

    def reap(self) -> None:
        """Wait for its end, and let it go."""
        self._child.wait()
        self._let_go()

    def _let_go(self) -> None:
        with no_fork():
            if self._pidfd in _ours:
                _ours.discard(self._pidfd)
                os.close(self._pidfd)
            self._pidfd = -1

    def _close(self) -> None:
        with no_fork():
            for fd in (self._go, self._told):
                if fd in _ours:  # in a forked child it is no longer
                    _ours.discard(fd)
                    os.close(fd)
            self._go = self._told = -1


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


DEFAULTS: Final[LaunchOptions] = {"cwd": None, "env": None, "stdout": NOWHERE, "stderr": None}


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

    found = own or shutil.which("python3")
    if not found:
        raise SpawnFailed("python3", why="no interpreter to start from is known")
    return found
