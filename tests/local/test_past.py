"""States of the past that are kept on the way: a help, and never the truth."""

import gzip
import hashlib
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from crewlog.local import archive, layout, snapshot
from crewlog.local.layout import Directory, open_existing
from crewlog.local.segments import Segments
from crewlog.model.events import Worker
from crewlog.model.snapshot import Snapshot, encode_snapshot
from crewlog.registry import Registry
from crewlog_compactor import KeepEvents, compact, repair, verify
from faults import empty_redo
from stores import limit, opened

pytestmark = pytest.mark.limits(segment_bytes=3000, state_events=20)


def live(reg: Registry, rounds: int) -> None:
    """Let workers come, change, end and be followed by others of their name."""
    for number in range(rounds):
        sid = f"w-{number % 5}"
        reg.register(sid, labels={"n": str(number)})
        reg.update(sid, meta={"n": [number]})
        reg.exited(sid, code=number % 3)


def pasts(reg: Registry) -> dict[int, dict[str, Worker]]:
    """Return the state at each seq that is kept."""
    return {seq: dict(reg.at(seq).workers) for seq in range(reg.first_seq, reg.last_seq + 1)}


def states(place: Path) -> Directory:
    """Open the directory whose kept states are looked at."""
    return open_existing(place)


def test_a_past_state_is_the_same_with_them_and_without(reg: Registry, place: Path) -> None:
    """Those kept by one compaction of much, and by many of little."""
    live(reg, 60)
    compact(reg, gc=False)
    for _ in range(4):
        live(reg, 8)
        compact(reg, gc=False)
    there = snapshot.kept(states(place))
    assert len(there) >= 4
    assert all(b - a >= 20 for a, b in itertools.pairwise(there))
    with_them = pasts(reg)
    for seq in there:
        (place / layout.ARCHIVE / layout.state_name(seq)).unlink()
    assert pasts(reg) == with_them
    assert verify(place).findings == ()


def test_a_past_state_is_folded_from_the_nearest(
    reg: Registry, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the history before it is."""
    live(reg, 80)
    compact(reg, gc=False)
    begun: list[int] = []
    real = snapshot.refold

    def noted(segments: Segments, start: Snapshot, *rest: object, **more: object) -> object:
        begun.append(start.last_seq)
        return real(segments, start, *rest, **more)  # type: ignore[arg-type] # as it was called

    monkeypatch.setattr(snapshot, "refold", noted)
    there = snapshot.kept(states(place))
    for seq in (there[0] + 1, there[1] - 1, there[-1] + 3):
        begun.clear()
        reg.at(seq)
        assert begun == [max(kept for kept in there if kept <= seq)]


@pytest.mark.parametrize("harm", ["flipped", "empty", "another seq", "another history"])
def test_one_that_is_not_of_this_history_is_passed_over(
    reg: Registry, place: Path, harm: str
) -> None:
    """The answer is the same; verify names the file, and repair sets it aside."""
    live(reg, 70)
    compact(reg, gc=False)
    right = pasts(reg)
    there = snapshot.kept(states(place))
    harmed = place / layout.ARCHIVE / layout.state_name(there[-2])
    match harm:
        case "flipped":
            data = bytearray(harmed.read_bytes())
            data[len(data) // 2] ^= 1
            harmed.write_bytes(data)
        case "empty":
            harmed.write_bytes(b"")
        case "another seq":
            shutil.copyfile(harmed.with_name(layout.state_name(there[-3])), harmed)
        case _:
            rewrite(place, there[-2], last_hash="0" * 64, sessions=(), ended=())
    assert pasts(reg) == right
    (finding,) = verify(place).findings
    assert (finding.code, finding.path, finding.repairable) == (
        "kept_state_wrong", str(harmed), True
    )  # fmt: skip
    report = repair(place, yes=True)
    assert (report.done, report.losses, len(report.quarantined)) == (True, (), 1)
    assert verify(place).findings == ()
    assert there[-2] not in snapshot.kept(states(place))
    assert {seq: was for seq, was in pasts(reg).items() if seq in right} == right


@pytest.mark.parametrize("kind", ["link", "directory", "mode", "format", "far"])
def test_a_bad_one_breaks_nothing(reg: Registry, place: Path, kind: str) -> None:
    """The past is told, verify finds it, and repair does not stumble."""
    live(reg, 70)
    compact(reg, gc=False)
    right = pasts(reg)
    there = snapshot.kept(states(place))
    harmed = place / layout.ARCHIVE / layout.state_name(there[-2])
    match kind:
        case "far":
            far = place / layout.ARCHIVE / layout.state_name(10**20 - 1)
            shutil.copy(harmed, far)
        case "mode":
            harmed.chmod(0o644)
        case "format":
            text = gzip.decompress(harmed.read_bytes()).replace(b'{"format":1,', b'{"format":9,')
            whole = text[: text.rfind(b',"sha256"')]
            mark = hashlib.sha256(whole).hexdigest().encode()
            harmed.write_bytes(gzip.compress(b'%b,"sha256":"%b"}\n' % (whole, mark)))
        case _:
            harmed.unlink()
            harmed.mkdir() if kind == "directory" else harmed.symlink_to("/etc/passwd")
    assert pasts(reg) == right
    assert len(verify(place).findings) == 1
    assert repair(place, yes=True).done == (kind in {"format", "far"})
    if kind in {"format", "far"}:
        assert verify(place).findings == ()
    live(reg, 30)
    compact(reg, gc=False)
    assert snapshot.kept(states(place))[-1] > there[-1]


def rewrite(place: Path, seq: int, **changes: object) -> None:
    """Write a kept state anew, with a right hash of its own."""
    state = snapshot.read_kept(states(place), seq)
    assert state is not None
    data = encode_snapshot(replace(state, **changes))  # type: ignore[arg-type] # a test's changes
    (place / layout.ARCHIVE / layout.state_name(seq)).write_bytes(archive.pack(data, "gzip"))


def test_verify_holds_them_against_the_history(reg: Registry, place: Path) -> None:
    """A state of other workers, though its hash and its place in the chain are right."""
    live(reg, 70)
    compact(reg, gc=False)
    seq = snapshot.kept(states(place))[0]
    rewrite(place, seq, ended=())
    name = str(place / layout.ARCHIVE / layout.state_name(seq))
    assert [(f.code, f.path, f.seq) for f in verify(place).findings] == [
        ("snapshot_differs", name, seq)
    ]


def test_retention_takes_them_along(reg: Registry, place: Path) -> None:
    """What no line leads on from is gone; what is left still answers."""
    live(reg, 80)
    compact(reg, gc=False)
    live(reg, 80)
    compact(reg, gc=False)
    before = snapshot.kept(states(place))
    dropped = compact(reg, gc=False, keep_history=KeepEvents(150)).dropped
    assert dropped is not None
    after = snapshot.kept(states(place))
    assert after == [seq for seq in before if seq > dropped[1]]
    assert 0 < len(after) < len(before)
    assert set(pasts(reg)) == set(range(reg.first_seq, reg.last_seq + 1))
    assert verify(place).findings == ()


def test_none_is_kept_between_a_loss_and_its_repair(place: Path) -> None:
    """What the lost events would have explained is taken as it comes there."""
    limit(state_events=1)
    with opened(place) as reg:
        live(reg, 60)
    segments = sorted((place / layout.LOG).iterdir())
    harmed = segments[2]
    lines = harmed.read_bytes().splitlines(keepends=True)
    harmed.write_bytes(b"".join([*lines[:2], b"x" * 40 + b"\n", *lines[3:]]))
    empty_redo(place)
    losses = repair(place, yes=False).losses
    repaired = repair(place, yes=True, accept_loss=losses).seq
    with opened(place) as reg:
        live(reg, 20)
        compact(reg, gc=False)
        there = snapshot.kept(states(place))
        assert there
        assert all(seq < losses[0][0] or seq > repaired for seq in there)
        assert set(pasts(reg))
    assert verify(place).findings == ()


def test_few_are_kept_of_many_workers(reg: Registry, place: Path) -> None:
    """A state takes no more room than the events that it saves the reading of."""
    with reg.batch() as batch:
        for number in range(100):
            batch.register(f"many-{number}")
    compact(reg, gc=False)
    live(reg, 60)
    compact(reg, gc=False)
    there = snapshot.kept(states(place))
    assert there
    assert all(b - a >= 100 for a, b in itertools.pairwise([0, *there]))
