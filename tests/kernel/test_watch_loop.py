"""``DataPlane.watch``: drift by name, in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flannel_dp import SourceError
from flannel_dp.reconcile.drift import Drift
from flannel_dp.tables.entries import Fdb, Neighbour
from tests.lib.kernel import expected, ifindex, observed
from tests.lib.leases import DEVICE, address, endpoint, lease_of, mac, peers, plane, subnet
from tests.lib.monitor import Monitor

NUMBERS = range(1, 21)


def test_before_a_sync_there_is_nothing_to_watch(host: Any) -> None:
    with plane(host) as dp, pytest.raises(SourceError, match="nothing to watch"):
        dp.watch()


def test_watch_yields_drift_by_name_and_ends(host: Any, family: int) -> None:
    leases = [lease_of(host), *peers(NUMBERS)]
    with plane(host, family) as dp:
        dp.sync(leases)
        index = ifindex(host, DEVICE[family])
        found = []
        steps: list[Callable[[], object]] = [
            lambda: host.ip(f"-{family} neigh del {address(family, 3)} dev {DEVICE[family]}"),
            lambda: host.bridge(f"fdb del {mac(family, 4)} dev {DEVICE[family]}"),
        ]
        host.ip(f"-{family} route del {subnet(family, 5)}")
        for drift in dp.watch(timeout=0.05):
            found.append(drift)
            if steps:
                steps.pop(0)()
        routes = [wanted for wanted in dp.state[family].all_tables if wanted.table.kind == "route"]
        route = next(one for one in routes[0].table if one.prefix == subnet(family, 5))

    assert found == [
        Drift(family, "route", "deleted", route),
        Drift(family, "neighbour", "deleted", Neighbour(index, address(family, 3), mac(family, 3))),
        Drift(family, "fdb", "deleted", Fdb(index, mac(family, 4), endpoint(family, 4))),
    ]
    assert observed(host, family) == expected(leases[1:], family)
    assert dp.on_written == [], "it has let go of the data plane"


def test_watch_is_quiet_when_all_is_right(host: Any) -> None:
    with plane(host) as dp:
        dp.sync([lease_of(host), *peers(NUMBERS)])
        with Monitor(host) as monitor:
            assert [*dp.watch(timeout=0.01)] == []
            assert monitor.events() == []


def test_an_abandoned_watch_lets_go(host: Any) -> None:
    with plane(host, 4) as dp:
        dp.sync([lease_of(host), *peers(NUMBERS)])
        host.ip(f"route del {subnet(4, 5)}")
        watching = dp.watch()
        next(watching)
        watching.close()  # type: ignore[attr-defined]

        assert dp.on_written == []
