"""Keep what was committed since the last sync of its segment a second time, in place: the redo.

An append makes a file longer, and a sync of a longer file has to write its size as well; a sync of
bytes that are overwritten in place has not. So a writer copies its lines into `redo`, a file that
never grows, and the sync leader syncs that. Once it is full, or a writer could not use it, the
leader syncs the segment itself, and the next writer begins again at its start.

The redo is nothing but a copy: whole lines, byte for byte as in the segment, from `base` up to
`kept` of append.state, and behind them whatever is left of an earlier round. No header says what it
holds: a line of it counts if its seq and `prev` make it the next line of the segment. So a torn
copy, an old round and a redo of another store complete nothing.

After a power cut a segment is read as its file and what the redo knows to follow its last whole
line; the next writer puts these bytes where they belong. Killing a process needs none of this:
written bytes outlive it.
"""

import logging
import os
from typing import Final

from crewlog import host
from crewlog.local import disk, layout
from crewlog.local.heads import AppendState, DurableHead
from crewlog.local.layout import Directory
from crewlog.local.segments import Segment, Segments
from crewlog.model import chain, codec
from crewlog.model.codec import LineError

_logger = logging.getLogger("crewlog.redo")
_NONE: Final = -1


class Redo:
    """The redo of one store as one writer, or one sync leader, has it open."""

    __slots__ = ("_copied", "_directory", "_fd", "_file", "_inode", "_sound")

    def __init__(self, directory: Directory) -> None:
        """Open nothing yet."""
        self._directory = directory
        self._fd = _NONE
        self._file = host.NO_FILE
        self._inode = 0
        self._sound = False  # it holds what append.state says, as far as it was looked at
        self._copied = (0, 0, 0)  # segment, base and end of what was copied last, or tried to

    def reopen(self) -> None:
        """Open the file that is in place now; without one, nothing is open.

        Raises: UnsafePermissions.
        """
        self.close()
        where, root = self._directory.where(layout.REDO), self._directory.root
        try:
            fd = disk.open_file(layout.REDO, at=root, where=where, change=True)
        except FileNotFoundError:  # an older store: the segment is synced instead
            return
        try:
            disk.require_one_name(fd, where=where)
            self._file = host.own(fd)
            self._inode = self._file[1]
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd  # last: what is open is known

    def keep(
        self, data: bytes, state: AppendState, *, head: DurableHead, source: Segment
    ) -> tuple[int, int, int]:
        """Copy lines that were just written behind `state`; return what append.state says of it.

        That is: its inode, and from where to where it holds the segment's bytes. Held: append.
        Where they do not fit or cannot be written (a copying file system has no room), the redo
        holds what it held.
        """
        _, segment, inode, base, kept, start, _, _, _ = state
        held = inode, base, kept
        end = start + len(data)
        if self._fd == _NONE:
            return held
        same = kept == start and inode == self._inode
        if not (same and (self._sound or self._is_sound(state, source))):
            if head.segment != segment or head.base < kept:
                return held  # what it holds is needed until the segment was synced
            base = head.base
            data = source.read(base, start - base) + data
        if end - base > self._directory.limits.redo_bytes:
            return held
        via, at = self._directory.disk, end - len(data) - base
        self._copied = (segment, base, end)
        try:
            via.overwrite(self._fd, data, at)
        except OSError as error:
            _logger.warning("the redo cannot be used: %s", error)
            return held
        self._sound = True
        if head.end == start:  # nobody else is about to write to the same page
            try:  # noqa: SIM105 (a hint, at every change)
                via.start(self._fd, at, len(data))
            except OSError:
                pass
        return self._inode, base, end

    def _is_sound(self, state: AppendState, source: Segment) -> bool:
        """Say whether the file holds what append.state says: an inode is used again."""
        size = state.kept - state.base
        self._sound = disk.read_at(self._fd, 0, size) == source.read(state.base, size)
        return self._sound

    def take_back(self, state: AppendState) -> None:
        """Remove the copy of lines behind `state` that were cut off the log; durable on return."""
        segment, base, end = self._copied
        if segment == state.segment and end > state.end:
            via = self._directory.disk
            via.overwrite(self._fd, bytes(end - state.end), state.end - base)
            via.sync(self._fd)
            self._copied = (0, 0, 0)

    def descriptor(self, state: AppendState) -> int:
        """Return the descriptor whose sync makes all of `state` durable; -1: the segment's own.

        Held: the sync lock in turn.
        """
        if state.kept != state.end or state.sealed:
            return _NONE
        if self._inode != state.redo:
            self.reopen()
        return self._fd if self._inode == state.redo else _NONE

    def close(self) -> None:
        """Close the file; the next use opens the one that is in place."""
        fd, self._fd = self._fd, _NONE  # first: a child forked between must not close it again
        self._inode, self._sound = 0, False
        if fd != _NONE:
            host.close_own(fd, self._file)


def read(directory: Directory) -> bytes:
    """Return all that is in the redo; nothing where there is none."""
    where, limit = directory.where(layout.REDO), directory.limits.redo_bytes
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
        disk.write_new(
            directory.disk, layout.REDO, bytes(directory.limits.redo_bytes), at=directory.root
        )
        directory.disk.sync_directory(directory.root)


def empty(directory: Directory) -> None:
    """Zero it; durable on return. Held: locks/append, both sync locks."""
    via, where = directory.disk, directory.where(layout.REDO)
    fd = disk.open_file(layout.REDO, at=directory.root, where=where, change=True)
    try:
        via.overwrite(fd, bytes(disk.size_of(fd)))
        via.sync(fd)
    finally:
        os.close(fd)


def _lines_from(kept: bytes, seq: int) -> bytes:
    """Return what the redo holds from the line `seq` on; b"" where no line of it begins so."""
    begin = b'{"v":1,"seq":%d,' % seq
    at = 0 if kept.startswith(begin) else kept.find(b"\n" + begin) + 1
    return kept[at:] if kept.startswith(begin, at) else b""


def line_after(kept: bytes, seq: int, hash_: bytes) -> bytes:
    """Return the line of the redo that follows line `seq` with that hash; b"" where none does."""
    rest = _lines_from(kept, seq + 1)
    raw = rest[: max(0, rest.find(b"\n"))]
    try:
        return raw if codec.parse(raw)["prev"] == hash_.hex() else b""
    except LineError:
        return b""


def completed(data: bytes, first: int, kept: bytes) -> bytes:
    """Return a segment's bytes with what the redo `kept` knows to follow their valid prefix."""
    scan = chain.scan(data, offset=0, seq=first - 1, prev=None)
    if scan.end == 0 or scan.sealed:
        return data
    rest = _lines_from(kept, scan.seq + 1)
    if not rest:
        return data
    more = chain.scan(rest, offset=scan.end, seq=scan.seq, prev=scan.hash)
    return data[: scan.end] + rest[: more.end - scan.end] + data[more.end :]


def complete(segments: Segments) -> None:
    """Complete the last segment from the redo, in memory, until a writer has recovered it.

    What was completed before stands until then: another thread may be reading it.
    """
    files, whole = Segments(segments.directory), {}
    for first in files.in_log()[-1:]:
        with files.open(first) as source:
            data = source.whole()
        more = completed(data, first, read(segments.directory))
        if more != data:
            whole[first] = more
    segments.completed = whole
