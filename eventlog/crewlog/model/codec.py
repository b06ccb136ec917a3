"""Turn one event into one checked line and back; the same for a store's documents.

A line is one JSON object and one newline::

    {"v":1,"seq":…,"ts":…,"type":…,"sid":…,"actor":{…},"data":{…},"synced":…,"prev":"…","crc":"…"}

and is valid if and only if

- it ends with the trailer ``,"prev":"<64 hex>","crc":"<8 hex>"}`` (92 bytes, always last),
- `crc` is the CRC-32 of every byte before ``,"crc"``, and
- it parses into the fields above, of the right shapes.

`prev` is the SHA-256 of the line before it, so order, omission and substitution show. The bytes
written are the canonical bytes: nothing is serialised again to be hashed or compared. Control
bytes are escaped by JSON, so a byte below 0x20 inside a line proves damage. No I/O happens here,
and this is the only module that knows orjson.
"""

import hashlib
import math
import zlib
from collections.abc import Mapping
from typing import Final, NamedTuple, NoReturn, TypeVar, cast

import orjson

from crewlog.errors import FormatTooNew
from crewlog.model.events import OWN_TYPES, JsonObject, JsonValue, Line

FORMAT: Final = 1
LINE_VERSION: Final = 1
LINE_BYTES_MAX: Final = 64 * 1024
LINE_BYTES_CEILING: Final = 1024 * 1024
# More than seq, ts, place, synced, prev and crc take.
LINE_OVERHEAD_BYTES: Final = 256
PAYLOAD_DEPTH_MAX: Final = 32
INT64_MAX: Final = 2**63 - 1

_PREV_KEY: Final = b',"prev":"'
_CRC_KEY: Final = b'","crc":"'
_PREV_AT: Final = -(len(_PREV_KEY) + 64 + len(_CRC_KEY) + 8 + 2)
_CRC_AT: Final = -(len(_CRC_KEY) - 1 + 8 + 2)
_STRICT: Final = (
    orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
    | orjson.OPT_PASSTHROUGH_SUBCLASS
)


T = TypeVar("T")


class LineError(ValueError):
    """The bytes are not a valid line; the message is the reason, fit for a finding."""


class DocumentError(ValueError):
    """The bytes are not a valid document of the store; the message is the reason."""


# -- payloads -------------------------------------------------------------------------------


def check_json(  # noqa: C901, PLR0912 (one branch a kind of value)
    value: object, *, name: str, depth: int = PAYLOAD_DEPTH_MAX
) -> None:
    """Refuse what JSON cannot carry unchanged, before anything is written.

    Raises TypeError for a value of another type or a key that is not a string, ValueError for
    NaN, infinities, integers beyond 64 bits, lone surrogates and nesting deeper than 32.
    (orjson would turn NaN into null without a word.)
    """
    if value is None or isinstance(value, bool) or (type(value) is str and value.isascii()):
        return
    if isinstance(value, str):
        _check_text(value, name)
    elif isinstance(value, int):
        if not -INT64_MAX - 1 <= value <= INT64_MAX:
            _refuse(name, f"{value} does not fit in 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            _refuse(name, f"{value} is not a JSON number")
    elif depth == 0:
        _refuse(name, f"it is nested deeper than {PAYLOAD_DEPTH_MAX}")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                message = f"{name}: the key {key!r} is not a string"
                raise TypeError(message)
            _check_text(key, name)
            check_json(inner, name=f"{name}.{key}", depth=depth - 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_json(inner, name=name, depth=depth - 1)
    else:
        message = f"{name}: {type(value).__name__} is not a JSON value"
        raise TypeError(message)


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        _refuse(name, "it holds a lone surrogate; escape the bytes first")


def _refuse(name: str, why: str) -> NoReturn:
    message = f"{name}: {why}"
    raise ValueError(message)


def _plain(value: object) -> object:
    """Return what orjson does not take as it is: mappings of other types, subclasses."""
    if isinstance(value, Mapping):
        return {str(key): inner for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return list(value)
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    message = f"{type(value).__name__} is no JSON"
    raise TypeError(message)


def dump(value: object) -> bytes:
    """Serialise JSON compactly; the value was checked or is the library's own."""
    return orjson.dumps(value, _plain, _STRICT)


def load_object(data: bytes) -> JsonObject:
    """Parse one JSON object or raise DocumentError."""
    try:
        value: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise DocumentError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DocumentError("not a JSON object")
    return cast("JsonObject", value)


# -- lines ----------------------------------------------------------------------------------


class Draft(NamedTuple):
    """An event that is checked and encoded, but has no seq yet.

    `body` is its part of the line; `data` is parsed from those very bytes, so that the writer
    folds exactly what every reader will.
    """

    type: str
    sid: str
    data: JsonObject
    body: bytes


def draft(event_type: str, sid: str, actor: bytes, data: Mapping[str, JsonValue]) -> Draft:
    """Encode the part of a line that needs no lock; `actor` is JSON already."""
    payload = orjson.dumps(data, _plain, _STRICT)
    words = event_type.encode(), orjson.dumps(sid), actor, payload
    body = b'"type":"%b","sid":%b,"actor":%b,"data":%b' % words
    if len(body) > LINE_BYTES_MAX:
        message = (
            f"the event of worker {sid!r} takes {len(body)} bytes; "
            f"a line holds at most {LINE_BYTES_MAX}"
        )
        raise ValueError(message)
    return Draft(event_type, sid, orjson.loads(payload), body)


def own_draft(event_type: str, data: Mapping[str, JsonValue]) -> Draft:
    """Encode an event of the store's own, which is about no worker and has no author."""
    return draft(event_type, "", b"{}", data)


def line(
    part: Draft, *, seq: int, ts: str, synced: int, prev: bytes, batch: tuple[int, int] | None
) -> bytes:
    """Finish a line, newline included; `prev` is the digest of the line before it."""
    place = b"" if batch is None else b',"b":[%d,%d]' % batch
    checked = b'{"v":1,"seq":%d,"ts":"%b",%b%b,"synced":%d,"prev":"%b"' % (
        seq,
        ts.encode(),
        part.body,
        place,
        synced,
        prev.hex().encode(),
    )
    return b'%b,"crc":"%08x"}\n' % (checked, zlib.crc32(checked))


def as_parsed(part: Draft, *, seq: int, ts: str) -> Line:
    """Return a draft as its line will parse; fields that no fold reads are left empty."""
    return {
        "v": LINE_VERSION,
        "seq": seq,
        "ts": ts,
        "type": part.type,
        "sid": part.sid,
        "actor": {},
        "data": part.data,
        "synced": 0,
        "prev": "",
        "crc": "",
    }


def digest(raw: bytes) -> bytes:
    """Hash a line without its newline, or store.json as a whole: the next line's `prev`."""
    return hashlib.sha256(raw).digest()


def short_digest(raw: bytes) -> int:
    """Return 32 bits of a line's hash, never 0: enough to notice that another is in its place."""
    return int.from_bytes(digest(raw)[:4], "little") or 1


def parse(raw: bytes) -> Line:
    """Check and parse one line, given without its newline.

    Raises LineError with the first reason, or FormatTooNew where the line is whole but written
    by a newer crewlog.
    """
    if len(raw) > LINE_BYTES_CEILING:
        raise LineError("longer than a line may be")
    if raw[_PREV_AT : _PREV_AT + 9] != _PREV_KEY or raw[_CRC_AT - 1 : -10] != _CRC_KEY:
        raise LineError("NUL bytes" if b"\0" in raw else "no trailer")
    if not is_intact(raw):
        raise LineError("crc differs")
    try:
        value: object = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise LineError(f"not JSON: {error}") from error
    return _checked_shape(value)


def is_intact(raw: bytes) -> bool:
    """Say whether a line is as it was written, by its crc alone."""
    return raw[-10:] == b'%08x"}' % zlib.crc32(raw[:_CRC_AT])


def _checked_shape(value: object) -> Line:
    if type(value) is not dict:
        raise LineError("not an object")
    try:
        kind = value["type"]
        if not (
            value["v"] == LINE_VERSION
            and type(value["seq"]) is type(value["synced"]) is int
            and type(kind) is type(value["sid"]) is type(value["ts"]) is type(value["prev"]) is str
            and type(value["actor"]) is type(value["data"]) is dict
            and ("b" not in value or _is_place(value["b"]))
        ):
            if value["v"] != LINE_VERSION:
                raise FormatTooNew("a line of the log", why=f"it has version {value['v']!r}")
            raise LineError("a field has the wrong shape")
    except KeyError as error:
        raise LineError(f"field {error} is missing") from error
    if kind[:1] == "_" and kind not in OWN_TYPES and kind[:2] != "_x":
        raise FormatTooNew("a line of the log", why=f"its type is {kind!r}")
    return cast("Line", value)


def _is_place(value: object) -> bool:
    if type(value) is not list or len(value) != 2:  # noqa: PLR2004 (index and count)
        return False
    index, count = value
    return type(index) is type(count) is int and 0 <= index < count


# -- who the store is -----------------------------------------------------------------------


def encode_identity(store: str, *, created: str) -> bytes:
    """Return the bytes of a new store's identity."""
    return dump(
        {"format": FORMAT, "store": store, "incompat": [], "compat": [], "created": created}
    )


def decode_identity(data: bytes, *, where: str) -> str:
    """Check a store's identity and return its id.

    Raises: DocumentError; FormatTooNew.
    """
    fields = load_object(data)
    if fields.get("format") != FORMAT:
        raise FormatTooNew(where, why=f"it has format {fields.get('format')!r}")
    if fields.get("incompat"):
        raise FormatTooNew(where, why=f"it needs {fields['incompat']!r}")
    store = fields.get("store")
    if not isinstance(store, str) or not store:
        raise DocumentError("it names no store")
    return store


# -- snapshots ------------------------------------------------------------------------------
