"""Look at the workers: ls, show, alive, explain, path. No lock is taken and nothing is written."""

import contextlib
import itertools
import shlex
import time
from collections import deque
from datetime import UTC, datetime
from typing import Final

import click

from crewlog import Flag, Liveness
from crewlog.errors import Unavailable, WorkerNotFound
from crewlog.model import figures
from crewlog.model.choice import GLOB, matcher
from crewlog.model.events import (
    FINAL,
    Identity,
    JsonObject,
    Past,
    State,
    Worker,
    WorkerState,
    timestamp,
)
from crewlog.registry import Registry
from crewlog_cli import inputs, render, shell, text
from crewlog_cli.shell import Shell, command

_LAST_EVENTS: Final = 10
_LOOK_S: Final = 0.05  # a death is no event: it is looked for


@command(
    "ls",
    examples="""crewlog ls
crewlog ls --all --state lost
crewlog ls -l role=web --json | jq -r '.workers[].sid'
crewlog ls --at yesterday""",
)
@click.argument("names", metavar="[SID|GLOB]…", nargs=-1, shell_complete=shell.complete_sid)
@click.option("-a", "--all", "all_", is_flag=True, help="Show the dead and the ended too.")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([s.value for s in WorkerState]),
    help="Only in this state; repeatable.",
)
@click.option("-l", "--label", "labels", multiple=True, metavar="K=V", help="Only with this label.")
@click.option("--at", "at_", metavar="TIME|SEQ", help="As it was then; nothing is probed.")
@click.option("--no-probe", is_flag=True, help="Do not look at the processes.")
@click.option("--sids", is_flag=True, help="Print the sids only, one a line.")
def ls(
    sh: Shell,
    *,
    names: tuple[str, ...],
    all_: bool,
    states: tuple[str, ...],
    labels: tuple[str, ...],
    at_: str | None,
    no_probe: bool,
    sids: bool,
) -> None:
    """List the workers that live or cannot be judged; read only, nothing is collected."""
    reg = sh.existing()
    wanted = inputs.pairs(labels).items()
    seen: State = reg.state() if at_ is None else inputs.at(sh, reg, at_)
    final = all_ or any(WorkerState(state) in FINAL for state in states)
    exact = {name for name in names if not GLOB.search(name)}  # shown, dead or alive
    for name in exact - seen.workers.keys():
        render.known(reg, name)
    matches = matcher(names or ("*",))
    workers = [
        worker
        for worker in seen.workers.values()
        if (final or not worker.final or worker.sid in exact)
        and (not states or worker.state.value in states)
        and wanted <= worker.labels.items()
        and matches(worker.sid)
    ]
    judged: list[Liveness | None] = [None] * len(workers)
    if at_ is None and not no_probe:
        judged = [*reg.judge(workers)]
    shown = [
        (worker, found)
        for worker, found in zip(workers, judged, strict=True)
        if final or found is None or not found.dead or worker.sid in exact
    ]
    if sids and sh.json:
        sh.document({"seq": seen.seq, "sids": [worker.sid for worker, _ in shown]})
    elif sids:
        for worker, _ in shown:
            sh.line(worker.sid)
    elif sh.json:
        sh.document(
            {
                "seq": seen.seq,
                "at": timestamp(datetime.now(UTC)),
                **(inputs.window(seen) if isinstance(seen, Past) else {}),
                "workers": [render.worker_json(worker, found) for worker, found in shown],
            }
        )
    else:
        _print_workers(sh, shown, inputs.moment_of(seen) or datetime.now(UTC))
        hidden = len(workers) - len(shown)
        if hidden:
            sh.note(f"{hidden} dead and not collected yet: crewlog ls --all, crewlog gc")


def _print_workers(sh: Shell, shown: list[tuple[Worker, Liveness | None]], now: datetime) -> None:
    rows = [
        [
            worker.sid,
            str(worker.pid),
            worker.state.value,
            "-" if found is None else render.liveness_text(found),
            sh.when(worker.created_at),
            figures.duration(now - worker.created_at),
            worker.version or "-",
            ",".join(f"{k}={v}" for k, v in worker.labels.items()) or "-",
        ]
        for worker, found in shown
    ]
    started = f"started ({sh.offset()})"
    sh.table(["sid", "pid", "state", "liveness", started, "age", "version", "labels"], rows)


def _verdict(found: Liveness) -> str:
    told = render.liveness_text(found)
    return f"{told} ({found.cause})" if found.alive else told


@command(
    "show",
    examples="""crewlog show web-1
crewlog show web-1 --json | jq .worker.exit
crewlog show web-1 --at '2 hours ago'""",
)
@click.argument("sid", shell_complete=shell.complete_sid)
@click.option("--at", "at_", metavar="TIME|SEQ", help="As it was then; nothing is probed.")
def show(sh: Shell, *, sid: str, at_: str | None) -> None:
    """Show one worker, whether it lives, and its last events."""
    reg = sh.existing()
    seen = None if at_ is None else inputs.at(sh, reg, at_)
    worker = render.known(reg, sid) if seen is None else seen.get(sid)
    if worker is None:
        error = WorkerNotFound(sid)
        error.remedy = f"It was not listed then; `crewlog history --sid {sid}` tells what there was"
        raise error
    found = reg.liveness(sid) if seen is None else None
    newest = reg.history(sid=sid, newest_first=True)
    told = (event for event in newest if seen is None or event.seq <= seen.seq)
    last = list(itertools.islice(told, _LAST_EVENTS))[::-1]
    if sh.json:
        sh.document(
            {
                **({} if seen is None else inputs.window(seen)),
                "worker": render.worker_json(worker, found),
                "events": [render.event_json(event) for event in last],
            }
        )
        return
    fields = {
        "sid": worker.sid,
        "pid": str(worker.identity or worker.pid),
        "state": worker.state.value,
        "liveness": "" if found is None else _verdict(found),
        "started": text.exact(worker.created_at, utc=sh.utc),
        "updated": f"{text.exact(worker.updated_at, utc=sh.utc)}, rev {worker.rev}",
        "version": worker.version,
        "sock": worker.sock,
        "labels": " ".join(f"{k}={v}" for k, v in worker.labels.items()),
        "meta": " ".join(f"{k}={v}" for k, v in worker.meta.items()),
        "command": "" if worker.argv is None else shlex.join(worker.argv),
        "cwd": worker.cwd or "",
        "log": "" if worker.log is None else worker.log.path,
        "says": "" if found is None else ": ".join(filter(None, (found.status, found.note))),
        "uptime": ""
        if worker.final or seen is not None
        else figures.duration(datetime.now(UTC) - worker.created_at),
        "ended": render.end_text(worker),
    }
    for name, value in fields.items():
        if value:
            sh.line(f"{name + ':':<10}{value}")
    if seen is None and worker.exit is not None:
        render.print_last_lines(sh, worker)
    sh.line("")
    render.print_events(sh, last)


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
    wait_s = None if timeout is None else inputs.span_s(timeout)
    reg = sh.existing()
    if wait_s is None:
        render.known(reg, sid)
    holds, found = _await(reg, sid, wanted, wait_s or 0.0)
    if sh.json:
        told = {} if found is None else {
            "liveness": found.verdict.value,
            "cause": found.cause,
            "evidence": found.evidence.seen(),
        }  # fmt: skip
        sh.document(
            {"sid": sid, "alive": found is not None and found.alive, "holds": holds, **told}
        )
    else:
        sh.line("not registered" if found is None else f"{found.verdict.value} ({found.cause})")
    if not holds:
        raise SystemExit(shell.EXIT_NO if wait_s is None else shell.EXIT_TIMEOUT)


def _await(reg: Registry, sid: str, wanted: str, wait_s: float) -> tuple[bool, Liveness | None]:
    """Look until it is as wanted or time is up: changes wake, a death is looked for."""
    deadline = time.monotonic() + wait_s
    holds, found = _holds(reg, sid, wanted)
    if holds or not wait_s:
        return holds, found
    with reg.watch(after="now") as items:
        while True:
            holds, found = _holds(reg, sid, wanted)
            left_s = deadline - time.monotonic()
            if holds or left_s <= 0:
                return holds, found
            items.next(min(left_s, _LOOK_S))


def _holds(reg: Registry, sid: str, wanted: str) -> tuple[bool, Liveness | None]:
    worker = reg.get(sid)
    if worker is None:
        return False, None
    found = reg.judge([worker])[0]
    if wanted == "dead":
        return found.dead, found
    return found.alive and (wanted == "alive" or worker.state == WorkerState.READY), found


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


_EVENTS: Final = 50

_CAUSES: Final = {
    "recorded": "its end is on record",
    "abandoned": "it was announced and never started, and who announced it is dead",
    "reserved": "it was announced and has no process yet",
    "rebooted": "the machine has booted since its last event",
    "lease_released": "nobody holds its lease any more; the kernel took it back at its end",
    "foreign_host": "it was registered in another boot or on another host, and nothing of it is "
    "to be seen from here",
    "clock_disputed": "it was registered in another boot of this host, and by the clock that was "
    "later than this one began: the clock was set since",
    "lease": "its lease is held, and only it can hold it",
    "found_in_namespace": "its very process was found among all that run, under another pid",
    "not_found": "its process is not among all that run, and from here all can be seen",
    "foreign_pid_namespace": "it lives in another pid namespace, and from here that cannot be "
    "looked into",
    "no_such_process": "no process has its pid",
    "pid_is_thread": "its pid is a thread's now",
    "pid_reused": "its pid belongs to another process now",
    "exited": "its process has ended and waits to be reaped by its parent",
    "identity": "the process with its pid is the very one that was registered",
    "start_time": "the process with its pid began at the very time that was recorded",
    "identity_unverifiable": "a process has its pid, and nothing tells whether it is the one",
}
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


@command("explain", examples="crewlog explain web-1\ncrewlog explain web-1 --json | jq .evidence")
@click.argument("sid", shell_complete=shell.complete_sid)
def explain(sh: Shell, *, sid: str) -> None:
    """Tell why a worker counts as alive, dead or unknown: the evidence now, and its events."""
    reg = sh.existing()
    worker = render.known(reg, sid)
    found = reg.liveness(sid)
    story = deque(reg.history(sid=sid), maxlen=_EVENTS)
    if sh.json:
        sh.document(
            {
                "seq": reg.last_seq,
                "sid": sid,
                "verdict": found.verdict.value,
                "liveness": found.verdict.value,  # as every other command calls it
                "cause": found.cause,
                "because": because(found.cause),
                "flags": sorted(flag.value for flag in found.flags),
                "tree": [] if found.alive else list(reg.trees([worker]).get(sid, ())),
                "recorded": None if worker.identity is None else worker.identity.as_json(),
                "evidence": found.evidence.seen(),
                "worker": render.worker_json(worker, found),
                "events": [render.event_json(event) for event in story],
            }
        )
        return
    sh.line(f"{sid} is {found.verdict.value} ({found.cause}): {because(found.cause)}.")
    for flag in sorted(found.flags):
        sh.line(f"It is {_FLAGS[flag]}.")
    if worker.exit is not None:
        sh.line(f"It {render.end_text(worker)}, {text.exact(worker.updated_at, utc=sh.utc)}.")
        render.print_last_lines(sh, worker)
    if found.status or found.note:
        sh.line(f"It says: {': '.join(filter(None, (found.status, found.note)))}.")
    left = reg.trees([worker]).get(sid, ()) if not found.alive else ()
    if left:
        numbers = ", ".join(map(str, left))
        sh.line(f"It left processes running: {numbers}. End them: crewlog stop --tree {sid}.")
    remedy = _REMEDIES.get(found.cause)
    if remedy is not None:
        sh.line(f"{sh.advice(remedy.replace('SID', sid))}.")
    sh.line("")
    _print_evidence(sh, worker, found)
    sh.line("")
    render.print_events(sh, story)


def because(cause: str) -> str:
    """Say a cause in words."""
    return _CAUSES.get(cause, cause)


def _print_evidence(sh: Shell, worker: Worker, found: Liveness) -> None:
    """Put what was recorded beside what is seen now."""
    recorded: JsonObject = {} if worker.identity is None else worker.identity.as_json()
    recorded |= {"lease": worker.lease, "heartbeat_s": worker.heartbeat_s, "sock": worker.sock}
    recorded["owner"] = _owner(worker.owner)
    seen = found.evidence.seen()
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
    "ls": ls,
    "show": show,
    "alive": alive,
    "path": path,
    "explain": explain,
}
