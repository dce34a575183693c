"""A real etcd on loopback for the benchmarks, filled and changed fast."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flannel_dp.cluster.lease import Lease, lease_attrs_json
from flannel_dp.errors import Unavailable
from flannel_dp.sources.etcd import messages as pb
from flannel_dp.sources.etcd.client import EtcdClient
from flannel_dp.sources.etcd.options import EtcdOptions
from flannel_dp.sources.etcd.source import open_client

#: Puts in one transaction: what fits one frame of HTTP/2.
_TOGETHER = 50

_START_SECONDS = 20.0


class Store:
    """An etcd server of this namespace, and a client of it."""

    def __init__(self, options: EtcdOptions) -> None:
        self.options = options
        self.client: EtcdClient = open_client(options, timeout=30.0)

    def configure(self, config: str) -> None:
        """Put the network's configuration."""
        self._put([(self.options.key("config"), config.encode())])

    def publish(self, leases: Iterable[Lease], together: int = _TOGETHER) -> None:
        """Put leases as flannel does, so many at once; one that is there is renewed."""
        self._put(((self.key(lease), lease_attrs_json(lease)) for lease in leases), together)

    def key(self, lease: Lease) -> bytes:
        """Where a lease is."""
        return self.options.key("subnets", lease.key)

    def delete(self, lease: Lease) -> None:
        """Delete one lease."""
        request = pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=self.key(lease)))
        self._txn([request])

    def list_raw(self) -> int:
        """One range request over all leases, answered and not looked at; how many."""
        prefix = self.options.key("subnets", "")
        return sum(len(kvs) for kvs, _ in self.client.pages(prefix))

    def _put(self, pairs: Iterable[tuple[bytes, bytes]], together: int = _TOGETHER) -> None:
        some: list[object] = []
        for key, value in pairs:
            some.append(pb.RequestOp(request_put=pb.PutRequest(key=key, value=value)))
            if len(some) == together:
                self._txn(some)
                some = []
        if some:
            self._txn(some)

    def _txn(self, requests: list[object]) -> None:
        request = pb.TxnRequest(success=requests)
        self.client._call("KV/Txn", request, pb.TxnResponse, "change the store")


@contextmanager
def store(folder: Path) -> Iterator[Store]:
    """Start a server on loopback of the caller's namespace; it is gone afterwards."""
    client, peer = _free_port(), _free_port()
    url = f"http://127.0.0.1:{client}"
    flags = {
        "data-dir": str(folder / "etcd"),
        "listen-client-urls": url,
        "advertise-client-urls": url,
        "listen-peer-urls": f"http://127.0.0.1:{peer}",
        "initial-advertise-peer-urls": f"http://127.0.0.1:{peer}",
        "initial-cluster": f"default=http://127.0.0.1:{peer}",
        "log-level": "error",
    }
    server = subprocess.Popen(
        ["etcd", *(f"--{name}={value}" for name, value in flags.items())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    made = Store(EtcdOptions(endpoints=(url,)))
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                made.list_raw()
                break
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield made
    finally:
        made.client.close()
        server.kill()
        server.wait()


def _free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])
