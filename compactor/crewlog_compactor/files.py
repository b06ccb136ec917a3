"""Put a file of ours outside the store: a page, a plan, metrics."""

from pathlib import Path

from crewlog.local import disk, layout
from crewlog.local.disk import Disk

require_outside = layout.require_outside


def replace_file(path: Path, data: bytes, *, public: bool = False) -> None:
    """Put a file at a path, whole or not at all; owner-only, or with `public` readable by all.

    Raises: OSError; UnsafePermissions where a device or a pipe is there; NotAStore within the
    directory of a registry.
    """
    layout.require_outside(path)
    disk.replace_file(Disk(), path, data, public=public)
