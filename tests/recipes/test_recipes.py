"""The recipes run as they stand, against the libraries that they are for."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import crewlog
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
        assert all(found.alive for found in reg.judge(reg.workers()))
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


@needs("jupyter_client")
@needs("ipykernel")
def test_jupyter_provisioner_registers_a_kernel_and_records_its_end(
    kitchen: Path, reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real kernel, started through the provisioner, computes and is shut down."""
    page = (RECIPES / "jupyter.md").read_text()
    spec = json.loads(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    spec["argv"][0] = sys.executable
    kernels = kitchen / "share" / "jupyter" / "kernels" / "remembered"
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text(json.dumps(spec))
    known = kitchen / "crewlog_kernels-1.dist-info"
    known.mkdir()
    entry = re.findall(r"```toml\n\[project.entry-points.\"(.*?)\"\]\n(\w+) = \"(.*?)\"", page)[0]
    (known / "entry_points.txt").write_text(f"[{entry[0]}]\n{entry[1]} = {entry[2]}\n")
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: crewlog-kernels\nVersion: 1\n")
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
    monkeypatch.setenv("JUPYTER_PATH", str(kitchen / "share" / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(kitchen / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(kitchen / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(kitchen))
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
