"""Watch: print every change as it becomes durable, or hand it to a program; keep cursors."""

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NoReturn

import click

from crewlog.model import arguments
from crewlog.model.choice import LabelTest
from crewlog.model.events import Event, EventType, Worker
from crewlog.model.items import Item
from crewlog.model.state import State
from crewlog.registry import Registry
from crewlog.store import CursorState
from crewlog.watch.feed import After, digest_at
from crewlog.watch.watch import Watch
from crewlog_cli import choose, inputs, output, render, shell
from crewlog_cli.choose import Chosen, Stream
from crewlog_cli.shell import Shell, command
from crewlog_cli.story import Story

_RETRY_MIN_S: Final = 0.1
_RETRY_MAX_S: Final = 30.0


@command(
    "watch",
    examples="""crewlog watch
crewlog watch 'web-*' -l tier=a
crewlog watch --after 120 --json | jq -r .sid
crewlog watch --type worker.lost --count 1 --timeout 1h
crewlog watch --cursor mailer --crashed --exec -- ./send-mail""",
)
@click.option("--after", type=click.IntRange(min=0), metavar="SEQ", help="Begin after this seq.")
@click.option(
    "-S", "--since", metavar="TIME", help="Begin with the first event of this time or later."
)
@click.option("--from-start", is_flag=True, help="Begin with the oldest event that is kept.")
@click.option(
    "--now", is_flag=True, help="Begin with the events to come; the default shows the state first."
)
@click.option("--sid", "sids", multiple=True, shell_complete=shell.complete_sid,
              help="Only this worker; repeatable.")  # fmt: skip
@choose.with_labels
@inputs.with_types
@inputs.with_crashed
@click.option("--wait", is_flag=True, help="Wait for a registry where there is none yet.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N changes.")
@click.option(
    "--timeout", metavar="SPAN", help="End after this long; 124 if --count was not reached."
)
@click.option(
    "--cursor", "name", metavar="NAME", help="Go on where this cursor stands, and move it."
)
@click.option("--exec", "run", is_flag=True, help="Run CMD for each change, its JSON on stdin.")
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=None,
    metavar="N",
    help="Give up (1) after N failures of CMD on one change; the default is never.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "inotify", "watchdog", "poll"]),
    default="auto",
    help="What wakes.",
)
@click.option("--observe", is_flag=True, help="Record deaths meanwhile, as observe --all does.")
@click.argument("words", metavar="[SID|GLOB]… [-- CMD…]", nargs=-1, type=click.UNPROCESSED,
                shell_complete=shell.complete_sid)  # fmt: skip
def watch(
    sh: Shell,
    *,
    observe: bool,
    after: int | None,
    since: str | None,
    from_start: bool,
    now: bool,
    sids: tuple[str, ...],
    labels: tuple[LabelTest, ...],
    types: tuple[EventType, ...],
    crashed: bool,
    wait: bool,
    count: int | None,
    timeout: str | None,
    name: str | None,
    run: bool,
    retries: int | None,
    backend: str,
    words: tuple[str, ...],
) -> None:
    """Print changes as they become durable, in order, each once; or run CMD for each.

    CMD is run without a shell, one change at a time. A change is acknowledged to the cursor only
    after CMD has exited with 0; until then it is run again, ever less often.
    """
    if sum([after is not None, since is not None, from_start, now]) > 1:
        message = "--after, --since, --from-start and --now exclude each other"
        raise click.UsageError(message)
    named = len(words) - sh.program_words if sh.separated else 0 if run else len(words)
    chosen, argv = Chosen((*sids, *words[:named]), labels), words[named:]
    if run != bool(argv):
        message = "--exec goes with -- CMD…, and CMD with --exec"
        raise click.UsageError(message)
    limit_s = None if timeout is None else inputs.wait_s(timeout)
    first = inputs.moment(since, sh)
    reg = sh.registry() if wait else sh.existing()
    start: After = "oldest" if from_start else "now" if now else first or after
    items = inputs.tried(
        lambda: reg.watch(
            after=start,
            sids=chosen.exact if chosen.is_exact else None,
            wait_for_store=wait and (limit_s is None or limit_s),
            types=(inputs.ends(types) if crashed else types) or None,
            cursor=name,
            backend=backend,  # type: ignore[arg-type] # click lets only these through
            observe=observe,
        )
    )
    with items:
        task = _Task(argv, retries, chosen, Stream(reg, chosen), types, crashed, Story(sh))
        left = _deliver(sh, reg, items, task, count=count, limit_s=limit_s)
    if left:
        raise SystemExit(shell.EXIT_TIMEOUT)


@dataclass(frozen=True, slots=True)
class _Task:
    """What to do with a change: run a program, or nothing but print it; what was asked for."""

    argv: Sequence[str]
    retries: int | None
    chosen: Chosen
    stream: Stream
    types: Sequence[str]
    crashed: bool
    story: Story

    def passes_over(self, item: Item) -> bool:
        """Say whether a change is not one that was asked for."""
        if item.kind != "change":
            return False
        return (self.crashed and not item.event.crashed) or not self.stream.wants(item.event)

    def shown(self, state: State | None) -> list[Worker] | None:
        """Return the workers of a state that were asked for."""
        if state is None or self.types or self.crashed:
            return None
        return self.chosen.of(state.workers.values())


def _deliver(
    sh: Shell, reg: Registry, items: Watch, task: _Task, *, count: int | None, limit_s: float | None
) -> int | None:
    """Print or run for each item until enough; return how many changes were still wanted."""
    deadline = None if limit_s is None else time.monotonic() + limit_s
    left = count
    while left is None or left > 0:
        wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        item = items.next(wait_s)
        if item is None:
            return left
        if task.passes_over(item):
            continue
        if task.argv:
            _hand_over(sh, reg, items, item, task, deadline)
        else:
            _print(sh, reg, item, task)
            if items.has_cursor:
                items.ack(item)  # it is printed and flushed
        if item.kind == "change" and left is not None:
            left -= 1
    return left


def _hand_over(
    sh: Shell, reg: Registry, items: Watch, item: Item, task: _Task, deadline: float | None
) -> None:
    """Run the program for a change until it succeeds, then acknowledge; 124 when time is up."""
    if item.kind == "change":
        line = json.dumps({"kind": "change", **render.event_json(item.event)}) + "\n"
        failures, pause_s = 0, _RETRY_MIN_S
        while (code := _run(task.argv, line)) != 0:
            sh.note(f"{task.argv[0]} exited with {code} on seq {item.seq}")
            if task.retries is not None and failures >= task.retries:
                raise SystemExit(shell.EXIT_NO)
            failures += 1
            if deadline is not None and time.monotonic() + pause_s > deadline:
                raise SystemExit(shell.EXIT_TIMEOUT)
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, _RETRY_MAX_S)
    elif item.kind == "reset":
        _print(sh, reg, item, task)  # a loss is never passed over, whatever is run for the rest
    if items.has_cursor:
        items.ack(item)


def _run(argv: Sequence[str], line: str) -> int:
    try:
        return subprocess.run(list(argv), input=line, text=True, check=False).returncode
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        output.warn(f"crewlog: {argv[0]!r}: {error.strerror}")
        raise SystemExit(shell.EXIT_NOT_FOUND if missing else shell.EXIT_NOT_RUN) from error


def _print_last_lines(sh: Shell, reg: Registry, event: Event) -> None:
    """Print what a worker that crashed wrote last, if it is still the one of that sid."""
    worker = reg.get(event.sid)
    if worker is not None and worker.rev == event.seq:
        render.print_last_lines(sh, worker)


def _print(sh: Shell, reg: Registry, item: Item, task: _Task) -> None:
    match item.kind:
        case "change":
            if sh.json:
                sh.stream({"kind": "change", **render.event_json(item.event)})
            else:
                task.story.line(item.event)
                if item.event.crashed:
                    _print_last_lines(sh, reg, item.event)
        case "synced":
            workers = task.shown(item.state)
            if sh.json:
                shown = None if workers is None else [render.worker_json(w, None) for w in workers]
                sh.stream({"kind": "synced", "seq": item.seq, "workers": shown})
            else:
                here = [worker for worker in workers or [] if not worker.final]
                for worker, liveness in zip(here, reg.judge(here), strict=True):
                    status = render.status_text(worker, liveness, datetime.now(UTC))
                    sh.line(f"{worker.rev}  {worker.sid}  {status}  pid={worker.pid}")
                sh.note(f"-- in step at seq {item.seq}; waiting for changes --")
        case "reset":
            if sh.json:
                left = [render.worker_json(w, None) for w in task.shown(item.state) or []]
                sh.stream({**render.reset_json(item), "workers": left})
            else:
                output.warn(render.reset_text(item))
    output.flush()


# -- cursors --------------------------------------------------------------------------------


@command(
    "cursor", examples="crewlog cursor ls\ncrewlog cursor set mailer 120\ncrewlog cursor rm mailer"
)
@click.argument("action", type=click.Choice(["ls", "show", "set", "rm"]))
@click.argument("name", required=False)
@click.argument("seq", type=click.IntRange(min=0), required=False)
def cursor_(sh: Shell, *, action: str, name: str | None, seq: int | None) -> None:
    """List, show, set or remove the durable positions of subscribers.

    A cursor holds back retention, so remove one that nobody will come back for.
    """
    if (name is None) != (action == "ls") or (seq is None) != (action != "set"):
        message = "it is: cursor ls | cursor show NAME | cursor set NAME SEQ | cursor rm NAME"
        raise click.UsageError(message)
    reg = sh.existing()
    if action == "ls":
        _print_cursors(sh, reg, reg.cursors.every())
        return
    name = inputs.tried(lambda: arguments.check_sid(name, what="cursor"))
    cursors = reg.cursors
    if action == "rm":
        if not cursors.remove(name):
            _no_cursor(sh, name)
        if sh.json:
            _print_cursors(sh, reg, [])
        else:
            sh.line(name)
        return
    known = cursors.read(name)
    if action == "set" and seq is not None:
        if seq > reg.last_seq:
            message = f"seq {seq} does not exist yet; the last one is {reg.last_seq}"
            raise click.UsageError(message)
        owned = cursors.own(name, start=seq)
        owned.set(seq, digest_at(reg.store(), seq))
        owned.close()
        known = cursors.read(name)
    if known is None:
        _no_cursor(sh, name)
    _print_cursors(sh, reg, [known])


def _no_cursor(sh: Shell, name: str) -> NoReturn:
    shell.complain(
        sh,
        code="cursor_not_found",
        exit_code=shell.EXIT_NO,
        what=f"no cursor {name!r}",
        where="",
        hint="`crewlog cursor ls` lists them",
    )
    raise SystemExit(shell.EXIT_NO)


def _print_cursors(sh: Shell, reg: Registry, cursors: Sequence[CursorState]) -> None:
    oldest, last = reg.first_seq, reg.last_seq
    rows = [
        {
            "name": cursor.name,
            "seq": cursor.seq,
            "lag": max(0, last - cursor.seq),
            "lost": cursor.damaged or cursor.seq + 1 < oldest,
            "owned": _owned(reg, cursor.name),
        }
        for cursor in cursors
    ]
    if sh.json:
        sh.document({"seq": last, "cursors": rows})
        return
    sh.table(
        ["name", "seq", "lag", "state"],
        [
            [
                str(row["name"]),
                str(row["seq"]),
                str(row["lag"]),
                "lost" if row["lost"] else "in use" if row["owned"] else "idle",
            ]
            for row in rows
        ],
    )


def _owned(reg: Registry, name: str) -> bool:
    return reg.cursors.is_owned(name)


COMMANDS: Final[dict[str, click.Command]] = {"watch": watch, "cursor": cursor_}
