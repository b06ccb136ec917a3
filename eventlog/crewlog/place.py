"""Find where a store is: a directory, or a prefix of an etcd cluster; open it, or create it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from crewlog import create, directory
from crewlog.errors import Unsupported
from crewlog.forks import no_fork
from crewlog.log import Log
from crewlog.store import Store


class Place(Protocol):
    """A place where a store is, or may be created. Its text is what `crewlog.open` takes."""

    def __str__(self) -> str:
        """Return it as a person would write it."""
        ...

    def open(self, *, wait_s: float) -> Store:
        """Open the store; this creates and changes nothing. *Raises* StoreMissing."""
        ...

    def create(self, *, wait_s: float) -> Store:
        """Open the store, and create it if there is none; durable on return."""
        ...


@dataclass(frozen=True, slots=True)
class DirectoryPlace:
    """A directory of this machine."""

    path: Path

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    def open(self, *, wait_s: float) -> Log:
        """Open the store in it."""
        return Log(directory.open_existing(self.path), wait_s=wait_s)

    def create(self, *, wait_s: float) -> Log:
        """Open the store in it, or create one."""
        return Log(create.open_or_create(self.path, wait_s=wait_s), wait_s=wait_s)


def locate(where: str | os.PathLike[str] | None = None) -> Place:
    """Return the place that `where` means: a path, a file://, etcd:// or etcds:// URL.

    None: `CREWLOG_DIR`, else `$XDG_STATE_HOME/crewlog` if that is absolute, else
    `~/.local/state/crewlog`. *Raises* ValueError for a URL that names no place; Unsupported where
    the extra that it needs is not installed.
    """
    named = os.fspath(where) if where is not None else os.environ.get(directory.ENVIRONMENT, "")
    if named.lower().startswith(("etcd:", "etcds:")):
        return _cluster(named)
    return DirectoryPlace(directory.locate(where))


def _cluster(url: str) -> Place:
    with no_fork():
        from crewlog.etcd.address import EtcdAddress  # noqa: PLC0415 (few ask for it)

    address = EtcdAddress.parse(url)
    try:
        with no_fork():
            from crewlog.etcd.place import EtcdPlace  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError as error:
        raise Unsupported(
            "etcd needs a package that is not installed",
            where=url,
            why=str(error),
            remedy="pip install urllib3 (the extra [etcd] of crewlog)",
        ) from error
    return EtcdPlace(address)


def locate_directory(where: str | os.PathLike[str] | None, *, what: str) -> Path:
    """Return the directory that `where` means. *Raises* Unsupported for another kind of place."""
    found = locate(where)
    if isinstance(found, DirectoryPlace):
        return found.path
    raise no_directory(str(found), what=what)


def no_directory(where: str, *, what: str) -> Unsupported:
    """Return the error of something that only a directory can be asked for."""
    return Unsupported(
        f"{what} is for a directory",
        where=where,
        why="its events are kept by a cluster",
        remedy="See docs/etcd.md; to mend a store in a cluster, restore a backup of it",
    )
