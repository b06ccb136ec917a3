"""Every row of the decision table, and that the first match wins."""

from dataclasses import replace

import pytest

from crewlog.model.events import Identity
from crewlog.process.liveness import Evidence, Verdict, judge

ALIVE, DEAD, UNKNOWN = Verdict.ALIVE, Verdict.DEAD, Verdict.UNKNOWN
ME = Identity(pid=7, pidfd_id=70, start_ticks=700, boot_id="b", pid_ns="n:1", host_id="h", uid=1000)
HERE = Evidence(boot_id="b", host_id="h", pid_ns="n:1")
THERE = HERE._replace(boot_id="other")
BOX = HERE._replace(pid_ns="m:2")
WEAK = replace(ME, pidfd_id=None)
BLIND = replace(ME, pidfd_id=None, start_ticks=None)

ROWS = [
    (2, None, HERE._replace(owner_dead=True, record_age_s=61), DEAD, "abandoned"),
    (3, None, HERE._replace(owner_dead=True, record_age_s=59), UNKNOWN, "reserved"),
    (3, None, HERE._replace(owner_dead=False, record_age_s=1e6), UNKNOWN, "reserved"),
    (5, ME, THERE._replace(boot_began_after_record=True), DEAD, "rebooted"),
    (5, ME, THERE._replace(log_of_this_boot_follows=True), DEAD, "rebooted"),
    (26, ME, THERE._replace(boot_began_after_record=False), UNKNOWN, "clock_disputed"),
    (26, ME, THERE._replace(lease="absent"), UNKNOWN, "clock_disputed"),
    (7, ME, THERE._replace(boot_began_after_record=True, lease="held"), UNKNOWN, "foreign_host"),
    (7, ME, THERE._replace(log_of_this_boot_follows=True, host_id="x"), UNKNOWN, "foreign_host"),
    (7, ME, THERE._replace(boot_began_after_record=True, host_id="x"), UNKNOWN, "foreign_host"),
    (7, replace(ME, host_id=""), THERE._replace(boot_began_after_record=True, host_id=""), UNKNOWN,
     "foreign_host"),
    (7, ME, THERE._replace(boot_began_after_record=True, local_file_system=False), UNKNOWN,
     "foreign_host"),
    (6, ME, THERE._replace(lease="free"), DEAD, "lease_released"),
    (7, ME, THERE._replace(lease="held"), UNKNOWN, "foreign_host"),
    (25, ME, THERE._replace(lease="held", local_file_system=False), ALIVE, "lease"),
    (8, ME, BOX._replace(lease="held"), ALIVE, "lease"),
    (9, ME, BOX._replace(lease="free"), DEAD, "lease_released"),
    (10, ME, BOX._replace(found_by_scan=True), ALIVE, "found_in_namespace"),
    (11, ME, BOX._replace(found_by_scan=False, scan_complete=True), DEAD, "not_found"),
    (12, ME, BOX._replace(found_by_scan=False), UNKNOWN, "foreign_pid_namespace"),
    (12, ME, BOX, UNKNOWN, "foreign_pid_namespace"),
    (13, ME, HERE._replace(opened="no_such_process"), DEAD, "no_such_process"),
    (14, ME, HERE._replace(opened="thread"), DEAD, "pid_is_thread"),
    (15, ME, HERE._replace(opened="yes", pidfd_id=71), DEAD, "pid_reused"),
    (16, ME, HERE._replace(opened="yes", pidfd_id=70, ended=True), DEAD, "exited"),
    (17, ME, HERE._replace(opened="yes", pidfd_id=70, ended=False), ALIVE, "identity"),
    (17, ME, HERE._replace(opened="yes", pidfd_id=70, ended=False, task_state="Z", threads=2),
     ALIVE, "identity"),
    (18, WEAK, HERE._replace(opened="yes", start_ticks=701), DEAD, "pid_reused"),
    (19, WEAK, HERE._replace(opened="yes", start_ticks=700, ended=True), DEAD, "exited"),
    (19, WEAK, HERE._replace(start_ticks=700, task_state="Z", threads=1), DEAD, "exited"),
    (19, WEAK, HERE._replace(start_ticks=700, task_state="X"), DEAD, "exited"),
    (20, WEAK, HERE._replace(start_ticks=700, task_state="Z", threads=2), ALIVE, "start_time"),
    (20, WEAK, HERE._replace(opened="yes", start_ticks=700, ended=False), ALIVE, "start_time"),
    (21, BLIND, HERE._replace(opened="unsupported", killed="no_such_process"), DEAD,
     "no_such_process"),
    (22, BLIND, HERE._replace(opened="unsupported", killed="exists"), UNKNOWN,
     "identity_unverifiable"),
    (22, ME, HERE._replace(opened="unsupported"), UNKNOWN, "identity_unverifiable"),
    (23, ME, HERE._replace(opened="unsupported", start_ticks=700), ALIVE, "start_time"),
    (24, WEAK, HERE._replace(platform="other", killed="no_such_process"), DEAD, "no_such_process"),
    (24, WEAK, HERE._replace(platform="other", access_denied=True), UNKNOWN,
     "identity_unverifiable"),
    (24, WEAK, HERE._replace(platform="other", start_ticks=700), ALIVE, "start_time"),
    (24, WEAK, HERE._replace(platform="other", start_ticks=9), DEAD, "pid_reused"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "identity", "seen", "verdict", "cause"), ROWS)
def test_row_gives_its_verdict(
    row: int, identity: Identity | None, seen: Evidence, verdict: Verdict, cause: str
) -> None:
    """Each row of the table."""
    answers = judge(identity, seen, final=False)
    assert (answers.verdict, answers.cause) == (verdict, cause), f"row {row}"


@pytest.mark.parametrize(("row", "identity", "seen", "verdict", "cause"), ROWS)
def test_final_record_is_dead_whatever_is_seen(
    row: int, identity: Identity | None, seen: Evidence, verdict: Verdict, cause: str
) -> None:
    """Row 1 comes before all others."""
    assert judge(identity, seen, final=True).cause == "recorded"


@pytest.mark.parametrize("pid", [0, -1])
def test_impossible_pid_is_an_error_never_a_verdict(pid: int) -> None:
    """Row 4."""
    with pytest.raises(ValueError, match="not a process id"):
        judge(replace(ME, pid=pid), HERE, final=False)


def test_no_evidence_never_proves_death() -> None:
    """Whoever sees nothing says UNKNOWN."""
    for identity in (ME, WEAK, BLIND):
        assert judge(identity, HERE, final=False).verdict is UNKNOWN


def test_namespace_ticks_hidden_compares_inodes_only() -> None:
    """Under hidepid the start of pid 1 cannot be read; the namespace is still ours."""
    hidden = HERE._replace(pid_ns="n:", opened="yes", pidfd_id=70, ended=False)
    assert judge(ME, hidden, final=False).verdict is ALIVE
