"""Speak to etcd's JSON gateway: endpoints, log-in, and what every refusal means.

What is sent twice does no harm: reads, and transactions that compare (see the package). So a
request without an answer goes out again, to the next server, until the deadline. Only who sends
something that changes need know whether it was ever sent. This is the only module that uses
urllib3. A pool is never shared with a forked child: two processes on one connection would read
each other's answers.
"""

import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeVar

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    SSLError,
)

from crewlog.errors import (
    AuthFailed,
    CrewlogError,
    QuotaExceeded,
    RegistryClosed,
    StorageFailed,
    Unavailable,
    UnknownOutcome,
    Unsupported,
)
from crewlog.etcd import layout as keys
from crewlog.etcd.address import EtcdAddress, secrets
from crewlog.etcd.layout import KeyValue
from crewlog.model import codec
from crewlog.model.codec import DocumentError
from crewlog.model.events import JsonObject
from crewlog.process import socket

CONNECTIONS_MAX: Final = 8
ANSWER_WAIT_S: Final = 2.0  # then the same is sent to the next server
STREAM_WAIT_S: Final = 30.0  # without a word, a stream is begun anew
BACKOFF_MIN_S: Final = 0.001
BACKOFF_MAX_S: Final = 0.1

# gRPC's status codes: what came too late, or from a server that is no leader and knows none.
_PASSING: Final = frozenset({1, 2, 4, 13, 14})
_NOT_FOUND, _DENIED, _EXHAUSTED, _OUT_OF_RANGE, _UNAUTHENTICATED = 5, 7, 8, 11, 16
_NO_SPACE: Final = "database space exceeded"
_TOO_LARGE: Final = "larger than max"
_NO_GATEWAY: Final = 404
_COMMON_NAME: Final = b"CommonName of client"
_OK: Final = 200
_LOGIN: Final = "v3/auth/authenticate"
_VERSION: Final = "version"
_OPEN: Final = frozenset({_LOGIN, _VERSION})  # to those who have not logged in
# What an HTTP proxy before the servers answers while they are gone.
_GATEWAY_ERRORS: Final = frozenset({502, 503, 504})


T = TypeVar("T")


class Unanswered(Exception):
    """No answer that settles anything; `sent`: the request may have arrived."""

    def __init__(self, why: str, *, sent: bool) -> None:
        """Say what happened."""
        super().__init__(why)
        self.sent = sent


class Refused(StorageFailed):
    """The server has answered, and refuses for a reason that its asker may know what to do with."""

    def __init__(self, where: str, *, status: int, message: str) -> None:
        """Keep gRPC's status and the server's words."""
        self.status = status
        super().__init__(
            "the server refuses the request",
            where=where,
            why=message,
            remedy="Check its settings (--max-txn-ops, --max-request-bytes) and its version",
        )

    @property
    def compacted(self) -> bool:
        """Say whether the revision that was asked for is no longer there."""
        return self.status == _OUT_OF_RANGE

    @property
    def not_found(self) -> bool:
        """Say whether there is no such lease."""
        return self.status == _NOT_FOUND


class Client:
    """A connection to a cluster; threads may share it, and a forked child may go on using it."""

    def __init__(self, address: EtcdAddress, *, wait_s: float) -> None:
        """Connect to nothing yet; `wait_s` is how long a request may take, in seconds."""
        self.where = str(address)
        self.wait_s = wait_s
        self.closed = False
        self._address = address
        self._secrets = secrets(address)
        # Set and read as one: threads of a forked child must never meet the parent's pool.
        self._held: tuple[int, urllib3.PoolManager] | None = None
        self._token = ""
        self._clusters: dict[str, str] = {}  # by host, as each said last
        self._next = random.randrange(len(address.hosts))  # noqa: S311 (spreads the load)

    # -- requests ---------------------------------------------------------------------------

    def call(self, path: str, body: JsonObject) -> JsonObject:
        """Send a request, which may arrive twice, and return the answer.

        Raises: Refused; Unavailable after `wait_s` without an answer; AuthFailed, QuotaExceeded.
        """
        return self._answered(lambda deadline: self.send(path, body, deadline=deadline))

    def at_once(self, *requests: JsonObject) -> JsonObject:
        """Carry out all of these at one moment, whatever is there; it may happen twice."""
        return self.call("kv/txn", keys.transaction((), requests))

    def read(self, key: bytes) -> list[KeyValue]:
        """Read one key: it, or nothing."""
        return keys.pairs(self.call("kv/range", {"key": keys.text(key)}))

    def _answered(self, ask: Callable[[float], T]) -> T:
        """Ask with a deadline, again where no answer comes.

        Raises: Unavailable after `wait_s`.
        """
        deadline = time.monotonic() + self.wait_s
        pauses = self.pauses(deadline)
        reasons: dict[str, None] = {}  # in order, each once
        while True:
            try:
                return ask(deadline)
            except Unanswered as error:
                reasons[str(error)] = None
                if not next(pauses):
                    raise self._unavailable(reasons) from error

    def commit(self, body: JsonObject) -> JsonObject:
        """Send a transaction that compares; the same one again where no answer comes.

        Raises: Unavailable if it was never sent, UnknownOutcome if it was; Refused and the others
        of `call` only where no earlier sending of it may have been carried out.
        """
        deadline = time.monotonic() + self.wait_s
        pauses = self.pauses(deadline)
        sent = ""
        reasons: dict[str, None] = {}
        while True:
            try:
                return self.send("kv/txn", body, deadline=deadline)
            except Unanswered as error:
                sent = str(error) if error.sent else sent
                reasons[str(error)] = None
                if not next(pauses):
                    if sent:
                        raise UnknownOutcome(self.where, why=sent) from error
                    raise self._unavailable(reasons) from error
            except CrewlogError as error:
                if sent:
                    raise UnknownOutcome(self.where, why=sent) from error
                raise

    def _unavailable(self, reasons: Mapping[str, None]) -> Unavailable:
        """Say what each server said last."""
        newest = {reason.partition(": ")[0]: reason for reason in reasons}
        why = "; ".join(newest.values())
        if not self._address.tls and "closed connection without response" in why:
            remedy = "A port that speaks TLS answers so: then write etcds:// where etcd:// stands"
            return Unavailable(self.where, why=why, remedy=remedy)
        return Unavailable(self.where, why=why)

    def pauses(self, deadline: float) -> Iterator[bool]:
        """Pause, ever longer and by chance, and yield True; yield False once the deadline is near.

        Each server is tried once before the first pause.
        """
        for _ in self._address.hosts[1:]:
            yield time.monotonic() < deadline
        pause_s = BACKOFF_MIN_S
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                yield False
            time.sleep(min(max(0.0, left_s), random.uniform(0, pause_s)))  # noqa: S311 (no secret)
            pause_s = min(2 * pause_s, BACKOFF_MAX_S)
            yield True

    def send(self, path: str, body: JsonObject, *, deadline: float) -> JsonObject:
        """Send a request once.

        Raises: Unanswered; else as `call`.
        """
        for again in (False, True):
            token = self._token
            try:
                return self._send(path, body, deadline=deadline)
            except Refused as error:
                expired = error.status == _UNAUTHENTICATED or "auth store is old" in error.why
                if again or not (expired and self._secrets.user):
                    raise self._typed(error) from error
                if self._token == token:  # else another thread has logged in again
                    self._token = ""
        raise AssertionError  # pragma: no cover (the second time returns or raises)

    def _send(self, path: str, body: JsonObject, *, deadline: float) -> JsonObject:
        left_s = max(0.05, deadline - time.monotonic())
        host = self._host()
        answer = self._request(host, f"v3/{path}", body, read_s=min(left_s, ANSWER_WAIT_S))
        fields = self._checked(host, answer.status, answer.data)
        self._require_one(host, keys.cluster(fields))
        return fields

    def _host(self) -> str:
        return self._address.hosts[self._next % len(self._address.hosts)]

    def _leave(self, host: str) -> None:
        """Go on with the next server, unless another thread has done so."""
        if host == self._host():
            self._next += 1

    def _checked(self, host: str, status: int, data: bytes) -> JsonObject:
        """Return the answer of a server, or raise what it says."""
        try:
            return _checked(status, data, self.where, host=host)
        except Unanswered:  # it may be cut off from the others
            self._leave(host)
            raise

    def _require_one(self, host: str, cluster: str) -> None:
        """Refuse servers of two clusters in one address: each would have a registry of its own."""
        before, self._clusters[host] = dict(self._clusters), cluster
        others = [name for name, known in before.items() if known != cluster and name != host]
        if cluster and others:
            self._clusters = {host: cluster}  # a cluster that was restored has another id for all
            raise Unsupported(
                "these servers are of two clusters",
                where=self.where,
                why=f"{host} is not of the cluster of {others[0]}",
                remedy="Give servers of one cluster",
            )

    def _typed(self, error: Refused) -> CrewlogError:
        """Return what a refusal means to a caller of ours."""
        why = error.why
        if _NO_SPACE in why:
            return QuotaExceeded(self.where)
        if error.status in {_DENIED, _UNAUTHENTICATED} or "authentication failed" in why:
            return AuthFailed(self.where, why=why)
        if "authentication is not enabled" in why:
            return AuthFailed(self.where, why=why, remedy="Unset the user, or enable it there")
        if "user name is empty" in why:
            if self._secrets.cert is not None and not self._secrets.user:
                return AuthFailed(
                    self.where,
                    why="its gateway does not take a certificate's name for a user",
                    remedy="Set CREWLOG_ETCD_USER and CREWLOG_ETCD_PASSWORD_FILE as well",
                )
            return AuthFailed(self.where, why="it asks for a user and a password")
        return error

    def _request(
        self, host: str, path: str, body: JsonObject | None, *, read_s: float, stream: bool = False
    ) -> urllib3.BaseHTTPResponse:
        """Send to a server; after a failure it is the next one's turn. No body: a GET."""
        pool = self._pooled()
        headers = {"Content-Type": "application/json"}
        if self._secrets.user and path not in _OPEN:
            headers["Authorization"] = self._logged_in(host, read_s)
        scheme = "https" if self._address.tls else "http"
        try:
            return pool.request(
                "GET" if body is None else "POST",
                f"{scheme}://{host}/{path}",
                body=None if body is None else codec.dump(body),
                headers=headers,
                timeout=urllib3.Timeout(connect=socket.CONNECT_WAIT_S, read=read_s),
                preload_content=not stream,
            )
        except HTTPError as error:
            if isinstance(error, SSLError) and _is_refusal(error):
                raise self._untrusted(host, error) from error
            self._leave(host)
            unsent = isinstance(error, NewConnectionError | ConnectTimeoutError)
            raise Unanswered(f"{host}: {_reason(error)}", sent=not unsent) from error

    def _untrusted(self, host: str, error: SSLError) -> AuthFailed:
        return AuthFailed(
            self.where,
            why=f"{host}: {_reason(error)}",
            remedy="Check CREWLOG_ETCD_CA, CREWLOG_ETCD_CERT and that the port speaks TLS",
        )

    def _pooled(self) -> urllib3.PoolManager:
        if self.closed:
            raise RegistryClosed(self.where)
        held, pid = self._held, os.getpid()
        if held is None or held[0] != pid:
            held = self._held = pid, self._new_pool()
        return held[1]

    def _new_pool(self) -> urllib3.PoolManager:
        context = None
        if self._address.tls:
            try:
                context = ssl.create_default_context(cafile=self._secrets.ca)
                if self._secrets.cert is not None:
                    context.load_cert_chain(self._secrets.cert, self._secrets.key)
            except (OSError, ssl.SSLError) as error:
                why = f"a certificate cannot be used: {error}"
                raise AuthFailed(self.where, why=why) from error
        return urllib3.PoolManager(maxsize=CONNECTIONS_MAX, retries=False, ssl_context=context)

    def _logged_in(self, host: str, read_s: float) -> str:
        if not self._token:
            who: JsonObject = {"name": self._secrets.user, "password": self._secrets.password}
            answer = self._request(host, _LOGIN, who, read_s=read_s)
            fields = self._checked(host, answer.status, answer.data)
            self._token = str(fields.get("token", ""))
        return self._token

    def each(self, path: str, body: JsonObject) -> Iterator[tuple[str, JsonObject | str]]:
        """Ask every server once; yield its host with the answer, or why there is none."""
        deadline = time.monotonic() + self.wait_s
        for number, host in enumerate(self._address.hosts):
            self._next = number
            try:
                yield host, self.send(path, body, deadline=deadline)
            except Unanswered as error:
                yield host, str(error).removeprefix(f"{host}: ")

    # -- streams ----------------------------------------------------------------------------

    def watch(self, key: bytes) -> "Stream":
        """Begin a stream of what happens to a key from now on.

        Raises: Unanswered, Refused.
        """
        body: JsonObject = {"create_request": {"key": keys.text(key)}}
        host = self._host()
        answer = self._request(host, "v3/watch", body, read_s=STREAM_WAIT_S, stream=True)
        if answer.status != _OK:
            self._token = ""
            self._checked(host, answer.status, answer.read())
        return Stream(answer)

    # -- life -------------------------------------------------------------------------------

    def version(self) -> str:
        """Return the version of the server whose turn it is.

        Raises: Unavailable.
        """

        def ask(deadline: float) -> str:
            host, left_s = self._host(), max(0.05, deadline - time.monotonic())
            answer = self._request(host, _VERSION, None, read_s=min(left_s, ANSWER_WAIT_S))
            return str(self._checked(host, answer.status, answer.data).get("etcdserver", ""))

        return self._answered(ask)

    def close(self) -> None:
        """Close every connection; idempotent."""
        self.closed = True
        held, self._held = self._held, None
        if held is not None and held[0] == os.getpid():
            held[1].clear()

    def twin(self) -> "Client":
        """Return a connection of its own to the same cluster."""
        return Client(self._address, wait_s=self.wait_s)


class Stream:
    """What a server tells as it happens, a message at a time."""

    def __init__(self, answer: urllib3.BaseHTTPResponse) -> None:
        """Read from an answer that has begun."""
        self._answer = answer
        self._closing = threading.Event()

    def messages(self) -> Iterator[JsonObject]:
        """Yield each message; ends with the stream, whatever ends it."""
        left = b""
        try:
            for data in self._answer.stream(keys.READ_BYTES):
                *rows, left = (left + data).split(b"\n")
                # some versions end a message with a newline, some begin the next with one
                if left.endswith(b"}") and _is_whole(left):
                    rows, left = [*rows, left], b""
                for row in rows:
                    if row.strip():
                        yield codec.load_object(row)
        except (HTTPError, OSError, ValueError, AttributeError):
            # cut off, or shut by `close` in the middle of a read: who reads goes by the keys
            return

    def close(self) -> None:
        """End it; from any thread."""
        if not self._closing.is_set():
            self._closing.set()
            try:
                self._answer.shutdown()
            except (ValueError, RuntimeError, OSError, AttributeError):
                return  # it has ended


def _is_whole(row: bytes) -> bool:
    try:
        codec.load_object(row)
    except DocumentError:
        return False
    return True


def _checked(status: int, data: bytes, where: str, *, host: str) -> JsonObject:
    """Return the answer, or raise what it says."""
    if status == _NO_GATEWAY:
        raise Unsupported(
            "this is no etcd, or its JSON gateway is off",
            where=where,
            why="it does not know /v3",
            remedy="Start etcd without --enable-grpc-gateway=false, and check host and port",
        )
    if _COMMON_NAME in data and status != _OK:
        raise AuthFailed(
            where,
            why="with users, its gateway takes no client certificate that has a CommonName",
            remedy="Use one without (a subject of /O=…), and CREWLOG_ETCD_USER with a password",
        )
    try:
        fields = codec.load_object(data)
    except DocumentError as error:
        if status in _GATEWAY_ERRORS:
            raise Unanswered(f"{host}: HTTP {status}", sent=True) from error
        raise StorageFailed(
            "the server does not speak as etcd does",
            where=where,
            why=f"HTTP {status}: {error}",
            remedy="Check host and port",
        ) from error
    if status == _OK:
        return fields
    code = fields.get("code")
    message = str(fields.get("message") or fields.get("error") or f"HTTP {status}")
    busy = code == _EXHAUSTED and _NO_SPACE not in message and _TOO_LARGE not in message
    if code in _PASSING or busy:
        raise Unanswered(f"{host}: {message}", sent=True)
    raise Refused(where, status=code if isinstance(code, int) else 0, message=message)


# What TLS says while it does not let anybody in; anything else may befall an answer on its way.
_REFUSALS: Final = ("certificate", "unknown ca", "unknown_ca", "version", "handshake", "protocol")


def _is_refusal(error: SSLError) -> bool:
    """Say whether a failure of TLS was one of letting us in: then nothing was read or written."""
    text = str(error).lower()
    return any(word in text for word in _REFUSALS)


def _reason(error: BaseException) -> str:
    """Say what went wrong without the addresses of objects that urllib3 puts into its messages."""
    inner = error.__cause__ or error.__context__
    if isinstance(error, NewConnectionError) and isinstance(inner, OSError):
        return (inner.strerror or str(inner)).lower()
    if isinstance(error, ConnectTimeoutError):
        return "it cannot be connected to in time"
    return str(inner if isinstance(inner, OSError) else error).rpartition(">: ")[2]
