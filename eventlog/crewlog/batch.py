"""Collect changes that become durable together, or not at all."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from crewlog import changes, layout
from crewlog.appending import Appended
from crewlog.changes import Author, Step
from crewlog.events import JsonValue


class Batch:
    """Changes that become durable together, or not at all; made by `Registry.batch`."""

    def __init__(
        self,
        author: Author,
        commit: Callable[[list[Step]], Appended],
        *,
        sock_of: Callable[[str], str | None],
    ) -> None:
        """Begin empty; `commit` writes steps as one unit, `sock_of` tells a worker's socket."""
        self._author = author
        self._commit = commit
        self._sock_of = sock_of
        self._steps: list[Step] = []
        self.last_seq: int | None = None

    def register(
        self,
        sid: str,
        *,
        pid: int | None = None,
        sock: str = "",
        version: str = "",
        labels: Mapping[str, str] | None = None,
        meta: Mapping[str, JsonValue] | None = None,
        ready: bool = False,
        owner: int | None = None,
    ) -> None:
        """Add a registration; see `Registry.register`. It takes no dead holder's sid over."""
        self._add(
            changes.registered(
                self._author,
                sid,
                pid=pid,
                sock=sock,
                version=version,
                labels=labels,
                meta=meta,
                ready=ready,
                owner=owner,
            )
        )

    def update(
        self,
        sid: str,
        *,
        state: str | None = None,
        sock: str | None = None,
        version: str | None = None,
        labels: Mapping[str, str | None] | None = None,
        meta: Mapping[str, JsonValue] | None = None,
        reason: str | None = None,
        expect: int | None = None,
    ) -> None:
        """Add an update; see `Registry.update`."""
        self._add(
            changes.updated(
                self._author,
                sid,
                state=state,
                sock=sock,
                version=version,
                labels=labels,
                meta=meta,
                reason=reason,
                expect=expect,
                sock_of=self._sock_of,
            )
        )

    def exited(
        self,
        sid: str,
        *,
        code: int | None = None,
        signal: int | None = None,
        source: str = "self",
        expect: int | None = None,
    ) -> None:
        """Add an end; see `Registry.exited`."""
        self._add(
            changes.exited(
                self._author, sid, code=code, signal=signal, source=source, expect=expect
            )
        )

    def remove(self, sid: str, *, reason: str, expect: int | None = None) -> None:
        """Add a removal; see `Registry.remove`."""
        self._add(changes.released(self._author, sid, reason=reason, expect=expect))

    def _add(self, step: Step) -> None:
        if len(self._steps) >= layout.BATCH_EVENTS_MAX:
            message = f"a batch holds at most {layout.BATCH_EVENTS_MAX} events"
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
