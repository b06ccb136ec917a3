"""Orphaned sockets go only under the full rule; everything else stays and is reported."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crewlog.local.disk import Disk
from crewlog.process.socket import socket_id
from crewlog.registry import Registry
from crewlog_compactor import CollectReport, collect
from procs import Crew, kill


class Server:
    """A worker's socket."""

    def __init__(self, path: Path) -> None:
        """Bind and listen."""
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen()

    def die(self) -> None:
        """Leave the file behind, as a killed worker does."""
        self.socket.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serve on a socket."""
    made = Server(tmp_path / "worker.sock")
    yield made
    made.die()


def dead(reg: Registry, crew: Crew, path: Path, sid: str = "a") -> None:
    """Register a worker with that socket, and kill it."""
    worker = crew.sleeper()
    reg.register(sid, pid=worker.pid, sock=str(path))
    kill(worker)


def test_socket_of_a_dead_worker_is_removed(reg: Registry, crew: Crew, server: Server) -> None:
    """The path, the socket recorded there, ours, refused: it goes."""
    dead(reg, crew, server.path)
    server.die()
    report = collect(reg)
    assert report.lost == ("a",)
    assert report.sockets == (str(server.path),)
    assert os.listdir(server.path.parent) == ["store"]


@pytest.mark.parametrize("batched", [False, True])
def test_socket_bound_after_the_registration_is_known_once_ready(
    reg: Registry, crew: Crew, tmp_path: Path, *, batched: bool
) -> None:
    """At the registration it was not there yet; a ready worker's is."""
    worker = crew.sleeper()
    path = tmp_path / "late.sock"
    assert reg.register("a", pid=worker.pid, sock=str(path)).sock_id is None
    late = Server(path)
    if batched:
        with reg.batch() as batch:
            batch.update("a", state="ready")
    else:
        reg.update("a", state="ready")
    ready = reg.get("a")
    assert ready is not None
    assert ready.sock_id == socket_id(str(path))
    late.die()
    kill(worker)
    assert collect(reg).sockets == (str(path),)


def _still_served(server: Server, reg: Registry, crew: Crew) -> None:
    dead(reg, crew, server.path)


def _bound_anew(server: Server, reg: Registry, crew: Crew) -> None:
    dead(reg, crew, server.path)
    server.die()
    server.path.unlink()
    again = socket.socket(socket.AF_UNIX)
    again.bind(str(server.path))  # bound and not listening yet: a connection is refused
    again.close()


def _replaced_by_a_file(server: Server, reg: Registry, crew: Crew) -> None:
    dead(reg, crew, server.path)
    server.die()
    server.path.unlink()
    server.path.write_text("precious")


def _replaced_by_a_link(server: Server, reg: Registry, crew: Crew) -> None:
    dead(reg, crew, server.path)
    server.die()
    server.path.rename(server.path.with_name("elsewhere.sock"))
    server.path.symlink_to("elsewhere.sock")


def _named_by_another(server: Server, reg: Registry, crew: Crew) -> None:
    dead(reg, crew, server.path)
    server.die()
    reg.register("b", pid=crew.sleeper().pid, sock=str(server.path))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give it away")
def test_socket_of_another_user_stays(reg: Registry, crew: Crew, server: Server) -> None:
    """Not ours."""
    dead(reg, crew, server.path)
    server.die()
    os.chown(server.path, 65534, 65534)
    report = collect(reg)
    assert report.sockets == ()
    assert report.sockets_kept == ((str(server.path), "it belongs to uid 65534"),)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (_still_served, "somebody listens on it"),
        (_bound_anew, "it is another socket than the recorded one"),
        (_replaced_by_a_file, "it is no socket"),
        (_replaced_by_a_link, "it is no socket"),
        (_named_by_another, "another record names it"),
    ],
)
def test_anything_else_stays_and_is_reported(
    reg: Registry,
    crew: Crew,
    server: Server,
    case: Callable[[Server, Registry, Crew], None],
    why: str,
) -> None:
    """One condition that does not hold is enough."""
    case(server, reg, crew)
    before = sorted(os.listdir(server.path.parent))
    report: CollectReport = collect(reg)
    assert report.sockets == ()
    assert report.sockets_kept == ((str(server.path), why),)
    assert sorted(os.listdir(server.path.parent)) == before


def test_socket_of_a_living_worker_is_not_looked_at(
    reg: Registry, crew: Crew, server: Server
) -> None:
    """However dead its socket is."""
    reg.register("a", pid=crew.sleeper().pid, sock=str(server.path))
    server.die()
    report = collect(reg)
    assert (report.sockets, report.sockets_kept) == ((), ())
    assert server.path.exists()


def test_dry_run_removes_no_socket(reg: Registry, crew: Crew, server: Server) -> None:
    """It only says who is dead."""
    dead(reg, crew, server.path)
    server.die()
    assert collect(reg, dry_run=True).lost == ("a",)
    assert server.path.exists()


def test_socket_bound_between_the_look_and_the_removal_is_put_back(
    reg: Registry, crew: Crew, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment: a new worker binds just before the file is moved aside."""
    dead(reg, crew, server.path)
    server.die()
    real = Disk.rename
    fresh: list[Server] = []

    def rename(self: Disk, name: str, new: str, *, at: int) -> None:
        if name == server.path.name:
            server.path.unlink()
            fresh.append(Server(server.path))
        real(self, name, new, at=at)

    monkeypatch.setattr(Disk, "rename", rename)
    report = collect(reg)
    assert report.sockets == ()
    assert report.sockets_kept[0][1] == "it is another socket than the recorded one"
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(server.path))
    client.close()
    fresh[0].die()
    assert sorted(os.listdir(server.path.parent)) == ["store", "worker.sock"]


def test_relative_and_foreign_addresses_are_left_alone(reg: Registry, crew: Crew) -> None:
    """tcp://…, or a path that only the worker can resolve."""
    for number, sock in enumerate(("tcp://127.0.0.1:80", "worker.sock", "@abstract")):
        worker = crew.sleeper()
        assert reg.register(f"w-{number}", pid=worker.pid, sock=sock).sock_id is None
        assert reg.liveness(f"w-{number}").flags == frozenset()
        kill(worker)
    assert collect(reg).sockets_kept == ()
