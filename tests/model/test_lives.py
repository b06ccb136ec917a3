"""Lives: what the events tell of when a worker lived, and no more than they tell."""

from datetime import timedelta

from crewlog.model.events import JsonObject, Line, WorkerState, utc
from crewlog.model.fold import empty
from crewlog.model.lives import Life, Lives

_AT = "2026-11-24T07:00:{:02d}.000000Z"


def _line(seq: int, kind: str, sid: str, *, by: int = 1, **data: object) -> Line:
    """Return a line at second `seq`, written by the process `by`."""
    given: JsonObject = data  # type: ignore[assignment]
    if kind == "worker.registered":
        given = {
            "pid": 7, "state": "ready", "sock": "", "version": "1", "labels": {}, "meta": {},
            "identity": None, "owner": None, **given,
        }  # fmt: skip
    return {
        "v": 1, "seq": seq, "ts": _AT.format(seq), "type": kind, "sid": sid,
        "actor": {"pid": by}, "data": given, "synced": 0, "prev": "", "crc": "",
    }  # fmt: skip


def _lives(*lines: Line) -> list[Life]:
    sample = Lives()
    for line in lines:
        sample.add(line)
    return sample.every


def test_lost_worker_is_proven_only_up_to_its_last_own_event() -> None:
    """What others record of a worker is no proof that it lives; what it does itself is."""
    (life,) = _lives(
        _line(1, "worker.registered", "a"),
        _line(5, "worker.updated", "a", by=7, labels={}),
        _line(9, "worker.updated", "a", by=1, labels={}),
        _line(30, "worker.lost", "a", cause="no_process"),
    )
    assert (life.end, life.cause, life.crashed) == (WorkerState.LOST, "no_process", True)
    assert life.seen_at == utc(_AT.format(5))
    assert life.ended_at == utc(_AT.format(30))
    assert life.proven == timedelta(seconds=4)


def test_stop_with_a_signal_proves_life() -> None:
    """It is written while the process is held, after its identity was checked."""
    (life,) = _lives(
        _line(1, "worker.registered", "a"),
        _line(6, "worker.stop_requested", "a", signal=15, reason="deploy"),
        _line(20, "worker.lost", "a"),
    )
    assert life.proven == timedelta(seconds=5)


def test_ends_are_told_apart() -> None:
    """Orderly, crashed with a code, ended by a signal, released, and alive."""
    lives = _lives(
        *(_line(n, "worker.registered", f"w{n}") for n in range(1, 6)),
        _line(11, "worker.exited", "w1", code=0, signal=None),
        _line(12, "worker.exited", "w2", code=3, signal=None),
        _line(13, "worker.exited", "w3", code=None, signal=9),
        _line(14, "worker.released", "w4", reason="handed over"),
    )
    assert [life.reason() for life in lives] == [
        "code 0", "code 3", "signal 9", "released", "alive",
    ]  # fmt: skip
    assert [life.crashed for life in lives] == [False, True, True, False, False]
    assert lives[0].proven == timedelta(seconds=10)


def test_second_registration_is_another_life() -> None:
    """A sid may live again; its lives are counted."""
    lives = _lives(
        _line(1, "worker.registered", "a"),
        _line(2, "worker.exited", "a", code=1),
        _line(3, "worker.registered", "a"),
    )
    assert [(life.generation, life.end) for life in lives] == [(1, WorkerState.FAILED), (2, None)]


def test_exit_known_after_a_loss_replaces_it() -> None:
    """The exit code came late: the end is then known as it was."""
    (life,) = _lives(
        _line(1, "worker.registered", "a"),
        _line(2, "worker.lost", "a"),
        _line(3, "worker.exited", "a", code=4),
    )
    assert (life.end, life.code) == (WorkerState.FAILED, 4)


def test_workers_of_an_older_state_live_on() -> None:
    """Where the beginning of the history was dropped, the state before it says who lived."""
    state = empty()
    state.apply(_line(1, "worker.registered", "a"))
    state.apply(_line(2, "worker.registered", "b"))
    state.apply(_line(3, "worker.exited", "b", code=0))
    lives = Lives(state.records.values())
    lives.add(_line(4, "worker.exited", "a", code=0))
    lives.add(_line(5, "worker.registered", "b"))
    assert [(life.sid, life.generation, life.seq) for life in lives.every] == [
        ("a", 1, 1), ("b", 2, 5),
    ]  # fmt: skip
    assert lives.every[0].ended_at == utc(_AT.format(4))
