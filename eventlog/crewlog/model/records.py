"""Records of workers: what shape one has, and many by sid, the ended ones kept as their bytes.

Who has ended is asked for seldom, and there may be very many: a record takes 2 KB as objects and
0.5 KB as the line that stands in registry.json. So a final one is kept as that line and parsed
when somebody asks for it. Pure.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Final, cast

from crewlog.errors import SnapshotCorrupt
from crewlog.model.codec import DocumentError, dump, load_object
from crewlog.model.events import FINAL, Record

_SHAPE: Final[Mapping[str, type | tuple[type, ...]]] = {
    "sid": str,
    "pid": int,
    "sock": str,
    "version": str,
    "created_at": str,
    "state": str,
    "labels": dict,
    "meta": dict,
    "rev": int,
    "updated_at": str,
    "registered_seq": int,
    "generation": int,
    "identity": (dict, type(None)),
    "owner": (dict, type(None)),
    "exit": (dict, type(None)),
}
# Younger than the first snapshots: absent in those.
_OPTIONAL: Final[Mapping[str, type | tuple[type, ...]]] = {
    "lease": str,
    "heartbeat_s": (int, float),
    "sock_id": str,
}
# There only where it says something.
RARE: Final[Mapping[str, type]] = {
    "ok_codes": list,
    "ends_with": str,
    "log": dict,
    "group": dict,
    "argv": list,
    "cwd": str,
    "end": dict,
    "asked": int,
}


# Keys and types of records that were checked: nearly all records have one of a few shapes.
_PROPER: Final[set[tuple[object, ...]]] = set()
_PROPER_MAX: Final = 1000


def checked(row: object, what: str) -> Record:
    """Return a parsed record.

    Raises: DocumentError where it has not the shape of one.
    """
    if not isinstance(row, dict):
        raise DocumentError(f"{what} is not an object")
    shape = (*row, *map(type, row.values()))
    if shape in _PROPER:
        return cast("Record", row)
    for key, kind in _SHAPE.items():
        if not isinstance(row.get(key), kind):
            raise DocumentError(f"{what} has no proper {key!r}")
    for key, kind in _OPTIONAL.items():
        if row.setdefault(key, None) is not None and not isinstance(row[key], kind):
            raise DocumentError(f"{what} has no proper {key!r}")
    for key in RARE.keys() & row.keys():
        if not isinstance(row[key], RARE[key]):
            raise DocumentError(f"{what} has no proper {key!r}")
    if len(row) * 2 == len(shape) and len(_PROPER) < _PROPER_MAX:  # it lacked none
        _PROPER.add(shape)
    return cast("Record", row)


def decode_record(data: bytes) -> Record:
    """Check and parse one worker's record, as `dump` wrote it.

    Raises: DocumentError.
    """
    return checked(load_object(data), "it")


# -- rows: final workers' records, each one line of JSON ----------------------------------------

# What `dump` makes of a final record, as far as it is soon seen: how it begins, and from the right,
# where no text of a caller's can stand behind it, the seq of its registration.
_BEGIN: Final = re.compile(
    rb'\{"sid":"([^"\\]+)","pid":\d+,"sock":"[^"\\]*","version":"[^"\\]*","created_at":"[^"\\]+",'
    rb'"state":"(?:exited|failed|lost|released)","labels":\{'
)
_SEQ: Final = b'"registered_seq":'
_END: Final = re.compile(rb'"registered_seq":(\d+),"generation":\d+,"identity":[{n].*\}')


def keys_of(row: bytes) -> tuple[int, str] | None:
    """Return the seq of a row's registration, and its sid; None where only parsing tells."""
    begin, end = _BEGIN.match(row), _END.fullmatch(row, max(0, row.rfind(_SEQ)))
    return None if begin is None or end is None else (int(end[1]), begin[1].decode())


def record_of(row: bytes) -> Record:
    """Parse a row.

    Raises: SnapshotCorrupt where it is no record, though a right hash covers it.
    """
    try:
        return decode_record(row)
    except DocumentError as error:
        raise SnapshotCorrupt("registry.json", why=str(error)) from error


class Ended(Sequence[Record]):
    """Final workers, each parsed when it is asked for."""

    __slots__ = ("_keys", "rows")

    def __init__(self, rows: Sequence[bytes], keys: list[tuple[int, str]] | None = None) -> None:
        """Keep rows, and their keys where those are known."""
        self.rows = rows
        self._keys = keys

    def keys(self) -> list[tuple[int, str]]:
        """Return of each row the seq of its registration, and its sid."""
        if self._keys is None:
            self._keys = [keys_of(row) or _parsed_keys(row) for row in self.rows]
        return self._keys

    def __getitem__(self, index: int) -> Record:  # type: ignore[override] # no slices
        """Return one record."""
        return record_of(self.rows[index])

    def __len__(self) -> int:
        """Count them."""
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        """Compare with any sequence of records."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment] # as of a list


def _parsed_keys(row: bytes) -> tuple[int, str]:
    record = record_of(row)
    return record["registered_seq"], record["sid"]


class Records(Mapping[str, Record]):
    """Workers' records by sid, in order of registration; final ones are kept as rows.

    Records are never changed in place, so copies share them.
    """

    __slots__ = ("_kept",)

    def __init__(self, kept: dict[str, Record | bytes] | None = None) -> None:
        """Begin with what another one kept, or with nothing."""
        self._kept: dict[str, Record | bytes] = {} if kept is None else kept

    def __getitem__(self, sid: str) -> Record:
        """Return the record of that sid, KeyError if there is none."""
        kept = self._kept[sid]
        return record_of(kept) if isinstance(kept, bytes) else kept

    def get(self, sid: str) -> Record | None:  # type: ignore[override] # as quick as a dict
        """Return the record of that sid, None if there is none."""
        kept = self._kept.get(sid)
        return record_of(kept) if isinstance(kept, bytes) else kept

    def __contains__(self, sid: object) -> bool:
        """Say whether there is one of that sid."""
        return sid in self._kept

    def __iter__(self) -> Iterator[str]:
        """Yield the sids."""
        return iter(self._kept)

    def __len__(self) -> int:
        """Count them."""
        return len(self._kept)

    def __eq__(self, other: object) -> bool:
        """Compare with any mapping of records; rows are parsed only where their bytes differ."""
        if isinstance(other, Records) and self._kept == other._kept:
            return True
        return isinstance(other, Mapping) and dict(self) == dict(other)

    __hash__ = None  # type: ignore[assignment] # as of a dict

    def put(self, sid: str, record: Record) -> None:
        """Keep a record."""
        self._kept[sid] = _kept(record) if record["state"] in FINAL else record

    def is_final(self, sid: str) -> bool:
        """Say whether there is a final record of that sid."""
        return isinstance(self._kept.get(sid), bytes)

    def drop(self, sid: str) -> None:
        """Let go of a record, if there is one."""
        self._kept.pop(sid, None)

    def living(self) -> Iterator[Record]:
        """Yield those that are not final."""
        return (kept for kept in self._kept.values() if not isinstance(kept, bytes))

    def ended(self) -> Ended:
        """Return those that are final."""
        return Ended([kept for kept in self._kept.values() if isinstance(kept, bytes)])

    def chosen(self, wants: Callable[[Record], bool], *, final: bool) -> list[Record]:
        """Return those that are wanted; without `final` only of those that are not."""
        return list(filter(wants, self.values() if final else self.living()))

    def copy(self) -> "Records":
        """Return one that moves on by itself."""
        return Records(self._kept.copy())


def merged(living: Iterable[Record], ended: Iterable[Record]) -> Records:
    """Put the workers of a snapshot together, in order of registration."""
    every: list[tuple[int, str, Record | bytes]] = []
    if isinstance(ended, Ended):
        every += [(*keys, row) for keys, row in zip(ended.keys(), ended.rows, strict=True)]
        ended = ()
    every += [(one["registered_seq"], one["sid"], _kept(one)) for one in (*living, *ended)]
    every.sort(key=itemgetter(0))
    return Records({sid: kept for _, sid, kept in every})


def _kept(record: Record) -> Record | bytes:
    if record["state"] not in FINAL:
        return record
    return b"%b" % dump(record)  # a copy: what orjson returns holds on to the 8 KB it wrote in
