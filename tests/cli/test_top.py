"""top: a live picture on a real terminal, which is given back as it was."""

import contextlib
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands import CREWLOG, Cli
from crewlog.registry import Registry
from procs import until

pytest.importorskip("rich")
import fcntl

_WAIT_S = 20.0


class Terminal:
    """A program on a terminal of its own; what it wrote, and the terminal's settings."""

    def __init__(self, place: Path, *arguments: str) -> None:
        """Start `crewlog top`."""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.environ.pop("COLUMNS", None)  # it would win over the terminal's own
            os.environ.pop("LINES", None)
            os.execv(  # noqa: S606
                CREWLOG[0], [*CREWLOG, "--dir", str(place), "top", *arguments]
            )
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 110, 0, 0))
        self.before = termios.tcgetattr(self.fd)
        self.text = ""

    def wait_for(self, holds: Callable[[str], bool]) -> None:
        """Read until what was written is as wanted."""
        deadline = time.monotonic() + _WAIT_S
        while not holds(self.text):
            assert time.monotonic() < deadline, self.text
            ready, _, _ = select.select([self.fd], [], [], 0.1)
            if ready:
                try:
                    self.text += os.read(self.fd, 65536).decode(errors="replace")
                except OSError as error:  # the program has ended
                    raise AssertionError(self.text) from error

    def end(self) -> int:
        """Read to the end, and return how it ended."""
        deadline = time.monotonic() + _WAIT_S
        with contextlib.suppress(OSError):  # EIO: the program has ended
            while select.select([self.fd], [], [], _WAIT_S)[0]:
                assert time.monotonic() < deadline, "it goes on"
                self.text += os.read(self.fd, 65536).decode(errors="replace")
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def is_given_back(self) -> bool:
        """Say whether the screen was left, the cursor shown, and the settings are as before."""
        return self.text.rfind("\x1b[?1049l") > self.text.rfind("\x1b[?1049h") and self.text.rfind(
            "\x1b[?25h"
        ) > self.text.rfind("\x1b[?25l")


@pytest.fixture
def terminal(place: Path, reg: Registry) -> Iterator[Terminal]:
    """Show a store with one worker, which is this process."""
    reg.register("web-1", pid=os.getpid(), ready=True)
    shown = Terminal(place, "--interval", "0.2s")
    shown.wait_for(lambda text: "web-1" in text)
    yield shown
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(shown.pid, signal.SIGKILL)
        os.waitpid(shown.pid, 0)
    os.close(shown.fd)


def test_changes_show_at_once_and_q_leaves(terminal: Terminal, reg: Registry) -> None:
    """A new worker, its processor and memory, its last event; then the old screen again."""
    terminal.wait_for(lambda text: "MiB" in text and "%" in text)
    reg.register("new-1", pid=os.getpid())
    terminal.wait_for(lambda text: "new-1" in text and "worker.registered" in text)
    os.write(terminal.fd, b"m")
    terminal.wait_for(lambda text: "by mem" in text)
    os.write(terminal.fd, b"q")
    assert terminal.end() == 0
    assert terminal.is_given_back()


def test_command_shows_where_it_was_recorded(terminal: Terminal, reg: Registry) -> None:
    """Only then is there a column for it."""
    assert "COMMAND" not in terminal.text
    reg.spawn("job-7", ["sleep", "77"], record_argv=True)
    terminal.wait_for(lambda text: "COMMAND" in text and "sleep 77" in text)
    reg.stop("job-7")
    os.write(terminal.fd, b"q")
    assert terminal.end() == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_leave_the_terminal_as_it_was(terminal: Terminal, number: int, code: int) -> None:
    """Ctrl-C, a kill, a closed connection."""
    os.kill(terminal.pid, number)
    assert terminal.end() == code
    assert terminal.is_given_back()


def test_failure_leaves_the_terminal_as_it_was(terminal: Terminal, reg: Registry) -> None:
    """A store that turns out damaged ends it with an error, after the screen was left."""
    os.kill(terminal.pid, signal.SIGSTOP)
    reg.register("new-1", pid=os.getpid())
    (segment,) = (reg.path / "log").glob("*.jsonl")
    data = segment.read_bytes()
    segment.write_bytes(data[:-100] + b"\0" * 99 + b"\n")
    os.kill(terminal.pid, signal.SIGCONT)
    assert terminal.end() == 65
    assert terminal.is_given_back()
    assert f"crewlog -d {reg.path} repair" in terminal.text[terminal.text.rfind("\x1b[?1049l") :]


def test_stop_gives_the_terminal_back_until_it_goes_on(terminal: Terminal) -> None:
    """Ctrl-Z stops it outside its screen; continued, it shows itself again."""
    os.kill(terminal.pid, signal.SIGTSTP)
    _, status = os.waitpid(terminal.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    terminal.wait_for(lambda _: terminal.is_given_back())
    terminal.text = ""
    os.kill(terminal.pid, signal.SIGCONT)
    terminal.wait_for(lambda text: "web-1" in text)
    os.write(terminal.fd, b"q")
    assert terminal.end() == 0


def test_without_a_terminal_it_says_what_to_use(cli: Cli, reg: Registry) -> None:
    """A pipe, --json, a bad interval: usage errors; no rich: what to install."""
    reg.register("a", pid=os.getpid())
    assert "ls --json" in cli("top", code=2, stdin=-3).stderr
    cli("top", "--interval", "0s", code=2)


def resized(terminal: Terminal, rows: int, columns: int) -> None:
    """Make the terminal another size, and begin to read anew."""
    fcntl.ioctl(terminal.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    os.kill(terminal.pid, signal.SIGWINCH)
    terminal.text = ""


def press(terminal: Terminal, keys: str) -> None:
    """Press keys, and read anew what is shown after them."""
    terminal.text = ""
    os.write(terminal.fd, keys.encode())


def test_sixty_columns_show_who_and_how(terminal: Terminal, reg: Registry) -> None:
    """The id and the status stay; what is worth less goes."""
    reg.register("a-worker-with-a-long-name", pid=os.getpid())
    resized(terminal, 20, 60)

    def fits(shown: str) -> bool:
        last = shown.rpartition("crewlog top")[2]  # the last picture
        return "starting" in last and "web-1" in last and "LAST EVENT" not in last

    terminal.wait_for(fits)
    press(terminal, "q")
    assert terminal.end() == 0


def test_rows_are_walked_and_looked_into(terminal: Terminal, reg: Registry) -> None:
    """Arrows and j, k move the mark; Enter tells why and what happened; Esc goes back."""
    reg.register("web-2", pid=os.getpid(), ready=True)
    terminal.wait_for(lambda text: "web-2" in text)
    press(terminal, "i")  # by id
    terminal.wait_for(lambda text: "by sid" in text)
    press(terminal, "j\x1b[B\x1b[A")
    press(terminal, "G")
    press(terminal, "\r")
    terminal.wait_for(lambda text: "web-2 is alive" in text and "registered pid" in text)
    press(terminal, "\x1b")
    terminal.wait_for(lambda text: "web-1" in text and "STATUS" in text)
    press(terminal, "q")
    assert terminal.end() == 0


def test_more_workers_than_rows_can_be_scrolled(terminal: Terminal, reg: Registry) -> None:
    """The mark is always in view."""
    with reg.batch() as batch:
        for number in range(60):
            batch.register(f"w{number:02d}", pid=os.getpid())
    press(terminal, "i")
    terminal.wait_for(lambda text: "w00" in text and "more" in text)
    assert "w59" not in terminal.text
    press(terminal, "G")
    press(terminal, "k")
    terminal.wait_for(lambda text: "w59" in text)
    press(terminal, "q")
    assert terminal.end() == 0


def test_filter_narrows_by_words(terminal: Terminal, reg: Registry) -> None:
    """By id, label, state or pid; Esc drops it."""
    reg.register("job-1", pid=os.getpid(), labels={"queue": "mail"})
    terminal.wait_for(lambda text: "job-1" in text)
    press(terminal, "/queue=mail\r")
    terminal.wait_for(lambda text: "filter: queue=mail" in text and "1 alive" in text)
    press(terminal, "\x1b")
    terminal.wait_for(lambda text: "2 alive" in text)
    press(terminal, "q")
    assert terminal.end() == 0


def test_stop_asks_first(terminal: Terminal, reg: Registry) -> None:
    """Any key but y leaves it alone."""
    reg.spawn("sleeper", ["sleep", "300"])
    terminal.wait_for(lambda text: "sleeper" in text)
    press(terminal, "/sleeper\r")
    terminal.wait_for(lambda text: "1 alive" in text)
    press(terminal, "x")
    terminal.wait_for(lambda text: "Stop sleeper? y" in text)
    press(terminal, "n")
    terminal.wait_for(lambda text: "sleeper was not stopped" in text)
    assert reg.liveness("sleeper").alive
    press(terminal, "xy")
    until(lambda: reg.liveness("sleeper").dead)
    until(lambda: "crewlog top" in str([e.reason for e in reg.history(sid="sleeper")]))
    press(terminal, "q")
    assert terminal.end() == 0
