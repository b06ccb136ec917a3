"""`crewlog run`: how it ends, and whose end it records."""

import signal
import subprocess
import sys
from pathlib import Path

from procs import Crew, until
from stores import opened

CREWLOG = [sys.executable, "-c", "from crewlog_cli.main import main; main()"]


def test_run_never_records_its_exit_for_a_stranger(place: Path, crew: Crew) -> None:
    """The sid was given to another worker meanwhile: that one is not ours to end."""
    with opened(place) as reg:
        process = subprocess.Popen(
            [*CREWLOG, "--dir", str(place), "run", "job", "--", "sh", "-c", "read x; exit 7"],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        until(lambda: reg.get("job") is not None)
        reg.remove("job", reason="handed over")
        reg.register("job", pid=crew.sleeper().pid, ready=True)
        process.send_signal(signal.SIGHUP)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) in {7, 128 + signal.SIGHUP}
        assert process.stderr is not None
        assert b"no longer ours" in process.stderr.read()
        process.stderr.close()
        worker = reg.get("job")
        assert worker is not None
        assert worker.state == "ready"


def test_run_ends_as_its_program_though_the_worker_is_gone(place: Path) -> None:
    """The exit code is the program's, whatever became of the record."""
    with opened(place) as reg:
        process = subprocess.Popen(
            [*CREWLOG, "--dir", str(place), "run", "job", "--", "sh", "-c", "read x; exit 7"],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until(lambda: reg.get("job") is not None)
        reg.remove("job", reason="x")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 7
