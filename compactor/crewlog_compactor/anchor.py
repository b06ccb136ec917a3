"""Anchor: the one line of a store to keep elsewhere, so that nobody can rewrite it unseen.

The hash chain binds every event to the last one: who keeps (seq, hash) on another host, in a
syslog or a git note can prove later that the history up to there is the one that was.
"""

import re
from dataclasses import dataclass
from typing import Final

from crewlog.model import codec
from crewlog.registry import Registry

_FORM: Final = re.compile(r"(\d{1,19}):([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Anchor:
    """The SHA-256 of one line; its text form is `SEQ:HASH`."""

    seq: int
    hash: str

    def __str__(self) -> str:
        """Write it as `SEQ:HASH`."""
        return f"{self.seq}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> "Anchor":
        """Read `SEQ:HASH`.

        Raises: ValueError for anything else.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None:
            message = f"{text!r} is no anchor: an anchor is SEQ:HASH, as `crewlog anchor` prints it"
            raise ValueError(message)
        return cls(int(match[1]), match[2])


def anchor(reg: Registry) -> Anchor:
    """Return the anchor of the last durable event.

    Raises: StoreMissing.
    """
    store = reg.store()
    seq = store.last_seq()
    for line, raw in store.read(seq - 1):
        if line["seq"] >= seq:
            return Anchor(line["seq"], codec.digest(raw).hex())
    message = "the last durable line was not read"  # pragma: no cover (read() raises before)
    raise AssertionError(message)
