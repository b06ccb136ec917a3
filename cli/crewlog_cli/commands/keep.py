"""Keep a registry in order: gc, compact, verify, repair, anchor, migrate."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import click

from crewlog.errors import (
    CollectRefused,
    CrewlogError,
    LockBusy,
    PlanInvalid,
    StoreMissing,
    WorkerExists,
    from_oserror,
)
from crewlog.model import times
from crewlog.model.arguments import PACKINGS, Packing
from crewlog.place import locate
from crewlog.registry import Registry
from crewlog_cli import inputs, metrics, output, render, shell
from crewlog_cli.inputs import safe, tried
from crewlog_cli.shell import Shell, command
from crewlog_cli.story import Story
from crewlog_compactor import (
    Anchor,
    CollectReport,
    CompactReport,
    KeepEvents,
    MigrateReport,
    Plan,
    RepairReport,
    anchor,
    apply_plan,
    assume_dead,
    backup,
    collect,
    compact,
    make_plan,
    migrate,
    plan,
    repair,
    verify,
)
from crewlog_compactor.repair import parse_range

_PLAN_BYTES_MAX: Final = 256 * 1024 * 1024
_JITTER_MAX_S: Final = 86_400.0


def _span(given: str) -> timedelta:
    return timedelta(seconds=inputs.span_s(given))


_SIZES: Final = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


def _keep(given: str) -> timedelta | int | KeepEvents | None:
    if given == "all":
        return None
    for unit in ("events", *_SIZES):
        number = inputs.whole(given.removesuffix(unit)) if given.endswith(unit) else None
        if number is not None:
            return KeepEvents(number) if unit == "events" else number * _SIZES[unit]
    try:
        if given.isdigit():  # of what?
            raise times.TimeError(given)
        return times.duration(given)
    except times.TimeError as error:
        message = f"--keep-history is 90d, 1GiB, 5000events or all, not {given!r}"
        raise click.UsageError(message) from error


def _ended(given: str | None) -> timedelta | int | None:
    """Read how long, or how many, ended workers stay listed."""
    if given is None:
        return None
    number = inputs.whole(given)
    return _span(given) if number is None else number


def _fields(report: CollectReport) -> dict[str, object]:
    return {
        "dry_run": report.dry_run,
        "lost": report.lost,
        "exited": report.exited,
        "pruned": report.pruned,
        "unknown": report.unknown,
        "conflicts": report.conflicts,
        "sockets": report.sockets,
        "sockets_kept": [{"path": path, "why": why} for path, why in report.sockets_kept],
    }


def _print_report(sh: Shell, report: CollectReport) -> None:
    for name, sids in _fields(report).items():
        if isinstance(sids, tuple):
            for sid in sids:
                sh.line(f"{name}  {sid}")
    for path, why in report.sockets_kept:
        sh.note(f"kept {path}: {why}")


@command(
    "gc",
    examples="""crewlog gc --dry-run
crewlog gc --plan plan.json && less plan.json && crewlog gc --apply plan.json
crewlog gc --assume-dead web-1 --reason 'its host burned down'""",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--keep", metavar="2d|50000", help="Keep ended workers listed so long, or so many; "
              "else a day, and not more than 10000.")  # fmt: skip
@click.option("--plan", "plan_", metavar="FILE", help="Only write what would be done to FILE.")
@click.option("--apply", "apply_", metavar="FILE", help="Do what a plan says, of any age.")
@click.option("--assume-dead", "assumed", metavar="SID", shell_complete=shell.complete_sid,
              help="Remove a worker whose liveness cannot be determined.")  # fmt: skip
@click.option("--reason", help="Why it is assumed dead, for the history.")
@click.option("--force", is_flag=True, help="Believe that most workers died at once.")
def gc(
    sh: Shell,
    *,
    dry_run: bool,
    keep: str | None,
    plan_: str | None,
    apply_: str | None,
    assumed: str | None,
    reason: str | None,
    force: bool,
) -> None:
    """Record the death of workers that are proven dead; drop what ended long ago from the list.

    Who cannot be judged is left alone. A plan is carried out only where its workers are unchanged.
    """
    span = _ended(keep)
    if sum((dry_run, plan_ is not None, apply_ is not None, assumed is not None)) > 1:
        message = "--dry-run, --plan, --apply and --assume-dead exclude each other"
        raise click.UsageError(message)
    if (assumed is None) != (reason is None):
        message = "--assume-dead goes with --reason"
        raise click.UsageError(message)
    reg = sh.existing()
    if assumed is not None and reason is not None:
        _assume_dead(sh, reg, assumed, reason)
        return
    if plan_ is not None:
        made = make_plan(reg, keep=span)
        _write_plan(sh, made, Path(plan_))
        if not force:
            _tell_refused(plan.refusal(made))
        return
    if apply_ is not None:
        report = apply_plan(reg, _read_plan(Path(apply_)), force=force)
    else:
        report = collect(reg, dry_run=dry_run, keep=span, force=force)
    if sh.json:
        refused = None if report.refused is None else str(report.refused)
        sh.document({"seq": reg.last_seq, **_fields(report), "refused": refused})
    else:
        if not sh.quiet:
            _print_report(sh, report)
        _tell_refused(report.refused)


def _tell_refused(refused: CollectRefused | None) -> None:
    if refused is not None:
        output.warn(f"crewlog: to collect them would be refused: {refused}")


def _jitter_s(given: str) -> float:
    span_s = inputs.span_s(given)
    if span_s > _JITTER_MAX_S:
        message = f"--jitter is at most a day, not {given}"
        raise click.UsageError(message)
    return span_s


def _assume_dead(sh: Shell, reg: Registry, sid: str, reason: str) -> None:
    render.known(reg, sid)
    try:
        event = tried(lambda: assume_dead(reg, sid, reason=safe(reason)))
    except WorkerExists as error:  # what the library says of a sid that is taken
        error.remedy = f"It is proven to live. To end it: crewlog stop {sid}"
        raise
    if sh.json:
        sh.document(render.event_json(event))
    else:
        Story(sh).line(event)


def _write_plan(sh: Shell, made: Plan, path: Path) -> None:
    output.put_file(path, made.encode() + b"\n", what="the plan", option="--plan")
    if sh.json:
        sh.document({"plan": str(path), "steps": len(made.tasks), "unknown": list(made.unknown)})
    else:
        sh.note(f"{len(made.tasks)} steps for {made.living} workers that are not ended: {path}")


def _read_plan(path: Path) -> Plan:
    try:
        with path.open("rb") as file:
            data = file.read(_PLAN_BYTES_MAX + 1)
    except (FileNotFoundError, IsADirectoryError) as error:
        message = f"--apply {path}: {error.strerror}"
        raise click.UsageError(message) from error
    except OSError as error:
        raise from_oserror(error, "cannot read the plan", where=str(path)) from error
    if len(data) > _PLAN_BYTES_MAX:
        raise PlanInvalid(str(path), why="it is too large for a plan")
    return plan.decode(data, where=str(path))


def _there(sh: Shell) -> Registry:
    """Open the registry; with -q it is no fault that cron was set up before the first worker."""
    try:
        return sh.existing()
    except StoreMissing:
        if sh.quiet:
            raise SystemExit(0) from None
        raise


@command(
    "compact",
    examples="""crewlog compact
crewlog compact --keep-history 90d --dry-run
crewlog compact --keep-history 90d --yes --pack zstd
crewlog schedule cron                # the line for a crontab""",
)
@click.option("--gc/--no-gc", "gc_", default=True, help="Collect the dead first.")
@click.option("--force", is_flag=True, help="Believe that most workers died at once.")
@click.option(
    "--keep-history",
    default="all",
    show_default=True,
    metavar="90d|1GiB|5000events|all",
    help="Drop archived history that is older, or beyond so many bytes or events.",
)
@click.option("--keep-ended", metavar="2d|50000", help="Keep ended workers listed so long, or "
              "so many; else a day, and not more than 10000.")  # fmt: skip
@click.option("--pack", type=click.Choice(PACKINGS), default="gzip", show_default=True,
              help="How to compress what is archived now; zstd is an extra.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--yes", is_flag=True, help="Drop history without asking.")
@click.option("--prometheus", metavar="FILE", help="Write metrics for a textfile collector.")
@click.option("--jitter", metavar="SPAN", help="Wait up to this long first, by chance.")
def compact_(
    sh: Shell,
    *,
    gc_: bool,
    force: bool,
    keep_history: str,
    keep_ended: str | None,
    pack: Packing,
    dry_run: bool,
    yes: bool,
    prometheus: str | None,
    jitter: str | None,
) -> None:
    """Collect, fold the log into registry.json, and archive: the command for cron.

    Silent with -q unless something is wrong; 75 if another compaction runs.
    """
    keep, ended = _keep(keep_history), _ended(keep_ended)
    if dry_run and prometheus is not None:
        message = "--dry-run compacts nothing that --prometheus could tell of"
        raise click.UsageError(message)
    if (
        keep is not None
        and not (yes or dry_run)
        and not shell.confirmed(
            f"Drop history for good, but for {keep_history}?", "--keep-history drops history"
        )
    ):
        sh.note("nothing was dropped, and nothing compacted")
        raise SystemExit(shell.EXIT_NO)
    if prometheus is not None:
        output.require_place(Path(prometheus), option="--prometheus")
    wait_s = 0.0 if jitter is None else random.uniform(0.0, _jitter_s(jitter))  # noqa: S311 (no secret)
    reg = _there(sh)
    time.sleep(0.0 if dry_run else wait_s)
    with _metered(reg, prometheus) as outcome:
        report = compact(
            reg,
            gc=gc_,
            force=force,
            keep_history=keep,
            keep_ended=ended,
            packing=pack,
            dry_run=dry_run,
        )
        outcome.refused = report.refused is not None
        if sh.json:
            sh.document(_compaction(reg, report))
        elif dry_run or not sh.quiet:
            _print_compaction(sh, report)
    if dry_run:
        _tell_refused(report.refused)
        return
    if report.full is not None:
        shell.fail(sh, report.full)
    if report.refused is not None:
        shell.fail(sh, report.refused)


def _compaction(reg: Registry, report: CompactReport) -> dict[str, object]:
    return {
        "seq": reg.last_seq,
        "dry_run": report.dry_run,
        "folded_events": report.folded_events,
        "snapshot_seq": report.snapshot_seq,
        "archived_segments": report.archived_segments,
        "dropped": report.dropped,
        "collected": None if report.collected is None else _fields(report.collected),
        "refused": None if report.refused is None else str(report.refused),
    }


def _print_compaction(sh: Shell, report: CompactReport) -> None:
    if report.collected is not None and (sh.verbose or report.dry_run):
        _print_report(sh, report.collected)
    elif report.collected is not None:
        collected = {name: sids for name, sids in _fields(report.collected).items() if sids}
        counts = [
            f"{len(sids)} {name}" for name, sids in collected.items() if isinstance(sids, tuple)
        ]
        if counts:
            sh.line("collected: " + ", ".join(counts))
    fold, archive, drop = (
        ("would fold", "archive", "would drop")
        if report.dry_run
        else ("folded", "archived", "dropped")
    )
    sh.line(
        f"{fold} {report.folded_events} events up to seq {report.snapshot_seq}, "
        f"{archive} {report.archived_segments} segments"
    )
    if report.dropped is not None:
        sh.line(f"{drop} history: events {report.dropped[0]} to {report.dropped[1]}")


@dataclass(slots=True)
class _Outcome:
    """What the metrics say of a compaction."""

    refused: bool = False


@contextmanager
def _metered(reg: Registry, path: str | None) -> Iterator[_Outcome]:
    """Write metrics after a compaction, also where it failed; of one beside another, nothing."""
    began, outcome = time.monotonic(), _Outcome()
    try:
        yield outcome
    except LockBusy:
        raise
    except CrewlogError:
        if path is not None:
            metrics.write_failure(Path(path), took_s=time.monotonic() - began)
        raise
    if path is not None:
        took_s = time.monotonic() - began
        metrics.write(reg, Path(path), took_s=took_s, refused=outcome.refused)


@command(
    "verify",
    examples="""crewlog verify && echo whole
crewlog verify --anchor "$(git notes show)"
crewlog verify --json | jq .findings""",
)
@click.option("--anchor", "kept", metavar="SEQ:HASH", help="What `crewlog anchor` had printed.")
def verify_(sh: Shell, *, kept: str | None) -> None:
    """Read everything, change nothing, report every finding; 1 if there is any."""
    held = None if kept is None else tried(lambda: Anchor.parse(kept))
    with output.progress("verify") as progress:
        report = verify(sh.registry().where, anchor=held, progress=progress)
    if sh.json:
        sh.document(
            {
                "ok": report.ok,
                "events": report.events,
                "last_seq": report.last_seq,
                "findings": [
                    {**asdict(finding), "repairable": finding.repairable}
                    for finding in report.findings
                ],
                "gaps": report.gaps,
                "notes": report.notes,
            }
        )
    else:
        for finding in report.findings:
            at = "" if finding.offset is None else f" at byte {finding.offset}"
            sh.line(f"{finding.code}  {finding.path}{at}: {finding.message}")
        for first, last in report.gaps:
            sh.note(f"events {first} to {last} are lost; a repair gave them up")
        for note in report.notes:
            sh.note(note)
        sh.note(
            f"{report.events} events up to seq {report.last_seq}; findings: {len(report.findings)}"
        )
        files = locate(sh.place).kind == "directory"
        if files and any(finding.repairable for finding in report.findings):
            sh.note("crewlog repair says what can be done about it, and does nothing by itself")
    if not report.ok:
        raise SystemExit(shell.EXIT_NO)


@command(
    "repair",
    examples="""crewlog repair                                  # only say what would be done
crewlog repair --yes
crewlog repair --yes --accept-loss 150..152     # what is lost is said, never guessed""",
)
@click.option("--yes", is_flag=True, help="Do it.")
@click.option("--accept-loss", "losses", multiple=True, metavar="FIRST..LAST",
              help="Give up these acknowledged events; repeatable.")  # fmt: skip
def repair_(sh: Shell, *, yes: bool, losses: tuple[str, ...]) -> None:
    """Make a store usable again after a failed sync or damage.

    Says what it would do, and does it with --yes. What is replaced goes to quarantine first; what
    is lost must be named; nothing is renumbered; the history tells of it. 1 if there is something
    to do and it was not done.
    """
    accepted = tried(lambda: [parse_range(text) for text in losses])
    report = repair(sh.existing().where, yes=yes, accept_loss=accepted)
    if sh.json:
        sh.document({**asdict(report), "needed": report.needed})
    else:
        _print_repair(sh, report)
    if report.needed and not report.done:
        raise SystemExit(shell.EXIT_NO)


def _print_repair(sh: Shell, report: RepairReport) -> None:
    if not report.needed:
        sh.note("nothing to repair")
        return
    did = "" if report.done else "would "
    if report.poisoned:
        sh.line(f"{did}lift the mark of a failed sync; what was not acknowledged goes")
    for name in report.aside:
        sh.line(f"{did}set aside {name}, which does not belong there")
    for name in report.rewritten:
        sh.line(f"{did}rewrite {name}")
    for first, last in report.losses:
        sh.line(f"{did}give up events {first} to {last}: --accept-loss {first}..{last}")
    for name in report.quarantined:
        sh.line(f"kept in quarantine: {name}")
    if not report.done:
        sh.note("nothing was changed; with --yes it is")


@command(
    "anchor",
    examples="""crewlog anchor | logger -t crewlog       # hourly, to another host
git notes add -m "$(crewlog anchor)\"""",
)
def anchor_(sh: Shell) -> None:
    """Print SEQ:HASH of the last event, to be kept elsewhere; see verify --anchor."""
    end = anchor(sh.existing())
    if sh.json:
        sh.document({"seq": end.seq, "hash": end.hash})
    else:
        sh.line(str(end))


@command(
    "migrate",
    examples="""crewlog migrate ~/.local/state/crewlog etcd://h1:2379,h2:2379/crew
crewlog migrate etcd://h1:2379/crew /srv/crewlog      # and back""",
)
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
def migrate_(sh: Shell, *, source: str, target: str) -> None:
    """Copy a registry with its whole history to a place where there is none, and verify the copy.

    Seqs, hashes, cursors and anchors stay true. Stop its writers first: the source stays as it is.
    """
    if sh.place is not None:
        message = "migrate takes two places, FROM and TO, and no --dir"
        raise click.UsageError(message)
    with output.progress("migrate") as progress:
        report = tried(lambda: migrate(source, target, progress=progress))
    _tell_copy(sh, report)


@command(
    "backup",
    examples="""crewlog backup /srv/backup/crewlog-$(date +%F)
crewlog --dir /srv/backup/crewlog-2026-11-29 ls --all     # it opens as it is""",
)
@click.argument("target", metavar="DIR")
def backup_(sh: Shell, *, target: str) -> None:
    """Copy the registry as it is now to DIR, where there is none yet, and verify the copy.

    Its writers go on meanwhile; what was acknowledged before is in the copy.
    """
    with output.progress("backup") as progress:
        report = tried(lambda: backup(str(locate(sh.place)), target, progress=progress))
    _tell_copy(sh, report)


def _tell_copy(sh: Shell, report: MigrateReport) -> None:
    if sh.json:
        sh.document(asdict(report))
    else:
        sh.line(
            f"copied {report.events} events up to seq {report.last_seq}, {report.workers} workers, "
            f"{report.cursors} cursors; the last hash is {report.hash}"
        )


COMMANDS: Final[dict[str, click.Command]] = {
    "gc": gc,
    "compact": compact_,
    "verify": verify_,
    "repair": repair_,
    "anchor": anchor_,
    "backup": backup_,
    "migrate": migrate_,
}
