"""Read and write the two state files in place: append.state and head/durable.

Both are written with one pwrite and never synced: they are caches and evidence. A reader may meet
a write half done, which the CRC shows; it looks again. What stays unreadable is rebuilt from the
segments by the next writer.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from crewlog import disk, layout, structs
from crewlog.directory import Directory
from crewlog.errors import RegistryClosed
from crewlog.structs import AppendState, DurableHead

T = TypeVar("T")
_NONE: Final = -1


class StateFile(Generic[T]):
    """One state file, opened on first use, for reading until something is to be written.

    What was read or written last is kept decoded: as long as the bytes are the same, so is it.
    """

    __slots__ = (
        "_at",
        "_closed",
        "_decode",
        "_directory",
        "_fd",
        "_guard",
        "_kept",
        "_name",
        "_size",
        "_where",
        "_writable",
    )

    def __init__(
        self,
        directory: Directory,
        name: str,
        *,
        inside: str,
        size: int,
        decode: Callable[[bytes], T | None],
    ) -> None:
        """Name the file, in the directory `inside` of the store ("" for the store itself)."""
        self._decode = decode
        self._kept: tuple[bytes, T] | None = None
        self._directory = directory
        self._name = name
        self._at = directory[inside]
        self._where = directory.where(inside, name)
        self._size = size
        self._fd = _NONE
        self._writable = False
        self._closed = False
        self._guard = threading.Lock()  # so that nobody uses a number that was closed

    def load(self) -> T | None:
        """Read it; None if it is absent or stays unreadable."""
        for _ in range(layout.TORN_READ_TRIES):
            with self._guard:
                try:
                    fd = self._fd if self._fd != _NONE else self._open(change=False)
                    data = os.pread(fd, self._size, 0)
                except FileNotFoundError:
                    return None
            kept = self._kept  # one look: another thread may put a newer one in its place
            if kept is not None and kept[0] == data:
                return kept[1]
            found = self._decode(data)
            if found is not None:
                self._kept = data, found
                return found
            time.sleep(0)  # a writer on another core is in the middle of its pwrite
        return None

    def store(self, data: bytes, value: T) -> None:
        """Write it, creating the file durably if it is absent. Held by the caller: its lock."""
        self._kept = data, value
        with self._guard:
            try:
                fd = self._open(change=True)
            except FileNotFoundError:
                disk.write_new(self._directory.disk, self._name, data, at=self._at)
                self._directory.disk.sync_directory(self._at)
                return
            self._directory.disk.overwrite(fd, data)

    def _open(self, *, change: bool) -> int:
        if self._closed:
            raise RegistryClosed(str(self._directory.path))
        if self._fd == _NONE or (change and not self._writable):
            fd = disk.open_file(self._name, at=self._at, where=self._where, change=change)
            try:
                disk.require_one_name(fd, where=self._where)
            except BaseException:
                os.close(fd)
                raise
            self._drop()
            self._fd, self._writable = fd, change
        return self._fd

    def renew(self) -> None:
        """Let go of a file that was removed or replaced; the next use opens the one in place."""
        with self._guard:
            if self._fd != _NONE and os.fstat(self._fd).st_nlink == 0:
                self._drop()

    def _drop(self) -> None:
        fd, self._fd = self._fd, _NONE  # first: a child forked between must not use it
        if fd != _NONE:
            os.close(fd)

    def after_fork(self) -> None:
        """Renew the guard in a forked child: another thread of the parent may have held it."""
        self._guard = threading.Lock()

    def close(self) -> None:
        """Close it for good."""
        with self._guard:
            self._closed = True
            self._drop()


class States:
    """Both state files of a store."""

    __slots__ = ("_append", "_head")

    def __init__(self, directory: Directory) -> None:
        """Prepare both; nothing is opened yet."""
        self._append = StateFile(
            directory,
            layout.APPEND_STATE,
            inside="",
            size=structs.APPEND_STATE_BYTES,
            decode=structs.decode_append_state,
        )
        self._head = StateFile(
            directory,
            layout.HEAD_DURABLE,
            inside=layout.HEAD,
            size=structs.DURABLE_HEAD_BYTES,
            decode=structs.decode_durable_head,
        )

    def append_state(self) -> AppendState | None:
        """Read append.state."""
        return self._append.load()

    def head(self) -> DurableHead | None:
        """Read head/durable."""
        return self._head.load()

    def put_append_state(self, state: AppendState) -> None:
        """Write append.state. Held: locks/append."""
        self._append.store(structs.encode_append_state(state), state)

    def put_head(self, head: DurableHead) -> None:
        """Write head/durable: publish, and wake every watcher. Held: the sync lock in turn."""
        self._head.store(structs.encode_durable_head(head), head)

    def renew(self) -> None:
        """Let go of files that are no longer in place."""
        self._append.renew()
        self._head.renew()

    def after_fork(self) -> None:
        """Go on in a forked child."""
        self._append.after_fork()
        self._head.after_fork()

    def close(self) -> None:
        """Close both for good."""
        self._append.close()
        self._head.close()
