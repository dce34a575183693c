"""What is not ours: 500 random objects of others stay byte for byte, and one in our place is
a conflict that stops nobody else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from flannel_dp import DataPlane, Route
from tests.lib.kernel import everything, expected, observed, places, stranger
from tests.lib.leases import address, endpoint, lease_of, peer, peers, plane, subnet


@pytest.fixture
def dp(host: Any, family: int) -> Iterator[DataPlane]:
    with plane(host, family, allow_shrink=True) as made:
        yield made


def litter(host: Any, family: int, seed: int, count: int) -> None:
    """``count`` random routes, rules, neighbours, proxies, nexthops and FDB entries."""
    chance = random.Random(seed)
    devices = ["other0", "other1", "vx8", "vx9"]
    for name in devices[:2]:
        stranger(host, name)
    for number, name in enumerate(devices[2:], 8):
        host.ip(
            f"link add {name} type vxlan id {number} local {host.underlay(family)} dev eth0 "
            f"dstport {4780 + number} nolearning"
        )
        host.ip(f"link set {name} addrgenmode none up")
    ip_lines, bridge_lines = [], []
    for number in range(count):
        device, where = chance.choice(devices), subnet(family, 1000 + number)
        host_address, kind = address(family, 1000 + number), chance.randrange(7)
        lladdr = f"02:aa:00:00:{number >> 8:02x}:{number & 255:02x}"
        protocol = chance.choice(["static", "boot", "bgp", "137", "139"])
        if kind == 0:
            metric = chance.choice(["", "metric 77", "metric 1024"])
            ip_lines.append(f"route add {where} dev {device} proto {protocol} {metric}")
        elif kind == 1:
            refusal = chance.choice(["blackhole", "unreachable", "prohibit"])
            ip_lines.append(f"route add {refusal} {where} table {chance.randrange(100, 200)}")
        elif kind == 2:
            ip_lines.append(f"neigh add {host_address} lladdr {lladdr} dev {device}")
        elif kind == 3:
            ip_lines.append(f"rule add from {where} lookup 100 priority {2000 + number}")
        elif kind == 4:
            ip_lines.append(f"neigh add proxy {host_address} dev {device}")
        elif kind == 5:
            number_ours = 0x5AF00000 + (1000 + number << 8)  # as a peer there would have
            chosen = chance.choice([number + 1, number_ours])
            ip_lines.append(f"nexthop add id {chosen} dev {device} proto {protocol}")
        else:
            vxlan, remote = chance.choice(devices[2:]), endpoint(family, number)
            bridge_lines.append(f"fdb add {lladdr} dev {vxlan} dst {remote} self permanent")
    _batch("ip", host, f"-{family}", ip_lines)
    _batch("bridge", host, "-s", bridge_lines)


def _batch(program: str, host: Any, option: str, lines: list[str]) -> None:
    from tests.lib.short import run

    run(program, option, "-batch", "-", stdin="\n".join(lines) + "\n", netns=host.ns)


@pytest.mark.parametrize("seed", [1, 2])
def test_500_random_objects_of_others_are_untouched(
    dp: DataPlane, host: Any, family: int, seed: int
) -> None:
    litter(host, family, seed, 500)
    before = everything(host)
    assert len(before) > 500
    leases = [lease_of(host), *peers(range(1, 60))]

    def untouched() -> bool:
        now = set(everything(host))
        return [line for line in before if line in now] == before

    dp.plan(leases)
    assert everything(host) == before
    assert dp.sync(leases).ok
    assert untouched()
    dp.update(added=[peer(90)], removed=[peer(3)])
    assert untouched()
    dp.sync([lease_of(host)])
    assert untouched()
    dp.explain(address(family, 5))
    dp.clean()
    assert everything(host) == before


@pytest.mark.parametrize("nexthops", [True, False], ids=["objects", "gateways"])
@pytest.mark.parametrize("metric", ["", "proto static", "proto bgp"])
def test_a_foreign_route_in_our_place(host: Any, family: int, metric: str, nexthops: bool) -> None:
    stranger(host, "other0")
    for number in (5, 9):
        host.ip(f"-{family} route add {subnet(family, number)} dev other0 {metric}")
    before = everything(host)
    leases = [lease_of(host), *peers(range(1, 20))]
    taken = sorted([subnet(family, 5), subnet(family, 9)])
    served = [lease for lease in leases[1:] if lease not in (peer(5), peer(9))]

    with plane(host, family, nexthops=nexthops) as dp:
        told = dp.plan(leases)
        assert places(told.conflicts()) == taken
        for _ in range(2):
            report = dp.sync(leases)
            assert not report.ok
            assert places(report.conflicts) == taken
            assert {f.protocol for _, f in report.conflicts if isinstance(f, Route)} == {
                {"": 3, "proto static": 4, "proto bgp": 186}[metric]
            }
            assert report.failures == []
            wanted = expected(served, family, nexthops=nexthops)["route"]
            assert observed(host, family)["route"] == wanted
            now = set(everything(host))
            assert [line for line in before if line in now] == before

        host.ip(f"-{family} route del {taken[0]} dev other0")
        host.ip(f"-{family} route del {taken[1]} dev other0")
        assert dp.sync(leases).ok
    assert observed(host, family) == expected(leases[1:], family, nexthops=nexthops)


def test_a_foreign_default_and_wider_routes_are_no_conflict(
    dp: DataPlane, host: Any, family: int
) -> None:
    """Only the same prefix at the same metric is our place."""
    stranger(host, "other0")
    wider = "10.0.0.0/8" if family == 4 else "fd00::/16"
    host.ip(f"-{family} route add default dev other0")
    host.ip(f"-{family} route add {wider} dev other0")
    host.ip(f"-{family} route add {subnet(family, 5)} dev other0 metric 5000")
    before = everything(host)
    leases = [lease_of(host), *peers(range(1, 20))]

    assert dp.plan(leases).conflicts() == []
    report = dp.sync(leases)

    assert report.ok, report.to_json()
    assert observed(host, family) == expected(leases[1:], family)
    dp.clean()
    assert everything(host) == before
