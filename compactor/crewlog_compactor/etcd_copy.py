"""Write a copied history into a cluster: everything else first, head last.

While the copy is under way P/m names the store that it is of, so nobody takes what is there for a
store, and the same migration, begun again, may remove it.
"""

import os
from collections.abc import Sequence

from crewlog import codec, layout, segments
from crewlog.errors import NotAStore
from crewlog.etcd import keys
from crewlog.etcd.address import EtcdAddress
from crewlog.etcd.engine import EtcdLog
from crewlog.etcd.reading import encode_head
from crewlog.events import JsonObject, Line
from crewlog_compactor.etcd import put_base
from crewlog_compactor.migrate import Copy

_LINES_A_KEY = 100


def write(copy: Copy, place: EtcdAddress) -> None:
    """Copy a history to where there is no store. *Raises* NotAStore where there is anything."""
    target = place.empty(wait_s=layout.LOCK_WAIT_S)
    try:
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
        self._claim = codec.dump({"store": copy.source.id})
        self._ops: list[JsonObject] = []
        self._bytes = 0

    def write(self) -> None:
        copy, names = self._copy, self._keys
        self._take()
        self._lines()
        self._flush()
        copy.require_still()
        with copy.source.state() as state:
            records, totals = list(state.records.values()), dict(state.totals)
        for record in records:
            self._put(names.named("w", record["sid"]), codec.dump(record))
        for cursor in copy.source.cursors.every():
            if not cursor.damaged:
                self._put(names.named("c", cursor.name), b"%d" % cursor.seq)
        self._flush()
        if copy.base.last_seq:
            put_base(self._target, copy.base)
        head = encode_head(copy.source.id, copy.seq, bytes.fromhex(copy.hash), totals)
        mine = [keys.is_value(names.migration, self._claim), keys.is_absent(names.head)]
        then = [
            keys.put(names.store, copy.source.identity()),
            keys.put(names.head, head.raw),
            keys.delete(names.migration),
        ]
        self._target.client.commit(keys.transaction(mine, then))

    def _take(self) -> None:
        """Claim the prefix, and remove what the same migration left when it was interrupted."""
        names, client = self._keys, self._target.client
        if any(True for _ in self._target.all_keys(*names.whole())):
            left = [keys.is_value(names.migration, self._claim), keys.is_absent(names.head)]
            begin, end = names.whole()
            answer = client.commit(keys.transaction(left, [keys.delete(begin, end)]))
            if answer.get("succeeded") is not True:
                raise NotAStore(
                    "the target is not empty",
                    where=self._target.where,
                    why="there are keys under this prefix",
                    remedy="Choose another prefix, or remove them: etcdctl del --prefix",
                )
        nobody = [keys.is_absent(names.head), keys.is_absent(names.migration)]
        client.commit(keys.transaction(nobody, [keys.put(names.migration, self._claim)]))

    def _lines(self) -> None:
        """Write the lines, many to a key, and each sealed part of the history."""
        rows: list[bytes] = []
        first, size, newest = self._copy.first, 0, ""
        last = 0
        for line, raw in self._copy.lines():
            rows.append(raw + b"\n")
            size += len(raw) + 1
            newest = max(newest, line["ts"])
            last = line["seq"]
            ended = segments.is_end(line)
            if ended or (_whole(line) and len(rows) >= _LINES_A_KEY):
                self._put(self._keys.event(last), b"".join(rows) + self._token)
                rows = []
            if ended:
                self._part(first, line, size, newest)
                first, size, newest = last + 1, 0, ""
        if rows:
            self._put(self._keys.event(last), b"".join(rows) + self._token)

    def _part(self, first: int, seal: Line, size: int, newest: str) -> None:
        told: JsonObject = {"last": seal["seq"], "size": size, "newest": newest, "at": seal["ts"]}
        self._put(self._keys.part(first), codec.dump(told))

    def _put(self, key: bytes, value: bytes) -> None:
        if self._bytes + len(value) > layout.TXN_BYTES_MAX or len(self._ops) >= _LINES_A_KEY:
            self._flush()
        self._ops.append(keys.put(key, value))
        self._bytes += len(value)

    def _flush(self) -> None:
        ops: Sequence[JsonObject] = self._ops
        if ops:
            mine = [keys.is_value(self._keys.migration, self._claim)]
            self._target.client.commit(keys.transaction(mine, ops))
        self._ops, self._bytes = [], 0


def _whole(line: Line) -> bool:
    """Say whether a line is the last of its batch: a key holds whole batches only."""
    index, count = line.get("b", (0, 1))
    return index + 1 == count
