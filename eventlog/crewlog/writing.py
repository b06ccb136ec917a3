"""Compose lines, and hold what phase one of an append needs, in order, with one deadline."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from crewlog import codec, events, layout, threads
from crewlog.codec import Draft
from crewlog.commit import Request
from crewlog.directory import Directory, incomplete
from crewlog.errors import CrewlogError, LockBusy, from_oserror
from crewlog.events import Line
from crewlog.lock import Lock
from crewlog.structs import AppendState

T = TypeVar("T")


class Writing:
    """What phase one runs under: the writer mutex, locks/append and the mutex of the state.

    The mutex comes last, so readers of this process never wait for another process's lock. An
    interrupt (Ctrl-C) may come wherever a function of Python begins or a call has returned, and
    must leave nothing taken: so all of it is given back by calls of C alone, each in a `finally` of
    its own. It keeps nothing itself: one serves a whole log.
    """

    __slots__ = ("_directory", "_lock", "_mutex", "_wait_s", "_writer")

    def __init__(
        self,
        writer: "threading.RLock",
        lock: Lock,
        mutex: "threading.RLock",
        *,
        wait_s: float,
        directory: Directory,
    ) -> None:
        """Take nothing yet; `directory` is that of the store."""
        self._writer = writer
        self._lock = lock
        self._mutex = mutex
        self._wait_s = wait_s
        self._directory = directory

    def run(self, work: Callable[[], T]) -> T:
        """Do the work under all three. *Raises* LockBusy after `wait_s`; what it raises, typed."""
        if threads.is_mine(self._writer):
            raise LockBusy(self._lock.where, waited_s=0, holder=threads.INTERRUPTED)
        began = time.monotonic()
        try:
            if not self._writer.acquire(timeout=self._wait_s):
                raise LockBusy(self._lock.where, waited_s=self._wait_s, holder="another thread")
            try:
                self._lock.acquire(wait_s=max(0.0, began + self._wait_s - time.monotonic()))
                with self._mutex:
                    return work()
            finally:
                self._lock.release()
        except OSError as error:
            raise self._typed(error) from error
        finally:
            try:  # noqa: SIM105 (suppress is a call of Python)
                self._writer.release()
            except RuntimeError:  # it was never ours
                pass

    def _typed(self, error: OSError) -> CrewlogError:
        root, where = self._directory.root, str(self._directory.path)
        if isinstance(error, FileNotFoundError):
            return incomplete(error, root=root, where=where)
        return from_oserror(error, "cannot write to the registry", where=where)


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
