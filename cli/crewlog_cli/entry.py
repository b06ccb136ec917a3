"""Be the console script: tell the version at once, and load the rest for whatever is more."""

import sys


def main() -> None:
    """Run `crewlog`."""
    if sys.argv[1:] == ["--version"] and _tells_version():
        return
    from crewlog_cli.main import main as run  # noqa: PLC0415 (slow to load)

    run()


def _tells_version() -> bool:
    """Print the version; False where stdout takes nothing, which every command says alike."""
    from crewlog import __version__  # noqa: PLC0415 (only here)

    if sys.stdout is None:
        return False
    try:
        # past the buffer: what it holds and cannot write, whoever flushes next would stumble over
        raw = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)
        raw.write(f"crewlog {__version__}\n".encode())
    except OSError:  # EPIPE, ENOSPC
        return False
    return True
