"""Every command in bad surroundings: a typed error or an answer, never a fault of ours.

The commands are those of click's own tree, so that a new one cannot be left out.
"""

import contextlib
import ctypes
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import crewlog
from commands import CREWLOG
from crewlog_cli.main import COMMANDS
from crewlog_compactor import compact
from procs import Crew

pytestmark = pytest.mark.long
ROOT = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare(1)"
)
# What a command is called with; a command that is not here is called without words.
WORDS = {
    "show": ("a",), "alive": ("a",), "explain": ("a",), "beat": ("beats",),
    "observe": ("a", "--timeout", "0s"),
    "register": ("b", "--pid", "1"), "update": ("a", "--state", "ready"),
    "remove": ("a", "--reason", "r"), "import": ("nothing.json",), "exec": ("c", "--", "true"),
    "run": ("d", "--", "true"), "start": ("e", "--log", "log", "--", "true"), "logs": ("a",),
    "stop": ("nobody", "--reason", "r"), "diff": ("--from", "1"),
    "watch": ("--timeout", "0s"), "top": ("--help",), "demo": ("--help",), "cursor": ("ls",),
    "schedule": ("cron",), "completion": ("bash",), "backup": ("copy",),
    "timeline": ("--html", "-"),
    "migrate": ("nowhere", "copy"),
}  # fmt: skip
WITHOUT_PLACE = {"migrate", "completion", "demo"}


def call(name: str, place: str) -> list[str]:
    """Return the words of a command on a place."""
    own = () if name in WITHOUT_PLACE else ("--dir", place)
    return [*CREWLOG, *own, name, *WORDS.get(name, ())]


def run(
    words: list[str],
    cwd: Path,
    *,
    env: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> None:
    """Run a command, and fail if it ends as a fault of ours."""
    done = subprocess.run(
        words, cwd=cwd, env=env, preexec_fn=before, capture_output=True, text=True,
        check=False, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode not in {70, -6, -11}, (words[-4:], said[-1500:])
    assert "Traceback" not in said, (words[-4:], said[-1500:])


@pytest.fixture
def store(place: Path, crew: Crew) -> Path:
    """Fill a store: a living worker with a beat, an archive, a cursor."""
    with crewlog.open(place) as reg:
        reg.register("a", pid=crew.sleeper().pid, labels={"x": "1"})
        for number in range(3):
            reg.update("a", meta={"n": number})
            compact(reg, gc=False)
        reg.spawn("beats", ["sleep", "300"], heartbeat_s=60)
        with reg.watch(cursor="c", after="oldest") as items:
            items.drain()
    return place


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", ["loop", "file", "device", "unreadable", "below a file", "long"])
def test_place_that_is_none(tmp_path: Path, kind: str, name: str) -> None:
    """A circle of links, a file, a device, a closed directory, a name that cannot be."""
    where = tmp_path / "it"
    match kind:
        case "loop":
            where.symlink_to("it")
        case "file":
            where.write_text("something")
        case "device":
            where = Path("/dev/null")
        case "unreadable":
            where.mkdir(mode=0o000)
        case "below a file":
            where.write_text("something")
            where /= "below"
        case _:
            where = tmp_path / ("x" * 5000)
    run(call(name, str(where)), tmp_path)


def _closed(*fds: int) -> Callable[[], None]:
    def close() -> None:
        for fd in fds:
            os.close(fd)

    return close


def _few(count: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def _small() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


_PIDFD_OPEN = 434  # on every machine


def _no_pidfd() -> None:
    """Let the kernel refuse pidfd_open(2), as sandboxes do: seccomp(2), bpf(4)."""
    libc = ctypes.CDLL(None, use_errno=True)
    load, equal, refuse, allow = (
        (0x20, 0, 0, 0),
        (0x15, 0, 1, _PIDFD_OPEN),
        0x00050000 | 1,
        0x7FFF0000,
    )
    rules = [load, equal, (0x06, 0, 0, refuse), (0x06, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code))
    held = ctypes.create_string_buffer(program)
    assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
    assert libc.prctl(22, 2, held, 0, 0) == 0, "PR_SET_SECCOMP"


SURROUNDINGS: dict[str, tuple[dict[str, str] | None, Callable[[], None] | None]] = {
    "no stdin": (None, _closed(0)),
    "no stdout": (None, _closed(1)),
    "no stderr": (None, _closed(2)),
    "no streams": (None, _closed(0, 1, 2)),
    "no HOME": ({"HOME": ""}, None),
    "LC_ALL=C": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, None),
    "a small file size": (None, _small),
    "few descriptors": (None, _few(14)),
    "no pidfd": (None, _no_pidfd),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", SURROUNDINGS)
def test_process_that_lacks_something(store: Path, tmp_path: Path, kind: str, name: str) -> None:
    """Streams, a home, a locale, room in files, descriptors."""
    extra, before = SURROUNDINGS[kind]
    env = {**os.environ, **(extra or {})}
    if kind == "no HOME":
        env = {key: value for key, value in env.items() if key not in {"HOME", "XDG_STATE_HOME"}}
    run(call(name, str(store)), tmp_path, env=env, before=before)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system without room."""
    at = tmp_path / "full"
    at.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k,mode=700", "none", str(at)], check=False
    )
    if done.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield at
    subprocess.run(["umount", "-l", str(at)], check=False)


@ROOT
@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk(full: Path, tmp_path: Path, name: str) -> None:
    """A store that was made while there was room."""
    with crewlog.open(full / "store") as reg:
        reg.register("a")
    fd = os.open(full / "fill", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(fd, bytes(4096)):
            continue
    os.close(fd)
    run(call(name, str(full / "store")), tmp_path)


NAMESPACES = {
    "no /proc": "mount -t tmpfs none /proc",
    "read-only": "mount --bind $STORE $STORE && mount -o remount,bind,ro $STORE",
    "no passwd": "mount -t tmpfs none /mnt && touch /mnt/p && mount --bind /mnt/p /etc/passwd",
}


@ROOT
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", NAMESPACES)
def test_machine_that_lacks_something(store: Path, tmp_path: Path, kind: str, name: str) -> None:
    """In a mount namespace of its own: no /proc, a read-only store, no users."""
    line = f'{NAMESPACES[kind]} && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", line, "sh", *call(name, str(store))]
    run(words, tmp_path, env={**os.environ, "STORE": str(store)})


def _open_to_all() -> bool:
    """Say whether a process of another user could start this interpreter."""
    parents = [*Path(sys.executable).resolve().parents, *Path(sys.executable).parents]
    return all(parent.stat().st_mode & 1 for parent in parents)


@ROOT
@pytest.mark.parametrize("name", COMMANDS)
def test_uid_that_nobody_has(store: Path, name: str) -> None:
    """A container that runs as a number."""
    if not Path(sys.executable).resolve().parent.stat().st_mode & 1 or not _open_to_all():
        pytest.skip("others may not run this Python")

    def become() -> None:
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)

    run(call(name, str(store)), Path("/"), before=become)


def test_the_harness_notices_a_fault(tmp_path: Path) -> None:
    """Negative control: a command that ends with 70 fails."""
    with pytest.raises(AssertionError):
        run(["sh", "-c", "exit 70"], tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs seccomp")
def test_worker_is_started_and_its_end_recorded_without_pidfds(place: Path) -> None:
    """A sandbox that refuses them: by its start time, and by wait(2)."""
    code = """
import sys, time, crewlog
with crewlog.open(sys.argv[1]) as reg:
    worker = reg.spawn("a", ["sh", "-c", "exit 7"])
    assert worker.identity.pidfd_id is None
    while not reg.get("a").final:
        time.sleep(0.05)
    assert reg.get("a").exit.code == 7
    sleeper = reg.spawn("b", ["sleep", "300"])
    assert reg.liveness("b").cause == "start_time"
    with reg.observe_all() as observer:
        assert observer.wait(20)
        print(reg.stop("b", reason="done").data["signal"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)], preexec_fn=_no_pidfd, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("15\n", "")
