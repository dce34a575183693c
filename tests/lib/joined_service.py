"""The agent as a process of a node that has joined a cluster: its leases are in an etcd."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from flannel_dp.cluster.lease import lease_attrs_json
from flannel_dp.kernel.netns import call_in_netns
from tests.lib.etcd import PREFIX, EtcdServer
from tests.lib.etcd_garbler import Garbler
from tests.lib.leases import NETWORK, peers, subnet
from tests.lib.service import Service, free_port
from tests.lib.waiting import LIMIT, wait_until


class Joined(Service):
    """A node whose leases and configuration are in an etcd, seen through a garbler."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.etcd = EtcdServer(self.folder, 2379, 2380, netns=self.host.ns)
        self.etcd.start().await_ready()
        self.garbler = Garbler(self.etcd)
        self.health = free_port(self.host)
        self.peers = []

    def close(self) -> None:
        """End what runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.garbler.close()
        self.etcd.kill()

    def publish_config(self, **backend: Any) -> None:
        key = "Network" if self.family == 4 else "IPv6Network"
        length = {} if self.family == 6 else {"SubnetLen": 24}
        document = {"Backend": {"Type": "vxlan", **backend}, key: NETWORK[self.family], **length}
        document |= {"EnableIPv4": self.family == 4, "EnableIPv6": self.family == 6}
        self.etcd.put("config", json.dumps(document))

    def add(self, number: int) -> None:
        """Another node publishes its lease."""
        (lease,) = peers([number])
        if self.family == 4:
            lease = type(lease)(
                subnet=lease.subnet, public_ip=lease.public_ip,
                backend_type="vxlan", backend_data=lease.backend_data,
            )  # fmt: skip
        else:
            lease = type(lease)(
                ipv6_subnet=lease.ipv6_subnet, public_ipv6=lease.public_ipv6,
                backend_type="vxlan", backend_v6_data=lease.backend_v6_data,
            )  # fmt: skip
        name = subnet(self.family, number).replace("/", "-")
        self.etcd.put(f"subnets/{name}", lease_attrs_json(lease).decode())
        self.peers.append(lease)

    def command(self, *more: str) -> list[str]:
        plain = super().command(*more)
        at = plain.index("--net-conf")
        etcd = ["--etcd-endpoints", self.garbler.url, "--etcd-prefix", PREFIX]
        files = ["--subnet-file", str(self.folder / "subnet.env")]
        health = ["--healthz-ip", "127.0.0.1", "--healthz-port", str(self.health)]
        return plain[:at] + etcd + files + health + plain[at + 4 :]

    def healthz(self) -> dict[str, Any]:
        def get() -> Any:
            url = f"http://127.0.0.1:{self.health}/healthz?format=json"
            with urllib.request.urlopen(url, timeout=LIMIT) as answer:
                return json.load(answer)

        return dict(call_in_netns(self.host.ns, get))

    def await_problems(self, *expected_: str) -> None:
        wait_until(lambda: {*self.healthz()["problems"]} == {*expected_})
