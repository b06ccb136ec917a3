"""Encode a few fields in a fixed number of bytes that show whether they are whole. Pure.

A magic word, the fields in order, and the CRC-32 of what stands before it. Such a file is written
in place with one pwrite, so a reader may meet it half written, which the CRC shows; it looks again.
"""

import struct
import zlib
from collections.abc import Iterable
from typing import Final

TORN_READ_TRIES: Final = 50  # so many looks before a file counts as torn, not as being written
_CRC: Final = struct.Struct("<I")


class Shape:
    """What one kind of file holds."""

    __slots__ = ("_magic", "_struct", "size")

    def __init__(self, magic: bytes, fields: str) -> None:
        """Name its magic word, of 8 bytes, and its fields, as `struct` writes them."""
        self._magic = magic
        self._struct = struct.Struct(f"<8s{fields}I")
        self.size = self._struct.size

    def pack(self, fields: Iterable[object]) -> bytes:
        """Return the bytes."""
        body = self._struct.pack(self._magic, *fields, 0)[: -_CRC.size]
        return body + _CRC.pack(zlib.crc32(body))

    def unpack(self, data: bytes) -> tuple[object, ...] | None:
        """Return the fields, None if the bytes are not what was written."""
        if len(data) != self.size:
            return None
        magic, *fields, crc = self._struct.unpack(data)
        whole = magic == self._magic and crc == zlib.crc32(data[: -_CRC.size])
        return tuple(fields) if whole else None


def with_crc(body: bytes) -> bytes:
    """Return bytes with their CRC-32 behind them."""
    return body + _CRC.pack(zlib.crc32(body))
