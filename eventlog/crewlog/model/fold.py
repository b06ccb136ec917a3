"""Fold events into the state: a table of transitions, no I/O, no clock, no randomness.

`refuse` decides, before anything is written, whether an event may follow; `Fold.apply` carries
it out. Records are replaced, never changed in place, so a reader may keep one across folds.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, cast

from crewlog.errors import InvalidTransition, WorkerExists, WorkerNotFound
from crewlog.model import events
from crewlog.model.events import (
    FINAL,
    LIVING,
    ExitRecord,
    JsonObject,
    JsonValue,
    Line,
    Record,
    WorkerState,
)
from crewlog.model.records import Ended, Records, merged

# event -> the states it may meet; None stands for "no such worker"
_ALLOWED: Final[Mapping[str, frozenset[str | None]]] = {
    events.REGISTERED: FINAL | {None},
    events.READY: frozenset({WorkerState.STARTING}),
    events.UPDATED: LIVING,
    events.DRAINING: frozenset({WorkerState.STARTING, WorkerState.READY}),
    events.STOP_REQUESTED: LIVING,
    events.EXITED: LIVING | {WorkerState.LOST},
    events.LOST: LIVING,
    events.RELEASED: LIVING,
    events.PRUNED: FINAL,
}
_NEXT: Final = {
    events.READY: WorkerState.READY.value,
    events.DRAINING: WorkerState.DRAINING.value,
    events.STOP_REQUESTED: WorkerState.STOPPING.value,
    events.LOST: WorkerState.LOST.value,
    events.RELEASED: WorkerState.RELEASED.value,
}
_PATCHING: Final = frozenset({events.UPDATED, events.READY})
# A worker that ends in one of these states was asked to.
_EXPECTING: Final = frozenset({WorkerState.DRAINING, WorkerState.STOPPING})


class FoldError(ValueError):
    """A whole line that no correct writer can have written; the message is the reason."""


def refuse(event_type: str, sid: str, record: Record | None) -> None:
    """Raise what the rules say against this event in the worker's present state.

    Raises WorkerExists, WorkerNotFound or InvalidTransition.
    """
    state = None if record is None else record["state"]
    if state in _ALLOWED[event_type]:
        return
    if record is None:
        raise WorkerNotFound(sid)
    if event_type == events.REGISTERED:
        raise WorkerExists(sid, pid=record["pid"], rev=record["rev"], state=record["state"])
    raise InvalidTransition(sid, event=event_type, state=record["state"])


def is_repeat(event_type: str, record: Record | None, data: JsonObject) -> bool:
    """Say whether the event would change nothing, so that it need not be written."""
    if record is None:
        return False
    match event_type:
        case events.READY | events.DRAINING | events.STOP_REQUESTED:
            if "signal" in data:  # a signal follows, and must not go out unrecorded
                return False
            if record["state"] != _NEXT[event_type]:
                return False
            # that its socket is another by now is no reason to move it to the state it is in
            return not _differs(record, {k: v for k, v in data.items() if k != "sock_id"})
        case events.UPDATED:
            return record["state"] in LIVING and not _differs(record, data)
        case events.LOST | events.RELEASED:
            return record["state"] == _NEXT[event_type]
        case events.EXITED:
            ended = record["exit"]
            return (
                record["state"] in {WorkerState.EXITED, WorkerState.FAILED}
                and ended is not None
                and ended["code"] == data.get("code")
                and ended["signal"] == data.get("signal")
            )
        case _:
            return False


def _differs(record: Record, patch: JsonObject) -> bool:
    for key, value in patch.items():
        match key:
            case "sock" | "version" | "sock_id":
                if value != record[key]:
                    return True
            case "labels" | "meta":
                old = record[key]
                if not isinstance(value, dict):
                    return True
                for name, inner in value.items():
                    if inner is None:
                        if name in old:
                            return True
                    elif name not in old or not _is_same(old[name], inner):
                        return True
            case _:  # a reason changes nothing
                continue
    return False


def _is_same(old: object, new: object) -> bool:
    """Say whether two values are the same JSON; Python takes 0 for False, and 1 for 1.0."""
    if isinstance(new, Mapping):
        return (
            isinstance(old, Mapping)
            and old.keys() == new.keys()
            and all(_is_same(old[key], value) for key, value in new.items())
        )
    if isinstance(new, list | tuple):
        return (
            isinstance(old, list | tuple) and len(old) == len(new) and all(map(_is_same, old, new))
        )
    return type(old) is type(new) and old == new and (new != 0 or repr(old) == repr(new))


# Signals that tell of a fault of the program: ILL, TRAP, ABRT, BUS, FPE, SEGV, SYS on Linux.
_FAULTS: Final = frozenset({4, 5, 6, 7, 8, 11, 31})


def expects_end(record: Record, data: JsonObject) -> bool:
    """Say whether this end of a worker, now, is one that it was asked for.

    It is not where a fault of its own ends one that has survived the request, unless that very
    signal was asked for.
    """
    number = data.get("signal")
    if number in _FAULTS and number != record.get("asked"):
        return False
    return record["state"] in _EXPECTING


def is_ok(record: Record, data: JsonObject) -> bool:
    """Say whether an exit is one that its worker was registered to end with."""
    code, signal = data.get("code"), data.get("signal")
    return (code if signal is None else 128 + cast("int", signal)) in record.get("ok_codes", ())


def exit_state(data: JsonObject) -> WorkerState:
    """Name the final state of an exit: failed where it was unexpected and is known to be bad."""
    return WorkerState.FAILED if events.is_failure(data) else WorkerState.EXITED


def _merge(old: Mapping[str, JsonValue], patch: JsonValue) -> dict[str, JsonValue]:
    """Merge as RFC 7396 does, one level deep: null removes a key, anything else replaces it."""
    if not isinstance(patch, dict):
        message = "a patch is not an object"
        raise FoldError(message)
    merged = {**old, **patch}
    if None in patch.values():
        return {key: value for key, value in merged.items() if value is not None}
    return merged


def _patch(fresh: Record, patch: JsonObject) -> None:
    """Carry out what an event says of its worker, in a copy of the record."""
    for key, value in patch.items():
        match key:
            case "labels":
                fresh["labels"] = _merge(fresh["labels"], value)  # type: ignore[typeddict-item] # text both
            case "meta":
                fresh["meta"] = _merge(fresh["meta"], value)
            case "sock":
                fresh["sock"] = cast("str", value)
                if "sock_id" not in patch:
                    fresh["sock_id"] = None
            case "version":
                fresh["version"] = cast("str", value)
            case "sock_id":
                fresh["sock_id"] = cast("str | None", value)
            case _:  # a reason is for the history
                continue


def _registered(old: Record | None, line: Line) -> Record:
    data = cast("Record", line["data"])  # what it says has the same name there
    pid, seq, ts = line["data"]["pid"], line["seq"], line["ts"]
    if type(pid) is not int or pid < 1:
        message = f"pid {pid!r} is not a process id"
        raise FoldError(message)
    record: Record = {
        "sid": line["sid"],
        "pid": pid,
        "sock": data["sock"],
        "version": data["version"],
        "created_at": data.get("created_at", ts),
        "state": WorkerState(data["state"]).value,
        "labels": data["labels"],
        "meta": data["meta"],
        "rev": seq,
        "updated_at": ts,
        "registered_seq": seq,
        "generation": 1 if old is None else old["generation"] + 1,
        "identity": data["identity"],
        "owner": data["owner"],
        "exit": None,
        "lease": data.get("lease"),
        "heartbeat_s": data.get("heartbeat_s"),
        "sock_id": data.get("sock_id"),
    }
    more = {key: line["data"][key] for key in events.TAKEN_OVER if key in data}
    return cast("Record", {**record, **more}) if more else record


def _moved(old: Record, line: Line) -> Record:
    """Carry out every event that keeps the worker in the state or moves it on."""
    kind, data = line["type"], line["data"]
    fresh = old.copy()
    fresh["rev"] = line["seq"]
    fresh["updated_at"] = line["ts"]
    if kind in _PATCHING:
        _patch(fresh, data)
    if kind in _NEXT:
        fresh["state"] = _NEXT[kind]
    if kind == events.STOP_REQUESTED and "signal" in data:
        fresh["asked"] = cast("int", data["signal"])
    elif kind == events.EXITED:
        fresh["state"] = exit_state(data).value
        fresh["exit"] = _exit(data, cast("str", data.get("source", "self")))
        details: JsonObject = {key: data[key] for key in events.DETAILS if key in data}
        if details:
            fresh["end"] = details
    elif kind == events.LOST:
        fresh["exit"] = _exit(data, "collect")
    elif kind == events.RELEASED:
        fresh["exit"] = _exit(data, "owner")
    return fresh


def _exit(data: JsonObject, source: str) -> ExitRecord:
    cause = data.get("cause", data.get("reason"))
    return {
        "code": cast("int | None", data.get("code")),
        "signal": cast("int | None", data.get("signal")),
        "source": source,
        "expected": data.get("expected") is True,
        "cause": None if cause is None else str(cause),
    }


@dataclass(slots=True)
class Fold:
    """The state after every event up to `seq`; `apply` moves it on by one line.

    `totals` counts worker events by type since the store began. Behind a gap, up to the note of
    its repair, it is `lenient`: what the lost events would have explained is taken as it comes.
    """

    seq: int
    records: Records
    totals: dict[str, int]
    lenient: bool = False

    def get(self, sid: str) -> Record | None:
        """Return the record of that sid."""
        return self.records.get(sid)

    def apply(self, line: Line) -> None:
        """Fold one line.

        Raises FoldError for a line that no correct writer can have written; the fold is then
        as before.
        """
        kind = line["type"]
        if kind in _ALLOWED:
            sid, records = line["sid"], self.records
            if kind == events.PRUNED and records.is_final(sid):  # there may be very many
                record = None
            else:
                record = after(line, records.get(sid), lenient=self.lenient)
            self.take(kind, sid, record)
        elif kind in {events.GAP, events.REPAIRED}:
            self.lenient = kind == events.GAP
        self.seq = line["seq"]

    def take(self, kind: str, sid: str, record: Record | None) -> None:
        """Take over a worker's record after an event of that type: what `after` makes of it."""
        if record is None or kind == events.REGISTERED:
            self.records.drop(sid)  # of a new one, so that the order is that of registration
        if record is not None:
            self.records.put(sid, record)
        self.totals[kind] = self.totals.get(kind, 0) + 1

    def sessions(self) -> Iterator[Record]:
        """Yield the workers that are not final, in order of registration."""
        return self.records.living()

    def ended(self) -> Ended:
        """Return the workers that are final and not yet pruned."""
        return self.records.ended()

    def copy(self) -> "Fold":
        """Return a fold that moves on by itself; the records are shared, being never changed."""
        return Fold(self.seq, self.records.copy(), self.totals.copy(), self.lenient)


def after(line: Line, old: Record | None, *, lenient: bool = False) -> Record | None:
    """Return the worker's record after this line, None once it is pruned.

    Types this version does not know leave the record as it is. Raises FoldError; `lenient`: an
    event of a worker whose registration was lost tells nothing, any other is taken as it comes.
    """
    kind = line["type"]
    if kind not in _ALLOWED:
        return old
    state = None if old is None else old["state"]
    if state not in _ALLOWED[kind] and not lenient:
        message = f"{kind} cannot follow state {state!r} of worker {line['sid']!r}"
        raise FoldError(message)
    try:
        if kind == events.REGISTERED:
            return _registered(old, line)
        if kind == events.PRUNED or old is None:
            return None
        return _moved(old, line)
    except (KeyError, TypeError, ValueError) as error:
        message = f"{kind} of worker {line['sid']!r} has the wrong shape: {error}"
        raise FoldError(message) from error


def empty() -> Fold:
    """Return the state before the first event."""
    return Fold(0, Records(), {})


def restored(
    seq: int, sessions: Iterable[Record], ended: Iterable[Record], totals: Mapping[str, int]
) -> Fold:
    """Rebuild the fold of a snapshot, in order of registration."""
    return Fold(seq, merged(sessions, ended), dict(totals))
