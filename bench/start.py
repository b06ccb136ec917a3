"""Time commands as whole processes, beside the bare interpreter and other commands (P10)."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import crewlog


def commands(home: Path, *, rounds: int) -> list[dict[str, float]]:
    """Milliseconds from start to end, in turn."""
    place = home / "started"
    with crewlog.open(place) as reg:
        for number in range(20):
            reg.register(f"w{number}")
    ours = str(Path(sys.executable).parent / "crewlog")
    contestants: dict[str, list[str]] = {
        "crewlog": [ours, "--dir", str(place), "ls"],
        "crewlog --version": [ours, "--version"],
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import click'": [sys.executable, "-c", "import click"],
    }
    if shutil.which("sqlite3"):
        contestants["sqlite3"] = ["sqlite3", str(home / "started.db"), "select 1"]
    return [
        {name: _took(lambda words=words: _run(words)) for name, words in contestants.items()}
        for _ in range(rounds)
    ]


def _run(words: list[str]) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"})


def _took(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3
