"""Stand between a client and a server of HTTP: lose answers, delay requests, or pass all on."""

import contextlib
import random
import socket
import threading
import time
from typing import Literal, TypeAlias

Fate: TypeAlias = Literal["pass", "lose_answer", "late", "lose_request"]


class LossyProxy:
    """A proxy on loopback that decides the fate of each request to `kv/txn` by chance.

    `lose_answer`: the server carries it out, and the client hears of a closed connection; `late`:
    the client hears that, and the server gets the request only afterwards; `lose_request`: the
    server never gets it. With `share` 0 all pass.
    """

    def __init__(self, port: int, *, share: float = 0.0, seed: int = 1) -> None:
        """Listen on a port of its own, in front of `port`."""
        self.share = share
        self.met: dict[Fate, int] = {"pass": 0, "lose_answer": 0, "late": 0, "lose_request": 0}
        self._behind = port
        self._dice = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _fate(self, request: bytes) -> Fate:
        if b"/v3/kv/txn" not in request or self._dice.random() >= self.share:
            return "pass"
        return self._dice.choice(["lose_answer", "late", "lose_request"])

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while True:
                request = _message(client)
                if not request:
                    return
                fate = self._fate(request)
                self.met[fate] += 1
                if fate == "lose_request":
                    return
                if fate == "late":
                    client.close()
                    time.sleep(self._dice.uniform(0, 0.03))
                    self._ask(request)
                    return
                answer = self._ask(request)
                if fate == "lose_answer":
                    return
                client.sendall(answer)

    def _ask(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self._behind), timeout=10) as server:
            server.sendall(request)
            return _message(server)

    def close(self) -> None:
        """Listen no more."""
        self._listener.shutdown(socket.SHUT_RDWR)  # the thread that accepts would go on
        self._listener.close()


def _message(stream: socket.socket) -> bytes:
    """Read one message, with its Content-Length or in chunks; b"" at the end."""
    data = b""
    while not _is_whole(data):
        part = stream.recv(65536)
        if not part:
            return b""
        data += part
    return data


def _is_whole(data: bytes) -> bool:
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return False
    if b"chunked" in head:
        return body.endswith(b"0\r\n\r\n")
    rows = [row.lower().partition(b":") for row in head.split(b"\r\n")]
    return len(body) >= sum(int(value) for name, _, value in rows if name == b"content-length")
