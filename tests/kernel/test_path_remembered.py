"""A VPN's rules and table are read by each pass and judged once; a change is seen at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from flannel_dp.resources.path import evidence
from tests.lib.diverted import HOST, IP, Pair, without_machine
from tests.lib.forwarding import Nodes
from tests.lib.leases import DEVICE, subnet
from tests.lib.traffic import pod_address
from tests.lib.waiting import wait_until

#: A peer's public address behind a router.
FAR = {4: "198.51.100.9", 6: "2001:db8:ff::9"}


@pytest.fixture
def behind_vpn(nodes: Nodes, family: int) -> Iterator[Pair]:
    """The first node has a VPN that leaves pods alone."""
    made = Pair(nodes(2), family, "kernel")
    made.ip("rule add pref 5270 lookup 52")
    made.ip(f"route add {HOST[family]} dev tun0 table 52")
    yield made
    made.plane.close()


def warnings(pair: Pair) -> tuple[str, ...]:
    report = pair.plane.sync(pair.leases)
    assert report.ok
    return without_machine(report.warnings)


def decisions() -> int:
    """How many were made so far: those that were not remembered."""
    return evidence._remembered.cache_info().misses


def test_nothing_is_decided_again_where_nothing_changed(behind_vpn: Pair) -> None:
    def remembered() -> bool:
        before = decisions()
        assert warnings(behind_vpn) == ()
        return decisions() == before

    wait_until(remembered)  # an address may still become permanent (duplicate address detection)


def test_no_change_of_what_is_remembered_is_missed(behind_vpn: Pair, family: int) -> None:
    pair, ip, taken = behind_vpn, IP[family], subnet(family, 2)
    nodad = "nodad" if family == 6 else ""
    on_device = "192.168.1.125/24"
    held = f"{pod_address(family, 2)[:-1]}1/{24 if family == 4 else 64}"
    own = f"{pod_address(family, 1)[:-1]}1/{24 if family == 4 else 64}"
    pair.host.ip("link add br9 type bridge")
    pair.host.ip("link add cni0 type bridge")
    steps = [
        (f"{ip} route add {taken} dev tun0 table 52", f"route {taken} dev tun0 in table 52"),
        (f"{ip} route replace {taken} dev br9 table 52", f"route {taken} dev br9 in table 52"),
        (f"{ip} route del {taken} table 52", ""),
        (f"{ip} rule add pref 100 to {taken} unreachable", "policy rule 100"),
        (f"{ip} rule del pref 100", ""),
        (f"{ip} rule add pref 5200 lookup 53", ""),
        (f"{ip} route add blackhole {taken} table 53", f"route blackhole {taken} in table 53"),
        (f"{ip} rule del pref 5200", ""),
        (f"{ip} route add blackhole {taken} table local", "in table local"),
        (f"{ip} route del {taken} table local", ""),
        (f"ip address add {on_device} dev {DEVICE[family]}", f"{DEVICE[family]} has {on_device}"),
        (f"ip address del {on_device} dev {DEVICE[family]}", ""),
        (f"ip address add {held} dev br9 {nodad}", f"bridge br9 has {held}"),
        (f"ip address del {held} dev br9", ""),
        # Which devices are pods' says whether a rule about one is about pods, and so does its name.
        (f"{ip} route add {taken} dev tun0 table 54", ""),
        (f"{ip} rule add pref 5100 iif cni0 lookup 54", ""),
        (f"ip address add {own} dev cni0 {nodad}", f"route {taken} dev tun0 in table 54"),
        ("ip link set cni0 name cni9", ""),
        ("ip link set cni9 name cni0", f"route {taken} dev tun0 in table 54"),
        (f"{ip} rule del pref 5100", ""),
    ]
    pair.host.ip("link set br9 up")
    assert warnings(pair) == ()
    for command, said in steps:
        pair.run(command)
        found = warnings(pair)
        assert [said in text for text in found] == [True] * bool(said), (command, found)
        assert warnings(pair) == found


def test_a_peer_that_moves_behind_a_router_is_asked_about(behind_vpn: Pair, family: int) -> None:
    pair, bits = behind_vpn, 32 if family == 4 else 128
    pair.ip(f"route add {FAR[family]}/{bits} dev tun0 table 52")
    assert warnings(pair) == ()
    key = "public_ip" if family == 4 else "public_ipv6"
    here = pair.leases
    pair.leases = [here[0], replace(here[1], **{key: FAR[family]})]
    (found,) = warnings(pair)
    assert f"route {FAR[family]}" in found
    assert "diverts packets of the tunnel" in found
    pair.leases = here
    assert warnings(pair) == ()
