"""Figures of a worker, and how people read figures: spans of time, sizes."""

from datetime import timedelta
from typing import NamedTuple


class Usage(NamedTuple):
    """What a process has used: processor seconds since its start, resident bytes now."""

    cpu_s: float
    rss_bytes: int


def duration(span: timedelta) -> str:
    """Write a duration in its two largest units."""
    seconds = max(0, int(span.total_seconds()))
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3_600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return f"{days}d{hours}h" if hours else f"{days}d"
    if hours:
        return f"{hours}h{minutes}m" if minutes else f"{hours}h"
    if minutes:
        return f"{minutes}m{seconds}s" if seconds else f"{minutes}m"
    return f"{seconds}s"


def brief(span: timedelta) -> str:
    """Write how long ago, as exactly as a person wants it. Source: kubectl's HumanDuration."""
    seconds = max(0, int(span.total_seconds()))
    minutes, hours, days = seconds // 60, seconds // 3_600, seconds // 86_400
    if seconds < 120:  # noqa: PLR2004
        return f"{seconds}s"
    if minutes < 10:  # noqa: PLR2004
        return duration(span)
    if minutes < 180:  # noqa: PLR2004
        return f"{minutes}m"
    if hours < 8:  # noqa: PLR2004
        return duration(timedelta(minutes=minutes))
    if hours < 48:  # noqa: PLR2004
        return f"{hours}h"
    return duration(timedelta(hours=hours)) if days < 8 else f"{days}d"  # noqa: PLR2004


def spoken(span: timedelta) -> str:
    """Write a duration in words, in its largest unit."""
    seconds = max(0, int(span.total_seconds()))
    unit, length = next(
        (row for row in (("day", 86_400), ("hour", 3_600), ("minute", 60)) if seconds >= row[1]),
        ("second", 1),
    )
    count = seconds // length
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


def size(count: int) -> str:
    """Write a number of bytes."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:  # noqa: PLR2004
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
