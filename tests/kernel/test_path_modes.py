"""What diverts packets, in every mode and by the command; and what it costs to look."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import DataPlane
from flannel_dp.kernel import ahead
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.socket import NetlinkSocket
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.path import evidence
from tests.lib.command import Cluster
from tests.lib.diverted import BRIEFLY, IP, NEAR, Pair, advised, without_machine
from tests.lib.forwarding import Nodes
from tests.lib.kernel import stranger
from tests.lib.leases import HOST_GW, NETWORK, lease_of, network_config, peers, plane, subnet


def diverted(report: Report) -> list[str]:
    """Those warnings of a report that are about the path; all of them are among the warnings."""
    found = [str(one) for each in report.diversions.values() for one in each]
    assert [text for text in report.warnings if text in found] == found
    return found


# ---- modes ------------------------------------------------------------------------------


def test_fr25_where_a_program_forwards(nodes: Nodes, family: int) -> None:
    pair = Pair(nodes(2), family, "ebpf")
    with pair.plane:
        assert pair.reaches()
        pair.ip("rule add pref 5270 lookup 52")
        pair.ip(f"route add {subnet(family, 2)} dev tun0 table 52")
        assert not pair.reaches(BRIEFLY)
        (found,) = pair.warnings()

        assert f"route {subnet(family, 2)} dev tun0 in table 52" in found
        pair.run(advised(found)[0])
        assert pair.reaches()
        assert pair.warnings() == ()


def test_host_gw_has_no_tunnel_whose_packets_are_diverted(host: Any, family: int) -> None:
    stranger(host, "tun0")
    host.ip(f"-{family} rule add pref 5270 lookup 52")
    host.ip(f"-{family} route add default dev tun0 table 52")
    config = network_config(family, **HOST_GW)
    with DataPlane(config, iface="eth0", netns=host.ns, subnet=subnet(family, 1)) as dp:
        (found,) = diverted(dp.sync([]))

    assert f"diverts packets of pods to {NETWORK[family]}" in found


def test_both_families_are_told_of_in_one_pass(host: Any) -> None:
    stranger(host, "tun0")
    for family in (4, 6):
        host.ip(f"-{family} rule add pref 5270 lookup 52")
        host.ip(f"-{family} route add {subnet(family, 2)} dev tun0 table 52")
    with plane(host) as dp:
        report = dp.sync([lease_of(host, 1), *peers([2, 3])])

        assert [*report.diversions] == [4, 6]
        assert [advised(one)[0] for one in diverted(report)] == [
            f"{IP[family]} route del {subnet(family, 2)} table 52" for family in (4, 6)
        ]
        # A repair of one family says nothing of the other.
        assert [*dp.resync([6], host=False).diversions] == [6]
        assert "path4" not in dp.resync([6], host=False).looked


def test_clean_looks_for_nothing(host: Any, family: int) -> None:
    stranger(host, "tun0")
    host.ip(f"-{family} rule add pref 5270 lookup 52")
    host.ip(f"-{family} route add {subnet(family, 2)} dev tun0 table 52")
    with plane(host, family) as dp:
        dp.sync([lease_of(host, 1)])
        assert dp.clean().warnings == ()


# ---- the command ------------------------------------------------------------------------


@pytest.fixture
def cluster(host: Any, family: int, tmp_path: Path) -> Cluster:
    stranger(host, "tun0")
    host.sysctl("ipv4/ip_forward", 1)
    host.sysctl("ipv6/conf/all/forwarding", 1)
    host.ip(f"-{family} rule add pref 5270 lookup 52")
    return Cluster(host, family, tmp_path)


SUBNET = {4: "10.244.2.0/24", 6: "fd00:10:244:2::/64"}


@pytest.mark.parametrize("command", ["plan", "sync", "show"])
@pytest.mark.parametrize("output", ["text", "json"])
def test_fr25_the_command_tells_and_succeeds(
    cluster: Cluster, family: int, command: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.run("sync") == 0
    cluster.host.ip(f"-{family} route add {SUBNET[family]} dev tun0 table 52")
    capsys.readouterr()
    assert cluster.run(command, "--output", output) == 0
    printed = capsys.readouterr().out

    wanted = (
        f"route {SUBNET[family]} dev tun0 in table 52, which policy rule 5270 (from all lookup "
        "52) has looked up before table main, diverts packets of pods: "
        f"'{IP[family]} route del {SUBNET[family]} table 52' removes it"
    )
    if output == "json":
        assert list(without_machine(json.loads(printed)["warnings"])) == [wanted]
    else:
        assert re.search(rf"^warnings:\n(  .*\n)*  {re.escape(wanted)}$", printed, re.MULTILINE)


def test_fr25_explain_gives_the_command_that_works(
    cluster: Cluster, family: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.run("sync") == 0
    cluster.host.ip(f"-{family} route add {SUBNET[family]} dev tun0 table 52")
    capsys.readouterr()
    cluster.run("explain", SUBNET[family].partition("/")[0].removesuffix("0") + "9")
    printed = capsys.readouterr().out

    assert f"'{IP[family]} route del {SUBNET[family]} table 52' removes it" in printed
    assert "run 'flannel-dp sync'" not in printed
    assert re.search(r"wrong +rule +5270: from all lookup 52$", printed, re.MULTILINE)
    assert "path: direct" in printed


# ---- cost -------------------------------------------------------------------------------


class Requests:
    """The requests that sockets of ``kernel/`` send: type, flags and body of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[int, int, bytes]] = []
        ask = NetlinkSocket._ask

        def counted(self_: Any, kind: int, flags: int, body: bytes, what: str) -> Iterator[Any]:
            self.made.append((kind, flags, body))
            return ask(self_, kind, flags, body, what)

        def fetched(fd: int, seq: int, scope: Any, *more: Any) -> Any:
            table = nl.attr_u32(nl.RTA_TABLE, scope.table)
            self.made.append((nl.RTM_GETROUTE, nl.NLM_F_DUMP, bytes(nl.RTMSG.size) + table))
            return fetch(fd, seq, scope, *more)

        fetch = ahead.fetch_dump
        monkeypatch.setattr(NetlinkSocket, "_ask", counted)
        monkeypatch.setattr(ahead, "fetch_dump", fetched)

    def of(self, dp: DataPlane, leases: list[Any]) -> list[tuple[int, int, bytes]]:
        """Those of the resource alone, in a pass of its own."""
        view = dp.resolver.resolve(leases)
        found = dp.reconciler.compare(view)
        resource = dp.reconciler["path"]
        self.made.clear()
        resource.compare(dp.host, resource.desired(view), found.done)
        return [*self.made]


@pytest.mark.parametrize("unusual", [False, True], ids=["usual", "vpn"])
def test_what_is_asked_does_not_grow_with_the_cluster(
    host: Any, family: int, unusual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if unusual:
        stranger(host, "tun0")
        host.ip(f"-{family} rule add pref 5270 lookup 52")
        out = {4: "100.64.0.9/32", 6: "fd7a::9/128"}[family]
        host.ip(f"-{family} route add {out} dev tun0 table 52")
    requests = Requests(monkeypatch)
    asked = []
    for count in (2, 200):
        leases = [lease_of(host, 1), *peers(range(2, count + 2))]
        with plane(host, family, allow_shrink=True) as dp:
            assert diverted(dp.sync(leases)) == []
            asked.append(requests.of(dp, leases))
    few, many = asked

    assert [kind for kind, _, _ in few] == [kind for kind, _, _ in many]
    # Rules, what was written to table local, the addresses of our device; where rules are unusual
    # all addresses and one table more.
    assert len(many) <= (8 if unusual else 5)
    tables = [
        nl.attributes(body, nl.RTMSG.size, "a test")[nl.RTA_TABLE][0]
        for kind, flags, body in many
        if kind == nl.RTM_GETROUTE
    ]
    assert tables == [255] + [52] * unusual, "never table main"


def test_of_a_large_table_only_the_beginning_is_read(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket goes on: what is asked after it is answered."""
    monkeypatch.setattr(evidence, "_ROUTES", 100)
    stranger(host, "tun0")
    host.ip(f"-{family} rule add pref 5270 lookup 52")
    made = [
        f"route add 100.64.{n >> 8}.{n & 255}/32 dev tun0 table 52"
        if family == 4
        else f"route add fd7a::{n:x}/128 dev tun0 table 52"
        for n in range(3000)
    ]
    host.ip_batch(f"-{family}", *made)
    host.ip(f"-{family} rule add pref 5271 lookup 53")
    host.ip(f"-{family} route add {subnet(family, 2)} dev tun0 table 53")
    with plane(host, family) as dp:
        found = diverted(dp.sync([lease_of(host, 1), *peers([2])]))

    assert [advised(one) for one in found] == [
        [f"{IP[family]} route del {subnet(family, 2)} table 53"]
    ]


def test_fr24_a_peer_behind_a_router_may_be_diverted_alone(host: Any, family: int) -> None:
    """wg-quick leaves connected networks alone, and takes the tunnel's packets beyond."""
    stranger(host, "tun0")
    gateway = NEAR[family].partition("/")[0] + "fe" * (family == 6)
    gateway = gateway if family == 6 else "192.0.2.254"
    for words in (
        f"route add default via {gateway} dev eth0",
        "rule add not fwmark 51820 lookup 51820",
        "rule add lookup main suppress_prefixlength 0",
        "route add default dev tun0 table 51820",
    ):
        host.ip(f"-{family} {words}")
    with plane(host, family) as dp:
        (found,) = diverted(dp.sync([lease_of(host, 1), *peers([2])]))

    assert "diverts packets of the tunnel to " in found
    assert "packets of pods" not in found
