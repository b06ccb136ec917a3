"""Tell what of the log counts where the states may not be trusted, and mend its end.

Ages. Every file is changed in one order (append.py), so in one page cache, killed writers included,
this holds at every instant:

I1  no line in the redo follows the last whole line of the last segment;
I2  no line bears a `synced` beyond the end that head/durable tells of;
I3  head/durable is ahead neither of append.state nor of the file's size;
I4  a segment has a successor only once head/durable covers its seal.

What breaks one of them proves that the device lost what was not synced, or that a file was put
back or copied: what counts is then judged as after a reboot, which is only the easiest such proof.
A redo or a log that is *ahead* of head/durable proves nothing: a writer may be about to publish.

What no rule can tell: the segment kept the last lines, and only the last publication of
head/durable was lost. That is byte for byte a leader that was killed before it published. Readers
show up to a sync less, and the next writer takes these lines over before it gives out a seq.

Two occasions to change something, under locks/append, so that appending can go on:

- `adopt`: a writer of this boot died between its write and its append.state. Whole lines are
  taken over (their caller never heard: outcome unknown), the rest was never acknowledged.
- `rebuild`: another boot or age, or a state file bad or missing. decide judges the last segment
  by all the evidence there is; only an unacknowledged tail is ever cut, and kept in quarantine.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Final, NamedTuple

from crewlog import host
from crewlog.errors import LogCorrupt, LogRegressed, SegmentMissing
from crewlog.local import disk, heads, layout, redo
from crewlog.local.heads import AppendState, DurableHead, States
from crewlog.local.layout import Directory
from crewlog.local.segments import Segment, Segments, sweep
from crewlog.model import chain, codec, events
from crewlog.model.chain import Scan
from crewlog.model.codec import LineError
from crewlog.model.events import JsonObject

# -- of one age? -----------------------------------------------------------------------------

_LOOKS: Final = 20  # of a reader, until head/durable stands still for the length of one


def proof(segments: Segments, states: States) -> str | None:
    """Return what proves different ages, for a reader: no lock is held, nothing is changed.

    The redo is read before the segment and again after it, head/durable first and last; what moved
    meanwhile is no proof. None where there is none, or head/durable is not of one file anyway.
    """
    for _ in range(_LOOKS):
        before = states.head()
        if before is None:
            return None
        kept = redo.read(segments.directory)
        why = _look(segments, states, before, kept)
        if why is None:
            return None
        if states.head() == before:
            return why
    return None


def _look(segments: Segments, states: States, head: DurableHead, kept: bytes) -> str | None:
    """Look once, in the order that leaves no false proof."""
    written, firsts = states.append_state(), segments.in_log()
    if written is not None and written.boot == head.boot and written.seq < head.seq:
        return f"seq {head.seq} is durable, and only {written.seq} written"  # I3
    if not firsts or firsts[-1] < head.segment:
        return f"head/durable names segment {head.segment}, which is not there"  # I3
    last = next(f for f in reversed(firsts) if f <= head.segment or segments.is_ours(f))
    if last > head.seq + 1:
        return f"segment {last} exists, and its predecessor's seal is not durable"  # I4
    begin = head.end if head.segment == last else 0
    try:
        with segments.open(last) as source:
            if source.size() < begin:
                return f"{begin} bytes were durable, {source.size()} are there"  # I3
            prev = hash_at(source, begin) if begin else None
            tail = source.read(begin, source.size() - begin)
    except SegmentMissing:  # it was archived meanwhile
        return None
    if begin and prev is None:
        return f"no line ends at byte {begin}, which was durable"  # I3
    seq = head.seq if begin else last - 1
    scan = chain.scan(tail, offset=begin, seq=seq, prev=prev)
    if scan.synced > begin:
        return f"a line bears witness that {scan.synced} bytes were durable"  # I2
    line = redo.line_after(kept, scan.seq, scan.hash)
    if line and not scan.sealed and line in redo.read(segments.directory):
        return f"the redo holds seq {scan.seq + 1}, the log does not"  # I1
    return None


def hash_at(source: Segment, end: int) -> bytes | None:
    """Return the hash of the line that ends at a byte, as the next line must name it."""
    size = min(end, codec.LINE_BYTES_CEILING + 1)
    data = source.read(end - size, size)
    if len(data) < size or data[-1:] != b"\n":
        return None
    raw = data[data.rfind(b"\n", 0, -1) + 1 : -1]
    try:
        return chain.hash_after(codec.parse(raw), raw)
    except LineError:
        return None


def proof_for_writer(segments: Segments, state: AppendState, head: DurableHead) -> str | None:
    """Return what proves that the states are not those of this log. Held: locks/append."""
    last = segments.in_log()[-1:]
    if last != [state.segment] and not (state.sealed and last == [state.seq + 1]):
        return f"segment {last} is the last one, append.state names {state.segment}"
    if (head.seq, head.segment) > (state.seq, state.segment):
        return f"seq {head.seq} is durable, and only {state.seq} written"
    with segments.open(state.segment) as source:
        if source.size() < state.end:
            return f"it has {source.size()} bytes, {state.end} were written"
        if hash_at(source, state.end) != state.hash:
            return f"the line that ends at byte {state.end} is another one"
    return None


# -- the decision --------------------------------------------------------------------------


class Action(StrEnum):
    """What to do with the last segment."""

    USE = "use"
    CUT = "cut"
    CORRUPT = "corrupt"
    REGRESSED = "regressed"


class Known(NamedTuple):
    """What is known to have been durable; 0 where nothing is.

    `head_*` come from head/durable of any boot: it is written after the sync that it tells of,
    so it can be old but never claims too much. `snapshot_seq` is the newest snapshot's last seq.
    """

    head_segment: int = 0
    head_end: int = 0
    head_seq: int = 0
    snapshot_seq: int = 0


class Decision(NamedTuple):
    """An action and the proof that it rests on."""

    action: Action
    proof: str


_HEADER_DURABLE: Final = "a segment's header is durable before the segment gets its name"


def decide(segment: int, scan: Scan, known: Known) -> Decision:
    """Return the verdict of protocol.md's table for the last segment."""
    if known.head_segment > segment:
        return Decision(Action.REGRESSED, f"head/durable names segment {known.head_segment}")
    proof = _proof(segment, scan, known)
    if scan.end == 0:
        return Decision(Action.CORRUPT, _HEADER_DURABLE)
    if scan.reason is None:
        if proof is not None:
            return Decision(Action.REGRESSED, proof)
        return Decision(Action.USE, "every line holds")
    if scan.sealed:
        return Decision(Action.CORRUPT, "nothing is written after a seal")
    if proof is not None:
        return Decision(Action.CORRUPT, proof)
    return Decision(Action.CUT, "nothing beyond this point was acknowledged")


def _proof(segment: int, scan: Scan, known: Known) -> str | None:
    """Name what proves that more than the valid prefix was durable, None if nothing does."""
    if scan.synced > scan.end:
        return f"a line bears witness that {scan.synced} bytes were durable"
    if known.head_segment == segment and known.head_end > scan.end:
        return f"head/durable says that {known.head_end} bytes were durable"
    if known.head_seq > scan.seq:
        return f"head/durable says that seq {known.head_seq} was durable"
    if known.snapshot_seq > scan.seq:
        return f"the snapshot covers seq {known.snapshot_seq}"
    return None


# -- the end of the log --------------------------------------------------------------------


def adopt(directory: Directory, source: Segment, state: AppendState) -> tuple[AppendState, Scan]:
    """Take whole lines beyond the written end into the state; cut what is left."""
    data = source.read(state.end, source.size() - state.end)
    at, sealed = state.end, state.sealed  # nothing that comes behind a seal undoes it
    scan = chain.scan(data, offset=at, seq=state.seq, prev=state.hash, sealed=sealed)
    if scan.reason is not None:
        quarantine(directory, source, scan, data[scan.end - state.end :])
        directory.disk.cut(source.fd, scan.end)
    after = state._replace(end=scan.end, seq=scan.seq, hash=scan.hash, sealed=scan.sealed)
    return after, scan


def known(head: DurableHead | None, *, snapshot_seq: int) -> Known:
    """Return what a head and the snapshots say to have been durable."""
    if head is None:
        return Known(snapshot_seq=snapshot_seq)
    return Known(
        head_segment=head.segment, head_end=head.end, head_seq=head.seq, snapshot_seq=snapshot_seq
    )


def judge(
    segments: Segments, head: DurableHead | None, *, snapshot_seq: int
) -> tuple[int, Scan, Action]:
    """Scan the last segment, as the redo completes it, and decide about its tail.

    This changes nothing; the segment is read as completed from here on. Returns the segment by its
    first seq, what was found, and what to do.
    Raises: LogCorrupt, LogRegressed or SegmentMissing where acknowledged data are damaged or gone.
    """
    directory, firsts = segments.directory, segments.in_log()
    if not firsts:
        raise LogRegressed(directory.where(layout.LOG), why="it holds no segment at all")
    last = firsts[-1]
    redo.complete(segments)
    with segments.open(last) as source:
        data = source.whole()
    scan = chain.scan(data, offset=0, seq=last - 1, prev=None)
    decision = decide(last, scan, known(head, snapshot_seq=snapshot_seq))
    if decision.action is Action.CORRUPT:
        raise LogCorrupt(
            source.name,
            offset=scan.end,
            seq=scan.seq + 1,
            reason=scan.reason or "the file ends early",
            proof=decision.proof,
        )
    if decision.action is Action.REGRESSED:
        raise LogRegressed(directory.where(layout.LOG, source.name), why=decision.proof)
    _check_header(segments, source, data[: data.find(b"\n")], snapshot_seq=snapshot_seq)
    return last, scan, decision.action


def _check_header(segments: Segments, source: Segment, raw: bytes, *, snapshot_seq: int) -> None:
    """Hold the header against the store and against the segment that it names before itself."""
    line, directory = codec.parse(raw), segments.directory
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
        before = segments.open(first)
    except SegmentMissing as error:
        raise SegmentMissing(directory.where(layout.LOG), first=first, last=last) from error
    with before:
        actual = before.size()
        rewritten = actual != size and events.GAP.encode() in before.read(0, actual)
    if actual != size and not rewritten:  # a repair told there what it gave up
        raise LogCorrupt(
            before.name,
            offset=min(actual, int(size) if isinstance(size, int) else 0),
            seq=last,
            reason=f"it has {actual} bytes",
            proof=f"its successor was told {size}",
        )


def rebuild(
    segments: Segments,
    head: DurableHead | None,
    *,
    boot: bytes,
    snapshot_seq: int,
    sync: Callable[[int], None],
) -> tuple[AppendState, DurableHead, Scan | None]:
    """Recover: make the valid prefix of the last segment durable, and derive both states from it.

    The third value tells what was cut, if anything. Idempotent: interrupted anywhere, the next
    call finds the same prefix. Held besides: both sync locks, so that no leader publishes.
    """
    directory = segments.directory
    sweep(directory, layout.LOG)
    try:
        last, scan, action = judge(segments, head, snapshot_seq=snapshot_seq)
        with segments.open_to_append(last) as source:
            disk.require_one_name(source.fd, where=directory.where(layout.LOG, source.name))
            completed = segments.completed.get(last)
            if completed is not None:
                _put_back(directory, source, completed[: scan.end])
            elif action is Action.CUT:
                cut = source.read(scan.end, scan.size - scan.end)
                quarantine(directory, source, scan, cut)
                directory.disk.cut(source.fd, scan.end)
            sync(source.fd)
    finally:
        segments.completed.clear()
    redo.make(directory)
    state = recovered(boot, last, scan)
    fresh = heads.durable(state, base=scan.end, after=head)
    return state, fresh, scan if action is Action.CUT else None


def recovered(boot: bytes, segment: int, scan: Scan) -> AppendState:
    """Return the state once the valid prefix of the last segment is all there is."""
    return heads.written(boot, segment, scan.end, scan.seq, scan.hash, sealed=scan.sealed)


def acknowledged(
    first: int, data: bytes, head: DurableHead | None, *, boot: bytes, snapshot_seq: int
) -> bytes:
    """Return what of the last segment was acknowledged, or may have been.

    In this boot head/durable tells; after a reboot what lies on disk is judged as by a recovery.
    """
    if head is not None and head.boot == boot and head.segment == first:
        return data[: head.end]
    scan = chain.scan(data, offset=0, seq=first - 1, prev=None)
    decision = decide(first, scan, known(head, snapshot_seq=snapshot_seq))
    return data[: scan.end] if decision.action is Action.CUT else data


def _put_back(directory: Directory, source: Segment, data: bytes) -> None:
    """Put what the redo held where it belongs; killed on the way, the redo still holds it."""
    there = source.whole()
    scan = chain.scan(there, offset=0, seq=source.first - 1, prev=None)
    if scan.size > scan.end:
        quarantine(directory, source, scan, there[scan.end :])
    directory.disk.cut(source.fd, scan.end)
    disk.write_all(directory.disk, source.fd, data[scan.end :])


def quarantine(directory: Directory, source: Segment, scan: Scan, data: bytes) -> None:
    """Keep bytes that are about to be cut, durable before the cut, with a note beside them."""
    at = directory[layout.QUARANTINE]
    taken = set(directory.names(layout.QUARANTINE))
    stem = f"{source.first:020d}-{scan.end}"
    number = next(n for n in range(len(taken) + 1) if f"{stem}.{n}.bytes" not in taken)
    note = {
        "segment": source.name,
        "offset": scan.end,
        "bytes": len(data),
        "reason": scan.reason,
        "at": events.timestamp(host.now()),
    }
    disk.write_new(directory.disk, f"{stem}.{number}.bytes", data, at=at)
    note_name = f"{stem}.{number}.json"
    if note_name not in taken:
        disk.write_new(directory.disk, note_name, codec.dump(note) + b"\n", at=at)
    directory.disk.sync_directory(at)


def recovered_data(source_first: int, scan: Scan) -> JsonObject:
    """Return what the `_recovered` line says about a cut."""
    return {
        "segment": source_first,
        "offset": scan.end,
        "bytes": scan.size - scan.end,
        "reason": scan.reason,
    }


def header_data(directory: Directory, boot: str, previous: AppendState | None) -> JsonObject:
    """Return what a segment's header says: whose it is and what stood before it."""
    return {
        "store": directory.store,
        "format": codec.FORMAT,
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
