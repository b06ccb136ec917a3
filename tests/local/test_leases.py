"""Leases prove life and death across pid namespaces; beats and flags tell the rest."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import crewlog
from crewlog import Flag, Verdict
from crewlog.errors import LeaseMissing
from crewlog.local import layout, leases
from crewlog.process import evidence, identity
from crewlog.registry import Registry
from crewlog_compactor import assume_dead, collect
from procs import Crew, files, forked, joined, kill, until

ROOT = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs root and unshare(1), to make a pid namespace",
)

_WORKER = """
import sys, crewlog
reg = crewlog.open(sys.argv[1])
reg.register("boxed", lease=sys.argv[2] == "lease", ready=True)
print("up", flush=True)
sys.stdin.read()
"""


def boxed(place: Path, kind: str) -> subprocess.Popen[str]:
    """Start a worker in a pid namespace of its own; it has registered itself."""
    worker = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c",
         _WORKER, str(place), kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert worker.stdout is not None
    assert worker.stdout.readline() == "up\n"
    return worker


def end(worker: subprocess.Popen[str]) -> None:
    """Kill unshare, and with it its namespace."""
    kill(worker)
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            stream.close()


@ROOT
@pytest.mark.parametrize(
    ("kind", "alive", "dead"),
    [("lease", "lease", "lease_released"), ("none", "found_in_namespace", "not_found")],
)
def test_worker_of_another_pid_namespace_is_judged(
    reg: Registry, place: Path, kind: str, alive: str, dead: str
) -> None:
    """Rows 8 to 11: by its lease; else by a scan, which proves death to root in the first one."""
    worker = boxed(place, kind)
    try:
        liveness = reg.liveness("boxed")
        assert (liveness.verdict, liveness.cause) == (Verdict.ALIVE, alive)
        assert collect(reg).lost == ()
    finally:
        end(worker)
    until(lambda: not reg.liveness("boxed").alive)
    liveness = reg.liveness("boxed")
    if kind == "none" and not identity.sees_every_process():
        assert liveness.cause == "foreign_pid_namespace"
        return
    assert liveness.verdict is Verdict.DEAD
    assert liveness.cause in {dead, "exited"}, "exited: a zombie that is not reaped yet was found"
    assert collect(reg).lost == ("boxed",)


@ROOT
def test_worker_outside_is_unknown_from_inside_a_namespace(
    reg: Registry, place: Path, crew: Crew
) -> None:
    """Row 12: what cannot be looked into is UNKNOWN, whatever the pid means in here."""
    reg.register("outside", pid=crew.sleeper().pid)
    reg.register("leased", lease=True)
    code = (
        "import sys, crewlog; reg = crewlog.open(sys.argv[1])\n"
        "for sid in sys.argv[2:]: print(reg.liveness(sid).cause)\n"
        "from crewlog_compactor import collect; print(collect(reg, force=True).unknown)"
    )
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code, str(place),
         "outside", "leased"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split("\n")[:3] == ["foreign_pid_namespace", "lease", "('outside',)"]


def test_lease_of_another_boot_that_nobody_holds_is_death(reg: Registry) -> None:
    """Row 6, through the seams: the record is of another boot, the lease's lock is free."""
    worker = reg.register("a", lease=True)
    assert worker.identity is not None
    here = identity.scope()
    elsewhere = identity.Scope("another-boot", "another-host", here.pid_ns)
    now = datetime.now(UTC)
    held: list[leases.Lease] = [own for own in registry_leases() if own.name == worker.lease]
    at = files(reg).directory
    looks = evidence.Witness(
        elsewhere, now=now, began_at=now, leases=lambda name: leases.look(at, name)
    )

    def cause() -> str:
        seen = looks.look(worker.identity, last_event_at=now, lease=worker.lease)
        from crewlog.process.liveness import judge

        return judge(worker.identity, seen, final=False).cause

    assert cause() == "foreign_host"
    held[0].hand_over(worker)
    assert cause() == "lease_released"
    os.unlink(reg.path / layout.LEASES / held[0].name)
    assert cause() == "foreign_host", "an absent lease proves nothing"


def registry_leases() -> list[leases.Lease]:
    """Return the leases that this process holds."""
    return leases._kept


def test_lease_survives_the_registry_and_ends_with_the_process(place: Path) -> None:
    """Closing a registry is no death; the end of the process is, and a fork does not hide it."""
    opened, ended = os.pipe(), os.pipe()

    def work() -> None:
        with crewlog.open(place) as mine:
            mine.register("a", lease=True)
        child = forked(signal.pause)
        os.write(opened[1], str(child).encode().ljust(16))
        os.read(ended[0], 1)

    pid = forked(work)
    child = int(os.read(opened[0], 16))
    with crewlog.open(place) as reg:
        worker = reg.get("a")
        assert worker is not None
        assert worker.lease is not None
        at = files(reg).directory
        assert leases.look(at, worker.lease)[0] == "held"
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        name = worker.lease
        until(lambda: leases.look(at, name)[0] == "free")  # its child still runs
    os.kill(child, 9)
    for fd in (*opened, *ended):
        os.close(fd)


def test_lease_survives_an_exec_of_its_worker(reg: Registry, place: Path, crew: Crew) -> None:
    """A worker that becomes another program lives on, and is not judged dead from elsewhere."""
    code = (
        "import os, sys, crewlog; crewlog.open(sys.argv[1]).register('a', lease=True)\n"
        "os.execvp('sleep', ['sleep', '300'])"
    )
    worker = crew.python(code, place)
    until(lambda: b"sleep\0" in Path(f"/proc/{worker.pid}/cmdline").read_bytes()[:6])
    now = reg.get("a")
    assert now is not None
    assert now.lease is not None
    assert leases.look(files(reg).directory, now.lease)[0] == "held"
    kill(worker)
    assert leases.look(files(reg).directory, now.lease)[0] == "free"


def test_spawned_program_inherits_its_lease(reg: Registry) -> None:
    """The spawner hands it over: held while the program lives, free at its end."""
    worker = reg.spawn("a", ["sleep", "300"], lease=True)
    assert worker.lease is not None
    at = files(reg).directory
    assert leases.look(at, worker.lease)[0] == "held"
    os.kill(worker.pid, 9)
    until(lambda: leases.look(at, str(worker.lease))[0] == "free")
    until(lambda: (now := reg.get("a")) is not None and now.final)


def test_lease_for_another_process_is_refused(reg: Registry, crew: Crew) -> None:
    """Only the worker itself can hold it; nothing is created."""
    with pytest.raises(ValueError, match="from inside"):
        reg.register("a", pid=crew.sleeper().pid, lease=True)
    assert not reg.exists


def test_refused_registration_leaves_no_lease(reg: Registry, crew: Crew) -> None:
    """WorkerExists: the lease that was made for it goes."""
    reg.register("a", pid=crew.sleeper().pid)
    with pytest.raises(crewlog.WorkerExists):
        reg.register("a", lease=True)
    assert os.listdir(reg.path / layout.LEASES) == []


def test_collection_sweeps_leases_of_the_dead_only(reg: Registry) -> None:
    """Whoever lives keeps its lease; whoever is dead needs none."""
    mine = reg.register("mine", lease=True)
    other = reg.spawn("other", ["sleep", "300"], lease=True)
    names = {mine.lease, other.lease, "other~turn"}
    assert set(os.listdir(reg.path / layout.LEASES)) == names
    os.kill(other.pid, 9)
    until(lambda: reg.liveness("other").dead)
    collect(reg)
    assert os.listdir(reg.path / layout.LEASES) == [mine.lease]


def test_sweep_leaves_the_lease_that_a_living_record_names(reg: Registry) -> None:
    """Nobody holds it, but it is the evidence of a worker that is not ended on record."""
    worker = reg.register("a", lease=True)
    for held in registry_leases():
        if held.name == worker.lease:
            held.hand_over(worker)
    collect(reg)
    assert os.listdir(reg.path / layout.LEASES) == [worker.lease]
    reg.exited("a", code=0)
    collect(reg)
    assert os.listdir(reg.path / layout.LEASES) == []


def test_beats_add_nothing_to_the_log_and_a_missing_one_stalls(reg: Registry) -> None:
    """A thousand beats, not one byte; silence is a flag, not a death, and ends with a beat."""
    reg.register("a", heartbeat_s=0.1)
    before = (reg.last_seq, (reg.path / layout.LOG / layout.segment_name(1)).stat().st_size)
    for _ in range(1000):
        reg.beat("a")
    assert reg.liveness("a").flags == frozenset()
    until(lambda: Flag.STALLED in reg.liveness("a").flags)
    assert reg.liveness("a").alive
    assert Flag.STALLED in reg.judge(reg.workers())[0].flags
    assert collect(reg).lost == ()
    reg.beat("a")
    assert reg.liveness("a").flags == frozenset()
    after = (reg.last_seq, (reg.path / layout.LOG / layout.segment_name(1)).stat().st_size)
    assert after == before


def test_torn_beat_is_no_beat_and_no_error(reg: Registry) -> None:
    """A lease file that is damaged says nothing about beats; its lock still speaks."""
    worker = reg.register("a", heartbeat_s=0.1)
    assert worker.lease is not None
    (reg.path / layout.LEASES / worker.lease).write_bytes(b"\0" * 36)
    liveness = reg.liveness("a")
    assert liveness.alive
    assert liveness.evidence.beat_age_s is None
    assert liveness.flags == frozenset()


@pytest.mark.parametrize("silence", [0, -1, float("nan"), float("inf"), 1e9, True, "1"])
def test_impossible_heartbeat_is_refused(reg: Registry, silence: float) -> None:
    """Bad arguments raise before anything is written."""
    with pytest.raises((ValueError, TypeError)):
        reg.register("a", heartbeat_s=silence)
    assert not reg.exists


def test_beat_without_a_lease_says_what_to_do(reg: Registry) -> None:
    """There is nothing to beat on."""
    reg.register("a")
    with pytest.raises(LeaseMissing) as caught:
        reg.beat("a")
    assert "heartbeat_s" in caught.value.remedy


def test_worker_whose_owner_died_is_orphaned(reg: Registry, crew: Crew) -> None:
    """It lives, and nobody answers for it any more."""
    owner, worker = crew.sleeper(), crew.sleeper()
    reg.register("a", pid=worker.pid, owner=owner.pid)
    assert reg.liveness("a").flags == frozenset()
    kill(owner)
    assert reg.liveness("a").flags == {Flag.ORPHANED}
    assert reg.liveness("a").alive


def test_worker_whose_socket_nobody_serves_is_unreachable(
    reg: Registry, crew: Crew, tmp_path: Path
) -> None:
    """Absent, refused, then served; the path may be longer than an address."""
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    path = deep / "worker.sock"
    reg.register("a", pid=crew.sleeper().pid, sock=str(path))
    assert reg.liveness("a").flags == {Flag.UNREACHABLE}
    listening = socket.socket(socket.AF_UNIX)
    here = os.open(deep, os.O_RDONLY)
    listening.bind(f"/proc/self/fd/{here}/worker.sock")
    os.close(here)
    assert reg.liveness("a").flags == {Flag.UNREACHABLE}
    listening.listen()
    assert reg.liveness("a").flags == frozenset()
    listening.close()


def test_clock_that_steps_changes_no_verdict(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A boot time that moves with the wall clock is no part of an identity."""
    worker = reg.register("a", pid=crew.sleeper().pid)
    began = identity.booted_at()
    for step in (
        timedelta(days=-900),
        timedelta(hours=-1),
        timedelta(hours=1),
        timedelta(days=900),
    ):
        monkeypatch.setattr(identity, "booted_at", lambda step=step: began + step)
        assert reg.liveness("a").cause == "identity"
        assert identity.capture(worker.pid) == worker.identity


@ROOT
def test_hidden_process_of_another_user_is_alive(place: Path, crew: Crew) -> None:
    """Under hidepid=2 /proc hides it; the pidfd proves it. Without one: UNKNOWN, not dead."""
    worker = crew.sleeper()
    who = identity.capture(worker.pid)
    fields = repr((who.pid, who.pidfd_id, who.start_ticks, who.boot_id, who.pid_ns, who.host_id, 0))
    code = f"""
import os
from datetime import UTC, datetime
from crewlog.process import evidence, identity
from crewlog.model.events import Identity
from crewlog.process.liveness import judge
os.setgroups([]); os.setgid(65534); os.setuid(65534)
assert not os.path.exists("/proc/{worker.pid}")
names = ("pid", "pidfd_id", "start_ticks", "boot_id", "pid_ns", "host_id", "uid")
who = Identity(**dict(zip(names, {fields})))
def cause():
    seen = evidence.witness().look(who, last_event_at=datetime.now(UTC))
    return judge(who, seen, final=False).cause
print(cause())
identity.open_pidfd = lambda pid: ("unsupported", -1)
print(cause())
"""
    os.chmod(place.parent, 0o755)  # noqa: S103 (the child must get there)
    script = "mount -t proc -o hidepid=2 proc /proc && exec " + sys.executable + ' -c "$0"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, code], check=False, capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "eventlog"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if "hidepid" in done.stderr or done.returncode == 32:
        pytest.skip(f"no procfs can be mounted here: {done.stderr}")
    assert done.stderr == ""
    assert done.stdout.split() == ["identity", "identity_unverifiable"]


def test_who_cannot_be_judged_is_released_on_a_persons_word(
    reg: Registry, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only an UNKNOWN one: the living are refused, the dead recorded as dead."""
    alive, dead, unknown = (crew.sleeper() for _ in range(3))
    for sid, process in (("alive", alive), ("dead", dead)):
        reg.register(sid, pid=process.pid)
    kill(dead)
    with pytest.raises(crewlog.WorkerExists):
        assume_dead(reg, "alive", reason="I think so")
    assert assume_dead(reg, "dead", reason="I think so").type == "worker.lost"
    reg.register("unknown", pid=unknown.pid)
    here = identity.scope()
    away = identity.Scope(here.boot_id, here.host_id, "1:1")
    monkeypatch.setattr(identity, "scope", lambda: away)
    assert reg.liveness("unknown").cause in {"foreign_pid_namespace", "found_in_namespace"}
    monkeypatch.setattr(identity, "pidfds_have_inodes", lambda: False)
    assert reg.liveness("unknown").verdict is Verdict.UNKNOWN
    assert collect(reg).unknown == ("alive", "unknown")
    event = assume_dead(reg, "unknown", reason="its host burned down")
    assert event.type == "worker.released"
    assert event.data["cause"] == "assumed_dead"
    assert event.data["reason"] == "its host burned down"


def test_beat_and_look_race_never_sees_a_torn_beat(place: Path) -> None:
    """Two processes: one beats, one looks; each look finds a whole beat."""
    with crewlog.open(place) as reg:
        worker = reg.register("a", heartbeat_s=60)
        assert worker.lease is not None
        name = worker.lease

        def beats() -> None:
            with crewlog.open(place) as mine:
                at = files(mine).directory
                deadline = time.monotonic() + 0.5
                while time.monotonic() < deadline:
                    leases.beat(at, name)

        pid = forked(beats)
        at = files(reg).directory
        looks = [leases.look(at, name) for _ in range(2000)]
        joined(pid)
    assert {seen.state for seen in looks} == {"held"}
    assert all(seen.beat_age_s is not None and seen.beat_age_s < 60 for seen in looks)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare(1)"
)
def test_beat_by_a_clock_of_another_namespace_tells_no_age(reg: Registry, place: Path) -> None:
    """A worker in a time namespace is not called stalled by a clock that is not its own."""
    code = "import signal, sys, crewlog\nreg = crewlog.open(sys.argv[1])\n"
    code += "reg.register('a', heartbeat_s=0.5)\nreg.beat('a')\n"
    code += "print(sorted(reg.liveness('a').flags), flush=True)\nsignal.pause()"
    words = ["unshare", "--time", "--monotonic", "500000", "--fork", "--kill-child"]
    process = subprocess.Popen(
        [*words, sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if process.stdout.readline() != "[]\n":
        pytest.skip("no time namespace can be made here")
    over = time.monotonic() + 0.8
    until(lambda: time.monotonic() > over)
    liveness = reg.liveness("a")
    assert liveness.evidence.beat_age_s is None
    assert liveness.flags == frozenset()
    process.kill()
    process.communicate()
