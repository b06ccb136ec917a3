"""Keep what was committed since the last sync of its segment a second time, in place: the redo.

An append makes a file longer, and a sync of a longer file has to write its size as well; a sync of
bytes that are overwritten in place has not. So a sync leader copies what is to be committed into
`redo`, a file that never grows, and syncs that. The segment itself is synced once the redo is
full, and at a rotation; then the redo begins again at its start.

The redo is nothing but a copy: whole lines, byte for byte as in the segment, from `head.base` on,
and behind them whatever is left of an earlier round. No header says what it holds: a line of it
counts if its seq and `prev` make it the next line of the segment. So a torn copy, an old round and
a redo of another store complete nothing.

After a power cut a segment is read as its file and what the redo knows to follow its last whole
line; the next writer puts these bytes where they belong. Killing a process needs none of this:
written bytes outlive it.
"""

import os
from typing import Final

from crewlog import disk, layout, segments
from crewlog.codec import AppendState, DurableHead
from crewlog.directory import Directory
from crewlog.segments import Source

_CLOSED: Final = -1


class Redo:
    """The redo of one store, for sync leaders; guarded by whoever holds the sync lock."""

    __slots__ = ("_directory", "_fd")

    def __init__(self, directory: Directory) -> None:
        """Open nothing yet."""
        self._directory = directory
        self._fd = _CLOSED

    def put(self, head: DurableHead, state: AppendState, source: Source) -> int:
        """Copy what lies between `head` and `state`; return the descriptor to be synced.

        Returns -1 where the segment itself must be synced: it is sealed or another one, the redo is
        full, missing, or cannot be written (a copying file system has no room).
        """
        if state.sealed or head.segment != state.segment:
            return _CLOSED
        if state.end - head.base > layout.REDO_BYTES:
            return _CLOSED
        try:
            fd = self._open()
            data = source.read(head.end, state.end - head.end)
            self._directory.disk.overwrite(fd, data, head.end - head.base)
        except OSError:
            return _CLOSED
        return fd

    def _open(self) -> int:
        if self._fd != _CLOSED and os.fstat(self._fd).st_nlink != 1:
            self.close()
        if self._fd == _CLOSED:
            where, root = self._directory.where(layout.REDO), self._directory.root
            fd = disk.open_file(layout.REDO, at=root, where=where, change=True)
            try:
                disk.require_one_name(fd, where=where)
            except BaseException:
                os.close(fd)
                raise
            self._fd = fd
        return self._fd

    def close(self) -> None:
        """Close the file."""
        if self._fd != _CLOSED:
            os.close(self._fd)
            self._fd = _CLOSED


def read(directory: Directory) -> bytes:
    """Return all that is in the redo; nothing where there is none."""
    where, limit = directory.where(layout.REDO), layout.REDO_BYTES
    with disk.failures("cannot read the redo", where=where):
        try:
            return disk.read_all(layout.REDO, at=directory.root, where=where, limit=limit)
        except FileNotFoundError:
            return b""


def make(directory: Directory) -> None:
    """Create an empty redo, durable on return, if there is none.

    Held: locks/append, and both sync locks once the store is in use. It is written in full, so
    that no later write has to find room for it.
    """
    if not disk.exists(layout.REDO, at=directory.root):
        disk.write_new(directory.disk, layout.REDO, bytes(layout.REDO_BYTES), at=directory.root)
        directory.disk.sync_directory(directory.root)


def completed(data: bytes, first: int, kept: bytes) -> bytes:
    """Return a segment's bytes with what the redo `kept` knows to follow their valid prefix."""
    found = segments.scan(data, offset=0, seq=first - 1, prev=None)
    if found.end == 0 or found.sealed:
        return data
    next_line = b'{"v":1,"seq":%d,' % (found.seq + 1)
    at = 0 if kept.startswith(next_line) else kept.find(b"\n" + next_line) + 1
    if not kept.startswith(next_line, at):
        return data
    more = segments.scan(kept[at:], offset=found.end, seq=found.seq, prev=found.hash)
    return data[: found.end] + kept[at : at + more.end - found.end] + data[more.end :]


def complete(directory: Directory) -> None:
    """Let the last segment be read as the redo completes it, until a writer has recovered it."""
    directory.completed.clear()
    firsts = segments.active_and_sealed(directory)
    if not firsts:
        return
    source = segments.open_segment(directory, firsts[-1])
    try:
        data = source.read(0, source.size())
    finally:
        source.close()
    whole = completed(data, firsts[-1], read(directory))
    if whole != data:
        directory.completed[firsts[-1]] = whole
