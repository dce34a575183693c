"""The guard of the VXLAN port follows the peers, and rules of others that block are named."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import ConfigError, DataPlane, FlannelDPError
from flannel_dp.look.explain import explain
from flannel_dp.look.show import show
from tests.lib.firewall import (
    ENGINES,
    PEERS,
    WORD,
    cluster,
    endpoints,
    guarded,
    installed,
    iptables,
    options,
)
from tests.lib.kernel import observed
from tests.lib.leases import address, endpoint, lease_of, mac, network_config, peer, plane, subnet


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_guard_is_the_endpoints_of_accepted_leases(host: Any, family: int, engine: str) -> None:
    liar = peer(9, backend_data=None, backend_v6_data=None)  # refused: it has no MAC
    with plane(host, family, rules=options(engine, guard=True)) as dp:
        report = dp.sync([*cluster(host), liar])

        assert {rejection.lease for rejection in report.rejected} == {liar.key}
        assert guarded(host, family) == endpoints(family, PEERS)
        assert dp.sync(cluster(host)[:-1]).ok
        assert guarded(host, family) == endpoints(family, [1, 2])


def test_the_guard_follows_updates(host: Any, family: int, engine: str) -> None:
    with plane(host, family, rules=options(engine, guard=True)) as dp:
        dp.sync(cluster(host))
        known = {number: peer(number) for number in PEERS}
        steps: list[tuple[dict[int, Any], list[int]]] = [
            ({4: peer(4), 5: peer(5)}, []),
            ({2: at(22, 2)}, []),  # a peer moves
            ({6: at(1, 6)}, []),  # two leases with one endpoint
            ({}, [1]),  # one of the two leaves, the endpoint stays
            ({}, [6]),  # and now it goes
            ({7: peer(7)}, [4, 5]),
        ]
        for added, removed in steps:
            report = dp.update(added.values(), [known.pop(number) for number in removed])
            known |= added
            wanted = {getattr(lease, _UNDERLAY[family]) for lease in known.values()}

            assert report.ok
            assert guarded(host, family) == wanted
            assert dp.plan([lease_of(host), *known.values()]).is_empty


_UNDERLAY = {4: "public_ip", 6: "public_ipv6"}


def at(place: int, number: int) -> Any:
    """Node ``number`` with the underlay addresses of node ``place``."""
    return peer(number, public_ip=endpoint(4, place), public_ipv6=endpoint(6, place))


def test_the_guard_follows_when_claims_meet(host: Any, family: int) -> None:
    """A subnet that two nodes claim: when the winner leaves, the other one may come in."""
    rival = peer(
        1,
        public_ip=endpoint(4, 50),
        public_ipv6=endpoint(6, 50),
        backend_data=peer(50).backend_data,
        backend_v6_data=peer(50).backend_v6_data,
        name="rival",
    )
    first = peer(1, name="first")
    both = {"first": endpoint(family, 1), "rival": endpoint(family, 50)}
    rest = endpoints(family, [2, 3])
    with plane(host, family, rules=options(guard=True)) as dp:
        report = dp.sync([lease_of(host), first, rival, peer(2), peer(3)])
        (loser,) = {rejection.lease for rejection in report.rejected}
        winner = next(name for name in both if name != loser)
        assert guarded(host, family) == {both[winner], *rest}

        assert dp.update(removed=[winner]).ok
        assert guarded(host, family) == {both[loser], *rest}


def test_a_guard_that_somebody_removed_is_reported_and_mended(host: Any, family: int) -> None:
    with plane(host, family, rules=options(guard=True)) as dp:
        dp.sync(cluster(host))
        host.exec("nft", "delete", "table", WORD[family], "flannel-dp")

        report = dp.update(added=[peer(4)])

        assert not report.ok
        assert "firewall" in report.problems
        assert (mac(family, 4), endpoint(family, 4)) in observed(host, family)["fdb"]
        assert dp.sync([*cluster(host), peer(4)]).ok
        assert guarded(host, family) == endpoints(family, range(1, 5))


def test_the_guard_needs_a_tunnel(host: Any, family: int) -> None:
    with pytest.raises(ConfigError, match="--guard-underlay guards the VXLAN port"):
        DataPlane(
            network_config(family, Type="host-gw"),
            iface="eth0",
            netns=host.ns,
            rules=options(guard=True),
        )


def test_the_guard_of_10000_peers(host: Any, family: int) -> None:
    leases = [lease_of(host), *(_one_of_many(family, number) for number in range(1, 10_001))]
    with plane(host, family, rules=options(guard=True)) as dp:
        assert dp.sync(leases).ok
        again = dp.sync(leases)
        newcomer, leaver = _one_of_many(family, 10_001), leases[1]
        update = dp.update([newcomer], [leaver])

        assert again.rules is not None
        assert again.rules.changes == ()
        assert update.ok
        held = guarded(host, family)
        assert len(held) == 10_000
        assert getattr(newcomer, _UNDERLAY[family]) in held
        assert getattr(leaver, _UNDERLAY[family]) not in held


# ---- rules of others --------------------------------------------------------------------


def test_blockers_are_named_wherever_a_person_looks(host: Any, family: int) -> None:
    leases = cluster(host)
    with plane(host, family, rules=options(guard=True)) as dp:
        assert dp.blockers() == ()  # nothing is known before the first sync
        assert dp.sync(leases).ok
        assert dp.blockers() == dp.blockers(leases) == ()
        for chain in ("FORWARD", "INPUT"):
            iptables(host, family, "-A", chain, "-j", "REJECT")

        found = dp.blockers()

        assert len(found) == 2
        assert all('engine "iptables-nft"' in each for each in found)
        for each, chain in zip(found, ("FORWARD", "INPUT"), strict=True):
            assert f"(IPv{family})" in each
            assert f"-A {chain} -j REJECT" in each
        assert dp.blockers(leases) == found
        assert set(found) <= set(dp.plan(leases).warnings)
        for answer in (show(dp, leases), explain(dp, address(family, 2), leases)):
            assert tuple(answer.to_json()["blockers"]) == found
            assert str(answer).splitlines()[-3:] == ["blocked by:", *(f"  {f}" for f in found)]

    with plane(host, family, rules=options("iptables-nft", guard=True)) as dp:
        assert dp.sync(leases).ok
        assert dp.blockers() == ()
        assert show(dp, leases).blockers == explain(dp, address(family, 2)).blockers == ()


def test_blockers_are_asked_for_only_with_rules(host: Any, family: int) -> None:
    iptables(host, family, *["-A", "FORWARD", "-j", "REJECT"])
    with plane(host, family) as dp:
        dp.sync(cluster(host))
        assert dp.blockers() == dp.blockers(cluster(host)) == ()
        assert show(dp, cluster(host)).to_json()["blockers"] == []


def test_a_look_that_may_not_read_the_rules_is_still_one(
    host: Any,
    family: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with plane(host, family, rules=options()) as dp:
        dp.sync(cluster(host))
        host.exec(
            "nft",
            "add table inet other; add chain inet other c "
            "{ type filter hook forward priority 0; policy drop; }",
        )
        with installed(monkeypatch, tmp_path, "echo 'Error: out of order' >&2; exit 1"):
            overview = show(dp, cluster(host))
            with pytest.raises(FlannelDPError, match="out of order"):
                dp.blockers()

    assert [one.subnet for one in overview.families[0].peers] == [subnet(family, n) for n in PEERS]
    assert "irewall rules cannot be read" in caplog.text


def _one_of_many(family: int, number: int) -> Any:
    """A node of a cluster that has more than a /24 for each of the network would do for."""
    if family == 6:
        return peer(number)
    base = IPv4Address(address(4, 1)) + 16 * number
    return peer(number, subnet=f"{base}/28", ipv6_subnet="", public_ipv6="")
