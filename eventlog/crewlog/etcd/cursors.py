"""Keep the positions of named subscribers in a cluster: one key each, one owner at a time."""

from crewlog.errors import CursorBusy, CursorCorrupt, RegistryClosed
from crewlog.etcd import claims
from crewlog.etcd import layout as keys
from crewlog.etcd.claims import Claim
from crewlog.etcd.client import Client
from crewlog.etcd.layout import Keys, KeyValue, Room
from crewlog.model.limits import Limits
from crewlog.store import CursorState


class EtcdCursors:
    """The cursors of a store in a cluster; see store.Cursors."""

    __slots__ = ("_client", "_keys", "_limits")

    def __init__(self, client: Client, names: Keys, limits: Limits) -> None:
        """Read nothing yet."""
        self._client = client
        self._keys = names
        self._limits = limits

    def read(self, name: str) -> CursorState | None:
        """Read a cursor, whoever owns it.

        Raises: CursorCorrupt.
        """
        asked = [self._keys.named(room, name) for room in (Room.CURSOR, Room.LINE)]
        rows, lines = keys.ranges(self._client.at_once(*map(keys.get, asked)))
        if not rows:
            return None
        state = _state_of(rows[0])
        if state.damaged:
            raise CursorCorrupt(f"{self._client.where}: {name}", name)
        return state._replace(digest=_digest(lines[0].value, state.seq)) if lines else state

    def every(self) -> list[CursorState]:
        """Read every cursor; a damaged one hides no other."""
        page = keys.page(*self._keys.room(Room.CURSOR), limit=0)
        return [_state_of(row) for row in keys.pairs(self._client.call("kv/range", page))]

    def own(self, name: str, *, start: int, digest: int = 0) -> "EtcdCursor":
        """Take ownership, and create the cursor at `start` if there is none.

        Raises: CursorBusy.

        An owner that was killed keeps it for CLAIM_TTL_S.
        """
        claim = Claim(
            self._client,
            self._keys.named(Room.OWNER, name),
            holder=claims.me(),
            ttl_s=self._limits.claim_ttl_s,
        )
        try:
            holder = claim.take()
            if holder is not None:
                raise CursorBusy(
                    name, holder=f"{holder}, or did within {self._limits.claim_ttl_s} s,"
                )
            known = self.read(name)
            owned = EtcdCursor(claim, name, self._keys, known)
            if known is None:
                owned.set(start, digest)
        except BaseException:
            claim.close()
            raise
        return owned

    def is_owned(self, name: str) -> bool:
        """Say whether a subscriber owns the cursor at this moment."""
        return bool(self._client.read(self._keys.named(Room.OWNER, name)))

    def remove(self, name: str) -> bool:
        """Remove a cursor that nobody owns; False if there is none.

        Raises: CursorBusy.
        """
        key, owner = self._keys.named(Room.CURSOR, name), self._keys.named(Room.OWNER, name)
        if not self._client.read(key):
            return False
        free = [keys.is_absent(owner)]
        gone = [keys.delete(key), keys.delete(self._keys.named(Room.LINE, name))]
        body = keys.transaction(free, gone, [keys.get(owner)])
        answer = self._client.call("kv/txn", body)
        if answer.get("succeeded") is not True:
            holder = keys.ranges(answer)[0]
            raise CursorBusy(name, holder=holder[0].value.decode() if holder else "somebody")
        return True


class EtcdCursor:
    """A cursor that this process owns; `close` lets another one own it."""

    __slots__ = ("_claim", "_closed", "_key", "_line", "_stored", "digest", "name", "seq")

    def __init__(self, claim: Claim, name: str, names: Keys, known: CursorState | None) -> None:
        """Use a claim that was taken; None: there is no position yet."""
        self.name = name
        self.seq = 0 if known is None else known.seq
        self.digest = 0 if known is None else known.digest
        self._stored = None if known is None else b"%d" % known.seq
        self._claim = claim
        self._key, self._line = names.named(Room.CURSOR, name), names.named(Room.LINE, name)
        self._closed = False

    def advance(self, seq: int, digest: int = 0) -> None:
        """Acknowledge everything up to `seq`; never moves back."""
        if seq > self.seq:
            self.set(seq, digest)

    def set(self, seq: int, digest: int = 0) -> None:
        """Move to `seq`, also backwards; durable on return. `digest` is that of its line.

        Raises: RegistryClosed once it is closed; CursorBusy if it was lost to another owner.
        """
        if self._closed:
            raise RegistryClosed(f"cursor {self.name}")
        after = b"%d" % seq
        line = keys.put(self._line, line_of(seq, digest))
        if after == self._stored and digest == self.digest:
            return
        if not self._claim.move(self._key, self._stored, after, also=[line]):
            raise CursorBusy(self.name, holder="another subscriber, since we stood still,")
        self.seq, self.digest, self._stored = seq, digest, after

    def close(self) -> None:
        """Let go of it; idempotent."""
        self._closed = True
        self._claim.close()


def _state_of(row: KeyValue) -> CursorState:
    whole = row.value.isdigit()
    return CursorState(row.name, int(row.value) if whole else 0, damaged=not whole)


def line_of(seq: int, digest: int) -> bytes:
    """Write which line stood at a cursor's seq, beside it: version 0.1 knows the seq alone."""
    return b"%d %08x" % (seq, digest)


def _digest(value: bytes, seq: int) -> int:
    """Return which line stood at `seq`; 0 where the value is another's, or none of ours."""
    at, _, digest = value.partition(b" ")
    try:
        return int(digest, 16) if int(at) == seq else 0
    except ValueError:
        return 0
