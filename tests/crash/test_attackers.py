"""Whatever an attacker puts in place of a file is refused, and nothing outside is touched.

Links, FIFOs, devices and directories in place of every file and directory of a store; open modes;
foreign owners; and, as root, a store that belongs to another user.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import crewlog
from crewlog.errors import CrewlogError, UnsafePermissions
from crewlog.local import layout
from crewlog_compactor import compact, repair, verify
from procs import forked, joined, tree

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")


@pytest.fixture
def store(place: Path) -> Path:
    """Make a store with one of everything."""
    with crewlog.open(place) as reg:
        for number in range(3):
            reg.register(f"w-{number}", lease=number == 0)
            compact(reg, gc=False)
        with reg.watch(cursor="c", after="oldest"):
            pass
    return place


def link(path: Path, outside: Path) -> None:
    """Put a symbolic link to something precious in its place."""
    path.symlink_to(outside)


def dangling(path: Path, outside: Path) -> None:
    """Put a symbolic link to nothing in its place: creating through it would create elsewhere."""
    path.symlink_to(outside.parent / "created-by-attack")


def hard(path: Path, outside: Path) -> None:
    """Put a second name of something precious in its place."""
    path.hardlink_to(outside)


def fifo(path: Path, outside: Path) -> None:
    """Put a FIFO in its place: opening it would wait for ever."""
    os.mkfifo(path, 0o600)


def directory(path: Path, outside: Path) -> None:
    """Put a directory in its place."""
    path.mkdir(mode=0o700)


def opened(path: Path, outside: Path) -> None:
    """Let others read it."""
    path.write_bytes(b"x")
    path.chmod(0o644)


TRICKS: list[Callable[[Path, Path], None]] = [link, dangling, hard, fifo, directory, opened]


def use(place: Path) -> list[str]:
    """Do everything with a store; return the codes of what was refused."""
    refused: list[str] = []

    def attempt(work: Callable[[], object]) -> None:
        try:
            work()
        except CrewlogError as error:
            refused.append(error.code)

    with crewlog.open(place) as reg:
        attempt(reg.workers)
        attempt(lambda: list(reg.history()))
        attempt(lambda: reg.register("new", lease=True))
        attempt(lambda: reg.liveness("w-0"))
        attempt(lambda: reg.beat("w-0"))
        attempt(lambda: reg.watch(cursor="c", after="oldest").close())
        attempt(lambda: compact(reg, force=True))
    attempt(lambda: repair(place))
    report = None
    try:
        report = verify(place)
    except CrewlogError as error:
        refused.append(error.code)
    if report is not None:
        refused += [finding.code for finding in report.findings]
    return refused


def _is_ours(path: Path) -> bool:
    """Say whether the trick was replaced, not followed: a plain file of ours with one name."""
    inode = path.lstat()
    return stat.S_ISREG(inode.st_mode) and inode.st_nlink == 1 and not inode.st_mode & 0o077


@pytest.mark.parametrize("trick", TRICKS, ids=lambda t: t.__name__)
def test_trick_in_place_of_every_file_is_refused_and_touches_nothing(
    store: Path, tmp_path: Path, trick: Callable[[Path, Path], None]
) -> None:
    """Each file in turn; what lies outside stays as it is, and nothing hangs."""
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = outside / "precious"
    precious.write_text("precious")
    precious.chmod(0o600)
    pristine = tmp_path / "pristine"
    shutil.copytree(store, pristine)
    before = tree(outside)
    names = [path.relative_to(pristine) for path in sorted(pristine.rglob("*")) if path.is_file()]
    assert len(names) > 12
    for name in names:
        path = store / name
        path.unlink()
        trick(path, precious)
        refused = use(store)
        inert = trick is hard and name.parts[0] == layout.LOCKS  # nothing is ever written there
        assert refused or inert or _is_ours(path), (trick.__name__, name)
        assert tree(outside) == before, (trick.__name__, name)
        assert stat.S_IMODE(precious.stat().st_mode) == 0o600
        shutil.rmtree(store)
        shutil.copytree(pristine, store)
    assert "unsafe_permissions" not in use(store)


@pytest.mark.parametrize("name", ["", *layout.DIRECTORIES])
def test_directory_that_is_a_link_or_open_is_refused(
    store: Path, tmp_path: Path, name: str
) -> None:
    """A link in place of a directory, and one that others may enter."""
    path = store / name
    if name:
        moved = tmp_path / "moved"
        path.rename(moved)
        path.symlink_to(moved)
        assert "unsafe_permissions" in use(store) or "storage_failed" in use(store)
        path.unlink()
        moved.rename(path)
    for mode in (0o701, 0o710, 0o750, 0o777):
        path.chmod(mode)
        with crewlog.open(store) as reg, pytest.raises(UnsafePermissions) as caught:
            reg.register("new")
        assert "chmod" in caught.value.remedy
        path.chmod(0o700)


def test_directory_of_something_else_is_named_as_that(tmp_path: Path) -> None:
    """A wrong path is no reason to close somebody's directory: no chmod is advised."""
    wrong = tmp_path / "wrong"
    wrong.mkdir(mode=0o755)
    (wrong / "passwd").touch()
    for work in ("workers", "register"):
        with crewlog.open(wrong) as reg, pytest.raises(crewlog.errors.NotAStore) as caught:
            reg.workers() if work == "workers" else reg.register("a")
        assert "passwd" in caught.value.why
        assert "chmod" not in str(caught.value)
    (wrong / "passwd").unlink()
    with crewlog.open(wrong) as reg, pytest.raises(UnsafePermissions, match="chmod"):
        reg.register("a")


def test_parent_that_others_may_write_is_refused(tmp_path: Path) -> None:
    """They could put another store in its place; the sticky bit keeps them from it."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with crewlog.open(shared / "store") as reg, pytest.raises(UnsafePermissions):
        reg.register("a")
    shared.chmod(0o1777)
    with crewlog.open(shared / "store") as reg:
        reg.register("a")


@ROOT
def test_store_of_another_user_is_refused(store: Path) -> None:
    """Neither read nor written, not even by root: what is in it was written by somebody else."""
    for path in (store, *store.rglob("*")):
        os.chown(path, 65534, 65534)
    before = tree(store)
    assert set(use(store)) == {"unsafe_permissions"}
    assert tree(store) == before
    for path in (store, *store.rglob("*")):
        os.chown(path, 0, 0)
    segment = next((store / layout.LOG).iterdir())
    os.chown(segment, 65534, 65534)
    assert "unsafe_permissions" in use(store)


@ROOT
def test_another_user_sees_nothing_of_a_store() -> None:
    """Two real users: the second can neither list, read, write nor lock."""
    home = Path(tempfile.mkdtemp(prefix="crewlog-test-"))
    home.chmod(0o755)
    try:
        with crewlog.open(home / "store") as reg:
            reg.register("secret", meta={"token": "t"})
            compact(reg, gc=False)

        def as_nobody() -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            for path in (home / "store", home / "store" / layout.SNAPSHOT):
                with pytest.raises(PermissionError):
                    os.listdir(path) if path.suffix == "" else path.read_bytes()
            with crewlog.open(home / "store") as mine, pytest.raises(CrewlogError):
                mine.workers()

        joined(forked(as_nobody))
    finally:
        shutil.rmtree(home)


@pytest.mark.parametrize("umask", [0, 0o777])
def test_reader_is_never_shown_more_than_owner_only_files(place: Path, umask: int) -> None:
    """Leases, plans, quarantine and repairs too, under any umask."""

    def work() -> None:
        os.umask(umask)
        with crewlog.open(place) as reg:
            reg.register("a", lease=True, heartbeat_s=9)
            reg.beat("a")
            compact(reg, gc=False)
        (place / layout.POISON).touch(mode=0o600)
        os.chmod(place / layout.POISON, 0o600)
        assert repair(place, yes=True).done
        with crewlog.open(place) as reg:
            compact(reg, gc=False)

    joined(forked(work))
    for path in (place, *place.rglob("*")):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


HOSTILE = ["\0", "\x1b]52;c;eA==\x07", "\u202e", "\ud800", "../../etc/passwd", "a/b", "", "x" * 129,
           "-rf", ".hidden", "a b", "a\nb", "\N{FULLWIDTH SOLIDUS}"]  # fmt: skip


@pytest.mark.parametrize("sid", HOSTILE)
def test_hostile_sid_names_no_file(place: Path, sid: str) -> None:
    """A sid is part of a lease's name, a cursor's name is a file's: neither leaves the store."""
    with crewlog.open(place) as reg:
        reg.register("first")
        before = tree(place.parent)
        for work in (
            lambda: reg.register(sid, lease=True),
            lambda: reg.spawn(sid, ["true"]),
            lambda: reg.ensure(sid, ["true"]),
            lambda: reg.watch(cursor=sid),
        ):
            with pytest.raises((ValueError, TypeError)):
                work()
        assert tree(place.parent) == before


@pytest.mark.parametrize(
    "labels",
    [{"k": "v" * (1 << 20)}, {"\ud800": "x"}, {"k": "\ud800"}, {str(n): "" for n in range(65)},
     {"k": 1}, {1: "v"}, [("k", "v")]],
)  # fmt: skip
def test_hostile_labels_are_refused_before_anything_is_written(place: Path, labels: object) -> None:
    """Too long, too many, not text."""
    with crewlog.open(place) as reg, pytest.raises((ValueError, TypeError)):
        reg.register("a", labels=labels)  # type: ignore[arg-type]
    assert not place.exists()


def test_hostile_meta_is_refused_before_anything_is_written(place: Path) -> None:
    """Deep, huge, not a number, not JSON, circular."""
    deep: dict[str, object] = {}
    inner = deep
    for _ in range(40):
        inner["a"] = inner = {}
    circular: dict[str, object] = {}
    circular["me"] = circular
    for meta in (deep, {"n": 2**64}, {"n": float("nan")}, {"n": float("inf")}, {"n": {1, 2}},
                 {"n": b"bytes"}, {1: 2}, circular, {"n": "x" * (1 << 20)}):  # fmt: skip
        with crewlog.open(place) as reg, pytest.raises((ValueError, TypeError)):
            reg.register("a", meta=meta)  # type: ignore[arg-type]
    assert not place.exists()
