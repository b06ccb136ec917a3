"""Build the timeline page: one file, no network, and nothing in it that a worker's name can do.

Names reach the page as JSON inside a script element that is never run, with every character that
could end it escaped, and from there only as text. The policy in the page's head allows the one
script and the one style by their hashes, and nothing else at all.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from typing import Final

from crewlog.model.events import WorkerState
from crewlog.model.lives import Life
from crewlog_cli import text

_KINDS: Final = {
    None: 0,
    WorkerState.EXITED: 1,
    WorkerState.FAILED: 2,
    WorkerState.LOST: 3,
    WorkerState.RELEASED: 4,
}
_UNKNOWN: Final = 5
# What could end a script element or be taken for the end of a line of it.
_ESCAPED: Final = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page(lives: Sequence[Life], *, unknown: frozenset[int], now: datetime, told: str) -> bytes:
    """Return the page for these lives; `unknown` are the positions of those nobody can judge."""
    begin = min((life.began_at for life in lives), default=now)
    sids: dict[str, int] = {}
    reasons: dict[str, int] = {}
    versions: dict[str, int] = {}
    rows = []
    for index, life in enumerate(lives):
        words = text.visible(life.reason()) if index not in unknown else "not known"
        rows.append(
            [
                sids.setdefault(text.visible(life.sid), len(sids)),
                life.pid,
                life.generation,
                _ms(life.began_at, begin),
                _ms(life.proven_until, life.began_at),
                -1 if life.ended_at is None else _ms(life.ended_at, life.began_at),
                _UNKNOWN if index in unknown else _KINDS[life.end],
                reasons.setdefault(words, len(reasons)),
                versions.setdefault(text.visible(life.version), len(versions)),
            ]
        )
    found = {
        "from": round(begin.timestamp() * 1000),
        "to": round(max(now, begin).timestamp() * 1000),
        "told": text.visible(told),
        "sids": list(sids),
        "reasons": list(reasons),
        "versions": list(versions),
        "lives": rows,
    }
    return _filled(found)


def _filled(found: dict[str, object]) -> bytes:
    data = json.dumps(found, separators=(",", ":"))  # ASCII only, so no other line ends either
    for char, escaped in _ESCAPED.items():
        data = data.replace(char, escaped)
    style, script = _asset("page.css"), _asset("page.js")
    whole = _asset("page.html")
    for mark, words in {
        "@STYLE_HASH@": _hash(style),
        "@SCRIPT_HASH@": _hash(script),
        "@STYLE@": style,
        "@SCRIPT@": script,
        "@DATA@": data,  # last: nothing in it is a mark of ours
    }.items():
        whole = whole.replace(mark, words, 1)
    return whole.encode()


def _asset(name: str) -> str:
    return resources.files("crewlog_cli.pages").joinpath(name).read_text("utf-8")


def _hash(words: str) -> str:
    """Return the hash by which a policy allows this text. Source: CSP level 3, hash-source."""
    return "sha256-" + base64.b64encode(hashlib.sha256(words.encode()).digest()).decode()


def _ms(when: datetime, since: datetime) -> int:
    return max(0, round((when - since).total_seconds() * 1000))
