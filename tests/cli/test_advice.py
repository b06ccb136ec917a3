"""Advice leads out: each error is met, its hint is followed, and what was wanted then works."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import pytest

import crewlog
from commands import CREWLOG, Cli
from crewlog import errors
from crewlog.local import layout
from faults import active_segment, empty_redo
from procs import Crew

# the very words, as a person types them
SHELL = f'crewlog() {{ {shlex.join(CREWLOG)} "$@"; }}\n'


def hint(cli: Cli, *words: object, code: str) -> str:
    """Run what must fail with an error of that code; return what it advises."""
    done = subprocess.run(
        [*CREWLOG, "--dir", cli.where, "--json", *map(str, words)],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode, done.stdout
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["code"] == code, error
    return cast("str", error["hint"])


def do(words: str, *, code: int = 0) -> str:
    """Run a piece of a hint in a shell."""
    done = subprocess.run(
        ["bash", "-c", SHELL + words], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return done.stdout


def at(cli: Cli, words: str) -> str:
    """Run what the library advises, which knows of no --dir."""
    return do(words.replace("crewlog", f"crewlog --dir {cli.where}", 1))


def quoted(advice: str) -> str:
    """Return the command between backquotes."""
    return advice.split("`")[1]


def tail(advice: str) -> str:
    """Return the command after the last colon and blank."""
    return advice.rpartition(": ")[2].rstrip(".")


def worker_not_found(cli: Cli, _: Crew, __: Path) -> None:
    cli("register", "here", "--pid", os.getpid())
    assert "here" in do(quoted(hint(cli, "show", "b", code="worker_not_found")))


def worker_exists(cli: Cli, crew: Crew, _: Path) -> None:
    cli("register", "a", "--pid", crew.sleeper().pid)
    advice = hint(cli, "register", "a", "--pid", os.getpid(), code="worker_exists")
    assert advice == "Choose another sid, or end that worker first"
    cli("register", "another", "--pid", os.getpid())
    cli("stop", "a")
    cli("register", "a", "--pid", os.getpid())


def stale_revision(cli: Cli, _: Crew, __: Path) -> None:
    cli("register", "a", "--pid", os.getpid())
    cli("update", "a", "-l", "k=v")
    advice = hint(cli, "update", "a", "--expect", 2, "-l", "k=w", code="stale_revision")
    assert "Read it again" in advice
    answer = cast("dict[str, object]", cli.json("show", "a")["worker"])
    cli("update", "a", "--expect", answer["rev"], "-l", "k=w")


def invalid_transition(cli: Cli, _: Crew, __: Path) -> None:
    cli("register", "a", "--pid", os.getpid())
    cli("remove", "a", "--reason", "x")
    advice = hint(cli, "update", "a", "--state", "ready", code="invalid_transition")
    assert "removed: x" in do(quoted(advice))


def process_not_found(cli: Cli, crew: Crew, _: Path) -> None:
    gone = crew.sleeper()
    gone.kill()
    gone.wait()
    advice = hint(cli, "register", "a", "--pid", gone.pid, code="process_not_found")
    assert "while it runs" in advice
    cli("register", "a", "--pid", crew.sleeper().pid)


def spawn_failed(cli: Cli, _: Crew, home: Path) -> None:
    program = home / "program"
    program.write_text("#!/bin/sh\n")
    advice = hint(cli, "run", "a", "--", program, code="spawn_failed")
    assert "mode" in advice
    program.chmod(0o700)
    cli("run", "a", "--", program)


def lease_missing(cli: Cli, crew: Crew, _: Path) -> None:
    cli("register", "a", "--pid", os.getpid())
    advice = hint(cli, "beat", "a", code="lease_missing")
    assert "run --lease`" in advice
    del crew
    cli("start", "--lease", "b", "--", "sleep", "30")
    cli("beat", "b")
    cli("stop", "b")


def plan_invalid(cli: Cli, _: Crew, home: Path) -> None:
    cli("register", "a", "--pid", os.getpid())
    other = Cli(home / "other")
    other("register", "a", "--pid", os.getpid())
    plan = home / "plan"
    other("gc", "--plan", plan)
    advice = hint(cli, "gc", "--apply", plan, code="plan_invalid")
    plan.unlink()
    do(tail(advice).replace("FILE", str(plan)))
    cli("gc", "--apply", plan)


def folded(cli: Cli) -> None:
    """Leave a store with archives."""
    cli("register", "a", "--pid", os.getpid())
    for number in range(3):
        cli("update", "a", "-l", f"n={number}")
        cli("compact")


def compacted(cli: Cli, _: Crew, __: Path) -> None:
    folded(cli)
    cli("compact", "--keep-history", "0events", "--yes")
    advice = hint(cli, "diff", "--from", 1, code="compacted")
    cli("diff", "--from", advice.rpartition(" ")[2])


def collect_refused(cli: Cli, crew: Crew, _: Path) -> None:
    sleepers = [crew.sleeper() for _ in range(12)]
    for number, one in enumerate(sleepers):
        cli("register", f"w{number}", "--pid", one.pid)
    for one in sleepers:
        one.kill()
        one.wait()
    advice = hint(cli, "gc", code="collect_refused")
    assert "w0" in do(quoted(advice))
    do(tail(advice))
    assert cli.workers() == []


def cursor_busy(cli: Cli, crew: Crew, _: Path) -> None:
    cli("register", "a", "--pid", os.getpid())
    with crewlog.open(cli.place) as reg, reg.watch(cursor="c", after="now"):
        advice = hint(cli, "watch", "--cursor", "c", "--count", 1, code="cursor_busy")
        assert "another name" in advice
        cli("watch", "--cursor", "d", "--from-start", "--count", 1)
    del crew


def wait_timeout(cli: Cli, _: Crew, __: Path) -> None:
    cli("register", "a", "--pid", os.getpid())
    with crewlog.open(cli.place) as reg, pytest.raises(errors.WaitTimeout) as missed:
        reg.wait("a", state="ready", timeout_s=0.1)
    assert "registered" in at(cli, quoted(missed.value.remedy))


def worker_ended(cli: Cli, _: Crew, __: Path) -> None:
    with crewlog.open(cli.place) as reg:
        reg.register("a")
        with crewlog.open(cli.place) as other, pytest.raises(errors.WorkerEnded) as ended:
            threading.Timer(0.2, lambda: reg.exited("a", code=3)).start()
            other.wait("a", state="ready", timeout_s=10)
    assert "crashed code 3" in at(cli, quoted(ended.value.remedy))


def closed(cli: Cli, _: Crew, __: Path) -> None:
    reg = crewlog.open(cli.place)
    reg.register("a")
    reg.close()
    with pytest.raises(errors.RegistryClosed, match=r"again with crewlog\.open"):
        reg.workers()
    with crewlog.open(cli.place) as again:
        assert again.workers()


def store_missing(cli: Cli, _: Crew, __: Path) -> None:
    assert "first registration creates one" in hint(cli, "ls", code="store_missing")
    cli("register", "a", "--pid", os.getpid())
    cli("ls")


def not_a_store(cli: Cli, _: Crew, __: Path) -> None:
    cli("register", "a", "--pid", os.getpid())
    (cli.place / layout.ARCHIVE).rmdir()
    do(tail(hint(cli, "ls", code="not_a_store")))
    cli("ls")
    for name in layout.LOCK_NAMES:
        (cli.place / layout.LOCKS / name).unlink()
    do(tail(hint(cli, "update", "a", "-l", "k=v", code="not_a_store")))
    cli("update", "a", "-l", "k=v")


def unsafe_permissions(cli: Cli, _: Crew, __: Path) -> None:
    cli("register", "a", "--pid", os.getpid())
    cli.place.chmod(0o777)
    do(tail(hint(cli, "ls", code="unsafe_permissions")))
    cli("ls")
    active_segment(cli.place).chmod(0o644)
    do(tail(hint(cli, "history", code="unsafe_permissions")))
    cli("history")


def lock_busy(cli: Cli, crew: Crew, _: Path) -> None:
    cli("register", "a", "--pid", os.getpid())
    code = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX);"
        " print('held', flush=True); sys.stdin.read()"
    )
    holder = crew.python(code, cli.place / layout.LOCKS / "append")
    assert holder.stdout is not None
    holder.stdout.readline()
    advice = hint(cli, "update", "a", "-l", "k=v", code="lock_busy")
    assert "goes on or ends" in advice
    holder.kill()
    holder.wait()
    cli("update", "a", "-l", "k=v")


def store_poisoned(cli: Cli, _: Crew, __: Path) -> None:
    cli("register", "a", "--pid", os.getpid())
    code = """
import os, sys, crewlog
from faults import FailingDisk, registry_on
from pathlib import Path
import errno
disk = FailingDisk()
disk.fault = lambda call: errno.EIO if call.startswith("sync") else None
try:
    registry_on(Path(sys.argv[1]), disk).update("a", meta={"n": 1})
except crewlog.CrewlogError as error:
    print(error)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, cli.where], check=True, env=env, timeout=60)
    advice = hint(cli, "update", "a", "-l", "k=v", code="store_poisoned")
    do(tail(advice) + " --yes")
    cli("update", "a", "-l", "k=v")


def damaged(cli: Cli) -> None:
    """Leave a store whose third line is damaged past mending."""
    cli("register", "a", "--pid", os.getpid())
    for number in range(3):
        cli("update", "a", "-l", f"n={number}")
    empty_redo(cli.place)
    path = active_segment(cli.place)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"worker", b"wOrker", 1)
    path.write_bytes(b"".join(lines))


def log_corrupt(cli: Cli, _: Crew, __: Path) -> None:
    damaged(cli)
    advice = hint(cli, "history", code="log_corrupt")
    said = json.loads(do(quoted(advice) + " --json; true"))
    assert said


def loss_refused(cli: Cli, _: Crew, __: Path) -> None:
    damaged(cli)
    do(tail(hint(cli, "repair", "--yes", code="loss_refused")))
    cli("verify")
    cli("register", "next", "--pid", os.getpid())


def archive_damaged(cli: Cli, __: Crew, home: Path) -> None:
    folded(cli)
    path = min((cli.place / layout.ARCHIVE).iterdir())
    whole = path.read_bytes()
    backup = home / "backup"
    backup.write_bytes(whole)
    path.write_bytes(whole[:-20] + bytes(20))
    advice = hint(cli, "export", code="archive_damaged")
    assert "stays usable" in advice
    cli("update", "a", "-l", "k=v")
    path.write_bytes(backup.read_bytes())
    cli("export")


def segment_missing(cli: Cli, __: Crew, home: Path) -> None:
    folded(cli)
    path = min((cli.place / layout.ARCHIVE).iterdir())
    path.rename(home / "backup")
    cli("verify", code=1)
    (home / "backup").rename(path)
    cli("verify")


def cursor_corrupt(cli: Cli, _: Crew, __: Path) -> None:
    cli("register", "a", "--pid", os.getpid())
    cli("cursor", "set", "c", 1)
    for path in (cli.place / layout.CURSORS).iterdir():
        if path.is_file() and path.stat().st_size:
            path.write_bytes(b"x" * path.stat().st_size)
    advice = hint(cli, "watch", "--cursor", "c", "--count", 1, code="cursor_corrupt")
    for words in re.findall(r"crewlog [^,]*", advice):
        do(words.replace("SEQ", "1"))
    cli("watch", "--cursor", "c", "--count", 1)


def legacy_corrupt(cli: Cli, _: Crew, home: Path) -> None:
    old = home / "old.json"
    old.write_text("{")
    assert "Nothing was imported" in hint(cli, "import", old, code="legacy_corrupt")
    assert not cli.place.exists()
    old.write_text('{"sessions": []}')
    cli("import", old)


def stop_refused(cli: Cli, crew: Crew, _: Path) -> None:
    cli("register", "a", "--pid", crew.sleeper().pid)
    here = cast("dict[str, object]", cli.json("show", "a")["worker"])
    assert here["pid"]
    code = "import sys; from crewlog_cli.entry import main; main()"
    done = subprocess.run(
        ["unshare", "-pf", "--mount-proc", sys.executable, "-c", code, "--dir", cli.where, "stop",
         "a", "--json"],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if "unshare" in done.stderr and done.returncode == 1 and "{" not in done.stderr:
        pytest.skip("needs root, to make a pid namespace")
    row = json.loads(done.stdout.splitlines()[-1] if done.stdout else done.stderr.splitlines()[-1])
    assert "namespace" in json.dumps(row)
    cli("stop", "a")  # from its own


SCENES: Final[dict[str, Callable[[Cli, Crew, Path], None]]] = {
    scene.__name__: scene
    for scene in (
        worker_not_found, worker_exists, stale_revision, invalid_transition, process_not_found,
        spawn_failed, lease_missing, plan_invalid, compacted, collect_refused, cursor_busy,
        wait_timeout, worker_ended, closed, store_missing, not_a_store, unsafe_permissions,
        lock_busy, store_poisoned, log_corrupt, loss_refused, archive_damaged, segment_missing,
        cursor_corrupt, legacy_corrupt, stop_refused,
    )
}  # fmt: skip
# Met elsewhere, with what is to be done about them, or not to be met on one machine.
ELSEWHERE: Final = {
    "identity_mismatch": "nothing is to be done: it says that nothing was sent (test_stop.py)",
    "format_too_new": "asks for a newer program",
    "unsupported": "asks for another file system, or system (test_surroundings.py)",
    "storage_full": "asks for room, and goes on when there is (tests/local)",
    "storage_failed": "names what to look into: a disk (tests/local)",
    "append_uncertain": "asks to read, as every test of it does (tests/local)",
    "unavailable": "asks to start the servers (tests/etcd)",
    "unknown_outcome": "asks to read (tests/etcd)",
    "quota_exceeded": "its command is run in tests/etcd",
    "auth_failed": "names the variable; each is set in test_tls_with_client_certificates",
    "snapshot_corrupt": "asks for verify, which says the same (tests/local)",
    "log_regressed": "asks for a backup (tests/crash)",
    "history_diverged": "asks for a backup (tests/crash)",
    "history_rewound": "asks to open it again (tests/watch)",
    "error": "the base of all",
    "data_damaged": "the base of damage",
}


def test_every_error_has_a_scene() -> None:
    """A new one needs its place here."""
    codes = {
        kind.code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.CrewlogError)
    }
    assert codes == SCENES.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("name", SCENES)
def test_advice_leads_out(name: str, tmp_path: Path, crew: Crew) -> None:
    """What the error says to do makes what was refused work."""
    SCENES[name](Cli(tmp_path / "store"), crew, tmp_path)
