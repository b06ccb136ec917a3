"""Turn events into lives: which worker lived from when to when, and how it ended. Pure.

An end is known as exactly as it was recorded: the end of an exited worker is a time; of a lost one
only that it lies between its last proof of life and the time its death was recorded.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, cast

from crewlog.model import events
from crewlog.model.events import Line, Record, WorkerState, utc
from crewlog.model.fold import exit_state

_RELEVANT: Final = events.ENDING | {
    events.REGISTERED,
    events.READY,
    events.UPDATED,
    events.DRAINING,
    events.STOP_REQUESTED,
}


@dataclass(slots=True, kw_only=True)
class Life:
    """One worker from its registration to its end; times aware and UTC.

    `seq` is that of the registration, kept or not. `generation` counts the lives of a sid, also
    where a record was pruned between two: that of `Worker` then begins anew. `seen_at` is the last
    proof of life. `ended_at` and `end` are None while it has not ended as far as the registry
    knows; `end` is exited, failed, lost or released. `cause` is why it counts as lost, or was
    released.
    """

    sid: str
    generation: int
    pid: int
    version: str
    seq: int
    began_at: datetime
    seen_at: datetime
    ended_at: datetime | None = None
    end: WorkerState | None = None
    code: int | None = None
    signal: int | None = None
    cause: str | None = None

    @property
    def crashed(self) -> bool:
        """Say whether it ended as nobody had asked it to."""
        return self.end in {WorkerState.FAILED, WorkerState.LOST}

    @property
    def proven_until(self) -> datetime:
        """Return until when it lived for certain: its end, or where nobody saw that, its proof."""
        if self.ended_at is None or self.end == WorkerState.LOST:
            return self.seen_at
        return self.ended_at

    @property
    def proven(self) -> timedelta:
        """Return how long it lived for certain."""
        return max(self.proven_until - self.began_at, timedelta(0))

    def reason(self) -> str:
        """Say in a word or two how it ended."""
        if self.end is None:
            return "alive"
        if self.signal is not None:
            return f"signal {self.signal}"
        if self.code is not None:
            return f"code {self.code}"
        if self.end == WorkerState.LOST:
            return f"lost: {self.cause}" if self.cause else "lost"
        return self.end.value


class Lives:
    """Lives as the events tell of them, in order of registration."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        """Begin with the workers of an older state, whose beginning is no longer kept."""
        self.every: list[Life] = []
        self._open: dict[str, Life] = {}
        self._generations: dict[str, int] = {}
        for record in records:
            self._generations[record["sid"]] = record["generation"]
            if WorkerState(record["state"]) in events.LIVING:
                began = utc(record["created_at"])
                self._begin(
                    Life(
                        sid=record["sid"],
                        generation=record["generation"],
                        pid=record["pid"],
                        version=record["version"],
                        seq=record["registered_seq"],
                        began_at=began,
                        seen_at=began,
                    )
                )

    def add(self, line: Line) -> None:
        """Take one event; the store's own are passed over."""
        kind = line["type"]
        if kind not in _RELEVANT:
            return
        when, data = utc(line["ts"]), line["data"]
        if kind == events.REGISTERED:
            self._register(line, when)
            return
        life = self._open.get(line["sid"])
        if life is None:  # exited after it was lost: the end is known better
            life = self._lost(line["sid"]) if kind == events.EXITED else None
            if life is None:
                return
        if kind in events.ENDING:
            self._end(life, line, when)
        elif line["actor"].get("pid") == life.pid or "signal" in data:
            life.seen_at = max(life.seen_at, when)  # it acted itself, or was held when it was asked

    def _register(self, line: Line, when: datetime) -> None:
        sid, data = line["sid"], line["data"]
        generation = self._generations.get(sid, 0) + 1
        self._generations[sid] = generation
        created = data.get("created_at")
        began = utc(created) if isinstance(created, str) else when
        self._begin(
            Life(
                sid=sid,
                generation=generation,
                pid=cast("int", data["pid"]),
                version=str(data.get("version") or ""),
                seq=line["seq"],
                began_at=began,
                # of one that was taken over when it was dead nobody saw more than that it began
                seen_at=when if data.get("identity") is not None else began,
            )
        )

    def _begin(self, life: Life) -> None:
        self.every.append(life)
        self._open[life.sid] = life

    def _lost(self, sid: str) -> Life | None:
        for life in reversed(self.every):
            if life.sid == sid:
                return life if life.end == WorkerState.LOST else None
        return None

    def _end(self, life: Life, line: Line, when: datetime) -> None:
        data = line["data"]
        life.ended_at = max(when, life.began_at)
        life.code = cast("int | None", data.get("code"))
        life.signal = cast("int | None", data.get("signal"))
        cause = data.get("cause", data.get("reason"))
        life.cause = None if cause is None else str(cause)
        match line["type"]:
            case events.EXITED:
                life.end = exit_state(data)
            case events.LOST:
                life.end = WorkerState.LOST
            case _:
                life.end = WorkerState.RELEASED
        self._open.pop(life.sid, None)
