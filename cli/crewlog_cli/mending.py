"""Check, mend and move a store: verify, repair, anchor, migrate."""

from dataclasses import asdict
from typing import Final

import click

from crewlog.place import DirectoryPlace, locate
from crewlog_cli import shell
from crewlog_cli.shell import Shell, command
from crewlog_cli.words import tried
from crewlog_compactor import Anchor, RepairReport, anchor, migrate, repair, verify
from crewlog_compactor.repair import parse_range


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
    with shell.progress("verify") as told:
        report = verify(sh.registry().where, anchor=held, progress=told)
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
            }
        )
    else:
        for found in report.findings:
            at = "" if found.offset is None else f" at byte {found.offset}"
            sh.line(f"{found.code}  {found.path}{at}: {found.message}")
        for first, last in report.gaps:
            sh.note(f"events {first} to {last} are lost; a repair gave them up")
        sh.note(
            f"{report.events} events up to seq {report.last_seq}; findings: {len(report.findings)}"
        )
        files = isinstance(locate(sh.place), DirectoryPlace)
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
        _print_report(sh, report)
    if report.needed and not report.done:
        raise SystemExit(shell.EXIT_NO)


def _print_report(sh: Shell, report: RepairReport) -> None:
    if not report.needed:
        sh.note("nothing to repair")
        return
    did = "" if report.done else "would "
    if report.poisoned:
        sh.line(f"{did}lift the mark of a failed sync; what was not acknowledged goes")
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
    found = anchor(sh.existing())
    if sh.json:
        sh.document({"seq": found.seq, "hash": found.hash})
    else:
        sh.line(str(found))


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
    with shell.progress("migrate") as told:
        report = tried(lambda: migrate(source, target, progress=told))
    if sh.json:
        sh.document(asdict(report))
    else:
        sh.line(
            f"copied {report.events} events up to seq {report.last_seq}, {report.workers} workers, "
            f"{report.cursors} cursors; the last hash is {report.hash}"
        )


COMMANDS: Final = {"verify": verify_, "repair": repair_, "anchor": anchor_, "migrate": migrate_}
