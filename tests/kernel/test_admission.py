"""Which leases are accepted beside what is connected to this node, on real devices and routes.

The test network is 10.240.0.0/12 and fd00:10::/32; node N has 10.240.N.0/24 and fd00:10:N::/64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from flannel_dp import ConfigError
from flannel_dp.cluster.admission import Reason, Rejection
from tests.lib.kernel import expected, observed
from tests.lib.leases import lease_of, peer, peers, plane, subnet

HONEST = peers([1, 2])


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


class Case(NamedTuple):
    """``prepare`` are arguments of ``ip`` by family, ``says`` is what the rejection names."""

    prepare: dict[int, tuple[str, ...]]
    says: dict[int, tuple[str, ...]]
    device: str = "eth1"
    kind: str = "veth"
    number: int = 7


CASES = {
    "class2-4 the network of another interface": Case(
        {4: ("address add 10.240.7.9/24 dev eth1",), 6: ("address add fd00:10:7::9/64 dev eth1",)},
        {
            4: ("the network of eth1, which has 10.240.7.9/24", "ip address del 10.240.7.9/24"),
            6: ("the network of eth1, which has fd00:10:7::9/64", "ip address del fd00:10:7::9/64"),
        },
    ),
    "class2-4 a part of the network of another interface": Case(
        {
            4: ("address add 10.240.16.9/20 dev eth1",),
            6: ("address add fd00:10:10::9/44 dev eth1",),
        },
        {4: ("10.240.16.9/20",), 6: ("fd00:10:10::9/44",)},
        number=20,
    ),
    "class2-4 a static route": Case(
        {
            4: ("address add 203.0.113.1/24 dev eth1", "route add 10.240.6.0/23 via 203.0.113.9"),
            6: (
                "address add 2001:db8:9::1/64 dev eth1 nodad",
                "route add fd00:10:6::/47 via 2001:db8:9::9",
            ),
        },
        {
            4: ("ip -4 route del 10.240.6.0/23 via 203.0.113.9 dev eth1",),
            6: ("ip -6 route del fd00:10:6::/47 via 2001:db8:9::9 dev eth1",),
        },
    ),
    "class2-4 a static route to a device": Case(
        {
            4: ("route add 10.240.6.0/23 dev eth1 proto static",),
            6: ("route add fd00:10:6::/47 dev eth1 proto static",),
        },
        {
            4: ("the static route 10.240.6.0/23 dev eth1",),
            6: ("the static route fd00:10:6::/47 dev eth1",),
        },
    ),
    "fr43 a left-over bridge with a peer's subnet": Case(
        {4: ("address add 10.240.7.1/24 dev cni0",), 6: ("address add fd00:10:7::1/64 dev cni0",)},
        {
            4: ("cni0, which has 10.240.7.1/24", "ip link delete cni0"),
            6: ("cni0, which has fd00:10:7::1/64", "ip link delete cni0"),
        },
        "cni0",
        "bridge",
    ),
    "an address of the loopback": Case(
        {4: ("address add 10.240.7.9/32 dev lo",), 6: ("address add fd00:10:7::9/128 dev lo",)},
        {4: ("10.240.7.9, an address of lo",), 6: ("fd00:10:7::9, an address of lo",)},
    ),
    "the gateway of the default route": Case(
        {
            4: ("route add default via 10.240.7.254 dev eth1 onlink",),
            6: ("route add default via fd00:10:7::fe dev eth1 onlink",),
        },
        {
            4: ("the gateway 10.240.7.254 on eth1",),
            6: ("the gateway fd00:10:7::fe on eth1",),
        },
    ),
    "the gateway of a static route elsewhere": Case(
        {
            4: ("route add 203.0.113.0/24 via 10.240.7.254 dev eth1 onlink",),
            6: ("route add 2001:db8:77::/48 via fd00:10:7::fe dev eth1 onlink",),
        },
        {
            4: ("the gateway 10.240.7.254 on eth1",),
            6: ("the gateway fd00:10:7::fe on eth1",),
        },
    ),
    "the other end of a point-to-point link": Case(
        {
            4: ("address add 203.0.113.1 peer 10.240.7.2/32 dev eth1",),
            6: ("address add 2001:db8:9::1 peer fd00:10:7::2/128 dev eth1",),
        },
        {4: ("the other end 10.240.7.2/32 of eth1",), 6: ("fd00:10:7::2/128 of eth1",)},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rejects_a_lease_over_what_is_connected(host: Any, family: int, case: Case) -> None:
    add_device(host, case.device, case.kind)
    for command in case.prepare[family]:
        host.ip(f"-{family} {command}")

    [rejection] = rejected(host, family, peer(case.number, name="greedy"), iface="eth0")

    assert (rejection.lease, rejection.reason) == ("greedy", Reason.UNDERLAY)
    assert subnet(family, case.number) in rejection.detail
    for words in case.says[family]:
        assert words in rejection.detail


ACCEPTED = {
    "a static route for more than the whole network": {
        4: ("route add 10.0.0.0/8 via {gateway} dev eth0 onlink",),
        6: ("route add fd00::/8 via {gateway} dev eth0 onlink",),
    },
    "fr23 a VPN's two halves of everything": {
        4: ("route add 0.0.0.0/1 dev eth1", "route add 128.0.0.0/1 dev eth1"),
        6: ("route add ::/1 dev eth1", "route add 8000::/1 dev eth1"),
    },
    "this node's own pod bridge": {
        4: ("address add 10.240.0.1/24 dev cni0",),
        6: ("address add fd00:10::1/64 dev cni0",),
    },
    "this node's own pod bridge with the mask of the network": {
        4: ("address add 10.240.0.1/12 dev cni0",),
        6: ("address add fd00:10::1/32 dev cni0",),
    },
    "fr43 docker0 with the whole network": {
        4: ("address add 10.240.0.99/12 dev cni0",),
        6: ("address add fd00:10:ffff::1/32 dev cni0",),
    },
    "a static route inside the lease": {
        4: ("route add 10.240.7.64/26 dev eth1",),
        6: ("route add fd00:10:7:0:8000::/65 dev eth1",),
    },
    "a network beside the pod network": {
        4: ("address add 10.239.255.9/16 dev eth1",),
        6: ("address add fd00:9::9/64 dev eth1",),
    },
}


@pytest.mark.parametrize("commands", ACCEPTED.values(), ids=ACCEPTED)
def test_accepts_what_overrules_nothing(
    host: Any, family: int, commands: dict[int, tuple[str, ...]]
) -> None:
    add_device(host, "eth1")
    add_device(host, "cni0", "bridge")
    for command in commands[family]:
        host.ip(f"-{family} " + command.format(gateway=host.underlay(family) + "77"[family == 4 :]))

    assert rejected(host, family, peer(7, name="n7"), iface="eth0") == []


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
        assert detail.startswith(f"{at} is the broadcast or the network address")
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


def test_an_interface_is_no_pod_bridge_by_an_address_in_the_own_subnet(
    host: Any, family: int
) -> None:
    add_device(host, "eth1")
    inside = {4: "10.240.0.9/20", 6: "fd00:10::9/44"}[family]
    host.ip(f"-{family} address add {inside} dev eth1")
    with plane(host, family) as dp:
        report = dp.sync([lease_of(host), *HONEST, peer(20)])

    assert {str(one.reason) for one in report.rejected} == {"underlay"}
    assert all(inside in one.detail for one in report.rejected)
    assert observed(host, family) == expected([peer(20)], family)
