"""Start processes as workers: exec becomes the worker, run stays as its parent.

Both register the pid before the program begins, so a kill at any moment leaves no living worker
that is not listed.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, ParamSpec

import click

from crewlog.errors import CrewlogError, StaleRevision
from crewlog.events import Worker
from crewlog.registry import Registry
from crewlog_cli import reading, shell
from crewlog_cli.changing import safe, tried
from crewlog_cli.shell import Shell, command

P = ParamSpec("P")

_NOT_FOUND: Final = shell.EXIT_NOT_FOUND
_NOT_RUN: Final = shell.EXIT_NOT_RUN
_TRIES: Final = 16
# Passed on to the worker; of these, all but the last three ask it to end.
_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_FORWARDED: Final = (*_ENDING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
_FROM_KERNEL: Final = 0x80  # SI_KERNEL: the terminal sent it to the whole group already


def _options(function: Callable[P, None]) -> Callable[P, None]:
    for option in (
        click.argument("argv", metavar="-- CMD…", nargs=-1, type=click.UNPROCESSED, required=True),
        click.argument("sid"),
        click.option("--starting", is_flag=True, help="It will say itself when it is ready."),
        click.option("-l", "--label", "labels", multiple=True, metavar="K=V", help="A label."),
        click.option("--version", default="", help="Its version."),
        click.option("--sock", default="", help="Where it will listen."),
    ):
        function = option(function)
    return function


@dataclass(frozen=True, slots=True)
class _Wish:
    """What the options say of the worker."""

    sock: str
    version: str
    labels: tuple[str, ...]
    starting: bool


def _register(
    reg: Registry, sid: str, pid: int, wish: _Wish, *, owner: int | None = None
) -> Worker:
    labels = reading.pairs([safe(row) for row in wish.labels])
    return tried(
        lambda: reg.register(
            sid,
            pid=pid,
            sock=safe(wish.sock),
            version=safe(wish.version),
            labels=labels,
            ready=not wish.starting,
            owner=owner,
        )
    )


def _replace(argv: Sequence[str]) -> int:
    """Become the program, or return the exit code of env(1): 127 not found, 126 not runnable."""
    try:
        os.execvp(argv[0], list(argv))  # noqa: S606 (to become the program is the point)
    except (FileNotFoundError, NotADirectoryError):
        return _NOT_FOUND
    except (OSError, ValueError):
        return _NOT_RUN


def _complain(sh: Shell, argv: Sequence[str], code: int) -> None:
    why = "not found" if code == _NOT_FOUND else "cannot be run"
    shell.complain(
        sh,
        code="exec_failed",
        exit_code=code,
        what=f"{argv[0]!r}: {why}",
        where="",
        hint="Check the name, PATH and its mode",
    )


@command("exec", examples="crewlog exec web-1 -- python -m http.server 8000")
@_options
def exec_(
    sh: Shell,
    *,
    sid: str,
    argv: tuple[str, ...],
    sock: str,
    version: str,
    labels: tuple[str, ...],
    starting: bool,
) -> None:
    """Register this process as SID, then become CMD: same pid, no code needed in the program."""
    wish = _Wish(sock, version, labels, starting)
    with sh.registry() as reg:
        _register(reg, sid, os.getpid(), wish)
        shell.flush()
        code = _replace(argv)
        reg.exited(sid, code=code)
    _complain(sh, argv, code)
    raise SystemExit(code)


@command(
    "run",
    examples="""crewlog run web-1 -- python -m http.server 8000
crewlog run job-7 -l queue=mail -- ./worker --once; echo $?""",
)
@_options
def run(
    sh: Shell,
    *,
    sid: str,
    argv: tuple[str, ...],
    sock: str,
    version: str,
    labels: tuple[str, ...],
    starting: bool,
) -> None:
    """Run CMD as worker SID, pass signals on, record how it ends, and end the same way.

    The exit code is the program's, or 128 plus the signal that ended it.
    """
    wish = _Wish(sock, version, labels, starting)
    with sh.registry() as reg:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*_FORWARDED, signal.SIGCHLD))
        pid, go = _held_child(argv, blocked)
        try:
            worker = _register(reg, sid, pid, wish, owner=os.getpid())
        except BaseException:
            os.close(go)  # the child sees the end of the pipe and ends without having begun
            os.waitpid(pid, 0)
            raise
        os.write(go, b"\n")
        os.close(go)
        code = os.waitstatus_to_exitcode(_wait(sh, reg, worker))
        _tell(
            sh,
            reg,
            worker,
            lambda rev: reg.exited(
                sid,
                code=code if code >= 0 else None,
                signal=-code if code < 0 else None,
                source="wait",
                expect=rev,
            ),
        )
    if code in {_NOT_FOUND, _NOT_RUN} and sh.verbose:
        _complain(sh, argv, code)
    raise SystemExit(code if code >= 0 else 128 - code)


def _held_child(argv: Sequence[str], mask: set[int | signal.Signals]) -> tuple[int, int]:
    """Fork a child that becomes the program once a byte arrives; at the pipe's end it gives up."""
    held, go = os.pipe()
    shell.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(held)
        return pid, go
    code = _NOT_RUN
    try:
        os.close(go)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if os.read(held, 1):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            code = _replace(argv)
            os.write(2, f"crewlog: {safe(argv[0])!r} cannot be run\n".encode("utf-8", "replace"))
    finally:
        os._exit(code)


def _tell(sh: Shell, reg: Registry, worker: Worker, change: Callable[[int], object]) -> None:
    """Record something of our worker, as long as the sid is still its own.

    Whatever keeps us from it is told, and keeps neither the signal nor the exit code back.
    """
    for _ in range(_TRIES):
        try:
            now = reg.get(worker.sid)
            if now is None or now.final or now.generation != worker.generation:
                sh.note(f"crewlog: {worker.sid} is no longer ours in the registry")
                return
            change(now.rev)
        except StaleRevision:  # somebody updated it between the look and the write
            continue
        except CrewlogError as error:
            sh.note(f"crewlog: {error}")
        return


def _wait(sh: Shell, reg: Registry, worker: Worker) -> int:
    """Wait for the child, passing signals on; a request to end is recorded before it is passed."""
    while True:
        number, from_terminal = _next_signal()
        if number == signal.SIGCHLD:
            done, status = os.waitpid(worker.pid, os.WNOHANG)
            if done:
                return status
            continue
        if number in _ENDING:
            why = f"{signal.Signals(number).name} passed on by crewlog run"
            stopping = _stopping(reg, worker.sid, why)
            _tell(sh, reg, worker, stopping)
        if not from_terminal:
            try:
                os.kill(
                    worker.pid, number
                )  # our own child, not waited for: the pid is still its own
            except ProcessLookupError:
                continue


def _next_signal() -> tuple[int, bool]:
    wanted = (*_FORWARDED, signal.SIGCHLD)
    if not hasattr(signal, "sigwaitinfo"):
        return signal.sigwait(wanted), False
    try:
        found = signal.sigwaitinfo(wanted)
    except OSError as error:
        if error.errno != errno.EINTR:
            raise
        return signal.SIGWINCH, True
    return found.si_signo, found.si_code == _FROM_KERNEL


def _stopping(reg: Registry, sid: str, why: str) -> Callable[[int], object]:
    return lambda rev: reg.update(sid, state="stopping", reason=why, expect=rev)


COMMANDS: Final = {"exec": exec_, "run": run}
