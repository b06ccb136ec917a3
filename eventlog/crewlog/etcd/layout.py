"""Name every key of a store, and build the requests that etcd's gateway takes. Pure.

Source: etcd, api/etcdserverpb/rpc.proto; in its JSON form bytes are base64, int64 are strings, and
whatever is zero or empty is left out.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, cast

from crewlog.model.events import JsonObject, JsonValue

READ_BYTES: Final = 4096  # so much is read at once from a pipe, a small file or a stream

# etcd refuses transactions of more than 128 operations or 1.5 MiB, unless it is told otherwise.
TXN_WORKERS_MAX: Final = 100
TXN_BYTES_MAX: Final = 1024 * 1024

_SEQ_DIGITS: Final = 16
_OWN: Final = ":"  # in no prefix: the keys of a store below this one are never ours


class Room(StrEnum):
    """What the first word of a key says that it holds, beside the three that stand alone."""

    EVENT = "e"
    RECORD = "w"
    PART = "s"
    BASE = "b"
    LEASE = "l"
    BEAT = "beat"
    TURN = "t"
    CURSOR = "c"
    LINE = "d"  # of a cursor: which line stood there
    OWNER = "o"
    QUEUE = "q"


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of the store under one prefix."""

    prefix: str

    @property
    def head(self) -> bytes:
        """Return the key that every append moves."""
        return self.named("head")

    @property
    def store(self) -> bytes:
        """Return the key of the store's identity."""
        return self.named("store")

    @property
    def migration(self) -> bytes:
        """Return the key that is there while a migration into here is under way."""
        return self.named("m")

    def event(self, seq: int) -> bytes:
        """Return the key of the transaction whose last line has that seq."""
        return self.named(Room.EVENT, f"{seq:0{_SEQ_DIGITS}d}")

    def part(self, first: int) -> bytes:
        """Return the key of a sealed part of the history."""
        return self.named(Room.PART, f"{first:0{_SEQ_DIGITS}d}")

    def base(self, seq: int, piece: int) -> bytes:
        """Return the key of a piece of the state that the history begins with."""
        return self.named(Room.BASE, f"{seq:0{_SEQ_DIGITS}d}", f"{piece:04d}")

    def named(self, *words: str) -> bytes:
        """Return a key by its room, and what it has there, such as a sid."""
        return f"{self.prefix}/{_OWN}{'/'.join(words)}".encode()

    def room(self, room: Room) -> tuple[bytes, bytes]:
        """Return the range of all keys of a room."""
        return self.named(room, ""), self.named(room) + b"0"  # "0" follows "/"

    def whole(self) -> tuple[bytes, bytes]:
        """Return the range of all keys of the store."""
        return f"{self.prefix}/{_OWN}".encode(), f"{self.prefix}/{chr(ord(_OWN) + 1)}".encode()


class KeyValue(NamedTuple):
    """One key as it was read; `create_revision` is that of its creation, `lease` 0 for none."""

    key: bytes
    value: bytes
    create_revision: int
    lease: int

    @property
    def name(self) -> str:
        """Return the last word of the key."""
        return self.key.rpartition(b"/")[2].decode()


def text(data: bytes) -> str:
    """Write bytes as the gateway takes them."""
    return base64.b64encode(data).decode()


# -- requests -------------------------------------------------------------------------------


def get(key: bytes) -> JsonObject:
    """Ask for one key."""
    return {"requestRange": {"key": text(key)}}


def first_of(begin: bytes, end: bytes) -> JsonObject:
    """Ask for the first key of a range."""
    return {"requestRange": {"key": text(begin), "rangeEnd": text(end), "limit": "1"}}


def page(
    begin: bytes, end: bytes, *, limit: int, revision: int = 0, newest_first: bool = False
) -> JsonObject:
    """Ask for a range in the order of its keys, up to `limit` (0: all), as of a revision."""
    return {
        "key": text(begin),
        "rangeEnd": text(end),
        "limit": str(limit),
        "revision": str(revision),
        "sortTarget": "KEY",
        "sortOrder": "DESCEND" if newest_first else "ASCEND",
    }


def put(key: bytes, value: bytes, *, lease: int = 0) -> JsonObject:
    """Set a key, on a lease that takes it away when it ends."""
    return {"requestPut": {"key": text(key), "value": text(value), "lease": str(lease)}}


def delete(key: bytes, end: bytes | None = None) -> JsonObject:
    """Remove a key, or all from it up to `end`."""
    if end is None:
        return {"requestDeleteRange": {"key": text(key)}}
    return {"requestDeleteRange": {"key": text(key), "rangeEnd": text(end)}}


def is_value(key: bytes, value: bytes) -> JsonObject:
    """Compare: the key is there and has this value."""
    return {"key": text(key), "target": "VALUE", "result": "EQUAL", "value": text(value)}


def is_absent(key: bytes) -> JsonObject:
    """Compare: the key is not there."""
    return {"key": text(key), "target": "VERSION", "result": "EQUAL", "version": "0"}


def none_in(begin: bytes, end: bytes) -> JsonObject:
    """Compare: no key is in a range."""
    room = {"key": text(begin), "rangeEnd": text(end)}
    return {**room, "target": "VERSION", "result": "EQUAL", "version": "0"}


def none_older(begin: bytes, end: bytes, revision: int) -> JsonObject:
    """Compare: every key in a range is there since that revision, or later."""
    room = {"key": text(begin), "rangeEnd": text(end)}
    return {**room, "target": "CREATE", "result": "GREATER", "createRevision": str(revision - 1)}


def is_created(key: bytes, revision: int) -> JsonObject:
    """Compare: the key is there since that revision."""
    return {
        "key": text(key),
        "target": "CREATE",
        "result": "EQUAL",
        "createRevision": str(revision),
    }


def transaction(
    compare: Sequence[JsonObject], then: Sequence[JsonObject], otherwise: Sequence[JsonObject] = ()
) -> JsonObject:
    """Build a transaction: all of `then` if every comparison holds, all of `otherwise` if not."""
    return {"compare": list(compare), "success": list(then), "failure": list(otherwise)}


# -- answers --------------------------------------------------------------------------------


def number(fields: JsonObject, name: str) -> int:
    """Read an int64, 0 where it is left out."""
    value = fields.get(name, 0)
    return int(cast("str | int", value))


def cluster(answer: JsonObject) -> str:
    """Read which cluster an answer is of."""
    return str(cast("JsonObject", answer.get("header") or {}).get("cluster_id", ""))


def objects(fields: JsonObject, name: str) -> list[JsonObject]:
    """Read a list of objects, empty where it is left out."""
    return cast("list[JsonObject]", fields.get(name) or [])


def pairs(fields: JsonObject) -> list[KeyValue]:
    """Read the keys of a range's answer."""
    return [
        KeyValue(
            _bytes(pair.get("key")),
            _bytes(pair.get("value")),
            number(pair, "create_revision"),
            number(pair, "lease"),
        )
        for pair in objects(fields, "kvs")
    ]


def ranges(answer: JsonObject) -> list[list[KeyValue]]:
    """Read the answers to the range requests of a transaction, in their order."""
    results = []
    for part in objects(answer, "responses"):
        asked = part.get("response_range")
        if isinstance(asked, dict):
            results.append(pairs(cast("JsonObject", asked)))
    return results


def _bytes(value: JsonValue) -> bytes:
    return base64.b64decode(value) if isinstance(value, str) else b""
