"""Verify: read everything, change nothing, report every finding, refold and compare.

Safe beside live writers and a running compaction; where a retention takes what is being read, the
reading begins again.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from crewlog import directory, layout, segments, snapshot
from crewlog.directory import Directory
from crewlog.errors import (
    NotAStore,
    SegmentMissing,
    SnapshotCorrupt,
)
from crewlog.forks import no_fork
from crewlog.place import DirectoryPlace, locate
from crewlog_compactor.anchor import Anchor
from crewlog_compactor.check import check
from crewlog_compactor.findings import Finding, VerifyReport


def verify(
    where: str | os.PathLike[str] | None = None,
    *,
    anchor: Anchor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a whole store: every line, the chain, the files, and the snapshots against the history.

    An `anchor` that was kept elsewhere shows what no store can show of itself: a history that was
    rewritten or cut by somebody who may write it. `progress` is told how many segments of how many
    are read. *Raises* StoreMissing if there is none, NotAStore where something else is, and
    UnsafePermissions; an unreadable file is StorageFailed, never a finding.
    """
    place = locate(where)
    if not isinstance(place, DirectoryPlace):
        with no_fork():
            from crewlog_compactor import etcd_check  # noqa: PLC0415 (few need it)

        return etcd_check.verify(place, anchor=anchor, progress=progress)
    return _verify(place.path, anchor=anchor, progress=progress)


def _verify(
    path: Path, *, anchor: Anchor | None, progress: Callable[[int, int], None] | None
) -> VerifyReport:
    try:
        opened = directory.open_existing(path)
    except NotAStore as error:
        if not (path / layout.STORE).exists():  # what is not there at all is no finding about it
            raise
        finding = Finding(code=error.code, path=str(path), message=str(error))
        return VerifyReport(events=0, last_seq=0, findings=(finding,))
    for _ in range(layout.VERIFY_TRIES):
        begun = _beginning(opened)
        try:
            report = check(opened, anchor=anchor, progress=progress)
        except SegmentMissing:  # a retention took it while we read; else it would be a finding
            if _beginning(opened) == begun:
                raise
        else:
            if report.ok or _beginning(opened) == begun:
                return report
    return check(opened, anchor=anchor, progress=progress)


def _beginning(opened: Directory) -> tuple[int, str]:
    """Say where the kept history begins: what was found is void where a retention moved that."""
    oldest = segments.all_of(opened)[:1]
    with contextlib.suppress(SnapshotCorrupt):
        base = snapshot.read_base(opened)
        return sum(oldest), "" if base is None else base.sha256
    return sum(oldest), "damaged"
