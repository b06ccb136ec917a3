"""Make text safe and straight for a terminal: whatever a person reads passes here."""

import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Final, NamedTuple

SID_COLUMNS: Final = 24  # on a terminal, where a long one would push away what is said of it
# Control, format (bidi among them), surrogate, private use, unassigned; line and paragraph ends.
_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    """Show every character that a terminal would obey or hide, and strip none.

    The backslash itself is doubled where something was escaped, so nothing can be forged.
    """
    if text.isascii() and text.isprintable():
        return text
    if not any(unicodedata.category(c) in _HIDDEN for c in text):
        return text
    return "".join(_escaped(char) for char in text)


def _escaped(char: str) -> str:
    if char == "\\":
        return "\\\\"
    if unicodedata.category(char) not in _HIDDEN:
        return char
    point = ord(char)
    if point <= 0xFF:  # noqa: PLR2004
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point <= 0xFFFF else f"\\U{point:08x}"  # noqa: PLR2004


def width(text: str) -> int:
    """Count terminal columns: wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    columns = 0
    for char in text:
        if unicodedata.combining(char):
            continue
        columns += 2 if unicodedata.east_asian_width(char) in {"W", "F"} else 1
    return columns


def clip(text: str, columns: int) -> str:
    """Shorten to a number of columns, with an ellipsis where something is gone."""
    if width(text) <= columns:
        return text
    kept = ""
    for char in text:
        if width(kept + char) > columns - 1:
            break
        kept += char
    return kept + "…"


def wrapped(words: str, columns: int, *, indent: int = 0) -> list[str]:
    """Break a sentence into lines; those after the first are indented. A long word stays whole."""
    from textwrap import wrap  # noqa: PLC0415 (start-up)

    return wrap(
        words, max(columns, indent + 20), subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    ) or [""]  # fmt: skip


class Column(NamedTuple):
    """A column of a table: where there is no room, the one of the least worth goes first.

    One that may shrink is clipped, cell by cell, down to so many columns before any column goes.
    """

    title: str
    worth: int = 9
    shrinks_to: int | None = None


def table(
    header: Sequence[Column | str],
    rows: Sequence[Sequence[str]],
    *,
    columns: int | None,
    titles: bool = True,
) -> list[str]:
    """Lay out rows under an upper-case header, two spaces apart; in `columns`, if that is given."""
    heads = [head if isinstance(head, Column) else Column(head) for head in header]
    shown = [[visible(cell) for cell in row] for row in rows]
    cells = [[head.title.upper() for head in heads], *shown]
    widths = [max(width(row[i]) for row in cells) for i in range(len(heads))]
    kept = list(range(len(heads)))
    if columns is not None:
        kept, widths = _fitting(heads, widths, columns)
    lines = []
    for row in cells if titles else shown:
        fit = [clip(row[i], widths[i]) for i in kept]
        pads = [cell + " " * (widths[i] - width(cell)) for i, cell in zip(kept, fit, strict=True)]
        line = "  ".join(pads).rstrip()
        lines.append(line if columns is None else clip(line, columns))
    return lines


def _fitting(
    heads: Sequence[Column], widths: Sequence[int], columns: int
) -> tuple[list[int], list[int]]:
    """Return which columns are kept in so much room, and how wide each is."""
    kept = list(range(len(heads)))
    while True:
        fit = list(widths)
        over = sum(fit[i] for i in kept) + 2 * (len(kept) - 1) - columns
        for i in sorted(kept, key=lambda i: -fit[i]):  # the widest gives first
            least = heads[i].shrinks_to
            if over > 0 and least is not None and fit[i] > least:
                given = min(over, fit[i] - least)
                fit[i] -= given
                over -= given
        worst = min(kept, key=lambda i: (heads[i].worth, -i))
        if over <= 0 or heads[worst].worth >= _ALWAYS:
            return kept, fit
        kept.remove(worst)


_ALWAYS: Final = 9  # columns of this worth never go


_COLOURS: Final = {
    "alive": 32, "ready": 32, "ok": 32,
    "starting": 33, "draining": 33, "stopping": 33, "unknown": 33, "warn": 33, "note": 36,
    "paused": 33, "stopped": 2, "exited": 2, "released": 2, "removed": 2,
    "dead": 31, "failed": 31, "lost": 31, "fail": 31, "crashed": 31,
    "+": 32, "~": 33, "-": 31,
}  # fmt: skip


@cache
def _words() -> re.Pattern[str]:
    words = "|".join(word for word in _COLOURS if word.isalpha())
    first = "|".join(map(re.escape, _COLOURS))
    return re.compile(rf"(?<=  )({words})(?= |,|$)|^({first})(?=  )")


def coloured(line: str) -> str:
    """Colour the words of a table's row that tell how things stand."""
    return _words().sub(lambda match: f"\x1b[{_COLOURS[match[0]]}m{match[0]}\x1b[0m", line)


def moment(when: datetime, *, utc: bool) -> str:
    """Write a time for a table, without its offset (that stands in the header)."""
    return _local(when, utc=utc).strftime("%Y-%m-%d %H:%M:%S")


def offset(when: datetime, *, utc: bool) -> str:
    """Write the offset for a table's header."""
    if utc:
        return "UTC"
    text = _local(when, utc=False).strftime("%z")
    return f"{text[:3]}:{text[3:]}"


def exact(when: datetime, *, utc: bool) -> str:
    """Write one time with its offset."""
    return f"{moment(when, utc=utc)} {offset(when, utc=utc)}"


def _local(when: datetime, *, utc: bool) -> datetime:
    return when if utc else when.astimezone()
