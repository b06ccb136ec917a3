"""Read and write the two state files in place: append.state and head/durable.

Both are written with one pwrite and never synced: they are caches and evidence. A reader may meet
a write half done, which the CRC shows; it looks again. What stays unreadable is rebuilt from the
segments by the next writer.
"""

import os
import time
from collections.abc import Callable
from typing import Final, TypeVar

from crewlog import codec, disk, layout
from crewlog.codec import AppendState, DurableHead
from crewlog.directory import Directory

T = TypeVar("T")
_CLOSED: Final = -1


class StateFile:
    """One state file, opened on first use."""

    __slots__ = ("_at", "_directory", "_fd", "_name", "_size", "_where")

    def __init__(self, directory: Directory, name: str, *, inside: str, size: int) -> None:
        """Name the file, in the directory `inside` of the store ("" for the store itself)."""
        self._directory = directory
        self._name = name
        self._at = directory[inside] if inside else directory.root
        self._where = directory.where(inside, name)
        self._size = size
        self._fd = _CLOSED

    def load(self, decode: Callable[[bytes], T | None]) -> T | None:
        """Read it; None if it is absent or stays unreadable."""
        try:
            fd = self._open()
        except FileNotFoundError:
            return None
        for _ in range(layout.TORN_READ_TRIES):
            found = decode(os.pread(fd, self._size, 0))
            if found is not None:
                return found
            time.sleep(0)  # a writer on another core is in the middle of its pwrite
        return None

    def store(self, data: bytes) -> None:
        """Write it, creating the file durably if it is absent. Held by the caller: its lock."""
        try:
            fd = self._open()
        except FileNotFoundError:
            disk.write_new(self._directory.disk, self._name, data, at=self._at)
            self._directory.disk.sync_directory(self._at)
            return
        self._directory.disk.overwrite(fd, data)

    def _open(self) -> int:
        if self._fd == _CLOSED:
            self._fd = disk.open_file(self._name, at=self._at, where=self._where, change=True)
            try:
                disk.require_one_name(self._fd, where=self._where)
            except BaseException:
                self.close()
                raise
        return self._fd

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd != _CLOSED:
            os.close(self._fd)
            self._fd = _CLOSED


class States:
    """Both state files of a store."""

    __slots__ = ("_append", "_head")

    def __init__(self, directory: Directory) -> None:
        """Prepare both; nothing is opened yet."""
        self._append = StateFile(
            directory, layout.APPEND_STATE, inside="", size=codec.APPEND_STATE_BYTES
        )
        self._head = StateFile(
            directory, layout.HEAD_DURABLE, inside=layout.HEAD, size=codec.DURABLE_HEAD_BYTES
        )

    def append_state(self) -> AppendState | None:
        """Read append.state."""
        return self._append.load(codec.decode_append_state)

    def head(self) -> DurableHead | None:
        """Read head/durable."""
        return self._head.load(codec.decode_durable_head)

    def put_append_state(self, state: AppendState) -> None:
        """Write append.state. Held: locks/append."""
        self._append.store(codec.encode_append_state(state))

    def put_head(self, head: DurableHead) -> None:
        """Write head/durable: publish, and wake every watcher. Held: the sync lock in turn."""
        self._head.store(codec.encode_durable_head(head))

    def close(self) -> None:
        """Close both descriptors."""
        self._append.close()
        self._head.close()
