"""Be `python -m crewlog`: the command line, where it is installed beside the library."""

import importlib
import sys


def main() -> None:
    """Run the command line."""
    try:
        entry = importlib.import_module("crewlog_cli.entry")
    except ModuleNotFoundError as error:
        raise SystemExit(f"crewlog: the command line is not installed ({error.name})") from error
    sys.argv[0] = "crewlog"
    entry.main()


if __name__ == "__main__":
    main()
