"""Which interface and which address a node is reached at: tables of what is there, and what
follows."""

from __future__ import annotations

import pytest

from flannel_dp.kernel.messages import Address
from flannel_dp.kernel.route_messages import DefaultRoute, StaticRoute
from flannel_dp.node.interface import (
    Interface,
    InUse,
    addresses_to_publish,
    best_addresses,
    default_uplink,
    is_routed_alone,
    only_single,
    source_of,
    still_there,
)

MAC = "02:00:00:00:00:02"
TUNNELS = [
    *("amt", "bareudp", "erspan", "geneve", "gre", "gretap", "gtp", "ip6erspan", "ip6gre"),
    *("ip6gretap", "ip6tnl", "ipip", "ovpn", "sit", "tun", "vti", "vti6", "vxlan", "wireguard"),
    *("xfrm", "netkit"),
]
LINKS = {
    2: Interface(2, "eth0", "", MAC),
    3: Interface(3, "bond0", "bond", MAC),
    4: Interface(4, "tap0", "tun", MAC),
    5: Interface(5, "tun0", "tun"),
    6: Interface(6, "wg0", "wireguard"),
    7: Interface(7, "cilium_vxlan", "vxlan", MAC),
    8: Interface(8, "flannel.1", "vxlan", MAC, ours=True),
    9: Interface(9, "br0", "bridge", MAC),
    10: Interface(10, "veth7a2", "veth", MAC, is_port=True),
    11: Interface(11, "cali5f", "veth", MAC, has_address=False),
    12: Interface(12, "veth7a3", "veth", MAC),
    13: Interface(13, "eth1", "veth", MAC),
    14: Interface(14, "dummy0", "dummy", MAC),
    15: Interface(15, "lo", "", "00:00:00:00:00:00"),
    16: Interface(16, "ppp0", "ppp"),
    17: Interface(17, "eth0.100", "vlan", MAC),
}


@pytest.mark.parametrize(
    ("routes", "name"),
    [
        pytest.param([], None, id="fr32-no-default-route"),
        pytest.param([99], None, id="an interface that is gone"),
        pytest.param([2], "eth0", id="eth0"),
        pytest.param([3, 2], "bond0", id="several by metric"),
        pytest.param([17, 2], "eth0.100", id="a vlan"),
        pytest.param([16, 2], "ppp0", id="ppp"),
        pytest.param([5, 2], "eth0", id="fr24-tun"),
        pytest.param([6, 2], "eth0", id="fr24-wireguard"),
        pytest.param([7, 2], "eth0", id="another overlay's vxlan"),
        pytest.param([8, 2], "eth0", id="fr26-our own device"),
        pytest.param([4, 2], "eth0", id="a VPN's tap"),
        pytest.param([4, 5], "tap0", id="a machine's only interface is a tap"),
        pytest.param([10, 2], "eth0", id="a port of a bridge"),
        pytest.param([11, 2], "eth0", id="a pod's device without an address"),
        pytest.param([12, 2], "eth0", id="a pod's device by its name"),
        pytest.param([12], "veth7a3", id="a container's only interface"),
        pytest.param([10, 11], None, id="pods' devices alone"),
        pytest.param([13, 2], "eth1", id="a container's eth1"),
        pytest.param([14, 2], "eth0", id="dummy"),
        pytest.param([14], "dummy0", id="air gap with a dummy"),
        pytest.param([5, 6, 7, 8], None, id="tunnels alone"),
    ],
)
def test_the_interface_of_the_default_route(routes: list[int], name: str | None) -> None:
    found = default_uplink(routes, LINKS)
    assert (found.name if found else None) == name


@pytest.mark.parametrize("kind", TUNNELS)
def test_no_tunnel_is_chosen_by_its_default_route(kind: str) -> None:
    mac = "" if kind == "tun" else MAC
    links = {2: LINKS[2], 9: Interface(9, "over0", kind, mac)}
    assert default_uplink([9, 2], links) == LINKS[2]
    assert default_uplink([9], links) is None


HERE = {
    "192.0.2.1": (2,),
    "2001:db8::1": (2,),
    "192.0.2.3": (9,),
    "198.51.100.1": (15,),
    "198.51.100.2": (14,),
    "10.8.0.5": (5,),
    "192.0.2.4": (5, 9),
}


@pytest.mark.parametrize(
    ("kept", "stays"),
    [
        pytest.param(InUse(4, 2, "192.0.2.1"), InUse(4, 2, "192.0.2.1"), id="fr24-ipv4"),
        pytest.param(InUse(6, 2, "2001:db8::1"), InUse(6, 2, "2001:db8::1"), id="fr24-ipv6"),
        pytest.param(InUse(4, 3, "192.0.2.9"), None, id="fr30-the address is gone"),
        pytest.param(InUse(4, 2, "192.0.2.9"), InUse(4, 2, ""), id="fr30-it has another"),
        pytest.param(InUse(4, 99, "192.0.2.9"), None, id="the interface is gone"),
        pytest.param(InUse(4, 99, "192.0.2.1"), InUse(4, 2, "192.0.2.1"), id="made anew"),
        pytest.param(InUse(4, 0, "192.0.2.1"), InUse(4, 2, "192.0.2.1"), id="the address alone"),
        pytest.param(InUse(4, 2, "192.0.2.3"), InUse(4, 9, "192.0.2.3"), id="bridged"),
        pytest.param(InUse(4, 2, "192.0.2.4"), InUse(4, 9, "192.0.2.4"), id="and on a tunnel"),
        pytest.param(InUse(4, 2, "10.8.0.5"), InUse(4, 2, ""), id="on a tunnel alone"),
        pytest.param(InUse(4, 2, "198.51.100.1"), InUse(4, 2, "198.51.100.1"), id="on lo"),
        pytest.param(InUse(4, 2, "198.51.100.2"), InUse(4, 2, "198.51.100.2"), id="on dummy"),
        pytest.param(InUse(4, 8, "192.0.2.1"), None, id="fr26-our own device"),
        pytest.param(InUse(4, 5, "10.8.0.5"), InUse(4, 5, "10.8.0.5"), id="a tunnel once named"),
    ],
)
def test_what_is_in_use_stays_while_it_is_there(kept: InUse, stays: InUse | None) -> None:
    found = still_there([kept], LINKS, HERE, {(2, 4)})
    assert found == ((stays,) if stays else ())


def test_an_interface_without_the_address_comes_after_all_others() -> None:
    kept = [InUse(4, 2, "192.0.2.9"), InUse(4, 9, "192.0.2.3")]
    assert [one.link for one in still_there(kept, LINKS, HERE, {(2, 4)})] == [9, 2]


@pytest.mark.parametrize(
    ("usable", "named", "kept", "best"),
    [
        ("", "", "", ""),
        ("a b", "", "", "a b"),
        ("a b", "", "b", "b a"),
        ("a b", "", "old", "old a b"),  # deprecated, say: in use all the same
        ("a b", "b", "a", "b"),
        ("a b", "b", "", "b"),
        ("a b c", "b c", "c", "c b"),
        ("", "b", "", "b"),
    ],
)
def test_the_address_in_use_comes_first_unless_a_flag_asks_for_another(
    usable: str, named: str, kept: str, best: str
) -> None:
    found = addresses_to_publish(tuple(usable.split()), tuple(named.split()), kept)
    assert found == tuple(best.split())


# ---- which address ----------------------------------------------------------------------

#: In words, as ``ip address`` shows them; RFC 8981 addresses are "temporary".
FLAGS = {
    "secondary": 0x01,
    "temporary": 0x01,
    "duplicate": 0x08,
    "deprecated": 0x20,
    "tentative": 0x40,
    "optimistic": 0x44,
    "permanent": 0x80,
}


def address(text: str) -> Address:
    """``"192.0.2.1/24 dynamic"``; "link" is a link-local scope, permanent is the default."""
    prefix, *words = text.split()
    value, _, length = prefix.partition("/")
    flags = 0 if "dynamic" in words or "temporary" in words else FLAGS["permanent"]
    for word in words:
        flags |= FLAGS.get(word, 0)
    link = "link" in words or value.startswith("fe80:")
    return Address(2, 6 if ":" in value else 4, value, int(length), 253 if link else 0, flags)


@pytest.mark.parametrize(
    ("there", "best"),
    [
        pytest.param([], "", id="none"),
        pytest.param(["127.0.0.1/8"], "", id="loopback"),
        pytest.param(["::1/128"], "", id="loopback of IPv6"),
        # IPv4
        pytest.param(["192.0.2.1/24", "198.51.100.1/24"], "192.0.2.1 198.51.100.1", id="two"),
        pytest.param(["192.0.2.1/24 dynamic", "192.0.2.100/32"], "192.0.2.1", id="fr27-vip"),
        pytest.param(["192.0.2.100/32", "192.0.2.1/24 dynamic"], "192.0.2.1", id="fr27-first"),
        pytest.param(
            ["192.0.2.1/24 dynamic", "192.0.2.100/24 secondary"], "192.0.2.1", id="fr27-secondary"
        ),
        pytest.param(
            ["192.0.2.1/24", "192.0.2.100/32 dynamic"], "192.0.2.1", id="fr27-vip-with-a-lifetime"
        ),
        pytest.param(["192.0.2.1/32 dynamic"], "192.0.2.1", id="a cloud's single address"),
        pytest.param(["192.0.2.1/32", "192.0.2.2/32"], "192.0.2.1 192.0.2.2", id="two singles"),
        pytest.param(
            ["192.0.2.1/24 deprecated", "192.0.2.2/24 secondary"],
            "192.0.2.2",
            id="the first is deprecated",
        ),
        pytest.param(
            ["192.0.2.1/24 dynamic", "198.51.100.1/24"],
            "198.51.100.1 192.0.2.1",
            id="permanent before dynamic",
        ),
        pytest.param(
            ["169.254.1.1/16 link", "192.0.2.1/24 dynamic"],
            "192.0.2.1 169.254.1.1",
            id="link-local of IPv4",
        ),
        # IPv6
        pytest.param(["2001:db8::1/64"], "2001:db8::1", id="global"),
        pytest.param(["fe80::1/64"], "", id="link-local"),
        pytest.param(
            ["2001:db8::a/64 temporary", "2001:db8::1/64 dynamic"], "2001:db8::1", id="temporary"
        ),
        pytest.param(["2001:db8::a/64 temporary"], "", id="temporary alone"),
        pytest.param(["2001:db8::1/64 tentative"], "", id="tentative"),
        pytest.param(["2001:db8::1/64 optimistic"], "", id="optimistic"),
        pytest.param(
            ["fd5a:1::1/64 duplicate", "2001:db8::1/64"], "2001:db8::1", id="fr31-duplicate"
        ),
        pytest.param(
            ["2001:db8::2/64 deprecated", "2001:db8::1/64"], "2001:db8::1", id="deprecated"
        ),
        pytest.param(
            ["fd5a:1::1/64", "2001:db8::1/64 dynamic"],
            "2001:db8::1 fd5a:1::1",
            id="rfc6724-global-before-unique-local",
        ),
        pytest.param(
            ["2002:c000:201::1/48", "fd5a:1::1/64"],
            "2002:c000:201::1 fd5a:1::1",
            id="rfc6724-6to4-before-unique-local",
        ),
        pytest.param(
            ["2002:c000:201::1/48", "2001:db8::1/64"],
            "2001:db8::1 2002:c000:201::1",
            id="rfc6724-native-before-6to4",
        ),
        pytest.param(
            ["2001:0:1::1/64", "2001:db8::1/64"],
            "2001:db8::1 2001:0:1::1",
            id="rfc6724-native-before-teredo",
        ),
        pytest.param(
            ["fec0::1/64", "fd5a:1::1/64"],
            "fd5a:1::1 fec0::1",
            id="rfc6724-unique-local-before-site-local",
        ),
        pytest.param(
            ["2001:db8::1/64 dynamic", "2001:db8::100/128"], "2001:db8::1", id="fr27-vip of IPv6"
        ),
        pytest.param(
            ["2001:db8::77/128 dynamic", "fd5a:1::1/64"],
            "2001:db8::77 fd5a:1::1",
            id="DHCPv6 gives single addresses",
        ),
        pytest.param(["2001:db8::77/128 dynamic"], "2001:db8::77", id="DHCPv6 alone"),
    ],
)
def test_the_addresses_to_publish(there: list[str], best: str) -> None:
    assert best_addresses(map(address, there)) == tuple(best.split())


@pytest.mark.parametrize(
    ("there", "source", "gateway", "best"),
    [
        pytest.param(
            ["192.0.2.1/24", "192.0.2.7/24 secondary"],
            "192.0.2.7",
            "",
            "192.0.2.7 192.0.2.1",
            id="src",
        ),
        pytest.param(["192.0.2.1/24"], "192.0.2.9", "", "192.0.2.1", id="src-not-there"),
        pytest.param(
            ["2001:db8::1/64", "fd5a:1::1/64"],
            "fd5a:1::1",
            "",
            "fd5a:1::1 2001:db8::1",
            id="src-of-ipv6",
        ),
        pytest.param(
            ["2001:db8::a/64 temporary", "2001:db8::1/64"],
            "2001:db8::a",
            "",
            "2001:db8::1",
            id="src-temporary",
        ),
        pytest.param(
            ["198.51.100.1/24", "192.0.2.1/24 dynamic"],
            "",
            "192.0.2.254",
            "192.0.2.1 198.51.100.1",
            id="fr27-what-the-kernel-sends-from",
        ),
        pytest.param(
            ["192.0.2.1/24", "198.51.100.1/24"],
            "",
            "fe80::1",
            "192.0.2.1 198.51.100.1",
            id="gateway-of-the-other-family",
        ),
        pytest.param(
            ["2001:db8:1::1/64", "2001:db8:2::1/64"],
            "",
            "2001:db8:2::fe",
            "2001:db8:2::1 2001:db8:1::1",
            id="gateway-of-ipv6",
        ),
    ],
)
def test_the_default_route_s_source_and_gateway(
    there: list[str], source: str, gateway: str, best: str
) -> None:
    assert best_addresses(map(address, there), source, gateway) == tuple(best.split())


def test_the_source_is_that_of_the_route_out_of_the_interface() -> None:
    routes = [
        DefaultRoute(5, None, 10, 254, "10.8.0.5"),
        DefaultRoute(2, "192.0.2.254", 100, 254, "192.0.2.7"),
        DefaultRoute(2, "192.0.2.253", 200),
    ]
    assert source_of(routes, 2) == ("192.0.2.7", "192.0.2.254")
    assert source_of(routes, 5) == ("10.8.0.5", "")
    assert source_of(routes, 9) == ("", "")


@pytest.mark.parametrize(
    ("there", "virtual"),
    [
        pytest.param([], False, id="none"),
        pytest.param(["192.0.2.99/32"], True, id="fr27-what-keepalived-leaves"),
        pytest.param(["192.0.2.99/32", "192.0.2.98/32"], True, id="fr27-two"),
        pytest.param(["192.0.2.99/32", "192.0.2.9/24"], False, id="beside-a-new-one"),
        pytest.param(["192.0.2.9/32 dynamic"], False, id="a-clouds-has-a-lifetime"),
        pytest.param(["2001:db8::99/128"], True, id="fr27-of-ipv6"),
        pytest.param(["2001:db8::99/128", "2001:db8::9/64"], False, id="beside-a-new-one-of-ipv6"),
        pytest.param(["2001:db8::9/128 dynamic"], False, id="dhcpv6"),
    ],
)
def test_addresses_that_may_be_virtual(there: list[str], virtual: bool) -> None:
    addresses = [*map(address, there)]
    assert only_single(addresses, best_addresses(addresses)) is virtual


@pytest.mark.parametrize(
    ("default", "static", "alone"),
    [
        pytest.param("", "", False, id="no-route"),
        pytest.param("via GATEWAY", "", False, id="fr27-a-gateway-that-nothing-reaches"),
        pytest.param("via GATEWAY dev other", "GATEWAY", False, id="another-interface"),
        pytest.param("via GATEWAY src OWN", "", True, id="asks-to-send-from-it"),
        pytest.param("via GATEWAY src ELSE", "", False, id="asks-to-send-from-another"),
        pytest.param("via GATEWAY onlink", "", True, id="a-gateway-on-the-link"),
        pytest.param("direct", "", True, id="all-is-on-the-link"),
        pytest.param("via GATEWAY", "GATEWAY", True, id="a-route-to-the-gateway"),
        pytest.param("", "NETWORK", True, id="a-route-to-the-network"),
        pytest.param("", "ELSE", False, id="a-route-to-another-host"),
        pytest.param("", "NETWORK via GATEWAY", False, id="a-network-behind-a-gateway"),
        pytest.param("", "NETWORK dev other", False, id="a-network-on-another-interface"),
    ],
)
@pytest.mark.parametrize("family", [4, 6])
def test_routes_of_a_node_that_has_a_single_address(
    default: str, static: str, alone: bool, family: int
) -> None:
    texts = {
        4: {"OWN": "192.0.2.9", "ELSE": "198.51.100.7", "GATEWAY": "192.0.2.254", "NETWORK": 24},
        6: {"OWN": "2001:db8::9", "ELSE": "2001:db9::7", "GATEWAY": "2001:db8::fe", "NETWORK": 64},
    }[family]
    near = {4: "192.0.2.0", 6: "2001:db8::"}[family]
    words = default.split()
    defaults = []
    if words:
        source = next((str(texts[word]) for word in words if word in ("OWN", "ELSE")), None)
        via = str(texts["GATEWAY"]) if "via" in words else None
        oif = 3 if "other" in words else 2
        defaults = [DefaultRoute(oif, via, 0, source=source, onlink="onlink" in words)]
    statics = [StaticRoute({4: "0.0.0.0", 6: "::"}[family], 0, ((2, ""),))]  # a default one
    if words := static.split():
        bits = 32 if family == 4 else 128
        base, length = (
            (near, texts["NETWORK"]) if words[0] == "NETWORK" else (texts[words[0]], bits)
        )
        hop = 3 if "other" in words else 2, str(texts["GATEWAY"]) if "via" in words else ""
        statics.append(StaticRoute(str(base), int(length), (hop,)))
    assert is_routed_alone(str(texts["OWN"]), 2, defaults, statics) is alone
