"""Workers of many hosts: a lease says who lives, and a pid of another host is never looked at.

Two hosts on one machine are two network namespaces with a boot id and a machine id of their own.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import crewlog
from cluster import MISSING, Cluster
from crewlog import host as host_clock
from crewlog.process import identity
from crewlog.process.evidence import Witness
from crewlog.registry import Registry
from crewlog.workers.start import turn
from crewlog_compactor import collect
from procs import Crew, forked, joined, slay, until
from stores import opened

TTL_S = 2
pytestmark = [
    pytest.mark.long,
    pytest.mark.alone,  # it counts processes of the whole machine
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    pytest.mark.limits(lease_ttl_s=TTL_S, claim_ttl_s=TTL_S),
]


@contextlib.contextmanager
def elsewhere(
    monkeypatch: pytest.MonkeyPatch, *, clock: timedelta = timedelta(0)
) -> Iterator[None]:
    """Be another host for a block: another boot id, another machine, another clock."""
    here = identity.scope()
    there = identity.Scope("11111111-0000-4000-8000-000000000000", "another", here.pid_ns)
    with monkeypatch.context() as patch:
        patch.setattr(identity, "scope", lambda: there)
        patch.setattr(identity, "boot_id", lambda: there.boot_id)
        patch.setattr(host_clock, "now", lambda: datetime.now(UTC) + clock)
        yield


def keepers() -> list[int]:
    """Return the pids of the processes that keep leases."""
    done = subprocess.run(
        ["pgrep", "-f", "from crewlog.etcd.keeper import main"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return [int(row) for row in done.stdout.split()]


def cause(reg: Registry, sid: str) -> tuple[str, str]:
    """Return verdict and cause."""
    liveness = reg.liveness(sid)
    return liveness.verdict.value, liveness.cause


def test_lease_is_kept_for_as_long_as_the_worker_lives(
    url: str, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far beyond its time; stopped or not; it ends with the process, at once."""
    with opened(url) as reg:
        worker = reg.spawn("a", ["sleep", "300"], lease=True)
        os.kill(worker.pid, signal.SIGSTOP)
        with elsewhere(monkeypatch):
            began = datetime.now(UTC)
            until(lambda: datetime.now(UTC) - began > timedelta(seconds=2.5 * TTL_S))
            assert cause(reg, "a") == ("alive", "lease"), "a stopped worker lives"
        leases, name = reg.store().leases, worker.lease
        assert name is not None
        os.kill(worker.pid, signal.SIGKILL)
        killed = datetime.now(UTC)
        # the lease itself: its starter records the end at the same time, and may be first
        until(lambda: leases.look([name])(name).state == "free")
        assert datetime.now(UTC) - killed < timedelta(seconds=TTL_S), "revoked, not run out"


_EXEC = """
import os, sys, crewlog
from crewlog.model.limits import Limits
from crewlog.place import locate
from crewlog.registry import Registry
Registry(locate(sys.argv[1]), limits=Limits(lease_ttl_s=2)).register("a", lease=True)
os.execvp("sleep", ["sleep", "300"])
"""


def test_lease_of_a_process_that_registers_itself_ends_with_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the registry is closed, and after an exec."""
    process = subprocess.Popen([sys.executable, "-c", _EXEC, url])
    with opened(url) as reg, elsewhere(monkeypatch):
        until(lambda: reg.get("a") is not None)
        began = datetime.now(UTC)
        until(lambda: datetime.now(UTC) - began > timedelta(seconds=1.5 * TTL_S))
        assert cause(reg, "a") == ("alive", "lease")
        process.kill()
        process.wait()
        until(lambda: cause(reg, "a") == ("dead", "lease_released"))


def _has_begun(pid: int) -> bool:
    """Say whether the program is there: killed before, its starter takes it along."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep")


def test_worker_outlives_its_manager_and_keeps_its_lease(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager is killed with -9; the worker lives on, for every host."""

    def manage() -> None:
        with opened(url) as mine:
            mine.spawn("a", ["sleep", "300"], lease=True)
            signal.pause()

    manager = forked(manage)
    with opened(url) as reg:
        until(lambda: (now := reg.get("a")) is not None and _has_begun(now.pid))
        slay(manager)
        began = datetime.now(UTC)
        with elsewhere(monkeypatch):
            until(lambda: datetime.now(UTC) - began > timedelta(seconds=1.5 * TTL_S))
            assert cause(reg, "a") == ("alive", "lease")
        worker = reg.get("a")
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)


def test_keeper_outlives_a_kill(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its two processes is made anew by the other one; the lease never runs out."""
    before = set(keepers())
    with opened(url) as reg:
        worker = reg.spawn("a", ["sleep", "300"], lease=True)
        for oldest in (True, False):
            until(lambda: len(set(keepers()) - before) == 2)
            pids = sorted(set(keepers()) - before, key=_started)
            os.kill(pids[0] if oldest else pids[-1], signal.SIGKILL)
            killed = datetime.now(UTC)
            until(lambda: datetime.now(UTC) - killed > timedelta(seconds=1.5 * TTL_S))  # noqa: B023
            with elsewhere(monkeypatch):
                assert cause(reg, "a") == ("alive", "lease")
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda: set(keepers()) <= before)


def _started(pid: int) -> int:
    stat = identity.read_stat(pid)
    assert stat is not None
    return stat.start_ticks


def test_keeper_that_is_killed_lets_the_lease_run_out_and_one_of_many_records_it(
    url: str, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a host is gone: any collector on another host, exactly one event."""
    before = set(keepers())
    with opened(url) as reg:
        worker = reg.spawn("a", ["sleep", "300"], lease=True)
        reg.register("kept", pid=crew.sleeper().pid)
        until(lambda: len(set(keepers()) - before) == 2)
        ours = set(keepers()) - before
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none is left to make the other anew
            for pid in ours:
                os.kill(pid, number)
        with elsewhere(monkeypatch):
            assert cause(reg, "a") == ("alive", "lease")
            assert collect(reg).lost == ()
            until(lambda: cause(reg, "a") == ("dead", "lease_released"))

            def work() -> None:
                with opened(url) as mine:
                    collect(mine)

            joined(*[forked(work) for _ in range(6)])
            losses = [(e.sid, e.data["cause"]) for e in reg.history(types=["worker.lost"])]
            assert losses == [("a", "lease_released")]
            assert [w.sid for w in reg.workers()] == ["kept"], "without a lease: left alone"
            assert cause(reg, "kept") == ("unknown", "foreign_host")
        os.kill(worker.pid, signal.SIGKILL)


def test_registration_that_fails_leaves_no_keeper(url: str, crew: Crew) -> None:
    """The lease is given back."""
    before = set(keepers())
    with opened(url) as reg:
        reg.register("a", pid=crew.sleeper().pid)
        with pytest.raises(crewlog.WorkerExists):
            reg.register("a", lease=True)
        until(lambda: set(keepers()) <= before)


def test_worker_that_does_not_beat_is_stalled_by_the_clusters_clock(url: str) -> None:
    """No clock of any host is asked."""
    with opened(url) as reg:
        reg.register("a", heartbeat_s=1.0)
        assert reg.liveness("a").flags == frozenset()
        until(lambda: crewlog.Flag.STALLED in reg.liveness("a").flags)
        reg.beat("a")
        assert reg.liveness("a").flags == frozenset()


@pytest.mark.parametrize("days", [-3650, 3650])
def test_clock_of_another_host_is_irrelevant(
    url: str, days: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten years off: order is by seq, and nobody is judged by it."""
    with opened(url) as reg:
        reg.register("a", lease=True)
        with elsewhere(monkeypatch, clock=timedelta(days=days)):
            reg.update("a", meta={"n": 1})
            assert cause(reg, "a") == ("alive", "lease")
            assert collect(reg).lost == ()
        assert cause(reg, "a") == ("alive", "identity")
        assert collect(reg).lost == ()
        assert [event.seq for event in reg.history()] == [2, 3]


def test_pid_of_another_host_is_never_looked_at(
    url: str, crew: Crew, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No pidfd, no signal, no /proc, no socket: with every way to look made to fail."""
    with opened(url) as reg:
        listener = socket.create_server(str(tmp_path / "sock"), family=socket.AF_UNIX)
        reg.register("leased", lease=True, sock=str(tmp_path / "sock"), ready=True)
        reg.register("bare", pid=crew.sleeper().pid)
        with elsewhere(monkeypatch) as _, monkeypatch.context() as patch:

            def never(*_: object, **__: object) -> None:
                raise AssertionError("it was looked at")

            for name in ("open_pidfd", "read_stat", "killed", "look_portable"):
                patch.setattr(identity, name, never)
            patch.setattr(Witness, "_look_here", never, raising=False)
            patch.setattr("crewlog.process.socket.ask", never)
            assert cause(reg, "leased") == ("alive", "lease")
            assert cause(reg, "bare") == ("unknown", "foreign_host")
            report = collect(reg)
            reg.update("leased", state="draining")
            with pytest.raises(crewlog.WaitTimeout):  # it leaves there; nobody looks for it here
                reg.ensure("leased", ["sleep", "1"], timeout_s=0.2)
        listener.close()
        assert report.unknown == ("bare",)
        with elsewhere(monkeypatch), pytest.raises(crewlog.CrewlogError):
            reg.stop("bare", reason="it is another host's")
        assert reg.liveness("bare").alive


def test_owner_of_a_cursor_and_of_a_turn_that_is_killed_gives_way(url: str) -> None:
    """Within the time of a claim; a stopped owner cannot write any more."""

    def own() -> None:
        with (
            opened(url) as mine,
            turn(mine._session, "t"),
            mine.watch(cursor="c", after=0) as items,
        ):
            items.next(1)
            signal.pause()

    with opened(url) as reg:
        reg.register("a")
        holder = forked(own)
        until(lambda: reg.store().cursors.is_owned("c"))
        with pytest.raises(crewlog.errors.CursorBusy, match=f"pid {holder}"):
            reg.watch(cursor="c")
        with (
            pytest.raises(crewlog.LockBusy, match=f"pid {holder}"),
            turn(reg._session, "t", wait_s=0.1),
        ):
            pass
        slay(holder)
        until(lambda: not reg.store().cursors.is_owned("c"))
        with reg.watch(cursor="c") as items:
            assert [i.seq for i in items.drain() if i.kind == "change"] == [2]
        with turn(reg._session, "t", wait_s=3 * TTL_S):
            pass


# -- two hosts ------------------------------------------------------------------------------


def ip(*words: str) -> None:
    """Call ip."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """A network namespace with an address, a boot and a machine of its own."""

    def __init__(self, number: int, home: Path) -> None:
        """Make it, and the wire to it."""
        self.name = f"crewlog-{os.getpid()}-{number}"
        self.wire = f"cl{os.getpid() % 10**6}x{number}"
        self.server = f"10.213.{number}.1"
        self._home = home
        ip("netns", "add", self.name)
        ip("link", "add", self.wire, "type", "veth", "peer", "name", "up0", "netns", self.name)
        ip("addr", "add", f"{self.server}/24", "dev", self.wire)
        ip("link", "set", self.wire, "up")
        ip("-n", self.name, "addr", "add", f"10.213.{number}.2/24", "dev", "up0")
        ip("-n", self.name, "link", "set", "up0", "up")
        boot = home / f"boot{number}"
        boot.write_text(f"{number:08d}-0000-4000-8000-000000000000\n")
        machine = home / f"machine{number}"
        machine.write_text(f"{number:032d}\n")
        mounts = [(boot, "/proc/sys/kernel/random/boot_id"), (machine, "/etc/machine-id")]
        self._mounts = " && ".join(
            f"mount --bind {file} {place}" for file, place in mounts if Path(place).exists()
        )

    def start(self, code: str, *words: str) -> subprocess.Popen[str]:
        """Run Python there."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, "sh", "-c", f'{self._mounts} && exec "$@"', "sh",
             sys.executable, "-c", code, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, code: str, *words: str) -> str:
        """Run Python there, and return what it printed."""
        process = self.start(code, *words)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        return output.strip()

    def cut(self, *, off: bool) -> None:
        """Take the wire away, or give it back."""
        ip("link", "set", self.wire, "down" if off else "up")

    def end(self) -> None:
        """Remove it, with all that still runs there."""
        listing = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
        )
        for pid in listing.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for words in (("link", "del", self.wire), ("netns", "del", self.name)):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip(*words)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Make two hosts, where root allows."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and ip (Debian: iproute2)")
    made: list[Host] = []
    try:
        try:
            made = [Host(1, tmp_path)]
            made.append(Host(2, tmp_path))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr}")
        yield made[0], made[1]
    finally:
        for host in made:
            host.end()


_SPAWN = """
import sys, crewlog
from crewlog.model.limits import Limits
from crewlog.place import locate
from crewlog.registry import Registry
reg = Registry(locate(sys.argv[1]), limits=Limits(lease_ttl_s=2))
worker = reg.spawn("web", ["sleep", "300"], lease=True, ready=True)
print(worker.pid, flush=True)
sys.stdin.read()
"""
_JUDGE = """
import sys, crewlog
with crewlog.open(sys.argv[1]) as reg:
    found = reg.liveness("web")
    seen = found.evidence
    print(found.verdict, found.cause, seen.opened, seen.killed, seen.start_ticks)
"""
_WATCH = """
import sys, crewlog
with crewlog.open(sys.argv[1]) as reg, reg.watch() as items:
    print("watching", flush=True)
    for item in items:
        if item.kind == "change":
            print(item.type, flush=True)
"""
_COLLECT = """
import sys, crewlog
from crewlog_compactor import collect
with crewlog.open(sys.argv[1]) as reg:
    print(*collect(reg).lost)
"""


def test_two_hosts_see_watch_and_judge_each_others_workers(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """A worker of one is seen, watched and judged by its lease on the other; cut off, lost."""
    one, two = hosts
    with Cluster(tmp_path / "home", listen="0.0.0.0") as cluster:  # noqa: S104 (namespaces of ours)
        port = cluster.servers[0].port
        here, there = (f"etcd://{host.server}:{port}/p" for host in hosts)
        with crewlog.open(cluster.url("p")) as reg:
            reg.register("first")
            watcher = two.start(_WATCH, there)
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == "watching\n"
            manager = one.start(_SPAWN, here)
            assert manager.stdout is not None
            pid = int(manager.stdout.readline())
            assert watcher.stdout.readline() == "worker.registered\n"
            assert one.ask(_JUDGE, here) == "alive identity yes None None"
            assert two.ask(_JUDGE, there) == "alive lease None None None"
            assert os.path.exists(f"/proc/{pid}"), (
                "there is such a pid on both, and it is not asked"
            )
            assert two.ask(_COLLECT, there) == ""

            one.cut(off=True)  # the host is gone for all others; its worker lives
            until(lambda: two.ask(_JUDGE, there).startswith("dead lease_released"))
            one.cut(off=False)  # and comes back before anybody has recorded it
            until(lambda: two.ask(_JUDGE, there).startswith("alive lease"))

            one.cut(off=True)
            until(lambda: two.ask(_JUDGE, there).startswith("dead lease_released"))
            assert two.ask(_COLLECT, there) == "web"
            assert two.ask(_COLLECT, there) == ""
            assert watcher.stdout.readline() == "worker.lost\n"
            assert [e.type for e in reg.history(sid="web")] == ["worker.registered", "worker.lost"]
            assert os.path.exists(f"/proc/{pid}")
        for process in (watcher, manager):
            process.kill()
            process.communicate()
