"""Cut the power of real file systems under writers, compactors and watchers.

A file system on a loop device in memory is shut down without flushing (ext4, XFS), or its device is
copied while every process stands still (btrfs), so that whatever was not written out is gone. Then
it is mounted again, its journal is replayed, and the store is opened as after a reboot: what was
acknowledged must be there, and what a watcher was shown must be there byte for byte.
"""

import contextlib
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

import stores
from crewlog.errors import CrewlogError
from crewlog.local.disk import Disk
from crewlog_compactor import compact, verify
from faults import another_boot
from procs import forked, state_of, until
from stores import opened

_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), ext4 and XFS; 2: without flushing the log
MEMORY = Path("/dev/shm")  # noqa: S108 (loop devices in memory)


@dataclass(frozen=True)
class Kind:
    """A file system: how it is made and mounted, how its power is cut."""

    make: tuple[str, ...]
    size: int
    options: str = "defaults"
    by_image: bool = False


KINDS = {
    "ext4-ordered": Kind(("mkfs.ext4", "-q", "-F"), 64 << 20, "data=ordered"),
    "ext4-writeback": Kind(("mkfs.ext4", "-q", "-F"), 64 << 20, "data=writeback"),
    "ext4-journal": Kind(("mkfs.ext4", "-q", "-F"), 64 << 20, "data=journal"),
    "xfs": Kind(("mkfs.xfs", "-q", "-f"), 320 << 20),
    "btrfs": Kind(("mkfs.btrfs", "-q", "-f"), 128 << 20, "commit=300", by_image=True),
}


def _why_not() -> str:
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        return "needs root and loop devices"
    if not MEMORY.is_dir() or shutil.which("losetup") is None:
        return "needs /dev/shm and losetup"
    return ""


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "can be done here"),
]


def run(*words: str) -> str:
    """Run a tool of the system."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


class Machine:
    """A file system whose power can be cut."""

    def __init__(self, kind: Kind) -> None:
        """Make it and mount it."""
        self.kind = kind
        self.home = Path(tempfile.mkdtemp(dir=MEMORY, prefix="crewlog-power-"))
        self.image = self.home / "image"
        self.mounted = self.home / "mounted"
        self.mounted.mkdir()
        with self.image.open("wb") as file:
            file.truncate(kind.size)
        self.device = ""
        self._attach()
        run(*kind.make, self.device)
        self._mount()

    def _attach(self) -> None:
        self.device = run("losetup", "-f", "--show", str(self.image))

    def _mount(self) -> None:
        run("mount", "-o", self.kind.options, self.device, str(self.mounted))

    @property
    def place(self) -> Path:
        """Name the store on it."""
        return self.mounted / "store"

    def cut(self, pids: list[int]) -> None:
        """Lose whatever was not written out, end the processes, and mount what is left."""
        copy = self.home / "copy"
        if self.kind.by_image:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            until(lambda: all(state_of(pid) == "T" for pid in pids))
            shutil.copyfile(self.image, copy)
        else:
            fd = os.open(self.mounted, os.O_RDONLY)
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", 2))
            os.close(fd)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._unmount()
        if self.kind.by_image:
            run("losetup", "-d", self.device)
            copy.rename(self.image)
            self._attach()
        self._mount()

    def _unmount(self) -> None:
        """Unmount it, and wait until no other mount namespace that was made meanwhile has it.

        Else the next mount would show the file system that was shut down.
        """
        run("umount", str(self.mounted))
        until(lambda: not self._mounted_anywhere())

    def _mounted_anywhere(self) -> bool:
        for process in Path("/proc").glob("[0-9]*/mountinfo"):
            with contextlib.suppress(OSError):  # it has ended
                if f" {self.device} " in process.read_text():
                    return True
        return False

    @contextlib.contextmanager
    def snapshot(self, number: int) -> Iterator[Path]:
        """Take a snapshot while everybody writes on, and look at it as another place."""
        if self.kind.by_image:  # btrfs has its own
            taken = self.mounted / f"taken-{number}"
            run("btrfs", "subvolume", "snapshot", str(self.mounted), str(taken))
            yield taken / "store"
            run("btrfs", "subvolume", "delete", str(taken))
            return
        run("fsfreeze", "-f", str(self.mounted))  # as LVM does it
        try:
            copy = self.home / f"taken-{number}.image"
            shutil.copyfile(self.image, copy)
        finally:
            run("fsfreeze", "-u", str(self.mounted))
        device, place = run("losetup", "-f", "--show", str(copy)), self.home / f"taken-{number}"
        place.mkdir()
        run("mount", device, str(place))
        try:
            yield place / "store"
        finally:
            run("umount", str(place))
            run("losetup", "-d", device)
            copy.unlink()

    def end(self) -> None:
        """Unmount and remove it."""
        subprocess.run(["umount", "-l", str(self.mounted)], check=False, capture_output=True)
        subprocess.run(["losetup", "-d", self.device], check=False, capture_output=True)
        shutil.rmtree(self.home, ignore_errors=True)


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Make a machine of the kind that the test names."""
    kind = KINDS[request.param]
    if shutil.which(kind.make[0]) is None:
        pytest.skip(f"{kind.make[0]} is not installed")
    try:
        made = Machine(kind)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot be mounted here: {error.stderr}")
    yield made
    made.end()


def _write(place: Path, report: int, turn: int, number: int, redo_bytes: int) -> None:
    """Change things for ever, and tell of each change once it is acknowledged."""
    stores.limit(segment_bytes=20_000, redo_bytes=redo_bytes)
    with opened(place) as reg:
        sid = f"w-{turn}-{number}"
        reg.register(sid)
        for change in range(1_000_000):
            if change % 5 == 4:
                with reg.batch() as batch:
                    for part in range(3):
                        batch.update(sid, meta={"n": change, "part": part})
            else:
                reg.update(sid, meta={"n": change})
            os.write(report, f"{sid} {change}\n".encode())


def _compact(place: Path) -> None:
    with opened(place) as reg:
        while True:
            try:
                compact(reg, gc=False)
            except CrewlogError:
                time.sleep(0.01)


def _watch(place: Path, report: int) -> None:
    with opened(place) as reg, reg.watch(after="now", backend="poll") as items:
        for item in items:
            if item.kind == "change":
                os.write(report, item.event.raw + b"\n")


def _endless(work: Callable[[], None]) -> int:
    """Fork a process that works until it is killed, whatever becomes of its disk."""

    def for_ever() -> None:
        try:
            work()
        except Exception:  # the disk is gone
            signal.pause()

    return forked(for_ever)


_REDO_BYTES = 262_144


def cuts(
    machine: Machine,
    count: int,
    *,
    seed: int,
    control: type[Disk] | None = None,
    rebooted: bool = True,
    redo_bytes: int = _REDO_BYTES,
) -> int:
    """Cut the power again and again; return how many acknowledged events were lost.

    Not `rebooted`: the device came back in the same boot. A small redo begins anew all the time.
    """
    dice, lost, changes = random.Random(seed), 0, 0
    stores.limit(redo_bytes=redo_bytes)
    for turn in range(count):
        with another_boot(turn + 1 if rebooted else 1):
            with opened(machine.place) as reg:
                reg.register(f"boot-{turn}")
            (acks, reports), (shown, seen) = os.pipe(), os.pipe()
            for fd in (acks, shown):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 20)
            with pytest.MonkeyPatch.context() as patch:
                if control is not None:
                    patch.setattr(Disk, "sync", control.sync)
                    patch.setattr(Disk, "start", control.start)
                pids = [
                    _endless(partial(_write, machine.place, reports, turn, n, redo_bytes))
                    for n in range(2)
                ]
            pids += [
                _endless(partial(_compact, machine.place)),
                _endless(partial(_watch, machine.place, seen)),
            ]
            os.close(reports)
            os.close(seen)
            until(lambda fd=acks: _waiting(fd) > _ENOUGH_BYTES)  # type: ignore[misc]
            time.sleep(dice.uniform(0.05, 0.25))
            machine.cut(pids)
        acknowledged, lines = _all(acks).splitlines(), _all(shown).splitlines()
        changes += len(acknowledged)
        with another_boot(turn + 2 if rebooted else 1), opened(machine.place) as reg:
            if not rebooted:  # a reader may be shown up to the last syncs less: see protocol.md
                reg.register(f"first-{turn}")
            before = {event.raw for event in reg.history()}
            there = {
                f"{event.sid} {event.data['meta']['n']}".encode()  # type: ignore[call-overload,index]
                for event in reg.history(types=["worker.updated"])
            }
            lost += len(set(acknowledged) - there)
            whole = [line for line in lines if line.endswith(b'"}')]
            lost += len([line for line in whole if line not in before])
            if control is None:
                reg.register(f"after-{turn}")
                assert [f.code for f in verify(machine.place).findings] == []
    assert changes > 10 * count, "something was written before each cut"
    return lost


_ENOUGH_BYTES = 200  # of some ten bytes an acknowledgement


def _waiting(fd: int) -> int:
    """Return how many bytes a pipe holds."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def _all(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as stream:
        return stream.read()


@pytest.mark.parametrize("machine", KINDS, indirect=True)
def test_power_cuts_lose_nothing_acknowledged_or_shown(machine: Machine) -> None:
    """A few cuts of each file system."""
    assert cuts(machine, 4, seed=1) == 0


@pytest.mark.parametrize("redo_bytes", [4096, _REDO_BYTES])
@pytest.mark.parametrize("machine", KINDS, indirect=True)
def test_devices_that_come_back_in_the_same_boot_lose_nothing(
    machine: Machine, redo_bytes: int
) -> None:
    """The next writer puts back what the redo holds; also of a redo that has begun anew."""
    assert cuts(machine, 3, seed=2, rebooted=False, redo_bytes=redo_bytes) == 0


@pytest.mark.parametrize("machine", ["btrfs", "ext4-ordered"], indirect=True)
def test_snapshots_opened_on_the_same_machine_are_whole_or_refused(machine: Machine) -> None:
    """A snapshot of btrfs, a copy of a device: every change that was acknowledged before it."""
    from crewlog.process import identity

    boot = identity.boot_id()
    (acks, report) = os.pipe()
    fcntl.fcntl(acks, fcntl.F_SETPIPE_SZ, 1 << 20)
    with opened(machine.place) as reg:
        reg.register("begin")
    pids = [_endless(partial(_write, machine.place, report, 0, n, _REDO_BYTES)) for n in range(2)]
    os.close(report)
    seen, whole, refused = b"", 0, 0
    try:
        for turn in range(6):
            until(lambda: _waiting(acks) > _ENOUGH_BYTES)
            seen += os.read(acks, _waiting(acks))  # acknowledged before the snapshot begins
            with machine.snapshot(turn) as place:
                try:
                    with opened(place) as reg:
                        reg.register("goes-on")
                        there = {
                            f"{event.sid} {event.data['meta']['n']}".encode()  # type: ignore[call-overload,index]
                            for event in reg.history(types=["worker.updated"])
                        }
                    assert verify(place).ok
                except CrewlogError:
                    refused += 1
                    continue
                known = set(seen.splitlines()[:-1])  # the last may be half read
                assert known <= there, sorted(known - there)[:5]
                whole += 1
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(acks)
    assert identity.boot_id() == boot
    assert whole > refused


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", KINDS, indirect=True)
def test_hundreds_of_power_cuts_lose_nothing(machine: Machine) -> None:
    """400 cuts of each file system, by hand."""
    for seed in range(16):  # a fresh store now and then keeps the histories short
        assert cuts(machine, 25, seed=seed) == 0
        shutil.rmtree(machine.place)


class Forgetful(Disk):
    """Acknowledges although nothing was synced."""

    def sync(self, fd: int) -> None:
        """Do nothing."""

    def start(self, fd: int, offset: int, size: int) -> None:
        """Do nothing."""


@pytest.mark.parametrize("machine", ["ext4-ordered", "xfs"], indirect=True)
def test_cut_finds_an_acknowledgement_before_the_sync(machine: Machine) -> None:
    """Negative control: a disk that leaves fdatasync out loses what it acknowledged.

    Not at each cut: the compactor beside the writers syncs what it seals.
    """
    try:
        lost = cuts(machine, 24, seed=1, control=Forgetful)
    except CrewlogError:  # damage to what was acknowledged, found and refused
        return
    assert lost > 0
