"""List the workers: ls. No lock is taken and nothing is written."""

import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple, TypeAlias

import click

from crewlog import Liveness
from crewlog.model import figures
from crewlog.model.choice import LabelTest
from crewlog.model.events import FINAL, Worker, WorkerState
from crewlog.model.figures import Usage
from crewlog.model.state import Past, State
from crewlog.registry import Registry
from crewlog_cli import answers, choose, inputs, output, render, text
from crewlog_cli.choose import Chosen
from crewlog_cli.shell import Shell, command
from crewlog_cli.text import Column

_Seen: TypeAlias = tuple[Worker, Liveness | None]
_Show: TypeAlias = Callable[[State, list[_Seen], int], None]  # of a state, these, so many hidden
_LOOK_S: Final = 1.0
_SORTS: Final = ("started", "age", "id", "status", "restarts", "pid")


@command(
    "ls",
    examples="""crewlog ls
crewlog ls 'web-*' -l role=web -o wide
crewlog ls --state failed
crewlog ls -l role=web --json | jq -r '.workers[].sid'
crewlog ls --at yesterday
crewlog ls --before-boot""",
)
@choose.with_names
@click.option("-a", "--all", "all_", is_flag=True, help="Show the dead and the ended too.")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([s.value for s in WorkerState]),
    help="Only in this state; repeatable.",
)
@click.option("--at", "at_", metavar="TIME|SEQ", help="As it was then; nothing is probed.")
@click.option("--before-boot", is_flag=True, help="Who ran when the machine went down last.")
@click.option("-o", "--output", "form", metavar="FORM", help="wide, name, json or columns=A,B,C.")
@click.option("--sort", type=click.Choice(_SORTS), default="started", help="Sort by this.")
@click.option("--absolute", is_flag=True, help="Show times, not how long ago.")
@click.option("--no-headers", is_flag=True, help="Print no header line.")
@click.option("--no-probe", is_flag=True, help="Do not look at the processes.")
@click.option("-w", "--watch", is_flag=True, help="Print the table again at each change.")
@click.option("--sids", is_flag=True, help="Print the sids only, one a line; as -o name.")
def ls(
    sh: Shell,
    *,
    names: tuple[str, ...],
    labels: tuple[LabelTest, ...],
    all_: bool,
    states: tuple[str, ...],
    at_: str | None,
    before_boot: bool,
    form: str | None,
    sort: str,
    absolute: bool,
    no_headers: bool,
    no_probe: bool,
    watch: bool,
    sids: bool,
) -> None:
    """List the workers that live or cannot be judged; read only, nothing is collected."""
    form = "name" if sids else form or ""
    sh.json |= form == "json"
    if (at_ is not None) + before_boot + watch > 1:
        message = "--at, --before-boot and --watch exclude each other"
        raise click.UsageError(message)
    columns = _columns_of(form) or (_BEFORE_BOOT if before_boot else ())
    shape = _Shape(
        columns,
        absolute=absolute,
        titles=not no_headers,
        looks_back=at_ is None and not before_boot,
    )
    reg = sh.existing()
    past = _past(sh, reg, at_, before_boot=before_boot)
    final = all_ or any(WorkerState(state) in FINAL for state in states)
    chosen = Chosen(names, labels)
    wanted = _Wanted(chosen, frozenset(states), final=final, probe=past is None and not no_probe)

    def show(seen: State, shown: list[_Seen], hidden: int) -> None:
        now = inputs.asked_at(at_, seen) or inputs.moment_of(seen) or datetime.now(UTC)
        shown = sorted(shown, key=_key(sort, now))
        if sh.json:
            _print_json(sh, seen, shown, now, name=form == "name")
        elif form == "name":
            for worker, _ in shown:
                sh.line(worker.sid)
        else:
            _print_workers(sh, reg, shown, now, shape)
            if hidden:
                sh.note(f"{hidden} dead and not collected yet: crewlog ls --all, crewlog gc")

    seen = past or reg.state()
    shown, hidden = wanted.look(reg, seen, required=not watch)
    show(seen, shown, hidden)

    def show_again(seen: State, shown: list[_Seen], hidden: int) -> None:
        if not sh.json and form != "name":
            sh.line("")
        show(seen, shown, hidden)

    if watch:
        _follow(reg, wanted, show_again, seen.seq, shown)


def _past(sh: Shell, reg: Registry, at_: str | None, *, before_boot: bool) -> Past | None:
    if not before_boot:
        return None if at_ is None else inputs.at(sh, reg, at_)
    past = reg.before_boot()
    inputs.tell_window(sh, past)
    return past


def _follow(
    reg: Registry, wanted: "_Wanted", show_again: _Show, after: int, shown: list[_Seen]
) -> None:
    """Show the table again when it is another than the one shown, which was of seq `after`.

    A death is no event before it is collected, so it is looked for.
    """

    def stand(shown: list[_Seen]) -> list[object]:
        return [(w.rev, None if j is None else (j.verdict, j.flags, j.status)) for w, j in shown]

    before = stand(shown)
    with reg.watch(after=after) as items:
        while True:
            output.flush()
            items.next(_LOOK_S)
            items.drain()
            seen = reg.state()
            shown, hidden = wanted.look(reg, seen, required=False)
            if stand(shown) != before:
                before = stand(shown)
                show_again(seen, shown, hidden)


class _Wanted(NamedTuple):
    """Which workers a list shows."""

    chosen: Chosen
    states: frozenset[str]
    final: bool
    probe: bool

    def look(self, reg: Registry, seen: State, *, required: bool) -> tuple[list[_Seen], int]:
        """Return those to show, and how many dead ones are not; a name must mean somebody."""
        every = self.final or self.chosen.names  # a name may mean somebody who has ended
        known = list(seen.workers.values() if every else seen.workers.living())
        exact = self.chosen.exact  # shown, dead or alive
        workers = (
            self.chosen.required(reg, known, some=False) if required else self.chosen.of(known)
        )
        workers = [
            worker
            for worker in workers
            if (self.final or not worker.final or worker.sid in exact)
            and (not self.states or worker.state.value in self.states)
        ]
        judged: list[Liveness | None] = [None] * len(workers)
        if self.probe:
            judged = [*reg.judge(workers)]
        shown = [
            (worker, verdict)
            for worker, verdict in zip(workers, judged, strict=True)
            if self.final or verdict is None or not verdict.dead or worker.sid in exact
        ]
        return shown, len(workers) - len(shown)


def _print_json(
    sh: Shell, seen: State, shown: Sequence[_Seen], now: datetime, *, name: bool
) -> None:
    if name:
        sh.document({"seq": seen.seq, "sids": [worker.sid for worker, _ in shown]})
        return
    sh.document(answers.listed(seen, shown, now))


def _key(sort: str, now: datetime) -> Callable[[_Seen], tuple[object, ...]]:
    def key(seen: _Seen) -> tuple[object, ...]:
        worker, liveness = seen
        match sort:
            case "age":  # the youngest first
                return (-worker.created_at.timestamp(),)
            case "id":
                return (worker.sid,)
            case "status":
                return (render.status_text(worker, liveness, now), worker.sid)
            case "restarts":
                return (-worker.generation, worker.sid)
            case "pid":
                return (worker.pid,)
            case _:
                return (worker.registered_seq,)

    return key


# What a list can show: how much each is worth where there is no room.
_COLUMNS: Final = {
    "sid": Column("sid", shrinks_to=text.SID_COLUMNS),
    "status": Column("status"),
    "pid": Column("pid", 7),
    "age": Column("age", 8),
    "restarts": Column("restarts", 6),
    "labels": Column("labels", 5, shrinks_to=16),
    "version": Column("version", 4),
    "started": Column("started", 7),
    "updated": Column("updated", 3),
    "state": Column("state", 4),
    "liveness": Column("liveness", 4),
    "generation": Column("generation", 2),
    "mem": Column("mem", 4),
    "cpu": Column("cpu", 4),
    "sock": Column("sock", 2, shrinks_to=12),
    "owner": Column("owner", 2),
    "host": Column("host", 2, shrinks_to=8),
    "command": Column("command", 5, shrinks_to=20),
    "cwd": Column("cwd", 3, shrinks_to=12),
    "note": Column("note", 3, shrinks_to=12),
}
_USUAL: Final = ("sid", "status", "pid", "age", "restarts", "version", "labels")
_WIDE: Final = ("sid", "status", "pid", "age", "restarts", "mem", "cpu", "started", "version",
                "labels", "sock", "command")  # fmt: skip
_BEFORE_BOOT: Final = ("sid", "status", "pid", "started", "labels", "command", "cwd")


class _Shape(NamedTuple):
    """How a list is printed; no columns: the usual ones, as far as they say something."""

    columns: tuple[str, ...]
    absolute: bool
    titles: bool
    looks_back: bool  # what came before is looked for: not of a past state


def _columns_of(form: str) -> tuple[str, ...]:
    if form in {"", "name", "json"}:
        return ()
    if form == "wide":
        return _WIDE
    columns = tuple(dict.fromkeys(form.removeprefix("columns=").split(",")))
    if not form.startswith("columns=") or not set(columns) <= _COLUMNS.keys():
        message = f"-o is wide, name, json or columns=A,B,C; columns are: {', '.join(_COLUMNS)}"
        raise click.UsageError(message)
    return columns


def _print_workers(
    sh: Shell, reg: Registry, shown: Sequence[_Seen], now: datetime, shape: _Shape
) -> None:
    names = list(shape.columns or _USUAL)
    if shape.absolute:
        names = list(dict.fromkeys("started" if name == "age" else name for name in names))
    uses: dict[str, Usage | None] = {}
    if {"mem", "cpu"} & set(names):
        trees = reg.trees([worker for worker, _ in shown])
        uses = {
            worker.sid: reg.usage(worker, tree=trees.get(worker.sid, ()))
            for worker, liveness in shown
            if liveness is not None and liveness.alive
        }
    past = render.before(reg, [worker for worker, _ in shown]) if shape.looks_back else {}
    rows = [
        _cells(
            sh, worker, liveness, now, uses.get(worker.sid), past.get(worker.sid, render.Before())
        )
        for worker, liveness in shown
    ]
    if not shape.columns:  # what nobody has is no column
        optional = {"restarts", "labels", "version"}
        names = [n for n in names if n not in optional or any(row[n] != "-" for row in rows)]
    heads = [_COLUMNS[name] for name in names]
    if "started" in names:
        heads[names.index("started")] = Column(f"started ({sh.offset()})", 7)
    cells = [[row[name] for name in names] for row in rows]
    sh.table(heads, cells, titles=shape.titles, fit=not shape.columns)  # what was asked for stays


def _cells(
    sh: Shell,
    worker: Worker,
    liveness: Liveness | None,
    now: datetime,
    usage: Usage | None,
    past: render.Before,
) -> dict[str, str]:
    cells = {
        "sid": worker.sid,
        "status": render.status_text(worker, liveness, now, past.seen_at),
        "pid": str(worker.pid),
        "age": figures.brief(now - worker.created_at),
        "restarts": render.restarts_text(worker, past.ended, now),
        "labels": ",".join(f"{k}={v}" for k, v in worker.labels.items()),
        "version": worker.version,
        "started": sh.when(worker.created_at),
        "updated": sh.when(worker.updated_at),
        "state": worker.state.value,
        "liveness": "" if liveness is None else render.liveness_text(liveness),
        "generation": str(worker.generation),
        "mem": "" if usage is None else figures.size(usage.rss_bytes),
        "cpu": "" if usage is None else figures.duration(timedelta(seconds=usage.cpu_s)),
        "sock": worker.sock,
        "owner": "" if worker.owner is None else str(worker.owner.pid),
        "host": "" if worker.identity is None else worker.identity.host_id or "",
        "command": shlex.join(worker.argv or ()),
        "cwd": worker.cwd or "",
        "note": "" if liveness is None or liveness.note is None else liveness.note,
    }
    return {name: cell or "-" for name, cell in cells.items()}


COMMANDS: Final[dict[str, click.Command]] = {"ls": ls}
