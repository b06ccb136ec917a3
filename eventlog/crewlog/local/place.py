"""Open or create the store in a directory of this machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crewlog.local import create, layout
from crewlog.local.log import Log
from crewlog.model.limits import DEFAULT, Limits
from crewlog.store import Kind


@dataclass(frozen=True, slots=True)
class DirectoryPlace:
    """A directory; see place.Place."""

    path: Path

    @property
    def kind(self) -> Kind:
        """Return "directory"."""
        return "directory"

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    def open(self, *, wait_s: float, limits: Limits = DEFAULT) -> Log:
        """Open the store in it."""
        return Log(layout.open_existing(self.path, limits=limits), wait_s=wait_s)

    def create(self, *, wait_s: float, limits: Limits = DEFAULT) -> Log:
        """Open the store in it, or create one."""
        made = create.open_or_create(self.path, wait_s=wait_s, limits=limits)
        return Log(made, wait_s=wait_s)

    def environment(self) -> Mapping[str, str]:
        """Return nothing: its path is enough."""
        return {}
