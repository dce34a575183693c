"""Whether our table of nftables is unchanged: what the kernel says, and nft as the oracle."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from flannel_dp.errors import DumpInterrupted
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.resources.firewall import nft, nft_kernel
from flannel_dp.resources.firewall.engine import apply_rules, plan_rules
from flannel_dp.resources.firewall.nft_layout import SET_TYPE
from flannel_dp.resources.firewall.nft_unchanged import is_unchanged
from flannel_dp.resources.firewall.programs import run
from flannel_dp.resources.firewall.rules import FamilyRules, RulesWanted, Underlay
from tests.lib.hosts import Host

WORD = {4: "ip", 6: "ip6"}
NETWORK = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}
SUBNET = {4: "10.244.3.0/24", 6: "fd00:10:244:3::/64"}
OTHER = {4: "10.245.0.0/16", 6: "fd00:10:245::/48"}
PEERS = {4: ("192.0.2.7", "192.0.2.8"), 6: ("2001:db8::7", "2001:db8::8")}

#: What another program may do to the table; OUR is the family's word and the table's name, SET its
#: type of addresses, and @chain.N the handle of a chain's rule, counted from 0.
ALTERED = [
    "add table OUR { flags dormant; }",
    "delete table OUR",
    "flush table OUR",
    "flush chain OUR forward",
    "flush chain OUR forward; delete chain OUR forward",
    "add chain OUR more",
    "add chain OUR more { type filter hook output priority 0; }",
    "add chain OUR forward { policy drop; }",
    "flush chain OUR forward; delete chain OUR forward; "
    "add chain OUR forward { type filter hook forward priority 1; }; ACCEPTS",
    "flush chain OUR forward; delete chain OUR forward; "
    "add chain OUR forward { type filter hook input priority 0; }; ACCEPTS",
    "flush chain OUR forward; delete chain OUR forward; add chain OUR forward; ACCEPTS",
    "add set OUR more { type SET; }",
    "add map OUR more { type SET : verdict; }",
    "add counter OUR more",
    "add element OUR peers { STRANGER }",
    "delete element OUR peers { FIRST }",
    "delete element OUR peers { FIRST }; add element OUR peers { STRANGER }",
    "flush set OUR peers",
    'delete element OUR peers { FIRST }; add element OUR peers { FIRST comment "x" }',
    "delete rule OUR postrouting handle @postrouting.0",
    "delete rule OUR postrouting handle @postrouting.6",
    "delete rule OUR input handle @input.0",
    "insert rule OUR postrouting accept",
    "insert rule OUR forward drop",
    "add rule OUR forward counter",
    "add rule OUR input handle @input.0 accept",
    'replace rule OUR forward handle @forward.0 WORD saddr NETWORK accept comment "pods"',
    "replace rule OUR forward handle @forward.0 WORD saddr NETWORK accept",
    'replace rule OUR forward handle @forward.0 WORD saddr NETWORK drop comment "from pods"',
    'replace rule OUR forward handle @forward.0 WORD daddr NETWORK accept comment "from pods"',
    'replace rule OUR forward handle @forward.0 WORD saddr OTHER accept comment "from pods"',
    'replace rule OUR forward handle @forward.0 WORD saddr SUBNET accept comment "from pods"',
    'replace rule OUR forward handle @forward.0 WORD saddr != NETWORK accept comment "from pods"',
    'replace rule OUR forward handle @forward.0 accept comment "from pods"',
    "replace rule OUR forward handle @forward.0 counter WORD saddr NETWORK accept "
    'comment "from pods"',
    "replace rule OUR forward handle @forward.0 WORD saddr NETWORK counter accept "
    'comment "from pods"',
    "replace rule OUR forward handle @forward.0 WORD saddr NETWORK meta mark 1 accept "
    'comment "from pods"',
    "replace rule OUR postrouting handle @postrouting.0 meta mark & 0x8000 == 0x4000 return "
    'comment "kube-proxy masquerades what it marked"',
    "replace rule OUR postrouting handle @postrouting.0 meta mark & 0x4000 == 0 return "
    'comment "kube-proxy masquerades what it marked"',
    "replace rule OUR postrouting handle @postrouting.0 ct mark & 0x4000 == 0x4000 return "
    'comment "kube-proxy masquerades what it marked"',
    "replace rule OUR postrouting handle @postrouting.0 meta mark & 0x4000 == 0x4000 accept "
    'comment "kube-proxy masquerades what it marked"',
    "replace rule OUR postrouting handle @postrouting.2 WORD saddr SUBNET WORD daddr NETWORK "
    'snat to WORD daddr comment "pod to overlay keeps its source"',
    "replace rule OUR postrouting handle @postrouting.2 WORD saddr SUBNET WORD daddr NETWORK "
    'snat to FIRST comment "pod to overlay keeps its source"',
    "replace rule OUR postrouting handle @postrouting.2 WORD saddr SUBNET WORD daddr NETWORK "
    'snat to WORD saddr random comment "pod to overlay keeps its source"',
    "replace rule OUR postrouting handle @postrouting.2 WORD saddr SUBNET WORD daddr NETWORK "
    'masquerade comment "pod to overlay keeps its source"',
    "replace rule OUR postrouting handle @postrouting.6 WORD saddr != NETWORK WORD daddr NETWORK "
    'masquerade comment "host or outside to remote pod"',
    "replace rule OUR postrouting handle @postrouting.6 WORD saddr != NETWORK WORD daddr NETWORK "
    'masquerade random comment "host or outside to remote pod"',
    "replace rule OUR postrouting handle @postrouting.6 WORD saddr != NETWORK WORD daddr NETWORK "
    'masquerade persistent,fully-random comment "host or outside to remote pod"',
    "replace rule OUR input handle @input.0 udp dport 8473 WORD saddr != @peers drop "
    'comment "tunnel, not from a peer"',
    "replace rule OUR input handle @input.0 udp sport 8472 WORD saddr != @peers drop "
    'comment "tunnel, not from a peer"',
    "replace rule OUR input handle @input.0 tcp dport 8472 WORD saddr != @peers drop "
    'comment "tunnel, not from a peer"',
    "replace rule OUR input handle @input.0 udp dport 8472 WORD saddr @peers drop "
    'comment "tunnel, not from a peer"',
    "replace rule OUR input handle @input.0 udp dport 8472 WORD daddr != @peers drop "
    'comment "tunnel, not from a peer"',
    "replace rule OUR input handle @input.0 udp dport 8472 WORD saddr != { FIRST } drop "
    'comment "tunnel, not from a peer"',
    "replace rule OUR input handle @input.0 udp dport 8472 WORD saddr != @peers reject "
    'comment "tunnel, not from a peer"',
]

ACCEPTS = (
    'add rule OUR forward WORD saddr NETWORK accept comment "from pods"; '
    'add rule OUR forward WORD daddr NETWORK accept comment "to pods"'
)

#: What leaves every packet's way as it was, and is left alone.
HARMLESS = [
    'replace rule OUR forward handle @forward.0 WORD saddr NETWORK accept comment "from pods"',
    "add element OUR peers { FIRST }",
    "delete element OUR peers { FIRST }; add element OUR peers { FIRST }",
    "add table WORD flannel-dp-2; add chain WORD flannel-dp-2 forward "
    "{ type filter hook forward priority 0; }; add rule WORD flannel-dp-2 forward drop",
]


def rules(family: int, **changes: Any) -> RulesWanted:
    given: dict[str, Any] = {
        "families": {family: FamilyRules(NETWORK[family], SUBNET[family])},
        "ip_masq": True,
        "underlay": {family: Underlay(8472, PEERS[family])},
    }
    return RulesWanted(**given | changes)


class Table:
    """Our table of one family on one host, and both ways to compare it."""

    def __init__(self, host: Host, family: int) -> None:
        self.host, self.family, self.wanted = host, family, rules(family)
        self._handles: dict[str, str] = {}

    def write(self) -> None:
        change = self._call(nft.plan_table, exists=False)
        assert change is not None
        call_in_netns(self.host.ns, nft.apply_table, change)

    def alter(self, command: str) -> None:
        family = self.family
        self._handles = self._handles or self._read_handles()
        for word, meaning in {
            "ACCEPTS": ACCEPTS,
            "OUR": "WORD flannel-dp",
            "SET": SET_TYPE[family],
            "STRANGER": {4: "192.0.2.99", 6: "2001:db8::99"}[family],
            "FIRST": PEERS[family][0],
            "NETWORK": NETWORK[family],
            "SUBNET": SUBNET[family],
            "OTHER": OTHER[family],
            "WORD": WORD[family],
            **self._handles,
        }.items():
            command = command.replace(word, meaning)
        call_in_netns(self.host.ns, run, "nft", command)

    def unchanged(self) -> bool:
        return bool(self._call(is_unchanged))

    def unchanged_says_nft(self) -> bool:
        tables = call_in_netns(self.host.ns, nft_kernel.present_tables)
        exists = (WORD[self.family], "flannel-dp") in tables
        return self._call(nft.plan_table, exists=exists) is None

    def _call(self, ask: Callable[..., Any], **more: Any) -> Any:
        return call_in_netns(self.host.ns, ask, self.wanted, self.family, full=True, **more)

    def _read_handles(self) -> dict[str, str]:
        """Return the handle of each rule by @chain.N: a table just written has the same."""
        found: dict[str, str] = {}
        listed = call_in_netns(self.host.ns, nft.read_objects, WORD[self.family], "flannel-dp")
        for item in listed or ():
            if "rule" in item:
                chain = item["rule"]["chain"]
                number = sum(name.startswith(f"@{chain}.") for name in found)
                found[f"@{chain}.{number}"] = str(item["rule"]["handle"])
        return found


@pytest.fixture
def table(host: Host, family: int) -> Table:
    made = Table(host, family)
    made.write()
    return made


def test_a_table_that_nft_wrote_is_unchanged_and_an_altered_one_is_not(table: Table) -> None:
    assert table.unchanged()
    assert table.unchanged_says_nft()
    found = {}
    for command in ALTERED:
        table.alter(command)
        found[command] = (table.unchanged(), table.unchanged_says_nft())
        table.write()
        assert table.unchanged(), command

    assert found == dict.fromkeys(ALTERED, (False, False))


def test_what_alters_nothing_is_no_change(table: Table) -> None:
    found = {}
    for command in HARMLESS:
        table.alter(command)
        found[command] = (table.unchanged(), table.unchanged_says_nft())

    assert found == dict.fromkeys(HARMLESS, (True, True))


def test_every_kind_of_rules_is_recognised(host: Host, family: int) -> None:
    own, other = SUBNET[family], {4: "10.32.0.0/11", 6: "fd00:20::/43"}[family]
    narrow = {4: "10.32.7.128/25", 6: "fd00:20:0:7::/65"}[family]
    single = {4: "10.32.7.1/32", 6: "fd00:20:0:7::1/128"}[family]
    kinds = [
        rules(family, ip_masq=False),
        rules(family, forward=False),
        rules(family, random_fully=False),
        rules(family, underlay={}),
        rules(family, underlay={family: Underlay(4789, ())}),
        rules(family, families={family: FamilyRules(NETWORK[family], own)}, underlay={}),
        rules(family, families={family: FamilyRules(other, narrow)}),
        rules(family, families={family: FamilyRules(other, single)}),
        rules(family, families={}),
    ]
    found = []
    for wanted in kinds:
        apply_rules(plan_rules(wanted, "nft", host.ns), host.ns)
        found.append(call_in_netns(host.ns, is_unchanged, wanted, family, full=True))

    assert found == [True] * len(kinds)


def test_a_guard_of_a_thousand_peers(host: Host, family: int) -> None:
    pattern = {4: "198.51.{}.{}", 6: "2001:db8:5:{:x}::{:x}"}[family]
    peers = [pattern.format(number // 250, number % 250 + 1) for number in range(1000)]
    wanted = rules(family, underlay={family: Underlay(8472, peers)})
    apply_rules(plan_rules(wanted, "nft", host.ns), host.ns)

    def unchanged(of: RulesWanted) -> Any:
        return call_in_netns(host.ns, is_unchanged, of, family, full=True)

    assert unchanged(wanted)
    assert not unchanged(rules(family, underlay={family: Underlay(8472, peers[1:])}))
    assert not unchanged(rules(family, underlay={family: Underlay(8472, [*peers, *PEERS[family]])}))


def test_a_change_between_two_answers_is_no_answer(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = nft_kernel.NftSocket.dump

    def with_a_change_before_rules(self: Any, what: Any, *args: Any) -> Any:
        if what == nft_kernel.RULES:
            table.host.exec("nft", "add table inet elsewhere; delete table inet elsewhere")
        return dump(self, what, *args)

    monkeypatch.setattr(nft_kernel.NftSocket, "dump", with_a_change_before_rules)
    assert not table.unchanged()

    def interrupted(*_: Any) -> Any:
        raise DumpInterrupted(4, "list", "interrupted")

    monkeypatch.setattr(nft_kernel.NftSocket, "dump", interrupted)
    assert not table.unchanged()


def test_nft_is_not_run_where_nothing_has_to_be_written(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(nft, "run", lambda *command, **_: ran.append(command))

    assert plan_rules(table.wanted, "nft", table.host.ns).is_empty
    assert not ran


def test_not_permitted(host: Host) -> None:
    script = (
        "from flannel_dp.errors import NotPermitted\n"
        "from flannel_dp.kernel.capabilities import drop_capabilities\n"
        "from flannel_dp.resources.firewall.nft_unchanged import is_unchanged\n"
        "from flannel_dp.resources.firewall.rules import FamilyRules, RulesWanted\n"
        "wanted = RulesWanted(families={4: FamilyRules('10.0.0.0/8', '10.0.1.0/24')})\n"
        "drop_capabilities(())\n"
        "try:\n    is_unchanged(wanted, 4, full=True)\n"
        "except NotPermitted as error:\n    print(error.message)\n"
    )

    assert host.exec(sys.executable, "-c", script).startswith("list the tables of nftables")
