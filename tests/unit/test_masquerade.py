"""Which rules are wanted, how both engines spell them, and how rules of others are judged."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannel_dp._core import Claims
from flannel_dp.errors import ConfigError
from flannel_dp.resources.firewall import iptables, nft, nft_packets, probe
from flannel_dp.resources.firewall.iptables import SavedTable
from flannel_dp.resources.firewall.nft_layout import FAMILY
from flannel_dp.resources.firewall.packets import (
    Action,
    End,
    Match,
    Packets,
    RuleStep,
    negate,
    walk_chain,
)
from flannel_dp.resources.firewall.programs import Variant
from flannel_dp.resources.firewall.rules import (
    Except,
    FamilyRules,
    Rule,
    RulesWanted,
    Underlay,
    pack_addresses,
)

NETWORK = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}
OWN = {4: "10.244.3.0/24", 6: "fd00:10:244:3::/64"}
MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}
REMOTE = {4: "10.244.7.9", 6: "fd00:10:244:7::9"}
LOCAL = {4: "10.244.3.9", 6: "fd00:10:244:3::9"}
OUTSIDE = {4: "198.51.100.9", 6: "2001:db8:51::9"}
GROUP = {4: "239.1.2.3", 6: "ff0e::9"}

both = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])


def wanted(family: int, **changes: Any) -> RulesWanted:
    values: dict[str, Any] = {
        "families": {family: FamilyRules(NETWORK[family], OWN[family])},
        "ip_masq": True,
    }
    return RulesWanted(**values | changes)


def verdict(rules: Iterable[Rule], source: str, destination: str, *, marked: bool = False) -> str:
    """What the rules do with a packet, by plain reading: the first that matches wins."""
    for rule in rules:
        pairs = ((rule.source, source), (rule.destination, destination))
        if (marked or not rule.marked) and all(_is_in(*pair) for pair in pairs):
            return rule.verdict
    return "none"


def _is_in(cidr: str | Except | None, address: str) -> bool:
    if cidr is None:
        return True
    if isinstance(cidr, Except):
        return not _is_in(cidr.cidr, address)
    return ipaddress.ip_address(address) in ipaddress.ip_network(cidr)


@both
def test_verdicts_are_those_of_flannels_table(family: int) -> None:
    rules = wanted(family).postrouting(family)
    local, remote, outside = LOCAL[family], REMOTE[family], OUTSIDE[family]
    group = GROUP[family]

    assert verdict(rules, local, remote, marked=True) == "leave"
    assert verdict(rules, outside, local, marked=True) == "leave"
    assert verdict(rules, local, local) == "leave"
    assert verdict(rules, local, remote) == "keep"
    assert verdict(rules, remote, local) == "keep"
    assert verdict(rules, outside, local) == "keep"
    assert verdict(rules, local, outside) == "masquerade"
    assert verdict(rules, remote, outside) == "masquerade"
    assert verdict(rules, local, group) == "none"
    assert verdict(rules, outside, remote) == "masquerade"
    assert verdict(rules, outside, outside) == "none"


@both
def test_without_masquerade_sources_are_shielded_only(family: int) -> None:
    rules = wanted(family, ip_masq=False).postrouting(family)

    assert {rule.verdict for rule in rules} == {"leave", "keep"}
    assert verdict(rules, LOCAL[family], REMOTE[family]) == "keep"
    assert verdict(rules, OUTSIDE[family], LOCAL[family]) == "none"
    assert wanted(family, ip_masq=False, keep_sources=False).postrouting(family) == ()


def test_families_have_their_own_rules() -> None:
    rules = wanted(4)

    assert rules.postrouting(6) == rules.forwarding(6) == rules.welcome(6) == rules.guard(6) == ()
    assert wanted(4, forward=False).forwarding(4) == ()
    assert RulesWanted().guarded == ()


IPTABLES = """\
-m mark --mark 0x4000/0x4000 -m comment --comment "kube-proxy masquerades what it marked" -j RETURN
-s {own} -d {own} -m comment --comment "traffic on this node" -j RETURN
-s {own} -d {net} -m comment --comment "pod to overlay keeps its source" -j ACCEPT
-s {net} -d {own} -m comment --comment "overlay to local pod keeps its source" -j ACCEPT
! -s {net} -d {own} -m comment --comment "outside to local pod keeps its source" -j ACCEPT
-s {net} ! -d {multicast} -m comment --comment "pod to outside" -j MASQUERADE --random-fully
! -s {net} -d {net} -m comment --comment "host or outside to remote pod" \
-j MASQUERADE --random-fully
"""

NFT = """\
meta mark & 0x4000 == 0x4000 return comment "kube-proxy masquerades what it marked"
{ip} saddr {own} {ip} daddr {own} return comment "traffic on this node"
{ip} saddr {own} {ip} daddr {net} snat to {ip} saddr comment "pod to overlay keeps its source"
{ip} saddr {net} {ip} daddr {own} snat to {ip} saddr comment "overlay to local pod keeps its source"
{ip} saddr != {net} {ip} daddr {own} snat to {ip} saddr \
comment "outside to local pod keeps its source"
{ip} saddr {net} {ip} daddr != {multicast} masquerade fully-random comment "pod to outside"
{ip} saddr != {net} {ip} daddr {net} masquerade fully-random \
comment "host or outside to remote pod"
"""


def names(family: int) -> dict[str, str]:
    return {
        "own": OWN[family],
        "net": NETWORK[family],
        "multicast": MULTICAST[family],
        "ip": FAMILY[family],
    }


@both
def test_iptables_words(family: int) -> None:
    rules = [iptables.rule_words(rule, True) for rule in wanted(family).postrouting(family)]

    lines = [iptables._line("-A", "X", words).removeprefix("-A X ") for words in rules]

    assert lines == IPTABLES.format(**names(family)).splitlines()
    plain = [iptables.rule_words(rule, False) for rule in wanted(family).postrouting(family)]
    assert plain == [tuple(word for word in words if word != "--random-fully") for words in rules]


@both
def test_nft_words(family: int) -> None:
    rules = wanted(family).postrouting(family)
    texts = [nft.text(nft._canon(nft._rule_json(rule, family, "x", True))) for rule in rules]

    assert texts == NFT.format(**names(family)).splitlines()


def test_nft_spelling_of_other_versions_is_the_same_rule() -> None:
    rule = {"expr": [{"masquerade": {"flags": "fully-random"}}], "handle": 7}
    other = {"expr": [{"masquerade": {"flags": ["fully-random"]}}], "comment": ""}
    bare = {"expr": [{"masquerade": None}]}

    assert nft._canon(rule) == nft._canon(other)
    assert nft._canon(bare) == nft._canon({"expr": [{"masquerade": {}}]})
    assert nft._canon(bare) != nft._canon(rule)


def test_one_address_is_no_prefix_to_nft() -> None:
    rule = Rule("accept", "x", source="10.244.3.7/32", destination="10.244.0.0/16")

    text = nft.text(nft._canon(nft._rule_json(rule, 4, "forward", True)))

    assert text == 'ip saddr 10.244.3.7 ip daddr 10.244.0.0/16 accept comment "x"'


def test_networks_are_spelt_as_the_tools_do() -> None:
    rules = FamilyRules("FD00:10:244:0::/48", "fd00:0010:244:3::/64")

    assert (rules.network, rules.subnet) == (NETWORK[6], OWN[6])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FamilyRules("10.244.0.1/16", OWN[4]), "network '10.244.0.1/16'"),
        (lambda: FamilyRules(NETWORK[4], "pods"), "subnet 'pods'"),
        (lambda: RulesWanted(families={6: FamilyRules(NETWORK[4], OWN[4])}), "is not IPv6"),
        (lambda: RulesWanted(underlay={4: Underlay(0)}), "UDP port 0 of IPv4"),
        (lambda: RulesWanted(underlay={5: Underlay(8472)}), "UDP port 8472 of IPv5"),
    ],
)
def test_bad_input_is_named(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_peers_come_as_text_or_packed() -> None:
    packed = bytes([192, 0, 2, 7, 192, 0, 2, 8])
    expected = frozenset({packed[:4], packed[4:]})

    assert pack_addresses(["192.0.2.7", "192.0.2.8", "192.0.2.7"], 4) == expected
    assert pack_addresses(packed, 4) == pack_addresses(memoryview(packed), 4) == expected
    assert pack_addresses(Claims(4).endpoints, 4) == pack_addresses((), 6) == frozenset()
    assert pack_addresses(iter(["2001:DB8::0:7"]), 6) == pack_addresses(["2001:db8::7"], 6)
    rules = wanted(4, underlay={4: Underlay(8472, packed), 6: Underlay(8472)})
    assert (rules.guarded, rules.peers(4)) == ((4,), expected)
    assert [len(rules.guard(family)) for family in (4, 6)] == [1, 0]
    assert rules.welcome(6)[0].port == 8472


@pytest.mark.parametrize(
    ("peers", "family", "says"),
    [
        (["192.0.2.300"], 4, "'192.0.2.300' is not an IPv4"),
        (["192.0.2.7"], 6, "'192.0.2.7' is not an IPv6"),
        ([7], 4, "7 is not an IPv4"),
        (b"12345", 4, "5 bytes"),
    ],
)
def test_bad_peers_are_named(peers: Any, family: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        pack_addresses(peers, family)


@given(st.sets(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), max_size=20))
def test_packing_and_text_agree(addresses: set[Any]) -> None:
    for family in (4, 6):
        texts = {str(a) for a in addresses if a.version == family}
        packed = pack_addresses(texts, family)
        assert pack_addresses({str(ipaddress.ip_address(one)) for one in packed}, family) == packed
        assert len(packed) == len(texts)


OLD = Variant("-legacy", "legacy")
JUMP = iptables.jump("FLANNEL-DP-FWD")


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        ([], ["-I FORWARD 1"]),
        ([JUMP], []),
        ([("-j", "REJECT"), JUMP], ["-D FORWARD", "-I FORWARD 1"]),
        ([JUMP, ("-j", "REJECT"), JUMP], ["-D FORWARD", "-D FORWARD", "-I FORWARD 1"]),
        ([("-s", "10.0.0.0/8", "-j", "FLANNEL-DP-FWD")], ["-D FORWARD -s 10", "-I FORWARD 1"]),
    ],
)
def test_jump_is_put_first_and_once(
    monkeypatch: pytest.MonkeyPatch, forward: list[iptables.Words], expected: list[str]
) -> None:
    rules: list[iptables.Words] = [("-j", "ACCEPT")]
    held = SavedTable({"FLANNEL-DP-FWD": "-"}, {"FLANNEL-DP-FWD": rules, "FORWARD": forward})
    monkeypatch.setattr(iptables, "existing_tables", lambda *_: ("filter",))
    monkeypatch.setattr(iptables, "save", lambda *_: held)

    change = iptables.plan_chains(OLD, 4, {"FLANNEL-DP-FWD": rules})

    lines = change.script.splitlines()[1:-1] if change else []
    assert [line.startswith(start) for line, start in zip(lines, expected, strict=True)] == [
        True
    ] * len(expected)


def test_comments_of_others_do_not_stop_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '*filter\n:FORWARD DROP [0:0]\n-A FORWARD -m comment --comment it"s -j ACCEPT\nCOMMIT\n'
    monkeypatch.setattr(iptables, "run", lambda *_: text)

    held = iptables.save(OLD, 4, "filter")

    assert held.policies == {"FORWARD": "DROP"}
    assert held.rules["FORWARD"][0][-1] == "ACCEPT"


POD = Packets(4, "pods", "forward", OWN[4], NETWORK[4], oif="flannel.1")


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ("-j DROP", Match.ALL),
        ("-s 10.0.0.0/8 -j DROP", Match.ALL),
        ("-s 10.244.3.0/25 -j DROP", Match.PART),
        ("! -s 10.0.0.0/8 -j DROP", Match.NONE),
        ("-d 192.0.2.0/24 -j DROP", Match.NONE),
        ("! -d 192.0.2.0/24 -j DROP", Match.ALL),
        ("-o flannel.1 -j DROP", Match.ALL),
        ("-o flannel.+ -j DROP", Match.ALL),
        ("-o docker0 -j DROP", Match.NONE),
        ("-i docker0 ! -o docker0 -j DROP", Match.UNKNOWN),
        ("-i lo -j DROP", Match.NONE),
        ("-i + -j DROP", Match.ALL),
        ("-p tcp -j DROP", Match.ALL),
        ("-p icmp -j DROP", Match.NONE),
        ("-p tcp -m tcp --dport 22 -j DROP", Match.PART),
        ("-m conntrack --ctstate RELATED,ESTABLISHED -j DROP", Match.NONE),
        ("-m conntrack ! --ctstate RELATED,ESTABLISHED -j DROP", Match.ALL),
        ("-m state --state NEW -j DROP", Match.ALL),
        ("-m mark --mark 0x1 -j DROP", Match.UNKNOWN),
        ("-m set --match-set x src -j DROP", Match.UNKNOWN),
        ("-m comment --comment -s -j DROP", Match.ALL),
        ("-m limit --limit 5/min -j LOG --log-prefix -x", Match.UNKNOWN),
    ],
)
def test_iptables_rules_are_matched(rule: str, match: Match) -> None:
    step = probe._step(tuple(rule.split()), POD, SavedTable(), "FORWARD")

    assert step.match == match
    assert step.action.kind == ("continue" if "LOG" in rule else "drop")


def test_iptables_port_lists() -> None:
    tunnel = Packets(4, "tunnel", "input", None, None, "udp", 8472)

    for value, match in (
        ("53,8000:9000", Match.ALL),
        ("8472", Match.ALL),
        ("1:100", Match.NONE),
        ("domain", Match.UNKNOWN),
    ):
        words = ("-p", "udp", "-m", "multiport", "--dports", value, "-j", "ACCEPT")
        assert probe._step(words, tunnel, SavedTable(), "INPUT").match == match
    from_some = ("-s", "192.0.2.0/24", "-j", "ACCEPT")
    assert probe._step(from_some, tunnel, SavedTable(), "INPUT").match == Match.UNKNOWN


def chains(**rules: list[tuple[Match, str, str]]) -> Any:
    """Chains for ``walk_chain``: (match, action, target) each; the rule is ``chain:number``."""

    def of(name: str) -> list[RuleStep]:
        return [
            RuleStep(match, Action(kind, target), f"{name}:{number}")
            for number, (match, kind, target) in enumerate(rules.get(name, ()))
        ]

    return of


@pytest.mark.parametrize(
    ("rules", "end"),
    [
        ({}, None),
        ({"a": [(Match.ALL, "drop", "")]}, End("drop", "a:0")),
        ({"a": [(Match.PART, "drop", "")]}, None),
        ({"a": [(Match.UNKNOWN, "drop", "")]}, None),
        ({"a": [(Match.ALL, "accept", ""), (Match.ALL, "drop", "")]}, End("accept", "a:0")),
        ({"a": [(Match.UNKNOWN, "accept", ""), (Match.ALL, "drop", "")]}, End("accept", "a:0")),
        ({"a": [(Match.PART, "accept", ""), (Match.ALL, "drop", "")]}, End("drop", "a:1")),
        ({"a": [(Match.NONE, "accept", ""), (Match.ALL, "drop", "")]}, End("drop", "a:1")),
        ({"a": [(Match.ALL, "jump", "b")], "b": [(Match.ALL, "drop", "")]}, End("drop", "b:0")),
        ({"a": [(Match.UNKNOWN, "jump", "b")], "b": [(Match.ALL, "drop", "")]}, None),
        (
            {
                "a": [(Match.ALL, "jump", "b"), (Match.ALL, "drop", "")],
                "b": [(Match.ALL, "return", ""), (Match.ALL, "accept", "")],
            },
            End("drop", "a:1"),
        ),
        ({"a": [(Match.ALL, "goto", "b"), (Match.ALL, "drop", "")]}, None),
        (
            {
                "a": [(Match.PART, "jump", "b"), (Match.ALL, "drop", "")],
                "b": [(Match.ALL, "accept", "")],
            },
            End("drop", "a:1"),
        ),
        ({"a": [(Match.UNKNOWN, "return", ""), (Match.ALL, "drop", "")]}, End("accept", "a:0")),
        ({"a": [(Match.ALL, "jump", "a")]}, End("accept", None)),
    ],
)
def test_only_what_is_sure_ends_a_packets_way(rules: Any, end: End | None) -> None:
    assert walk_chain(chains(**rules), "a") == end


def test_unknown_stays_unknown_when_negated() -> None:
    assert [negate(match) for match in Match] == [
        Match.ALL,
        Match.PART,
        Match.UNKNOWN,
        Match.NONE,
    ]


def test_unknown_nft_expressions_block_nothing() -> None:
    left = {"fib": {"result": "type", "flags": "daddr"}}
    rule = {
        "chain": "x",
        "handle": 3,
        "expr": [{"match": {"op": "==", "left": left, "right": "local"}}, {"drop": None}],
    }
    base = {"name": "x", "type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}
    table = nft_packets.table_of([{"chain": base}, {"rule": rule}])

    assert table.bases("forward") == ["x"]
    assert table.bases("input") == []
    assert walk_chain(table.steps(POD), "x") is None
