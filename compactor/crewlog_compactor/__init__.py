"""Do the work of cron: collect the dead, compact the log, verify the store, import an older one."""

from crewlog_compactor.collect import CollectReport, collect
from crewlog_compactor.compact import CompactReport, compact
from crewlog_compactor.legacy import ImportReport, import_legacy
from crewlog_compactor.verify import Finding, VerifyReport, verify

__all__ = [
    "CollectReport",
    "CompactReport",
    "Finding",
    "ImportReport",
    "VerifyReport",
    "collect",
    "compact",
    "import_legacy",
    "verify",
]
