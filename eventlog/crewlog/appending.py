"""State what an append is: a decision on the state that the next event will follow."""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol, TypeAlias

from crewlog.codec import Draft
from crewlog.events import Record


class Written(Protocol):
    """The state that the next event will follow: every line written, durable or not."""

    @property
    def seq(self) -> int:
        """Return the seq of the last line written."""
        ...

    def get(self, sid: str) -> Record | None:
        """Return the record of that sid, None if there is none."""
        ...


class _Empty:
    """The state of a store that is not there yet."""

    seq = 0

    def get(self, _sid: str) -> None:
        """Return None: there is none."""


EMPTY: Final[Written] = _Empty()

# Looks at the state and returns what to write, or raises. It may run more than once and must not
# do anything else.
Decide: TypeAlias = Callable[[Written], Sequence[Draft]]


class Appended(NamedTuple):
    """What an append made durable: raw lines, and the state's records after it by sid."""

    lines: Sequence[bytes]
    records: dict[str, Record | None]
    seq: int
