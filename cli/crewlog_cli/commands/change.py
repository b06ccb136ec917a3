"""Change the registry: register, update, remove, import. Each prints the seq of what it wrote."""

import json
from typing import Final

import click

from crewlog.errors import InvalidTransition
from crewlog.model.events import JsonValue, NextState
from crewlog_cli import inputs, render, shell
from crewlog_cli.inputs import safe, tried
from crewlog_cli.shell import Shell, command


def _meta(given: str | None) -> dict[str, JsonValue] | None:
    if given is None:
        return None
    try:
        meta: object = json.loads(given, object_pairs_hook=_unique)
    except ValueError as error:
        message = f"--meta is no JSON object: {error}"
        raise click.UsageError(message) from error
    if not isinstance(meta, dict):
        message = "--meta is no JSON object"
        raise click.UsageError(message)
    return meta


def _unique(rows: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    if len({key for key, _ in rows}) != len(rows):
        message = "a key stands twice"
        raise ValueError(message)
    return dict(rows)


def _done(sh: Shell, sid: str, seq: int, **more: object) -> None:
    if sh.json:
        sh.document({"seq": seq, "sid": sid, **more})
    else:
        sh.line(str(seq))
        sh.note(f"{sid} is at rev {seq}: the seq of this change, which --expect takes")


@command(
    "register",
    examples="""crewlog register web-1 --pid $! --sock /run/web-1.sock -l role=web --ready
crewlog register job-7 --pid 4711 --meta '{"queue":"mail"}'""",
)
@click.argument("sid", shell_complete=shell.complete_sid)
@click.option("--pid", type=int, required=True, help="The process that is to be known as SID.")
@click.option("--sock", default="", help="Where it listens.")
@click.option("--version", default="", help="Its version.")
@click.option("-l", "--label", "labels", multiple=True, metavar="K=V", help="A label; repeatable.")
@click.option("--meta", metavar="JSON", help="Anything else, as a JSON object.")
@click.option("--owner", type=int, metavar="PID", help="The process that answers for it.")
@click.option("--ready", is_flag=True, help="It is ready already.")
def register(
    sh: Shell,
    *,
    sid: str,
    pid: int,
    sock: str,
    version: str,
    labels: tuple[str, ...],
    meta: str | None,
    owner: int | None,
    ready: bool,
) -> None:
    """Register a running process; prints the seq once it is durable."""
    pairs = inputs.pairs([safe(row) for row in labels])
    with sh.registry() as reg:
        worker = tried(
            lambda: reg.register(
                sid,
                pid=pid,
                sock=safe(sock),
                version=safe(version),
                labels=pairs,
                meta=_meta(meta),
                ready=ready,
                owner=owner,
            )
        )
    _done(sh, sid, worker.rev, worker=render.worker_json(worker, None))


@command(
    "update",
    examples="""crewlog update web-1 --state ready
crewlog update web-1 -l shard=3 --unlabel canary --expect 118
crewlog update web-1 --state draining --reason deploy""",
)
@click.argument("sid", shell_complete=shell.complete_sid)
@click.option("--state", type=click.Choice(["ready", "draining", "stopping"]), help="Move it on.")
@click.option("--sock", help="Where it listens now.")
@click.option("--version", help="Its version now.")
@click.option("-l", "--label", "labels", multiple=True, metavar="K=V", help="Set a label.")
@click.option("--unlabel", multiple=True, metavar="K", help="Remove a label.")
@click.option("--meta", metavar="JSON", help="Keys to set; null removes one.")
@click.option("--reason", help="Why, for the history.")
@click.option("--expect", type=int, metavar="REV", help="Only if it is still at this rev.")
def update(
    sh: Shell,
    *,
    sid: str,
    state: NextState | None,
    sock: str | None,
    version: str | None,
    labels: tuple[str, ...],
    unlabel: tuple[str, ...],
    meta: str | None,
    reason: str | None,
    expect: int | None,
) -> None:
    """Move a worker to another state, or change what is known of it; prints its rev."""
    patch: dict[str, str | None] = {**inputs.pairs([safe(row) for row in labels])}
    gone = dict.fromkeys((safe(key) for key in unlabel), None)
    if patch.keys() & gone.keys():
        message = f"-l and --unlabel both name {', '.join(sorted(patch.keys() & gone.keys()))}"
        raise click.UsageError(message)
    patch |= gone
    with sh.existing() as reg:
        render.known(reg, sid)
        worker = tried(
            lambda: reg.update(
                sid,
                state=state,
                sock=None if sock is None else safe(sock),
                version=None if version is None else safe(version),
                labels=patch or None,
                meta=_meta(meta),
                reason=None if reason is None else safe(reason),
                expect=expect,
            )
        )
    _done(sh, sid, worker.rev, worker=render.worker_json(worker, None))


@command("remove", examples="crewlog remove web-1 --reason 'handed over to host b'")
@click.argument("sid", shell_complete=shell.complete_sid)
@click.option("--reason", default="crewlog remove", show_default=True, help="Why, for the history.")
@click.option("--expect", type=int, metavar="REV", help="Only if it is still at this rev.")
def remove(sh: Shell, *, sid: str, reason: str, expect: int | None) -> None:
    """Take a worker out of the registry; its process is left alone. Prints the seq."""
    with sh.existing() as reg:
        worker = render.known(reg, sid)
        try:
            event = tried(lambda: reg.remove(sid, reason=safe(reason), expect=expect))
        except InvalidTransition as error:
            if worker.final:
                error.what = f"worker {sid!r} has ended already"
                error.remedy = "The list drops it after a day; now: crewlog gc --keep 0"
            raise
    if sh.json:
        sh.document({"seq": event.seq, "sid": sid})
    else:
        sh.line(str(event.seq))
        sh.note(f"{sid} was removed; that is event {event.seq} of the history")


@command(
    "import", examples="crewlog --dir ~/.local/state/crewlog import /var/lib/old/registry.json"
)
@click.argument("source", metavar="OLD.json", type=click.Path(exists=True, dir_okay=False))
def import_(sh: Shell, *, source: str) -> None:
    """Take over an older registry.json, `{"sessions": […]}`; whom there is already it skips."""
    from crewlog_compactor import import_legacy  # noqa: PLC0415 (only this command needs it)

    with sh.registry() as reg:
        report = import_legacy(reg, source)
    if sh.json:
        sh.document(
            {
                "seq": report.seq,
                "living": report.living,
                "lost": report.lost,
                "skipped": [{"sid": sid, "why": why} for sid, why in report.skipped],
            }
        )
        return
    for sid, why in report.skipped:
        sh.note(f"skipped {sid}: {why}")
    sh.line(f"{len(report.living)} living, {len(report.lost)} lost, {len(report.skipped)} skipped")


COMMANDS: Final[dict[str, click.Command]] = {
    "register": register,
    "update": update,
    "remove": remove,
    "import": import_,
}
