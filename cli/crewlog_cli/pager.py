"""Show long output in the pager of the person who asked, as git does."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress

from crewlog_cli import output


def show(lines: Sequence[str]) -> bool:
    """Show lines in $CREWLOG_PAGER, $PAGER or less; False where there is none, or it is cat.

    What it gets was made inert before; our own colours pass through `less -R`.
    """
    words = shlex.split(os.environ.get("CREWLOG_PAGER", os.environ.get("PAGER", "less")))
    if not words or words == ["cat"]:
        return False
    output.flush()
    variables = {**os.environ, "LESS": os.environ.get("LESS", "FRX")}
    try:
        pager = subprocess.Popen(words, stdin=subprocess.PIPE, env=variables, text=True,
                                 errors="backslashreplace")  # fmt: skip
    except OSError:
        return False
    with suppress(BrokenPipeError, KeyboardInterrupt):  # left before the end
        pager.communicate("".join(f"{line}\n" for line in lines))
    while pager.returncode is None:
        with suppress(KeyboardInterrupt):  # the pager's own business
            pager.wait()
    return True
