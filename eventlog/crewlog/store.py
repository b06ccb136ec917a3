"""State what any log must promise, so that a registry does not care where its events live."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from crewlog.codec import Draft
from crewlog.events import Line, Record
from crewlog.fold import Fold


class Written(Protocol):
    """The state that the next event will follow: every line written, durable or not."""

    @property
    def seq(self) -> int:
        """Return the seq of the last line written."""
        ...

    def get(self, sid: str) -> Record | None:
        """Return the record of that sid, None if there is none."""
        ...


# Looks at the state under the lock and returns what to write, or raises. It may run more than
# once and must not do anything else.
Decide: TypeAlias = Callable[[Written], Sequence[Draft]]


class Appended(NamedTuple):
    """What an append made durable: raw lines, and the state's records after it by sid."""

    lines: Sequence[bytes]
    records: dict[str, Record | None]
    seq: int


class Store(Protocol):
    """An append-only log of events and the state that they fold to."""

    def append(self, decide: Decide, *, about: Collection[str]) -> Appended:
        """Write what `decide` returns as one unit; durable on return. `about` names its workers.

        Where `decide` returns nothing, the state it looked at is durable on return.
        """
        ...

    def state(self) -> Fold:
        """Return the durable state of now; the caller must not change it."""
        ...

    def read(self, after: int) -> Iterator[tuple[Line, bytes]]:
        """Yield every durable line after seq `after`, up to the last one of now."""
        ...

    def last_seq(self) -> int:
        """Return the seq of the last durable line."""
        ...

    def close(self) -> None:
        """Give every resource back; idempotent."""
        ...
