"""``flannel-dp leases``: which leases this node believes, from files and from etcd."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import Lease
from flannel_dp.cluster.lease import LeaseList
from flannel_dp.look.leases import Listing, list_leases
from flannel_dp.sources import Snapshot
from tests.lib import programs
from tests.lib.etcd import PREFIX, EtcdServer, free_ports
from tests.lib.kernel import everything
from tests.lib.leases import NETWORK, lease_of, network_config, peer, peers, plane, subnet
from tests.lib.waiting import LIMIT


def leases_of(host: Any) -> list[Lease]:
    """The own lease, two that are to be believed, and three that this node must not believe."""
    data = lease_of(host, 0)
    return [
        *peers((1, 2)),
        lease_of(host, 0),
        peer(3, public_ip="198.18.3.1", public_ipv6="2001:db8:1::301", subnet=subnet(4, 0),
             ipv6_subnet=subnet(6, 0)),
        peer(4, backend_data=data.backend_data, backend_v6_data=data.backend_v6_data),
        peer(5, public_ip=host.ipv4, public_ipv6=host.ipv6),
    ]  # fmt: skip


def listing_of(host: Any, leases: list[Lease], family: int, **options: Any) -> Listing:
    with plane(host, family, **options) as made:
        snapshot = Snapshot(LeaseList(leases, []), "test", 0.0)
        return list_leases(network_config(family), snapshot, made)


def test_a_node_believes_less_than_others(host: Any, family: int) -> None:
    leases = leases_of(host)
    before = everything(host)

    listing = listing_of(host, leases, family, subnet=subnet(family, 0))

    assert everything(host) == before
    assert listing.leases == tuple(leases[:3])
    assert listing.own == 2
    assert listing.notes == ()
    assert [(one.family, str(one.reason)) for one in listing.rejected] == [
        (family, "own-subnet"),
        (family, "own-mac"),
        (family, "own-public-ip"),
    ]


def test_a_claim_to_the_underlay(host: Any) -> None:
    claim = peer(3, subnet="10.240.3.0/24")
    host.ip("address add 10.240.3.9/32 dev eth0")

    listing = listing_of(host, [lease_of(host), claim], 4)

    assert [str(one.reason) for one in listing.rejected] == ["underlay"]
    assert listing_of(host, [claim], 4, iface="nowhere0").leases == (claim,)


def test_a_node_that_has_no_lease_yet(host: Any, family: int) -> None:
    leases = peers((1, 2))

    listing = listing_of(host, leases, family)

    assert listing.leases == tuple(leases)
    assert listing.own is None
    (note,) = listing.notes
    assert f"no lease was published with {host.underlay(family)}" in note


def test_a_machine_that_is_no_node(host: Any, family: int) -> None:
    listing = listing_of(host, leases_of(host), family, iface="nowhere0")

    assert len(listing.leases) + len(listing.rejected) == 6
    assert listing.own is None
    (note,) = listing.notes
    assert "there is no interface 'nowhere0'" in note


# ---- the command --------------------------------------------------------------------


class Command:
    """``flannel-dp`` for a host and its network configuration."""

    def __init__(self, host: Any, family: int, folder: Path) -> None:
        self.host = host
        self.conf, self.leases = folder / "net-conf.json", folder / "leases.json"
        document: dict[str, Any] = {"Backend": {"Type": "vxlan"}, "EnableIPv4": family == 4}
        if family == 4:
            document |= {"Network": NETWORK[4], "SubnetLen": 24}
        else:
            document |= {"EnableIPv6": True, "IPv6Network": NETWORK[6], "IPv6SubnetLen": 64}
        self.document = json.dumps(document)
        self.conf.write_text(self.document)

    def write(self, leases: list[Lease]) -> None:
        self.leases.write_text('{"leases": [' + ",".join(one.to_json() for one in leases) + "]}")

    def run(self, name: str, *more: str, source: tuple[str, ...] = (), stdin: str = "") -> Any:
        source = source or ("--leases", str(self.leases))
        return programs.run(
            [
                *(sys.executable, "-m", "flannel_dp", name, *source, *more),
                *("--netns", self.host.ns),
                *(() if "--etcd-endpoints" in source else ("--net-conf", str(self.conf))),
            ],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )


@pytest.fixture
def command(host: Any, family: int, tmp_path: Path) -> Command:
    return Command(host, family, tmp_path)


def test_the_text(command: Command, host: Any, family: int) -> None:
    command.write(leases_of(host))

    done = command.run("leases", "--iface", "eth0", "--subnet", subnet(family, 0))

    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\S+ .* vxlan ", done.stdout, re.MULTILINE)) == 3
    assert "(this node)\n" in done.stdout
    assert "rejected leases (3):\n" in done.stdout
    assert "3 leases accepted, 3 rejected; " in done.stdout


def test_the_json_makes_the_same_overlay(command: Command, host: Any, family: int) -> None:
    command.write(leases_of(host))
    where = ("--iface", "eth0", "--subnet", subnet(family, 0), "--output", "json")

    done = command.run("leases", *where)

    assert done.returncode == 0, done.stderr
    listing = json.loads(done.stdout)
    assert len(listing["rejected"]) == 3
    first = json.loads(command.run("plan", *where).stdout)
    again = command.run("plan", *where, source=("--leases", "-"), stdin=done.stdout)
    assert again.returncode == 0, again.stderr
    then = json.loads(again.stdout)
    assert then["operations"] == first["operations"] != []
    assert (len(first["rejected"]), then["rejected"]) == (3, [])


def test_where_there_is_no_such_node(command: Command, host: Any) -> None:
    command.write(leases_of(host))

    done = command.run("leases", "--iface", "nowhere0")

    assert done.returncode == 0, done.stderr
    assert "note: " in done.stdout
    assert "without regard to this node: there is no interface 'nowhere0'" in done.stdout


def test_what_stands_in_the_way(command: Command) -> None:
    assert command.run("leases").returncode == 4  # the file is missing
    done = command.run("leases", source=("--net-conf", str(command.conf)))
    assert done.returncode == 2
    assert "where are the leases?" in done.stderr


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    client, peer_port = free_ports(2)
    made = EtcdServer(tmp_path, client, peer_port)
    try:
        yield made.start().await_ready()
    finally:
        made.kill()


def test_expiry_in_etcd(host: Any, tmp_path: Path, etcd: EtcdServer) -> None:
    """A lease that ends in an hour, a reservation that never does, and a key that is none."""
    command = Command(host, 4, tmp_path)
    etcd.put("config", command.document)
    granted = etcd.run("lease", "grant", "3600").split()[1]
    attrs = '{"PublicIP":"198.18.0.%d","PublicIPv6":null,"BackendType":"vxlan",'
    attrs += '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:%02x"}}'
    etcd.put("subnets/10.240.1.0-24", attrs % (1, 1), f"--lease={granted}")
    etcd.put("subnets/10.240.2.0-24", attrs % (2, 2))
    etcd.put("subnets/nonsense", "{}")
    source = ("--etcd-endpoints", etcd.url, "--etcd-prefix", PREFIX)

    done = command.run("leases", "--iface", "eth0", source=source)

    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert re.search(r" in (59 min|0 h 59 min|1 h 0 min) ", lines["10.240.1.0/24"])
    assert " never " in lines["10.240.2.0/24"]
    assert "bad-key" in lines["nonsense"]

    document = json.loads(
        command.run("leases", "--iface", "eth0", "--output", "json", source=source).stdout
    )
    assert ["Expiration" in lease for lease in document["leases"]] == [True, False]
    assert [refused["reason"] for refused in document["rejected"]] == ["bad-key"]
