"""Read, check and atomically replace registry.json.

The snapshot is replaced in this order, so that registry.json exists at every moment and two
generations can always be rebuilt: temporary file, fsync, read back and check; the current one
gets the second name registry.prev.json; the temporary takes its place; fsync of the directory.
That last fsync is the commit point of a compaction.

States of the past are kept in archive/, each at the end of a segment, so that the next line can
vouch for it. They are a help, never the truth: one that is damaged, or that no line leads on from,
is passed over.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from crewlog import host
from crewlog.errors import (
    DataDamaged,
    FormatTooNew,
    LogCorrupt,
    LogRegressed,
    SnapshotCorrupt,
    UnsafePermissions,
)
from crewlog.local import archive, disk, layout
from crewlog.local.archive import PackingError
from crewlog.local.layout import Directory
from crewlog.local.segments import Reader, Segments, corrupt, first_line, unpacked
from crewlog.model import events
from crewlog.model.chain import Position
from crewlog.model.codec import DocumentError
from crewlog.model.events import Line
from crewlog.model.fold import FoldError
from crewlog.model.snapshot import (
    SNAPSHOT_BYTES_MAX,
    OnTheWay,
    Snapshot,
    decode_snapshot,
    empty_snapshot,
    encode_snapshot,
    refold_lines,
    states_before,
)

_logger = logging.getLogger("crewlog.snapshot")


class Loaded(NamedTuple):
    """The newest good snapshot (None: there is none), and what was wrong with newer ones."""

    snapshot: Snapshot | None
    complaints: tuple[SnapshotCorrupt, ...]


def read(directory: Directory, name: str, *, inside: str = "") -> Snapshot | None:
    """Read one snapshot, in a directory of the store; None if it is absent.

    Raises: SnapshotCorrupt if it is damaged or another store's; FormatTooNew.
    """
    where = directory.where(inside, name)
    at = directory[inside]
    with disk.failures("cannot read the snapshot", where=where):
        try:
            data = disk.read_all(name, at=at, where=where, limit=SNAPSHOT_BYTES_MAX)
        except FileNotFoundError:
            return None
    return _decoded(directory, data, where)


def _decoded(directory: Directory, data: bytes, where: str) -> Snapshot:
    try:
        state = decode_snapshot(data)
    except DocumentError as error:
        raise SnapshotCorrupt(where, why=str(error)) from error
    if state.store != directory.store:
        raise SnapshotCorrupt(where, why=f"it belongs to store {state.store}")
    return state


def load(directory: Directory) -> Loaded:
    """Return the newest good snapshot: the current one, else the one before it.

    A damaged or missing current snapshot is a complaint, never "empty": what it held is in the
    one before it and in the segments that no compaction has let go of.
    """
    complaints: list[SnapshotCorrupt] = []
    for name in (layout.SNAPSHOT, layout.SNAPSHOT_PREV):
        try:
            state = read(directory, name)
        except SnapshotCorrupt as error:
            complaints.append(error)
            continue
        if state is not None:
            if name == layout.SNAPSHOT_PREV and not complaints:
                missing = directory.where(layout.SNAPSHOT)
                complaints.append(SnapshotCorrupt(missing, why="it is missing"))
            return Loaded(state, tuple(complaints))
    return Loaded(None, tuple(complaints))


def newest(directory: Directory) -> Snapshot:
    """Return the newest good snapshot; before the first one, the empty state."""
    return load(directory).snapshot or empty(directory)


def empty(directory: Directory) -> Snapshot:
    """Return the state before the first event."""
    return empty_snapshot(directory.store, directory.digest)


def read_base(directory: Directory) -> Snapshot | None:
    """Return the state before the oldest archived segment; None if no retention left one.

    Raises: SnapshotCorrupt.
    """
    return read(directory, layout.BASE, inside=layout.ARCHIVE)


def put_base(directory: Directory, snapshot: Snapshot) -> str:
    """Keep the state that the archive begins with; durable on return. Held: locks/compact.

    Returns its sha256.
    """
    via, shelf = directory.disk, directory[layout.ARCHIVE]
    temporary = f"{disk.TEMPORARY_PREFIX}base-{os.getpid()}"
    written = _written(directory, snapshot, temporary, inside=layout.ARCHIVE)
    via.rename(temporary, layout.BASE, at=shelf)
    via.sync_directory(shelf)
    return written.sha256


def every(directory: Directory) -> Iterator[Snapshot]:
    """Yield every older state that is kept, the empty one too; damaged ones are passed over."""
    yield empty(directory)
    places = ((layout.BASE, layout.ARCHIVE), (layout.SNAPSHOT_PREV, ""), (layout.SNAPSHOT, ""))
    for name, inside in places:
        with contextlib.suppress(SnapshotCorrupt):
            state = read(directory, name, inside=inside)
            if state is not None:
                yield state


# -- states of the past ----------------------------------------------------------------------


def kept(directory: Directory) -> list[int]:
    """List the seqs of which a state is kept in archive/."""
    seqs = map(layout.state_seq_of, directory.names(layout.ARCHIVE))
    return sorted(seq for seq in seqs if seq is not None)


def read_kept(directory: Directory, seq: int) -> Snapshot | None:
    """Read the state that is kept as of `seq`; None if there is none.

    Raises: SnapshotCorrupt.
    """
    name = layout.state_name(seq)
    where = directory.where(layout.ARCHIVE, name)
    try:
        with disk.failures("cannot read the state", where=where):
            state = _decoded(directory, unpacked(directory, name), where)
    except FileNotFoundError:
        return None
    except (PackingError, FormatTooNew) as error:
        raise SnapshotCorrupt(where, why=str(error)) from error
    if state.last_seq != seq:
        raise SnapshotCorrupt(where, why=f"it is the state after event {state.last_seq}")
    return state


def keep(directory: Directory, snapshot: Snapshot) -> None:
    """Keep a state of the past; durable on return. Held: locks/compact."""
    via, shelf = directory.disk, directory[layout.ARCHIVE]
    temporary = f"{disk.TEMPORARY_PREFIX}state-{os.getpid()}"
    packed = archive.pack(encode_snapshot(snapshot), "gzip")
    disk.write_new(via, temporary, packed, at=shelf)
    via.rename(temporary, layout.state_name(snapshot.last_seq), at=shelf)
    via.sync_directory(shelf)


def forget(directory: Directory, upto: int) -> None:
    """Let go of the states up to a seq that history no longer leads on from, where that can be."""
    via, shelf = directory.disk, directory[layout.ARCHIVE]
    for seq in kept(directory):
        if seq > upto:
            continue
        try:
            via.unlink(layout.state_name(seq), at=shelf)
        except OSError as error:  # nobody goes by it, and verify tells of what is no state
            _logger.warning("%s stays: %s", layout.state_name(seq), error)


def nearest(segments: Segments, seq: int) -> Iterator[Snapshot]:
    """Yield the states at or before `seq` that kept lines lead on from, the nearest first."""
    directory, oldest = segments.directory, segments.all()[0]
    states = states_before(every(directory), seq, oldest=oldest)
    beyond = states[0].last_seq if states else oldest - 1
    for last in reversed(kept(directory)):
        if beyond < last <= seq:
            state = _vouched(segments, last)
            if state is not None:
                yield state
    yield from states


def _vouched(segments: Segments, seq: int) -> Snapshot | None:
    """Return a kept state if the line after it says that it is of this history."""
    try:
        state, line = read_kept(segments.directory, seq), first_line(segments, seq + 1)
    except (DataDamaged, UnsafePermissions) as error:
        _logger.warning("%s", str(error))
        return None
    if state is None or line is None or line["prev"] != state.last_hash:
        return None
    return state


def strange(segments: Segments) -> list[int]:
    """List the seqs of kept states that cannot be read, or that the line after them denies."""
    seqs, oldest = [], segments.all()[:1]
    for seq in kept(segments.directory):
        if not oldest or seq < oldest[0]:  # of no use any more: the next retention takes it
            continue
        try:
            state = read_kept(segments.directory, seq)
        except SnapshotCorrupt:
            seqs.append(seq)
            continue
        except UnsafePermissions:  # not ours to move
            continue
        with contextlib.suppress(DataDamaged):  # told of by itself
            line = first_line(segments, seq + 1)
            if state is not None and line is not None and line["prev"] != state.last_hash:
                seqs.append(seq)
    return seqs


def replace(directory: Directory, snapshot: Snapshot) -> Snapshot:
    """Make `snapshot` the current one; durable and checked on return. Held: locks/compact.

    Raises: LogRegressed if it is older than the current one, SnapshotCorrupt if it does not read
    back as written.
    """
    via, root = directory.disk, directory.root
    temporary = f"{disk.TEMPORARY_PREFIX}snapshot-{os.getpid()}"
    current = load(directory)
    if current.snapshot is not None and current.snapshot.last_seq > snapshot.last_seq:
        raise LogRegressed(
            directory.where(layout.LOG),
            why=f"it ends at seq {snapshot.last_seq}, the snapshot at {current.snapshot.last_seq}",
        )
    written = _written(directory, snapshot, temporary)
    if current.complaints:
        _set_aside(directory, written.sha256)
    elif current.snapshot is not None:
        _keep_previous(directory)
    via.rename(temporary, layout.SNAPSHOT, at=root)
    via.sync_directory(root)
    return written


def _written(
    directory: Directory, snapshot: Snapshot, temporary: str, *, inside: str = ""
) -> Snapshot:
    """Write a snapshot to a temporary file, durably, and return it as it reads back."""
    disk.write_new(directory.disk, temporary, encode_snapshot(snapshot), at=directory[inside])
    state = read(directory, temporary, inside=inside)
    if state is None or state.last_hash != snapshot.last_hash:
        where = directory.where(inside, temporary)
        raise SnapshotCorrupt(where, why="it does not read back as written")
    return state


def _keep_previous(directory: Directory) -> None:
    """Give the current snapshot its second name, by way of a temporary one: link never replaces."""
    via, root = directory.disk, directory.root
    temporary = f"{disk.TEMPORARY_PREFIX}previous-{os.getpid()}"
    via.link(layout.SNAPSHOT, temporary, at=root, new_at=root)
    via.rename(temporary, layout.SNAPSHOT_PREV, at=root)


def _set_aside(directory: Directory, mark: str) -> None:
    """Keep a damaged snapshot in quarantine, under a name that its replacement gives it."""
    via, aside = directory.disk, directory[layout.QUARANTINE]
    name = f"{layout.SNAPSHOT}.before-{mark[:16]}"
    with contextlib.suppress(FileNotFoundError, FileExistsError):  # missing, or set aside before
        via.link(layout.SNAPSHOT, name, at=directory.root, new_at=aside)
    via.sync_directory(aside)


def refold(
    segments: Segments,
    start: Snapshot,
    stop: Position,
    *,
    seen: Callable[[Line], None] | None = None,
    on_the_way: OnTheWay | None = None,
) -> Snapshot:
    """Return the state at `stop`, which is durable, from that of `start`, which is not after it.

    `seen` is told of each line in between, `on_the_way` of the states at the ends of segments.
    Raises: HistoryDiverged, LogCorrupt, ArchiveDamaged, SegmentMissing.
    """
    reader = Reader(segments, segments.find(start.last_seq))

    def wrong(line: Line, raw: bytes, error: FoldError) -> LogCorrupt:
        return corrupt(reader.position, line, raw, error)

    try:
        lines = reader.read(stop)
        return refold_lines(
            lines,
            start,
            stop.seq,
            where=segments.directory.where(layout.LOG),
            wrong=wrong,
            written_at=events.timestamp(host.now()),
            seen=seen,
            on_the_way=on_the_way,
        )
    finally:
        reader.close()
