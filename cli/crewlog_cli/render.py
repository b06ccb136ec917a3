"""Say what workers and events are, as JSON, and how a worker stands and ended in words."""

import signal
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Final, NamedTuple

from crewlog import Flag, Liveness
from crewlog.errors import WorkerNotFound
from crewlog.model import figures
from crewlog.model.choice import LabelTest
from crewlog.model.events import (
    ENDING,
    EXITED,
    LOST,
    Event,
    Exit,
    Worker,
    WorkerState,
    timestamp,
)
from crewlog.model.items import Reset
from crewlog.registry import Registry
from crewlog.workers import output as logs
from crewlog_cli import text
from crewlog_cli.shell import Shell


def worker_json(worker: Worker, liveness: Liveness | None) -> dict[str, object]:
    """Return a worker as the CLI's JSON shows it."""
    ended = worker.exit
    return {
        "sid": worker.sid,
        "pid": worker.pid,
        "sock": worker.sock,
        "version": worker.version,
        "created_at": timestamp(worker.created_at),
        "state": worker.state.value,
        "liveness": None if liveness is None else liveness.verdict.value,
        "cause": None if liveness is None else liveness.cause,
        "flags": [] if liveness is None else sorted(flag.value for flag in liveness.flags),
        "labels": dict(worker.labels),
        "meta": dict(worker.meta),
        "rev": worker.rev,
        "updated_at": timestamp(worker.updated_at),
        "generation": worker.generation,
        "registered_seq": worker.registered_seq,
        "identity": None if worker.identity is None else worker.identity.as_json(),
        "owner": None if worker.owner is None else worker.owner.as_json(),
        "lease": worker.lease,
        "heartbeat_s": worker.heartbeat_s,
        "exit": None if ended is None else exit_json(ended),
        **_more_json(worker, liveness),
    }


def exit_json(ended: Exit) -> dict[str, object]:
    """Return how a worker ended as the CLI's JSON shows it; details only where they are known."""
    details = {
        "ok": ended.ok or None,
        "core": ended.core or None,
        "max_rss_bytes": ended.max_rss_bytes,
        "cpu_s": ended.cpu_s,
        "error": ended.error,
        "message": ended.message,
        "oom": None if ended.oom is None else ended.oom.as_json(),
        "tail": ended.tail,
    }
    return {
        "code": ended.code,
        "signal": ended.signal,
        "source": ended.source,
        "expected": ended.expected,
        "cause": ended.cause,
        **{key: value for key, value in details.items() if value is not None},
    }


def _more_json(worker: Worker, liveness: Liveness | None) -> dict[str, object]:
    """Return what only some workers have."""
    log, group = worker.log, worker.group
    more: dict[str, object] = {
        "ok_codes": list(worker.ok_codes) or None,
        "ends_with": worker.ends_with,
        "log": None
        if log is None
        else {"path": log.path, "dev": log.dev, "ino": log.ino, "offset": log.offset},
        "group": None
        if group is None
        else {"session": group.session, "pgid": group.pgid, "cgroup": group.cgroup},
        "argv": None if worker.argv is None else list(worker.argv),
        "cwd": worker.cwd,
        "status": None if liveness is None else liveness.status,
        "note": None if liveness is None else liveness.note,
    }
    return {key: value for key, value in more.items() if value is not None}


def event_json(event: Event) -> dict[str, object]:
    """Return an event as the CLI's JSON shows it."""
    return {
        "seq": event.seq,
        "ts": timestamp(event.ts),
        "type": event.type,
        "sid": event.sid,
        "actor": event.actor,
        "data": event.data,
    }


def reset_json(item: Reset) -> dict[str, object]:
    """Return what a watcher did not get, as the CLI's JSON shows it."""
    return {"kind": "reset", "seq": item.seq, "reason": item.reason, "lost": item.lost}


def reset_text(item: Reset) -> str:
    """Say what a Reset means."""
    if item.lost is None:
        return (
            f"-- this store was never that far: another one is in place, or the position is wrong; "
            f"on from its seq {item.seq} --"
        )
    return f"-- events {item.lost[0]} to {item.lost[1]} are gone; on from seq {item.seq} --"


def known(reg: Registry, sid: str) -> Worker:
    """Return a worker.

    Raises: WorkerNotFound, which names the nearest sids.
    """
    worker = reg.get(sid)
    if worker is None:
        raise not_found(reg, sid)
    return worker


def no_such_labels(tests: Iterable[LabelTest]) -> WorkerNotFound:
    """Return the error of labels that nobody has."""
    error = WorkerNotFound(" ".join(map(str, tests)))
    error.what = f"no worker has the labels {error.sid}"
    error.remedy = "`crewlog ls -a -o columns=sid,labels` shows who has which"
    return error


def not_found(reg: Registry, sid: str, *, in_history: bool = False) -> WorkerNotFound:
    """Return the error of an unknown sid, with the nearest names as the hint.

    `in_history`: it was looked for there, too.
    """
    from difflib import get_close_matches  # noqa: PLC0415 (start-up)

    error = WorkerNotFound(sid)
    near = get_close_matches(sid, [worker.sid for worker in reg.workers(all=True)], n=3)
    lead = f"Did you mean {', '.join(near)}? Else see" if near else "See"
    error.remedy = f"{lead} `crewlog ls --all`"
    if not in_history:
        error.remedy += f"; what is no longer listed may be in `crewlog history --sid {sid}`"
    return error


def liveness_text(liveness: Liveness) -> str:
    """Say a verdict, with its flags, and its cause where it does not go without saying."""
    if liveness.alive:
        flags = sorted(flag.value for flag in liveness.flags)
        return ", ".join((liveness.verdict.value, *flags, *filter(None, (liveness.status,))))
    if liveness.cause == "recorded":
        return liveness.verdict.value
    return f"{liveness.verdict.value} ({liveness.cause})"


class Before(NamedTuple):
    """What the history knows of a worker beside its record: None where it was not looked for."""

    seen_at: datetime | None = None  # of a lost one: the last proof of its life
    ended: Event | None = None  # how the life before this one ended


_BEFORE_S: Final = 0.2  # a list waits no longer for what came before


def before(reg: Registry, workers: Iterable[Worker]) -> dict[str, Before]:
    """Look back: when lost workers were last heard of, how the lives before ended.

    From the newest event on, for a moment: what lies further back is left out.
    """
    lost = {worker.sid: worker for worker in workers if worker.state == WorkerState.LOST}
    again = {worker.sid: worker for worker in workers if worker.generation > 1}
    by_sid: dict[str, Before] = {}
    deadline = time.monotonic() + _BEFORE_S
    if not lost and not again:
        return by_sid
    for event in reg.history(sids=[*lost, *again], newest_first=True):
        sid = event.sid
        known = by_sid.get(sid, Before())
        if sid in lost and known.seen_at is None and event.seq < lost[sid].rev:
            known = by_sid[sid] = known._replace(seen_at=event.ts)
        if sid in again and event.seq < again[sid].registered_seq and event.type in ENDING:
            by_sid[sid] = known._replace(ended=event)
            del again[sid]
        done = all(by_sid.get(sid, Before()).seen_at for sid in lost) and not again
        if done or time.monotonic() > deadline:
            break
    return by_sid


def status_text(
    worker: Worker, liveness: Liveness | None, now: datetime, seen_at: datetime | None = None
) -> str:
    """Say how a worker stands, in the words of docker and kubectl: ready, crashed (3) 5s ago.

    `seen_at` is the last proof of life of a lost one, where that is known.
    """
    if worker.final:
        return _ended_text(worker, now, seen_at)
    words = [worker.state.value]
    if worker.state == WorkerState.STARTING:
        words[0] += f" {figures.brief(now - worker.created_at)}"
    elif worker.state in {WorkerState.DRAINING, WorkerState.STOPPING}:
        words[0] += f" {figures.brief(now - worker.updated_at)}"
    if liveness is None:
        return words[0]
    if liveness.dead:
        return f"dead ({liveness.cause})"
    if not liveness.alive:
        return f"{words[0]}, unknown ({liveness.cause})"
    flags = {flag.value for flag in liveness.flags}
    if Flag.PAUSED in liveness.flags:
        words[0] = Flag.PAUSED.value
    words += sorted(flags - {Flag.PAUSED.value})
    if liveness.status:
        words.append(liveness.status)
    return ", ".join(words)


def _ended_text(worker: Worker, now: datetime, seen_at: datetime | None) -> str:
    ended, word = worker.exit, end_word(worker)
    if worker.state == WorkerState.LOST and seen_at is not None:
        return f"{word}, last seen {figures.brief(now - seen_at)} ago"
    how = "" if ended is None else _code(ended.code, ended.signal)
    if word == "stopped" or worker.state == WorkerState.RELEASED:
        how = ""
    return f"{word}{how} {figures.brief(now - worker.updated_at)} ago"


def _code(code: object, number: object) -> str:
    """Write how it ended in brackets: an exit code, or the name of a signal."""
    if isinstance(number, int):
        return f" ({signal_name(number)})"
    return "" if code is None else f" ({code})"


def restarts_text(worker: Worker, ended: Event | None, now: datetime) -> str:
    """Say how often a sid was started again, and how its last life ended; "" for never."""
    if worker.generation <= 1:
        return ""
    count = worker.generation - 1
    if ended is None:
        return str(count)
    if ended.type == LOST:  # when, nobody saw
        return f"{count}, last lost"
    word, how = ended_word(ended), ""
    if word in {"crashed", "exited"}:
        how = _code(ended.data.get("code"), ended.data.get("signal"))
    return f"{count}, last {word}{how} {figures.brief(now - ended.ts)} ago"


def end_text(worker: Worker, seen_at: datetime | None = None, *, utc: bool = True) -> str:
    """Say in one sentence how a worker ended, as far as anybody could tell.

    `seen_at` is the last proof of life of a lost one, where that is known.
    """
    ended = worker.exit
    if ended is None:
        return ""
    when = f"{figures.spoken(worker.updated_at - worker.created_at)} after its start"
    if worker.state == WorkerState.LOST:
        when = "nobody saw when"
        if seen_at is not None:
            first, last = (text.exact(t, utc=utc) for t in (seen_at, worker.updated_at))
            when = f"it died between {first} and {last}"
    parts = [_how(ended), _want(ended), when]
    if ended.max_rss_bytes is not None:
        parts.append(f"at most {figures.size(ended.max_rss_bytes)} of memory")
    if ended.cpu_s is not None and ended.cpu_s >= _CPU_MIN_S:
        parts.append(f"{ended.cpu_s:.1f} s of processor time")
    if ended.message:
        parts.append(f"saying: {ended.message}")
    return f"{end_word(worker)}: {', '.join(filter(None, parts))} (source: {ended.source})"


_CPU_MIN_S: Final = 0.1


def end_word(worker: Worker) -> str:
    """Say in one word how a worker ended, "" while it has not."""
    ended = worker.exit
    if ended is None:
        return ""
    if worker.state == WorkerState.FAILED:
        return "crashed"
    if worker.state == WorkerState.LOST:
        return "lost"
    if worker.state == WorkerState.RELEASED:
        return "removed"
    return "stopped" if ended.expected and not ended.ok else "exited"


def ended_word(ended: Event) -> str:
    """Say in the same words how a life ended, by the event of its end."""
    if ended.type != EXITED:
        return "lost" if ended.type == LOST else "removed"
    if ended.crashed:
        return "crashed"
    return "stopped" if ended.expected and ended.data.get("ok") is not True else "exited"


def _how(ended: Exit) -> str:
    if ended.error is not None:
        return f"its program did not start ({ended.error})"
    if ended.signal is not None:
        dumped = ", core dumped" if ended.core else ""
        return f"signal {ended.signal} ({signal_name(ended.signal)}){dumped}"
    if ended.code is not None:
        return f"code {ended.code}" + (", which is no crash for it" if ended.ok else "")
    return ended.cause or "nobody could tell how"


def _want(ended: Exit) -> str:
    """Say what is known of a lack of memory."""
    oom = ended.oom
    if oom is None:
        return ""
    limit = "" if oom.limit_bytes is None else f", limit {figures.size(oom.limit_bytes)}"
    if oom.proven:
        return f"by the kernel, out of memory (cgroup {oom.cgroup}{limit})"
    kills = "1 oom kill" if oom.kills == 1 else f"{oom.kills} oom kills"
    return f"its cgroup {oom.cgroup} had {kills} about then{limit}"


def signal_name(number: int) -> str:
    """Return the name of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:  # of another system, or real-time
        return f"SIG{number}"


_LAST_LINES: Final = 5


def print_last_lines(sh: Shell, worker: Worker) -> None:
    """Print the last lines that a worker wrote, if its log is there, or was kept."""
    kept = worker.exit.tail if worker.exit is not None else None
    rows = [] if worker.log is None else logs.last_lines(worker.log, _LAST_LINES)
    if not rows and kept:
        rows = kept.splitlines()[-_LAST_LINES:]
    if rows:
        sh.line("last lines of its output:")
        for row in rows:
            sh.line(f"  | {row}")
