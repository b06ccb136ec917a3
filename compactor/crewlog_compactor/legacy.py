"""Import the registry.json of the system that this one succeeds: `{"sessions": […]}`.

Its entries carry a pid but no start identity. A process that began after its entry was made is a
stranger; the entry is then recorded as registered and lost, like one whose process is gone.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from crewlog.errors import LegacyCorrupt, ProcessNotFound, StorageFailed, from_oserror
from crewlog.model import arguments, codec
from crewlog.model.events import JsonObject, JsonValue, timestamp
from crewlog.model.snapshot import SNAPSHOT_BYTES_MAX
from crewlog.model.steps import Step, Wish, describe_worker, import_step, loss_step
from crewlog.process import identity
from crewlog.registry import Registry

_SLACK = timedelta(seconds=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What was imported, by sid: `living` as they are, `lost` as lost; `skipped` says why."""

    living: tuple[str, ...]
    lost: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    seq: int


@dataclass(frozen=True, slots=True)
class _Entry:
    sid: str
    pid: int
    sock: str
    version: str
    created_at: datetime | None


# A unit holds 10,000 events of 16 MiB: a dead worker takes two, and a character up to six bytes.
_UNIT_WORKERS_MAX: Final = 5_000
_UNIT_CHARS_MAX: Final = 2 * 1024 * 1024
_PLAIN_CHARS: Final = 300


def import_legacy(reg: Registry, source: str | os.PathLike[str]) -> ImportReport:
    """Register every worker of an older registry.json; durable on return.

    In a directory thousands of workers are one unit, on etcd a hundred; where it is interrupted
    between two of them it is run again.

    Of several entries with one sid the first counts, as it did there; sids that the registry holds
    already are skipped.
    Raises: LegacyCorrupt if the file is not such a registry, and then nothing is written;
    StorageFailed if it cannot be read.
    """
    entries = _read(Path(source))
    living: list[str] = []
    lost: list[str] = []
    skipped: list[tuple[str, str]] = []
    parts: list[tuple[_Entry, list[Step]]] = []
    seen: set[str] = set()
    for entry in entries:
        if entry.sid in seen:
            skipped.append((entry.sid, "an earlier entry has the same sid"))
        elif reg.get(entry.sid) is not None:
            skipped.append((entry.sid, "the registry holds this sid already"))
        else:
            seen.add(entry.sid)
            added, alive = _steps(reg, entry)
            parts.append((entry, added))
            (living if alive else lost).append(entry.sid)
    seq = reg.last_seq
    for unit in _units(parts, min(reg.unit_workers_max, _UNIT_WORKERS_MAX) if parts else 1):
        seq = reg.commit(unit).seq
    return ImportReport(living=tuple(living), lost=tuple(lost), skipped=tuple(skipped), seq=seq)


def _units(parts: Sequence[tuple[_Entry, list[Step]]], most: int) -> Iterator[list[Step]]:
    """Put the steps of at most so many workers together, and no more than a unit holds."""
    unit: list[Step] = []
    workers = size = 0
    for entry, steps in parts:
        more = len(entry.sock) + len(entry.version) + _PLAIN_CHARS
        if workers == most or size + more > _UNIT_CHARS_MAX:
            yield unit
            unit, workers, size = [], 0, 0
        unit += steps
        workers, size = workers + 1, size + more
    if unit:
        yield unit


def _steps(reg: Registry, entry: _Entry) -> tuple[list[Step], bool]:
    author = reg.author()
    cause = None
    who = None
    try:
        who = identity.capture(entry.pid)
    except ProcessNotFound:
        cause = "no_such_process"
    began = None if who is None else identity.started_at(who)
    if began is not None and entry.created_at is not None and began - _SLACK > entry.created_at:
        who, cause = None, "pid_reused"
    register = import_step(
        author,
        entry.sid,
        pid=entry.pid,
        who=who,
        sock=entry.sock,
        version=entry.version,
        created_at=None if entry.created_at is None else timestamp(entry.created_at),
    )
    if cause is None:
        return [register], True
    evidence: JsonObject = {"import": "the entry had no start identity"}
    return [
        register,
        loss_step(author, entry.sid, cause=cause, evidence=evidence, expect=None),
    ], False


def _read(source: Path) -> list[_Entry]:
    where = str(source)
    try:
        if source.stat().st_size > SNAPSHOT_BYTES_MAX:
            raise StorageFailed(
                "cannot import",
                where=where,
                why="it is larger than a registry can be",
                remedy="Check that it is the registry.json of the older system",
            )
        data = source.read_bytes()
    except OSError as error:
        raise from_oserror(error, "cannot read the older registry", where=where) from error
    try:
        document = codec.load_object(data)
    except codec.DocumentError as error:
        raise LegacyCorrupt(where, why=str(error)) from error
    sessions = document.get("sessions")
    if not isinstance(sessions, list):
        raise LegacyCorrupt(where, why='it has no list "sessions"')
    return [_entry(where, number, value) for number, value in enumerate(sessions)]


def _entry(where: str, number: int, value: JsonValue) -> _Entry:
    if not isinstance(value, dict):
        raise LegacyCorrupt(where, why=f"session {number} is not an object")
    sid, pid = value.get("sid"), value.get("pid")
    sock, version = value.get("sock", ""), value.get("version", "")
    sock, version = (text if isinstance(text, str) else "" for text in (sock, version))
    try:
        describe_worker(Wish(sock=sock, version=version))
        return _Entry(
            sid=arguments.check_sid(sid),
            pid=identity.check_pid(pid),
            sock=sock,
            version=version,
            created_at=_time(value.get("created_at")),
        )
    except (TypeError, ValueError) as error:
        raise LegacyCorrupt(where, why=f"session {number}: {error}") from error


_EPOCH: Final = re.compile(r"[0-9]{1,19}")


def _time(value: object) -> datetime | None:
    """Read a time as text or as seconds since the epoch; None where it tells nothing."""
    if isinstance(value, str):
        try:
            when = datetime.fromisoformat(value)
        except ValueError:
            if not _EPOCH.fullmatch(value):
                return None
            value = int(value)
        else:
            try:
                return when.replace(tzinfo=when.tzinfo or UTC).astimezone(UTC)
            except OverflowError:  # before the year 1 or after 9999
                return None
    if isinstance(value, int | float) and 0 < value < 1e11:  # noqa: PLR2004 (the year 5138)
        return datetime.fromtimestamp(value, UTC)
    return None
