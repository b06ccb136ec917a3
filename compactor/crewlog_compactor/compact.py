"""Compact a store: collect, fold or seal, archive, retain; the job of cron."""

from functools import partial

from crewlog.local.archive import require
from crewlog.model.arguments import Packing
from crewlog.registry import Registry
from crewlog_compactor.collect import Ended, check_ended, collect_nobody, try_collect
from crewlog_compactor.engines import maintenance
from crewlog_compactor.reports import CompactReport
from crewlog_compactor.retention import Keep, check_keep


def compact(
    reg: Registry,
    *,
    gc: bool = True,
    force: bool = False,
    keep_history: Keep = None,
    keep_ended: Ended = None,
    packing: Packing = "gzip",
    dry_run: bool = False,
) -> CompactReport:
    """Collect the dead, fold the log into registry.json, archive what two snapshots cover.

    Guarantee: durable on return; safe to kill anywhere; writers go on meanwhile; no history is lost
    unless `keep_history` says so: None keeps all, a timedelta what is younger, an int so many bytes
    of archive, KeepEvents so many events; a cursor holds back what it needs.
    Args: `keep_ended` is the `keep` of `collect`: for how long, or how many, ended workers stay
    listed; `packing` of what is archived now, gzip or zstd (extra `[zstd]`); with `dry_run` nothing
    is written.
    Raises: LockBusy at once where another compaction runs, StoreMissing, DataDamaged, Unsupported.
    """
    if not isinstance(reg, Registry):
        message = f"compact takes a registry: compact(crewlog.open({reg!r}))"
        raise TypeError(message)
    check_keep(keep_history)
    keep = check_ended(keep_ended)
    packed, store = require(packing), reg.store()
    collect = partial(try_collect, reg, force=force, keep=keep, dry_run=dry_run)
    return maintenance(store.kind).compact(
        store,
        packing=packed,
        collect=collect if gc else collect_nobody,
        keep_history=keep_history,
        dry_run=dry_run,
    )
