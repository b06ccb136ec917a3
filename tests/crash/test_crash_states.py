"""At every moment, in every state that a power cut may leave, nothing acknowledged is lost.

After each change of any file the crash states of recording.py are written out, opened under another
boot, and checked: what was acknowledged is there, what is there is a prefix of what was asked for,
batches are whole, the next change goes through, and verify finds nothing.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import stores
from crewlog.errors import CrewlogError
from crewlog.local import cursors, layout
from crewlog.registry import Registry
from crewlog_compactor import collect, compact, repair, verify
from faults import another_boot, registry_on
from procs import files
from recording import CrashState, File, RecordingDisk
from stores import opened

pytestmark = [pytest.mark.long, pytest.mark.limits(redo_bytes=8192)]

Story = Callable[[Registry, "Witness"], None]


class Witness(RecordingDisk):
    """Checks every crash state of every moment."""

    def __init__(self, home: Path, *, every: int = 1) -> None:
        """Record below home/live; look at every `every`th moment."""
        self.root_path = home / "live"
        self.root_path.mkdir(mode=0o700)
        super().__init__(self.root_path)
        self.home = home
        self.shown: list[tuple[str, str]] = []
        self.acknowledged: list[tuple[str, str]] = []
        self.asked: list[tuple[str, str]] = []
        self.units: set[int] = {0}
        self.counts = {"moments": 0, "states": 0}
        self.seen: set[tuple[int, int]] = set()
        self.failures: list[str] = []
        self.stop_at_first = False
        self.every = every
        self.looking = True
        self.dropping = False  # retention takes the oldest events by policy

    def asks(self, *events: tuple[str, str]) -> None:
        """Be told what is about to be asked for, as one unit."""
        self.asked += events
        self.units.add(len(self.asked))

    def acknowledges(self) -> None:
        """Be told that the call has returned."""
        self.acknowledged = list(self.asked)

    def done(self, call: str) -> None:
        self.counts["moments"] += 1
        if not self.looking or self.counts["moments"] % self.every:
            return
        self.shown = self._shown()
        for state in self.states():
            target = self.home / "crashed"
            target.mkdir(mode=0o700)
            try:
                self.materialise(state, target)
                mark = _digest(target)
                if (mark, len(self.acknowledged)) not in self.seen:
                    self.seen.add((mark, len(self.acknowledged)))
                    self.counts["states"] += 1
                    self._check(target / "store", call, state)
            finally:
                shutil.rmtree(target)
            if self.failures and self.stop_at_first:
                return

    def _shown(self) -> list[tuple[str, str]]:
        """Return what a reader is shown at this moment: nothing of it may ever be taken back."""
        try:
            with opened(self.root_path / "store") as reader:
                return [(e.type, e.sid) for e in reader.history()]
        except (CrewlogError, OSError):  # not created yet, or just being mended
            return []

    def _check(self, place: Path, call: str, state: CrashState) -> None:
        try:
            self._recovers(place)
        except (CrewlogError, AssertionError, OSError) as error:
            self.failures.append(
                f"{call} at moment {self.counts['moments']}, kept {sorted(state.kept)} "
                f"torn {state.torn} zeros {state.zeros}: {type(error).__name__}: {error}"
            )

    def _recovers(self, place: Path) -> None:
        with another_boot():
            with opened(place) as reader:
                before = [(e.type, e.sid) for e in reader.history()]
            self._compare(before)
            with opened(place) as writer:
                writer.register("probe")
                after = [(e.type, e.sid) for e in writer.history()]
            assert after == [*before, ("worker.registered", "probe")]
            findings = verify(place).findings
            assert findings == (), findings
        with another_boot(2), opened(place) as again:
            assert [(e.type, e.sid) for e in again.history()] == after

    def _compare(self, rows: list[tuple[str, str]]) -> None:
        if self.dropping:
            ends = range(len(self.acknowledged), len(self.asked) + 1)
            kept = [self.asked[max(0, end - len(rows)) : end] for end in ends]
            assert rows in kept, "more is gone than the oldest"
            return
        assert rows[: len(self.acknowledged)] == self.acknowledged, "acknowledged events are lost"
        assert rows[: len(self.shown)] == self.shown, "what a reader was shown is taken back"
        assert rows == self.asked[: len(rows)], "there is something that nobody asked for"
        assert len(rows) in self.units, "a batch is split"


def _digest(place: Path) -> int:
    return hash(
        tuple(
            (str(p.relative_to(place)), p.read_bytes() if p.is_file() else b"")
            for p in sorted(place.rglob("*"))
        )
    )


def registered(reg: Registry, witness: Witness, sid: str) -> None:
    witness.asks(("worker.registered", sid))
    reg.register(sid)
    witness.acknowledges()


def creation_and_appends(reg: Registry, witness: Witness) -> None:
    """The first change creates the store; then single changes and a batch."""
    for sid in ("a", "b", "c"):
        registered(reg, witness, sid)
    witness.asks(*[("worker.updated", "a")] * 4)
    with reg.batch() as batch:
        for number in range(4):
            batch.update("a", meta={"number": number, "pad": "x" * 700})
    witness.acknowledges()
    registered(reg, witness, "d")


def rotation(reg: Registry, witness: Witness) -> None:
    """Two rotations, by size."""
    for number in range(4):
        registered(reg, witness, f"w-{number}")


def compaction(reg: Registry, witness: Witness) -> None:
    """Three compactions: snapshot, previous snapshot, archive."""
    for number in range(3):
        registered(reg, witness, f"w-{number}")
        compact(reg, gc=False)


def retention(reg: Registry, witness: Witness) -> None:
    """History is dropped from the archive, twice; the events that went are not asked for again."""
    for number in range(4):
        registered(reg, witness, f"w-{number}")
        compact(reg, gc=False)
    witness.dropping = True
    compact(reg, gc=False, keep_history=0)
    registered(reg, witness, "last")
    compact(reg, gc=False, keep_history=0)


def merging(reg: Registry, witness: Witness) -> None:
    """Archives are put together, and those with one more; retention takes them, and the states."""
    for number in range(6):
        registered(reg, witness, f"w-{number}")
        compact(reg, gc=False)
    witness.dropping = True
    compact(reg, gc=False, keep_history=0)
    registered(reg, witness, "last")


def leases(reg: Registry, witness: Witness) -> None:
    """Leases are made and swept; a worker is stopped being known."""
    witness.asks(("worker.registered", "a"))
    reg.register("a", lease=True)
    witness.acknowledges()
    witness.asks(("worker.exited", "a"))
    reg.exited("a", code=0)
    witness.acknowledges()
    collect(reg)


def laps(reg: Registry, witness: Witness) -> None:
    """The redo is filled again and again."""
    for number in range(8):
        registered(reg, witness, f"w-{number}")


def cursor(reg: Registry, witness: Witness) -> None:
    """A cursor is created, moved and removed; retention asks for it."""
    registered(reg, witness, "a")
    owned = cursors.Cursor(files(reg).directory, "c", start=1)
    for seq in (2, 3):
        owned.advance(seq)
    owned.close()
    cursors.remove(files(reg).directory, "c")
    registered(reg, witness, "b")


STORIES: dict[str, Story] = {
    "creation": creation_and_appends,
    "rotation": rotation,
    "laps": laps,
    "compaction": compaction,
    "cursors": cursor,
    "retention": retention,
    "merging": merging,
    "leases": leases,
}


def play(story: Story, witness: Witness) -> None:
    with registry_on(witness.home / "live" / "store", witness) as reg:
        story(reg, witness)


@pytest.mark.parametrize("name", STORIES)
def test_every_crash_state_keeps_what_was_acknowledged(
    fast: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enumerated at every call of every operation."""
    if name == "rotation":
        stores.limit(segment_bytes=2500)
    if name == "laps":
        stores.limit(redo_bytes=1500)
    if name == "merging":
        stores.limit(archives_small=2, state_events=1)
    witness = Witness(fast)
    play(STORIES[name], witness)
    assert witness.failures == []
    assert witness.counts["states"] > 150, witness.counts


@pytest.mark.parametrize("left", ["torn", "header", "hole"])
def test_every_crash_state_of_a_recovery_recovers(fast: Path, left: str) -> None:
    """The power goes again while the next writer recovers, at every call.

    From a torn tail; from a segment that lost all but its header, or got a hole: there the redo
    completes it.
    """
    base = fast / "live" / "store"
    witness = Witness(fast)
    witness.looking = False
    play(creation_and_appends, witness)
    segment = max((base / layout.LOG).iterdir())
    data = segment.read_bytes()
    header = data.index(b"\n") + 1
    segment.write_bytes(
        {
            "torn": data + b'{"v":1,"seq":99,"torn',
            "header": data[:header],
            "hole": data[: header + 90] + bytes(512) + data[header + 602 :],
        }[left]
    )
    _adopt(witness, segment)
    witness.looking = True
    with another_boot(7), registry_on(base, witness) as reg:
        registered(reg, witness, "after")
    assert witness.failures == []
    assert witness.counts["states"] > 50, witness.counts


class Mended(Witness):
    """Checks the crash states of a repair: run again, it finishes."""

    def _recovers(self, place: Path) -> None:
        with another_boot(8):
            repair(place, yes=True, accept_loss=[(1, 10_000)])
            with opened(place) as writer:
                writer.register("probe")
                there = {e.sid for e in writer.history()}
            assert there >= {"a", "d", "probe"}, "what was whole is gone"
            findings = verify(place).findings
            assert findings == (), findings


def test_every_crash_state_of_a_repair_is_repaired(
    fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power goes while a damaged, poisoned store of several segments is repaired."""
    stores.limit(segment_bytes=2500)
    base = fast / "live" / "store"
    witness = Mended(fast)
    witness.looking = False
    play(creation_and_appends, witness)
    for segment in sorted((base / layout.LOG).iterdir()):
        data = segment.read_bytes()
        segment.write_bytes(data.replace(b'"sid":"b"', b'"sid":"x"'))
        _adopt(witness, segment)
    (base / layout.POISON).touch(mode=0o600)
    witness.files[witness._new((base / layout.POISON).stat().st_ino)] = File()
    folder = witness.folders[witness._ids[base.stat().st_ino]]
    folder.durable[layout.POISON] = witness._ids[(base / layout.POISON).stat().st_ino]
    witness.looking = True
    real = layout.open_existing
    monkeypatch.setattr(
        layout, "open_existing",
        lambda path, **_: real(path, via=witness if path == base else None),
    )  # fmt: skip
    assert repair(base, yes=True, accept_loss=[(1, 10_000)]).done
    assert witness.failures == []
    assert witness.counts["states"] > 100, witness.counts


def _adopt(witness: Witness, segment: Path) -> None:
    """Let the model know of bytes that a dead writer left."""
    number = witness._ids[segment.stat().st_ino]
    file = witness.files[number]
    file.durable = segment.read_bytes()
    file.pending.clear()


# -- negative controls: each mistake must be found ------------------------------------------


class ForgetsFileSyncs(Witness):
    """Acknowledges although nothing was synced."""

    def settle_file(self, number: int) -> None:
        return


class ForgetsDirectorySyncs(Witness):
    """Never syncs a directory once the store is there."""

    def settle_folder(self, number: int) -> None:
        if not self.acknowledged:
            super().settle_folder(number)


@pytest.mark.parametrize(
    ("control", "name"),
    [
        (ForgetsFileSyncs, "creation"),
        (ForgetsFileSyncs, "rotation"),
        (ForgetsDirectorySyncs, "rotation"),
        (ForgetsDirectorySyncs, "compaction"),
    ],
)
def test_missing_syncs_are_found(
    fast: Path, monkeypatch: pytest.MonkeyPatch, control: type[Witness], name: str
) -> None:
    """The enumeration catches what it is there for."""
    stores.limit(segment_bytes=2500)
    witness = control(fast, every=1)
    witness.stop_at_first = True
    play(STORIES[name], witness)
    assert witness.failures
