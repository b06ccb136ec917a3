"""Look at a cluster that a registry is in: its servers, its room, who may reach it."""

from collections.abc import Iterator
from typing import cast

from crewlog.etcd import layout as keys
from crewlog.etcd.append import EtcdLog, outdated
from crewlog.etcd.client import ANSWER_WAIT_S
from crewlog.etcd.place import EtcdPlace
from crewlog.model.events import JsonObject
from crewlog.model.figures import size
from crewlog.place import Place
from crewlog.store import Store
from crewlog.watch.wake import Bell, Waker
from crewlog_compactor.reports import Check

_LOOPBACK = ("127.", "localhost", "[::1]")
_NO_SPACE = "NOSPACE"


def checks(store: Store) -> Iterator[Check]:
    """Yield what a look at the servers finds."""
    log = cast("EtcdLog", store)  # its kind says so
    yield _place(log)
    yield from _servers(log)
    yield _room(log)
    yield Check(name="log", status="ok", found=f"seq {log.last_seq()} is durable")
    with Waker(log.channel, backend="auto", bell=Bell()) as waker:
        yield Check(name="wakes", status="ok", found=f"by {waker.source}")


def outlook(place: Place) -> tuple[str, list[Check]]:
    """Look at the servers of a place where no store can be opened."""
    log = cast("EtcdPlace", place).empty(wait_s=ANSWER_WAIT_S)
    try:
        seen = _place(log)
        # why it cannot be opened is told already
        return "", [*([seen] if seen.status != "ok" else []), *_servers(log)]
    finally:
        log.close()


def _place(log: EtcdLog) -> Check:
    address = log.address
    if not address.tls and not all(host.startswith(_LOOPBACK) for host in address.hosts):
        return Check(
            name="place",
            status="warn",
            found=f"{log.where}: nothing is encrypted on the way",
            remedy="Give the servers certificates, and use etcds://",
        )
    return Check(name="place", status="ok", found=log.where)


def _servers(log: EtcdLog) -> Iterator[Check]:
    for host, answer in log.client.each("maintenance/status", {}):
        if isinstance(answer, str):
            yield Check(
                name="server",
                status="warn",
                found=f"{host}: {answer}",
                remedy="Start it: without a quorum of the servers nothing is written",
            )
            continue
        version = str(answer.get("version"))
        server = f"{host}: etcd {version}, {size(keys.number(answer, 'dbSize'))}"
        old = outdated(version)
        if keys.number(answer, "leader") == 0:
            yield Check(
                name="server",
                status="fail",
                found=f"{server}, knows no leader",
                remedy="Start the other servers: nothing is written without a quorum",
            )
        elif old:
            yield Check(name="server", status="warn", found=f"{server}: {old}", remedy="Upgrade it")
        else:
            yield Check(name="server", status="ok", found=server)


def _room(log: EtcdLog) -> Check:
    alarms: list[JsonObject] = keys.objects(log.client.call("maintenance/alarm", {}), "alarms")
    if any(alarm.get("alarm") == _NO_SPACE for alarm in alarms):
        return Check(
            name="room",
            status="fail",
            found="the quota is full: no change is taken",
            remedy="crewlog compact --keep-history 30d --yes; "
            "then etcdctl compact, defrag, alarm disarm",
        )
    return Check(name="room", status="ok", found="no alarm")
