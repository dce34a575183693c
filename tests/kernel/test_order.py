"""In which order the kernel hears of a change: no packet ever meets half of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from flannel_dp import BackendData
from tests.lib.kernel import observed
from tests.lib.leases import address, endpoint, lease_of, mac, peer, peers, plane, subnet
from tests.lib.monitor import Monitor

MOVED = 3


class Moment(NamedTuple):
    table: str
    deleted: bool
    key: str


def renewed(number: int, like: int) -> Any:
    """Node ``number`` with the MACs of node ``like``."""
    return peer(
        number,
        backend_data=BackendData(1, mac(4, like)),
        backend_v6_data=BackendData(1, mac(6, like)),
    )


def moments(monitor: Monitor) -> list[Moment]:
    return [Moment(event.table, event.deleted, event.key) for event in monitor.events()]


@pytest.mark.parametrize("how", ["sync", "update"])
def test_a_new_mac_is_in_the_fdb_before_the_neighbour_names_it(
    host: Any, family: int, how: str
) -> None:
    leases = [lease_of(host), *peers(range(1, 6))]
    after = [lease for lease in leases if lease.subnet != subnet(4, MOVED)]
    after.append(renewed(MOVED, 77))
    with plane(host, family) as dp:
        dp.sync(leases)
        with Monitor(host) as monitor:
            report = dp.sync(after) if how == "sync" else dp.update(added=[renewed(MOVED, 77)])
            seen = moments(monitor)

    known = seen.index(Moment("fdb", False, mac(family, 77)))
    named = seen.index(Moment("neighbour", False, address(family, MOVED)))
    forgotten = seen.index(Moment("fdb", True, mac(family, MOVED)))
    assert known < named < forgotten
    assert Moment("neighbour", True, address(family, MOVED)) not in seen
    assert not any(moment.table in ("route", "nexthop") for moment in seen)
    assert report.ok
    assert (mac(family, 77), endpoint(family, MOVED)) in observed(host, family)["fdb"]


@pytest.mark.parametrize("how", ["sync", "update"])
def test_macs_that_are_exchanged_are_never_missing(host: Any, family: int, how: str) -> None:
    """Two peers take each other's MAC: entries are replaced, not deleted and added."""
    leases = [lease_of(host), *peers(range(1, 6))]
    swapped = [renewed(1, 2), renewed(2, 1)]
    with plane(host, family) as dp:
        dp.sync(leases)
        with Monitor(host) as monitor:
            if how == "sync":
                report = dp.sync([leases[0], *swapped, *leases[3:]])
            else:
                report = dp.update(added=swapped)
            seen = moments(monitor)

    assert report.ok
    assert not any(moment.deleted for moment in seen)
    assert {(mac(family, 1), endpoint(family, 2)), (mac(family, 2), endpoint(family, 1))} <= (
        observed(host, family)["fdb"]
    )


@pytest.mark.parametrize("how", ["sync", "update"])
def test_a_route_comes_last_and_goes_first(host: Any, family: int, how: str) -> None:
    leases = [lease_of(host), *peers(range(1, 6))]
    chain = ["fdb", "neighbour", *(["nexthop"] if family == 4 else []), "route"]
    with plane(host, family) as dp:
        dp.sync(leases)
        with Monitor(host) as monitor:
            if how == "sync":
                dp.sync([*leases, peer(9)])
            else:
                dp.update(added=[peer(9)])
            came = [moment.table for moment in moments(monitor) if not moment.deleted]
            if how == "sync":
                dp.sync(leases)
            else:
                dp.update(removed=[peer(9)])
            went = [moment.table for moment in moments(monitor) if moment.deleted]

    assert came == chain
    assert went == chain[::-1]
