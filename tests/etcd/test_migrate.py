"""A store moves between engines with its whole history, and nothing of it changes."""

import contextlib
import shutil
from pathlib import Path

import pytest

import crewlog
from cluster import MISSING, Cluster
from commands import Cli
from crewlog.errors import HistoryDiverged, LockBusy, LogCorrupt, NotAStore, Unavailable
from crewlog.etcd.client import Client
from crewlog.process import identity
from crewlog.registry import Registry
from crewlog_compactor import KeepEvents, anchor, compact, migrate, repair, verify
from crewlog_compactor.copy import Copy
from procs import Crew, files, forked, joined, kill

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


def lived(reg: Registry, crew: Crew, *, keep: int | None = None) -> None:
    """Give a store a history: batches, deaths, compactions, a cursor, maybe retention."""
    for number in range(12):
        process = crew.sleeper()
        with reg.batch() as batch:
            batch.register(f"w{number}", pid=process.pid, labels={"n": str(number)})
            batch.update(f"w{number}", state="ready")
            batch.update(f"w{number}", meta={"words": "ä\n" * number})
        if number % 3 == 0:
            kill(process)
        if number % 4 == 0:
            reg.exited("w1", code=number) if number == 4 else None
        if number % 5 == 4:
            compact(reg, keep_history=None if keep is None else KeepEvents(keep))
    with reg.watch(cursor="mailer", after=reg.last_seq - 3) as items:
        items.next(1)
        items.next(1)


def lines_of(reg: Registry) -> list[bytes]:
    """Return the lines of the history, as they are."""
    return [raw for _, raw in reg.store().read(reg.store().first_seq() - 1)]


@pytest.mark.parametrize("keep", [None, 20])
def test_there_and_back_is_byte_for_byte_the_same(
    reg: Registry, url: str, tmp_path: Path, crew: Crew, keep: int | None
) -> None:
    """Lines, state, totals, past, cursors and anchors; and life goes on at every place."""
    lived(reg, crew, keep=keep)
    kept, lines, before = anchor(reg), lines_of(reg), reg.state()
    report = migrate(reg.where, url)
    assert (report.last_seq, report.events) == (reg.last_seq, len(lines))
    assert (report.workers, report.cursors) == (len(before.workers), 1)
    with crewlog.open(url) as there:
        assert lines_of(there) == lines
        assert there.state() == before
        assert there.totals() == reg.totals()
        assert [(c.name, c.seq) for c in there.store().cursors.every()] == [
            (c.name, c.seq) for c in reg.store().cursors.every()
        ]
        assert verify(url, anchor=kept).ok
        first = there.store().first_seq()
        for seq in range(first, there.last_seq + 1, 5):
            assert there.at(seq).workers == reg.at(seq).workers
        assert there.liveness("w11").alive, "the same host, the same process"
        there.register("new")
        compact(there)
        there.register("newer")
        lines, before = lines_of(there), there.state()
    back = tmp_path / "back"
    migrate(url, back)
    with crewlog.open(back) as again:
        assert lines_of(again) == lines
        assert again.state() == before
        assert verify(back, anchor=kept).ok
        again.register("newest")
        compact(again)
        assert verify(back).ok
        assert again.store().id == reg.store().id
    assert lines_of(reg) != lines, "the source stays as it was"


def test_target_that_is_not_empty_is_refused(reg: Registry, url: str, tmp_path: Path) -> None:
    """Of either kind; nothing there is touched."""
    reg.register("a")
    with crewlog.open(url) as there:
        there.register("other")
        last = there.last_seq
        with pytest.raises(NotAStore, match="not empty"):
            migrate(reg.where, url)
        with pytest.raises(NotAStore, match="not empty"):
            migrate(url, reg.where)
        assert there.last_seq == last
        with pytest.raises(ValueError, match="same place"):
            migrate(url, url)
    strange = tmp_path / "strange"
    strange.mkdir(mode=0o700)
    (strange / "file").touch()
    with pytest.raises(NotAStore):
        migrate(reg.where, strange)
    assert (strange / "file").exists()
    with pytest.raises(crewlog.StoreMissing):
        migrate(tmp_path / "nothing", f"{url}-2")


def test_migration_that_is_interrupted_leaves_no_store_and_is_begun_anew(
    reg: Registry, url: str, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its transactions: nothing can be opened there, and the next one succeeds."""
    lived(reg, crew)
    real, calls, limit = Client.commit, 0, 0

    def failing(self: Client, body: dict[str, object]) -> object:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise Unavailable(self.where, why="it was cut off")
        return real(self, body)  # type: ignore[arg-type]

    while True:
        limit, calls = limit + 1, 0
        monkeypatch.setattr(Client, "commit", failing)
        try:
            migrate(reg.where, url)
        except Unavailable:
            with crewlog.open(url) as there:
                assert not there.exists
        else:
            break
        finally:
            monkeypatch.setattr(Client, "commit", real)
    assert limit > 4
    assert verify(url).ok
    with crewlog.open(url) as there:
        assert lines_of(there) == lines_of(reg)


def test_change_that_comes_between_is_noticed(
    reg: Registry, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A directory's writers wait; those of a cluster are noticed before the last step."""
    reg.register("a")
    migrate(reg.where, url)
    there = crewlog.open(url)
    real = Copy.require_still

    def late(copy: Copy) -> None:
        there.register("late")
        real(copy)

    monkeypatch.setattr(Copy, "require_still", late)
    with pytest.raises(LockBusy, match="a writer, who has changed it"):
        migrate(url, tmp_path / "back")
    there.close()


def test_damaged_source_is_refused_and_a_repaired_one_moves_with_its_gap(
    reg: Registry, url: str
) -> None:
    """What is lost stays named; nothing is made up."""
    reg.register("a")
    for number in range(6):
        reg.update("a", meta={"n": number})
    files(reg).rotate()
    reg.register("b")
    (segment,) = [p for p in (reg.path / "log").iterdir() if p.name.startswith("0" * 19 + "1.")]
    data = segment.read_bytes().split(b"\n")
    data[4] = data[4].replace(b"worker", b"wOrker", 1)
    segment.write_bytes(b"\n".join(data))
    reg.close()
    with pytest.raises((LogCorrupt, HistoryDiverged)):
        migrate(reg.where, url)
    with crewlog.open(url) as there:
        assert not there.exists
    repair(reg.where, yes=True, accept_loss=[(5, 5)])
    migrate(reg.where, url)
    assert verify(url).gaps == ((5, 5),)
    with crewlog.open(url) as there, crewlog.open(reg.where) as again:
        assert there.state() == again.state()


def test_command_line_moves_a_store(cli: Cli, url: str, tmp_path: Path, reg: Registry) -> None:
    """One line for a person, an object for a program, 66 for a target that is taken."""
    reg.register("a")
    done = cli("migrate", reg.where, url, code=2)
    assert "no --dir" in done.stderr
    bare = Cli.bare
    assert "copied 2 events up to seq 2, 1 workers" in bare("migrate", reg.where, url).stdout
    assert "not empty" in bare("migrate", reg.where, url, code=66).stderr
    assert '"workers":1' in bare("migrate", url, tmp_path / "back", "--json").stdout
    shutil.rmtree(tmp_path / "back")


def test_many_workers_and_lines_move(one_server: Cluster, url: str, reg: Registry) -> None:
    """More than a page and a transaction hold."""
    for part in range(5):
        with reg.batch() as batch:  # one unit: in a cluster it takes many transactions
            for number in range(300):
                batch.register(f"w{part}-{number}", meta={"filling": "x" * 300})
    for number in range(60):
        reg.update("w0-0", meta={"filling": f"{number:02d}" * 15_000})
    migrate(reg.where, url)
    with crewlog.open(url) as there:
        assert len(there.workers()) == 1500
        assert there.state() == reg.state()
        there.update("w3-7", state="ready")
    assert verify(url).ok


def test_leases_do_not_speak_for_a_copy(url: str, crew: Crew, one_server: Cluster) -> None:
    """A worker of a copied store is judged by its process; its old lease says nothing of it."""
    with crewlog.open(url) as reg:
        reg.register("a", lease=True)
    migrate(url, f"{url}-copy")
    with crewlog.open(f"{url}-copy") as copy, pytest.MonkeyPatch.context() as patch:
        assert copy.liveness("a").alive
        there = identity.Scope("11111111-0000-4000-8000-000000000000", "another", None)
        patch.setattr(identity, "scope", lambda: there)
        assert copy.liveness("a").cause == "foreign_host"


def test_same_migration_twice_at_once_leaves_one_whole_store(
    reg: Registry, url: str, crew: Crew
) -> None:
    """One of them, or none, puts it in place; never half of each."""
    lived(reg, crew)
    reg.close()

    def work() -> None:
        with contextlib.suppress(crewlog.CrewlogError):
            migrate(back, f"{url}-2")

    back = f"{url}-1"
    migrate(reg.where, back)
    joined(*[forked(work) for _ in range(4)])
    with contextlib.suppress(NotAStore):
        migrate(back, f"{url}-2")
    assert verify(f"{url}-2").ok
