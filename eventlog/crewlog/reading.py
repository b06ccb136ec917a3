"""Read what is durable: the head, the state, the lines. Takes no lock, changes nothing.

The head is read before the log, else a busy writer would look like a shortened log. After a reboot,
and before the first write, the durable end is what a recovery would find.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from crewlog import disk, identity, segments, tail
from crewlog.current import Current
from crewlog.directory import Directory
from crewlog.errors import CompactedError, StoreMissing, from_oserror
from crewlog.events import Line
from crewlog.fold import Fold
from crewlog.reader import Reader, Sieve
from crewlog.states import States
from crewlog.structs import DurableHead


class Reading:
    """The reading half of a log."""

    def __init__(self, directory: Directory) -> None:
        """Use an open directory; nothing is read yet."""
        self.directory = directory
        self.recovery_pending = False
        self.mutex = threading.RLock()  # guards the state, and what a writer has open
        self._boot = identity.boot_bytes()
        self._states = States(directory)
        self._current = Current(directory)

    def head(self) -> DurableHead:
        """Return how far events are durable.

        After a reboot, and before the first write, that is the valid prefix of the last segment;
        `recovery_pending` is then set and nothing is changed.
        """
        try:
            head = self._states.head()
            if head is None or head.boot != self._boot:
                judged = self._judged(head)
                head = self._states.head()  # a writer may have recovered, and gone on, meanwhile
                if head is None or head.boot != self._boot:
                    self.recovery_pending = True
                    return judged
        except OSError as error:
            raise from_oserror(error, "cannot read the registry", where=self._where()) from error
        self.recovery_pending = False
        self.directory.completed.clear()
        return head

    def renew(self) -> None:
        """Let go of state files that were removed or replaced under a long-lived reader."""
        self._states.renew()

    def _judged(self, head: DurableHead | None) -> DurableHead:
        """Return the head that a recovery would publish."""
        if os.fstat(self.directory.root).st_nlink == 0:
            raise StoreMissing(self._where(), why="its directory was removed")
        with self.mutex:
            self._current.load()
            snapshot_seq = self._current.snapshot_seq
        segment, found, _ = tail.judge(self.directory, head, snapshot_seq=snapshot_seq)
        return tail.fresh_head(head, self._boot, segment, found)

    def last_seq(self) -> int:
        """Return the seq of the last durable line."""
        return self.head().seq

    def first_seq(self) -> int:
        """Return the seq of the oldest line that is kept."""
        return segments.all_of(self.directory)[0]

    @contextmanager
    def state(self) -> Iterator[Fold]:
        """Hold the durable state of now still, while something is copied out of it."""
        self._states.renew()
        head = self.head()  # before the log: else a busy writer looks like a shortened log
        with disk.failures("cannot read the log", where=self._where()), self.mutex:
            yield self._current.durable(segments.durable_end(head))

    def read(self, after: int, *, sieve: Sieve | None = None) -> Iterator[tuple[Line, bytes]]:
        """Yield the durable lines after seq `after` that the sieve holds, up to the last of now.

        *Raises* CompactedError where the line after `after` is no longer kept.
        """
        with disk.failures("cannot read the log", where=self._where()):
            head = self.head()
            if after >= head.seq:
                return
            reader = self.reader(after, sieve=sieve)
            try:
                for line, raw in reader.read(segments.durable_end(head)):
                    if line["seq"] > after:
                        yield line, raw
            finally:
                reader.close()

    def reader(self, after: int, *, sieve: Sieve | None = None) -> Reader:
        """Return a reader whose segment holds the line after seq `after`; it may begin before.

        *Raises* CompactedError where that line is no longer kept.
        """
        oldest = self.first_seq()
        if after + 1 < oldest:
            snapshot_seq = self._current.snapshot_seq
            raise CompactedError(requested=after + 1, oldest=oldest, snapshot_seq=snapshot_seq)
        return Reader(self.directory, segments.find(self.directory, after), sieve=sieve)

    def _where(self) -> str:
        return str(self.directory.path)
