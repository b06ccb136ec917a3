"""Name every file of a store.

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
      archive/               sealed segments, compressed: the audit history; and states on the way
      leases/<sid>~<token>   held by flock for as long as a worker lives; carries its last beat
      cursors/ quarantine/   positions of subscribers; bytes taken out of the log
"""

from typing import Final

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
# In archive/: the state after the event of that seq, compressed, so that a past one is soon told.
STATE_PREFIX: Final = "state-"
STATE_SUFFIX: Final = ".json.gz"

SMALL_FILE_BYTES_MAX: Final = 4096


def segment_name(first_seq: int) -> str:
    """Name the segment whose header line carries `first_seq`."""
    return f"{first_seq:0{SEGMENT_DIGITS}d}{SEGMENT_SUFFIX}"


def archive_name(first_seq: int, packing: str = "gzip") -> str:
    """Name the archived form of that segment."""
    return f"{first_seq:0{SEGMENT_DIGITS}d}{ARCHIVE_SUFFIXES[packing]}"


def merged_name(first_seq: int, last_seq: int, packing: str) -> str:
    """Name the archive that holds all segments from one seq to another."""
    digits = f"{first_seq:0{SEGMENT_DIGITS}d}-{last_seq:0{SEGMENT_DIGITS}d}"
    return f"{digits}{ARCHIVE_SUFFIXES[packing]}"


def first_seq_of(name: str) -> int | None:
    """Read the first seq out of a segment's or an archived segment's name, None for other names."""
    digits, dot, rest = name.partition(".")
    if dot + rest not in {SEGMENT_SUFFIX, *ARCHIVE_SUFFIXES.values()}:
        return None
    return _seq(digits)


def merged_seqs_of(name: str) -> tuple[int, int] | None:
    """Read the first and the last seq out of the name of a merged archive, None for other names."""
    digits, dot, rest = name.partition(".")
    begin, dash, end = digits.partition("-")
    if not dash or dot + rest not in ARCHIVE_SUFFIXES.values():
        return None
    first, last = _seq(begin), _seq(end)
    return None if first is None or last is None or last < first else (first, last)


def _seq(digits: str) -> int | None:
    if len(digits) != SEGMENT_DIGITS or not digits.isascii() or not digits.isdigit():
        return None
    return int(digits)


def state_name(seq: int) -> str:
    """Name the state that is kept as of `seq`."""
    return f"{STATE_PREFIX}{seq:0{SEGMENT_DIGITS}d}{STATE_SUFFIX}"


def state_seq_of(name: str) -> int | None:
    """Read the seq out of the name of a kept state, None for other names."""
    digits = name.removeprefix(STATE_PREFIX).removesuffix(STATE_SUFFIX)
    if not digits.isascii() or not digits.isdigit() or name != state_name(int(digits)):
        return None
    return int(digits)
