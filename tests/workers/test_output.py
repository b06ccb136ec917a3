"""The output of workers: where it goes, and how it is found again."""

import os
import shutil
import sys
from pathlib import Path

import pytest

import crewlog
from crewlog.registry import Registry
from crewlog.workers import output
from procs import until


def over(reg: Registry, sid: str) -> crewlog.Worker:
    """Return a worker once its end is on record."""
    until(lambda: (now := reg.get(sid)) is not None and now.final)
    worker = reg.get(sid)
    assert worker is not None
    return worker


def said(worker: crewlog.Worker, lines: int | None = None) -> str:
    """Return what a worker wrote, as it is found now."""
    follower = output.Follower(worker.log, lines=lines)
    text = b""
    while part := follower.read():
        text += part
    follower.close()
    return text.decode()


def test_output_is_appended_and_each_life_finds_its_own(reg: Registry, tmp_path: Path) -> None:
    """Both streams, 0600; where it begins is on record."""
    log = tmp_path / "log"
    for number in (1, 2):
        reg.spawn("a", ["sh", "-c", f"echo out {number}; echo err {number} >&2"], log=log)
        worker = over(reg, "a")
        assert said(worker) == f"out {number}\nerr {number}\n"
        assert said(worker, 1) == f"err {number}\n"
    assert log.read_text() == "out 1\nerr 1\nout 2\nerr 2\n"
    assert log.stat().st_mode & 0o777 == 0o600
    assert worker.log is not None
    assert (worker.log.path, worker.log.offset) == (str(log), len("out 1\nerr 1\n"))


def test_renamed_and_cut_logs_are_found(reg: Registry, tmp_path: Path) -> None:
    """As logrotate does it: by create, and by copytruncate."""
    log = tmp_path / "log"
    reg.spawn("a", ["echo", "before"], log=log)
    worker = over(reg, "a")
    log.rename(tmp_path / "log.1")
    log.write_text("of another\n")
    assert said(worker) == "before\n"
    (tmp_path / "log.1").rename(tmp_path / "elsewhere")
    assert output.find(worker.log) is None if worker.log else False
    log.unlink()

    log.touch(0o600)
    os.chmod(log, 0o600)
    log.write_text("much that came before this life\n")
    reg.spawn("b", ["echo", "mine"], log=log)
    worker = over(reg, "b")
    shutil.copy(log, tmp_path / "log.2")
    os.truncate(log, 0)
    with log.open("a") as file:
        file.write("later\n")
    assert said(worker) == "later\n"
    assert worker.log is not None
    assert output.last_lines(worker.log, 5) == ["later"]


def test_long_log_is_set_aside_between_two_lives(reg: Registry, tmp_path: Path) -> None:
    """One old one is kept."""
    log = tmp_path / "log"
    for number in range(3):
        reg.spawn("a", ["echo", f"life {number} " + "x" * 40], log=log, log_bytes_max=20)
        over(reg, "a")
    assert log.read_text().startswith("life 2")
    assert (tmp_path / "log.1").read_text().startswith("life 1")
    assert sorted(p.name for p in tmp_path.glob("log*")) == ["log", "log.1"]


@pytest.mark.parametrize("what", ["link", "fifo", "open to others", "second name", "no place"])
def test_log_that_is_not_ours_alone_is_refused(reg: Registry, tmp_path: Path, what: str) -> None:
    """Nothing is started, nothing is written."""
    log, other = tmp_path / "log", tmp_path / "other"
    other.touch(0o600)
    match what:
        case "link":
            log.symlink_to(other)
        case "fifo":
            os.mkfifo(log, 0o600)
        case "open to others":
            log.touch()
            log.chmod(0o644)
        case "second name":
            os.link(other, log)
        case _:
            log = tmp_path / "missing" / "log"
    with pytest.raises(crewlog.CrewlogError) as refused:
        reg.spawn("a", ["echo", "x"], log=log)
    assert refused.value.remedy
    assert reg.get("a") is None
    assert other.read_text() == ""


@pytest.mark.parametrize(
    "wrong", [{"log": 3}, {"log": "l", "log_bytes_max": 0}, {"log_bytes_max": 5}, {"keep_tail": 5},
              {"log": "l", "keep_tail": 1 << 20}],
)  # fmt: skip
def test_wrong_logs_are_refused_at_once(reg: Registry, wrong: dict[str, object]) -> None:
    """Before anything is written."""
    with pytest.raises((TypeError, ValueError)):
        reg.spawn("a", ["true"], **wrong)  # type: ignore[arg-type] # wrong
    assert not reg.exists


def test_tail_of_a_crash_is_kept_where_that_was_asked_for(reg: Registry, tmp_path: Path) -> None:
    """Of a crash only; what is no text is made inert."""
    words = "for n in 1 2 3 4 5 6; do echo line $n; done; exit "
    reg.spawn("a", ["sh", "-c", words + "3"], log=tmp_path / "a", keep_tail=14)
    reg.spawn("b", ["sh", "-c", words + "0"], log=tmp_path / "b", keep_tail=14)
    ended = over(reg, "a").exit, over(reg, "b").exit
    assert ended[0] is not None
    assert ended[1] is not None
    assert (ended[0].tail, ended[1].tail) == ("line 5\nline 6\n", None)


def test_without_a_log_nothing_inherits_our_streams(reg: Registry) -> None:
    """A worker outlives whoever reads ours, and must not die of that."""
    reg.spawn(
        "a", ["sh", "-c", "for n in 1 2; do readlink /proc/$$/fd/$n; done > /dev/null; sleep 9"]
    )
    worker = reg.get("a")
    assert worker is not None
    if sys.platform == "linux":
        places = {os.readlink(f"/proc/{worker.pid}/fd/{n}") for n in (0, 2)}
        assert places == {"/dev/null"}
    reg.stop("a", reason="done")


def test_words_and_directory_are_recorded_where_that_was_asked_for(
    reg: Registry, tmp_path: Path
) -> None:
    """They may hold secrets: not by default."""
    worker = reg.spawn("a", ["sleep", "300"], record_argv=True, cwd=tmp_path)
    assert (worker.argv, worker.cwd) == (("sleep", "300"), str(tmp_path))
    assert reg.spawn("b", ["sleep", "300"]).argv is None
    mine = reg.register("c", record_argv=True)
    assert mine.argv is not None
    assert mine.cwd == os.getcwd()
    for sid in "ab":
        reg.stop(sid, reason="done")
