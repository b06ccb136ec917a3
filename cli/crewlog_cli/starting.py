"""Start processes as workers: exec becomes the worker, run stays as its parent.

Both register the pid before the program begins, so a kill at any moment leaves no living worker
that is not listed.
"""

import errno
import functools
import os
import signal
from collections.abc import Callable, Sequence
from typing import Final, NoReturn, ParamSpec, TypedDict, Unpack

import click

from crewlog import changes, judging, launch, registering, starting
from crewlog.errors import CrewlogError, InvalidTransition, SpawnFailed, StaleRevision
from crewlog.events import Worker
from crewlog.launch import Launch
from crewlog.registering import Wish
from crewlog.registry import Registry
from crewlog.store import Turn
from crewlog_cli import shell, words
from crewlog_cli.shell import Shell, command
from crewlog_cli.words import safe, tried

P = ParamSpec("P")

# Passed on to the worker; of these, all but the last three ask it to end.
_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_FORWARDED: Final = (*_ENDING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
_FROM_KERNEL: Final = 0x80  # SI_KERNEL: the terminal sent it to the whole group already


def _options(function: Callable[P, None]) -> Callable[P, None]:
    for option in (
        click.argument("argv", metavar="-- CMD…", nargs=-1, type=click.UNPROCESSED, required=True),
        click.argument("sid"),  # a new one: there is nothing to complete
        click.option("--starting", is_flag=True, help="It will say itself when it is ready."),
        click.option("-l", "--label", "labels", multiple=True, metavar="K=V", help="A label."),
        click.option("--version", default="", help="Its version."),
        click.option("--sock", default="", help="Where it will listen."),
        click.option(
            "--lease",
            is_flag=True,
            help="Prove its life to other namespaces and hosts.",
        ),
        click.option("--heartbeat", metavar="SPAN", help="Stalled without a beat for so long."),
    ):
        function = option(function)
    return function


class _Options(TypedDict):
    """What the options say of the worker, as click gives them."""

    sock: str
    version: str
    labels: tuple[str, ...]
    starting: bool
    lease: bool
    heartbeat: str | None


def _wish(options: _Options) -> Wish:
    spoken = options["heartbeat"]
    heartbeat_s = None if spoken is None else words.span_s(spoken)
    wish = Wish(
        sock=safe(options["sock"]),
        version=safe(options["version"]),
        labels=words.pairs([safe(row) for row in options["labels"]]),
        ready=not options["starting"],
        lease=options["lease"],
        heartbeat_s=heartbeat_s,
    )
    tried(lambda: registering.check(wish))
    return wish


def _require_separated(sh: Shell) -> None:
    """Refuse a command line in which the program's own options would be taken for ours."""
    if not sh.separated:
        message = "put -- between crewlog's own words and the program: SID -- CMD…"
        raise click.UsageError(message)


def _replace(argv: Sequence[str]) -> int:
    """Become the program, or return the exit code of env(1): 127 not found, 126 not runnable."""
    try:
        os.execvp(argv[0], list(argv))  # noqa: S606 (to become the program is the point)
    except (FileNotFoundError, NotADirectoryError):
        return launch.NOT_FOUND
    except (OSError, ValueError):
        return launch.NOT_RUN


@command("exec", examples="crewlog exec web-1 -- python -m http.server 8000")
@_options
def exec_(sh: Shell, *, sid: str, argv: tuple[str, ...], **options: Unpack[_Options]) -> None:
    """Register this process as SID, then become CMD: same pid, no code needed in the program."""
    _require_separated(sh)
    wish = _wish(options)
    with sh.registry() as reg:
        tried(lambda: registering.register(reg.session, sid, os.getpid(), wish))
        shell.flush()
        code = _replace(argv)
        reg.exited(sid, code=code)
    _fail(sh, argv, code)


def _fail(sh: Shell, argv: Sequence[str], code: int) -> NoReturn:
    why = "not found" if code == launch.NOT_FOUND else "cannot be run"
    shell.complain(
        sh,
        code=SpawnFailed.code,
        exit_code=code,
        what=f"{argv[0]!r}: {why}",
        where="",
        hint="Check the name, PATH and its mode",
    )
    raise SystemExit(code)


@command(
    "run",
    examples="""crewlog run web-1 -- python -m http.server 8000
crewlog run job-7 -l queue=mail -- ./worker --once; echo $?""",
)
@_options
def run(sh: Shell, *, sid: str, argv: tuple[str, ...], **options: Unpack[_Options]) -> None:
    """Run CMD as worker SID, pass signals on, record how it ends, and end the same way.

    The exit code is the program's, or 128 plus the signal that ended it. Where its end cannot be
    recorded, since the registry is locked or no server answers, that is tried for ten minutes;
    Ctrl-C ends the trying.
    """
    _require_separated(sh)
    wish = _wish(options)._replace(owner=os.getpid())
    with sh.registry() as reg:
        session = reg.session
        with tried(lambda: starting.turn(session, sid)) as turn:
            waiting = functools.partial(_waiting, argv, turn)
            worker, started = tried(lambda: starting.entered(session, sid, wish, waiting))
            begun = _begin(started)
        code = _wait(sh, reg, worker, started)
        if code is None:
            shell.warn(f"crewlog: nobody tells how worker {sid} ended")
            raise SystemExit(shell.EXIT_BUG)
        _tell_end(sh, reg, worker, code)
        started.reap()  # until it is on record, whoever looks sees how it ended
    if not begun:
        _fail(sh, argv, code)
    raise SystemExit(code if code >= 0 else 128 - code)


def _waiting(argv: Sequence[str], turn: Turn, keep: Sequence[int]) -> Launch:
    shell.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored by who started us, it would never come
    started = Launch(argv, stdin=None, own_session=False, keep=keep, turn=turn.share())
    # Before the registration: a signal of now must reach the worker, or find none.
    signal.pthread_sigmask(signal.SIG_BLOCK, (*_FORWARDED, signal.SIGCHLD))
    return started


def _begin(started: Launch) -> bool:
    try:
        started.go()
    except SpawnFailed:  # told by its exit code, once that is recorded
        return False
    return True


def _tell_end(sh: Shell, reg: Registry, worker: Worker, code: int) -> None:
    """Record how our child ended; whatever keeps us from it is told, and changes no exit code."""
    how = f"exited with {code}" if code >= 0 else f"was ended by signal {-code}"
    told = f"worker {worker.sid} {how}"

    def late(error: CrewlogError) -> None:
        shell.warn(f"crewlog: {told}; that is not recorded yet: {error}")
        # Ctrl-C ends the waiting, and nothing else any more
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))

    try:
        step = judging.exit_of(reg.session.author(), worker, code)
        if not judging.record_end(reg.session.append, step, late=late):
            sh.note(f"crewlog: {worker.sid} is no longer ours in the registry")
    except (CrewlogError, KeyboardInterrupt) as error:
        shell.warn(f"crewlog: {told}; that is not recorded: {error or 'interrupted'}")
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def _tell_stopping(sh: Shell, reg: Registry, worker: Worker, why: str) -> None:
    """Record that somebody asked our child to end, as long as the sid is still its own."""
    step = changes.updated(
        reg.session.author(), worker.sid, state="stopping", reason=why, of=worker.registered_seq
    )
    try:
        reg.session.append([step])
    except (StaleRevision, InvalidTransition):  # another's by now, or ended
        return
    except CrewlogError as error:
        sh.note(f"crewlog: {error}")


def _wait(sh: Shell, reg: Registry, worker: Worker, started: Launch) -> int | None:
    """Wait for the child, passing signals on; a request to end is recorded before it is passed.

    Returns its exit code, or minus the signal that ended it; None where nobody tells.
    """
    while True:
        number, from_terminal = _next_signal()
        if number == signal.SIGCHLD:
            end = started.ended(wait=False)
            if end is not None:
                return end.code
            continue
        if number in _ENDING:
            why = f"{signal.Signals(number).name} passed on by crewlog run"
            _tell_stopping(sh, reg, worker, why)
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


COMMANDS: Final = {"exec": exec_, "run": run}
