"""Copy a store with its whole history to another place, of the same or another kind, and prove it.

Every line is copied byte for byte, so seqs, hashes, cursors and anchors stay true; the store keeps
its identity. The target does not exist before its last step, and a copy that was interrupted before
that is begun anew (on etcd) or refused (a directory that is not empty). Writers of the source are
kept out where it is a directory; where it is a cluster, a change that comes between is noticed. The
source stays as it is: who still writes there afterwards writes into the past.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

from crewlog.errors import HistoryDiverged
from crewlog.model import chain
from crewlog.model.limits import LOCK_WAIT_S
from crewlog.place import Place, locate
from crewlog.store import Store
from crewlog_compactor.copy import Copy, Progress, begin
from crewlog_compactor.engines import maintenance
from crewlog_compactor.reports import VerifyReport
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

    Guarantee: the target is there whole, or not at all. Cursors are copied, leases are not: a
    worker is judged by its process until it registers again.
    Raises: StoreMissing; NotAStore where the target is not empty; LockBusy where the source is
    being written to; DataDamaged.
    """
    origin, place = _places(source, target)
    with ExitStack() as undo:
        store = origin.open(wait_s=LOCK_WAIT_S)
        undo.callback(store.close)
        undo.enter_context(maintenance(store.kind).still(store))
        copy = begin(store, progress or _silent)
        maintenance(place.kind).fill(copy, place)
        return _proven(copy, place)


def backup(source: Where, target: Where, *, progress: Progress | None = None) -> MigrateReport:
    """Copy a store as it is now to a place where there is none, beside its writers, and verify it.

    Every event that was acknowledged before this was called is in the copy, which opens as it is.

    Guarantee: the copy is there whole, or not at all. Writers of the source go on; a compaction
    waits. Cursors are copied, leases are not.
    Raises: StoreMissing; NotAStore where the target is not empty; LockBusy where the source is
    being compacted; DataDamaged.
    """
    origin, place = _places(source, target)
    store = origin.open(wait_s=LOCK_WAIT_S)
    try:
        with maintenance(store.kind).kept(store):
            copy = begin(store, progress or _silent, live=True)
            maintenance(place.kind).fill(copy, place)
            return _proven(copy, place)
    finally:
        store.close()


def _places(source: Where, target: Where) -> tuple[Place, Place]:
    origin, place = locate(source), locate(target)
    if str(origin) == str(place):
        message = "source and target are the same place"
        raise ValueError(message)
    return origin, place


def _silent(_done: int, _whole: int) -> None:
    return


# -- proof ----------------------------------------------------------------------------------


def _proven(copy: Copy, place: Place) -> MigrateReport:
    """Read the copy back: verify it, and hold counts, hashes and state against the source."""
    made = place.open(wait_s=LOCK_WAIT_S)
    try:
        report = verify(str(place))
        last_hash = _last_hash(made)
        if not report.ok or (report.events, last_hash) != (copy.events, copy.hash):
            raise HistoryDiverged(str(place), seq=_differing(report, copy))
        with made.state() as state:
            there = state.copy()
        if (copy.state.records, copy.state.totals) != (there.records, there.totals):
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
    return chain.hash_after(line, raw).hex()


def _differing(report: VerifyReport, copy: Copy) -> int:
    return min([f.seq for f in report.findings if f.seq is not None], default=copy.seq)
