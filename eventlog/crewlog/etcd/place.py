"""Open the store at an address in a cluster, or create it."""

from dataclasses import dataclass

from crewlog.etcd.address import EtcdAddress
from crewlog.etcd.engine import EtcdLog


@dataclass(frozen=True, slots=True)
class EtcdPlace:
    """A prefix of a cluster; see place.Place."""

    address: EtcdAddress

    def __str__(self) -> str:
        """Return the URL."""
        return str(self.address)

    def open(self, *, wait_s: float) -> EtcdLog:
        """Open the store; this creates and changes nothing. *Raises* StoreMissing."""
        return EtcdLog(self.address, wait_s=wait_s).opened()

    def create(self, *, wait_s: float) -> EtcdLog:
        """Open the store, and create it if there is none; durable on return."""
        return EtcdLog(self.address, wait_s=wait_s).created()

    def empty(self, *, wait_s: float) -> EtcdLog:
        """Return what would be the store, for who fills it: nothing of it is read or checked."""
        return EtcdLog(self.address, wait_s=wait_s)
