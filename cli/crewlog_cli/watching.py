"""Watch: print every change as it becomes durable."""

import time
from datetime import datetime
from typing import Final

import click

from crewlog.events import Item
from crewlog.registry import Registry
from crewlog.watch import After
from crewlog_cli import reading, shell, times
from crewlog_cli.shell import Shell, command


@command(
    "watch",
    examples="""crewlog watch
crewlog watch --after 120 --json | jq -r .sid
crewlog watch --type worker.lost --count 1 --timeout 1h""",
)
@click.option("--after", type=click.IntRange(min=0), metavar="SEQ", help="Begin after this seq.")
@click.option("--since", metavar="TIME", help="Begin with the first event of this time or later.")
@click.option("--from-start", is_flag=True, help="Begin with the oldest event that is kept.")
@click.option(
    "--now", is_flag=True, help="Begin with the events to come; the default shows the state first."
)
@click.option("--sid", "sids", multiple=True, help="Only this worker; repeatable.")
@click.option("--type", "types", multiple=True, help="Only this type of event; repeatable.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N changes.")
@click.option(
    "--timeout", metavar="TIME", help="End after this long; 124 if --count was not reached."
)
def watch(
    sh: Shell,
    *,
    after: int | None,
    since: str | None,
    from_start: bool,
    now: bool,
    sids: tuple[str, ...],
    types: tuple[str, ...],
    count: int | None,
    timeout: str | None,
) -> None:
    """Print changes as they become durable, in order, each once."""
    if sum([after is not None, since is not None, from_start, now]) > 1:
        message = "--after, --since, --from-start and --now exclude each other"
        raise click.UsageError(message)
    try:
        limit_s = None if timeout is None else times.duration(timeout).total_seconds()
    except times.TimeError as error:
        raise click.UsageError(str(error)) from error
    first = reading.moment(since, sh)
    reg = sh.existing()
    if first is not None:
        after = _before(reg, first)
    start: After = "oldest" if from_start else "now" if now else after
    deadline = None if limit_s is None else time.monotonic() + limit_s
    left = count
    with reg.watch(after=start, sids=sids or None, types=types or None) as items:
        while left is None or left > 0:
            wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            item = items.next(wait_s)
            if item is None:
                break
            _print(sh, item)
            if item.kind == "change" and left is not None:
                left -= 1
    if left:
        raise SystemExit(shell.EXIT_TIMEOUT)


def _before(reg: Registry, first: datetime) -> int:
    """Return the seq before the first event of that time or later."""
    last = reg.last_seq
    found = next(reg.history(since=first), None)
    return last if found is None else found.seq - 1


def _print(sh: Shell, item: Item) -> None:
    match item.kind:
        case "change":
            if sh.json:
                sh.stream({"kind": "change", **shell.event_json(item.event)})
            else:
                reading.print_line(sh, item.event)
        case "synced":
            workers = [] if item.state is None else list(item.state.workers.values())
            if sh.json:
                shown = [shell.worker_json(w, None) for w in workers]
                sh.stream({"kind": "synced", "seq": item.seq, "workers": shown})
            else:
                for worker in workers:
                    if not worker.final:
                        sh.line(
                            f"{worker.rev}  {worker.sid}  {worker.state.value}  pid={worker.pid}"
                        )
                sh.note(f"-- in step at seq {item.seq}; waiting for changes --")
        case "reset":
            if sh.json:
                found = {"kind": "reset", "seq": item.seq, "reason": item.reason, "lost": item.lost}
                sh.stream(found)
            else:
                sh.note(
                    f"-- events {item.lost} are gone ({item.reason}); on from seq {item.seq} --"
                )
    shell.flush()


COMMANDS: Final = {"watch": watch}
