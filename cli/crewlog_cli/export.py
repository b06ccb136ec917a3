"""Hand the history to other systems: JSON Lines, CSV, CloudEvents."""

import csv
import json
from collections.abc import Callable, Iterator
from typing import Final

import click

from crewlog.events import Event, timestamp
from crewlog_cli import facts, shell, words
from crewlog_cli.shell import Shell, command

_COLUMNS: Final = ("seq", "ts", "type", "sid", "user", "program", "host", "name", "data")
# A spreadsheet takes a cell that begins so for a formula. Source: OWASP, "CSV Injection".
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


class _Rows:
    """A file to csv.writer, a stream of rows to us."""

    def write(self, row: str) -> None:
        shell.put(row.removesuffix("\r\n"))


def _csv(found: Iterator[Event]) -> None:
    writer = csv.writer(_Rows())
    writer.writerow(_COLUMNS)
    for event in found:
        actor = event.actor
        cells = [
            str(event.seq),
            timestamp(event.ts),
            event.type,
            event.sid,
            *(str(actor.get(key) or "") for key in ("user", "program", "host", "name")),
            json.dumps(event.data, separators=(",", ":")),
        ]
        writer.writerow([f"'{cell}" if cell.startswith(_FORMULA) else cell for cell in cells])


def _jsonl(found: Iterator[Event]) -> None:
    for event in found:
        shell.put(json.dumps(facts.event_json(event), separators=(",", ":")))


def _cloudevents(store: str) -> Callable[[Iterator[Event]], None]:
    """Write CloudEvents 1.0; `source` and `id` name an event for ever. Source: cloudevents.io."""

    def write(found: Iterator[Event]) -> None:
        for event in found:
            shell.put(
                json.dumps(
                    {
                        "specversion": "1.0",
                        "id": str(event.seq),
                        "source": f"urn:crewlog:{store}",
                        "type": f"dev.crewlog.{event.type}",
                        "subject": event.sid,
                        "time": timestamp(event.ts),
                        "datacontenttype": "application/json",
                        "sequence": f"{event.seq:020d}",
                        "data": {"actor": event.actor, **event.data},
                    },
                    separators=(",", ":"),
                )
            )

    return write


@command(
    "export",
    examples="""crewlog export --format csv > history.csv
crewlog export --format cloudevents --since yesterday | vector --config sink.toml
crewlog export --after 120 | jq -c 'select(.type == "worker.lost")'""",
)
@click.option("--format", "form", type=click.Choice(["jsonl", "csv", "cloudevents"]),
              default="jsonl", show_default=True, help="What to write.")  # fmt: skip
@click.option("--since", metavar="TIME", help="Only events from this time on.")
@click.option("--until", metavar="TIME", help="Only events before this time.")
@click.option("--after", type=click.IntRange(min=0), metavar="SEQ", help="Only after this seq.")
@click.option("--sid", shell_complete=shell.complete_sid, help="Only this worker.")
@words.with_types
def export(
    sh: Shell,
    *,
    form: str,
    since: str | None,
    until: str | None,
    after: int | None,
    sid: str | None,
    types: tuple[str, ...],
) -> None:
    """Write the history to stdout, oldest first, one event a line; a seq names it for ever."""
    if sh.json and form == "csv":
        message = "--json goes with the formats jsonl and cloudevents"
        raise click.UsageError(message)
    first, last = words.moment(since, sh), words.moment(until, sh)
    reg = sh.existing()
    found = reg.history(sid=sid, types=types or None, since=first, until=last, after=after)
    writers: dict[str, Callable[[Iterator[Event]], None]] = {
        "jsonl": _jsonl,
        "csv": _csv,
        "cloudevents": _cloudevents(reg.session.store().id),
    }
    writers[form](found)


COMMANDS: Final = {"export": export}
