"""What ``explain`` says of an address, against a real kernel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from flannel_dp import ConfigError, DataPlane, NetworkConfig
from flannel_dp.command.cli import main
from flannel_dp.kernel.links import LinkReader
from flannel_dp.look.explain import explain
from flannel_dp.look.explanation import Explanation, Owner, Step, holds
from tests.lib.kernel import everything, stranger
from tests.lib.leases import DEVICE, replaced
from tests.lib.one_family import config, endpoint, gateway, lease, leases, node_mac, pod, subnet

CHAIN = {
    4: ["device", "route", "nexthop", "neighbour", "fdb", "packet"],
    6: ["device", "route", "neighbour", "fdb", "packet"],
}


@pytest.fixture
def synced(host: Any, family: int) -> Iterator[DataPlane]:
    """Node 1, which has synced itself and two peers, 2 and 3."""
    with DataPlane(config(family), iface="eth0", netns=host.ns) as made:
        made.sync(leases(family, 1, 2, 3))
        everything(host)  # the kernel has made the local routes
        yield made


@pytest.fixture
def fresh(synced: DataPlane, host: Any, family: int) -> Iterator[DataPlane]:
    """A second process on node 1, which knows of no leases."""
    with DataPlane(config(family), iface="eth0", netns=host.ns) as made:
        yield made


def step(explanation: Explanation, name: str) -> Step:
    (found,) = (one for one in explanation.steps if one.name == name)
    return found


def wrong(explanation: Explanation) -> list[str]:
    return [one.name for one in explanation.steps if not one.ok]


def test_pod_of_a_peer(synced: DataPlane, host: Any, family: int) -> None:
    found = synced.explain(pod(family, 2))

    assert (found.verdict, found.way, found.ok, found.family) == ("peer", "tunnel", True, family)
    assert found.lease == Owner("node2", subnet(family, 2), endpoint(family, 2), node_mac(2))
    assert [one.name for one in found.steps] == ["lease", *CHAIN[family]]
    assert step(found, "neighbour").held == f"{gateway(family, 2)} lladdr {node_mac(2)}"
    assert step(found, "fdb").held == f"{node_mac(2)} dst {endpoint(family, 2)}"
    far = endpoint(family, 2) if family == 4 else f"[{endpoint(family, 2)}]"
    assert step(found, "packet").held.startswith(f"{host.underlay(family)} -> {far}:8472 vni 1, ")
    text = str(found)
    assert text.startswith(f"{pod(family, 2)}: it is in {subnet(family, 2)} of lease node2 ")
    assert "wrong" not in text
    assert text.endswith("\npath: tunnel (into the vxlan device)")


def test_without_leases_the_kernel_is_enough(fresh: DataPlane, family: int) -> None:
    found = fresh.explain(pod(family, 2))

    assert (found.verdict, found.way, found.ok) == ("peer", "tunnel", True)
    assert found.lease == Owner("", subnet(family, 2), endpoint(family, 2), node_mac(2))
    assert [one.name for one in found.steps] == CHAIN[family]


def test_leases_given_count_more_than_those_of_the_last_sync(
    synced: DataPlane, family: int
) -> None:
    found = explain(synced, pod(family, 5), leases(family, 1, 5))

    assert found.lease is not None
    assert found.lease.name == "node5"
    assert wrong(found) == ["route", "neighbour", "fdb"]
    assert step(found, "route").text == "there is no route: run 'flannel-dp sync'"


@pytest.mark.parametrize("known", [True, False], ids=["leases", "kernel"])
def test_missing_neighbour(
    synced: DataPlane, fresh: DataPlane, host: Any, family: int, known: bool
) -> None:
    host.ip(f"neigh del {gateway(family, 2)} dev {DEVICE[family]}")

    found = (synced if known else fresh).explain(pod(family, 2))

    assert wrong(found) == ["neighbour"]
    assert step(found, "neighbour").text == "it is missing: run 'flannel-dp sync'"
    assert "  wrong  neighbour" in str(found)


def test_changed_mac(synced: DataPlane, host: Any, family: int) -> None:
    host.ip(f"neigh replace {gateway(family, 2)} lladdr {node_mac(9)} dev {DEVICE[family]}")

    found = synced.explain(pod(family, 2))

    assert wrong(found) == ["neighbour", "fdb"]
    assert step(found, "neighbour").wanted == f"{gateway(family, 2)} lladdr {node_mac(2)}"
    assert step(found, "neighbour").text.startswith("it is not the one of the lease")


@pytest.mark.parametrize("known", [True, False], ids=["leases", "kernel"])
def test_missing_fdb_entry(
    synced: DataPlane, fresh: DataPlane, host: Any, family: int, known: bool
) -> None:
    host.bridge(f"fdb del {node_mac(2)} dev {DEVICE[family]}")

    found = (synced if known else fresh).explain(pod(family, 2))

    assert wrong(found) == ["fdb"]
    assert "packet" not in [one.name for one in found.steps]


def test_changed_endpoint(synced: DataPlane, host: Any, family: int) -> None:
    far = endpoint(family, 66)
    host.bridge(f"fdb replace {node_mac(2)} dst {far} dev {DEVICE[family]}")

    found = synced.explain(pod(family, 2))

    assert wrong(found) == ["fdb"]
    assert step(found, "fdb").held == f"{node_mac(2)} dst {far}"
    assert far in step(found, "packet").held


@pytest.mark.parametrize("known", [True, False], ids=["leases", "kernel"])
def test_foreign_route_in_the_way(
    synced: DataPlane, fresh: DataPlane, host: Any, family: int, known: bool
) -> None:
    narrow = "10.244.2.0/25" if family == 4 else "fd00:10:244:2::/65"
    host.ip(f"route add {narrow} via {endpoint(family, 9)} dev eth0 proto static")

    found = (synced if known else fresh).explain(pod(family, 2))

    assert found.way == "direct"
    assert wrong(found) == ["route"]
    assert step(found, "route").held == (
        f"{narrow} via {endpoint(family, 9)} dev eth0 proto static"
    )
    assert f"ip route del {narrow} dev eth0" in step(found, "route").text


def test_missing_route_under_a_default_route(synced: DataPlane, host: Any, family: int) -> None:
    host.ip(f"-{family} route add default via {endpoint(family, 9)} dev eth0")
    host.ip(f"route del {subnet(family, 2)}")

    found = synced.explain(pod(family, 2))

    assert (found.way, wrong(found)) == ("direct", ["route"])
    assert step(found, "route").text == "the route is missing or wrong: run 'flannel-dp sync'"


def test_route_through_another_peer(synced: DataPlane, host: Any, family: int) -> None:
    """Somebody's route to half of the subnet leads to the wrong node."""
    half = "10.244.2.0/25" if family == 4 else "fd00:10:244:2::/65"
    host.ip(f"route add {half} via {gateway(family, 3)} dev {DEVICE[family]} onlink")

    found = synced.explain(pod(family, 2))

    assert found.way == "tunnel"
    assert wrong(found)[0] == "route"
    assert step(found, "route").text.startswith("the packet takes a route to another prefix")


def test_route_of_flanneld_is_told_apart(synced: DataPlane, host: Any, family: int) -> None:
    prefix, via = subnet(family, 2), gateway(family, 2)
    host.ip(f"route del {prefix}")
    host.ip(f"route add {prefix} via {via} dev {DEVICE[family]} onlink")

    found = synced.explain(pod(family, 2))

    assert found.ok
    assert step(found, "route").held.endswith(" proto boot")
    assert step(found, "route").text == "written by another program; a sync takes it over"


def test_device_down_and_gone(synced: DataPlane, host: Any, family: int) -> None:
    host.ip(f"link set {DEVICE[family]} down")
    down = synced.explain(pod(family, 2))
    host.ip(f"link delete {DEVICE[family]}")
    gone = synced.explain(pod(family, 2))

    assert wrong(down)[:2] == ["device", "route"]
    assert "it is down" in step(down, "device").text
    assert wrong(gone) == ["device", "route"]
    assert step(gone, "device").held == ""
    assert gone.way == "none"


def test_underlay_without_a_route(host: Any, family: int) -> None:
    far = "198.51.100.2" if family == 4 else "2001:db8:9::2"
    one = lease(family, 2)
    moved = replaced(one, **{"public_ip" if family == 4 else "public_ipv6": far})
    with DataPlane(config(family), iface="eth0", netns=host.ns) as dataplane:
        dataplane.sync([lease(family, 1), moved])

        found = dataplane.explain(pod(family, 2))

    assert wrong(found) == ["packet"]
    assert step(found, "packet").text.startswith(f"the underlay has no route to {far}")


def test_tunnel_that_runs_through_itself(synced: DataPlane, host: Any, family: int) -> None:
    bits = 32 if family == 4 else 128
    host.ip(
        f"route add {endpoint(family, 2)}/{bits} via {gateway(family, 2)} "
        f"dev {DEVICE[family]} onlink"
    )

    inner, outer = synced.explain(pod(family, 2)), synced.explain(endpoint(family, 2))

    assert wrong(inner) == ["packet"]
    assert "runs through itself" in step(inner, "packet").text
    assert (outer.verdict, outer.way, wrong(outer)) == ("peer-endpoint", "tunnel", ["route"])


@pytest.mark.parametrize("known", [True, False], ids=["leases", "kernel"])
def test_public_address_of_a_peer(
    synced: DataPlane, fresh: DataPlane, family: int, known: bool
) -> None:
    found = (synced if known else fresh).explain(endpoint(family, 2))

    assert (found.verdict, found.way, found.ok) == ("peer-endpoint", "direct", True)
    assert found.lease is not None
    assert found.lease.name == ("node2" if known else "")
    assert found.lease.mac == node_mac(2)


@pytest.mark.parametrize("known", [True, False], ids=["leases", "kernel"])
def test_own_addresses(
    synced: DataPlane, fresh: DataPlane, host: Any, family: int, known: bool
) -> None:
    dataplane = synced if known else fresh
    for address in (host.underlay(family), gateway(family, 1)):
        found = dataplane.explain(address)

        assert (found.verdict, found.way, found.ok) == ("own-address", "local", True)


@pytest.mark.parametrize("known", [True, False], ids=["leases", "kernel"])
def test_own_subnet(
    synced: DataPlane, fresh: DataPlane, host: Any, family: int, known: bool
) -> None:
    dataplane = synced if known else fresh
    without = dataplane.explain(pod(family, 1))
    host.ip("link add cni0 up type bridge")
    first = "10.244.1.1/24" if family == 4 else "fd00:10:244:1::1/64"
    host.ip(f"address add {first} dev cni0 {'nodad' if family == 6 else ''}")

    found = dataplane.explain(pod(family, 1))

    assert (without.verdict, without.way, without.ok) == ("own-subnet", "none", True)
    assert "CNI plugin" in step(without, "route").text
    assert (found.verdict, found.way, found.ok) == ("own-subnet", "direct", True)
    assert step(found, "route").held == f"{subnet(family, 1)} dev cni0 proto kernel"
    assert subnet(family, 1) in found.summary


def test_own_subnet_in_the_tunnel_is_wrong(synced: DataPlane, host: Any, family: int) -> None:
    host.ip(f"route add {subnet(family, 1)} via {gateway(family, 3)} dev {DEVICE[family]} onlink")

    found = synced.explain(pod(family, 1))

    assert (found.verdict, found.way, wrong(found)) == ("own-subnet", "tunnel", ["route"])


def test_refused_lease(synced: DataPlane, family: int) -> None:
    bad = lease(family, 7, kind="host-gw")

    found = explain(synced, pod(family, 7), [*leases(family, 1, 2), bad])

    assert (found.verdict, found.way, found.ok) == ("refused", "none", True)
    assert found.lease is not None
    assert found.lease.name == "node7"
    assert "rejected: wrong-backend: " in found.summary
    assert found.lease.mac == ""


def test_refused_lease_that_still_has_a_route(synced: DataPlane, family: int) -> None:
    """It was believed in the last sync and is not any more."""
    found = explain(synced, pod(family, 2), [lease(family, 1), lease(family, 2, kind="host-gw")])

    assert (found.verdict, found.way, wrong(found)) == ("refused", "tunnel", ["route"])
    assert "run 'flannel-dp sync'" in step(found, "route").text


def test_address_in_no_lease(synced: DataPlane, fresh: DataPlane, family: int) -> None:
    stale = explain(synced, pod(family, 3), leases(family, 1, 2))

    assert synced.explain(pod(family, 200)).verdict == "unclaimed"
    assert fresh.explain(pod(family, 200)).verdict == "unknown"
    assert (stale.verdict, stale.way, wrong(stale)) == ("unclaimed", "tunnel", ["route"])


@pytest.mark.parametrize("known", [True, False], ids=["leases", "kernel"])
def test_outside_the_network(synced: DataPlane, fresh: DataPlane, family: int, known: bool) -> None:
    address = "203.0.113.9" if family == 4 else "2001:db8:77::9"

    found = (synced if known else fresh).explain(address)

    assert (found.verdict, found.way, found.ok) == ("outside-network", "none", True)
    assert found.lease is None


def test_other_family_is_switched_off(synced: DataPlane, family: int) -> None:
    found = synced.explain(pod(10 - family, 2))

    assert found.verdict == "outside-network"
    assert f"IPv{10 - family} is switched off" in found.summary


def test_family_that_the_leases_cannot_be_used_for(host: Any) -> None:
    both = NetworkConfig.from_json(
        '{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48",'
        ' "Backend": {"Type": "vxlan"}}'
    )
    with DataPlane(both, iface="eth0", netns=host.ns) as dataplane:
        found = explain(dataplane, pod(6, 2), leases(4, 1, 2))

    assert wrong(found)[0] == "leases"
    assert "no lease was published with 2001:db8::" in step(found, "leases").text


@pytest.mark.parametrize(
    "text", ["", "banana", "10.244.2.0/24", "10.244.2", "fe80::1%eth0", "[::1]:80", "10.244.2.1 "]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with DataPlane(config(4)) as dataplane, pytest.raises(ConfigError) as caught:
        dataplane.explain(text)

    assert repr(text) in caught.value.message
    assert caught.value.hint


def test_direct_peer(host: Any, family: int) -> None:
    with DataPlane(config(family, DirectRouting=True), iface="eth0", netns=host.ns) as dataplane:
        dataplane.sync(leases(family, 1, 2))
        found = dataplane.explain(pod(family, 2))
        host.ip(f"route del {subnet(family, 2)}")
        lost = dataplane.explain(pod(family, 2))
        via = f"via {gateway(family, 2)} dev {DEVICE[family]} onlink"
        host.ip(f"route add {subnet(family, 2)} {via}")
        tunnelled = dataplane.explain(pod(family, 2))

    assert (found.way, found.ok) == ("direct", True)
    assert f"via {endpoint(family, 2)} dev eth0" in step(found, "route").held
    assert (lost.way, wrong(lost)) == ("none", ["route"])
    assert (tunnelled.way, wrong(tunnelled)) == ("tunnel", ["route"])
    assert "goes through the tunnel, and need not" in step(tunnelled, "route").text


def test_host_gw(host: Any, family: int) -> None:
    cluster = leases(family, 1, 2, kind="host-gw")
    settings = config(family, Type="host-gw")
    with DataPlane(settings, iface="eth0", netns=host.ns) as dataplane:
        dataplane.sync(cluster)
        known = dataplane.explain(pod(family, 2))
    with DataPlane(settings, iface="eth0", netns=host.ns) as other:
        alone = other.explain(pod(family, 2))

    assert (known.verdict, known.way, known.ok) == ("peer", "direct", True)
    assert (alone.verdict, alone.way, alone.ok) == ("peer", "direct", True)
    assert alone.lease == Owner("", subnet(family, 2), endpoint(family, 2))


def test_nothing_is_written(fresh: DataPlane, family: int) -> None:
    for address in (pod(family, 2), pod(family, 200), endpoint(family, 2)):
        explain(fresh, address, leases(family, 1, 2, 3, 4))

    assert fresh.kernel.channel.batches_sent == 0


def test_command_prints_the_same(
    synced: DataPlane, host: Any, family: int, tmp_path: Any, capsys: Any
) -> None:
    conf, cluster = tmp_path / "net-conf.json", tmp_path / "leases.json"
    conf.write_text(config(family).to_json())
    listed = ",".join(one.to_json() for one in leases(family, 1, 2, 3))
    cluster.write_text(f'{{"leases": [{listed}]}}')
    flags = ["--netns", host.ns, "--net-conf", str(conf), "--leases", str(cluster)]
    address = pod(family, 2)

    assert main(["explain", address, *flags, "--iface", "eth0"]) == 0
    assert capsys.readouterr().out == f"{synced.explain(address)}\n"
    assert main(["explain", address, *flags, "--iface", "eth0", "--output", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(json.dumps(synced.explain(address).to_json()))
    assert (document["schema"], document["ok"], document["verdict"]) == (1, True, "peer")


def test_route_match_says_what_iproute2_says(synced: DataPlane, host: Any, family: int) -> None:
    for address in (pod(family, 2), endpoint(family, 9), host.underlay(family)):
        (shown,) = host.ip_json(f"route get fibmatch {address}")
        with LinkReader(host.ns) as fib:
            match = fib.route_match(address)

        assert match is not None
        plain = {match.prefix, match.prefix.removesuffix("/32").removesuffix("/128")}
        assert shown["dst"] in plain
        assert match.device_name == shown["dev"]
        assert match.gateway == shown.get("gateway", "")
        assert match.nexthop == shown.get("nhid", 0)
        assert match.local == (shown["type"] == "local")


def test_route_match_is_none_where_a_route_refuses(host: Any, family: int) -> None:
    for kind in ("blackhole", "unreachable", "prohibit"):
        host.ip(f"-{family} route replace {kind} {subnet(family, 9)}")

        with LinkReader(host.ns) as fib:
            assert fib.route_match(pod(family, 9)) is None


@pytest.mark.parametrize(
    ("prefix", "address", "inside"),
    [
        ("10.244.2.0/24", "10.244.2.255", True),
        ("10.244.2.0/24", "10.244.3.0", False),
        ("0.0.0.0/0", "203.0.113.1", True),
        ("0.0.0.0/0", "2001:db8::1", False),
        ("fd00::/128", "fd00::", True),
        ("fd00::/127", "fd00::2", False),
    ],
)
def test_holds(prefix: str, address: str, inside: bool) -> None:
    assert holds(prefix, address) is inside


# ---- policy rules before the first pod has a device ------------------------------------------


def test_a_rule_that_drops_packets_of_pods(
    synced: DataPlane, fresh: DataPlane, host: Any, family: int
) -> None:
    """Then no device has an address of the subnet that the kernel could be asked about."""
    ip = {4: "ip", 6: "ip -6"}[family]
    host.ip(f"-{family} rule add pref 100 from {subnet(family, 1)} blackhole")
    for plane in (synced, fresh):
        found = plane.explain(pod(family, 2))
        route = step(found, "route")
        assert (found.way, found.ok, route.held, route.ok) == ("none", False, "", False)
        assert route.wanted.startswith(f"{subnet(family, 2)} via ")
        assert f"(from {subnet(family, 1)} blackhole) drops packets of pods" in route.text
        assert f"'{ip} rule del pref 100' removes it" in route.text

    host.ip(f"-{family} rule del pref 100")
    assert synced.explain(pod(family, 2)).way == "tunnel"


def test_a_rule_that_diverts_packets_of_pods(synced: DataPlane, host: Any, family: int) -> None:
    stranger(host, "tun0")
    host.ip(f"-{family} rule add pref 100 from {subnet(family, 1)} lookup 52")
    host.ip(f"-{family} route add default dev tun0 table 52")

    found = synced.explain(pod(family, 2))

    route = step(found, "route")
    assert (found.way, route.ok) == ("direct", False)
    assert "dev tun0" in route.held
    assert "diverts packets of pods" in route.text
    assert route.wanted not in ("", route.held)
