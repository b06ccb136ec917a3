"""Do the job of cron on a cluster: seal, retain.

There is no file to fold into: each append has brought the workers' records up to date. A compaction
collects, and seals the newest part of the history, so that retention has something to drop whole.
Retention keeps the state before what stays, in pieces, then tells of it in the log, then drops; the
last step removes only, so that it goes on working where the cluster's quota is full.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final, cast

from crewlog import host
from crewlog.errors import (
    QuotaExceeded,
    SnapshotCorrupt,
)
from crewlog.etcd import layout as keys
from crewlog.etcd.append import Attempt, Beaten, EtcdLog, section_data
from crewlog.etcd.layout import Room
from crewlog.etcd.state import Part
from crewlog.model import codec, events
from crewlog.model.arguments import Packing
from crewlog.model.events import JsonObject, Line
from crewlog.model.snapshot import Snapshot, decode_snapshot, encode_snapshot
from crewlog.store import Store
from crewlog_compactor import retention
from crewlog_compactor.collect import Collect
from crewlog_compactor.reports import CompactReport
from crewlog_compactor.retention import Keep

_PIECE_BYTES: Final = 512 * 1024
_logger = logging.getLogger("crewlog.retain")


def compact(
    store: Store,
    *,
    packing: Packing,  # noqa: ARG001 (nothing is archived)
    collect: Collect,
    keep_history: Keep,
    dry_run: bool,
) -> CompactReport:
    """Collect, seal, retain; see `crewlog_compactor.compact`."""
    log = cast("EtcdLog", store)  # its kind says so
    collected, refused = collect()
    if dry_run:
        added = 0 if collected is None else collected.changed
        sealed, last, going = _foretell(log, keep_history, added)
        if going and not sealed:  # what is sealed only then is folded by who reads it
            base_at(log, going[-1].last)
        return CompactReport(
            folded_events=sealed,
            snapshot_seq=last,
            archived_segments=0,
            dropped=retention.span(going),
            collected=collected,
            refused=refused,
            dry_run=True,
        )
    folded = 0
    full: QuotaExceeded | None = None
    try:
        folded = seal(log)
    except QuotaExceeded as error:
        if keep_history is None:  # then nothing is left that could be done
            raise
        full = error
    return CompactReport(
        folded_events=folded,
        snapshot_seq=log.last_seq(),
        archived_segments=0,
        dropped=retain(log, keep_history),
        collected=collected,
        refused=refused,
        full=full,
    )


def seal(log: EtcdLog) -> int:
    """Seal the newest part of the history, and begin the next; return how many events it holds.

    Nothing is written where it holds none of a worker. It is measured before the transaction, so
    that this is as short as any writer's: what others write meanwhile counts in no size.
    """
    while True:
        first, size, newest, count = _measure(log, log.parts())
        if not count:
            return 0
        try:
            log.note(lambda attempt: _sealed(log, attempt, first, size, newest))  # noqa: B023 (now)
        except Beaten:  # by another compaction: see what that one left
            continue
        return count


def _foretell(log: EtcdLog, keep: Keep, added: int) -> tuple[int, int, list[Part]]:
    """Say how many events would be sealed, up to what seq the log comes, and what would go.

    `added` events come of the collection.
    """
    parts, last = log.parts(), log.last_seq() + added
    first, size, newest, count = _measure(log, parts)
    count += added
    if count:
        at = events.timestamp(host.now())
        parts.append(Part(first, last + 1, size, max(newest, at), sealed_at=at))
        last += 2  # a seal, and a header
    return count, last, due(log, parts, keep, last_seq=last)


def _measure(log: EtcdLog, parts: list[Part]) -> tuple[int, int, str, int]:
    """Return of what is not sealed yet: first seq, bytes, newest time, and events of workers."""
    first = parts[-1].last + 1 if parts else log.first_seq()
    size, newest, count = 0, "", 0
    for line, raw in log.read(first - 1):
        size += len(raw) + 1
        newest = max(newest, line["ts"])
        count += not events.is_own(line["type"])
    return first, size, newest, count


def _sealed(log: EtcdLog, attempt: Attempt, first: int, size: int, newest: str) -> None:
    at = events.timestamp(host.now())
    attempt.add([codec.own_draft(events.SEAL, {"first": first})], ts=at)
    attempt.cut()
    last, hash_ = attempt.written.seq, attempt.written.hash.hex()
    size += attempt.size()
    part: JsonObject = {"last": last, "size": size, "newest": max(newest, at), "at": at}
    attempt.absent = log.keys.part(first)
    attempt.extra = [keys.put(attempt.absent, codec.dump(part))]
    previous: JsonObject = {"first": first, "last": last, "size": size, "hash": hash_}
    header = section_data(log.id, previous)
    attempt.add([codec.own_draft(events.SEGMENT, header)], ts=at)


# -- retention ------------------------------------------------------------------------------


def retain(log: EtcdLog, keep: Keep) -> tuple[int, int] | None:
    """Drop what the policy no longer keeps; return the range of seqs that went, None for none."""
    going = due(log, log.parts(), keep, last_seq=log.last_seq())
    if not going:
        return None
    first, last = going[0].first, going[-1].last
    try:
        _tell(log, going)
    except QuotaExceeded:  # to drop is the way out of it; what cannot be told must wait
        _logger.warning("the quota is full: no state is kept for the history after seq %d", last)
    drop(log, going)
    return first, last


def due(log: EtcdLog, parts: list[Part], keep: Keep, *, last_seq: int) -> list[Part]:
    """Return the parts that the policy lets go when the log has come to `last_seq`."""
    if keep is None:
        return []
    return retention.going(
        parts,
        keep,
        last_seq=last_seq,
        cursors=log.cursors.every(),
        hold_bytes=log.limits.cursor_hold_bytes,
    )


def _tell(log: EtcdLog, going: list[Part]) -> None:
    """Keep the state after what goes, and say in the log that it goes.

    Raises: DataDamaged.
    """
    last = going[-1].last
    after = next(line for line, _ in log.lines(last, last + 1))
    data: JsonObject = {"first": going[0].first, "last": last, "head": after["prev"]}
    base = base_at(log, last)
    if base is not None:
        data["base"] = put_base(log, base).sha256
    draft = codec.own_draft(events.DROPPED, data)
    at = events.timestamp(host.now())
    log.note(lambda attempt: attempt.add([draft], ts=at))


def base_at(log: EtcdLog, last: int) -> Snapshot | None:
    """Return the state after what goes.

    Deterministic, so concurrent runs write identical bytes.
    """
    states = [log.empty()]
    with suppress(SnapshotCorrupt):
        states += filter(None, [log.read_base()])
    oldest = log.first_seq()
    fitting = [state for state in states if oldest - 1 <= state.last_seq <= last]
    start = max(fitting, key=lambda state: state.last_seq, default=None)
    if start is None or start.last_seq == last:
        return start
    times: list[str] = []

    def fold(seen: Callable[[Line], None]) -> Snapshot:
        def both(line: Line) -> None:
            times.append(line["ts"])
            seen(line)

        return log.fold_to(start, last, seen=both)

    base = retention.folded(fold)
    return None if base is None else replace(base, written_at=times[-1])


def put_base(log: EtcdLog, base: Snapshot) -> Snapshot:
    """Keep a state in pieces, and return it; an older one goes once the new one is whole."""
    data = encode_snapshot(base)
    names = log.keys
    pieces = [data[at : at + _PIECE_BYTES] for at in range(0, len(data), _PIECE_BYTES)]
    for number, piece in reversed(list(enumerate(pieces))):
        log.client.at_once(keys.put(names.base(base.last_seq, number), piece))
    begin, _ = names.room(Room.BASE)
    log.client.at_once(keys.delete(begin, names.base(base.last_seq, 0)))
    return decode_snapshot(data)


def drop(log: EtcdLog, going: list[Part]) -> None:
    """Remove parts of the history; harmless to repeat."""
    last = going[-1]
    names = log.keys
    for begin, end in (
        (names.event(0), names.event(last.last) + b"\0"),
        (names.part(0), names.part(last.first) + b"\0"),
    ):
        log.client.call("kv/deleterange", {"key": keys.text(begin), "range_end": keys.text(end)})
