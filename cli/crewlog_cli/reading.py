"""Read: ls, show, alive, history, path. No lock is taken and nothing is written."""

import contextlib
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Final

import click

from crewlog import events
from crewlog.errors import Unavailable, WorkerNotFound
from crewlog.events import FINAL, Event, Past, State, Worker, WorkerState, timestamp
from crewlog.liveness import Liveness
from crewlog.registry import Registry
from crewlog_cli import facts, past, shell, text, words
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
@click.option("-a", "--all", "all_", is_flag=True, help="Show the dead and the ended too.")
@click.option("--state", type=click.Choice([s.value for s in WorkerState]), help="Only this state.")
@click.option("-l", "--label", "labels", multiple=True, metavar="K=V", help="Only with this label.")
@click.option("--at", "at_", metavar="TIME|SEQ", help="As it was then; nothing is probed.")
@click.option("--no-probe", is_flag=True, help="Do not look at the processes.")
@click.option("--sids", is_flag=True, help="Print the sids only, one a line.")
def ls(
    sh: Shell,
    *,
    all_: bool,
    state: str | None,
    labels: tuple[str, ...],
    at_: str | None,
    no_probe: bool,
    sids: bool,
) -> None:
    """List the workers that live or cannot be judged; read only, nothing is collected."""
    reg = sh.existing()
    wanted = words.pairs(labels).items()
    seen: State = reg.state() if at_ is None else past.at(sh, reg, at_)
    final = all_ or (state is not None and WorkerState(state) in FINAL)
    workers = [
        worker
        for worker in seen.workers.values()
        if (final or not worker.final)
        and state in {None, worker.state.value}
        and wanted <= worker.labels.items()
    ]
    judged: list[Liveness | None] = [None] * len(workers)
    if at_ is None and not no_probe:
        judged = [*reg.judge(workers)]
    shown = [
        (worker, found)
        for worker, found in zip(workers, judged, strict=True)
        if final or found is None or not found.dead
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
                **(past.window(seen) if isinstance(seen, Past) else {}),
                "workers": [facts.worker_json(worker, found) for worker, found in shown],
            }
        )
    else:
        _print_workers(sh, shown, past.moment_of(seen) or datetime.now(UTC))
        hidden = len(workers) - len(shown)
        if hidden:
            sh.note(f"{hidden} dead and not collected yet: crewlog ls --all, crewlog gc")


def _print_workers(sh: Shell, shown: list[tuple[Worker, Liveness | None]], now: datetime) -> None:
    rows = [
        [
            worker.sid,
            str(worker.pid),
            worker.state.value,
            "-" if found is None else facts.liveness_text(found),
            sh.when(worker.created_at),
            text.duration(now - worker.created_at),
            worker.version or "-",
            ",".join(f"{k}={v}" for k, v in worker.labels.items()) or "-",
        ]
        for worker, found in shown
    ]
    started = f"started ({sh.offset()})"
    sh.table(["sid", "pid", "state", "liveness", started, "age", "version", "labels"], rows)


def _verdict(found: Liveness) -> str:
    told = facts.liveness_text(found)
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
    seen = None if at_ is None else past.at(sh, reg, at_)
    worker = facts.known(reg, sid) if seen is None else seen.get(sid)
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
                **({} if seen is None else past.window(seen)),
                "worker": facts.worker_json(worker, found),
                "events": [facts.event_json(event) for event in last],
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
        "ended": facts.end_text(worker),
    }
    for name, value in fields.items():
        if value:
            sh.line(f"{name + ':':<10}{value}")
    sh.line("")
    facts.print_events(sh, last)


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
    wait_s = None if timeout is None else words.span_s(timeout)
    reg = sh.existing()
    if wait_s is None:
        facts.known(reg, sid)
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


@command(
    "history",
    examples="""crewlog history --sid web-1
crewlog history --since yesterday --crashed
crewlog history -n 20 -r""",
)
@click.option("--since", metavar="TIME", help="Only events from this time on.")
@click.option("--until", metavar="TIME", help="Only events before this time.")
@click.option("--sid", shell_complete=shell.complete_sid, help="Only this worker.")
@words.with_types
@words.with_crashed
@click.option("--actor", help="Only by this name, user, program, via or pid.")
@click.option("--after", type=click.IntRange(min=0), metavar="SEQ", help="Only after this seq.")
@click.option("-n", "count", type=click.IntRange(min=1), help="Only the last N of them.")
@click.option("-r", "--reverse", is_flag=True, help="Newest first.")
@click.option("-f", "--follow", is_flag=True, help="Go on with the events to come.")
def history(
    sh: Shell,
    *,
    since: str | None,
    until: str | None,
    sid: str | None,
    types: tuple[str, ...],
    crashed: bool,
    actor: str | None,
    after: int | None,
    count: int | None,
    reverse: bool,
    follow: bool,
) -> None:
    """Tell what happened, from the log and the archive; says on stderr which period it covers."""
    if follow and (until is not None or reverse):
        message = "--follow goes with neither --until nor --reverse"
        raise click.UsageError(message)
    first, last = words.moment(since, sh), words.moment(until, sh)
    reg = sh.existing()
    types = words.ends(types) if crashed else types
    last_seq = reg.last_seq
    newest_first = reverse or count is not None  # then the end of a long history is enough
    found: Iterable[Event] = _by(
        reg.history(
            sid=sid,
            types=types or None,
            since=first,
            until=last,
            after=after,
            newest_first=newest_first,
        ),
        actor,
        crashed=crashed,
    )
    if follow:  # what comes later is followed, and must not be printed twice
        found = (event for event in found if event.seq <= last_seq)
    if count is not None:
        found = itertools.islice(found, min(count, sys.maxsize))
    if newest_first and not reverse:
        found = list(found)[::-1]
    if sh.json:
        for event in found:
            sh.stream(facts.event_json(event))
    else:
        facts.print_events(sh, found)
    if sid is not None and reg.get(sid) is None and not any(reg.history(sid=sid)):
        sh.note(f"no event of {sid!r} is kept")
    _print_period(sh, reg)
    if follow:
        _follow(sh, reg, sid=sid, types=types, crashed=crashed, actor=actor, after=last_seq)


def _by(found: Iterable[Event], actor: str | None, *, crashed: bool) -> Iterator[Event]:
    keys = ("name", "user", "program", "via", "pid")
    for event in found:
        if crashed and not event.crashed:
            continue
        if actor is None or actor in {str(event.actor[k]) for k in keys if k in event.actor}:
            yield event


def _print_period(sh: Shell, reg: Registry) -> None:
    """Say what the answer can cover at all, so that silence is not mistaken for peace."""
    if sh.quiet:
        return
    for gap in reg.history(types=[events.GAP]):
        sh.note(f"events {gap.data.get('first')} to {gap.seq} are lost; a repair gave them up")
    oldest = next(reg.history(types=[events.SEGMENT]), None)
    if oldest is not None:
        began = text.exact(oldest.ts, utc=sh.utc)
        kept = "everything" if oldest.seq == 1 else f"what is kept: from seq {oldest.seq} on,"
        sh.note(f"history covers {kept} since {began}, up to seq {reg.last_seq}")


def _follow(
    sh: Shell,
    reg: Registry,
    *,
    sid: str | None,
    types: tuple[str, ...],
    crashed: bool,
    actor: str | None,
    after: int,
) -> None:
    with reg.watch(after=after, sids=None if sid is None else [sid], types=types or None) as items:
        for item in items:
            if item.kind == "reset" and sh.json:
                sh.stream(facts.reset_json(item))
            elif item.kind == "reset":
                shell.warn(facts.reset_text(item))
            if item.kind != "change" or not any(_by([item.event], actor, crashed=crashed)):
                continue
            if sh.json:
                sh.stream(facts.event_json(item.event))
            else:
                facts.print_line(sh, item.event)


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


COMMANDS: Final = {
    "ls": ls,
    "show": show,
    "alive": alive,
    "history": history,
    "path": path,
}
