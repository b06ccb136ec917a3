"""Keep the state as this process has read it, twice: for its readers and for its writers.

Readers are shown the fold of everything durable, brought up to date when they look. A writer
decides on top of every line that is *written*, durable or not, but asks about few workers: for the
workers it has asked about, `recent` is kept right by looking at the sid of each line that others
write, without parsing the rest. So a process that only writes never folds what all the others do.

Not safe for threads by itself; the log's mutex guards it. Whatever interrupts a step (a signal
handler that raises, out of memory), everything is dropped and begun anew from the snapshot: a
state that has missed a line must never be decided upon.
"""

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from crewlog import codec, fold, layout, segments, snapshot
from crewlog.directory import Directory
from crewlog.errors import HistoryDiverged, LogCorrupt, SegmentMissing
from crewlog.events import Line, Record
from crewlog.fold import Fold, FoldError
from crewlog.reader import Reader, raw_between, walk
from crewlog.refold import corrupt
from crewlog.segments import Position

_logger = logging.getLogger("crewlog.current")
# The fixed beginning of every line, up to the sid.
_SID: Final = re.compile(
    rb'^\{"v":1,"seq":\d+,"ts":"[^"]*","type":"worker\.[^"]*","sid":"([^"]+)".*$', re.MULTILINE
)


class Current:
    """The durable fold and the recent records of a store; loaded on first use."""

    def __init__(self, directory: Directory) -> None:
        """Read nothing yet."""
        self._directory = directory
        self._loaded: tuple[Fold, Reader] | None = None
        self._recent: dict[str, Record | None] = {}
        self._written: Position | None = None  # `_recent` is right up to here
        self.snapshot_seq = 0

    # -- for readers ------------------------------------------------------------------------

    def load(self) -> Fold:
        """Return the durable fold as far as it was read; at first the newest good snapshot's."""
        return self._load()[0]

    def durable(self, head: Position) -> Fold:
        """Return the fold of everything up to `head`, which the caller knows to be durable."""
        try:
            return self._fold_to(head)
        except SegmentMissing:  # retention took what we had not read; the snapshot covers it
            return self._fold_to(head)

    def _fold_to(self, head: Position) -> Fold:
        state, reader = self._load()
        if reader.position.seq < head.seq:
            with self._all_or_nothing():
                for line, raw in reader.read(head):
                    self._apply(state, line, raw, reader)
        return state

    def _apply(self, state: Fold, line: Line, raw: bytes, reader: Reader) -> None:
        try:
            state.apply(line)
        except FoldError as error:
            raise corrupt(reader.position, line, raw, error) from error

    def _load(self) -> tuple[Fold, Reader]:
        if self._loaded is None:
            found = snapshot.load(self._directory)
            for complaint in found.complaints:
                _logger.warning("%s", str(complaint))  # not what its traceback holds
            base = fold.empty()
            kept = found.snapshot
            if kept is not None:
                base = fold.restored(kept.last_seq, kept.sessions, kept.ended, kept.totals)
                self._check_joint(kept.last_seq, kept.last_hash)
            self.snapshot_seq = base.seq
            self._loaded = base, Reader(self._directory, segments.start_of(base.seq + 1))
        return self._loaded

    def _check_joint(self, seq: int, hash_: str) -> None:
        """Hold the snapshot against the line that follows it."""
        source = segments.open_segment(self._directory, seq + 1)
        try:
            first = next(walk(source, segments.start_of(seq + 1)), None)
        finally:
            source.close()
        if first is None or first.line is None:
            raise LogCorrupt(
                source.name,
                offset=0,
                seq=seq + 1,
                reason="it is empty",
                proof="a segment's header is durable before the segment gets its name",
            )
        if first.line["prev"] != hash_:
            raise HistoryDiverged(self._directory.where(layout.SNAPSHOT), seq=seq)

    # -- for writers ------------------------------------------------------------------------

    def knows(self, sids: Collection[str]) -> bool:
        """Say whether a decision about these workers needs no look at the durable fold."""
        return all(sid in self._recent for sid in sids)

    def lag(self, seq: int) -> int:
        """Return how many lines were written since `recent` was last brought up to date."""
        return 0 if self._written is None or not self._recent else seq - self._written.seq

    def catch_up(self, end: Position) -> None:
        """Bring the recent records up to `end`, which the caller knows to be written."""
        if len(self._recent) >= layout.RECENT_MAX:  # never while a group is being decided
            self._recent = {}
        if self.lag(end.seq) > 0:
            assert self._written is not None  # lag() said so
            try:
                self._look_between(self._written, end)
            except SegmentMissing:  # retention took what we had not read: ask the state again
                self._recent = {}
        self._written = end

    def _look_between(self, start: Position, end: Position) -> None:
        with self._all_or_nothing():
            for raw in raw_between(self._directory, start, end):
                for match in _SID.finditer(raw):
                    sid = match[1].decode()
                    if sid in self._recent:
                        self._recent[sid] = self._after(codec.parse(match[0]), sid)

    def record(self, sid: str, *, head: Position, end: Position) -> Record | None:
        """Return a worker's record as of `end`; `head` is durable and not beyond it."""
        if sid not in self._recent:
            record = self.durable(head).get(sid)
            reader = Reader(self._directory, self._load()[1].position)
            try:
                for line, raw in reader.read(end):
                    if line["sid"] == sid:
                        try:
                            record = fold.after(line, record)
                        except FoldError as error:
                            raise corrupt(reader.position, line, raw, error) from error
            finally:
                reader.close()
            self._recent[sid] = record
        return self._recent[sid]

    def advance(self, lines: Sequence[Line], end: Position) -> None:
        """Take over lines that this process wrote itself."""
        with self._all_or_nothing():
            for line in lines:
                if line["sid"] in self._recent:
                    self._recent[line["sid"]] = self._after(line, line["sid"])
            self._written = end

    def forget_written(self) -> None:
        """Drop what writers know; the next one asks the log."""
        self._recent = {}
        self._written = None

    def _after(self, line: Line, sid: str) -> Record | None:
        return fold.after(line, self._recent[sid])

    # -- both -------------------------------------------------------------------------------

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Drop everything; the next use begins from the snapshot."""
        loaded, self._loaded = self._loaded, None
        self._recent = {}
        self._written = None
        if loaded is not None:
            loaded[1].close()


class Written:
    """The state that a writer decides upon: see store.Written."""

    __slots__ = ("_current", "_end", "_head", "_seq")

    def __init__(self, current: Current, *, head: Position, end: Position, seq: int) -> None:
        """Look at everything up to `end`, of which `head` is durable.

        Lines up to `seq` that are not on disk yet are in what `current` was advanced by.
        """
        self._current = current
        self._head = head
        self._end = end
        self._seq = seq

    @property
    def seq(self) -> int:
        """Return the seq of the last line written."""
        return self._seq

    def get(self, sid: str) -> Record | None:
        """Return the record of that sid as of the last line written."""
        return self._current.record(sid, head=self._head, end=self._end)
