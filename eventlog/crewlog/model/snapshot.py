"""Turn the state at one seq into registry.json and back, and fold lines onto an older one. Pure."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar, cast

from crewlog.errors import FormatTooNew, HistoryDiverged, LogCorrupt
from crewlog.model import chain, fold
from crewlog.model.codec import FORMAT, DocumentError, dump, load_object
from crewlog.model.events import SEAL, JsonObject, Line, Record
from crewlog.model.fold import Fold, FoldError
from crewlog.model.records import Ended, Records, checked, keys_of, merged

SNAPSHOT_BYTES_MAX: Final = 1024 * 1024 * 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The fold of every event up to `last_seq`; `sha256` covers its bytes ("" before encoding)."""

    store: str
    last_seq: int
    last_hash: str
    written_at: str
    sessions: Sequence[Record]
    ended: Sequence[Record]
    totals: Mapping[str, int]
    sha256: str = ""

    def records(self) -> Records:
        """Return every worker's record by sid, in order of registration."""
        return merged(self.sessions, self.ended)


def empty_snapshot(store: str, identity: bytes) -> Snapshot:
    """Return the state before the first event; `identity` is the digest of store.json."""
    return Snapshot(
        store=store,
        last_seq=0,
        last_hash=identity.hex(),
        written_at="",
        sessions=(),
        ended=(),
        totals={},
    )


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """Write registry.json: one JSON object, one worker a line, its own SHA-256 last.

    The hash covers every byte before ``,"sha256"``.
    """
    head = dump(
        {
            "format": FORMAT,
            "store": snapshot.store,
            "last_seq": snapshot.last_seq,
            "last_hash": snapshot.last_hash,
            "written_at": snapshot.written_at,
            "totals": dict(sorted(snapshot.totals.items())),
        }
    )
    checked = b'%b,"sessions":[\n%b\n],"ended":[\n%b\n]' % (
        head[:-1],
        _lines(snapshot.sessions),
        _lines(snapshot.ended),
    )
    return b'%b,"sha256":"%b"}\n' % (checked, hashlib.sha256(checked).hexdigest().encode())


def _lines(records: Iterable[Record]) -> bytes:
    rows = records.rows if isinstance(records, Ended) else map(dump, records)
    return b",\n".join(rows)


def decode_snapshot(data: bytes) -> Snapshot:
    """Check and parse a snapshot.

    Raises DocumentError with the reason, or FormatTooNew for a format this version does not know.
    """
    end = data.rfind(b',"sha256":"')
    tail = data[end + 11 :]
    if end < 0 or len(tail) != 64 + 3 or tail[64:] != b'"}\n':
        raise DocumentError("it does not end with its sha256")
    sha256 = hashlib.sha256(memoryview(data)[:end]).hexdigest()
    if tail[:64] != sha256.encode():
        raise DocumentError("its sha256 differs")
    middle = data.find(_ENDED)
    apart = middle >= 0 and data.endswith(b"\n]", middle, end)
    fields = load_object(data[:middle] + b"]}" if apart else data)
    if fields.get("format") != FORMAT:
        raise FormatTooNew("registry.json", why=f"it has format {fields.get('format')!r}")
    return Snapshot(
        store=_field(fields, "store", str),
        last_seq=_field(fields, "last_seq", int),
        last_hash=_field(fields, "last_hash", str),
        written_at=_field(fields, "written_at", str),
        sessions=_sessions(_field(fields, "sessions", list)),
        ended=_rows(data[middle + len(_ENDED) : end - 2])
        if apart
        else _checked(_field(fields, "ended", list)),
        totals=cast("dict[str, int]", _field(fields, "totals", dict)),
        sha256=sha256,
    )


# Before the ended, which are many and seldom asked for: a worker a line, they stay as they are. No
# text of JSON has such a line.
_ENDED: Final = b'\n],"ended":[\n'


def _field(fields: JsonObject, name: str, kind: type[T]) -> T:
    value = fields.get(name)
    if not isinstance(value, kind):
        raise DocumentError(f"field {name!r} is missing or has the wrong shape")
    return value


def _sessions(rows: list[object]) -> list[Record]:
    return [checked(row, "an entry of 'sessions'") for row in rows]


def _rows(data: bytes) -> Ended:
    """Keep rows as they are, where each is plainly one record; else parse and check them all.

    Raises: DocumentError.
    """
    rows = data.split(b",\n") if data else []
    if _is_text(data) and b'},{"sid":' not in data:
        keys = [key for row in rows if (key := keys_of(row)) is not None]
        if len(keys) == len(rows):
            return Ended(rows, keys)
    return _checked(cast("list[object]", load_object(b'{"ended":[%b]}' % data)["ended"]))


def _is_text(data: bytes) -> bool:
    try:
        return data.isascii() or bool(data.decode())
    except UnicodeDecodeError:
        return False


def _checked(rows: list[object]) -> Ended:
    return Ended([dump(checked(row, "an entry of 'ended'")) for row in rows])


def states_before(states: Iterable[Snapshot], seq: int, *, oldest: int) -> list[Snapshot]:
    """Return those at or before `seq` that lines since `oldest` lead on from, nearest first."""
    candidates = [one for one in states if oldest - 1 <= one.last_seq <= seq]
    return sorted(candidates, key=lambda one: one.last_seq, reverse=True)


# -- folding ----------------------------------------------------------------------------------


def fold_of(snapshot: Snapshot) -> Fold:
    """Begin a fold where a snapshot was taken."""
    return fold.restored(snapshot.last_seq, snapshot.sessions, snapshot.ended, snapshot.totals)


def snapshot_of(state: Fold, *, store: str, last_hash: str, written_at: str) -> Snapshot:
    """Copy a state out of a fold; `last_hash` is the hex digest of the last line it has seen."""
    return Snapshot(
        store=store,
        last_seq=state.seq,
        last_hash=last_hash,
        written_at=written_at,
        sessions=list(state.sessions()),
        ended=state.ended(),
        totals=state.totals.copy(),
    )


# Is told of a state at the end of a segment: its seq, how many workers it has, and what builds it.
OnTheWay: TypeAlias = Callable[[int, int, Callable[[], Snapshot]], None]


def refold_lines(
    lines: Iterator[tuple[Line, bytes]],
    start: Snapshot,
    stop: int,
    *,
    where: str,
    wrong: Callable[[Line, bytes, FoldError], LogCorrupt],
    written_at: str,
    seen: Callable[[Line], None] | None = None,
    on_the_way: OnTheWay | None = None,
) -> Snapshot:
    """Return the state at seq `stop`, from lines that may begin before that of `start`.

    `on_the_way` is told of no state behind a gap, up to its repair: nothing leads on from there.

    `wrong` makes the error of a whole line that no correct writer can have written.
    Raises: it, and HistoryDiverged.
    """
    state, prev = fold_of(start), start.last_hash

    def diverged(seq: int) -> HistoryDiverged:
        return HistoryDiverged(where, seq=seq)

    def copied() -> Snapshot:
        return snapshot_of(state, store=start.store, last_hash=prev, written_at=written_at)

    for line, raw in lines:
        if line["seq"] <= start.last_seq:
            continue
        if line["seq"] > stop:  # a gap stands for more than was asked for
            break
        prev = chain.follow(state, line, raw, prev, diverged=diverged, wrong=wrong)
        if seen is not None:
            seen(line)
        if on_the_way is not None and line["type"] == SEAL and not state.lenient:
            on_the_way(state.seq, len(state.records), copied)
        if state.seq == stop:
            break
    return copied()
