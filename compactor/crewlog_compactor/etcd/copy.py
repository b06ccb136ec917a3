"""Write a copied history into a cluster: everything else first, head last.

While the copy is under way the key P/:m names the store that it is of, so nobody takes what is
there for a store, and the same migration, begun again, may remove it.
"""

import os
from collections.abc import Sequence
from typing import Final, cast

from crewlog.errors import LockBusy, NotAStore
from crewlog.etcd import layout as keys
from crewlog.etcd.append import EtcdLog
from crewlog.etcd.cursors import line_of
from crewlog.etcd.layout import Room
from crewlog.etcd.place import EtcdPlace
from crewlog.etcd.reader import encode_head
from crewlog.model import chain, codec
from crewlog.model.codec import DocumentError
from crewlog.model.events import JsonObject, Line
from crewlog.model.limits import LOCK_WAIT_S
from crewlog.place import Place
from crewlog_compactor.copy import Copy
from crewlog_compactor.etcd.compact import put_base

_LINES_A_KEY: Final = 100
_KEY_BYTES: Final = 256 * 1024


def fill(copy: Copy, place: Place) -> None:
    """Copy a history to where there is no store.

    Raises: NotAStore where there is anything.
    """
    target = cast("EtcdPlace", place).empty(wait_s=LOCK_WAIT_S)
    try:
        target.check_version()
        _Writer(copy, target).write()
    finally:
        target.close()


class _Writer:
    """One copy into a cluster."""

    def __init__(self, copy: Copy, target: EtcdLog) -> None:
        self._copy = copy
        self._target = target
        self._keys = target.keys
        self._token = os.urandom(8).hex().encode()
        self._claim = codec.dump({"store": copy.source.id, "by": self._token.decode()})
        self._ops: list[JsonObject] = []
        self._bytes = 0

    def write(self) -> None:
        copy, names = self._copy, self._keys
        self._take()
        self._lines()
        self._flush()
        copy.require_still()
        for record in copy.state.records.values():
            self._put(names.named(Room.RECORD, record["sid"]), codec.dump(record))
        for cursor in copy.source.cursors.every():
            if not cursor.damaged:
                self._put(names.named(Room.CURSOR, cursor.name), b"%d" % cursor.seq)
                line = line_of(cursor.seq, cursor.digest)
                self._put(names.named(Room.LINE, cursor.name), line)
        self._flush()
        if copy.base.last_seq:
            put_base(self._target, copy.base)
        head = encode_head(copy.source.id, copy.seq, bytes.fromhex(copy.hash), copy.state.totals)
        mine = [keys.is_value(names.migration, self._claim), keys.is_absent(names.head)]
        then = [
            keys.put(names.store, copy.source.identity()),
            keys.put(names.head, head.raw),
            keys.delete(names.migration),
        ]
        self._send(mine, then, proof=(names.head, head.raw))

    def _send(
        self,
        compare: Sequence[JsonObject],
        then: Sequence[JsonObject],
        *,
        proof: tuple[bytes, bytes] | None = None,
    ) -> None:
        """Carry out a step, if the prefix is still ours.

        Raises: LockBusy.

        Sent twice, its second sending may find that the first has changed what it compares with:
        then the key of `proof` has its value.
        """
        key, value = proof or (self._keys.migration, self._claim)
        answer = self._target.client.commit(keys.transaction(compare, then, [keys.get(key)]))
        if answer.get("succeeded") is True:
            return
        rows = keys.ranges(answer)[0]
        if proof is None or not rows or rows[0].value != value:
            raise LockBusy(self._target.where, waited_s=0, holder="another migration")

    def _take(self) -> None:
        """Claim the prefix, and remove what the same migration left when it was interrupted."""
        names, target = self._keys, self._target
        put = keys.put(names.migration, self._claim)
        before = target.ask([keys.get(names.migration)])[0]
        if before and self._is_ours(before[0].value):
            left = [keys.is_value(names.migration, before[0].value), keys.is_absent(names.head)]
            self._send(left, [put], proof=(names.migration, self._claim))
            mine = [keys.is_value(names.migration, self._claim)]
            for room in (Room.EVENT, Room.RECORD, Room.PART, Room.BASE, Room.CURSOR, Room.LINE):
                self._send(mine, [keys.delete(*names.room(room))])
        elif any(True for _ in target.all_keys(*names.whole())):
            raise NotAStore(
                "the target is not empty",
                where=target.where,
                why="there are keys of a store under this prefix",
                remedy=f"Choose another prefix, or: etcdctl del --prefix '{names.prefix}/:'",
            )
        else:
            nobody = [keys.is_absent(names.head), keys.is_absent(names.migration)]
            self._send(nobody, [put], proof=(names.migration, self._claim))

    def _is_ours(self, claim: bytes) -> bool:
        """Say whether a claim is of a migration of the same store."""
        try:
            return codec.load_object(claim).get("store") == self._copy.source.id
        except DocumentError:
            return False

    def _lines(self) -> None:
        """Write the lines, many to a key, and each sealed part of the history."""
        rows: list[bytes] = []
        first, size, newest = self._copy.first, 0, ""
        last = held = 0
        for line, raw in self._copy.lines():
            rows.append(raw + b"\n")
            size += len(raw) + 1
            newest = max(newest, line["ts"])
            last = line["seq"]
            held += len(raw) + 1
            ended = chain.is_end(line)
            if ended or len(rows) >= _LINES_A_KEY or held >= _KEY_BYTES:
                self._put(self._keys.event(last), b"".join(rows) + self._token)
                rows, held = [], 0
            if ended:
                self._part(first, line, size, newest)
                first, size, newest = last + 1, 0, ""
        if rows:
            self._put(self._keys.event(last), b"".join(rows) + self._token)

    def _part(self, first: int, seal: Line, size: int, newest: str) -> None:
        part: JsonObject = {"last": seal["seq"], "size": size, "newest": newest, "at": seal["ts"]}
        self._put(self._keys.part(first), codec.dump(part))

    def _put(self, key: bytes, value: bytes) -> None:
        if self._bytes + len(value) > keys.TXN_BYTES_MAX or len(self._ops) >= _LINES_A_KEY:
            self._flush()
        self._ops.append(keys.put(key, value))
        self._bytes += len(value)

    def _flush(self) -> None:
        ops: Sequence[JsonObject] = self._ops
        if ops:
            self._send([keys.is_value(self._keys.migration, self._claim)], ops)
        self._ops, self._bytes = [], 0
