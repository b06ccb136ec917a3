"""Hold the house in order: one room per danger, sizes, names, reasons."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("eventlog", "compactor", "cli") for path in (ROOT / folder).rglob("*.py")
)
# module -> the only rooms that may import it, by path below eventlog/, compactor/ or cli/
ROOMS = {
    "orjson": {"crewlog/model/codec.py"},
    "psutil": {"crewlog/process/identity.py"},
    "watchdog": {"crewlog/local/listen.py"},
    "inotify_simple": {"crewlog/local/listen.py", "crewlog/watch/wake.py"},
    "asyncio": {"crewlog/aio/"},
    "fcntl": {"crewlog/local/lock.py", "crewlog/local/disk.py", "crewlog/process/identity.py"},
    "click": {"crewlog_cli/"},
    "gzip": {"crewlog/local/archive.py", "crewlog_cli/pages/page.py"},
    "rich": {"crewlog_cli/commands/top.py"},
    "urllib3": {"crewlog/etcd/client.py"},
    "termios": {"crewlog_cli/commands/top.py"},
    "threading": {
        *("crewlog/host.py", "crewlog/queue.py", "crewlog/session.py", "crewlog/watch/"),
        *("crewlog/local/append.py", "crewlog/local/heads.py", "crewlog/local/sync.py"),
        *("crewlog/etcd/claims.py", "crewlog/etcd/client.py", "crewlog/etcd/listen.py"),
        *("crewlog/etcd/reader.py", "crewlog/observer.py", "crewlog/workers/reaper.py"),
        "crewlog/workers/own.py",
        "crewlog_cli/commands/workers.py",
    },
    "socket": {"crewlog/process/socket.py", "crewlog/process/forkserver.py"},
    "subprocess": {
        *("crewlog/process/", "crewlog/etcd/keeper.py", "crewlog/testing.py"),
        *("crewlog_cli/commands/demo.py", "crewlog_cli/commands/follow.py"),
        "crewlog_cli/pager.py",
    },
    "pytest": {"crewlog/testing.py"},
}
CHANGES_FILES = re.compile(
    r"\bos\.(?:mkdir|makedirs|write|pwrite|ftruncate|truncate|fsync|fdatasync|link|symlink|rename"
    r"|replace|unlink|remove|rmdir|chmod|fchmod|chown)\("
    r"|\.(?:write_text|write_bytes|mkdir|unlink|rename|touch|rmdir)\(|\bshutil\.|O_CREAT"
)
# The first writes to a pipe; the second cleans up a directory of its own.
NOT_FILES = {"crewlog/process/launch.py", "crewlog_cli/commands/demo.py"}
# What a pure room must not ask: the clock, the system, a file.
ASKS = re.compile(r"\bnow\(|(?<![\w.])open\(|\bos\.|\btime\.|\bthreading\.")
FUNCTION_LINES_MAX = 60
# A protocol is one function in reading order: its page is the unit.
PROTOCOL_LINES_MAX = 120
PROTOCOLS = {"append.py", "sync.py", "recovery.py", "verify.py"}
MODULE_LINES_MAX = 700
BANNED_NAMES = {"utils", "helpers", "common", "base", "manager", "handler", "misc", "util"}
# A room is named by a noun, or by the verb of what it does: not by a tense.
TENSES = re.compile(r"(?:ing|ed)$")
# A name tells the thing, not how we came by it.
EMPTY_NAMES = re.compile(r"(?:^|_)(?<!not_)(?:found|told)(?:_|$)")
# Words of the file format, and of what 0.1 made public.
KEPT_NAMES = {"found_by_scan"}
KEPT_FIELDS = {("crewlog/errors.py", "found"), ("crewlog_compactor/reports.py", "found")}
# Exceptions that a caller can act upon; another needs a reason of that kind.
ERRORS_MAX = 43


def room(path: Path) -> str:
    """Return a module's path below the folder of its package."""
    return str(path.relative_to(ROOT)).split("/", 1)[1]


def holds(rooms: set[str], path: Path) -> bool:
    """Say whether a module is one of these rooms, or in one of these packages."""
    return any(
        room(path) == one or (one[-1] == "/" and room(path).startswith(one)) for one in rooms
    )


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each function's name and its lines of code, docstring and signature not counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                body = body[1:]
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            yield f"{room(path)}:{node.name}", lines


@pytest.mark.parametrize("module", ROOMS)
def test_danger_stays_in_its_room(module: str) -> None:
    """A module that is dangerous, slow or foreign is imported where it belongs."""
    users = [path for path in SOURCES if module in set(imports(path))]
    assert [room(path) for path in users if not holds(ROOMS[module], path)] == []
    for one in ROOMS[module]:
        assert any(holds({one}, path) for path in users), f"{one} is empty: strike it from the list"


def test_only_disk_changes_files() -> None:
    """One seam for everything that changes files."""
    rooms = {room(path) for path in SOURCES if CHANGES_FILES.search(_code(path)) is not None}
    assert rooms - NOT_FILES == {"crewlog/local/disk.py"}


def test_the_model_asks_nobody() -> None:
    """Pure functions of values: no clock, no file, no system, no thread."""
    pure = [path for path in SOURCES if room(path).startswith("crewlog/model/")]
    assert pure
    assert {room(path) for path in pure if ASKS.search(_code(path))} == set()
    assert ASKS.search("when = host.now()"), "negative control"


def _code(path: Path) -> str:
    """Return the source without comments, docstrings and calls through the seam."""
    text = re.sub(r'"""[\s\S]*?"""', "", path.read_text())
    return re.sub(r"#.*|\bvia\.\w+\(|\bdisk\.\w+\(|directory\.disk\.\w+\(", "", text)


def test_who_raises_a_plain_error_says_what_to_do() -> None:
    """Errors without a remedy of their own are given one wherever they are made."""
    plain = {"NotAStore", "UnsafePermissions", "Unsupported", "StorageFailed"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                given = {keyword.arg for keyword in node.keywords}
                if node.func.id in plain:
                    assert "remedy" in given, f"{path.name}:{node.lineno}"


def test_only_the_command_line_prints() -> None:
    """Results go to stdout through one function; the library logs."""
    for path in SOURCES:
        text = _code(path)
        assert not re.search(r"(?<!\w)print\(", text), path
        if "crewlog_cli" not in path.parts:
            assert "sys.stdout" not in text, path
            assert "sys.stderr" not in text, path


def test_functions_are_short() -> None:
    """None over 60 lines; a protocol has its page."""
    for path in SOURCES:
        limit = PROTOCOL_LINES_MAX if path.name in PROTOCOLS else FUNCTION_LINES_MAX
        assert {name: n for name, n in functions(path) if n > limit} == {}


def test_modules_are_short() -> None:
    """None over 700 lines."""
    lengths = {room(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: n for name, n in lengths.items() if n > MODULE_LINES_MAX} == {}


def test_modules_say_what_they_are_for_and_bear_names_of_their_own() -> None:
    """A docstring first; no utils, helpers, managers; no tense."""
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
        assert path.stem not in BANNED_NAMES
        assert not TENSES.search(path.stem) or path.stem in {"testing", "feed"}, path


def names_of(path: Path) -> Iterator[str]:
    """Yield every name that a module gives to something; a test's is a sentence."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                if not name.startswith("test_"):
                    yield name


def test_names_tell_the_thing() -> None:
    """No `found`, no `told`: they would fit anything."""
    empty = {
        (room(path), name)
        for path in [*SOURCES, *(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
        for name in names_of(path)
        if EMPTY_NAMES.search(name) and name not in KEPT_NAMES
    }
    assert empty == KEPT_FIELDS


def test_packages_hold_nothing_but_their_description() -> None:
    """Only the two libraries have a face of public names."""
    for path in SOURCES:
        if path.name == "__init__.py" and room(path).count("/") > 1:
            assert len(ast.parse(path.read_text()).body) == 1, path


def test_errors_are_few() -> None:
    """One constructor for all of them, and each is one that a caller can act upon."""
    tree = ast.parse((ROOT / "eventlog/crewlog/errors.py").read_text())
    kinds = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(kinds) <= ERRORS_MAX
    for kind in kinds:
        names = {node.name for node in kind.body if isinstance(node, ast.FunctionDef)}
        assert names <= {"__post_init__", "__reduce__"}, kind.name


def test_every_ignore_has_a_reason() -> None:
    """`noqa` and `type: ignore` say why."""
    for path in SOURCES:
        for number, row in enumerate(path.read_text().splitlines(), start=1):
            if "noqa" in row:
                assert re.search(r"# noqa: [A-Z0-9, ]+ \(.+\)|# noqa: \w+$", row), (path, number)
            if "type: ignore" in row:
                assert re.search(r"type: ignore\[[\w,-]+\] # \w+", row), (path, number)


def test_every_test_says_what_it_shows() -> None:
    """A docstring on every test."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{path.name}:{node.name}"


def test_tests_do_not_wait_for_time() -> None:
    """Only procs.until sleeps, and tests in which passing time is the matter."""
    allowed = {
        "lossy.py",
        "procs.py",
        "test_kill_storm.py",
        "test_watch.py",
        "test_tidy.py",
        "test_guarantees.py",
        "test_power_cut.py",
        "test_soak.py",
        "test_exactly_once.py",
        "test_server.py",
    }
    for path in (ROOT / "tests").rglob("*.py"):
        if "time.sleep(" in re.sub(r'"""[\s\S]*?"""', "", path.read_text()):
            assert path.name in allowed, path


def test_no_path_or_host_of_a_machine_is_written_down() -> None:
    """The project speaks only of itself."""
    for path in ROOT.rglob("*"):
        if path.suffix in {".py", ".md", ".toml"} and ".venv" not in path.parts:
            text = path.read_text()
            assert str(ROOT) + "/" not in text, path
