"""Copy a store with its whole history to another place, of the same or another kind, and prove it.

Every line is copied byte for byte, so seqs, hashes, cursors and anchors stay true; the store keeps
its identity. The target does not exist before its last step, and a copy that was interrupted before
that is begun anew (on etcd) or refused (a directory that is not empty). Writers of the source are
kept out where it is a directory; where it is a cluster, a change that comes between is noticed. The
source stays as it is: who still writes there afterwards writes into the past.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

from crewlog import create, layout, segments
from crewlog.errors import HistoryDiverged
from crewlog.forks import no_fork
from crewlog.log import Log
from crewlog.place import DirectoryPlace, Place, locate
from crewlog.store import Store
from crewlog_compactor.copying import Copy, Progress, begin
from crewlog_compactor.findings import VerifyReport
from crewlog_compactor.verify import verify

Where: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateReport:
    """What was copied: events are all lines, the store's own too; `hash` is that of the last."""

    events: int
    last_seq: int
    hash: str
    workers: int
    cursors: int


def migrate(source: Where, target: Where, *, progress: Progress | None = None) -> MigrateReport:
    """Copy a store with its history to a place where there is none, and verify the copy.

    *Guarantee*: the target is there whole, or not at all. Cursors are copied, leases are not: a
    worker is judged by its process until it registers again. *Raises* StoreMissing; NotAStore where
    the target is not empty; LockBusy where the source is being written to; DataDamaged.
    """
    origin, place = locate(source), locate(target)
    if str(origin) == str(place):
        message = "source and target are the same place"
        raise ValueError(message)
    with ExitStack() as undo:
        store = origin.open(wait_s=layout.LOCK_WAIT_S)
        undo.callback(store.close)
        undo.enter_context(_still(store))
        copy = begin(store, progress or _silent)
        if isinstance(place, DirectoryPlace):
            _to_directory(copy, place)
        else:
            _to_etcd(copy, place)
        return _proven(copy, place)


def _to_etcd(copy: Copy, place: Place) -> None:
    with no_fork():
        from crewlog.etcd.place import EtcdPlace  # noqa: PLC0415 (few need it)
        from crewlog_compactor import etcd_copy  # noqa: PLC0415 (as above)

    assert isinstance(place, EtcdPlace)  # there are two kinds
    etcd_copy.write(copy, place)


def _silent(_done: int, _whole: int) -> None:
    return


def _still(store: Store) -> AbstractContextManager[object]:
    """Keep writers and compactions out, where that can be done."""
    return _alone(store) if isinstance(store, Log) else nullcontext()


@contextmanager
def _alone(log: Log) -> Iterator[None]:
    with log.take_compact_lock(), log.alone():
        yield


# -- to a directory -------------------------------------------------------------------------


def _to_directory(copy: Copy, place: DirectoryPlace) -> None:
    content = create.Content(
        copy.source.identity(),
        _segments(copy),
        copy.base if copy.base.last_seq else None,
        lambda: copy.sealed,
    )
    made = Log(create.create_with(place.path, content, wait_s=layout.LOCK_WAIT_S))
    try:
        _copy_cursors(copy.source, made)
    finally:
        made.close()


def _segments(copy: Copy) -> Iterator[tuple[int, bytes]]:
    """Yield the history as segments: each ends with its seal."""
    first, rows = copy.first, []
    for line, raw in copy.lines():
        rows.append(raw + b"\n")
        if segments.is_end(line):
            yield first, b"".join(rows)
            first, rows = line["seq"] + 1, []
    copy.require_still()
    if rows:
        yield first, b"".join(rows)


def _copy_cursors(source: Store, target: Store) -> None:
    for cursor in source.cursors.every():
        if not cursor.damaged:
            target.cursors.own(cursor.name, start=cursor.seq).close()


# -- proof ----------------------------------------------------------------------------------


def _proven(copy: Copy, place: Place) -> MigrateReport:
    """Read the copy back: verify it, and hold counts, hashes and state against the source."""
    made = place.open(wait_s=layout.LOCK_WAIT_S)
    try:
        report = verify(str(place))
        told = _last_hash(made)
        if not report.ok or (report.events, told) != (copy.events, copy.hash):
            raise HistoryDiverged(str(place), seq=_differing(report, copy))
        with made.state() as state:
            there = state.copy()
        with copy.source.state() as state:
            if (state.records, state.totals) != (there.records, there.totals):
                raise HistoryDiverged(str(place), seq=copy.seq)
        return MigrateReport(
            events=copy.events,
            last_seq=copy.seq,
            hash=copy.hash,
            workers=len(there.records),
            cursors=len(made.cursors.every()),
        )
    finally:
        made.close()


def _last_hash(store: Store) -> str:
    last = store.last_seq()
    (line, raw), *_ = list(store.read(last - 1))
    return segments.hash_after(line, raw).hex()


def _differing(report: VerifyReport, copy: Copy) -> int:
    return min([f.seq for f in report.findings if f.seq is not None], default=copy.seq)
