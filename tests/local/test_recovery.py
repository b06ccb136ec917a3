"""The recovery table, exhaustively over small cases: acknowledged bytes are never cut."""

import itertools

from crewlog.local.recovery import Action, Known, decide
from crewlog.model.chain import Scan


def test_every_combination_keeps_what_was_durable() -> None:
    """Over all small cases: no cut or use lies below any proof, and only torn tails are cut."""
    counts = dict.fromkeys(Action, 0)
    for end, extra, sealed, reason, synced, segment, head_end, head_seq, snapshot_seq in (
        itertools.product(
            (0, 10, 20), (0, 5), (False, True), (None, "torn"), (0, 10, 20, 25), (0, 1, 2, 3),
            (0, 10, 20, 25), (0, 5, 6), (0, 5, 6),
        )
    ):  # fmt: skip
        if reason is None and extra:
            continue  # a valid prefix that is the whole file
        scan = Scan(
            end=end, size=end + extra, seq=5, hash=b"", sealed=sealed, reason=reason, synced=synced
        )
        known = Known(
            head_segment=segment, head_end=head_end, head_seq=head_seq, snapshot_seq=snapshot_seq
        )
        decision = decide(2, scan, known)
        counts[decision.action] += 1
        proven = max(synced, head_end if segment == 2 else 0)
        below = proven > end or head_seq > 5 or snapshot_seq > 5 or segment > 2
        if decision.action in {Action.USE, Action.CUT}:
            assert not below, (scan, known, decision)
            assert (decision.action is Action.CUT) == (reason is not None)
        else:
            assert below or end == 0 or (reason is not None and sealed), (scan, known, decision)
        assert decision.proof
    assert all(counts.values()), counts
