"""Answer for the past: what happened, and what the state was at a seq or a time.

Order is seq, never a clock. A time is looked up among the parts of the history, then line by line;
where the clock stepped back near it, events of both sides of the step claim the same time, and the
answer names them.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, TypedDict, Unpack

from crewlog import host
from crewlog.errors import CompactedError
from crewlog.host import no_fork
from crewlog.model import arguments, events, times
from crewlog.model.events import Event, EventType, Line, event_of
from crewlog.model.records import Records
from crewlog.model.sieve import Sieve
from crewlog.model.snapshot import Snapshot
from crewlog.model.state import Past, past_of
from crewlog.process import identity
from crewlog.session import Session
from crewlog.store import Store, oldest_state, retried
from crewlog.watch import feed
from crewlog.watch.feed import Filter

if TYPE_CHECKING:
    from crewlog.model.lives import Life


# A time: aware, or a span before now, or the words of the command line ("1h", "yesterday").
When: TypeAlias = datetime | timedelta | str


class HistoryOptions(TypedDict, total=False):
    """What `history` takes."""

    sid: str | None
    sids: Collection[str] | None
    types: Collection[EventType] | None
    since: When | None
    until: When | None
    after: int | None
    newest_first: bool


DEFAULTS: Final[HistoryOptions] = {
    "sid": None,
    "sids": None,
    "types": None,
    "since": None,
    "until": None,
    "after": None,
    "newest_first": False,
}


def history(session: Session, **options: Unpack[HistoryOptions]) -> Iterator[Event]:
    """Yield the events that match; see `Registry.history`."""
    arguments.check_options(options, HistoryOptions.__annotations__, of="history")
    sid, sids, after = options.get("sid"), options.get("sids"), options.get("after")
    newest_first = options.get("newest_first", False)
    if sid is not None:
        sid = arguments.check_one(sid, name="sid", many="sids")
    wanted = feed.filter_of(sids if sid is None else [sid, *(sids or ())], options.get("types"))
    first, last = (
        _moment(options.get("since"), name="since"),
        _moment(options.get("until"), name="until"),
    )
    if after is not None and (type(after) is not int or after < 0):
        message = f"after must be a seq, not {after!r}"
        raise ValueError(message)
    store = session.find()
    if store is None:
        return iter(())
    if newest_first and after is not None and after + 1 < (oldest := store.first_seq()):
        raise CompactedError(requested=after + 1, oldest=oldest)  # as the other way round
    return _matching(store, wanted, first, last, after=after, newest_first=newest_first)


def at(session: Session, when: When | int) -> Past:
    """Return the state as it was at a seq or a time; see `Registry.at`."""
    if isinstance(when, bool) or not isinstance(when, int | datetime | timedelta | str):
        message = f"a state is asked for by seq or by a time, not {when!r}"
        raise TypeError(message)
    stamp = "" if isinstance(when, int) else _moment(when, name="when")
    seq = when if isinstance(when, int) else 0
    if seq < 0:
        message = f"there is no seq {seq}"
        raise ValueError(message)
    store = session.find()
    if store is None:
        return past_of(0, Records(), since=None, until=None, disputed=None)
    return retried(
        lambda: _at(store, _before(store, stamp) if stamp else _Place(seq, None)), CompactedError
    )


def before_boot(session: Session) -> Past:
    """Return the state when this machine went down last; see `Registry.before_boot`."""
    store = session.find()
    past = at(session, identity.booted_at())
    since = None if store is None else store.since_boot(identity.scope().boot_id)
    if since is not None and past.seq >= since:  # the clock was set: the log tells it exactly
        return at(session, since - 1)
    return past


def lives(session: Session, progress: Callable[[int, int], None] | None) -> "list[Life]":
    """Return every worker's life that the kept history tells of; see `Registry.lives`."""
    store = session.find()
    if store is None:
        return []
    return retried(lambda: _lives(store, progress), CompactedError)


def _lives(store: Store, progress: Callable[[int, int], None] | None) -> "list[Life]":
    with no_fork():
        from crewlog.model.lives import Lives  # noqa: PLC0415 (start-up; few ask)

    last, lives, first, base_seq = store.last_seq(), Lives(()), 0, 0
    for line, _ in store.read(store.first_seq() - 1):
        if not first:
            first = line["seq"]
            kept = oldest_state(store, first)
            lives = Lives(() if kept is None else kept.records().values())
            base_seq = 0 if kept is None else kept.last_seq
        if line["seq"] > base_seq:
            lives.add(line)
        if progress is not None and line["seq"] % _PROGRESS_LINES == 0:
            progress(line["seq"] - first, last - first + 1)
    return lives.every


def _from_oldest(store: Store, sieve: Sieve | None) -> Iterator[tuple[Line, bytes]]:
    """Read all that is kept; begin again where retention takes the oldest before it is read."""

    def begun() -> Iterator[tuple[Line, bytes]]:  # with its first line at hand
        lines = store.read(store.first_seq() - 1, sieve=sieve)
        return itertools.chain(list(itertools.islice(lines, 1)), lines)

    return retried(begun, CompactedError)


_PROGRESS_LINES: Final = 10_000


class _Place(NamedTuple):
    """The seq after which the state is asked for, and seqs before it that claim a later time."""

    seq: int
    disputed: tuple[int, int] | None


def _before(store: Store, ts: str) -> _Place:
    """Return the last seq up to a time: the parts that may hold it are read line by line."""
    firsts = store.firsts()
    parts, later = _parts_at(store, firsts, ts)
    seq = 0
    disputed: tuple[int, int] | None = None
    for number in parts:
        end = firsts[number + 1] - 1 if number + 1 < len(firsts) else None
        for line, _ in store.read(firsts[number] - 1):
            if line["ts"] > ts:
                later = later or line["seq"]
            else:
                seq = line["seq"]
                if later:
                    disputed = (later, seq)
            if line["seq"] == end:
                break
    if not seq and firsts[0] > 1:  # what was then is no longer known, only how it came out
        raise CompactedError(requested=firsts[0] - 1, oldest=firsts[0])
    return _Place(seq, disputed)


# A clock that was ahead for more parts of a history than so many is not noticed.
_UNSORTED_MAX: Final = 64


def _parts_at(store: Store, firsts: Sequence[int], ts: str) -> tuple[list[int], int]:
    """Return which parts may hold the last line up to a time, and an exception.

    Times are nearly sorted, so a bisection says where to look: the last part that begins by then
    holds it. But where a clock is set back, lines of an earlier time follow in a part that begins
    later: in the next one, in one that begins later than its successor, or in the newest one. The
    exception is the first seq of a part that begins later and stands before, 0 for none.
    """
    begun = bisect_right(firsts, ts, key=store.begins)
    beyond = range(begun, min(len(firsts), begun + _UNSORTED_MAX))
    known = range(begun, min(len(firsts), beyond.stop + 1))  # of the last one's successor, too
    begins = {n: store.begins(firsts[n]) for n in known}
    last = max((n for n in beyond if begins[n] <= ts), default=begun - 1)
    newest = len(firsts) - 1
    parts = [
        n
        for n in beyond
        if n > last and (n in {last + 1, newest} or begins.get(n + 1, begins[n]) < begins[n])
    ]
    later = 0
    if last > begun:
        later = firsts[begun]
    elif last > 0 and store.begins(firsts[last - 1]) > ts:
        later = firsts[last - 1]
    return [last, *parts] if last >= 0 else parts, later


def _at(store: Store, place: _Place) -> Past:
    seq = min(place.seq, store.last_seq())
    start = _nearest(store, seq)
    times: dict[str, str] = {}
    if start.last_seq < seq:
        start = store.fold_to(start, seq, seen=lambda line: times.update(at=line["ts"]))
    following = next((line["ts"] for line, _ in store.read(start.last_seq)), None)
    since = times.get("at") or _time_of(store, start.last_seq)
    return past_of(
        start.last_seq,
        start.records(),
        since=since,
        until=following,
        disputed=place.disputed,
    )


def _time_of(store: Store, seq: int) -> str | None:
    """Return the time of one line, None if it is not kept."""
    if seq < store.first_seq():
        return None
    return next((line["ts"] for line, _ in store.read(seq - 1)), None)


def _nearest(store: Store, seq: int) -> Snapshot:
    """Return the nearest older state that the history leads on from."""
    snapshot = next(store.nearest(seq), None)
    if snapshot is not None:
        return snapshot
    oldest = store.first_seq()
    later = (kept.last_seq for kept in store.snapshots() if kept.last_seq + 1 >= oldest)
    raise CompactedError(requested=seq, oldest=min(later, default=oldest) + 1)


def _matching(
    store: Store, wanted: Filter, first: str, last: str, *, after: int | None, newest_first: bool
) -> Iterator[Event]:
    """Yield the events that are wanted, from one time on and before another."""
    sieve = wanted.sieve(first)
    if newest_first:
        lines = store.backwards(sieve=sieve)
    else:
        lines = _from_oldest(store, sieve) if after is None else store.read(after, sieve=sieve)
    for line, raw in lines:
        if newest_first and after is not None and line["seq"] <= after:
            return
        # times may step back: whatever is out of range, the next one may match again
        in_time = line["ts"] >= first and (not last or line["ts"] < last)
        if in_time and wanted.wants(line):
            yield event_of(line, raw)


def _moment(when: When | None, *, name: str) -> str:
    """Write a time as the log does, "" for none."""
    moment = times.moment(when, now=host.now(), name=name)
    return "" if moment is None else events.timestamp(moment)
