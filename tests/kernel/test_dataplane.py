"""DataPlane against a real kernel: the invariants of docs/architecture.md, for both
families; iproute2 says what the kernel holds, and a plain loop over the leases what it
should hold."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import DataPlane, KernelError, ShrinkRefused, SourceError
from flannel_dp.kernel.tables import Kernel
from tests.lib.cluster_script import ClusterRun
from tests.lib.kernel import everything, expected, has_device, ifindex, observed, stranger
from tests.lib.leases import DEVICE, address, lease_of, mac, peer, peers, plane, subnet
from tests.lib.monitor import Monitor
from tests.lib.planes import PEERS, counts, sent
from tests.lib.script import Script, each_script
from tests.lib.traffic import Pings


@pytest.fixture
def dp(host: Any, family: int) -> Iterator[DataPlane]:
    """The data plane of ``host``, of one family."""
    with plane(host, family) as made:
        yield made


@each_script(Path(__file__).with_name("dataplane.txt"))
def test_invariants_and_plans(script: Script, host: Any, family: int) -> None:
    ClusterRun(script, host, family).run()


def test_invariant_1_a_second_sync_writes_nothing(dp: DataPlane, host: Any, family: int) -> None:
    leases = [lease_of(host), *peers(PEERS)]
    dp.sync(leases)
    sent_before = sent(dp)
    with Monitor(host) as monitor:
        again = dp.sync(leases)
        with plane(host, family, lock=False) as fresh:
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
        plan = dp.plan([mine, *peers(PEERS)])
        report = dp.sync([mine, *peers(PEERS)])

    assert counts(plan.to_json(), "added") == counts(report.to_json(), "added")
    assert [device.name for device in plan.devices] == [DEVICE[4]]
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
    with plane(host, family, lock=False) as other:
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

    assert "allow_shrink=True" in caught.value.hint
    assert caught.value.report.ok
    assert everything(host) == before
    assert sent(dp) == sent_before
    assert dp.sync([lease_of(host), *peers(range(16, 31))]).ok  # half of them may go
    with plane(host, family, allow_shrink=True, lock=False) as willing:
        assert willing.sync([lease_of(host), *peers(range(30, 31))]).ok
    assert observed(host, family) == expected(peers([30]), family)


def test_invariant_7_a_shrink_of_one_family_leaves_the_other_alone(host: Any) -> None:
    with plane(host) as dp:
        dp.sync([lease_of(host), *peers(PEERS)])
        only_v4 = [peer(n, ipv6_subnet="") for n in range(2, 40)]

        with pytest.raises(ShrinkRefused, match="30 of 30 IPv6"):
            dp.sync([lease_of(host), *only_v4])

    assert observed(host, 4) == expected(peers(range(2, 40)), 4)
    assert observed(host, 6) == expected(peers(PEERS), 6)


def test_invariant_7_an_empty_list_changes_nothing(dp: DataPlane, host: Any, family: int) -> None:
    dp.sync([lease_of(host), *peers(PEERS)])
    before = everything(host)

    with pytest.raises(SourceError, match="no lease was published with"):
        dp.sync([])
    with (
        plane(host, family, subnet=subnet(family, 0), lock=False) as named,
        pytest.raises(ShrinkRefused),
    ):
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
                with plane(here, family, lock=False) as fresh:
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

    tests/kernel/test_core_failures.py has the same one level below, message by message.
    """
    dp.sync([lease_of(host), *peers(PEERS)])
    before, sent_before = everything(host), sent(dp)

    def interrupted(self: Kernel, *args: Any, **more: Any) -> Any:
        raise KernelError(errno.EINTR, "dump route table")

    monkeypatch.setattr(Kernel, "diff", interrupted)
    with pytest.raises(KernelError, match="dump"):
        dp.sync([lease_of(host), *peers(range(5, 40))])

    assert sent(dp) == sent_before
    assert everything(host) == before
