"""Check what callers give, and return it; what cannot be used is a ValueError or a TypeError."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Literal, TypeAlias, cast

from crewlog.model import codec
from crewlog.model.events import JsonValue

# How archives are compressed: gzip is in every Python, zstd an extra.
Packing: TypeAlias = Literal["gzip", "zstd"]
PACKINGS: Final[tuple[Packing, ...]] = ("gzip", "zstd")

LABELS_MAX: Final = 64
TEXT_CHARS_MAX: Final = 4096
WORD_CHARS_MAX: Final = 128 * 1024  # of a program's arguments
SOCK_CHARS_MAX: Final = 4096
PID_MAX: Final = 2**31 - 1
HEARTBEAT_MIN_S: Final = 0.1
HEARTBEAT_MAX_S: Final = 7 * 86_400.0
SID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}")


def check_sid(sid: object, *, what: str = "sid") -> str:
    """Return `sid` if it can name a worker, or what else is named like one."""
    if type(sid) is str and SID.fullmatch(sid) is not None:
        return sid
    text = check_text(sid, name=what)
    if SID.fullmatch(text) is None:
        message = (
            f"{text!r} cannot be a {what}: it has 1 to 128 letters, digits or ._:@+- , "
            "and begins with a letter or a digit"
        )
        raise ValueError(message)
    return text


def check_one(value: object, *, name: str, many: str) -> str:
    """Return one name; several have an argument of their own."""
    if isinstance(value, str):
        return value
    message = f"{name} is one name, not {type(value).__name__}: for several give {many}=[…]"
    raise TypeError(message)


def check_options(options: Mapping[str, object], known: Collection[str], *, of: str) -> None:
    """Raise TypeError for an option that there is not, as Python does for an argument."""
    for name in options:
        if name not in known:
            message = f"{of}() got an unexpected keyword argument {name!r}"
            raise TypeError(message)


def check_text(value: object, *, name: str, limit: int = TEXT_CHARS_MAX) -> str:
    """Return a text that JSON carries unchanged, of at most `limit` characters."""
    if type(value) is str and len(value) <= limit and value.isascii():  # nearly all are
        return value
    if not isinstance(value, str):
        message = f"{name} must be a string, not {type(value).__name__}"
        raise TypeError(message)
    codec.check_json(value, name=name)
    if len(value) > limit:
        message = f"{name} has {len(value)} characters; at most {limit} are kept"
        raise ValueError(message)
    return str(value)


def check_reason(reason: object, *, name: str = "reason") -> str:
    """Return a reason, or a name, that says something."""
    text = check_text(reason, name=name)
    if not text.strip():
        message = f"{name} must say something"
        raise ValueError(message)
    return text


def check_mapping(value: object, *, name: str) -> dict[str, JsonValue]:
    """Return a mapping that JSON carries unchanged, None as an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        message = f"{name} must be a mapping, not {type(value).__name__}"
        raise TypeError(message)
    codec.check_json(value, name=name)
    return dict(value)


def check_labels(value: object, *, removing: bool) -> dict[str, JsonValue]:
    """Return labels; with `removing` None may stand for a label that goes."""
    if type(value) is dict and len(value) <= LABELS_MAX:  # nearly all are plain: no closer look
        for key, text in value.items():
            if not (type(key) is type(text) is str and key.isascii() and text.isascii()):
                break
        else:
            return value.copy()
    labels = check_mapping(value, name="labels")
    if len(labels) > LABELS_MAX:
        message = f"{len(labels)} labels; at most {LABELS_MAX} are kept"
        raise ValueError(message)
    for key, text in labels.items():
        if not (isinstance(text, str) or (text is None and removing)):
            message = f"label {key!r} must be a string, not {type(text).__name__}"
            raise TypeError(message)
    return labels


def check_wanted(labels: object) -> Mapping[str, str | None]:
    """Return labels to look for; None stands for any value."""
    checked = check_labels({} if labels is None else labels, removing=True)
    return cast("dict[str, str | None]", checked)


def check_patience(value: bool | float) -> None:  # noqa: FBT001 (a value, as callers give it)
    """Raise TypeError or ValueError for what is neither yes, no nor so many seconds."""
    if not isinstance(value, bool):
        check_wait(value)


def check_sock(value: object) -> str:
    """Return the path or address of a socket, "" for none."""
    text = check_text(value, name="sock", limit=SOCK_CHARS_MAX)
    if "\0" in text:
        message = "sock holds a NUL"
        raise ValueError(message)
    return text


def check_expect(expect: object) -> int | None:
    """Return a revision to compare with, None for none."""
    if expect is None or (type(expect) is int and expect >= 0):
        return expect
    message = f"expect must be the rev that was read, not {expect!r}"
    raise TypeError(message)


def check_small(value: object, *, name: str, low: int) -> int | None:
    """Return an integer from `low` up to the largest pid, None for none; a signal is one, too."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        message = f"{name} must be an integer, not {type(value).__name__}"
        raise TypeError(message)
    if not low <= value <= PID_MAX:
        message = f"{name} {value} is out of range"
        raise ValueError(message)
    return int(value)


OK_CODES_MAX: Final = 256


def check_codes(codes: object) -> list[int] | None:
    """Return exit codes that are no crash, in order; 128 + N is signal N. None for none."""
    if isinstance(codes, tuple) and not codes:
        return None
    if isinstance(codes, str | bytes | Mapping) or not isinstance(codes, Collection):
        message = "ok_codes must be exit codes: (0, 143)"
        raise TypeError(message)
    for code in codes:
        if type(code) is not int or not 0 <= code < OK_CODES_MAX:
            message = f"ok_codes holds {code!r}; an exit code is 0 to 255, and 128 + N is signal N"
            raise ValueError(message)
    return sorted(set(codes)) or None


def check_ends_with(ends_with: object) -> str | None:
    """Return with whom a worker ends, None for nobody."""
    if ends_with in {None, "owner"}:
        return None if ends_with is None else "owner"
    message = f"ends_with is 'owner' or None, not {ends_with!r}"
    raise ValueError(message)


def check_words(words: object) -> list[JsonValue]:
    """Return a program's words."""
    if isinstance(words, str) or not isinstance(words, Sequence):
        message = "argv must be a sequence of strings"
        raise TypeError(message)
    return [check_text(word, name="argv", limit=WORD_CHARS_MAX) for word in words]


def check_heartbeat(heartbeat_s: float | None) -> float | None:
    """Return how long a worker may be silent, in seconds, None for as long as it likes."""
    if heartbeat_s is None:
        return None
    every_s = check_wait(heartbeat_s)
    if not HEARTBEAT_MIN_S <= every_s <= HEARTBEAT_MAX_S:
        message = (
            f"heartbeat_s is {HEARTBEAT_MIN_S:g} to {HEARTBEAT_MAX_S:g} seconds, "
            f"not {heartbeat_s:g}"
        )
        raise ValueError(message)
    return every_s


_WAIT_MAX_S: Final = 1e9  # the system takes no more than nine of these


def check_wait(wait_s: float) -> float:
    """Return a wait in seconds that can be waited; what is longer than 30 years is as good."""
    if not isinstance(wait_s, int | float) or isinstance(wait_s, bool):
        message = f"a wait must be a number of seconds, not {type(wait_s).__name__}"
        raise TypeError(message)
    if not math.isfinite(wait_s) or wait_s < 0:
        message = f"{wait_s} s cannot be waited"
        raise ValueError(message)
    return min(float(wait_s), _WAIT_MAX_S)
