"""A program that the fork server has made has what a child of ours has, and nothing else."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from crewlog.process import launch
from crewlog.process.forkserver import Refused
from crewlog.process.launch import Launch
from procs import forked, joined, until

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in {"x86_64", "aarch64"},
    reason="needs a fork of Linux",
)

_PROBE = """
import json, os, resource, signal, sys
rows = dict(r.split(":", 1) for r in open("/proc/self/status").read().splitlines())
keep = ("Umask", "Uid", "Gid", "Groups", "SigIgn", "SigBlk", "SigCgt", "CapEff", "NoNewPrivs",
        "Seccomp", "Cpus_allowed")
def target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
print(json.dumps({
    **{k: rows[k] for k in keep},
    "limits": [resource.getrlimit(n) for n in range(16)],
    "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "cwd": os.getcwd(), "argv": sys.argv,
    "env": {k: v for k, v in os.environ.items() if k != "LC_CTYPE"},  # which Python itself sets
    "parent": os.getppid(), "leads": os.getsid(0) == os.getpid() == os.getpgid(0),
    "fds": {fd: target(fd) for fd in os.listdir("/proc/self/fd") if not target(fd).endswith("/fd")},
    "cgroup": open("/proc/self/cgroup").read(),
}))
"""


def probe(path: Path, *words: str) -> list[str]:
    """Return a program that says what it has; a bare one, to see signals as they come."""
    code = path / "probe.py"
    code.write_text(_PROBE)
    return [sys.executable, "-I", "-S", str(code), *words]


def spawned(argv: list[str], path: Path, **options: object) -> dict[str, object]:
    """Start it in two steps, and return what it said."""
    out = path / "out"
    with out.open("wb") as file:
        made = Launch(argv, stdout=file, stderr=launch.AS_STDOUT, **options)  # type: ignore[arg-type]
        made.go()
        made.ended()
        made.reap()
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def plain(argv: list[str], path: Path, **options: object) -> dict[str, object]:
    """Start it by subprocess, and return what it said."""
    out = path / "out"
    with out.open("wb") as file:
        subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=True,
            start_new_session=True, **{"env": dict(os.environ), **options},  # type: ignore[call-overload]
        )  # fmt: skip
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def is_born(made: Launch) -> bool:
    """Say whether the fork server made it."""
    return isinstance(made._child, launch._Born)


def test_program_has_what_subprocess_would_give_it(tmp_path: Path) -> None:
    """Ids, limits, signals, mask, environment, directory, descriptors, our child, a session."""
    words = probe(tmp_path, "a b", "ä", "")
    env = {**os.environ, "A.B": "dot", "EMPTY": "", "UMLAUT": "ä"}
    mine = spawned(words, tmp_path, env=env, cwd=str(tmp_path))
    assert mine == plain(words, tmp_path, env=env, cwd=str(tmp_path))
    assert (mine["parent"], mine["leads"]) == (os.getpid(), True)


def _umask() -> None:
    os.umask(0o027)


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (900, 900))  # more than the tests before have open


def _nice() -> None:
    os.nice(3)


def _ignored() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # nohup has ignored SIGHUP already


def _blocked() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def _cpus() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def _nobody() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


@pytest.mark.parametrize("change", [_umask, _limits, _nice, _ignored, _blocked, _cpus])
def test_what_changed_since_the_server_began_is_had_too(tmp_path: Path, change: object) -> None:
    """A server that has it otherwise is not asked."""

    def child() -> None:
        before = spawned(probe(tmp_path), tmp_path)
        change()  # type: ignore[operator] # a function
        after = spawned(probe(tmp_path), tmp_path)
        assert after != before
        assert after == plain(probe(tmp_path), tmp_path)

    joined(forked(child))


def test_environment_of_the_program_reaches_the_program_only(tmp_path: Path) -> None:
    """What breaks Python breaks no start of what is none."""
    broken = tmp_path / "lib"
    broken.mkdir()
    for name in ("libc.so.6", "libpython3.11.so.1.0"):
        (broken / name).write_text("no library")
    out = tmp_path / "out"
    env = {"PATH": os.environ["PATH"], "PYTHONHOME": "/nowhere", "LD_PRELOAD": "", "X": "1"}
    with out.open("wb") as file:
        made = Launch(["sh", "-c", "echo $X $PYTHONHOME"], env=env, stdout=file)
        made.go()
        made.ended()
        made.reap()
    assert out.read_text() == "1 /nowhere\n"
    made = Launch(
        ["sleep", "300"], env={"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(broken)}
    )
    assert is_born(made)
    made.give_up()


def test_killed_server_is_begun_anew(tmp_path: Path) -> None:
    """And what it had made lives on, and is ours to wait for."""
    first = Launch(["sleep", "300"])
    assert is_born(first)
    first.go()
    server = launch._server._process
    assert server is not None
    server.kill()
    server.wait()
    second = Launch(["sh", "-c", "exit 3"])
    assert is_born(second)
    second.go()
    ended = second.ended()
    assert ended is not None
    assert ended.status is not None
    assert ended.status.code == 3
    second.reap()
    assert first.ended(wait=False) is None
    os.kill(first.pid, signal.SIGKILL)
    first.ended()
    first.reap()


def test_without_a_fork_an_interpreter_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on systems that have none; the program has the same."""
    words = probe(tmp_path)
    mine = spawned(words, tmp_path)

    def refuse(*_: object) -> int:
        raise Refused("not here")

    monkeypatch.setattr(launch._server, "fork", refuse)
    made = Launch(["true"])
    assert not is_born(made)
    made.give_up()
    assert spawned(words, tmp_path) == mine


def test_forked_child_has_a_server_of_its_own(tmp_path: Path) -> None:
    """The parent's makes children of the parent."""
    Launch(["true"]).give_up()
    assert launch._server._line is not None

    def child() -> None:
        assert launch._server._line is None
        assert spawned(probe(tmp_path), tmp_path)["parent"] == os.getpid()

    joined(forked(child))
    Launch(["true"]).give_up()


def test_threads_share_a_server(tmp_path: Path) -> None:
    """One asks at a time; each gets its own."""
    codes: dict[int, int | None] = {}

    def start(number: int) -> None:
        made = Launch(["sh", "-c", f"exit {number}"])
        made.go()
        ended = made.ended()
        assert ended is not None
        assert ended.status is not None
        codes[number] = ended.status.code
        made.reap()

    threads = [threading.Thread(target=start, args=(n,)) for n in range(1, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {n: n for n in range(1, 25)}


def test_server_ends_with_its_host() -> None:
    """Killed with -9, too: it reads the end of its line."""
    code = "import sys; from crewlog.process import launch\n"
    code += "launch.Launch(['true']).give_up(); print(launch._server._process.pid, flush=True)\n"
    code += "sys.stdin.read()"
    host = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert host.stdout is not None
    server = int(host.stdout.readline())
    host.kill()
    host.communicate()
    until(lambda: not os.path.exists(f"/proc/{server}") or _is_dead(server))


def _is_dead(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def test_large_words_pass(tmp_path: Path) -> None:
    """More than a socket takes at once."""
    out = tmp_path / "out"
    env = {"PATH": os.environ["PATH"], **{f"V{n}": "x" * 100_000 for n in range(12)}}
    with out.open("wb") as file:
        made = Launch(["sh", "-c", "echo ${#V11} ${#1}", "sh", "y" * 100_000], env=env, stdout=file)
        assert is_born(made)
        made.go()
        made.ended()
        made.reap()
    assert out.read_text() == "100000 100000\n"
