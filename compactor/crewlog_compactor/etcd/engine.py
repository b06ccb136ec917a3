"""Maintain a store in a cluster; see engines.Maintenance."""

from contextlib import AbstractContextManager, nullcontext

from crewlog.errors import Unsupported
from crewlog.place import Place
from crewlog.store import Store
from crewlog_compactor.etcd.check import verify
from crewlog_compactor.etcd.compact import compact
from crewlog_compactor.etcd.copy import fill
from crewlog_compactor.etcd.health import checks, outlook
from crewlog_compactor.reports import Range, RepairReport

__all__ = ["checks", "compact", "fill", "kept", "outlook", "repair", "still", "verify"]


def still(store: Store) -> AbstractContextManager[None]:  # noqa: ARG001 (nobody can be kept out)
    """Keep nobody out: a change that comes between is noticed."""
    return nullcontext()


def kept(store: Store) -> AbstractContextManager[None]:  # noqa: ARG001 (as above)
    """Keep nobody out: a part that a retention takes meanwhile is noticed."""
    return nullcontext()


def repair(
    place: Place,
    *,
    yes: bool,  # noqa: ARG001 (there is nothing to confirm)
    accept_loss: list[Range],  # noqa: ARG001 (as above)
) -> RepairReport:
    """Raise Unsupported: what a cluster has lost, only a backup of it can bring back."""
    raise Unsupported(
        "repair is for a directory",
        where=str(place),
        why="its events are kept by a cluster",
        remedy="See docs/etcd.md; to mend a store in a cluster, restore a backup of it",
    )
