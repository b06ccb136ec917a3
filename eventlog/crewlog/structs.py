"""Encode small files that are overwritten in place: both states, cursors, a worker's beat.

Each is one fixed-size struct that ends with the CRC-32 of what stands before it. They are caches
and evidence: what cannot be decoded is rebuilt or left out of account.
"""

import struct
import zlib
from collections.abc import Iterable
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
    poisoned: bool
    errno: int


def durable(state: AppendState, *, base: int, after: DurableHead | None) -> DurableHead:
    """Return the head that tells of a state which is durable; `after` is the one before, if any."""
    generation = 0 if after is None else after.generation + 1
    return DurableHead(
        generation, state.boot, state.segment, base, state.end, state.seq, poisoned=False, errno=0
    )


# A magic word, the fields in order, and the CRC-32 of what stands before it.
_APPEND_STATE: Final = struct.Struct("<8s16sQQQQQQ32s?3x")
_DURABLE_HEAD: Final = struct.Struct("<8sQ16sQQQQ8x?3xi")  # 8 bytes are reserved
_SLOT: Final = struct.Struct("<8sQQ4x")
_BEAT: Final = struct.Struct("<8s16sQ")
_CRC: Final = struct.Struct("<I")
_APPEND_MAGIC: Final = b"crewlogA"
_HEAD_MAGIC: Final = b"crewlogD"
_SLOT_MAGIC: Final = b"crewlogC"
_BEAT_MAGIC: Final = b"crewlogB"
APPEND_STATE_BYTES: Final = _APPEND_STATE.size + _CRC.size
DURABLE_HEAD_BYTES: Final = _DURABLE_HEAD.size + _CRC.size
SLOT_BYTES: Final = _SLOT.size + _CRC.size
BEAT_BYTES: Final = _BEAT.size + _CRC.size


def encode_append_state(state: AppendState) -> bytes:
    """Write append.state: one fixed-size struct and its CRC-32."""
    return _pack(_APPEND_STATE, _APPEND_MAGIC, state)


def decode_append_state(data: bytes) -> AppendState | None:
    """Read append.state; None means absent, torn or damaged, so: rebuild it from the segments."""
    fields = _unpack(data, _APPEND_STATE, _APPEND_MAGIC)
    return None if fields is None else AppendState._make(fields)


def encode_durable_head(head: DurableHead) -> bytes:
    """Write head/durable: one fixed-size struct and its CRC-32."""
    return _pack(_DURABLE_HEAD, _HEAD_MAGIC, head)


def decode_durable_head(data: bytes) -> DurableHead | None:
    """Read head/durable; None means absent, torn or damaged."""
    fields = _unpack(data, _DURABLE_HEAD, _HEAD_MAGIC)
    return None if fields is None else DurableHead._make(fields)


class Slot(NamedTuple):
    """One of the two positions of a cursor; that of the higher generation counts."""

    generation: int
    seq: int


def encode_slot(slot: Slot) -> bytes:
    """Write a slot: one fixed-size struct and its CRC-32."""
    return _pack(_SLOT, _SLOT_MAGIC, slot)


def decode_slots(data: bytes) -> Slot | None:
    """Read a cursor's file; return the newest whole slot, None if there is none."""
    slots = (data[:SLOT_BYTES], data[SLOT_BYTES : 2 * SLOT_BYTES])
    fields = [_unpack(slot, _SLOT, _SLOT_MAGIC) for slot in slots]
    return max((Slot._make(found) for found in fields if found is not None), default=None)


class Beat(NamedTuple):
    """The last beat of a worker: when, by the monotonic clock of that boot."""

    boot: bytes
    at_ns: int


def encode_beat(beat: Beat) -> bytes:
    """Write a lease file's content: one fixed-size struct and its CRC-32."""
    return _pack(_BEAT, _BEAT_MAGIC, beat)


def decode_beat(data: bytes) -> Beat | None:
    """Read a lease file; None means no beat yet, torn or damaged."""
    fields = _unpack(data, _BEAT, _BEAT_MAGIC)
    return None if fields is None else Beat._make(fields)


def _pack(shape: struct.Struct, magic: bytes, fields: Iterable[object]) -> bytes:
    body = shape.pack(magic, *fields)
    return body + _CRC.pack(zlib.crc32(body))


def _unpack(data: bytes, shape: struct.Struct, magic: bytes) -> tuple[object, ...] | None:
    """Return the fields, None if the bytes are not what was written."""
    body, crc = data[: shape.size], data[shape.size :]
    if crc != _CRC.pack(zlib.crc32(body)) or not body.startswith(magic):
        return None
    return shape.unpack(body)[1:]
