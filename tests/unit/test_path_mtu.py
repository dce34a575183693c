"""The MTU of the paths to the peers, from routes that have one: tables of routes and peers."""

from __future__ import annotations

import pytest

from flannel_dp._core import Claims
from flannel_dp.cluster.admission import pack
from flannel_dp.kernel.messages import Address, Link
from flannel_dp.kernel.route_messages import DefaultRoute, StaticRoute
from flannel_dp.node.path_mtu import path_mtu
from tests.lib.leases import peer

LINK = Link(2, "eth0", "", 1500, "02:00:00:00:00:01", True, True, 0, False, None)
NETWORKS = [
    Address(2, 4, "192.0.2.1", 24, 0, 0x80),
    Address(2, 6, "2001:db8::1", 64, 0, 0x80),
    Address(3, 4, "198.51.100.1", 24, 0, 0x80),
    Address(3, 6, "2001:db8:77::1", 64, 0, 0x80),
]
NEAR = {4: "192.0.2.7", 6: "2001:db8::7"}
FAR = {4: "198.51.100.7", 6: "2001:db8:77::7"}
WORDS = {
    "near": {4: "192.0.2.0/24", 6: "2001:db8::/64"},
    "far": {4: "198.51.100.0/24", 6: "2001:db8:77::/64"},
    "host": {4: "198.51.100.7/32", 6: "2001:db8:77::7/128"},
    "other": {4: "203.0.113.0/24", 6: "2001:db8:99::/64"},
    "all": {4: "0.0.0.0/0", 6: "::/0"},
}
GATEWAY = {4: "192.0.2.254", 6: "2001:db8::fe"}


def claims(family: int, where: str) -> Claims:
    places = [{"near": NEAR, "far": FAR}[word] for word in where.split()]
    leases = [
        peer(number, public_ip=at[4], public_ipv6=at[6]) for number, at in enumerate(places, 2)
    ]
    return pack(leases, family, backend="vxlan", vni=1, has_data=True)


def static(family: int, text: str) -> StaticRoute:
    """The route of a text such as "far via mtu 1400", "near dev eth1" or "host metric 7"."""
    to, *words = text.split()
    prefix, _, length = WORDS[to][family].partition("/")
    hop = (3 if "eth1" in words else 2, GATEWAY[family] if "via" in words else "")
    numbers = {"metric": {4: 0, 6: 256}[family]}  # that of a connected route
    numbers |= {key: int(words[words.index(key) + 1]) for key in ("mtu", "metric") if key in words}
    return StaticRoute(prefix, int(length), (hop,), **numbers)


@pytest.mark.parametrize(
    ("peers", "default", "routes", "mtu", "said_by"),
    [
        pytest.param("near far", 0, [], 1500, "", id="no route has one"),
        pytest.param("near far", 1400, [], 1400, "all", id="the default route carries a peer"),
        pytest.param("near", 1400, [], 1500, "", id="the default route carries none"),
        pytest.param("", 1400, [], 1500, "", id="no peer"),
        pytest.param("far", 0, ["far via mtu 1400"], 1400, "far", id="a static route"),
        pytest.param("far", 1400, ["far via"], 1500, "", id="a static route without, before it"),
        pytest.param("far", 1300, ["far via mtu 1400"], 1400, "far", id="the narrower prefix"),
        pytest.param("far", 0, ["far via", "host via mtu 1400"], 1400, "host", id="a peer's own"),
        pytest.param("near far", 0, ["far mtu 1400", "near mtu 1300"], 1300, "near", id="least"),
        pytest.param("far", 0, ["other via mtu 1400"], 1500, "", id="to no peer"),
        pytest.param("far", 0, ["far dev eth1 mtu 1400"], 1500, "", id="another interface"),
        pytest.param("far", 1400, ["far dev eth1"], 1400, "all", id="by another interface"),
        pytest.param("far", 0, ["far via mtu 9000"], 1500, "", id="more than the interface has"),
        pytest.param(
            "far", 0, ["far via mtu 1300 metric 9", "far via mtu 1400 metric 5"], 1400, "far",
            id="the lower metric",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", [4, 6])
def test_the_mtu_of_the_paths_to_the_peers(
    family: int, peers: str, default: int, routes: list[str], mtu: int, said_by: str
) -> None:
    defaults = [DefaultRoute(2, GATEWAY[family], 0, mtu=default)]
    statics = [static(family, text) for text in routes]

    found = path_mtu(LINK, claims(family, peers), NETWORKS, defaults, statics)

    assert found.mtu == mtu
    if said_by:
        assert found.said_by.startswith(f"route {WORDS[said_by][family]} ")
        assert found.said_by.endswith(f"dev eth0 mtu {mtu}")
    else:
        assert found.said_by == ""


@pytest.mark.parametrize(("metric", "mtu"), [(256, 1400), (1024, 1500)])
def test_an_ipv6_route_replaces_a_connected_one_by_its_metric(metric: int, mtu: int) -> None:
    statics = [static(6, f"near mtu 1400 metric {metric}")]
    assert path_mtu(LINK, claims(6, "near"), NETWORKS, [], statics).mtu == mtu
