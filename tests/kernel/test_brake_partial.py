"""The brake counts and keeps peers of which the kernel has a part alone, as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flannel_dp import DataPlane, ShrinkRefused, Table
from flannel_dp.cluster.network import network_of
from flannel_dp.tables.scopes import peer_scope
from tests.lib.forwarding import config as ebpf_config
from tests.lib.forwarding import held, remove_pins
from tests.lib.kernel import everything, expected, observed
from tests.lib.leases import (
    DEVICE,
    HOST_GW,
    half,
    lease_of,
    mac,
    near_peer,
    network_config,
    peer,
    peers,
    plane,
    subnet,
)

#: Peers, and how many of them are incomplete: the only one, some, all.
SIZES = [(1, 1), (2, 1), (3, 3)]


def remove_route(host: Any, family: int, number: int) -> None:
    host.ip(f"-{family} route del {subnet(family, number)}")


def take_route(host: Any, family: int, number: int) -> None:
    remove_route(host, family, number)
    host.ip(f"-{family} route add {subnet(family, number)} dev eth0 proto static")


def remove_fdb(host: Any, family: int, number: int) -> None:
    host.exec("bridge", "fdb", "del", mac(family, number), "dev", DEVICE[family])


def remove_neighbour(host: Any, family: int, number: int) -> None:
    address = subnet(family, number).partition("/")[0]
    host.ip(f"-{family} neigh del {address} dev {DEVICE[family]}")


Fault = Callable[[Any, int, int], None]
FAULTS: list[Fault] = [remove_route, take_route, remove_fdb, remove_neighbour]


@pytest.fixture(params=FAULTS, ids=lambda fault: fault.__name__.replace("_", " "), name="spoil")
def spoil_fixture(request: pytest.FixtureRequest) -> Any:
    return request.param


def named(host: Any, family: int, **options: Any) -> DataPlane:
    """A data plane that needs no lease to know this node."""
    return plane(host, family, subnet=subnet(family, 0), **options)


@pytest.mark.parametrize(
    ("spoil", "size", "spoilt"),
    [*((remove_route, *one) for one in SIZES), *((fault, 2, 1) for fault in FAULTS[1:])],
)
def test_an_empty_list_leaves_incomplete_peers_as_they_are(
    host: Any, family: int, spoil: Fault, size: int, spoilt: int
) -> None:
    """Whatever part is missing; and, of one kind of fault, whatever part of the peers has it."""
    with plane(host, family) as dp:
        dp.sync([lease_of(host), *peers(range(1, size + 1))])
    for number in range(1, spoilt + 1):
        spoil(host, family, number)
    before = everything(host)

    with named(host, family) as dp:
        planned = dp.plan([])
        with pytest.raises(ShrinkRefused, match=f"^{size} of {size} IPv{family} peer") as caught:
            dp.sync([])

        assert everything(host) == before
        assert not any(row["removed"] for row in planned.counts().values())
        assert f"({spoilt} of them incomplete: " in caught.value.message
        assert caught.value.report.ok
        assert not dp.resync().writes
        with pytest.raises(ShrinkRefused, match=f"^{size} of {size} "):
            dp.sync([])
    assert everything(host) == before


@pytest.mark.parametrize(("spoil", "size"), [(remove_route, 1), *((fault, 3) for fault in FAULTS)])
def test_an_empty_list_keeps_peers_that_this_process_wanted(
    host: Any, family: int, spoil: Fault, size: int
) -> None:
    """Whatever part of them is missing; and the only one."""
    with named(host, family) as dp:
        dp.sync([lease_of(host), *peers(range(1, size + 1))])
        for number in range(1, size + 1):
            spoil(host, family, number)

        with pytest.raises(ShrinkRefused, match=f"^{size} of {size} "):
            dp.sync([])

        assert {*dp.brake.held[family]} == {peer(n).key for n in range(1, size + 1)}


@pytest.mark.parametrize("changed", [False, True], ids=["sync", "update"])
def test_an_incomplete_peer_that_comes_back_is_completed(
    host: Any, family: int, spoil: Fault, changed: bool
) -> None:
    """With another MAC, and nothing of the old one stays."""
    with plane(host, family) as dp:
        dp.sync([lease_of(host), *peers([1])])
    spoil(host, family, 1)
    data = {4: "backend_data", 6: "backend_v6_data"}[family]
    new = peer(1, **{data: getattr(peer(50), data)})

    with named(host, family) as dp:
        with pytest.raises(ShrinkRefused):
            dp.sync([])
        if spoil is take_route:
            remove_route(host, family, 1)
        if changed:
            dp.update(added=[new])
        else:
            dp.sync([lease_of(host), new])

        assert dp.brake.held.get(family, {}) == {}
        assert observed(host, family) == expected([new], family)
        assert not dp.resync().writes


def test_a_confirmed_removal_removes_incomplete_peers(host: Any, family: int) -> None:
    with plane(host, family) as dp:
        dp.sync([lease_of(host), *peers(range(1, 4))])
    for number, fault in enumerate([remove_route, remove_fdb, remove_neighbour], 1):
        fault(host, family, number)

    with named(host, family) as dp:
        with pytest.raises(ShrinkRefused) as caught:
            dp.sync([])
        names = {family: {*caught.value.report.held[family]}}
        assert dp.sync([], confirmed=names).ok

    assert observed(host, family) == expected([], family)


def test_a_listed_peer_that_is_incomplete_is_not_gone(host: Any, family: int, spoil: Fault) -> None:
    with plane(host, family) as dp:
        dp.sync([lease_of(host), *peers(range(1, 4))])
    spoil(host, family, 1)
    if spoil is take_route:
        remove_route(host, family, 1)

    with plane(host, family) as dp:
        assert dp.sync([lease_of(host), *peers([1, 2])]).ok

    assert observed(host, family) == expected(peers([1, 2]), family)


def test_one_peer_is_missing_in_the_singular(host: Any, family: int) -> None:
    with named(host, family) as dp:
        dp.sync([lease_of(host), peer(1)])

        with pytest.raises(ShrinkRefused) as caught:
            dp.sync([])

    assert caught.value.message == (
        f"1 of 1 IPv{family} peer is missing from this list of leases, or rejected in it: "
        f"1 IPv{family} peer is kept, and all else is in sync"
    )


@pytest.mark.parametrize(("size", "spoilt"), SIZES)
@pytest.mark.parametrize("fault", [remove_route, take_route])
def test_host_gw_keeps_what_is_there(
    host: Any, family: int, fault: Fault, size: int, spoilt: int
) -> None:
    """Of an IPv6 peer without its route nothing is there, as IPv6 has no nexthop objects."""
    config = network_config(family, **HOST_GW)
    options = {"iface": host.iface, "netns": host.ns, "subnet": subnet(family, 0)}
    leases = [near_peer(n, backend_type="host-gw") for n in range(1, size + 1)]
    with DataPlane(config, **options) as dp:
        assert dp.sync(leases).ok
    for number in range(1, spoilt + 1):
        fault(host, family, number)
    before, there = everything(host), size if family == 4 else size - spoilt

    with DataPlane(config, **options) as dp:
        if there:
            with pytest.raises(ShrinkRefused, match=f"^{there} of {there} "):
                dp.sync([])
        else:
            assert dp.sync([]).ok

    assert everything(host) == before


@pytest.fixture(name="pinned")
def pinned_fixture(host: Any) -> Iterator[None]:
    yield
    remove_pins(host)


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize(("size", "spoilt"), SIZES)
@pytest.mark.parametrize("shared", [False, True], ids=["map entries", "the route of all"])
def test_a_program_keeps_what_is_there(
    host: Any, family: int, size: int, spoilt: int, shared: bool
) -> None:
    """A peer without its map entry has its own route, and for IPv4 its nexthop object; without
    the route of all, or with a foreign one in its place, all peers are in the map."""
    config = ebpf_config(family, DirectRouting=True)
    options = {"iface": host.iface, "netns": host.ns, "subnet": subnet(family, 0)}
    with DataPlane(config, **options) as dp:
        assert dp.sync([near_peer(n) for n in range(1, size + 1)]).ok
        if shared:
            route = f"-{family} route", network_of(config, family)
            host.ip(f"{route[0]} del {route[1]}")
            host.ip(f"{route[0]} add {route[1]} dev eth0 proto static")
        else:
            forget_in_map(dp, family, [subnet(family, n) for n in range(1, spoilt + 1)])
    before, left = everything(host), {*range(1, size + 1)} - {*range(1, spoilt + 1)}
    listed = [near_peer(n) for n in (range(1, size + 1) if shared else left)]

    with DataPlane(config, **options) as dp:
        with pytest.raises(ShrinkRefused, match=f"^{size} of {size} ") as caught:
            dp.sync([])
        assert ("incomplete" in caught.value.message) is not shared
        assert held(dp, family) == {half(lease, family) for lease in listed}
        assert not dp.resync().writes

    assert everything(host) == before


def forget_in_map(dp: DataPlane, family: int, prefixes: list[str]) -> None:
    """Remove peers from the program's map."""
    scope = peer_scope(dp.forwarder.maps(family), family)
    rest = Table("peer")
    for one in dp.kernel.read("peer", scope):
        if one.prefix not in prefixes:
            rest.add(one)
    dp.kernel.apply(dp.kernel.diff(rest, scope))
