"""Give every file, mode, version and limit of a store its one name.

A store is a directory::

    DIR/                     0700
      store.json             the store's identity; its existence means "initialised"
      locks/append           flock: who may write lines
      locks/sync.0 .1        flock: who runs the current fdatasync
      locks/compact          flock: who compacts, repairs or migrates
      append.state           how far lines have been written (a cache, never the truth)
      redo                   what was committed since its segment was synced, a second time
      head/durable           how far lines are durable (what readers watch)
      log/<first seq>.jsonl  segments; the last one is active, the others end with a seal
      registry.json          the snapshot; registry.prev.json is the one before it
      archive/               sealed segments, compressed: the audit history
      leases/<sid>~<token>   held by flock for as long as a worker lives; carries its last beat
      cursors/ quarantine/   positions of subscribers; bytes taken out of the log

Most of what bounds its loops, waits and allocations is a number in this file.
"""

import re
from typing import Final

# -- versions -------------------------------------------------------------------------------
FORMAT: Final = 1
LINE_VERSION: Final = 1

# -- names ----------------------------------------------------------------------------------
STORE: Final = "store.json"
SNAPSHOT: Final = "registry.json"
SNAPSHOT_PREV: Final = "registry.prev.json"
APPEND_STATE: Final = "append.state"
REDO: Final = "redo"
POISON: Final = "POISON.json"
LOCKS: Final = "locks"
HEAD: Final = "head"
LOG: Final = "log"
ARCHIVE: Final = "archive"
CURSORS: Final = "cursors"
LEASES: Final = "leases"
QUARANTINE: Final = "quarantine"
# Files that a creation makes before store.json says that there is a store.
NEWBORN: Final = (APPEND_STATE, REDO)
DIRECTORIES: Final = (LOCKS, HEAD, LOG, ARCHIVE, CURSORS, LEASES, QUARANTINE)

HEAD_DURABLE: Final = "durable"
LOCK_APPEND: Final = "append"
LOCK_SYNC: Final = ("sync.0", "sync.1")
LOCK_COMPACT: Final = "compact"
LOCK_NAMES: Final = (LOCK_APPEND, *LOCK_SYNC, LOCK_COMPACT)

SEGMENT_SUFFIX: Final = ".jsonl"
ARCHIVE_SUFFIXES: Final = {"gzip": ".jsonl.gz", "zstd": ".jsonl.zst"}
ZSTD_SUFFIX: Final = ".zst"
# In archive/: the state before its oldest segment, once retention dropped what was before.
BASE: Final = "base.json"
SEGMENT_DIGITS: Final = 20
# A temporary file that a killed writer left is swept by the next holder of its lock; in cursors/,
# where there is none, once it is old.
TEMPORARY_PREFIX: Final = ".tmp-"
TEMPORARY_AGE_S: Final = 3600.0

# -- modes ----------------------------------------------------------------------------------
DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644  # of metrics alone, which name no worker

# -- limits ---------------------------------------------------------------------------------
LINE_BYTES_MAX: Final = 64 * 1024
LINE_BYTES_CEILING: Final = 1024 * 1024
# More than seq, ts, place, synced, prev and crc take.
LINE_OVERHEAD_BYTES: Final = 256
HEADER_BYTES: Final = 1024  # a segment's first line names the store within these
REDO_BYTES: Final = 256 * 1024  # so much is committed between two syncs of a segment
SEGMENT_BYTES_MAX: Final = 8 * 1024 * 1024
GROUP_BYTES_MAX: Final = 256 * 1024  # of lines that callers of one process share a write for
BATCH_EVENTS_MAX: Final = 10_000
BATCH_BYTES_MAX: Final = 16 * 1024 * 1024
SNAPSHOT_BYTES_MAX: Final = 1024 * 1024 * 1024
SMALL_FILE_BYTES_MAX: Final = 4096
PAYLOAD_DEPTH_MAX: Final = 32
# How many workers a writer keeps at hand, and how far behind it may be under the lock.
RECENT_MAX: Final = 50_000
CATCH_UP_LINES_MAX: Final = 200
CATCH_UP_IDLE_S: Final = 0.05
READ_BYTES: Final = 256 * 1024
SIEVE_BYTES: Final = 1024 * 1024
WRITE_BYTES_MAX: Final = 16 * 1024 * 1024
LABELS_MAX: Final = 64
TEXT_CHARS_MAX: Final = 4096
SOCK_CHARS_MAX: Final = 4096
INT64_MAX: Final = 2**63 - 1
PID_MAX: Final = 2**31 - 1

# -- waits ----------------------------------------------------------------------------------
LOCK_WAIT_S: Final = 5.0
# A sync in progress is waited for at least this long: a busy disk is no reason not to know.
SYNC_WAIT_MIN_S: Final = 30.0
LOCK_PAUSE_MAX_S: Final = 0.01  # of the usual waits that a first pause goes by
LOCK_POLL_MIN_S: Final = 0.000_02
LOCK_POLL_MAX_S: Final = 0.000_5
# Growing faster cost half of the p99 of 8 writers (5.3 against 3.1 ms).
LOCK_POLL_GROWTH: Final = 1.1
SYNC_GATHER_MAX_S: Final = 0.000_3
SYNC_GATHER_SHARE: Final = 0.15
SAFETY_LOOK_S: Final = 1.0
# Polling: this soon after a change, then doubling.
POLL_MIN_S: Final = 0.01
POLL_MAX_S: Final = 0.25
RETRY_MAX_S: Final = 30.0
# A wake may be this late before it counts as never sent.
WAKE_GRACE_S: Final = 0.1
CURSOR_HOLD_BYTES_MAX: Final = 1024 * 1024 * 1024
# A directory that changed within so long may change again at the same tick of its clock.
STAMP_SETTLED_NS: Final = 20_000_000
STAMP_SECONDS_NS: Final = 2_000_000_000
TORN_READ_TRIES: Final = 50
SEGMENT_OPEN_TRIES: Final = 8
VERIFY_TRIES: Final = 50
QUARANTINE_MAX: Final = 10_000
LEASE_TRIES: Final = 8
# A sid whose dead holder is replaced, or whose record changes, under us again and again.
CHANGE_TRIES: Final = 16
GRACE_S: Final = 10.0
# A process that SIGKILL has not ended by then waits inside the kernel.
KILL_WAIT_S: Final = 30.0
LAUNCH_WAIT_S: Final = 30.0
ENSURE_WAIT_S: Final = 30.0
# How long after its end a process that is not our child is given to be reaped.
REAP_WAIT_S: Final = 0.5
REAP_LOOK_S: Final = 0.01
DEATH_LOOK_S: Final = 0.05
HEARTBEAT_MIN_S: Final = 0.1
HEARTBEAT_MAX_S: Final = 7 * 86_400.0
CONNECT_WAIT_S: Final = 1.0
PLAN_BYTES_MAX: Final = 256 * 1024 * 1024

# -- a cluster ------------------------------------------------------------------------------
# etcd refuses transactions of more than 128 operations or 1.5 MiB, unless it is told otherwise.
TXN_WORKERS_MAX: Final = 100
TXN_BYTES_MAX: Final = 1024 * 1024
GROUP_EVENTS_MAX: Final = 40  # of callers that share a transaction
KEYS_A_PAGE: Final = 256
RECORDS_A_PAGE: Final = 1000
NEWEST_LINES_MAX: Final = 1000  # that watchers of one process share
PIECE_BYTES: Final = 512 * 1024
PIECES_MAX: Final = 10_000
CONNECTIONS_MAX: Final = 8
ANSWER_WAIT_S: Final = 2.0  # then the same is sent to the next server
STREAM_WAIT_S: Final = 30.0  # without a word, a stream is begun anew
BACKOFF_MIN_S: Final = 0.001
BACKOFF_MAX_S: Final = 0.1
RACE_PAUSE_MAX_S: Final = 0.02  # of a writer that others were faster than
LEASE_TTL_S: Final = 15  # of a worker: so long it may seem to live after its host is gone
CLAIM_TTL_S: Final = 10  # of who owns a cursor, or has the turn to start a worker
CLAIM_LOOK_S: Final = 0.05
KEEPER_WAIT_S: Final = 30.0
END_WAIT_S: Final = 600.0  # so long the end of a child is tried to be recorded, wherever

SID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}")


def is_temporary(name: str) -> bool:
    """Say whether a file is one that its writer had not finished."""
    return name.startswith(TEMPORARY_PREFIX)


def segment_name(first_seq: int) -> str:
    """Name the segment whose header line carries `first_seq`."""
    return f"{first_seq:0{SEGMENT_DIGITS}d}{SEGMENT_SUFFIX}"


def archive_name(first_seq: int, packing: str = "gzip") -> str:
    """Name the archived form of that segment."""
    return f"{first_seq:0{SEGMENT_DIGITS}d}{ARCHIVE_SUFFIXES[packing]}"


def first_seq_of(name: str) -> int | None:
    """Read the first seq out of a segment's or an archived segment's name, None for other names."""
    digits, dot, rest = name.partition(".")
    if dot + rest not in {SEGMENT_SUFFIX, *ARCHIVE_SUFFIXES.values()}:
        return None
    if len(digits) != SEGMENT_DIGITS or not digits.isascii() or not digits.isdigit():
        return None
    return int(digits)
