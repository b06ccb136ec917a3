"""Say what a verification found, what a compaction or a repair did, and what a check saw."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from crewlog.errors import CollectRefused, QuotaExceeded
from crewlog_compactor.collect import CollectReport

_REPAIRABLE: Final = frozenset(
    {
        "store_poisoned",
        "log_corrupt",
        "log_regressed",
        "segment_missing",
        "archive_damaged",
        "kept_state_wrong",
        "archive_foreign",
    }
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
    notes: tuple[str, ...] = ()  # what the next change mends by itself: no finding

    @property
    def ok(self) -> bool:
        """Say whether nothing is wrong."""
        return not self.findings


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactReport:
    """What a compaction did, or with `dry_run` would do to what is there now.

    `folded_events` were new to the snapshot, which now covers `snapshot_seq` (0: there is none
    yet); `archived_segments` counts moves into the archive, `dropped` is the range of seqs that
    retention took (first, last); `collected` is None without `gc`, and where the collection was
    refused, as `refused` then says; `full` that a cluster's quota is full,
    so that nothing was done but dropping.

    A dry run counts the lines that a compaction adds, too; where others write meanwhile there are
    more. On etcd it does not know the bytes of these lines, which a policy by bytes may hang on.
    """

    folded_events: int
    snapshot_seq: int
    archived_segments: int
    dropped: tuple[int, int] | None
    collected: CollectReport | None
    refused: CollectRefused | None
    full: QuotaExceeded | None = None
    dry_run: bool = False


Range: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What a repair did, or without `yes` would do.

    `losses` are the ranges of seqs that cannot be read any more, `rewritten` the segments, `aside`
    files that do not belong where they lie (what they hide shows once they are gone), and
    `quarantined` the files that keep what they held; `seq` is that of the `_repaired` line.
    """

    done: bool
    poisoned: bool
    losses: tuple[Range, ...]
    rewritten: tuple[str, ...]
    quarantined: tuple[str, ...] = ()
    seq: int = 0
    aside: tuple[str, ...] = ()

    @property
    def needed(self) -> bool:
        """Say whether there is anything to repair."""
        return self.poisoned or bool(self.rewritten or self.aside)


Status: TypeAlias = Literal["ok", "note", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was looked at, what was found, and what to do about it ("" for nothing)."""

    name: str
    status: Status
    found: str
    remedy: str = ""
