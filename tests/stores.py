"""Open registries with limits of a test's own: `@pytest.mark.limits(segment_bytes=2000)`."""

import os
from dataclasses import replace

from crewlog.model.limits import DEFAULT, LOCK_WAIT_S, Limits
from crewlog.model.steps import Redact
from crewlog.place import locate
from crewlog.registry import Registry

_limits = DEFAULT


def limit(**limits: float) -> None:
    """Let what is opened from here on, until the test ends, have these limits."""
    global _limits  # noqa: PLW0603 (one test at a time)
    _limits = replace(_limits, **limits)  # type: ignore[arg-type]


def unlimit() -> None:
    """Begin with the usual limits."""
    global _limits  # noqa: PLW0603 (one test at a time)
    _limits = DEFAULT


def limits() -> Limits:
    """Return the limits of this test."""
    return _limits


def opened(
    where: str | os.PathLike[str] | None = None,
    *,
    lock_timeout_s: float = LOCK_WAIT_S,
    actor: str | None = None,
    redact: Redact | None = None,
) -> Registry:
    """Open a registry as `crewlog.open` does, but with the limits of this test."""
    return Registry(
        locate(where), lock_timeout_s=lock_timeout_s, actor=actor, redact=redact, limits=_limits
    )
