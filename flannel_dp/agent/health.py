"""Health and metrics over HTTP: /healthz, /readyz and /metrics, made from a StatusBoard.

/healthz is for liveness probes, so it fails only when a restart would help: when the loop is
stuck, or a thread has ended for good. A source that is down makes the agent degraded, which
is still 200. /readyz is 200 once the peers are programmed and firewall rules and subnet.env
are written. (flanneld answers both in the same way, but is ready before its peers are.)

Nothing here wakes up while nobody asks: the server's thread waits in accept(2), and is
ended by shutdown(2) of the listening socket, where socketserver's own loop would look for
its end twice a second. Import this only when a port was asked for: http.server is not cheap.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import urlsplit

from msgspec import to_builtins

from flannel_dp._core import trim_heap
from flannel_dp.agent.logs import one_line
from flannel_dp.agent.status import BUCKETS, Status, StatusBoard
from flannel_dp.agent.supervise import Worker
from flannel_dp.errors import ConfigError, NotYet

if TYPE_CHECKING:
    from flannel_dp.agent.metrics import Exposition
    from flannel_dp.resources.counters.resource import Counting

log = logging.getLogger(__name__)

#: How long a client may be silent, in seconds.
REQUEST_SECONDS = 5.0
#: Of a body, which no request here needs, at most this many bytes are read over.
MOST_BODY = 65536
#: How long ``close`` waits for the threads to end, in seconds.
_LARGE = 1 << 18  # bytes of an answer
CLOSE_SECONDS = 0.2

#: What a restart helps against.
_UNHEALTHY = ("stuck", "ended")

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
NO_CLIENT = "metrics need prometheus-client: pip install flannel-dp[metrics]\n"


class Answer(NamedTuple):
    """Status code, content type and body of a response."""

    code: int
    kind: str
    body: bytes


class HealthServer:
    """Serves the state of ``board`` at ``address``:``port``.

    The constructor binds, so that it can come before privileges are dropped, and starts
    no thread; connections wait until ``start``. ``address`` is an IPv4 or IPv6 address
    ("::" takes IPv4, too) or a name, "" means 0.0.0.0; port 0 takes a free one, see ``port``.
    The agent is stuck when ``status.heartbeat`` is more than ``stuck_after`` seconds ago by
    ``now``, the clock that heartbeats are made with; None: never. Before the first one the
    time counts from here. Of more than ``connections`` at once, the oldest is closed.

    ``counting()`` gives the traffic counters for /metrics, if there are any by now.

    Raises ConfigError, naming address and port, when they cannot be used.
    """

    def __init__(
        self,
        board: StatusBoard,
        address: str,
        port: int,
        *,
        stuck_after: float | None = None,
        now: Callable[[], float] = time.time,
        connections: int = 16,
        counting: Callable[[], Counting | None] = lambda: None,
    ) -> None:
        self._counting = counting
        self._board, self._stuck_after, self._now = board, stuck_after, now
        self._made = now()
        self._exposition: Exposition | None = None
        self._lock = threading.Lock()
        self._server = _bound(address, port, self.answer, connections)
        self._worker: Worker | None = None

    @property
    def port(self) -> int:
        """The port that is bound, also when 0 was asked for."""
        return int(self._server.server_address[1])

    def start(self, prepare: Callable[[], object] = lambda: None) -> HealthServer:
        """Serve on a thread of its own, which calls ``prepare`` first. Raises what that raised."""
        if self._worker is not None:
            return self
        began: Future[None] = Future()

        def serve() -> None:
            try:
                prepare()
            except BaseException as error:
                if not began.done():
                    began.set_exception(error)
                raise
            if not began.done():
                began.set_result(None)
            self._server.serve()

        self._worker = Worker("health", serve, board=self._board, on_failure=self._note_failure)
        self._worker.start()
        if self._worker.alive or began.done():
            began.result()
        return self

    def close(self) -> None:
        """Stop listening, close all connections, and end the threads; within 0.2 s."""
        if self._worker is not None:
            self._worker.stop()
        self._server.stop()
        deadline = time.monotonic() + CLOSE_SECONDS
        if self._worker is not None:
            self._worker.join(max(0.0, deadline - time.monotonic()))
        self._server.join(deadline)
        self._server.server_close()

    def __enter__(self) -> HealthServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- what is answered

    def answer(self, path: str, accept: str, wants_json: bool) -> Answer | None:
        """The response to GET ``path``, None when there is no such path.

        ``accept`` is the request's header, which chooses the form of the metrics.
        """
        status = self._board.status
        if "health" in status.problems:  # told now, and it is over: we answer
            self._board.problem("health", None)
        if path == "/metrics":
            return self._metrics(accept)
        verdict = self._verdict(status)
        if path == "/healthz":
            code = 503 if verdict in _UNHEALTHY else 200
            text = _health_text(verdict, status)
        elif path == "/readyz":
            code = 200 if status.ready else 503
            text = "ready\n" if status.ready else _unready_text(status)
        else:
            return None
        if wants_json:
            document = status_document(status, verdict) | {"heartbeat_age": self._age(status)}
            return Answer(code, JSON, json.dumps(document).encode() + b"\n")
        return Answer(code, TEXT, text.encode())

    def _age(self, status: Status) -> float:
        """Seconds since the last sign of life."""
        return max(0.0, self._now() - max(status.heartbeat, self._made))

    def _note_failure(self, text: str) -> None:
        self._board.problem("health", text)

    def _verdict(self, status: Status) -> str:
        if status.ended:
            return "ended"
        if self._stuck_after is not None and self._age(status) > self._stuck_after:
            return "stuck"
        return "degraded" if status.degraded else "ok"

    def _metrics(self, accept: str) -> Answer:
        from flannel_dp.agent.metrics import Exposition

        with self._lock:
            try:
                self._exposition = self._exposition or Exposition(self._board, self._counting)
            except ImportError:
                return Answer(501, TEXT, NO_CLIENT.encode())
            exposition = self._exposition
        body, kind = exposition.render(accept)
        return Answer(200, kind, body)


def status_document(status: Status, verdict: str) -> dict[str, Any]:
    """A status in plain form, for JSON: ``{"schema": 1, "status": "ok", "ready": ...}``.

    All fields of Status follow, by their names; keys are text ("4" and "6" for the
    families), and ``apply`` has the ``buckets`` that its ``counts`` belong to.
    """
    plain: dict[str, Any] = {"schema": 1, "status": verdict, "ready": status.ready}
    for name, value in to_builtins(status).items():
        if isinstance(value, dict):
            value = {str(key): one for key, one in sorted(value.items())}
        plain[name] = value
    plain["apply"]["buckets"] = BUCKETS
    return plain


def _health_text(verdict: str, status: Status) -> str:
    told = verdict in ("degraded", "ended")
    return _with_problems(verdict, status) if told else f"{verdict}\n"


def _unready_text(status: Status) -> str:
    what = "peers, firewall rules or subnet.env are" if status.peers else "peers are"
    return _with_problems(f"not ready: {what} not programmed yet", status)


def _with_problems(first: str, status: Status) -> str:
    problems = sorted(status.problems.items())
    return "\n".join([first, *(one_line(f"{about}: {text}") for about, text in problems), ""])


# ---- the server ----------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    """A thread per connection, of which there are ``connections`` at most."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(
        self,
        family: int,
        address: tuple[Any, ...],
        answer: Callable[[str, str, bool], Answer | None],
        connections: int,
    ) -> None:
        self.address_family = family
        self.answer = answer
        self._slots = threading.Semaphore(connections)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, None] = {}  # the oldest first
        self._workers: list[threading.Thread] = []
        self._stopping = threading.Event()
        super().__init__(cast("tuple[str, int]", address), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer's, which asks DNS for a name of ours that nobody needs.
        socketserver.TCPServer.server_bind(self)

    def serve(self) -> None:
        """Accept until ``stop``."""
        while not self._stopping.is_set():
            try:
                request, client = self.get_request()
            except ConnectionAbortedError:
                continue
            except OSError as error:
                # EMFILE and ENOBUFS leave the connection waiting: accept would fail at once.
                if not self._stopping.wait(0.1):
                    log.debug("accept error=%s", error)
                continue
            if not self._slots.acquire(blocking=False):
                self._close_oldest()
                self._slots.acquire()
            self._begin(request, client)

    def stop(self) -> None:
        """End ``serve`` and all connections."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for request in self._open:
                _hang_up(request)

    def join(self, deadline: float) -> None:
        """Wait for the threads of connections until ``deadline`` (monotonic)."""
        with self._lock:
            threads = self._workers
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _begin(self, request: socket.socket, client: Any) -> None:
        thread = threading.Thread(
            target=self._attend, args=(request, client), name="flannel-dp-probe", daemon=True
        )
        with self._lock:
            if not self._stopping.is_set():
                self._open[request] = None
                # Those that ended are let go here and not by themselves, so that `join` sees
                # a thread to its very end.
                self._workers = [t for t in self._workers if t.is_alive()]
                with contextlib.suppress(RuntimeError):  # no more threads for this process
                    thread.start()
                    self._workers.append(thread)
                    return
                del self._open[request]
        self.shutdown_request(request)
        self._slots.release()

    def _attend(self, request: socket.socket, client: Any) -> None:
        try:
            self.finish_request(request, client)
        except OSError as error:
            log.debug("client=%s error=%s", client[0], error)
        except Exception:
            log.exception("client=%s", client[0])
        finally:
            with self._lock:
                self._open.pop(request, None)
            self.shutdown_request(request)
            self._slots.release()

    def _close_oldest(self) -> None:
        # Whoever opens connections and says nothing must not keep a probe waiting.
        with self._lock:
            if self._open:
                _hang_up(next(iter(self._open)))


def _hang_up(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = REQUEST_SECONDS
    wbufsize = -1  # head and body in one packet
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = TEXT

    def version_string(self) -> str:
        return "flannel-dp"

    def log_message(self, format: str, *args: object) -> None:
        log.debug("client=%s %s", self.client_address[0], format % args)

    def __getattr__(self, name: str) -> Any:
        # The base class looks for do_METHOD, and would answer 501 where there is none.
        if name.startswith("do_"):
            return self._refuse
        raise AttributeError(name)

    def do_GET(self) -> None:
        found = self._answer()
        size = len(found.body) if found is not None else 0
        if found is not None:
            self._send(found)
        del found
        if size > _LARGE:  # the metrics of thousands of peers, and all that making them took
            trim_heap()

    do_HEAD = do_GET

    def _refuse(self) -> None:
        if self._answer() is not None:
            self.close_connection = True
            allow = {"Allow": "GET, HEAD"}
            self._send(Answer(405, TEXT, b"only GET and HEAD\n"), allow)

    def _answer(self) -> Answer | None:
        """What the path stands for; None when that was refused already."""
        self._skip_body()
        try:
            target = urlsplit(self.path)
        except ValueError:
            self.send_error(400, "bad target")
            return None
        accept = self.headers.get("Accept", "")
        wants_json = "format=json" in target.query.split("&") or _accepts_json(accept)
        answer = cast("_Server", self.server).answer(target.path, accept, wants_json)
        if answer is None:
            self.close_connection = self.close_connection or self.command not in ("GET", "HEAD")
            self._send(Answer(404, TEXT, b"not found: /healthz, /readyz and /metrics are here\n"))
        return answer

    def _skip_body(self) -> None:
        # What is left unread would be taken for the next request, and closing a connection
        # with unread bytes resets it, the response included.
        length = self.headers.get("Content-Length", "0")
        size = int(length) if length.isascii() and length.isdecimal() and len(length) < 9 else -1
        if "Transfer-Encoding" in self.headers or not 0 <= size <= MOST_BODY:
            self.close_connection = True
        else:
            self.rfile.read(size)

    def _send(self, answer: Answer, headers: dict[str, str] | None = None) -> None:
        self.send_response(answer.code)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)


def _accepts_json(accept: str) -> bool:
    return any(kind.partition(";")[0].strip().lower() == JSON for kind in accept.split(","))


# ---- binding -------------------------------------------------------------------


def _bound(
    address: str, port: int, answer: Callable[[str, str, bool], Answer | None], connections: int
) -> _Server:
    host = (address.removeprefix("[").removesuffix("]")) or "0.0.0.0"
    where = f"health server: address {address!r} port {port}"
    if not 0 <= port <= 65535:
        raise ConfigError(
            f"{where}: there is no such port", hint="give --healthz-port a number up to 65535"
        )
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}: {error}",
            hint="give --healthz-ip an address of this node, such as 127.0.0.1, 0.0.0.0 or ::",
        ) from error
    try:
        return _Server(found[0][0], found[0][4], answer, connections)
    except OSError as error:
        kind = NotYet if error.errno == errno.EADDRNOTAVAIL else ConfigError
        raise kind(f"{where}: {error.strerror}", hint=_hint(error, port)) from error


def _hint(error: OSError, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"'ss -ltnp sport = :{port}' shows who has it: stop that, or give another "
            "--healthz-port"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return "ports below 1024 need CAP_NET_BIND_SERVICE: give a higher --healthz-port"
    return "give --healthz-ip an address that 'ip address' shows on this node"
