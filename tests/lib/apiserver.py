"""A small Kubernetes API server: nodes and pods over TLS, with the parts of the published
API that a client of nodes meets, and faults on demand.

It keeps to https://kubernetes.io/docs/reference/using-api/api-concepts/: lists with limit
and continue at one resource version, watches as chunked streams from a resource version,
bookmarks, 410 for history that is gone, Status objects, and strategic merge patches of
annotations and conditions on nodes/NAME/status.
"""

from __future__ import annotations

import base64
import copy
import json
import socket
import ssl
import subprocess
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.lib.waiting import LIMIT

JSON = dict[str, Any]
MERGE = "application/strategic-merge-patch+json"


class Certificates:
    """A certificate authority in ``directory``, made by openssl(1)."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.ca = directory / f"{name}.crt"
        self._key = directory / f"{name}.key"
        _openssl("req", "-x509", *_new_key(self._key), "-subj", f"/CN={name}", "-days", "2",
                 "-out", self.ca)  # fmt: skip

    def issue(self, name: str, *addresses: str, days: int = 2) -> tuple[Path, Path]:
        """A certificate and its key, for servers at ``addresses`` or for the client ``name``."""
        certificate, key, request, extensions = (
            self.directory / f"{name}.{kind}" for kind in ("crt", "key", "csr", "ext")
        )
        names = ",".join(f"IP:{address}" for address in addresses) or f"DNS:{name}"
        extensions.write_text(f"subjectAltName={names}\n")
        _openssl("req", *_new_key(key), "-subj", f"/CN={name}", "-out", request)
        signer = ("-CA", self.ca, "-CAkey", self._key, "-CAcreateserial", "-days", days)
        output = ("-extfile", extensions, "-out", certificate)
        _openssl("x509", "-req", "-in", request, *signer, *output)
        return certificate, key


def _new_key(key: Path) -> tuple[object, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key)


def _openssl(*args: object) -> None:
    done = subprocess.run(["openssl", *map(str, args)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def status(code: int, reason: str, message: str = "", **details: object) -> JSON:
    """A Status object, as the API sends it with an error and in an ERROR event."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message or reason,
        "reason": reason,
        **({"details": details} if details else {}),
        "code": code,
    }


EXPIRED = status(410, "Expired", "The provided continue parameter is too old")
GONE = status(410, "Expired", "too old resource version: 1 (99)")


def raw_answer(code: int, text: str, **headers: object) -> bytes:
    """An answer of plain text, as the API server gives it when it sheds load (429)."""
    said = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": len(text), **headers}
    lines = [f"HTTP/1.1 {code} Refused"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in said.items()]
    return "\r\n".join([*lines, "", text]).encode()


#: What a server that has too much to do answers, of kube-apiserver's max-inflight filter.
OVERLOADED = raw_answer(429, "Too many requests, please try again later.\n", Retry_After=1)


@dataclass
class Seen:
    """One request that the server has got."""

    method: str
    path: str
    query: dict[str, str]
    authorization: str
    content_type: str
    body: bytes
    at: float
    headers: Any = None

    @property
    def verb(self) -> str:
        """As RBAC calls it: list, watch, get or patch; and "ask" for the version alone."""
        if self.query.get("limit") == "1" and "continue" not in self.query:
            return "ask"
        if self.method == "PATCH":
            return "patch"
        if self.path != "/api/v1/nodes":
            return "get"
        return "watch" if self.query.get("watch") == "true" else "list"

    @property
    def patched(self) -> Any:
        return json.loads(self.body)


@dataclass
class _Watcher:
    events: deque[JSON | str] = field(default_factory=deque)


class ApiServer:
    """Serves until ``close``; ``nodes`` is what it has, changed through its methods only.

    ``fail(verb, answer)`` gives the next request of that verb another end: a Status,
    raw bytes instead of HTTP, or a callable that is handed the handler.
    """

    def __init__(
        self,
        certificate: tuple[Path, Path],
        *,
        client_ca: Path | None = None,
        tokens: set[str] | None = None,
        address: tuple[str, int] = ("127.0.0.1", 0),
        prefix: str = "",
    ) -> None:
        self.nodes: dict[str, JSON] = {}
        self.pods: dict[tuple[str, str], JSON] = {}
        self.tokens = tokens
        self.prefix = prefix
        #: Whether it gives metadata alone where that is asked for; else whole objects, as servers
        #: before 1.15 do, and 406 where these are not accepted.
        self.metadata_only = True
        #: Whether each answer is 406 unless the client takes plain objects alone.
        self.picky = False
        self.version = 100
        self.oldest = 0
        self.requests: list[Seen] = []
        self.faults: dict[str, deque[Any]] = defaultdict(deque)
        self.changed = threading.Condition()
        self._created = 0
        self._history: list[tuple[int, JSON]] = []
        self._watchers: list[_Watcher] = []
        self._connections: set[socket.socket] = set()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        self._server = _Server(address, _handler(self, context))
        self.port = self._server.server_address[1]
        self.url = f"https://{address[0]}:{self.port}{prefix}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.cut()

    # ---- the cluster

    def put(self, node: JSON) -> None:
        """Create or change a node, and send it to the watches. As the API server has it, pod CIDRs
        are given once, and a node that was deleted and is created again has another uid."""
        before = self.nodes.get(node["metadata"]["name"])
        assert before is None or _cidrs(before) in ([], _cidrs(node)), "delete the node before"
        self._change(lambda: self._put(node))

    def make_again(self, node: JSON) -> None:
        """Delete a node, and create it with what it cannot be given otherwise."""
        self.delete(node["metadata"]["name"])
        self.put(node)

    def delete(self, name: str, *, silently: bool = False) -> None:
        """Delete a node; ``silently`` leaves no history of it."""
        self._change(lambda: self._delete(name), silently)

    def replace_all(self, *nodes: JSON) -> None:
        """Replace the nodes without an event for any watch."""
        with self.changed:
            self.version += 1
            self.nodes = {n["metadata"]["name"]: self._stamped(n) for n in nodes}

    def restore(self, version: int, *nodes: JSON, cut: bool = True) -> None:
        """Go back to an earlier version with these nodes, as after a restored backup; watches
        are told nothing, and with ``cut`` are broken as by a restart."""
        with self.changed:
            self.version, self.oldest = version, 0
            self._history.clear()
            self.nodes = {n["metadata"]["name"]: self._stamped(n) for n in nodes}
        if cut:
            self.cut()

    def compact(self) -> None:
        """Forget all history: a watch from before now is answered with 410."""
        with self.changed:
            self.version += 1
            self.oldest = self.version
            self._history.clear()

    def bookmark(self) -> int:
        """Send a bookmark to the watchers that asked for them; returns its version."""
        with self.changed:
            self.version += 1
            version = self.version
        self.send({"type": "BOOKMARK", "object": _bookmark(version)}, bookmark=True)
        return version

    def send(self, event: JSON | str, *, bookmark: bool = False) -> None:
        """Send anything to all watchers; "end" ends their streams in good order."""
        with self.changed:
            for watcher in self._watchers:
                watcher.events.append(event)
            self.changed.notify_all()

    def cut(self) -> None:
        """Break all connections, in the middle of whatever they are doing."""
        with self.changed:
            for connection in self._connections:
                try:
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
                except OSError:
                    continue

    def fail(self, verb: str, *answers: Any) -> None:
        self.faults[verb].extend(answers)

    @property
    def watching(self) -> int:
        return len(self._watchers)

    def count(self, verb: str) -> int:
        return sum(seen.verb == verb for seen in list(self.requests))

    def last(self, verb: str) -> Seen:
        return [seen for seen in list(self.requests) if seen.verb == verb][-1]

    def _change(self, change: Callable[[], JSON], silently: bool = False) -> None:
        with self.changed:
            self.version += 1
            event = change()
            if not silently:
                self._history.append((self.version, event))
                for watcher in self._watchers:
                    watcher.events.append(event)
                self.changed.notify_all()

    def _stamped(self, node: JSON) -> JSON:
        node, before = copy.deepcopy(node), self.nodes.get(node["metadata"]["name"])
        if before is None or _cidrs(before) not in ([], _cidrs(node)):
            self._created += 1
            uid = f"00000000-0000-4000-8000-{self._created:012}"
        else:
            uid = before["metadata"]["uid"]
        node["metadata"] |= {"resourceVersion": str(self.version), "uid": uid}
        return node

    def _put(self, node: JSON) -> JSON:
        name = node["metadata"]["name"]
        kind = "MODIFIED" if name in self.nodes else "ADDED"
        self.nodes[name] = self._stamped(node)
        return {"type": kind, "object": self.nodes[name]}

    def _delete(self, name: str) -> JSON:
        gone = self._stamped(self.nodes[name])
        del self.nodes[name]
        return {"type": "DELETED", "object": gone}

    # ---- requests

    def list(self, query: dict[str, str]) -> tuple[int, JSON]:
        limit = int(query.get("limit", 0))
        with self.changed:
            after, version = "", self.version
            if token := query.get("continue"):
                told = json.loads(base64.b64decode(token))
                after, version = told["start"], told["rv"]
                if version < self.oldest:
                    return 410, EXPIRED
            names = sorted(name for name in self.nodes if name > after)
            page = names[:limit] if limit else names
            meta: JSON = {"resourceVersion": str(version)}
            if len(page) < len(names):
                token = base64.b64encode(json.dumps({"start": page[-1], "rv": version}).encode())
                meta["continue"] = token.decode()
                meta["remainingItemCount"] = len(names) - len(page)
            items = [
                {k: v for k, v in self.nodes[name].items() if k not in ("kind", "apiVersion")}
                for name in page
            ]
        return 200, {"kind": "NodeList", "apiVersion": "v1", "metadata": meta, "items": items}

    def patch(self, name: str, patch: JSON) -> tuple[int, JSON]:
        with self.changed:
            if name not in self.nodes:
                return 404, status(404, "NotFound", f'nodes "{name}" not found')
            node = copy.deepcopy(self.nodes[name])
        notes = patch.get("metadata", {}).get("annotations", {})
        node["metadata"].setdefault("annotations", {}).update(notes)
        conditions = {c["type"]: c for c in node["status"].get("conditions", [])}
        for condition in patch.get("status", {}).get("conditions", []):
            conditions[condition["type"]] = conditions.get(condition["type"], {}) | condition
        node["status"]["conditions"] = list(conditions.values())
        self.put(node)
        return 200, self.nodes[name]

    def watch(self, version: int, write: Callable[[JSON], None], seconds: float) -> None:
        """Write events until the timeout ends or the server is stopped."""
        deadline = time.monotonic() + seconds
        with self.changed:
            watcher = _Watcher(deque(event for at, event in self._history if at > version))
            self._watchers.append(watcher)
        try:
            while True:
                with self.changed:
                    ready = self.changed.wait_for(
                        lambda: bool(watcher.events), max(0.0, deadline - time.monotonic())
                    )
                    event = watcher.events.popleft() if ready else "end"
                if event == "end":
                    return
                if event == "cut":
                    raise BrokenPipeError
                assert not isinstance(event, str)
                write(event)
        finally:
            with self.changed:
                self._watchers.remove(watcher)


def _cidrs(node: JSON) -> list[str]:
    spec = node.get("spec", {})
    return [*(spec.get("podCIDRs") or filter(None, [spec.get("podCIDR")]))]


def _bookmark(version: int) -> JSON:
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {"resourceVersion": str(version), "creationTimestamp": None},
        "spec": {},
        "status": {"daemonEndpoints": {"kubeletEndpoint": {"Port": 0}}, "nodeInfo": {}},
    }


def metadata_of(node: JSON) -> JSON:
    """The node as PartialObjectMetadata."""
    return {
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": node["metadata"],
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


def _handler(server: ApiServer, context: ssl.SSLContext) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            self.request.settimeout(LIMIT)
            self.request = context.wrap_socket(
                self.request, server_side=True, do_handshake_on_connect=False
            )
            with server.changed:
                server._connections.add(self.request)
            try:
                self.request.do_handshake()
            except BaseException:
                with server.changed:
                    server._connections.discard(self.request)
                self.request.close()
                raise
            super().setup()

        def finish(self) -> None:
            with server.changed:
                server._connections.discard(self.request)
            try:
                super().finish()
            finally:
                self.request.close()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing to standard error."""

        def do_GET(self) -> None:
            self._serve()

        def do_PATCH(self) -> None:
            self._serve()

        def _serve(self) -> None:
            url = urlsplit(self.path)
            path = url.path.removeprefix(server.prefix)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kind = self.headers.get("Content-Type", "")
            bearer = self.headers.get("Authorization", "")
            seen = Seen(
                self.command, path, query, bearer, kind, body, time.monotonic(), self.headers
            )
            server.requests.append(seen)
            if server.tokens is not None and bearer.removeprefix("Bearer ") not in server.tokens:
                return self.answer(401, status(401, "Unauthorized"))
            faults = server.faults[seen.verb]
            if faults and (fault := faults.popleft()) is not None:
                return self._fault(fault)
            form = self._form("PartialObjectMetadata")
            if not form:
                return self.answer(406, status(406, "NotAcceptable", "only plain objects"))
            if seen.verb == "watch":
                return self._watch(query, form)
            return self.answer(*self._result(seen))

        def _result(self, seen: Seen) -> tuple[int, JSON]:
            match seen.path.strip("/").split("/"):
                case ["api", "v1", "nodes"]:
                    return server.list(seen.query)
                case ["api", "v1", "nodes", name, "status"] if seen.method == "PATCH":
                    if seen.content_type != MERGE:
                        return 415, status(415, "UnsupportedMediaType")
                    return server.patch(name, seen.patched)
                case ["api", "v1", "nodes", name] if name in server.nodes:
                    return 200, server.nodes[name]
                case ["api", "v1", "namespaces", space, "pods", name] if (
                    space, name
                ) in server.pods:  # fmt: skip
                    return 200, server.pods[space, name]
            return 404, status(404, "NotFound", f"{seen.path} not found")

        def _form(self, partial: str) -> str:
            """The first form of objects that the client takes and the server has; "" for none."""
            accepted = [one.strip() for one in self.headers.get("Accept", "*/*").split(",")]
            if server.picky and any(";as=" in one for one in accepted):
                return ""
            for one in accepted:
                kind, *params = one.split(";")
                if f"as={partial}" in params and server.metadata_only:
                    return partial
                if kind in ("application/json", "*/*") and not any("as=" in p for p in params):
                    return "Node"
            return ""

        def _watch(self, query: dict[str, str], form: str) -> None:
            version = int(query["resourceVersion"])
            self.start_stream()

            def write(event: JSON) -> None:
                # A Status has one form.
                if form != "Node" and event.get("object", {}).get("kind") == "Node":
                    event = {**event, "object": metadata_of(event["object"])}
                self.chunk(event)

            if version < server.oldest:
                self.chunk({"type": "ERROR", "object": GONE})
            else:
                server.watch(version, write, float(query.get("timeoutSeconds", 1800)))
            self.end_stream()

        def start_stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()

        def chunk(self, event: JSON | bytes) -> None:
            data = event if isinstance(event, bytes) else json.dumps(event).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        def end_stream(self) -> None:
            self.wfile.write(b"0\r\n\r\n")

        def answer(self, code: int, document: JSON | bytes, **headers: str) -> None:
            data = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def _fault(self, fault: Any) -> None:
            if isinstance(fault, dict):
                self.answer(fault["code"], fault)
            elif isinstance(fault, bytes):
                self.wfile.write(fault)
                self.close_connection = True
            else:
                fault(self)
                self.close_connection = True

    return Handler
