"""Watch from asyncio: the same feed, waiting on the loop instead of a thread.

Nothing is awaited between taking an item and returning it, so a cancellation loses nothing. Where a
look goes over a network, a thread takes it, one at a time, and who is cancelled meanwhile leaves it
to the next one who asks.
"""

import asyncio
import contextlib
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self, TypeVar

from crewlog.model.items import Item
from crewlog.watch import wake
from crewlog.watch.wake import Bell
from crewlog.watch.watch import Vigil

T = TypeVar("T")
# Lines that are not wanted are passed over in steps, so that the loop is never held up for long.
_LINES_A_STEP: Final = 500


class LoopBell(Bell):
    """A bell that wakes a coroutine."""

    __slots__ = ("_event", "_loop")

    def __init__(self) -> None:
        """Bind to the running loop."""
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wake the coroutine, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._event.set)

    async def heard(self, timeout_s: float) -> bool:
        """Return True after a ring, False after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


class AsyncWatch:
    """An asynchronous iterator over Change, Synced and Reset; also a context manager."""

    def __init__(self, vigil: Vigil, bell: LoopBell) -> None:
        """Use `Registry.awatch`."""
        self._vigil = vigil
        self._bell = bell
        self._taking = False  # a coroutine is inside `next`
        remote = vigil.feed.store.remote
        self._thread = ThreadPoolExecutor(1, "crewlog-look") if remote else None
        self._looking: asyncio.Future[Item | None] | None = None
        weakref.finalize(self, vigil.end)  # who forgets to close gives it back all the same

    @property
    def position(self) -> int:
        """Return the seq up to which everything was delivered or filtered out."""
        return self._vigil.feed.position

    @property
    def lag(self) -> int:
        """Return how many durable lines lie ahead of the position, filtered ones included."""
        return self._vigil.lag()

    async def next(self, timeout_s: float | None = None) -> Item | None:
        """Return the next item; None after `timeout_s` seconds without one, or once closed."""
        self._taking = True
        try:
            return await self._next(timeout_s)
        finally:
            self._taking = False
            if self._vigil.closed:
                self._end()

    async def _next(self, timeout_s: float | None) -> Item | None:
        vigil = self._vigil
        if not vigil.closed:
            await self._aside(vigil.begin)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not vigil.closed:
            item = await self._look()
            if item is not None:
                return item
            if vigil.feed.unfinished:
                await asyncio.sleep(0)
                continue
            wait_s = await self._aside(lambda: vigil.patience_s(deadline))
            if wait_s is None:
                return None
            if await self._bell.heard(vigil.waker.pause_s(wait_s)):
                vigil.wakes += 1
            elif vigil.overdue():
                await self._safety_look()
        return None

    async def _safety_look(self) -> None:
        vigil = self._vigil
        unseen = await self._aside(vigil.moved_unseen)
        if unseen and not await self._bell.heard(wake.WAKE_GRACE_S):
            vigil.distrust()
        await self._aside(vigil.check_place)

    async def _look(self) -> Item | None:
        """Take the next item that is there now."""
        if self._thread is None:
            return self._vigil.look(_LINES_A_STEP)
        if self._looking is None:
            loop = asyncio.get_running_loop()
            self._looking = loop.run_in_executor(self._thread, self._vigil.look, _LINES_A_STEP)
        try:
            item = await asyncio.shield(self._looking)
        except asyncio.CancelledError:  # what it finds is for the next one who asks
            raise
        except BaseException:
            self._looking = None
            raise
        self._looking = None
        return item

    async def _aside(self, work: Callable[[], T]) -> T:
        """Do what may take long where the store is remote, beside the loop."""
        if self._thread is None:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _end(self) -> None:
        """Give every resource back, once no thread is inside."""
        if self._thread is None:
            self._vigil.end()
        else:
            with contextlib.suppress(RuntimeError):  # it has ended before
                self._thread.submit(self._vigil.end)
            self._thread.shutdown(wait=False)

    def ack(self, item: Item) -> None:
        """Acknowledge everything up to `item` to the cursor now, not at the next take."""
        self._vigil.acknowledge(item)

    def stats(self) -> dict[str, int | str]:
        """Return counts for a person: delivered, wakes, position, lag, source."""
        return self._vigil.stats()

    def close(self) -> None:
        """End the iteration at once; idempotent, from any thread."""
        self._vigil.closed = True
        self._bell.ring()
        if not self._taking:
            self._end()

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Item:
        """Wait for the next item; the iteration ends on `close`."""
        item = await self.next()
        if item is None:
            raise StopAsyncIteration
        return item

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close, and give every resource back."""
        self.close()
