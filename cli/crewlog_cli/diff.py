"""Compare two states of the past: who came, who changed, who went."""

from typing import Final

import click

from crewlog.events import Worker, diff_of
from crewlog_cli import facts, past, shell
from crewlog_cli.shell import Shell, command


@command(
    "diff",
    examples="""crewlog diff --from yesterday
crewlog diff --from 2h --to 1h
crewlog diff --from 1200 --to 1300 --json | jq .added""",
)
@click.option("--from", "begin", required=True, metavar="TIME|SEQ", help="The older state.")
@click.option("--to", "end", metavar="TIME|SEQ", help="The newer state; the default is now.")
def diff(sh: Shell, *, begin: str, end: str | None) -> None:
    """Show which workers came, changed and went between two states; 1 if there is no difference."""
    reg = sh.existing()
    before = past.at(sh, reg, begin)
    after = past.at(sh, reg, "now" if end is None else end)
    if after.seq < before.seq:
        message = f"--from is after --to (seq {before.seq} and {after.seq})"
        raise click.UsageError(message)
    found = diff_of(before.workers.revs(), after.workers.revs())
    if sh.json:
        sh.document(
            {
                "from": past.window(before),
                "to": past.window(after),
                "added": [facts.worker_json(after.workers[sid], None) for sid in found.added],
                "changed": [
                    {
                        "before": facts.worker_json(before.workers[sid], None),
                        "after": facts.worker_json(after.workers[sid], None),
                    }
                    for sid in found.changed
                ],
                "removed": [facts.worker_json(before.workers[sid], None) for sid in found.removed],
            }
        )
    else:
        rows = [["+", sid, _said(after.workers[sid])] for sid in found.added]
        rows += [
            ["~", sid, _changed(before.workers[sid], after.workers[sid])] for sid in found.changed
        ]
        rows += [["-", sid, _said(before.workers[sid])] for sid in found.removed]
        sh.table(["", "sid", "what"], rows)
    if not (found.added or found.changed or found.removed):
        raise SystemExit(shell.EXIT_NO)


def _facts(worker: Worker) -> dict[str, str]:
    told = {
        "state": worker.state.value,
        "pid": str(worker.pid),
        "generation": str(worker.generation),
        "version": worker.version,
        "sock": worker.sock,
        "ended": facts.end_text(worker),
    }
    told |= {f"labels.{key}": value for key, value in worker.labels.items()}
    return told | {f"meta.{key}": repr(value) for key, value in worker.meta.items()}


def _said(worker: Worker) -> str:
    return f"{worker.state.value} pid={worker.pid}"


def _changed(before: Worker, after: Worker) -> str:
    old, new = _facts(before), _facts(after)
    told = [
        f"{name} {old.get(name) or '-'} → {new.get(name) or '-'}"
        for name in {**old, **new}
        if old.get(name, "") != new.get(name, "")
    ]
    return ", ".join(told) or f"rev {before.rev} → {after.rev}"


COMMANDS: Final = {"diff": diff}
