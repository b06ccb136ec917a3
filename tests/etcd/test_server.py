"""What servers refuse, and what is said of it: passwords, certificates, room, versions."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import cast

import pytest

import crewlog
from cluster import MISSING, Cluster
from commands import CREWLOG, Cli
from crewlog.errors import (
    AuthFailed,
    HistoryRewound,
    QuotaExceeded,
    SnapshotCorrupt,
    Unavailable,
    UnsafePermissions,
    Unsupported,
)
from crewlog.etcd import layout as keys
from crewlog.etcd import waiters
from crewlog.etcd.address import EtcdAddress
from crewlog.etcd.append import EtcdLog, is_sound, outdated
from crewlog.etcd.client import Client
from crewlog.etcd.layout import Room
from crewlog.etcd.state import Part
from crewlog.model.events import JsonObject
from crewlog.model.items import Reset
from crewlog.model.steps import loss_step
from crewlog.place import locate
from crewlog_compactor import KeepEvents, compact, repair, verify
from crewlog_compactor.etcd import compact as job
from procs import Crew, forked, joined, until
from stores import opened

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


def ask(port: int, path: str, body: dict[str, object], token: str = "") -> dict[str, object]:
    """Speak to a server past crewlog."""
    headers = {"Authorization": token} if token else {}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v3/{path}", data=json.dumps(body).encode(), headers=headers
    )
    with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 (as above)
        fields: dict[str, object] = json.load(answer)
        return fields


def text(word: str) -> str:
    """Write a word as the gateway takes bytes."""
    return base64.b64encode(word.encode()).decode()


# -- addresses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("etcd://h/p", "etcd://h:2379/p"),
        ("etcd://h:1,i:2/a/b", "etcd://h:1,i:2/a/b"),
        ("etcds://ann@[::1]:5/p", "etcds://ann@[::1]:5/p"),
        ("etcd://h//p/", "etcd://h:2379/p"),
    ],
)
def test_address_is_read_and_written_back(url: str, shown: str) -> None:
    """Hosts, ports, TLS, a user and the prefix."""
    assert str(locate(url)) == shown
    assert str(locate(shown)) == shown


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("etcd://h", "the prefix is missing"),
        ("etcd:///p", "a host is missing"),
        ("etcd://h:0/p", "there is no port 0"),
        ("etcd://h:x/p", "is no host"),
        ("etcd://h,,i/p", "a host is missing"),
        ("etcd://h/a b", "is no prefix"),
        ("etcd://h/p?x=1", "is no prefix"),
        ("etcd://ann:geheim@h/p", "a password must not stand in a URL"),
        ("ETCD://ann:geheim@h/p", "a password must not stand in a URL"),
        ("etcd://ann:ge/heim@h/p", "is no host"),
        ("etcd://h/p?password=geheim", "is no prefix"),
        ("etcd://@h/p", "the user is missing"),
    ],
)
def test_bad_address_is_refused_with_its_reason(url: str, why: str) -> None:
    """A ValueError for Python, a usage error on the command line; no password is repeated."""
    with pytest.raises(ValueError, match=why) as caught:
        crewlog.open(url)
    assert not any(word in str(caught.value) for word in ("geheim", "ge/", "heim"))
    output = Cli(url)("ls", code=2).stderr
    assert "geheim" not in output
    assert "Traceback" not in output


def test_environment_names_a_cluster(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CREWLOG_DIR takes a URL, too."""
    monkeypatch.setenv("CREWLOG_DIR", url)
    with crewlog.open() as reg:
        reg.register("a")
        assert reg.where == url
        with pytest.raises(Unsupported):
            _ = reg.path


def test_nobody_there_is_told_with_the_address(tmp_path: Path) -> None:
    """Within the wait; reading and writing."""
    with crewlog.open("etcd://127.0.0.1:1/p", lock_timeout_s=0.2) as reg:
        for use in (reg.workers, lambda: reg.register("a")):
            with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1") as caught:
                use()
            assert caught.value.outcome == "not_written"
    done = Cli("etcd://127.0.0.1:1/p")("ls", code=69)
    assert done.stderr.count("\n") == 3


def test_one_server_of_three_is_enough(one_server: Cluster, tmp_path: Path) -> None:
    """Servers that are not there are passed over."""
    port = one_server.servers[0].port
    place = f"etcd://127.0.0.1:1,127.0.0.1:{port},127.0.0.1:2/test/{tmp_path.name}"
    for _ in range(6):  # whichever is asked first
        with crewlog.open(place) as reg:
            reg.register(f"w{reg.last_seq}")
    assert verify(place).ok


def test_what_only_a_directory_can_do_says_so(url: str) -> None:
    """Repair is for files; a waker of directories hears nothing here."""
    with crewlog.open(url) as reg:
        reg.register("a")
        with pytest.raises(ValueError, match="on etcd: auto or poll"):
            reg.watch(backend="watchdog")
        with reg.watch(after=0, backend="poll") as items:
            assert items.stats()["source"] == "poll"
            assert [i.seq for i in items.drain()] == [2, 2]
    with pytest.raises(Unsupported, match="repair is for a directory"):
        repair(url)
    Cli(url)("repair", code=69)


# -- who we are -----------------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Cluster]:
    """Start a server that asks for users: root, and ann, who may use test/ only."""
    with Cluster(tmp_path / "home", more=["--auth-token-ttl", "1"]) as cluster:
        port = cluster.servers[0].port
        for name in ("root", "ann"):
            ask(port, "auth/user/add", {"name": name, "password": f"geheim-{name}"})
        for role in ("root", "tester"):
            ask(port, "auth/role/add", {"name": role})
        grant = {"permType": "READWRITE", "key": text("test/"), "range_end": text("test0")}
        ask(port, "auth/role/grant", {"name": "tester", "perm": grant})
        ask(port, "auth/user/grant", {"user": "root", "role": "root"})
        ask(port, "auth/user/grant", {"user": "ann", "role": "tester"})
        ask(port, "auth/enable", {})
        yield cluster


def test_user_with_a_password_works_and_others_are_told(
    guarded: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file or the environment; without, with a wrong one, and outside one's role: 77."""
    place = guarded.url("test/a")
    with crewlog.open(place) as reg, pytest.raises(AuthFailed, match="asks for a user"):
        reg.register("a")
    secret = tmp_path / "password"
    secret.touch(mode=0o600)
    secret.write_text("geheim-ann\n")
    monkeypatch.setenv("CREWLOG_ETCD_USER", "ann")
    with crewlog.open(place) as reg, pytest.raises(AuthFailed, match="CREWLOG_ETCD_PASSWORD_FILE"):
        reg.register("a")
    monkeypatch.setenv("CREWLOG_ETCD_PASSWORD_FILE", str(secret))
    with crewlog.open(place) as reg:
        reg.register("a", lease=True)
        with reg.watch(after=0) as items:
            assert items.next(5) is not None
    with (
        crewlog.open(guarded.url("other/a")) as reg,
        pytest.raises(AuthFailed, match="permission denied") as caught,
    ):
        reg.register("a")
    assert caught.value.outcome == "not_written"
    secret.chmod(0o644)
    with crewlog.open(place) as reg, pytest.raises(UnsafePermissions, match="chmod go="):
        reg.workers()
    monkeypatch.setenv("CREWLOG_ETCD_PASSWORD", "wrong")
    output = Cli(place)("ls", code=77).stderr
    assert "authentication failed" in output
    assert "wrong" not in output


def _accepted(port: int, token: str) -> bool:
    try:
        ask(port, "kv/range", {"key": text("test/x")}, token)
    except urllib.error.HTTPError as error:
        error.close()
        return False
    time.sleep(1.5)  # asking keeps it alive: ask less often than it lives
    return True


def test_token_that_expires_is_renewed_once(
    guarded: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the token's life the next request logs in again; a watch goes on."""
    monkeypatch.setenv("CREWLOG_ETCD_USER", "ann")
    monkeypatch.setenv("CREWLOG_ETCD_PASSWORD", "geheim-ann")
    with crewlog.open(guarded.url("test/a")) as reg:
        reg.register("a")
        client = reg.store().client  # type: ignore[attr-defined]
        before = client._token
        port = guarded.servers[0].port
        until(lambda: not _accepted(port, before))  # it lives for a second
        reg.update("a", state="ready")
        assert client._token not in {"", before}
        with reg.watch(after="now") as items:
            items.next(1)
            reg.update("a", meta={"n": 1})
            assert items.next(5) is not None


# -- certificates ---------------------------------------------------------------------------


def openssl(*words: str, at: Path) -> None:
    """Run openssl."""
    subprocess.run(["openssl", *words], cwd=at, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an authority, a server's certificate that is a client's too, and a client's."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    at = tmp_path_factory.mktemp("certificates")
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem",
            "-subj", "/CN=authority", "-days", "2",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign", at=at)  # fmt: skip
    (at / "more").write_text(
        "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n"
        "authorityKeyIdentifier=keyid\n"  # Python 3.13 asks for it
    )
    for name, subject in (("server", "/CN=server"), ("client", "/O=crewlog"), ("ann", "/CN=ann")):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key",
                "-out", f"{name}.csr", "-subj", subject, at=at)  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                "-CAcreateserial", "-out", f"{name}.pem", "-extfile", "more", at=at)  # fmt: skip
    return at


class Secured(Cluster):
    """One server that speaks TLS and asks for a client's certificate."""

    def __init__(self, home: Path, certificates: Path) -> None:
        """Start it."""
        self._certificates = certificates
        super().__init__(
            home,
            scheme="https",
            more=[
                *("--cert-file", str(certificates / "server.pem")),
                *("--key-file", str(certificates / "server.key")),
                *("--trusted-ca-file", str(certificates / "ca.pem")),
                "--client-cert-auth",
            ],
        )

    def wait(self) -> None:
        """Wait until it listens: it answers nobody without a certificate."""
        log = self.servers[0].home / "log"
        until(lambda: b"ready to serve client requests" in log.read_bytes())


def test_tls_with_client_certificates(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Authority, certificate and key from the environment; each mistake has its message."""
    with Secured(tmp_path, certificates) as cluster:
        place = cluster.url("p").replace("etcd://", "etcds://")
        with crewlog.open(cluster.url("p")) as reg, pytest.raises(Unavailable, match="etcds://"):
            reg.register("a")
        with crewlog.open(place) as reg, pytest.raises(AuthFailed, match="CREWLOG_ETCD_CA"):
            reg.register("a")
        monkeypatch.setenv("CREWLOG_ETCD_CA", str(certificates / "ca.pem"))
        with crewlog.open(place, lock_timeout_s=1) as reg, pytest.raises((AuthFailed, Unavailable)):
            reg.register("a")
        monkeypatch.setenv("CREWLOG_ETCD_CERT", str(certificates / "client.pem"))
        with crewlog.open(place) as reg, pytest.raises(AuthFailed, match="go together"):
            reg.register("a")
        monkeypatch.setenv("CREWLOG_ETCD_KEY", str(certificates / "none.key"))
        with crewlog.open(place) as reg, pytest.raises(AuthFailed, match="cannot be read"):
            reg.register("a")
        monkeypatch.setenv("CREWLOG_ETCD_KEY", str(certificates / "client.key"))
        with crewlog.open(place) as reg:
            reg.register("a", lease=True)
            with reg.watch(after="now") as items:
                items.next(1)
                reg.update("a", state="ready")
                assert items.next(5) is not None
        assert Cli(place).json("doctor")["ok"] is True
        admin = Client(EtcdAddress.parse(place), wait_s=5)
        for path, body in (
            ("auth/user/add", {"name": "root", "password": "geheim"}),
            ("auth/role/add", {"name": "root"}),
            ("auth/user/grant", {"user": "root", "role": "root"}),
            ("auth/enable", {}),
        ):
            admin.call(path, cast("JsonObject", body))
        admin.close()
        with crewlog.open(place) as reg, pytest.raises(AuthFailed):
            reg.register("b")
        monkeypatch.setenv("CREWLOG_ETCD_USER", "root")
        monkeypatch.setenv("CREWLOG_ETCD_PASSWORD", "geheim")
        with crewlog.open(place) as reg:
            reg.register("b")
        with monkeypatch.context() as patch:
            patch.setenv("CREWLOG_ETCD_CERT", str(certificates / "ann.pem"))
            patch.setenv("CREWLOG_ETCD_KEY", str(certificates / "ann.key"))
            with crewlog.open(place) as reg, pytest.raises(AuthFailed, match="CommonName"):
                reg.register("c")
        plain = place.replace("etcds://", "etcd://")
        with crewlog.open(plain, lock_timeout_s=1) as reg, pytest.raises(crewlog.CrewlogError):
            reg.workers()


# -- room -----------------------------------------------------------------------------------


def test_base_that_was_not_written_whole_costs_a_watcher_only_the_history(
    one_server: Cluster, tmp_path: Path
) -> None:
    """A retention that was killed while it wrote: a Reset with a state, not an error for good."""
    with crewlog.open(one_server.url(f"test/{tmp_path.name}")) as reg:
        for number in range(4):
            reg.register(f"w{number}")
            compact(reg)
        assert compact(reg, keep_history=KeepEvents(2)).dropped is not None
        log = reg.store()
        assert isinstance(log, EtcdLog)
        base = log.read_base()
        assert base is not None
        log.client.at_once(keys.put(log.keys.base(base.last_seq, 0), b"half of"))
        with pytest.raises(SnapshotCorrupt):
            log.read_base()
        with reg.watch(after=1) as items:
            item = items.next(5)
            assert isinstance(item, Reset)
            assert item.reason == "compacted"
            assert dict(item.state.workers) == dict(reg.state().workers)
            later = reg.register("later").rev
            assert [i.seq for i in items.drain() if i.kind == "change"] == [later]


def test_full_quota_refuses_changes_and_retention_still_works(tmp_path: Path) -> None:
    """QuotaExceeded, nothing written; what only removes goes on; defragmented, all does."""
    quota = 4 * 1024 * 1024
    with Cluster(tmp_path, more=["--quota-backend-bytes", str(quota)]) as cluster:
        port = cluster.servers[0].port
        place = cluster.url("p")
        with crewlog.open(place) as reg:
            for number in range(6):
                reg.register(f"w{number}", meta={"filling": "x" * 20_000})
                compact(reg)
            with pytest.raises(QuotaExceeded) as caught:
                for number in range(10_000):
                    reg.update("w0", meta={"filling": f"{number:04d}" * 8_000})
                    if number in {9, 19, 29}:  # then something is left to be sealed
                        compact(reg)
            assert caught.value.outcome == "not_written"
            last = reg.last_seq
            with pytest.raises(QuotaExceeded):
                reg.exited("w1", code=0)
            report = compact(reg, keep_history=KeepEvents(0))
            assert report.dropped is not None
            assert report.full is not None
            assert reg.last_seq == last
            assert Cli(place)("compact", "-q", "--yes", "--keep-history", "0events", code=74).stderr
            assert len(reg.workers()) == 6
            assert Cli(place).json("doctor", code=1)["ok"] is False
            Cli(place)("update", "w0", "--state", "ready", code=74)
            header = ask(port, "kv/range", {"key": text("a")})["header"]
            assert isinstance(header, dict)
            ask(port, "kv/compaction", {"revision": header["revision"], "physical": True})
            ask(port, "maintenance/defragment", {})
            alarms = cast("list[dict[str, object]]", ask(port, "maintenance/alarm", {})["alarms"])
            ask(port, "maintenance/alarm", {**alarms[0], "action": "DEACTIVATE"})
            reg.update("w0", state="ready")
            assert reg.store().first_seq() == report.dropped[1] + 1
        assert verify(place).ok


def test_too_much_for_one_transaction_is_refused_before_it_is_sent(url: str) -> None:
    """A batch of more workers, or bytes, than etcd takes."""
    with crewlog.open(url) as reg:
        with (
            pytest.raises(ValueError, match="at most 100 workers"),
            reg.batch() as batch,
        ):
            for number in range(101):
                batch.register(f"w{number}")
        with pytest.raises(ValueError, match="on etcd a batch holds at most"), reg.batch() as batch:
            for number in range(40):
                batch.register(f"w{number}", meta={"much": "x" * 40_000})
        assert reg.last_seq in {0, 1}
        reg.register("a")
        assert [w.sid for w in reg.workers()] == ["a"]


# -- a server that answers, but is cut off from the others ----------------------------------


@pytest.mark.parametrize("answer", [{"code": 14, "message": "etcdserver: no leader"}, "proxy"])
def test_server_without_a_leader_is_left_for_the_next_one(
    one_server: Cluster, answer: dict[str, object] | str, tmp_path: Path
) -> None:
    """It is reached and answers, so nothing else would ever lead away from it."""
    with pretending(answer, status=503) as port:
        place = f"etcd://127.0.0.1:{port},{one_server.url(tmp_path.name).removeprefix('etcd://')}"
        with crewlog.open(place) as reg:
            reg.register("a")
            log = reg.store()
            assert isinstance(log, EtcdLog)
            for number, ask in enumerate((log.client.version, log.last_seq, reg.workers)):
                log.client._next, began = 0, time.monotonic()
                assert ask()
                reg.update("a", meta={"n": number})
                assert time.monotonic() - began < 2, "left at its word, not as one that is mute"


# -- versions and gateways ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "sound", "old"),
    [
        ("3.3.27", False, True), ("3.4.19", False, True), ("3.4.20", True, True),
        ("3.5.0", False, True), ("3.5.2", False, True), ("3.5.4", False, True),
        ("3.5.5", True, True), ("3.5.32", True, True), ("3.5.33", True, False),
        ("3.6.0", True, True), ("3.6.14", True, False), ("3.7.0", True, True),
        ("3.7.1", True, False), ("3.8.0", True, False), ("4.0.0", True, False),
        ("3.6.0-rc.1", True, True), ("", False, False),
    ],
)  # fmt: skip
def test_versions_are_refused_or_warned_of(version: str, *, sound: bool, old: bool) -> None:
    """Below 3.4.20 and 3.5.5 nothing is written; below what is current it is said."""
    assert is_sound(version) == sound
    assert bool(outdated(version)) == old


@contextmanager
def pretending(answer: object, *, status: int = 200) -> Iterator[int]:
    """Serve HTTP that answers everything alike, or with 404; yield its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answer).encode()
            self.send_response(404 if answer is None else status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 (http.server's names)

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_old_server_is_refused_and_said_so(tmp_path: Path) -> None:
    """Before anything is read or written."""
    with (
        pretending({"etcdserver": "3.5.1"}) as port,
        crewlog.open(f"etcd://127.0.0.1:{port}/p") as reg,
        pytest.raises(Unsupported, match=r"3\.5\.1 is known to lose or corrupt data"),
    ):
        reg.register("a")


def test_server_that_is_no_etcd_is_told(tmp_path: Path) -> None:
    """404 for all: the gateway is off, or it is something else."""
    with (
        pretending(None) as port,
        crewlog.open(f"etcd://127.0.0.1:{port}/p") as reg,
        pytest.raises(Unsupported, match="enable-grpc-gateway"),
    ):
        reg.register("a")


def test_gateway_that_is_off_is_told(tmp_path: Path) -> None:
    """A real server with --enable-grpc-gateway=false."""

    class Closed(Cluster):
        def wait(self) -> None:
            log = self.servers[0].home / "log"
            until(lambda: b"ready to serve client requests" in log.read_bytes())

    with Closed(tmp_path, more=["--enable-grpc-gateway=false"]) as cluster:
        with crewlog.open(cluster.url("p")) as reg, pytest.raises(Unsupported, match="gateway"):
            reg.register("a")
        assert "gateway" in Cli(cluster.url("p"))("ls", code=69).stderr


def test_old_version_is_warned_of_once_it_is_written_to(
    url: str, caplog: pytest.LogCaptureFixture, one_server: Cluster
) -> None:
    """At the creation of a store, and by doctor; every other command is silent."""
    version = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=True)
    number = version.stdout.split()[2]
    with crewlog.open(url) as reg:
        reg.register("a")
    warnings = [r.getMessage() for r in caplog.records if "is old" in r.getMessage()]
    assert bool(warnings) == bool(outdated(number))
    assert Cli(url)("ls").stderr == ""
    assert ("is old" in Cli(url)("doctor").stdout) == bool(outdated(number))


# -- a backup that came back ----------------------------------------------------------------


def backed_up(cluster: Cluster, place: str, home: Path) -> Path:
    """Make a store of one worker, and copy all that the server has."""
    (server,) = cluster.servers
    with crewlog.open(place) as reg:
        reg.register("a")
    server.kill()
    shutil.copytree(server.home, home / "backup")
    server.start()
    cluster.wait()
    return home / "backup"


def bring_back(cluster: Cluster, backup: Path) -> None:
    """Let the server be what it was."""
    (server,) = cluster.servers
    server.kill()
    shutil.rmtree(server.home)
    shutil.copytree(backup, server.home)
    server.start()
    cluster.wait()


def test_store_that_went_back_in_time_is_noticed(tmp_path: Path) -> None:
    """Writers and readers that saw more are told; a watcher gets a Reset and goes on."""
    with Cluster(tmp_path / "home") as cluster:
        place = cluster.url("p")
        backup = backed_up(cluster, place, tmp_path)
        reg = crewlog.open(place)
        items = reg.watch(after=0)
        for number in range(5):
            reg.update("a", meta={"n": number})
        assert len(items.drain()) >= 6
        bring_back(cluster, backup)
        with pytest.raises(HistoryRewound) as caught:
            reg.update("a", state="ready")
        assert (caught.value.seen, caught.value.found) == (7, 2)
        with pytest.raises(HistoryRewound):
            reg.workers()
        item = items.next(10)
        assert item is not None
        assert item.kind == "reset"
        assert (item.reason, item.seq) == ("replaced", 2)
        with crewlog.open(place) as again:
            again.update("a", state="ready")
            reset = items.next(10)
            assert reset is not None
            assert reset.seq == 3
        items.close()
        reg.close()
        assert verify(place).ok


def test_backup_that_has_grown_since_is_noticed_by_watchers_and_cursors(tmp_path: Path) -> None:
    """Other events bear the seqs that were seen: a Reset, and nothing after it is left out."""
    with Cluster(tmp_path / "home") as cluster:
        place = cluster.url("p")
        backup = backed_up(cluster, place, tmp_path)
        with crewlog.open(place) as reg:
            plain, held = reg.watch(after=0), reg.watch(after=0, cursor="c")
            for number in range(3):
                reg.update("a", meta={"n": number})
            folded = crewlog.open(place)
            assert len(folded.workers()) == 1
            seen = [item.seq for item in plain.drain()]
            assert [item.seq for item in held.drain()] == seen
            bring_back(cluster, backup)
            with crewlog.open(place) as other:
                for number in range(6):
                    other.update("a", meta={"other": number})
            with pytest.raises(HistoryRewound):
                folded.workers()
            folded.close()
            for items in (plain, held):
                item = items.next(10)
                assert item is not None
                assert item.kind == "reset", item
                assert (item.reason, item.seq) == ("replaced", 8)
            with crewlog.open(place) as other:
                other.update("a", state="ready")
            for items in (plain, held):
                item = items.next(10)
                assert item is not None
                assert item.seq == 9
                items.close()


# -- damage ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("e/0000000000000003", b"{}\n0", "log_corrupt"),
        ("e/0000000000000003", None, "log_corrupt"),
        ("w/a", None, "snapshot_differs"),
        ("zz", b"1", "stray"),
        ("w/a", b"{}", "snapshot_corrupt"),
        ("s/0000000000000001", b"{}", "snapshot_corrupt"),
        ("s/0000000000000001", None, "state_differs"),
        ("c/mailer", b"x", "cursor_corrupt"),
        ("e/0000000000000001", None, "segment_missing"),
    ],
)
def test_verify_finds_what_was_changed_past_crewlog(
    one_server: Cluster, tmp_path: Path, key: str, value: bytes | None, code: str
) -> None:
    """A line, a record or a key that somebody changed, removed or added."""
    prefix = f"test/{tmp_path.name}"
    place = one_server.url(prefix)
    with crewlog.open(place) as reg:
        reg.register("a")
        for number in range(4):
            reg.update("a", meta={"n": number})
        compact(reg)
        reg.update("a", meta={"n": 9})
        reg.store().cursors.own("mailer", start=2).close()
    assert verify(place).ok
    port = one_server.servers[0].port
    if value is None:
        ask(port, "kv/deleterange", {"key": text(f"{prefix}/:{key}")})
    else:
        encoded = base64.b64encode(value).decode()
        ask(port, "kv/put", {"key": text(f"{prefix}/:{key}"), "value": encoded})
    report = verify(place)
    assert code in {finding.code for finding in report.findings}, report
    assert Cli(place)("verify", code=1).stdout
    with crewlog.open(place) as reg:  # whatever is asked for, what comes is typed
        for use in (reg.workers, lambda: list(reg.history()), lambda: compact(reg), reg.lives):
            with contextlib.suppress(crewlog.CrewlogError):
                use()


def test_migration_marker_keeps_a_half_copied_store_from_being_used(
    one_server: Cluster, tmp_path: Path
) -> None:
    """Neither read nor created over."""
    prefix = f"test/{tmp_path.name}"
    ask(one_server.servers[0].port, "kv/put", {"key": text(f"{prefix}/:m"), "value": text("x")})
    with crewlog.open(one_server.url(prefix)) as reg:
        assert not reg.exists
        with pytest.raises(crewlog.StoreMissing, match="migration"):
            reg.register("a")


def test_store_below_another_disturbs_nothing(one_server: Cluster, tmp_path: Path) -> None:
    """Whatever word its prefix ends with."""
    outer = one_server.url(f"test/{tmp_path.name}")
    with crewlog.open(outer) as reg:
        reg.register("a")
        for word in "ewsbltcom":
            with crewlog.open(f"{outer}/{word}") as inner:
                inner.register("b")
                compact(inner)
        compact(reg)
        assert [w.sid for w in reg.workers()] == ["a"]
    assert verify(outer).ok
    assert verify(f"{outer}/w").ok


def test_grown_record_and_large_groups_are_counted(url: str) -> None:
    """Records count: what is too much alone is refused, what is too much together is parted."""
    filling = {f"k{n}": "x" * 15_000 for n in range(4)}
    with crewlog.open(url) as reg:
        for first in range(0, 60, 5):
            with reg.batch() as batch:
                for number in range(first, first + 5):
                    batch.register(f"w{number}", meta=filling)
        with pytest.raises(ValueError, match="on etcd a batch holds at most"), reg.batch() as batch:
            for number in range(60):
                batch.update(f"w{number}", labels={"a": "b"})
        threads = [
            Thread(target=lambda n=n: reg.update(f"w{n}", labels={"a": "b"})) for n in range(60)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(w.labels == {"a": "b"} for w in reg.workers())
        for number in range(20):
            try:
                reg.update("w0", meta={f"more{number}": "x" * 60_000})
            except ValueError as error:
                assert "take something out of its meta" in str(error)  # noqa: PT017 (which it is)
                break
        else:
            raise AssertionError
        reg.update("w0", meta={f"more{n}": None for n in range(20)})
    assert verify(url).ok


def test_completion_does_not_wait_for_servers_that_are_gone() -> None:
    """A prompt is no place to wait: nothing is offered, soon."""
    began = time.monotonic()
    env = {**os.environ, "_CREWLOG_COMPLETE": "bash_complete", "COMP_CWORD": "2",
           "COMP_WORDS": "crewlog show ", "CREWLOG_DIR": "etcd://127.0.0.1:1/p"}  # fmt: skip
    done = Cli.bare(env=env)
    assert done.stdout.strip() == ""
    assert time.monotonic() - began < 4


# -- what a newcomer met --------------------------------------------------------------------


def test_end_of_a_child_is_recorded_once_the_servers_are_back(tmp_path: Path, crew: Crew) -> None:
    """`crewlog run` alone knows how it ended: it waits, says so, and tells it."""
    with Cluster(tmp_path / "home") as cluster:
        (server,) = cluster.servers
        place = cluster.url("p")
        begun, gate = tmp_path / "begun", tmp_path / "gate"
        words = f"touch {begun}; while [ ! -e {gate} ]; do sleep 0.05; done; exit 7"
        runner = subprocess.Popen(
            [*CREWLOG, "--dir", place, "run", "w", "--", "sh", "-c", words],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with crewlog.open(place) as reg:
            until(begun.exists)  # it is let go once the registration is answered
            server.kill()
            gate.touch()
            assert runner.stderr is not None
            output = iter(runner.stderr.readline, "")
            assert any("exited with 7; that is not recorded yet" in row for row in output)
            server.start()
            cluster.wait()
            assert runner.wait(60) == 7
            runner.stderr.close()
            worker = reg.get("w")
            assert worker is not None
            assert worker.exit is not None
            assert worker.exit.code == 7


def test_servers_of_two_clusters_in_one_address_are_refused(
    one_server: Cluster, tmp_path: Path
) -> None:
    """Before a second registry could begin in the other one."""
    with Cluster(tmp_path / "home") as other:
        ports = [one_server.servers[0].port, other.servers[0].port]
        place = f"etcd://127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}/test/{tmp_path.name}"
        with pytest.raises(Unsupported, match="of two clusters"):
            for _ in range(12):  # whichever is asked first
                with crewlog.open(place) as reg:
                    reg.register(f"w{reg.last_seq}")
                    list(reg.store().client.each("maintenance/status", {}))  # type: ignore[attr-defined]


def test_lost_worker_that_runs_here_is_not_taken_for_ended(url: str, crew: Crew) -> None:
    """Recorded as lost by another host: `stop` says what is to be done, and sends nothing."""
    process = crew.sleeper()
    with crewlog.open(url) as reg:
        worker = reg.register("a", pid=process.pid)
        step = loss_step(reg.author(), "a", cause="lease_released", evidence={}, expect=worker.rev)
        reg.change(step)
        with pytest.raises(crewlog.StopRefused, match="its process runs here"):
            reg.stop("a", reason="r")
        reg.register("a", pid=process.pid)
        assert reg.stop("a", reason="r").type == "worker.exited"


def test_schedule_tells_what_a_job_needs_but_no_password(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """User, certificates and the file of the password, absolute; never the password."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CREWLOG_ETCD_USER", "ann")
    monkeypatch.setenv("CREWLOG_ETCD_PASSWORD", "geheim")
    monkeypatch.setenv("CREWLOG_ETCD_PASSWORD_FILE", "secret file")
    cli = Cli("etcds://h1:2379/p")
    line = cli("schedule", "cron").stdout
    assert f"CREWLOG_ETCD_USER=ann CREWLOG_ETCD_PASSWORD_FILE='{tmp_path}/secret file' " in line
    unit = cli("schedule", "systemd-user")
    assert f'Environment="CREWLOG_ETCD_PASSWORD_FILE={tmp_path}/secret file"\n' in unit.stdout
    assert "geheim" not in line + unit.stdout + unit.stderr
    assert "CREWLOG_ETCD_PASSWORD_FILE" in unit.stderr


def test_doctor_names_each_server_when_none_answers() -> None:
    """What each of them said, and what to do."""
    cli = Cli("etcd://127.0.0.1:1,127.0.0.1:2/p")
    answer = cli.json("doctor", code=1)
    checks = [c["found"] for c in answer["checks"] if c["name"] == "server"]  # type: ignore[attr-defined]
    assert checks == ["127.0.0.1:1: connection refused", "127.0.0.1:2: connection refused"]
    said = cli("ls", code=69).stderr
    assert "127.0.0.1:1: connection refused" in said
    assert "127.0.0.1:2: connection refused" in said


def test_part_is_sealed_once_whatever_comes_between(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another compaction seals after this one has measured, and before it looks."""
    real, others = job._measure, [True]

    def measured(log: EtcdLog, parts: list[Part]) -> tuple[int, int, str, int]:
        result = real(log, parts)
        if others and others.pop():
            with crewlog.open(url) as other:
                compact(other)
        return result

    with crewlog.open(url) as reg:
        reg.register("a")
    monkeypatch.setattr(job, "_measure", measured)
    with crewlog.open(url) as reg:
        assert compact(reg).folded_events == 0
        assert [line["type"] for line, _ in reg.store().read(0)].count("_seal") == 1
    assert verify(url).ok


def test_lines_that_are_missing_from_a_transaction_are_noticed_by_readers(
    one_server: Cluster, tmp_path: Path
) -> None:
    """Its key says which seq is the last; no reader takes less for all."""
    prefix = f"test/{tmp_path.name}"
    port = one_server.servers[0].port
    with crewlog.open(one_server.url(prefix)) as reg:
        with reg.batch() as batch:
            batch.register("a")
            batch.register("b")
        key = text(f"{prefix}/:e/0000000000000003")
        (row,) = cast("list[dict[str, str]]", ask(port, "kv/range", {"key": key})["kvs"])
        lines = base64.b64decode(row["value"]).split(b"\n")
        cut = base64.b64encode(lines[0] + b"\n" + lines[2]).decode()
        ask(port, "kv/put", {"key": key, "value": cut})
        with pytest.raises(crewlog.errors.LogCorrupt, match="seq 3 is the last"):
            list(reg.history())


def test_state_before_the_history_that_is_half_written_is_passed_over(
    one_server: Cluster, tmp_path: Path
) -> None:
    """A retention that was killed while it wrote the next one: the one before it still holds."""
    prefix = f"test/{tmp_path.name}"
    place, port = one_server.url(prefix), one_server.servers[0].port
    with crewlog.open(place) as reg:
        for number in range(8):
            reg.register(f"w{number}")
            compact(reg)
        report = compact(reg, keep_history=KeepEvents(8))
        assert report.dropped is not None
        first = report.dropped[1] + 1
        half = {"key": text(f"{prefix}/:b/{first + 3:016d}/0001"), "value": text("half")}
        ask(port, "kv/put", {**half})
        assert len(reg.at(first).workers) > 0
        assert compact(reg, keep_history=KeepEvents(4)).dropped is not None
        assert reg.at(reg.store().first_seq()).seq == reg.store().first_seq()
    assert verify(place).ok


def test_records_of_many_pages_are_of_one_moment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change between two pages belongs to what is read afterwards, and is folded once."""
    with crewlog.open(url) as other:
        for first in range(0, 1100, 100):
            with other.batch() as batch:
                for number in range(first, first + 100):
                    batch.register(f"w{number:04d}")
        real, todo = Client.call, [True]

        def call(self: Client, path: str, body: dict[str, object]) -> object:
            if path == "kv/range" and "revision" in body and todo:
                todo.pop()
                other.exited("w1099", code=0)
            return real(self, path, body)  # type: ignore[arg-type]

        monkeypatch.setattr(Client, "call", call)
        with crewlog.open(url) as reg:
            assert len(reg.workers(all=True)) == 1100
            assert not todo
            assert reg.state() == other.state()


# -- the queue of writers -------------------------------------------------------------------


def test_writers_that_are_beaten_take_turns(url: str) -> None:
    """Eight at once: none waits for ever, none is refused, and nothing of the queue is left."""

    def work(number: int) -> None:
        with opened(url, lock_timeout_s=20) as mine:
            for step in range(10):
                mine.update("a", meta={str(number): step})

    with opened(url) as reg:
        reg.register("a")
        joined(*[forked(lambda n=n: work(n)) for n in range(8)])  # type: ignore[misc]
        worker = reg.get("a")
        assert worker is not None
        assert worker.meta == {str(n): 9 for n in range(8)}
        assert [e.seq for e in reg.history()] == list(range(2, 83))
        store = reg.store()
        assert isinstance(store, EtcdLog)
        begin, end = store.keys.room(Room.QUEUE)
        left = store.client.call("kv/range", keys.page(begin, end, limit=0))
        assert keys.pairs(left) == []


def test_who_stands_before_is_waited_for_and_named(url: str) -> None:
    """A newcomer does not push past; one that is stopped in the queue gives way with its lease."""
    with opened(url) as reg, opened(url, lock_timeout_s=0.3) as hasty:
        reg.register("a")
        hasty.update("a", meta={"n": 0})
        store = reg.store()
        assert isinstance(store, EtcdLog)
        place = store._waiters.enter()
        with pytest.raises(
            crewlog.LockBusy, match="stand before us in the cluster's queue"
        ) as busy:
            hasty.update("a", meta={"n": 1})
        assert busy.value.outcome == "not_written"
        assert reg.last_seq == 3
        place.leave()
        hasty.update("a", meta={"n": 2})
        store._waiters.enter()  # and is killed
        with opened(url, lock_timeout_s=30) as patient:
            patient.update("a", meta={"n": 3})
        assert reg.last_seq == 5


@contextlib.contextmanager
def two_writers(url: str) -> Iterator[tuple[crewlog.Registry, EtcdLog, crewlog.Registry, EtcdLog]]:
    """Open a store with a worker "a" twice, each with its log; the first is not patient."""
    with opened(url, lock_timeout_s=0.3) as reg, opened(url) as other:
        reg.register("a")
        mine, theirs = reg.store(), other.store()
        assert isinstance(mine, EtcdLog)
        assert isinstance(theirs, EtcdLog)
        yield reg, mine, other, theirs


def test_who_was_served_has_a_turn_past_the_queue_and_then_waits_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wait serves many changes, for a moment; a newcomer has no turn."""
    monkeypatch.setattr(waiters, "TURN_S", 60.0)
    with two_writers(url) as (reg, mine, _, theirs):
        place = mine._waiters.enter()
        theirs._waiters.enter()
        place.leave()
        with pytest.raises(crewlog.LockBusy):
            reg.update("a", meta={"n": 0})
        mine._waiters.begin_turn(place)
        reg.update("a", meta={"n": 1})
        reg.update("a", meta={"n": 2})
        mine._waiters._turn_until = 0.0  # it is over
        with pytest.raises(crewlog.LockBusy):
            reg.update("a", meta={"n": 3})


def test_turn_ends_where_another_was_faster(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That one's turn has begun, and two in their turns would lose half of what they try."""
    monkeypatch.setattr(waiters, "TURN_S", 60.0)
    with two_writers(url) as (reg, mine, other, theirs):
        place = mine._waiters.enter()
        place.leave()
        mine._waiters.begin_turn(place)
        reg.update("a", meta={"n": 0})
        other.update("a", meta={"n": 1})
        theirs._waiters.enter()
        with pytest.raises(crewlog.LockBusy):  # it has what is left of the look before: beaten
            reg.update("a", meta={"n": 2})


def test_turn_is_longer_in_a_crowd() -> None:
    """To change turns costs the most where many wait, and a wait is never without a bound."""
    assert [round(waiters.turn_s(n) / waiters.TURN_S, 2) for n in (0, 3, 15, 500)] == [1, 1.2, 2, 2]
