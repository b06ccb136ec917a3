"""Hold the rules of the chain: which line may follow which, and how far a tail holds. Pure.

Every line carries the hash of the line before it, and seqs follow each other without a hole, but
for a `_gap` line, which stands for events that a repair gave up. The same rules hold in a directory
and in a cluster.
"""

from collections.abc import Callable
from typing import NamedTuple

from crewlog.errors import CrewlogError
from crewlog.model import codec, events
from crewlog.model.codec import LineError
from crewlog.model.events import JsonObject, Line
from crewlog.model.fold import Fold, FoldError

# -- neighbours -----------------------------------------------------------------------------


def follows(line: Line, seq: int) -> bool:
    """Say whether a line may stand where `seq` is due; a gap stands for all that it names."""
    if line["type"] != events.GAP:
        return line["seq"] == seq
    data = line["data"]
    return data.get("first") == seq and data.get("last") == line["seq"] >= seq


def is_end(line: Line) -> bool:
    """Say whether a line ends its segment: a seal, or a gap that stands for one."""
    kind = line["type"]
    return kind == events.SEAL or (kind == events.GAP and line["data"].get("sealed") is True)


def hash_after(line: Line, raw: bytes) -> bytes:
    """Return the `prev` that the next line must have; behind a gap the lost line's is kept."""
    kept = line["data"].get("next_prev") if line["type"] == events.GAP else None
    return bytes.fromhex(kept) if isinstance(kept, str) else codec.digest(raw)


def follow(
    state: Fold,
    line: Line,
    raw: bytes,
    prev: str,
    *,
    diverged: Callable[[int], CrewlogError],
    wrong: Callable[[Line, bytes, FoldError], CrewlogError],
) -> str:
    """Fold a line that must follow the one with the hash `prev`, and return its own hash.

    Raises: what `diverged` makes of the last seq that both have, where it follows another one; what
    `wrong` makes of a line that no correct writer can have written.
    """
    if line["prev"] != prev:
        raise diverged(line["seq"] - 1)
    try:
        state.apply(line)
    except FoldError as error:
        raise wrong(line, raw, error) from error
    return hash_after(line, raw).hex()


# -- a place, and a tail -------------------------------------------------------------------


class Position(NamedTuple):
    """A place between two lines of a directory's log: everything up to `seq` was read.

    `segment` is the segment by its first seq, `offset` (bytes) that after the last line read there.
    """

    segment: int
    offset: int
    seq: int


class Scan(NamedTuple):
    """What a scan of the last segment found.

    `end` is the offset after its valid prefix (bytes), `seq` and `hash` those of the last line in
    it, `reason` why the next line fails (None: the prefix is the whole segment), `synced` the
    largest durable offset that any valid line, before or after the failure, bears witness to.
    """

    end: int
    size: int
    seq: int
    hash: bytes
    sealed: bool
    reason: str | None
    synced: int


def scan(data: bytes, *, offset: int, seq: int, prev: bytes | None, sealed: bool = False) -> Scan:
    """Check lines one after the other, chain and batches included, and stop at the first failure.

    `data` begins at `offset` of its segment, after the line `seq` with the hash `prev` (None:
    trust the first line's own).
    """
    good = Scan(
        end=offset,
        size=offset + len(data),
        seq=seq,
        hash=prev or b"",
        sealed=sealed,
        reason=None,
        synced=0,
    )
    at, end, last, hashed = 0, offset, seq, prev
    synced, reason = 0, None
    batch = (0, 0)  # the place that the next line must have in an open batch
    while at < len(data) and reason is None:
        newline = data.find(b"\n", at)
        raw = data[at : newline if newline >= 0 else len(data)]
        line, reason = _try(raw, last + 1, hashed, batch, whole=newline >= 0, sealed=good.sealed)
        if line is None:
            break
        at, end, last = newline + 1, end + len(raw) + 1, line["seq"]
        hashed = hash_after(line, raw)
        synced = max(synced, line["synced"])
        index, count = line.get("b", (0, 1))
        batch = (index + 1, count) if index + 1 < count else (0, 0)
        if batch == (0, 0):
            good = good._replace(end=end, seq=last, hash=hashed, sealed=is_end(line))
    if reason is None and batch != (0, 0):
        reason = "the batch is not complete"
    if reason is not None:
        synced = max(synced, _witnessed(data[good.end - offset :]))
    return good._replace(reason=reason, synced=synced)


def is_whole(data: bytes) -> bool:
    """Say whether bytes are whole lines that follow each other."""
    first = data[: data.find(b"\n")]
    try:
        seq = codec.parse(first)["seq"]
    except LineError:
        return False
    return scan(data, offset=0, seq=seq - 1, prev=None).reason is None


def _try(
    raw: bytes, seq: int, prev: bytes | None, batch: tuple[int, int], *, whole: bool, sealed: bool
) -> tuple[Line | None, str | None]:
    """Parse a line that must follow; the second value says why it does not."""
    if not whole:
        return None, "NUL bytes" if b"\0" in raw else "half a line"
    try:
        line = codec.parse(raw)
    except LineError as error:
        return None, str(error)
    if sealed:
        return None, "a line stands after the seal"
    if not follows(line, seq):
        return None, f"seq is {line['seq']}"
    if prev is not None and line["prev"] != prev.hex():
        return None, "prev differs from the hash of the line before"
    place = tuple(line.get("b", (0, 1)))
    if (place != batch) if batch != (0, 0) else (place[0] != 0):
        return None, "it is out of place in its batch"
    return line, None


def _witnessed(data: bytes) -> int:
    """Return the largest `synced` that any whole line in a damaged tail bears witness to."""
    synced = 0
    for raw in data.split(b"\n"):
        try:
            synced = max(synced, codec.parse(raw)["synced"])
        except LineError:  # part of the damage
            continue
    return synced


# -- the store's own lines ------------------------------------------------------------------


def own_line(
    kind: str, data: JsonObject, *, seq: int, ts: str, synced: int, prev: bytes
) -> tuple[bytes, Line]:
    """Write one of the store's own lines, and return it parsed as well."""
    part = codec.own_draft(kind, data)
    raw = codec.line(part, seq=seq, ts=ts, synced=synced, prev=prev, batch=None)
    return raw, codec.parse(raw[:-1])
