"""Open, change and sync files: the one seam between crewlog and the file system.

Everything that changes a file goes through a `Disk`, so that a test can put a recording or a
failing one in its place; this is the only module that changes files. Every name is relative to
an open directory, so a path that is swapped under us leads nowhere.

Duties of the methods (what the argument in append.py builds on):

- `create` fails if the name exists, never follows a link, and the file is 0600 from birth;
- `sync` returns only when every byte written to this descriptor before is durable, its size too;
- `sync_directory` returns only when every name created, replaced or removed in it is durable;
- `link` fails if the target exists; `rename` replaces the target at once or not at all.

None of them retries. A failed `sync` must never be called again on the same file: Linux reports
the loss once, marks the pages clean, and the next call succeeds although the data are gone.
"""

import errno
import hashlib
import os
import resource
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from crewlog.errors import (
    CrewlogError,
    StorageFailed,
    StorageFull,
    UnsafePermissions,
    from_oserror,
)

DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644  # of metrics alone, which name no worker
# A temporary file that a killed writer left is swept by the next holder of its lock; in cursors/,
# where there is none, once it is old.
TEMPORARY_PREFIX: Final = ".tmp-"
WRITE_BYTES_MAX: Final = 16 * 1024 * 1024
# A directory that changed within so long may change again at the same tick of its clock.
STAMP_SETTLED_NS: Final = 20_000_000
STAMP_SECONDS_NS: Final = 2_000_000_000

_SAFE: Final = os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS: Final = 0o077


class Disk:
    """The real file system. Every method may raise OSError and changes nothing but what it says."""

    def make_directory(self, name: str, *, at: int | None = None) -> None:
        """Create a directory with mode 0700, whatever the umask."""
        os.mkdir(name, DIRECTORY_MODE, dir_fd=at)
        if stat.S_IMODE(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode) != (
            DIRECTORY_MODE
        ):  # a umask took bits away; it can never have added any
            os.chmod(name, DIRECTORY_MODE, dir_fd=at)

    def create(self, name: str, *, at: int, append: bool = False) -> int:
        """Create a file with mode 0600, whatever the umask, and return its descriptor."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE | (os.O_APPEND if append else 0)
        fd = os.open(name, flags, FILE_MODE, dir_fd=at)
        try:
            os.fchmod(fd, FILE_MODE)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def write(self, fd: int, data: bytes) -> int:
        """Write once at the end of an appending descriptor; return how many bytes were taken."""
        return os.write(fd, data)

    def overwrite(self, fd: int, data: bytes, offset: int = 0) -> None:
        """Write in place, within what the file holds: a state, a slot, a round of the redo."""
        if os.pwrite(fd, data, offset) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def start(self, fd: int, offset: int, size: int) -> None:
        """Start writing bytes to the disk; a hint without a guarantee.

        What a caller does until its `sync` then costs no time. Source: posix_fadvise(2), which
        begins to write dirty pages back before it would drop them.
        """
        if sys.platform == "linux":
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)

    def cut(self, fd: int, size: int) -> None:
        """Cut a file to `size` bytes."""
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        """Make the file's bytes and size durable."""
        if sys.platform == "darwin":
            import fcntl  # noqa: PLC0415 (fsync alone leaves the drive's cache unflushed there)

            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fdatasync(fd)

    def sync_directory(self, fd: int) -> None:
        """Make the names in a directory durable."""
        os.fsync(fd)

    def link(self, name: str, new: str, *, at: int, new_at: int) -> None:
        """Give a file a second name, which must not exist."""
        os.link(name, new, src_dir_fd=at, dst_dir_fd=new_at, follow_symlinks=False)

    def rename(self, name: str, new: str, *, at: int) -> None:
        """Replace `new` by `name`, atomically."""
        os.rename(name, new, src_dir_fd=at, dst_dir_fd=at)

    def make_public(self, name: str, *, at: int) -> None:
        """Let everybody read a file of ours; for what is not the store's."""
        os.chmod(name, PUBLIC_MODE, dir_fd=at)

    def unlink(self, name: str, *, at: int) -> None:
        """Remove a name."""
        os.unlink(name, dir_fd=at)


# -- opening --------------------------------------------------------------------------------


def open_directory(name: str, *, at: int | None = None, where: str) -> int:
    """Open a directory of ours that nobody else can look into.

    Raises: FileNotFoundError if it is absent; UnsafePermissions if it is not a directory of ours,
    or open to others.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _SAFE, dir_fd=at)
    except FileNotFoundError as error:
        error.filename = where
        raise
    try:
        _check(os.fstat(fd), where=where)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_file(name: str, *, at: int, where: str, change: bool = False, append: bool = False) -> int:
    """Open a file of ours that nobody else can read.

    Raises: FileNotFoundError if it is absent; UnsafePermissions if it is not a plain file of ours,
    or is open to others; see require_one_name for a second name. O_NONBLOCK keeps a FIFO from
    holding us up.
    """
    flags = (os.O_RDWR if change else os.O_RDONLY) | (os.O_APPEND if append else 0)
    try:
        fd = os.open(name, flags | _SAFE | os.O_NONBLOCK, dir_fd=at)
    except FileNotFoundError as error:
        error.filename = where
        raise
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:
            raise _unsafe(where, "it is a link or no plain file", "Remove it") from error
        raise
    try:
        _check(os.fstat(fd), where=where, regular=True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(inode: os.stat_result, *, where: str, regular: bool = False) -> None:
    if regular and not stat.S_ISREG(inode.st_mode):
        raise _unsafe(where, "it is not a regular file", "Remove it")
    if inode.st_uid != os.geteuid():
        raise _unsafe(where, f"its owner is uid {inode.st_uid}, not {os.geteuid()}", "Use your own")
    if inode.st_mode & _OTHERS:
        mode = stat.S_IMODE(inode.st_mode)
        deep = "-R " if stat.S_ISDIR(inode.st_mode) else ""  # a copy lets them into all of it
        raise _unsafe(where, f"mode {mode:04o} lets others in", f"Run: chmod {deep}go= {where}")


def _unsafe(where: str, why: str, remedy: str) -> UnsafePermissions:
    return UnsafePermissions("refused for safety", where=where, why=why, remedy=remedy)


def require_one_name(fd: int, *, where: str) -> None:
    """Refuse a file that has a second name somewhere."""
    if os.fstat(fd).st_nlink > 1:
        raise _unsafe(where, "it has a second name (hard link)", "Remove the other name")


def resolved(path: Path) -> Path:
    """Return a path without links.

    Raises: UnsafePermissions where links lead in a circle.
    """
    try:
        return path.resolve()
    except (RuntimeError, OSError) as error:  # RuntimeError before Python 3.13
        raise _unsafe(str(path), "its links lead in a circle", "Check --dir") from error


def check_ancestors(path: Path) -> None:
    """Refuse a place that others could replace: a parent they may write, without sticky bit."""
    for parent in path.parents:
        inode = os.stat(parent)
        shared = inode.st_mode & stat.S_IWOTH or (
            inode.st_mode & stat.S_IWGRP and inode.st_gid not in {0, os.getegid(), *os.getgroups()}
        )
        if shared and not inode.st_mode & stat.S_ISVTX:
            raise _unsafe(str(parent), "others may rename what is in it", f"Run: chmod +t {parent}")


def write_all(via: Disk, fd: int, data: bytes) -> None:
    """Write all of it, in as many steps as it takes; not for an append, which is one write."""
    rest = memoryview(data)
    while rest:
        taken = via.write(fd, bytes(rest[:WRITE_BYTES_MAX]))
        if taken == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest = rest[taken:]


def write_new(via: Disk, name: str, data: bytes, *, at: int) -> None:
    """Create a file with this content, its bytes durable on return, or leave nothing behind.

    The name is not durable before `sync_directory`.
    """
    fd = via.create(name, at=at, append=True)
    try:
        write_all(via, fd, data)
        via.sync(fd)
    except BaseException:
        via.unlink(name, at=at)
        raise
    finally:
        os.close(fd)


def replace_file(via: Disk, path: Path, data: bytes, *, public: bool = False) -> None:
    """Put a file of ours at a path outside the store, whole or not at all.

    It is owner-only, or with `public` readable by all. A link at that path is replaced, never
    followed.
    Raises: UnsafePermissions where a device or a pipe is there, which would be gone.
    """
    with suppress(FileNotFoundError, NotADirectoryError):  # told below
        there = os.lstat(path).st_mode
        if not (stat.S_ISREG(there) or stat.S_ISLNK(there) or stat.S_ISDIR(there)):
            raise _unsafe(str(path), "it is a device or a pipe", "Name a file, or a new one")
    at = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    temporary = f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}"
    try:
        write_new(via, temporary, data, at=at)
        try:
            if public:
                via.make_public(temporary, at=at)
            via.rename(temporary, path.name, at=at)
        except BaseException:
            via.unlink(temporary, at=at)
            raise
        via.sync_directory(at)
    finally:
        os.close(at)


def open_log(path: Path, *, bytes_max: int | None, aside: str) -> int:
    """Open a file for a worker's output, to append to; make it where there is none.

    One of more than `bytes_max` bytes gets the suffix `aside` first, and replaces what has that.
    Raises: UnsafePermissions where it is no plain file of ours, or open to others; OSError.
    """
    via = Disk()
    at = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            with suppress(FileExistsError):  # made meanwhile by another who starts a worker
                if not exists(path.name, at=at):
                    return via.create(path.name, at=at, append=True)
            with suppress(FileNotFoundError):  # set aside meanwhile, as above
                fd = open_file(path.name, at=at, where=str(path), change=True, append=True)
                try:
                    require_one_name(fd, where=str(path))
                    if bytes_max is None or size_of(fd) <= bytes_max:
                        os.set_blocking(fd, True)
                        return fd
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)
                via.rename(path.name, path.name + aside, at=at)
    finally:
        os.close(at)


# -- reading --------------------------------------------------------------------------------


class Stamp:
    """Notice that a name in one of some directories was created, replaced or removed.

    By the directory's ctime, which no tool that restores times can set back, so that the files in
    it need not be looked at one by one. (Nor should they be: on Linux ≥ 6.13 the first write after
    an fstat of a file gives it a finer time, and so its next sync an inode to write.) A time that
    was too young, when it was looked at, to be told from the next change's is never settled for.
    One thread at a time.
    """

    __slots__ = ("_looked_at", "_seen", "_settled")

    def __init__(self, *fds: int) -> None:
        """Stamp open directories; at first everything has moved."""
        self._settled = dict.fromkeys(fds, -1)  # by descriptor, what was found before the look
        self._seen = self._settled
        self._looked_at = 0

    def moved(self) -> bool:
        """Say whether anything may have changed since `settle`; look, and then settle."""
        for fd, ctime_ns in self._settled.items():
            if os.fstat(fd).st_ctime_ns != ctime_ns:
                self._looked_at = time.time_ns()
                self._seen = {fd: os.fstat(fd).st_ctime_ns for fd in self._settled}
                return True
        return False

    def settle(self) -> None:
        """Take what was found before the look as seen."""
        newest = max(self._seen.values())
        whole = newest % 1_000_000_000 == 0  # a file system that counts in seconds
        tick = STAMP_SECONDS_NS if whole else STAMP_SETTLED_NS
        if self._looked_at - newest > tick:
            self._settled = self._seen


def require_length(size: int, *, where: str) -> None:
    """Refuse what this process's own limit would cut off half way, or has cut off.

    Raises: StorageFull. Source: setrlimit(2), RLIMIT_FSIZE; `ulimit -f`.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and size > limit:
        raise StorageFull(where, why=f"this process may write files of {limit} bytes (ulimit -f)")


def place_of(fd: int) -> int:
    """Return a digest of an open file's device and inode: 64 bits, never 0."""
    inode = os.fstat(fd)
    names = b"%d %d" % (inode.st_dev, inode.st_ino)
    return int.from_bytes(hashlib.blake2b(names, digest_size=8).digest(), "little") or 1


def size_of(fd: int) -> int:
    """Return a file's size without an fstat (see Stamp); its offset is not to be relied on."""
    return os.lseek(fd, 0, os.SEEK_END)


def is_temporary(name: str) -> bool:
    """Say whether a file is one that its writer had not finished."""
    return name.startswith(TEMPORARY_PREFIX)


def exists(name: str, *, at: int) -> bool:
    """Say whether a name is there, whatever it names."""
    return os.access(name, os.F_OK, dir_fd=at, follow_symlinks=False)


def read_from_device(fd: int, offset: int, size: int) -> bytes:
    """Read bytes that were synced from the device itself, not from the page cache.

    Source: posix_fadvise(2): clean pages of the range are dropped, so the next read fetches them. A
    page that the kernel failed to write, and dropped since or marked clean, shows as it is on disk.
    """
    if sys.platform == "linux":
        page = 4096  # whole pages only are dropped
        begin = offset - offset % page
        os.posix_fadvise(fd, begin, size + offset - begin + page, os.POSIX_FADV_DONTNEED)
    return read_at(fd, offset, size)


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Read up to `size` bytes; fewer only at the end of the file."""
    chunk = os.pread(fd, size, offset)
    if len(chunk) == size or not chunk:
        return chunk
    parts = [chunk]
    got = len(chunk)
    while got < size and (chunk := os.pread(fd, size - got, offset + got)):
        parts.append(chunk)
        got += len(chunk)
    return b"".join(parts)


def read_all(name: str, *, at: int, where: str, limit: int) -> bytes:
    """Read a whole small file; FileNotFoundError alone means absent."""
    fd = open_file(name, at=at, where=where)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            message = "a file of the store is larger than it can be"
            raise StorageFailed(message, where=where, why=f"{size} bytes", remedy="Look into it")
        return read_at(fd, 0, size)
    finally:
        os.close(fd)


def names(fd: int, *, where: str) -> list[str]:
    """List a directory, sorted.

    A descriptor of its own each time: the place in a listing belongs to the open file, so threads
    and forked children that listed through a shared one would take each other's names away.
    """
    with failures("cannot list the directory", where=where):
        own = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
        try:
            return sorted(os.listdir(own))
        finally:
            os.close(own)


def is_network_file_system(fd: int) -> bool:
    """Say whether an open directory lies on a file system shared over a network.

    flock, O_APPEND and inotify do not mean there what they mean here. Source: mountinfo in
    proc_pid_mountinfo(5), matched by device number.
    """
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        table = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:  # no /proc: nothing is known against it
        return False
    for row in table.splitlines():
        left, _, right = row.partition(" - ")
        if left.split()[2] == wanted:
            return right.split()[0] not in _LOCAL
    return False


# Known to be of one machine. Whatever else there is, or will be, may be shared: virtiofs, cluster
# file systems, and nearly everything behind FUSE.
_LOCAL: Final = frozenset(
    {
        *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "nilfs2"),
        *("reiserfs", "tmpfs", "ramfs", "rootfs", "overlay", "aufs", "ntfs3", "exfat", "vfat"),
        *("ufs", "udf", "erofs", "squashfs", "iso9660", "fuseblk"),
    }
)


# -- failures -------------------------------------------------------------------------------


@contextmanager
def failures(what: str, *, where: str) -> Iterator[None]:
    """Turn an OSError from inside into the library's own; absence stays FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, CrewlogError):
        raise
    except OSError as error:
        raise from_oserror(error, what, where=where) from error
