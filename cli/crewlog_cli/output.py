"""Write to the streams of the command line: data to stdout, the rest to stderr; files whole."""

import errno
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO, TypeAlias

import click

from crewlog.errors import from_oserror
from crewlog_cli import text

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    Bar: TypeAlias = ProgressBar[int]


class OutputFailedError(OSError):
    """stdout took no more: its reader is gone, or its disk is full."""


def columns() -> int:
    """Return how wide the terminal is that stdout is; 0 where it is none."""
    if not sys.stdout.isatty():
        return 0
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        return 0


def height() -> int:
    """Return how many lines the terminal has that stdout is."""
    return os.get_terminal_size(sys.stdout.fileno()).lines


def put(row: str, *, flush: bool = False) -> None:
    """Write one line to stdout."""
    try:
        sys.stdout.write(row + "\n")
        if flush:
            sys.stdout.flush()
    except OSError as error:
        raise OutputFailedError(error.errno, error.strerror) from error


def put_raw(part: bytes) -> None:
    """Write bytes of somebody else's to stdout: as they are, but inert on a terminal."""
    try:
        if sys.stdout.isatty():
            for row in part.decode(errors="replace").splitlines(keepends=True):
                end = "\n" if row.endswith("\n") else ""
                sys.stdout.write(text.visible(row.rstrip("\r\n")) + end)
        else:
            sys.stdout.flush()
            sys.stdout.buffer.write(part)
        sys.stdout.flush()
    except OSError as error:
        raise OutputFailedError(error.errno, error.strerror) from error


@contextmanager
def redirected(fd: int | None) -> Iterator[None]:
    """Let stdout and stderr be another file for a block, and for a program that we become in it."""
    if fd is None:
        yield
        return
    kept = [(number, os.dup(number)) for number in (1, 2)]
    try:
        for number, _ in kept:
            os.dup2(fd, number)
        yield
    finally:
        for number, old in kept:
            os.dup2(old, number)
            os.close(old)


def warn(words: str) -> None:
    """Tell a person on stderr what must not be missed, also with --quiet."""
    tell(text.visible(words))


def tell(row: str) -> None:
    """Write one line to stderr; where that takes nothing, the exit code has to say it."""
    try:
        sys.stderr.write(row + "\n")
        sys.stderr.flush()
    except OSError:  # ENOSPC, EPIPE
        _lose(sys.stderr)


def warn_rows(words: str) -> None:
    """Tell a person on stderr what has several lines, such as a help page."""
    for row in words.splitlines():
        warn(row)


def flush() -> None:
    """Write out what stdout still holds."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OutputFailedError(error.errno, error.strerror) from error


def require_place(path: Path, *, option: str) -> None:
    """Refuse, before anything is done, a path at which no file can be put.

    Raises: UsageError; NotAStore within a registry.
    """
    from crewlog_compactor.files import require_outside  # noqa: PLC0415 (as below)

    require_outside(path)
    parent, why = path.absolute().parent, ""
    if path.is_dir():
        why = "it is a directory"
    elif not parent.is_dir():
        why = f"{parent} is no directory"
    elif not os.access(parent, os.W_OK | os.X_OK):
        why = f"we may not write in {parent}"
    if why:
        message = f"{option} {path}: {why}"
        raise click.UsageError(message)


def put_file(path: Path, made: bytes, *, what: str, option: str, public: bool = False) -> None:
    """Put a file where an option says, whole or not at all.

    Raises: UsageError, StorageFailed.
    """
    from crewlog_compactor.files import replace_file  # noqa: PLC0415 (start-up; few write files)

    try:
        replace_file(path.absolute(), made, public=public)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        message = f"{option} {path}: {error.strerror}"
        raise click.UsageError(message) from error
    except OSError as error:
        raise from_oserror(error, f"cannot write {what}", where=str(path)) from error


def prepare() -> None:
    """Let no stream be missing, and none fail for a character that its encoding lacks."""
    for name in ("stdout", "stderr"):
        stream: object = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until we end)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_PROGRESS_AFTER_S: Final = 0.5


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far long work is, on stderr, only on a terminal, only after half a second."""
    began = time.monotonic()
    with ExitStack() as open_bar:
        bars: list[Bar] = []

        def show(done: int, whole: int) -> None:
            if not sys.stderr.isatty() or time.monotonic() - began < _PROGRESS_AFTER_S:
                return
            if not bars:
                bar = click.progressbar(length=whole, label=label, file=sys.stderr)
                bars.append(open_bar.enter_context(bar))
            bars[0].update(done - bars[0].pos)

        yield show


def lose_stdout() -> None:
    """Keep the interpreter from flushing into a closed or full stdout at its end."""
    _lose(sys.stdout)


def _lose(stream: TextIO) -> None:
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
    except OSError:  # no descriptor left, or no such stream: there is nothing to lose then
        return


STREAM_ERRORS: Final = frozenset({errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF})
