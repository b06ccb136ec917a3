"""Decide what the end of the log means after a crash: use, cut or refuse. Pure.

At the first offset where a line of the last segment fails, everything turns on whether bytes
beyond it are known to have been durable. If they are, acknowledged data are damaged and nothing
may be cut; if not, the tail is what an interrupted append leaves and goes to quarantine.
"""

from enum import StrEnum
from typing import Final, NamedTuple


class Action(StrEnum):
    """What to do with the last segment."""

    USE = "use"
    CUT = "cut"
    CORRUPT = "corrupt"
    REGRESSED = "regressed"


class Found(NamedTuple):
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


def decide(segment: int, found: Found, known: Known) -> Decision:
    """Return the verdict of protocol.md's table for the last segment."""
    if known.head_segment > segment:
        return Decision(Action.REGRESSED, f"head/durable names segment {known.head_segment}")
    proof = _proof(segment, found, known)
    if found.end == 0:
        return Decision(Action.CORRUPT, _HEADER_DURABLE)
    if found.reason is None:
        if proof is not None:
            return Decision(Action.REGRESSED, proof)
        return Decision(Action.USE, "every line holds")
    if found.sealed:
        return Decision(Action.CORRUPT, "nothing is written after a seal")
    if proof is not None:
        return Decision(Action.CORRUPT, proof)
    return Decision(Action.CUT, "nothing beyond this point was acknowledged")


def _proof(segment: int, found: Found, known: Known) -> str | None:
    """Name what proves that more than the valid prefix was durable, None if nothing does."""
    if found.synced > found.end:
        return f"a line bears witness that {found.synced} bytes were durable"
    if known.head_segment == segment and known.head_end > found.end:
        return f"head/durable says that {known.head_end} bytes were durable"
    if known.head_seq > found.seq:
        return f"head/durable says that seq {known.head_seq} was durable"
    if known.snapshot_seq > found.seq:
        return f"the snapshot covers seq {known.snapshot_seq}"
    return None
