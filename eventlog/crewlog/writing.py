"""Compose lines, and hold what phase one of an append needs, in order, with one deadline."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from crewlog import codec, events, layout
from crewlog.codec import Draft
from crewlog.commit import Request
from crewlog.directory import Directory, incomplete
from crewlog.errors import LockBusy, from_oserror
from crewlog.events import Line
from crewlog.lock import Lock
from crewlog.structs import AppendState


class Writing:
    """A block of code under the writer's turn, locks/append and the mutex of the state.

    The mutex comes last, so readers of this process never wait for another process's lock.
    Whatever interrupts the taking or the giving back, what was taken is given back. A failure of
    the system inside the block gets its type. It keeps nothing itself: one serves a whole log.
    """

    __slots__ = ("_directory", "_lock", "_mutex", "_turn", "_wait_s")

    def __init__(
        self,
        turn: threading.Lock,
        lock: Lock,
        mutex: "threading.RLock",
        *,
        wait_s: float,
        directory: Directory,
    ) -> None:
        """Take nothing yet; `directory` is that of the store."""
        self._turn = turn
        self._lock = lock
        self._mutex = mutex
        self._wait_s = wait_s
        self._directory = directory

    def __enter__(self) -> None:
        """Take all three. *Raises* LockBusy after `wait_s`."""
        began, taken = time.monotonic(), 0
        try:
            if not self._turn.acquire(timeout=self._wait_s):
                raise LockBusy(self._lock.where, waited_s=self._wait_s, holder="another thread")
            taken = 2  # before it is: giving back a flock that is not held is harmless
            self._lock.acquire(wait_s=max(0.0, began + self._wait_s - time.monotonic()))
            self._mutex.acquire()
        except BaseException as error:
            self._give_back(taken)
            self._translate(error)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give all three back."""
        self._give_back(3)
        if error is not None:
            self._translate(error)

    def _give_back(self, taken: int) -> None:
        """Give back what was taken: nothing, the first two, or all three."""
        try:
            if taken >= 3:  # noqa: PLR2004 (all three)
                self._mutex.release()
        finally:
            try:
                if taken >= 2:  # noqa: PLR2004 (the first two)
                    self._lock.release()
            finally:
                if taken:
                    self._turn.release()

    def _translate(self, error: BaseException) -> None:
        if isinstance(error, FileNotFoundError):
            root, where = self._directory.root, str(self._directory.path)
            raise incomplete(error, root=root, where=where) from error
        if isinstance(error, OSError):
            why = "cannot write to the registry"
            raise from_oserror(error, why, where=str(self._directory.path)) from error


def size_of(drafts: Sequence[Draft]) -> int:
    """Return how many bytes the lines will take at most. *Raises* ValueError for too much."""
    size = sum(len(part.body) for part in drafts) + layout.LINE_OVERHEAD_BYTES * len(drafts)
    if len(drafts) > layout.BATCH_EVENTS_MAX or size > layout.BATCH_BYTES_MAX:
        message = (
            f"a batch holds at most {layout.BATCH_EVENTS_MAX} events "
            f"and {layout.BATCH_BYTES_MAX} bytes"
        )
        raise ValueError(message)
    return size


class Unit(NamedTuple):
    """Lines that are all written or none, who asked for them, and the state after them."""

    request: Request
    raws: list[bytes]
    lines: list[Line]
    after: AppendState


def compose(request: Request, drafts: Sequence[Draft], state: AppendState, *, synced: int) -> Unit:
    """Make one unit of lines that follow `state`."""
    raws: list[bytes] = []
    lines: list[Line] = []
    boot, segment, redo, base, kept, end, seq, prev, _ = state
    ts, count = events.timestamp(events.now()), len(drafts)
    for index, part in enumerate(drafts):
        seq += 1
        place = (index, count) if count > 1 else None
        raw = codec.line(part, seq=seq, ts=ts, synced=synced, prev=prev, batch=place)
        prev = codec.digest(raw[:-1])
        end += len(raw)
        raws.append(raw)
        lines.append(codec.as_parsed(part, seq=seq, ts=ts))
    after = AppendState(boot, segment, redo, base, kept, end, seq, prev, sealed=False)
    return Unit(request, raws, lines, after)
