"""Collect changes that become durable together, or not at all."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, Unpack

from crewlog.model.steps import (
    BATCH_EVENTS_MAX,
    Appended,
    Author,
    ExitOptions,
    Step,
    UpdateOptions,
    WorkerOptions,
    exit_step,
    release_step,
    update_step,
    wish_of,
)
from crewlog.workers.register import captured, seen_socket


class Batch:
    """Changes that become durable together, or not at all; made by `Registry.batch`."""

    def __init__(
        self,
        author: Author,
        commit: Callable[[Sequence[Step]], Appended],
        *,
        sock_of: Callable[[str], str | None],
    ) -> None:
        """Begin empty; `commit` writes steps as one unit, `sock_of` tells a worker's socket."""
        self._author = author
        self._commit = commit
        self._outer_sock_of = sock_of
        self._socks: dict[str, str] = {}  # as the changes so far leave them, by sid
        self._steps: list[Step] = []
        self.last_seq: int | None = None

    def register(
        self, sid: str, *, pid: int | None = None, **options: Unpack[WorkerOptions]
    ) -> None:
        """Add a registration; see `Registry.register`. It takes no dead holder's sid over."""
        wish = wish_of(options)
        if wish.lease or wish.heartbeat_s is not None:
            message = "a batch makes no lease: register that worker by itself"
            raise ValueError(message)
        self._add(captured(self._author, sid, pid, wish))
        self._socks[sid] = wish.sock

    def update(self, sid: str, **options: Unpack[UpdateOptions]) -> None:
        """Add an update; see `Registry.update`."""
        seen = seen_socket(sid, options, self._sock_of)
        self._add(update_step(self._author, sid, options, seen=seen))
        if (sock := options.get("sock")) is not None:
            self._socks[sid] = sock

    def _sock_of(self, sid: str) -> str | None:
        return self._socks[sid] or None if sid in self._socks else self._outer_sock_of(sid)

    def exited(self, sid: str, **options: Unpack[ExitOptions]) -> None:
        """Add an end; see `Registry.exited`."""
        self._add(exit_step(self._author, sid, options))

    def remove(
        self, sid: str, *, reason: str = "crewlog.remove", expect: int | None = None
    ) -> None:
        """Add a removal; see `Registry.remove`."""
        self._add(release_step(self._author, sid, reason=reason, expect=expect))

    def _add(self, step: Step) -> None:
        if len(self._steps) >= BATCH_EVENTS_MAX:
            message = f"a batch holds at most {BATCH_EVENTS_MAX} events"
            raise ValueError(message)
        self._steps.append(step)

    def __enter__(self) -> Self:
        """Begin to collect."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write all of it, durable on return; nothing at all if the block raised."""
        if error is None and self._steps:
            self.last_seq = self._commit(self._steps).seq
