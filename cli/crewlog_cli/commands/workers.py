"""Start and stop workers: run, exec, stop, beat, observe."""

import errno
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from typing import Final, NoReturn, ParamSpec, TypedDict, Unpack

import click

from crewlog import host, place
from crewlog.errors import CrewlogError, SpawnFailed
from crewlog.model.events import Event, Worker
from crewlog.model.steps import WorkerOptions
from crewlog.registry import Registry
from crewlog.workers.start import Child
from crewlog_cli import inputs, output, render, shell
from crewlog_cli.inputs import safe, tried
from crewlog_cli.shell import Shell, command

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


def _wished(options: _Options) -> WorkerOptions:
    spoken = options["heartbeat"]
    return {
        "sock": inputs.safe(options["sock"]),
        "version": inputs.safe(options["version"]),
        "labels": inputs.pairs([inputs.safe(row) for row in options["labels"]]),
        "ready": not options["starting"],
        "lease": options["lease"],
        "heartbeat_s": None if spoken is None else inputs.span_s(spoken),
    }


def _require_separated(sh: Shell, sid: str) -> None:
    """Refuse a command line in which the program's own words would be taken for ours."""
    if sh.separated and sid not in sh.own:
        message = "the worker's SID is missing: SID -- CMD…"
        raise click.UsageError(message)
    if not sh.separated:
        message = "put -- between crewlog's own words and the program: SID -- CMD…"
        raise click.UsageError(message)


def _replace(argv: Sequence[str]) -> int:
    """Become the program, or return the exit code of env(1): 127 not found, 126 not runnable."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; the program must not
        signal.signal(number, signal.SIG_DFL)
    if host.locale_is_coerced():
        os.environ.pop("LC_CTYPE", None)
    os.environ.update(place.inherited(None) or {})
    try:
        os.execvp(argv[0], list(argv))  # noqa: S606 (to become the program is the point)
    except (FileNotFoundError, NotADirectoryError):
        return shell.EXIT_NOT_FOUND
    except (OSError, ValueError):
        return shell.EXIT_NOT_RUN


@command("exec", examples="crewlog exec web-1 -- python -m http.server 8000")
@_options
def exec_(sh: Shell, *, sid: str, argv: tuple[str, ...], **options: Unpack[_Options]) -> None:
    """Register this process as SID, then become CMD: same pid, no code needed in the program."""
    _require_separated(sh, sid)
    wished = _wished(options)
    with sh.registry() as reg:
        tried(lambda: reg.register(sid, **wished))
        output.flush()
        code = _replace(argv)
        reg.exited(sid, code=code)
    _fail(sh, argv, code)


def _fail(sh: Shell, argv: Sequence[str], code: int) -> NoReturn:
    why = "not found" if code == shell.EXIT_NOT_FOUND else "cannot be run"
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
    _require_separated(sh, sid)
    wished = _wished(options)
    wished["owner"] = os.getpid()
    with sh.registry() as reg:
        with ExitStack() as turn:
            waits = reg.child(sid, argv, before=_prepare, after=_hold_signals, **wished)
            child = tried(lambda: turn.enter_context(waits))
            begun = child.begin()
        code = _wait(sh, child)
        if code is None:
            output.warn(f"crewlog: nobody tells how worker {sid} ended")
            raise SystemExit(shell.EXIT_BUG)
        _tell_end(sh, child, code)
        child.reap()  # until it is on record, whoever looks sees how it ended
    if not begun:
        _fail(sh, argv, code)
    raise SystemExit(code if code >= 0 else 128 - code)


def _prepare() -> None:
    output.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored by who started us, it would never come


def _hold_signals() -> None:
    """Take signals one by one from here on: one of now must reach the worker, or find none."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (*_heard(), signal.SIGCHLD))


def _tell_end(sh: Shell, child: Child, code: int) -> None:
    """Record how our child ended; whatever keeps us from it is told, and changes no exit code."""
    how = f"exited with {code}" if code >= 0 else f"was ended by signal {-code}"
    sid = child.worker.sid
    told = f"worker {sid} {how}"

    def late(error: CrewlogError) -> None:
        output.warn(f"crewlog: {told}; that is not recorded yet: {error}")
        # Ctrl-C ends the waiting, and nothing else any more
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))

    try:
        if not child.record(code, late=late):
            sh.note(f"crewlog: {sid} is no longer ours in the registry")
    except (CrewlogError, KeyboardInterrupt) as error:
        output.warn(f"crewlog: {told}; that is not recorded: {error or 'interrupted'}")
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def _wait(sh: Shell, child: Child) -> int | None:
    """Wait for the child, passing signals on; a request to end is recorded before it is passed.

    Returns its exit code, or minus the signal that ended it; None where nobody tells.
    """
    while True:
        number, from_terminal = _next_signal()
        if number == signal.SIGCHLD:
            end = child.ended()
            if end is not None:
                return end.code
            _reap_orphans(child)
            continue
        if number in _ENDING:
            try:
                child.asked_to_stop(f"{signal.Signals(number).name} passed on by crewlog run")
            except CrewlogError as error:
                sh.note(f"crewlog: {error}")
        if not from_terminal:
            child.send(number)


def _heard() -> tuple[int, ...]:
    """Return the signals to pass on: not those that whoever started us had us ignore (nohup)."""
    return tuple(n for n in _FORWARDED if signal.getsignal(n) is not signal.SIG_IGN)


def _reap_orphans(child: Child) -> None:
    """Reap what the kernel gave to us as the first process of a container, but not our child."""
    while os.getpid() == 1:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None or found.si_pid == child.worker.pid:
                return
            os.waitpid(found.si_pid, os.WNOHANG)
        except ChildProcessError:
            return


def _next_signal() -> tuple[int, bool]:
    wanted = (*_heard(), signal.SIGCHLD)
    if not hasattr(signal, "sigwaitinfo"):
        return signal.sigwait(wanted), False
    try:
        found = signal.sigwaitinfo(wanted)
    except OSError as error:
        if error.errno != errno.EINTR:
            raise
        return signal.SIGWINCH, True
    return found.si_signo, found.si_code == _FROM_KERNEL


_AT_ONCE: Final = 32


def _signal(ctx: click.Context, param: click.Parameter, value: str) -> signal.Signals:
    """Read a signal by its name, with or without SIG, or by its number."""
    word = value.upper()
    try:
        if word.isdigit():
            return signal.Signals(int(word))
        return signal.Signals["SIG" + word.removeprefix("SIG")]
    except (KeyError, ValueError) as error:
        message = f"{value!r} is no signal: TERM, SIGINT, 15"
        raise click.BadParameter(message, ctx, param) from error


@command(
    "stop",
    examples="""crewlog stop web-1 --reason deploy
crewlog stop web-1 web-2 --grace 30s
crewlog stop --all --yes --reason 'the host goes down'""",
)
@click.argument("sids", metavar="SID…", nargs=-1, shell_complete=shell.complete_sid)
@click.option("--grace", default="10s", show_default=True, metavar="SPAN",
              help="Kill it after this long.")  # fmt: skip
@click.option(
    "--signal", "number", default="TERM", show_default=True, help="What asks it to end.",
    callback=_signal, metavar="NAME",
)  # fmt: skip
@click.option("--reason", default="crewlog stop", show_default=True, help="Why, for the history.")
@click.option("--all", "all_", is_flag=True, help="Every worker that has not ended.")
@click.option("--yes", is_flag=True, help="Do not ask before --all.")
@click.option("--dry-run", is_flag=True, help="Only say whom it would signal.")
def stop_(
    sh: Shell,
    *,
    sids: tuple[str, ...],
    grace: str,
    number: signal.Signals,
    reason: str,
    all_: bool,
    yes: bool,
    dry_run: bool,
) -> None:
    """End workers: a signal, after --grace SIGKILL, and how each ended goes on record.

    Only the recorded process is ever signalled; the request is durable before the signal is sent.
    """
    if all_ == bool(sids):
        message = "name workers, or --all"
        raise click.UsageError(message)
    grace_s = inputs.span_s(grace)
    reg = sh.existing()
    workers = reg.workers() if all_ else [render.known(reg, sid) for sid in dict.fromkeys(sids)]
    if dry_run:
        _print_targets(sh, reg, workers)
        return
    if all_ and not yes:
        count = sum(_foreseen(reg, worker)[0] == "signal" for worker in workers)
        what = f"--all would stop {count} workers"
        if count and not shell.confirmed(f"Stop {count} workers?", what):
            sh.note("nobody was stopped")
            raise SystemExit(shell.EXIT_NO)

    def end(worker: Worker) -> Event | CrewlogError:
        try:
            return reg.stop(worker.sid, grace_s=grace_s, reason=safe(reason), signal=number)
        except CrewlogError as error:
            return error

    _print_ends(sh, reg, tried(lambda: _at_once(end, workers)))


def _at_once(
    end: Callable[[Worker], Event | CrewlogError], workers: Sequence[Worker]
) -> dict[str, Event | CrewlogError]:
    """End workers in threads that nobody joins: Ctrl-C ends the waiting, and us, at once."""
    left, ended = deque(workers), SimpleQueue[tuple[str, Event | CrewlogError | Exception]]()

    def work() -> None:
        with suppress(IndexError):  # none is left
            while True:
                worker = left.popleft()
                try:
                    ended.put((worker.sid, end(worker)))
                except Exception as error:  # noqa: BLE001 (raised by who waits)
                    ended.put((worker.sid, error))

    for number, _ in enumerate(workers[:_AT_ONCE]):
        try:
            host.start_thread(work, name="crewlog-stop")
        except OSError:  # no more threads are to be had: fewer will do, or none
            if not number:
                work()
            break
    found: dict[str, Event | CrewlogError] = {}
    for _ in workers:
        sid, told = ended.get()
        if isinstance(told, Exception) and not isinstance(told, CrewlogError):
            raise told
        found[sid] = told
    return {worker.sid: found[worker.sid] for worker in workers}


def _print_targets(sh: Shell, reg: Registry, workers: list[Worker]) -> None:
    rows = [
        (worker, judged, *_foreseen(reg, worker))
        for worker, judged in zip(workers, reg.judge(workers), strict=True)
    ]
    if sh.json:
        told = [
            {"sid": w.sid, "pid": w.pid, "liveness": j.verdict.value, "cause": j.cause,
             "would": would, "why": why}
            for w, j, would, why in rows
        ]  # fmt: skip
        sh.document({"seq": reg.last_seq, "dry_run": True, "workers": told})
        return
    sh.table(
        ["sid", "pid", "state", "liveness", "would"],
        [
            [w.sid, str(w.pid), w.state.value, render.liveness_text(j),
             f"{would}: {why}" if why else would]
            for w, j, would, why in rows
        ],
    )  # fmt: skip


def _foreseen(reg: Registry, worker: Worker) -> tuple[str, str]:
    """Say what stop would do with a worker, and why it would refuse to."""
    try:
        would = reg.foresee_stop(worker)
    except CrewlogError as error:
        return "refuse", error.why
    return would, "it has ended" if would == "nothing" else ""


def _print_ends(sh: Shell, reg: Registry, ended: dict[str, Event | CrewlogError]) -> None:
    events = [event for event in ended.values() if isinstance(event, Event)]
    errors = {sid: error for sid, error in ended.items() if isinstance(error, CrewlogError)}
    if sh.json:
        failed = [
            {"sid": sid, "code": error.code, "message": str(error)} for sid, error in errors.items()
        ]
        stopped = [render.event_json(event) for event in events]
        sh.document({"seq": reg.last_seq, "stopped": stopped, "failed": failed})
    else:
        for event in events:
            render.print_line(sh, event)
    for error in list(errors.values())[:-1]:
        if not sh.json:  # there, the document names them all
            shell.complain_of(sh, error)
    if errors:
        shell.fail(sh, list(errors.values())[-1])


@command("beat", examples="while work; do crewlog beat web-1; done")
@click.argument("sid", shell_complete=shell.complete_sid)
def beat(sh: Shell, *, sid: str) -> None:
    """Say that SID is well; nothing is added to the log. For a worker with --heartbeat."""
    reg = sh.existing()
    render.known(reg, sid)
    reg.beat(sid)
    if sh.json:
        sh.document({"seq": reg.last_seq, "sid": sid})


@command("observe", examples="crewlog observe web-1 &\ncrewlog observe web-1 --timeout 1h")
@click.argument("sid", shell_complete=shell.complete_sid)
@click.option("--timeout", metavar="SPAN", help="Give up after this long (exit code 124).")
def observe(sh: Shell, *, sid: str, timeout: str | None) -> None:
    """Wait for the end of a worker that need not be our child, and record how it ended."""
    wait_s = None if timeout is None else inputs.span_s(timeout)
    reg = sh.existing()
    render.known(reg, sid)
    event = reg.observe(sid, timeout_s=wait_s)
    if sh.json:
        sh.document({"sid": sid, **render.event_json(event)})
    else:
        render.print_line(sh, event)


COMMANDS: Final[dict[str, click.Command]] = {
    "exec": exec_,
    "run": run,
    "stop": stop_,
    "beat": beat,
    "observe": observe,
}
