"""The recipes run as they stand, against the libraries that they are for."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

import crewlog
import crewlog_compactor
from crewlog.registry import Registry
from procs import Crew, kill, until

pytestmark = pytest.mark.long

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
BIN = Path(sys.executable).parent


def needs(module: str) -> pytest.MarkDecorator:
    """Skip, with the reason, where a library of the extra is not installed."""
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"needs {module}: pip install '.[recipes]'")


@pytest.fixture
def kitchen(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write every file of every recipe down, and make the store the default one."""
    for page in RECIPES.glob("*.md"):
        for code in re.findall(r"```python\n(# (\S+)\n.*?)```", page.read_text(), re.DOTALL):
            (tmp_path / code[1]).write_text(code[0])
    monkeypatch.setenv("CREWLOG_DIR", str(place))
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def cook(kitchen: Path, *words: str) -> str:
    """Run one file of a recipe and return what it prints."""
    done = subprocess.run(
        [sys.executable, *words], cwd=kitchen, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def story(reg: Registry, sid: str) -> list[str]:
    """Return what happened to a worker."""
    return [event.type.removeprefix("worker.") for event in reg.history(sid=sid)]


@needs("mcp")
def test_mcp_server_registers_itself_and_its_client_hides_nothing(
    kitchen: Path, reg: Registry
) -> None:
    """The lifespan inside, the client's `crewlog exec` around it: one process, two sids."""
    out = cook(kitchen, "client.py", "outer", sys.executable, "server.py", "inner")
    assert out.splitlines() == ["outer alive", "42"]
    outer, inner = reg.get("outer"), reg.get("inner")
    assert outer is not None
    assert inner is not None
    assert outer.pid == inner.pid
    assert story(reg, "inner") == ["registered", "exited"]
    until(lambda: reg.liveness("outer").dead)


@needs("gunicorn")
def test_gunicorn_hooks_register_workers_and_note_their_ends(kitchen: Path, reg: Registry) -> None:
    """Two workers; one is killed, is noted, and is replaced."""
    (kitchen / "app.py").write_text(
        "def app(environ, start):\n    start('200 OK', [])\n    return [b'hello']\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "--bind", "unix:site.sock", "app:app"],
        cwd=kitchen, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until(lambda: sum(w.state == "ready" for w in reg.workers()) == 2)
        first = reg.workers()[0]
        assert first.owner is not None
        assert first.owner.pid == server.pid
        assert all(answers.alive for answers in reg.judge(reg.workers()))
        os.kill(first.pid, signal.SIGKILL)
        until(lambda: story(reg, first.sid)[-1] in {"exited", "lost"})
        assert list(reg.history(sid=first.sid))[-1].crashed
        until(lambda: sum(w.state == "ready" for w in reg.workers()) == 2)
    finally:
        server.terminate()
        log = server.communicate()[1]
    assert "Traceback" not in log, log
    assert reg.workers() == []
    ended = list(reg.history(types=["worker.exited", "worker.lost"]))
    assert [event.sid for event in ended if event.crashed] == [first.sid]


def spec(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the kernel of the recipe known to Jupyter."""
    page = (RECIPES / "jupyter.md").read_text()
    kind = json.loads(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    kind["argv"][0] = sys.executable
    kernels = kitchen / "share" / "jupyter" / "kernels" / "remembered"
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text(json.dumps(kind))
    known = kitchen / "crewlog_kernels-1.dist-info"
    known.mkdir()
    entry = re.findall(r"```toml\n\[project.entry-points.\"(.*?)\"\]\n(\w+) = \"(.*?)\"", page)[0]
    (known / "entry_points.txt").write_text(f"[{entry[0]}]\n{entry[1]} = {entry[2]}\n")
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: crewlog-kernels\nVersion: 1\n")
    monkeypatch.setenv("JUPYTER_PATH", str(kitchen / "share" / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(kitchen / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(kitchen / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(kitchen))


@needs("jupyter_client")
@needs("ipykernel")
def test_jupyter_provisioner_registers_a_kernel_and_records_its_end(
    kitchen: Path, reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real kernel, started through the provisioner, computes and is shut down."""
    spec(kitchen, monkeypatch)
    code = """
import asyncio

from jupyter_client.manager import AsyncKernelManager

async def main():
    kernel = AsyncKernelManager(kernel_name="remembered")
    await kernel.start_kernel()
    client = kernel.client()
    client.start_channels()
    await client.wait_for_ready(timeout=60)
    answer = await client.execute_interactive("6 * 7", timeout=60, allow_stdin=False)
    print("", answer["content"]["status"], kernel.kernel_id)
    client.stop_channels()
    await kernel.shutdown_kernel(now=True)

asyncio.run(main())
"""
    status, kernel = cook(kitchen, "-c", code).split()[-2:]
    assert status == "ok"
    assert story(reg, f"kernel-{kernel}") == ["registered", "stop_requested", "exited"]
    worker = reg.get(f"kernel-{kernel}")
    assert worker is not None
    assert worker.exit is not None
    assert (worker.exit.signal, worker.exit.source) == (9, "wait")


def test_spawned_and_piped_subprocesses(kitchen: Path, reg: Registry) -> None:
    """The two ways of subprocess."""
    assert cook(kitchen, "spawned.py").splitlines() == ["job-1 alive", "15"]
    assert cook(kitchen, "piped.py").splitlines() == ["hello"]
    assert story(reg, "job-1") == ["registered", "stop_requested", "exited"]
    assert story(reg, "job-2") == ["registered", "exited"]


def test_multiprocessing_workers_register_and_beat(kitchen: Path, reg: Registry) -> None:
    """Four workers, four orderly ends."""
    assert cook(kitchen, "pool.py").strip() == f"0 {['exited'] * 4}"
    assert reg.workers() == []
    assert crewlog.open(reg.path).last_seq == reg.last_seq


def test_manager_finds_its_workers_again_and_hears_of_their_ends(
    kitchen: Path, reg: Registry, crew: Crew
) -> None:
    """Killed with -9 and started again: nothing is started twice, and an end is noticed at once."""

    def started(words: str) -> subprocess.Popen[str]:
        manager = crew.python((kitchen / "manager.py").read_text())
        assert manager.stdout is not None
        assert [manager.stdout.readline().split() for _ in range(2)] == [
            [words, "job-a"], [words, "job-b"],
        ]  # fmt: skip
        assert manager.stdout.readline() == "ready\n"
        return manager

    kill(started("started"))
    second = started("found")
    doomed = reg.get("job-a")
    assert doomed is not None
    os.kill(doomed.pid, signal.SIGKILL)
    assert second.stdout is not None
    assert second.stdout.readline().split()[1] == "job-a"
    assert list(reg.history(sid="job-a"))[-1].crashed
    reg.stop("job-b", reason="the test is over")


# -- pools ----------------------------------------------------------------------------------


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    """Run a Redis of the test's own, on a Unix socket; return the path of that."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server")
    home = Path(tempfile.mkdtemp())  # a socket's path is short
    words = ["redis-server", "--port", "0", "--unixsocket", str(home / "s"), "--save", ""]
    server = subprocess.Popen([*words, "--dir", str(home)], stdout=subprocess.DEVNULL)
    until((home / "s").exists)
    yield str(home / "s")
    server.terminate()
    server.wait()
    shutil.rmtree(home)


class Pool:
    """A program that has workers of a kind, from its start to its end."""

    def __init__(self, kitchen: Path, words: Sequence[str], **more: str) -> None:
        """Start it in a session of its own."""
        self.process = subprocess.Popen(
            words, cwd=kitchen, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(kitchen), **more},
        )  # fmt: skip

    def end(self, number: int | None) -> None:
        """End it in order: by a signal, or by the end of its stdin."""
        if number is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
        else:
            self.process.send_signal(number)
        try:
            self.process.wait(60)
        finally:
            self.kill()

    def kill(self) -> None:
        """End what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def living(reg: Registry, prefix: str) -> dict[str, int]:
    """Return the pids of the living workers whose sid begins so."""
    workers = [w for w in reg.workers() if w.sid.startswith(prefix)]
    return {w.sid: w.pid for w, j in zip(workers, reg.judge(workers), strict=True) if j.alive}


def catches(pid: int, number: int) -> bool:
    """Say whether a process has a handler for a signal by now."""
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(row for row in rows if row.startswith("SigCgt:")).split()[1]
    return bool(int(caught, 16) & 1 << (number - 1))


def is_collected(reg: Registry, sid: str) -> bool:
    """Collect, and say whether a worker's end is on record."""
    crewlog_compactor.collect(reg)
    worker = reg.get(sid)
    return worker is not None and worker.final


CELERY = ["-m", "celery", "-A", "celery_tasks", "worker", "-P", "prefork", "-c", "2", "-l", "error"]
POOLS = {
    "executor": (["executor.py"], None, 2, "concurrent.futures"),
    "loky": (["loky_pool.py"], None, 2, "loky"),
    "joblib": (["joblib_jobs.py"], None, 2, "joblib"),
    "celery": (CELERY, signal.SIGTERM, 2, "celery"),
    "rq": (["-m", "rq.cli", "worker", "-w", "rq_crew.CrewWorker", "-u", "{rq}"], signal.SIGTERM, 1,
           "rq"),
    "dramatiq": (["-m", "dramatiq", "dramatiq_crew", "-p", "2"], signal.SIGTERM, 2, "dramatiq"),
    "dask": (["dask_crew.py"], None, 2, "distributed"),
    "uvicorn": (["-m", "uvicorn", "asgi_app:app", "--workers", "2", "--uds", "{sock}"],
                signal.SIGTERM, 2, "uvicorn"),
    "gw": (["-m", "pytest", "-q", "-p", "conftest_crew", "-n", "2", "waits.py"], None, 2, "xdist"),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("how", ["in order", "killed"])
def test_workers_of_a_pool_are_listed_and_their_ends_recorded(
    kitchen: Path, reg: Registry, request: pytest.FixtureRequest, name: str, how: str
) -> None:
    """One sid a process; ended in order none is a crash, one that is killed is told as one."""
    words, number, count, module = POOLS[name]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}: pip install '.[recipes]'")
    more = {}
    if name in {"celery", "rq", "dramatiq"}:
        path = request.getfixturevalue("broker")
        more["BROKER"] = f"{'redis+socket' if name == 'celery' else 'unix'}://{path}"
    (kitchen / "waits.py").write_text(
        "import os, threading, time\n"
        + "".join(
            f"def test_{n}():\n    until = time.time() + 30\n"
            "    while not os.path.exists('go') and time.time() < until:\n"
            "        threading.Event().wait(0.05)\n"
            for n in range(2)
        )
    )
    filled = [word.format(rq=more.get("BROKER", ""), sock=kitchen / "u") for word in words]
    pool = Pool(kitchen, [sys.executable, *filled], **more)
    try:
        until(lambda: len(living(reg, name)) >= count, wait_s=60)
        crew = living(reg, name)
        if how == "killed":
            victim, pid = next(iter(crew.items()))
            os.kill(pid, signal.SIGKILL)
            until(lambda: is_collected(reg, victim))
            assert [e.crashed for e in reg.history(sid=victim)][-1]
            return
        (kitchen / "go").touch()
        until(lambda: number is None or catches(pool.process.pid, number))
        pool.end(number)
    finally:
        pool.kill()
    until(lambda: all(w.final for w in reg.workers(all=True) if w.sid.startswith(name)))
    states = {w.sid: w.state.value for w in reg.workers(all=True) if w.sid in crew}
    assert states == dict.fromkeys(crew, "exited")


@needs("supervisor")
def test_programs_of_supervisord_are_workers(kitchen: Path, reg: Registry) -> None:
    """Stopped in order none is a crash; started again under the same name."""
    page = (RECIPES / "pools.md").read_text()
    program = re.findall(r"```ini\n(.*?)```", page, re.DOTALL)[0]
    (kitchen / "web.py").write_text("import signal\nsignal.pause()\n")
    head = "[supervisord]\nnodaemon=true\nlogfile=/dev/null\nlogfile_maxbytes=0\npidfile=pid\n"
    (kitchen / "conf").write_text(
        head + program.replace("python web.py", f"{sys.executable} web.py")
    )
    for life in (1, 2):
        pool = Pool(kitchen, [sys.executable, "-m", "supervisor.supervisord", "-c", "conf"])
        try:
            until(lambda: len(living(reg, "web-")) == 2, wait_s=60)
            pool.end(signal.SIGTERM)
        finally:
            pool.kill()
        workers = [w for w in reg.workers(all=True) if w.sid.startswith("web-")]
        assert [(w.state.value, w.generation) for w in workers] == [("exited", life)] * 2


@needs("jupyter_client")
@needs("ipykernel")
def test_kernel_is_found_again_after_its_server_was_killed(
    kitchen: Path, reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the registry holds alone; its end is one that was asked for."""
    spec(kitchen, monkeypatch)
    server = """
import asyncio, os, signal
from jupyter_client.manager import AsyncKernelManager
async def main():
    kernel = AsyncKernelManager(kernel_name="remembered")
    await kernel.start_kernel(independent=True)
    client = kernel.client()
    client.start_channels()
    await client.wait_for_ready(timeout=60)
    await client.execute_interactive("x = 41", timeout=60, allow_stdin=False)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    killed = subprocess.run([sys.executable, "-c", server], cwd=kitchen, check=False)
    assert killed.returncode == -signal.SIGKILL
    (worker,) = reg.workers()
    assert reg.liveness(worker.sid).alive
    assert cook(kitchen, "kernels_again.py").splitlines() == ["42", f"{worker.sid} worker.exited"]
    assert story(reg, worker.sid) == ["registered", "stop_requested", "exited"]
    assert not any(event.crashed for event in reg.history(sid=worker.sid))


@needs("jupyter_client")
@needs("ipykernel")
def test_shutdown_during_start_is_no_crash_and_a_crash_is_no_shutdown(
    kitchen: Path, reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shutdown begins by SIGINT; a restarter kills what had ended."""
    spec(kitchen, monkeypatch)
    code = """
import asyncio, os, signal
from jupyter_client.manager import AsyncKernelManager
async def main(crash):
    kernel = AsyncKernelManager(kernel_name="remembered")
    await kernel.start_kernel()
    if crash:
        os.kill(kernel.provisioner.pid, signal.SIGKILL)
        while await kernel.is_alive():
            await asyncio.sleep(0.05)
    await kernel.shutdown_kernel(now=crash)
    print(kernel.kernel_id)
asyncio.run(main(CRASH))
"""
    for crash in (False, True):
        kernel = cook(kitchen, "-c", code.replace("CRASH", str(crash))).split()[-1]
        ends = [e.crashed for e in reg.history(sid=f"kernel-{kernel}")]
        assert ends[-1] is crash, story(reg, f"kernel-{kernel}")


def test_runner_finds_its_jobs_again_and_stops_what_goes(
    kitchen: Path, reg: Registry, crew: Crew
) -> None:
    """Killed by -9, its jobs go on, and the next one starts none of them twice."""
    jobs = kitchen / "jobs"
    jobs.write_text("one sleep 300\ntwo sleep 300\nnone /not/there\n")

    def started() -> subprocess.Popen[str]:
        runner = subprocess.Popen(
            [sys.executable, "runner.py", "jobs"], cwd=kitchen, stdout=subprocess.PIPE, text=True
        )
        crew.processes.append(runner)
        return runner

    first = started()
    until(lambda: {"one", "two", "runner"} <= {w.sid for w in reg.living()})
    pids = {w.sid: w.pid for w in reg.living(sids=["one", "two"])}
    # a job whose program has not begun yet ends with whoever starts it
    until(lambda: all(psutil.Process(pid).name() == "sleep" for pid in pids.values()))
    kill(first)
    second = started()
    until(lambda: (w := reg.get("runner")) is not None and w.pid == second.pid)
    assert {w.sid: w.pid for w in reg.living(sids=["one", "two"])} == pids
    os.kill(pids["one"], signal.SIGKILL)
    until(lambda: (w := reg.get("one")) is not None and not w.final and w.pid != pids["one"])
    jobs.write_text("one sleep 300\n")
    until(lambda: (w := reg.get("two")) is not None and w.final)
    jobs.write_text("")
    until(lambda: (w := reg.get("one")) is not None and w.final)
    second.terminate()


def test_service_tells_of_each_crash_once_across_restarts(
    kitchen: Path, place: Path, crew: Crew
) -> None:
    """It begins before there is a store; what crashed while it was down is told, too."""

    def service() -> subprocess.Popen[str]:
        one = subprocess.Popen(
            [sys.executable, "-u", "crashes.py"], cwd=kitchen, stdout=subprocess.PIPE, text=True
        )
        crew.processes.append(one)
        return one

    def crashes(one: subprocess.Popen[str]) -> list[str]:
        assert one.stdout is not None
        return one.stdout.readline().split()[1:]

    first = service()
    with crewlog.open(place) as reg:
        reg.spawn("a", ["sh", "-c", "exit 3"])
        assert crashes(first) == ["a", "code", "3"]
        until(lambda: reg.cursors.read("crashes") is not None)
        reg.spawn("b", ["sh", "-c", "kill -SEGV $$"])
        assert crashes(first) == ["b", "signal", "11"]
        first.terminate()
        assert first.wait(20) == 0
        reg.spawn("ok", ["true"])
        reg.spawn("c", ["sh", "-c", "exit 4"])
        until(lambda: (w := reg.get("c")) is not None and w.final)
    second = service()
    assert crashes(second) == ["c", "code", "4"]
    second.terminate()
    assert second.wait(20) == 0
