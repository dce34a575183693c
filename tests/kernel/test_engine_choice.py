"""``--firewall auto``: the engine that lets pods through, by what others put into the firewall.

Two nodes with Docker's bridge, both families, pods made from subnet.env; the foreign rules come
before the first sync, as on a host where Docker was there first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.lib.cni_site import (
    DOCKER,
    SERVICES,
    WORDS,
    Site,
    SiteNode,
    of_a_node,
    refused,
    subnet,
    transfer,
)

BACKENDS: dict[str, dict[str, Any]] = {"host-gw": {"Type": "host-gw"}, "vxlan": {"Type": "VxLAN"}}

DROP = "-P FORWARD DROP"
#: What Docker has beside them, on its bridge.
BRIDGE = (
    "-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "-A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
    "-A FORWARD -i docker0 -o docker0 -j ACCEPT",
)
#: What kube-proxy has: an accept of packets that something else marked, which is not all of them.
KUBE = (
    "-N KUBE-FORWARD",
    "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
    "-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT",
    "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "-A FORWARD -j KUBE-FORWARD",
)
#: Accepts of packets that are told by what we cannot know.
UNKNOWN = (
    "-A FORWARD -m connmark --mark 0x77 -j ACCEPT",
    "-A FORWARD -m addrtype --dst-type LOCAL -j ACCEPT",
    "-A FORWARD -m length --length 9000: -j RETURN",
)


class Case(NamedTuple):
    """Rules of others, in one kind of iptables, and the engine that lets pods through."""

    kind: str
    rules: tuple[str, ...]
    engine: str


CASES = {
    "plain": Case("nft", (), "nft"),
    "masquerade": Case("nft", (DOCKER,), "nft"),
    "docker": Case("nft", (DROP, DOCKER, *BRIDGE), "iptables"),
    "docker-legacy": Case("legacy", (DROP, DOCKER, *BRIDGE), "iptables-legacy"),
    "docker-kubernetes": Case("nft", (DROP, DOCKER, *KUBE, *BRIDGE), "iptables"),
    "unknown": Case("nft", (*UNKNOWN, DROP), "iptables"),
    "unknown-legacy": Case("legacy", (DROP, *UNKNOWN), "iptables-legacy"),
    "drop": Case("nft", (DROP,), "iptables"),
    "drop-legacy": Case("legacy", (DROP,), "iptables-legacy"),
    "reject": Case("nft", SERVICES, "iptables"),
    "reject-legacy": Case("legacy", SERVICES, "iptables-legacy"),
}


def iptables(node: SiteNode, kind: str, family: int, rule: str) -> None:
    words = rule.format(own=subnet(family, node.number), **WORDS[family]).split()
    node.exec(f"{'iptables' if family == 4 else 'ip6tables'}-{kind}", *words)


def give(node: SiteNode, kind: str, rules: tuple[str, ...]) -> None:
    for family in (4, 6):
        for rule in rules:
            iptables(node, kind, family, rule)


def clear(node: SiteNode) -> None:
    """A firewall as after a boot."""
    node.exec("nft", "flush ruleset")
    for family in (4, 6):
        for rule in ("-P FORWARD ACCEPT", "-F", "-X", "-t nat -F", "-t nat -X"):
            iptables(node, "legacy", family, rule)


def ruleset(node: SiteNode) -> str:
    """All rules, without what the kernel counts."""
    saved = [f"{word}-legacy-save" for word in ("iptables", "ip6tables")]
    shown = [node.exec("nft", "-s", "list", "ruleset"), *(node.exec(name) for name in saved)]
    return "\n".join(
        line.partition(" [")[0] for text in shown for line in text.splitlines() if line[:1] != "#"
    )


def sync(node: SiteNode, *more: str) -> Any:
    code, report, said = node.flannel_dp("sync", "--ip-masq", *more)
    assert code == 0, said
    return report


@pytest.fixture(scope="module", params=BACKENDS)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("choice"), (21, 22)) as made:
        made.configure(BACKENDS[request.param])
        for number, node in made.nodes.items():
            sync(node)
            made.add_pod(number, "docker0")
        made.settle()
        for node in made.nodes.values():
            clear(node)
        yield made
        for node in made.nodes.values():
            clear(node)


@pytest.fixture
def bare(site: Site) -> Iterator[Site]:
    """The site with no firewall rules, before and after."""
    yield site
    for node in site.nodes.values():
        clear(node)


def pods_see_each_other(site: Site, family: int) -> bool:
    """Whether each pod takes the other's bytes as the other's."""
    one, other = site.pods.values()
    return all(
        transfer(family, a, b, b.address[family], 1 << 16)[0] == a.address[family]
        for a, b in ((one, other), (other, one))
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pods_talk_under_their_own_names_whatever_others_block(bare: Site, case: Case) -> None:
    one, other = bare.pods.values()
    for node in bare.nodes.values():
        give(node, case.kind, case.rules)
    blocked = case.engine != "nft"
    assert all(refused(family, one, other.address[family]) is blocked for family in (4, 6))

    reports = [sync(node) for node in bare.nodes.values()]

    assert [report["rules"]["engine"] for report in reports] == [case.engine] * 2
    assert [of_a_node(report["warnings"]) for report in reports] == [[], []]
    for family in (4, 6):
        assert pods_see_each_other(bare, family)
    before = ruleset(bare.nodes[21])
    assert sync(bare.nodes[21])["rules"] == {"engine": case.engine, "changes": []}
    assert ruleset(bare.nodes[21]) == before


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_an_engine_that_lets_pods_through_stays_when_it_is_not_needed(
    bare: Site, kind: str
) -> None:
    node = bare.nodes[21]
    give(node, kind, (DROP,))
    engine = sync(node)["rules"]["engine"]
    give(node, kind, ("-P FORWARD ACCEPT",))

    after = sync(node)["rules"]

    assert "iptables" in engine
    assert (after["engine"], after["changes"]) == (engine, [])


def test_what_flanneld_left_does_not_hide_the_block(bare: Site) -> None:
    """Its chain accepts pods until the next boot, in memory only."""
    node = bare.nodes[21]
    flanneld = ("-N FLANNEL-FWD", "-A FLANNEL-FWD -j ACCEPT", "-A FORWARD -j FLANNEL-FWD")
    give(node, "nft", (DROP, *flanneld))

    assert sync(node)["rules"]["engine"] == "iptables"


def test_both_kinds_that_block_are_named(bare: Site) -> None:
    """What is accepted in one is not accepted in the other."""
    node = bare.nodes[21]
    for kind in ("nft", "legacy"):
        give(node, kind, (DROP,))

    report = sync(node)

    assert report["rules"]["engine"] == "iptables"
    blocked = [text for text in report["warnings"] if "policy DROP of FORWARD" in text]
    assert len(blocked) == 2  # one of each family
    assert all("iptables-legacy" in text or "ip6tables-legacy" in text for text in blocked)
