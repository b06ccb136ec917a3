"""Check a whole store once: every line, the chain, the files, the snapshots against the history.

Snapshots are read before the head and the head before the log, and only what the head covers is
judged, so live writers and a running compaction cause no finding. A finding never stops the
reading.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from crewlog import (
    codec,
    events,
    fold,
    identity,
    layout,
    recovery,
    redo,
    segments,
    snapshot,
    tail,
)
from crewlog.codec import LineError, Snapshot
from crewlog.directory import Directory
from crewlog.errors import (
    ArchiveDamaged,
    CrewlogError,
    SnapshotCorrupt,
)
from crewlog.events import JsonObject, JsonValue, Line, Record
from crewlog.fold import Fold, FoldError
from crewlog.states import States
from crewlog.structs import AppendState, DurableHead
from crewlog_compactor.anchor import Anchor
from crewlog_compactor.findings import Finding, VerifyReport
from crewlog_compactor.strays import strays

# The place in a batch that a line behind a gap may have: any.
_ANY: Final = (-1, -1)


@dataclass(slots=True)
class Check:
    """One verification: the findings so far, and the history as far as it could be followed."""

    directory: Directory
    anchor: Anchor | None = None
    progress: Callable[[int, int], None] | None = None
    findings: list[Finding] = field(default_factory=list)
    gaps: list[tuple[int, int]] = field(default_factory=list)
    events: int = 0
    seq: int = 0
    hash: str = ""
    anchored: str = ""
    snapshot_told: int = 0  # the log tells of a snapshot up to here
    base: Snapshot | None = None
    base_told: tuple[int, JsonValue] = (0, None)  # a retention left this state, and its hash
    hole: bool = False  # damage so far: the fold is no longer the truth
    partial: bool = False  # retention took the beginning: the fold begins at the older snapshot
    bases: dict[int, Snapshot] = field(default_factory=dict)
    state: Fold = field(default_factory=fold.empty)
    checkpoints: dict[int, tuple[str, dict[str, Record], dict[str, int]] | None] = field(
        default_factory=dict
    )

    def run(self) -> VerifyReport:
        """Read everything and return what was found."""
        snapshots = list(self._snapshots())
        head, written = self._states()
        self.checkpoints = dict.fromkeys(found.last_seq for _, found in snapshots)
        base = self._archive_base()
        self.bases = {found.last_seq: found for _, found in snapshots}
        if base is not None:
            self.bases[base.last_seq] = base
        self.hash = self.directory.digest.hex()
        if head is None or head.boot != identity.boot_bytes():
            redo.complete(self.directory)
        firsts = segments.all_of(self.directory)
        if not firsts:
            self._report("log_regressed", layout.LOG, "there is no segment at all")
        end = self._walk_all(firsts, head)
        for name, found in snapshots:
            self._compare(name, found)
        self._newest()
        self._base()
        if head is not None and written is not None:
            self._hold_together(head, written)
        self._anchored()
        strays(self.directory, self._report)
        if head is not None and end < head.seq:
            self._report(
                "log_regressed",
                f"{layout.HEAD}/{layout.HEAD_DURABLE}",
                f"seq {head.seq} was durable, the log ends at {end}",
                seq=head.seq,
            )
        return VerifyReport(
            events=self.events,
            last_seq=end,
            findings=tuple(self.findings),
            gaps=tuple(self.gaps),
        )

    def _report(
        self,
        code: str,
        name: str,
        message: str,
        *,
        offset: int | None = None,
        seq: int | None = None,
    ) -> None:
        self.findings.append(
            Finding(
                code=code,
                path=self.directory.where(name),
                offset=offset,
                seq=seq,
                message=message,
            )
        )

    # -- snapshots and states ---------------------------------------------------------------

    def _snapshots(self) -> Iterator[tuple[str, Snapshot]]:
        """Yield the good snapshots, the older first: a compaction may replace them meanwhile."""
        for name in (layout.SNAPSHOT_PREV, layout.SNAPSHOT):
            try:
                found = snapshot.read(self.directory, name)
            except CrewlogError as error:
                if error.code != "snapshot_corrupt":
                    raise
                self._report(error.code, name, error.why)
                continue
            if found is not None:
                yield name, found

    def _archive_base(self) -> Snapshot | None:
        """Read the state that the archive begins with."""
        try:
            self.base = snapshot.read_base(self.directory)
        except SnapshotCorrupt as error:
            self._report(error.code, f"{layout.ARCHIVE}/{layout.BASE}", error.why)
        return self.base

    def _base(self) -> None:
        """Hold the state that the archive begins with against what its retention told of it."""
        last, told = self.base_told
        if told is None or any(f.path.endswith(layout.BASE) for f in self.findings):
            return
        base = self.base
        if base is None or base.last_seq < last or (base.last_seq == last and base.sha256 != told):
            why = "it is missing" if base is None else "it is not the one that the log tells of"
            self._report("snapshot_differs", f"{layout.ARCHIVE}/{layout.BASE}", why, seq=last)

    def _read_states(self) -> tuple[DurableHead | None, AppendState | None]:
        states = States(self.directory)
        try:
            return states.head(), states.append_state()
        finally:
            states.close()

    def _states(self) -> tuple[DurableHead | None, AppendState | None]:
        head, written = self._read_states()
        name = f"{layout.HEAD}/{layout.HEAD_DURABLE}"
        if head is None:
            self._report("state_unreadable", name, "it is missing or damaged")
        elif head.poisoned:
            self._report("store_poisoned", name, f"a sync failed: {os.strerror(head.errno)}")
        if written is None:
            self._report("state_unreadable", layout.APPEND_STATE, "it is missing or damaged")
        return head, written

    def _hold_together(self, head: DurableHead, written: AppendState) -> None:
        """Hold the two states against each other and the log; of another boot they may be old."""
        boot = identity.boot_bytes()
        if head.boot != boot or written.boot != boot:
            return
        self._redo(head, written)
        why = None
        if written.seq < head.seq:  # read after the head, and never behind it
            why = f"seq {head.seq} is durable, and only {written.seq} written"
        elif written.seq == head.seq == self.seq and not self.hole:
            end = (written.segment, written.end, written.hash.hex())
            if end != (head.segment, head.end, self.hash):
                why = "it tells of another end of the log"
        if why is not None:
            self._report("state_differs", layout.APPEND_STATE, why, seq=written.seq)

    def _redo(self, head: DurableHead, written: AppendState) -> None:
        """Hold the redo against the end of the segment that it alone keeps durable."""
        kept = redo.read(self.directory)
        why = None if kept else "it is missing or empty"
        if head.segment == written.segment and head.base < written.kept:
            _, data = self._bytes(head.segment)
            end = min(written.kept, head.end)
            if kept[: end - written.base] != data[written.base : end]:
                why = "it does not hold what was committed since its segment was synced"
        if why is not None and self._read_states() == (head, written):  # nobody went on meanwhile
            self._report("redo_differs", layout.REDO, why)

    # -- the log ----------------------------------------------------------------------------

    def _walk_all(self, firsts: list[int], head: DurableHead | None) -> int:
        """Check every segment up to the durable end; return the last good seq."""
        last = len(firsts) - 1
        if head is not None and head.segment in firsts:
            last = firsts.index(head.segment)
        self._begin(firsts)
        for index, first in enumerate(firsts[: last + 1]):
            if first != self.seq + 1:
                self._missing(first)
            active = index == last
            try:
                name, data = self._bytes(first)
            except ArchiveDamaged as error:
                self._unreadable(error, following=firsts[index + 1])
                continue
            if active:
                data = self._durable_part(name, first, data, head)
            self._walk(name, first, data, active=active)
            if self.progress is not None:
                self.progress(index + 1, last + 1)
        return self.seq

    def _bytes(self, first: int) -> tuple[str, bytes]:
        """Read a segment wherever it lies; return its name in the store, too."""
        source = segments.open_segment(self.directory, first)
        try:
            data = source.read(0, source.size())
        finally:
            source.close()
        folder = layout.ARCHIVE if source.archived else layout.LOG
        return f"{folder}/{source.name}", data

    def _unreadable(self, error: ArchiveDamaged, *, following: int) -> None:
        """Report an archive that cannot be unpacked, and go on behind it."""
        self._report(error.code, f"{layout.ARCHIVE}/{error.segment}", error.reason, seq=error.seq)
        self.seq, self.hash, self.hole = following - 1, "", True

    def _begin(self, firsts: list[int]) -> None:
        """Take the beginning that retention dropped for policy, if a line of the log says so."""
        first = firsts[0] if firsts else 1
        if first == 1:
            return
        for found in reversed(firsts):
            try:
                _, data = self._bytes(found)
            except ArchiveDamaged:  # reported when its turn comes
                continue
            for raw in reversed(data.split(b"\n")):
                if b'"type":"_archive_dropped"' in raw:
                    with contextlib.suppress(LineError):
                        if self._is_told(codec.parse(raw)["data"], first):
                            return

    def _is_told(self, told: JsonObject, first: int) -> bool:
        """Begin at `first` if a retention announced that what was before it would go."""
        begin, last = told.get("first"), told.get("last")
        if not isinstance(begin, int) or not isinstance(last, int):
            return False
        if not begin <= first <= last + 1:  # killed half way, some of it is still there
            return False
        self.seq = first - 1
        self.hash = str(told.get("head")) if first == last + 1 else ""
        self.partial = True
        self.base_told = last, told.get("base")
        self._rebase()
        return True

    def _missing(self, first: int) -> None:
        if first > self.seq + 1:
            self._report(
                "segment_missing",
                f"{layout.LOG}/{layout.segment_name(self.seq + 1)}",
                f"events {self.seq + 1} to {first - 1} are in no segment",
                seq=self.seq + 1,
            )
        else:
            self._report(
                "segment_foreign",
                f"{layout.LOG}/{layout.segment_name(first)}",
                f"it begins at seq {first}, but the log went on to {self.seq}",
                seq=first,
            )
        self.seq = first - 1
        self.hash = ""
        self.hole = True

    def _durable_part(self, name: str, first: int, data: bytes, head: DurableHead | None) -> bytes:
        """Return what of the last segment is durable; a tail that recovery will cut is none."""
        boot = identity.boot_bytes()
        if head is not None and head.boot == boot and head.segment == first:
            if len(data) < head.end:
                self._report(
                    "log_regressed",
                    name,
                    f"it has {len(data)} bytes, {head.end} were durable",
                    offset=len(data),
                )
            return data[: head.end]
        found = segments.scan(data, offset=0, seq=first - 1, prev=None)
        known = tail.known(head, snapshot_seq=0)
        cut = recovery.decide(first, found, known).action is recovery.Action.CUT
        return data[: found.end] if cut else data

    def _walk(self, name: str, first: int, data: bytes, *, active: bool) -> None:
        """Check one segment line by line; after a bad line, go on at the next newline."""
        offset, ended = 0, False
        batch = (0, 0)
        while offset < len(data):
            newline = data.find(b"\n", offset)
            raw = data[offset : newline if newline >= 0 else len(data)]
            try:
                line = codec.parse(raw)
                if newline < 0:
                    raise LineError("half a line")
            except LineError as error:
                self._bad_line(name, offset, str(error))
            else:
                batch = self._good_line(name, offset, line, raw, batch)
                ended = segments.is_end(line)
                if offset == 0:
                    self._header(name, first, line)
            offset += len(raw) + 1
        if not active and not ended:
            self._report(
                "log_corrupt",
                name,
                "the segment ends without a seal",
                offset=len(data),
                seq=self.seq,
            )

    def _bad_line(self, name: str, offset: int, reason: str) -> None:
        self._report("log_corrupt", name, reason, offset=offset, seq=self.seq + 1)
        self.seq += 1
        self.hash = ""
        self.hole = True

    def _good_line(
        self, name: str, offset: int, line: Line, raw: bytes, batch: tuple[int, int]
    ) -> tuple[int, int]:
        """Check a line against its neighbours and fold it; return its place in the open batch."""
        if not segments.follows(line, self.seq + 1):
            self._report(
                "log_corrupt",
                name,
                f"seq {self.seq + 1} is followed by {line['seq']}",
                offset=offset,
                seq=line["seq"],
            )
            self.hole = True
        elif self.hash and line["prev"] != self.hash:
            self._report(
                "log_corrupt",
                name,
                "prev differs from the hash of the line before",
                offset=offset,
                seq=line["seq"],
            )
            self.hole = True
        index, count = line.get("b", (0, 1))
        if batch != _ANY and (((index, count) != batch) if batch != (0, 0) else index != 0):
            self._report("log_corrupt", name, "it is out of place in its batch", offset=offset)
        self.seq, self.hash = line["seq"], segments.hash_after(line, raw).hex()
        self.events += 1
        if self.anchor is not None and self.seq == self.anchor.seq:
            self.anchored = codec.digest(raw).hex()
        if line["type"] == events.GAP:
            self._gap(line)
            return _ANY
        if line["type"] == events.SNAPSHOT:
            told = line["data"].get("last_seq")
            self.snapshot_told = told if isinstance(told, int) else 0
        try:
            if not self.partial:
                self.state.apply(line)
        except FoldError as error:
            if not self.hole:  # behind a hole, it tells only of the hole
                self._report("log_corrupt", name, str(error), offset=offset, seq=line["seq"])
        self._rebase()
        self._checkpoint()
        return (index + 1, count) if index + 1 < count else (0, 0)

    def _rebase(self) -> None:
        """Begin the fold at the older snapshot, where the history before it was dropped."""
        base = self.bases.get(self.seq) if self.partial else None
        if base is not None:
            self.state = fold.restored(base.last_seq, base.sessions, base.ended, base.totals)
            self.partial = False
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Keep the state where a snapshot claims to be it."""
        if self.seq in self.checkpoints:
            copied = self.state.copy()
            self.checkpoints[self.seq] = (self.hash, copied.records, copied.totals)

    def _gap(self, line: Line) -> None:
        """Take note of a loss that was given up; the next snapshot tells what it had led to."""
        begin, last = line["data"].get("first"), line["seq"]
        first = begin if isinstance(begin, int) else last
        self.gaps.append((first, last))
        inside = [seq for seq in self.bases if first <= seq <= last]
        if inside:
            base = self.bases[max(inside)]
            self.state = fold.restored(base.last_seq, base.sessions, base.ended, base.totals)
        self.state.apply(line)
        self.partial = any(seq > last for seq in self.bases)

    def _header(self, name: str, first: int, line: Line) -> None:
        data = line["data"]
        if line["type"] == events.GAP:
            return
        if line["type"] != events.SEGMENT:
            self._report(
                "log_corrupt", name, "it does not begin with a header", offset=0, seq=first
            )
        elif data.get("store") != self.directory.store:
            self._report("segment_foreign", name, f"it is of store {data.get('store')}", offset=0)

    # -- snapshots against history ----------------------------------------------------------

    def _compare(self, name: str, found: Snapshot) -> None:
        """Hold a snapshot against the refolded history, where there is a whole one."""
        there = self.checkpoints.get(found.last_seq)
        if there is None:
            if not self.hole and not any(a <= found.last_seq <= b for a, b in self.gaps):
                self._report(
                    "log_regressed",
                    name,
                    f"it covers seq {found.last_seq}, the log ends at {self.seq}",
                )
            return
        hash_, records, totals = there
        if hash_ != found.last_hash:
            self._report(
                "history_diverged",
                name,
                f"the hash of event {found.last_seq} differs",
                seq=found.last_seq,
            )
        elif not self.hole:
            kept = {record["sid"]: record for record in (*found.sessions, *found.ended)}
            if kept != records or dict(found.totals) != totals:
                wrong = sorted(
                    sid for sid in {*kept, *records} if kept.get(sid) != records.get(sid)
                )
                self._report(
                    "snapshot_differs",
                    name,
                    f"refolding the history gives other workers: {wrong[:5]}",
                    seq=found.last_seq,
                )

    def _anchored(self) -> None:
        """Hold the history against the anchor that was kept elsewhere."""
        anchor = self.anchor
        if anchor is None or self.anchored == anchor.hash:
            return
        if self.anchored:
            message = f"event {anchor.seq} is not the one that was anchored"
            self._report("history_diverged", layout.LOG, message, seq=anchor.seq)
        elif anchor.seq > self.seq:
            message = f"event {anchor.seq} was anchored, the log ends at {self.seq}"
            self._report("log_regressed", layout.LOG, message, seq=anchor.seq)
        else:
            message = f"event {anchor.seq} was anchored and is no longer kept, or is lost"
            self._report("anchor_unverifiable", layout.LOG, message, seq=anchor.seq)

    def _newest(self) -> None:
        """Hold registry.json, read again, against the snapshots that the log tells of."""
        with contextlib.suppress(SnapshotCorrupt):  # reported before
            now = snapshot.read(self.directory, layout.SNAPSHOT)
            covered = 0 if now is None else now.last_seq
            if covered < self.snapshot_told:
                self._report(
                    "snapshot_regressed",
                    layout.SNAPSHOT,
                    f"it covers seq {covered}, the log tells of one up to {self.snapshot_told}",
                )
