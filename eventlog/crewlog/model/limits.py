"""What bounds the loops, waits and files of a store: one object, handed down at its opening."""

from dataclasses import dataclass
from typing import Final

LOCK_WAIT_S: Final = 5.0  # how long a change waits for other writers, unless the caller says


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits that one opened registry goes by; sizes in bytes, spans in seconds."""

    # -- a directory
    segment_bytes: int = 8 * 1024 * 1024  # a segment is sealed before it is longer
    redo_bytes: int = 256 * 1024  # so much is committed between two syncs of a segment
    group_bytes: int = 256 * 1024  # of lines that callers of one process share a write for
    recent_workers: int = 50_000  # that a writer keeps at hand
    own_lines: int = 64  # of its own, the last ones, that it keeps folded
    archive_bytes: int = 1024 * 1024  # small archives are put together to one of at most so many
    archive_lines: int = 25_000  # and of so many lines
    archives_small: int = 32  # once there are so many beside each other
    state_events: int = 100_000  # at least so many lie between two states that are kept
    catch_up_lines: int = 200  # a writer further behind catches up before it takes the lock
    sync_wait_s: float = 30.0  # at least: a busy disk is no reason not to know
    # -- readers and workers
    safety_look_s: float = 1.0  # a reader looks again after so long, though nothing woke it
    cursor_hold_bytes: int = 1024**3  # a cursor that is behind holds back no more history
    kill_wait_s: float = 30.0  # a process that SIGKILL has not ended by then waits in the kernel
    # -- a cluster
    lease_ttl_s: int = 15  # so long a worker may seem to live after its host is gone
    claim_ttl_s: int = 10  # of the owner of a cursor, or who has the turn to start a worker


DEFAULT: Final = Limits()
