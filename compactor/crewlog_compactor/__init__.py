"""Do the work of cron: collect the dead, compact the log, verify the store, import an older one."""

from crewlog_compactor.collect import (
    CollectReport,
    apply_plan,
    assume_dead,
    collect,
    make_plan,
)
from crewlog_compactor.compact import CompactReport, compact
from crewlog_compactor.legacy import ImportReport, import_legacy
from crewlog_compactor.plan import Plan
from crewlog_compactor.verify import Finding, VerifyReport, verify

__all__ = [
    "CollectReport",
    "CompactReport",
    "Finding",
    "ImportReport",
    "Plan",
    "VerifyReport",
    "apply_plan",
    "assume_dead",
    "collect",
    "compact",
    "import_legacy",
    "make_plan",
    "verify",
]
