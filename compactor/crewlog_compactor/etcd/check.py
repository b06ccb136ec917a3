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
        self._history = History(where=self._where, log_name="e", anchor=anchor)
        # the sealed parts as the log names them, by first seq: last seq and bytes
        self._sealed: dict[int, tuple[int, int]] = {}

    def _where(self, name: str) -> str:
        return f"{self._log.where}: {name}"

    def run(self) -> VerifyReport:
        """Read everything and return what was found."""
        log, history = self._log, self._history
        try:
            head, records, parts = self._still()
        except DataDamaged as error:
            history.report(error.code, "w, s", str(error))
            return self._report()
        state = fold.restored(head.seq, records, (), head.totals)
        now = snapshot_of(state, store=log.id, last_hash=head.hash.hex(), written_at="")
        history.checkpoints = {head.seq: None}
        history.hash = log.digest.hex()
        self._begin()
        self._walk(head.seq)
        if history.seq == head.seq:
            history.compare("w", now)
        self._parts(parts)
        history.hold_anchor()
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
        history = self._history
        return VerifyReport(
            events=history.events,
            last_seq=history.seq,
            findings=tuple(history.findings),
            gaps=tuple(history.gaps),
        )

    def _begin(self) -> None:
        """Begin with the oldest line, and the state before it if a line of the log tells of it."""
        log, history = self._log, self._history
        first = log.first_seq()
        if first == 1:
            return
        try:
            base = log.read_base()
        except SnapshotCorrupt as error:
            base = None
            history.report(error.code, "b", error.why)
        if base is not None:
            history.bases = {base.last_seq: base}
        for line, _ in log.read(first - 1, sieve=Sieve([type_needle(events.DROPPED)])):
            if line["type"] == events.DROPPED and history.begins_behind(line["data"], first):
                self._hold_base(base)
                return
        history.seq, history.hash, history.partial = first - 1, "", True
        history.rebase()
        # Dropped while the quota was full, nothing could be told; but parts go whole.
        oldest = next((line for line, _ in log.read(first - 1)), None)
        if oldest is None or oldest["type"] != events.SEGMENT:
            history.report("segment_missing", "e", f"events 1 to {first - 1} are gone", seq=1)
            history.hole = True

    def _hold_base(self, base: Snapshot | None) -> None:
        last, digest = self._history.base_note
        if digest is not None and (base is None or base.last_seq < last):
            self._history.report("snapshot_differs", "b", "it is missing", seq=last)
        elif base is not None and base.last_seq == last and digest not in {None, base.sha256}:
            why = "it is not the one that the log tells of"
            self._history.report("snapshot_differs", "b", why, seq=last)

    def _walk(self, stop: int) -> None:
        """Check every line up to the durable end; after a bad one, go on at the next."""
        history, batch = self._history, (0, 0)
        begun = history.seq
        for row in self._log.transactions(begun, stop):
            name = f"e/{row.name}"
            offset = 0
            for raw in lines_of(row).split(b"\n")[:-1]:
                try:
                    line = codec.parse(raw)
                except LineError as error:
                    history.bad_line(name, offset, str(error))
                else:
                    batch = history.good_line(name, offset, line, raw, batch)
                    if line["type"] == events.SEGMENT:
                        self._begun(line)
                offset += len(raw) + 1
            if history.seq != int(row.name):
                why = f"its last line has seq {history.seq}"
                history.report("log_corrupt", name, why, seq=history.seq)
                history.seq, history.hash, history.hole = int(row.name), "", True
            if self._progress is not None:
                self._progress(history.seq - begun, stop - begun)
        if history.seq < stop:
            why = f"seq {stop} was durable, the log ends at {history.seq}"
            history.report("log_regressed", "head", why, seq=stop)

    def _begun(self, line: Line) -> None:
        """Note the part before, as the first line of the next one tells of it."""
        before = line["data"].get("previous")
        if isinstance(before, dict):
            first, last, size = (before.get(name) for name in ("first", "last", "size"))
            if isinstance(first, int) and isinstance(last, int) and isinstance(size, int):
                self._sealed[first] = last, size

    def _parts(self, parts: list[Part]) -> None:
        """Hold the sealed parts against what the log tells of them."""
        if self._history.hole:
            return
        there = {part.first: (part.last, part.size) for part in parts}
        begun = self._log.first_seq()
        for first in sorted({*there, *self._sealed}):
            stored, logged = there.get(first, (0, 0)), self._sealed.get(first, (0, 0))
            # where a repair gave lines up, the bytes that were told of are no longer there
            if first >= begun and (
                stored[0] != logged[0] or (stored != logged and not self._history.gaps)
            ):
                why = f"up to seq {stored[0]}, {stored[1]} bytes; the log: {logged[0]}, {logged[1]}"
                self._history.report("state_differs", f"s/{first:016d}", why, seq=first)

    def _strays(self) -> None:
        """Report keys under the prefix that are none of the store's."""
        log = self._log
        known = {log.keys.head, log.keys.store}
        begin, end = log.keys.whole()
        for key in log.all_keys(begin, end):
            room = key[len(begin) :].split(b"/")[0].decode(errors="replace")
            if key not in known and room not in set(Room):
                name = key[len(begin) :].decode(errors="replace")
                self._history.report("stray", name, "it is no key of a store")
        for cursor in log.cursors.every():
            if cursor.damaged:
                self._history.report("cursor_corrupt", f"c/{cursor.name}", "it holds no seq")
