"""From one trace of the system calls of each command: no acknowledgement before its syncs.

This sees what crash tests mostly do not: a missing fsync of a directory hides behind the next sync
of anything on the same journal.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import crewlog
from crewlog.local import disk, layout
from procs import Crew, kill

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("strace") is None, reason="strace is not installed (Debian: strace)"
    ),
]

MAIN = "from crewlog_cli.main import main; main()"
CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (\d+)")
FD = re.compile(r"^(\d+)<([^>]*)>")
AT = re.compile(r'(\d+|AT_FDCWD)<([^>]*)>, "([^"]*)"')


class Trace:
    """Plays a trace through and notes every acknowledgement that came too early."""

    def __init__(self, place: Path) -> None:
        """Watch the store at `place`."""
        self.place = str(place)
        self.unsynced: set[str] = set()
        self.unnamed: set[str] = set()
        self.copied: set[str] = set()  # segments whose unsynced end the redo holds, unsynced
        self.early: list[str] = []
        self.syncs = 0
        self.acknowledgements = 0

    def play(self, text: str) -> "Trace":
        """Read a whole trace."""
        for row in text.splitlines():
            match = CALL.match(row)
            if match is not None:
                self._call(match[1], match[2])
        return self

    def _call(self, name: str, arguments: str) -> None:
        fd = FD.match(arguments)
        if name in {"write", "pwrite64"} and fd is not None:
            self._written(int(fd[1]), fd[2])
        elif name in {"fsync", "fdatasync"} and fd is not None:
            self.syncs += 1
            self.unsynced.discard(fd[2])
            if Path(fd[2]).name == layout.REDO:
                self.unsynced -= self.copied
            self.unnamed.discard(fd[2])
        elif name == "unlinkat" and layout.POISON in arguments:
            self._acknowledged("the end of a repair")
        elif name in {"linkat", "renameat", "renameat2"}:
            (_, source_at, source), (_, at, new) = AT.findall(arguments)
            if at.startswith(self.place):
                if f"{source_at}/{source}" in self.unsynced:
                    self.early.append(f"{new} got its name before its bytes were synced")
                if not new.startswith(disk.TEMPORARY_PREFIX) and new != layout.SNAPSHOT_PREV:
                    self.unnamed.add(at)

    def _written(self, fd: int, path: str) -> None:
        if path.startswith(self.place) and Path(path).name not in {"append.state", "durable"}:
            self.unsynced.add(path)
            self.copied.discard(path)
        if Path(path).name == layout.REDO:
            self.copied = {p for p in self.unsynced if p.endswith(".jsonl")}
        if path.endswith("/head/durable"):
            self._acknowledged("head/durable", segments_only=True)
        if fd == 1:
            self._acknowledged("stdout")

    def _acknowledged(self, what: str, *, segments_only: bool = False) -> None:
        self.acknowledgements += 1
        late = {p for p in self.unsynced if p.endswith(".jsonl") or not segments_only}
        if late:
            self.early.append(f"{what} was written before a sync of {sorted(late)}")
        if self.unnamed and not segments_only:
            self.early.append(f"{what} was written before a sync of {sorted(self.unnamed)}")


def traced(place: Path, tmp_path: Path, *arguments: object, code: str = MAIN) -> Trace:
    """Run a command under strace and play its trace."""
    out = tmp_path / "trace"
    subprocess.run(
        ["strace", "-f", "-y", "-o", str(out),
         "-e", "trace=write,pwrite64,fsync,fdatasync,linkat,renameat,renameat2,unlinkat",
         sys.executable, "-c", code, "--dir", str(place), *map(str, arguments)],
        check=True, stdout=subprocess.PIPE, timeout=120,
    )  # fmt: skip
    return Trace(place).play(out.read_text())


def test_every_command_acknowledges_after_its_syncs(
    place: Path, tmp_path: Path, crew: Crew
) -> None:
    """Creation, changes, rotation, compaction, retention, cursors, import, stop, repair."""
    worker, ended = crew.sleeper(), crew.sleeper()
    old = tmp_path / "old.json"
    entry = {"sid": "old", "pid": worker.pid, "sock": "", "version": "", "created_at": ""}
    old.write_text(json.dumps({"sessions": [entry]}))
    commands: list[tuple[object, ...]] = [
        ("register", "a", "--pid", worker.pid),
        ("update", "a", "--state", "ready"),
        ("import", old),
        ("run", "r", "--", "true"),
        ("compact",),
        ("remove", "a", "--reason", "x"),
        ("compact",),
        ("gc", "--keep", "0s"),
        ("compact",),
        ("run", "leased", "--lease", "--", "true"),
        ("register", "s", "--pid", crew.sleeper().pid),
        ("stop", "s"),
        ("register", "d", "--pid", ended.pid),
        ("gc", "--plan", tmp_path / "plan"),
        ("gc", "--apply", tmp_path / "plan"),
        ("cursor", "set", "c", 1),
        ("cursor", "rm", "c"),
        ("compact", "--yes", "--keep-history", "0s"),
    ]
    for command in commands:
        if command == ("gc", "--plan", tmp_path / "plan"):
            kill(ended)
            traced(place, tmp_path, *command)  # changes nothing in the store
            continue
        trace = traced(place, tmp_path, *command)
        assert trace.early == [], command
        assert trace.acknowledgements > 0, command
        assert trace.syncs > 0, command
    with crewlog.open(place) as reg:
        assert reg.last_seq > 10
    (place / layout.POISON).touch(mode=0o600)
    trace = traced(place, tmp_path, "repair", "--yes")
    assert trace.early == []
    assert trace.syncs > 5


@pytest.mark.parametrize("forgotten", ["sync", "sync_directory"])
def test_trace_finds_a_forgotten_sync(place: Path, tmp_path: Path, forgotten: str) -> None:
    """Negative control: a disk that leaves one kind of sync out."""
    code = f"from crewlog.local.disk import Disk\nDisk.{forgotten} = lambda self, fd: None\n{MAIN}"
    traced(place, tmp_path, "register", "a", "--pid", 1)
    trace = traced(place, tmp_path, "update", "a", "--state", "ready", code=code)
    trace.play("")
    compacted = traced(place, tmp_path, "compact", "--no-gc", code=code)
    assert trace.early or compacted.early
