"""Keep a worker's lease from a process beside it, for as long as the worker's process lives.

A thread of the worker would stop with it (SIGSTOP, a long garbage collection) and end with an exec;
one of whoever started it would end with that one. So a small process of its own holds the worker's
pidfd and keeps the lease until that is ready, then ends the lease and itself. It is told whom to
guard once the worker is registered; if it never is, because we fail or are killed, it reads the end
of its pipe and ends the lease.

It guards as two processes, so that it outlives a kill (the kernel's when memory runs out): a child
keeps the lease, and its parent, which has little to do, starts another one where that is killed; a
child whose parent is killed becomes one itself. Nothing but the end of both at once, or of the
host, lets a lease of a living worker run out.
"""

import contextlib
import os
import select
import subprocess
import sys
import time
from typing import Final, cast

from crewlog.errors import CrewlogError, ProcessNotFound, SpawnFailed, not_started
from crewlog.etcd import claims, client
from crewlog.etcd import layout as keys
from crewlog.etcd.address import EtcdAddress, environment
from crewlog.etcd.client import Client
from crewlog.model import codec
from crewlog.model.codec import DocumentError
from crewlog.model.events import Identity, IdentityRecord, Worker, identity_of
from crewlog.process import identity
from crewlog.process.handle import Process

KEEPER_WAIT_S: Final = 30.0

_STDERR: Final = 2
_SCRIPT: Final = """
import sys
sys.path[:] = sys.argv[6:]
from crewlog.etcd.keeper import main
main(*sys.argv[1:6])
"""


class Keeper:
    """The process that keeps one lease."""

    def __init__(self, url: str, key: bytes, lease: int, *, ttl_s: int) -> None:
        """Start it; it keeps the lease and its key on return.

        Raises: SpawnFailed.
        """
        us = codec.dump(identity.capture(None).as_json()).decode()
        arguments = [url, key.decode(), str(lease), str(ttl_s), us]
        paths = [os.path.abspath(path) for path in sys.path]  # it runs in another directory
        words = [sys.executable, "-c", _SCRIPT, *arguments, *paths]
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env=environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise not_started("the keeper of the lease", error) from error
        self._await()

    def _await(self) -> None:
        """Return once it has gone into the background: what we started has then ended with 0."""
        stderr = self._process.stderr
        assert stderr is not None  # it was asked for
        try:
            code = self._process.wait(KEEPER_WAIT_S)
            why = "" if code == 0 else stderr.read().decode(errors="replace").strip()[-500:]
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            self._process.wait()
            raise SpawnFailed("the keeper of the lease", why="it does not begin") from error
        finally:
            stderr.close()
        if code != 0:
            self.dismiss()
            raise SpawnFailed("the keeper of the lease", why=why or f"it ended with {code}")

    def guard(self, worker: Worker) -> None:
        """Tell it whom to guard, and leave it alone."""
        assert worker.identity is not None  # it was registered while it ran
        self._tell(codec.dump(worker.identity.as_json()) + b"\n")

    def dismiss(self) -> None:
        """Let it end the lease, and itself."""
        self._tell(b"")

    def _tell(self, words: bytes) -> None:
        stdin = self._process.stdin
        assert stdin is not None  # it was asked for
        try:
            stdin.write(words)
            stdin.close()
        except BrokenPipeError:  # it was killed: the lease will run out, which is what it says
            return


class _Watch:
    """What the process does: it keeps a lease."""

    def __init__(self, client: Client, key: bytes, lease: int, *, ttl_s: int) -> None:
        self._client = client
        self._key = key
        self._lease = lease
        self.pause_s = ttl_s / 3
        self._ttl_s = ttl_s

    def keep(self) -> None:
        """Keep the lease; make it anew where it ran out while no server could be reached."""
        try:
            claims.keep_or_make(self._client, self._lease, self._ttl_s, self._key)
        except CrewlogError:  # no server answers: again, for as long as the worker lives
            time.sleep(client.BACKOFF_MAX_S)

    def end(self) -> None:
        """End the lease. Where no server answers, it runs out."""
        with contextlib.suppress(CrewlogError):
            claims.revoke(self._client, self._lease)


def main(url: str, key: str, lease: str, ttl_s: str, starter: str) -> None:
    """Be the process: keep the lease once, go into the background, guard."""
    client = Client(EtcdAddress.parse(url), wait_s=float(ttl_s))
    watch = _Watch(client, key.encode(), int(lease), ttl_s=int(ttl_s))
    if not claims.keep(client, int(lease)):
        sys.exit("the lease has run out")
    if os.fork():
        os._exit(0)
    os.close(_STDERR)
    os.open(os.devnull, os.O_WRONLY)
    guarded = _read_guarded(watch, _identity(starter.encode()))
    if guarded is not None:
        _guard(watch, guarded)
    watch.end()


def _read_guarded(watch: _Watch, starter: Identity | None) -> Identity | None:
    """Read whom to guard, and keep the lease meanwhile; None for nobody.

    The starter is looked at, too: the end of the pipe may be held open by a process that it forked.
    """
    poll = select.poll()
    poll.register(0, select.POLLIN)
    words = b""
    while not words.endswith(b"\n"):
        if poll.poll(watch.pause_s * 1000):
            read = os.read(0, keys.READ_BYTES)
            if not read:
                return None
            words += read
        elif starter is not None and not _lives(starter):
            return None
        else:
            watch.keep()
    return _identity(words)


def _lives(who: Identity) -> bool:
    try:
        with Process(who) as held:
            return not held.wait(0)
    except ProcessNotFound:
        return False


def _identity(words: bytes) -> Identity | None:
    try:
        return identity_of(cast("IdentityRecord", codec.load_object(words)))
    except (DocumentError, TypeError):  # half of it
        return None


def _guard(watch: _Watch, who: Identity) -> None:
    """Keep the lease until the process has ended."""
    try:
        with Process(who) as held:
            parent = _go_on_in_a_child()
            watch.keep()
            while not held.wait(watch.pause_s):
                if os.getppid() != parent:
                    parent = _go_on_in_a_child()
                watch.keep()
    except ProcessNotFound:  # it has ended already
        return


def _go_on_in_a_child() -> int:
    """Return in a child, with our pid; in another one where that does not do its work."""
    us = os.getpid()
    while True:
        try:
            child = os.fork()
        except OSError:  # EAGAIN, ENOMEM: then without a second one
            return os.getppid()
        if not child:
            return us
        _, status = os.waitpid(child, 0)
        if status == 0:
            os._exit(0)
        time.sleep(client.BACKOFF_MIN_S)
