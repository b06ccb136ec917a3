"""Compress sealed segments for the archive, and read them back; the only room that does.

gzip is in every Python; zstd (extra `[zstd]`) is smaller and faster to read. Both carry a checksum
of what they hold, so damage shows before a line is looked at. `zcat` and `zstdcat` read them too.
"""

import importlib
from types import ModuleType
from typing import Final, assert_never

from crewlog.errors import Unsupported
from crewlog.host import no_fork
from crewlog.local import layout
from crewlog.model.arguments import PACKINGS, Packing
from crewlog.model.snapshot import SNAPSHOT_BYTES_MAX

_GZIP_LEVEL: Final = 6
_ZSTD_LEVEL: Final = 9


class PackingError(ValueError):
    """The bytes are not what was packed; the message is the reason."""


def require(packing: str) -> Packing:
    """Return a packing that can be used here.

    Raises: ValueError, Unsupported.
    """
    if packing == "zstd":
        _zstandard(f"archive{layout.ZSTD_SUFFIX}")
        return "zstd"
    if packing == "gzip":
        return "gzip"
    message = f"archives are packed by {' or '.join(PACKINGS)}, not {packing!r}"
    raise ValueError(message)


def packing_of(name: str) -> Packing:
    """Tell by an archive's name how it is packed."""
    return "zstd" if name.endswith(layout.ZSTD_SUFFIX) else "gzip"


def pack(data: bytes, packing: Packing) -> bytes:
    """Compress; the same bytes give the same archive."""
    match packing:
        case "gzip":
            with no_fork():
                import gzip  # noqa: PLC0415 (slow to load; few reads go that far back)

            return gzip.compress(data, _GZIP_LEVEL, mtime=0)
        case "zstd":
            module = _zstandard("archive")
            made = module.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compress(data)
            return bytes(made)
    assert_never(packing)


def unpack(packed: bytes, *, name: str, where: str) -> bytes:
    """Decompress an archive.

    Raises: PackingError; Unsupported where zstd is not installed.
    """
    packing = packing_of(name)
    match packing:
        case "gzip":
            with no_fork():
                import gzip  # noqa: PLC0415 (as above)
                import zlib  # noqa: PLC0415 (as above)

            try:
                return gzip.decompress(packed)
            except (OSError, EOFError, zlib.error) as error:
                raise PackingError(f"not gzip: {error}") from error
        case "zstd":
            return _unzstd(packed, where)
    assert_never(packing)


def _unzstd(packed: bytes, where: str) -> bytes:
    module = _zstandard(where)
    try:
        size = module.get_frame_parameters(packed).content_size
        if size > SNAPSHOT_BYTES_MAX:
            raise PackingError(f"not zstd: it claims to hold {size} bytes")
        return bytes(module.ZstdDecompressor().decompress(packed, allow_extra_data=False))
    except module.ZstdError as error:
        raise PackingError(f"not zstd: {error}") from error


def _zstandard(where: str) -> ModuleType:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise Unsupported(
            "zstd is not installed",
            where=where,
            why="it is packed by zstd",
            remedy="Run: pip install zstandard (the extra [zstd] of crewlog)",
        ) from error
