"""Be a child process that outlives us on purpose; a room of its own, because it is slow to load."""

import subprocess


class Child(subprocess.Popen[bytes]):
    """A child of which no warning is due when it is forgotten."""

    def __del__(self) -> None:
        """Say nothing."""
