"""Encode the three small files that are overwritten in place: both states, and a worker's beat.

Each is one fixed-size struct that ends with the CRC-32 of what stands before it. They are caches
and evidence: what cannot be decoded is rebuilt or left out of account.
"""

import struct
import zlib
from typing import Final, NamedTuple


class AppendState(NamedTuple):
    """How far lines are written: position, boot and head hash after the last line.

    The redo, the file with the inode `redo`, holds the segment's bytes from `base` to `kept`.
    """

    boot: bytes
    segment: int
    redo: int
    base: int
    kept: int
    end: int
    seq: int
    hash: bytes
    sealed: bool


def written(
    boot: bytes, segment: int, end: int, seq: int, hash_: bytes, *, sealed: bool = False
) -> AppendState:
    """Return a state of which the redo holds nothing yet."""
    return AppendState(boot, segment, 0, 0, 0, end, seq, hash_, sealed)


class DurableHead(NamedTuple):
    """How far lines are durable. `generation` counts syncs; `errno` is set once poisoned.

    The segment itself is synced up to `base`; what follows, up to `end`, is durable in the redo.
    """

    generation: int
    boot: bytes
    segment: int
    base: int
    end: int
    seq: int
    oldest: int
    poisoned: bool
    errno: int


# Each ends with the CRC-32 of what stands before it.
_APPEND_STATE: Final = struct.Struct("<8s16sQQQQQQ32sB3xI")
_DURABLE_HEAD: Final = struct.Struct("<8sQ16sQQQQQB3xiI")
_CRC: Final = struct.Struct("<I")
_APPEND_MAGIC: Final = b"crewlogA"
_HEAD_MAGIC: Final = b"crewlogD"
APPEND_STATE_BYTES: Final = _APPEND_STATE.size
DURABLE_HEAD_BYTES: Final = _DURABLE_HEAD.size


def encode_append_state(state: AppendState) -> bytes:
    """Write append.state: one fixed-size struct and its CRC-32."""
    return _with_crc(
        _APPEND_STATE.pack(
            _APPEND_MAGIC,
            state.boot,
            state.segment,
            state.redo,
            state.base,
            state.kept,
            state.end,
            state.seq,
            state.hash,
            state.sealed,
            0,
        )
    )


def decode_append_state(data: bytes) -> AppendState | None:
    """Read append.state; None means absent, torn or damaged, so: rebuild it from the segments."""
    if len(data) != APPEND_STATE_BYTES:
        return None
    magic, boot, segment, redo, base, kept, end, seq, head, sealed, crc = _APPEND_STATE.unpack(data)
    if magic != _APPEND_MAGIC or crc != zlib.crc32(data[:-4]):
        return None
    return AppendState(boot, segment, redo, base, kept, end, seq, head, bool(sealed))


def encode_durable_head(head: DurableHead) -> bytes:
    """Write head/durable: one fixed-size struct and its CRC-32."""
    return _with_crc(
        _DURABLE_HEAD.pack(
            _HEAD_MAGIC,
            head.generation,
            head.boot,
            head.segment,
            head.base,
            head.end,
            head.seq,
            head.oldest,
            head.poisoned,
            head.errno,
            0,
        )
    )


def decode_durable_head(data: bytes) -> DurableHead | None:
    """Read head/durable; None means absent, torn or damaged."""
    if len(data) != DURABLE_HEAD_BYTES:
        return None
    magic, generation, boot, segment, base, end, seq, oldest, poisoned, errno, crc = (
        _DURABLE_HEAD.unpack(data)
    )
    if magic != _HEAD_MAGIC or crc != zlib.crc32(data[:-4]):
        return None
    return DurableHead(generation, boot, segment, base, end, seq, oldest, bool(poisoned), errno)


class Beat(NamedTuple):
    """The last beat of a worker: when, by the monotonic clock of that boot."""

    boot: bytes
    at_ns: int


_BEAT: Final = struct.Struct("<8s16sQI")
_BEAT_MAGIC: Final = b"crewlogB"
BEAT_BYTES: Final = _BEAT.size


def encode_beat(beat: Beat) -> bytes:
    """Write a lease file's content: one fixed-size struct and its CRC-32."""
    return _with_crc(_BEAT.pack(_BEAT_MAGIC, beat.boot, beat.at_ns, 0))


def decode_beat(data: bytes) -> Beat | None:
    """Read a lease file; None means no beat yet, torn or damaged."""
    if len(data) != BEAT_BYTES:
        return None
    magic, boot, at_ns, crc = _BEAT.unpack(data)
    if magic != _BEAT_MAGIC or crc != zlib.crc32(data[:-4]):
        return None
    return Beat(boot, at_ns)


def _with_crc(data: bytes) -> bytes:
    body = data[: -_CRC.size]
    return body + _CRC.pack(zlib.crc32(body))
