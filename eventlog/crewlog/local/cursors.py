"""Keep the durable position of a named subscriber: two slots, one owner.

A position is written to the slot that is not the newest, so a torn write leaves the one before.
Losing the last write in a power cut only delivers again what was delivered: at least once.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from crewlog.errors import CursorBusy, CursorCorrupt, LockBusy, RegistryClosed
from crewlog.local import disk, layout
from crewlog.local.disk import Disk
from crewlog.local.layout import Directory
from crewlog.local.lock import take
from crewlog.model.shape import Shape
from crewlog.store import CursorState

TEMPORARY_AGE_S: Final = 3600.0


class Slot(NamedTuple):
    """One of the two positions of a cursor; that of the higher generation counts.

    `digest` is codec.short_digest of the line `seq`; version 0.1 left its bytes 0: not known.
    """

    generation: int
    seq: int
    digest: int = 0


_SLOT: Final = Shape(b"crewlogC", "QQI")
SLOT_BYTES: Final = _SLOT.size
encode_slot: Final[Callable[[Slot], bytes]] = _SLOT.pack


def decode_slots(data: bytes) -> Slot | None:
    """Read a cursor's file; return the newest whole slot, None if there is none."""
    slots = (data[:SLOT_BYTES], data[SLOT_BYTES : 2 * SLOT_BYTES])
    fields = [_SLOT.unpack(slot) for slot in slots]
    return max((Slot._make(whole) for whole in fields if whole is not None), default=None)


def read(directory: Directory, name: str) -> CursorState | None:
    """Read a cursor, whoever owns it; None if there is none of that name.

    Raises: CursorCorrupt if neither slot is whole.
    """
    where = directory.where(layout.CURSORS, name)
    with disk.failures("cannot read the cursor", where=where):
        try:
            data = disk.read_all(
                name, at=directory[layout.CURSORS], where=where, limit=layout.SMALL_FILE_BYTES_MAX
            )
        except FileNotFoundError:
            return None
    newest = decode_slots(data)
    if newest is None:
        raise CursorCorrupt(where, name)
    return CursorState(name, newest.seq, digest=newest.digest)


def every(directory: Directory) -> list[CursorState]:
    """Read every cursor; a damaged one hides no other."""
    states = []
    for name in directory.names(layout.CURSORS):
        if disk.is_temporary(name):
            continue
        try:
            state = read(directory, name)
        except CursorCorrupt:
            state = CursorState(name, 0, damaged=True)
        if state is not None:
            states.append(state)
    return states


class Cursor:
    """A cursor that this process owns; `close` lets another one own it."""

    def __init__(self, directory: Directory, name: str, *, start: int, digest: int = 0) -> None:
        """Take ownership, and create the cursor at `start` if there is none.

        Raises: CursorBusy while another subscriber owns it.
        """
        self.name = name
        self._directory = directory
        at, where = directory[layout.CURSORS], directory.where(layout.CURSORS, name)
        if not disk.exists(name, at=at):
            _create(directory, name, start, digest)
        try:
            self._lock = take(name, at=at, where=where)
        except LockBusy as error:
            raise CursorBusy(name, holder=error.holder) from error
        try:
            self._fd = disk.open_file(name, at=at, where=where, change=True)
        except BaseException:
            self._lock.close()
            raise
        newest = decode_slots(disk.read_at(self._fd, 0, 2 * SLOT_BYTES))
        if newest is None:
            self.close()
            raise CursorCorrupt(where, name)
        self._generation, self.seq, self.digest = newest

    def advance(self, seq: int, digest: int = 0) -> None:
        """Acknowledge everything up to `seq`; never moves back."""
        if seq > self.seq:
            self.set(seq, digest)

    def set(self, seq: int, digest: int = 0) -> None:
        """Move to `seq`, also backwards; `digest` is that of its line.

        Raises: RegistryClosed once it is closed.
        """
        if self._fd < 0:
            raise RegistryClosed(f"cursor {self.name}")
        self._generation += 1
        slot = self._generation % 2
        data = encode_slot(Slot(self._generation, seq, digest))
        where = self._directory.where(layout.CURSORS, self.name)
        with disk.failures("cannot move the cursor", where=where):
            self._directory.disk.overwrite(self._fd, data, slot * SLOT_BYTES)
        self.seq, self.digest = seq, digest

    def close(self) -> None:
        """Make the position durable and let go of it; idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            where = self._directory.where(layout.CURSORS, self.name)
            try:
                with disk.failures("cannot make the cursor durable", where=where):
                    self._directory.disk.sync(fd)
            finally:
                os.close(fd)
                self._lock.close()


def _create(directory: Directory, name: str, start: int, digest: int) -> None:
    """Put a whole cursor in place at once: link never replaces one that another was faster with."""
    via, at = directory.disk, directory[layout.CURSORS]
    temporary = f"{disk.TEMPORARY_PREFIX}{os.urandom(8).hex()}"  # threads create cursors too
    where = directory.where(layout.CURSORS, name)
    with disk.failures("cannot create the cursor", where=where):
        slots = (Slot(1, start, digest), Slot(0, start, digest))
        _put(via, temporary, name, b"".join(map(encode_slot, slots)), at=at)
        via.sync_directory(at)


def _put(via: Disk, temporary: str, name: str, data: bytes, *, at: int) -> None:
    disk.write_new(via, temporary, data, at=at)
    try:
        via.link(temporary, name, at=at, new_at=at)
    except FileExistsError:  # the other one's will do
        return
    finally:
        via.unlink(temporary, at=at)


def sweep(directory: Directory, *, now: float) -> None:
    """Remove what creations that were killed left, once it is so old that no living one has it."""
    at = directory[layout.CURSORS]
    for name in filter(disk.is_temporary, directory.names(layout.CURSORS)):
        with suppress(FileNotFoundError):
            if now - os.stat(name, dir_fd=at).st_mtime > TEMPORARY_AGE_S:
                directory.disk.unlink(name, at=at)


def is_owned(directory: Directory, name: str) -> bool:
    """Say whether a subscriber owns the cursor at this moment."""
    at, where = directory[layout.CURSORS], directory.where(layout.CURSORS, name)
    if not disk.exists(name, at=at):
        return False
    try:
        take(name, at=at, where=where).close()
    except LockBusy:
        return True
    return False


def remove(directory: Directory, name: str) -> bool:
    """Remove a cursor that nobody owns; False if there is none.

    Raises: CursorBusy.
    """
    if not disk.exists(name, at=directory[layout.CURSORS]):
        return False
    at, where = directory[layout.CURSORS], directory.where(layout.CURSORS, name)
    try:
        lock = take(name, at=at, where=where)
    except LockBusy as error:
        raise CursorBusy(name, holder=error.holder) from error
    with disk.failures("cannot remove the cursor", where=where):
        try:
            directory.disk.unlink(name, at=at)
        finally:
            lock.close()
        directory.disk.sync_directory(directory[layout.CURSORS])
    return True


class Cursors:
    """The cursors of a directory; see store.Cursors."""

    __slots__ = ("_directory",)

    def __init__(self, directory: Directory) -> None:
        """Read nothing yet."""
        self._directory = directory

    def read(self, name: str) -> CursorState | None:
        """Read a cursor, whoever owns it."""
        return read(self._directory, name)

    def every(self) -> list[CursorState]:
        """Read every cursor."""
        return every(self._directory)

    def own(self, name: str, *, start: int, digest: int = 0) -> Cursor:
        """Take ownership."""
        return Cursor(self._directory, name, start=start, digest=digest)

    def is_owned(self, name: str) -> bool:
        """Say whether a subscriber owns it."""
        return is_owned(self._directory, name)

    def remove(self, name: str) -> bool:
        """Remove one that nobody owns."""
        return remove(self._directory, name)
