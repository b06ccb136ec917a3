"""A sieve finds exactly the lines that looking at each one would find."""

from hypothesis import given, settings
from hypothesis import strategies as st

from crewlog.local import segments
from crewlog.local.segments import Segment, start_of, walk
from crewlog.model import codec
from crewlog.model.sieve import Sieve

_KINDS = ["worker.registered", "worker.exited", "_seal"]
_SIDS = ["a", "ab", "web-1", "web-10", ""]


def _segment(rows: list[tuple[str, str, int, int]]) -> bytes:
    """Return whole lines with these types, sids, times and sizes."""
    data, prev = b"", b"\0" * 32
    for seq, (kind, sid, minute, size) in enumerate(rows, start=1):
        part = codec.draft(kind, sid, b"{}", {"x": "y" * size})
        ts = f"2026-11-24T07:{minute:02d}:00.000000Z"
        raw = codec.line(part, seq=seq, ts=ts, synced=0, prev=prev, batch=None)
        prev = codec.digest(raw[:-1])
        data += raw
    return data


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(_KINDS),
            st.sampled_from(_SIDS),
            st.integers(0, 59),
            st.integers(0, 300),
        ),
        max_size=40,
    ),
    sids=st.lists(st.sampled_from(_SIDS), min_size=1, max_size=3) | st.none(),
    since=st.integers(0, 59) | st.none(),
    chunk=st.integers(700, 5000),
)
def test_sieve_finds_what_a_look_at_each_line_finds(
    rows: list[tuple[str, str, int, int]], sids: list[str] | None, since: int | None, chunk: int
) -> None:
    """Whatever the lines, the needles, the time and the size of a read are."""
    stamp = "" if since is None else f"2026-11-24T07:{since:02d}:00.000000Z"
    needles = None if sids is None else [b'"sid":"%b"' % sid.encode() for sid in sids]
    expected = [
        seq
        for seq, (_, sid, minute, _) in enumerate(rows, start=1)
        if (sids is None or sid in sids) and (since is None or minute >= since)
    ]
    source = Segment(1, "memory", data=_segment(rows))
    sieve = Sieve(needles, stamp.encode())
    before, segments.SIEVE_BYTES = segments.SIEVE_BYTES, chunk  # type: ignore[misc]
    try:
        steps = list(walk(source, start_of(1), sieve=sieve))
    finally:
        segments.SIEVE_BYTES = before  # type: ignore[misc]
    assert [seq for line, _, _, seq in steps if line is not None] == expected
    assert [line["seq"] for line, *_ in steps if line is not None] == expected
    if rows:
        assert steps[-1][2:] == (source.size(), len(rows))
