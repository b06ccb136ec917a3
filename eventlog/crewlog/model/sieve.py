"""Sieve lines: say which of many are worth parsing, by what their bytes hold.

Finding a sid in a few megabytes takes less than parsing ten lines.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from crewlog.model import events

_TS: Final = b',"ts":"'
_TS_BYTES: Final = len("2026-11-24T07:26:36.123456Z")


def type_needle(event_type: str) -> bytes:
    """Return bytes that every line of that type holds, and hardly any other."""
    return f'"type":"{event_type}"'.encode()


def sid_needle(sid: str) -> bytes:
    """Return bytes that every line of that sid holds; of what none can be called, no line does."""
    return b'"sid":"%b"' % sid.encode(errors="backslashreplace")


_GAP: Final = type_needle(events.GAP)


class Sieve(NamedTuple):
    """What a line must have to be looked at: one of the needles in it, and a time from `since` on.

    A gap is never passed over, because it stands for many events.
    """

    needles: Sequence[bytes] | None = None
    since: bytes = b""

    def lines(self, data: bytes) -> Iterator[tuple[int, int]]:
        """Yield where each wanted line of whole lines begins, and where its newline stands."""
        spans = self._held(data) if self.needles is not None else _every(data)
        if not self.since:
            return spans
        return ((at, end) for at, end in spans if self._recent(data, at, end))

    def _recent(self, data: bytes, at: int, end: int) -> bool:
        stamp = data.find(_TS, at, end) + len(_TS)
        return data[stamp : stamp + _TS_BYTES] >= self.since or data.find(_GAP, at, end) >= 0

    def _held(self, data: bytes) -> Iterator[tuple[int, int]]:
        """Yield the lines that hold a needle: by looking for needles, not line by line."""
        assert self.needles is not None  # the caller looked
        places = {needle: data.find(needle) for needle in (*self.needles, _GAP)}
        while hits := [place for place in places.values() if place >= 0]:
            hit = min(hits)
            at, end = data.rfind(b"\n", 0, hit) + 1, data.index(b"\n", hit)
            yield at, end
            for needle, place in places.items():
                if 0 <= place < end:
                    places[needle] = data.find(needle, end)


def _every(data: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(data):
        end = data.index(b"\n", at)
        yield at, end
        at = end + 1
