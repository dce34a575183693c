"""An API server on loopback that sends heartbeats of nodes: lines made beforehand, over TLS.

A process of its own, so that the reader's processor time is the reader's. It has the list of its
nodes, whole, and a watch that sends events one by one, each after a pause and in a chunk of its
own, as the API server flushes each event.

    python -m bench.kube_server CERTIFICATE KEY NODES EVENTS PAUSE
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import threading
import time
from functools import cache
from typing import Any

#: Marks the end of the heartbeats: the address that a node has from then on.
LAST = "198.51.100.1"

_KEY = "flannel.alpha.coreos.com/"

#: The resource version of the list.
_FIRST = 1000

_KINDS = ("MemoryPressure", "DiskPressure", "PIDPressure", "NetworkUnavailable", "Ready")


def node(name: str, number: int, beat: int) -> dict[str, Any]:
    """A node as a kubelet of a cloud reports it: 20 kB, of which 2.5 kB are metadata."""
    then = f"2026-01-01T{beat // 3600:02}:{beat // 60 % 60:02}:00Z"
    mac = f"02:00:00:00:{number // 256:02x}:{number % 256:02x}"
    fields = {f"f:field-{one}": {} for one in range(20)}
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {
            "name": name,
            "uid": f"00000000-0000-4000-8000-{number:012}",
            "resourceVersion": str(_FIRST + beat),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {f"topology.example/{label}": "value" for label in range(12)},
            "annotations": {
                f"{_KEY}kube-subnet-manager": "true",
                f"{_KEY}backend-type": "vxlan",
                f"{_KEY}backend-data": f'{{"VNI":1,"VtepMAC":"{mac}"}}',
                f"{_KEY}public-ip": f"192.0.2.{number % 250 + 1}",
                "node.alpha.kubernetes.io/ttl": "0",
                "csi.volume.example/nodeid": json.dumps({"driver.example": "i-0123456789"}),
            },
            "managedFields": [
                {
                    "manager": f"manager-{one}",
                    "operation": "Update",
                    "apiVersion": "v1",
                    "time": then,
                    "fieldsType": "FieldsV1",
                    "fieldsV1": {"f:metadata": fields},
                }
                for one in range(3)
            ],
        },
        "spec": {
            "podCIDR": f"10.{number // 256}.{number % 256}.0/24",
            "podCIDRs": [f"10.{number // 256}.{number % 256}.0/24"],
        },
        "status": {
            "conditions": [
                {
                    "type": kind,
                    "status": "False",
                    "lastHeartbeatTime": then,
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                    "reason": f"Kubelet{kind}",
                    "message": f"kubelet has {kind}",
                }
                for kind in _KINDS
            ],
            "images": [
                {
                    "names": [
                        f"registry.example/team/image-{one}@sha256:{one:064x}",
                        f"registry.example/team/image-{one}:v1.2.3",
                    ],
                    "sizeBytes": 123456789,
                }
                for one in range(100)
            ],
        },
    }


def event(kind: str, said: dict[str, Any], *, whole: bool) -> bytes:
    """A line of a watch."""
    if not whole:
        said = {
            "kind": "PartialObjectMetadata",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": said["metadata"],
        }
    return json.dumps({"type": kind, "object": said}, separators=(",", ":")).encode() + b"\n"


@cache
def lines(nodes: int, events: int, *, whole: bool) -> list[bytes]:
    """Heartbeats of all nodes in turn, and at last a node with the address ``LAST``."""
    each = [event("MODIFIED", node(f"node-{n:05}", n, 0), whole=whole) for n in range(nodes)]
    now = b'"resourceVersion":"%d"'
    beats = [each[n % nodes].replace(now % _FIRST, now % (_FIRST + 1 + n)) for n in range(events)]
    moved = node("node-00000", 0, events + 1)
    moved["metadata"]["annotations"][f"{_KEY}public-ip"] = LAST
    return [*beats, event("MODIFIED", moved, whole=whole)]


def _serve(connection: ssl.SSLSocket, nodes: int, events: int, pause: float) -> None:
    file = connection.makefile("rb")
    while request := file.readline():
        head = {}
        while (line := file.readline().strip()) != b"":
            name, _, value = line.partition(b":")
            head[name.lower()] = value
        path = request.split()[1].decode()
        if "watch=true" not in path:
            connection.sendall(_list(nodes))
            continue
        whole = b"PartialObjectMetadata" not in head.get(b"accept", b"")
        said = lines(nodes, events, whole=whole)
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for line in said:
            time.sleep(pause)
            connection.sendall(b"%x\r\n%s\r\n" % (len(line), line))
        time.sleep(3600)


def _list(nodes: int) -> bytes:
    items = [node(f"node-{n:05}", n, 0) for n in range(nodes)]
    version = {"resourceVersion": str(_FIRST)}
    said = {"kind": "NodeList", "apiVersion": "v1", "metadata": version, "items": items}
    body = json.dumps(said, separators=(",", ":")).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        len(body),
        body,
    )


def main(arguments: list[str]) -> int:
    """Serve until the parent closes standard input; the first line printed is the port."""
    certificate, key, nodes, events, pause = arguments
    for whole in (False, True):
        lines(int(nodes), int(events), whole=whole)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            plain, _ = listener.accept()
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def serve(plain: socket.socket = plain) -> None:
                try:
                    connection = context.wrap_socket(plain, server_side=True)
                    _serve(connection, int(nodes), int(events), float(pause))
                except OSError:  # the reader has gone
                    plain.close()

            threading.Thread(target=serve, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
