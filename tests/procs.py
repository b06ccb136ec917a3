"""Start real processes for tests, and wait for conditions, never for time."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from crewlog.local.log import Log
from crewlog.registry import Registry

WAIT_S = 30.0


def until(holds: Callable[[], bool], *, wait_s: float = WAIT_S) -> None:
    """Return once a condition holds; fail after a deadline."""
    deadline = time.monotonic() + wait_s
    while not holds():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.002)


def files(reg: Registry) -> Log:
    """Return the store of a registry, which is in a directory."""
    store = reg.store()
    assert isinstance(store, Log)
    return store


class Crew:
    """Real processes of a test; `end` kills and reaps them all."""

    def __init__(self) -> None:
        """Begin with none."""
        self.processes: list[subprocess.Popen[str]] = []

    def sleeper(self) -> subprocess.Popen[str]:
        """Start a process that does nothing for a while."""
        process = subprocess.Popen(["sleep", "300"], text=True)
        self.processes.append(process)
        return process

    def python(self, code: str, *arguments: object) -> subprocess.Popen[str]:
        """Start Python on a piece of code; its stdout and stderr are pipes."""
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def end(self) -> None:
        """Kill and reap every process."""
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # unread input of a dead process
                        stream.close()


def kill(process: subprocess.Popen[str]) -> None:
    """Kill with SIGKILL and reap."""
    process.kill()
    process.wait()


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a forked child and return its pid; its exit code is 0 if it returned."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # the child must never return into the test runner
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def joined(*pids: int) -> None:
    """Wait for forked children, and fail if one failed."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * len(pids)


def slay(pid: int) -> None:
    """Kill a forked child with SIGKILL and reap it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


def stranger_with(pid: int) -> int:
    """Fork a process that bears a given, free pid; only where ns_last_pid can be set."""
    deadline = time.monotonic() + 60  # another test's process may have it for a while
    while time.monotonic() < deadline:
        LAST_PID.write_text(str(pid - 1))
        stranger = forked(signal.pause)
        if stranger == pid:
            return stranger
        slay(stranger)
        time.sleep(0.002)
    message = "the pid could not be brought back"
    raise AssertionError(message)


def tree(place: Path) -> dict[str, bytes | None]:
    """Return every file below a place with its content, directories as None."""
    return {
        str(path.relative_to(place)): path.read_bytes() if path.is_file() else None
        for path in sorted(place.rglob("*"))
    }


def state_of(pid: int) -> str:
    """Return the state letter of a process, "" once it is gone."""
    from crewlog.process import identity

    stat = identity.read_stat(pid)
    return "" if stat is None else stat.state


def kernel_keeps_status() -> bool:
    """Say whether a pidfd tells how its process ended after that was reaped (Linux ≥ 6.15)."""
    from crewlog.process import identity

    pid = forked(lambda: None)
    fd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    try:
        return identity.exit_status(pid, fd) is not None
    finally:
        os.close(fd)
