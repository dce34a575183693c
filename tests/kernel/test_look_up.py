"""A large FDB is looked up and not dumped, once its whole was read: with the same outcome."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp._core import Table
from flannel_dp.kernel.tables import Kernel
from flannel_dp.resources.peers import stack
from flannel_dp.tables.columns import fdb_table
from flannel_dp.tables.entries import Fdb, Neighbour
from flannel_dp.tables.scopes import fdb_scope
from tests.lib.kernel import expected, ifindex, observed
from tests.lib.leases import DEVICE, lease_of, mac, peer, peers, plane


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "LOOK_UP", 10)


class Reads:
    """Which tables a channel dumped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds: list[str] = []
        original = Kernel.diff

        def noted(kernel: Kernel, table: Table, *scopes: Any, **more: Any) -> Any:
            self.kinds.append(table.kind)
            return original(kernel, table, *scopes, **more)

        monkeypatch.setattr(Kernel, "diff", noted)


def test_a_second_sync_asks_and_does_not_dump(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = [lease_of(host), *peers(range(1, 200))]
    with plane(host, family) as dp:
        dp.sync(leases)
        reads = Reads(monkeypatch)
        device, gone, wrong = DEVICE[family], mac(family, 3), mac(family, 4)
        endpoint = "198.18.9.9" if family == 4 else "2001:db8:9::9"
        host.bridge(f"fdb del {gone} dev {device}")
        host.bridge(f"fdb replace {wrong} dst {endpoint} dev {device} self permanent")

        report = dp.sync(leases)

        assert "fdb" not in reads.kinds
        assert {"neighbour", "route"} <= {*reads.kinds}
        row = report.tables["fdb"]
        assert (row["added"], row["replaced"], row["unchanged"]) == (1, 1, 197)
        assert observed(host, family) == expected(leases[1:], family)
        assert dp.resync().writes == 0


def test_entries_of_peers_that_left_are_found_by_their_neighbours(host: Any, family: int) -> None:
    leases = [lease_of(host), *peers(range(1, 60))]
    with plane(host, family) as dp:
        dp.sync(leases)

        moved = peer(7, **{"backend_data" if family == 4 else "backend_v6_data": None})
        left = [one for one in leases if one.subnet not in (peer(5).subnet, moved.subnet)]
        report = dp.sync(left)

        assert report.tables["fdb"]["removed"] == 2
        assert observed(host, family) == expected(left[1:], family)


def test_the_first_reading_is_of_the_whole(host: Any, family: int) -> None:
    leases = [lease_of(host), *peers(range(1, 60))]
    with plane(host, family) as dp:
        dp.sync(leases)
    device = DEVICE[family]
    where = "198.18.9.9" if family == 4 else "2001:db8:9::9"
    host.bridge(f"fdb add 02:00:00:00:99:99 dst {where} dev {device} self permanent")

    with plane(host, family) as dp:
        report = dp.sync(leases)

    assert report.tables["fdb"]["removed"] == 1
    assert observed(host, family) == expected(leases[1:], family)


def test_look_up_is_a_diff(host: Any, family: int) -> None:
    leases = [lease_of(host), *peers(range(1, 300))]
    with plane(host, family) as dp, Kernel(host.ns) as kernel:
        dp.sync(leases)
        index = ifindex(host, DEVICE[family])
        here = "198.18.0.{}" if family == 4 else "2001:db8:1::{:x}"
        wanted = fdb_table(index, {mac(family, n): here.format(n) for n in range(1, 200)})
        wanted.add(Fdb(index, "02:00:00:00:99:99", here.format(99)))
        others = fdb_table(
            index, {mac(family, 250): here.format(1), "02:00:00:00:88:88": here.format(2)}
        )

        found = kernel.channel.look_up(wanted, fdb_scope(index), others)

        assert (found.added, found.removed, found.unchanged) == (1, 1, 199)
        (operation,) = [found.operation(n) for n in range(len(found)) if found.operation(n)[2]]
        assert operation[2].mac == mac(family, 250)
        empty = kernel.channel.look_up(Table("fdb"), fdb_scope(index))
        assert (len(empty), empty.unchanged) == (0, 0)


def test_routes_are_not_looked_up(host: Any) -> None:
    with Kernel(host.ns) as kernel, pytest.raises(ValueError, match="cannot be looked up"):
        kernel.channel.look_up(Table("route"), fdb_scope(1))


def test_neighbours_can_be_looked_up(host: Any, family: int) -> None:
    from flannel_dp.tables.scopes import neighbour_scope

    leases = [lease_of(host), *peers(range(1, 100))]
    with plane(host, family) as dp, Kernel(host.ns) as kernel:
        dp.sync(leases)
        index = ifindex(host, DEVICE[family])
        table = dp.state[family].tables[1].table
        missing = "10.255.255.0" if family == 4 else "fd00:10:ffff::"
        table.add(Neighbour(index, missing, "02:00:00:00:99:99"))

        found = kernel.channel.look_up(table, neighbour_scope(index, family))

        assert (found.added, found.unchanged, len(found)) == (1, 99, 1)
