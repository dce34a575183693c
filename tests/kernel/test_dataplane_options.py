"""DataPlane against a real kernel: the end state of a sync, plans, the own lease, options,
kernels without nexthop objects, and lost answers."""

from __future__ import annotations

import errno
import logging
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flannel_dp import ConfigError, DataPlane, KernelError, NetworkConfig, SourceError
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.kernel.tables import Kernel
from tests.lib.kernel import everything, expected, has_device, observed, stranger
from tests.lib.leases import DEVICE, address, lease_of, mac, peer, peers, plane, subnet
from tests.lib.monitor import Monitor
from tests.lib.planes import PEERS, counts, sent, vtep


@pytest.fixture
def dp(host: Any, family: int) -> Iterator[DataPlane]:
    """The data plane of ``host``, of one family."""
    with plane(host, family) as made:
        yield made


# ---- the end state -------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 130])
def test_sync_leaves_flannels_end_state(dp: DataPlane, host: Any, family: int, number: int) -> None:
    leases = peers(range(1, number + 1))

    report = dp.sync([lease_of(host), *leases])

    assert report.ok
    assert observed(host, family) == expected(leases, family)
    device = host.ip_json(f"link show {DEVICE[family]}")[0]
    assert device["address"] == mac(family, 0)
    assert device["mtu"] == (1450 if family == 4 else 1430)
    addresses = [
        f"{a['local']}/{a['prefixlen']}"
        for a in host.ip_json(f"-{family} address show dev {DEVICE[family]} scope global")[0][
            "addr_info"
        ]
        if a
    ]
    assert addresses == [f"{address(family, 0)}/{32 if family == 4 else 128}"]


def test_dual_stack_has_the_end_state_of_both_families(host: Any) -> None:
    leases = peers(PEERS)
    with plane(host) as dp:
        assert dp.sync([lease_of(host), *leases]).ok

        for family in (4, 6):
            assert observed(host, family) == expected(leases, family)


def test_a_sync_brings_any_state_to_the_leases(dp: DataPlane, host: Any, family: int) -> None:
    """Peers come, go, move, change their MAC, and swap MACs; strangers' writes on our device
    are undone."""
    dp.sync([lease_of(host), *peers(PEERS)])
    moved = peer(1, public_ip="198.18.9.9", public_ipv6="2001:db8:1::909")
    changed = peer(2, backend_data=vtep(4, 900), backend_v6_data=vtep(6, 900))
    swapped = [
        peer(3, backend_data=vtep(4, 4), backend_v6_data=vtep(6, 4)),
        peer(4, backend_data=vtep(4, 3), backend_v6_data=vtep(6, 3)),
    ]
    leases = [moved, changed, *swapped, *peers(range(5, 20)), *peers(range(100, 110))]
    device = DEVICE[family]
    host.ip(f"-{family} neigh replace {address(family, 6)} lladdr 02:99:99:99:99:99 dev {device}")
    host.ip(f"-{family} neigh del {address(family, 7)} dev {device}")
    host.ip(f"-{family} route del {subnet(family, 8)}")
    host.ip(f"-{family} route add {subnet(family, 2000)} dev {device} proto static")
    host.bridge(f"fdb del {mac(family, 9)} dev {device}")
    host.bridge(f"fdb append {mac(family, 10)} dst {host.underlay(family)} dev {device}")
    host.bridge(f"fdb add 02:99:99:99:99:98 dst {host.underlay(family)} dev {device}")

    assert dp.sync([lease_of(host), *leases]).ok
    assert observed(host, family) == expected(leases, family)


# ---- plan ------------------------------------------------------------------------


def test_a_plan_writes_nothing(dp: DataPlane, host: Any, family: int) -> None:
    dp.sync([lease_of(host), *peers(PEERS)])
    before, sent_before = everything(host), sent(dp)
    with Monitor(host) as monitor:
        plan = dp.plan([lease_of(host), *peers(range(10, 60))])
        str(plan), plan.to_json()

        assert monitor.events() == []
    assert not plan.is_empty
    assert sent(dp) == sent_before
    assert everything(host) == before


def test_a_plan_for_a_bare_node_writes_nothing(dp: DataPlane, host: Any, family: int) -> None:
    before = everything(host)
    with Monitor(host) as monitor:
        plan = dp.plan([lease_of(host), *peers(PEERS)])

        assert monitor.events() == []
    assert [d.action for d in plan.devices] == ["create"]
    assert everything(host) == before
    assert not has_device(host, family)


def test_a_plan_is_what_sync_sends(dp: DataPlane, host: Any, family: int) -> None:
    """One message for each operation, and the difference of the tables before and after is
    that which the plan told."""
    dp.sync([lease_of(host), *peers(PEERS)])
    changed = [
        peer(1, public_ip="198.18.9.9", public_ipv6="2001:db8:1::909"),
        peer(2, backend_data=vtep(4, 900), backend_v6_data=vtep(6, 900)),
    ]
    leases = [lease_of(host), *changed, *peers(range(3, 20)), *peers(range(40, 50))]
    before, sent_before = observed(host, family), sent(dp)

    operations = dp.plan(leases).to_json()["operations"]
    told = before
    for operation in operations:
        told = _after(told, operation)
    report = dp.sync(leases)

    assert observed(host, family) == told == expected(leases[1:], family)
    assert sent(dp) - sent_before == len(operations) == report.writes


def _after(state: dict[str, set[Any]], operation: dict[str, Any]) -> dict[str, set[Any]]:
    """A state as ``observed`` gives it, after one operation of a plan in JSON."""
    table, entry = operation["table"], operation["entry"]
    result = {name: set(rows) for name, rows in state.items()}

    def row(entry: dict[str, Any]) -> Any:
        if table == "neighbour":
            return entry["address"], entry["mac"]
        if table == "fdb":
            return entry["mac"], entry["endpoint"]
        if table == "nexthop":
            return entry["gateway"], str(entry["protocol"]), entry["onlink"]
        gateway = entry["prefix"].partition("/")[0]
        kind = "object" if entry["nexthop"] else "gateway"
        assert entry["gateway"] in ("", gateway)
        return entry["prefix"], gateway, str(entry["protocol"]), kind

    if operation["op"] == "replace":
        result[table].remove(row(operation["old"]))
    if operation["op"] == "remove":
        result[table].remove(row(entry))
    else:
        assert row(entry) not in result[table]
        result[table].add(row(entry))
    return result


def test_after_a_sync_the_plan_is_empty(dp: DataPlane, host: Any) -> None:
    leases = [lease_of(host), *peers(PEERS)]
    assert not dp.plan(leases).is_empty

    dp.sync(leases)

    assert dp.plan(leases).is_empty
    assert dp.plan(leases).to_json()["operations"] == []


def test_a_plan_names_the_same_operations_for_a_device_that_is_not_there_yet(
    dp: DataPlane, host: Any, family: int
) -> None:
    leases = [lease_of(host), *peers(PEERS)]
    planned = counts(dp.plan(leases).to_json(), "added")

    assert planned == counts(dp.sync(leases).to_json(), "added")
    assert planned["route"] == planned["fdb"] == planned["neighbour"] == len(PEERS)


def test_a_plan_counts_what_a_changed_device_loses(dp: DataPlane, host: Any, family: int) -> None:
    """A new MAC on a device takes its neighbours along (NETDEV_CHANGEADDR): they have to be
    written anew, and the plan says so."""
    dp.sync([lease_of(host), *peers(PEERS)])
    own = lease_of(host)
    own = peer(
        0,
        public_ip=own.public_ip,
        public_ipv6=own.public_ipv6,
        backend_data=vtep(4, 800),
        backend_v6_data=vtep(6, 800),
    )
    leases = [own, *peers(PEERS)]

    planned = counts(dp.plan(leases).to_json(), "added")
    done = counts(dp.sync(leases).to_json(), "added")

    assert planned == done
    assert done["neighbour"] == len(PEERS)
    assert observed(host, family) == expected(leases[1:], family)


# ---- own lease, options --------------------------------------------------------------


def test_without_an_own_lease_the_subnet_can_be_named(host: Any, family: int) -> None:
    leases = peers(PEERS)
    with plane(host, family) as dp, pytest.raises(SourceError, match="no lease"):
        dp.sync(leases)
    assert not has_device(host, family)

    with plane(host, family, subnet=subnet(family, 0)) as dp:
        assert dp.sync(leases).ok
        assert dp.sync(leases).writes == 0

    assert observed(host, family) == expected(leases, family)


def test_the_mac_is_kept_where_no_lease_tells_it(host: Any, family: int) -> None:
    with plane(host, family, subnet=subnet(family, 0)) as dp:
        dp.sync(peers(PEERS))
        first = host.ip_json(f"link show {DEVICE[family]}")[0]["address"]
        host.ip(f"link del {DEVICE[family]}")
        dp.sync(peers(PEERS))

    assert host.ip_json(f"link show {DEVICE[family]}")[0]["address"] == first


def test_another_backend_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="udp"):
        NetworkConfig.from_json('{"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}')


def test_update_before_the_first_sync_is_refused(dp: DataPlane) -> None:
    with pytest.raises(SourceError, match=r"sync\(\)"):
        dp.update(added=[peer(1)])


def test_clean_removes_what_is_ours(dp: DataPlane, host: Any, family: int) -> None:
    before = everything(host)
    dp.sync([lease_of(host), *peers(PEERS)])

    report = dp.clean()

    assert report.ok
    assert counts(report.to_json(), "removed")["route"] == len(PEERS)
    assert everything(host) == before
    assert dp.clean().writes == 0


def test_a_device_that_vanishes_during_a_sync_is_made_again(
    dp: DataPlane, host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dp.sync([lease_of(host), *peers(PEERS)])
    original, deleted = Kernel.apply, threading.Event()

    def late(self: Kernel, *args: Any, **kwargs: Any) -> Any:
        if not deleted.is_set():
            deleted.set()
            host.ip(f"link del {DEVICE[family]}")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Kernel, "apply", late)
    report = dp.sync([lease_of(host), *peers(range(1, 40))])

    assert report.ok
    assert observed(host, family) == expected(peers(range(1, 40)), family)


# ---- nexthop objects, and kernels without ------------------------------------------


def test_without_nexthop_objects_routes_carry_their_gateway(host: Any) -> None:
    leases = [lease_of(host), *peers(PEERS)]
    with plane(host, 4, nexthops=False) as dp:
        assert dp.sync(leases).ok
        assert dp.sync(leases).writes == 0

    assert observed(host, 4) == expected(leases[1:], 4, nexthops=False)


@pytest.mark.parametrize("nexthops", [True, False])
def test_warns_of_many_gateway_routes(host: Any, family: int, nexthops: bool) -> None:
    """Only IPv4 routes share a bucket of the kernel, and only without nexthop objects."""
    with plane(host, family, nexthops=nexthops) as dp:
        few = dp.plan([lease_of(host), *peers(range(1, 2001))])
        many = dp.plan([lease_of(host), *peers(range(1, 2002))])

    text = "2001 IPv4 gateway routes without nexthop objects"
    assert not any("gateway routes" in warning for warning in few.warnings)
    assert any(text in warning for warning in many.warnings) == (family == 4 and not nexthops)


def test_changing_between_both_ways_deletes_no_route(host: Any) -> None:
    leases = [lease_of(host), *peers(PEERS)]
    for nexthops in (True, False, True, False):
        with Monitor(host) as monitor, plane(host, 4, nexthops=nexthops) as dp:
            assert dp.sync(leases).ok

            assert monitor.deleted("route", "neighbour", "fdb") == set()
        assert observed(host, 4) == expected(leases[1:], 4, nexthops=nexthops)


def test_a_kernel_without_nexthop_objects_is_noticed(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux before 5.3 knows no RTM_GETNEXTHOP and answers as to any unknown type:
    ``test_what_the_kernel_answers_to_an_unknown_message``."""
    original = Kernel.read

    def old_kernel(self: Kernel, kind: str, *scopes: Any) -> Any:
        if kind == "nexthop":
            raise KernelError(errno.EOPNOTSUPP, "dump nexthop table")
        return original(self, kind, *scopes)

    monkeypatch.setattr(Kernel, "read", old_kernel)
    leases = [lease_of(host), *peers(PEERS)]
    with plane(host, 4) as dp:
        report = dp.sync(leases)

    assert report.ok
    assert report.tables["nexthop"] == dict.fromkeys(report.tables["nexthop"], 0)
    assert observed(host, 4) == expected(leases[1:], 4, nexthops=False)


def test_what_the_kernel_answers_to_an_unknown_message(netns: str) -> None:
    """The errno by which a kernel without nexthop objects is recognised."""
    unknown_type = 254  # beyond RTM_MAX, as RTM_GETNEXTHOP was before 5.3; (254 - 16) % 4: a GET
    request = struct.pack("=IHHII", 20, unknown_type, 0x305, 1, 0) + bytes(4)

    def ask() -> bytes:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as rtnetlink:
            rtnetlink.sendto(request, (0, 0))
            return rtnetlink.recv(4096)

    reply = call_in_netns(netns, ask)
    (kind,) = struct.unpack_from("=H", reply, 4)
    (error,) = struct.unpack_from("=i", reply, 16)
    assert (kind, -error) == (2, errno.EOPNOTSUPP)


# ---- many conflicts, little room for answers -----------------------------------------


def test_lost_answers_hide_no_conflict(host: Any, family: int, caplog: Any) -> None:
    """The receive buffer has room for a few errors only (ENOBUFS); still every conflict is
    reported and every other peer is served."""
    taken = range(1, 61)
    with plane(host, family) as dp:
        dp.sync([lease_of(host)])
        stranger(host, "other0")
        for number in taken:
            host.ip(f"-{family} route add {subnet(family, number)} dev other0")
        dp.kernel.close()
        dp.host._kernel = Kernel(host.ns, rcvbuf=4096)

        with caplog.at_level(logging.INFO):
            report = dp.sync([lease_of(host), *peers(range(1, 201))])

        assert dp.kernel.channel.overruns > 0
    assert len(report.conflicts) == len(taken)
    assert report.failures == []
    served = expected(peers(range(61, 201)), family)["route"]
    assert observed(host, family)["route"] == served
