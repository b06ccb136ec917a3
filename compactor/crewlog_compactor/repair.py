"""Make a store usable again after a failed sync or damage, and lose nothing unsaid."""

import os
import re
from collections.abc import Sequence
from typing import Final

from crewlog.place import locate
from crewlog_compactor.engines import maintenance
from crewlog_compactor.reports import Range, RepairReport


def repair(
    where: str | os.PathLike[str] | None = None,
    *,
    yes: bool = False,
    accept_loss: Sequence[Range] = (),
) -> RepairReport:
    """Say what a repair would do, and with `yes` do it; durable on return.

    Raises: LossRefused where acknowledged events are lost that `accept_loss` does not name (first,
    last); HistoryDiverged where lines contradict each other and nobody can know which is right;
    StoreMissing, LockBusy, StorageFailed; Unsupported where the store is no directory.
    """
    place = locate(where)
    return maintenance(place.kind).repair(place, yes=yes, accept_loss=list(accept_loss))


_RANGE: Final = re.compile(r"([0-9]{1,19})\.\.([0-9]{1,19})")


def parse_range(text: str) -> Range:
    """Read `FIRST..LAST`.

    Raises: ValueError for anything else.
    """
    given = _RANGE.fullmatch(text)
    if given is None or int(given[1]) > int(given[2]):
        message = f"{text!r} is no range of events: FIRST..LAST, as `crewlog repair` prints it"
        raise ValueError(message)
    return int(given[1]), int(given[2])
