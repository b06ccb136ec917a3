"""Tidy up after the dead: sockets that nobody listens on any more, leases that nobody holds.

A socket goes only if everything speaks for it: the path was recorded with the device, inode and
time of its socket, that very socket is still there and ours, its worker has ended, no other record
names it, and a connection is refused. It is looked at once more, moved aside, looked at again, and
only then removed: one that a new worker has bound meanwhile is put back. Anything else stays and
is reported.
"""

import os
import secrets
import stat
from collections import Counter
from dataclasses import dataclass
from typing import Final

from crewlog.local.disk import Disk
from crewlog.model.events import Worker
from crewlog.process import identity, socket
from crewlog.registry import Registry

_ASIDE: Final = ".crewlog-orphan-"


@dataclass(frozen=True, slots=True)
class Tidied:
    """The sockets that were removed, by path, and those that stay, each with the reason."""

    sockets: tuple[str, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()


def tidy(reg: Registry) -> Tidied:
    """Remove orphaned sockets and leases. The ends of their workers are durable."""
    via = Disk()
    workers = reg.workers(all=True)
    named = Counter(worker.sock for worker in workers)
    removed: list[str] = []
    kept: list[tuple[str, str]] = []
    for worker in workers:
        if not worker.final or worker.sock_id is None or not os.path.lexists(worker.sock):
            continue
        if worker.identity is None or worker.identity.host_id != identity.scope().host_id:
            continue  # its path is one of another host
        why = _remove(worker, via, named=named[worker.sock])
        if why is None:
            removed.append(worker.sock)
        else:
            kept.append((worker.sock, why))
    reg.store().leases.sweep(needed=lambda sid, name: _is_needed(reg, sid, name))
    return Tidied(tuple(removed), tuple(kept))


def _is_needed(reg: Registry, sid: str, name: str) -> bool:
    worker = reg.get(sid)
    return worker is not None and worker.lease == name and not worker.final


def _remove(worker: Worker, via: Disk, *, named: int) -> str | None:
    """Remove a dead worker's socket; a reason if it stays."""
    if named > 1:
        return "another record names it"
    parent, name = os.path.split(worker.sock)
    try:
        at = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        return f"its directory cannot be opened: {error.strerror}"
    try:
        why = _mismatch(worker, name, at)
        if why is not None:
            return why
        answer = socket.ask(worker.sock)
        if answer != "refused":
            return "somebody listens on it" if answer == "answers" else "it does not say"
        return _mismatch(worker, name, at) or _take_away(worker, name, at, via)
    except OSError as error:
        return f"it cannot be removed: {error.strerror}"
    finally:
        os.close(at)


def _mismatch(worker: Worker, name: str, at: int) -> str | None:
    """Return how what is there differs from the recorded socket."""
    try:
        inode = os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return "it is gone"
    if not stat.S_ISSOCK(inode.st_mode):
        return "it is no socket"
    if inode.st_uid != os.geteuid():
        return f"it belongs to uid {inode.st_uid}"
    if socket.id_of(inode) != worker.sock_id:
        return "it is another socket than the recorded one"
    return None


def _take_away(worker: Worker, name: str, at: int, via: Disk) -> str | None:
    aside = f"{_ASIDE}{secrets.token_hex(4)}"
    via.rename(name, aside, at=at)
    why = _mismatch(worker, aside, at)
    if why is not None:
        via.link(aside, name, at=at, new_at=at)  # fails, and leaves both, if yet another came
    via.unlink(aside, at=at)
    return why
