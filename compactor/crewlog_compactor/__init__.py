"""What is done to a whole store: collect, compact, verify, repair, back up, migrate, import."""

from crewlog_compactor.anchor import Anchor, anchor
from crewlog_compactor.collect import (
    CollectReport,
    apply_plan,
    assume_dead,
    collect,
    make_plan,
)
from crewlog_compactor.compact import compact
from crewlog_compactor.legacy import ImportReport, import_legacy
from crewlog_compactor.migrate import MigrateReport, backup, migrate
from crewlog_compactor.plan import Plan
from crewlog_compactor.repair import repair
from crewlog_compactor.reports import CompactReport, Finding, RepairReport, VerifyReport
from crewlog_compactor.retention import KeepEvents
from crewlog_compactor.verify import verify

__all__ = [
    "Anchor",
    "CollectReport",
    "CompactReport",
    "Finding",
    "ImportReport",
    "KeepEvents",
    "MigrateReport",
    "Plan",
    "RepairReport",
    "VerifyReport",
    "anchor",
    "apply_plan",
    "assume_dead",
    "backup",
    "collect",
    "compact",
    "import_legacy",
    "make_plan",
    "migrate",
    "repair",
    "verify",
]
