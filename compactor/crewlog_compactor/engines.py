"""Know what maintains which kind of store: one table, and nothing else asks for a kind."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final, Protocol, cast

from crewlog.host import no_fork
from crewlog.model.arguments import Packing
from crewlog.place import Place
from crewlog.store import Kind, Store
from crewlog_compactor.anchor import Anchor
from crewlog_compactor.collect import Collect
from crewlog_compactor.copy import Copy
from crewlog_compactor.reports import Check, CompactReport, Range, RepairReport, VerifyReport
from crewlog_compactor.retention import Keep

_MODULES: Final[dict[Kind, str]] = {
    "directory": "crewlog_compactor.local.engine",
    "etcd": "crewlog_compactor.etcd.engine",
}


class Maintenance(Protocol):
    """What is done to a whole store, by the kind of engine that keeps it."""

    def compact(
        self,
        store: Store,
        *,
        packing: Packing,
        collect: Collect,
        keep_history: Keep,
        dry_run: bool,
    ) -> CompactReport:
        """Compact; see `crewlog_compactor.compact`."""
        ...

    def verify(
        self, place: Place, *, anchor: Anchor | None, progress: Callable[[int, int], None] | None
    ) -> VerifyReport:
        """Check a whole store; see `crewlog_compactor.verify`."""
        ...

    def repair(self, place: Place, *, yes: bool, accept_loss: "list[Range]") -> RepairReport:
        """Repair; see `crewlog_compactor.repair`.

        Raises: Unsupported where there is none.
        """
        ...

    def kept(self, store: Store) -> AbstractContextManager[object]:
        """Keep compactions out for a block, where that can be done; writers go on."""
        ...

    def still(self, store: Store) -> AbstractContextManager[object]:
        """Keep writers and compactions out for a block, where that can be done."""
        ...

    def fill(self, copy: Copy, place: Place) -> None:
        """Write a copied history to a place where there is no store."""
        ...

    def checks(self, store: Store) -> Iterator[Check]:
        """Yield what a look at a store's surroundings finds."""
        ...

    def outlook(self, place: Place) -> tuple[str, list[Check]]:
        """Return why no store can be there ("" if one can), and what else is to be said."""
        ...


def maintenance(kind: Kind) -> Maintenance:
    """Return what maintains a kind of store."""
    with no_fork():
        return cast("Maintenance", importlib.import_module(_MODULES[kind]))
