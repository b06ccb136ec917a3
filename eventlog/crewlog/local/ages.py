"""Tell whether the files of a store are of one age, or some were put back from another time.

Every file is changed in one order (append.py), so in one page cache, killed writers included, this
holds at every instant:

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
"""

from typing import Final

from crewlog.errors import SegmentMissing
from crewlog.local import redo
from crewlog.local.heads import AppendState, DurableHead, States
from crewlog.local.segments import Segment, Segments
from crewlog.model import chain, codec
from crewlog.model.codec import LineError

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
        found = _look(segments, states, before, kept)
        if found is None:
            return None
        if states.head() == before:
            return found
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
