"""A registry against a plain dict, through crashes, reboots, torn tails and compactions.

Hypothesis plays: changes by two long-lived writers, units of changes, a writer killed inside an
append, half lines and lost state files, reboots, compactions. After each step every registry, old
or fresh, shows what the dict holds; at the end verify finds nothing.
"""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import stores
from crewlog.errors import InvalidTransition, WorkerExists, WorkerNotFound
from crewlog.local import layout
from crewlog.model.events import LIVING
from crewlog.registry import Registry
from crewlog_compactor import compact, verify
from faults import FailingDisk, active_segment, another_boot, registry_on
from stores import opened

SIDS = st.sampled_from(["x", "y", "z"])
REFUSED = (InvalidTransition, WorkerExists, WorkerNotFound)


class Killed(BaseException):
    """Ends a writer where SIGKILL would."""


class RegistryMachine(RuleBasedStateMachine):
    """The system and its model."""

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()
        self.undo = ExitStack()
        memory = Path("/dev/shm")  # noqa: S108 (only for speed)
        self.home = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.place = self.home / "store"
        self.model: dict[str, tuple[str, str | None]] = {}
        self.former: set[str] = set()  # of an earlier boot: dead, whether that is proven or not
        self.boot = 1
        self.booted = ExitStack()
        stores.limit(segment_bytes=3000)

    @initialize()
    def begin(self) -> None:
        """Boot the machine."""
        self.booted.enter_context(another_boot(self.boot))
        self.writers = [opened(self.place) for _ in range(2)]

    def _change(self, writer: int, sid: str, wish: str, number: int) -> None:
        reg = self.writers[writer]
        may_replace = wish == "register" and sid in self.former
        after = _next(None if may_replace else self.model.get(sid), wish, number)
        try:
            _wish(reg, sid, wish, number)
        except REFUSED:
            assert after is None or may_replace
            return
        assert after is not None
        self.model[sid] = after
        if wish == "register":
            self.former.discard(sid)

    @rule(
        writer=st.integers(0, 1),
        sid=SIDS,
        wish=st.sampled_from(["register", "ready", "label", "exit", "release"]),
        number=st.integers(0, 9),
    )
    def change(self, writer: int, sid: str, wish: str, number: int) -> None:
        """One change by one writer."""
        self._change(writer, sid, wish, number)

    @rule(writer=st.integers(0, 1), sid=SIDS)
    def batch(self, writer: int, sid: str) -> None:
        """Two changes as one unit: both or none."""
        reg = self.writers[writer]
        first = _next(self.model.get(sid), "register", 0)
        try:
            with reg.batch() as items:
                items.register(sid)
                items.update(sid, labels={"n": "7"})
        except WorkerExists:
            assert first is None
        else:
            self.model[sid] = ("starting", "7")
            self.former.discard(sid)

    @rule(sid=SIDS, call=st.integers(1, 6))
    def killed_inside_a_change(self, sid: str, call: int) -> None:
        """A third writer is killed before call `call`; what it asked for may have happened."""
        disk = FailingDisk()

        def deadly(_: str) -> int | None:
            if len(disk.calls) == call:
                raise Killed
            return None

        disk.fault = deadly
        before = self.model.get(sid)
        held = before is not None and before[0] in LIVING
        refused = held and sid not in self.former
        try:
            registry_on(self.place, disk).register(sid)
        except (Killed, WorkerExists):
            pass
        except REFUSED:  # pragma: no cover (only registrations are asked for)
            return
        with opened(self.place) as fresh:
            if not refused:
                fresh.register("sync")  # what was written becomes durable with it
                fresh.remove("sync", reason="only to sync")
            worker = fresh.get(sid)
        if worker is not None:
            shown = (worker.state.value, worker.labels.get("n"))
            assert shown in {before, ("starting", None)} or (shown[0] == "lost" and held)
            self.model[sid] = shown
            if shown != before:
                self.former.discard(sid)
        if not refused:
            self.model["sync"] = ("released", None)

    @rule(tail=st.sampled_from([b"{", b'{"v":1,"seq":9', b"\0" * 700, b"\n", b"null\n"]))
    def torn_tail(self, tail: bytes) -> None:
        """A writer died in the middle of its line."""
        if self.place.exists():
            with active_segment(self.place).open("ab") as file:
                file.write(tail)

    @rule(name=st.sampled_from([layout.APPEND_STATE, f"{layout.HEAD}/{layout.HEAD_DURABLE}"]))
    def lost_state(self, name: str) -> None:
        """A state file is gone, as after a power cut."""
        (self.place / name).unlink(missing_ok=True)

    @rule()
    def reboot(self) -> None:
        """Another boot: the writers of the old one are gone."""
        for reg in self.writers:
            reg.close()
        self.booted.close()
        self.boot += 1
        self.former = {sid for sid, now in self.model.items() if now[0] in LIVING}
        self.begin()

    @rule(keep=st.booleans())
    def compaction(self, keep: bool) -> None:
        """Fold, archive, and now and then drop the history."""
        if self.place.exists():
            with opened(self.place) as reg:
                compact(reg, gc=False, keep_history=None if keep else 0)

    @invariant()
    def everybody_sees_the_model(self) -> None:
        """A fresh reader and both writers."""
        if not hasattr(self, "writers"):
            return
        with opened(self.place) as fresh:
            for reg in (fresh, *self.writers):
                states = {w.sid: (w.state.value, w.labels.get("n")) for w in reg.workers(all=True)}
                assert states == self.model

    def teardown(self) -> None:
        """Verify, and clean up."""
        try:
            if self.place.exists():
                with opened(self.place) as reg:
                    reg.register("last")
                assert verify(self.place).findings == ()
        finally:
            for reg in getattr(self, "writers", []):
                reg.close()
            self.booted.close()
            self.undo.close()
            shutil.rmtree(self.home)


def _wish(reg: Registry, sid: str, wish: str, number: int) -> None:
    match wish:
        case "register":
            reg.register(sid)
        case "ready":
            reg.update(sid, state="ready")
        case "label":
            reg.update(sid, labels={"n": str(number)})
        case "exit":
            reg.exited(sid, code=0)
        case _:
            reg.remove(sid, reason="x")


def _next(
    now: tuple[str, str | None] | None, wish: str, number: int
) -> tuple[str, str | None] | None:
    """Say what the rules make of a wish; None: they refuse it."""
    state, label = now or ("none", None)
    living = state in {"starting", "ready"}
    match wish:
        case "register":
            return None if living else ("starting", None)
        case "ready":
            return ("ready", label) if living else None
        case "label":
            return (state, str(number)) if living else None
        case "exit":
            return ("exited", label) if living or state == "exited" else None
        case _:
            return ("released", label) if living or state == "released" else None


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
