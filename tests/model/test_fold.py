"""The table of transitions, exhaustively, and the laws of folding."""

import itertools

import pytest

from crewlog.errors import InvalidTransition, WorkerExists, WorkerNotFound
from crewlog.model import events, fold
from crewlog.model.events import FINAL, LIVING, JsonObject, Line, Record, WorkerState

TYPES = (
    events.REGISTERED, events.READY, events.UPDATED, events.DRAINING, events.STOP_REQUESTED,
    events.EXITED, events.LOST, events.RELEASED, events.PRUNED,
)  # fmt: skip
REGISTERED: JsonObject = {
    "pid": 1, "state": "starting", "sock": "", "version": "", "labels": {"a": "1"}, "meta": {},
    "identity": None, "owner": None,
}  # fmt: skip
# What each event may meet, written down once more and by hand: None is "no such worker".
MAY: dict[str, set[str | None]] = {
    events.REGISTERED: {None, "exited", "failed", "lost", "released"},
    events.READY: {"starting"},
    events.UPDATED: {"starting", "ready", "draining", "stopping"},
    events.DRAINING: {"starting", "ready"},
    events.STOP_REQUESTED: {"starting", "ready", "draining", "stopping"},
    events.EXITED: {"starting", "ready", "draining", "stopping", "lost"},
    events.LOST: {"starting", "ready", "draining", "stopping"},
    events.RELEASED: {"starting", "ready", "draining", "stopping"},
    events.PRUNED: {"exited", "failed", "lost", "released"},
}


def line(seq: int, kind: str, data: JsonObject | None = None, sid: str = "w") -> Line:
    return {
        "v": 1, "seq": seq, "ts": f"2026-11-24T00:00:{seq % 60:02d}.000000Z", "type": kind,
        "sid": sid, "actor": {}, "data": data or {}, "synced": 0, "prev": "", "crc": "",
    }  # fmt: skip


def record_in(state: str | None) -> Record | None:
    if state is None:
        return None
    record = fold.after(line(1, events.REGISTERED, REGISTERED), None)
    assert record is not None
    record["state"] = state
    return record


@pytest.mark.parametrize(
    ("kind", "state"), list(itertools.product(TYPES, [None, *(s.value for s in WorkerState)]))
)
def test_event_in_every_state_is_allowed_or_refused_as_the_table_says(
    kind: str, state: str | None
) -> None:
    """Refusing before the write and folding after it agree, for every pair."""
    record = record_in(state)
    data = REGISTERED if kind == events.REGISTERED else {}
    if state in MAY[kind]:
        fold.refuse(kind, "w", record)
        fold.after(line(2, kind, data), record)
    else:
        with pytest.raises((InvalidTransition, WorkerExists, WorkerNotFound)):
            fold.refuse(kind, "w", record)
        with pytest.raises(fold.FoldError):
            fold.after(line(2, kind, data), record)


@pytest.mark.parametrize(
    ("data", "state"),
    [
        ({"code": 0}, "exited"),
        ({"code": 1}, "failed"),
        ({"signal": 9}, "failed"),
        ({"code": 1, "expected": True}, "exited"),
        ({"signal": 15, "expected": True}, "exited"),
        ({}, "exited"),
    ],
)
def test_exit_state_is_failed_only_where_known_bad_and_unasked(
    data: JsonObject, state: str
) -> None:
    """An exit is a failure only where it is known to be one."""
    record = fold.after(line(2, events.EXITED, data), record_in("ready"))
    assert record is not None
    assert record["state"] == state


def test_registered_again_counts_generation_and_moves_last() -> None:
    """A sid that had ended may be registered again."""
    state = fold.empty()
    state.apply(line(1, events.REGISTERED, REGISTERED, "a"))
    state.apply(line(2, events.REGISTERED, REGISTERED, "b"))
    state.apply(line(3, events.LOST, {"cause": "x"}, "a"))
    state.apply(line(4, events.REGISTERED, REGISTERED, "a"))
    assert [r["sid"] for r in state.sessions()] == ["b", "a"]
    assert state.records["a"]["generation"] == 2
    assert state.totals == {events.REGISTERED: 3, events.LOST: 1}


def test_patch_merges_labels_and_null_removes() -> None:
    """A patch names what changes; null removes."""
    record = record_in("ready")
    patched = fold.after(line(2, events.UPDATED, {"labels": {"b": "2", "a": None}}), record)
    assert patched is not None
    assert patched["labels"] == {"b": "2"}
    assert record is not None
    assert record["labels"] == {"a": "1"}, "the old record stays as it was"


def test_unknown_worker_event_leaves_the_state() -> None:
    """An event of a newer version is passed over."""
    record = record_in("ready")
    assert fold.after(line(2, "worker.blessed"), record) is record


def test_registration_with_an_impossible_pid_is_damage() -> None:
    """In a file, pid 0 is corruption."""
    with pytest.raises(fold.FoldError, match="pid 0"):
        fold.after(line(1, events.REGISTERED, {**REGISTERED, "pid": 0}), None)


def test_registration_in_no_state_that_there_is_says_so() -> None:
    """In a file, that is corruption, too."""
    with pytest.raises(fold.FoldError, match="'asleep' is not a valid WorkerState"):
        fold.after(line(1, events.REGISTERED, {**REGISTERED, "state": "asleep"}), None)


def test_states_are_living_or_final() -> None:
    """Every state is one or the other."""
    assert set(WorkerState) == LIVING | FINAL
    assert not LIVING & FINAL
