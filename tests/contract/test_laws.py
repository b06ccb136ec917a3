"""Laws that hold for every input: codec round trip, fold, and the registry against a plain dict."""

import shutil
import tempfile
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import stores
from crewlog.errors import InvalidTransition, WorkerExists, WorkerNotFound
from crewlog.model import codec, events, fold
from crewlog.model.events import JsonObject, Line, NextState
from crewlog.model.snapshot import Snapshot, decode_snapshot, encode_snapshot
from crewlog.registry import Registry
from crewlog_cli import text
from crewlog_compactor import compact, verify
from stores import opened

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        TEXT,
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=5)


@given(data=OBJECT, sid=TEXT, seq=st.integers(1, 2**53))
def test_line_round_trip_over_all_json(data: JsonObject, sid: str, seq: int) -> None:
    """What is accepted comes back equal, from one line without a control byte."""
    codec.check_json(data, name="data")
    part = codec.draft("worker.updated", sid, b"{}", data)
    raw = codec.line(part, seq=seq, ts="t", synced=0, prev=codec.digest(b""), batch=None)
    assert raw.count(b"\n") == 1
    assert min(raw[:-1]) >= 0x20
    line = codec.parse(raw[:-1])
    assert (line["data"], line["sid"], line["seq"]) == (data, sid, seq)


@given(noise=st.binary(max_size=300))
def test_noise_is_never_a_line(noise: bytes) -> None:
    """Bytes that we did not write are refused with a reason, whatever they are."""
    for raw in (noise, b'{"v":1,' + noise, noise + b'"}'):
        with pytest.raises(codec.LineError, match=r"."):
            codec.parse(raw)


def _lines(draw: st.DrawFn) -> list[Line]:
    """Draw a history that the rules allow."""
    state = fold.empty()
    lines: list[Line] = []
    for seq in range(1, draw(st.integers(0, 25)) + 1):
        sid = draw(st.sampled_from(["a", "b", "c"]))
        record = state.get(sid)
        kinds = [k for k in ALL if _may(k, sid, record)]
        kind = draw(st.sampled_from(kinds))
        data: JsonObject = dict(REGISTERED) if kind == events.REGISTERED else {}
        if kind == events.UPDATED:
            data = {"labels": {draw(st.sampled_from("xyz")): draw(st.none() | st.just("1"))}}
        part = codec.draft(kind, sid, b"{}", data)
        line = codec.as_parsed(part, seq=seq, ts="2026-11-24T00:00:00.000000Z")
        state.apply(line)
        lines.append(line)
    return lines


def _may(kind: str, sid: str, record: events.Record | None) -> bool:
    try:
        fold.refuse(kind, sid, record)
    except (InvalidTransition, WorkerExists, WorkerNotFound):
        return False
    return True


ALL = (
    events.REGISTERED, events.READY, events.UPDATED, events.DRAINING, events.STOP_REQUESTED,
    events.EXITED, events.LOST, events.RELEASED, events.PRUNED,
)  # fmt: skip
REGISTERED: JsonObject = {
    "pid": 1, "state": "starting", "sock": "", "version": "", "labels": {}, "meta": {},
    "identity": None, "owner": None,
}  # fmt: skip
HISTORY = st.composite(_lines)()


@given(lines=HISTORY, cut=st.integers(0, 25))
def test_fold_of_a_snapshot_and_its_rest_is_the_fold_of_the_whole(
    lines: list[Line], cut: int
) -> None:
    """Any prefix as a snapshot, read back, and then the rest: the same, in order too."""
    whole, half = fold.empty(), fold.empty()
    for line in lines:
        whole.apply(line)
    for line in lines[:cut]:
        half.apply(line)
    data = encode_snapshot(
        Snapshot(
            store="s", last_seq=half.seq, last_hash="", written_at="",
            sessions=list(half.sessions()), ended=list(half.ended()), totals=half.totals,
        )
    )  # fmt: skip
    base = decode_snapshot(data)
    resumed = fold.restored(base.last_seq, base.sessions, base.ended, base.totals)
    for line in lines[cut:]:
        resumed.apply(line)
    assert list(resumed.records.items()) == list(whole.records.items())
    assert (resumed.seq, resumed.totals) == (whole.seq, whole.totals)


WISHES = st.lists(
    st.tuples(
        st.sampled_from("ab"),  # which of two writers
        st.sampled_from("xyz"),
        st.sampled_from(["register", "ready", "label", "release", "look"]),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(wishes=WISHES, far=st.integers(0, 3))
def test_two_writers_decide_upon_the_same_state(
    wishes: list[tuple[str, str, str]], far: int
) -> None:
    """What each writer keeps at hand is what a fresh reader folds, however they take turns."""
    with tempfile.TemporaryDirectory() as home:
        stores.limit(catch_up_lines=far, recent_workers=2)
        writers = {name: opened(Path(home) / "store") for name in "ab"}
        model: dict[str, tuple[str, str | None]] = {}
        for number, (name, sid, wish) in enumerate(wishes):
            _act(writers[name], sid, wish, number, model)
        for reg in (*writers.values(), opened(Path(home) / "store")):
            states = {w.sid: (w.state.value, w.labels.get("n")) for w in reg.workers(all=True)}
            assert states == model
            reg.close()


def _act(
    reg: Registry, sid: str, wish: str, number: int, model: dict[str, tuple[str, str | None]]
) -> None:
    state = model.get(sid, (None, None))[0]
    label = model.get(sid, (None, None))[1]
    living = state in events.LIVING
    try:
        if wish == "register":
            reg.register(sid)
            assert not living
            model[sid] = ("starting", None)
        elif wish == "ready":
            reg.update(sid, state="ready")
            assert state in {"starting", "ready"}
            model[sid] = ("ready", label)
        elif wish == "label":
            reg.update(sid, labels={"n": str(number)})
            assert living
            model[sid] = (str(state), str(number))
        elif wish == "release":
            reg.remove(sid, reason="x")
            assert living or state == "released"
            model[sid] = ("released", label)
        else:
            worker = reg.get(sid)
            assert (None if worker is None else worker.state) == state
    except (InvalidTransition, WorkerExists, WorkerNotFound):
        assert (wish == "register") == living or (wish == "ready" and state != "starting")


@given(words=st.text(max_size=60))
def test_visible_text_holds_nothing_that_a_terminal_obeys(words: str) -> None:
    """Nothing hidden is left, and text without anything hidden stays as it is."""
    import unicodedata

    shown = text.visible(words)
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert not any(unicodedata.category(c) in hidden for c in shown)
    if not any(unicodedata.category(c) in hidden for c in words):
        assert shown == words


class RegistryMachine(RuleBasedStateMachine):
    """A registry beside a plain dict, with reopening and compaction between the steps."""

    def __init__(self) -> None:
        """Begin with no store and an empty dict."""
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.reg = opened(self.home / "store")
        self.model: dict[str, str] = {}
        self.count = 0

    @rule(sid=st.sampled_from("abc"), ready=st.booleans())
    def register(self, sid: str, ready: bool) -> None:
        """Register; refused while the sid lives."""
        if self.model.get(sid) in events.LIVING:
            try:
                self.reg.register(sid)
            except WorkerExists:
                return
            raise AssertionError(sid)
        self.reg.register(sid, ready=ready)
        self.model[sid] = "ready" if ready else "starting"
        self.count += 1

    @rule(sid=st.sampled_from("abc"), state=st.sampled_from(["ready", "draining", "stopping"]))
    def move(self, sid: str, state: str) -> None:
        """Move on, if the table lets it."""
        allowed = {"ready": {"starting"}, "draining": {"starting", "ready"}}.get(
            state, {str(living) for living in events.LIVING}
        )
        try:
            self.reg.update(sid, state=cast("NextState", state))
        except (InvalidTransition, WorkerNotFound):
            assert self.model.get(sid) not in allowed
            return
        if self.model[sid] != state:
            assert self.model[sid] in allowed
            self.model[sid] = state
            self.count += 1

    @rule(sid=st.sampled_from("abc"))
    def release(self, sid: str) -> None:
        """Take out, if it lives."""
        try:
            self.reg.remove(sid, reason="x")
        except (InvalidTransition, WorkerNotFound):
            assert self.model.get(sid) not in {*events.LIVING, "released"}
            return
        if self.model[sid] == "released":
            return  # nothing that needed to be written
        self.model[sid] = "released"
        self.count += 1

    @rule()
    def reopen(self) -> None:
        """Begin from what is on disk."""
        self.reg.close()
        self.reg = opened(self.home / "store")

    @rule()
    @precondition(lambda self: self.count > 0)
    def compact(self) -> None:
        """Fold and archive."""
        compact(self.reg, gc=False)

    @invariant()
    def same(self) -> None:
        """The registry holds what the dict holds."""
        assert {w.sid: w.state for w in self.reg.workers(all=True)} == self.model
        assert len(list(self.reg.history())) == self.count

    def teardown(self) -> None:
        """Verify, and clean up."""
        if self.count:
            assert verify(self.home / "store").findings == ()
        self.reg.close()
        shutil.rmtree(self.home)


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
