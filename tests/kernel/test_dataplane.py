"""DataPlane against a real kernel: the invariants of docs/architecture.md, for both
families; iproute2 says what the kernel holds, and a plain loop over the leases what it
should hold."""

from __future__ import annotations

import errno
import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flannel_dp import (
    BackendData,
    ConfigError,
    DataPlane,
    KernelError,
    NetworkConfig,
    ShrinkRefused,
    SourceError,
)
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.kernel.tables import Kernel
from tests.support import (
    DEVICE,
    Monitor,
    Pings,
    address,
    everything,
    expected,
    has_device,
    ifindex,
    lease_of,
    mac,
    observed,
    peer,
    peers,
    plane,
    stranger,
    subnet,
)

PEERS = range(1, 31)
EMPTY: dict[str, set[Any]] = {"route": set(), "neighbour": set(), "fdb": set(), "nexthop": set()}


@pytest.fixture
def dp(host: Any, family: int) -> Iterator[DataPlane]:
    """The data plane of ``host``, of one family."""
    with plane(host, family) as made:
        yield made


def sent(dp: DataPlane) -> int:
    return dp.kernel.channel.messages_sent


def counts(document: dict[str, Any], word: str) -> dict[str, int]:
    return {table: row[word] for table, row in document["tables"].items()}


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
    changed = peer(2, backend_data=_mac(4, 900), backend_v6_data=_mac(6, 900))
    swapped = [
        peer(3, backend_data=_mac(4, 4), backend_v6_data=_mac(6, 4)),
        peer(4, backend_data=_mac(4, 3), backend_v6_data=_mac(6, 3)),
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


def _mac(family: int, number: int) -> BackendData:
    return BackendData(1, mac(family, number))


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
        peer(2, backend_data=_mac(4, 900), backend_v6_data=_mac(6, 900)),
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
        backend_data=_mac(4, 800),
        backend_v6_data=_mac(6, 800),
    )
    leases = [own, *peers(PEERS)]

    planned = counts(dp.plan(leases).to_json(), "added")
    done = counts(dp.sync(leases).to_json(), "added")

    assert planned == done
    assert done["neighbour"] == len(PEERS)
    assert observed(host, family) == expected(leases[1:], family)


# ---- the invariants ----------------------------------------------------------------


def test_invariant_1_a_second_sync_writes_nothing(dp: DataPlane, host: Any, family: int) -> None:
    leases = [lease_of(host), *peers(PEERS)]
    dp.sync(leases)
    sent_before = sent(dp)
    with Monitor(host) as monitor:
        again = dp.sync(leases)
        with plane(host, family) as fresh:
            anew = fresh.sync(list(reversed(leases)))
            assert sent(fresh) == 0

        assert monitor.events() == []
    assert sent(dp) == sent_before
    assert again.ok
    assert anew.ok
    assert again.writes == anew.writes == 0
    assert counts(again.to_json(), "unchanged")["route"] == len(PEERS)


def test_invariant_2_foreign_state_is_untouched(dp: DataPlane, host: Any, family: int) -> None:
    _foreign_state(host, family)
    before = everything(host)

    dp.plan([lease_of(host), *peers(PEERS)])
    assert everything(host) == before
    dp.sync([lease_of(host), *peers(PEERS)])
    dp.update(added=[peer(70)], removed=[peer(1)])
    dp.explain(address(family, 5))
    foreign = [line for line in before if line in set(everything(host))]
    assert foreign == before
    dp.clean()
    assert everything(host) == before


def _foreign_state(host: Any, family: int) -> None:
    """What others may have: another vxlan, our protocol's number elsewhere, our ids' range,
    routes to the pod network on other devices, other tables, rules, proxies."""
    here, there = host.underlay(family), f"{host.underlay(family)}99"
    host.ip(f"link add vx9 type vxlan id 9 local {here} dev eth0 dstport 4789 nolearning")
    host.ip("link set vx9 up")
    host.bridge(f"fdb add {mac(family, 1)} dst {there} dev vx9 self permanent")
    host.ip(f"-{family} neigh add {address(family, 1)} lladdr {mac(family, 1)} dev vx9")
    host.ip(f"-{family} neigh add proxy {address(family, 1)} dev eth0")
    stranger(host, "other0")
    host.ip(f"-{family} route add {subnet(family, 3000)} dev other0 proto static")
    elsewhere = "10.9.9.0/24" if family == 4 else "fd09::/64"
    host.ip(f"-{family} route add {elsewhere} dev other0 proto 138")
    host.ip(f"-{family} route add {subnet(family, 1)} dev other0 table 77")
    host.ip(f"-{family} route add {subnet(family, 2)} dev other0 metric 4000")
    host.ip(f"-{family} route add blackhole {subnet(family, 3002)}")
    host.ip(f"-{family} rule add from {subnet(family, 1)} lookup 77 priority 1000")
    host.ip(f"-{family} nexthop add id 1342177281 via {there} dev eth0 proto 138")
    host.ip(f"-{family} nexthop add id 7 via {there} dev eth0 proto static")


def test_invariant_3_a_fresh_process_finds_what_is_stale(host: Any, family: int) -> None:
    with plane(host, family) as first:
        first.sync([lease_of(host), *peers(PEERS)])
    index = ifindex(host, DEVICE[family])
    kept = peers(range(10, 31))

    with plane(host, family) as second:
        report = second.sync([lease_of(host), *kept])

    assert observed(host, family) == expected(kept, family)
    assert counts(report.to_json(), "removed")["route"] == 9
    assert counts(report.to_json(), "added")["route"] == 0
    assert ifindex(host, DEVICE[family]) == index


def test_invariant_4_no_lease_takes_the_underlay_into_the_overlay(
    dp: DataPlane, host: Any, family: int
) -> None:
    stranger(host, "other0")
    inside = f"{address(family, 600)[:-1]}9" if family == 4 else f"{address(family, 600)}9"
    host.ip(f"-{family} address add {inside}/{24 if family == 4 else 64} dev other0")
    claims = [
        peer(1, subnet="0.0.0.0/0", ipv6_subnet="::/0"),
        peer(2, subnet="192.0.2.0/24", ipv6_subnet="2001:db8::/64"),
        peer(3, subnet=subnet(4, 0), ipv6_subnet=subnet(6, 0)),
        peer(4, public_ip=address(4, 9), public_ipv6=address(6, 9)),
        peer(600),
    ]

    report = dp.sync([lease_of(host), *claims, *peers(range(5, 9))])

    assert report.ok
    assert observed(host, family) == expected(peers(range(5, 9)), family)
    assert len(report.rejected) == len(claims)


def test_invariant_5_one_bad_lease_stops_no_other(dp: DataPlane, host: Any, family: int) -> None:
    bad = peer(1, backend_data=_mac(4, 2), backend_v6_data=_mac(6, 2), revision=9)
    worse = peer(99, public_ip="nowhere", public_ipv6="nowhere")

    report = dp.sync([lease_of(host), bad, worse, *peers(range(2, 20))])

    assert report.ok
    assert {str(r.reason) for r in report.rejected} == {"duplicate-mac", "bad-public-ip"}
    assert observed(host, family) == expected(peers(range(2, 20)), family)


def test_invariant_5_one_failing_entry_stops_no_other(host: Any) -> None:
    """Somebody else has a nexthop object of the id that one peer needs: that peer gets no
    route, which would lead elsewhere; all others are served, and it is as soon as it can."""
    leases = [lease_of(host), *peers(PEERS)]
    taken = 0x50000000 + (10 << 24) + (240 << 16) + (5 << 8)
    host.ip(f"nexthop add id {taken} via {host.ipv4}9 dev eth0 proto static")
    with plane(host, 4) as dp:
        report = dp.sync(leases)

        assert not report.ok
        assert [wanted[0] for wanted, _ in report.conflicts] == [taken]
        assert [(f.table, f.entry[0]) for f in report.failures] == [("route", subnet(4, 5))]
        served = [lease for lease in leases[1:] if lease != peer(5)]
        assert observed(host, 4)["route"] == expected(served, 4)["route"]
        host.ip(f"nexthop del id {taken}")
        assert dp.sync(leases).ok
    assert observed(host, 4) == expected(leases[1:], 4)


def test_invariant_5_one_family_does_not_stop_the_other(host: Any) -> None:
    """No lease says what our IPv6 subnet is: IPv4 is in order all the same."""
    own = lease_of(host)
    mine = peer(0, public_ip=own.public_ip, public_ipv6="", ipv6_subnet="", backend_v6_data=None)
    with plane(host) as dp:
        report = dp.sync([mine, *peers(PEERS)])

    assert not report.ok
    assert list(report.family_errors) == [6]
    assert isinstance(report.family_errors[6], SourceError)
    assert observed(host, 4) == expected(peers(PEERS), 4)
    assert not has_device(host, 6)


def test_invariant_5_a_taken_device_name_stops_one_family_only(host: Any, family: int) -> None:
    other = 10 - family
    host.ip(f"link add {DEVICE[family]} type bridge")
    with plane(host) as dp:
        report = dp.sync([lease_of(host), *peers(PEERS)])

    assert list(report.family_errors) == [family]
    assert observed(host, other) == expected(peers(PEERS), other)


def test_invariant_6_what_is_gone_or_there_is_a_success(
    dp: DataPlane, host: Any, family: int
) -> None:
    """Everything is deleted, or added, behind the back of a data plane that acts from memory."""
    dp.sync([lease_of(host), *peers(PEERS)])
    device = DEVICE[family]
    with plane(host, family) as other:
        other.sync([lease_of(host), *peers(range(2, 31))])
        report = dp.update(removed=[peer(1)])
        assert report.ok
        assert report.failures == []

        other.sync([lease_of(host), *peers(range(2, 32))])
    report = dp.update(added=[peer(31)])

    assert report.ok, report.to_json()
    assert observed(host, family) == expected(peers(range(2, 32)), family)
    assert ifindex(host, device)


def test_invariant_7_a_list_that_shrinks_sharply_is_refused(
    dp: DataPlane, host: Any, family: int
) -> None:
    dp.sync([lease_of(host), *peers(PEERS)])
    before = everything(host)
    sent_before = sent(dp)

    with pytest.raises(ShrinkRefused, match="16 of 30") as caught:
        dp.sync([lease_of(host), *peers(range(17, 31))])

    assert "--allow-shrink" in caught.value.hint
    assert everything(host) == before
    assert sent(dp) == sent_before
    assert dp.sync([lease_of(host), *peers(range(16, 31))]).ok  # half of them may go
    with plane(host, family, allow_shrink=True) as willing:
        assert willing.sync([lease_of(host), *peers(range(30, 31))]).ok
    assert observed(host, family) == expected(peers([30]), family)


def test_invariant_7_ten_peers_may_go_at_once(dp: DataPlane, host: Any, family: int) -> None:
    dp.sync([lease_of(host), *peers(range(1, 12))])

    assert dp.sync([lease_of(host), *peers([11])]).ok
    assert observed(host, family) == expected(peers([11]), family)


def test_invariant_7_a_shrink_of_one_family_writes_to_neither(host: Any) -> None:
    with plane(host) as dp:
        dp.sync([lease_of(host), *peers(PEERS)])
        before = everything(host)
        only_v4 = [peer(n, ipv6_subnet="") for n in range(1, 40)]

        with pytest.raises(ShrinkRefused, match="IPv6"):
            dp.sync([lease_of(host), *only_v4])

    assert everything(host) == before


def test_invariant_7_an_empty_list_changes_nothing(dp: DataPlane, host: Any, family: int) -> None:
    dp.sync([lease_of(host), *peers(PEERS)])
    before = everything(host)

    with pytest.raises(SourceError, match="no lease was published with"):
        dp.sync([])
    with plane(host, family, subnet=subnet(family, 0)) as named, pytest.raises(ShrinkRefused):
        named.sync([])

    assert everything(host) == before


def test_invariant_8_unchanged_peers_lose_no_packet(
    make_host: Callable[..., Any], family: int
) -> None:
    here, there = make_host(), make_host()
    leases = [lease_of(here, 0), lease_of(there, 1)]
    with plane(there, family) as far, plane(here, family) as near:
        far.sync(leases)
        near.sync([*leases, *peers(range(2, 60))])
        with Pings(here.ns, address(family, 1)) as pings:
            for step in range(5):
                near.sync([*leases, *peers(range(2 + step * 25, 60 + step * 25))])
                with plane(here, family) as fresh:
                    fresh.sync([*leases, *peers(range(15 + step * 25, 80 + step * 25))])
            pings.await_answers(3)

    assert pings.sent > 5
    assert pings.lost == 0


def test_invariant_9_the_kernel_forwards_when_the_agent_is_gone(
    make_host: Callable[..., Any], family: int
) -> None:
    here, there = make_host(), make_host()
    leases = [lease_of(here, 0), lease_of(there, 1)]
    for one in (here, there):
        dp = plane(one, family)
        dp.sync(leases)
        dp.close()
        del dp

    assert here.ping(address(family, 1), 3)


def test_invariant_10_steady_state_forks_and_dumps_nothing(
    dp: DataPlane, host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update of one peer reads no table, and writes as much among 10 as among 300."""
    dp.sync([lease_of(host), *peers(range(1, 11))])
    few = _writes_of_one_update(dp, 700, monkeypatch)
    dp.sync([lease_of(host), *peers(range(1, 301))])
    many = _writes_of_one_update(dp, 701, monkeypatch)

    assert few == many == (4 if family == 4 else 3)


def _writes_of_one_update(dp: DataPlane, number: int, monkeypatch: pytest.MonkeyPatch) -> int:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a dump or a fork in steady state")

    before = sent(dp)
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "diff", refuse)
        patch.setattr(Kernel, "read", refuse)
        patch.setattr("os.fork", refuse)
        patch.setattr("subprocess.Popen", refuse)
        assert dp.update(added=[peer(number)]).ok
    return sent(dp) - before


def test_invariant_11_both_families_write_the_same_tables(host: Any) -> None:
    """Apart from nexthop objects, which IPv6 does not need, one code path serves both."""
    reports = {}
    for family in (4, 6):
        with plane(host, family) as dp:
            reports[family] = dp.sync([lease_of(host), *peers(PEERS)]).tables

    assert reports[4].pop("nexthop")["added"] == len(PEERS)
    assert reports[6].pop("nexthop")["added"] == 0
    assert reports[4] == reports[6]


def test_invariant_12_an_interrupted_dump_is_never_trusted(
    dp: DataPlane, host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When reading fails, the family is reported as failed and nothing is written.

    tests/kernel/test_core.py has the same one level below, message by message.
    """
    dp.sync([lease_of(host), *peers(PEERS)])
    before, sent_before = everything(host), sent(dp)

    def interrupted(self: Kernel, *args: Any) -> Any:
        raise KernelError(errno.EINTR, "dump route table")

    monkeypatch.setattr(Kernel, "diff", interrupted)
    with pytest.raises(KernelError, match="dump"):
        dp.sync([lease_of(host), *peers(range(5, 40))])

    assert sent(dp) == sent_before
    assert everything(host) == before


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
        dp._kernel = Kernel(host.ns, rcvbuf=4096)

        with caplog.at_level(logging.INFO):
            report = dp.sync([lease_of(host), *peers(range(1, 201))])

        assert dp.kernel.channel.overruns > 0
    assert len(report.conflicts) == len(taken)
    assert report.failures == []
    served = expected(peers(range(61, 201)), family)["route"]
    assert observed(host, family)["route"] == served
