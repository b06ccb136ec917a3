"""Records of workers: the ended are kept as rows, and nobody can tell but by the memory."""

import tracemalloc
from typing import cast

import pytest

from crewlog.errors import SnapshotCorrupt
from crewlog.model import codec, records
from crewlog.model.events import Record
from crewlog.model.records import Ended, Records, checked, keys_of, merged
from crewlog.model.snapshot import Snapshot, decode_snapshot, encode_snapshot


def record(sid: str, seq: int, state: str = "exited", **more: object) -> Record:
    """Return a record as a fold makes it."""
    made = {
        "sid": sid, "pid": 1, "sock": "", "version": "", "created_at": "2026-01-01T00:00:00.0Z",
        "state": state, "labels": {}, "meta": {}, "rev": seq + 1,
        "updated_at": "2026-01-01T00:00:01.0Z", "registered_seq": seq, "generation": 1,
        "identity": None, "owner": None, "exit": None, "lease": None, "heartbeat_s": None,
        "sock_id": None, **more,
    }  # fmt: skip
    return cast("Record", made)


def test_the_ended_are_small_and_read_as_they_were() -> None:
    """Each is a row of its own size; what is asked for equals what was put."""
    held = Records()
    ended = [record(f"w-{n}", n, meta={"n": [n]}) for n in range(100)]
    for one in ended:
        held.put(one["sid"], one)
    held.put("here", record("here", 100, state="ready"))
    assert [held[f"w-{n}"] for n in range(100)] == ended
    assert list(held.values()) == [*ended, record("here", 100, state="ready")]
    assert held.ended() == ended
    assert [one["sid"] for one in held.living()] == ["here"]
    assert held.is_final("w-1")
    assert not held.is_final("here")
    copied = held.copy()
    copied.drop("w-1")
    assert ("w-1" in held, "w-1" in copied, len(copied)) == (True, False, 100)


def test_a_row_does_not_hold_on_to_the_room_it_was_written_in() -> None:
    """What is allocated, not what a row says of its size."""
    held = Records()
    ended = [record(f"w-{n}", n) for n in range(500)]
    tracemalloc.start()
    try:
        for one in ended:
            held.put(one["sid"], one)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken / len(ended) < 1000


def test_rows_are_merged_in_order_of_registration() -> None:
    """Whatever the order in which they ended, and whatever their texts say."""
    hostile = {"registered_seq": 99, "x": '"registered_seq":98,"generation":1,"identity":'}
    ended = [
        record("b", 5, meta=hostile, exit={"cause": '"registered_seq":97,'}),
        record("ä-ö", 2),
        record("c", 9, argv=['"registered_seq":3,']),
    ]
    rows = Ended([codec.dump(one) for one in ended])
    assert [keys_of(row) for row in rows.rows] == [(5, "b"), (2, "ä-ö"), (9, "c")]
    living = [record("a", 7, state="ready"), record("d", 1, state="ready")]
    for given in (rows, ended):
        order = merged(living, given)
        assert list(order) == ["d", "ä-ö", "b", "a", "c"]
        assert order == {one["sid"]: one for one in (*living, *ended)}


def test_a_row_of_another_layout_is_parsed() -> None:
    """A version that writes keys in another order, or escapes them, is read all the same."""
    turned = codec.dump(dict(reversed(record("w", 4).items())))
    escaped = codec.dump(record("w", 4)).replace(b'"w"', b'"\\u0077"')
    assert (keys_of(turned), keys_of(escaped)) == (None, None)
    assert Ended([turned, escaped]).keys() == [(4, "w"), (4, "w")]


@pytest.mark.parametrize("row", [b"", b"{}", b'{"sid":"a"}', b'{"sid":"a","registered_seq":1,'])
def test_what_is_no_record_is_told_as_damage(row: bytes) -> None:
    """Though a right hash may cover it."""
    with pytest.raises(SnapshotCorrupt, match=r"registry\.json"):
        records.record_of(row)
    with pytest.raises(SnapshotCorrupt, match=r"registry\.json"):
        Ended([row]).keys()


GOOD = codec.dump(record("w", 4))


@pytest.mark.parametrize(
    ("rows", "outcome"),
    [
        ([GOOD, codec.dump(record("v", 9))], ["w", "v"]),
        ([GOOD + b"," + codec.dump(record("v", 9))], ["w", "v"]),  # two on one line
        ([GOOD.replace(b'"pid":1,', b"")], "no proper 'pid'"),
        ([GOOD.replace(b'"w"', b'"\xff"')], "not JSON"),
        ([GOOD + b","], "not JSON"),
        ([b"7"], "not an object"),
        ([GOOD.replace(b'"exited"', b'"ready"')], ["w"]),
    ],
)
def test_a_snapshot_is_checked_as_it_is_read(rows: list[bytes], outcome: list[str] | str) -> None:
    """What is not plainly a worker a line is parsed as a whole: nobody is lost by the short way."""
    whole = Snapshot(
        store="s",
        last_seq=2,
        last_hash="h",
        written_at="t",
        sessions=[],
        ended=Ended(rows),
        totals={},
    )
    data = encode_snapshot(whole)
    if isinstance(outcome, str):
        with pytest.raises(codec.DocumentError, match=outcome):
            decode_snapshot(data)
    else:
        assert [one["sid"] for one in decode_snapshot(data).ended] == outcome
        assert list(decode_snapshot(data).records()) == outcome


def test_a_shape_that_was_checked_lets_no_other_pass() -> None:
    """Types count, and keys; what an old record lacked is put in each time."""
    whole = record("w", 1)
    checked(dict(whole), "it")
    for key, wrong in (("pid", "1"), ("labels", []), ("lease", 5), ("sid", None)):
        with pytest.raises(codec.DocumentError, match=key):
            checked({**whole, key: wrong}, "it")
    old = {key: value for key, value in whole.items() if key != "lease"}
    for _ in range(2):
        assert checked(dict(old), "it")["lease"] is None
    with pytest.raises(codec.DocumentError, match="no proper 'ok_codes'"):
        checked({**whole, "ok_codes": 3}, "it")
