"""What the real kernel does to a writer: injected errors, a stopped leader, a fork midway."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import AppendUncertain, CrewlogError, LockBusy
from crewlog.local import layout
from crewlog_compactor import repair, verify
from procs import Crew, forked, joined, state_of, until
from stores import opened

pytestmark = pytest.mark.long

STRACE = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed (Debian: strace)"
)
MAIN = "from crewlog_cli.main import main; main()"


def injected(place: Path, call: str, error: str, when: int, *words: object) -> tuple[int, str]:
    """Run a command while its `when`th call of one kind fails; return exit code and stderr."""
    # Only calls on the store's own files: Python itself opens and writes a good many others.
    names = (
        place / layout.LOG / layout.segment_name(1),
        place / layout.HEAD / layout.HEAD_DURABLE,
        place / layout.APPEND_STATE,
        place / layout.REDO,
    )
    own = [word for name in names for word in ("-P", str(name))]
    fault = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}"]
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", os.devnull, *own, *fault,
         sys.executable, "-c", MAIN, "--dir", str(place), *map(str, words)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


@STRACE
@pytest.mark.parametrize("call", ["fdatasync", "write", "pwrite64", "openat", "flock", "fstat"])
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_error_injected_into_a_system_call_ends_as_promised(
    place: Path, crew: Crew, call: str, error: str
) -> None:
    """At the kernel's own border: three lines, the right exit code, the truth on the disk."""
    worker = crew.sleeper()
    with opened(place) as reg:
        reg.register("old", pid=worker.pid)
    codes = set()
    for when in (1, 2, 3, 99):
        code, err = injected(place, call, error, when, "register", f"n-{when}", "--pid", worker.pid)
        codes.add(code)
        assert "Traceback" not in err
        assert code in {0, 74, 75}, (call, error, when, code, err)
        if code:
            assert err.startswith("crewlog: "), err
        with opened(place) as reg:
            there = {w.sid for w in reg.workers()}
            assert "old" in there
            assert (f"n-{when}" in there) or code != 0, "acknowledged and not there"
        if (place / layout.POISON).exists():
            assert call == "fdatasync"
            assert repair(place, yes=True).done
    assert 0 in codes, "the last one met no fault"
    with opened(place) as reg:
        reg.register("after")
    assert verify(place).ok


@STRACE
def test_failed_fdatasync_of_one_process_stops_every_other(place: Path, crew: Crew) -> None:
    """Opened before or after: nobody is acknowledged until the repair."""
    worker = crew.sleeper()
    with opened(place) as before:
        before.register("old", pid=worker.pid)
        code, err = injected(place, "fdatasync", "EIO", 1, "register", "n", "--pid", worker.pid)
        assert code == 74
        assert "sync failed" in err
        for reg in (before, opened(place)):
            with pytest.raises(CrewlogError) as caught:
                reg.register("later")
            assert caught.value.code == "store_poisoned"
        assert repair(place, yes=True).done
        before.register("later")


@pytest.mark.limits(sync_wait_s=0.3)
def test_stopped_sync_leader_costs_only_those_who_wait_for_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP inside the sync: others hear "unknown" in time, and all goes on when it goes on."""
    from crewlog.local.disk import Disk

    with opened(place, lock_timeout_s=0.3) as reg:
        reg.register("old")
        real = Disk.sync

        def stop_first(self: Disk, fd: int) -> None:
            os.kill(os.getpid(), signal.SIGSTOP)
            real(self, fd)

        def lead() -> None:
            monkeypatch.setattr(Disk, "sync", stop_first)
            with opened(place) as mine:
                mine.register("leader")

        pid = forked(lead)
        until(lambda: state_of(pid) == "T")
        with pytest.raises(AppendUncertain) as caught:
            reg.register("waiting")
        assert caught.value.outcome == "unknown"
        assert f"pid {pid}" in str(caught.value)
        assert [w.sid for w in reg.workers()] == ["old"], "nothing that is not durable is shown"
        os.kill(pid, signal.SIGCONT)
        joined(pid)
        reg.register("next")
        assert [w.sid for w in reg.workers()] == ["old", "leader", "waiting", "next"]
    assert verify(place).ok


def test_writer_stopped_under_the_lock_is_named(place: Path) -> None:
    """The others hear LockBusy with its pid; nothing of theirs is written."""
    from crewlog.local.disk import Disk

    with opened(place, lock_timeout_s=0.2) as reg:
        reg.register("old")
        real = Disk.write

        def stop_first(self: Disk, fd: int, data: bytes) -> int:
            os.kill(os.getpid(), signal.SIGSTOP)
            return real(self, fd, data)

        def write() -> None:
            with pytest.MonkeyPatch.context() as patch, opened(place) as mine:
                patch.setattr(Disk, "write", stop_first)
                mine.register("stopped")

        pid = forked(write)
        until(lambda: state_of(pid) == "T")
        with pytest.raises(LockBusy, match=f"pid {pid}"):
            reg.register("waiting")
        os.kill(pid, signal.SIGCONT)
        joined(pid)
        assert [w.sid for w in reg.workers()] == ["old", "stopped"]
        reg.register("waiting")


def test_children_forked_while_threads_write_go_on(place: Path) -> None:
    """Parent and children share one registry object; every change of each is there once."""
    with opened(place) as reg:
        reg.register("p")
        done = threading.Event()
        counts = {"parent": 0}

        def write() -> None:
            while not done.is_set():
                reg.update("p", meta={"n": counts["parent"]})
                counts["parent"] += 1

        thread = threading.Thread(target=write)
        thread.start()
        pids = []
        for number in range(8):
            sid = f"c-{number}"

            def child(sid: str = sid) -> None:
                reg.register(sid)
                for change in range(20):
                    reg.update(sid, meta={"n": change})

            pids.append(forked(child))
        joined(*pids)
        done.set()
        thread.join()
        for number in range(8):
            notes = [
                e.data["meta"] for e in reg.history(sid=f"c-{number}", types=["worker.updated"])
            ]
            assert notes == [{"n": n} for n in range(20)]
        mine = [e.data["meta"] for e in reg.history(sid="p", types=["worker.updated"])]
        assert mine == [{"n": n} for n in range(counts["parent"])]
    assert verify(place).ok


@pytest.mark.limits(segment_bytes=4000)
def test_reader_never_sees_the_state_go_backwards(place: Path) -> None:
    """Two compactors, a writer, and a reader that looks all the time: each rev only grows."""
    from crewlog_compactor import compact

    with opened(place) as reg:
        reg.register("a")
    deadline = time.monotonic() + 2

    def write() -> None:
        with opened(place) as mine:
            while time.monotonic() < deadline:
                mine.update("a", meta={"n": time.monotonic_ns()})

    def fold() -> None:
        with opened(place) as mine:
            while time.monotonic() < deadline:
                try:
                    compact(mine, gc=False)
                except LockBusy:  # the other one runs
                    continue

    pids = [forked(write), forked(fold), forked(fold)]
    last, looks = 0, 0
    while time.monotonic() < deadline:
        with opened(place) as fresh:
            worker = fresh.get("a")
            assert worker is not None
            assert worker.rev >= last
            last = worker.rev
            looks += 1
    joined(*pids)
    assert looks > 20
    assert verify(place).ok


@pytest.mark.limits(segment_bytes=4000)
def test_verify_beside_live_writers_and_compactions_finds_nothing(place: Path) -> None:
    """Writers, rotations, compactions, retention and cursors at work: no false alarm."""
    from crewlog_compactor import compact

    with opened(place) as reg:
        reg.register("a")
    deadline = time.monotonic() + 3

    def write(sid: str) -> None:
        with opened(place) as mine:
            mine.register(sid, lease=True)
            while time.monotonic() < deadline:
                with mine.batch() as batch:
                    batch.update(sid, meta={"n": time.monotonic_ns()})
                    batch.update("a", meta={"n": time.monotonic_ns()})

    def fold() -> None:
        with opened(place) as mine, mine.watch(cursor="c", after="now") as items:
            while time.monotonic() < deadline:
                items.drain()
                compact(mine, gc=False, keep_history=20_000)

    pids = [forked(lambda: write("b")), forked(lambda: write("c")), forked(fold)]
    looks = 0
    while time.monotonic() < deadline:
        assert verify(place).findings == ()
        looks += 1
    joined(*pids)
    assert looks > 5
    assert verify(place).findings == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small tmpfs")
def test_full_file_system_refuses_and_goes_on_once_there_is_room(tmp_path: Path) -> None:
    """A real full disk: typed, not written, nothing lost; compaction fails cleanly too."""
    from crewlog_compactor import compact

    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(small)],
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with crewlog.open(small / "store") as reg:
            reg.register("a")
            acknowledged = 0
            with pytest.raises(crewlog.errors.StorageFull) as caught:
                while True:
                    reg.update("a", meta={"n": acknowledged + 1, "pad": "x" * 2000})
                    acknowledged += 1
            assert caught.value.outcome == "not_written"
            with pytest.raises(CrewlogError) as full:
                compact(reg, gc=False)
            assert full.value.code in {"storage_full", "storage_failed"}
            worker = reg.get("a")
            assert worker is not None
            assert worker.meta["n"] == acknowledged > 10
            subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
            reg.update("a", meta={"n": acknowledged + 1})
            compact(reg, gc=False)
        assert verify(small / "store").ok
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_error_of_the_command_line_says_what_became_of_the_change(place: Path, crew: Crew) -> None:
    """A full disk at the border of the process: not written, and said so as JSON too."""
    import resource

    with opened(place) as reg:
        reg.register("old")
    size = (place / layout.LOG / layout.segment_name(1)).stat().st_size

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = subprocess.run(
        [sys.executable, "-c", MAIN, "--dir", str(place), "register", "a", "--pid",
         str(crew.sleeper().pid), "--json"],
        capture_output=True, text=True, check=False, preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == 74
    assert json.loads(done.stderr)["error"]["code"] == "storage_full"
    with opened(place) as reg:
        assert [w.sid for w in reg.workers()] == ["old"]
