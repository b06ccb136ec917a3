"""Write one store with a fixed clock and fixed ids; tell what it holds and what commands say."""

import gzip
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import crewlog
from commands import Cli
from crewlog import host
from crewlog.local import disk, layout
from crewlog.model.events import Identity
from crewlog.model.steps import Author
from crewlog.process import identity
from crewlog.process.identity import Scope
from crewlog.session import Session
from crewlog_compactor import KeepEvents, compact

BOOT = "11111111-2222-3333-4444-555555555555"
BEGAN = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
ACTOR = b'{"pid":77,"uid":1000,"user":"ann","program":"script","via":"api","host":"here"}'


def _who(pid: int | None = None) -> Identity:
    number = 77 if pid is None else pid
    return Identity(
        pid=number, pidfd_id=9000 + number, start_ticks=100 + number, boot_id=BOOT,
        pid_ns="4026531836:1", host_id="ab" * 16, uid=1000,
    )  # fmt: skip


def _fixed(stack: ExitStack) -> None:
    """Let the clock move by a second at each look, and every id be the same each time."""
    clock = iter(BEGAN + timedelta(seconds=n) for n in range(100_000))
    random = iter(bytes([n % 256]) * 8 for n in range(1, 100_000))
    boot = bytes.fromhex(BOOT.replace("-", ""))
    for owner, name, value in (
        (host, "now", lambda: next(clock)),
        (identity, "boot_id", lambda: BOOT),
        (identity, "boot_bytes", lambda: boot),
        (identity, "scope", lambda: Scope(BOOT, "ab" * 16, "4026531836:1")),
        (disk, "place_of", lambda _: 0),
        (identity, "look", lambda pid=None: (_who(pid), None)),
        (uuid, "uuid4", lambda: uuid.UUID(int=42)),
        (os, "urandom", lambda size: next(random)[:size]),
        (Session, "author", lambda *_: Author(actor=ACTOR)),
    ):
        stack.enter_context(mock.patch.object(owner, name, value))


def write(place: Path) -> None:
    """Write the store: every kind of event, a batch, a tail, rotations, retention, a cursor."""
    with ExitStack() as stack:
        _fixed(stack)
        reg = stack.enter_context(crewlog.open(place))
        reg.register(
            "web-1", pid=101, labels={"role": "web", "née": "ü"}, version="1.0", ready=True
        )
        reg.register("web-2", pid=102, sock="/run/web-2.sock", meta={"queue": ["a", 1, None, 2.5]})
        reg.update("web-2", state="ready", labels={"role": "web"}, reason="it listens")
        reg.update("web-1", meta={"x": {"y": True}}, expect=2)
        with reg.batch() as batch:
            batch.register("job-1", pid=201, owner=101)
            batch.update("job-1", state="ready")
            batch.exited("job-1", code=3)
        reg.update("web-2", state="draining", reason="deploy")
        reg.exited("web-2", signal=15)
        compact(reg, gc=False)
        reg.register("web-2", pid=103, version="1.1", ready=True)
        reg.remove("web-1", reason="handed over")
        with next((place / "log").glob("*2*.jsonl")).open("ab") as torn:
            torn.write(b'{"v":1,"seq":')
        reg.register("late", pid=104)
        compact(reg, gc=False)
        reg.update("late", state="ready")
        compact(reg, gc=False)
        reg.update("late", labels={"n": "1"})
        compact(reg, gc=False, keep_history=KeepEvents(12))
        reg.update("late", state="draining", reason="slowly")
        compact(reg, gc=False, keep_history=KeepEvents(12))
        with reg.watch(after="oldest", cursor="mailer") as items:
            for _ in range(3):
                items.next(0)
        reg.update("late", state="stopping", reason="enough")


def content(place: Path) -> dict[str, str]:
    """Return what the files of a store hold; what no two runs have alike is left out."""
    digests: dict[str, str] = {}
    for path in sorted(place.rglob("*")):
        if not path.is_file() or path.parent.name == layout.LOCKS:
            continue
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        if path.name == layout.APPEND_STATE:  # but for the inode of the redo, and the crc
            data = data[:32] + bytes(8) + data[40:-4]
        name = str(path.relative_to(place))
        if name == layout.REDO:
            digests[name] = hashlib.sha256(data).hexdigest()
        elif (data.isascii() and b"\0" not in data) or path.suffix in {".json", ".jsonl", ".gz"}:
            digests[name] = data.decode()
        else:
            digests[name] = data.hex()
    return digests


COMMANDS = (
    "ls", "ls --all", "ls --no-probe --all", "ls --at 8 --all", "ls --sids", "ls -l role=web",
    "ls --state lost", "show late", "show web-1", "show web-2 --at 10", "alive late", "history",
    "history -n 3", "history -n 3 -r", "history --sid web-2", "history --crashed",
    "history --type worker.ready", "history --after 20", "history --actor ann",
    "history --since 2026-01-02T03:04:20Z --until 2026-01-02T03:04:30Z", "stats", "diff --from 13",
    "diff --from 12 --to 20", "timeline", "export", "export --format cloudevents", "path",
    "watch --after 12 --count 3 --timeout 9s", "watch --from-start --count 3 --timeout 9s",
    "watch --count 1 --timeout 0s", "cursor ls", "cursor show mailer", "gc --dry-run",
    "compact --dry-run --keep-history 5events", "verify", "repair", "anchor", "explain late",
    "stop late --dry-run", "schedule cron", "--version", "show nobody", "history --sid nobody",
    "cursor show nobody", "ls --at 3", "stop", "completion bash",
)  # fmt: skip
_VOLATILE = (
    (re.compile(r'"at":"[^"]*"'), '"at":"…"'),
    (re.compile(r'"(boot_id|host_id|pid_ns)":("[^"]*"|null)'), r'"\1":"…"'),
    (re.compile(r'"(record_age_s|proven_s)":[-0-9.e]+'), r'"\1":0'),
    (re.compile(r"\*/5 \* \* \* \* \S+ --dir"), "*/5 * * * * crewlog --dir"),
    (re.compile(r'"seen_at":"[^"]*"'), '"seen_at":"…"'),
)


def answers(place: Path) -> dict[str, object]:
    """Return what every command that can answer alike each time answers with --json."""
    by_command: dict[str, object] = {}
    cli = Cli(place)
    for words in COMMANDS:
        done = cli.any(*words.split(), "--json")
        answer: dict[str, object] = {
            "code": done.returncode,
            "stdout": done.stdout,
            "stderr": done.stderr,
        }
        for name in ("stdout", "stderr"):
            text = str(answer[name]).replace(str(place), "PLACE")
            for pattern, instead in _VOLATILE:
                text = pattern.sub(instead, text)
            answer[name] = text.splitlines()
        by_command[words] = answer
    return by_command


def helps(run: Callable[[str, str], str], names: list[str]) -> str:
    """Return every help page."""
    pages = [(name, run(name, "--help")) for name in ["", *names]]
    return "".join(f"===== crewlog {name} --help\n{page}\n" for name, page in pages)


def dumped(document: object) -> str:
    """Write what is kept as a golden file."""
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
