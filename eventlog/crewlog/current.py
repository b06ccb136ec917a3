"""Keep the state as this process has read it: from a snapshot, then line by line.

Not safe for threads by itself; the log's mutex guards it.
"""

import logging
from collections import deque
from collections.abc import Sequence

from crewlog import fold, layout, segments, snapshot
from crewlog.directory import Directory
from crewlog.errors import HistoryDiverged, LogCorrupt
from crewlog.events import Line
from crewlog.fold import FoldError, Tentative
from crewlog.segments import Position, Reader

_logger = logging.getLogger("crewlog.current")


class Current:
    """The tentative state of a store, and the reader that moves it on; loaded on first use."""

    def __init__(self, directory: Directory) -> None:
        """Read nothing yet."""
        self._directory = directory
        self._loaded: tuple[Tentative, Reader] | None = None
        self.snapshot_seq = 0

    def state(self) -> Tentative:
        """Return the state as far as it was read; at first that of the newest good snapshot."""
        return self._load()[0]

    def _load(self) -> tuple[Tentative, Reader]:
        if self._loaded is None:
            found = snapshot.load(self._directory)
            for complaint in found.complaints:
                _logger.warning("%s", complaint)
            base = fold.empty()
            kept = found.snapshot
            if kept is not None:
                base = fold.restored(kept.last_seq, kept.sessions, kept.ended, kept.totals)
                self._check_joint(kept.last_seq, kept.last_hash)
            self.snapshot_seq = base.seq
            reader = Reader(self._directory, segments.start_of(base.seq + 1))
            self._loaded = Tentative(base, deque(), {}), reader
        return self._loaded

    def _check_joint(self, seq: int, hash_: str) -> None:
        """Hold the snapshot against the line that follows it."""
        source = segments.open_segment(self._directory, seq + 1)
        try:
            line, _, _ = next(segments.walk(source, segments.start_of(seq + 1)))
        finally:
            source.close()
        if line["prev"] != hash_:
            raise HistoryDiverged(self._directory.where(layout.SNAPSHOT), seq=seq)

    def read_to(self, stop: Position) -> None:
        """Add every line up to `stop`, which the caller knows to be whole."""
        state, reader = self._load()
        if reader.position.seq >= stop.seq:
            return
        for line, raw in reader.read(stop):
            try:
                state.add(line)
            except FoldError as error:
                place = reader.position
                self.forget()
                raise LogCorrupt(
                    layout.segment_name(place.segment),
                    offset=place.offset - len(raw) - 1,
                    seq=line["seq"],
                    reason=str(error),
                    proof="its crc is right",
                ) from error

    def advance(self, lines: Sequence[Line], to: Position) -> None:
        """Add lines that this process wrote itself; the reader steps over them."""
        state, reader = self._load()
        for line in lines:
            state.add(line)
        reader.position = to

    def forget(self) -> None:
        """Drop everything; the next use begins from the snapshot."""
        if self._loaded is not None:
            self._loaded[1].close()
            self._loaded = None
