"""Which leases are accepted beside what is connected to this node, on real devices and routes.

The test network is 10.240.0.0/12 and fd00:10::/32; node N has 10.240.N.0/24 and fd00:10:N::/64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import BackendData, ConfigError, DataPlane, Lease, LeaseRejected, NetworkConfig
from flannel_dp.cluster.rejections import Reason, Rejection
from tests.lib.kernel import expected, observed
from tests.lib.leases import lease_of, peer, peers, plane, subnet
from tests.lib.script import Script, each_script

HONEST = peers([1, 2])
SECTIONS = ("before", "says")


def add_device(host: Any, name: str, kind: str = "veth") -> None:
    more = f"peer name {name}p" if kind == "veth" else ""
    host.ip(f"link add {name} type {kind} {more}")
    if kind == "veth":
        host.ip(f"link set {name}p up")
    host.ip(f"link set {name} up")


def rejected(host: Any, family: int, *leases: Any, **options: Any) -> list[Rejection]:
    """What a sync with these leases and the honest ones rejects; those are all programmed."""
    with plane(host, family, **options) as dp:
        report = dp.sync([lease_of(host), *HONEST, *leases])
        names = {one.lease for one in report.rejected}
        accepted = [one for one in leases if one.label not in names]
        assert report.ok
        assert observed(host, family) == expected([*HONEST, *accepted], family)
    return report.rejected


@each_script(Path(__file__).with_name("connected.txt"))
def test_a_lease_beside_what_is_connected(script: Script, host: Any, family: int) -> None:
    before, says = f"before, IPv{family}", f"says, IPv{family}"
    script.check_names("rejected", "accepted", *(f"{n}, IPv{f}" for n in SECTIONS for f in (4, 6)))
    for line in script[before].lines:
        match line.split(maxsplit=1):
            case ["device", name]:
                add_device(host, name)
            case ["bridge", name]:
                add_device(host, name, "bridge")
            case ["ip", words]:
                gateway = {4: "192.0.2.77", 6: "2001:db8::77"}[family]
                host.ip(f"-{family} {words.replace('GATEWAY', gateway)}")
            case _:
                raise AssertionError(f"{script.origin}: cannot run {line!r}")
    (node,) = [*script.lines("rejected"), *script.lines("accepted")]
    number = int(node.removeprefix("node "))

    found = rejected(host, family, peer(number, name="greedy"), iface="eth0")

    if "accepted" in script:
        assert found == []
        return
    (rejection,) = found
    assert (rejection.lease, rejection.reason) == ("greedy", Reason.UNDERLAY)
    assert subnet(family, number) in rejection.detail
    assert [words for words in script[says].lines if words not in rejection.detail] == []


def test_an_audit_sees_a_network_that_came_and_one_that_went(host: Any, family: int) -> None:
    """The leases are validated again where what is connected has changed."""
    add_device(host, "eth1")
    inside = {4: "10.240.2.9/24", 6: "fd00:10:2::9/64"}[family]
    with plane(host, family) as dp:
        dp.sync([lease_of(host), *HONEST])
        host.ip(f"-{family} address add {inside} dev eth1")
        [rejection] = dp.resync().rejected
        assert "eth1" in rejection.detail
        assert observed(host, family) == expected(HONEST[:1], family)
        host.ip(f"-{family} address del {inside} dev eth1")
        assert dp.resync().rejected == []
    assert observed(host, family) == expected(HONEST, family)


# ---- endpoints ----------------------------------------------------------------------------


def endpoint_case(host: Any, family: int, at: str) -> list[tuple[str, str]]:
    lease = peer(7, name="odd", **{"public_ip" if family == 4 else "public_ipv6": at})
    return [(str(one.reason), one.detail) for one in rejected(host, family, lease)]


@pytest.mark.parametrize("on", ["eth0", "eth1"])
def test_rejects_endpoints_that_are_no_host_of_a_connected_network(
    host: Any, family: int, on: str
) -> None:
    add_device(host, "eth1")
    here = {4: "198.51.100.9/24", 6: "2001:db8:51::9/64"}[family]
    host.ip(f"-{family} address add {here} dev {on}")
    none = {4: ("198.51.100.0", "198.51.100.255"), 6: ("2001:db8:51::",)}[family]
    for at in none:
        [(reason, detail)] = endpoint_case(host, family, at)
        assert reason == "broadcast"
        network = {4: "198.51.100.0/24", 6: "2001:db8:51::/64"}[family]
        assert detail.startswith(f"{at} is the broadcast or the network address of {network}")
        assert "--iface" in detail


def test_rejects_a_broadcast_address_that_was_set(host: Any) -> None:
    host.ip("address add 198.51.100.9/24 brd 198.51.100.77 dev eth0")

    assert [reason for reason, _ in endpoint_case(host, 4, "198.51.100.77")] == ["broadcast"]


NO_HOST = {
    4: ("169.254.0.7", "169.254.169.254", "127.0.0.7", "224.0.0.7", "239.9.9.9", "0.0.0.7"),
    6: ("fe80::7", "::1", "ff02::7", "ff0e::7", "::ffff:192.0.2.7"),
}


def test_rejects_endpoints_that_no_host_has(host: Any, family: int) -> None:
    for at in NO_HOST[family]:
        [(reason, detail)] = endpoint_case(host, family, at)
        assert reason == "bad-public-ip"
        assert at in detail


def test_accepts_both_ends_of_a_network_of_two(host: Any, family: int) -> None:
    """A /31 (RFC 3021) or /127 (RFC 6164) has neither network nor broadcast address."""
    own, near = {
        4: ("198.51.100.8/31", "198.51.100.9"),
        6: ("2001:db8:51::8/127", "2001:db8:51::9"),
    }[family]
    host.ip(f"-{family} address add {own} dev eth0")
    assert endpoint_case(host, family, near) == []
    host.ip(f"-{family} address del {own} dev eth0")
    host.ip(f"-{family} address add {near}/{own.partition('/')[2]} dev eth0")
    assert endpoint_case(host, family, own.partition("/")[0]) == []


def test_accepts_the_other_end_of_a_point_to_point_link(host: Any, family: int) -> None:
    own, far = {4: ("203.0.113.1", "203.0.113.200"), 6: ("2001:db8:9::1", "2001:db8:9::c8")}[family]
    host.ip(f"-{family} address add {own} peer {far} dev eth0")

    assert endpoint_case(host, family, far) == []


def test_program_forwarding_names_the_network_that_holds_all_pods(host: Any) -> None:
    add_device(host, "eth1")
    host.ip("address add 10.9.9.9/8 dev eth1")
    with (
        plane(host, 4, public_ip=host.ipv4) as dp,
        dp.sibling(dp.config.with_forwarding("ebpf")) as other,
        pytest.raises(ConfigError, match=r"10\.0\.0\.0/8"),
    ):
        other.plan([lease_of(host)])


def test_a_network_over_this_nodes_own_subnet_stops_the_family(host: Any, family: int) -> None:
    """An interface is no pod bridge by an address in this node's subnet. What is there stays."""
    add_device(host, "eth1")
    inside = {4: "10.240.0.9/20", 6: "fd00:10::9/44"}[family]
    with plane(host, family) as dp:
        dp.sync([lease_of(host), *HONEST])
        host.ip(f"-{family} address add {inside} dev eth1")
        for again in (lambda: dp.sync([lease_of(host), *HONEST, peer(20)]), dp.resync):
            with pytest.raises(LeaseRejected, match=r"overlaps the network of eth1") as caught:
                again()
            assert subnet(family, 0) in caught.value.message
            assert f"ip address del {inside} dev eth1" in caught.value.hint
            assert observed(host, family) == expected(HONEST, family)
        host.ip(f"-{family} address del {inside} dev eth1")
        assert dp.sync([lease_of(host), *HONEST, peer(20)]).ok
    assert observed(host, family) == expected([*HONEST, peer(20)], family)


def test_a_network_that_holds_all_pods_is_a_warning(host: Any, family: int) -> None:
    """fr15: nodes of 10.0.0.0/8 whose pods have a part of it. Routes of pods are narrower."""
    wide = {4: "10.128.0.9/8", 6: "fd00:80::9/16"}[family]
    host.ip(f"-{family} address add {wide} dev eth0")
    with plane(host, family) as dp:
        report = dp.sync([lease_of(host), *HONEST])

        assert (report.ok, list(report.rejected)) == (True, [])
        [warning] = [text for text in report.warnings if "eth0" in text]
        assert f"is a part of the network of eth0, which has {wide}" in warning
        assert observed(host, family) == expected(HONEST, family)


def test_fr15_a_network_around_the_range_of_pods_is_a_warning(host: Any, family: int) -> None:
    """flannel's example with nodes in one network of the whole 10.0.0.0/8: pods have the range
    from SubnetMin to SubnetMax, and the rest of the network is protected as ever."""
    prefix = {4: "", 6: "IPv6"}[family]
    network = {4: "10.240.0.0/12", 6: "fd00:10::/32"}[family]
    first, last = {4: ("10.240.1.0", "10.240.9.0"), 6: ("fd00:10:1::", "fd00:10:9::")}[family]
    document = {
        "EnableIPv4": family == 4,
        "EnableIPv6": family == 6,
        f"{prefix}Network": network,
        f"{prefix}SubnetMin": first,
        f"{prefix}SubnetMax": last,
        "Backend": {"Type": "vxlan"},
    }
    wide = {4: "10.255.0.9/12", 6: "fd00:10:ff::9/32"}[family]
    host.ip(f"-{family} address add {wide} dev eth0")
    config = NetworkConfig.from_json(json.dumps(document))
    with DataPlane(config, iface="eth0", subnet=subnet(family, 3), netns=host.ns) as dp:
        report = dp.sync([*HONEST, peer(20, name="outside")])

        assert [(one.lease, one.reason) for one in report.rejected] == [("outside", "underlay")]
        assert f"the network of eth0, which has {wide}" in report.rejected[0].detail
        [warning] = [text for text in report.warnings if "eth0" in text]
        assert f"the range {first} to {last[:-1]}" in warning
        assert f"of pods is a part of the network of eth0, which has {wide}" in warning
        assert observed(host, family) == expected(HONEST, family)


def test_an_update_rejects_what_a_sync_rejects(host: Any, family: int) -> None:
    add_device(host, "eth1")
    inside = {4: "10.240.7.9/24", 6: "fd00:10:7::9/64"}[family]
    host.ip(f"-{family} address add {inside} dev eth1")
    with plane(host, family) as dp:
        dp.sync([lease_of(host), *HONEST])
        [rejection] = dp.update(added=[peer(7), peer(8)]).rejected
    assert "eth1" in rejection.detail
    assert observed(host, family) == expected([*HONEST, peer(8)], family)


# ---- unusual underlays and pod networks, with packets -------------------------------------------

UNUSUAL = {
    "240/4 for nodes and pods": ("240.0.0.{}", 24, "250.0.0.0/16", "250.0.{}.0/24"),
    "100.64/10 for nodes and pods": ("100.64.0.{}", 24, "100.96.0.0/16", "100.96.{}.0/24"),
    "/31 between the nodes": ("198.51.100.{}", 31, "10.244.0.0/16", "10.244.{}.0/24"),
    "flannel's own example, fr15": ("10.128.0.{}", 24, "10.0.0.0/8", "10.10.{}.0/24"),
    "its nodes in one network of a /9": ("10.128.0.{}", 9, "10.0.0.0/8", "10.10.{}.0/24"),
    "its nodes in one network of the /8": ("10.128.0.{}", 8, "10.0.0.0/8", "10.10.{}.0/24"),
    "pods in a part of the nodes' network": ("10.128.0.{}", 8, "10.42.0.0/16", "10.42.{}.0/24"),
    "link-local": ("169.254.7.{}", 16, "10.244.0.0/16", "10.244.{}.0/24"),
    "/127 between the nodes": ("2001:db8:5::{}", 127, "fd00:10::/32", "fd00:10:{}::/64"),
}


@pytest.mark.parametrize(("nodes", "length", "network", "pods"), UNUSUAL.values(), ids=UNUSUAL)
def test_packets_pass_where_people_use_unusual_addresses(
    make_host: Any, nodes: str, length: int, network: str, pods: str
) -> None:
    family = 6 if ":" in nodes else 4
    prefix = "IPv6" if family == 6 else ""
    document: dict[str, Any] = {
        "EnableIPv4": family == 4,
        "EnableIPv6": family == 6,
        f"{prefix}Network": network,
        "Backend": {"Type": "vxlan"},
    }
    if network == "10.0.0.0/8":
        document |= {"SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0"}
    config = NetworkConfig.from_json(json.dumps(document))
    hosts = [make_host(), make_host()]
    key = "" if family == 4 else "ipv6_"
    leases = [
        Lease(
            **{
                f"{key}subnet": pods.format(number),
                "public_ip" if family == 4 else "public_ipv6": nodes.format(number),
                "backend_data" if family == 4 else "backend_v6_data": BackendData(
                    1, f"02:00:00:00:00:0{number}"
                ),
                "backend_type": "vxlan",
            }
        )
        for number in (2, 3)
    ]
    for number, host in enumerate(hosts, 2):
        nodad = "nodad" if family == 6 else ""
        host.ip(f"-{family} address flush dev eth0 scope global")
        host.ip(f"-{family} address add {nodes.format(number)}/{length} dev eth0 {nodad}")
        with DataPlane(config, iface="eth0", netns=host.ns) as dp:
            report = dp.sync(leases)
        assert (report.ok, list(report.rejected)) == (True, [])

    assert hosts[0].ping(pods.format(3).partition("/")[0])
    assert hosts[1].ping(pods.format(2).partition("/")[0])
