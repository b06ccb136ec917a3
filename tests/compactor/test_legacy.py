"""The six promises of the system that this one succeeds hold here too, and its defects do not."""

import json
import os
import stat
from datetime import timedelta
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import CrewlogError, LegacyCorrupt, SnapshotCorrupt, UnsafePermissions
from crewlog.local import layout
from crewlog.registry import Registry
from crewlog_compactor import collect, compact, import_legacy
from procs import Crew, files, forked, joined, kill, until


def test_absent_store_is_empty_and_reading_creates_nothing(place: Path, reg: Registry) -> None:
    """Whoever only looks leaves no trace."""
    assert reg.workers() == []
    assert reg.get("a") is None
    assert reg.last_seq == 0
    assert list(reg.history()) == []
    assert not reg.exists
    assert not place.exists()
    assert not place.parent.joinpath("state").exists()


def test_dead_pid_is_pruned_and_the_living_kept(reg: Registry, crew: Crew) -> None:
    """A collection takes the dead out of the list and leaves the living in it."""
    living, dead = crew.sleeper(), crew.sleeper()
    reg.register("living", pid=living.pid)
    reg.register("dead", pid=dead.pid)
    kill(dead)
    assert collect(reg).lost == ("dead",)
    assert [w.sid for w in reg.workers()] == ["living"]
    gone = reg.get("dead")
    assert gone is not None
    assert gone.state == "lost"


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b'{"sessions":{}}', b"\xff" * 40, b"null"])
def test_broken_json_is_a_typed_error_and_never_empty(
    tmp_path: Path, place: Path, reg: Registry, broken: bytes
) -> None:
    """Neither an older file nor our own is taken for an empty registry when it is damaged."""
    old = tmp_path / "registry.json"
    old.write_bytes(broken)
    with pytest.raises(LegacyCorrupt):
        import_legacy(reg, old)
    assert not place.exists(), "a refused import creates nothing"
    reg.register("a")
    compact(reg, gc=False)
    (place / layout.SNAPSHOT).write_bytes(broken)
    with crewlog.open(place) as fresh:
        assert [w.sid for w in fresh.workers()] == ["a"], "rebuilt from the log"
    (place / layout.LOG / layout.segment_name(1)).unlink()
    with crewlog.open(place) as fresh, pytest.raises(CrewlogError):
        fresh.workers()


def test_unreadable_file_is_never_absent(place: Path, reg: Registry) -> None:
    """Only ENOENT is absence: a directory that cannot be looked into is an error."""
    reg.register("a")
    (place / layout.STORE).chmod(0o644)
    with crewlog.open(place) as fresh, pytest.raises(UnsafePermissions) as caught:
        fresh.workers()
    assert "chmod" in caught.value.remedy


@pytest.mark.parametrize(("writers", "changes"), [(2, 50), (8, 200)])
def test_concurrent_writers_lose_nothing(place: Path, writers: int, changes: int) -> None:
    """Each change of each writer is there, exactly once, in its writer's order."""

    def write(number: int) -> None:
        with crewlog.open(place) as mine:
            mine.register(f"w-{number}", pid=os.getpid())
            for change in range(changes):
                mine.update(f"w-{number}", meta={"change": change})

    joined(*(forked(lambda n=n: write(n)) for n in range(writers)))  # type: ignore[misc]
    with crewlog.open(place) as reader:
        versions: dict[str, list[object]] = {f"w-{n}": [] for n in range(writers)}
        for event in reader.history(types=["worker.updated"]):
            meta = event.data["meta"]
            assert isinstance(meta, dict)
            versions[event.sid].append(meta["change"])
        assert all(seen == list(range(changes)) for seen in versions.values())
        seqs = [event.seq for event in reader.history(types=None)]
        assert seqs == sorted(set(seqs))
        assert len(reader.workers()) == writers


@pytest.mark.parametrize("umask", [0, 0o777, 0o022, 0o077])
def test_everything_is_owner_only_at_every_moment(place: Path, umask: int) -> None:
    """Directory, files and lock files, from the moment each exists, under any umask."""
    seen: dict[str, int] = {}

    def work() -> None:
        os.umask(umask)
        with crewlog.open(place) as mine:
            for number in range(20):
                mine.register(f"w-{number}")
                compact(mine, gc=False)

    pid = forked(work)

    def looked() -> bool:
        for path in (place, *place.rglob("*")) if place.exists() else ():
            try:
                inode = path.lstat()
            except FileNotFoundError:
                continue
            if stat.S_IMODE(inode.st_mode) & 0o077:
                seen[str(path)] = inode.st_mode
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    until(looked)
    joined(pid)
    assert seen == {}
    for path in (place, *place.rglob("*")):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_restarted_manager_finds_the_living(place: Path, crew: Crew) -> None:
    """A manager that is killed leaves its workers in the registry for the next one."""
    code = """
import subprocess, sys, crewlog, time
reg = crewlog.open(sys.argv[1])
worker = subprocess.Popen(["sleep", "300"])
reg.register("survivor", pid=worker.pid, ready=True)
print(worker.pid, flush=True)
time.sleep(300)
"""
    manager = crew.python(code, place)
    assert manager.stdout is not None
    worker = int(manager.stdout.readline())
    try:
        kill(manager)
        with crewlog.open(place) as reg:
            workers = reg.workers()
            assert [(w.sid, w.pid) for w in workers] == [("survivor", worker)]
            assert reg.liveness("survivor").alive
    finally:
        os.kill(worker, 9)


def test_program_written_for_the_old_file_reads_the_new_one(reg: Registry, place: Path) -> None:
    """The five old fields have their names and types, strings are never null."""
    reg.register("a", sock="/run/a.sock", version="1.2", ready=True)
    compact(reg, gc=False)
    answer = json.loads((place / layout.SNAPSHOT).read_text())
    (session,) = answer["sessions"]
    assert (session["sid"], session["pid"], session["sock"], session["version"]) == (
        "a", os.getpid(), "/run/a.sock", "1.2",
    )  # fmt: skip
    for name in ("sid", "sock", "version", "created_at"):
        assert type(session[name]) is str
    assert type(session["pid"]) is int


def test_older_file_is_taken_over_with_its_dead_recorded(
    tmp_path: Path, reg: Registry, crew: Crew
) -> None:
    """Living workers get an identity, those whose process is gone or a stranger are lost."""
    living, gone, stranger = crew.sleeper(), crew.sleeper(), crew.sleeper()
    kill(gone)
    now, then = "2999-01-01T00:00:00Z", "2001-01-01T00:00:00Z"
    sessions = [
        {"sid": "living", "pid": living.pid, "sock": "/s", "version": "1", "created_at": now},
        {"sid": "gone", "pid": gone.pid, "sock": "", "version": "", "created_at": now},
        {"sid": "reused", "pid": stranger.pid, "sock": "", "version": "", "created_at": then},
        {"sid": "living", "pid": 1, "sock": "", "version": "", "created_at": 17},
    ]
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"sessions": sessions}))
    report = import_legacy(reg, old)
    assert report.living == ("living",)
    assert report.lost == ("gone", "reused")
    assert [sid for sid, _ in report.skipped] == ["living"]
    assert reg.liveness("living").alive
    worker = reg.get("living")
    assert worker is not None
    assert worker.created_at.year == 2999
    lost = reg.get("reused")
    assert lost is not None
    assert lost.exit is not None
    assert lost.exit.cause == "pid_reused"


@pytest.mark.parametrize("when", ["²", "9" * 5000, "soon", ""])
def test_import_of_a_time_that_is_none_takes_the_worker_all_the_same(
    tmp_path: Path, reg: Registry, when: str
) -> None:
    """It tells nothing, and is no fault."""
    old = tmp_path / "old.json"
    entry = {"sid": "a", "pid": os.getpid(), "sock": "", "version": "", "created_at": when}
    old.write_text(json.dumps({"sessions": [entry]}))
    assert import_legacy(reg, old).living == ("a",)


@pytest.mark.parametrize("pid", [0, -1, 2**31, 2**63, True, "7", 1.0, None])
def test_import_of_an_impossible_pid_writes_nothing(
    tmp_path: Path, reg: Registry, place: Path, pid: object
) -> None:
    """One bad entry and none is imported."""
    old = tmp_path / "old.json"
    good = {"sid": "a", "pid": os.getpid(), "sock": "", "version": "", "created_at": ""}
    old.write_text(json.dumps({"sessions": [good, {**good, "sid": "b", "pid": pid}]}))
    with pytest.raises(LegacyCorrupt, match="session 1"):
        import_legacy(reg, old)
    assert not place.exists()


@pytest.mark.parametrize(("count", "version"), [(5_001, "1"), (1_200, "\x01" * 4_096)])
def test_registry_of_any_size_is_taken_over(
    reg: Registry, tmp_path: Path, count: int, version: str
) -> None:
    """In several units, where it is too much for one."""
    old = tmp_path / "registry.json"
    rows = [{"sid": f"s{n}", "pid": 4_194_303, "version": version} for n in range(count)]
    old.write_text(json.dumps({"sessions": rows}))
    report = import_legacy(reg, old)
    assert (len(report.lost), report.living) == (count, ())
    assert len(reg.workers(all=True)) == count
    assert import_legacy(reg, old).lost == ()


@pytest.mark.parametrize(
    "created_at",
    ["9999-12-31T23:59:59Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"],
)
@pytest.mark.parametrize("alive", [True, False])
def test_times_at_the_ends_of_the_calendar_are_taken_or_left(
    reg: Registry, tmp_path: Path, created_at: str, *, alive: bool
) -> None:
    """Whether its process lives or not."""
    old = tmp_path / "registry.json"
    pid = os.getpid() if alive else 4_194_303
    old.write_text(json.dumps({"sessions": [{"sid": "a", "pid": pid, "created_at": created_at}]}))
    report = import_legacy(reg, old)
    assert (report.living, report.lost) == ((("a",), ()) if alive else ((), ("a",)))


@pytest.mark.parametrize("wrong", [{"version": "v" * 5_000}, {"sock": "s" * 5_000}, {"sock": "\0"}])
def test_entry_that_cannot_be_written_is_named(
    reg: Registry, place: Path, tmp_path: Path, wrong: dict[str, str]
) -> None:
    """And nothing of the file is written."""
    old = tmp_path / "registry.json"
    old.write_text(
        json.dumps({"sessions": [{"sid": "a", "pid": 1}, {"sid": "b", "pid": 1, **wrong}]})
    )
    with pytest.raises(LegacyCorrupt, match="session 1"):
        import_legacy(reg, old)
    assert not place.exists()


def test_one_that_was_dead_when_it_was_taken_over_is_not_proven_to_have_lived(
    reg: Registry, tmp_path: Path
) -> None:
    """Nobody saw it live, for all that the older registry says when it began."""
    old = tmp_path / "registry.json"
    entry = {"sid": "gone", "pid": 4_194_303, "created_at": "2020-01-01T00:00:00Z"}
    old.write_text(json.dumps({"sessions": [entry]}))
    import_legacy(reg, old)
    (life,) = reg.lives()
    assert (life.end, life.proven) == ("lost", timedelta(0))


def test_damaged_snapshot_without_anything_to_rebuild_from_is_an_error(
    reg: Registry, place: Path
) -> None:
    """The typed error names the file."""
    reg.register("a")
    compact(reg, gc=False)
    from crewlog.local import snapshot

    (place / layout.SNAPSHOT).write_bytes(b"{}")
    with pytest.raises(SnapshotCorrupt, match=r"registry\.json"):
        snapshot.read(files(reg).directory, layout.SNAPSHOT)
