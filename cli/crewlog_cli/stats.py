"""Count: how many workers lived, how long, how they ended, and who starts again and again."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import click

from crewlog import events
from crewlog.events import WorkerState, timestamp
from crewlog.liveness import Verdict
from crewlog.lives import Life
from crewlog.registry import Registry
from crewlog_cli import metrics, shell, text, words
from crewlog_cli.shell import Shell, command

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
@click.option("--since", metavar="TIME", help="Only lives that began from this time on.")
@click.option("--prometheus", metavar="FILE", help="Write metrics for a textfile collector.")
def stats(sh: Shell, *, since: str | None, prometheus: str | None) -> None:
    """Count workers by state and liveness, how long they live and how they end, and bytes.

    The life of a lost worker counts to its last proof of life. Three starts of one sid within ten
    minutes are flapping.
    """
    first = words.moment(since, sh)
    reg = sh.existing()
    if prometheus is not None:
        metrics.write(reg, Path(prometheus))
        if sh.json:
            sh.document({"seq": reg.last_seq, "prometheus": prometheus})
        return
    with shell.progress("reading") as told:
        lives = reg.lives(progress=told)
    found = _ends([life for life in lives if first is None or life.began_at >= first])
    if sh.json:
        sh.document(_document(reg, found))
    else:
        _print(sh, reg, found)


def _document(reg: Registry, found: _Ends) -> dict[str, object]:
    compacted = reg.compacted()
    return {
        "last_seq": reg.last_seq,
        "snapshot_seq": 0 if compacted is None else compacted[0],
        "compacted_at": None if compacted is None else timestamp(compacted[1]),
        "workers": population(reg),
        "liveness": _verdicts(reg),
        "events": dict(sorted(reg.totals().items())),
        "lives": {
            "started": found.started,
            "ended": found.ended,
            "crashed": found.crashed,
            "crash_ratio": found.crash_ratio,
            "lifetime_p50_s": found.quantile(0.50),
            "lifetime_p95_s": found.quantile(0.95),
            "causes": dict(found.causes.most_common()),
            "restarts": dict(found.restarts.most_common()),
            "flapping": found.flapping,
        },
        "bytes": reg.session.store().sizes(),
    }


def population(reg: Registry) -> dict[str, int]:
    """Count the listed workers by state; every state is named."""
    found = Counter(worker.state for worker in reg.workers(all=True))
    return {state.value: found[state] for state in WorkerState}


def _verdicts(reg: Registry) -> dict[str, int]:
    found = Counter(judged.verdict for judged in reg.judge(reg.workers()))
    return {verdict.value: found[verdict] for verdict in Verdict}


def _print(sh: Shell, reg: Registry, found: _Ends) -> None:
    compacted = reg.compacted()
    when = "never" if compacted is None else text.exact(compacted[1], utc=sh.utc)
    covered = 0 if compacted is None else compacted[0]
    p50, p95 = found.quantile(0.50), found.quantile(0.95)
    ratio = found.crash_ratio
    rows = [
        ["last seq", str(reg.last_seq)],
        ["last compaction", f"{when} up to seq {covered}" if covered else when],
        *([f"workers {name}", str(count)] for name, count in population(reg).items() if count),
        *([f"liveness {name}", str(count)] for name, count in _verdicts(reg).items() if count),
        ["started", str(found.started)],
        ["ended", str(found.ended)],
        ["crashed", "0" if not ratio else f"{found.crashed} ({ratio:.1%} of the ended)"],
    ]
    if p50 is not None and p95 is not None:
        rows.append(["lifetime p50", text.duration(timedelta(seconds=p50))])
        rows.append(["lifetime p95", text.duration(timedelta(seconds=p95))])
    rows += [[f"ended by {what}", str(count)] for what, count in found.causes.most_common(_SHOWN)]
    rows += [[f"restarts {sid}", str(n)] for sid, n in found.restarts.most_common(_SHOWN)]
    rows += [
        [f"flapping {sid}", f"{most} starts in {text.duration(_FLAP_SPAN)}"]
        for sid, most in list(found.flapping.items())[:_SHOWN]
    ]
    rows += [[f"events {name}", str(count)] for name, count in sorted(reg.totals().items())]
    rows += [
        [f"bytes {name}", text.size(count)] for name, count in reg.session.store().sizes().items()
    ]
    sh.table(["what", "value"], rows)
    began = next((event.ts for event in reg.history(types=[events.SEGMENT])), datetime.now(UTC))
    sh.note(f"lives since {text.exact(began, utc=sh.utc)}; events since the store began")


COMMANDS: Final = {"stats": stats}
