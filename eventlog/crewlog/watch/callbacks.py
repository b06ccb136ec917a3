"""Call a function for every item, in a thread of its own; wait for a state as wished."""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Literal, TypeAlias

from crewlog.errors import Unsupported, WaitTimeout
from crewlog.host import Closable
from crewlog.model import arguments
from crewlog.model.events import Worker
from crewlog.model.items import Item
from crewlog.model.state import State
from crewlog.watch import wake
from crewlog.watch.watch import Watch

RETRY_MAX_S: Final = 30.0

_logger = logging.getLogger("crewlog.subscribe")
OnError: TypeAlias = Literal["stop", "retry", "skip"]


def check_on_error(on_error: object) -> None:
    """Raise ValueError for what is no way to go on after an error."""
    if on_error not in {"stop", "retry", "skip"}:
        message = f"on_error is stop, retry or skip, not {on_error!r}"
        raise ValueError(message)


def _error_of(raised: BaseException) -> Exception:
    """Return what says that a callback wanted to end more than itself: a thread cannot."""
    error = RuntimeError(f"the callback raised {raised!r}")
    error.__cause__ = raised
    return error


class Subscription(Closable):
    """A thread that calls back for every item, in order, one at a time.

    A callback that is slow or raises affects no other subscriber; what it raises is logged always.
    `on_error`: "stop" ends the subscription, keeps the error in `error`, and raises it again from
    `close` and the end of the block, once; "retry" calls again with the same item, ever less often;
    "skip" goes on.
    """

    def __init__(
        self, watch: Watch, callback: Callable[[Item], object], *, on_error: OnError
    ) -> None:
        """Use `Registry.subscribe`."""
        self.error: Exception | None = None
        self._raised = False  # `close` has told of the error
        self._watch = watch
        self._callback = callback
        self._on_error = on_error
        self._closing = threading.Event()
        # unlike our other threads it hears signals: what a callback starts would be born deaf
        self._thread = threading.Thread(target=self._run, name="crewlog-subscribe", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # EAGAIN
            watch.close()
            raise Unsupported(
                "no thread to subscribe by",
                why=str(error),
                remedy="Raise the limit of processes (ulimit -u), or use watch",
            ) from error

    def _run(self) -> None:
        with self._watch as items:
            try:
                for item in items:
                    if not self._call(item):
                        return
                    if items.has_cursor:  # now: there is no next take once it is closed
                        items.ack(item)
            except Exception as error:
                _logger.exception("a subscription ends")
                self.error = error

    def _call(self, item: Item) -> bool:
        """Call back until it works or is given up; say whether to go on."""
        pause_s = wake.POLL_MIN_S
        while not self._closing.is_set():
            try:
                self._callback(item)
            except BaseException as raised:
                error = raised if isinstance(raised, Exception) else _error_of(raised)
                _logger.exception("a subscriber raised on seq %d", item.seq)
                if self._on_error == "stop":
                    self.error = error
                    return False
                if self._on_error == "skip":
                    return True
                self._closing.wait(pause_s)
                pause_s = min(pause_s * 2, RETRY_MAX_S)
            else:
                return True
        return False

    @property
    def alive(self) -> bool:
        """Say whether it still calls back."""
        return self._thread.is_alive()

    def close(self, *, timeout_s: float | None = None) -> None:
        """End it, and wait for a callback under way; from the callback itself, only end it.

        A callback that returns has its item acknowledged to the cursor, the last one too.

        Raises: the error that had ended it, the first time.
        """
        self._end(timeout_s)
        if self.error is not None and not self._raised:
            self._raised = True
            raise self.error

    def _end(self, timeout_s: float | None = None) -> None:
        if timeout_s is not None:
            timeout_s = arguments.check_wait(timeout_s)
        self._closing.set()
        self._watch.end()  # not closed: what the callback does just now is still acknowledged
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
            if not self._thread.is_alive():  # it has closed it; a forked child has no such thread
                self._watch.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; an error of the block itself goes first."""
        if error is None:
            self.close()
        else:
            self._end()


class Mirror(Closable):
    """The state of now, and a way to wait until it is as wished; one thread at a time waits."""

    def __init__(self, watch: Watch, state: Callable[[], State]) -> None:
        """Use `Registry.mirror`."""
        self._watch = watch
        self._state = state

    @property
    def state(self) -> State:
        """Return the durable state of now; only what changed since the last look is read."""
        return self._state()

    def get(self, sid: str) -> Worker | None:
        """Return one worker as it is now, None if there is none."""
        return self._state().get(sid)

    def wait(
        self,
        predicate: Callable[[State], object],
        *,
        timeout_s: float | None = None,
        what: str = "the awaited state",
    ) -> State:
        """Return the first state that the predicate accepts, asked again after every change.

        Raises: WaitTimeout, which names `what`, after `timeout_s` seconds.
        """
        if timeout_s is not None:
            arguments.check_wait(timeout_s)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            state = self._state()
            if predicate(state):
                return state
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._wait(state.seq, left_s):
                continue
            state = self._state()
            if predicate(state):
                return state
            raise WaitTimeout(what, waited_s=timeout_s or 0)

    def _wait(self, seq: int, timeout_s: float | None) -> bool:
        """Return True once something newer than `seq` is durable."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if deadline is None else deadline - time.monotonic()
            item = None if left_s is not None and left_s < 0 else self._watch.next(left_s)
            if item is None:
                return False
            if item.seq > seq or item.kind == "reset":
                return True

    def close(self) -> None:
        """Stop waiting."""
        self._watch.close()
