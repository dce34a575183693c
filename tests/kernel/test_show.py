"""What ``show`` reads back from a real kernel, with and without leases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from flannel_dp import DataPlane, NetworkConfig
from flannel_dp.command.cli import main
from flannel_dp.look.show import FamilyView, Overview, PeerView, show
from flannel_dp.tables.entries import Fdb, Neighbour, Nexthop, Route
from tests.lib.leases import DEVICE, replaced
from tests.lib.one_family import config, endpoint, gateway, lease, leases, node_mac, subnet


def only(overview: Overview) -> FamilyView:
    (view,) = overview.families
    return view


def by_subnet(view: FamilyView) -> dict[str, PeerView]:
    return {peer.subnet: peer for peer in view.peers}


@pytest.fixture
def dataplane(host: Any, family: int) -> Iterator[DataPlane]:
    """A node that is in sync with itself (1) and three peers (2, 3, 4)."""
    with DataPlane(config(family), iface="eth0", netns=host.ns) as made:
        made.sync(leases(family, 1, 2, 3, 4))
        yield made


def test_before_the_first_sync(host: Any, family: int) -> None:
    with DataPlane(config(family), iface="eth0", netns=host.ns) as dataplane:
        overview = show(dataplane)

    view = only(overview)
    assert view.device is not None
    assert (view.device.index, view.peers, view.strays) == (0, (), ())
    assert str(overview) == (
        f"{DEVICE[family]}: there is no such device; 'flannel-dp sync' makes it"
    )


def test_peers_in_order_and_complete(dataplane: DataPlane, family: int) -> None:
    overview = show(dataplane)

    view = only(overview)
    assert view.strays == ()
    assert list(view.peers) == [
        PeerView(
            subnet(family, number),
            gateway(family, number),
            node_mac(number),
            endpoint(family, number),
        )
        for number in (2, 3, 4)
    ]
    assert str(overview).endswith("  3 peers, 0 out of sync")


def test_device_line(dataplane: DataPlane, host: Any, family: int) -> None:
    device = only(show(dataplane)).device

    bits = 32 if family == 4 else 128
    assert str(device) == (
        f"{DEVICE[family]}: up, vni 1 port 8472, local {host.underlay(family)} dev eth0, "
        f"mtu {1450 if family == 4 else 1430}, mac {node_mac(1)}, "
        f"address {gateway(family, 1)}/{bits}"
    )


def test_device_problems(dataplane: DataPlane, host: Any, family: int) -> None:
    name = DEVICE[family]
    host.ip(f"link set {name} down")
    down = only(show(dataplane)).device
    host.ip(f"link delete {name}")
    host.ip(f"link add {name} type bridge")
    other = only(show(dataplane)).device

    assert down is not None
    assert other is not None
    assert (down.up, down.problem[:10]) == (False, "it is down")
    assert (other.index, other.problem) == (0, "it is a bridge, not a vxlan device")


def test_wrong_vni_is_said(host: Any, family: int) -> None:
    local = host.underlay(family)
    host.ip(f"link add {DEVICE[family]} up type vxlan id 7 local {local} dev eth0 dstport 8472")
    with DataPlane(config(family), iface="eth0", netns=host.ns) as dataplane:
        device = only(show(dataplane)).device

    assert device is not None
    assert device.problem == "its VNI is not 1"


def break_everything(host: Any, family: int) -> None:
    """Peer 2 loses its neighbour, 3 its FDB entry; 4 goes elsewhere; strangers come in."""
    name = DEVICE[family]
    host.ip(f"neigh del {gateway(family, 2)} dev {name}")
    host.bridge(f"fdb del {node_mac(3)} dev {name}")
    host.bridge(f"fdb replace {node_mac(4)} dst {endpoint(family, 66)} dev {name}")
    host.bridge(f"fdb append {node_mac(77)} dst {endpoint(family, 77)} dev {name}")
    host.ip(f"neigh add {gateway(family, 78)} lladdr {node_mac(78)} nud permanent dev {name}")
    host.ip(f"route add {subnet(family, 79)} via {gateway(family, 4)} dev {name} onlink")
    host.ip(f"route add {subnet(family, 80)} dev {name}")


def test_what_is_wrong_is_named(dataplane: DataPlane, host: Any, family: int) -> None:
    break_everything(host, family)

    view = only(show(dataplane))

    states = {name: (peer.state, peer.detail) for name, peer in by_subnet(view).items()}
    assert states == {
        subnet(family, 2): ("no neighbour", ""),
        subnet(family, 3): ("no fdb", ""),
        subnet(family, 4): ("ok", ""),
        subnet(family, 79): ("foreign", "proto boot"),
        subnet(family, 80): ("no gateway", "proto boot"),
    }
    assert by_subnet(view)[subnet(family, 4)].endpoint == endpoint(family, 66)
    assert {(type(one), getattr(one, "mac", "")) for one in view.strays} == {
        (Fdb, node_mac(2)),
        (Fdb, node_mac(77)),
        (Neighbour, node_mac(78)),
    }


def test_leases_add_names_and_differences(dataplane: DataPlane, host: Any, family: int) -> None:
    break_everything(host, family)
    bad = lease(family, 9, kind="host-gw")

    overview = show(dataplane, [*leases(family, 1, 2, 3, 4, 5), bad])

    found = {
        name: (peer.lease, peer.state, peer.difference)
        for name, peer in by_subnet(only(overview)).items()
    }
    assert found[subnet(family, 2)] == (
        "node2",
        "no neighbour",
        f"add neighbour lladdr {node_mac(2)}",
    )
    assert found[subnet(family, 3)][2] == f"add fdb dst {endpoint(family, 3)}"
    assert found[subnet(family, 4)] == ("node4", "ok", f"change fdb dst {endpoint(family, 4)}")
    assert found[subnet(family, 79)][2] == "no lease: sync removes it"
    lost = found[subnet(family, 5)]
    assert lost[:2] == ("node5", "missing")
    assert "add neighbour" in lost[2]
    assert "add route" in lost[2]
    assert [(one.lease, str(one.reason)) for one in overview.rejected] == [
        ("node9", "wrong-backend")
    ]
    text = str(overview)
    assert "LEASE" in text
    assert "rejected leases (1):" in text


def test_in_sync_there_is_no_difference(dataplane: DataPlane, family: int) -> None:
    overview = show(dataplane, leases(family, 1, 2, 3, 4))

    assert {(peer.state, peer.difference) for peer in only(overview).peers} == {("ok", "")}


def test_after_a_sync_all_is_in_order_again(dataplane: DataPlane, host: Any, family: int) -> None:
    break_everything(host, family)
    dataplane.sync(leases(family, 1, 2, 3, 4))

    view = only(show(dataplane))

    assert [peer.state for peer in view.peers] == ["ok"] * 3
    assert view.strays == ()


def test_leftover_of_ours_on_another_device(dataplane: DataPlane, host: Any, family: int) -> None:
    via = endpoint(family, 9)
    host.ip(f"route add {subnet(family, 9)} via {via} dev eth0 proto 138")
    host.ip(f"route add {subnet(family, 10)} via {via} dev eth0 proto static")

    view = only(show(dataplane))

    assert [(type(one), one.prefix) for one in view.strays if isinstance(one, Route)] == [
        (Route, subnet(family, 9))
    ]
    assert len(view.peers) == 3


def test_unused_nexthop_of_ours(host: Any) -> None:
    with DataPlane(config(4), iface="eth0", netns=host.ns) as dataplane:
        dataplane.sync(leases(4, 1, 2))
        free = 0x50000000 | 0x0AF40900
        host.ip(f"nexthop add id {free} via 10.244.9.0 dev flannel.1 onlink proto 138")
        host.ip("nexthop add id 77 via 192.0.2.9 dev eth0")

        view = only(show(dataplane))

    assert [one.id for one in view.strays if isinstance(one, Nexthop)] == [free]
    assert len(view.strays) == 1


def test_direct_routes(host: Any, family: int) -> None:
    with DataPlane(config(family, DirectRouting=True), iface="eth0", netns=host.ns) as dataplane:
        dataplane.sync(leases(family, 1, 2))

        overview = show(dataplane, leases(family, 1, 2))

    (peer,) = only(overview).peers
    assert (peer.way, peer.via, peer.endpoint, peer.mac, peer.state, peer.difference) == (
        "direct",
        endpoint(family, 2),
        endpoint(family, 2),
        "",
        "ok",
        "",
    )
    assert "ok (direct)" in str(overview)


def test_host_gw(host: Any, family: int) -> None:
    far = lease(family, 3, kind="host-gw")
    address = "198.51.100.3" if family == 4 else "2001:db8:9::3"
    moved = replaced(far, **{"public_ip" if family == 4 else "public_ipv6": address})
    cluster = [*leases(family, 1, 2, kind="host-gw"), moved]
    with DataPlane(config(family, Type="host-gw"), iface="eth0", netns=host.ns) as dataplane:
        dataplane.sync(cluster)

        alone, overview = show(dataplane), show(dataplane, cluster)

    assert only(alone).device is None
    assert [(peer.way, peer.state) for peer in only(alone).peers] == [("direct", "ok")]
    near, lost = only(overview).peers
    assert (near.difference, near.lease) == ("", "node2")
    assert (lost.state, lost.difference) == (
        "missing",
        f"host-gw cannot reach {address}: it is not on-link",
    )
    assert str(alone).startswith(f"host-gw: direct IPv{family} routes, no device\n")


def test_family_that_cannot_be_says_why(host: Any) -> None:
    both = NetworkConfig.from_json(
        '{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48",'
        ' "Backend": {"Type": "vxlan"}}'
    )
    with DataPlane(both, iface="eth0", netns=host.ns) as dataplane:
        four, six = show(dataplane, leases(4, 1, 2)).families

    assert four.error == ""
    assert "no lease was published with 2001:db8::" in six.error


def test_nothing_is_written(dataplane: DataPlane, host: Any, family: int) -> None:
    break_everything(host, family)
    dataplane.kernel.close()
    with DataPlane(config(family), iface="eth0", netns=host.ns) as other:
        show(other)
        show(other, leases(family, 1, 2, 3, 4, 5))

        assert other.kernel.channel.batches_sent == 0


def test_command_prints_the_same(
    dataplane: DataPlane, host: Any, family: int, tmp_path: Any, capsys: Any
) -> None:
    conf = tmp_path / "net-conf.json"
    conf.write_text(config(family).to_json())
    flags = ["show", "--netns", host.ns, "--net-conf", str(conf), "--iface", "eth0"]

    assert main(flags) == 0
    assert capsys.readouterr().out == f"{show(dataplane)}\n"
    assert main([*flags, "--output", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(json.dumps(show(dataplane).to_json()))
    assert document["schema"] == 1
    assert set(document["families"][0]["peers"][0]) == {
        "subnet", "via", "mac", "endpoint", "state", "detail", "way", "mtu",
    }  # fmt: skip
    cluster = tmp_path / "leases.json"
    listed = ",".join(one.to_json() for one in leases(family, 1, 2, 3, 4, 5))
    cluster.write_text(f'{{"leases": [{listed}]}}')
    assert main([*flags, "--leases", str(cluster), "--output", "json"]) == 0
    peers = json.loads(capsys.readouterr().out)["families"][0]["peers"]
    assert [peer["lease"] for peer in peers] == ["node2", "node3", "node4", "node5"]
