"""Maintain a store in a directory; see engines.Maintenance."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import cast

from crewlog.local import create
from crewlog.local.log import Log
from crewlog.model import chain
from crewlog.model.limits import LOCK_WAIT_S
from crewlog.place import Place
from crewlog.store import Store
from crewlog_compactor.copy import Copy
from crewlog_compactor.local.compact import compact
from crewlog_compactor.local.health import checks, outlook
from crewlog_compactor.local.repair import repair
from crewlog_compactor.local.verify import verify

__all__ = ["checks", "compact", "fill", "kept", "outlook", "repair", "still", "verify"]


@contextmanager
def still(store: Store) -> Iterator[None]:
    """Keep writers and compactions out for a block."""
    log = cast("Log", store)  # its kind says so
    with log.take_compact_lock(), log.alone():
        yield


def kept(store: Store) -> AbstractContextManager[object]:
    """Keep compactions out for a block: what is read stays where it is."""
    return cast("Log", store).take_compact_lock()  # its kind says so


def fill(copy: Copy, place: Place) -> None:
    """Write a copied history to a directory where there is no store."""
    content = create.Content(
        copy.source.identity(),
        _segments(copy),
        copy.base if copy.base.last_seq else None,
        lambda: copy.sealed,
    )
    made = Log(create.create_with(place.path, content, wait_s=LOCK_WAIT_S))
    try:
        _copy_cursors(copy.source, made)
    finally:
        made.close()


def _segments(copy: Copy) -> Iterator[tuple[int, bytes]]:
    """Yield the history as segments: each ends with its seal."""
    first, rows = copy.first, []
    for line, raw in copy.lines():
        rows.append(raw + b"\n")
        if chain.is_end(line):
            yield first, b"".join(rows)
            first, rows = line["seq"] + 1, []
    copy.require_still()
    if rows:
        yield first, b"".join(rows)


def _copy_cursors(source: Store, target: Store) -> None:
    for cursor in source.cursors.every():
        if not cursor.damaged:
            target.cursors.own(cursor.name, start=cursor.seq, digest=cursor.digest).close()
