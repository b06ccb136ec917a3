"""Explain: "why do you say it is dead?", in words, with the evidence and the story."""

from collections import deque
from typing import Final

import click

from crewlog.events import Identity, JsonObject, Worker
from crewlog.liveness import Flag, Liveness
from crewlog_cli import facts, shell, text
from crewlog_cli.shell import Shell, command

_EVENTS: Final = 50

_CAUSES: Final = {
    "recorded": "its end is on record",
    "abandoned": "it was announced and never started, and who announced it is dead",
    "reserved": "it was announced and has no process yet",
    "rebooted": "the machine has booted since its last event",
    "lease_released": "nobody holds its lease any more; the kernel took it back at its end",
    "foreign_host": "it was registered in another boot or on another host, and nothing of it is "
    "to be seen from here",
    "lease": "its lease is held, and only it can hold it",
    "found_in_namespace": "its very process was found among all that run, under another pid",
    "not_found": "its process is not among all that run, and from here all can be seen",
    "foreign_pid_namespace": "it lives in another pid namespace, and from here that cannot be "
    "looked into",
    "no_such_process": "no process has its pid",
    "pid_is_thread": "its pid is a thread's now",
    "pid_reused": "its pid belongs to another process now",
    "exited": "its process has ended and waits to be reaped by its parent",
    "identity": "the process with its pid is the very one that was registered",
    "start_time": "the process with its pid began at the very time that was recorded",
    "identity_unverifiable": "a process has its pid, and nothing tells whether it is the one",
}
_FLAGS: Final = {
    Flag.STALLED: "stalled: it has not said that it is well for longer than it promised",
    Flag.ORPHANED: "orphaned: the process that answers for it is dead",
    Flag.UNREACHABLE: "unreachable: nothing listens on its socket",
}
_ASSUME: Final = "crewlog gc --assume-dead SID --reason R"
_REMEDIES: Final = {
    "foreign_pid_namespace": "Look from its namespace, or as root from the first one; a worker "
    "with a lease is judged from anywhere",
    "foreign_host": f"Look on its host; if it is gone for good: {_ASSUME}",
    "identity_unverifiable": f"Look at the process; if it is another: {_ASSUME}",
}


@command("explain", examples="crewlog explain web-1\ncrewlog explain web-1 --json | jq .evidence")
@click.argument("sid", shell_complete=shell.complete_sid)
def explain(sh: Shell, *, sid: str) -> None:
    """Tell why a worker counts as alive, dead or unknown: the evidence now, and its events."""
    reg = sh.existing()
    worker = facts.known(reg, sid)
    found = reg.liveness(sid)
    story = deque(reg.history(sid=sid), maxlen=_EVENTS)
    if sh.json:
        sh.document(
            {
                "seq": reg.last_seq,
                "sid": sid,
                "verdict": found.verdict.value,
                "liveness": found.verdict.value,  # as every other command calls it
                "cause": found.cause,
                "because": because(found.cause),
                "flags": sorted(flag.value for flag in found.flags),
                "recorded": None if worker.identity is None else worker.identity.as_json(),
                "evidence": found.evidence.seen(),
                "worker": facts.worker_json(worker, found),
                "events": [facts.event_json(event) for event in story],
            }
        )
        return
    sh.line(f"{sid} is {found.verdict.value} ({found.cause}): {because(found.cause)}.")
    for flag in sorted(found.flags):
        sh.line(f"It is {_FLAGS[flag]}.")
    if worker.exit is not None:
        sh.line(f"It ended: {facts.end_text(worker)}, {text.exact(worker.updated_at, utc=sh.utc)}.")
    remedy = _REMEDIES.get(found.cause)
    if remedy is not None:
        sh.line(f"{sh.advice(remedy.replace('SID', sid))}.")
    sh.line("")
    _print_evidence(sh, worker, found)
    sh.line("")
    facts.print_events(sh, story)


def because(cause: str) -> str:
    """Say a cause in words."""
    return _CAUSES.get(cause, cause)


def _print_evidence(sh: Shell, worker: Worker, found: Liveness) -> None:
    """Put what was recorded beside what is seen now."""
    recorded: JsonObject = {} if worker.identity is None else worker.identity.as_json()
    recorded |= {"lease": worker.lease, "heartbeat_s": worker.heartbeat_s, "sock": worker.sock}
    recorded["owner"] = _owner(worker.owner)
    seen = found.evidence.seen()
    names = dict.fromkeys((*recorded, *seen))
    rows = [
        [name, _cell(recorded.get(name)), _cell(seen.get(name))]
        for name in names
        if recorded.get(name) not in {None, ""} or name in seen
    ]
    sh.table(["evidence", "recorded", "seen now"], rows)


def _owner(owner: Identity | None) -> str | None:
    return None if owner is None else str(owner)


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


COMMANDS: Final = {"explain": explain}
