"""Say what a verification found."""

from dataclasses import dataclass
from typing import Final

_REPAIRABLE: Final = frozenset(
    {"store_poisoned", "log_corrupt", "log_regressed", "segment_missing", "archive_damaged"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, and where: offset in bytes, None where it does not apply."""

    code: str
    path: str
    offset: int | None = None
    seq: int | None = None
    message: str

    @property
    def repairable(self) -> bool:
        """Say whether `repair` has something to offer."""
        return self.code in _REPAIRABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification read and found."""

    events: int
    last_seq: int
    findings: tuple[Finding, ...]
    gaps: tuple[tuple[int, int], ...] = ()  # lost events (first, last) that a repair gave up

    @property
    def ok(self) -> bool:
        """Say whether nothing is wrong."""
        return not self.findings
