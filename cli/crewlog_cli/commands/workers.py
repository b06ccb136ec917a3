"""Start and stop workers: run, exec, start, stop, beat, observe."""

import errno
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from queue import SimpleQueue
from shutil import which
from typing import Final, NoReturn, ParamSpec, TypedDict, Unpack

import click

from crewlog import Flag, host, place
from crewlog.errors import CrewlogError, SpawnFailed, WorkerEnded
from crewlog.model import events
from crewlog.model.choice import LabelTest
from crewlog.model.events import Event, Status, Worker, WorkerState
from crewlog.model.steps import WorkerOptions
from crewlog.registry import Registry
from crewlog.workers import output as logs
from crewlog.workers.judge import STATUSES, BeatStatus
from crewlog.workers.start import Child, LogOptions
from crewlog_cli import choose, inputs, output, render, shell
from crewlog_cli.choose import Chosen
from crewlog_cli.inputs import safe, tried
from crewlog_cli.shell import Shell, command
from crewlog_cli.story import Story

P = ParamSpec("P")

# Passed on to the worker; of these, all but the last three ask it to end.
_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_FORWARDED: Final = (*_ENDING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
_STORE_LOOK_S: Final = 1.0
_FROM_KERNEL: Final = 0x80  # SI_KERNEL: the terminal sent it to the whole group already


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


def _signals(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[signal.Signals, ...]:
    return tuple(_signal(ctx, param, value) for value in values)


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
        click.option("--ok", "ok", metavar="CODES", help="Exit codes that are no crash: 0,143."),
        click.option(
            "--ends-on",
            multiple=True,
            metavar="SIGNAL",
            callback=_signals,
            help="A signal that is meant to end it, and no crash; repeatable.",
        ),
        click.option("--ends-with-owner", is_flag=True, help="Stop it once its owner is dead."),
        click.option(
            "--replace",
            is_flag=True,
            help="End the same program first, left by a supervisor that is dead.",
        ),
        click.option(
            "--owner", type=click.IntRange(min=1), metavar="PID", help="Who answers for it."
        ),
        click.option("--record-argv", is_flag=True, help="Put CMD on record; it may hold secrets."),
        click.option("--log", metavar="FILE", help="Append its output to FILE (crewlog logs)."),
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
    ok: str | None
    ends_on: tuple[signal.Signals, ...]
    replace: bool
    ends_with_owner: bool
    owner: int | None
    record_argv: bool
    log: str | None


def _ends(words: str | None, numbers: Sequence[signal.Signals]) -> tuple[int, ...]:
    """Read exit codes given as 0,143, and signals, which are 128 + N."""
    try:
        codes = [int(word) for word in (words or "").split(",") if word.strip()]
        return (*codes, *(128 + number for number in numbers))
    except ValueError as error:
        message = f"--ok takes exit codes: 0,143, not {words!r}"
        raise click.UsageError(message) from error


def _require_free(reg: Registry, sid: str, argv: Sequence[str]) -> None:
    """End what holds a sid, if it is this very program and its supervisor is proven dead.

    A supervisor that is killed leaves its program; the next one would find the sid in use for ever.
    """
    holder = reg.get(sid)
    if holder is None or holder.final:
        return
    liveness = reg.judge([holder])[0]
    path = which(argv[0])
    same = path is not None and reg.runs(holder, path)
    if liveness.alive and Flag.ORPHANED in liveness.flags and same:
        reg.stop(sid, reason="replaced: its supervisor is dead", tree=True)


def _wished(options: _Options) -> WorkerOptions:
    spoken = options["heartbeat"]
    return {
        "sock": inputs.safe(options["sock"]),
        "version": inputs.safe(options["version"]),
        "labels": inputs.pairs([inputs.safe(row) for row in options["labels"]]),
        "ready": not options["starting"],
        "lease": options["lease"],
        "heartbeat_s": None if spoken is None else inputs.span_s(spoken),
        "ok_codes": _ends(options["ok"], options["ends_on"]),
        "ends_with": "owner" if options["ends_with_owner"] else None,
        "owner": options["owner"],
        "record_argv": options["record_argv"],
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
    if wished["ends_with"] and wished["owner"] is None:
        wished["owner"] = os.getppid()
    if wished["owner"] is None and options["replace"]:
        wished["owner"] = os.getppid()  # by whose death the next one may replace this one
    with sh.registry() as reg, logs.opened(options["log"], bytes_max=None) as log:
        if options["replace"]:
            _require_free(reg, sid, argv)
        tried(lambda: reg.become(sid, log, **wished))
        output.flush()
        with output.redirected(None if log is None else log.fd):
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
    if wished["owner"] is None:
        wished["owner"] = os.getpid()
    with sh.registry() as reg:
        if options["replace"]:
            _require_free(reg, sid, argv)
        with ExitStack() as turn:
            into: LogOptions = {"log": options["log"]}
            waits = reg.child(sid, argv, before=_prepare, after=_hold_signals, log=into, **wished)
            child = tried(lambda: turn.enter_context(waits))
            begun = child.begin()
        status = _wait(sh, child)
        if status is None:
            output.warn(f"crewlog: nobody tells how worker {sid} ended")
            raise SystemExit(shell.EXIT_BUG)
        _tell_end(sh, child, status)
        child.reap()  # until it is on record, whoever looks sees how it ended
    code = status.code if status.signal is None else 128 + status.signal
    if not begun:
        _fail(sh, argv, code or 0)
    raise SystemExit(code)


def _prepare() -> None:
    output.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored by who started us, it would never come


def _hold_signals() -> None:
    """Take signals one by one from here on: one of now must reach the worker, or find none."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (*_heard(), signal.SIGCHLD))


def _tell_end(sh: Shell, child: Child, status: Status) -> None:
    """Record how our child ended; whatever keeps us from it is told, and changes no exit code."""
    killed = status.signal is not None
    how = f"was ended by signal {status.signal}" if killed else f"exited with {status.code}"
    sid = child.worker.sid
    end = f"worker {sid} {how}"

    def late(error: CrewlogError) -> None:
        output.warn(f"crewlog: {end}; that is not recorded yet: {error}")
        # Ctrl-C ends the waiting, and nothing else any more
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))

    try:
        if not child.record(status, late=late):
            sh.note(f"crewlog: {sid} is no longer ours in the registry")
    except (CrewlogError, KeyboardInterrupt) as error:
        output.warn(f"crewlog: {end}; that is not recorded: {error or 'interrupted'}")
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def _wait(sh: Shell, child: Child) -> Status | None:
    """Wait for the child, passing signals on; a request to end is recorded before it is passed.

    Returns how it ended, None where nobody tells.
    """
    while True:
        number, from_terminal = _next_signal()
        if number == signal.SIGCHLD:
            end = child.ended()
            if end is not None:
                return end.status
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
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == child.worker.pid:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)
        except ChildProcessError:
            return


def _next_signal() -> tuple[int, bool]:
    wanted = (*_heard(), signal.SIGCHLD)
    if not hasattr(signal, "sigwaitinfo"):
        return signal.sigwait(wanted), False
    try:
        info = signal.sigwaitinfo(wanted)
    except OSError as error:
        if error.errno != errno.EINTR:
            raise
        return signal.SIGWINCH, True
    return info.si_signo, info.si_code == _FROM_KERNEL


_LOOK_S: Final = 0.02


@command(
    "start",
    examples="""crewlog start web-1 --log web.log -- python -m http.server 8000
crewlog start api --ready-when /run/api.sock -- ./api
0 3 * * *  crewlog start -q backup --log backup.log -- ./backup  # in a crontab""",
)
@_options
@click.option("--ready-when", metavar="SOCK", help="Return once it listens on this Unix socket.")
@click.option("--timeout", default="30s", show_default=True, metavar="SPAN",
              help="Give up waiting after so long (exit code 124).")  # fmt: skip
@click.option("--log-max", type=click.IntRange(min=1), metavar="BYTES",
              help="Set a longer log aside first, as FILE.1.")  # fmt: skip
def start(
    sh: Shell,
    *,
    sid: str,
    argv: tuple[str, ...],
    ready_when: str | None,
    timeout: str,
    log_max: int | None,
    **options: Unpack[_Options],
) -> None:
    """Start CMD as worker SID and leave it running; print its pid. If SID lives, that one's.

    It has a session of its own, no input, and its output goes to --log, else nowhere. How it ends
    is told by `crewlog observe --all`, with its code on Linux >= 6.15; without an observer the next
    `crewlog compact` finds that it has ended.
    """
    _require_separated(sh, sid)
    wished = _wished(options)
    wait_s = inputs.wait_s(timeout)
    if ready_when is not None:
        wished |= {"sock": inputs.safe(os.path.abspath(ready_when)), "ready": False}
    deadline = time.monotonic() + wait_s
    with sh.registry() as reg:
        if options["replace"]:
            _require_free(reg, sid, argv)
        before = reg.get(sid)
        worker = tried(
            lambda: reg.ensure(
                sid, argv, timeout_s=wait_s, log=options["log"], log_bytes_max=log_max, **wished
            )
        )
        if before is not None and before.registered_seq == worker.registered_seq:
            sh.note(f"{sid} lives already")
        while ready_when is not None and not _listens(reg, worker):
            if time.monotonic() >= deadline:
                sh.note(f"{sid} runs, and does not listen on {ready_when} yet")
                raise SystemExit(shell.EXIT_TIMEOUT)
            time.sleep(_LOOK_S)
        if sh.json:
            sh.document({"seq": worker.rev, "worker": render.worker_json(worker, None)})
        else:
            sh.line(str(worker.pid))


def _listens(reg: Registry, worker: Worker) -> bool:
    """Say whether a worker takes connections, and record that it is ready then.

    Raises: WorkerEnded.
    """
    now = reg.get(worker.sid)
    liveness = None if now is None else reg.liveness(worker.sid)
    same = now is not None and now.registered_seq == worker.registered_seq
    if now is None or not same or liveness is None or liveness.dead:
        raise WorkerEnded(worker.sid, state="ended" if now is None else now.state.value,
                          wanted="ready")  # fmt: skip
    if liveness.evidence.sock != "answers":
        return False
    if now.state == WorkerState.STARTING:
        reg.update(worker.sid, state="ready")
    return True


_AT_ONCE: Final = 32


@command(
    "stop",
    examples="""crewlog stop web-1 --reason deploy
crewlog stop 'web-*' -l role=web --grace 30s
crewlog stop --all --yes --reason 'the host goes down'""",
)
@choose.with_names
@click.option("--grace", default="10s", show_default=True, metavar="SPAN",
              help="Kill it after this long.")  # fmt: skip
@click.option(
    "--signal", "number", default="TERM", show_default=True, help="What asks it to end.",
    callback=_signal, metavar="NAME",
)  # fmt: skip
@click.option("--reason", default="crewlog stop", show_default=True, help="Why, for the history.")
@click.option("--all", "all_", is_flag=True, help="Every worker that has not ended.")
@click.option("--orphaned", is_flag=True, help="Those whose owner is proven dead.")
@click.option("--older", metavar="SPAN", help="Those that were started so long ago, or longer.")
@click.option("--tree", is_flag=True, help="End those who belong to it, too: its session or group.")
@click.option("--yes", is_flag=True, help="Do not ask where more are meant than were named.")
@click.option("--dry-run", is_flag=True, help="Only say whom it would signal.")
def stop_(
    sh: Shell,
    *,
    names: tuple[str, ...],
    labels: tuple[LabelTest, ...],
    grace: str,
    number: signal.Signals,
    reason: str,
    all_: bool,
    orphaned: bool,
    older: str | None,
    tree: bool,
    yes: bool,
    dry_run: bool,
) -> None:
    """End workers: a signal, after --grace SIGKILL, and how each ended goes on record.

    Only the recorded process is ever signalled, with --tree also those that are shown to belong to
    it; the request is durable before the signal is sent.
    """
    meant = Chosen(names, labels)
    chosen = all_ or orphaned or older is not None or not meant.is_exact
    if (all_ and bool(meant)) or not (all_ or orphaned or older is not None or meant):
        message = "name workers, or choose them: 'web-*', -l, --all, --orphaned, --older SPAN"
        raise click.UsageError(message)
    grace_s = inputs.wait_s(grace)
    reg = sh.existing()
    if chosen:
        span = None if older is None else timedelta(seconds=inputs.span_s(older))
        workers = _chosen(reg, orphaned=orphaned, older=span, tree=tree)
        if meant:
            meant.required(reg, reg.workers(all=True))
            workers = meant.of(workers)
    else:
        workers = meant.required(reg, reg.workers(all=True))
    if dry_run:
        _print_targets(sh, reg, workers, tree=tree)
        return
    if chosen and not yes:
        _confirm(sh, reg, workers, tree=tree)

    def end(worker: Worker) -> Event | CrewlogError:
        try:
            return reg.stop(
                worker.sid, grace_s=grace_s, reason=safe(reason), signal=number, tree=tree
            )
        except CrewlogError as error:
            return error

    ended = tried(lambda: _at_once(end, workers))
    over = [now for worker in workers if (now := reg.get(worker.sid)) is not None]
    for sid, pids in () if tree else reg.trees(over).items():
        numbers = ", ".join(map(str, pids))
        sh.note(f"{sid} has left processes running: {numbers} (crewlog stop --tree {sid})")
    _print_ends(sh, reg, ended)


def _confirm(sh: Shell, reg: Registry, workers: list[Worker], *, tree: bool) -> None:
    """Ask a person, who sees whom it would stop; 1 where the answer is no."""
    count = len(workers) if tree else sum(_foreseen(reg, w)[0] == "signal" for w in workers)
    if count and sys.stdin is not None and sys.stdin.isatty():
        _print_targets(sh, reg, workers, tree=tree)
    what = f"that would stop {count} workers"
    if count and not shell.confirmed(f"Stop {count} workers?", what):
        sh.note("nobody was stopped")
        raise SystemExit(shell.EXIT_NO)


def _chosen(reg: Registry, *, orphaned: bool, older: timedelta | None, tree: bool) -> list[Worker]:
    """Return the workers that are chosen by what they are; with `tree` what ended ones left, too.

    Orphaned is one whose owner is proven dead, by the same proof as a worker's own death.
    """
    workers = reg.workers(all=tree)
    left = reg.trees([w for w in workers if w.final]) if tree else {}
    workers = [w for w in workers if not w.final or w.sid in left]
    if older is not None:
        before = datetime.now(UTC) - older
        workers = [w for w in workers if w.created_at <= before]
    if not orphaned:
        return [w for w in workers if not w.final] if not tree else workers
    pairs = zip(workers, reg.judge(workers), strict=True)
    return [w for w, j in pairs if w.final or Flag.ORPHANED in j.flags]


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
    results: dict[str, Event | CrewlogError] = {}
    for _ in workers:
        sid, result = ended.get()
        if isinstance(result, Exception) and not isinstance(result, CrewlogError):
            raise result
        results[sid] = result
    return {worker.sid: results[worker.sid] for worker in workers}


def _print_targets(sh: Shell, reg: Registry, workers: list[Worker], *, tree: bool) -> None:
    left = reg.trees(workers) if tree else {}
    rows = [
        (worker, judged, *_foreseen(reg, worker))
        for worker, judged in zip(workers, reg.judge(workers), strict=True)
    ]
    if sh.json:
        targets = [
            {"sid": w.sid, "pid": w.pid, "liveness": j.verdict.value, "cause": j.cause,
             "would": would, "why": why, "tree": list(left.get(w.sid, ()))}
            for w, j, would, why in rows
        ]  # fmt: skip
        sh.document({"seq": reg.last_seq, "dry_run": True, "workers": targets})
        return
    sh.table(
        ["sid", "pid", "state", "liveness", "would"],
        [
            [w.sid, str(w.pid), w.state.value, render.liveness_text(j),
             (f"{would}: {why}" if why else would)
             + (f", and its tree: {', '.join(map(str, left[w.sid]))}" if w.sid in left else "")]
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
        story = Story(sh)
        for event in events:
            story.line(event)
    for error in list(errors.values())[:-1]:
        if not sh.json:  # there, the document names them all
            shell.complain_of(sh, error)
    if errors:
        shell.fail(sh, list(errors.values())[-1])


@command(
    "beat",
    examples="""while work; do crewlog beat web-1; done
crewlog beat agent-3 --status waiting --note 'for approval'""",
)
@click.argument("sid", shell_complete=shell.complete_sid)
@click.option("--status", type=click.Choice(STATUSES), help="What it does.")
@click.option("--note", metavar="TEXT", help="A few words beside that.")
def beat(sh: Shell, *, sid: str, status: BeatStatus | None, note: str | None) -> None:
    """Say that SID is well, and what it does; nothing is added to the log.

    For a worker with --lease or --heartbeat.
    """
    reg = sh.existing()
    render.known(reg, sid)
    tried(lambda: reg.beat(sid, status=status, note=None if note is None else safe(note)))
    if sh.json:
        sh.document({"seq": reg.last_seq, "sid": sid})


@command(
    "observe",
    examples="""crewlog observe --all        # as a service: crewlog schedule systemd-user
crewlog observe web-1 --timeout 1h""",
)
@click.argument("sid", required=False, shell_complete=shell.complete_sid)
@click.option("--all", "all_", is_flag=True, help="Every worker, from now on, until it is ended.")
@click.option("--timeout", metavar="SPAN", help="Give up after this long (exit code 124).")
def observe(sh: Shell, *, sid: str | None, all_: bool, timeout: str | None) -> None:
    """Wait for the end of a worker that need not be our child, and record how it ended.

    With --all every end is recorded within milliseconds, whoever started the worker. Of several
    one leads, the others stand by; each end is recorded once.
    """
    if all_ == (sid is not None):
        message = "name a worker, or --all"
        raise click.UsageError(message)
    wait_s = None if timeout is None else inputs.wait_s(timeout)
    if sid is None:
        _observe_all(sh, wait_s)
        return
    reg = sh.existing()
    render.known(reg, sid)
    event = reg.observe(sid, timeout_s=wait_s)
    if sh.json:
        sh.document({"sid": sid, **render.event_json(event)})
    else:
        Story(sh).line(event)


def _observe_all(sh: Shell, wait_s: float | None) -> None:
    """Record ends until we are ended, or time is up, and print each of them."""
    deadline = None if wait_s is None else time.monotonic() + wait_s
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    reg = sh.registry()
    before = reg.last_seq  # what the observer records at once is printed, too
    if not reg.exists:
        sh.note(f"crewlog: there is no registry in {reg.where} yet; waiting")
    with reg.observe_all():
        while not reg.exists and not ended.wait(_STORE_LOOK_S):
            if deadline is not None and time.monotonic() >= deadline:
                raise SystemExit(shell.EXIT_TIMEOUT)
        if ended.is_set():
            return
        sh.note(f"crewlog: observing {reg.where}")
        story = Story(sh)
        with reg.watch(after=before, types=events.ENDING) as items:
            while not ended.is_set():
                left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                item = items.next(_STORE_LOOK_S if left_s is None else min(left_s, _STORE_LOOK_S))
                if item is not None and item.kind == "change":
                    if sh.json:
                        sh.stream({"kind": "change", **render.event_json(item.event)})
                    else:
                        story.line(item.event)
                elif left_s == 0:
                    raise SystemExit(shell.EXIT_TIMEOUT)


COMMANDS: Final[dict[str, click.Command]] = {
    "exec": exec_,
    "run": run,
    "start": start,
    "stop": stop_,
    "beat": beat,
    "observe": observe,
}
