"""Let writers whom others beat to it wait in a queue in the cluster, first come, first served.

A place is a key on a short lease; its create revision is its number. A transaction is carried out
only if nobody stands before its writer: who has no place needs the queue to be empty, who has one
needs it to be the oldest. So a writer cannot be beaten for ever, however many there are; one that
is killed or stopped in the queue gives way when its lease runs out. The key goes with the
transaction that it was taken for. Who has waited then has a turn: for a moment it need not mind
the queue, so that one wait serves many changes. Who is next tries beside it, and soon is first.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from crewlog.errors import CrewlogError
from crewlog.etcd import claims
from crewlog.etcd import layout as keys
from crewlog.etcd.client import Client
from crewlog.etcd.layout import Keys, KeyValue, Room
from crewlog.model.events import JsonObject

PLACE_TTL_S: Final = 5  # who is stopped in the queue holds up all others for so long, at most
_NEXT_S: Final = 0.0005  # so long who is next waits between two looks
TURN_S: Final = 0.03  # so long a writer goes on past the queue, once it has waited in it
_CROWD: Final = 15  # twice as long where so many stood before it: to change turns costs the most
_BEATEN_S: Final = 0.006  # and so long who is next waits, where that one was faster
_PAUSE_MAX_S: Final = 1.0
_LEFT_MAX: Final = 64


class Waiters:
    """The queue of a store's writers, as one process sees it; one thread at a time enters it."""

    def __init__(self, client: Client, names: Keys) -> None:
        """Have no lease yet."""
        self._client = client
        self._keys = names
        self._lease = 0
        self._granted_at = 0.0
        self._turn_until = 0.0  # until then we need not mind who waits
        self._left: deque[bytes] = deque(maxlen=_LEFT_MAX)  # the keys of our last places

    def enter(self) -> "Place":
        """Take a place at the end."""
        if time.monotonic() - self._granted_at > PLACE_TTL_S / 2:
            self._lease = claims.new_id()
            claims.grant(self._client, self._lease, PLACE_TTL_S)
            self._granted_at = time.monotonic()
        key = self._keys.named(Room.QUEUE, os.urandom(8).hex())
        self._client.at_once(keys.put(key, b"", lease=self._lease))
        return Place(self._client, self._keys, key, self._lease, left=self._left)

    def forget(self) -> None:
        """Use no lease of the parent's, nor its turn, in a forked child."""
        self._granted_at = self._turn_until = 0.0

    def let_pass(self, place: "Place | None") -> list[JsonObject]:
        """Return what a transaction compares: it is first, nobody waits, or nothing in its turn."""
        if place is not None:
            return [place.is_first()]
        if time.monotonic() < self._turn_until:
            return []
        return [keys.none_in(*self._keys.room(Room.QUEUE))]

    def begin_turn(self, place: "Place | None") -> None:
        """Begin our turn, if a transaction was carried out that had waited for it."""
        if place is not None:
            self._turn_until = time.monotonic() + turn_s(place.crowd)

    def end_turn(self) -> None:
        """End our turn: another was first, whose turn has begun."""
        self._turn_until = 0.0


def turn_s(crowd: int) -> float:
    """Return how long a turn is, in seconds, where so many stand before."""
    return TURN_S * (1 + min(crowd, _CROWD) / _CROWD)


class Place:
    """A writer's place in the queue; `leave` gives it up where no transaction took it along."""

    def __init__(
        self, client: Client, names: Keys, key: bytes, lease: int, *, left: deque[bytes]
    ) -> None:
        """Use `Waiters.enter`; `left` are the keys of places that were given up."""
        self.key = key
        self._ours = set(left)
        left.append(key)
        self._client = client
        self._keys = names
        self._lease = lease
        self._is_next = False  # nobody stood before us when we last looked
        self.crowd = 0  # how many stood before us at most
        self._number = 0  # the revision of the key's creation, once it was seen
        self._kept_at = time.monotonic()

    def peek(self) -> int:
        """Return how many stood before a moment ago, as one server knows; 0 if it does not."""
        room = keys.page(*self._keys.room(Room.QUEUE), limit=0)
        older: JsonObject = {"maxCreateRevision": str(self._number - 1), "keysOnly": True}
        answer = self._client.call("kv/range", {**room, **older, "serializable": True})
        return len(keys.pairs(answer))

    def look(self) -> JsonObject:
        """Ask who stands in the queue."""
        return {
            "requestRange": {**keys.page(*self._keys.room(Room.QUEUE), limit=0), "keysOnly": True}
        }

    def before(self, rows: Sequence[KeyValue]) -> int | None:
        """Return how many stand before, by an answer to `look`; None if the place is lost.

        A request may arrive twice, and late: then a key of ours is there that was given up.
        """
        late = [row.key for row in rows if row.key in self._ours]
        if late:
            self._client.at_once(*map(keys.delete, late))
        mine = next((row for row in rows if row.key == self.key), None)
        if mine is None:
            return None
        self._number = mine.create_revision
        before = sum(row.create_revision < self._number for row in rows)
        self._is_next = before == 0
        self.crowd = max(self.crowd, before)
        return before

    def is_first(self) -> JsonObject:
        """Compare: nobody stands before."""
        begin, end = self._keys.room(Room.QUEUE)
        return keys.none_older(begin, end, self._number)

    def give_way(self) -> None:
        """Pause where we were next and one in its turn was faster: that soon ends."""
        if self._is_next:
            time.sleep(_BEATEN_S)

    def wait(self, before: int) -> None:
        """Wait about as long as those who stand before will take, and keep the lease."""
        time.sleep(min(_NEXT_S + turn_s(self.crowd) * (before - 1), _PAUSE_MAX_S))
        if time.monotonic() - self._kept_at > PLACE_TTL_S / 3:
            claims.keep(self._client, self._lease)
            self._kept_at = time.monotonic()

    def leave(self) -> None:
        """Give the place up. Where no server answers, its lease runs out."""
        with contextlib.suppress(CrewlogError):
            self._client.at_once(keys.delete(self.key))
