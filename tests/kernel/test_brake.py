"""The brake: additions and changes of a list are applied, removals of nearly all are held."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp import DataPlane, Lease, ShrinkRefused
from flannel_dp.cluster.network import NetworkConfig
from tests.lib.kernel import everything, expected, observed
from tests.lib.leases import (
    HOST_GW,
    lease_of,
    mac,
    near_peer,
    network_config,
    peer,
    peers,
    plane,
    subnet,
)

#: Peers before and after.
HELD = [(1, 0), (2, 0), (3, 0), (3, 1), (11, 1), (30, 14)]
NEAR = range(1, 11)
REMOVED = [(2, 1), (3, 2), (4, 2), (12, 2), (30, 15)]


def key(number: int) -> str:
    return peer(number).key


@pytest.fixture(name="dp")
def dp_fixture(host: Any, family: int) -> Any:
    with plane(host, family) as made:
        yield made


@pytest.mark.parametrize("restarted", [False, True], ids=["same process", "new process"])
@pytest.mark.parametrize(("before", "after"), HELD)
def test_holds_back_removals_and_nothing_else(
    host: Any, family: int, before: int, after: int, restarted: bool
) -> None:
    own, old = lease_of(host), peers(range(1, before + 1))
    listed = peers(range(before - after + 1, before + 1))
    moved = [peer(before, public_ip="198.18.9.9", public_ipv6="2001:db8:1::999")] if after else []
    with plane(host, family) as first:
        first.sync([own, *old])
        with plane(host, family, lock=False) as second:
            dp = second if restarted else first
            with pytest.raises(ShrinkRefused, match=f"{before - after} of {before}") as caught:
                dp.sync([own, *listed[:-1], *moved, peer(60)])

            report = caught.value.report
            kept = [*old[:-1], *(moved or old[-1:]), peer(60)]
            assert observed(host, family) == expected(kept, family)
            assert report.ok
            assert len(report.held[family]) == before - after
            assert not dp.resync().writes  # the state knows what is kept
            host.ip(f"-{family} route del {subnet(family, 1)}")
            assert dp.resync().writes
            assert observed(host, family) == expected(kept, family)
            with pytest.raises(ShrinkRefused):
                dp.sync([own, *moved])
            assert dp.sync([own, *kept]).held == {}
            dp.allow_shrink = True
            assert dp.sync([own]).ok
    assert observed(host, family) == expected([], family)


@pytest.mark.parametrize(("before", "after"), REMOVED)
def test_removes_what_is_not_nearly_all(
    dp: DataPlane, host: Any, family: int, before: int, after: int
) -> None:
    own, old = lease_of(host), peers(range(1, before + 1))
    dp.sync([own, *old])

    assert dp.sync([own, *old[:after]]).ok

    assert observed(host, family) == expected(old[:after], family)


def test_an_empty_list_removes_nothing(host: Any, family: int) -> None:
    with plane(host, family) as dp:
        dp.sync([lease_of(host), peer(1)])
    before = everything(host)

    named = plane(host, family, subnet=subnet(family, 0))
    with named as dp, pytest.raises(ShrinkRefused, match="1 of 1"):
        dp.sync([])

    assert everything(host) == before


def test_a_confirmed_peer_is_removed_and_the_others_are_held(
    dp: DataPlane, host: Any, family: int
) -> None:
    dp.sync([lease_of(host), *peers(range(1, 5))])

    with pytest.raises(ShrinkRefused):
        dp.sync([lease_of(host)], confirmed={family: {key(1), key(2)}})
    assert observed(host, family) == expected(peers([3, 4]), family)

    report = dp.sync([lease_of(host)], confirmed={family: {key(3), key(4)}})
    assert report.ok
    assert observed(host, family) == expected([], family)


def test_keep_holds_back_a_single_removal(host: Any, family: int) -> None:
    with plane(host, family, allow_shrink=True) as dp:
        dp.sync([lease_of(host), *peers(range(1, 9))])

        with pytest.raises(ShrinkRefused, match="1 of 8"):
            dp.sync([lease_of(host), *peers(range(1, 8))], keep=True)

        assert observed(host, family) == expected(peers(range(1, 9)), family)
        assert dp.sync([lease_of(host), *peers(range(1, 9))], keep=True).ok


def taking(old: int, new: int, what: str) -> Lease:
    """Peer ``new`` with something of peer ``old``."""
    fields = {
        "subnet": ("subnet", "ipv6_subnet"),
        "address": ("public_ip", "public_ipv6"),
        "MAC": ("backend_data", "backend_v6_data"),
    }[what]
    return peer(new, **{name: getattr(peer(old), name) for name in fields})


@pytest.mark.parametrize("changed", [False, True], ids=["sync", "update"])
@pytest.mark.parametrize("what", ["subnet", "address", "MAC"])
def test_a_lease_of_the_list_wins_against_a_held_peer(
    dp: DataPlane, host: Any, family: int, what: str, changed: bool
) -> None:
    new = taking(1, 60, what)
    dp.sync([lease_of(host), *peers(range(1, 5))])

    with pytest.raises(ShrinkRefused, match=f"{4 if changed else 3} of 4"):
        dp.sync([lease_of(host), *([] if changed else [new])])
    if changed:
        assert not dp.update(added=[new]).rejected

    assert observed(host, family) == expected([new, *peers([2, 3, 4])], family)
    assert {*dp.brake.held[family]} == {key(n) for n in (2, 3, 4)}
    assert not dp.resync().writes


def test_held_peers_come_back_and_leave_one_by_one(dp: DataPlane, host: Any, family: int) -> None:
    dp.sync([lease_of(host), *peers(range(1, 5))])
    with pytest.raises(ShrinkRefused):
        dp.sync([lease_of(host)])

    assert not dp.update(added=[peer(1)]).writes
    assert {*dp.brake.held[family]} == {key(n) for n in (2, 3, 4)}
    dp.update(removed=[key(2), peer(3)])

    assert {*dp.brake.held[family]} == {key(4)}
    assert observed(host, family) == expected(peers([1, 4]), family)
    assert dp.sync([lease_of(host), peer(1), peer(4)]).writes == 0


def test_a_device_that_is_changed_keeps_held_peers(dp: DataPlane, host: Any, family: int) -> None:
    """A new MAC of the device flushes its neighbours."""
    dp.sync([lease_of(host), *peers(range(1, 5))])
    data = {4: "backend_data", 6: "backend_v6_data"}[family]
    own = peer(0, public_ip=host.ipv4, public_ipv6=host.ipv6, **{data: getattr(peer(99), data)})

    with plane(host, family, lock=False) as other, pytest.raises(ShrinkRefused, match="4 of 4"):
        other.sync([own])

    assert mac(family, 99) in host.ip("-d link show")
    assert observed(host, family) == expected(peers(range(1, 5)), family)


def test_host_gw_keeps_held_peers(host: Any, family: int) -> None:
    config = network_config(family, **HOST_GW)
    options = {"iface": host.iface, "netns": host.ns}
    own = peer(0, public_ip=host.ipv4, public_ipv6=host.ipv6, backend_type="host-gw")
    leases = [near_peer(n, backend_type="host-gw") for n in NEAR]
    with DataPlane(config, **options) as dp:
        assert dp.sync([own, *leases]).ok
    before = everything(host)

    with DataPlane(config, **options) as dp, pytest.raises(ShrinkRefused, match="10 of 10"):
        dp.sync([own])

    assert everything(host) == before


def test_direct_routing_keeps_held_peers(host: Any, family: int) -> None:
    config: NetworkConfig = network_config(family, DirectRouting=True)
    options = {"iface": host.iface, "netns": host.ns}
    leases = [
        *(near_peer(n) for n in NEAR),
        *peers(range(20, 25)),
    ]
    with DataPlane(config, **options) as dp:
        assert dp.sync([lease_of(host), *leases]).ok
    before = everything(host)

    with DataPlane(config, **options) as dp, pytest.raises(ShrinkRefused, match="15 of 15"):
        dp.sync([lease_of(host)])

    assert everything(host) == before


def test_a_plan_tells_what_is_held_back(dp: DataPlane, host: Any, family: int) -> None:
    dp.sync([lease_of(host), *peers(range(1, 5))])

    plan = dp.plan([lease_of(host), peer(60)])

    (said,) = (line for line in plan.warnings if "4 of 4" in line)
    assert f"sync would keep 4 IPv{family} peers, and do all else" in said
    assert "allow_shrink=True to DataPlane" in said
    routes = plan.counts()["route"]
    assert (routes["added"], routes["removed"]) == (1, 0)
    assert dp.brake.held[family] == {}


def test_strays_are_removed_while_peers_are_held(dp: DataPlane, host: Any, family: int) -> None:
    """A route that leads to no peer is no peer's."""
    dp.sync([lease_of(host), *peers(range(1, 5))])
    device = {4: "flannel.1", 6: "flannel-v6.1"}[family]
    host.ip(f"-{family} route add {subnet(family, 77)} dev {device}")

    with pytest.raises(ShrinkRefused, match="4 of 4"):
        dp.sync([lease_of(host)])

    assert observed(host, family) == expected(peers(range(1, 5)), family)


def test_rejected_leases_of_peers_are_told_from_missing_ones(
    dp: DataPlane, host: Any, family: int
) -> None:
    """They are in the list, and the message does not deny it."""
    dp.sync([lease_of(host), *peers(range(1, 5))])
    spoilt = [peer(number, backend_type="host-gw") for number in range(1, 5)]

    with pytest.raises(ShrinkRefused) as caught:
        dp.sync([lease_of(host), *spoilt])

    assert caught.value.message == (
        f"4 of 4 IPv{family} peers are missing from this list of leases, or rejected in it: "
        f"4 IPv{family} peers are kept, and all else is in sync"
    )
    assert observed(host, family) == expected(peers(range(1, 5)), family)


def test_a_list_without_a_change_takes_no_look_at_each_peer(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = [lease_of(host), *peers(range(1, 9))]
    with plane(host, family) as dp:
        assert dp.sync(leases).ok

    with plane(host, family) as dp:
        monkeypatch.setattr(dp.brake, "_in_kernel", None)  # a call would fail
        assert not dp.sync(leases).writes
