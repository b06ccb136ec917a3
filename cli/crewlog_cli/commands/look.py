"""Look at a worker: show, alive, explain, path. No lock is taken and nothing is written."""

import contextlib
import shlex
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Final

import click

from crewlog import Flag, Liveness
from crewlog.errors import Unavailable, WorkerNotFound
from crewlog.model import figures
from crewlog.model.choice import LabelTest
from crewlog.model.events import Identity, JsonObject, Worker, WorkerState
from crewlog.model.state import Past
from crewlog.registry import Registry
from crewlog_cli import answers, choose, inputs, render, shell, text
from crewlog_cli.choose import Chosen
from crewlog_cli.shell import Shell, command
from crewlog_cli.story import Story

_LOOK_S: Final = 0.05  # a death is no event: it is looked for


def _verdict(liveness: Liveness) -> str:
    words = render.liveness_text(liveness)
    return f"{words} ({liveness.cause})" if liveness.alive else words


@command(
    "show",
    examples="""crewlog show web-1
crewlog show web-1 --json | jq .worker.exit
crewlog show web-1 --at '2 hours ago'""",
)
@choose.with_names
@click.option("--at", "at_", metavar="TIME|SEQ", help="As it was then; nothing is probed.")
def show(
    sh: Shell, *, names: tuple[str, ...], labels: tuple[LabelTest, ...], at_: str | None
) -> None:
    """Show workers one by one: whether each lives, how it ended, its last events."""
    reg = sh.existing()
    seen = None if at_ is None else inputs.at(sh, reg, at_)
    now = None if seen is None else inputs.asked_at(at_, seen) or inputs.moment_of(seen)
    _each(sh, _meant(reg, names, labels, seen), partial(_show, sh, reg, seen, now))


def _meant(
    reg: Registry, names: tuple[str, ...], labels: tuple[LabelTest, ...], seen: Past | None
) -> tuple[list[Worker], bool]:
    """Return the workers that are meant, and whether it is one that was named by its id."""
    chosen = Chosen(names, labels)
    if not chosen:
        message = "name workers: ids, globs such as 'web-*', or labels with -l"
        raise click.UsageError(message)
    if seen is not None and (missing := sorted(chosen.exact - seen.workers.keys())):
        error = WorkerNotFound(missing[0])
        error.remedy = (
            f"It was not listed then; `crewlog history {missing[0]}` tells what there was"
        )
        raise error
    state = reg.state() if seen is None else seen
    workers = chosen.required(reg, list(state.workers.values()))
    return workers, chosen.is_exact and len(workers) == 1


def _each(
    sh: Shell,
    meant: tuple[list[Worker], bool],
    tell: Callable[[Worker], dict[str, object] | None],
) -> None:
    """Tell of one worker after the other; in JSON of several in one document."""
    workers, single = meant
    rows = []
    for number, worker in enumerate(workers):
        if number and not sh.json:
            sh.line("")
        rows.append(tell(worker))
    if sh.json:
        sh.document((rows[0] or {}) if single else {"workers": rows})


def _show(
    sh: Shell, reg: Registry, seen: Past | None, now: datetime | None, worker: Worker
) -> dict[str, object] | None:
    sid = worker.sid
    liveness = reg.liveness(sid) if seen is None else None
    last = answers.last_events(reg, sid, seen)
    if sh.json:
        return answers.shown(worker, liveness, seen, last)
    now = now or datetime.now(UTC)
    past = render.before(reg, [worker] if seen is None else []).get(sid, render.Before())
    fields = {
        "sid": worker.sid,
        "pid": str(worker.identity or worker.pid),
        "status": render.status_text(worker, liveness, now, past.seen_at),
        "liveness": "" if liveness is None else _verdict(liveness),
        "started": text.exact(worker.created_at, utc=sh.utc),
        "updated": f"{text.exact(worker.updated_at, utc=sh.utc)}, rev {worker.rev}",
        "version": worker.version,
        "sock": worker.sock,
        "labels": " ".join(f"{k}={v}" for k, v in worker.labels.items()),
        "meta": " ".join(f"{k}={v}" for k, v in worker.meta.items()),
        "command": "" if worker.argv is None else shlex.join(worker.argv),
        "cwd": worker.cwd or "",
        "log": "" if worker.log is None else worker.log.path,
        "says": ""
        if liveness is None
        else ": ".join(filter(None, (liveness.status, liveness.note))),
        "uptime": ""
        if worker.final or seen is not None
        else figures.duration(now - worker.created_at),
        "restarts": render.restarts_text(worker, past.ended, now),
        "ended": render.end_text(worker, past.seen_at, utc=sh.utc),
    }
    for name, value in fields.items():
        if value:
            sh.prose(f"{name + ':':<10}{value}", indent=10)
    if seen is None and worker.exit is not None:
        render.print_last_lines(sh, worker)
    sh.line("")
    Story(sh).tell(last)
    return None


@command(
    "alive",
    examples="""crewlog alive web-1 && echo still there
crewlog alive web-1 --for ready --timeout 10s
crewlog alive web-1 --for dead --timeout 1m""",
)
@click.argument("sid", shell_complete=shell.complete_sid)
@click.option("--for", "wanted", type=click.Choice(["alive", "dead", "ready"]), default="alive",
              help="What to ask, or to wait for.")  # fmt: skip
@click.option("--timeout", metavar="SPAN", help="Wait this long for it to become true; else 124.")
def alive(sh: Shell, *, sid: str, wanted: str, timeout: str | None) -> None:
    """Tell by the exit code whether a worker lives: 0 yes, 1 no or not known."""
    wait_s = None if timeout is None else inputs.wait_s(timeout)
    reg = sh.existing()
    if wait_s is None:
        render.known(reg, sid)
    holds, liveness = _await(reg, sid, wanted, wait_s or 0.0)
    if sh.json:
        verdict = {} if liveness is None else {
            "liveness": liveness.verdict.value,
            "cause": liveness.cause,
            "evidence": liveness.evidence.seen(),
        }  # fmt: skip
        sh.document(
            {
                "sid": sid,
                "alive": liveness is not None and liveness.alive,
                "holds": holds,
                **verdict,
            }
        )
    else:
        sh.line(
            "not registered" if liveness is None else f"{liveness.verdict.value} ({liveness.cause})"
        )
    if not holds:
        raise SystemExit(shell.EXIT_NO if wait_s is None else shell.EXIT_TIMEOUT)


def _await(reg: Registry, sid: str, wanted: str, wait_s: float) -> tuple[bool, Liveness | None]:
    """Look until it is as wanted or time is up: changes wake, a death is looked for."""
    deadline = time.monotonic() + wait_s
    holds, liveness = _holds(reg, sid, wanted)
    if holds or not wait_s:
        return holds, liveness
    with reg.watch(after="now") as items:
        while True:
            holds, liveness = _holds(reg, sid, wanted)
            left_s = deadline - time.monotonic()
            if holds or left_s <= 0:
                return holds, liveness
            items.next(min(left_s, _LOOK_S))


def _holds(reg: Registry, sid: str, wanted: str) -> tuple[bool, Liveness | None]:
    worker = reg.get(sid)
    if worker is None:
        return False, None
    liveness = reg.judge([worker])[0]
    if wanted == "dead":
        return liveness.dead, liveness
    return liveness.alive and (wanted == "alive" or worker.state == WorkerState.READY), liveness


@command("path", examples='ls -l "$(crewlog path)"')
def path(sh: Shell) -> None:
    """Print the registry's place, a directory or a URL, whether or not it exists."""
    reg = sh.registry()
    if sh.json:
        exists: bool | None = None  # where no server answers, nobody knows
        with contextlib.suppress(Unavailable):
            exists = reg.exists
        sh.document({"path": reg.where, "exists": exists})
    else:
        click.echo(reg.where.encode(errors="surrogateescape"))


_FLAGS: Final = {
    Flag.STALLED: "stalled: it has not said that it is well for longer than it promised",
    Flag.ORPHANED: "orphaned: the process that answers for it is dead",
    Flag.UNREACHABLE: "unreachable: nothing listens on its socket",
    Flag.PAUSED: "paused: it was stopped by a signal, or its control group is frozen",
}
_ASSUME: Final = "crewlog gc --assume-dead SID --reason R"
_REMEDIES: Final = {
    "foreign_pid_namespace": "Look from its namespace, or as root from the first one; a worker "
    "with a lease is judged from anywhere",
    "clock_disputed": f"If the machine has booted since: {_ASSUME}",
    "foreign_host": f"Look on its host; if it is gone for good: {_ASSUME}",
    "identity_unverifiable": f"Look at the process; if it is another: {_ASSUME}",
}


@command(
    "explain",
    examples="""crewlog explain web-1
crewlog explain -v web-1     # the evidence, too
crewlog explain web-1 --json | jq .evidence""",
)
@choose.with_names
def explain(sh: Shell, *, names: tuple[str, ...], labels: tuple[LabelTest, ...]) -> None:
    """Tell why a worker counts as alive, dead or unknown, and its story; -v shows the evidence."""
    reg = sh.existing()
    _each(sh, _meant(reg, names, labels, None), partial(_explain, sh, reg))


def _explain(sh: Shell, reg: Registry, worker: Worker) -> dict[str, object] | None:
    sid = worker.sid
    liveness = reg.liveness(sid)
    story = answers.story_of(reg, sid)
    if sh.json:
        return answers.explained(reg, worker, liveness, story)
    sh.prose(
        f"{sid} is {liveness.verdict.value} ({liveness.cause}): {answers.because(liveness.cause)}."
    )
    for flag in sorted(liveness.flags):
        sh.prose(f"It is {_FLAGS[flag]}.")
    if worker.exit is not None:
        past = render.before(reg, [worker]).get(sid, render.Before())
        end = render.end_text(worker, past.seen_at, utc=sh.utc)
        was = "was " if render.end_word(worker) in {"lost", "removed", "stopped"} else ""
        sh.prose(f"It {was}{end}, {text.exact(worker.updated_at, utc=sh.utc)}.")
        render.print_last_lines(sh, worker)
    if liveness.status or liveness.note:
        sh.prose(f"It says: {': '.join(filter(None, (liveness.status, liveness.note)))}.")
    left = reg.trees([worker]).get(sid, ()) if not liveness.alive else ()
    if left:
        numbers = ", ".join(map(str, left))
        sh.prose(f"It left processes running: {numbers}. End them: crewlog stop --tree {sid}.")
    remedy = _REMEDIES.get(liveness.cause)
    if remedy is not None:
        sh.prose(f"{sh.advice(remedy.replace('SID', sid))}.")
    if sh.verbose:
        sh.line("")
        _print_evidence(sh, worker, liveness)
    sh.line("")
    Story(sh).tell(story)
    return None


def _print_evidence(sh: Shell, worker: Worker, liveness: Liveness) -> None:
    """Put what was recorded beside what is seen now."""
    recorded: JsonObject = {} if worker.identity is None else worker.identity.as_json()
    recorded |= {"lease": worker.lease, "heartbeat_s": worker.heartbeat_s, "sock": worker.sock}
    recorded["owner"] = _owner(worker.owner)
    seen = liveness.evidence.seen()
    names = dict.fromkeys((*recorded, *seen))
    rows = [
        [name, _cell(recorded.get(name)), _cell(seen.get(name))]
        for name in names
        if recorded.get(name) not in {None, ""} or name in seen
    ]
    sh.table(["evidence", "recorded", "seen now"], rows)


def _owner(owner: Identity | None) -> str | None:
    return None if owner is None else str(owner)


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


COMMANDS: Final[dict[str, click.Command]] = {
    "show": show,
    "alive": alive,
    "path": path,
    "explain": explain,
}
