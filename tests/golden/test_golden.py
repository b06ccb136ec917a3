"""Show that files, help pages and JSON are the same as those of version 0.1, byte for byte."""

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

import crewlog
import scripted
from commands import CREWLOG, Cli
from crewlog.errors import DataDamaged
from crewlog_cli.main import COMMANDS
from crewlog_compactor import compact, repair, verify
from procs import until
from stores import opened

HERE = Path(__file__).parent


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Write the scripted store, once no thread of another test may look at its clock."""
    until(lambda: not any(t.name.startswith("crewlog-") for t in threading.enumerate()))
    place = tmp_path / "scripted"
    scripted.write(place)
    return place


def _golden(name: str) -> object:
    return json.loads((HERE / name).read_text())


def test_the_files_of_a_scripted_store_are_the_same(written: Path) -> None:
    """Log, archive, snapshots, states, cursor, quarantine: every byte that is not chance."""
    assert scripted.content(written) == _golden("content.json")


def test_every_answer_in_json_is_the_same(written: Path) -> None:
    """Forty commands with --json: stdout, stderr and exit code."""
    actual, golden = scripted.answers(written), _golden("answers.json")
    assert isinstance(golden, dict)
    assert {k: v for k, v in actual.items() if golden.get(k) != v} == {}
    assert actual.keys() == golden.keys()


def test_every_help_page_is_the_same() -> None:
    """The page of every command, at 80 columns."""

    def run(*words: str) -> str:
        return subprocess.run(
            [*CREWLOG, *filter(None, words)], check=True, capture_output=True, text=True,
            env={**os.environ, "COLUMNS": "80"},
        ).stdout  # fmt: skip

    assert scripted.helps(run, list(COMMANDS)) == (HERE / "help.txt").read_text()


def test_a_golden_file_that_differs_is_noticed(written: Path) -> None:
    """Negative control: one byte more in one file."""
    with (written / "archive" / "base.json").open("ab") as file:
        file.write(b" ")
    assert scripted.content(written) != _golden("content.json")


# -- a store of version 0.1 -----------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Unpack a store that version 0.1 wrote, in another boot on another machine."""
    with tarfile.open(HERE / "store-0.1.tar.gz") as packed:
        packed.extractall(tmp_path, filter="tar")  # which leaves 0700 and 0600 as they are
    return tmp_path / "store-0.1"


def test_a_store_of_version_0_1_is_read_verified_compacted_and_goes_on(old: Path) -> None:
    """Nothing of it is lost, and what follows is chained to it."""
    assert verify(old).ok
    with crewlog.open(old) as reg:
        before = list(reg.history())
        assert (reg.last_seq, len(before), before[0].sid) == (135, 99, "done")
        assert reg.get("w-4").labels["turn"] == "39"  # type: ignore[union-attr]
        reg.update("w-3", meta={"after": True})
        compact(reg)
        compact(reg, gc=False)
        reg.register("new", ready=True)
        assert [e.raw for e in reg.history()][: len(before)] == [e.raw for e in before]
        with reg.watch(cursor="mailer") as items:
            assert items.next(0) is not None
    assert verify(old).ok
    assert Cli(old).json("verify")["ok"] is True


_OLD_WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
import crewlog
from crewlog_compactor import compact
assert crewlog.__version__ == "0.1.0"
with crewlog.open(sys.argv[2]) as reg:
    reg.register("old", ready=True)
    print("open", flush=True)
    for n in range(200):
        reg.update("old", labels={"n": str(n)})
        if n == 100:
            try:
                compact(reg, gc=False)
            except crewlog.LockBusy:  # the other version compacts at this moment
                pass
    print(reg.get("new") is not None, flush=True)
"""


def test_both_versions_write_to_one_store_at_once(place: Path, tmp_path: Path) -> None:
    """Each sees what the other has written; no event is lost and the chain is whole."""
    with tarfile.open(HERE / "crewlog-0.1.0.tar.xz") as packed:
        packed.extractall(tmp_path / "old", filter="data")
    words = [sys.executable, "-c", _OLD_WRITER, str(tmp_path / "old"), str(place)]
    with (
        crewlog.open(place) as reg,
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as other,
    ):
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        reg.register("new", ready=True)
        for n in range(200):
            reg.update("new", labels={"n": str(n)})
            if n == 50:
                with contextlib.suppress(crewlog.LockBusy):  # the other one compacts
                    compact(reg, gc=False)
        assert other.stdout.read() == "True\n"
        counts = {sid: sum(e.sid == sid for e in reg.history()) for sid in ("old", "new")}
        assert counts == {"old": 201, "new": 201}
    assert other.returncode == 0
    assert verify(place).ok


_OLD_RETENTION = """
import sys
sys.path.insert(0, sys.argv[1])
import crewlog
from crewlog_compactor import KeepEvents, compact

with crewlog.open(sys.argv[2]) as reg:
    reg.update("a", meta={"old": True})
    print(compact(reg, gc=False, keep_history=KeepEvents(5)).dropped is not None)
"""


@pytest.mark.limits(archives_small=4)
def test_a_retention_of_version_0_1_takes_nothing_else_with_it(place: Path, tmp_path: Path) -> None:
    """It does not see merged archives, and drops what lies behind them: no more goes after it."""
    with tarfile.open(HERE / "crewlog-0.1.0.tar.xz") as packed:
        packed.extractall(tmp_path / "old", filter="data")
    with opened(place) as reg:
        reg.register("a")
        for n in range(14):
            reg.update("a", meta={"n": n})
            compact(reg, gc=False)
    merged = sorted(path.name for path in (place / "archive").glob("*-*.jsonl.gz"))
    assert merged
    words = [sys.executable, "-c", _OLD_RETENTION, str(tmp_path / "old"), str(place)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "True\n"
    with opened(place) as reg:
        reg.update("a", meta={"after": True})
        with contextlib.suppress(DataDamaged):
            compact(reg, gc=False)
        assert reg.first_seq == 1
        assert merged == sorted(path.name for path in (place / "archive").glob("*-*.jsonl.gz"))
        reg.update("a", meta={"later": True})
        losses = repair(place, yes=False).losses
        assert len(losses) == 1
        assert repair(place, yes=True, accept_loss=losses).done
        kept = [event.seq for event in reg.history()]
        compact(reg, gc=False)
        assert [event.seq for event in reg.history()] == kept
        assert kept[0] < losses[0][0]
    assert verify(place).ok
