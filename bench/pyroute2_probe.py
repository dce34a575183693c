"""pyroute2 doing a job by itself, in a process of its own: the time goes to standard output.

    python -m bench.pyroute2_probe objects|batch|dump FAMILY FILE DEVICE

FILE is what the flannel-style program reads. ``objects`` makes one call for each entry,
``batch`` compiles them with IPBatch and sends 96 at a time, ``dump`` reads what there is.
Neither importing pyroute2 nor reading the file is part of the time.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PERMANENT = 0x80
_NTF_SELF = 0x02
_ONLINK = 0x04
_BOOT = 3
_MAIN = 254
_NLMSG_ERROR = 2
#: Three for each of 32 peers. Each has its ack; the default receive buffer holds 256.
_PEERS_IN_BATCH = 32

Call = tuple[str, dict[str, Any]]


def _calls(peers: list[list[str]], family: int, index: int) -> Iterator[Call]:
    for subnet, gateway, mac, endpoint in peers:
        common = {"ifindex": index, "lladdr": mac, "state": _PERMANENT}
        yield "neigh", {**common, "dst": gateway, "family": family}
        yield "fdb", {**common, "dst": endpoint, "flags": _NTF_SELF}
        yield (
            "route",
            {
                "dst": subnet,
                "gateway": gateway,
                "oif": index,
                "flags": _ONLINK,
                "proto": _BOOT,
                "family": family,
            },
        )


def _objects(calls: list[Call]) -> int:
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        for method, arguments in calls:
            getattr(ipr, method)("replace", **arguments)
    return len(calls)


def _batch(calls: list[Call]) -> int:
    from pyroute2 import IPBatch

    size = 3 * _PEERS_IN_BATCH
    with (
        IPBatch() as batch,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as channel,
    ):
        channel.bind((0, 0))
        for start in range(0, len(calls), size):
            some = calls[start : start + size]
            for method, arguments in some:
                getattr(batch, method)("replace", **arguments)
            channel.send(batch.batch)
            batch.reset()
            _acks(channel, len(some))
    return len(calls)


def _acks(channel: socket.socket, count: int) -> None:
    while count:
        data = channel.recv(1 << 16)
        at = 0
        while at + 20 <= len(data):
            length, kind, _, _, _, error = struct.unpack_from("=IHHIIi", data, at)
            if kind != _NLMSG_ERROR or error:
                raise OSError(-error, f"message of type {kind}, {count} answers before the end")
            count -= 1
            at += (length + 3) & ~3


def _dump(family: int, index: int) -> int:
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        routes = [
            one
            for one in ipr.get_routes(family=family, oif=index, table=_MAIN)
            if one.get_attr("RTA_GATEWAY")
        ]
        neighbours = list(ipr.get_neighbours(family=family, ifindex=index))
        fdb = list(ipr.fdb("dump", ifindex=index))
    return min(len(routes), len(neighbours), len(fdb))


def main(arguments: list[str]) -> int:
    """Do one job; prints {"seconds", "done"}: calls made, or entries in the smallest dump."""
    what, family_text, path, device = arguments
    import pyroute2  # noqa: F401  # the import is no part of what is measured

    family = socket.AF_INET if family_text == "4" else socket.AF_INET6
    index = socket.if_nametoindex(device)
    peers = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    calls = list(_calls(peers, family, index)) if what != "dump" else []
    started = time.perf_counter()
    if what == "dump":
        done = _dump(family, index)
    else:
        done = {"objects": _objects, "batch": _batch}[what](calls)
    print(json.dumps({"seconds": time.perf_counter() - started, "done": done}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
