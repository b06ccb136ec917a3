"""Claim a key for as long as this process lives, by a lease that a thread keeps.

Who claims it is its only owner while the lease lasts. A process that is stopped for longer than
that loses it without knowing; so what an owner writes is conditional on the claim's own revision.
"""

import contextlib
import os
import random
import threading
from collections.abc import Sequence
from typing import Final, cast

from crewlog import host
from crewlog.errors import CrewlogError, RegistryClosed
from crewlog.etcd import layout as keys
from crewlog.etcd.client import Client, Refused
from crewlog.model.events import JsonObject

_ID_BITS: Final = 62  # a lease's id is a positive int64; the lowest bit is for beats


def new_id() -> int:
    """Return an id for a lease that nobody else has; it is even."""
    return (random.SystemRandom().getrandbits(_ID_BITS) << 1) or 2


def grant(client: Client, id_: int, ttl_s: int) -> tuple[int, str]:
    """Make a lease; return how long it lasts without being kept, in seconds, and its cluster.

    The server may raise `ttl_s` to what its elections need.
    """
    try:
        answer = client.call("lease/grant", {"ID": str(id_), "TTL": str(ttl_s)})
    except Refused as error:
        if "already exists" not in error.why:
            raise
        answer = client.call("lease/timetolive", {"ID": str(id_)})  # our own, sent twice
        return keys.number(answer, "grantedTTL"), keys.cluster(answer)
    return keys.number(answer, "TTL"), keys.cluster(answer)


def keep_or_make(client: Client, id_: int, ttl_s: int, key: bytes) -> None:
    """Keep a lease alive; where it ran out, make it anew, with the key that hangs on it."""
    if not keep(client, id_):
        grant(client, id_, ttl_s)
        client.at_once(keys.put(key, b"", lease=id_))


def keep(client: Client, id_: int) -> bool:
    """Keep a lease for its whole time again; False if it has run out."""
    answer = client.call("lease/keepalive", {"ID": str(id_)})
    lease = answer.get("result")
    return isinstance(lease, dict) and keys.number(cast("JsonObject", lease), "TTL") > 0


def revoke(client: Client, id_: int) -> None:
    """End a lease, and remove its keys."""
    try:
        client.call("lease/revoke", {"ID": str(id_)})
    except Refused as error:
        if not error.not_found:  # else it had run out
            raise


def me() -> str:
    """Name this process to those who wait for it."""
    return f"pid {os.getpid()} on {os.uname().nodename}"


class Claim:
    """The claim of one key; `close` gives it up."""

    def __init__(self, client: Client, key: bytes, *, holder: str, ttl_s: int) -> None:
        """Make a lease and keep it; nothing is claimed yet. `holder` tells others who has it."""
        self.key = key
        self.revision = 0  # since when we hold it
        self._client = client.twin()  # it outlives the store that it is for
        self._holder = holder.encode()
        self._id = new_id()
        self._ttl_s, _ = grant(self._client, self._id, ttl_s)
        self._closing = threading.Event()
        host.start_thread(self._keep, name="crewlog-claim")

    def _keep(self) -> None:
        while not self._closing.wait(self._ttl_s / 3):
            try:
                if not keep(self._client, self._id):
                    return
            except RegistryClosed:
                return
            except CrewlogError:  # no server answers: the next time, while the lease lasts
                continue

    def take(self) -> str | None:
        """Claim the key if nobody holds it; else return who does."""
        answer = self._client.call(
            "kv/txn",
            keys.transaction(
                [keys.is_absent(self.key)],
                [keys.put(self.key, self._holder, lease=self._id)],
                [keys.get(self.key)],
            ),
        )
        if answer.get("succeeded") is True:
            header = cast("JsonObject", answer["header"])
            self.revision = keys.number(header, "revision")
            return None
        rows = keys.ranges(answer)[0]
        if rows and rows[0].lease == self._id:  # ours: sent twice
            self.revision = rows[0].create_revision
            return None
        return rows[0].value.decode(errors="replace") if rows else "somebody"

    def move(
        self, key: bytes, before: bytes | None, after: bytes, *, also: Sequence[JsonObject] = ()
    ) -> bool:
        """Give a key another value if the claim is still ours; False if it is not.

        `before` is the value that it has (None: it is absent), so that a request which arrives a
        second time, late, changes nothing. `also` is carried out with it.
        """
        held = [
            keys.is_created(self.key, self.revision),
            keys.is_absent(key) if before is None else keys.is_value(key, before),
        ]
        owner = [keys.get(self.key), keys.get(key)]
        body = keys.transaction(held, [keys.put(key, after), *also], owner)
        answer = self._client.call("kv/txn", body)
        if answer.get("succeeded") is True:
            return True
        claim, rows = keys.ranges(answer)
        ours = bool(claim) and claim[0].create_revision == self.revision
        return ours and bool(rows) and rows[0].value == after  # it was sent twice

    def close(self) -> None:
        """Give it up; idempotent. Where no server answers, it runs out."""
        if not self._closing.is_set():
            self._closing.set()
            with contextlib.suppress(CrewlogError):
                revoke(self._client, self._id)
            self._client.close()
