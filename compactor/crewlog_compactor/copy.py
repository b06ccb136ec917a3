"""Carry a history from one store to another: each line checked and folded on its way."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from crewlog import host
from crewlog.errors import CompactedError, HistoryDiverged, LockBusy
from crewlog.model import chain, events, fold
from crewlog.model.chain import follow
from crewlog.model.events import Line
from crewlog.model.fold import Fold, FoldError
from crewlog.model.snapshot import Snapshot, fold_of, snapshot_of
from crewlog.store import Store, state_before

Progress: TypeAlias = Callable[[int, int], None]


@dataclass(slots=True)
class Copy:
    """A history on its way: lines are checked and folded as they are read.

    `seq`, `hash` and `state` are those of the last line, `sealed` is the state after the last seal.
    """

    source: Store
    first: int
    base: Snapshot
    progress: Progress
    live: bool = False  # others write meanwhile: what was there at the beginning is copied
    events: int = 0
    seq: int = 0
    hash: str = ""
    sealed: Snapshot | None = None
    state: Fold = field(default_factory=fold.empty)

    def lines(self) -> Iterator[tuple[Line, bytes]]:
        """Yield every line that is kept, each proven to follow the one before."""
        self.seq, self.hash = self.base.last_seq, self.base.last_hash
        base, last = self.base, self.source.last_seq()
        self.state = state = fold_of(base)
        for line, raw in self.source.read(self.first - 1):
            self.hash = follow(
                state, line, raw, self.hash, diverged=self._diverged, wrong=self._wrong
            )
            self.seq = line["seq"]
            if chain.is_end(line):
                self.sealed = snapshot_of(
                    state,
                    store=base.store,
                    last_hash=self.hash,
                    written_at=events.timestamp(host.now()),
                )
            self.events += 1
            self.progress(self.events, last - self.first + 1)
            yield line, raw

    def _diverged(self, seq: int) -> HistoryDiverged:
        return HistoryDiverged(self.source.where, seq=seq)

    def _wrong(self, line: Line, _raw: bytes, _error: FoldError) -> HistoryDiverged:
        return self._diverged(line["seq"])

    def require_still(self) -> None:
        """Refuse to go on where the source has changed.

        Raises: LockBusy.
        """
        if not self.live and self.source.last_seq() != self.seq:
            raise LockBusy(self.source.where, waited_s=0, holder="a writer, who has changed it,")


def begin(store: Store, progress: Progress, *, live: bool = False) -> Copy:
    """Return a copy that has not begun.

    Raises: CompactedError where its state is not kept.
    """
    first = store.first_seq()
    base = state_before(store, first)
    if base is None:  # retention could keep no state before what it left
        raise CompactedError(requested=first - 1, oldest=first)
    return Copy(store, first, base, progress, live=live)
