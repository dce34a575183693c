"""Which tables nftables has, as the kernel says it and as nft prints it."""

from __future__ import annotations

import sys

from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.resources.firewall.filters import may_stop
from flannel_dp.resources.firewall.nft_kernel import present_tables
from tests.lib.hosts import Host


def _printed(host: Host) -> set[tuple[str, str]]:
    lines = host.exec("nft", "list", "tables").splitlines()
    return {(words[1], words[2]) for words in map(str.split, lines)}


def test_every_family_is_named_as_nft_names_it(host: Host) -> None:
    assert call_in_netns(host.ns, present_tables) == set()
    for family in ("ip", "ip6", "inet", "arp", "bridge", "netdev"):
        host.exec("nft", "add", "table", family, f"of-{family}")
    host.exec("nft", "add table ip dormant { flags dormant; }")

    found = call_in_netns(host.ns, present_tables)

    assert found == _printed(host)
    assert len(found) == 7


def test_more_tables_than_one_answer_holds(host: Host) -> None:
    names = [f"table-{number:03}-with-a-name-of-some-length" for number in range(600)]
    for start in range(0, len(names), 100):
        host.exec("nft", "; ".join(f"add table ip6 {name}" for name in names[start : start + 100]))

    assert call_in_netns(host.ns, present_tables) == {("ip6", name) for name in names}


def test_not_permitted(host: Host) -> None:
    script = (
        "from flannel_dp.errors import NotPermitted\n"
        "from flannel_dp.kernel.capabilities import drop_capabilities\n"
        "from flannel_dp.resources.firewall.nft_kernel import present_tables\n"
        "drop_capabilities(())\n"
        "try:\n    present_tables()\nexcept NotPermitted as error:\n    print(error.message)\n"
    )

    said = host.exec(sys.executable, "-c", script)

    assert said.startswith("list the tables of nftables")


BASE = "add chain ip t base { type filter hook forward priority 0; }; "
STOPS = {
    "add table ip t; " + BASE: False,
    "add table ip t; " + BASE + "add rule ip t base ct state established accept": False,
    "add table ip t; " + BASE + "add rule ip t base counter return": False,
    "add table ip t; "
    + BASE
    + "add rule ip t base ip saddr { 192.0.2.1, 192.0.2.2 } accept": False,
    "add table ip t; " + BASE.replace("0;", "0; policy drop;"): True,
    "add table ip t; " + BASE + "add rule ip t base ip saddr 192.0.2.1 drop": True,
    "add table ip t; " + BASE + "add rule ip t base counter reject": True,
    "add table ip t; " + BASE + "add chain ip t c; add rule ip t c drop": True,
    "add table ip t; " + BASE + "add rule ip t base ct state vmap { new : drop }": True,
    "add table ip t; " + BASE + "add chain ip t FLANNEL-DP-FWD": True,
    "add table ip other; add chain ip other c; add rule ip other c drop; add table ip t": False,
}


def test_only_a_table_that_may_stop_packets_is_read(host: Host) -> None:
    found = {}
    for script in STOPS:
        host.exec("nft", "flush ruleset; " + script)
        found[script] = call_in_netns(host.ns, may_stop, "ip", "t")

    assert found == STOPS


def test_a_reject_of_iptables_may_stop_packets(host: Host) -> None:
    host.exec("iptables-nft", "-A", "FORWARD", "-j", "ACCEPT")
    assert not call_in_netns(host.ns, may_stop, "ip", "filter")

    host.exec("iptables-nft", "-A", "FORWARD", "-j", "REJECT")
    assert call_in_netns(host.ns, may_stop, "ip", "filter")
