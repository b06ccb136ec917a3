"""Register workers: with a lease where one is wanted, over a dead holder where that is proven."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from crewlog.errors import InvalidTransition, StaleRevision, WorkerExists
from crewlog.model import arguments
from crewlog.model.events import JsonObject, Worker
from crewlog.model.steps import (
    Author,
    Step,
    UpdateOptions,
    Wish,
    check_wish,
    register_step,
)
from crewlog.process import identity
from crewlog.process.socket import socket_id
from crewlog.session import Session
from crewlog.store import Lease
from crewlog.workers import judge, tree


def check(wish: Wish) -> None:
    """Raise ValueError or TypeError for what cannot be written, ProcessNotFound for the owner."""
    check_wish(wish)
    if wish.owner is not None:
        identity.capture(wish.owner)


def register(
    session: Session, sid: str, pid: int | None, wish: Wish, *, seen: JsonObject | None = None
) -> Worker:
    """Register a running process, None: this one, which alone can hold a lease.

    `seen` is what else is known of it and is to be recorded.
    """
    leased = wish.lease or wish.heartbeat_s is not None
    if leased and pid not in {None, os.getpid()}:
        message = "a lease is held by the worker: register it from inside, or spawn it"
        raise ValueError(message)
    with lease_for(session, sid, wish) as held:
        worker = enter(session, sid, pid, wish, held=held, seen=seen)
    if held is not None:
        held.keep(worker)
    return worker


@contextmanager
def lease_for(session: Session, sid: str, wish: Wish) -> Iterator[Lease | None]:
    """Make the lease that is wished for, with its first beat, for who is registered in this block.

    If the block raises, the worker is not registered and the lease goes.
    """
    arguments.check_sid(sid)
    heartbeat_s = arguments.check_heartbeat(wish.heartbeat_s)
    if not wish.lease and heartbeat_s is None:
        yield None
        return
    check(wish)  # before a lease is made, and a store for it
    made = session.make().leases.make(sid, heartbeat_s=heartbeat_s)
    try:
        yield made
    except BaseException:
        made.drop()
        raise


def enter(
    session: Session,
    sid: str,
    pid: int | None,
    wish: Wish,
    *,
    held: Lease | None,
    seen: JsonObject | None = None,
) -> Worker:
    """Write a registration, with the lease that is held for it, and what else was seen of it.

    Raises: WorkerExists.
    """
    lease = None if held is None else held.name
    step = captured(session.author(), sid, pid, wish, lease=lease, seen=seen)
    burial: list[Step] = []
    for _ in range(judge.CHANGE_TRIES):
        try:
            return session.put([*burial, step])
        except WorkerExists as error:
            burial = judge.burial(session, sid)
            if not burial:
                raise judge.taken(session, error) from None
        except (StaleRevision, InvalidTransition):  # the holder changed since the probe
            burial = []
    return session.put([step])


def captured(
    author: Author,
    sid: str,
    pid: int | None,
    wish: Wish,
    *,
    lease: str | None = None,
    seen: JsonObject | None = None,
) -> Step:
    """Return the step that registers a process as it is now.

    Raises: ProcessNotFound if it, or the owner, has ended.
    """
    who, stat = identity.look(pid)
    more = {**tree.described(who.pid, stat), **(seen or {})}
    if wish.record_argv and "argv" not in more:
        more |= identity.command(who.pid)
    return register_step(
        author,
        sid,
        wish,
        who=who,
        owner=None if wish.owner is None else identity.capture(wish.owner),
        sock_id=socket_id(arguments.check_sock(wish.sock)),
        lease=lease,
        seen=more,
    )


def seen_socket(
    sid: str, options: UpdateOptions, sock_of: Callable[[str], str | None]
) -> JsonObject:
    """Return what is to be recorded of the socket of a worker that an update is about.

    A worker that becomes ready listens from then on: then its recorded socket is looked at, which
    `sock_of` tells.
    """
    path = options.get("sock")
    if path is None and options.get("state") == "ready":
        path = sock_of(sid)
    return {} if path is None else {"sock_id": socket_id(arguments.check_sock(path))}


def recorded_sock(session: Session, sid: str) -> str | None:
    """Return the recorded socket of a worker; None if it has none, or there is no such worker."""
    worker = session.get(sid)
    return None if worker is None else worker.sock or None
