"""Choose workers as every command takes them: ids, globs, and labels as k, k=v or k!=v."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, ParamSpec, TypeVar

import click

from crewlog.model import events
from crewlog.model.choice import GLOB, LabelTest, matcher, read_labels
from crewlog.model.events import Event, Worker
from crewlog.registry import Registry
from crewlog_cli import render, shell

P = ParamSpec("P")
R = TypeVar("R")


def _read(
    _ctx: click.Context, _param: click.Parameter, rows: tuple[str, ...]
) -> tuple[LabelTest, ...]:
    try:
        return tests_of(rows)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def tests_of(rows: Iterable[str]) -> tuple[LabelTest, ...]:
    """Read tests of labels, in each row one or, as kubectl has it, several.

    Raises: ValueError.
    """
    return tuple(test for row in rows for test in read_labels(row))


def with_labels(function: Callable[P, R]) -> Callable[P, R]:
    """Give a command the option that chooses by labels."""
    return click.option(
        "-l", "--label", "labels", multiple=True, metavar="K[=V]", callback=_read,
        shell_complete=shell.complete_label,
        help="Only with these: k=v, k!=v, k, !k; repeatable.",
    )(function)  # fmt: skip


def with_names(function: Callable[P, R]) -> Callable[P, R]:
    """Give a command ids and globs as its arguments, and the option that chooses by labels."""
    names = click.argument(
        "names", metavar="[SID|GLOB]…", nargs=-1, shell_complete=shell.complete_sid
    )
    return names(with_labels(function))


class Chosen(NamedTuple):
    """Which workers are wanted: any of the names, and all of the labels; without either, all."""

    names: tuple[str, ...] = ()
    labels: tuple[LabelTest, ...] = ()

    def __bool__(self) -> bool:
        """Say whether it is a choice at all."""
        return bool(self.names or self.labels)

    @property
    def exact(self) -> frozenset[str]:
        """Return the names that are no globs."""
        return frozenset(name for name in self.names if not GLOB.search(name))

    @property
    def is_exact(self) -> bool:
        """Say whether whom it means is known without a look: by ids alone."""
        return bool(self.names) and not self.labels and len(self.exact) == len(set(self.names))

    def wants_sid(self) -> Callable[[str], object]:
        """Return what says of a sid whether it is among the names."""
        return matcher(self.names or ("*",))

    def fits(self, labels: Mapping[str, str]) -> bool:
        """Say whether labels are as wanted."""
        return all(test.holds(labels) for test in self.labels)

    def of(self, workers: Iterable[Worker]) -> list[Worker]:
        """Return those that are wanted."""
        wants = self.wants_sid()
        return [worker for worker in workers if wants(worker.sid) and self.fits(worker.labels)]

    def required(
        self, reg: Registry, workers: Collection[Worker], *, some: bool = True
    ) -> list[Worker]:
        """Return those that are wanted, in the order of the names where those are ids.

        Raises: WorkerNotFound, with the nearest, for a name that means nobody; with `some` also
        where nobody has the labels: a list may be empty, but an act needs somebody.
        """
        chosen = self.of(workers)
        if some and self.labels and not self.names and not chosen:
            raise render.no_such_labels(self.labels)
        for name in self.names:
            means = matcher((name,))
            if not any(means(worker.sid) for worker in workers):
                raise render.not_found(reg, name)
        if self.is_exact:
            place = {name: at for at, name in enumerate(dict.fromkeys(self.names))}
            chosen.sort(key=lambda worker: place[worker.sid])
        return chosen

    def sids(self, reg: Registry, *, required: Iterable[str] = ()) -> list[str] | None:
        """Return the sids that are meant, also of workers that are no longer listed; None: all.

        A name that is `required` must be one that a worker has, or had as far as history is kept.
        Raises: WorkerNotFound, with the nearest.
        """
        sids = self._sids(reg)
        for name in required:
            if not GLOB.search(name):  # an event is found without a fold of the log
                known = any(reg.history(sid=name)) or reg.get(name) is not None
            else:  # the labels may have left out whom it means
                known = any(map(matcher((name,)), sids or ())) or bool(Chosen((name,)).sids(reg))
            if not known:
                raise render.not_found(reg, name, in_history=True)
        return sids

    def _sids(self, reg: Registry) -> list[str] | None:
        if not self:
            return None
        if self.is_exact:
            return list(dict.fromkeys(self.names))
        listed = {worker.sid: worker.labels for worker in reg.workers(all=True)}
        wants = self.wants_sid()
        sids = dict.fromkeys(name for name in self.exact if not self.labels)
        for sid, labels in listed.items():
            if wants(sid) and self.fits(labels):
                sids[sid] = None
        for event in reg.history(types=[events.REGISTERED]):  # who was pruned since
            given = event.data.get("labels")
            known = event.sid in sids or not wants(event.sid)
            if known or not isinstance(given, dict):
                continue
            if self.fits({key: str(value) for key, value in given.items()}):
                sids[event.sid] = None
        return list(sids)


class Stream:
    """Say of one event after the other whether its worker is wanted, by its labels as of then."""

    def __init__(self, reg: Registry, chosen: Chosen) -> None:
        """Know the labels of those who are listed."""
        self._reg = reg
        self._chosen = chosen
        self._wants = chosen.wants_sid()
        self._labels: dict[str, dict[str, str]] = {}

    def wants(self, event: Event) -> bool:
        """Say whether it is of a worker that is wanted."""
        if not self._wants(event.sid):
            return False
        if not self._chosen.labels:
            return True
        worker = self._reg.get(event.sid)
        if worker is not None:
            self._labels[event.sid] = dict(worker.labels)
        return self._chosen.fits(self._labels.get(event.sid, {}))
