"""What people do every day takes few words, in threads and in asyncio alike."""

import asyncio
import json
import logging
import pickle
import pydoc
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import cast

import orjson
import pytest

import crewlog
from crewlog.registry import Registry
from crewlog.session import Session
from crewlog.watch import follow
from procs import Crew, until

ROOT = Path(__file__).parents[1]


# -- find the living ------------------------------------------------------------------------


def test_living_are_those_not_proven_dead(reg: Registry, crew: Crew) -> None:
    """By labels and globs; of one that was killed nobody need have told."""
    killed = crew.sleeper()
    reg.register("web-1", labels={"role": "web", "tier": "a"})
    reg.register("web-2", pid=killed.pid, labels={"role": "web"})
    reg.register("job", labels={"role": "job"})
    assert [w.sid for w in reg.living()] == ["web-1", "web-2", "job"]
    killed.kill()
    killed.wait()
    assert [w.sid for w in reg.living()] == ["web-1", "job"]
    assert [w.sid for w in reg.living(labels={"role": "web"})] == ["web-1"]
    assert [w.sid for w in reg.living(labels={"tier": None})] == ["web-1"]
    assert [w.sid for w in reg.living(sids=["w*", "j?b"])] == ["web-1", "job"]
    assert [w.sid for w in reg.workers(sids=["web-[2-9]"])] == ["web-2"], "recorded, not judged"
    assert reg.living(sids=[]) == []


def test_workers_by_state_are_the_final_ones_too(reg: Registry) -> None:
    """A state that is named is wanted; one that there is not is refused."""
    reg.register("a")
    reg.register("b", ready=True)
    reg.exited("a", code=3)
    assert [w.sid for w in reg.workers(states=["failed"])] == ["a"]
    assert [w.sid for w in reg.workers(states=["failed", "ready"])] == ["a", "b"]
    with pytest.raises(ValueError, match="redy"):
        reg.workers(states=["redy"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="give a list"):
        reg.workers(sids="a")
    with pytest.raises(TypeError, match=r"for several give sids=\[…\]"):
        reg.history(sid=["a"])  # type: ignore[arg-type]


# -- be in the list -------------------------------------------------------------------------


def test_presence_is_a_worker_for_the_length_of_a_block(reg: Registry) -> None:
    """Its end is written with it: 0, or 1 for an error; the registry stays open."""
    with reg.presence("runner", labels={"k": "v"}) as me:
        assert me.worker.state == "ready"
        assert [w.sid for w in reg.living(labels={"k": "v"})] == ["runner"]
    with pytest.raises(ZeroDivisionError), reg.presence("broken-{pid}"):
        raise ZeroDivisionError
    ended = {w.sid.split("-")[0]: w.exit and w.exit.code for w in reg.workers(all=True)}
    assert ended == {"runner": 0, "broken": 1}


# -- hear of it -----------------------------------------------------------------------------


def test_callback_that_raises_is_logged_and_raised_again(
    reg: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, at the end of the block; an error of the block itself goes first."""
    reg.register("a")

    def broken(_: object) -> None:
        message = "a bug"
        raise RuntimeError(message)

    with caplog.at_level(logging.ERROR):
        subscription = reg.subscribe(broken, after="oldest")
        until(lambda: not subscription.alive)
        assert "a subscriber raised on seq" in caplog.text
    with pytest.raises(RuntimeError, match="a bug"):
        subscription.close()
    subscription.close()
    with pytest.raises(RuntimeError, match="a bug"), reg.subscribe(broken, after="oldest") as one:
        until(lambda: not one.alive)
    with pytest.raises(KeyError), reg.subscribe(broken, after="oldest") as one:
        until(lambda: not one.alive)
        raise KeyError


def test_change_has_what_its_event_has(reg: Registry) -> None:
    """And both say code, signal, reason and whether it was expected, None where they do not."""
    reg.register("a")
    reg.exited("a", code=3)
    reg.register("b")
    reg.remove("b", reason="moved")
    with reg.watch(after="oldest") as items:
        changes = [item for item in items.drain() if item.kind == "change"]
    first, ended, _, gone = changes
    assert (ended.code, ended.signal, ended.expected, ended.crashed) == (3, None, False, True)
    assert (first.code, first.expected, first.reason, gone.reason) == (None, None, None, "moved")
    assert (ended.data, ended.ts, ended.actor) == (
        ended.event.data, ended.event.ts, ended.event.actor,
    )  # fmt: skip
    assert (ended.known_type, ended.event.known_type) == ("worker.exited", "worker.exited")
    assert repr(ended) == f"<Change {ended.seq} worker.exited a>"
    assert repr(ended.event) == f"<Event {ended.seq} worker.exited a>"


def test_store_may_come_later(place: Path) -> None:
    """With create it is there at once; watch, wait and mirror wait for one that others make."""
    other = place.parent / "other"
    with crewlog.open(other, create=True) as reg:
        assert reg.exists
        assert reg.watch(after="now").drain()[0].kind == "synced"
    with crewlog.open(place) as reader:
        with pytest.raises(crewlog.StoreMissing):
            reader.watch(wait_for_store=0.05)
        with pytest.raises(crewlog.WaitTimeout):
            reader.wait("a", state="ready", timeout_s=0.05)

        def begin() -> None:
            with crewlog.open(place) as writer:
                writer.register("a", ready=True)

        late = threading.Timer(0.2, begin)
        late.start()
        with reader.watch(after="now", wait_for_store=20) as items:
            item = items.next(20)
            assert item is not None
            assert item.kind == "change", "all of it was to come"
        assert reader.wait("a", state="ready", timeout_s=20).sid == "a"
        late.join()


# -- ask the past ---------------------------------------------------------------------------


def test_times_are_said_as_on_the_command_line(reg: Registry) -> None:
    """Spans before now, and words."""
    reg.register("a")
    assert [e.sid for e in reg.history(since="1h")] == ["a"]
    assert [e.sid for e in reg.history(since=timedelta(hours=1), until="now")] == ["a"]
    assert not list(reg.history(until="1h"))
    assert len(reg.at("now").workers) == 1
    with reg.watch(after=timedelta(hours=1)) as items:
        assert items.drain()[0].kind == "change"


# -- what a program holds -------------------------------------------------------------------


def test_worker_only_reads(reg: Registry) -> None:
    """Its mappings refuse to change, and are JSON, and travel between processes."""
    worker = reg.register("a", labels={"k": "v"}, meta={"n": [1]})
    labels = cast("dict[str, str]", worker.labels)  # as who does not heed its type
    with pytest.raises(TypeError, match=r"reg\.update"):
        labels["k"] = "w"
    with pytest.raises(TypeError, match=r"reg\.update"):
        labels.update(k="w")
    with pytest.raises(TypeError, match=r"reg\.update"):
        cast("dict[str, object]", worker.meta).pop("n")
    assert orjson.dumps(worker.labels) == json.dumps(worker.labels, separators=(",", ":")).encode()
    again = pickle.loads(pickle.dumps(worker))  # noqa: S301 (our own)
    assert again == worker
    assert repr(again) == f"<Worker a starting pid {worker.pid} rev 2>"
    assert repr(reg) == f"<Registry {reg.path}, seq 2>"


def test_reasons_need_not_be_given(reg: Registry, crew: Crew) -> None:
    """As on the command line."""
    reg.register("a", pid=crew.sleeper().pid)
    assert reg.stop("a").type == "worker.exited" or reg.get("a") is not None
    reg.register("b")
    assert reg.remove("b").reason == "crewlog.remove"
    reasons = [e.reason for e in reg.history(types=["worker.stop_requested"])]
    assert reasons == ["crewlog.stop"]


def test_asyncio_has_the_same_names(place: Path) -> None:
    """What may take long is awaited, a property too; the old call of one says what is new."""

    async def main() -> None:
        async with crewlog.aopen(place, create=True) as reg:
            assert await reg.exists
            assert (reg.where, reg.path) == (str(place), place)
            async with reg.presence("me", labels={"k": "v"}) as me:
                assert me.worker.sid == "me"
                assert [w.sid for w in await reg.living(labels={"k": "v"})] == ["me"]
            seq = await reg.last_seq
            with pytest.warns(DeprecationWarning, match=r"await reg\.last_seq"):
                assert await reg.last_seq() == seq
            with pytest.raises(TypeError, match="await it"):
                bool(reg.exists)
            ends = [event async for event in reg.history(since="1h", types=["worker.exited"])]
            assert [event.code for event in ends] == [0]
            with pytest.raises(ZeroDivisionError):
                async with reg.presence("broken"):
                    raise ZeroDivisionError
            broken = await reg.get("broken")
            assert broken is not None
            assert broken.exit is not None
            assert broken.exit.code == 1

    asyncio.run(main())


def test_asyncio_waits_for_a_store_without_a_thread(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a task that is cancelled meanwhile leaves nothing behind."""
    waiting_ones: set[int] = set()
    real = follow.awaited

    def awaited(session: Session, patience: bool | float) -> Iterator[float]:
        pauses = real(session, patience)
        for pause_s in pauses:
            waiting_ones.add(id(pauses))
            yield pause_s

    monkeypatch.setattr(follow, "awaited", awaited)

    async def main() -> None:
        async with crewlog.aopen(place) as reg:

            async def first() -> str:
                async with reg.watch(after="now", wait_for_store=True) as items:
                    async for item in items:
                        if item.kind != "synced":  # which may come first: nothing was there yet
                            return item.kind
                raise AssertionError

            waiting = asyncio.create_task(first())
            idle = asyncio.create_task(first())
            woken = asyncio.create_task(reg.wait("a", state="ready", timeout_s=20))
            while len(waiting_ones) < 3:
                await asyncio.sleep(0.01)
            idle.cancel()
            await reg.register("a", ready=True)
            assert await asyncio.wait_for(waiting, 20) == "change"
            assert (await woken).sid == "a"

    asyncio.run(main())


# -- help, and what type checkers see -------------------------------------------------------


def test_help_fits_a_screen_or_two() -> None:
    """Verbs first; every option of a verb has its name, type and default."""
    text = pydoc.render_doc(crewlog)
    assert len(text.splitlines()) < 120
    for verb in ("living", "presence", "ensure", "watch", "history"):
        assert verb in text
    verbs: list[object] = [Registry.ensure, Registry.presence, crewlog.worker, Registry.watch]
    for one in verbs:
        assert "**options" not in pydoc.render_doc(one)
    assert "labels" in pydoc.render_doc(crewlog.worker)


def test_old_names_say_the_new_ones() -> None:
    """Errors that few programs catch stand in crewlog.errors only."""
    with pytest.warns(DeprecationWarning, match=r"crewlog\.errors\.LogCorrupt"):
        assert crewlog.LogCorrupt is crewlog.errors.LogCorrupt


@pytest.mark.long
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_find_each_mistake(checker: str, tmp_path: Path) -> None:
    """tests/typing/mistakes.txt: every line that is marked fails, and no other."""
    tool = Path(sys.executable).with_name(checker)
    if not tool.exists():
        pytest.skip(f"needs {checker}: pip install '.[lint]'")
    text = (ROOT / "tests" / "typing" / "mistakes.txt").read_text()
    marked = {n for n, row in enumerate(text.splitlines(), 1) if "# wrong" in row}
    assert len(marked) > 8
    copy = tmp_path / "mistakes.py"
    copy.write_text(text)
    strict = ["--strict", "--no-warn-unused-ignores", "--cache-dir", str(tmp_path)]
    words = strict if checker == "mypy" else ["--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(
        [str(tool), *words, str(copy)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if checker == "mypy":
        rows = [row for row in done.stdout.splitlines() if " error:" in row]
        lines = {int(row.split(":")[1]) for row in rows}
    else:
        mistakes = json.loads(done.stdout)["generalDiagnostics"]
        lines = {item["range"]["start"]["line"] + 1 for item in mistakes}
    assert lines == marked, done.stdout
