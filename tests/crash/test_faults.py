"""Every call of every operation fails in turn, in every way: each outcome is as promised.

The faults are at the disk seam, call k of an operation, for every k until none fires. What the
caller is told is held against what is on the disk: "not_written" is not there and never comes,
a return is there, "unknown" may be either; nothing acknowledged before is ever lost; after a failed
sync nobody is acknowledged, whoever opened the store before or after, until a repair.
"""

import errno
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import stores
from crewlog.errors import CrewlogError, StorePoisoned
from crewlog.local import cursors, heads, layout, segments
from crewlog.model import chain
from crewlog.model.chain import Scan
from crewlog.registry import Registry
from crewlog_compactor import compact, repair, verify
from faults import FailingDisk, active_segment, another_boot, registry_on
from procs import files, forked
from stores import opened

pytestmark = pytest.mark.long

ERRORS = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EINTR]
CALLS_MAX = 400


@dataclass(frozen=True)
class Operation:
    """What to do on a prepared store, and which sids it asks to be registered."""

    prepare: Callable[[Path], None]
    work: Callable[[Registry], None]
    asks: tuple[str, ...] = ("new",)
    limits: Mapping[str, int] = field(default_factory=dict)
    boot: int = 0


def one(place: Path) -> None:
    """A store with one worker."""
    with opened(place) as reg:
        reg.register("old")


def several(place: Path) -> None:
    """A store with an archive, two snapshots and something to fold."""
    with opened(place) as reg:
        reg.register("old")
        for _ in range(3):
            reg.update("old", meta={"n": reg.last_seq})
            compact(reg, gc=False)
        reg.update("old", meta={"n": reg.last_seq})


def torn(place: Path) -> None:
    """A store whose last writer died in the middle of a line."""
    one(place)
    with active_segment(place).open("ab") as file:
        file.write(b'{"v":1,"seq":3,"half')


def nothing(_: Path) -> None:
    """No store."""


def batch(reg: Registry) -> None:
    """Three workers as one unit."""
    with reg.batch() as items:
        for sid in ("b1", "b2", "b3"):
            items.register(sid)


def cursor(reg: Registry) -> None:
    """A cursor is made, moved, closed and removed."""
    at = files(reg).directory
    with reg.watch(cursor="c", after="oldest") as items:
        items.drain()
    cursors.remove(at, "c")


def leased(reg: Registry) -> None:
    """A worker with a lease."""
    reg.register("new", lease=True)


def register(reg: Registry) -> None:
    """One worker."""
    reg.register("new")


def merge(reg: Registry) -> None:
    """Two compactions, of which the second puts archives together; each keeps a state."""
    compact(reg, gc=False)
    reg.update("old", meta={"n": reg.last_seq})
    compact(reg, gc=False)


FEW = {"archives_small": 3, "state_events": 1}
OPERATIONS = {
    "creation": Operation(nothing, register),
    "append": Operation(one, register),
    "batch": Operation(one, batch, ("b1", "b2", "b3")),
    "rotation": Operation(one, register, limits={"segment_bytes": 1200}),
    "compaction": Operation(several, lambda reg: ignore(compact(reg, gc=False)), ()),
    "retention": Operation(several, lambda reg: ignore(compact(reg, gc=False, keep_history=0)), ()),
    "archives put together": Operation(several, merge, (), limits=FEW),
    "cursors": Operation(one, cursor, ()),
    "lease": Operation(one, leased),
    "adoption of a dead writer's tail": Operation(torn, register),
    "recovery after a reboot": Operation(torn, register, boot=3),
}


def ignore(_: object) -> None:
    """Make an expression a statement."""


class Counted:
    """Fails call k, in one way; counts calls."""

    def __init__(self, k: int, number: int) -> None:
        """Fail the `k`th call with an errno."""
        self.k = k
        self.number = number
        self.calls = 0
        self.failed = ""

    def __call__(self, call: str) -> int | None:
        self.calls += 1
        if self.calls != self.k + 1:
            return None
        self.failed = call
        return self.number


@pytest.mark.parametrize("number", ERRORS, ids=lambda n: errno.errorcode[n])
@pytest.mark.parametrize("name", OPERATIONS)
def test_fault_at_every_call_ends_as_promised(
    fast: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Until no call is left to fail."""
    operation = OPERATIONS[name]
    stores.limit(**operation.limits)
    base = fast / "base"
    operation.prepare(base)
    fired = 0
    for k in range(CALLS_MAX):
        place = fast / f"k-{k}"
        if base.exists():
            shutil.copytree(base, place)
        fault = Counted(k, number)
        with another_boot(operation.boot + 1):
            _fail_once(place, operation, fault)
        shutil.rmtree(place, ignore_errors=True)
        if not fault.failed:
            break
        fired += 1
    assert fired >= 3, "the operation changes the disk"
    assert fired < CALLS_MAX


def _fail_once(place: Path, operation: Operation, fault: Counted) -> None:
    disk = FailingDisk()
    if place.exists():
        reg = registry_on(place, disk)
        before = opened(place)
    else:
        reg, before = opened(place), None
        disk.fault = fault
        try:
            reg = registry_on(place, disk)
        except CrewlogError as error:
            _held_against(place, operation, error.outcome, set())
            _goes_on(place, set())
            return
    disk.fault = fault
    outcome: str | None = None
    try:
        operation.work(reg)
        outcome = "durable"
    except CrewlogError as error:
        outcome = error.outcome
    finally:
        disk.fault = lambda _: None
    acknowledged = {"old"} if before is not None else set()
    _held_against(place, operation, outcome, acknowledged)
    if disk_poisoned(place):
        for registry in (reg, before, opened(place)):
            if registry is not None:
                with pytest.raises(StorePoisoned):
                    registry.register("later")
        assert repair(place, yes=True).done
    if outcome == "durable":
        acknowledged |= set(operation.asks)
    _goes_on(place, acknowledged, maybe=operation.asks if outcome == "unknown" else ())
    reg.close()
    if before is not None:
        before.close()


def disk_poisoned(place: Path) -> bool:
    """Say whether the store bears the mark of a failed sync."""
    return (
        any(finding.code == "store_poisoned" for finding in verify(place).findings)
        or (place / layout.POISON).exists()
    )


def _held_against(
    place: Path, operation: Operation, outcome: str | None, acknowledged: set[str]
) -> None:
    """Compare what the caller was told with what everybody can read."""
    with opened(place) as fresh:
        there = {worker.sid for worker in fresh.workers()}
    assert acknowledged <= there, "acknowledged before, and lost"
    asked = set(operation.asks)
    assert there & asked in (set(), asked), "a unit is split"
    match outcome:
        case "durable":
            assert asked <= there
        case "not_written":
            assert not there & asked
        case _:
            assert outcome == "unknown"


def _goes_on(place: Path, acknowledged: set[str], *, maybe: tuple[str, ...] = ()) -> None:
    """The next writer goes on, the one after a reboot too; nothing goes that was seen.

    What was written and is `unknown` may come with the next sync, as a unit.
    """
    with opened(place) as fresh:
        seen = {worker.sid for worker in fresh.workers()}
        fresh.register("after")
        before = {worker.sid for worker in fresh.workers()} - {"after"}
        assert before - seen in (set(), set(maybe))
        assert seen <= before
    with another_boot(9), opened(place) as later:
        later.register("later")
        there = {worker.sid for worker in later.workers()}
        assert there == before | {"after", "later"}
        assert acknowledged <= there
        compact(later, gc=False)
    assert verify(place).findings == ()


def test_short_write_at_every_call_is_cut_back_or_poisons(fast: Path) -> None:
    """Half of what was to be written arrives."""

    class Short(FailingDisk):
        """Takes half of the bytes of write k."""

        def __init__(self, k: int) -> None:
            super().__init__()
            self.k = k
            self.writes = 0
            self.cut_short = False

        def write(self, fd: int, data: bytes) -> int:
            self.writes += 1
            if self.writes == self.k + 1:
                self.cut_short = True
                return os.write(fd, data[: len(data) // 2])
            return super().write(fd, data)

    outcomes: set[tuple[str, str]] = set()
    for name, operation in OPERATIONS.items():
        base = fast / f"base-{name}"
        operation.prepare(base)
        for k in range(CALLS_MAX):
            place = fast / "k"
            if base.exists():
                shutil.copytree(base, place)
            disk = Short(k)
            acknowledged = {"old"} if base.exists() else set()
            try:
                with registry_on(place, disk) as reg:
                    operation.work(reg)
                acknowledged |= set(operation.asks)
            except CrewlogError as error:
                outcomes.add((name, error.outcome))
            _goes_on(place, acknowledged)
            shutil.rmtree(place)
            if not disk.cut_short:
                break
    assert {outcome for _, outcome in outcomes} == {"not_written"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_kill_at_every_call_loses_nothing(
    fast: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """SIGKILL before call k, for every k: what was acknowledged is there, the next one goes on."""
    operation = OPERATIONS[name]
    stores.limit(**operation.limits)
    base = fast / "base"
    operation.prepare(base)
    killed = 0
    for k in range(CALLS_MAX):
        place = fast / "k"
        if base.exists():
            shutil.copytree(base, place)
        before = {"old"} if base.exists() else set()
        with another_boot(operation.boot + 1):
            code = _killed(place, operation, k)
            if code == 0:
                before |= set(operation.asks)
            _goes_on(place, before, maybe=operation.asks)
        shutil.rmtree(place)
        if code == 0:
            break
        killed += 1
    assert 3 <= killed < CALLS_MAX


def _killed(place: Path, operation: Operation, k: int) -> int:
    class Deadly(FailingDisk):
        """Kills this process before call k."""

        def _meet(self, call: str) -> None:
            super()._meet(call)
            if len(self.calls) == k + 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        operation.work(registry_on(place, Deadly()))

    status = os.waitpid(forked(work), 0)[1]
    code = os.waitstatus_to_exitcode(status)
    assert code in {0, -signal.SIGKILL}
    return code


def test_negative_control_a_tail_glued_to_the_next_line_is_caught(
    fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that does not cut a dead one's half line makes one broken line of two."""
    from crewlog.local import recovery

    place = fast / "store"
    torn(place)

    def glued(_: object, source: segments.Segment, state: heads.AppendState) -> tuple[object, Scan]:
        scan = chain.scan(b"", offset=source.size(), seq=state.seq, prev=state.hash)
        return state._replace(end=source.size()), scan

    monkeypatch.setattr(recovery, "adopt", glued)
    with opened(place) as reg, pytest.raises(CrewlogError):
        reg.register("new")
        reg.workers()
    assert verify(place).findings != ()


def test_negative_control_an_unpoisoned_failure_is_caught(
    fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that goes on after a failed sync is what these tests are there to find."""
    from crewlog.local.sync import Syncer

    place = fast / "store"
    one(place)
    monkeypatch.setattr(Syncer, "poison", lambda *_: None)
    disk = FailingDisk()
    reg = registry_on(place, disk)
    disk.fault = lambda call: errno.EIO if call == "sync" else None
    with pytest.raises(CrewlogError) as caught:
        reg.register("new")
    assert caught.value.outcome == "unknown"
    disk.fault = lambda _: None
    assert not disk_poisoned(place)
    with opened(place) as next_one:
        assert next_one.register("later").rev > 0, "acknowledged over a hole"
