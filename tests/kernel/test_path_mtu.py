"""The MTU of routes to the peers: the device, subnet.env and full-size packets follow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flannel_dp import NotYet
from flannel_dp.look.myself import explain_self
from tests.lib import programs
from tests.lib.forwarding import Nodes
from tests.lib.leases import DEVICE, peer, replaced
from tests.lib.traffic import pod_address
from tests.lib.waiting import LIMIT, wait_until

#: Outer headers of the tunnel, and the inner ones of a ping.
TUNNEL, PING = {4: 50, 6: 70}, {4: 28, 6: 48}
FAR = {4: "198.51.100.2", 6: "2001:db8:77::2"}


def passes(node: Any, target: str, size: int) -> bool:
    """Whether a ping of ``size`` bytes from the pod that must not be split is answered, and the
    node did not split the tunnel's packets either."""
    family = 6 if ":" in target else 4
    before = fragments(node.host, family)
    command = ["ip", "netns", "exec", node.pod, "ping", "-c1", "-W1", "-M", "do"]
    command += ["-s", str(size - PING[family]), target]
    done = programs.run(command, capture_output=True, check=False, timeout=LIMIT)
    return done.returncode == 0 and fragments(node.host, family) == before


def fragments(host: Any, family: int) -> int:
    """How many fragments a host has made."""
    file = {4: "/proc/net/snmp", 6: "/proc/net/snmp6"}[family]
    command = ["ip", "netns", "exec", host.ns, "cat", file]
    done = programs.run(command, capture_output=True, text=True, check=True, timeout=LIMIT)
    if family == 6:
        return int(dict(line.split() for line in done.stdout.splitlines())["Ip6FragCreates"])
    names, values, *_ = (line.split() for line in done.stdout.splitlines() if line[:3] == "Ip:")
    return int(dict(zip(names, values, strict=True))["FragCreates"])


def mtu(host: Any, family: int) -> int:
    return int(host.ip_json(f"link show {DEVICE[family]}")[0]["mtu"])


@pytest.mark.parametrize(("route", "forwarding"), [("default", "kernel"), ("static", "ebpf")])
def test_a_route_s_mtu_lowers_that_of_the_device(
    nodes: Nodes, tmp_path: Path, family: int, route: str, forwarding: str
) -> None:
    """The route carries a peer, which is in another network."""
    near, far = nodes(2)
    path = tmp_path / "subnet.env"
    bits = {4: 24, 6: 64}[family]
    far.host.ip(f"address add {FAR[family]}/{bits} dev eth0{' nodad' * (family == 6)}")
    leases = [near.lease, replaced(far.lease, public_ip=FAR[4], public_ipv6=FAR[6])]
    to = "default" if route == "default" else {4: "198.51.100.0/24", 6: "2001:db8:77::/64"}[family]
    way = f"-{family} route replace {to} dev eth0"
    near.host.ip(way)
    own = near.plane(family, forwarding=forwarding, subnet_file=str(path))
    target = pod_address(family, far.number)
    with far.plane(family, forwarding=forwarding) as dp:
        assert dp.sync(leases).ok
    with own as dp:
        assert dp.sync(leases).ok
        room, less = 1500 - TUNNEL[family], 1400 - TUNNEL[family]
        assert mtu(near.host, family) == room
        wait_until(lambda: passes(near, target, room))

        near.host.ip(f"{way} mtu 1400")
        wait_until(lambda: not passes(near, target, room))
        (planned,) = dp.plan(leases).devices
        assert f"mtu {room} -> {less}" in planned.changes
        assert dp.sync(leases).ok
        assert mtu(near.host, family) == less
        assert f"FLANNEL_MTU={less}\n" in path.read_text()
        wait_until(lambda: passes(near, target, less))
        assert dp.sync(leases).writes == dp.resync().writes == 0
        (known,) = explain_self(dp, leases).families
        assert known.mtu == 1400
        assert any("mtu 1400" in item.says for item in known.evidence)

        near.host.ip(way)
        assert dp.resync().ok
        assert mtu(near.host, family) == room
        assert f"FLANNEL_MTU={room}\n" in path.read_text()


def test_a_route_s_mtu_that_carries_no_peer_changes_nothing(nodes: Nodes, family: int) -> None:
    (near,) = nodes(1)
    near.host.ip(f"-{family} route replace default dev eth0 mtu 1400")
    on_link = replaced(peer(2), public_ip="192.0.2.200", public_ipv6="2001:db8::200")
    with near.plane(family, forwarding="kernel") as dp:
        assert dp.sync([near.lease, on_link]).ok
    assert mtu(near.host, family) == 1500 - TUNNEL[family]


def test_a_path_that_is_too_narrow_for_ipv6_is_named(nodes: Nodes) -> None:
    (near,) = nodes(1)
    near.host.ip("-6 route replace default dev eth0 mtu 1300")
    far = replaced(peer(2), public_ipv6=FAR[6])
    with near.plane(6, forwarding="kernel") as dp, pytest.raises(NotYet) as caught:
        dp.sync([near.lease, far])
    assert "route ::/0 dev eth0 mtu 1300" in str(caught.value)
    assert "leaves 1230 bytes in the tunnel; IPv6 needs 1280" in str(caught.value)
    assert "mtu of that route" in caught.value.hint
