"""`crewlog watch`: what is printed is acknowledged, what is lost is said."""

import subprocess
import sys
from pathlib import Path

import stores
from crewlog_compactor import compact
from stores import opened

CREWLOG = [sys.executable, "-c", "from crewlog_cli.main import main; main()"]


def test_printed_changes_are_acknowledged(place: Path) -> None:
    """Watch --cursor --count 1, again and again: each time the next one."""
    with opened(place) as reg:
        for sid in "abc":
            reg.register(sid)
    seqs = []
    for _ in range(3):
        done = subprocess.run(
            [*CREWLOG, "--dir", str(place), "watch", "--from-start", "--cursor", "c",
             "--count", "1", "--json"], check=True, capture_output=True, text=True,
        )  # fmt: skip
        seqs.append(done.stdout.split('"seq":')[1].split(",")[0])
    assert seqs == ["2", "3", "4"]


def test_lost_range_is_told_though_a_program_is_run(place: Path) -> None:
    """--exec hands over changes; a loss is said on stderr, with -q too."""
    with opened(place) as reg:
        reg.register("a")
        with reg.watch(after=1, cursor="c"):
            pass
        for number in range(8):
            reg.update("a", meta={"number": number})
            compact(reg, gc=False)
    stores.limit(cursor_hold_bytes=0)
    with opened(place) as tight:
        compact(tight, gc=False, keep_history=0)
    done = subprocess.run(
        [*CREWLOG, "--dir", str(place), "watch", "-q", "--cursor", "c", "--timeout", "1s",
         "--exec", "--", "cat"], check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "events 2 to" in done.stderr


def test_state_first_comes_first_for_the_command_too(place: Path) -> None:
    """Only the workers that were asked for; null where none was looked at."""
    import json

    with opened(place) as reg:
        reg.register("a")
        reg.register("b")

    def first(*arguments: str) -> dict[str, object]:
        done = subprocess.run(
            [*CREWLOG, "--dir", str(place), "watch", "--json", "--timeout", "0.1s", *arguments],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        answer: dict[str, object] = json.loads(done.stdout.splitlines()[0])
        return answer

    workers = first("--sid", "b")["workers"]
    assert isinstance(workers, list)
    assert [w["sid"] for w in workers] == ["b"]
    assert first("--now")["workers"] is None
