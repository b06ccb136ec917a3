"""History that goes by policy."""

from pathlib import Path

from crewlog.local import layout
from crewlog_compactor import compact, verify
from stores import opened


def test_idle_writer_survives_retention(place: Path) -> None:
    """What it had not read has gone; its next change goes through all the same."""
    with opened(place) as idle, opened(place) as other:
        idle.register("a")
        for number in range(5):
            other.register(f"w-{number}")
            compact(other, gc=False, keep_history=0)
        assert idle.update("a", state="ready").state == "ready"
        assert len(idle.workers()) == 6


def test_retention_killed_half_way_is_policy_not_loss(place: Path) -> None:
    """Some of what was announced is gone, some is still there."""
    with opened(place) as reg:
        reg.register("a")
        for number in range(6):
            reg.update("a", meta={"number": number})
            compact(reg, gc=False)
        kept = {p.name: p.read_bytes() for p in (place / layout.ARCHIVE).iterdir()}
        compact(reg, gc=False, keep_history=0)
    for name in sorted(kept)[2:]:
        path = place / layout.ARCHIVE / name
        path.write_bytes(kept[name])
        path.chmod(0o600)
    assert verify(place).findings == ()
