"""Keep workers' leases in a cluster, and the turns to start them.

A worker's lease is a key on an etcd lease, which a process beside the worker keeps (keeper.py) for
as long as the worker's own process lives. Its name holds the lease's id and its place, so that it
never speaks for an earlier or later worker of the same sid, nor for a copy of the store. A beat is
a second key, on a lease as long as the worker may be silent: whether that is there is read from the
cluster's clock alone.
"""

import contextlib
import math
import re
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from crewlog.errors import LockBusy
from crewlog.etcd import claims
from crewlog.etcd import layout as keys
from crewlog.etcd.claims import Claim
from crewlog.etcd.client import Client
from crewlog.etcd.keeper import Keeper
from crewlog.etcd.layout import Keys, Room
from crewlog.model.events import JsonObject, Worker
from crewlog.model.limits import Limits
from crewlog.process.liveness import LeaseSeen, LeaseState

CLAIM_LOOK_S: Final = 0.05

_MARK: Final = "~"  # in no sid
_NAME: Final = re.compile(r".+~([0-9a-f]{8})([0-9a-f]{16})")


class EtcdLeases:
    """The leases of a store in a cluster; see store.Leases."""

    __slots__ = ("_client", "_keys", "_limits")

    def __init__(self, client: Client, names: Keys, limits: Limits) -> None:
        """Look at nothing yet."""
        self._client = client
        self._keys = names
        self._limits = limits

    def make(self, sid: str, *, heartbeat_s: float | None) -> "EtcdLease":
        """Make a lease, with its first beat, and a process that keeps it.

        Raises: SpawnFailed if that process does not start.
        """
        id_ = claims.new_id()
        ttl_s, cluster = claims.grant(self._client, id_, self._limits.lease_ttl_s)
        name = f"{sid}{_MARK}{self._place(cluster)}{id_:016x}"
        key = self._keys.named(Room.LEASE, name)
        self._client.at_once(keys.put(key, b"", lease=id_))
        made = EtcdLease(name, Keeper(self._client.where, key, id_, ttl_s=ttl_s))
        if heartbeat_s is not None:
            self.beat(name, heartbeat_s=heartbeat_s)
        return made

    def look(self, names: Collection[str]) -> Callable[[str], LeaseSeen]:
        """Return what looks at leases: all of them were read at once."""
        wanted = [self._wanted(room, names) for room in (Room.LEASE, Room.BEAT)]
        answer = self._client.at_once(*wanted)
        leases, beats = keys.ranges(answer)
        held, fresh = {row.name for row in leases}, {row.name: row.value for row in beats}
        place = self._place(keys.cluster(answer))

        def seen(name: str) -> LeaseSeen:
            match = _NAME.fullmatch(name)
            if match is None or match[1] != place:  # of another place, from before a migration
                return LeaseSeen("absent")
            state: LeaseState = "held" if name in held else "free"
            return LeaseSeen(state, beat_expired=name not in fresh, said=fresh.get(name, b""))

        return seen

    def _wanted(self, room: Room, names: Collection[str]) -> JsonObject:
        if len(names) == 1:
            return keys.get(self._keys.named(room, next(iter(names))))
        return {"requestRange": keys.page(*self._keys.room(room), limit=0)}

    def _place(self, cluster: str) -> str:
        """Name where a lease is: one of another cluster or prefix says nothing here."""
        return f"{zlib.crc32(f'{cluster}/{self._keys.prefix}'.encode()):08x}"

    def beat(self, name: str, *, heartbeat_s: float | None, said: bytes | None = None) -> bool:
        """Note that the worker is well, now, and what it says of itself; False if no such lease.

        The cluster counts in whole seconds, and not below its election timeout.
        """
        match = _NAME.fullmatch(name)
        if match is None or not self._client.read(self._keys.named(Room.LEASE, name)):
            return False
        id_, key = int(match[2], 16), self._keys.named(Room.BEAT, name)
        if heartbeat_s is not None:
            id_ += 1
            claims.keep_or_make(self._client, id_, math.ceil(heartbeat_s), key)
        if said is not None:
            self._client.at_once(keys.put(key, said, lease=id_))
        return True

    @contextmanager
    def turn(self, sid: str, *, wait_s: float) -> "Iterator[EtcdTurn]":
        """Hold the turn to start a worker of one sid, on any host.

        Who is killed while having it keeps it for CLAIM_TTL_S.
        Raises: LockBusy.
        """
        key = self._keys.named(Room.TURN, sid)
        claim = Claim(self._client, key, holder=claims.me(), ttl_s=self._limits.claim_ttl_s)
        deadline = time.monotonic() + wait_s
        try:
            while (holder := claim.take()) is not None:
                if time.monotonic() >= deadline:
                    where = f"{self._client.where}: {key.decode()}"
                    raise LockBusy(where, waited_s=wait_s, holder=holder)
                time.sleep(CLAIM_LOOK_S)
            yield EtcdTurn()
        finally:
            claim.close()

    def sweep(self, *, needed: Callable[[str, str], bool]) -> int:  # noqa: ARG002 (they end by themselves)
        """Remove nothing: what nobody keeps runs out."""
        return 0


class EtcdTurn:
    """The turn to start a worker; see store.Turn."""

    def share(self) -> int:
        """Return -1: no descriptor holds it."""
        return -1


class EtcdLease:
    """A lease that was made; see store.Lease."""

    def __init__(self, name: str, keeper: Keeper) -> None:
        """Hand it to the keeper."""
        self.name = name
        self._keeper = keeper

    def inherited(self) -> Sequence[int]:
        """Return nothing: no descriptor holds it."""
        return ()

    def keep(self, worker: Worker) -> None:
        """Hand it to the keeper, which renews it while the worker's process lives."""
        self._keeper.guard(worker)

    def hand_over(self, worker: Worker) -> None:
        """Hand it to the keeper, which renews it while the worker's process lives."""
        self._keeper.guard(worker)

    def drop(self) -> None:
        """Give it back: the worker was not registered."""
        with contextlib.suppress(OSError):
            self._keeper.dismiss()
