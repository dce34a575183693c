"""Whatever is done to entries is undone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flannel_dp.reconcile.watch import Watch
from tests.lib.hosts import Lab
from tests.lib.kernel import expected, observed
from tests.lib.leases import DEVICE, address, endpoint, lease_of, mac, peers, plane, subnet
from tests.lib.watched_node import Kept, nexthop_id, settle


class Meddler:
    """Random changes to a node, by iproute2, of one or a few words each."""

    def __init__(self, host: Any, seed: int) -> None:
        self.host, self.chance = host, random.Random(seed)

    def line(self, family: int) -> tuple[str, str]:
        chance = self.chance
        number, other = chance.randrange(1, 8), chance.randrange(1, 8)
        dev, net, via = DEVICE[family], subnet(family, number), address(family, other)
        metric = "metric 1024" if family == 6 else ""
        ip = [
            f"route del {net}",
            f"route replace {net} dev {dev} {metric}",
            f"route replace {net} via {via} dev {dev} onlink proto 138 {metric}",
            f"route add {subnet(family, number + 70)} dev {dev}",
            f"neigh del {address(family, number)} dev {dev}",
            f"neigh replace {address(family, number)} lladdr {mac(family, other)} dev {dev}",
            f"neigh replace {address(family, number + 70)} lladdr {mac(family, other)} dev {dev}",
        ]
        if family == 4:
            ip += [
                f"nexthop del id {nexthop_id(number)}",
                f"nexthop replace id {nexthop_id(number)} via {via} dev {dev} onlink proto 138",
                f"nexthop replace id {nexthop_id(number)} via {address(4, number)} dev {dev} "
                "onlink proto 138",
                f"route replace {net} nhid {nexthop_id(other)} proto 138",
            ]
        bridge = [
            f"fdb del {mac(family, number)} dev {dev}",
            f"fdb replace {mac(family, number)} dev {dev} dst {endpoint(family, other)} self "
            "permanent",
            f"fdb replace {mac(family, number + 70)} dev {dev} dst {endpoint(family, other)} self "
            "permanent",
        ]
        chosen = chance.choice([*ip, *bridge])
        return ("bridge" if chosen in bridge else "ip"), chosen

    def meddle(self, family: int, count: int) -> None:
        """Failures are as good as successes."""
        import subprocess

        for _ in range(count):
            program, words = self.line(family)
            options = ["-s"] if program == "bridge" else [f"-{family}"]
            subprocess.run(
                [program, *options, "-n", self.host.ns, *words.split()],
                capture_output=True,
                check=False,
            )


@pytest.fixture(scope="module")
def shared() -> Iterator[Kept]:
    with Lab() as lab:
        host = lab.host()
        made = Kept(host, plane(host), [lease_of(host), *peers(range(1, 8))])
        yield made
        made.close()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 8))
def test_whatever_is_done_to_entries_is_undone(
    shared: Kept, family: int, seed: int, count: int
) -> None:
    Meddler(shared.host, seed).meddle(family, count)
    settle(shared.watch)

    assert observed(shared.host, family) == expected(shared.leases[1:], family)
    report = shared.dp.resync()
    assert report.writes == 0, "and reading everything finds nothing else"


def test_a_family_that_is_out_of_line_is_not_mended_over_and_over(host: Any, family: int) -> None:
    leases = [lease_of(host), *peers(range(1, 6))]
    with plane(host, family) as dp, Watch(dp) as watching:
        dp.sync(leases)
        watching.remember()
        while watching.read():
            watching.repair()
        dp.peers[family].in_sync = False

        host.ip(f"-{family} route del {subnet(family, 2)}")
        assert not watching.read()

        dp.peers[family].in_sync = True
        assert watching.read()
        watching.repair()
        assert observed(host, family) == expected(leases[1:], family)
