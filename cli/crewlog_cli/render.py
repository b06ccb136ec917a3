"""Say what workers and events are, as JSON and in the rows of tables."""

import signal
from collections.abc import Iterable
from typing import Final

from crewlog import Liveness
from crewlog.errors import WorkerNotFound
from crewlog.model import figures
from crewlog.model.events import EXITED, Event, Exit, Worker, WorkerState, timestamp
from crewlog.model.items import Reset
from crewlog.registry import Registry
from crewlog.workers import output as logs
from crewlog_cli.shell import Shell


def worker_json(worker: Worker, found: Liveness | None) -> dict[str, object]:
    """Return a worker as the CLI's JSON shows it."""
    ended = worker.exit
    return {
        "sid": worker.sid,
        "pid": worker.pid,
        "sock": worker.sock,
        "version": worker.version,
        "created_at": timestamp(worker.created_at),
        "state": worker.state.value,
        "liveness": None if found is None else found.verdict.value,
        "cause": None if found is None else found.cause,
        "flags": [] if found is None else sorted(flag.value for flag in found.flags),
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
        **_more_json(worker, found),
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


def _more_json(worker: Worker, found: Liveness | None) -> dict[str, object]:
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
        "status": None if found is None else found.status,
        "note": None if found is None else found.note,
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


def event_row(shell: Shell, event: Event) -> list[str]:
    """Return an event as a table shows it."""
    return [
        str(event.seq),
        shell.when(event.ts),
        event.type,
        event.sid,
        data_text(event),
        actor_text(event),
    ]


def actor_text(event: Event) -> str:
    """Name who did it: a given name, else user and program; and its process, for there are many."""
    actor = event.actor
    name, user, program = actor.get("name"), actor.get("user"), actor.get("program")
    who = name if isinstance(name, str) else f"{user}@{program}"
    return f"{who}[{actor.get('pid')}]" if user is not None else "crewlog"


_TELLING: Final = (
    *("pid", "code", "signal", "cause", "reason", "state", "labels", "version", "sock", "meta"),
    *("error", "message"),
)


def data_text(event: Event) -> str:
    """Say the telling part of an event's data in a few words."""
    told = []
    for key in _TELLING:
        value = event.data.get(key)
        if value is None or value in ("", {}):
            continue
        if isinstance(value, dict):
            told += [f"-{k}" if v is None else f"{k}={_short(v)}" for k, v in value.items()]
        else:
            told.append(f"{key}={value}")
    oom = event.data.get("oom")
    if isinstance(oom, dict):
        told.append("out of memory" if oom.get("proven") else "oom kills in its cgroup")
    if event.type == EXITED:  # a crash must not read like an end that was asked for
        told.append(
            "crashed" if event.crashed else "as asked" if event.data.get("expected") else ""
        )
    return " ".join(filter(None, told))


_VALUE_CHARS: Final = 40


def _short(value: object) -> str:
    """Write a value of labels or meta, cut where it is long: --json has all of it."""
    words = str(value)
    return words if len(words) <= _VALUE_CHARS else f"{words[: _VALUE_CHARS - 1]}…"


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
        raise _not_found(reg, sid)
    return worker


def _not_found(reg: Registry, sid: str) -> WorkerNotFound:
    """Return the error of an unknown sid, with the nearest names as the hint."""
    from difflib import get_close_matches  # noqa: PLC0415 (start-up)

    error = WorkerNotFound(sid)
    near = get_close_matches(sid, [worker.sid for worker in reg.workers(all=True)], n=3)
    lead = f"Did you mean {', '.join(near)}? Else see" if near else "See"
    history = f"`crewlog history --sid {sid}`"
    error.remedy = f"{lead} `crewlog ls --all`; what is no longer listed may be in {history}"
    return error


def liveness_text(found: Liveness) -> str:
    """Say a verdict, with its flags, and its cause where it does not go without saying."""
    if found.alive:
        flags = sorted(flag.value for flag in found.flags)
        return ", ".join((found.verdict.value, *flags, *filter(None, (found.status,))))
    if found.cause == "recorded":
        return found.verdict.value
    return f"{found.verdict.value} ({found.cause})"


def end_text(worker: Worker) -> str:
    """Say in one sentence how a worker ended, as far as anybody could tell."""
    ended = worker.exit
    if ended is None:
        return ""
    after = figures.spoken(worker.updated_at - worker.created_at)
    told = [_how(ended), _want(ended), f"{after} after its start"]
    if ended.max_rss_bytes is not None:
        told.append(f"at most {figures.size(ended.max_rss_bytes)} of memory")
    if ended.cpu_s is not None and ended.cpu_s >= _CPU_MIN_S:
        told.append(f"{ended.cpu_s:.1f} s of processor time")
    if ended.message:
        told.append(f"saying: {ended.message}")
    return f"{end_word(worker)}: {', '.join(filter(None, told))} (source: {ended.source})"


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


def print_events(sh: Shell, found: Iterable[Event]) -> None:
    """Print events as a table."""
    rows = [event_row(sh, event) for event in found]
    sh.table(["seq", f"time ({sh.offset()})", "event", "sid", "data", "by"], rows)


def print_line(sh: Shell, event: Event) -> None:
    """Print one event as a line of a stream, flushed."""
    sh.line("  ".join(part for part in event_row(sh, event) if part), flush=True)
