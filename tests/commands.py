"""Run the command line as scripts do."""

import json
import os
import subprocess
import sys
from pathlib import Path

CREWLOG = [sys.executable, "-c", "from crewlog_cli.entry import main; main()"]


class Cli:
    """Run `crewlog` on one store."""

    def __init__(self, place: Path | str) -> None:
        """Use the store at `place`."""
        self.where = str(place)
        self.place = Path(place)  # of a directory

    def __call__(
        self, *arguments: object, code: int = 0, **options: object
    ) -> subprocess.CompletedProcess[str]:
        return self.bare("--dir", self.where, *arguments, code=code, **options)

    @staticmethod
    def bare(
        *arguments: object, code: int = 0, **options: object
    ) -> subprocess.CompletedProcess[str]:
        """Run it without --dir."""
        done = subprocess.run(
            [*CREWLOG, *map(str, arguments)],
            check=False, capture_output=True, text=True, timeout=60, **options,  # type: ignore[call-overload]
        )  # fmt: skip
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done  # type: ignore[no-any-return]

    def any(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run it in 80 columns and UTC, whatever it answers."""
        environment = {**os.environ, "COLUMNS": "80", "TZ": "UTC", "NO_COLOR": "1"}
        return subprocess.run(
            [*CREWLOG, "--dir", self.where, *map(str, arguments)],
            check=False, capture_output=True, text=True, timeout=60, env=environment,
        )  # fmt: skip

    def json(self, *arguments: object, code: int = 0) -> dict[str, object]:
        done = self(*arguments, "--json", code=code)
        assert done.stdout.count("\n") == 1, "one object on one line"
        assert done.stdout.isascii()
        answer = json.loads(done.stdout)
        assert answer["schema"] == 1
        return answer  # type: ignore[no-any-return]

    def workers(self) -> list[dict[str, object]]:
        """Return what ls shows."""
        workers: object = self.json("ls")["workers"]
        assert isinstance(workers, list)
        return workers
