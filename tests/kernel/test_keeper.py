"""Tables of one's own that stay true: ``keep``, its changes, and what ends it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flannel_dp import (
    ConfigError,
    Fdb,
    Keeper,
    Kernel,
    Neighbour,
    Repair,
    Report,
    Route,
    Table,
    Unsupported,
    fdb_scope,
    fdb_table,
    keep,
    neighbour_scope,
    route_scope,
)
from tests.lib.core_overlay import Overlay
from tests.lib.leases import address, endpoint, mac, subnet

NUMBERS = range(1, 6)


@pytest.fixture
def overlay(host: Any, family: int) -> Iterator[Overlay]:
    made = Overlay(host, family)
    with made.kernel:
        yield made


def kept_of(overlay: Overlay, timeout: float | None = None) -> Keeper:
    """All tables of the peers NUMBERS; those of ``observed`` and ``expected``."""
    wanted = overlay.wanted(NUMBERS)
    tables, scopes = [table for table, _ in wanted], [scope for _, scope in wanted]
    return keep(overlay.kernel, tables, scopes, timeout=timeout)


def next_repairs(kept: Keeper, done: Callable[[], bool]) -> list[Repair]:
    """The repairs until ``done()``; a keeper with a time limit that ends it if need be."""
    found = []
    for repair in kept:
        found.append(repair)
        if done():
            return found
    raise AssertionError(f"no more repairs came: {found}")


def test_what_others_do_to_the_entries_is_undone(overlay: Overlay, family: int) -> None:
    def as_wanted() -> bool:
        return overlay.observed() == overlay.expected(NUMBERS)

    with kept_of(overlay, timeout=60) as kept:
        assert (kept.report.ok, kept.report.writes) == (
            True,
            len(NUMBERS) * (4 if family == 4 else 3),
        )
        assert as_wanted()
        overlay.ip(f"route del {subnet(family, 2)}")
        overlay.ip(
            f"neigh replace {address(family, 3)} lladdr {mac(family, 9)} nud permanent "
            f"dev {overlay.device}"
        )
        overlay.bridge(
            f"fdb replace {mac(family, 8)} dst {endpoint(family, 8)} "
            f"dev {overlay.device} self permanent"
        )
        repairs = next_repairs(kept, as_wanted)

        changes = {(d.table, d.change) for repair in repairs for d in repair.drifts()}
        assert changes == {("route", "deleted"), ("neighbour", "changed"), ("fdb", "added")}
        assert all(repair.report is None for repair in repairs)  # each entry alone
        assert mac(family, 8) in "\n".join(map(str, repairs))


def test_a_device_that_went_down_and_up_is_read_again(overlay: Overlay) -> None:
    """IPv4 routes go with it, and no event says so."""
    with kept_of(overlay, timeout=60) as kept:
        overlay.host.ip(f"link set {overlay.device} down")
        overlay.host.ip(f"link set {overlay.device} up")
        next_repairs(kept, lambda: overlay.observed() == overlay.expected(NUMBERS))


def test_an_update_changes_what_is_wanted(overlay: Overlay, family: int) -> None:
    index = overlay.index
    with kept_of(overlay, timeout=60) as kept:
        sent = overlay.kernel.channel.messages_sent
        report = kept.update(
            added=[
                Neighbour(index, address(family, 3), mac(family, 9)),
                Fdb(index, mac(family, 9), endpoint(family, 9)),
                Fdb(index, mac(family, 4), endpoint(family, 4)),  # as it is
            ],
            removed=[Fdb(index, mac(family, 5), ""), Fdb(index, mac(family, 77), "")],
        )

        assert overlay.kernel.channel.messages_sent - sent == 3
        assert report.ok
        assert report.tables["fdb"] | {"unchanged": 0} == {
            "added": 1,
            "replaced": 0,
            "removed": 1,
            "unchanged": 0,
            "failed": 0,
        }
        assert report.tables["neighbour"]["replaced"] == 1
        assert [mac(family, 77) in name for name in report.unknown] == [True]
        # What is wanted now is what is kept, and nothing of it was drift.
        assert kept.resync().writes == 0
        overlay.bridge(f"fdb del {mac(family, 9)} dev {overlay.device} self")
        (repair,) = next_repairs(kept, lambda: True)
        assert [d.entry for d in repair.named] == [Fdb(index, mac(family, 9), endpoint(family, 9))]


def test_an_update_of_a_kernel_that_changed_meanwhile_ends_up_right(
    overlay: Overlay, family: int
) -> None:
    with kept_of(overlay) as kept:
        overlay.bridge(f"fdb del {mac(family, 5)} dev {overlay.device} self")
        report = kept.update(removed=[Fdb(overlay.index, mac(family, 5), "")])
        assert report.ok
        assert mac(family, 5) not in {
            entry.mac for entry in overlay.kernel.read("fdb", fdb_scope(overlay.index))
        }
        assert kept.resync().writes == 0


def test_routes_of_ones_own_protocol_survive_a_replacement(host: Any, family: int) -> None:
    """Another program's route takes the place of ours, and only its own mark is in the event."""
    prefix, gateway = subnet(family, 1), f"192.0.2.9{''}" if family == 4 else "2001:db8::9"
    with Kernel(host.ns) as kernel:
        routes = Table("route")
        routes.add(Route(prefix, 0, gateway, kernel.ifindex("eth0"), protocol=139))
        with keep(kernel, routes, route_scope(family, protocol=139), timeout=60) as kept:
            host.ip(f"-{family} route del {prefix}")
            next_repairs(kept, lambda: prefix in host.ip(f"-{family} route show proto 139"))
            kept.update(removed=[Route(prefix)])
            assert prefix not in host.ip(f"-{family} route show proto 139")


def test_asyncio_gets_the_same_and_stop_ends_both(overlay: Overlay, family: int) -> None:
    async def controller(kept: Keeper) -> list[Repair]:
        found = []
        async for repair in kept:
            found.append(repair)
            kept.stop()
        return found

    delete = f"fdb del {mac(family, 1)} dev {overlay.device} self"
    with kept_of(overlay, timeout=60) as kept:
        overlay.bridge(delete)
        (repair,) = asyncio.run(controller(kept))
        assert [d.entry.mac for d in repair.named if isinstance(d.entry, Fdb)] == [mac(family, 1)]
    with kept_of(overlay) as kept:
        ended = threading.Thread(target=lambda: [*kept])
        ended.start()
        kept.stop()
        ended.join(60)
        assert not ended.is_alive()


def test_one_table_by_names(overlay: Overlay, family: int) -> None:
    """``sync`` and ``snapshot`` of one table; the device by its name in another namespace."""
    ns, kernel, device = overlay.host.ns, overlay.kernel, overlay.device
    scope = fdb_scope(device, netns=ns)
    wanted = fdb_table(device, {mac(family, n): endpoint(family, n) for n in NUMBERS}, netns=ns)

    result = kernel.sync(wanted, scope)

    assert (result.ok, result.counts()["added"]) == (True, len(NUMBERS))
    assert "5 added" in str(result)
    assert result.to_dict()["table"] == "fdb"
    shown = overlay.host.bridge_json(f"fdb show dev {device}")
    assert sorted(kernel.snapshot("fdb", scope), key=str) == sorted(
        [{**one, "ifname": device} for one in shown], key=str
    )
    assert kernel.sync(wanted, scope).counts()["unchanged"] == len(NUMBERS)


def test_snapshots_are_in_the_shape_of_ip(overlay: Overlay, family: int) -> None:
    overlay.sync(overlay.wanted(NUMBERS))
    kernel, device = overlay.kernel, overlay.device

    found = kernel.snapshot("neighbour", neighbour_scope(overlay.index, family))
    neighbours = [one for one in found if one["state"] == ["PERMANENT"]]  # the kernel's own are not
    shown = overlay.host.ip_json(f"-{family} neigh show nud permanent")
    assert sorted(neighbours, key=str) == sorted(
        [{k: one[k] for k in ("dst", "dev", "lladdr", "state")} for one in shown], key=str
    )
    routes = kernel.snapshot("route", route_scope(family, device=overlay.index, exclusive=True))
    by_prefix = {one["dst"]: one for one in overlay.host.ip_json(f"-{family} route show")}
    ours = [one for one in routes if one["protocol"] == "138"]
    assert len(ours) == len(NUMBERS)
    for route in ours:
        assert route.items() <= {"dev": device, **by_prefix[route["dst"]]}.items()


@pytest.mark.parametrize(
    ("wanted", "scope", "error", "said"),
    [
        (
            Table("fdb"),
            route_scope(4),
            ConfigError,
            "wanted has tables of fdb, and scope is of route",
        ),
        ([Table("fdb"), Table("fdb")], fdb_scope(1), ConfigError, "several tables of one kind"),
        (Table("fdb"), fdb_scope(0), Unsupported, "followed on one device"),
        (Table("route"), route_scope(4, table=7), Unsupported, "main routing table, and not of 7"),
        (
            Table("fdb"),
            [fdb_scope(n) for n in range(1, 10)],
            Unsupported,
            "follows 8 devices, not 9",
        ),
        (5, fdb_scope(1), ConfigError, "wanted"),
        (Table("fdb"), 5, ConfigError, "scope"),
    ],
)
def test_what_cannot_be_kept_is_said_at_once(
    wanted: Any, scope: Any, error: type[Exception], said: str
) -> None:
    with Kernel() as kernel, pytest.raises(error, match=said):
        keep(kernel, wanted, scope)


def test_a_keeper_has_to_be_entered() -> None:
    with Kernel() as kernel:
        kept = keep(kernel, Table("fdb"), fdb_scope(1))
        assert kept.report == Report()
        with pytest.raises(ConfigError, match="not open"):
            kept.update()
