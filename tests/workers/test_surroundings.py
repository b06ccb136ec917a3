"""What a machine, a shell or a supervisor may do to us, and what is concluded from it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import crewlog
from commands import CREWLOG, Cli
from crewlog.errors import SpawnFailed, StopRefused, StorageFull, WaitTimeout
from crewlog.local import disk, layout
from crewlog.process.forkserver import Refused
from crewlog.registry import Registry
from crewlog_compactor import compact, verify
from procs import Crew, until
from stores import opened

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


def test_interpreter_that_does_not_start_is_no_success(
    reg: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence means nothing: only the word that the program comes next does."""
    (tmp_path / "libc.so.6").write_text("no library")
    broken = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}

    def refuse(*_: object) -> int:
        raise Refused("an interpreter is started for each")

    monkeypatch.setattr("crewlog.process.launch._server.fork", refuse)
    with pytest.raises(SpawnFailed, match="LD_LIBRARY_PATH") as caught:
        reg.spawn("j", ["/bin/true"], env=broken)
    assert (caught.value.outcome == "written") == (reg.get("j") is not None)
    assert reg.workers() == []


def test_what_breaks_the_program_is_its_own_end(reg: Registry, tmp_path: Path) -> None:
    """Its environment reaches the program only: it is started, and ends as it would by a shell."""
    (tmp_path / "libc.so.6").write_text("no library")
    broken = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    reg.spawn("j", ["/bin/true"], env=broken)
    until(lambda: (worker := reg.get("j")) is not None and worker.final)
    worker = reg.get("j")
    assert worker is not None
    assert worker.exit is not None
    assert (worker.state.value, worker.exit.code) == ("failed", 127)


@pytest.mark.parametrize("name", ["python-that-is-none", "sh", "true"])
def test_executable_that_is_no_python_is_no_success(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An embedding program may name anything there."""
    monkeypatch.setattr(sys, "executable", shutil.which(name) or f"/nowhere/{name}")
    monkeypatch.setattr("crewlog.process.launch._interpreter", lambda: sys.executable)
    with pytest.raises(SpawnFailed):
        reg.spawn("j", ["sleep", "100"])
    assert reg.workers() == []


def test_program_that_is_not_there_is_an_error_behind_two_events(reg: Registry) -> None:
    """It was registered, and how it ended is recorded: the outcome says so."""
    with pytest.raises(SpawnFailed) as caught:
        reg.spawn("j", ["/nowhere/at-all"])
    assert caught.value.outcome == "written"
    assert [e.type for e in reg.history(sid="j")] == ["worker.registered", "worker.exited"]


def test_stop_that_takes_too_long_was_written(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is in the log; that the process does not end came after it."""
    reg.spawn("j", ["sleep", "100"])
    monkeypatch.setattr("crewlog.workers.stop.Process.wait", lambda *_: False)
    with pytest.raises(WaitTimeout) as caught:
        reg.stop("j", reason="r", grace_s=0)
    assert caught.value.outcome == "written"


@ROOT
def test_refused_stop_leaves_no_trace(reg: Registry, place: Path) -> None:
    """The kernel is asked first whether a signal may be sent; else nothing is recorded."""
    place.parent.chmod(0o755)
    worker = reg.spawn("s", ["sleep", "100"])
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        code = 1
        try:
            from crewlog.process.handle import Process
            from crewlog.workers import stop

            assert worker.identity is not None
            with Process(worker.identity) as held:
                stop._require_stoppable(worker, held)
        except StopRefused:
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [e.type for e in reg.history(sid="s")] == ["worker.registered"]
    reg.stop("s", reason="r")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_signal_that_was_ignored_at_our_start_is_not_passed_on(
    place: Path, number: signal.Signals
) -> None:
    """As nohup does, and a shell for what is in its background."""
    ignoring = lambda: signal.signal(number, signal.SIG_IGN)  # noqa: E731
    words = [*CREWLOG, "--dir", str(place), "run", "j", "--", "sleep", "100"]
    running = subprocess.Popen(words, preexec_fn=ignoring)  # noqa: PLW1509 (no thread yet)
    with opened(place) as reg:
        until(lambda: (worker := reg.get("j")) is not None and worker.state == "ready")
        running.send_signal(number)
        running.send_signal(signal.SIGWINCH)
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 128 + signal.SIGTERM
        reasons = [e.data.get("reason") for e in reg.history(types=["worker.stop_requested"])]
    assert len(reasons) == 1
    assert "SIGTERM" in str(reasons[0])


@pytest.mark.parametrize("verb", ["exec", "run"])
def test_program_begins_as_a_shell_would_start_it(place: Path, verb: str) -> None:
    """What Python ignores for itself, and puts into its environment, is not handed on."""
    line = "grep SigIgn /proc/self/status; env | grep -c ^LC_CTYPE="
    plain = {"PATH": os.environ["PATH"], "HOME": str(place.parent), "LC_ALL": ""}
    done = subprocess.run(
        [*CREWLOG, "--dir", str(place), verb, "a", "--", "sh", "-c", line],
        capture_output=True, text=True, check=False, env=plain,
    )  # fmt: skip
    expected = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, check=False, env=plain
    )
    ours, theirs = done.stdout.split(), expected.stdout.split()
    handled = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)  # what Python ignores
    assert int(ours[1], 16) & handled == int(theirs[1], 16) & handled
    assert ours[2:] == theirs[2:]


def test_what_is_no_lease_is_left_alone(place: Path, crew: Crew) -> None:
    """A file and a directory of somebody else's: not removed, no obstacle, and named by verify."""
    with opened(place) as reg:
        reg.register("a", pid=crew.sleeper().pid)
        (place / layout.LEASES / "README").touch(0o600)
        (place / layout.LEASES / "notes").mkdir(0o700)
        compact(reg)
    names = sorted(Path(f.path).name for f in verify(place).findings)
    assert names == ["README", "notes"]
    assert (place / layout.LEASES / "README").exists()


def test_limit_of_one_process_concerns_nobody_else(place: Path) -> None:
    """`ulimit -f`: refused by type before anything is written; the others go on."""
    with opened(place) as reg:
        reg.register("a")
        for words in (("register", "b", "--pid", str(os.getpid())), ("compact",)):
            done = subprocess.run(
                ["prlimit", "--fsize=100", *CREWLOG, "--dir", str(place), *words],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert (done.returncode, "ulimit -f" in done.stderr) == (74, True), done.stderr
        reg.update("a", meta={"n": 1})
        compact(reg, gc=False)
    assert not (place / layout.POISON).exists()
    assert verify(place).ok


def test_full_disk_for_states_poisons_nothing(place: Path) -> None:
    """A state file is a cache: where it cannot be written, the next writer rebuilds it."""
    from faults import ENOSPC, FailingDisk, registry_on

    failing = FailingDisk()
    with registry_on(place, failing) as reg:
        reg.register("a")
        failing.fault = lambda call: ENOSPC if call == "overwrite" else None
        with pytest.raises(crewlog.CrewlogError) as caught:
            reg.register("b")
        failing.fault = lambda _: None
    assert not isinstance(caught.value, crewlog.errors.StorePoisoned)
    assert not (place / layout.POISON).exists()
    with opened(place) as reg:
        reg.register("c")
        assert "c" in [w.sid for w in reg.workers()]
    assert verify(place).ok
    assert isinstance(StorageFull("x", why="y").outcome, str)


def test_labels_and_meta_grow_no_further_than_a_worker_may_have(reg: Registry) -> None:
    """The limit is the worker's, not the call's; what is there already stays and may shrink."""
    reg.register("a", labels={f"l{n}": "x" for n in range(60)})
    with pytest.raises(ValueError, match="at most 64 are kept"):
        reg.update("a", labels={f"m{n}": "x" for n in range(5)})
    assert (
        len(reg.update("a", labels={"l0": None, **{f"m{n}": "x" for n in range(5)}}).labels) == 64
    )
    reg.update("a", meta={"one": "x" * 40_000})
    with pytest.raises(ValueError, match="bytes of meta"):
        reg.update("a", meta={"two": "x" * 40_000})
    reg.update("a", meta={"one": None, "two": "x" * 40_000})


@pytest.mark.parametrize("words", [["ls"], ["show", "a"], ["verify"], ["doctor"], ["compact"]])
def test_place_that_is_a_circle_of_links_is_refused_by_type(
    tmp_path: Path, words: list[str]
) -> None:
    """Not a fault of crewlog."""
    (tmp_path / "loop").symlink_to("loop")
    done = Cli(tmp_path / "loop").any(*words)
    assert done.returncode not in {0, 70}, done.stderr
    assert "circle" in done.stderr + done.stdout


@pytest.mark.parametrize("kind", ["virtiofs", "gpfs", "fuse.rclone", "fuse.s3fs", "9p", "nfs4"])
def test_file_system_that_is_not_known_to_be_local_is_taken_for_shared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """An open set is allowed by name, not denied; what is unknown can be overridden."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        device = os.fstat(fd).st_dev
        row = f"36 35 {os.major(device)}:{os.minor(device)} / / rw - {{}} x rw\n"
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: row.format(kind))
        assert disk.is_network_file_system(fd)
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: row.format("ext4"))
        assert not disk.is_network_file_system(fd)
    finally:
        os.close(fd)


def test_compact_says_what_it_takes(place: Path) -> None:
    """A path is none."""
    with pytest.raises(TypeError, match=r"compact\(crewlog.open"):
        compact(str(place))  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", ["run", "exec"])
def test_relative_place_is_the_same_one_in_a_program_that_moves(tmp_path: Path, verb: str) -> None:
    """What children inherit is absolute: else they would make a second registry, with exit 0."""
    (tmp_path / "elsewhere").mkdir()
    line = "cd elsewhere && exec crewlog path"
    bin_ = os.path.dirname(sys.executable)
    done = subprocess.run(
        [*CREWLOG, verb, "x", "--", "sh", "-c", line],
        env={**os.environ, "CREWLOG_DIR": "reg", "PATH": f"{bin_}:{os.environ['PATH']}"},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "reg")


def test_lease_of_a_copy_proves_no_death(place: Path, tmp_path: Path) -> None:
    """Its file is another one, and nobody holds it: that is not known, not dead."""
    with opened(place) as reg:
        worker = reg.spawn("a", ["sleep", "100"], lease=True)
        assert worker.lease is not None
        shutil.copytree(place, tmp_path / "copy")
        with opened(tmp_path / "copy") as copy:
            look = copy.store().leases.look({worker.lease})
            assert look(worker.lease).state == "absent"
        assert reg.store().leases.look({worker.lease})(worker.lease).state == "held"
        reg.stop("a", reason="r")
        assert reg.store().leases.look({worker.lease})(worker.lease).state in {"free", "absent"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_zero_that_stands_for_hidden_is_no_exit_code(place: Path) -> None:
    """A zombie with another group: the kernel shows 0 to its own user, whatever its code was."""
    from crewlog.process import identity

    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(2000, 2000, 2000)
        os.setresuid(65534, 65534, 65534)
        os._exit(3)
    until(lambda: (stat := identity.read_stat(pid)) is not None and stat.state == "Z")
    looker = os.fork()
    if looker == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        fd = os.pidfd_open(pid)
        status = identity.exit_status(pid, fd)
        os._exit(0 if status is None or status.code == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(looker, 0)[1]) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert not place.exists()


def test_sid_whose_holder_cannot_be_judged_names_the_ways_out(
    reg: Registry, monkeypatch: pytest.MonkeyPatch, crew: Crew
) -> None:
    """What it says helps: the holder is assumed dead, and the sid is free."""
    from crewlog.process import identity
    from crewlog_compactor import assume_dead

    reg.register("web", pid=crew.sleeper().pid)
    there = identity.Scope("another-boot", "another-host", "4026531836:1")
    monkeypatch.setattr(identity, "scope", lambda: there)
    with pytest.raises(crewlog.WorkerExists, match=r"--assume-dead web.*lease=True"):
        reg.register("web")
    assume_dead(reg, "web", reason="the container was restarted")
    reg.register("web")


_GREEN = """
import sys, time
real = time.sleep
slept = []
def sleep(seconds):  # another library's, in place of Python's, as gevent puts it there
    slept.append(seconds)
    real(seconds)
time.sleep = sleep
import crewlog
with crewlog.open(sys.argv[1]) as reg:
    reg.spawn("j", ["sleep", "0.3"])
    while reg.get("j").exit is None:
        sleep(0.05)
    assert reg.get("j").exit.code == 0
assert len(slept) > 8, slept
"""


def test_wait_for_a_child_gives_way_to_green_threads(place: Path) -> None:
    """Where threads are another library's, a call that blocks would hold up the whole process."""
    subprocess.run([sys.executable, "-c", _GREEN, str(place)], check=True)
