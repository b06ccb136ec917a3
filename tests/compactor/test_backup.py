"""A copy beside writers: what was acknowledged before it began is in it, or there is none."""

import os
from pathlib import Path

import pytest

import crewlog
from commands import Cli
from crewlog.errors import NotAStore
from crewlog.local import layout
from crewlog_compactor import backup, compact, verify
from procs import forked, slay, until
from stores import opened


def _write(place: Path, report: int) -> None:
    with opened(place) as reg:
        sid = f"w-{os.getpid()}"
        reg.register(sid)
        for number in range(1_000_000):
            reg.update(sid, meta={"n": number})
            os.write(report, f"{sid} {number}\n".encode())


@pytest.mark.limits(segment_bytes=20_000, redo_bytes=8192)
def test_backup_beside_writers_holds_all_that_was_acknowledged_before(
    place: Path, tmp_path: Path
) -> None:
    """Each of several copies opens as it is, verifies, and goes on."""
    got, up = os.pipe()
    os.set_blocking(got, False)
    pids = [forked(lambda: _write(place, up)) for _ in range(3)]
    try:
        acknowledged: dict[str, int] = {}
        for number in range(5):
            until(lambda: _heard(got, acknowledged))
            before = dict(acknowledged)
            report = backup(str(place), str(tmp_path / f"copy-{number}"))
            assert verify(tmp_path / f"copy-{number}").ok
            with crewlog.open(tmp_path / f"copy-{number}") as reg:
                assert reg.last_seq == report.last_seq
                for sid, count in before.items():
                    worker = reg.get(sid)
                    assert worker is not None
                    assert int(str(worker.meta["n"])) >= count
                reg.register("after")
            assert verify(tmp_path / f"copy-{number}").ok
    finally:
        for pid in pids:
            slay(pid)
        os.close(got)
        os.close(up)


def _heard(got: int, acknowledged: dict[str, int]) -> bool:
    try:
        rows = os.read(got, 1 << 20).decode().split("\n")
    except BlockingIOError:
        return False
    for row in rows[1:-1]:
        sid, _, number = row.partition(" ")
        acknowledged[sid] = int(number)
    return bool(acknowledged)


def test_backup_over_a_store_is_refused_and_changes_nothing(place: Path, tmp_path: Path) -> None:
    """An older one is not overwritten: it may be all that is left."""
    for where in (place, tmp_path / "old"):
        with crewlog.open(where) as reg:
            reg.register("a")
    before = (tmp_path / "old" / layout.STORE).read_bytes()
    with pytest.raises(NotAStore):
        backup(str(place), str(tmp_path / "old"))
    assert (tmp_path / "old" / layout.STORE).read_bytes() == before


def test_command_copies_and_says_what(cli: Cli, place: Path, tmp_path: Path) -> None:
    """And the copy holds archives and their states, too."""
    with crewlog.open(place) as reg:
        for number in range(5):
            reg.register(f"w{number}")
            compact(reg, gc=False)
    done = cli("backup", str(tmp_path / "copy"))
    assert "5 workers" in done.stdout
    assert cli.json("verify")["ok"] is True
    assert verify(tmp_path / "copy").ok
