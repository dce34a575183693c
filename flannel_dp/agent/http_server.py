"""A small HTTP server for a few pages, which costs nothing while no client asks.

Its thread waits in accept(2) and is ended by shutdown(2) of the listening socket, where
socketserver's own loop would check for its end twice a second. A client that is silent, sends a
body or opens many connections cannot keep another one waiting. Import this only when a port was
asked for: http.server takes long to import.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from flannel_dp._core import trim_heap
from flannel_dp.threads import Thread

log = logging.getLogger(__name__)

#: How long a client may be silent, in seconds.
REQUEST_SECONDS = 5.0
#: Of a body, which no request here needs, at most this many bytes are read and dropped.
MOST_BODY = 65536
#: After an answer of more bytes than this, freed memory goes back to the system.
_LARGE = 1 << 18

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"


class Answer(NamedTuple):
    """Status code, content type and body of a response."""

    code: int
    kind: str
    body: bytes


AnswerTo = Callable[[str, str, bool], Answer | None]


class HttpServer(ThreadingHTTPServer):
    """Serves ``answer(path, accept, wants_json)`` to GET and HEAD, a thread per connection.

    ``accept`` is the request's header, and ``wants_json`` whether it or the query asks for JSON.
    None is answered with 404 and the text ``not_found``. Of more than ``connections`` connections
    at once, the oldest is closed. The constructor binds and listens; it raises OSError.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(
        self,
        family: int,
        address: tuple[Any, ...],
        answer: AnswerTo,
        connections: int,
        not_found: str,
    ) -> None:
        self.address_family = family
        self.answer, self.not_found = answer, not_found
        self._slots = threading.Semaphore(connections)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, None] = {}  # the oldest first
        self._workers: list[threading.Thread] = []
        self._stopping = threading.Event()
        super().__init__(cast("tuple[str, int]", address), _ProbeHandler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer's, which asks DNS for a name that is not needed.
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
                    log.debug("Cannot accept a connection: %(error)s", {"error": error})
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
        thread = Thread(
            target=self._attend, args=(request, client), name="flannel-dp-probe", daemon=True
        )
        with self._lock:
            if not self._stopping.is_set():
                self._open[request] = None
                # Those that ended are let go here and not by themselves, so that `join` sees
                # a thread to its very end.
                self._workers = [t for t in self._workers if t.is_alive()]
                with contextlib.suppress(
                    RuntimeError, MemoryError
                ):  # no more threads for this process
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
            log.debug("Client %(client)s: %(error)s", {"client": client[0], "error": error})
        except Exception:
            log.exception("Cannot answer client %(client)s", {"client": client[0]})
        finally:
            with self._lock:
                self._open.pop(request, None)
            self.shutdown_request(request)
            self._slots.release()

    def _close_oldest(self) -> None:
        # A client that opens connections and sends nothing must not keep a probe waiting.
        with self._lock:
            if self._open:
                _hang_up(next(iter(self._open)))


def _hang_up(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _ProbeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = REQUEST_SECONDS
    wbufsize = -1  # head and body in one packet
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = TEXT

    def version_string(self) -> str:
        return "flannel-dp"

    def log_message(self, format: str, *args: object) -> None:
        log.debug("%(client)s: %(said)s", {"client": self.client_address[0], "said": format % args})

    def __getattr__(self, name: str) -> Any:
        # The base class looks for do_METHOD, and would answer 501 where there is none.
        if name.startswith("do_"):
            return self._reject_method
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

    def _reject_method(self) -> None:
        if self._answer() is not None:
            self.close_connection = True
            allow = {"Allow": "GET, HEAD"}
            self._send(Answer(405, TEXT, b"only GET and HEAD\n"), allow)

    def _answer(self) -> Answer | None:
        """Return what the path stands for; None when that was rejected already."""
        self._skip_body()
        try:
            target = urlsplit(self.path)
        except ValueError:
            self.send_error(400, "bad target")
            return None
        accept = self.headers.get("Accept", "")
        wants_json = "format=json" in target.query.split("&") or _accepts_json(accept)
        server = cast("HttpServer", self.server)
        answer = server.answer(target.path, accept, wants_json)
        if answer is None:
            self.close_connection = self.close_connection or self.command not in ("GET", "HEAD")
            self._send(Answer(404, TEXT, server.not_found.encode()))
        return answer

    def _skip_body(self) -> None:
        # A body that is left unread would be read as the next request, and closing a connection
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
