"""Read times and spans as people write them: 15m, 2 hours ago, yesterday, 2026-11-24."""

import re
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final

_UNITS: Final = {
    "s": 1,
    "sec": 1,
    "second": 1,
    "m": 60,
    "min": 60,
    "minute": 60,
    "h": 3600,
    "hour": 3600,
    "d": 86_400,
    "day": 86_400,
    "w": 604_800,
    "week": 604_800,
}
_LONGEST_S: Final = 1000 * 366 * 86_400
_COMPACT: Final = re.compile(r"(?:\d+(?:\.\d+)?[smhdw])+")
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_AGO: Final = re.compile(r"(\d+)\s*([a-z]+?)s?\s+ago")
_CLOCK: Final = re.compile(r"\d{1,2}:\d\d(:\d\d)?")
_EXAMPLES: Final = (
    "a time is: now, today, yesterday, @1764000000, 2026-11-24, 2026-11-24T07:26:36+01:00, "
    "20:43, 15m, 1h30m, '2 hours ago'"
)


class TimeError(ValueError):
    """The text is no time; the message says what would be."""


def duration(text: str) -> timedelta:
    """Read 90s, 15m, 2h, 3d, 1w or 1h30m."""
    if text == "0":
        return timedelta(0)
    if _COMPACT.fullmatch(text) is None:
        message = f"{text!r} is no duration; a duration is: 90s, 15m, 2h, 3d, 1w, 1h30m"
        raise TimeError(message)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    if seconds > _LONGEST_S:
        message = f"{text!r} is longer than a thousand years"
        raise TimeError(message)
    return timedelta(seconds=seconds)


def read_time(text: str, *, now: datetime, zone: tzinfo | None = None) -> tuple[datetime, str]:
    """Read a point in time; the second value says what was assumed, "" if nothing.

    `now` is aware; `zone` None is the machine's own. A local time that a clock change skips is
    refused; of one that it repeats, the earlier is taken, and said.
    """
    word = text.strip()
    local = now.astimezone(zone)
    midnight = local.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    try:
        if (known := _spoken(word, now, midnight, zone)) is not None:
            return known
        if word.startswith("@"):
            return datetime.fromtimestamp(float(word[1:]), UTC), ""
        if _COMPACT.fullmatch(word.removeprefix("-")):  # journalctl has it with a minus
            return now.astimezone(UTC) - duration(word.removeprefix("-")), ""
        ago = _AGO.fullmatch(word)
        if ago is not None and ago[2] in _UNITS:
            return now.astimezone(UTC) - timedelta(seconds=int(ago[1]) * _UNITS[ago[2]]), ""
        if word[:4].isdigit() and "-" in word:
            return _zoned(datetime.fromisoformat(word), zone)
    except (ValueError, OverflowError, OSError) as error:
        if isinstance(error, TimeError):
            raise
        message = f"{text!r} is no time ({error}); {_EXAMPLES}"
        raise TimeError(message) from error
    message = f"{text!r} is no time; {_EXAMPLES}"
    raise TimeError(message)


def _zoned(when: datetime, zone: tzinfo | None) -> tuple[datetime, str]:
    """Give a time without an offset the local one, minding the changes of the clock."""
    if when.tzinfo is not None:
        return when.astimezone(UTC), ""
    earlier, later = (_at(when, zone, fold) for fold in (0, 1))
    if earlier == later:
        return earlier, ""
    if earlier.astimezone(zone).replace(tzinfo=None) != when:
        message = f"{when.isoformat()} does not exist here: the clock was put forward over it"
        raise TimeError(message)
    return earlier, f"{when.isoformat()} came twice here; the earlier one was taken"


def _spoken(
    word: str, now: datetime, midnight: datetime, zone: tzinfo | None
) -> tuple[datetime, str] | None:
    """Read now, today, yesterday, or a time of the day: the latest one that is not to come."""
    match word:
        case "now":
            return now.astimezone(UTC), ""
        case "today":
            return _at(midnight, zone, 0), ""  # where the clock skips it: the day's first moment
        case "yesterday":
            return _at(midnight - timedelta(days=1), zone, 0), ""
    if _CLOCK.fullmatch(word) is None:
        return None
    clock = word if word[2] == ":" else f"0{word}"
    instant = _zoned(datetime.fromisoformat(f"{midnight.date()} {clock}"), zone)
    if instant[0] <= now:
        return instant
    before = midnight - timedelta(days=1)
    return _zoned(datetime.fromisoformat(f"{before.date()} {clock}"), zone)


def _at(when: datetime, zone: tzinfo | None, fold: int) -> datetime:
    folded = when.replace(fold=fold)
    return (folded if zone is None else folded.replace(tzinfo=zone)).astimezone(UTC)


def moment(when: object, *, now: datetime, name: str) -> datetime | None:
    """Return the aware time that a caller means: a time, a span before now, or words; None: none.

    A span that is longer than the calendar means its beginning, or its end.
    Raises: TypeError, ValueError.
    """
    if when is None:
        return None
    if isinstance(when, timedelta):
        try:
            return now - when
        except OverflowError:
            if when > timedelta(0):
                return datetime.min.replace(tzinfo=UTC)
            return datetime.max.replace(tzinfo=UTC)
    if isinstance(when, str):
        return read_time(when, now=now)[0]
    if not isinstance(when, datetime):
        message = f"{name} must be a datetime, a timedelta or words, not {type(when).__name__}"
        raise TypeError(message)
    if when.tzinfo is None:
        message = f"{name} must be an aware time: {name}.astimezone() takes it for a local one"
        raise ValueError(message)
    try:
        return when.astimezone(UTC)
    except OverflowError as error:
        message = f"{name} {when} is out of range in UTC"
        raise ValueError(message) from error
