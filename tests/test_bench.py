"""The benchmarks run: every figure is produced. What they measure is no test's business."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.alone]

ROOT = Path(__file__).parent.parent
KEYS = ["about", "P1", "P1a", "P1c", "P1b", "P2", "P2b", "P3", "P4", "P5", "P6", "P6b", "P11",
        "P7", "P8", "P8b", "P8c", "P8d", "P8e", "P9", "P9b", "P9c", "P10"]  # fmt: skip
if shutil.which("etcd"):
    KEYS += ["P12", "P12b", "P12c", "P12d"]


def test_every_figure_is_produced_and_the_page_written(tmp_path: Path) -> None:
    """From next to nothing, with the peers that are here."""
    out = tmp_path / "figures.jsonl"
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/run.py"), "--smoke", "--dir", str(tmp_path),
         "--out", str(out)], check=False, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(row) for row in out.read_text().splitlines()]
    assert [row["key"] for row in rows] == KEYS
    for row in rows[1:]:
        assert len(row) > 2, row
        assert all(value > 0 for value in row.get("median", {}).values()), row
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "performance-notes.md").write_text("notes\n")
    write = [sys.executable, str(ROOT / "bench/page.py"), str(out), str(docs), "--slow", str(out)]
    subprocess.run([*write, "--slow-disk", "a loop device"], check=True)
    page = (docs / "performance.md").read_text()
    assert "| crewlog |" in page
    assert "The same on a loop device." in page
    assert "### P1: changes/s, one process" in page
    assert (docs / "performance-p1.svg").read_text().startswith("<svg ")
