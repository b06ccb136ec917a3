"""A change on etcd is made once or not at all, and what its caller is told is true."""

import asyncio
import contextlib
import json
import os
import random
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import crewlog
from cluster import MISSING, Cluster
from crewlog.errors import LockBusy, Unavailable, UnknownOutcome
from crewlog.etcd import append
from crewlog.etcd.client import Client
from crewlog.model.steps import Wish, decide_all, register_step, release_step
from crewlog.process import identity
from crewlog.queue import Request
from crewlog.registry import Registry
from crewlog_compactor import compact, verify
from lossy import LossyProxy
from procs import forked, joined, slay, until
from stores import opened

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


class Ledger:
    """What writers were told: numbers that are acknowledged, and those whose outcome is unknown."""

    def __init__(self, path: Path) -> None:
        """Write to a file: writers are processes."""
        self.path = path

    def note(self, writer: int, number: int, what: str) -> None:
        """Add one row, with one write."""
        with self.path.open("a") as file:
            file.write(json.dumps([writer, number, what]) + "\n")

    def rows(self) -> list[tuple[int, int, str]]:
        """Return all rows."""
        return [tuple(json.loads(row)) for row in self.path.read_text().splitlines()]


def count(reg: Registry, sid: str, number: int) -> None:
    """Make a change that would be made again if it were asked for again: two events at once."""
    with reg.batch() as batch:
        batch.update(sid, meta={"number": number, "fresh": True})
        batch.update(sid, meta={"fresh": None})


def numbers(reg: Registry, sid: str) -> list[int]:
    """Return the numbers of a worker's changes, in order."""
    rows = []
    for event in reg.history(sid=sid, types=["worker.updated"]):
        meta = event.data["meta"]
        assert isinstance(meta, dict)
        rows += [int(meta["number"])] if "number" in meta else []
    return rows


def write_on(place: str, writer: int, ledger: Ledger, stop: Path, *, wait_s: float) -> None:
    """Write numbers, one after the other, until told to stop; note what each came to."""
    with crewlog.open(place, lock_timeout_s=wait_s) as reg:
        number = 0
        while not stop.exists():
            number += 1
            try:
                count(reg, f"w{writer}", number)
            except UnknownOutcome:
                ledger.note(writer, number, "unknown")
            except (Unavailable, LockBusy) as error:
                ledger.note(writer, number, error.outcome)
            else:
                ledger.note(writer, number, "done")


def watch_on(place: str, stop: Path, seen: Path) -> None:
    """Take every change until told to stop and nothing is left; write down the seqs."""
    seqs: list[int] = []
    with crewlog.open(place) as reg, reg.watch(after=0) as items:
        while True:
            done = stop.exists()
            try:
                item = items.next(0.2)
            except Unavailable:
                continue
            if item is None and done:
                break
            if item is not None and item.kind != "synced":
                assert item.kind == "change", item
                seqs.append(item.seq)
    seen.write_text(json.dumps(seqs))


@contextmanager
def writers(place: str, tmp_path: Path, *, count: int = 4, wait_s: float = 5.0) -> Iterator[Ledger]:
    """Let writers and a watcher run beside a block; check, at its end, what they were told."""
    ledger, stop, seen = Ledger(tmp_path / "ledger"), tmp_path / "stop", tmp_path / "watched"
    ledger.path.touch()
    with crewlog.open(place, lock_timeout_s=30) as reg:
        for writer in range(count):
            reg.register(f"w{writer}")
    pids = [
        forked(lambda n=n: write_on(place, n, ledger, stop, wait_s=wait_s))  # type: ignore[misc]
        for n in range(count)
    ]
    ended = tmp_path / "ended"
    watcher = forked(lambda: watch_on(place, ended, seen))
    try:
        yield ledger
        stop.touch()
        joined(*pids)
        ended.touch()
        joined(watcher)
    finally:
        for pid in (*pids, watcher):
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                slay(pid)
    hold_against(place, ledger)
    with crewlog.open(place) as reg:
        there = [event.seq for event in reg.history()]
    assert json.loads(seen.read_text()) == there, "the watcher got each event once, in order"


def hold_against(place: str, ledger: Ledger) -> None:
    """Hold what writers were told against the history."""
    with crewlog.open(place) as reg:
        sids = [worker.sid for worker in reg.workers(all=True)]
        made = Counter((sid, number) for sid in sids for number in numbers(reg, sid))
    assert [key for key, times in made.items() if times > 1] == [], "made twice"
    acknowledged = {(f"w{writer}", number): what for writer, number, what in ledger.rows()}
    lost = [key for key, what in acknowledged.items() if what == "done" and key not in made]
    assert lost == [], "acknowledged and lost"
    false = [key for key, what in acknowledged.items() if what == "not_written" and key in made]
    assert false == [], "told not to be written, and written"
    assert verify(place).ok


def done(ledger: Ledger) -> int:
    """Count what was acknowledged."""
    return sum(1 for _, _, what in ledger.rows() if what == "done")


def more(ledger: Ledger, count: int) -> None:
    """Wait until so many more changes are acknowledged."""
    begun = done(ledger)
    until(lambda: done(ledger) >= begun + count, wait_s=60)


# -- answers that are lost ------------------------------------------------------------------


def behind(one_server: Cluster, tmp_path: Path, proxy: LossyProxy) -> str:
    """Return the address of a store, through the proxy."""
    return f"etcd://127.0.0.1:{proxy.port}/test/{tmp_path.name}"


def count_on(reg: Registry, times: int) -> list[int]:
    """Count up, one change each; return the numbers that the history holds."""
    for number in range(times):
        count(reg, "a", number)
    return numbers(reg, "a")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_lost_answers_and_late_requests_make_nothing_twice(
    one_server: Cluster, tmp_path: Path, seed: int
) -> None:
    """A third of the requests are lost, lose their answer, or come after the second sending."""
    proxy = LossyProxy(one_server.servers[0].port, seed=seed)
    place = behind(one_server, tmp_path, proxy)
    with crewlog.open(place) as reg:
        reg.register("a")
        proxy.share = 0.33
        assert count_on(reg, 150) == list(range(150))
        proxy.share = 0.0
        assert min(proxy.met["lose_answer"], proxy.met["late"], proxy.met["lose_request"]) > 5
    assert verify(place).ok
    proxy.close()


def test_control_a_writer_that_does_not_know_its_own_attempt_writes_twice(
    one_server: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above finds the usual mistake: look, and send again."""
    monkeypatch.setattr(append.EtcdLog, "_is_mine", lambda *_: False)
    proxy = LossyProxy(one_server.servers[0].port)
    with crewlog.open(behind(one_server, tmp_path, proxy)) as reg:
        reg.register("a")
        proxy.share = 0.33
        counted = count_on(reg, 150)
        proxy.share = 0.0
    assert len(counted) > 150
    proxy.close()


def test_no_answer_until_the_deadline_is_an_unknown_outcome(
    one_server: Cluster, tmp_path: Path
) -> None:
    """The change may be there, and the error says so; where none was sent, that is known."""
    proxy = LossyProxy(one_server.servers[0].port)
    place = behind(one_server, tmp_path, proxy)
    with crewlog.open(place, lock_timeout_s=2) as reg:
        reg.register("a")
        proxy.share = 1.0
        with pytest.raises(UnknownOutcome) as caught:
            reg.update("a", meta={"n": 1})
        assert caught.value.outcome == "unknown"
        proxy.close()
        proxy.share = 0.0
    gone = f"etcd://127.0.0.1:{proxy.port}/test/{tmp_path.name}"
    with crewlog.open(gone, lock_timeout_s=0.3) as reg, pytest.raises(Unavailable) as never:
        reg.register("b")
    assert never.value.outcome == "not_written"


# -- servers that fail ----------------------------------------------------------------------


def test_server_killed_with_9_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """One server, killed and started again under four writers."""
    with Cluster(tmp_path / "home") as cluster:
        (server,) = cluster.servers
        with writers(cluster.url("a"), tmp_path) as ledger:
            for _ in range(5):
                more(ledger, 40)
                server.kill()
                server.start()
                cluster.wait()
            more(ledger, 40)


def kill_leader(cluster: Cluster) -> None:
    """End the leader, and start it again once there is another one."""
    leader = cluster.leader()
    leader.kill()
    others = [server for server in cluster.servers if server is not leader]
    until(lambda: any(server.leads() for server in others))
    leader.start()
    cluster.wait()


def pause_leader(cluster: Cluster) -> None:
    """Stop the leader for longer than an election takes, then let it go on."""
    leader = cluster.leader()
    leader.send(signal.SIGSTOP)
    others = [server for server in cluster.servers if server is not leader]
    until(lambda: any(server.leads() for server in others))
    leader.send(signal.SIGCONT)
    cluster.wait()


def lose_quorum(cluster: Cluster) -> None:
    """End two of three servers, for a moment."""
    leader = cluster.leader()
    two = [leader, next(server for server in cluster.servers if server is not leader)]
    for server in two:
        server.kill()
    threading.Event().wait(0.5)
    for server in two:
        server.start()
    cluster.wait()


@pytest.mark.parametrize("fault", [kill_leader, pause_leader, lose_quorum])
def test_three_servers_lose_and_double_nothing(
    tmp_path: Path, fault: Callable[[Cluster], None]
) -> None:
    """Whatever befalls the leader: none acknowledged is lost, none made twice, watchers exact."""
    with (
        Cluster(tmp_path / "home", size=3) as cluster,
        writers(cluster.url("a"), tmp_path, wait_s=3.0) as ledger,
    ):
        for _ in range(4):
            more(ledger, 40)
            fault(cluster)
        more(ledger, 40)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_many_faults_of_three_servers_by_chance(tmp_path: Path) -> None:
    """Leaders killed and stopped, quorums lost, the history of the cluster compacted, by chance."""
    dice, stop = random.Random(int(os.environ.get("SEED", "1"))), threading.Event()
    with Cluster(tmp_path / "home", size=3) as cluster:
        thread = threading.Thread(target=storm, args=(cluster, stop))
        thread.start()
        try:
            with writers(cluster.url("a"), tmp_path, wait_s=3.0) as ledger:
                for _ in range(int(os.environ.get("FAULTS", "40"))):
                    more(ledger, 40)
                    dice.choice([kill_leader, pause_leader, lose_quorum])(cluster)
                more(ledger, 40)
        finally:
            stop.set()
            thread.join()


def test_quorum_that_stays_lost_is_told_in_time(tmp_path: Path) -> None:
    """Reading and writing end with an error after the wait that was asked for."""
    with Cluster(tmp_path, size=3) as cluster:
        with crewlog.open(cluster.url("a"), lock_timeout_s=1.0) as reg:
            reg.register("a")
            for server in cluster.servers[:2]:
                server.kill()
            with pytest.raises(Unavailable):
                reg.workers()
            with pytest.raises((Unavailable, UnknownOutcome)):
                reg.update("a", meta={"n": 1})
        for server in cluster.servers[:2]:
            server.start()
        cluster.wait()


def storm(cluster: Cluster, stop: threading.Event) -> None:
    """Compact the cluster's own history, again and again, up to now."""
    port = cluster.servers[0].port

    def ask(path: str, body: dict[str, object]) -> dict[str, dict[str, str]]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v3/{path}", data=json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 (as above)
            members: dict[str, dict[str, str]] = json.load(answer)
            return members

    while not stop.wait(0.005):
        try:
            revision = ask("kv/range", {"key": "YQ=="})["header"]["revision"]
            ask("kv/compaction", {"revision": revision, "physical": True})
        except OSError:  # that revision is compacted already, or the server is down
            continue


def test_compaction_storm_of_the_cluster_changes_nothing(tmp_path: Path) -> None:
    """Its own compaction forgets revisions; no event and no watcher depends on one."""
    with Cluster(tmp_path / "home") as cluster:
        stop = threading.Event()
        thread = threading.Thread(target=storm, args=(cluster, stop))
        thread.start()
        try:
            place = cluster.url("a")
            with writers(place, tmp_path) as ledger:
                more(ledger, 200)
                with crewlog.open(place) as reg:
                    compact(reg)
                    for number in range(30):
                        reg.register(f"x{number}")
                    assert len(reg.workers()) == 34
        finally:
            stop.set()
            thread.join()


def test_writers_that_are_killed_lose_nothing(one_server: Cluster, tmp_path: Path) -> None:
    """SIGKILL in the middle of a request: the change is there once, or not at all."""
    place = one_server.url(f"test/{tmp_path.name}")
    ledger, stop = Ledger(tmp_path / "ledger"), tmp_path / "stop"
    ledger.path.touch()
    with crewlog.open(place) as reg:
        for writer in range(8):
            reg.register(f"w{writer}")
            pid = forked(lambda n=writer: write_on(place, n, ledger, stop, wait_s=5))  # type: ignore[misc]
            more(ledger, 10)
            slay(pid)
    hold_against(place, ledger)


def test_watch_rides_out_servers_that_are_gone(tmp_path: Path) -> None:
    """For a thread and for a loop: no error, nothing missed, and the loop is never held up."""
    with Cluster(tmp_path / "home") as cluster:
        (server,) = cluster.servers
        place = cluster.url("a")
        with crewlog.open(place, lock_timeout_s=2) as reg:
            reg.register("a")
            with reg.watch(after="now") as items:
                items.next(1)
                server.kill()
                began = time.monotonic()
                assert items.next(1.5) is None, "though each look takes longer than a second"
                assert time.monotonic() - began < 30
                server.start()
                cluster.wait()
                reg.update("a", state="ready")
                item = items.next(20)
                assert item is not None
                assert item.seq == 3

            async def work() -> tuple[int, float]:
                async with reg.awatch(after=3) as waiting:
                    await waiting.next(1)
                    server.kill()
                    asking = asyncio.create_task(waiting.next(30))
                    latest = 0.0
                    for _ in range(100):
                        began = time.monotonic()
                        await asyncio.sleep(0.01)
                        latest = max(latest, time.monotonic() - began)
                    await asyncio.to_thread(server.start)
                    await asyncio.to_thread(cluster.wait)
                    await asyncio.to_thread(reg.update, "a", meta={"n": 1})
                    answer = await asking
                    assert answer is not None
                    return answer.seq, latest

            seq, latest_s = asyncio.run(work())
            assert seq == 4
            assert latest_s < 5, "the loop goes on while one of its tasks waits for a server"


def test_task_that_is_cancelled_leaves_its_item_to_the_next(
    one_server: Cluster, tmp_path: Path
) -> None:
    """Cancelled at any moment: each item once, in order."""

    async def work() -> list[int]:
        seqs: list[int] = []
        async with crewlog.aopen(one_server.url(f"test/{tmp_path.name}")) as reg:
            await reg.register("a")
            async with reg.watch(after="now") as items:
                await items.next(1)
                for number in range(60):
                    await reg.update("a", meta={"n": number})
                while len(seqs) < 60:
                    try:
                        async with asyncio.timeout(0.0007):
                            item = await items.next(5)
                    except TimeoutError:
                        continue
                    if item is not None and item.kind == "change":
                        seqs.append(item.seq)
        return seqs

    assert asyncio.run(work()) == list(range(3, 63))


def test_cursor_is_not_moved_back_by_a_request_that_comes_late(
    one_server: Cluster, tmp_path: Path
) -> None:
    """A second copy of an acknowledgement changes nothing."""
    proxy = LossyProxy(one_server.servers[0].port, seed=4)
    with crewlog.open(behind(one_server, tmp_path, proxy)) as reg:
        reg.register("a")
        owned = reg.store().cursors.own("c", start=0)
        proxy.share = 0.4
        for seq in range(1, 100):
            owned.advance(seq)
            if seq % 3 == 0:
                time.sleep(0.05)  # what comes late has come
                state = reg.store().cursors.read("c")
                assert state is not None
                assert state.seq == seq
        proxy.share = 0.0
        assert proxy.met["late"] > 5
        owned.close()
    proxy.close()


def test_rider_is_not_refused_for_a_change_that_was_not_made(
    one_server: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the transaction fails, whoever was refused because of it hears of that failure."""
    with crewlog.open(one_server.url(f"test/{tmp_path.name}")) as reg:
        reg.register("a")
        log = reg.store()
        assert isinstance(log, append.EtcdLog)

        def failing(*_: object) -> None:
            raise Unavailable("nowhere", why="it was cut off")

        monkeypatch.setattr(log.client, "commit", failing)
        author = reg.author()
        steps = [
            register_step(
                author, "dup", Wish(), who=identity.capture(os.getpid()), owner=None, sock_id=None
            )
            for _ in range(2)
        ] + [release_step(author, "nobody", reason="r", expect=None)]  # fmt: skip
        first = release_step(author, "nobody", reason="r", expect=None)
        group = [Request(decide_all([step]), {step.sid}) for step in (first, *steps)]
        with pytest.raises(Unavailable):
            log.write(group)
        assert [request.refused for request in group] == [True, False, False, False]


def test_threads_of_a_forked_child_never_meet_the_parents_connections(
    one_server: Cluster, tmp_path: Path
) -> None:
    """Each asks for its own, at the same moment, right after the fork."""
    with crewlog.open(one_server.url(f"test/{tmp_path.name}")) as reg:
        names = [f"w{number}" for number in range(8)]
        with reg.batch() as batch:
            for name in names:
                batch.register(name)

        def work() -> None:
            wrong: list[str] = []

            def ask(name: str) -> None:
                for _ in range(20):
                    worker = reg.get(name)
                    if worker is None or worker.sid != name:
                        wrong.append(name)

            threads = [threading.Thread(target=ask, args=(name,)) for name in names]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert wrong == []

        real = Client._new_pool
        with pytest.MonkeyPatch.context() as patch:

            def slow(self: Client) -> object:
                time.sleep(0.02)
                return real(self)

            patch.setattr(Client, "_new_pool", slow)
            pids = [forked(work) for _ in range(3)]
            for name in names * 5:
                worker = reg.get(name)
                assert worker is not None
                assert worker.sid == name
            joined(*pids)


@pytest.mark.limits(safety_look_s=60.0)
def test_change_wakes_a_watcher_long_before_it_would_look(
    one_server: Cluster, tmp_path: Path
) -> None:
    """The watch of etcd rings; the look a second is for when it does not."""
    with opened(one_server.url(f"test/{tmp_path.name}")) as reg:
        reg.register("a")
        with reg.watch(after="now") as items:
            items.next(1)
            for number in range(5):
                threading.Timer(0.1, reg.update, ["a"], {"meta": {"n": number}}).start()
                began = time.monotonic()
                item = items.next(10)
                assert item is not None
                assert time.monotonic() - began < 8, "woken, not at the end of the wait"


@pytest.mark.parametrize("fresh", [True, False])
def test_batch_looks_once_for_all_its_workers(
    one_server: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fresh: bool
) -> None:
    """A hundred registrations: a handful of requests, in a process that wrote before as well."""
    from crewlog.etcd.client import Client

    sent: list[int] = []
    real = Client._request

    def counted(self: Client, *given: object, **options: object) -> object:
        sent.append(1)
        return real(self, *given, **options)  # type: ignore[arg-type]

    with crewlog.open(one_server.url(f"test/{tmp_path.name}")) as reg:
        if not fresh:
            reg.register("before")
            reg.update("before", labels={"n": "1"})
        monkeypatch.setattr(Client, "_request", counted)
        if fresh:
            reg.workers()
        sent.clear()
        with reg.batch() as batch:
            for number in range(99):
                batch.register(f"w-{number}")
        assert len(sent) <= (12 if fresh else 4)  # a fresh place: the store is made, too
        assert len(reg.workers()) == 99 + (not fresh)
