"""A sync that is killed at any message leaves nothing that harms, and the next one is clean."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flannel_dp import BackendData
from tests.adversity.conftest import ROOT, WORKER
from tests.lib.kernel import expected, observed
from tests.lib.leases import address, lease_of, mac, peer, peers, plane
from tests.lib.traffic import Pings

BATCH = 128


@contextmanager
def victims(host: Any, family: int, path: str) -> Iterator[Callable[[int], bool]]:
    """``kill(point)`` runs a sync that is killed there; whether it lived to see that."""
    command = [*WORKER, "kill-at", host.ns, str(family), path]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        stdin, stdout = process.stdin, process.stdout

        def kill(point: int) -> bool:
            stdin.write(f"{point}\n")
            stdin.flush()
            answer = json.loads(stdout.readline())
            assert answer["killed"] or answer["exit"] == 0
            return bool(answer["killed"])

        yield kill
        stdin.close()


def unresolved(state: dict[str, set[Any]]) -> set[str]:
    """Gateways of routes that no neighbour, or no FDB entry behind it, resolves."""
    macs = dict(state["neighbour"])
    known = {lladdr for lladdr, _ in state["fdb"]}
    return {route[1] for route in state["route"] if macs.get(route[1]) not in known}


def spread(total: int, family: int) -> range:
    """Points all over a sync; IPv6's are between IPv4's."""
    return range(1 if family == 4 else 15, total, 28)


def points(total: int, family: int) -> list[int]:
    """Around every batch's end, and others in between."""
    near = {n + d for n in range(0, total, BATCH) for d in (-1, 0, 1)}
    return sorted(n for n in near | {*spread(total, family)} | {total} if 0 < n <= total)


def test_a_sync_killed_at_any_message(
    make_host: Callable[..., Any], lease_file: Callable[..., str], family: int
) -> None:
    here, there = make_host(), make_host()
    both = [lease_of(here, 0), lease_of(there, 1)]
    before = [*both, *peers(range(2, 120))]
    changed = [
        peer(n, public_ip=f"198.18.200.{n}", public_ipv6=f"2001:db8:1::200:{n}")
        for n in range(60, 70)
    ]
    remade = [
        peer(n, backend_data=_mac(4, n + 500), backend_v6_data=_mac(6, n + 500))
        for n in range(70, 80)
    ]
    after = [*both, *changed, *remade, *peers(range(80, 120)), *peers(range(200, 260))]

    with plane(there, family) as far:
        far.sync(both)
    with plane(here, family, allow_shrink=True, lock=False) as dp:
        dp.sync(before)
        total = len(dp.plan(after).to_json()["operations"])
        with (
            Pings(here.ns, address(family, 1)) as pings,
            victims(here, family, lease_file(after)) as kill,
        ):
            killed = 0
            for point in points(total, family):
                dp.sync(before)
                assert kill(point)
                killed += 1
                # Not even the peers whose MAC changes are between two worlds.
                assert unresolved(observed(here, family)) == set()
                with plane(here, family, allow_shrink=True) as fresh:
                    assert fresh.sync(after).ok
                assert observed(here, family) == expected(after[1:], family)
            assert not kill(total + 1)

    assert killed >= 20
    assert pings.lost == 0


def _mac(family: int, number: int) -> BackendData:
    return BackendData(1, mac(family, number))


def test_a_first_sync_killed_while_it_makes_the_device(
    host: Any, lease_file: Callable[..., str], family: int
) -> None:
    leases = [lease_of(host), *peers(range(1, 20))]
    with victims(host, family, lease_file(leases)) as kill:
        step = -1
        while kill(step):
            with plane(host, family) as dp:
                assert dp.sync(leases).ok
                assert observed(host, family) == expected(leases[1:], family)
                dp.clean()
            step -= 1
    assert step <= -4  # accept_ra, address, up at least


def test_a_first_sync_killed_between_the_tables(
    host: Any, lease_file: Callable[..., str], family: int
) -> None:
    """From nothing: at no point is there a route that is not resolved."""
    leases = [lease_of(host), *peers(range(1, 60))]
    total = 59 * (4 if family == 4 else 3)  # two batches
    with victims(host, family, lease_file(leases)) as kill:
        for point in spread(total, family):
            assert kill(point)
            assert unresolved(observed(host, family)) == set()
            with plane(host, family) as dp:
                assert dp.sync(leases).ok
                assert observed(host, family) == expected(leases[1:], family)
                dp.clean()
