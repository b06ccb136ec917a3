"""Check a whole store in a cluster: every line, the chain, the records, the parts, stray keys."""

from collections.abc import Callable
from typing import cast

from crewlog.errors import (
    CompactedError,
    DataDamaged,
    SegmentMissing,
    SnapshotCorrupt,
)
from crewlog.etcd.append import EtcdLog
from crewlog.etcd.layout import Room
from crewlog.etcd.reader import Head, lines_of
from crewlog.etcd.state import Part
from crewlog.model import codec, events, fold
from crewlog.model.codec import LineError
from crewlog.model.events import Line, Record
from crewlog.model.limits import LOCK_WAIT_S
from crewlog.model.sieve import Sieve, type_needle
from crewlog.model.snapshot import Snapshot, snapshot_of
from crewlog.place import Place
from crewlog_compactor.anchor import Anchor
from crewlog_compactor.reports import VerifyReport
from crewlog_compactor.walk import VERIFY_TRIES, History


def verify(
    place: Place, *, anchor: Anchor | None, progress: Callable[[int, int], None] | None
) -> VerifyReport:
    """Check a whole store in a cluster; see verify.verify.

    Raises: StoreMissing, Unavailable.
    """
    log = cast("EtcdLog", place.open(wait_s=LOCK_WAIT_S))  # its kind says so
    try:
        for _ in range(VERIFY_TRIES):
            oldest = log.first_seq()
            try:
                report = _Check(log, anchor, progress).run()
            except (CompactedError, SegmentMissing):
                if log.first_seq() == oldest:
                    raise
                continue
            if report.ok or log.first_seq() == oldest:  # else a retention came between
                return report
        return _Check(log, anchor, progress).run()
    finally:
        log.close()


class _Check:
    """One verification of a cluster's store."""

    def __init__(
        self, log: EtcdLog, anchor: Anchor | None, progress: Callable[[int, int], None] | None
    ) -> None:
        self._log = log
        self._progress = progress
        self._found = History(where=self._where, log_name="e", anchor=anchor)
        self._told: dict[int, tuple[int, int]] = {}  # parts: their last seq and bytes, by first seq

    def _where(self, name: str) -> str:
        return f"{self._log.where}: {name}"

    def run(self) -> VerifyReport:
        """Read everything and return what was found."""
        log, found = self._log, self._found
        try:
            head, records, parts = self._still()
        except DataDamaged as error:
            found.report(error.code, "w, s", str(error))
            return self._report()
        state = fold.restored(head.seq, records, (), head.totals)
        now = snapshot_of(state, store=log.id, last_hash=head.hash.hex(), written_at="")
        found.checkpoints = {head.seq: None}
        found.hash = log.digest.hex()
        self._begin()
        self._walk(head.seq)
        if found.seq == head.seq:
            found.compare("w", now)
        self._parts(parts)
        found.hold_anchor()
        self._strays()
        return self._report()

    def _still(self) -> tuple[Head, list[Record], list[Part]]:
        """Read head, records and parts between which nothing was sealed."""
        while True:
            parts = self._log.parts()
            head, records = self._log.records()
            if self._log.parts() == parts:
                return head, records, parts

    def _report(self) -> VerifyReport:
        found = self._found
        return VerifyReport(
            events=found.events,
            last_seq=found.seq,
            findings=tuple(found.findings),
            gaps=tuple(found.gaps),
        )

    def _begin(self) -> None:
        """Begin with the oldest line, and the state before it if a line of the log tells of it."""
        log, found = self._log, self._found
        first = log.first_seq()
        if first == 1:
            return
        try:
            base = log.read_base()
        except SnapshotCorrupt as error:
            base = None
            found.report(error.code, "b", error.why)
        if base is not None:
            found.bases = {base.last_seq: base}
        for line, _ in log.read(first - 1, sieve=Sieve([type_needle(events.DROPPED)])):
            if line["type"] == events.DROPPED and found.is_told(line["data"], first):
                self._hold_base(base)
                return
        found.seq, found.hash, found.partial = first - 1, "", True
        found.rebase()
        # Dropped while the quota was full, nothing could be told; but parts go whole.
        oldest = next((line for line, _ in log.read(first - 1)), None)
        if oldest is None or oldest["type"] != events.SEGMENT:
            found.report("segment_missing", "e", f"events 1 to {first - 1} are gone", seq=1)
            found.hole = True

    def _hold_base(self, base: Snapshot | None) -> None:
        last, told = self._found.base_told
        if told is not None and (base is None or base.last_seq < last):
            self._found.report("snapshot_differs", "b", "it is missing", seq=last)
        elif base is not None and base.last_seq == last and told not in {None, base.sha256}:
            why = "it is not the one that the log tells of"
            self._found.report("snapshot_differs", "b", why, seq=last)

    def _walk(self, stop: int) -> None:
        """Check every line up to the durable end; after a bad one, go on at the next."""
        found, batch = self._found, (0, 0)
        begun = found.seq
        for row in self._log.transactions(begun, stop):
            name = f"e/{row.name}"
            offset = 0
            for raw in lines_of(row).split(b"\n")[:-1]:
                try:
                    line = codec.parse(raw)
                except LineError as error:
                    found.bad_line(name, offset, str(error))
                else:
                    batch = found.good_line(name, offset, line, raw, batch)
                    if line["type"] == events.SEGMENT:
                        self._begun(line)
                offset += len(raw) + 1
            if found.seq != int(row.name):
                why = f"its last line has seq {found.seq}"
                found.report("log_corrupt", name, why, seq=found.seq)
                found.seq, found.hash, found.hole = int(row.name), "", True
            if self._progress is not None:
                self._progress(found.seq - begun, stop - begun)
        if found.seq < stop:
            why = f"seq {stop} was durable, the log ends at {found.seq}"
            found.report("log_regressed", "head", why, seq=stop)

    def _begun(self, line: Line) -> None:
        """Note the part before, as the first line of the next one tells of it."""
        before = line["data"].get("previous")
        if isinstance(before, dict):
            first, last, size = (before.get(name) for name in ("first", "last", "size"))
            if isinstance(first, int) and isinstance(last, int) and isinstance(size, int):
                self._told[first] = last, size

    def _parts(self, parts: list[Part]) -> None:
        """Hold the sealed parts against what the log tells of them."""
        if self._found.hole:
            return
        there = {part.first: (part.last, part.size) for part in parts}
        begun = self._log.first_seq()
        for first in sorted({*there, *self._told}):
            found, told = there.get(first, (0, 0)), self._told.get(first, (0, 0))
            # where a repair gave lines up, the bytes that were told of are no longer there
            if first >= begun and (found[0] != told[0] or (found != told and not self._found.gaps)):
                why = f"up to seq {found[0]}, {found[1]} bytes; the log: {told[0]}, {told[1]}"
                self._found.report("state_differs", f"s/{first:016d}", why, seq=first)

    def _strays(self) -> None:
        """Report keys under the prefix that are none of the store's."""
        log = self._log
        known = {log.keys.head, log.keys.store}
        begin, end = log.keys.whole()
        for key in log.all_keys(begin, end):
            room = key[len(begin) :].split(b"/")[0].decode(errors="replace")
            if key not in known and room not in set(Room):
                name = key[len(begin) :].decode(errors="replace")
                self._found.report("stray", name, "it is no key of a store")
        for cursor in log.cursors.every():
            if cursor.damaged:
                self._found.report("cursor_corrupt", f"c/{cursor.name}", "it holds no seq")
