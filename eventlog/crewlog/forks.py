"""Keep forks away from what a child could not go on with; loads nothing, for it comes first.

A child has the locks and the descriptors of threads that it has not. The lock of an import is
released by none then: whoever loads the same module in the child would wait for ever. So a module
that is loaded late, in whatever thread first needs it, is loaded where no fork can come between.
"""

import _thread
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager

# Held by a thread that must not be forked meanwhile.
_forking = _thread.RLock()


def no_fork() -> "AbstractContextManager[object]":
    """Let every fork wait until the end of the block; a lock, for a generator's could stay held."""
    return _forking


def _renew_in_child() -> None:
    global _forking  # noqa: PLW0603 (held by the thread that forked, which is this one)
    _forking = _thread.RLock()


os.register_at_fork(
    before=lambda: _forking.acquire(),  # noqa: PLW0108 (whichever it is then)
    after_in_parent=lambda: _forking.release(),  # noqa: PLW0108 (as above)
    after_in_child=_renew_in_child,
)
