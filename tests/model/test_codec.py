"""One event is one checked line, and nothing else is."""

import re
import zlib

import pytest

from crewlog.errors import FormatTooNew
from crewlog.local import cursors, heads
from crewlog.local.cursors import Slot
from crewlog.model import codec, events
from crewlog.model.codec import LineError
from crewlog.model.shape import Shape
from crewlog.model.snapshot import Snapshot, decode_snapshot, encode_snapshot

PREV = codec.digest(b"before")


def a_line(**changes: object) -> bytes:
    part = codec.draft("worker.lost", "w-1", b'{"pid":1}', {"cause": "x", "n": 1})
    fields = {
        "seq": 7,
        "ts": "2026-11-24T00:00:00.000001Z",
        "synced": 5,
        "prev": PREV,
        "batch": None,
    }
    return codec.line(part, **(fields | changes))[:-1]  # type: ignore[arg-type]


def test_line_parsed_gives_back_its_fields() -> None:
    """What is written is what is read."""
    line = codec.parse(a_line(batch=(1, 3)))
    assert line["seq"] == 7
    assert line["type"] == "worker.lost"
    assert line["sid"] == "w-1"
    assert line["data"] == {"cause": "x", "n": 1}
    assert line["b"] == [1, 3]
    assert line["prev"] == PREV.hex()


def test_line_trailer_has_fixed_place() -> None:
    """A line can be checked by slicing: the trailer is its last 92 bytes."""
    trailer = a_line()[-92:]
    assert re.fullmatch(rb',"prev":"[0-9a-f]{64}","crc":"[0-9a-f]{8}"\}', trailer)


@pytest.mark.parametrize(
    "trailer",
    [
        b',"prev":"' + b"a" * 63 + b'" ,',  # a blank after a hash that is too short
        b', "prev":"' + b"a" * 64 + b'",',
        b',"prev": "' + b"a" * 63 + b'",',
        b',"last":"' + b"a" * 64 + b'",',
    ],
)
def test_line_of_another_trailer_is_none(trailer: bytes) -> None:
    """However right its crc: prev and crc stand at their places, or it is no line."""
    checked = a_line()[:-92] + trailer[:-1]
    raw = checked + b',"crc":"%08x"}' % zlib.crc32(checked)
    with pytest.raises(LineError, match="no trailer"):
        codec.parse(raw)


def test_line_with_any_bit_flipped_is_refused() -> None:
    """No single flipped bit goes unnoticed."""
    raw = a_line()
    for index in range(len(raw)):
        for bit in range(8):
            broken = bytearray(raw)
            broken[index] ^= 1 << bit
            with pytest.raises((LineError, FormatTooNew)):
                codec.parse(bytes(broken))


def test_line_cut_anywhere_is_refused() -> None:
    """No prefix of a line is a line."""
    raw = a_line()
    for end in range(len(raw)):
        with pytest.raises(LineError):
            codec.parse(raw[:end])


@pytest.mark.parametrize(
    ("kind", "known"), [("_unknown", False), ("_xtra", True), ("worker.new", True)]
)
def test_line_of_unknown_type_is_kept_or_too_new(kind: str, known: bool) -> None:
    """Unknown worker events and `_x…` pass; any other unknown `_…` needs a newer version."""
    part = codec.draft(kind, "", b"{}", {})
    raw = codec.line(part, seq=1, ts="", synced=0, prev=PREV, batch=None)[:-1]
    if known:
        assert codec.parse(raw)["type"] == kind
    else:
        with pytest.raises(FormatTooNew):
            codec.parse(raw)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 2**63, -(2**63) - 1, "\ud800", {"\udfff": 1}, [[["\ud800"]]]],
)
def test_payload_json_cannot_carry_is_refused(value: object) -> None:
    """Nothing is turned into null or lost without a word."""
    with pytest.raises(ValueError, match="meta"):
        codec.check_json({"k": value}, name="meta")


@pytest.mark.parametrize("value", [{1: 2}, object(), b"x", {"a": {3}}])
def test_payload_of_wrong_type_is_refused(value: object) -> None:
    """Only JSON types are JSON."""
    with pytest.raises(TypeError):
        codec.check_json(value, name="meta")


def test_payload_nested_too_deep_is_refused() -> None:
    """32 levels pass, 33 do not."""
    value: object = 1
    for _ in range(32):
        value = [value]
    codec.check_json(value, name="meta")
    with pytest.raises(ValueError, match="deeper"):
        codec.check_json([value], name="meta")


def test_draft_over_the_limit_is_refused() -> None:
    """A line holds at most 64 KiB."""
    with pytest.raises(ValueError, match="at most 65536"):
        codec.draft("worker.updated", "w", b"{}", {"meta": {"k": "x" * 70_000}})


def test_states_damaged_anywhere_are_unreadable() -> None:
    """A torn state file is never taken for a whole one."""
    state = heads.AppendState(b"b" * 16, 1, 7, 0, 2, 2, 3, b"h" * 32, sealed=True)
    head = heads.DurableHead(9, b"b" * 16, 1, 2, 2, 3, place=4, poisoned=True, errno=5)
    assert heads.decode_append_state(heads.encode_append_state(state)) == state
    assert heads.decode_durable_head(heads.encode_durable_head(head)) == head
    slots = cursors.encode_slot(Slot(4, 7)), cursors.encode_slot(Slot(3, 9))
    assert cursors.decode_slots(b"".join(slots)) == cursors.decode_slots(b"".join(slots[::-1]))
    assert cursors.decode_slots(slots[0][:-1] + b"x" + slots[1]) == Slot(3, 9)
    for data, decode in (
        (heads.encode_append_state(state), heads.decode_append_state),
        (heads.encode_durable_head(head), heads.decode_durable_head),
        (cursors.encode_slot(Slot(4, 7)), cursors.decode_slots),
    ):
        assert decode(data[:-1]) is None
        for index in range(len(data)):
            broken = bytearray(data)
            broken[index] ^= 1
            assert decode(bytes(broken)) is None


def test_snapshot_damaged_anywhere_is_refused() -> None:
    """Its sha256 covers every byte."""
    record: events.Record = {
        "sid": "w",
        "pid": 1,
        "sock": "",
        "version": "",
        "created_at": "2026-11-24T00:00:00Z",
        "state": "ready",
        "labels": {},
        "meta": {},
        "rev": 2,
        "updated_at": "2026-11-24T00:00:00Z",
        "registered_seq": 2,
        "generation": 1,
        "identity": None,
        "owner": None,
        "exit": None,
        "lease": None,
        "heartbeat_s": None,
        "sock_id": None,
    }
    snapshot = Snapshot(
        store="s", last_seq=2, last_hash="h", written_at="t", sessions=[record], ended=[], totals={}
    )
    data = encode_snapshot(snapshot)
    assert decode_snapshot(data).sessions == [record]
    for index in range(len(data)):
        broken = bytearray(data)
        broken[index] ^= 1
        with pytest.raises((codec.DocumentError, FormatTooNew)):
            decode_snapshot(bytes(broken))


def test_file_of_another_kind_is_not_taken_for_it() -> None:
    """Whole, and as long as one; and bytes behind the end make it another thing, too."""
    other = Shape(b"another!", "QQI").pack((4, 7, 0))
    assert len(other) == cursors.SLOT_BYTES
    assert cursors.decode_slots(other) is None
    head = heads.DurableHead(9, b"b" * 16, 1, 2, 2, 3, place=4, poisoned=False, errno=0)
    assert heads.decode_durable_head(heads.encode_durable_head(head) + b"x") is None
