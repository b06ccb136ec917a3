"""State what any store must promise, so that a registry does not care where its events live.

Two keep these promises: a directory of this machine (local/) and a prefix of an etcd cluster
(etcd/). `append`, cursors and leases change it; whatever is read is durable.
"""

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from crewlog.host import no_fork
from crewlog.model import codec
from crewlog.model.events import Line, Record, Worker
from crewlog.model.fold import Fold
from crewlog.model.limits import Limits
from crewlog.model.sieve import Sieve
from crewlog.model.snapshot import Snapshot
from crewlog.model.steps import Appended, Decide
from crewlog.process.liveness import LeaseSeen
from crewlog.queue import Done, Start

_RETRIES: Final = 8


T = TypeVar("T")
Kind: TypeAlias = Literal["directory", "etcd"]


# -- wakes --------------------------------------------------------------------------------

Backend: TypeAlias = Literal["auto", "inotify", "watchdog", "poll"]


class Rings(Protocol):
    """What a source rings: every reader of a hub."""

    def __call__(self) -> None:
        """Ring them all; never raises and never touches a file."""
        ...


class Source(Protocol):
    """Something that tells of the changes of one store."""

    name: str

    def healthy(self) -> bool:
        """Say whether it can still tell."""
        ...

    def close(self) -> None:
        """Give every resource back."""
        ...


class Channel(Protocol):
    """Where the changes of a store can be heard."""

    @property
    def where(self) -> str:
        """Return the place, for messages."""
        ...

    def identity(self) -> Hashable:
        """Return what changes when something else takes its place; None where it is gone."""
        ...

    def unheard(self) -> str:
        """Return why nothing can be heard and it must be polled, "" if it can be."""
        ...

    def source(self, backend: Backend, rings: Rings) -> Source:
        """Listen from here on.

        Raises: OSError where the system cannot tell.
        """
        ...


# -- the store -----------------------------------------------------------------------------


class Store(Protocol):
    """An append-only log of events, the state that they fold to, and what belongs to its readers.

    `where` names it for people, `id` tells it from every other store, `kind` says which engine
    keeps it.
    """

    @property
    def kind(self) -> Kind:
        """Return which engine keeps it."""
        ...

    @property
    def limits(self) -> Limits:
        """Return the limits that it was opened with."""
        ...

    @property
    def where(self) -> str:
        """Return the place, for messages."""
        ...

    @property
    def id(self) -> str:
        """Return what no other store has."""
        ...

    @property
    def closed(self) -> bool:
        """Say whether it was closed."""
        ...

    @property
    def unit_workers_max(self) -> int:
        """Return how many workers one unit may change."""
        ...

    @property
    def remote(self) -> bool:
        """Say whether a look at it goes over a network, and may take long."""
        ...

    @property
    def one_host(self) -> bool:
        """Say whether all its workers are of the host that we are on."""
        ...

    # -- change -----------------------------------------------------------------------------

    def append(self, decide: Decide, *, about: Collection[str]) -> Appended:
        """Write what `decide` returns as one unit; durable on return. `about` names its workers.

        Where `decide` returns nothing, the state it looked at is durable on return.
        """
        ...

    def submit(self, decide: Decide, about: Collection[str], *, done: Done, start: Start) -> object:
        """Append as `append` does, without waiting; see queue.Commits.submit."""
        ...

    # -- read -------------------------------------------------------------------------------

    def state(self) -> AbstractContextManager[Fold]:
        """Hold the durable state of now still, while something is copied out of it."""
        ...

    def record(self, sid: str) -> Record | None:
        """Return one worker's durable record of now."""
        ...

    def last_seq(self) -> int:
        """Return the seq of the last durable line."""
        ...

    def first_seq(self) -> int:
        """Return the seq of the oldest line that is kept."""
        ...

    def read(self, after: int, *, sieve: Sieve | None = None) -> Iterator[tuple[Line, bytes]]:
        """Yield the durable lines after seq `after` that the sieve holds, up to the last of now.

        Raises: CompactedError where the line after `after` is no longer kept.
        """
        ...

    def backwards(self, *, sieve: Sieve | None = None) -> Iterator[tuple[Line, bytes]]:
        """Yield the durable lines that the sieve holds, the newest first."""
        ...

    def tail(self, after: int, *, sieve: Sieve | None = None) -> "Tail":
        """Return what reads on from seq `after`.

        Raises: CompactedError as `read` does.
        """
        ...

    def mark(self) -> Hashable:
        """Return what no other store has, not even a copy of it in its place; None: not known."""
        ...

    def identity(self) -> bytes:
        """Return what says who the store is, the bytes that its first line's `prev` is of."""
        ...

    # -- the past ---------------------------------------------------------------------------

    def firsts(self) -> Sequence[int]:
        """Return the first seqs of the parts of the history; all but the last are sealed."""
        ...

    def begins(self, first: int) -> str:
        """Return the time of a part's first line, as the log writes it."""
        ...

    def since_boot(self, boot: str) -> int | None:
        """Return from which seq on all was written in a boot, None where nothing tells."""
        ...

    def snapshots(self) -> Iterator[Snapshot]:
        """Yield every older state that is kept, the empty one too."""
        ...

    def nearest(self, seq: int) -> Iterator[Snapshot]:
        """Yield the states at or before `seq` that kept lines lead on from, the nearest first."""
        ...

    def fold_to(self, start: Snapshot, seq: int, *, seen: Callable[[Line], None]) -> Snapshot:
        """Return the state at a durable seq from an older one; `seen` is told of each line."""
        ...

    def compacted(self) -> tuple[int, datetime] | None:
        """Return what seq the last compaction covers, and when it ended; None before the first."""
        ...

    def sizes(self) -> dict[str, int]:
        """Return how many bytes its rooms take."""
        ...

    # -- its readers and workers ------------------------------------------------------------

    @property
    def channel(self) -> Channel:
        """Return what tells of changes."""
        ...

    @property
    def cursors(self) -> "Cursors":
        """Return the durable positions of subscribers."""
        ...

    @property
    def leases(self) -> "Leases":
        """Return what workers hold while they live."""
        ...

    # -- life -------------------------------------------------------------------------------

    def is_ours(self) -> bool:
        """Say whether it can go on: False where its descriptors were closed under it."""
        ...

    def is_in_place(self) -> bool:
        """Say whether this store is what its place leads to; True where nothing is there."""
        ...

    def renew(self) -> None:
        """Let go of what may have been replaced under a long-lived reader."""
        ...

    def close(self) -> None:
        """Give every resource back; idempotent."""
        ...


class Tail(Protocol):
    """Lines from a position on, read as they come; everything up to `seq` was looked at."""

    @property
    def seq(self) -> int:
        """Return the seq up to which it has read."""
        ...

    def read(self, head: int) -> Iterator[tuple[Line, bytes]]:
        """Yield the lines up to the durable seq `head`; it may begin before the position."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


# -- cursors --------------------------------------------------------------------------------


class CursorState(NamedTuple):
    """A cursor as anyone may see it: everything up to `seq` is acknowledged.

    Of a damaged one that is not known: `seq` is then 0, and it holds back everything. `digest` is
    codec.short_digest of the line `seq`, 0 where it is not known: by it a store that was restored
    from a backup, and has grown since, is told from the one that the subscriber read.
    """

    name: str
    seq: int
    damaged: bool = False
    digest: int = 0


class Cursor(Protocol):
    """A cursor that this process owns; `close` lets another one own it."""

    @property
    def name(self) -> str:
        """Return its name."""
        ...

    @property
    def seq(self) -> int:
        """Return the seq up to which everything is acknowledged."""
        ...

    @property
    def digest(self) -> int:
        """Return the digest of that line; 0 where it is not known."""
        ...

    def advance(self, seq: int, digest: int = 0) -> None:
        """Acknowledge everything up to `seq`; never moves back."""
        ...

    def set(self, seq: int, digest: int = 0) -> None:
        """Move to `seq`, also backwards; `digest` is that of its line.

        Raises: RegistryClosed once it is closed.
        """
        ...

    def close(self) -> None:
        """Make the position durable and let go of it; idempotent."""
        ...


class Cursors(Protocol):
    """The cursors of a store."""

    def read(self, name: str) -> CursorState | None:
        """Read a cursor, whoever owns it; None if there is none of that name."""
        ...

    def every(self) -> list[CursorState]:
        """Read every cursor; a damaged one hides no other."""
        ...

    def own(self, name: str, *, start: int, digest: int = 0) -> Cursor:
        """Take ownership; a new one is created at `start`, whose line has that digest.

        Raises: CursorBusy.
        """
        ...

    def is_owned(self, name: str) -> bool:
        """Say whether a subscriber owns the cursor at this moment."""
        ...

    def remove(self, name: str) -> bool:
        """Remove a cursor that nobody owns; False if there is none.

        Raises: CursorBusy.
        """
        ...


# -- leases ---------------------------------------------------------------------------------


class Lease(Protocol):
    """A lease that was made for a worker which is about to be registered."""

    @property
    def name(self) -> str:
        """Return what the worker's record will bear."""
        ...

    def inherited(self) -> Sequence[int]:
        """Return the descriptors by which a program that is started holds it."""
        ...

    def keep(self, worker: Worker) -> None:
        """Let this process, which is the worker, hold it until it ends, also after an exec."""
        ...

    def hand_over(self, worker: Worker) -> None:
        """Hand the lease to the process that was started as the worker."""
        ...

    def drop(self) -> None:
        """Give it back: the worker was not registered."""
        ...


class Turn(Protocol):
    """The turn to start a worker of one sid."""

    def share(self) -> int:
        """Return a descriptor by which a waiting process holds it too, -1 where there is none."""
        ...


class Leases(Protocol):
    """The leases of a store."""

    def make(self, sid: str, *, heartbeat_s: float | None) -> Lease:
        """Make a lease, with its first beat, for a worker that is about to be registered."""
        ...

    def look(self, names: Collection[str]) -> Callable[[str], LeaseSeen]:
        """Return what looks at leases of these names."""
        ...

    def beat(self, name: str, *, heartbeat_s: float | None, said: bytes | None = None) -> bool:
        """Note that the worker is well, now, and what it says of itself, None: as before.

        False if there is no such lease.
        """
        ...

    def turn(self, sid: str, *, wait_s: float) -> AbstractContextManager[Turn]:
        """Hold the turn to start a worker of one sid.

        Raises: LockBusy after `wait_s` seconds.
        """
        ...

    def sweep(self, *, needed: Callable[[str, str], bool]) -> int:
        """Remove the leases that nobody holds and no living worker needs; return how many.

        `needed` is asked with the sid that a lease was made for and its name.
        """
        ...


# -- new stores -----------------------------------------------------------------------------


def new_identity(created: str) -> bytes:
    """Return the identity of a store that is made now; no other store has its id."""
    with no_fork():
        import uuid  # noqa: PLC0415 (once in the life of a store)

    return codec.encode_identity(str(uuid.uuid4()), created=created)


# -- states that are kept ------------------------------------------------------------------


def oldest_state(store: Store, first: int) -> Snapshot | None:
    """Return the oldest state that all lines after it are kept of, where `first` is the oldest.

    Beside a retention, or after one that was killed, it may lie within what is to go next.
    """
    fitting = [kept for kept in store.snapshots() if kept.last_seq >= first - 1]
    return min(fitting, key=lambda kept: kept.last_seq, default=None)


def state_before(store: Store, first: int) -> Snapshot | None:
    """Return the state that the line `first` leads on from; None where none of it is kept."""
    return next((kept for kept in store.snapshots() if kept.last_seq == first - 1), None)


def retried(work: Callable[[], T], *errors: type[Exception]) -> T:
    """Do the work, again where one of these says that a compaction took what it was to read."""
    for _ in range(_RETRIES - 1):
        with contextlib.suppress(*errors):
            return work()
    return work()
