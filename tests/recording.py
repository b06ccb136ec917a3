"""A disk that remembers every change, and can say what a power cut might leave of it.

The model is the pessimist's reading of POSIX. What was written and not synced may be there wholly,
partly, as zeros, or not at all, each write by itself; a name that was created, replaced or removed
and not synced with its directory may be there or not, each by itself; a sync makes everything
written to that file before it durable, a sync of a directory the names in it. Nothing else orders
anything.
"""

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from crewlog.local.disk import Disk

SECTOR = 512
_ALL_SUBSETS = 4
_SOME_SUBSETS = 6
# ("w" or "n", file or folder, which of its changes)
Pending = tuple[str, int, int]


@dataclass
class File:
    """A file's durable bytes, and what came since its last sync: (offset, data), (size, None)."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def image(self, kept: frozenset[int], *, torn: int | None = None, zeros: bool = False) -> bytes:
        """Return the bytes if only the `kept` pending writes arrived.

        The write `torn` arrived up to its middle, or, in a long one, without its first sector;
        `zeros`: the size of those that did not arrive did.
        """
        data = bytearray(self.durable)
        for number, (at, written) in enumerate(self.pending):
            if written is None:
                if number in kept:
                    del data[at:]
                continue
            part: bytes | None = written if number in kept else None
            if number == torn:
                hole = len(written) > 2 * SECTOR
                part = b"\0" * SECTOR + written[SECTOR:] if hole else written[: len(written) // 2]
            if part is None and zeros and at + len(written) > len(data):  # a size, not an overwrite
                part = bytes(data[at:]) + b"\0" * (at + len(written) - max(at, len(data)))
            if part is not None:
                if len(data) < at:
                    data += b"\0" * (at - len(data))
                data[at : at + len(part)] = part
        return bytes(data)

    def settle(self) -> None:
        """Make every write durable."""
        self.durable = self.image(frozenset(range(len(self.pending))))
        self.pending.clear()


Names = dict[str, int]


@dataclass
class Folder:
    """A directory's durable names, and the changes since its last sync; None: gone."""

    durable: Names = field(default_factory=dict)
    pending: list[dict[str, int | None]] = field(default_factory=list)

    def image(self, kept: frozenset[int]) -> Names:
        """Return the names if only the `kept` pending changes arrived."""
        names = dict(self.durable)
        for number, change in enumerate(self.pending):
            if number in kept:
                for name, what in change.items():
                    if what is None:
                        names.pop(name, None)
                    else:
                        names[name] = what
        return names

    def settle(self) -> None:
        """Make every name durable."""
        self.durable = self.image(frozenset(range(len(self.pending))))
        self.pending.clear()


class RecordingDisk(Disk):
    """Do everything for real, and keep the model beside it."""

    def __init__(self, root: Path) -> None:
        """Record what happens below `root`, which exists, is empty and durable."""
        self.files: dict[int, File] = {}
        self.folders: dict[int, Folder] = {}
        self._ids: dict[int, int] = {}  # inode -> our number, because inodes are recycled
        self._next = itertools.count(1)
        self.root = self._new(os.stat(root).st_ino)
        self.folders[self.root] = Folder()
        self.after_each: list[str] = []

    def _new(self, inode: int) -> int:
        self._ids[inode] = number = next(self._next)
        return number

    def _of(self, fd: int) -> int:
        return self._ids[os.fstat(fd).st_ino]

    def _folder(self, at: int | None, name: str) -> tuple[Folder, str]:
        if at is not None:
            return self.folders[self._of(at)], name
        path = Path(name)
        return self.folders[self._ids[path.parent.stat().st_ino]], path.name

    def done(self, call: str) -> None:
        """Be told of every call that is over; a test looks at the possible crash states here."""

    def make_directory(self, name: str, *, at: int | None = None) -> None:
        super().make_directory(name, at=at)
        folder, short = self._folder(at, name)
        number = self._new(os.stat(name, dir_fd=at).st_ino)
        self.folders[number] = Folder()
        folder.pending.append({short: number})
        self.done("make_directory")

    def create(self, name: str, *, at: int, append: bool = False) -> int:
        fd = super().create(name, at=at, append=append)
        number = self._new(os.fstat(fd).st_ino)
        self.files[number] = File()
        self.folders[self._of(at)].pending.append({name: number})
        self.done("create")
        return fd

    def write(self, fd: int, data: bytes) -> int:
        offset = os.fstat(fd).st_size
        taken = super().write(fd, data)
        self.files[self._of(fd)].pending.append((offset, data[:taken]))
        self.done("write")
        return taken

    def overwrite(self, fd: int, data: bytes, offset: int = 0) -> None:
        super().overwrite(fd, data, offset)
        pending = self.files[self._of(fd)].pending
        if pending[-2:] and all(p[0] == offset for p in pending[-2:]) and len(pending) > 1:
            del pending[
                -2
            ]  # of many whole overwrites, the last two and what was before stand for all
        pending.append((offset, data))
        self.done("overwrite")

    def cut(self, fd: int, size: int) -> None:
        super().cut(fd, size)
        self.files[self._of(fd)].pending.append((size, None))
        self.done("cut")

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self.settle_file(self._of(fd))
        self.done("sync")

    def settle_file(self, number: int) -> None:
        """Make a file's bytes durable; a negative control leaves this out."""
        self.files[number].settle()

    def sync_directory(self, fd: int) -> None:
        super().sync_directory(fd)
        number = self._ids.get(os.fstat(fd).st_ino)
        if number is not None:  # not above the root of the model
            self.settle_folder(number)
        self.done("sync_directory")

    def settle_folder(self, number: int) -> None:
        """Make a directory's names durable; a negative control leaves this out."""
        self.folders[number].settle()

    def link(self, name: str, new: str, *, at: int, new_at: int) -> None:
        super().link(name, new, at=at, new_at=new_at)
        number = self._ids[os.stat(new, dir_fd=new_at, follow_symlinks=False).st_ino]
        self.folders[self._of(new_at)].pending.append({new: number})
        self.done("link")

    def rename(self, name: str, new: str, *, at: int) -> None:
        super().rename(name, new, at=at)
        number = self._ids[os.stat(new, dir_fd=at, follow_symlinks=False).st_ino]
        self.folders[self._of(at)].pending.append({name: None, new: number})
        self.done("rename")

    def unlink(self, name: str, *, at: int) -> None:
        super().unlink(name, at=at)
        self.folders[self._of(at)].pending.append({name: None})
        self.done("unlink")

    # -- crash states -----------------------------------------------------------------------

    def states(self) -> Iterator["CrashState"]:
        """Yield what a power cut at this moment may leave.

        Nothing of what is pending; all of it; only names, only bytes; zeros for a size; each
        pending change lost alone and kept alone; each write torn; of a few pending changes every
        subset, of many some by chance.
        """
        writes = [(n, i) for n, f in self.files.items() for i in range(len(f.pending))]
        names = [(n, i) for n, f in self.folders.items() for i in range(len(f.pending))]
        everything = frozenset(("w", *w) for w in writes) | frozenset(("n", *n) for n in names)
        only_names = frozenset(p for p in everything if p[0] == "n")
        yield CrashState(frozenset())
        yield CrashState(everything)
        yield CrashState(only_names)
        yield CrashState(only_names, zeros=True)
        yield CrashState(everything - only_names)
        for one in everything:
            yield CrashState(everything - {one})
            yield CrashState(frozenset({one}))
        yield from (CrashState(kept) for kept in _subsets(sorted(everything)))
        for number, index in writes:
            yield CrashState(everything - {("w", number, index)}, torn=(number, index))

    def materialise(self, state: "CrashState", target: Path) -> None:
        """Write a crash state to an empty directory."""
        self._put(self.root, state, target)

    def _put(self, number: int, state: "CrashState", target: Path) -> None:
        kept = frozenset(i for kind, n, i in state.kept if kind == "n" and n == number)
        for name, what in self.folders[number].image(kept).items():
            place = target / name
            if what in self.folders:
                place.mkdir(mode=0o700)
                self._put(what, state, place)
                continue
            file = self.files[what]
            writes = frozenset(i for kind, n, i in state.kept if kind == "w" and n == what)
            torn = state.torn[1] if state.torn is not None and state.torn[0] == what else None
            fd = os.open(place, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
            os.write(fd, file.image(writes, torn=torn, zeros=state.zeros))
            os.close(fd)


def _subsets(pending: list[Pending]) -> Iterator[frozenset[Pending]]:
    if len(pending) <= _ALL_SUBSETS:
        for size in range(2, len(pending) - 1):
            yield from map(frozenset, itertools.combinations(pending, size))
        return
    dice = random.Random(len(pending))
    for _ in range(_SOME_SUBSETS):
        yield frozenset(one for one in pending if dice.random() < 0.5)


@dataclass(frozen=True)
class CrashState:
    """Which pending changes arrived."""

    kept: frozenset[Pending]
    torn: tuple[int, int] | None = None
    zeros: bool = False
