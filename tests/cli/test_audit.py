"""The audit commands: history, ls and show in the past, diff, stats, metrics, export."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import crewlog
from commands import Cli
from crewlog.local import layout
from crewlog.registry import Registry
from crewlog_cli import main
from crewlog_compactor import compact
from procs import Crew, files, kill


def _grown(reg: Registry, workers: int) -> None:
    for number in range(workers):
        sid = f"w{number}"
        reg.register(sid, pid=os.getpid(), labels={"n": str(number)})
        if number % 2:
            reg.exited(sid, code=number % 4)


def test_history_shows_the_last_n_and_newest_first(cli: Cli, reg: Registry) -> None:
    """-n takes the end of the history, -r turns it round, and both go with every filter."""
    _grown(reg, 10)
    rows = [json.loads(row) for row in cli("history", "--json").stdout.splitlines()]
    seqs = [row["seq"] for row in rows]

    def shown(*arguments: object) -> list[int]:
        done = cli("history", "--json", *arguments)
        assert "history covers" in done.stderr
        return [json.loads(row)["seq"] for row in done.stdout.splitlines()]

    assert shown("-n", 3) == seqs[-3:]
    assert shown("-n", 3, "-r") == seqs[-1:-4:-1]
    assert shown("-r") == seqs[::-1]
    ends = [row["seq"] for row in rows if row["type"] == "worker.exited"]
    assert shown("--type", "worker.exited", "-n", 2) == ends[-2:]
    assert shown("--after", seqs[4], "-n", 100) == seqs[5:]
    assert shown("--actor", "nobody-of-that-name", "-n", 5) == []


def test_ls_and_show_in_the_past(cli: Cli, reg: Registry) -> None:
    """As it was at a seq or a time; who has gone since is there, and nothing is probed."""
    worker = reg.register("a", pid=os.getpid(), labels={"k": "old"})
    reg.update("a", labels={"k": "new"})
    reg.exited("a", code=0)
    answer = cli.json("ls", "--at", worker.rev)
    workers = answer["workers"]
    assert isinstance(workers, list)
    assert (answer["seq"], workers[0]["labels"]) == (worker.rev, {"k": "old"})
    assert workers[0]["liveness"] is None
    assert answer["until"] is not None
    assert cli("ls", "--sids").stdout == ""
    done = cli("ls", "--sids", "--at", worker.rev)
    assert done.stdout == "a\n"
    assert f"after seq {worker.rev}" in done.stderr
    shown = cli.json("show", "a", "--at", worker.rev)
    events = shown["events"]
    assert isinstance(events, list)
    assert [event["type"] for event in events] == ["worker.registered"]
    assert "old" in cli("show", "a", "--at", worker.rev).stdout
    cli("show", "a", "--at", 0, code=1)
    assert cli("ls", "--sids", "--at", "1h").stdout == ""
    cli("ls", "--at", "gestern", code=2)


def test_diff_names_who_came_changed_and_went(cli: Cli, reg: Registry) -> None:
    """Between two seqs; 1 where nothing changed; a --from after --to is a usage error."""
    reg.register("gone", pid=os.getpid())
    first = reg.register("changed", pid=os.getpid(), labels={"k": "1"})
    reg.exited("gone", code=0)
    start = reg.last_seq
    reg.update("changed", labels={"k": "2"})
    reg.register("new", pid=os.getpid())
    done = cli("diff", "--from", start)
    assert re.search(r"\+ +new +starting", done.stdout)
    assert re.search(r"~ +changed +labels.k 1 → 2", done.stdout)
    answer = cli.json("diff", "--from", first.rev, "--to", start)
    changed = answer["changed"]
    assert isinstance(changed, list)
    assert [pair["after"]["state"] for pair in changed] == ["exited"]
    cli("diff", "--from", start, "--to", start, code=1)
    cli("diff", "--from", reg.last_seq, "--to", start, code=2)


@pytest.mark.limits(segment_bytes=4096)
def test_diff_across_retention_is_an_honest_no(cli: Cli, reg: Registry) -> None:
    """What is no longer kept is said to be so: 1, with what to do."""
    for _ in range(3):
        _grown(reg, 20)
        for worker in reg.workers():
            reg.remove(worker.sid, reason="done")
        compact(reg, gc=False)
    cli("compact", "--no-gc", "--yes", "--keep-history", "10events")
    done = cli("diff", "--from", 3, code=1)
    assert "no longer kept" in done.stderr


def test_stats_tell_of_lifetimes_ends_and_flapping(cli: Cli, reg: Registry) -> None:
    """Crash ratio, quantiles, causes, restarts; a sid that starts three times in ten minutes."""
    for code in (0, 1, 1):
        reg.register("flaps", pid=os.getpid())
        reg.exited("flaps", code=code)
    reg.register("lives", pid=os.getpid())
    answer = cli.json("stats")
    lives = answer["lives"]
    assert isinstance(lives, dict)
    assert (lives["started"], lives["ended"], lives["crashed"]) == (4, 3, 2)
    assert lives["crash_ratio"] == pytest.approx(0.6667)
    assert lives["causes"] == {"code 1": 2, "code 0": 1}
    assert lives["restarts"] == {"flaps": 2}
    assert lives["flapping"] == {"flaps": 3}
    assert 0 <= lives["lifetime_p50_s"] <= lives["lifetime_p95_s"]
    assert answer["liveness"] == {"alive": 1, "dead": 0, "unknown": 0}
    output = cli("stats").stdout
    assert "FLAPPING\n  flaps  3 starts" in output
    assert "66.7%" in output
    later = cli.json("stats", "--since", "now")["lives"]
    assert isinstance(later, dict)
    assert later["started"] == 0


_SAMPLE = re.compile(r'crewlog_[a-z_]+(?:\{[a-z]+="[a-z._]+"\})? -?[0-9.e+]+')


def _metrics(path: Path) -> dict[str, float]:
    """Parse the text format, strictly."""
    values: dict[str, float] = {}
    declared = set()
    for row in path.read_text().splitlines():
        if row.startswith("# TYPE "):
            declared.add(row.split()[2])
        elif not row.startswith("# HELP "):
            assert _SAMPLE.fullmatch(row), row
            name, _, value = row.rpartition(" ")
            assert name.partition("{")[0] in declared, "declared before its samples"
            values[name] = float(value)
    return values


@pytest.mark.limits(segment_bytes=4096)
def test_metrics_never_step_back(cli: Cli, reg: Registry, tmp_path: Path) -> None:
    """Totals survive compaction and retention; the file is replaced whole and readable by all."""
    path = tmp_path / "crewlog.prom"
    _grown(reg, 30)
    cli("stats", "--prometheus", path)
    before = _metrics(path)
    assert before['crewlog_events_total{type="worker.registered"}'] == 30
    assert before['crewlog_workers{state="starting"}'] == 15
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    for _ in range(3):
        reg.update("w0", labels={"x": str(reg.last_seq)})
        cli("compact", "-q", "--no-gc", "--yes", "--keep-history", "0events", "--prometheus", path)
    after = _metrics(path)
    assert after['crewlog_events_total{type="worker.registered"}'] == 30
    assert after["crewlog_compaction_success"] == 1
    assert after["crewlog_snapshot_seq"] > 0
    for name, value in before.items():
        if name.startswith(("crewlog_events_total", "crewlog_last_seq")):
            assert after[name] >= value
    assert "w0" not in path.read_text(), "no worker is named"
    cli("stats", "--prometheus", tmp_path / "no" / "where.prom", code=2)


def test_export_of_each_format_is_whole(cli: Cli, reg: Registry) -> None:
    """Every event once, in order; formats as their readers want them."""
    _grown(reg, 6)
    reg.register("sum", pid=os.getpid(), version="=1+1")
    seqs = [event.seq for event in reg.history()]
    rows = [json.loads(row) for row in cli("export").stdout.splitlines()]
    assert [row["seq"] for row in rows] == seqs
    table = list(csv.DictReader(io.StringIO(cli("export", "--format", "csv").stdout)))
    assert [int(row["seq"]) for row in table] == seqs
    assert json.loads(table[0]["data"])["pid"] == os.getpid()
    clouds = [json.loads(row) for row in
              cli("export", "--format", "cloudevents").stdout.splitlines()]  # fmt: skip
    for event, seq in zip(clouds, seqs, strict=True):
        assert event["specversion"] == "1.0"
        assert (event["id"], int(event["sequence"])) == (str(seq), seq)
        assert re.fullmatch(r"urn:crewlog:[0-9a-f-]{36}", event["source"])
        assert event["type"].startswith("dev.crewlog.worker.")
    assert len({(event["source"], event["id"]) for event in clouds}) == len(clouds)
    assert len(cli("export", "--sid", "w1").stdout.splitlines()) == 2


@pytest.mark.limits(segment_bytes=4096)
@pytest.mark.parametrize(("packing", "tool"), [("gzip", "zcat"), ("zstd", "zstdcat")])
def test_archive_is_read_by_everybodys_tools(
    cli: Cli, reg: Registry, packing: str, tool: str
) -> None:
    """Zcat or zstdcat, and jq: the lines as they were written."""
    for name in (tool, "jq"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    for _ in range(3):
        _grown(reg, 20)
        for number in range(20):
            if number % 2 == 0:
                reg.remove(f"w{number}", reason="the next round")
        cli("compact", "--no-gc", "--pack", packing)
    packed = sorted((cli.place / layout.ARCHIVE).glob("0*"))
    assert len(packed) > 1
    line = f"{tool} {shlex.join(map(str, packed))} | jq -r 'select(.sid == \"w1\") | .seq'"
    output = subprocess.run(["sh", "-c", line], check=True, capture_output=True, text=True).stdout
    kept = files(reg).segments.in_log()[0]  # what is not archived begins here
    assert [int(row) for row in output.split()] == [
        event.seq for event in reg.history(sid="w1") if event.seq < kept
    ]


def test_export_of_a_formula_is_text_in_a_spreadsheet(place: Path, cli: Cli) -> None:
    """A cell that begins like a formula is quoted; what JSON cells hold cannot begin so."""
    with crewlog.open(place, actor="=cmd|' /C calc'!A0") as reg:
        reg.register("a", pid=os.getpid())
    table = list(csv.DictReader(io.StringIO(cli("export", "--format", "csv").stdout)))
    assert table[0]["name"] == "'=cmd|' /C calc'!A0"


def test_crashed_is_what_nobody_had_asked_for(cli: Cli, reg: Registry, crew: Crew) -> None:
    """A bad code, a signal, a loss; not an orderly end, nor one that was asked for."""
    for sid in ("bad", "killed", "fine", "asked"):
        reg.register(sid)
    reg.exited("bad", code=3)
    reg.exited("killed", signal=9)
    reg.exited("fine", code=0)
    reg.update("asked", state="stopping", reason="x")
    reg.exited("asked", signal=15)
    lost = crew.sleeper()
    reg.register("lost", pid=lost.pid)
    kill(lost)
    compact(reg)
    rows = cli("history", "--crashed", "--json").stdout.splitlines()
    assert [json.loads(row)["sid"] for row in rows] == ["bad", "killed", "lost"]
    seen = cli("watch", "--from-start", "--crashed", "--count", "3", "--json").stdout.splitlines()
    assert [json.loads(row)["sid"] for row in seen if '"change"' in row] == [
        "bad",
        "killed",
        "lost",
    ]
    assert [e.sid for e in reg.history() if e.crashed] == ["bad", "killed", "lost"]
    output = cli(
        "watch", "--cursor", "c", "--from-start", "--crashed", "--count", "3", "--exec", "--",
        sys.executable, "-c", "import json, sys; print(json.load(sys.stdin)['sid'])",
    ).stdout  # fmt: skip
    assert output.split() == ["bad", "killed", "lost"]


def test_history_of_a_worker_folds_no_log(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cost is that of the answer: no state is asked for, and no older part for a gap."""
    for number in range(5):
        reg.register(f"w{number}")
    asked: list[object] = []
    monkeypatch.setattr(Registry, "get", lambda _, sid: asked.append(sid))
    monkeypatch.setattr(Registry, "state", lambda _: asked.append("state"))
    real = Registry.history

    def history(self: Registry, **options: object) -> object:
        if options.get("types") == ["_gap"]:
            asked.append(("gap after", options["after"]))
        return real(self, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Registry, "history", history)
    assert main.run(["-d", reg.where, "history", "w3"]) == 0
    assert main.run(["-d", reg.where, "history", "-n", "2"]) == 0
    assert asked == [("gap after", None), ("gap after", reg.last_seq - 2)]
    assert "w3" in capsys.readouterr().out
