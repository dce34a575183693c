"""``flannel-dp sync --watch`` as a process, behind a garbled etcd."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.cluster.lease import lease_attrs_json
from flannel_dp.kernel.netns import call_in_netns
from tests.lib.etcd import PREFIX, EtcdServer
from tests.lib.etcd_garbler import Garbler, noise
from tests.lib.leases import NETWORK, peers, subnet
from tests.lib.service import Service, free_port, service_fixture  # noqa: F401
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


@pytest.fixture
def joined(
    host: Any, family: int, tmp_path: Path, wait_until: Callable[..., None]
) -> Iterator[Joined]:
    made = Joined(host, family, tmp_path, wait_until)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()
    made.garbler.close()
    made.etcd.kill()


def test_unreadable_answers_end_nothing(joined: Joined) -> None:
    joined.publish_config()
    joined.start("--audit-interval", "1")
    joined.add(1)
    joined.await_clean()
    joined.await_problems()

    # Two watches: the leases' and this node's own.
    joined.garbler.fail("Watch", *[noise] * 6)
    joined.add(2)
    joined.await_clean()
    wait_until(lambda: not joined.garbler.left("Watch"))
    joined.await_problems()

    joined.garbler.fail("Range", *[noise] * 8)
    os.kill(joined.pid, signal.SIGHUP)
    wait_until(lambda: joined.said("the new configuration is rejected"))
    wait_until(lambda: not joined.garbler.left("Range"))
    joined.add(3)
    joined.await_clean()
    joined.await_problems()  # the configuration was read again by itself
    assert joined.healthz()["status"] == "ok"
    assert joined.healthz()["ended"] == {}
    assert not joined.said("Traceback"), joined.log.read_text()
    assert joined.end() == 0
