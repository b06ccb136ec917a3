"""Hear of changes from etcd: a stream that watches head, and only rings.

Whatever ends the stream (a server that goes, a lost leader, a revision that was compacted away,
half a minute without a word), the readers are rung and a new one is begun: they read by the keys,
so nothing that a stream tells or fails to tell changes what they deliver.
"""

import logging
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from crewlog import host
from crewlog.errors import CrewlogError
from crewlog.etcd import client
from crewlog.etcd.address import EtcdAddress
from crewlog.etcd.client import Client, Stream, Unanswered
from crewlog.store import Backend, Rings

_logger = logging.getLogger("crewlog.etcd")
_PAUSE_MIN_S: Final = 0.01
_BACKENDS: Final = frozenset({"auto", "poll"})


@dataclass(frozen=True, slots=True)
class EtcdChannel:
    """The changes of a store in a cluster; see notify.Channel."""

    address: EtcdAddress
    head: bytes
    store: str
    pause_max_s: float

    @property
    def where(self) -> str:
        """Return the URL."""
        return str(self.address)

    def identity(self) -> Hashable:
        """Return what another store under this prefix would not have."""
        return self.address, self.store

    def unheard(self) -> str:
        """Return "": a cluster can always be heard."""
        return ""

    def source(self, backend: Backend, rings: Rings) -> "EtcdSource":
        """Listen from here on.

        Raises: ValueError for a waker of directories.
        """
        if backend not in _BACKENDS:
            message = f"backend {backend!r} wakes readers of a directory; on etcd: auto or poll"
            raise ValueError(message)
        made = Client(self.address, wait_s=client.ANSWER_WAIT_S)
        return EtcdSource(made, self.head, rings, pause_max_s=self.pause_max_s)


class EtcdSource:
    """A thread that reads a stream and rings; see notify.Source."""

    name = "etcd"

    def __init__(self, client: Client, key: bytes, rings: Rings, *, pause_max_s: float) -> None:
        """Begin to listen; who looks after the first ring misses nothing."""
        self._client = client
        self._key = key
        self._rings = rings
        self._pause_max_s = pause_max_s
        self._closing = threading.Event()
        self._stream: Stream | None = None
        self._thread = host.start_thread(self._run, name="crewlog-etcd")

    def _run(self) -> None:
        pause_s = _PAUSE_MIN_S
        while not self._closing.is_set():
            try:
                self._stream = self._client.watch(self._key)
                for _ in self._stream.messages():
                    if self._closing.is_set():
                        return
                    self._rings()  # the first message says that the stream has begun
                    pause_s = _PAUSE_MIN_S
            except (Unanswered, CrewlogError) as error:
                _logger.info("no word from %s: %s", self._client.where, error)
            finally:
                self._end()
            self._rings()
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, self._pause_max_s)

    def _end(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def healthy(self) -> bool:
        """Say whether its thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End its thread and its stream."""
        self._closing.set()
        stream = self._stream
        if stream is not None:
            stream.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(client.ANSWER_WAIT_S)
        self._client.close()
