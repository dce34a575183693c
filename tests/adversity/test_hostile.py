"""Leases that lie: none of them reaches the kernel, each gets one reason, and honest peers
are served. Who wins where two honest ones meet does not depend on who asks, nor when."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from flannel_dp import BackendData, Lease, SourceError
from flannel_dp._core import parse_prefix
from flannel_dp.cluster.admission import Node, pack, validate
from tests.lib.kernel import expected, has_device, observed
from tests.lib.leases import lease_of, mac, peer, peers, plane, subnet
from tests.lib.monitor import Monitor
from tests.lib.script import load

HONEST = peers(range(1, 31))


def _data(text4: str, text6: str = "", vni: int = 1) -> dict[str, BackendData]:
    return {
        "backend_data": BackendData(vni, text4),
        "backend_v6_data": BackendData(vni, text6 or text4),
    }


def _to(v4: str, v6: str) -> dict[str, str]:
    return {"subnet": v4, "ipv6_subnet": v6}


def _at(v4: str, v6: str) -> dict[str, str]:
    return {"public_ip": v4, "public_ipv6": v6}


def _fields(kind: str, v4: str, v6: str) -> dict[str, Any]:
    """The fields of a lease that claims this, in either family."""
    match kind:
        case "Subnets":
            return _to(v4, v6)
        case "Addresses":
            return _at(v4, v6)
        case "MACs" if v4 == "none":
            return {"backend_data": None, "backend_v6_data": None}
        case "MACs":
            return _data(v4, v6)
        case "VNIs":
            return _data(mac(4, 99), mac(6, 99), vni=int(v4))
        case "Backends":
            return {"backend_type": v4}
    raise AssertionError(kind)


#: The tables of hostile.txt: fields and reason by what is claimed, such as "MACs: zero".
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    f"{script.title}: {row['what it claims']}": (
        _fields(script.title, *(row[name].replace(r"\0", "\0") for name in ("IPv4", "IPv6"))),
        row["reason"],
    )
    for script in load(Path(__file__).with_name("hostile.txt"))
    for row in script["table"].table()
}


def hostile(name: str, number: int = 99) -> Lease:
    """A lease of ``HOSTILE``; it came last, so that it wins nowhere."""
    changes, _ = HOSTILE[name]
    return peer(number, **({"revision": 1 << 40, "name": f"evil {name}"} | changes))


@pytest.mark.parametrize("name", HOSTILE)
def test_one_hostile_lease_has_one_reason(host: Any, family: int, name: str) -> None:
    with plane(host, family) as dp:
        plan = dp.plan([lease_of(host), *HONEST, hostile(name)])

    assert [(r.lease, str(r.reason)) for r in plan.rejected] == [(f"evil {name}", HOSTILE[name][1])]
    assert plan.rejected[0].detail
    assert plan.counts()["route"]["added"] == len(HONEST)


def test_all_hostile_leases_at_once_change_nothing(host: Any, family: int) -> None:
    """Before, among and after the honest ones; the honest ones are what is served."""
    evil = [hostile(name, 300 + number) for number, name in enumerate(HOSTILE)]
    leases = [*evil[::2], lease_of(host), *HONEST, *evil[1::2]]
    with plane(host, family) as dp:
        report = dp.sync(leases)

        assert report.ok
        assert len(report.rejected) == len(evil)
        assert observed(host, family) == expected(HONEST, family)
        with Monitor(host) as monitor:
            for lease in evil:
                assert dp.update(added=[lease]).writes == 0
            assert monitor.events() == []
    assert observed(host, family) == expected(HONEST, family)


def test_a_claim_on_our_own_address_is_not_taken_for_ours(host: Any, family: int) -> None:
    """Another node publishes our public address with its own subnet, under a name and a
    revision that come first. What was given, or is there, tells which lease is ours."""
    impostor = peer(99, public_ip=host.ipv4, public_ipv6=host.ipv6, revision=0, name="a-evil")
    own = peer(0, public_ip=host.ipv4, public_ipv6=host.ipv6, name="node-0")
    leases = [impostor, own, *HONEST]
    with plane(host, family) as dp, pytest.raises(SourceError, match=r"a-evil.*node-0") as caught:
        dp.sync(leases)
    assert "subnet=" in caught.value.hint
    assert not has_device(host, family)

    for told in (subnet(family, 0), None):  # the second time there is a device
        with plane(host, family, subnet=told) as dp:
            report = dp.sync(leases)
        assert [str(r.reason) for r in report.rejected] == ["own-public-ip"]
        assert "lease node-0" in report.rejected[0].detail
        assert subnet(family, 0) in report.rejected[0].detail
        assert any("a-evil" in warning for warning in report.warnings)
        assert observed(host, family) == expected(HONEST, family)


def test_an_underlay_inside_the_network_is_not_routed_away(host: Any, family: int) -> None:
    """Addresses of this node and of its links may lie inside Network: nobody gets them."""
    inside, bits = (("10.241.0.9", 24), ("fd00:10:100::9", 64))[family == 6]
    host.ip(f"-{family} address add {inside}/{bits} dev eth0")
    leases = [lease_of(host), *HONEST, peer(256)]  # 10.241.0.0/24, fd00:10:100::/64
    with plane(host, family, public_ip=host.ipv4, public_ipv6=host.ipv6) as dp:
        report = dp.sync(leases)

    assert [str(r.reason) for r in report.rejected] == ["underlay"]
    assert observed(host, family) == expected(HONEST, family)


# ---- the same winner everywhere ----------------------------------------------------

_CONTEST = [
    *peers(range(1, 4)),
    peer(4, name="b", revision=5, **_at("198.18.7.1", "2001:db8:1::71")),
    peer(4, name="a", revision=5, **_at("198.18.7.2", "2001:db8:1::72")),
    peer(4, name="c", revision=4, **_at("198.18.7.3", "2001:db8:1::73")),
    peer(5, name="wide", revision=8, **_to("10.240.4.0/22", "fd00:10:4::/46")),
    peer(6, name="late", revision=9, **_data(mac(4, 3), mac(6, 3))),
    peer(7, name="twin", **_data(mac(4, 7), mac(6, 7))),
    peer(7, name="twin", **_data(mac(4, 8), mac(6, 8))),
]


def test_the_same_winner_on_every_node(make_host: Callable[..., Any], family: int) -> None:
    nodes = [make_host(), make_host()]
    owns = [lease_of(node, 200 + n) for n, node in enumerate(nodes)]
    chance = random.Random(3)
    found = []
    for node in nodes:
        leases = [*owns, *_CONTEST]
        chance.shuffle(leases)
        with plane(node, family) as dp:
            dp.sync(leases)
        found.append({row for row in observed(node, family)["fdb"] if row[1] != nodes[0].ipv4})
    others = {(mac(family, 200 + n), node.underlay(family)) for n, node in enumerate(nodes)}
    assert found[0] - others == found[1] - others


def test_no_winner_changes_on_another_reading(host: Any, family: int) -> None:
    chance = random.Random(5)
    leases = [lease_of(host), *_CONTEST]
    with plane(host, family) as dp:
        first = dp.sync(leases)
        assert len(first.rejected) == 5
        with Monitor(host) as monitor:
            for _ in range(20):
                chance.shuffle(leases)
                again = dp.sync(leases)
                assert again.writes == 0
                assert _verdicts(again.rejected) == _verdicts(first.rejected)
            assert monitor.events() == []


def _verdicts(rejected: Any) -> list[tuple[str, str, str]]:
    return sorted((r.lease, str(r.reason), r.detail) for r in rejected)


# ---- no accepted set takes an address of the underlay away ----------------------------

_V4 = st.sampled_from(
    ("192.0.2.9", "10.240.7.9", "198.18.0.1", "10.241.3.3", "172.16.0.1", "203.0.113.4")
)


@st.composite
def _claims(draw: st.DrawFn) -> list[Lease]:
    made = []
    for number in range(draw(st.integers(0, 8))):
        length = draw(st.integers(0, 32))
        base = draw(_V4 | st.just("10.240.0.0") | st.just("0.0.0.0"))
        made.append(
            peer(
                number,
                name=f"n{number}",
                subnet=f"{base}/{length}",
                public_ip=draw(_V4),
                backend_data=BackendData(1, mac(4, draw(st.integers(0, 9)))),
            )
        )
    return made


@seed(17)
@settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    leases=_claims(),
    network=st.sampled_from(("10.240.0.0/12", "10.0.0.0/8", "0.0.0.0/0", "10.240.0.0/20")),
    own=st.lists(_V4, min_size=1, max_size=3, unique=True),
)
def test_no_accepted_set_routes_an_underlay_address_into_the_overlay(
    leases: list[Lease], network: str, own: list[str]
) -> None:
    underlay = ("192.0.2.0/24", "172.16.0.1/32")
    node = Node(4, network, own[0], tuple(own), underlay, "10.240.200.0/24", mac(4, 200))

    claims = validate(pack(leases, 4, backend="vxlan", vni=1), node).accepted

    routed = [parse_prefix(claims.subnet(n)) for n in range(len(claims))]
    precious = [parse_prefix(f"{address}/32") for address in own]
    precious += [parse_prefix(f"{claims.endpoint(n)}/32") for n in range(len(claims))]
    precious += [parse_prefix(prefix) for prefix in (*underlay, node.subnet)]
    for mine in routed:
        assert not any(_overlap(mine, other) for other in precious)
    for number, one in enumerate(routed):
        assert not any(_overlap(one, other) for other in routed[number + 1 :])


def _overlap(a: tuple[int, bytes, int], b: tuple[int, bytes, int]) -> bool:
    keep = 32 - min(a[2], b[2])
    return int.from_bytes(a[1], "big") >> keep == int.from_bytes(b[1], "big") >> keep


# ---- very many ----------------------------------------------------------------------


def test_200000_leases_cost_less_than_their_own_memory(
    host: Any,
    lease_file: Callable[..., str],
    worker: Callable[..., list[Any]],
) -> None:
    """All of them claim a piece of an honest peer's subnet, and a MAC that is not theirs."""
    leases = [lease_of(host), *peers(range(1, 200))]
    count = 200_000
    [found] = worker("hostile-leases", host.ns, "4", lease_file(leases), count)

    assert found["peak"] < 2 * found["given"], found
    assert found["rejected"] > count // 2
