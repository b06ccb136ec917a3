"""Follow a history line by line: the chain, the batches, the fold, and the states it must lead to.

What one engine's check and the other's have in common. A finding never stops the reading.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, cast

from crewlog.errors import SnapshotCorrupt
from crewlog.model import chain, codec, events, fold
from crewlog.model.events import JsonObject, JsonValue, Line, Record
from crewlog.model.fold import Fold, FoldError
from crewlog.model.records import RARE, Records
from crewlog.model.snapshot import Snapshot, fold_of
from crewlog_compactor.anchor import Anchor
from crewlog_compactor.reports import Finding

VERIFY_TRIES: Final = 50  # of a verification beside retentions that take what it reads
# The place in a batch that a line behind a gap may have: any.
_ANY: Final = (-1, -1)


@dataclass(slots=True, kw_only=True)
class History:
    """One verification: the findings so far, and the history as far as it could be followed.

    `where` turns a name in the store into what a person is told.
    """

    where: Callable[[str], str]
    log_name: str
    anchor: Anchor | None = None
    findings: list[Finding] = field(default_factory=list)
    gaps: list[tuple[int, int]] = field(default_factory=list)
    events: int = 0
    seq: int = 0
    hash: str = ""
    anchored: str = ""
    snapshot_seq: int = 0  # the log tells of a snapshot up to here
    base_note: tuple[int, JsonValue] = (0, None)  # a retention left this state, and its hash
    hole: bool = False  # damage so far: the fold is no longer the truth
    partial: bool = False  # retention took the beginning: the fold begins at the older snapshot
    bases: dict[int, Snapshot] = field(default_factory=dict)
    state: Fold = field(default_factory=fold.empty)
    # by seq: the hash, the records (None: retention took what they rest on), the totals
    checkpoints: dict[int, tuple[str, Records | None, dict[str, int]] | None] = field(
        default_factory=dict
    )

    def report(
        self,
        code: str,
        name: str,
        message: str,
        *,
        offset: int | None = None,
        seq: int | None = None,
    ) -> None:
        """Add a finding; `name` is that of something in the store."""
        self.findings.append(
            Finding(
                code=code,
                path=self.where(name),
                offset=offset,
                seq=seq,
                message=message,
            )
        )

    def begins_behind(self, dropped: JsonObject, first: int) -> bool:
        """Begin at `first` if a retention announced that what was before it would go."""
        begin, last = dropped.get("first"), dropped.get("last")
        if not isinstance(begin, int) or not isinstance(last, int):
            return False
        if not begin <= first <= last + 1:  # killed half way, some of it is still there
            return False
        self.seq = first - 1
        self.hash = str(dropped.get("head")) if first == last + 1 else ""
        self.partial = True
        self.base_note = last, dropped.get("base")
        self.rebase()
        return True

    def bad_line(self, name: str, offset: int, reason: str) -> None:
        """Pass over a line that cannot be read."""
        self.report("log_corrupt", name, reason, offset=offset, seq=self.seq + 1)
        self.seq += 1
        self.hash = ""
        self.hole = True

    def good_line(
        self, name: str, offset: int, line: Line, raw: bytes, batch: tuple[int, int]
    ) -> tuple[int, int]:
        """Check a line against its neighbours and fold it; return its place in the open batch."""
        if not chain.follows(line, self.seq + 1):
            self.report(
                "log_corrupt",
                name,
                f"seq {self.seq + 1} is followed by {line['seq']}",
                offset=offset,
                seq=line["seq"],
            )
            self.hole = True
        elif self.hash and line["prev"] != self.hash:
            self.report(
                "log_corrupt",
                name,
                "prev differs from the hash of the line before",
                offset=offset,
                seq=line["seq"],
            )
            self.hole = True
        index, count = line.get("b", (0, 1))
        if batch != _ANY and (((index, count) != batch) if batch != (0, 0) else index != 0):
            self.report("log_corrupt", name, "it is out of place in its batch", offset=offset)
        self.seq, self.hash = line["seq"], chain.hash_after(line, raw).hex()
        self.events += 1
        if self.anchor is not None and self.seq == self.anchor.seq:
            self.anchored = codec.digest(raw).hex()
        if line["type"] == events.GAP:
            self._gap(line)
            return _ANY
        if line["type"] == events.SNAPSHOT:
            seq = line["data"].get("last_seq")
            self.snapshot_seq = seq if isinstance(seq, int) else 0
        try:
            if not self.partial:
                self.state.apply(line)
        except FoldError as error:
            if not self.hole:  # behind a hole, it tells only of the hole
                self.report("log_corrupt", name, str(error), offset=offset, seq=line["seq"])
        self.rebase()
        self.checkpoint()
        return (index + 1, count) if index + 1 < count else (0, 0)

    def rebase(self) -> None:
        """Begin the fold at the older snapshot, where the history before it was dropped."""
        base = self.bases.get(self.seq) if self.partial else None
        if base is not None:
            self.state = fold_of(base)
            self.partial = False
            self.checkpoint()

    def checkpoint(self) -> None:
        """Keep the state where a snapshot claims to be it."""
        if self.seq in self.checkpoints:
            copied = self.state.copy()
            known = None if self.partial else copied.records
            self.checkpoints[self.seq] = (self.hash, known, copied.totals)

    def _gap(self, line: Line) -> None:
        """Take note of a loss that was given up; the next snapshot tells what it had led to."""
        begin, last = line["data"].get("first"), line["seq"]
        first = begin if isinstance(begin, int) else last
        self.gaps.append((first, last))
        inside = [seq for seq in self.bases if first <= seq <= last]
        if inside:
            base = self.bases[max(inside)]
            self.state = fold_of(base)
        self.state.apply(line)
        self.partial = any(seq > last for seq in self.bases)

    # -- snapshots against history ----------------------------------------------------------

    def compare(self, name: str, snapshot: Snapshot) -> None:
        """Hold a snapshot against the refolded history, where there is a whole one."""
        there = self.checkpoints.get(snapshot.last_seq)
        if there is None:
            if not self.hole and not any(a <= snapshot.last_seq <= b for a, b in self.gaps):
                self.report(
                    "log_regressed",
                    name,
                    f"it covers seq {snapshot.last_seq}, the log ends at {self.seq}",
                )
            return
        self.hold(name, snapshot, *there)

    def hold(
        self,
        name: str,
        snapshot: Snapshot,
        hash_: str,
        records: Records | None,
        totals: Mapping[str, int],
    ) -> None:
        """Report what a snapshot says otherwise than the history up to its last event."""
        if hash_ != snapshot.last_hash:
            self.report(
                "history_diverged",
                name,
                f"the hash of event {snapshot.last_seq} differs",
                seq=snapshot.last_seq,
            )
        elif not self.hole and records is not None:
            try:
                wrong = _differing(snapshot.records(), records)
            except SnapshotCorrupt as error:  # a row of one who has ended
                self.report(error.code, name, error.why, seq=snapshot.last_seq)
                return
            if wrong or dict(snapshot.totals) != dict(totals):
                self.report(
                    "snapshot_differs",
                    name,
                    f"refolding the history gives other workers: {wrong[:5]}",
                    seq=snapshot.last_seq,
                )

    def hold_anchor(self) -> None:
        """Hold the history against the anchor that was kept elsewhere."""
        anchor = self.anchor
        if anchor is None or self.anchored == anchor.hash:
            return
        if self.anchored:
            message = f"event {anchor.seq} is not the one that was anchored"
            self.report("history_diverged", self.log_name, message, seq=anchor.seq)
        elif anchor.seq > self.seq:
            message = f"event {anchor.seq} was anchored, the log ends at {self.seq}"
            self.report("anchor_ahead", self.log_name, message, seq=anchor.seq)
        else:
            message = f"event {anchor.seq} was anchored and is no longer kept, or is lost"
            self.report("anchor_unverifiable", self.log_name, message, seq=anchor.seq)


def _differing(kept: Records, records: Records) -> list[str]:
    """Return the sids of which a snapshot keeps something else than the history comes to."""
    if kept == records:
        return []
    return sorted(
        sid
        for sid in {*kept, *records}
        if (record := records.get(sid)) is None or kept.get(sid) != _as_kept(record, kept.get(sid))
    )


def _as_kept(record: Record, kept: Record | None) -> Record:
    """Leave out what the snapshot has not: one that an older version wrote keeps less."""
    lacking = RARE.keys() - (record if kept is None else kept).keys()
    return cast("Record", {key: value for key, value in record.items() if key not in lacking})
