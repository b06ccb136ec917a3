"""Check a whole store once: every line, the chain, the files, the snapshots against the history.

Snapshots are read before the head and the head before the log, and only what the head covers is
judged, so live writers and a running compaction cause no finding. A finding never stops the
reading.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from crewlog.errors import (
    ArchiveDamaged,
    DataDamaged,
    NotAStore,
    SegmentMissing,
    SnapshotCorrupt,
    UnsafePermissions,
)
from crewlog.local import disk, layout, recovery, redo, snapshot
from crewlog.local.heads import AppendState, DurableHead, States
from crewlog.local.layout import Directory
from crewlog.local.segments import Segments, archive_of, covered_archives
from crewlog.model import chain, codec, events
from crewlog.model.codec import LineError
from crewlog.model.events import Line
from crewlog.model.sieve import type_needle
from crewlog.model.snapshot import Snapshot
from crewlog.place import Place
from crewlog.process import identity
from crewlog_compactor.anchor import Anchor
from crewlog_compactor.local import archive
from crewlog_compactor.local.strays import strays
from crewlog_compactor.reports import Finding, VerifyReport
from crewlog_compactor.walk import VERIFY_TRIES, History


def verify(
    place: Place, *, anchor: Anchor | None, progress: Callable[[int, int], None] | None
) -> VerifyReport:
    """Check a whole store in a directory; see `crewlog_compactor.verify`.

    Safe beside live writers and a running compaction; where a retention takes what is being read,
    the reading begins again.
    """
    path = place.path
    try:
        opened = layout.open_existing(path)
    except NotAStore as error:
        if not (path / layout.STORE).exists():  # what is not there at all is no finding about it
            raise
        finding = Finding(code=error.code, path=str(path), message=str(error))
        return VerifyReport(events=0, last_seq=0, findings=(finding,))
    for _ in range(VERIFY_TRIES):
        begun = _beginning(opened)
        try:
            with disk.failures("cannot verify", where=str(path)):
                report = _check(opened, anchor=anchor, progress=progress)
        except SegmentMissing:  # a retention took it while we read; else it would be a finding
            if _beginning(opened) == begun:
                raise
        else:
            if report.ok or _beginning(opened) == begun:
                return report
    return _check(opened, anchor=anchor, progress=progress)


def _beginning(opened: Directory) -> tuple[int, str]:
    """Say where the kept history begins: what was found is void where a retention moved that."""
    oldest = Segments(opened).all()[:1]
    with contextlib.suppress(SnapshotCorrupt):
        base = snapshot.read_base(opened)
        return sum(oldest), "" if base is None else base.sha256
    return sum(oldest), "damaged"


def _check(
    opened: Directory,
    *,
    anchor: Anchor | None,
    progress: Callable[[int, int], None] | None,
) -> VerifyReport:
    """Read everything and return what was found."""
    verification = _Verification(
        where=opened.where,
        log_name=layout.LOG,
        anchor=anchor,
        directory=opened,
        segments=Segments(opened),
        progress=progress,
    )
    return verification.run()


@dataclass(slots=True, kw_only=True)
class _Verification(History):
    """One verification of a directory."""

    directory: Directory
    segments: Segments
    progress: Callable[[int, int], None] | None = None
    base: Snapshot | None = None
    pending: bool = False  # the next change recovers: what counts is judged as after a reboot
    notes: list[str] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)  # seqs of which a state is kept

    def run(self) -> VerifyReport:
        """Read everything and return what was found."""
        snapshots = list(self._snapshots())
        self.kept = set(snapshot.kept(self.directory))
        head, written = self._states()
        self.checkpoints = dict.fromkeys(stored.last_seq for _, stored in snapshots)
        base = self._archive_base()
        self.bases = {stored.last_seq: stored for _, stored in snapshots}
        if base is not None:
            self.bases[base.last_seq] = base
        self.hash = self.directory.digest.hex()
        if self.pending:
            redo.complete(self.segments)
        firsts = self.segments.all()
        if not firsts:
            self.report("log_regressed", layout.LOG, "there is no segment at all")
        end = self._walk_all(firsts, head)
        for name, stored in snapshots:
            self.compare(name, stored)
        self._newest()
        self._base()
        self._unreached(firsts, head)
        self._covered()
        for seq in sorted(self.kept):  # the history did not come to it
            if seq > end and not self.hole:
                name = f"{layout.ARCHIVE}/{layout.state_name(seq)}"
                self.report("kept_state_wrong", name, f"the log ends at {end}", seq=seq)
        if head is not None and written is not None and not self.pending:
            self._hold_together(head, written)
        self._pending(end, head)
        self.hold_anchor()
        strays(self.directory, self.report)
        if head is not None and end < head.seq:
            self.report(
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
            notes=tuple(self.notes),
        )

    def _pending(self, end: int, head: DurableHead | None) -> None:
        """Tell of lines that count, and that the next change makes durable in their place."""
        if self.pending and self.segments.completed and (head is None or end >= head.seq):
            self.notes.append("recovery pending: the next change completes the log from the redo")
        elif self.pending and head is not None and head.boot == identity.boot_bytes():
            self.notes.append("recovery pending: head/durable is another file, or of another age")

    def _unreached(self, firsts: list[int], head: DurableHead | None) -> None:
        """Report segments behind the end that the chain does not lead to."""
        if head is None or self.pending:
            return
        for first in firsts:
            if first <= head.segment:
                continue
            name = f"{layout.LOG}/{layout.segment_name(first)}"
            try:
                if self.segments.is_ours(first):  # then a rotation is under way
                    continue
            except (DataDamaged, UnsafePermissions):
                name = f"{layout.ARCHIVE}/{archive_of(self.directory, first)}"
                self.report("archive_foreign", name, f"the log ends at {head.seq}", seq=first)
                continue
            self.report("segment_foreign", name, "it is no part of the log", seq=first)

    def _covered(self) -> None:
        """Report archives that a merged one hides, though it does not hold them."""
        with contextlib.suppress(FileNotFoundError):  # a compaction took it meanwhile
            for name, large in covered_archives(self.directory):
                if not archive.holds(self.directory, large, name):
                    why = f"{large.name} stands for it, and does not hold it"
                    self.report("archive_foreign", f"{layout.ARCHIVE}/{name}", why, seq=large.first)

    # -- snapshots and states ---------------------------------------------------------------

    def _snapshots(self) -> Iterator[tuple[str, Snapshot]]:
        """Yield the good snapshots, the older first: a compaction may replace them meanwhile."""
        for name in (layout.SNAPSHOT_PREV, layout.SNAPSHOT):
            try:
                stored = snapshot.read(self.directory, name)
            except SnapshotCorrupt as error:
                self.report(error.code, name, error.why)
                continue
            if stored is not None:
                yield name, stored

    def _archive_base(self) -> Snapshot | None:
        """Read the state that the archive begins with."""
        try:
            self.base = snapshot.read_base(self.directory)
        except SnapshotCorrupt as error:
            self.report(error.code, f"{layout.ARCHIVE}/{layout.BASE}", error.why)
        return self.base

    def _base(self) -> None:
        """Hold the state that the archive begins with against what its retention told of it."""
        last, digest = self.base_note
        if digest is None or any(f.path.endswith(layout.BASE) for f in self.findings):
            return
        base = self.base
        if (
            base is None
            or base.last_seq < last
            or (base.last_seq == last and base.sha256 != digest)
        ):
            why = "it is missing" if base is None else "it is not the one that the log tells of"
            self.report("snapshot_differs", f"{layout.ARCHIVE}/{layout.BASE}", why, seq=last)

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
            self.notes.append(f"{self.where(name)}: missing or damaged, rebuilt at the next change")
        elif head.poisoned:
            self.report("store_poisoned", name, f"a sync failed: {os.strerror(head.errno)}")
        if written is None:
            name = self.where(layout.APPEND_STATE)
            self.notes.append(f"{name}: missing or damaged, rebuilt at the next change")
        self.pending = not self._counts(head)
        return head, written

    def _counts(self, head: DurableHead | None) -> bool:
        """Say whether a head tells of this log, as a reader does."""
        if head is None or head.boot != identity.boot_bytes():
            return False
        states = States(self.directory)
        try:
            states.head()
            return not states.is_elsewhere(head) and not recovery.proof(self.segments, states)
        finally:
            states.close()

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
            self.report("state_differs", layout.APPEND_STATE, why, seq=written.seq)

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
            self.report("redo_differs", layout.REDO, why)

    # -- the log ----------------------------------------------------------------------------

    def _walk_all(self, firsts: list[int], head: DurableHead | None) -> int:
        """Check every segment up to the durable end; return the last good seq."""
        last = len(firsts) - 1
        if head is not None and head.segment in firsts:
            last = firsts.index(head.segment)
        self._begin(firsts)
        for index, first in enumerate(firsts[: last + 1]):
            if first <= self.seq and self.segments.is_merged(first):
                continue  # since it was listed, and it was read with those before it
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
            self._walk(name, data, active=active)
            if not active:
                self._walk_on(firsts[index + 1])
            if self.progress is not None:
                self.progress(index + 1, last + 1)
        return self.seq

    def checkpoint(self) -> None:
        """Hold the state that is kept as of this line, too, against the history so far."""
        History.checkpoint(self)
        if self.seq not in self.kept or self.partial or self.hole or self.gaps:
            return
        self.kept.discard(self.seq)
        name = f"{layout.ARCHIVE}/{layout.state_name(self.seq)}"
        try:
            kept = snapshot.read_kept(self.directory, self.seq)
        except SnapshotCorrupt as error:
            self.report("kept_state_wrong", name, error.why)
            return
        except UnsafePermissions:  # told as a stray
            return
        if kept is None:  # a retention took it
            return
        if kept.last_hash != self.hash:
            why = f"the hash of event {self.seq} differs: nobody goes by it"
            self.report("kept_state_wrong", name, why, seq=self.seq)
            return
        self.hold(name, kept, self.hash, self.state.records, self.state.totals)

    def _walk_on(self, following: int) -> None:
        """Go on to the segment that was listed next: archives may be put together since then."""
        with contextlib.suppress(SegmentMissing, ArchiveDamaged):  # then it is told as missing
            while self.seq + 1 < following:
                seq = self.seq
                self._walk(*self._bytes(seq + 1), active=False)
                if self.seq <= seq:
                    return

    def _bytes(self, first: int) -> tuple[str, bytes]:
        """Read a segment wherever it lies; return its name in the store, too."""
        with self.segments.open(first) as source:
            data = source.whole()
        folder = layout.ARCHIVE if source.archived else layout.LOG
        return f"{folder}/{source.name}", data

    def _unreadable(self, error: ArchiveDamaged, *, following: int) -> None:
        """Report an archive that cannot be unpacked, and go on behind it."""
        self.report(error.code, f"{layout.ARCHIVE}/{error.segment}", error.reason, seq=error.seq)
        self.seq, self.hash, self.hole = following - 1, "", True

    def _begin(self, firsts: list[int]) -> None:
        """Take the beginning that retention dropped for policy, if a line of the log says so."""
        first = firsts[0] if firsts else 1
        if first == 1:
            return
        for segment in reversed(firsts):
            try:
                _, data = self._bytes(segment)
            except ArchiveDamaged:  # reported when its turn comes
                continue
            for raw in reversed(data.split(b"\n")):
                if type_needle(events.DROPPED) in raw:
                    with contextlib.suppress(LineError):
                        if self.begins_behind(codec.parse(raw)["data"], first):
                            return

    def _missing(self, first: int) -> None:
        if first > self.seq + 1:
            self.report(
                "segment_missing",
                f"{layout.LOG}/{layout.segment_name(self.seq + 1)}",
                f"events {self.seq + 1} to {first - 1} are in no segment",
                seq=self.seq + 1,
            )
        else:
            self.report(
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
        boot = b"" if self.pending else identity.boot_bytes()
        ours = head is not None and head.boot == boot and head.segment == first
        if head is not None and ours and len(data) < head.end:
            self.report(
                "log_regressed",
                name,
                f"it has {len(data)} bytes, {head.end} were durable",
                offset=len(data),
            )
        return recovery.acknowledged(first, data, head, boot=boot, snapshot_seq=0)

    def _walk(self, name: str, data: bytes, *, active: bool) -> None:
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
                self.bad_line(name, offset, str(error))
            else:
                batch = self.good_line(name, offset, line, raw, batch)
                if offset == 0 or ended:  # of a merged archive, each segment's first line
                    self._header(name, line)
                ended = chain.is_end(line)
            offset += len(raw) + 1
        if not active and not ended:
            self.report(
                "log_corrupt",
                name,
                "the segment ends without a seal",
                offset=len(data),
                seq=self.seq,
            )

    def _header(self, name: str, line: Line) -> None:
        data = line["data"]
        if line["type"] == events.GAP:
            return
        if line["type"] != events.SEGMENT:
            self.report(
                "log_corrupt", name, "it does not begin with a header", offset=0, seq=line["seq"]
            )
        elif data.get("store") != self.directory.store:
            self.report("segment_foreign", name, f"it is of store {data.get('store')}", offset=0)

    def _newest(self) -> None:
        """Hold registry.json, read again, against the snapshots that the log tells of."""
        with contextlib.suppress(SnapshotCorrupt):  # reported before
            now = snapshot.read(self.directory, layout.SNAPSHOT)
            covered = 0 if now is None else now.last_seq
            if covered < self.snapshot_seq:
                self.report(
                    "snapshot_regressed",
                    layout.SNAPSHOT,
                    f"it covers seq {covered}, the log tells of one up to {self.snapshot_seq}",
                )
