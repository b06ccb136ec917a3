"""Register workers: with a lease where one is wanted, over a dead holder where that is proven."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from crewlog import arguments, changes, identity, judging, layout
from crewlog.changes import Step
from crewlog.errors import InvalidTransition, StaleRevision, WorkerExists
from crewlog.events import JsonValue, Worker
from crewlog.session import Session
from crewlog.store import Lease


class Wish(NamedTuple):
    """What a worker is to be registered with, beside its sid and pid; see `Registry.register`."""

    sock: str = ""
    version: str = ""
    labels: Mapping[str, str] | None = None
    meta: Mapping[str, JsonValue] | None = None
    ready: bool = False
    owner: int | None = None
    lease: bool = False
    heartbeat_s: float | None = None


def check(wish: Wish) -> None:
    """Raise ValueError or TypeError for what cannot be written, ProcessNotFound for the owner."""
    arguments.check_heartbeat(wish.heartbeat_s)
    changes.description(sock=wish.sock, version=wish.version, labels=wish.labels, meta=wish.meta)
    if wish.owner is not None:
        identity.capture(wish.owner)


def register(session: Session, sid: str, pid: int | None, wish: Wish) -> Worker:
    """Register a running process, None: this one, which alone can hold a lease."""
    leased = wish.lease or wish.heartbeat_s is not None
    if leased and pid not in {None, os.getpid()}:
        message = "a lease is held by the worker: register it from inside, or spawn it"
        raise ValueError(message)
    with leasing(session, sid, wish) as held:
        worker = enter(session, sid, pid, wish, held=held)
    if held is not None:
        held.keep(worker)
    return worker


@contextmanager
def leasing(session: Session, sid: str, wish: Wish) -> Iterator[Lease | None]:
    """Make the lease that is wished for, with its first beat, for who is registered in this block.

    If the block raises, the worker is not registered and the lease goes.
    """
    arguments.check_sid(sid)
    heartbeat_s = arguments.check_heartbeat(wish.heartbeat_s)
    if not wish.lease and heartbeat_s is None:
        yield None
        return
    check(wish)  # before a lease is made, and a store for it
    made = session.created().leases.make(sid, heartbeat_s=heartbeat_s)
    try:
        yield made
    except BaseException:
        made.drop()
        raise


def enter(session: Session, sid: str, pid: int | None, wish: Wish, *, held: Lease | None) -> Worker:
    """Write a registration, with the lease that is held for it. *Raises* WorkerExists."""
    step = changes.registered(
        session.author(),
        sid,
        pid=pid,
        sock=wish.sock,
        version=wish.version,
        labels=wish.labels,
        meta=wish.meta,
        ready=wish.ready,
        owner=wish.owner,
        lease=None if held is None else held.name,
        heartbeat_s=arguments.check_heartbeat(wish.heartbeat_s),
    )
    burial: list[Step] = []
    for _ in range(layout.CHANGE_TRIES):
        try:
            return session.put([*burial, step])
        except WorkerExists:
            burial = judging.burial(session, sid)
            if not burial:
                raise
        except (StaleRevision, InvalidTransition):  # the holder changed since the probe
            burial = []
    return session.put([step])
