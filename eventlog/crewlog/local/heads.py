"""Read and write the two small files that tell how far the log goes: append.state, head/durable.

Each is one fixed-size struct that ends with the CRC-32 of what stands before it, written in place
with one pwrite and never synced: they are caches and evidence. A reader may meet a write half done,
which the CRC shows; it looks again. What stays unreadable is rebuilt from the segments by the next
writer. Cursors and a worker's beat are encoded in the same way.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

from crewlog import host
from crewlog.errors import RegistryClosed
from crewlog.local import disk, layout
from crewlog.local.layout import Directory
from crewlog.model.chain import Position
from crewlog.model.shape import TORN_READ_TRIES, Shape

if TYPE_CHECKING:
    from crewlog.local.futex import Word

T = TypeVar("T")
CROWD_WAKES: Final = 256
_NONE: Final = -1


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

    @property
    def position(self) -> Position:
        """Return the position up to which lines are written."""
        return Position(self.segment, self.end, self.seq)


def written(
    boot: bytes, segment: int, end: int, seq: int, hash_: bytes, *, sealed: bool = False
) -> AppendState:
    """Return a state of which the redo holds nothing yet."""
    return AppendState(boot, segment, 0, 0, 0, end, seq, hash_, sealed)


class DurableHead(NamedTuple):
    """How far lines are durable. `generation` counts syncs; `errno` is set once poisoned.

    The segment itself is synced up to `base`; what follows, up to `end`, is durable in the redo.
    `place` tells which file it was written to (0: not known): a copy, a file that was put back and
    a snapshot of the device are others.
    """

    generation: int
    boot: bytes
    segment: int
    base: int
    end: int
    seq: int
    place: int
    poisoned: bool
    errno: int

    @property
    def position(self) -> Position:
        """Return the position up to which events are durable."""
        return Position(self.segment, self.end, self.seq)


def durable(state: AppendState, *, base: int, after: DurableHead | None) -> DurableHead:
    """Return the head that tells of a state which is durable; `after` is the one before, if any."""
    generation = 0 if after is None else after.generation + 1
    return DurableHead(
        generation,
        state.boot,
        state.segment,
        base,
        state.end,
        state.seq,
        place=0 if after is None else after.place,
        poisoned=False,
        errno=0,
    )


_APPEND_STATE: Final = Shape(b"crewlogA", "16sQQQQQQ32s?3x")
_DURABLE_HEAD: Final = Shape(b"crewlogD", "Q16sQQQQQ?3xi")
_APPEND_WORD_AT: Final = 64  # the seq, of which the low half counts
_HEAD_WORD_AT: Final = 8  # the generation, as above
APPEND_STATE_BYTES: Final = _APPEND_STATE.size
DURABLE_HEAD_BYTES: Final = _DURABLE_HEAD.size
encode_append_state: Final[Callable[[AppendState], bytes]] = _APPEND_STATE.pack
encode_durable_head: Final[Callable[[DurableHead], bytes]] = _DURABLE_HEAD.pack


def decode_append_state(data: bytes) -> AppendState | None:
    """Read append.state; None means absent, torn or damaged, so: rebuild it from the segments."""
    fields = _APPEND_STATE.unpack(data)
    return None if fields is None else AppendState._make(fields)


def decode_durable_head(data: bytes) -> DurableHead | None:
    """Read head/durable; None means absent, torn or damaged."""
    fields = _DURABLE_HEAD.unpack(data)
    return None if fields is None else DurableHead._make(fields)


# -- the files -----------------------------------------------------------------------------


class StateFile(Generic[T]):
    """One state file, opened on first use, for reading until something is to be written.

    What was read or written last is kept decoded: as long as the bytes are the same, so is it.
    """

    __slots__ = (
        "_at",
        "_closed",
        "_decode",
        "_directory",
        "_encode",
        "_fd",
        "_file",
        "_guard",
        "_kept",
        "_name",
        "_size",
        "_where",
        "_word",
        "_word_at",
        "_writable",
        "crowd",
        "place",
    )

    def __init__(
        self,
        directory: Directory,
        name: str,
        *,
        inside: str,
        size: int,
        word_at: int,
        encode: Callable[[T], bytes],
        decode: Callable[[bytes], T | None],
    ) -> None:
        """Name the file, in the directory `inside` of the store ("" for the store itself).

        At `word_at` (bytes) stands what changes with every write: others wait for that.
        """
        self._word_at = word_at
        self._word: Word | None = None
        self.crowd = 0  # so many more times it is worth waking who waits: we had to wait lately
        self._encode = encode
        self._decode = decode
        self._kept: tuple[bytes, T] | None = None
        self._directory = directory
        self._name = name
        self._at = directory[inside]
        self._where = directory.where(inside, name)
        self._size = size
        self._fd = _NONE
        self._file = host.NO_FILE
        self.place = 0  # which file is open: a digest of its device and inode
        self._writable = False
        self._closed = False
        self._guard = threading.Lock()  # so that nobody uses a number that was closed

    def load(self) -> T | None:
        """Read it; None if it is absent or stays unreadable."""
        for _ in range(TORN_READ_TRIES):
            with self._guard:
                try:
                    fd = self._fd if self._fd != _NONE else self._open(change=False)
                    data = os.pread(fd, self._size, 0)
                except FileNotFoundError:
                    return None
            kept = self._kept  # one look: another thread may put a newer one in its place
            if kept is not None and kept[0] == data:
                return kept[1]
            state = self._decode(data)
            if state is not None:
                self._kept = data, state
                return state
            time.sleep(0)  # a writer on another core is in the middle of its pwrite
        return None

    def look(self) -> int:
        """Return what `wait` compares with: read it, look whether to wait at all, then wait."""
        with self._guard:
            fd = self._fd if self._fd != _NONE else self._open(change=False)
            return int.from_bytes(os.pread(fd, 4, self._word_at), "little")

    def wait(self, value: int, wait_s: float) -> None:
        """Return once the file was written since `look`, or after a short while."""
        self.crowd = CROWD_WAKES
        if self._word is None:
            with host.no_fork():
                from crewlog.local.futex import Word  # noqa: PLC0415 (nobody waits who is alone)

            self._word = Word(self._word_at)
        with self._guard:
            if self._fd == _NONE:  # let go of meanwhile: look again
                return
            self._word.map(self._fd)
        self._word.wait(value, wait_s)

    def wake(self, count: int) -> None:
        """Wake so many of those who wait; worth it as long as there is a crowd."""
        self.crowd -= 1
        if self._word is not None:
            with self._guard:
                if self._fd != _NONE:
                    self._word.map(self._fd)
                    self._word.wake(count)

    def store(self, value: T, data: bytes = b"") -> None:
        """Write it, creating the file durably if it is absent. Held by the caller: its lock.

        `data` is the value encoded, where that was done beforehand.
        """
        data = data or self._encode(value)
        self._kept = data, value
        with self._guard:
            try:
                fd = self._fd if self._writable else self._open(change=True)
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
                self._drop()
                self._file, self.place = host.own(fd), disk.place_of(fd)
            except BaseException:
                os.close(fd)
                raise
            self._fd, self._writable = fd, change  # last: what is open is known
        return self._fd

    def renew(self) -> None:
        """Let go of a file that was removed or replaced; the next use opens the one in place."""
        with self._guard:
            if self._fd != _NONE and os.fstat(self._fd).st_nlink == 0:
                self._drop()

    def _drop(self) -> None:
        fd, self._fd = self._fd, _NONE  # first: a child forked between must not use it
        self._writable = False
        if self._word is not None:
            self._word.close()
        if fd != _NONE:
            host.close_own(fd, self._file)

    def after_fork(self) -> None:
        """Renew the guard in a forked child: another thread of the parent may have held it."""
        self._guard = threading.Lock()

    def close(self) -> None:
        """Close it for good."""
        with self._guard:
            self._closed = True
            self._drop()


class States:
    """Both state files of a store.

    Who waits for locks/append waits for `written` to change, who waits for a sync for `published`.
    """

    __slots__ = ("append_state", "head", "published", "put_append_state", "written")

    def __init__(self, directory: Directory) -> None:
        """Prepare both; nothing is opened yet."""
        self.written = StateFile(
            directory,
            layout.APPEND_STATE,
            inside="",
            size=APPEND_STATE_BYTES,
            word_at=_APPEND_WORD_AT,
            encode=encode_append_state,
            decode=decode_append_state,
        )
        self.published = StateFile(
            directory,
            layout.HEAD_DURABLE,
            inside=layout.HEAD,
            size=DURABLE_HEAD_BYTES,
            word_at=_HEAD_WORD_AT,
            encode=encode_durable_head,
            decode=decode_durable_head,
        )
        self.append_state = self.written.load
        self.head = self.published.load
        self.put_append_state = self.written.store  # held: locks/append

    def put_head(self, head: DurableHead, data: bytes = b"") -> None:
        """Write head/durable: publish, and wake every watcher. Held: the sync lock in turn.

        `data` is the head encoded, where that was done beforehand.
        """
        if head.place != self.published.place:
            head, data = head._replace(place=self.published.place), b""
        self.published.store(head, data)

    def is_elsewhere(self, head: DurableHead) -> bool:
        """Say whether a head was written to another file than the one it was read from."""
        return head.place not in {0, self.published.place}

    def renew(self) -> None:
        """Reopen files that were replaced or removed."""
        self.written.renew()
        self.published.renew()

    def after_fork(self) -> None:
        """Go on in a forked child."""
        self.written.after_fork()
        self.published.after_fork()

    def close(self) -> None:
        """Close both for good."""
        self.written.close()
        self.published.close()
