"""End workers, hear their beats, see them end: stop, beat, observe. Only stop sends signals."""

import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Final

import click

from crewlog import ending, threads
from crewlog.errors import CrewlogError
from crewlog.events import Event, Worker
from crewlog.process import Process
from crewlog.registry import Registry
from crewlog_cli import facts, shell, words
from crewlog_cli.shell import Shell, command
from crewlog_cli.words import safe, tried

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
@click.option("--all", "all_", is_flag=True, help="Every worker that is not ended.")
@click.option("--yes", is_flag=True, help="Do not ask before --all.")
@click.option("--dry-run", is_flag=True, help="Only say whom it would signal.")
def stop(
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
    grace_s = words.span_s(grace)
    reg = sh.existing()
    workers = reg.workers() if all_ else [facts.known(reg, sid) for sid in dict.fromkeys(sids)]
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
            threads.start(work, name="crewlog-stop")
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
            [w.sid, str(w.pid), w.state.value, facts.liveness_text(j),
             f"{would}: {why}" if why else would]
            for w, j, would, why in rows
        ],
    )  # fmt: skip


def _foreseen(reg: Registry, worker: Worker) -> tuple[str, str]:
    """Say what stop would do with a worker, and why it would refuse to."""
    try:
        held = ending.hold_to_stop(reg.session, worker)
    except CrewlogError as error:
        return "refuse", error.why
    if isinstance(held, Process):
        held.close()
        return "signal", ""
    return ("nothing", "it has ended") if worker.final else ("record its end", "")


def _print_ends(sh: Shell, reg: Registry, ended: dict[str, Event | CrewlogError]) -> None:
    events = [event for event in ended.values() if isinstance(event, Event)]
    errors = {sid: error for sid, error in ended.items() if isinstance(error, CrewlogError)}
    if sh.json:
        failed = [
            {"sid": sid, "code": error.code, "message": str(error)} for sid, error in errors.items()
        ]
        stopped = [facts.event_json(event) for event in events]
        sh.document({"seq": reg.last_seq, "stopped": stopped, "failed": failed})
    else:
        for event in events:
            facts.print_line(sh, event)
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
    facts.known(reg, sid)
    reg.beat(sid)
    if sh.json:
        sh.document({"seq": reg.last_seq, "sid": sid})


@command("observe", examples="crewlog observe web-1 &\ncrewlog observe web-1 --timeout 1h")
@click.argument("sid", shell_complete=shell.complete_sid)
@click.option("--timeout", metavar="SPAN", help="Give up after this long (exit code 124).")
def observe(sh: Shell, *, sid: str, timeout: str | None) -> None:
    """Wait for the end of a worker that need not be our child, and record how it ended."""
    wait_s = None if timeout is None else words.span_s(timeout)
    reg = sh.existing()
    facts.known(reg, sid)
    event = reg.observe(sid, timeout_s=wait_s)
    if sh.json:
        sh.document({"sid": sid, **facts.event_json(event)})
    else:
        facts.print_line(sh, event)


COMMANDS: Final = {"stop": stop, "beat": beat, "observe": observe}
