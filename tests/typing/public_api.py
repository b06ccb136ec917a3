"""The public API as type checkers see it: read by mypy and pyright (`make lint`), never run."""

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, assert_type

import crewlog
from crewlog_compactor import (
    Anchor,
    CollectReport,
    CompactReport,
    RepairReport,
    VerifyReport,
    anchor,
    collect,
    compact,
    repair,
    verify,
)


def changes(reg: crewlog.Registry) -> None:
    """What changes something returns what it made."""
    worker = assert_type(
        reg.register("a", labels={"k": "v"}, meta={"n": [1, None]}), crewlog.Worker
    )
    assert_type(reg.update("a", labels={"k": None}, expect=worker.rev), crewlog.Worker)
    assert_type(reg.exited("a", code=0), crewlog.Event)
    assert_type(reg.remove("a", reason="x"), crewlog.Event)
    assert_type(reg.spawn("b", ["true"]), crewlog.Worker)
    assert_type(reg.ensure("b", ["true"], ready=True), crewlog.Worker)
    assert_type(reg.stop("b", grace_s=1, reason="x"), crewlog.Event)
    with reg.batch() as batch:
        assert_type(batch, crewlog.Batch)
        batch.register("c")
        batch.update("c", state="ready")
    assert_type(batch.last_seq, int | None)


def reads(reg: crewlog.Registry, when: datetime) -> None:
    """What reads returns frozen values."""
    assert_type(reg.get("a"), crewlog.Worker | None)
    assert_type(reg.workers(all=True), list[crewlog.Worker])
    assert_type(reg.last_seq, int)
    assert_type(reg.liveness("a"), crewlog.Liveness)
    assert_type(reg.history(sid="a", types=["worker.lost"], since=when), Iterator[crewlog.Event])
    assert_type(reg.at(when), crewlog.Past)
    assert_type(reg.at(7), crewlog.Past)
    assert_type(reg.state(), crewlog.State)
    assert_type(reg.state().get("a"), crewlog.Worker | None)
    assert_type(reg.lives(), list[crewlog.Life])


def values(worker: crewlog.Worker, event: crewlog.Event, liveness: crewlog.Liveness) -> None:
    """The fields that are promised."""
    assert_type(worker.sid, str)
    assert_type(worker.pid, int)
    assert_type(worker.created_at, datetime)
    assert_type(worker.state, crewlog.WorkerState)
    assert_type(worker.labels, Mapping[str, str])
    assert_type(worker.rev, int)
    assert_type(worker.identity, crewlog.Identity | None)
    assert_type(worker.exit, crewlog.Exit | None)
    assert_type(event.seq, int)
    assert_type(event.raw, bytes)
    assert_type(liveness.verdict, crewlog.Verdict)
    assert_type(liveness.alive, bool)


def follows(reg: crewlog.Registry) -> None:
    """An item says by its kind what it is."""
    with reg.watch(after=None, sids=["a"], cursor="c", on_compacted="raise") as items:
        assert_type(items, crewlog.Watch)
        for item in items:
            match item.kind:
                case "change":
                    assert_type(item.event, crewlog.Event)
                case "synced":
                    assert_type(item.state, crewlog.State | None)
                case "reset":
                    assert_type(item.reason, Literal["compacted", "lost", "replaced"])
                    assert_type(item.lost, tuple[int, int] | None)
        assert_type(items.position, int)
    assert_type(reg.subscribe(lambda item: None, on_error="retry"), crewlog.Subscription)
    assert_type(reg.mirror(), crewlog.Mirror)
    assert_type(reg.wait("a", state="ready", timeout_s=1.0), crewlog.Worker)


async def awaits() -> None:
    """The same verbs as coroutines."""
    async with crewlog.aopen() as reg:
        assert_type(reg, crewlog.AsyncRegistry)
        assert_type(await reg.register("a"), crewlog.Worker)
        assert_type(await reg.update("a", state="ready"), crewlog.Worker)
        assert_type(await reg.get("a"), crewlog.Worker | None)
        assert_type(await reg.last_seq, int)
        async for event in reg.history(sid="a"):
            assert_type(event, crewlog.Event)
        async with reg.watch(after="now") as items:
            assert_type(items, crewlog.AsyncWatch)


def jobs(reg: crewlog.Registry, place: Path) -> None:
    """The job of cron, and what an operator does."""
    report = assert_type(compact(reg, keep_history=timedelta(days=90)), CompactReport)
    assert_type(report.collected, CollectReport | None)
    assert_type(collect(reg, dry_run=True).lost, tuple[str, ...])
    assert_type(verify(place).ok, bool)
    assert_type(verify(place), VerifyReport)
    assert_type(repair(place, yes=True, accept_loss=[(1, 2)]), RepairReport)
    assert_type(anchor(reg), Anchor)


def errors() -> None:
    """Every error is a CrewlogError, with an outcome."""
    try:
        crewlog.open("/nowhere", lock_timeout_s=1.0, actor="me").register("a")
    except crewlog.LockBusy as error:
        assert_type(error.holder, str)
    except crewlog.CrewlogError as error:
        assert_type(error.outcome, Literal["not_written", "unknown", "written"])
        assert_type(error.code, str)
