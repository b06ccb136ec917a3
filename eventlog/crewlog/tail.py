"""Mend the end of the log so that appending can go on: adopt, quarantine, cut, rebuild.

Held by the caller of what changes something: locks/append. Two occasions:

- `adopt`: a writer of this boot died between its write and its append.state. Whole lines are
  taken over (their caller never heard: outcome unknown), the rest was never acknowledged.
- `rebuild`: another boot, or a state file bad or missing. recovery.decide judges the last segment
  by all the evidence there is; only an unacknowledged tail is ever cut, and kept in quarantine.
"""

from collections.abc import Callable

from crewlog import codec, disk, events, layout, recovery, redo, segments, structs
from crewlog.directory import Directory
from crewlog.errors import LogCorrupt, LogRegressed, SegmentMissing
from crewlog.events import JsonObject
from crewlog.recovery import Action, Found, Known
from crewlog.segments import Source
from crewlog.structs import AppendState, DurableHead


def adopt(directory: Directory, source: Source, state: AppendState) -> tuple[AppendState, Found]:
    """Take whole lines beyond the written end into the state; cut what is left."""
    data = source.read(state.end, source.size() - state.end)
    at, sealed = state.end, state.sealed  # nothing that comes behind a seal undoes it
    found = segments.scan(data, offset=at, seq=state.seq, prev=state.hash, sealed=sealed)
    if found.reason is not None:
        quarantine(directory, source, found, data[found.end - state.end :])
        directory.disk.cut(source.fd, found.end)
    after = state._replace(end=found.end, seq=found.seq, hash=found.hash, sealed=found.sealed)
    return after, found


def known(head: DurableHead | None, *, snapshot_seq: int) -> Known:
    """Return what a head and the snapshots say to have been durable."""
    if head is None:
        return Known(snapshot_seq=snapshot_seq)
    return Known(
        head_segment=head.segment, head_end=head.end, head_seq=head.seq, snapshot_seq=snapshot_seq
    )


def judge(
    directory: Directory, head: DurableHead | None, *, snapshot_seq: int
) -> tuple[int, Found, Action]:
    """Scan the last segment, as the redo completes it, and decide about its tail.

    This changes nothing; the segment is read as completed from here on.
    Returns the segment by its first seq, what was found, and what to do. *Raises* LogCorrupt,
    LogRegressed or SegmentMissing where acknowledged data are damaged or gone.
    """
    firsts = segments.active_and_sealed(directory)
    if not firsts:
        raise LogRegressed(directory.where(layout.LOG), why="it holds no segment at all")
    last = firsts[-1]
    redo.complete(directory)
    with segments.open_segment(directory, last) as source:
        data = source.whole()
    found = segments.scan(data, offset=0, seq=last - 1, prev=None)
    decision = recovery.decide(last, found, known(head, snapshot_seq=snapshot_seq))
    if decision.action is Action.CORRUPT:
        raise LogCorrupt(
            source.name,
            offset=found.end,
            seq=found.seq + 1,
            reason=found.reason or "the file ends early",
            proof=decision.proof,
        )
    if decision.action is Action.REGRESSED:
        raise LogRegressed(directory.where(layout.LOG, source.name), why=decision.proof)
    _check_header(directory, source, data[: data.find(b"\n")], snapshot_seq=snapshot_seq)
    return last, found, decision.action


def _check_header(directory: Directory, source: Source, raw: bytes, *, snapshot_seq: int) -> None:
    """Hold the header against the store and against the segment that it names before itself."""
    line = codec.parse(raw)
    name = source.name
    previous = line["data"].get("previous")
    if line["type"] != events.SEGMENT or line["data"].get("store") != directory.store:
        raise LogCorrupt(
            name,
            offset=0,
            seq=source.first,
            reason="not a header of this store",
            proof=f"the store is {directory.store}",
        )
    if not isinstance(previous, dict):
        return
    first, last, size = previous.get("first"), previous.get("last"), previous.get("size")
    if not isinstance(first, int) or not isinstance(last, int) or last <= snapshot_seq:
        return
    try:
        before = segments.open_segment(directory, first)
    except SegmentMissing as error:
        raise SegmentMissing(directory.where(layout.LOG), first=first, last=last) from error
    with before:
        found = before.size()
        rewritten = found != size and events.GAP.encode() in before.read(0, found)
    if found != size and not rewritten:  # a repair told there what it gave up
        raise LogCorrupt(
            before.name,
            offset=min(found, int(size) if isinstance(size, int) else 0),
            seq=last,
            reason=f"it has {found} bytes",
            proof=f"its successor was told {size}",
        )


def rebuild(
    directory: Directory,
    head: DurableHead | None,
    *,
    boot: bytes,
    snapshot_seq: int,
    sync: Callable[[int], None],
) -> tuple[AppendState, DurableHead, Found | None]:
    """Recover: make the valid prefix of the last segment durable, and derive both states from it.

    The third value tells what was cut, if anything. Idempotent: interrupted anywhere, the next
    call finds the same prefix. Held besides: both sync locks, so that no leader publishes.
    """
    segments.sweep(directory, directory[layout.LOG])
    last, found, action = judge(directory, head, snapshot_seq=snapshot_seq)
    with segments.open_active(directory, last) as source:
        disk.require_one_name(source.fd, where=directory.where(layout.LOG, source.name))
        completed = directory.completed.get(last)
        if completed is not None:
            _put_back(directory, source, completed[: found.end])
        elif action is Action.CUT:
            quarantine(directory, source, found, source.read(found.end, found.size - found.end))
            directory.disk.cut(source.fd, found.end)
        sync(source.fd)
    directory.completed.clear()
    redo.make(directory)
    state = recovered(boot, last, found)
    fresh = structs.durable(state, base=found.end, after=head)
    return state, fresh, found if action is Action.CUT else None


def recovered(boot: bytes, segment: int, found: Found) -> AppendState:
    """Return the state once the valid prefix of the last segment is all there is."""
    return structs.written(boot, segment, found.end, found.seq, found.hash, sealed=found.sealed)


def acknowledged(
    first: int, data: bytes, head: DurableHead | None, *, boot: bytes, snapshot_seq: int
) -> bytes:
    """Return what of the last segment was acknowledged, or may have been.

    In this boot head/durable tells; after a reboot what lies on disk is judged as by a recovery.
    """
    if head is not None and head.boot == boot and head.segment == first:
        return data[: head.end]
    found = segments.scan(data, offset=0, seq=first - 1, prev=None)
    decision = recovery.decide(first, found, known(head, snapshot_seq=snapshot_seq))
    return data[: found.end] if decision.action is Action.CUT else data


def _put_back(directory: Directory, source: Source, data: bytes) -> None:
    """Put what the redo held where it belongs; killed on the way, the redo still holds it."""
    there = source.whole()
    found = segments.scan(there, offset=0, seq=source.first - 1, prev=None)
    if found.size > found.end:
        quarantine(directory, source, found, there[found.end :])
    directory.disk.cut(source.fd, found.end)
    disk.write_all(directory.disk, source.fd, data[found.end :])


def quarantine(directory: Directory, source: Source, found: Found, data: bytes) -> None:
    """Keep bytes that are about to be cut, durable before the cut, with a note beside them."""
    at = directory[layout.QUARANTINE]
    taken = set(disk.names(at))
    stem = f"{source.first:020d}-{found.end}"
    number = next(n for n in range(len(taken) + 1) if f"{stem}.{n}.bytes" not in taken)
    note = {
        "segment": source.name,
        "offset": found.end,
        "bytes": len(data),
        "reason": found.reason,
        "at": events.timestamp(events.now()),
    }
    disk.write_new(directory.disk, f"{stem}.{number}.bytes", data, at=at)
    note_name = f"{stem}.{number}.json"
    if note_name not in taken:
        disk.write_new(directory.disk, note_name, codec.dump(note) + b"\n", at=at)
    directory.disk.sync_directory(at)


def recovered_data(source_first: int, found: Found) -> JsonObject:
    """Return what the `_recovered` line says about a cut."""
    return {
        "segment": source_first,
        "offset": found.end,
        "bytes": found.size - found.end,
        "reason": found.reason,
    }


def header_data(directory: Directory, boot: str, previous: AppendState | None) -> JsonObject:
    """Return what a segment's header says: whose it is and what stood before it."""
    return {
        "store": directory.store,
        "format": layout.FORMAT,
        "boot": boot,
        "previous": None
        if previous is None
        else {
            "first": previous.segment,
            "last": previous.seq,
            "size": previous.end,
            "hash": previous.hash.hex(),
        },
    }
