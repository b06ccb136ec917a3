"""Say what a path or a URL means, and load the engine that it needs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

from crewlog import host
from crewlog.errors import StoreMissing, Unsupported
from crewlog.host import no_fork
from crewlog.local.place import DirectoryPlace
from crewlog.model.limits import DEFAULT, Limits
from crewlog.store import Kind, Store

ENVIRONMENT: Final = "CREWLOG_DIR"


class Place(Protocol):
    """A place where a store is, or may be created. Its text is what `crewlog.open` takes."""

    @property
    def kind(self) -> Kind:
        """Return which engine keeps a store there."""
        ...

    @property
    def path(self) -> Path:
        """Return the directory.

        Raises: Unsupported for another kind of place.
        """
        ...

    def __str__(self) -> str:
        """Return it as a person would write it."""
        ...

    def open(self, *, wait_s: float, limits: Limits = DEFAULT) -> Store:
        """Open the store; this creates and changes nothing.

        Raises: StoreMissing.
        """
        ...

    def create(self, *, wait_s: float, limits: Limits = DEFAULT) -> Store:
        """Open the store, and create it if there is none; durable on return."""
        ...

    def environment(self) -> Mapping[str, str]:
        """Return the variables that a job must be given to reach it; no password is among them."""
        ...


def locate(where: str | os.PathLike[str] | None = None) -> Place:
    """Return the place that `where` means: a path, a file://, etcd:// or etcds:// URL.

    None: `CREWLOG_DIR`, else `$XDG_STATE_HOME/crewlog` if that is absolute, else
    `~/.local/state/crewlog`.
    Raises: ValueError for a URL that names no place, and where there is no home directory;
    Unsupported where the extra that it needs is not installed.
    """
    named = os.fspath(where) if where is not None else os.environ.get(ENVIRONMENT, "")
    if not isinstance(named, str):
        message = f"a registry is named by text, not {type(named).__name__}: os.fsdecode makes it"
        raise TypeError(message)
    if named.lower().startswith(("etcd:", "etcds:")):
        return _cluster(named)
    if where is not None and not named:
        message = "an empty path names no registry"
        raise ValueError(message)
    return DirectoryPlace(_directory(named))


def inherited(variables: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Return the environment of a program that is started: a relative CREWLOG_DIR made absolute.

    The program may change its directory, and is to find the same registry. None: our environment.
    """
    given = os.environ if variables is None else variables
    named = given.get(ENVIRONMENT, "")
    if not named or named.startswith(("/", "~")) or ":" in named:
        return variables
    coerced = variables is None and host.locale_is_coerced()
    kept = {name: value for name, value in given.items() if not (coerced and name == "LC_CTYPE")}
    return {**kept, ENVIRONMENT: str(_directory(named))}


def _directory(named: str) -> Path:
    """Return the absolute directory of a path or a file:// URL, "" for the default one."""
    if not named:
        state = os.environ.get("XDG_STATE_HOME", "")
        home = Path(state) if state.startswith("/") else _expanded("~") / ".local" / "state"
        return home / "crewlog"
    if "://" in named:
        with no_fork():
            from urllib.parse import unquote, urlsplit  # noqa: PLC0415 (a URL is rare)

        parts = urlsplit(named)
        if parts.scheme != "file" or parts.netloc not in {"", "localhost"}:
            message = (
                f"{named!r} is not a place for a registry: "
                "give a directory, file:///path or etcd://host:2379/prefix"
            )
            raise ValueError(message)
        named = unquote(parts.path)
    if "\0" in named:
        message = f"{named!r} is not a path: it holds a NUL"
        raise ValueError(message)
    try:
        return _expanded(named).absolute()
    except FileNotFoundError as error:
        remedy = "Go to a directory that exists, or give an absolute path"
        raise StoreMissing(named, why="the working directory was removed", remedy=remedy) from error


def _expanded(named: str) -> Path:
    """Put the home directory where `~` stands.

    Raises: ValueError where there is none.
    """
    if not named.startswith("~"):
        return Path(named)
    try:
        path = Path(named).expanduser()
    except RuntimeError as error:
        message = f"{named!r} means no directory: {error}"
        raise ValueError(message) from error
    home = os.environ.get("HOME")
    if not path.is_absolute() or home == "":  # it would be another one in every directory, or /
        message = f"HOME is {home!r}, no absolute path: name the place without ~ (--dir)"
        raise ValueError(message)
    return path


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
            remedy="Run: pip install urllib3 (the extra [etcd] of crewlog)",
        ) from error
    return EtcdPlace(address)
