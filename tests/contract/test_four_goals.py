"""What the predecessor's users want, end to end: real workers with sockets, SIGKILL for an end.

Their manager ensures a worker per session, shows its status, runs commands in it, continues after
a reconnect and stops it. Here the manager is a process of its own, told what to do by lines.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import crewlog
from crewlog_compactor import collect, verify
from procs import kill, until

# A session's worker: keeps a number, adds to it over its socket, and says when it is ready.
WORKER = """
import os, socket, sys
import crewlog

store, sid, path = sys.argv[1:]
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
with crewlog.open(store, actor="worker") as reg:
    reg.update(sid, state="ready")
total = 0
while True:
    client, _ = server.accept()
    with client, client.makefile("rw") as words:
        for row in words:
            total += int(row)
            words.write(f"{total}\\n")
            words.flush()
"""

# The manager: ensure, status, run, stop, each a line of JSON in and out.
MANAGER = """
import json, os, socket, sys
import crewlog

store, worker = sys.argv[1:]
reg = crewlog.open(store, actor="manager")

def ensure(sid):
    path = os.path.join(os.path.dirname(store), sid + ".sock")
    reg.ensure(sid, [sys.executable, "-c", worker, store, sid, path], sock=path)
    return reg.wait(sid, state="ready", timeout_s=20).pid

def status():
    return {w.sid: reg.liveness(w.sid).verdict for w in reg.workers()}

def run(sid, number):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(reg.get(sid).sock)
        with client.makefile("rw") as words:
            words.write(f"{number}\\n")
            words.flush()
            return int(words.readline())

def stop(sid):
    return reg.stop(sid, reason="the session is over").type

for row in sys.stdin:
    name, *arguments = json.loads(row)
    print(json.dumps(globals()[name](*arguments)), flush=True)
"""


class Manager:
    """A manager process."""

    def __init__(self, place: Path) -> None:
        """Start it."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", MANAGER, str(place), WORKER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, *words: object) -> object:
        """Let it do something, and return its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        """Kill it, as nobody should."""
        kill(self.process)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def managers(place: Path) -> Iterator[list[Manager]]:
    """Keep the managers of a test, and end them and all workers."""
    started: list[Manager] = []
    yield started
    for manager in started:
        if manager.process.returncode is None:
            manager.end()
    with crewlog.open(place) as reg:
        for worker in reg.workers():
            if reg.liveness(worker.sid).alive:
                os.kill(worker.pid, signal.SIGKILL)


def test_session_is_visible_survives_continues_and_ends(
    place: Path, managers: list[Manager]
) -> None:
    """The four goals in one story."""
    first = Manager(place)
    managers.append(first)
    pid = first.ask("ensure", "s1")
    other = first.ask("ensure", "s2")
    # 1. the session is visible
    assert first.ask("status") == {"s1": "alive", "s2": "alive"}
    assert first.ask("run", "s1", 40) == 40
    # 2. it is visible after the manager's death and restart
    first.end()
    second = Manager(place)
    managers.append(second)
    assert second.ask("status") == {"s1": "alive", "s2": "alive"}
    # 3. it continues after the reconnect: the same process, with what it had
    assert second.ask("ensure", "s1") == pid
    assert second.ask("run", "s1", 2) == 42
    # a worker that is killed unseen is found out, collected with its socket, and started anew
    assert isinstance(other, int)
    os.kill(other, signal.SIGKILL)
    with crewlog.open(place) as reg:
        until(lambda: reg.liveness("s2").dead)
        report = collect(reg)
        assert (*report.lost, *report.exited) == ("s2",)
        assert report.sockets == (str(place.parent / "s2.sock"),)
    assert second.ask("ensure", "s2") != other
    assert second.ask("run", "s2", 7) == 7
    # 4. stop empties the list
    assert second.ask("stop", "s1") == "worker.exited"
    assert second.ask("stop", "s2") == "worker.exited"
    assert second.ask("status") == {}
    with crewlog.open(place) as reg:
        assert reg.workers() == []
        story = [(e.sid, e.type.removeprefix("worker.")) for e in reg.history(sid="s1")]
        assert [what for _, what in story] == ["registered", "ready", "stop_requested", "exited"]
        by = [e.actor["name"] for e in reg.history(sid="s1")]
        assert by == ["manager", "worker", "manager", "manager"]
    assert verify(place).ok
