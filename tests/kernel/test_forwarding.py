"""Forwarding by a program against a real kernel: nodes with it and nodes without it reach each
other's pods, what is not theirs is dropped, and a sync does with its map what it does elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from flannel_dp import Conflict, DataPlane
from flannel_dp.bpf import loader
from flannel_dp.resources.forwarding.program import Forwarding
from tests.lib.forwarding import Nodes, config, filters, held, reaches, remove_pins, wanted_in_map
from tests.lib.kernel import everything, has_device, ifindex
from tests.lib.leases import PROTOCOL, lease_of, peer, peers, subnet
from tests.lib.traffic import pod_address

OUR_FILTERS = {("egress", 13800, "forward_out"), ("ingress", 13800, "forward_in")}


@pytest.fixture
def dp(host: Any, family: int) -> Iterator[DataPlane]:
    """The data plane of ``host``, of one family."""
    with DataPlane(config(family), iface=host.iface, netns=host.ns) as made:
        yield made
    remove_pins(host)


# ---- tables ---------------------------------------------------------------------------


def test_sync_plan_and_update_work_on_the_map(dp: DataPlane, host: Any, family: int) -> None:
    own, first = lease_of(host), peers(range(1, 31))
    plan = dp.plan([own, *first])
    assert plan.counts()["peer"]["added"] == 30
    assert not has_device(host, family)
    report = dp.sync([own, *first])
    assert report.ok
    assert {kind: row["added"] for kind, row in report.tables.items() if row["added"]} == {
        "peer": 30,
        "neighbour": 1,
        "route": 1,
    }
    assert held(dp, family) == wanted_in_map(first, family)
    device = dp.resolver.device_name(family)
    assert filters(host, device) == OUR_FILTERS
    (shown,) = host.ip_json(f"link show {device}")
    assert shown["linkinfo"]["info_data"]["external"]

    dp.update(added=[peer(40), peer(3, **_moved(family, 99))], removed=["nobody", peer(5)])
    second = [*first[:2], peer(3, **_moved(family, 99)), first[3], *first[5:], peer(40)]
    assert held(dp, family) == wanted_in_map(second, family)
    assert dp.sync([own, *second]).writes == 0

    report = dp.sync([own, *second[:20]])
    assert report.tables["peer"]["removed"] == len(second) - 20
    assert held(dp, family) == wanted_in_map(second[:20], family)


def _moved(family: int, number: int) -> dict[str, str]:
    from tests.lib.leases import endpoint

    return {"public_ip" if family == 4 else "public_ipv6": endpoint(family, number)}


def test_claims_that_meet_are_judged_as_everywhere(dp: DataPlane, host: Any, family: int) -> None:
    """A newcomer with a peer's MAC, and one inside a peer's subnet."""
    own, others = lease_of(host), peers(range(1, 6))
    dp.sync([own, *others])
    data = peer(2)
    twin = peer(7, backend_data=data.backend_data, backend_v6_data=data.backend_v6_data)

    report = dp.update(added=[twin])

    assert [one.reason for one in report.rejected] == ["duplicate-mac"]
    assert held(dp, family) == wanted_in_map(others, family)


def test_drift_is_repaired_by_the_next_look(dp: DataPlane, host: Any, family: int) -> None:
    own, others = lease_of(host), peers(range(1, 11))
    dp.sync([own, *others])
    device = dp.resolver.device_name(family)
    stranger = Forwarding(device, host.ns)
    assert stranger.open_pinned()
    held_map = stranger._maps[f"peers{family}"]
    _, keys, values = held_map.read()
    size = len(keys) // 10
    held_map.delete(keys[:size])
    held_map.update(keys[size : 2 * size], values[24:30] + b"\xff" + values[31:48])
    host.exec("tc", "filter", "del", "dev", device, "egress")
    host.ip(f"-{family} route del {_network(family)} dev {device}")
    host.ip(f"-{family} neigh flush dev {device} nud permanent")

    plan = dp.plan([own, *others])
    assert plan.counts()["peer"]["added"] == plan.counts()["peer"]["replaced"] == 1
    assert plan.devices[0].changes == ("attach the forwarding program (egress)",)
    report = dp.resync()

    assert report.ok
    assert report.devices[0].changes == ("attach the forwarding program (egress)",)
    assert {kind: row["added"] for kind, row in report.tables.items() if row["added"]} == {
        "peer": 1,
        "neighbour": 1,
        "route": 1,
    }
    assert filters(host, device) == OUR_FILTERS
    assert held(dp, family) == wanted_in_map(others, family)
    assert dp.resync().writes == 0


def _network(family: int) -> str:
    from tests.lib.leases import NETWORK

    return NETWORK[family]


def test_a_device_that_vanished_is_made_again(dp: DataPlane, host: Any, family: int) -> None:
    own, others = lease_of(host), peers(range(1, 11))
    dp.sync([own, *others])
    device = dp.resolver.device_name(family)
    host.ip(f"link del {device}")

    report = dp.resync()

    assert report.ok
    assert report.devices[0].action == "create"
    assert report.tables["peer"]["unchanged"] == 10
    assert filters(host, device) == OUR_FILTERS
    assert PROTOCOL in host.ip(f"-{family} route show dev {device}")


def test_pins_that_vanished_are_made_again(host: Any, family: int) -> None:
    """The map that runs is not the one that would be found: all of it is loaded anew."""
    own, others = lease_of(host), peers(range(1, 11))
    make = lambda: DataPlane(config(family), iface=host.iface, netns=host.ns)  # noqa: E731
    with make() as dp:
        dp.sync([own, *others])
        device = dp.resolver.device_name(family)
    found = Forwarding(device, host.ns)
    assert found.open_pinned()
    assert found._directory is not None
    (found._directory / f"forward-peers{family}").unlink()
    found.close()

    with make() as dp:
        report = dp.sync([own, *others])
        assert report.ok
        assert report.tables["peer"]["added"] == 10
        assert held(dp, family) == wanted_in_map(others, family)
        assert dp.sync([own, *others]).writes == 0
    remove_pins(host)


def test_a_full_map_fails_for_those_that_found_no_room(host: Any, family: int) -> None:
    own, others = lease_of(host), peers(range(1, 11))
    with DataPlane(config(family), iface=host.iface, netns=host.ns, room=8) as dp:
        report = dp.sync([own, *others])

    assert not report.ok
    assert report.tables["peer"]["added"] == 8
    assert len(report.failures) == 2
    assert "the map of peers is full" in report.failures[0].message()
    remove_pins(host)


def test_foreign_state_is_untouched_and_clean_leaves_nothing(
    dp: DataPlane, host: Any, family: int
) -> None:
    host.ip("link add d0 type veth peer name d1")
    host.ip("link set d0 up")
    host.exec("tc", "qdisc", "add", "dev", "d0", "clsact")
    before = everything(host)
    dp.sync([lease_of(host), *peers(range(1, 11))])
    device = dp.resolver.device_name(family)

    report = dp.clean()

    assert report.ok
    assert report.tables["peer"]["removed"] == 10
    assert everything(host) == before
    assert not Forwarding(device, host.ns).open_pinned()


def test_a_filter_of_somebody_else_in_our_place_is_a_conflict(
    dp: DataPlane, host: Any, family: int
) -> None:
    own, others = lease_of(host), peers(range(1, 4))
    dp.sync([own, *others])
    device = dp.resolver.device_name(family)
    host.exec("tc", "filter", "del", "dev", device, "egress")
    where = ["dev", device, "egress", "prio", "13800", "protocol", "ip"]
    match = ["u32", "match", "u32", "0", "0", "flowid", "1:1"]
    host.exec("tc", "filter", "add", *where, *match)

    with pytest.raises(Conflict, match="priority 13800"):
        dp.sync([own, *others])

    assert "u32" in host.exec("tc", "filter", "show", "dev", device, "egress")


def test_a_foreign_map_at_our_pin_is_named_and_left(host: Any, family: int) -> None:
    from flannel_dp._core import BpfMap
    from flannel_dp.bpf import pins

    device = "flannel.1" if family == 4 else "flannel-v6.1"
    directory = pins.pin_directory(device, host.ns, create=True)
    theirs = BpfMap.create(1, 4, 4, 1, 0, "theirs")
    theirs.pin(directory / f"forward-peers{family}")
    with (
        DataPlane(config(family), iface=host.iface, netns=host.ns) as dp,
        pytest.raises(Conflict, match=f"forward-peers{family}.*with_forwarding"),
    ):
        dp.sync([lease_of(host), *peers(range(1, 4))])

    assert BpfMap.open(directory / f"forward-peers{family}").id == theirs.id
    assert not has_device(host, family)
    (directory / f"forward-peers{family}").unlink()
    remove_pins(host)


@pytest.mark.parametrize("forwarding", ["kernel", "ebpf"])
def test_clean_leaves_a_foreign_map_and_says_so(host: Any, family: int, forwarding: str) -> None:
    from flannel_dp._core import BpfMap
    from flannel_dp.bpf import pins

    device = "flannel.1" if family == 4 else "flannel-v6.1"
    own, others = lease_of(host), peers(range(1, 4))
    with DataPlane(config(family), iface=host.iface, netns=host.ns) as dp:
        assert dp.sync([own, *others]).ok
    pin = pins.pin_directory(device, host.ns) / f"forward-peers{family}"
    pin.unlink()
    theirs = BpfMap.create(1, 4, 4, 1, 0, "theirs")
    theirs.pin(pin)

    made = config(family, forwarding=forwarding)
    with DataPlane(made, iface=host.iface, netns=host.ns) as dp:
        report = dp.clean()

    assert isinstance(report.problems["program"], Conflict)
    assert not has_device(host, family)
    assert BpfMap.open(pin).id == theirs.id
    assert [path.name for path in pin.parent.iterdir()] == [pin.name]
    pin.unlink()
    remove_pins(host)


def test_a_sync_after_clean_pins_again(dp: DataPlane, host: Any, family: int) -> None:
    own, others = lease_of(host), peers(range(1, 4))
    dp.sync([own, *others])
    dp.clean()

    assert dp.sync([own, *others]).ok

    assert held(dp, family) == wanted_in_map(others, family)


def test_a_route_in_the_networks_place_is_a_conflict(dp: DataPlane, host: Any, family: int) -> None:
    metric = "metric 1024" if family == 6 else ""
    host.ip(f"-{family} route add {_network(family)} dev eth0 proto static {metric}")

    report = dp.sync([lease_of(host), *peers(range(1, 4))])

    assert [wanted.prefix for wanted, _ in report.conflicts] == [_network(family)]
    assert "dev eth0 proto static" in host.ip(f"-{family} route show {_network(family)}")


def test_the_own_subnet_and_the_tunnel_survive(dp: DataPlane, host: Any, family: int) -> None:
    """One route leads the whole network into the tunnel, but for what this node has itself."""
    dp.sync([lease_of(host), *peers(range(1, 4))])
    device = dp.resolver.device_name(family)

    for target in ("198.18.0.1", "192.0.2.77") if family == 4 else ("2001:db8::77",):
        if target.startswith("198"):
            host.ip(f"route add {target}/32 via 192.0.2.250")
        assert f"dev {device}" not in host.ip(f"-{family} route get {target}")
    assert ifindex(host, device)
    assert subnet(family, 0).partition("/")[0] in host.ip(f"-{family} address show dev {device}")


def test_maps_grow_with_the_cluster(host: Any, family: int) -> None:
    """A map has the size of the cluster it was made for; a larger one is filled and attached in
    place of it, and who is attached meanwhile goes on by the old one."""
    own = lease_of(host)
    make = lambda: DataPlane(config(family), iface=host.iface, netns=host.ns)  # noqa: E731
    with make() as dp:
        assert dp.sync([own, *peers(range(1, 11))]).ok
        device = dp.resolver.device_name(family)
        assert dp.sync([own, *peers(range(1, 2001))]).ok
        assert dp.sync([own, *peers(range(1, 2001))]).writes == 0
        assert filters(host, device) == OUR_FILTERS
        assert len(held(dp, family)) == 2000
    with make() as dp:
        assert dp.sync([own, *peers(range(1, 2001))]).writes == 0
    remove_pins(host)


def test_maps_that_cannot_grow_take_what_they_have_room_for(
    dp: DataPlane, host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that gave its privileges away goes on with the maps that it has."""
    own, others = lease_of(host), peers(range(1, 1201))
    assert dp.sync([own, *others[:800]]).ok
    with monkeypatch.context() as patched:
        patched.setattr(loader, "effective", lambda: frozenset({"CAP_NET_ADMIN"}))
        report = dp.sync([own, *others])
        assert report.tables["peer"]["added"] == 224
        assert report.tables["peer"]["failed"] == 176
        assert any("CAP_BPF" in one and "room" in one for one in report.warnings)
        assert wanted_in_map(others[:800], family) < held(dp, family)
        dp.update(removed=[*others[:200]])
        assert len(held(dp, family)) == 824
        assert dp.resync().ok
        assert held(dp, family) == wanted_in_map(others[200:], family)

    assert dp.sync([own, *others]).ok
    assert held(dp, family) == wanted_in_map(others, family)
    assert not any("room" in one for one in dp.sync([own, *others]).warnings)


def test_maps_that_a_change_outgrows_are_made_anew(dp: DataPlane, host: Any, family: int) -> None:
    own, others = lease_of(host), peers(range(1, 1101))
    assert dp.sync([own, *others[:800]]).ok
    report = dp.update(added=others[800:])
    assert len(report.failures) == 76

    assert dp.resync().ok

    assert held(dp, family) == wanted_in_map(others, family)
    assert filters(host, dp.resolver.device_name(family)) == OUR_FILTERS


@pytest.mark.parametrize("outgrown", [False, True], ids=["as-it-was", "outgrown"])
@pytest.mark.parametrize("failing", [4, 6])
def test_a_family_that_fails_is_forwarded_as_before(
    nodes: Nodes, failing: int, outgrown: bool
) -> None:
    """What a new process cannot find out about it was told before."""
    near, far = cluster = nodes(2)
    leases = [node.lease for node in cluster]
    for node in cluster:
        with node.plane(4, 6) as dp:
            assert dp.sync(leases).ok
    half = {"subnet": "", "public_ip": ""} if failing == 4 else {"ipv6_subnet": ""}
    mine = replace(near.lease, **half)
    more = peers(range(20, 1100)) if outgrown else [peer(20)]

    with near.plane(4, 6) as dp:
        report = dp.sync([mine, far.lease, *more])
        assert {*report.family_errors} == {failing}

    for family in (4, 6):
        assert reaches(near.pod, pod_address(family, 2)), family
        assert reaches(far.pod, pod_address(family, 1)), family


def test_more_lengths_than_there_is_room_for_stop_nobody_else(
    dp: DataPlane, host: Any, family: int
) -> None:
    """The program looks for 16: the most common ones, and those that are left out are named."""
    own, others = lease_of(host), peers(range(1, 4))
    field = "subnet" if family == 4 else "ipv6_subnet"
    odd = [
        replace(
            one, **{field: f"10.241.{128 + n}.0/{25 + n}" if n < 8 else f"10.25{n - 8}.0.0/{n + 8}"}
        )
        if family == 4
        else replace(one, **{field: f"fd00:10:{0x1000 + 0x100 * n:x}::/{65 + n}"})
        for n, one in enumerate(peers(range(40, 57 if family == 6 else 50)))
    ]
    forwarding = dp.forwarder.forwarding
    assert forwarding is not None

    def told() -> set[int]:
        packed = forwarding._maps["own"].lookup(bytes(4))
        assert packed is not None
        return {*(packed[-32:-16] if family == 4 else packed[-16:])} - {255}

    assert dp.sync([own, *others]).ok
    report = dp.update(added=odd)
    many = family == 6
    assert ("program" in report.problems) == many
    assert len(told()) == (16 if many else 11)
    assert (24 if family == 4 else 64) in told()
    assert ("program" in dp.sync([own, *others, *odd]).problems) == many

    dp.allow_shrink = True
    report = dp.sync([own, *others])
    assert report.ok
    assert not report.problems
    assert told() == {24 if family == 4 else 64}
