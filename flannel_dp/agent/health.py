"""Health and metrics over HTTP: /healthz, /readyz and /metrics, made from a StatusBoard.

/healthz is for liveness probes, so it fails only when a restart would help: when the loop is
stuck, or a thread has ended for good. A source that is down makes the agent degraded, which
is still 200. /readyz is 200 once the peers are programmed and firewall rules and subnet.env
are written, or with --ready-when=reachable once half of the peers have answered probes, too.
(flanneld answers both in the same way, but is ready before its peers are.)

Import this only when a port was asked for: http.server takes long to import.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from msgspec import to_builtins

from flannel_dp.agent.http_server import JSON, TEXT, Answer, AnswerTo, HttpServer
from flannel_dp.agent.logs import one_line
from flannel_dp.agent.status import BUCKETS, UNHEALTHY, Status, StatusBoard, verdict_of
from flannel_dp.agent.supervise import Worker
from flannel_dp.errors import SHORTAGES, ConfigError, NotYet
from flannel_dp.sources.names import resolve_within

if TYPE_CHECKING:
    from flannel_dp.agent.metrics import Exposition
    from flannel_dp.probe.prober import Prober
    from flannel_dp.resources.counters.traffic import TrafficReader

#: How long ``close`` waits for the threads to end, in seconds.
CLOSE_SECONDS = 0.2

#: How long the name in --healthz-ip may take to be looked up, in seconds.
LOOKUP_SECONDS = 5.0

#: Errors of bind(2) that waiting may repair.
_PASSING = SHORTAGES | {errno.EADDRNOTAVAIL}

NO_CLIENT = "metrics need prometheus-client: pip install flannel-dp[metrics]\n"
NOT_FOUND = "not found: /healthz, /readyz and /metrics are here\n"


class HealthServer:
    """Serves the state of ``board`` at ``address``:``port``.

    The constructor binds, so that it can come before privileges are dropped, and starts
    no thread; connections wait until ``start``. ``address`` is an IPv4 or IPv6 address
    ("::" takes IPv4, too) or a name, "" means 0.0.0.0; port 0 takes a free one, see ``port``.
    The agent is stuck when ``status.heartbeat`` is more than ``stuck_after`` seconds ago by
    ``now``, the clock that heartbeats are made with; None: never. Before the first one the
    time counts from here. Of more than ``connections`` at once, the oldest is closed.

    ``counting()`` gives the traffic counters for /metrics, and ``probing()`` what probes the peers,
    if there are any by now.

    Raises ConfigError, naming address and port, when they cannot be used.
    """

    def __init__(
        self,
        board: StatusBoard,
        address: str,
        port: int,
        *,
        stuck_after: float | None = None,
        now: Callable[[], float] = time.monotonic,
        connections: int = 16,
        counting: Callable[[], TrafficReader | None] = lambda: None,
        probing: Callable[[], Prober | None] = lambda: None,
    ) -> None:
        self._counting, self._probing = counting, probing
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
        """Return the response to GET ``path``, None when there is no such path.

        ``accept`` is the request's header, which chooses the form of the metrics.
        """
        status = self._board.status
        if "health" in status.problems:  # its end: this request is answered
            self._board.problem("health", None)
        if path == "/metrics":
            return self._metrics(accept)
        verdict = self._verdict(status)
        if path == "/healthz":
            code = 503 if verdict in UNHEALTHY else 200
            text = _health_text(verdict, status)
        elif path == "/readyz":
            code = 200 if status.serves else 503
            text = "ready\n" if status.serves else _unready_text(status)
        else:
            return None
        if wants_json:
            document = status_document(status, verdict) | {"heartbeat_age": self._age(status)}
            return Answer(code, JSON, json.dumps(document).encode() + b"\n")
        return Answer(code, TEXT, text.encode())

    def _age(self, status: Status) -> float:
        """Return seconds since the last sign of life."""
        return max(0.0, self._now() - max(status.heartbeat, self._made))

    def _note_failure(self, text: str) -> None:
        self._board.problem("health", text)

    def _verdict(self, status: Status) -> str:
        return verdict_of(status, self._age(status), self._stuck_after)

    def _metrics(self, accept: str) -> Answer:
        from flannel_dp.agent.metrics import Exposition

        with self._lock:
            try:
                self._exposition = self._exposition or Exposition(
                    self._board, self._counting, self._probing
                )
            except ImportError:
                return Answer(501, TEXT, NO_CLIENT.encode())
            exposition = self._exposition
        body, kind = exposition.render(accept)
        return Answer(200, kind, body)


def status_document(status: Status, verdict: str) -> dict[str, Any]:
    """Return a status in plain form, for JSON: ``{"schema": 1, "status": "ok", "ready": ...}``.

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
    """Return the verdict, and problems. The body is "ok" alone where nothing is wrong: rejected
    leases and warnings are in the JSON."""
    told = verdict in ("degraded", "ended")
    return _with_problems(verdict, status) if told else f"{verdict}\n"


def _unready_text(status: Status) -> str:
    if status.ready:
        return _with_problems(f"not ready: {status.awaiting}", status)
    what = "peers, firewall rules or subnet.env are" if status.peers else "peers are"
    return _with_problems(f"not ready: {what} not programmed yet", status)


def _with_problems(first: str, status: Status) -> str:
    problems = sorted(status.problems.items())
    return "\n".join([first, *(one_line(f"{about}: {text}") for about, text in problems), ""])


# ---- binding -------------------------------------------------------------------


def _bound(address: str, port: int, answer: AnswerTo, connections: int) -> HttpServer:
    host = (address.removeprefix("[").removesuffix("]")) or "0.0.0.0"
    where = f"health server: address {address!r} port {port}"
    if not 0 <= port <= 65535:
        raise ConfigError(
            f"{where}: there is no such port", hint="give --healthz-port a number up to 65535"
        )
    try:
        found = resolve_within(host, port, LOOKUP_SECONDS)
    except (TimeoutError, RuntimeError) as error:
        raise NotYet(
            f"{where}: {error}", hint="give --healthz-ip an address, or repair the name server"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}: {error}",
            hint="give --healthz-ip an address of this node, such as 127.0.0.1, 0.0.0.0 or ::",
        ) from error
    try:
        return HttpServer(*found[0], answer, connections, NOT_FOUND)
    except OSError as error:
        kind = NotYet if error.errno in _PASSING else ConfigError
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
