"""Be the console script: tell the version at once, and load the rest for whatever is more.

What is loaded stays until the end. To look through it for garbage, fifty times while it grows and
once more at the end, takes a fifth of the time of a short command: so the collector comes seldom,
and not at the end.

Ctrl-C ends the program at once while it is loaded: there is nothing to give back yet, and a module
of C that is interrupted as it is loaded may crash.
"""

import gc
import signal
import sys
from typing import Final

_COLLECT_AFTER: Final = 50_000  # objects; all that is loaded are fewer
_INTERRUPTED: Final = 130


def main() -> None:
    """Run `crewlog`."""
    if sys.argv[1:] in (["--version"], ["-V"]) and _tells_version():
        return
    gc.set_threshold(_COLLECT_AFTER)
    interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interrupts:  # else it is ignored, as in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        import crewlog.model.codec  # noqa: F401, PLC0415 (the module of C, which most need)
        from crewlog_cli.main import main as run  # noqa: PLC0415 (slow to load)

        if interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt as error:  # before there was anything to interrupt
        raise SystemExit(_INTERRUPTED) from error
    finally:
        gc.freeze()


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
