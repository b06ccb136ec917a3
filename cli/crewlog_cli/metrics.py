"""Write metrics in Prometheus' text format, for the textfile collector; no worker is named.

Counters come from totals that survive compaction and retention, so they never step back. Source:
prometheus.io, "Exposition formats" and "Metric and label naming".
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from crewlog.model.events import WorkerState
from crewlog.registry import Registry
from crewlog_cli import output


def write(reg: Registry, path: Path, *, took_s: float | None = None, refused: bool = False) -> None:
    """Put the metrics at a path, whole or not at all, readable by all.

    After a compaction `took_s` is how long it took, and `refused` that it collected nobody.
    """
    rows = list(_rows(reg))
    if took_s is not None:
        rows += _compaction(took_s, success=not refused)
    _put(path, rows)


def write_failure(path: Path, *, took_s: float) -> None:
    """Put at a path that a compaction failed, and nothing else: the registry may be unreadable."""
    _put(path, _compaction(took_s, success=False))


def _put(path: Path, rows: Iterable[str]) -> None:
    made = "".join(f"{row}\n" for row in rows)
    output.put_file(path, made.encode(), what="the metrics", option="--prometheus", public=True)


def _rows(reg: Registry) -> Iterator[str]:
    states = Counter(worker.state for worker in reg.workers(all=True))
    yield from _metric(
        "workers", "gauge", "Workers listed, by state.",
        {f'{{state="{state.value}"}}': states[state] for state in WorkerState},
    )  # fmt: skip
    totals = sorted(reg.totals().items())
    yield from _metric(
        "events_total", "counter", "Events ever recorded, by type.",
        {f'{{type="{kind}"}}': count for kind, count in totals},
    )  # fmt: skip
    yield from _metric("last_seq", "gauge", "Seq of the last durable event.", {"": reg.last_seq})
    compacted = reg.compacted()
    covered, written = compacted or (0, datetime.fromtimestamp(0, UTC))
    yield from _metric("snapshot_seq", "gauge", "Seq that registry.json covers.", {"": covered})
    yield from _metric(
        "snapshot_timestamp_seconds", "gauge", "When registry.json was written; 0: never.",
        {"": written.timestamp()},
    )  # fmt: skip
    yield from _metric(
        "bytes", "gauge", "Bytes on disk, by directory; of a cluster, its database.",
        {f'{{directory="{name}"}}': count for name, count in reg.sizes().items()},
    )  # fmt: skip


def _compaction(took_s: float, *, success: bool) -> Iterator[str]:
    now = datetime.now(UTC).timestamp()
    yield from _metric(
        "compaction_timestamp_seconds", "gauge", "When a compaction last ended.", {"": now}
    )
    yield from _metric(
        "compaction_duration_seconds", "gauge", "How long it took.", {"": round(took_s, 6)}
    )
    yield from _metric(
        "compaction_success", "gauge", "1; 0 where it failed, or collecting was refused.",
        {"": int(success)},
    )  # fmt: skip


def _metric(name: str, kind: str, summary: str, values: Mapping[str, float]) -> Iterator[str]:
    yield f"# HELP crewlog_{name} {summary}"
    yield f"# TYPE crewlog_{name} {kind}"
    for labels, value in values.items():
        yield f"crewlog_{name}{labels} {value}"
