"""Repair: make a store usable again after a failed sync or damage, and lose nothing unsaid.

Nothing is done without `yes`, nothing acknowledged is given up without `accept_loss` naming it,
nothing is renumbered, and whatever is replaced lies in quarantine, durable, before it goes.

Each damaged segment is rewritten into a new file: its good lines as they are, and for what is lost
between them one `_gap` line that stands for these seqs and keeps the hash that the next line must
name, so that the chain still proves all that is left. The last segment is sealed by its rewriting,
so that no process that has the old file open writes there again. The commit point of each segment
is its rename made durable; a repair that is killed is simply run again. The mark of a failed sync
goes last, and a `_repaired` line tells what was done.

A torn tail that was never acknowledged is no case for a repair: the next writer cuts it.
Lock order as in append.py: compact, append, sync, all held while files change.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from crewlog import host
from crewlog.errors import ArchiveDamaged, HistoryDiverged, LossRefused, SnapshotCorrupt
from crewlog.local import (
    archive,
    disk,
    heads,
    layout,
    recovery,
    redo,
    snapshot,
)
from crewlog.local.heads import DurableHead, States
from crewlog.local.layout import Directory
from crewlog.local.log import Log
from crewlog.local.segments import Segments, archive_file, sweep
from crewlog.model import chain, codec, events
from crewlog.model.codec import LineError
from crewlog.model.events import JsonObject, Line
from crewlog.model.snapshot import SNAPSHOT_BYTES_MAX
from crewlog.place import Place
from crewlog.process import identity
from crewlog_compactor.local.archive import strange
from crewlog_compactor.reports import Range, RepairReport

_QUARANTINE_MAX = 10_000


def repair(place: Place, *, yes: bool, accept_loss: list[Range]) -> RepairReport:
    """Say what a repair would do, and with `yes` do it; see `crewlog_compactor.repair`."""
    log = Log(layout.open_existing(place.path))
    try:
        if not yes:
            with disk.failures("cannot look into the store", where=str(place.path)):
                return _report(_survey(log.segments), done=False)
        with log.take_compact_lock():
            return _repair(log, accept_loss)
    finally:
        log.close()


def _repair(log: Log, accepted: Sequence[Range]) -> RepairReport:
    """Survey again and carry out, with everybody kept out. Held: compact."""
    with log.alone() as states, disk.failures("cannot repair", where=str(log.directory.path)):
        survey = _survey(log.segments)
        kept, aside = [], _aside(survey)
        while survey.strange:
            kept += [_set_aside(log.directory, layout.ARCHIVE, name) for name in survey.strange]
            survey = _survey(log.segments)
        for loss in survey.losses:
            if not any(first <= loss[0] and loss[1] <= last for first, last in accepted):
                raise LossRefused(str(log.directory.path), losses=survey.losses)
        if not survey.needed and not kept:
            return _report(survey, done=False)
        kept += [_set_aside(log.directory, layout.LOG, name) for name in survey.foreign]
        if any(part.changed for part in survey.parts):
            kept.append(_set_redo_aside(log.directory))
        kept += [_rewrite(log.directory, part) for part in survey.parts if part.changed]
        _tell_states(states, survey)
        if survey.poisoned:
            kept += _lift_mark(log.directory)
    data: JsonObject = {
        "losses": [list(loss) for loss in survey.losses],
        "poisoned": survey.poisoned,
        "rewritten": [part.name for part in survey.parts if part.changed],
        "quarantined": list(kept),
    }
    log.note(events.REPAIRED, data)
    return _report(survey, aside, done=True, quarantined=tuple(kept), seq=log.last_seq())


# -- looking --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Part:
    """One segment as it should be; `first` names it."""

    first: int
    archived: str | None  # its name in archive/; None: it is in log/
    original: bytes | None  # None: there was no such file
    lines: list[bytes] = field(default_factory=list)
    changed: bool = False
    sealed: bool = False

    @property
    def name(self) -> str:
        return self.archived or layout.segment_name(self.first)

    def beside(self, first: int) -> "_Part":
        """Return a part that was not there, where this one lies."""
        return _Part(first, layout.archive_name(first) if self.archived else None, None)

    @property
    def folder(self) -> str:
        return layout.ARCHIVE if self.archived else layout.LOG


@dataclass(slots=True)
class _Survey:
    """The log as far as it can be followed: parts, losses, and where it ends."""

    store: str
    poisoned: bool
    head: DurableHead | None
    hashes: dict[int, str]  # what snapshots know of lines that may be lost
    parts: list[_Part] = field(default_factory=list)
    losses: list[Range] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # files under a segment's name that are none
    strange: list[str] = field(default_factory=list)  # files in archive/ that are not ours
    dropped: tuple[int, str] = (0, "")  # retention let go of all up to here, with its hash
    seq: int = 0
    hash: str = ""

    @property
    def needed(self) -> bool:
        aside = self.foreign or self.strange
        return self.poisoned or bool(aside) or any(part.changed for part in self.parts)

    def lose(self, part: _Part, last: int, next_prev: str | None, *, end: bool = False) -> None:
        """Let a gap stand for the events from here to `last`; at the `end`, for the seal too."""
        first = self.seq + 1
        self.losses.append((first, last))
        next_prev = next_prev or self.hashes.get(last)
        data: JsonObject = {"store": self.store, "first": first, "last": last}
        if end:
            data["sealed"] = part.sealed = True
        if next_prev is not None:
            data["next_prev"] = next_prev
        raw, _ = chain.own_line(
            events.GAP,
            data,
            seq=last,
            ts=events.timestamp(host.now()),
            synced=0,
            prev=bytes.fromhex(self.hash),
        )
        part.lines.append(raw)
        part.changed = True
        self.seq, self.hash = last, next_prev or codec.digest(raw[:-1]).hex()

    def lose_rest(self, part: _Part, last: int, next_prev: str | None) -> None:
        """Let gaps stand for everything up to `last`, in segments that end where snapshots do."""
        for boundary in sorted({*self.hashes, last}):
            if self.seq < boundary <= last:
                if part.sealed:
                    self.parts.append(part)
                    part = part.beside(self.seq + 1)
                self.lose(part, boundary, next_prev if boundary == last else None, end=True)
        self.parts.append(part)

    def keep(self, part: _Part, line: Line, raw: bytes) -> None:
        """Take a good line over as it is."""
        part.lines.append(raw + b"\n")
        part.sealed = line["type"] == events.SEAL
        self.seq, self.hash = line["seq"], chain.hash_after(line, raw).hex()
        if line["type"] == events.DROPPED and isinstance(line["data"].get("last"), int):
            data = line["data"]
            self.dropped = max(self.dropped, (int(str(data["last"])), str(data["head"])))


def _survey(segments: Segments) -> _Survey:
    """Follow the whole log; nothing is changed."""
    at = segments.directory
    states = States(at)
    try:
        head = states.head()
    finally:
        states.close()
    noted = disk.exists(layout.POISON, at=at.root)
    poisoned = noted or (head is not None and head.poisoned)
    snapshots = list(_snapshots(at))
    known = max((last_seq for last_seq, _ in snapshots), default=0)
    known = max(known, 0 if head is None else head.seq)
    begin = at.digest.hex()
    survey = _Survey(at.store, poisoned, head, dict(snapshots), hash=begin, dropped=(0, begin))
    redo.complete(segments)
    survey.strange += strange(segments, known=known)
    if survey.strange:  # they hide what is ours: all else is looked at without them
        return survey
    firsts = segments.all()
    while firsts and _is_foreign(segments, firsts[-1], known):
        survey.foreign.append(layout.segment_name(firsts.pop()))
    kept = redo.read(at)
    for index, first in enumerate(firsts):
        last = index == len(firsts) - 1
        data = _bytes(segments, first)
        part = _Part(first, None if _in_log(at, first) else archive_file(at, first), data)
        if last and data is not None:
            boot = identity.boot_bytes()
            data = recovery.acknowledged(first, data, head, boot=boot, snapshot_seq=known)
            data += _behind_a_gap(data, kept, first, known)
        if first > survey.seq + 1:
            _missing(survey, part, _prev_of(data or b""))
        _follow(survey, part, data or b"")
        if first in segments.completed and head is not None and head.boot == identity.boot_bytes():
            part.changed = True  # no recovery of this boot will put back what the redo holds
        _close(survey, part, known + 1 if last else firsts[index + 1], segments)
    _end(survey)
    survey.strange += map(layout.state_name, snapshot.strange(segments))
    return survey


def _is_foreign(segments: Segments, first: int, known: int) -> bool:
    """Say whether a file under a segment's name was never one: behind all that is known."""
    return first > known and _in_log(segments.directory, first) and not segments.is_ours(first)


def _behind_a_gap(data: bytes, kept: bytes, first: int, known: int) -> bytes:
    """Return the acknowledged lines that the redo holds and a cut segment lacks, behind a gap."""
    seq = chain.scan(data, offset=0, seq=first - 1, prev=None).seq
    lines: dict[int, bytes] = {}
    for raw in kept.split(b"\n"):
        try:
            number = codec.parse(raw)["seq"]
        except LineError:
            continue
        if seq + 1 < number <= known:
            lines[number] = raw + b"\n"
    more, due = b"", known
    while due in lines:  # back from the last one: what is older may be of another round
        more, due = lines[due] + more, due - 1
    return more


def _snapshots(at: Directory) -> Iterator[tuple[int, str]]:
    for name in (layout.SNAPSHOT_PREV, layout.SNAPSHOT):
        try:
            state = snapshot.read(at, name)
        except SnapshotCorrupt:  # the other one and the log are the truth then
            continue
        if state is not None:
            yield state.last_seq, state.last_hash


def _in_log(at: Directory, first: int) -> bool:
    return disk.exists(layout.segment_name(first), at=at[layout.LOG])


def _bytes(segments: Segments, first: int) -> bytes | None:
    """Read a segment; of an archive that cannot be unpacked, nothing."""
    try:
        with segments.open(first) as source:
            return source.whole()
    except ArchiveDamaged:
        return None


def _prev_of(data: bytes) -> str | None:
    """Return the hash that the first good line of a segment names, if that is its first line."""
    try:
        return codec.parse(data[: data.find(b"\n")])["prev"]
    except LineError:
        return None


def _missing(survey: _Survey, following: _Part, next_prev: str | None) -> None:
    """Put a segment of one gap where segments are missing, unless retention dropped them."""
    if not survey.parts and following.first > 1:
        survey.seq, survey.hash = following.first - 1, next_prev or "0" * 64
        return  # decided once the lines that tell of a retention were read
    survey.lose_rest(following.beside(survey.seq + 1), following.first - 1, next_prev)


def _follow(survey: _Survey, part: _Part, data: bytes) -> None:
    """Take over the good lines of one segment; what is lost between them becomes a gap."""
    for raw in data.split(b"\n"):
        if not raw:
            continue
        try:
            line = codec.parse(raw)
        except LineError:
            part.changed = True
            continue
        begins = line["data"].get("first") if line["type"] == events.GAP else line["seq"]
        if not isinstance(begins, int) or begins <= survey.seq:
            part.changed = True  # a line that stands twice
            continue
        if begins > survey.seq + 1:
            survey.lose(part, begins - 1, line["prev"])
        elif line["prev"] != survey.hash:
            raise HistoryDiverged(part.name, seq=line["seq"] - 1)
        survey.keep(part, line, raw)
    part.changed |= data != b"".join(part.lines)


def _close(survey: _Survey, part: _Part, following: int, segments: Segments) -> None:
    """Bring a segment to its end: the next one's first seq says how far it went."""
    if survey.seq + 1 >= following or part.sealed:
        survey.parts.append(part)  # where a whole segment is missing behind it, the next one tells
        return
    there = segments.all()
    survey.lose_rest(
        part,
        following - 1,
        _prev_of(_bytes(segments, following) or b"") if following in there else None,
    )


def _end(survey: _Survey) -> None:
    """Seal the end, if it is rewritten, and see to the beginning."""
    if not survey.parts:
        return
    begin = survey.parts[0].first
    if begin > 1 and survey.dropped[0] < begin - 1:
        _beginning(survey, begin)
    last = survey.parts[-1]
    if not last.changed and not survey.poisoned:
        return
    last.changed = True
    if not last.sealed:
        raw, _ = chain.own_line(
            events.SEAL,
            {"first": last.first},
            seq=survey.seq + 1,
            ts=events.timestamp(host.now()),
            synced=0,
            prev=bytes.fromhex(survey.hash),
        )
        last.lines.append(raw)
        survey.seq, survey.hash = survey.seq + 1, codec.digest(raw[:-1]).hex()


def _beginning(survey: _Survey, begin: int) -> None:
    """Put gaps for a beginning that is lost without a word."""
    last, hash_ = survey.dropped
    before = _Survey(survey.store, survey.poisoned, None, survey.hashes, seq=last, hash=hash_)
    part = survey.parts[0].beside(last + 1)
    before.lose_rest(part, begin - 1, _prev_of(b"".join(survey.parts[0].lines[:1])))
    survey.parts[:0] = before.parts
    survey.losses[:0] = before.losses


# -- changing -------------------------------------------------------------------------------


def _rewrite(at: Directory, part: _Part) -> str:
    """Put a segment's good lines in its place; durable. Returns what keeps the old ones."""
    via, folder = at.disk, at[part.folder]
    aside = ""
    if part.original is not None:
        where = at.where(part.folder, part.name)
        limit = SNAPSHOT_BYTES_MAX
        held = disk.read_all(part.name, at=folder, where=where, limit=limit)
        aside = _quarantine(at, f"{part.name}.before-repair", held)
    data = b"".join(part.lines)
    temporary = f"{disk.TEMPORARY_PREFIX}repair-{os.getpid()}"
    sweep(at, part.folder)
    if part.archived:
        data = archive.pack(data, archive.packing_of(part.archived))
    disk.write_new(via, temporary, data, at=folder)
    via.rename(temporary, part.name, at=folder)
    via.sync_directory(folder)
    return aside


def _set_aside(at: Directory, inside: str, name: str) -> str:
    """Take a file out of log/ or archive/ that does not belong there; quarantine keeps it."""
    folder, where = at[inside], at.where(inside, name)
    held = disk.read_all(name, at=folder, where=where, limit=SNAPSHOT_BYTES_MAX)
    aside = _quarantine(at, name, held)
    at.disk.unlink(name, at=folder)
    at.disk.sync_directory(folder)
    return aside


def _set_redo_aside(at: Directory) -> str:
    """Keep what the redo holds, then zero it, durably: else it would complete what is rewritten."""
    held = redo.read(at)
    if not held.strip(b"\0"):
        return ""
    aside = _quarantine(at, layout.REDO, held)
    redo.empty(at)
    return aside


def _quarantine(at: Directory, stem: str, data: bytes) -> str:
    """Keep bytes, durable, before what held them goes; return the file's name."""
    folder = at[layout.QUARANTINE]
    taken = set(at.names(layout.QUARANTINE))
    name = next(n for n in _numbered(stem) if n not in taken)
    disk.write_new(at.disk, name, data, at=folder)
    at.disk.sync_directory(folder)
    return name


def _numbered(stem: str) -> Iterator[str]:
    yield from (f"{stem}.{number}" for number in range(_QUARANTINE_MAX))


def _tell_states(states: States, survey: _Survey) -> None:
    """Write states for the rewritten end of the log, if it was rewritten."""
    last = survey.parts[-1]
    if not last.changed:
        return
    end, digest = sum(map(len, last.lines)), bytes.fromhex(survey.hash)
    boot = identity.boot_bytes()
    state = heads.written(boot, last.first, end, survey.seq, digest, sealed=True)
    states.renew()
    states.put_append_state(state)
    states.put_head(heads.durable(state, base=end, after=survey.head))


def _lift_mark(at: Directory) -> list[str]:
    """Take the mark of a failed sync away, last of all; it is kept in quarantine."""
    if not disk.exists(layout.POISON, at=at.root):
        return []
    where = at.where(layout.POISON)
    note = disk.read_all(layout.POISON, at=at.root, where=where, limit=layout.SMALL_FILE_BYTES_MAX)
    kept = _quarantine(at, layout.POISON, note)
    at.disk.unlink(layout.POISON, at=at.root)
    at.disk.sync_directory(at.root)
    return [kept]


def _aside(survey: _Survey) -> tuple[str, ...]:
    """Name the files that a repair takes out of the store."""
    archives = [f"{layout.ARCHIVE}/{name}" for name in survey.strange]
    return tuple([f"{layout.LOG}/{name}" for name in survey.foreign] + archives)


def _report(
    survey: _Survey,
    aside: tuple[str, ...] = (),
    *,
    done: bool,
    quarantined: tuple[str, ...] = (),
    seq: int = 0,
) -> RepairReport:
    return RepairReport(
        done=done,
        poisoned=survey.poisoned,
        losses=tuple(survey.losses),
        rewritten=tuple(part.name for part in survey.parts if part.changed),
        aside=aside or _aside(survey),
        quarantined=tuple(name for name in quarantined if name),
        seq=seq,
    )
