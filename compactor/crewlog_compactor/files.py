"""Put a file of ours outside the store: a page, a plan, metrics."""

from pathlib import Path

from crewlog.local import disk
from crewlog.local.disk import Disk


def replace_file(path: Path, data: bytes, *, public: bool = False) -> None:
    """Put a file at a path, whole or not at all; owner-only, or with `public` readable by all.

    Raises: OSError; UnsafePermissions where a device or a pipe is there.
    """
    disk.replace_file(Disk(), path, data, public=public)
