"""Parse an etcd URL; credentials and certificates come from the environment."""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crewlog.errors import AuthFailed, UnsafePermissions
from crewlog.etcd import layout as keys

USER: Final = "CREWLOG_ETCD_USER"
PASSWORD: Final = "CREWLOG_ETCD_PASSWORD"  # noqa: S105 (the name of a variable)
PASSWORD_FILE: Final = "CREWLOG_ETCD_PASSWORD_FILE"  # noqa: S105 (as above)
CA: Final = "CREWLOG_ETCD_CA"
CERT: Final = "CREWLOG_ETCD_CERT"
KEY: Final = "CREWLOG_ETCD_KEY"
_PORT: Final = 2379
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_PREFIX: Final = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_FORM: Final = "etcd://host:2379,host:2379/prefix (etcds:// for TLS)"


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    """The servers of a cluster, each as host:port, and the prefix that the store's keys have."""

    hosts: tuple[str, ...]
    prefix: str
    tls: bool
    user: str = ""

    @classmethod
    def parse(cls, url: str) -> "EtcdAddress":
        """Read a URL.

        Raises: ValueError, which says what is wrong with it.
        """
        scheme, slashes, rest = url.partition("://")
        if not slashes:
            raise _bad(url, "it is no URL")
        place, _, path = rest.partition("/")
        user, at, names = place.rpartition("@")
        if ":" in user:
            message = f"a password must not stand in a URL: set {PASSWORD_FILE} instead"
            raise ValueError(message)
        if at and not user:
            raise _bad(url, "the user is missing before @")
        hosts = tuple(_host(url, name) for name in names.split(","))
        prefix = path.strip("/")
        if not _PREFIX.fullmatch(prefix):
            raise _bad(
                url, f"{_shown(url, prefix)} is no prefix" if prefix else "the prefix is missing"
            )
        return cls(hosts, prefix, tls=scheme.lower() == "etcds", user=user)

    def __str__(self) -> str:
        """Return the URL."""
        user = f"{self.user}@" if self.user else ""
        return f"{'etcds' if self.tls else 'etcd'}://{user}{','.join(self.hosts)}/{self.prefix}"


def _host(url: str, name: str) -> str:
    match = _HOST.fullmatch(name)
    if match is None:
        raise _bad(url, f"{_shown(url, name)} is no host" if name else "a host is missing")
    port = int(match[2] or _PORT)
    if not 0 < port < 2**16:
        raise _bad(url, f"there is no port {port}")
    return f"{match[1]}:{port}"


def _bad(url: str, why: str) -> ValueError:
    return ValueError(f"{_shown(url, url)} is not a place for a registry: {why}; it is {_FORM}")


def _shown(url: str, part: str) -> str:
    """Quote part of a URL, but nothing of one that may hold a password."""
    if "@" in url:
        return "what stands there"
    return repr(part.partition("?")[0] + "?…" if "?" in part else part)


@dataclass(frozen=True, slots=True)
class Secrets:
    """What the environment says of who we are: a user with a password, files of certificates."""

    user: str
    password: str
    ca: str | None
    cert: str | None
    key: str | None


def secrets(address: EtcdAddress) -> Secrets:
    """Read the environment.

    Raises: AuthFailed, UnsafePermissions.
    """
    where = str(address)
    user = address.user or os.environ.get(USER, "")
    password = os.environ.get(PASSWORD, "")
    file = os.environ.get(PASSWORD_FILE)
    if user and not password:
        if not file:
            why = f"user {user!r} has no password"
            remedy = f"Set {PASSWORD_FILE}, or {PASSWORD}"
            raise AuthFailed(where, why=why, remedy=remedy)
        password = _password(file, where)
    if not password.isascii() and "\udc80" <= max(password) <= "\udcff":
        raise AuthFailed(where, why=f"{PASSWORD} is not UTF-8", remedy="Write it as UTF-8")
    files = {name: os.environ.get(name) or None for name in (CA, CERT, KEY)}
    for name, path in files.items():
        if path is not None and not os.access(path, os.R_OK):
            why = f"{name}={path} cannot be read"
            raise AuthFailed(where, why=why, remedy="Check the path and its mode")
    if (files[CERT] is None) != (files[KEY] is None):
        raise AuthFailed(where, why=f"{CERT} and {KEY} go together", remedy="Set both or neither")
    return Secrets(user, password, files[CA], files[CERT], files[KEY])


def _password(file: str, where: str) -> str:
    try:
        with Path(file).open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            data = opened.read(keys.READ_BYTES)
    except OSError as error:
        why = f"{PASSWORD_FILE}={file}: {error.strerror}"
        raise AuthFailed(where, why=why, remedy="Check the path and its mode") from error
    if stat.S_IMODE(mode) & 0o077:
        raise UnsafePermissions(
            "others can read the password",
            where=file,
            why=f"its mode is {stat.S_IMODE(mode):o}",
            remedy=f"chmod go= {file}",
        )
    try:
        return data.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        why = f"{PASSWORD_FILE}={file} is not UTF-8"
        raise AuthFailed(where, why=why, remedy="Write the password as UTF-8") from error


def environment() -> dict[str, str]:
    """Return the environment for a process of another directory: its paths are absolute."""
    named = {
        name: os.environ[name] for name in (CA, CERT, KEY, PASSWORD_FILE) if os.environ.get(name)
    }
    return {**os.environ, **{name: os.path.abspath(path) for name, path in named.items()}}
