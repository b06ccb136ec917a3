"""The state at one seq, as callers hold it: frozen, its workers built when they are asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from crewlog.model.events import Worker, utc, worker_of
from crewlog.model.records import Records


class Workers(Mapping[str, Worker]):
    """Workers by sid, each built when it is asked for."""

    __slots__ = ("_records",)

    def __init__(self, records: Records) -> None:
        """Keep records that are not moved on."""
        self._records = records

    def __getitem__(self, sid: str) -> Worker:
        """Return the worker of that sid, KeyError if there is none."""
        return worker_of(self._records[sid])

    def __iter__(self) -> Iterator[str]:
        """Yield the sids, in order of registration."""
        return iter(self._records)

    def __len__(self) -> int:
        """Count the workers."""
        return len(self._records)

    def living(self) -> Iterator[Worker]:
        """Yield those that are not final; of the ended, however many, none is looked at."""
        return map(worker_of, self._records.living())

    def revs(self) -> dict[str, int]:
        """Return each worker's rev, without building the workers."""
        return {sid: record["rev"] for sid, record in self._records.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The state at one seq: every worker that is not pruned, in order of registration."""

    seq: int
    workers: Workers

    def get(self, sid: str) -> Worker | None:
        """Return the worker of that sid, None if there is none."""
        return self.workers.get(sid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Past(State):
    """The state as it was from `since`, the time of the event `seq`, until the next one.

    `until` is None where there is none yet, `since` where the event is not kept. `disputed` is a
    range of seqs (first, last) where the clock stepped back: these events claim times on both sides
    of the time that was asked for.
    """

    since: datetime | None
    until: datetime | None
    disputed: tuple[int, int] | None


def state_of(seq: int, records: Records) -> State:
    """Build the frozen state from records that are not moved on."""
    return State(seq=seq, workers=Workers(records))


def past_of(
    seq: int,
    records: Records,
    *,
    since: str | None,
    until: str | None,
    disputed: tuple[int, int] | None,
) -> Past:
    """Build the frozen state of a time in the past."""
    return Past(
        seq=seq,
        workers=Workers(records),
        since=None if since is None else utc(since),
        until=None if until is None else utc(until),
        disputed=disputed,
    )
