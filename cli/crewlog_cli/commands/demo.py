"""Show the main job on real processes, and assert every claim that is made."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

import crewlog
from crewlog.registry import Registry
from crewlog_cli import shell
from crewlog_cli.pages.page import names
from crewlog_cli.shell import Shell, command
from crewlog_cli.story import Story
from crewlog_compactor import compact, verify

_WAIT_S: Final = 20.0
_SIDS: Final = ("web-1", "web-2", "mail-1")

_MANAGER: Final = """\
import sys, time
import crewlog

with crewlog.open(sys.argv[1], actor="first manager") as reg:
    for sid in sys.argv[2:]:
        labels = {"app": sid.split("-")[0]}
        reg.spawn(sid, ["sleep", "120"], labels=labels, ready=True)
print("started", flush=True)
time.sleep(120)
"""


class _Broken(Exception):
    """A claim did not hold."""


class _Stage:
    """Prints the story, checks its claims, and ends whatever it started."""

    def __init__(self, sh: Shell, place: Path, *, keep: bool) -> None:
        self.sh = sh
        self.keep = keep
        self.place = place
        self.processes: list[subprocess.Popen[str]] = []
        self.held: list[str] = []
        self.ending = _Ending()

    def say(self, words: str) -> None:
        if self.sh.json:
            return
        for row in words.split("\n"):
            self.sh.line(row, flush=True)

    def claim(self, words: str, holds: bool) -> None:  # noqa: FBT001 (a claim holds or does not)
        if not holds:
            raise _Broken(words)
        self.held.append(words)
        self.say(f"   ok  {words}")

    def end(self, *, took_s: float, broken: str | None) -> None:
        """Sum up: every claim that held, and the one that did not."""
        if self.sh.json:
            outcome = {"ok": broken is None, "held": self.held, "broken": broken}
            kept = str(self.place) if self.keep else None
            self.sh.document({**outcome, "took_s": round(took_s, 1), "dir": kept})
        elif broken is None:
            self.say(f"\nEvery claim held, in {took_s:.1f} s.")
        else:
            self.say(f"FAILED  {broken}")

    def start(self, *argv: str) -> subprocess.Popen[str]:
        # in a session of its own: Ctrl-C comes to the demo alone, which ends what it started
        with self.ending.later():
            process = subprocess.Popen(
                argv, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            self.processes.append(process)
        return process

    def clear(self, reg: Registry) -> None:
        """End every process that the demo started, the workers by their proven identity."""
        for process in self.processes:  # first: then nothing more is started
            process.kill()
            process.communicate()
        for worker in reg.workers():
            if reg.liveness(worker.sid).alive:
                os.kill(worker.pid, signal.SIGKILL)


class _Ending:
    """Turns the signals that end us into an orderly end, which clears up."""

    def __init__(self) -> None:
        self._number = 0
        self._held = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._come)

    def _come(self, number: int, _: object) -> None:
        self._number = number
        self._end()

    def _end(self) -> None:
        if self._number and not self._held:
            raise SystemExit(128 + self._number)

    @contextmanager
    def later(self) -> Iterator[None]:
        """Put them off for a block: what it starts must be known, or it would be left behind."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._end()


@command("demo", examples="crewlog demo\ncrewlog demo --keep")
@click.option("--keep", is_flag=True, help="Leave the registry in place, to look at it.")
def demo(sh: Shell, *, keep: bool) -> None:
    """Play the main job through with real processes and kill -9, in a directory of its own."""
    if sh.place is not None:
        message = "demo plays in a directory of its own; leave out --dir, and --keep keeps it"
        raise click.UsageError(message)
    home = Path(tempfile.mkdtemp(prefix="crewlog-demo-"))
    stage = _Stage(sh, home / "registry", keep=keep)
    began = time.monotonic()
    try:
        with crewlog.open(stage.place, actor="second manager") as reg:
            try:
                _play(stage, reg)
            finally:
                with stage.ending.later():
                    stage.clear(reg)
    except _Broken as error:
        stage.end(took_s=time.monotonic() - began, broken=str(error))
        raise SystemExit(shell.EXIT_NO) from error
    finally:
        if keep:
            stage.say(f"\nThe registry is still there: crewlog --dir {stage.place} ls --all")
        else:
            shutil.rmtree(home)
    stage.end(took_s=time.monotonic() - began, broken=None)


def _play(stage: _Stage, reg: Registry) -> None:
    _first_manager_dies(stage, reg)
    watcher = stage.start(
        *_this_program(), "--dir", str(stage.place), "watch", "--json", "--now", "--timeout", "60s"
    )
    _await_watcher(watcher)
    killed = _worker_dies_unseen(stage, reg)
    _compaction_tells(stage, reg, killed)
    _watcher_saw(stage, watcher, killed)
    _history_tells(stage, reg)
    _timeline_shows(stage, killed)


def _this_program() -> tuple[str, ...]:
    return sys.executable, "-c", "from crewlog_cli.main import main; main()"


def _first_manager_dies(stage: _Stage, reg: Registry) -> None:
    stage.say("1. A manager starts three workers, registers them, and is killed with SIGKILL:\n")
    for row in _MANAGER.splitlines():
        stage.say(f"      {row}".rstrip())
    stage.say("")
    manager = stage.start(sys.executable, "-c", _MANAGER, str(stage.place), *_SIDS)
    assert manager.stdout is not None  # start() made a pipe
    if manager.stdout.readline() != "started\n":
        raise _Broken("the manager starts")
    manager.kill()
    manager.wait()
    stage.claim("the manager is dead", manager.returncode == -signal.SIGKILL)
    stage.say("\n2. Another process opens the same directory and finds them:\n")
    workers = reg.workers()
    stage.claim("all three are listed", tuple(w.sid for w in workers) == _SIDS)
    stage.claim("all three are proven to live", all(j.alive for j in reg.judge(workers)))


def _await_watcher(watcher: subprocess.Popen[str]) -> None:
    assert watcher.stdout is not None  # start() made a pipe
    if json.loads(watcher.stdout.readline())["kind"] != "synced":
        raise _Broken("the watcher is in step")


def _worker_dies_unseen(stage: _Stage, reg: Registry) -> str:
    stage.say("\n3. A worker is killed with SIGKILL, and nobody is told:\n")
    victim = reg.workers()[1]
    os.kill(victim.pid, signal.SIGKILL)
    _until(
        stage,
        "its death is seen at once, by the kernel's word",
        lambda: reg.liveness(victim.sid).dead,
    )
    after = reg.get(victim.sid)
    stage.claim("looking changed nothing", after is not None and after.rev == victim.rev)
    return victim.sid


def _until(stage: _Stage, words: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    stage.claim(words, holds())


def _compaction_tells(stage: _Stage, reg: Registry, killed: str) -> None:
    stage.say("\n4. cron runs `crewlog compact`:\n")
    report = compact(reg)
    done = report.collected
    stage.claim(
        f"it records the death of {killed}, and of nobody else",
        done is not None and {*done.lost, *done.exited} == {killed},
    )
    old = json.loads((stage.place / "registry.json").read_text())
    listed = [session["sid"] for session in old["sessions"]]
    stage.claim("registry.json lists the living", listed == [s for s in _SIDS if s != killed])
    checked = verify(stage.place)
    stage.claim(f"verify reads {checked.events} lines and finds nothing wrong", checked.ok)


def _watcher_saw(stage: _Stage, watcher: subprocess.Popen[str], killed: str) -> None:
    stage.say("\n5. Meanwhile `crewlog watch --json` in a process of its own printed:\n")
    assert watcher.stdout is not None  # start() made a pipe
    change = json.loads(watcher.stdout.readline())
    stage.say(f"      {json.dumps({k: change[k] for k in ('kind', 'seq', 'type', 'sid')})}")
    stage.claim(
        "that is the death, once it was durable",
        change["sid"] == killed and change["type"] in {"worker.lost", "worker.exited"},
    )


def _history_tells(stage: _Stage, reg: Registry) -> None:
    stage.say("\n6. `crewlog history` tells what happened, and who did it:\n")
    events = list(reg.history())
    if not stage.sh.json:
        Story(stage.sh).tell(events)
    stage.say("")
    stage.claim("four events, each with its author", len(events) == len(_SIDS) + 1)


def _timeline_shows(stage: _Stage, killed: str) -> None:
    stage.say("\n7. `crewlog timeline` draws who lived when, and how each ended:\n")
    drawn = _crewlog(stage, "timeline", "-q")
    stage.say("\n".join(f"      {row}" for row in drawn.splitlines()))
    stage.say("")
    rows = {row.split()[0]: row for row in drawn.splitlines()[1:]}
    stage.claim("the living go on, the killed one does not",
                all(row.endswith(">") == (sid != killed) for sid, row in rows.items()))  # fmt: skip
    page = stage.place.parent / "timeline.html"
    _crewlog(stage, "timeline", "-q", "--html", str(page))
    stage.claim("the same as a page: --html timeline.html", killed in names(page.read_bytes()))


def _crewlog(stage: _Stage, *arguments: str) -> str:
    argv = [*_this_program(), "--dir", str(stage.place), *arguments]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


COMMANDS: Final[dict[str, click.Command]] = {"demo": demo}
