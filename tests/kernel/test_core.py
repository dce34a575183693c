"""The compiled core against a real kernel: what it writes, repairs, removes, leaves alone
and reads; iproute2 says what the kernel holds."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from flannel_dp._core import REMOVE, SKIPPED, Table
from flannel_dp.tables import columns, scopes
from flannel_dp.tables.entries import Entry, Fdb, Neighbour, Nexthop, Route, Scope
from tests.lib.core_overlay import PROTOCOL, Overlay
from tests.lib.leases import address, endpoint, mac, near, subnet

PEERS = 20


@pytest.fixture
def overlay(host: Any, family: int) -> Iterator[Overlay]:
    made = Overlay(host, family)
    with made.kernel:
        yield made


def test_what_was_applied_is_what_iproute2_shows(overlay: Overlay) -> None:
    numbers = range(1, PEERS + 1)
    wanted = overlay.wanted(numbers)
    steps: list[tuple[int, int]] = []

    plan = overlay.plan(wanted)
    results = overlay.kernel.apply(plan, progress=lambda done, total: steps.append((done, total)))

    assert overlay.observed() == overlay.expected(numbers)
    assert {result.counts()["added"] for result in results} == {PEERS}
    assert not [failure for result in results for failure in result.failures()]
    assert steps[-1] == (PEERS * len(wanted), PEERS * len(wanted))


def test_second_plan_is_empty(overlay: Overlay) -> None:
    wanted = overlay.wanted(range(1, PEERS + 1))
    overlay.sync(wanted)

    again = overlay.plan(wanted)

    assert again.is_empty
    assert {
        row["unchanged"]
        for kind, row in again.counts().items()
        if kind not in ("nexthop", "peer") or (kind, overlay.family) == ("nexthop", 4)
    } == {PEERS}


def test_drift_is_repaired(overlay: Overlay) -> None:
    numbers = range(1, PEERS + 1)
    family, device = overlay.family, overlay.device
    wanted = overlay.wanted(numbers)
    # The device's own route is the kernel's and stays.
    overlay.ip(f"addr add {address(family, 0)}/{16 if family == 4 else 48} dev {device}")
    own = overlay.ip(f"route show dev {device} proto kernel")
    overlay.sync(wanted)

    overlay.ip(
        f"neigh replace {address(family, 1)} lladdr {mac(family, 99)} dev {device} nud permanent"
    )
    overlay.ip(f"neigh del {address(family, 2)} dev {device}")
    overlay.ip(
        f"neigh add {address(family, 77)} lladdr {mac(family, 77)} dev {device} nud permanent"
    )
    overlay.bridge(
        f"fdb replace {mac(family, 1)} dst {endpoint(family, 99)} dev {device} self permanent"
    )
    overlay.bridge(f"fdb del {mac(family, 2)} dev {device}")
    overlay.bridge(
        f"fdb add {mac(family, 77)} dst {endpoint(family, 77)} dev {device} self permanent"
    )
    if family == 4:
        overlay.host.ip(f"nexthop replace id 1 via 10.240.99.0 dev {device} onlink proto 138")
        overlay.host.ip("nexthop del id 3")  # and its route with it
        overlay.host.ip(f"nexthop add id 77 via 10.240.77.0 dev {device} onlink proto 138")
    overlay.ip(
        f"route replace {subnet(family, 4)} via {address(family, 99)} dev {device} onlink"
        f"{' metric 1024' if family == 6 else ''}"
    )
    overlay.ip(f"route del {subnet(family, 2)}")
    overlay.ip(f"route add {subnet(family, 77)} via {address(family, 77)} dev {device} onlink")
    results = overlay.sync(wanted)

    assert overlay.observed() == overlay.expected(numbers)
    assert overlay.plan(wanted).is_empty
    assert overlay.ip(f"route show dev {device} proto kernel") == own != ""
    one_of_each = {"added": 1, "replaced": 1, "removed": 1, "unchanged": PEERS - 2, "failed": 0}
    lost = {"added": 2, "unchanged": PEERS - 3} if family == 4 else {}
    assert {kind: result.counts() for kind, result in results.items()} == {
        "neighbour": one_of_each,
        "fdb": one_of_each,
        **({"nexthop": one_of_each} if family == 4 else {}),
        "route": one_of_each | lost,
    }


def test_peers_that_left_are_removed(overlay: Overlay) -> None:
    overlay.sync(overlay.wanted(range(1, PEERS + 1)))

    results = overlay.sync(overlay.wanted(range(3, PEERS + 1)))

    assert overlay.observed() == overlay.expected(range(3, PEERS + 1))
    assert {result.counts()["removed"] for result in results.values()} == {2}


def test_other_remotes_of_one_mac_are_removed(overlay: Overlay) -> None:
    """The zero MAC and multicast ones may have several remotes, in any order."""
    overlay.kernel.strict = False  # the device is ours alone
    family, device, index = overlay.family, overlay.device, overlay.index
    zero, group = "00:00:00:00:00:00", "01:00:5e:00:00:01"
    wanted = columns.fdb_table(index, {mac(family, 1): endpoint(family, 1)})
    wanted.add(Fdb(index, zero, endpoint(family, 92), state=0xC0))  # as bridge(8) has it
    scope = scopes.fdb_scope(index)
    for several in (zero, group):
        for number in (91, 92, 93):
            overlay.bridge(
                f"fdb append {several} dst {endpoint(family, number)} dev {device} self permanent"
            )

    counts = overlay.sync([(wanted, scope)])["fdb"].counts()

    assert counts == {"added": 1, "replaced": 0, "removed": 5, "unchanged": 1, "failed": 0}
    assert overlay.observed()["fdb"] == {
        (zero, endpoint(family, 92), "permanent"),
        (mac(family, 1), endpoint(family, 1), "permanent"),
    }
    assert overlay.plan([(wanted, scope)]).is_empty


def test_other_routes_to_one_prefix_are_removed(host: Any) -> None:
    """IPv4 alone keeps several routes of one prefix and metric (``ip route append``)."""
    overlay = Overlay(host, 4)
    with overlay.kernel:
        overlay.kernel.strict = False
        wanted = overlay.wanted(range(1, 3))
        overlay.sync(wanted)
        words = f"via 10.240.9.0 dev {overlay.device} onlink proto 138"
        overlay.ip(f"route append {subnet(4, 1)} {words}")
        overlay.ip(f"route prepend {subnet(4, 2)} {words}")

        overlay.sync(wanted)

        assert overlay.observed() == overlay.expected(range(1, 3))
        assert overlay.plan(wanted).is_empty


def test_fdb_entry_on_a_nexthop_group_becomes_one_with_a_remote(overlay: Overlay) -> None:
    """Linux takes a replacement of one by the other as done and does nothing: the old
    entry is removed, and who owns the whole device adds the right one in the next pass."""
    overlay.kernel.strict = False
    fdb, scope = overlay.wanted(range(1, 3))[1]
    family, device = overlay.family, overlay.device
    overlay.ip(f"nexthop add id 1001 via {endpoint(family, 9)} fdb")
    overlay.host.ip("nexthop add id 1002 group 1001 fdb")
    overlay.bridge(f"fdb add {mac(family, 1)} nhid 1002 dev {device} self permanent")

    first = overlay.sync([(fdb, scope)])["fdb"]
    overlay.sync([(fdb, scope)])

    assert first.counts()["removed"] == 1
    assert overlay.observed()["fdb"] == overlay.expected(range(1, 3))["fdb"]
    assert overlay.plan([(fdb, scope)]).is_empty


def test_foreign_route_is_left_alone_and_reported(overlay: Overlay) -> None:
    family = overlay.family
    via = near(family, 1)
    overlay.ip(f"route add {subnet(family, 5)} via {via} dev eth0 proto static")
    before = overlay.ip("route show dev eth0 table all")
    wanted = overlay.wanted(range(1, PEERS + 1))

    plan = overlay.plan(wanted)
    routes = {result.kind: result for result in overlay.kernel.apply(plan)}["route"]

    assert plan.conflicts() == []  # the kernel was asked about the vxlan device alone
    (failure,) = routes.failures()
    assert failure.entry == wanted[-1][0][4]
    # IPv6 looks the gateway up first, and the foreign route leads it to another device.
    assert failure.error == (errno.EEXIST if family == 4 else errno.EINVAL)
    assert routes.counts()["added"] == PEERS - 1
    assert overlay.ip("route show dev eth0 table all") == before


def test_foreign_route_in_view_is_a_conflict(overlay: Overlay) -> None:
    family = overlay.family
    via = near(family, 1)
    overlay.ip(f"route add {subnet(family, 5)} via {via} dev eth0 proto static")
    before = overlay.ip("route show dev eth0 table all")
    routes = overlay.wanted(range(5, 7))[-1][0]
    scope = scopes.route_scope(family, within=subnet(family, 5))._replace(marked=False)

    overlay.sync(overlay.wanted(range(5, 7))[:-1])
    diff = overlay.kernel.diff(routes, scope)
    overlay.kernel.apply(diff)

    ((wanted, foreign),) = diff.conflicts()
    assert isinstance(wanted, Route)
    assert isinstance(foreign, Route)
    assert (wanted.prefix, wanted.protocol) == (subnet(family, 5), PROTOCOL)
    assert (foreign.prefix, foreign.gateway, foreign.protocol) == (subnet(family, 5), via, 4)
    assert (diff.added, diff.replaced, diff.removed) == (1, 0, 0)
    assert overlay.ip("route show dev eth0 table all") == before


def test_foreign_nexthop_is_not_overwritten(host: Any) -> None:
    overlay = Overlay(host, 4)
    with overlay.kernel:
        host.ip("nexthop add id 7 via 192.0.2.200 dev eth0 proto static")
        before = host.ip("nexthop show id 7")

        results = overlay.sync(overlay.wanted(range(6, 9)))

        assert [(o.entry, o.error) for o in results["nexthop"].failures()] == [
            (Nexthop(7, "10.240.7.0", overlay.index), errno.EEXIST)
        ]
        assert list(results["route"].results) == [0, SKIPPED, 0]
        assert host.ip("nexthop show id 7") == before


def test_get_one_entry(overlay: Overlay) -> None:
    family, index = overlay.family, overlay.index
    kernel = overlay.kernel
    gateway = address(family, 1)
    entries: list[tuple[Scope, Entry, Entry]] = [
        (
            scopes.neighbour_scope(index, family),
            Neighbour(index, gateway, mac(family, 1)),
            Neighbour(index, address(family, 2), mac(family, 1)),
        ),
        (
            scopes.fdb_scope(index),
            Fdb(index, mac(family, 1), endpoint(family, 1)),
            Fdb(index, mac(family, 2), endpoint(family, 1)),
        ),
        (
            scopes.nexthop_scope(index, family),
            Nexthop(1, gateway, index),
            Nexthop(2, gateway, index),
        ),
    ]
    for scope, entry, absent in entries:
        assert kernel.get(scope, entry) is None
        table = Table(scope.kind)
        table.add(entry)
        kernel.apply(kernel.diff(table, scope))

        assert kernel.get(scope, entry) == entry
        assert kernel.get(scope, absent) is None
    with pytest.raises(ValueError, match="routes"):
        kernel.get(scopes.route_scope(family), Route(subnet(family, 1)))


def test_get_of_what_is_none_of_the_scope_does_not_wait(overlay: Overlay) -> None:
    """The kernel answers with an entry of another device: that is no entry, at once."""
    family, index = overlay.family, overlay.index
    overlay.sync(overlay.wanted(range(1, 2)))
    entry = Neighbour(index, address(family, 1), mac(family, 1))

    assert overlay.kernel.get(scopes.neighbour_scope(index + 100, family), entry) is None
    assert overlay.kernel.get(scopes.neighbour_scope(index, family), entry) == entry


def test_deleting_what_is_gone_is_a_success(overlay: Overlay) -> None:
    family, device = overlay.family, overlay.device
    numbers = range(1, 4)
    overlay.sync(overlay.wanted(numbers))
    plan = overlay.plan(overlay.wanted(range(0)))

    overlay.ip(f"route del {subnet(family, 1)}")
    overlay.ip(f"neigh del {address(family, 1)} dev {device}")
    overlay.bridge(f"fdb del {mac(family, 1)} dev {device}")
    if family == 4:
        overlay.host.ip("nexthop del id 1")
    results = overlay.kernel.apply(plan)

    for result in results:
        (error,) = set(result.results) - {0}
        assert error in (errno.ENOENT, errno.ESRCH)
        assert list(result.results).count(0) == 2
        assert result.counts()["removed"] == 3
        assert list(result.failures()) == []
        assert result.complaints == ()


def test_deleting_from_a_device_that_is_gone_is_a_success(overlay: Overlay) -> None:
    overlay.sync(overlay.wanted(range(1, 4)))
    plan = overlay.plan(overlay.wanted(range(0)))
    operations = {op for t in plan.tables for op, _, _ in map(t.diff.operation, range(len(t.diff)))}

    overlay.host.ip(f"link del {overlay.device}")
    results = overlay.kernel.apply(plan)

    assert operations == {REMOVE}
    assert [result.counts()["failed"] for result in results] == [0] * len(results)


def test_routes_of_another_table_and_metric(overlay: Overlay) -> None:
    family, index = overlay.family, overlay.index
    table = Table("route")
    for metric in (50, 4096):
        table.add(
            Route(
                subnet(family, 1),
                gateway=address(family, 1),
                device=index,
                onlink=True,
                metric=metric,
                table=1000,
            )
        )
    scope = scopes.route_scope(family, table=1000)

    first = overlay.kernel.diff(table, scope)  # nobody made table 1000 yet: it is empty
    overlay.kernel.apply(first)
    shown = overlay.host.ip_json(f"-{family} route show table 1000")

    assert (first.added, first.observed) == (2, 0)
    assert {(r["dst"], r["metric"]) for r in shown} == {
        (subnet(family, 1), 50),
        (subnet(family, 1), 4096),
    }
    assert overlay.kernel.diff(table, scope).unchanged == 2


def test_read_tells_who_owns_what(overlay: Overlay) -> None:
    family = overlay.family
    router = near(family, 1)
    overlay.ip(f"route add {subnet(family, 1)} via {router} dev eth0 proto 138")
    overlay.ip(f"route add {subnet(family, 2)} via {router} dev eth0 proto static")
    scope = scopes.route_scope(family)._replace(marked=False)

    held = overlay.kernel.read("route", scope)

    owners = {entry.prefix: held.tag(number) for number, entry in enumerate(held)}
    assert owners[subnet(family, 1)] == 1
    assert owners[subnet(family, 2)] == 2
