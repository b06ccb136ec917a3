"""Ask the history: history, diff, stats, export."""

import csv
import itertools
import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import click

from crewlog import Verdict
from crewlog.model import events, figures
from crewlog.model.choice import LabelTest
from crewlog.model.events import Event, EventType, Worker, WorkerState, timestamp
from crewlog.model.items import diff_of
from crewlog.model.lives import Life
from crewlog.registry import Registry
from crewlog_cli import answers, choose, inputs, metrics, output, render, shell, text
from crewlog_cli.choose import Chosen, Stream
from crewlog_cli.shell import Shell, command
from crewlog_cli.story import Story


@command(
    "history",
    examples="""crewlog history web-1 'job-*'
crewlog history -S yesterday --crashed
crewlog history -l role=web -n 20 -r
crewlog history -f""",
)
@inputs.with_period
@choose.with_names
@click.option(
    "--sid",
    "sids",
    multiple=True,
    shell_complete=shell.complete_sid,
    help="Only this worker; repeatable.",
)
@inputs.with_types
@inputs.with_crashed
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
    names: tuple[str, ...],
    labels: tuple[LabelTest, ...],
    sids: tuple[str, ...],
    types: tuple[EventType, ...],
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
    first, last = inputs.period(sh, since, until)
    reg = sh.existing()
    types = inputs.ends(types) if crashed else types
    chosen = Chosen((*names, *sids), labels)
    meant, last_seq = chosen.sids(reg, required=names), reg.last_seq
    newest_first = reverse or count is not None  # then the end of a long history is enough
    selected: Iterable[Event] = answers.chosen_events(
        reg.history(
            sids=meant,
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
        selected = (event for event in selected if event.seq <= last_seq)
    if count is not None:  # then gaps are looked for no further back than these reach
        selected = list(itertools.islice(selected, min(count, sys.maxsize)))
        after = min((event.seq for event in selected), default=last_seq) - 1
    if newest_first and not reverse:
        selected = list(selected)[::-1]
    if sh.json:
        for event in selected:
            sh.stream(render.event_json(event))
    else:
        # with --follow no pager: nobody would leave it to hear of what comes
        Story(sh).tell(selected, paged=not follow)
    _tell_missing(sh, reg, Chosen(sids).exact, nobody=bool(chosen) and not meant)
    _print_period(sh, reg, after)
    if follow:
        _follow(sh, reg, chosen, types=types, crashed=crashed, actor=actor, after=last_seq)


def _tell_missing(sh: Shell, reg: Registry, sids: Iterable[str], *, nobody: bool) -> None:
    """Say where a name means nobody: an empty answer must not be mistaken for peace."""
    for sid in sorted(sids):
        if not any(reg.history(sid=sid)) and reg.get(sid) is None:
            sh.note(f"no event of {sid!r} is kept")
    if nobody:
        sh.note("no worker is, or was, such a one")


def _print_period(sh: Shell, reg: Registry, after: int | None) -> None:
    """Say what the answer can cover at all, so that silence is not mistaken for peace."""
    if sh.quiet:
        return
    for gap in reg.history(types=[events.GAP], after=after):
        sh.note(f"events {gap.data.get('first')} to {gap.seq} are lost; a repair gave them up")
    oldest = next(reg.history(types=[events.SEGMENT]), None)
    if oldest is not None:
        began = text.exact(oldest.ts, utc=sh.utc)
        kept = "everything" if oldest.seq == 1 else f"what is kept: from seq {oldest.seq} on,"
        sh.note(f"history covers {kept} since {began}, up to seq {reg.last_seq}")


def _follow(
    sh: Shell,
    reg: Registry,
    chosen: Chosen,
    *,
    types: tuple[EventType, ...],
    crashed: bool,
    actor: str | None,
    after: int,
) -> None:
    story, stream = Story(sh), Stream(reg, chosen)
    sids = chosen.exact if chosen.is_exact else None
    with reg.watch(after=after, sids=sids, types=types or None) as items:
        for item in items:
            if item.kind == "reset" and sh.json:
                sh.stream(render.reset_json(item))
            elif item.kind == "reset":
                output.warn(render.reset_text(item))
            if item.kind != "change" or not stream.wants(item.event):
                continue
            if not any(answers.chosen_events([item.event], actor, crashed=crashed)):
                continue
            if sh.json:
                sh.stream(render.event_json(item.event))
            else:
                story.line(item.event)


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
    before = inputs.at(sh, reg, begin)
    after = inputs.at(sh, reg, "now" if end is None else end)
    if after.seq < before.seq:
        message = f"--from is after --to (seq {before.seq} and {after.seq})"
        raise click.UsageError(message)
    changes = diff_of(before.workers.revs(), after.workers.revs())
    if sh.json:
        sh.document(
            {
                "from": inputs.window(before),
                "to": inputs.window(after),
                "added": [render.worker_json(after.workers[sid], None) for sid in changes.added],
                "changed": [
                    {
                        "before": render.worker_json(before.workers[sid], None),
                        "after": render.worker_json(after.workers[sid], None),
                    }
                    for sid in changes.changed
                ],
                "removed": [
                    render.worker_json(before.workers[sid], None) for sid in changes.removed
                ],
            }
        )
    else:
        rows = [["+", sid, _said(after.workers[sid])] for sid in changes.added]
        rows += [
            ["~", sid, _changed(before.workers[sid], after.workers[sid])] for sid in changes.changed
        ]
        rows += [["-", sid, _said(before.workers[sid])] for sid in changes.removed]
        sh.table(["", "sid", "what"], rows)
    if not (changes.added or changes.changed or changes.removed):
        raise SystemExit(shell.EXIT_NO)


def _facts(worker: Worker) -> dict[str, str]:
    facts = {
        "state": worker.state.value,
        "pid": str(worker.pid),
        "generation": str(worker.generation),
        "version": worker.version,
        "sock": worker.sock,
        "ended": render.end_text(worker),
    }
    facts |= {f"labels.{key}": value for key, value in worker.labels.items()}
    return facts | {f"meta.{key}": repr(value) for key, value in worker.meta.items()}


def _said(worker: Worker) -> str:
    return f"{worker.state.value} pid={worker.pid}"


def _changed(before: Worker, after: Worker) -> str:
    old, new = _facts(before), _facts(after)
    facts = [
        f"{name} {old.get(name) or '-'} → {new.get(name) or '-'}"
        for name in {**old, **new}
        if old.get(name, "") != new.get(name, "")
    ]
    return ", ".join(facts) or f"rev {before.rev} → {after.rev}"


# So many starts of one sid within so long are flapping.
_FLAPS: Final = 3
_FLAP_SPAN: Final = timedelta(minutes=10)
_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class _Ends:
    """What the lives that began in a period tell."""

    started: int
    ended: int
    crashed: int
    lifetimes_s: Sequence[float]
    causes: Counter[str]
    restarts: Counter[str]
    flapping: dict[str, int]
    removed: int

    @property
    def crash_ratio(self) -> float | None:
        return round(self.crashed / self.ended, 4) if self.ended else None

    def quantile(self, share: float) -> float | None:
        if not self.lifetimes_s:
            return None
        if len(self.lifetimes_s) == 1:
            return self.lifetimes_s[0]
        cuts = statistics.quantiles(self.lifetimes_s, n=100, method="inclusive")
        return round(cuts[round(share * 100) - 1], 6)


def _ends(lives: Sequence[Life]) -> _Ends:
    # who was released was handed over, not ended
    ended = [life for life in lives if life.end not in {None, WorkerState.RELEASED}]
    starts: dict[str, list[datetime]] = defaultdict(list)
    for life in lives:
        starts[life.sid].append(life.began_at)
    return _Ends(
        started=len(lives),
        ended=len(ended),
        crashed=sum(life.crashed for life in ended),
        lifetimes_s=sorted(life.proven.total_seconds() for life in ended),
        causes=Counter(life.reason() for life in lives if life.end is not None),
        restarts=Counter({sid: len(times) - 1 for sid, times in starts.items() if len(times) > 1}),
        removed=sum(life.end == WorkerState.RELEASED for life in lives),
        flapping={sid: most for sid, times in starts.items() if (most := _most(times)) >= _FLAPS},
    )


def _most(times: Sequence[datetime]) -> int:
    """Return how many of the times, at most, lie within one span."""
    ordered, low, most = sorted(times), 0, 0
    for high, when in enumerate(ordered):
        while when - ordered[low] > _FLAP_SPAN:
            low += 1
        most = max(most, high - low + 1)
    return most


@command(
    "stats",
    examples="""crewlog stats
crewlog stats --since 7d --json | jq .lives.crash_ratio
crewlog stats --prometheus /var/lib/node_exporter/crewlog.prom""",
)
@click.option("-S", "--since", metavar="TIME", help="Only lives that began from this time on.")
@click.option("--prometheus", metavar="FILE", help="Write metrics for a textfile collector.")
def stats(sh: Shell, *, since: str | None, prometheus: str | None) -> None:
    """Count workers by state and liveness, how long they live and how they end, and bytes.

    The life of a lost worker counts to its last proof of life. Three starts of one sid within ten
    minutes are flapping.
    """
    first = inputs.moment(since, sh)
    reg = sh.existing()
    if prometheus is not None:
        metrics.write(reg, Path(prometheus))
        if sh.json:
            sh.document({"seq": reg.last_seq, "prometheus": prometheus})
        return
    with output.progress("reading") as progress:
        lives = reg.lives(progress=progress)
    ends = _ends([life for life in lives if first is None or life.began_at >= first])
    if sh.json:
        sh.document(_document(reg, ends))
    else:
        _print(sh, reg, ends)


def _document(reg: Registry, ends: _Ends) -> dict[str, object]:
    compacted = reg.compacted()
    return {
        "last_seq": reg.last_seq,
        "snapshot_seq": 0 if compacted is None else compacted[0],
        "compacted_at": None if compacted is None else timestamp(compacted[1]),
        "workers": population(reg),
        "liveness": _verdicts(reg),
        "events": dict(sorted(reg.totals().items())),
        "lives": {
            "started": ends.started,
            "ended": ends.ended,
            "crashed": ends.crashed,
            "crash_ratio": ends.crash_ratio,
            "lifetime_p50_s": ends.quantile(0.50),
            "lifetime_p95_s": ends.quantile(0.95),
            "causes": dict(ends.causes.most_common()),
            "restarts": dict(ends.restarts.most_common()),
            "flapping": ends.flapping,
        },
        "bytes": reg.sizes(),
    }


def population(reg: Registry) -> dict[str, int]:
    """Count the listed workers by state; every state is named."""
    counts = Counter(worker.state for worker in reg.workers(all=True))
    return {state.value: counts[state] for state in WorkerState}


def _verdicts(reg: Registry) -> dict[str, int]:
    counts = Counter(judged.verdict for judged in reg.judge(reg.workers()))
    return {verdict.value: counts[verdict] for verdict in Verdict}


def _print(sh: Shell, reg: Registry, ends: _Ends) -> None:
    compacted = reg.compacted()
    when = "never" if compacted is None else text.exact(compacted[1], utc=sh.utc)
    covered = 0 if compacted is None else compacted[0]
    p50, p95 = ends.quantile(0.50), ends.quantile(0.95)
    ratio = ends.crash_ratio
    sections: dict[str, list[list[str]]] = {
        "store": [
            ["last seq", str(reg.last_seq)],
            ["last compaction", f"{when} up to seq {covered}" if covered else when],
            *([name, figures.size(count)] for name, count in reg.sizes().items()),
        ],
        "workers": [
            *([name, str(count)] for name, count in population(reg).items() if count),
            *([name, str(count)] for name, count in _verdicts(reg).items() if count),
        ],
        "lives": [
            ["started", str(ends.started)],
            ["ended", str(ends.ended)],
            *([["removed", str(ends.removed)]] if ends.removed else []),
            ["crashed", f"{ends.crashed}" + (f" ({ratio:.1%} of the ended)" if ratio else "")],
        ],
        "how they ended": [[what, str(count)] for what, count in ends.causes.most_common(_SHOWN)],
        "started again": [[sid, str(n)] for sid, n in ends.restarts.most_common(_SHOWN)],
        "flapping": [
            [sid, f"{most} starts in {figures.duration(_FLAP_SPAN)}"]
            for sid, most in list(ends.flapping.items())[:_SHOWN]
        ],
        "events": [[name, str(count)] for name, count in sorted(reg.totals().items())],
    }
    if p50 is not None and p95 is not None:
        sections["lives"].append(["lifetime p50", figures.duration(timedelta(seconds=p50))])
        sections["lives"].append(["lifetime p95", figures.duration(timedelta(seconds=p95))])
    first = True
    for title, rows in sections.items():
        if rows:
            if not first:
                sh.line("")
            first = False
            sh.line(title.upper())
            sh.table(
                ["what", "value"], [[f"  {name}", value] for name, value in rows], titles=False
            )
    began = next((event.ts for event in reg.history(types=[events.SEGMENT])), datetime.now(UTC))
    sh.note(f"lives since {text.exact(began, utc=sh.utc)}; events since the store began")


_COLUMNS: Final = ("seq", "ts", "type", "sid", "user", "program", "host", "name", "data")
# A spreadsheet takes a cell that begins so for a formula. Source: OWASP, "CSV Injection".
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


class _Rows:
    """A file to csv.writer, a stream of rows to us."""

    def write(self, row: str) -> None:
        output.put(row.removesuffix("\r\n"))


def _csv(selected: Iterator[Event]) -> None:
    writer = csv.writer(_Rows())
    writer.writerow(_COLUMNS)
    for event in selected:
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


def _jsonl(selected: Iterator[Event]) -> None:
    for event in selected:
        output.put(json.dumps(render.event_json(event), separators=(",", ":")))


def _cloudevents(store: str) -> Callable[[Iterator[Event]], None]:
    """Write CloudEvents 1.0; `source` and `id` name an event for ever. Source: cloudevents.io."""

    def write(selected: Iterator[Event]) -> None:
        for event in selected:
            output.put(
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
@inputs.with_period
@choose.with_names
@click.option("--after", type=click.IntRange(min=0), metavar="SEQ", help="Only after this seq.")
@click.option("--sid", "sids", multiple=True, shell_complete=shell.complete_sid,
              help="Only this worker; repeatable.")  # fmt: skip
@inputs.with_types
def export(
    sh: Shell,
    *,
    form: str,
    since: str | None,
    until: str | None,
    after: int | None,
    names: tuple[str, ...],
    labels: tuple[LabelTest, ...],
    sids: tuple[str, ...],
    types: tuple[EventType, ...],
) -> None:
    """Write the history to stdout, oldest first, one event a line; a seq names it for ever."""
    if sh.json and form == "csv":
        message = "--json goes with the formats jsonl and cloudevents"
        raise click.UsageError(message)
    first, last = inputs.period(sh, since, until)
    reg = sh.existing()
    chosen = Chosen((*names, *sids), labels)
    meant = chosen.sids(reg, required=names)
    selected = reg.history(sids=meant, types=types or None, since=first, until=last, after=after)
    writers: dict[str, Callable[[Iterator[Event]], None]] = {
        "jsonl": _jsonl,
        "csv": _csv,
        "cloudevents": _cloudevents(reg.id),
    }
    writers[form](selected)


COMMANDS: Final[dict[str, click.Command]] = {
    "history": history,
    "diff": diff,
    "stats": stats,
    "export": export,
}
