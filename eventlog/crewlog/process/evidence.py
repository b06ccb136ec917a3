"""Gather the evidence about the life of workers: what a decision table can judge.

A witness looks from one place at one time. It asks for as little as the table may need: for most
workers a pidfd, its inode and one poll. What costs more (a scan of /proc for a worker of another
pid namespace, an owner many workers share) is looked up once for all of them.
"""

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, TypeAlias, TypedDict

from crewlog.model import codec
from crewlog.model.codec import DocumentError
from crewlog.model.events import Identity
from crewlog.process import cgroup, identity
from crewlog.process.identity import Scope
from crewlog.process.liveness import Evidence, LeaseSeen, judge, same_scope

_PLATFORM: Final[Literal["linux", "other"]] = "linux" if identity.LINUX else "other"
# Room for a clock that was set while the machine booted.
_BOOT_SLACK: Final = timedelta(seconds=2)

_STOPPED: Final = frozenset({"T", "t"})  # by a signal, by a debugger
# Looks at a lease by its name.
LeaseLook: TypeAlias = Callable[[str], LeaseSeen]


class Witness:
    """Look at processes from one place, at one time; the arguments are seams for tests."""

    def __init__(
        self,
        here: Scope,
        *,
        now: datetime,
        began_at: datetime,
        local_file_system: bool = True,
        leases: LeaseLook | None = None,
        since_boot: int | None = None,
    ) -> None:
        """Look from `here`, in a boot that began at `began_at` by the clock of `now`.

        `leases` is None where none can be looked at; `since_boot` is the seq from which on the log
        was written in this boot, None where that is not known.
        """
        self._here = here
        self._now = now
        self._began_at = began_at - _BOOT_SLACK
        self._local = local_file_system
        self._leases = leases
        self._since_boot = since_boot
        self._owners: dict[Identity, bool] = {}
        self._frozen: dict[bytes, bool] = {}  # by control group
        self._scanned: tuple[set[int], set[int], bool] | None = None

    def look(
        self,
        who: Identity | None,
        *,
        last_event_at: datetime,
        owner: Identity | None = None,
        lease: str | None = None,
        heartbeat_s: float | None = None,
        rev: int | None = None,
    ) -> Evidence:
        """Gather what the decision table may need about one worker, and nothing more."""
        here = self._here
        seen = Evidence(
            platform=_PLATFORM,
            boot_id=here.boot_id,
            host_id=here.host_id,
            pid_ns=here.pid_ns,
            local_file_system=self._local,
            record_age_s=(self._now - last_event_at).total_seconds(),
            boot_began_after_record=self._began_at > last_event_at,
            log_of_this_boot_follows=self._follows(rev),
            owner_dead=owner is not None and self._owner_dead(owner),
        )
        elsewhere = who is not None and not self._is_here(who)
        if lease is not None and self._leases is not None:
            beat = self._leases(lease)
            seen = seen._replace(**_said(beat.said))
            if elsewhere or heartbeat_s is not None:
                seen = seen._replace(lease=beat.state, heartbeat_s=heartbeat_s)
                seen = seen._replace(beat_age_s=beat.beat_age_s, beat_expired=beat.beat_expired)
        if who is None or who.boot_id != here.boot_id:
            return seen
        identity.check_pid(who.pid)
        if not identity.LINUX:
            return _look_portable(who.pid, seen)
        return self._look_elsewhere(who, seen) if elsewhere else self._look_here(who, seen)

    def _follows(self, rev: int | None) -> bool | None:
        """Say whether what this boot wrote comes after an event; None where nothing tells."""
        known = rev is not None and self._since_boot is not None
        return True if known and (self._since_boot or 0) > (rev or 0) else None

    def _is_here(self, who: Identity) -> bool:
        return who.boot_id == self._here.boot_id and same_scope(who.pid_ns, self._here.pid_ns)

    def _look_here(self, who: Identity, seen: Evidence) -> Evidence:
        opened, fd = identity.open_pidfd(who.pid)
        try:
            if opened in {"no_such_process", "thread"}:
                return seen._replace(opened=opened)
            inode = None
            if fd >= 0 and who.pidfd_id is not None and identity.pidfds_have_inodes():
                inode = os.fstat(fd).st_ino
                if inode != who.pidfd_id or not identity.ended(fd):
                    paused = True if inode == who.pidfd_id and self._is_paused(who.pid) else None
                    return seen._replace(opened=opened, pidfd_id=inode, ended=False, paused=paused)
            stat = identity.read_stat(who.pid)
            seen = seen._replace(opened=opened, pidfd_id=inode)
            if stat is not None:
                seen = seen._replace(start_ticks=stat.start_ticks, task_state=stat.state)
                seen = seen._replace(threads=stat.threads)
            if fd >= 0:
                seen = seen._replace(ended=identity.ended(fd))
            seen = seen._replace(killed=identity.killed(who.pid))
            return _with_status(who, seen, fd)
        finally:
            if fd >= 0:
                os.close(fd)

    def _is_paused(self, pid: int) -> bool:
        """Say whether a process does not run: stopped, or its control group is frozen."""
        if identity.task_state(pid) in _STOPPED:
            return True
        rows = cgroup.rows_of(pid)
        if rows not in self._frozen:
            self._frozen[rows] = cgroup.is_frozen(rows)
        return self._frozen[rows]

    def _look_elsewhere(self, who: Identity, seen: Evidence) -> Evidence:
        """Look for a worker of another pid namespace, where its pid means nothing to us."""
        if who.pidfd_id is None or seen.lease == "held":
            return seen
        if not identity.pidfds_have_inodes():
            return seen
        if self._scanned is None:
            self._scanned = self._scan()
        living, ended, complete = self._scanned
        return seen._replace(
            found_by_scan=who.pidfd_id in living,
            ended=True if who.pidfd_id in ended else None,
            scan_complete=complete,
        )

    def _scan(self) -> tuple[set[int], set[int], bool]:
        """Return the pidfd inodes of all living and all ended processes, and whether it is all."""
        living: set[int] = set()
        over: set[int] = set()
        complete = identity.sees_every_process()
        for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
            if not name.isdecimal():
                continue
            with identity.opened_pidfd(int(name)) as (opened, fd):
                if fd >= 0:
                    inode = os.fstat(fd).st_ino
                    (over if identity.ended(fd) else living).add(inode)
                complete &= opened != "unsupported"  # out of descriptors: we may have missed it
        return living, over, complete

    def _owner_dead(self, owner: Identity) -> bool:
        """Say whether an owner is proven dead, by the same evidence as a worker."""
        if owner not in self._owners:
            seen = self.look(owner, last_event_at=self._now)
            self._owners[owner] = judge(owner, seen, final=False).dead
        return self._owners[owner]


def witness(
    *,
    local_file_system: bool = True,
    leases: LeaseLook | None = None,
    since_boot: int | None = None,
) -> Witness:
    """Return a witness for this process's own place and time."""
    return Witness(
        identity.scope(),
        now=datetime.now(UTC),
        began_at=identity.booted_at(),
        local_file_system=local_file_system,
        leases=leases,
        since_boot=since_boot,
    )


def _said(said: bytes) -> "_Said":
    """Read what a worker says of itself; what a newer version adds is left out."""
    if not said:
        return {}
    try:
        fields = codec.load_object(said)
    except DocumentError:
        return {}
    words: _Said = {}
    if isinstance(status := fields.get("status"), str):
        words["status"] = status
    if isinstance(note := fields.get("note"), str):
        words["note"] = note
    return words


class _Said(TypedDict, total=False):
    """What a worker says of itself."""

    status: str
    note: str


def _with_status(who: Identity, seen: Evidence, fd: int) -> Evidence:
    """Add how it ended, if what is seen proves that it is this very process that did."""
    if judge(who, seen, final=False).cause != "exited":
        return seen
    status = identity.exit_status(who.pid, fd)
    if status is None:
        return seen
    return seen._replace(
        exit_code=status.code, exit_signal=status.signal, exit_source=status.source
    )


def _look_portable(pid: int, seen: Evidence) -> Evidence:
    process = identity.look_portable(pid)
    return seen._replace(
        killed=None if process.exists else "no_such_process",
        access_denied=process.denied,
        start_ticks=process.start_ticks,
        ended=process.ended,
    )
