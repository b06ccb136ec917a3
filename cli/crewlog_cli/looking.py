"""Say what a look at something found, and what to do about it."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "note", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was looked at, what was found, and what to do about it ("" for nothing)."""

    name: str
    status: Status
    found: str
    remedy: str = ""
