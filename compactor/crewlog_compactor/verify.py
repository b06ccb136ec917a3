"""Verify: read everything, change nothing, report every finding, refold and compare."""

import os
from collections.abc import Callable

from crewlog.place import locate
from crewlog_compactor.anchor import Anchor
from crewlog_compactor.engines import maintenance
from crewlog_compactor.reports import VerifyReport


def verify(
    where: str | os.PathLike[str] | None = None,
    *,
    anchor: Anchor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a whole store: every line, the chain, the files, and the snapshots against the history.

    An `anchor` that was kept elsewhere shows what no store can show of itself: a history that was
    rewritten or cut by somebody who may write it. `progress` is told how many segments of how many
    are read.
    Raises: StoreMissing if there is none, NotAStore where something else is, and UnsafePermissions;
    an unreadable file is StorageFailed, never a finding.
    """
    place = locate(where)
    return maintenance(place.kind).verify(place, anchor=anchor, progress=progress)
