"""The API keeps its word: arguments, batches, revisions, threads, forks, closing."""

import asyncio
import collections
import contextlib
import gc
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

import crewlog
from crewlog import errors
from crewlog.errors import (
    CrewlogError,
    InvalidTransition,
    LockBusy,
    RegistryClosed,
    StaleRevision,
    UnsafePermissions,
    WorkerNotFound,
)
from crewlog.local import layout
from crewlog.model.events import JsonValue
from crewlog.registry import Registry
from crewlog_compactor import verify
from procs import Crew, files, forked, joined, tree
from stores import opened


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"sid": ""}, ValueError),
        ({"sid": "-a"}, ValueError),
        ({"sid": "a/b"}, ValueError),
        ({"sid": "a" * 129}, ValueError),
        ({"sid": "ä"}, ValueError),
        ({"sid": 7}, TypeError),
        ({"sid": "a", "pid": "7"}, TypeError),
        ({"sid": "a", "pid": True}, TypeError),
        ({"sid": "a", "labels": {"k": 1}}, TypeError),
        ({"sid": "a", "labels": {1: "v"}}, TypeError),
        ({"sid": "a", "labels": ["k"]}, TypeError),
        ({"sid": "a", "labels": {f"k{n}": "" for n in range(65)}}, ValueError),
        ({"sid": "a", "meta": {"x": float("nan")}}, ValueError),
        ({"sid": "a", "meta": {"x": {1: 2}}}, TypeError),
        ({"sid": "a", "meta": {"x": b""}}, TypeError),
        ({"sid": "a", "meta": {"x": "y" * 70_000}}, ValueError),
        ({"sid": "a", "sock": "a\0b"}, ValueError),
        ({"sid": "a", "version": None}, TypeError),
    ],
)
def test_bad_argument_is_refused_before_anything_is_written(
    reg: Registry, place: Path, arguments: dict[str, object], kind: type[Exception]
) -> None:
    """ValueError and TypeError come before the store is even created."""
    with pytest.raises(kind):
        reg.register(**arguments)  # type: ignore[arg-type]
    assert not place.exists()


def test_bad_wish_for_a_lease_or_a_program_creates_nothing(place: Path) -> None:
    """Arguments are looked at before a lease is made, and a store for it."""
    bad: Mapping[str, object]
    with crewlog.open(place) as reg:
        for bad in ({"lease": True, "labels": {"x": 1}}, {"lease": True, "owner": 0},
                    {"heartbeat_s": 60, "version": "v" * 10_000}):  # fmt: skip
            with pytest.raises((TypeError, ValueError)):
                reg.register("a", **bad)
        for bad in (
            {"labels": {"x": 1}},
            {"cwd": 5},
            {"cwd": "a\0"},
            {"env": ["A=b"]},
            {"env": {"a": 1}},
            {"env": {"a=": "1"}},
            {"stdout": "x"},
        ):
            for start in (reg.spawn, reg.ensure):
                with pytest.raises((TypeError, ValueError)):
                    start("a", ["true"], **bad)
        assert not reg.exists


def test_option_that_does_not_exist_is_refused(reg: Registry) -> None:
    """A misspelt cursor must not pass for none."""
    reg.register("a")
    wrong: dict[str, str] = {"cursr": "c"}
    unexpected = pytest.raises(TypeError, match="unexpected keyword")
    with unexpected:
        reg.watch(**wrong)  # type: ignore[arg-type]
    with unexpected:
        reg.subscribe(print, **wrong)  # type: ignore[arg-type]
    with unexpected:
        reg.ensure("a", ["true"], **wrong)  # type: ignore[arg-type]
    with unexpected:
        reg.history(**wrong)  # type: ignore[arg-type]

    async def later() -> None:
        with unexpected:
            reg.awatch(**wrong)  # type: ignore[arg-type]
        async with crewlog.aopen(reg.path) as areg:
            with unexpected:
                await areg.watch(**wrong).__aenter__()  # type: ignore[arg-type]
            with unexpected:
                await areg.exited("a", evidence={})  # type: ignore[call-arg]
            with unexpected:
                await areg.update("a", sock_of=None)  # type: ignore[call-arg]

    asyncio.run(later())


def test_batch_is_all_or_nothing(reg: Registry) -> None:
    """One refused change and none is written; one write and one sync for all."""
    reg.register("a")
    with pytest.raises(WorkerNotFound), reg.batch() as batch:
        batch.update("a", state="ready")
        batch.update("b", state="ready")
    assert [e.type for e in reg.history()] == ["worker.registered"]
    with reg.batch() as batch:
        batch.update("a", state="ready")
        batch.update("a", state="draining", reason="x")
        batch.exited("a", code=0)
        batch.register("a")
        batch.remove("a", reason="y")
    assert batch.last_seq == reg.last_seq == 7
    worker = reg.get("a")
    assert worker is not None
    assert (worker.generation, worker.state) == (2, "released")
    assert [e.data.get("expected") for e in reg.history(types=["worker.exited"])] == [True]


def test_batch_whose_block_raises_writes_nothing(reg: Registry) -> None:
    """An error inside the block leaves the store alone."""
    reg.register("a")
    with pytest.raises(RuntimeError), reg.batch() as batch:
        batch.update("a", state="ready")
        raise RuntimeError
    assert reg.last_seq == 2


def test_expect_lets_one_of_two_through(reg: Registry) -> None:
    """A change that was decided on an old rev is refused, and nothing is written."""
    rev = reg.register("a").rev
    reg.update("a", state="ready", expect=rev)
    with pytest.raises(StaleRevision) as caught:
        reg.update("a", meta={"x": 1}, expect=rev)
    assert (caught.value.expected, caught.value.actual) == (rev, rev + 1)
    assert reg.last_seq == rev + 1


def test_change_that_changes_nothing_is_not_written(reg: Registry) -> None:
    """Equal updates and equal ends are no events."""
    reg.register("a", labels={"k": "v"}, ready=True)
    assert reg.update("a", state="ready").rev == 2
    assert reg.update("a", labels={"k": "v", "gone": None}).rev == 2
    end = reg.exited("a", code=1)
    assert reg.exited("a", code=1) == end
    assert reg.last_seq == 3
    with pytest.raises(InvalidTransition):
        reg.exited("a", code=2)
    with pytest.raises(InvalidTransition):
        reg.remove("a", reason="x")


def test_worker_and_event_carry_what_was_written(reg: Registry) -> None:
    """Fields, types, aware UTC times, and the raw line."""
    worker = reg.register("a", sock="/s", version="2", labels={"k": "v"}, meta={"m": [1, None]})
    assert worker.pid == os.getpid()
    assert (worker.sock, worker.version) == ("/s", "2")
    assert (worker.labels, worker.meta) == ({"k": "v"}, {"m": [1, None]})
    assert worker.created_at.tzinfo is UTC
    assert worker == reg.get("a")
    (event,) = reg.history()
    assert (event.seq, event.type, event.sid) == (worker.rev, "worker.registered", "a")
    assert event.actor["via"] == "api"
    assert event.actor["pid"] == os.getpid()
    assert event.raw.startswith(b'{"v":1,"seq":2,')
    assert abs((event.ts - datetime.now(UTC)).total_seconds()) < 60
    assert pickle.loads(pickle.dumps(worker)) == worker  # noqa: S301 (our own bytes)
    assert pickle.loads(pickle.dumps(event)) == event  # noqa: S301 (our own bytes)


def test_what_a_reader_changes_in_its_copy_stays_there(reg: Registry) -> None:
    """A worker's mappings refuse it; what is nested in them is the caller's own."""
    worker = reg.register("a", labels={"k": "v"}, meta={"m": {"n": 1}})
    worker.meta["m"]["n"] = 2  # type: ignore[index]
    copy = reg.get("a")
    assert copy is not None
    assert (copy.labels, copy.meta) == ({"k": "v"}, {"m": {"n": 1}})


def test_threads_share_a_registry(reg: Registry, place: Path) -> None:
    """16 threads, one object: every change once, each thread's in order."""
    reg.register("a")
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            reg.register(f"t-{number}")
            for change in range(30):
                reg.update(f"t-{number}", meta={"change": change})
                worker = reg.get(f"t-{number}")
                assert worker is not None
                assert worker.meta == {"change": change}
                assert len(reg.workers()) >= number // 16
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(list(reg.history(types=["worker.updated"]))) == 16 * 30
    assert verify(place).ok


def test_forked_child_goes_on_using_the_registry(reg: Registry, place: Path) -> None:
    """Also while other threads of the parent hold every lock there is."""
    reg.register("parent")
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            reg.update("parent", meta={"n": reg.last_seq})

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()

    def child(number: int) -> None:
        reg.register(f"child-{number}")
        worker = reg.get(f"child-{number}")
        assert worker is not None
        assert worker.pid == os.getpid()
        actor = next(reg.history(sid=f"child-{number}")).actor
        assert actor["pid"] == os.getpid()

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python ≥ 3.12 warns of this very case
        pids = [forked(lambda n=n: child(n)) for n in range(20)]  # type: ignore[misc]
    joined(*pids)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(reg.workers()) == 21
    assert verify(place).ok


def test_closed_registry_says_so(reg: Registry) -> None:
    """Closing is idempotent; every use after it is refused."""
    reg.register("a")
    reg.close()
    reg.close()
    for use in (reg.workers, lambda: reg.register("b"), lambda: reg.last_seq, reg.watch):
        with pytest.raises(RegistryClosed):
            use()


def test_opening_and_closing_leaks_no_descriptor(place: Path) -> None:
    """Also where opening is refused, and where a change fails."""
    gc.collect()  # what earlier tests left in cycles
    with crewlog.open(place) as reg:
        reg.register("a")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        with crewlog.open(place) as reg:
            reg.update("a", meta={"number": number})
            list(reg.history())
            with pytest.raises(WorkerNotFound):
                reg.update("b", state="ready")
    place.chmod(0o755)
    for _ in range(20):
        with crewlog.open(place) as reg, pytest.raises(UnsafePermissions):
            reg.workers()
    assert len(os.listdir("/proc/self/fd")) == before


def test_lock_held_too_long_names_its_holder(place: Path) -> None:
    """A stopped writer keeps its lock; the others are told who it is, and nothing is written."""
    with crewlog.open(place) as reg:
        reg.register("a")
        with (
            files(reg)._appender.lock.held(wait_s=1),
            crewlog.open(place, lock_timeout_s=0.05) as other,
        ):
            with pytest.raises(LockBusy) as caught:
                other.register("b")
            assert other.workers() == reg.workers(), "reading takes no lock"
        assert caught.value.outcome == "not_written"
        assert f"pid {os.getpid()}" in str(caught.value)


_FILES = ("store.json", "log/00000000000000000001.jsonl", "head/durable", "append.state",
          "locks/append")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "trick"),
    [
        (name, trick)
        for name in _FILES
        for trick in ("symlink", "fifo", "hardlink", "mode", "directory")
        # a second name of these gives nobody anything
        if trick != "hardlink" or name not in {"store.json", "locks/append"}
    ],
)
def test_tampered_file_is_refused_with_a_typed_error(
    place: Path, tmp_path: Path, name: str, trick: str
) -> None:
    """Links, FIFOs, second names and open modes in place of a file; nothing outside is touched."""
    with crewlog.open(place) as reg:
        reg.register("a")
    victim, outside = place / name, tmp_path / "outside"
    original = victim.read_bytes()
    if trick == "hardlink":
        os.link(victim, outside)
    elif trick == "mode":
        victim.chmod(0o640)
    else:
        victim.rename(outside)
        outside.chmod(0o600)
        if trick == "symlink":
            victim.symlink_to(outside)
        elif trick == "fifo":
            os.mkfifo(victim, 0o600)
        else:
            victim.mkdir(0o700)
    with crewlog.open(place, lock_timeout_s=0.2) as reg:
        with pytest.raises(CrewlogError) as caught:
            reg.register("b")
        assert caught.value.outcome == "not_written"
        assert isinstance(caught.value, UnsafePermissions | errors.StorageFailed), caught.value
    if outside.exists():
        assert outside.read_bytes() == original


def test_directory_that_others_can_replace_is_refused(tmp_path: Path) -> None:
    """A parent that others may write to, without the sticky bit."""
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    with crewlog.open(loose / "store") as reg, pytest.raises(UnsafePermissions, match=r"\+t"):
        reg.register("a")
    loose.chmod(0o1777)
    with crewlog.open(loose / "store") as reg:
        reg.register("a")


def test_existing_parent_keeps_its_mode(tmp_path: Path) -> None:
    """What crewlog did not create it does not chmod."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    with crewlog.open(shared / "new" / "store") as reg:
        reg.register("a")
    assert shared.stat().st_mode & 0o777 == 0o755
    assert (shared / "new").stat().st_mode & 0o777 == 0o700


def test_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    """No store is made among other files."""
    home = tmp_path / "home"
    home.mkdir(0o700)
    (home / "notes.txt").write_text("mine")
    before = tree(home)
    with crewlog.open(home) as reg, pytest.raises(errors.NotAStore, match=r"notes\.txt"):
        reg.register("a")
    assert tree(home) == before


def test_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    """A path that names a file."""
    (tmp_path / "file").write_text("x")
    with crewlog.open(tmp_path / "file") as reg, pytest.raises(errors.NotAStore):
        reg.register("a")


@pytest.mark.parametrize(
    "where", ["", "etcd:", "etcds:/h/p", "http://x/y", "file://host/x", "a\0b"]
)
def test_place_that_is_none_is_refused(where: str) -> None:
    """A typed refusal with an example."""
    with pytest.raises(ValueError, match=r"registry|path"):
        crewlog.open(where)


def test_every_error_pickles_and_has_code_exit_and_outcome() -> None:
    """Errors cross process boundaries whole."""
    samples: list[CrewlogError] = [
        WorkerNotFound("a"),
        errors.WorkerExists("a", pid=1, rev=2, state="ready"),
        StaleRevision("a", expected=1, actual=None),
        InvalidTransition("a", event="x", state="y"),
        LockBusy("/x", waited_s=1, holder="pid 1"),
        errors.LogCorrupt("s", offset=1, seq=2, reason="r", proof="p"),
        errors.AppendUncertain("/x", why="y"),
        errors.CompactedError(requested=1, oldest=2),
        errors.StorageFailed("x", where="y", outcome="unknown"),
    ]
    for error in samples:
        copy: CrewlogError = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert copy.__dict__ == error.__dict__
    classes = [c for name, c in vars(errors).items() if isinstance(c, type) and name[0] != "_"]
    codes = [c.code for c in classes if issubclass(c, CrewlogError)]
    assert len(set(codes)) == len(codes)


def test_writer_of_a_moved_store_follows_it(place: Path, crew: Crew) -> None:
    """The directory is opened once: a store that is renamed stays the same store."""
    with crewlog.open(place) as reg:
        reg.register("a", pid=crew.sleeper().pid)
        moved = place.with_name("moved")
        place.rename(moved)
        reg.update("a", state="ready")
        with crewlog.open(moved) as other:
            worker = other.get("a")
            assert worker is not None
            assert worker.state == "ready"
        assert (moved / layout.STORE).exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [(0, False), (1, True), (1, 1.0), (0.0, -0.0), ([1, 2], [True, 2.0]), ({"n": 0}, {"n": False})],
)
def test_another_value_of_json_is_a_change(reg: Registry, old: JsonValue, new: JsonValue) -> None:
    """Python takes them for the same; whoever reads the record does not."""
    reg.register("a", meta={"k": old})
    assert repr(reg.update("a", meta={"k": new}).meta["k"]) == repr(new)
    assert repr(fresh(reg).meta["k"]) == repr(new)
    last = reg.last_seq
    reg.update("a", meta={"k": new})
    assert reg.last_seq == last, "again, it changes nothing"


def fresh(reg: Registry) -> crewlog.Worker:
    with opened(reg.where) as other:
        worker = other.get("a")
        assert worker is not None
        return worker


def test_none_in_meta_stands_for_nothing_from_the_beginning(reg: Registry) -> None:
    """So no other change takes it away, and nothing is there that cannot be removed."""
    worker = reg.register("a", meta={"keep": None, "other": 1, "deep": {"keep": None}})
    assert dict(worker.meta) == {"other": 1, "deep": {"keep": None}}
    assert dict(reg.update("a", meta={"other": None}).meta) == {"deep": {"keep": None}}


class _Text(str):
    __slots__ = ()


def test_mappings_and_subclasses_are_written_as_what_they_hold(reg: Registry) -> None:
    """Another worker's meta among them: it is a mapping that nobody can change."""
    reg.register("b", meta={"n": {"m": 1}})
    other = reg.get("b")
    assert other is not None
    counts = collections.Counter("aab")
    reg.register("a", meta={"was": other.meta, "deep": {"counts": counts, "text": _Text("t")}})
    assert dict(fresh(reg).meta) == {
        "was": {"n": {"m": 1}},
        "deep": {"counts": {"a": 2, "b": 1}, "text": "t"},
    }


@pytest.mark.parametrize("edge", [timedelta.max, timedelta.min])
def test_span_beyond_the_calendar_means_its_end(reg: Registry, edge: timedelta) -> None:
    """Whoever says "ever" means the beginning, or never."""
    reg.register("a")
    since = [event.sid for event in reg.history(since=edge)]
    assert since == (["a"] if edge > timedelta(0) else [])
    assert len(reg.at(edge).workers) == (edge < timedelta(0))


def test_time_that_utc_does_not_have_is_refused(reg: Registry) -> None:
    """With the error of a wrong argument."""
    late = datetime.max.replace(tzinfo=timezone(timedelta(hours=-12)))
    with pytest.raises(ValueError, match="out of range in UTC"):
        reg.history(until=late)


def test_waits_of_any_length_are_taken(place: Path) -> None:
    """The system counts no further than 292 years."""
    with crewlog.open(place, lock_timeout_s=1e12) as reg:
        reg.register("a")
        reg.subscribe(lambda _: None).close(timeout_s=1e12)
        assert reg.wait("a", state="starting", timeout_s=1e300).sid == "a"


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda reg: reg.history(sids=[1]), TypeError, "are strings, not int"),
        (lambda reg: reg.history(types=[1]), TypeError, "are strings, not int"),
        (lambda reg: reg.stop("a", reason="x", signal=99), ValueError, "not a signal"),
        (lambda reg: crewlog.open(reg.where, actor=""), ValueError, "actor must say"),
        (lambda reg: crewlog.open(os.fsencode(reg.where)), TypeError, "by text, not bytes"),  # type: ignore[arg-type] # the test
        (lambda reg: reg.workers(states=["rdy"]), ValueError, "starting, ready, draining"),
        (lambda reg: reg.spawn("b", ["true"], log="here/\udcff"), ValueError, "is not UTF-8"),
        (lambda reg: crewlog.open(reg.where, actor=5), TypeError, "actor must be a string"),  # type: ignore[arg-type] # the test
    ],
)
def test_wrong_argument_is_named(
    reg: Registry, call: Callable[[Registry], object], kind: type[Exception], words: str
) -> None:
    """By the name that the caller gave it."""
    reg.register("a")
    with pytest.raises(kind, match=words):
        call(reg)


def test_signals_of_real_time_can_be_sent(reg: Registry) -> None:
    """Though Python names two of them only."""
    worker = reg.spawn("a", ["sleep", "300"])
    assert reg.stop("a", reason="x", signal=signal.SIGRTMIN + 3).signal == signal.SIGRTMIN + 3
    assert worker.pid > 0


def test_socket_of_a_batch_is_the_one_that_it_registers(reg: Registry, tmp_path: Path) -> None:
    """Not that of the worker which had the sid before."""
    paths = [str(tmp_path / name) for name in ("old", "new")]
    with contextlib.ExitStack() as kept:
        for path in paths:
            listener = kept.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
        reg.register("a", sock=paths[0])
        reg.exited("a", code=0)
        with reg.batch() as batch:
            batch.register("a", sock=paths[1])
            batch.update("a", state="ready")
        worker = reg.get("a")
        assert worker is not None
        inode = os.lstat(paths[1])
        assert (worker.sock_id or "").split(":")[1] == str(inode.st_ino)


def test_ready_again_changes_nothing_whatever_became_of_the_socket(
    reg: Registry, tmp_path: Path
) -> None:
    """It was bound anew, or is gone."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        reg.register("a", sock=path)
        ready = reg.update("a", state="ready")
    os.unlink(path)
    assert reg.update("a", state="ready").rev == ready.rev
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        assert reg.update("a", state="ready").rev == ready.rev
