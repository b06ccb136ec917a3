"""Open the store at an address in a cluster, or create it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crewlog.errors import Unsupported
from crewlog.etcd import address
from crewlog.etcd.address import EtcdAddress
from crewlog.etcd.append import EtcdLog
from crewlog.model.limits import DEFAULT, Limits
from crewlog.store import Kind


@dataclass(frozen=True, slots=True)
class EtcdPlace:
    """A prefix of a cluster; see place.Place."""

    address: EtcdAddress

    @property
    def kind(self) -> Kind:
        """Return "etcd"."""
        return "etcd"

    @property
    def path(self) -> Path:
        """Raise Unsupported: it is no directory."""
        raise Unsupported(
            "a path is for a directory",
            where=str(self),
            why="its events are kept by a cluster",
            remedy="See docs/etcd.md; to mend a store in a cluster, restore a backup of it",
        )

    def __str__(self) -> str:
        """Return the URL."""
        return str(self.address)

    def open(self, *, wait_s: float, limits: Limits = DEFAULT) -> EtcdLog:
        """Open the store; this creates and changes nothing.

        Raises: StoreMissing.
        """
        return EtcdLog(self.address, wait_s=wait_s, limits=limits).opened()

    def create(self, *, wait_s: float, limits: Limits = DEFAULT) -> EtcdLog:
        """Open the store, and create it if there is none; durable on return."""
        return EtcdLog(self.address, wait_s=wait_s, limits=limits).created()

    def empty(self, *, wait_s: float) -> EtcdLog:
        """Return what would be the store, for who fills it: nothing of it is read or checked."""
        return EtcdLog(self.address, wait_s=wait_s)

    def environment(self) -> Mapping[str, str]:
        """Return the variables that a job must be given to reach it; no password is among them."""
        known = address.environment()
        names = (address.USER, address.PASSWORD_FILE, address.CA, address.CERT, address.KEY)
        return {name: known[name] for name in names if known.get(name)}
