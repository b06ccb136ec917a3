"""Start etcd servers for tests: one, or three on loopback; kill, pause and restart them."""

import json
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

from crewlog.host import Closable
from procs import until

MISSING: Final = "" if shutil.which("etcd") else "etcd is not installed (Debian: etcd-server)"


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    taken = [socket.socket() for _ in range(count)]
    for one in taken:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in taken]
    for one in taken:
        one.close()
    return ports


class Server:
    """One member of a cluster."""

    def __init__(self, home: Path, name: str, client: int, peer: int, words: Sequence[str]) -> None:
        """Start nothing yet."""
        self.port = client
        self.peer = peer
        self.name = name
        self.home = home / name
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def peer_url(self) -> str:
        """Return where other members reach it."""
        return f"http://127.0.0.1:{self.peer}"

    def start(self) -> None:
        """Start it, with what it had on disk."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["etcd", "--name", self.name, "--data-dir", str(self.home / "data"), *self._words],
                stdout=log,
                stderr=log,
            )

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def status(self) -> dict[str, object] | None:
        """Return what it says of itself, None if it does not answer."""
        url = f"http://127.0.0.1:{self.port}/v3/maintenance/status"
        request = urllib.request.Request(url, data=b"{}")
        try:
            with urllib.request.urlopen(request, timeout=1) as answer:  # noqa: S310 (as above)
                return cast("dict[str, object]", json.load(answer))
        except (OSError, urllib.error.URLError, ValueError):
            return None

    def healthy(self) -> bool:
        """Say whether it answers and knows a leader."""
        status = self.status()
        return status is not None and str(status.get("leader", "0")) != "0"

    def leads(self) -> bool:
        """Say whether it is the leader."""
        status = self.status()
        if status is None:
            return False
        header = cast("dict[str, object]", status["header"])
        return status.get("leader") == header["member_id"]


class Cluster(Closable):
    """One server or more, which end with the block."""

    def __init__(
        self,
        home: Path,
        *,
        size: int = 1,
        scheme: str = "http",
        listen: str = "127.0.0.1",
        more: Sequence[str] = (),
    ) -> None:
        """Start them, and wait until each knows a leader."""
        ports = free_ports(2 * size)
        peers = [f"http://127.0.0.1:{port}" for port in ports[size:]]
        names = [f"m{number}" for number in range(size)]
        whole = ",".join(f"{name}={url}" for name, url in zip(names, peers, strict=True))
        self.servers = [
            Server(
                home,
                name,
                ports[number],
                ports[size + number],
                [
                    *("--listen-client-urls", f"{scheme}://{listen}:{ports[number]}"),
                    *("--advertise-client-urls", f"{scheme}://127.0.0.1:{ports[number]}"),
                    *("--listen-peer-urls", peers[number]),
                    *("--initial-advertise-peer-urls", peers[number]),
                    *("--initial-cluster", whole),
                    *("--heartbeat-interval", "10", "--election-timeout", "100"),
                    *more,
                ],
            )
            for number, name in enumerate(names)
        ]
        for server in self.servers:
            server.start()
        self.wait()

    def wait(self) -> None:
        """Wait until every server answers."""
        until(lambda: all(server.healthy() for server in self.servers), wait_s=30)

    def leader(self) -> Server:
        """Return the leader, once there is one."""
        leaders: list[Server] = []

        def known() -> bool:
            leaders[:] = [server for server in self.servers if server.leads()]
            return bool(leaders)

        until(known, wait_s=30)
        return leaders[0]

    def url(self, prefix: str) -> str:
        """Return the address of a store."""
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.servers)
        return f"etcd://{hosts}/{prefix}"

    def close(self) -> None:
        """End all of them."""
        for server in self.servers:
            server.kill()
