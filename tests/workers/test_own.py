"""Be a worker in one line: as a block, for a process's life, in pools of several kinds."""

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import crewlog
from crewlog_compactor import collect
from procs import until


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("CREWLOG_DIR", str(place))


def ends(place: Path) -> dict[str, tuple[str, int | None]]:
    """Return how each worker ended."""
    with crewlog.open(place) as reg:
        return {
            w.sid: (w.state.value, None if w.exit is None else w.exit.code)
            for w in reg.workers(all=True)
        }


def test_block_is_a_worker_until_its_end(place: Path) -> None:
    """Registered and ready inside; ended behind it."""
    with crewlog.worker("job-{pid}", labels={"queue": "mail"}) as me:
        assert me.worker.sid == f"job-{os.getpid()}"
        with crewlog.open(place) as reg:
            assert reg.liveness(me.worker.sid).alive
            assert [w.state.value for w in reg.workers()] == ["ready"]
    assert ends(place) == {me.worker.sid: ("exited", 0)}


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError(), 1), (SystemExit(3), 3), (SystemExit(), 0), (SystemExit("x"), 1)],
)
def test_block_that_is_left_by_an_exception_failed(
    place: Path, error: BaseException, code: int
) -> None:
    """With the exit code that the process would have."""
    with pytest.raises(type(error)), crewlog.worker("a"):
        raise error
    assert ends(place)["a"] == ("failed" if code else "exited", code)


@pytest.mark.parametrize("form", ["crewlog.worker('svc')", "with crewlog.worker('svc'):"])
def test_process_that_ctrl_c_ends_was_ended_by_a_signal(place: Path, form: str) -> None:
    """Python sends it to itself again, so that whoever waits for it sees that."""
    code = f"import crewlog, os, signal\n{form}\n  os.kill(os.getpid(), signal.SIGINT)\n"
    code = code if form[-1] == ":" else code.replace("  os", "os")
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGINT
    with crewlog.open(place) as reg:
        worker = reg.workers(all=True)[0]
    assert worker.exit is not None
    assert (worker.exit.code, worker.exit.signal) == (None, signal.SIGINT)


def test_code_that_subprocess_tells_of_a_signal_is_that_signal(place: Path) -> None:
    """-9 is no code that a process can end with."""
    with crewlog.open(place) as reg:
        reg.register("a")
        reg.exited("a", code=-9, source="wait")
        worker = reg.workers(all=True)[0]
        assert worker.exit is not None
        assert (worker.exit.code, worker.exit.signal) == (None, 9)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["/x/pkg/__main__.py"], "pkg"), (["_priv.py"], "priv"), (["+x.py"], "x"),
        (["a" * 300], "a" * 100), ([], "python"), ([""], "python"), (["-c"], "c"),
    ],
)  # fmt: skip
def test_every_program_has_a_name(
    place: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], name: str
) -> None:
    """Whatever it is started as; a package that is run by `python -m` is named by that."""
    monkeypatch.setattr(sys, "argv", argv)
    with crewlog.worker() as me:
        assert me.worker.sid == f"{name}-{os.getpid()}"


def test_process_that_calls_it_once_ends_with_it(place: Path) -> None:
    """And a child that it forks records nothing."""
    code = "import crewlog, os\ncrewlog.worker('svc')\nos.fork() or os._exit(0)\nos.wait()\n"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert ends(place) == {"svc": ("exited", None)}


@pytest.mark.parametrize(
    ("last", "end"),
    [
        ("raise ValueError", ("failed", 1)),
        ("sys.exit(3)", ("exited", None)),  # whether it was 0 or 3 nothing tells any more
        ("pass", ("exited", None)),
        ("import multiprocessing; sys.exit(3)", ("exited", None)),
    ],
)
def test_process_that_ends_by_an_error_crashed(
    place: Path, last: str, end: tuple[str, int | None]
) -> None:
    """No end is called 0 that may not have been."""
    code = f"import crewlog, sys\ncrewlog.worker('svc')\n{last}\n"
    subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ends(place) == {"svc": end}


def _fail() -> None:
    crewlog.worker("child")
    raise ValueError


def _leave() -> None:
    crewlog.worker("child")
    sys.exit(3)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="since then nothing tells any more")
@pytest.mark.parametrize(("target", "end"), [(_fail, ("failed", 1)), (_leave, ("failed", 3))])
def test_child_of_multiprocessing_ends_with_its_code(
    place: Path, target: object, end: tuple[str, int]
) -> None:
    """Its error is at hand when it ends."""
    child = multiprocessing.get_context("fork").Process(target=target)  # type: ignore[arg-type]
    child.start()
    child.join()
    assert child.exitcode == end[1]
    assert ends(place) == {"child": end}


@pytest.mark.parametrize("form", ["with crewlog.worker('svc'):", "crewlog.worker('svc')\nif 1:"])
def test_end_that_a_second_signal_interrupts_is_recorded(place: Path, form: str) -> None:
    """A group is signalled, and its parent passes the signal on."""
    code = f"""
import crewlog, os, signal, sys
from crewlog.registry import Registry
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
get, asked = Registry.get, []
def interrupted(self, sid):
    if not asked:
        asked.append(sid)
        os.kill(os.getpid(), signal.SIGTERM)
    return get(self, sid)
Registry.get = interrupted
{form}
    pass
"""
    subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ends(place)["svc"][0] == "exited"


def test_process_that_was_killed_is_found_by_a_collector(place: Path) -> None:
    """It cannot say how it ended."""
    code = "import crewlog, os, signal\ncrewlog.worker('svc')\nos.kill(os.getpid(), 9)\n"
    subprocess.run([sys.executable, "-c", code], check=False)
    with crewlog.open(place) as reg:
        assert collect(reg).lost == ("svc",)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_process_pool_lists_its_children(place: Path, method: str) -> None:
    """`initializer=crewlog.worker`: no atexit runs there, and each end is recorded all the same."""
    with concurrent.futures.ProcessPoolExecutor(
        2,
        mp_context=multiprocessing.get_context(method),
        initializer=crewlog.worker,
        initargs=("pool-{pid}",),
    ) as pool:
        assert sorted(pool.map(abs, [-1, -2, -3])) == [1, 2, 3]
        with crewlog.open(place) as reg:
            living = {w.sid for w in reg.workers() if w.sid.startswith("pool-")}
        assert living
    until(lambda: {sid: end for sid, end in ends(place).items() if end[0] != "exited"} == {})
    assert living <= set(ends(place))


def test_multiprocessing_pool_lists_its_children(place: Path) -> None:
    """The same for the older kind of pool."""
    pool = multiprocessing.get_context("fork").Pool(2, crewlog.worker, ("mp-{pid}",))
    pool.map(abs, [1, 2, 3])
    pool.close()
    pool.join()
    code = 0 if sys.version_info < (3, 13) else None
    until(lambda: {end for sid, end in ends(place).items()} == {("exited", code)})


def test_sid_that_is_held_is_refused(place: Path) -> None:
    """Two workers of one name are a mistake."""
    with crewlog.worker("one"), pytest.raises(crewlog.WorkerExists):
        crewlog.worker("one")
    assert ends(place) == {"one": ("exited", 0)}
