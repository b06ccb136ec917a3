"""Build the timeline page: one file, no network, and nothing in it that a worker's name can do.

What workers are called reaches the page packed (JSON, gzip, base64: letters and digits only), or
where they are many as JSON with every character escaped that could end it, in a script element that
is never run, and from there only as text. The policy in the page's head allows
the one script and the one style by their hashes, and nothing else at all.
"""

import base64
import gzip
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from typing import Final

from crewlog.model.events import WorkerState
from crewlog.model.lives import Life
from crewlog_cli import text
from crewlog_cli.pages.stories import Account

_KINDS: Final = {
    None: 0,
    WorkerState.EXITED: 1,
    WorkerState.FAILED: 2,
    WorkerState.LOST: 3,
    WorkerState.RELEASED: 4,
}
_UNKNOWN: Final = 5
# The script, in the order in which its parts need each other.
_SCRIPT: Final = ("data.js", "count.js", "rows.js", "draw.js", "pane.js", "hands.js", "page.js")


_LARGE: Final = 20_000  # lives: from here on the time counts, not the size


class _Words:
    """Texts, each kept once; a life names them by number."""

    def __init__(self) -> None:
        self.all: dict[str, int] = {}

    def number(self, words: str) -> int:
        return self.all.setdefault(words, len(self.all))


def page(
    lives: Sequence[Life],
    *,
    unknown: frozenset[int],
    now: datetime,
    caption: str,
    stories: Mapping[int, Account] | None = None,
) -> bytes:
    """Return the page for these lives; `unknown` are the positions of those nobody can judge.

    `stories` are told of lives by the seq of their registration.
    """
    begin = min((life.began_at for life in lives), default=now)
    words, sets, classes, accounts = _Words(), _Words(), _Words(), stories or {}
    rows = [
        _row(
            life,
            words,
            sets,
            classes,
            unknown=at in unknown,
            account=accounts.get(life.seq, _NOTHING),
        )
        for at, life in enumerate(lives)
    ]
    first = _ms(begin)
    picture = {
        "from": first,
        "to": max(_ms(now), first),
        "caption": text.visible(caption),
        "workers": len({life.sid for life in lives}),
        "lives": _columns(rows, _SEEN, begin=first),
        "classes": [json.loads(alike) for alike in classes.all],
        "sets": [json.loads(labels) for labels in sets.all],
        "words": list(words.all),
    }
    known = len(words.all)
    steps = [_steps(life, words, accounts.get(life.seq, _NOTHING)) for life in lives]
    rest = {
        "lives": _columns(rows, _IN_PANE, begin=first),
        "steps": steps,
        "words": list(words.all)[known:],
    }
    return _filled(picture, rest, large=len(lives) > _LARGE)


_NOTHING: Final = Account()


def _row(
    life: Life, words: _Words, sets: _Words, classes: _Words, *, unknown: bool, account: Account
) -> list[int]:
    """Return a life as the picture takes it; see data.js. Times are whole ms: order is kept."""
    began = _ms(life.began_at)
    proof = max(0, _ms(life.proven_until) - began)
    end = -1 if life.ended_at is None else max(0, _ms(life.ended_at) - began)
    labels = [words.number(text.visible(f"{k}={v}")) for k, v in sorted(account.labels.items())]
    alike = [
        _UNKNOWN if unknown else _KINDS[life.end],
        life.generation,
        words.number(text.visible("not known" if unknown else life.reason())),
        words.number(text.visible(life.version)),
        sets.number(json.dumps(labels)),
        words.number(account.host),
        words.number(account.owner),
    ]
    return [
        words.number(text.visible(life.sid)),
        life.pid,
        began,
        -1 if proof == end else proof,
        end,
        life.seq,
        classes.number(json.dumps(alike)),
    ]


# Of a life, in the order of `_row`. Columns of like numbers are small, and at hand at once.
_COLUMNS: Final = ("sid", "pid", "began", "proof", "end", "seq", "class")
# What the picture shows; and what is only told of a life, so it may come later.
_SEEN: Final = ("sid", "began", "proof", "end", "class")
_IN_PANE: Final = ("pid", "seq")


def _columns(
    rows: Sequence[list[int]], names: Sequence[str], *, begin: int
) -> dict[str, list[int]]:
    """Return lives as columns; pids, beginnings and seqs as differences to the life before."""
    columns = {}
    for name in names:
        at = _COLUMNS.index(name)
        columns[name] = [row[at] for row in rows]
        if name in {"pid", "began", "seq"}:
            before = [begin if name == "began" else 0, *columns[name]]
            columns[name] = [now - then for then, now in itertools.pairwise(before)]
    return columns


# Stands for "registered pid" and the life's own, so lives share a text; no visible text has it.
_REGISTERED: Final = "\1"


def _steps(life: Life, words: _Words, account: Account) -> list[int]:
    """Return what happened in a life, and the number of what else is told of it."""
    began, last, registered = _ms(life.began_at), 0, f"registered pid {life.pid}"
    numbers = [words.number(account.more)]
    for when, step, what, who in account.steps:
        at = max(last, _ms(when) - began)
        own = what.startswith(registered)
        shared = _REGISTERED + what.removeprefix(registered) if own else what
        numbers += [at - last, step, words.number(shared), words.number(who)]
        last = at
    return numbers


def _filled(picture: Mapping[str, object], stories: Mapping[str, object], *, large: bool) -> bytes:
    script = "".join(['"use strict";\n(async () => {\n', *map(_asset, _SCRIPT), "})();\n"])
    style, whole = _asset("page.css"), _asset("page.html")
    for mark, words in {
        "@STYLE_HASH@": _hash(style),
        "@SCRIPT_HASH@": _hash(script),
        "@STYLE@": style,
        "@SCRIPT@": script,
        "@DATA@": _plain(picture) if large else _packed(picture),
        "@STORIES@": _packed(stories),
    }.items():
        whole = whole.replace(mark, words, 1)
    return whole.encode()


# What could end a script element or be taken for the end of a line of it.
_ESCAPED: Final = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def _plain(document: Mapping[str, object]) -> str:
    """Return what is larger, and at hand sooner: nothing need be unpacked."""
    data = json.dumps(document, separators=(",", ":"))  # ASCII only, so no other line ends either
    for char, escaped in _ESCAPED.items():
        data = data.replace(char, escaped)
    return data


def _packed(document: Mapping[str, object]) -> str:
    data = json.dumps(document, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def names(made: bytes) -> list[str]:
    """Return what a page names: ids, labels, words; packed, no search finds them in the file."""
    data = made.split(b'id="data">', 1)[1].split(b"<", 1)[0]
    plain = data if data.startswith(b"{") else gzip.decompress(base64.b64decode(data))
    words: list[str] = json.loads(plain)["words"]
    return words


def _asset(name: str) -> str:
    return resources.files("crewlog_cli.pages").joinpath(name).read_text("utf-8")


def _hash(words: str) -> str:
    """Return the hash by which a policy allows this text. Source: CSP level 3, hash-source."""
    return "sha256-" + base64.b64encode(hashlib.sha256(words.encode()).digest()).decode()


def _ms(when: datetime) -> int:
    """Return whole ms since 1970: what comes after stays after."""
    return int(when.timestamp() * 1000)
