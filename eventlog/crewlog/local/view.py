"""Keep the state as this process has read it, twice: for its readers and for its writers.

Readers are shown the fold of everything durable, brought up to date when they look. A writer
decides on top of every line that is *written*, durable or not, but asks about few workers: for the
workers it has asked about, `recent` is kept right by looking at the sid of each line that others
write, without parsing the rest. So a process that only writes never folds what all the others do.
What it writes itself it folds once: where all else is read, a writer takes that over.

Not safe for threads by itself; the log's mutex guards it. Whatever interrupts a step (a signal
handler that raises, out of memory), everything is dropped and begun anew from the snapshot: a
state that has missed a line must never be decided upon.
"""

import logging
import re
from collections import deque
from collections.abc import Sequence
from typing import Final, TypeAlias

from crewlog.errors import HistoryDiverged, LogCorrupt, SegmentMissing
from crewlog.local import layout, snapshot
from crewlog.local.heads import AppendState, DurableHead
from crewlog.local.segments import Reader, Segments, corrupt, first_line, raw_between, start_of
from crewlog.model import chain, codec, fold
from crewlog.model.chain import Position
from crewlog.model.codec import Draft
from crewlog.model.events import Line, Record
from crewlog.model.fold import Fold, FoldError
from crewlog.model.sieve import sid_needle
from crewlog.model.snapshot import fold_of

_logger = logging.getLogger("crewlog.current")
# The fixed beginning of every line, up to the sid.
_SID: Final = re.compile(
    rb'^\{"v":1,"seq":\d+,"ts":"[^"]*","type":"worker\.[^"]*","sid":"([^"]+)".*$', re.MULTILINE
)
# Of so few workers each is looked for by itself.
_NEEDLES_MAX: Final = 8
# One of our own last lines, folded: its segment, where it ends there, its seq, type and sid, and
# the record after it. A plain tuple: one is made at every change.
Own: TypeAlias = tuple[int, int, int, str, str, Record | None]


class View:
    """The durable fold and the recent records of a store; loaded on first use."""

    def __init__(self, segments: Segments, written: Segments) -> None:
        """Read nothing yet: for readers as the redo may complete it, for writers what is there."""
        self._segments = segments
        self._written = written
        self._directory = segments.directory
        self._loaded: tuple[Fold, Reader] | None = None
        self.recent: dict[str, Record | None] = {}  # of the workers that writers asked about
        self.written: AppendState | None = None  # `recent` is right up to here
        # one behind the other, without a hole
        self._own: deque[Own] = deque(maxlen=self._directory.limits.own_lines)
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
        if state.seq < head.seq:
            try:
                for line, raw in reader.read(head):
                    self._apply(state, line, raw, reader)
            except BaseException:
                self.forget()
                raise
        return state

    def _apply(self, state: Fold, line: Line, raw: bytes, reader: Reader) -> None:
        try:
            state.apply(line)
        except FoldError as error:
            raise corrupt(reader.position, line, raw, error) from error

    def _load(self) -> tuple[Fold, Reader]:
        if self._loaded is None:
            loaded = snapshot.load(self._directory)
            for complaint in loaded.complaints:
                _logger.warning("%s", str(complaint))  # not what its traceback holds
            base = fold.empty()
            kept = loaded.snapshot
            if kept is not None:
                base = fold_of(kept)
                self._check_joint(kept.last_seq, kept.last_hash)
            self.snapshot_seq = base.seq
            self._loaded = base, Reader(self._segments, start_of(base.seq + 1))
        return self._loaded

    def _check_joint(self, seq: int, hash_: str) -> None:
        """Hold the snapshot against the line that follows it."""
        try:
            first = first_line(self._segments, seq + 1)
        except SegmentMissing:
            if self._ends_with(seq):
                return  # a rotation that has not begun the next segment
            raise
        if first is None:
            raise LogCorrupt(
                layout.segment_name(seq + 1),
                offset=0,
                seq=seq + 1,
                reason="it is empty",
                proof="a segment's header is durable before the segment gets its name",
            )
        if first["prev"] != hash_:
            raise HistoryDiverged(self._directory.where(layout.SNAPSHOT), seq=seq)

    def _ends_with(self, seq: int) -> bool:
        """Say whether the last segment is sealed by the line `seq`."""
        firsts = self._segments.in_log()
        if not firsts or firsts[-1] > seq:
            return False
        last = firsts[-1]
        with self._segments.open(last) as source:
            scan = chain.scan(source.whole(), offset=0, seq=last - 1, prev=None)
        return scan.sealed and scan.seq == seq

    # -- for writers ------------------------------------------------------------------------

    def keep(self, own: Sequence[Own]) -> None:
        """Keep lines that this process has just written."""
        if self._own and self._own[-1][2] + 1 != own[0][2]:
            self._own.clear()
        self._own.extend(own)

    def reaches(self, end: AppendState) -> bool:
        """Say whether nothing up to `end` is left to be read."""
        if self._loaded is None:
            return False
        seq, own = self._loaded[0].seq, self._own
        return seq >= end.seq or (bool(own) and own[-1][2] == end.seq and own[0][2] <= seq + 1)

    def lag(self, seq: int) -> int:
        """Return how many lines were written since `recent` was last brought up to date."""
        return 0 if self.written is None or not self.recent else seq - self.written.seq

    def catch_up(self, end: AppendState, data: bytes | None = None) -> None:
        """Bring the recent records up to `end`, which the caller knows to be written.

        `data` are the lines up to there, where the caller has read them.
        """
        written = self.written
        if written is not None and self.recent and end.seq > written.seq:
            try:
                if data is not None:
                    self._look_through(data)
                else:
                    for part in raw_between(self._written, written.position, end.position):
                        self._look_through(part)
            except SegmentMissing:  # retention took what we had not read: ask the state again
                self.recent = {}
            except BaseException:
                self.forget()
                raise
        self.written = end

    def _look_through(self, data: bytes) -> None:
        """Take over what lines say about recent workers, without parsing the others."""
        recent = self.recent
        if len(recent) <= _NEEDLES_MAX:
            for sid in recent:
                if sid_needle(sid) in data:
                    break
            else:
                return
        for match in _SID.finditer(data):
            sid = match[1].decode()
            if sid in recent:
                recent[sid] = fold.after(codec.parse(match[0]), recent[sid])

    def _take_own(self, head: Position) -> None:
        """Take over what this process wrote itself, as far as nothing of others lies between.

        For a writer, which knows that the log goes on from there.
        """
        if self._loaded is None:  # loaded by whoever reads, who tries again where it must
            return
        (state, reader), own = self._loaded, self._own
        try:
            while own and own[0][2] <= head.seq:
                segment, end, seq, kind, sid, record = own.popleft()
                if seq == state.seq + 1 and reader.skip_to(Position(segment, end, seq)):
                    state.take(kind, sid, record)
                    state.seq = seq
        except BaseException:  # an interrupt
            self.forget()
            raise

    def record(self, sid: str, *, head: Position, end: Position) -> Record | None:
        """Return a worker's record as of `end`; `head` is durable and not beyond it.

        For a writer, before which whatever was to be recovered has been.
        """
        self._segments.completed.clear()
        self._take_own(head)
        state = self.durable(head)
        record = state.get(sid)
        if state.seq == end.seq:
            return record
        reader = Reader(self._written, self._load()[1].position)
        try:
            for line, raw in reader.read(end):
                if line["sid"] == sid:
                    try:
                        record = fold.after(line, record)
                    except FoldError as error:
                        raise corrupt(reader.position, line, raw, error) from error
        finally:
            reader.close()
        return record

    def forget_written(self) -> None:
        """Drop what writers know; the next one asks the log."""
        self._own.clear()
        self.recent = {}
        self.written = None

    # -- both -------------------------------------------------------------------------------

    def forget(self) -> None:
        """Drop everything; the next use begins from the snapshot."""
        loaded, self._loaded = self._loaded, None
        self._own.clear()
        self.recent = {}
        self.written = None
        if loaded is not None:
            loaded[1].close()


class LocalTip:
    """The state that a writer decides upon: see model.steps.Tip."""

    __slots__ = ("_head", "_state", "_view", "seq")

    def __init__(self, view: View, *, state: AppendState, head: DurableHead) -> None:
        """Look at everything up to `state`, of which `head` is durable.

        Lines up to `seq` that are not on disk yet are in what `view` was advanced by.
        """
        self._view = view
        self._state = state
        self._head = head
        self.seq = state.seq

    def get(self, sid: str) -> Record | None:
        """Return the record of that sid as of the last line written."""
        recent = self._view.recent
        if sid not in recent:
            ends = self._head.position, self._state.position
            recent[sid] = self._view.record(sid, head=ends[0], end=ends[1])
        return recent[sid]

    def take(self, part: Draft, *, seq: int, ts: str) -> Record | None:
        """Fold a line that is about to be written; return the record after it."""
        sid, recent = part.sid, self._view.recent
        old = recent[sid] if sid in recent else self.get(sid)
        record = recent[sid] = fold.after(codec.as_parsed(part, seq=seq, ts=ts), old)
        self.seq = seq
        return record
