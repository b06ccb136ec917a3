"""Make text safe and straight for a terminal: whatever a person reads passes here."""

import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from typing import Final

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


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, columns: int | None
) -> list[str]:
    """Lay out rows under an upper-case header, two spaces apart; clipped if `columns` is given."""
    shown = [[visible(cell) for cell in row] for row in rows]
    cells = [[title.upper() for title in header], *shown]
    widths = [max(width(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [cell + " " * (widths[i] - width(cell)) for i, cell in enumerate(row[:-1])]
        line = "  ".join([*padded, row[-1]]).rstrip()
        lines.append(line if columns is None else clip(line, columns))
    return lines


_COLOURS: Final = {
    "alive": 32, "ready": 32, "ok": 32,
    "starting": 33, "draining": 33, "stopping": 33, "unknown": 33, "warn": 33, "note": 36,
    "dead": 31, "failed": 31, "lost": 31, "fail": 31,
}  # fmt: skip
_WORDS: Final = re.compile(rf"(?<=  )({'|'.join(_COLOURS)})(?= |,|$)|^({'|'.join(_COLOURS)})(?=  )")


def coloured(line: str) -> str:
    """Colour the words of a table's row that tell how things stand."""
    return _WORDS.sub(lambda found: f"\x1b[{_COLOURS[found[0]]}m{found[0]}\x1b[0m", line)


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
