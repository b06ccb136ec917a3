"""Read the output of workers: logs."""

from contextlib import ExitStack
from typing import Final

import click

from crewlog.model.events import REGISTERED, Worker
from crewlog.registry import Registry
from crewlog.workers.output import Follower
from crewlog_cli import output, render, shell
from crewlog_cli.shell import Shell, command

_LOOK_S: Final = 0.2  # a file tells nobody that it grows


@command(
    "logs",
    examples="""crewlog logs web-1
crewlog logs web-1 -n 100
crewlog logs -f web-1""",
)
@click.argument("sid", shell_complete=shell.complete_sid)
@click.option("-n", "--lines", type=click.IntRange(min=0), metavar="N", help="The last N lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on as it writes, and into its next life.")
def logs(sh: Shell, *, sid: str, lines: int | None, follow: bool) -> None:
    """Print what a worker wrote in its last life, as far as its --log is still there."""
    reg = sh.existing()
    since = reg.last_seq  # before the look: the life that begins after it is heard of
    worker = render.known(reg, sid)
    if worker.log is None:
        message = f"the output of {sid} goes to no log: start it with --log FILE"
        raise click.UsageError(message)
    follower = reg.logs(sid, lines=lines)
    try:
        if not follower.is_there and not follow:
            sh.note(f"its log is gone: {worker.log.path}")
            raise SystemExit(shell.EXIT_NO)
        _print(sh, follower)
        if follow:
            _follow(sh, reg, worker, follower, since=since)
    finally:
        follower.close()


def _print(sh: Shell, follower: Follower) -> bool:
    """Print what is there; False for nothing."""
    some = False
    while part := follower.read():
        some = True
        if sh.json:
            sh.stream({"output": part.decode(errors="replace")})
        else:
            output.put_raw(part)
    return some


def _follow(sh: Shell, reg: Registry, worker: Worker, follower: Follower, *, since: int) -> None:
    """Go on with this life and the next ones, those that began after seq `since`."""
    with (
        ExitStack() as lives,
        reg.watch(after=since, sids=[worker.sid], types=[REGISTERED]) as items,
    ):
        while True:
            begun = items.next(0 if _print(sh, follower) else _LOOK_S)
            if begun is not None and begun.kind == "change":
                _print(sh, follower)
                sh.note(f"-- {worker.sid} was started again --")
                follower = reg.logs(worker.sid)
                lives.callback(follower.close)


COMMANDS: Final[dict[str, click.Command]] = {"logs": logs}
