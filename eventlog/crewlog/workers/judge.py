"""Judge whether workers live, hear their beats, and put their ends on record."""

import os
import time
from collections.abc import Callable, Collection
from typing import Final, Literal, TypeAlias

from crewlog.errors import (
    CrewlogError,
    InvalidTransition,
    LeaseMissing,
    ProcessNotFound,
    StaleRevision,
    WorkerExists,
)
from crewlog.model import arguments, codec
from crewlog.model.events import JsonObject, Status, Worker
from crewlog.model.steps import Author, ExitOptions, Step, burial_step, details_of, exit_step
from crewlog.process import identity, liveness, socket
from crewlog.process.evidence import witness
from crewlog.process.handle import Process
from crewlog.process.liveness import Evidence, Liveness, Verdict
from crewlog.session import Session
from crewlog.store import Store
from crewlog.workers.reaper import END_WAIT_S, PASSING

# A sid whose dead holder is replaced, or whose record changes, under us again and again.
CHANGE_TRIES: Final = 16

_NOTHING: Final = Evidence()


def liveness_of(session: Session, sid: str) -> Liveness:
    """Judge whether one worker lives, and ask its socket; see `Registry.liveness`."""
    worker = session.known(sid)
    answer = judge(session, [worker])[0]
    if not answer.alive or not worker.sock or not _is_of_this_boot(worker):
        return answer
    seen = answer.evidence._replace(sock=socket.ask(worker.sock))
    return liveness.judge(worker.identity, seen, final=False)


def judge(session: Session, workers: Collection[Worker]) -> list[Liveness]:
    """Judge many workers, now, in their order; no lock is held and nothing is written."""
    names = [w.lease for w in workers if w.lease is not None and not w.final]
    living = names or any(not worker.final for worker in workers)
    store = session.require() if living else None
    look = witness(
        since_boot=None if store is None else _since_boot(store, workers),
        local_file_system=store is None or store.one_host,
        leases=store.leases.look(names) if store is not None and names else None,
    ).look
    return [
        liveness.judge(
            worker.identity,
            _NOTHING
            if worker.final
            else look(
                worker.identity,
                last_event_at=worker.updated_at,
                owner=worker.owner,
                lease=worker.lease,
                heartbeat_s=worker.heartbeat_s,
                rev=worker.rev,
            ),
            final=worker.final,
        )
        for worker in workers
    ]


def _since_boot(store: Store, workers: Collection[Worker]) -> int | None:
    """Return since which seq this boot has written, if a worker of another one is to be judged."""
    here = identity.scope()
    for worker in workers:
        who = worker.identity
        if who is not None and not worker.final and who.boot_id != here.boot_id:
            return store.since_boot(here.boot_id)
    return None


def burial(session: Session, sid: str) -> list[Step]:
    """Return the step that records the death of a sid's holder; none if it is not proven."""
    worker = session.get(sid)
    if worker is None or worker.final:
        return []
    answer = judge(session, [worker])[0]
    return [death(session.author(), worker, answer)] if answer.dead else []


def taken(session: Session, held: WorkerExists) -> WorkerExists:
    """Return what to say of a sid whose holder lives, or may: with the ways out of the latter."""
    sid, worker = held.sid, session.get(held.sid)
    if worker is None:  # what holds it is not durable yet, or is gone again
        return held
    answer = judge(session, [worker])[0]
    if answer.verdict is not Verdict.UNKNOWN:
        return held
    return WorkerExists(
        sid,
        pid=worker.pid,
        rev=worker.rev,
        state=worker.state.value,
        remedy=f"From here nobody can tell whether it lives ({answer.cause}). If you know that it "
        f"does not: crewlog gc --assume-dead {sid}. A lease would tell: --lease, lease=True",
    )


BeatStatus: TypeAlias = Literal["busy", "idle", "waiting"]
STATUSES: Final[tuple[BeatStatus, ...]] = ("busy", "idle", "waiting")
_NOTE_CHARS_MAX: Final = 256


def beat(session: Session, sid: str, *, status: BeatStatus | None, note: str | None) -> None:
    """Say that a worker is well, now, and what it does; see `Registry.beat`."""
    said: JsonObject = {}
    if status is not None:
        if status not in STATUSES:
            message = f"status is one of {', '.join(STATUSES)}, not {status!r}"
            raise ValueError(message)
        said["status"] = status
    if note is not None:
        said["note"] = arguments.check_text(note, name="note", limit=_NOTE_CHARS_MAX)
    worker = session.known(sid)
    words = codec.dump(said) if said else None
    name, heartbeat_s = worker.lease, worker.heartbeat_s
    leases = session.require().leases
    if name is None or not leases.beat(name, heartbeat_s=heartbeat_s, said=words):
        raise LeaseMissing(sid)


# -- ends -------------------------------------------------------------------------------


def same(session: Session, worker: Worker) -> Worker:
    """Return the worker as it is now.

    Raises: StaleRevision if the sid is another's by now.
    """
    now = session.get(worker.sid)
    if now is None or now.registered_seq != worker.registered_seq:
        actual = None if now is None else now.rev
        raise StaleRevision(worker.sid, expected=worker.rev, actual=actual)
    return now


def record_end(
    append: Callable[[list[Step]], object],
    step: Step,
    *,
    pause_s: float,
    passing: tuple[type[CrewlogError], ...] = PASSING,
    late: Callable[[CrewlogError], None] | None = None,
) -> bool:
    """Write a step about the end of a worker of ours; False if the sid is another's by now.

    A worker that is recorded as ended already, in another way than lost, stays as it is. After
    an error that is `passing` it is tried again for END_WAIT_S, for nobody else knows as surely how
    it ended; `late` is told once.
    """
    deadline = time.monotonic() + END_WAIT_S
    while True:
        try:
            append([step])
        except StaleRevision:
            return False
        except InvalidTransition:
            return True
        except passing as error:
            if time.monotonic() > deadline:
                raise
            if late is not None:
                late(error)
                late = None
        else:
            return True
        # The error is gone, and what it kept open. Many that ended at once must not meet again.
        time.sleep(pause_s * (0.5 + os.urandom(1)[0] / 256))


def runs_here(worker: Worker) -> bool:
    """Say whether the very process of a worker runs in this namespace, whatever is recorded."""
    seen = witness().look(worker.identity, last_event_at=worker.updated_at)
    answer = liveness.judge(worker.identity, seen, final=False)
    return answer.alive and answer.cause in {"identity", "start_time"}


def _is_of_this_boot(worker: Worker) -> bool:
    """Say whether a worker's pid and paths may be looked at: on another host they are others'."""
    return worker.identity is not None and worker.identity.boot_id == identity.scope().boot_id


def is_exiting(worker: Worker) -> bool:
    """Say whether a living worker's process is on its way out: it may have let go of locks already.

    The kernel closes what a process has open before it counts as ended.
    """
    who, here = worker.identity, identity.scope()
    ours = who is not None and (who.boot_id, who.pid_ns) == (here.boot_id, here.pid_ns)
    return ours and identity.is_exiting(worker.pid)  # elsewhere, that pid is another's


def hold(worker: Worker) -> Process | None:
    """Hold a worker's process; None if it has ended, or is of another host."""
    if worker.identity is None or not _is_of_this_boot(worker):
        return None
    try:
        return Process(worker.identity)
    except ProcessNotFound:
        return None


def exit_of(author: Author, sid: str, status: Status, *, of: int, details: JsonObject) -> Step:
    """Return the step that records how a child ended, and what else is known of that."""
    how: ExitOptions = {"code": status.code, "signal": status.signal, "source": status.source}
    return exit_step(author, sid, how, of=of, details={**details_of(status), **details})


def death(
    author: Author,
    worker: Worker,
    answer: Liveness,
    *,
    status: Status | None = None,
    details: JsonObject | None = None,
) -> Step:
    """Return the step that records a proven death, if the sid is still that worker's."""
    return burial_step(
        author,
        worker.sid,
        cause=answer.cause,
        evidence=answer.evidence.seen(),
        status=status or status_in(answer),
        details=details,
        of=worker.registered_seq,
    )


def status_in(answer: Liveness) -> Status | None:
    """Return how the process ended, if the evidence tells."""
    seen = answer.evidence
    if seen.exit_source is None:
        return None
    return Status(seen.exit_code, seen.exit_signal, seen.exit_source)
