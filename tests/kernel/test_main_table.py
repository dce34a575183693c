"""The main routing table, received once in a pass: what is taken from it is what the kernel sends
when it is asked for each part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from flannel_dp import (
    BackendData,
    DataPlane,
    Kernel,
    Lease,
    NetworkConfig,
    Route,
    Table,
    route_scope,
)
from flannel_dp._core import Pages
from flannel_dp.kernel import ahead
from flannel_dp.kernel.links import LinkReader
from flannel_dp.resources.peers.paths import whole_main_table
from flannel_dp.tables.entries import Scope
from tests.lib.core_overlay import Overlay
from tests.lib.leases import NETWORK, near, peer, replaced, subnet

RTPROT_KERNEL = 2


@pytest.fixture
def overlay(host: Any, family: int) -> Iterator[Overlay]:
    overlay = Overlay(host, family)
    with overlay.kernel:
        yield overlay


def _odd_routes(overlay: Overlay) -> None:
    """Routes of each form that a person may write, on our device, beside it and on both."""
    family, device = overlay.family, overlay.device
    via, pods = near(family, 5), subnet(family, 9).partition("/")[0]
    both = f"nexthop via {via} dev eth0 nexthop via {pods} dev {device} onlink"
    far = f"nexthop via {via} dev eth0 nexthop via {near(family, 6)} dev eth0"
    overlay.ip(f"nexthop add id 900 via {via} dev eth0")
    overlay.ip(f"nexthop add id 901 via {pods} dev {device} onlink")
    overlay.host.ip("nexthop add id 902 group 900/901")
    overlay.ip("nexthop add id 903 blackhole")
    for number, rest in enumerate(
        [
            f"via {via} dev eth0",
            f"via {via} dev eth0 proto static metric 7",
            f"via {via} dev eth0 proto 138",
            f"via {via} dev eth0 proto bgp",
            f"via {via} dev eth0 table 100",
            f"dev {device}",
            f"dev {device} proto static",
            f"via {pods} dev {device} onlink proto 138",
            f"proto static {both}",
            f"proto static {far}",
            "nhid 900 proto static",
            "nhid 901 proto 138",
            "nhid 902",
            "nhid 903 proto static",
        ]
    ):
        overlay.ip(f"route add {subnet(family, 20 + number)} {rest}")
    overlay.ip(f"route add blackhole {subnet(family, 40)} proto 138 metric 4000")
    overlay.ip(f"route add unreachable {subnet(family, 41)} proto static")


def _scopes(overlay: Overlay, uplink: int) -> list[list[Scope]]:
    family, network = overlay.family, NETWORK[overlay.family]
    ours = route_scope(family, device=overlay.index, exclusive=True)
    left = route_scope(family, device=uplink, within=network)
    every = left._replace(marked=False)
    boot = route_scope(family, device=uplink, within=network, protocol=3)
    black = route_scope(family, within=network)._replace(type=6)
    return [
        [ours, left],
        [ours, every, boot],
        [black],
        [whole_main_table(family)],
        [ours, left, whole_main_table(family)],
        [ours._replace(device=1)],
    ]


def _wanted(family: int) -> Table:
    """Some of the odd routes as ours, to meet replacements and conflicts."""
    table = Table("route")
    for number in (20, 22, 25, 27, 28, 31, 33, 40, 50):
        table.add(Route(subnet(family, number), gateway=near(family, 5), device=2), number)
    return table


def _found(kernel: Kernel, table: Table, scopes: list[Scope], whole: Pages | None) -> Any:
    diff = kernel.channel.diff(table, scopes, whole=whole)
    return (
        sorted(diff.operation(number) for number in range(len(diff)) if diff.operation(number)[1]),
        sorted(str(diff.operation(number)[2]) for number in range(len(diff))),
        sorted(map(str, diff.conflicts())),
        (diff.observed, diff.unchanged, diff.added, diff.removed),
    )


def _read(kernel: Kernel, scopes: list[Scope], whole: Pages | None) -> list[str]:
    table = kernel.channel.read("route", scopes, whole=whole)
    found = [(table.tag(number), table[number]) for number in range(len(table))]
    # Of the kernel's own routes, which are on every device, a table has the last.
    return sorted(f"{tag} {one}" for tag, one in found if one.protocol != RTPROT_KERNEL)


@pytest.mark.parametrize("compat", [1, 0])
def test_the_whole_table_says_what_each_part_says(overlay: Overlay, compat: int) -> None:
    family = overlay.family
    _odd_routes(overlay)
    overlay.host.sysctl("ipv4/nexthop_compat_mode", compat)
    wanted = _wanted(family)
    with LinkReader(overlay.host.ns) as asking, LinkReader(overlay.host.ns) as reader:
        uplink = asking.link("eth0")
        assert uplink
        reader.read_main_table(family, 0)
        whole = reader.main_table(family)
        assert whole is not None
        for scopes in _scopes(overlay, uplink.index):
            assert _found(overlay.kernel, wanted, scopes, whole) == _found(
                overlay.kernel, wanted, scopes, None
            )
            assert _read(overlay.kernel, scopes, whole) == _read(overlay.kernel, scopes, None)

        static = asking.static_routes(family)
        assert len(static) >= 6
        assert {*reader.static_routes(family)} == {*static}
        left = [one for one in static if one.hops != ((overlay.index, ""),)]
        assert len(left) == len(static) - 2
        assert {*reader.static_routes(family, [overlay.index])} == {*left}


def test_scopes_of_another_table_are_no_part_of_it(overlay: Overlay) -> None:
    family = overlay.family
    with LinkReader(overlay.host.ns) as reader:
        reader.read_main_table(family, 0)
        whole = reader.main_table(family)
    other = route_scope(family, table=100)
    with pytest.raises(ValueError, match="is no part of"):
        overlay.kernel.channel.diff(Table("route"), [other], whole=whole)


@pytest.mark.parametrize("count", [0, 100, 4000])
def test_memory_of_a_small_table_serves_the_next_pass(host: Any, family: int, count: int) -> None:
    """What a table held before is not read again, and a large one is given back."""
    with LinkReader(host.ns) as reader:
        reader.read_main_table(family, count)
        before = reader.small_tables()
        assert len(before) == (count < 4000)
    gone = subnet(family, 1)
    host.ip(f"-{family} route add {gone} dev eth0 proto static")
    for there in (True, False):
        with LinkReader(host.ns) as reader:
            reader.spare = dict(before)
            reader.read_main_table(family, count)
            assert not reader.spare
            assert (reader.main_table(family) in before.values()) == bool(before)
            found = [f"{one.prefix}/{one.length}" for one in reader.static_routes(family)]
            assert (gone in found) == there
        if there:
            host.ip(f"-{family} route del {gone} dev eth0")


MANY = 10_000


def _small(family: int, number: int) -> Lease:
    """Node ``number`` of a network of small subnets, of which there are many."""
    if family == 4:
        text = f"{ip_address('10.240.0.0') + 64 * number}/26"
        return peer(number & 1023, subnet=text, ipv6_subnet="", backend_data=_data(number),
                    public_ip=f"198.18.{number >> 8}.{number & 255}", public_ipv6="",
                    backend_v6_data=None)  # fmt: skip
    return peer(number & 1023, subnet="", ipv6_subnet=subnet(6, number), public_ip="",
                public_ipv6=f"2001:db8:1::{number:x}", backend_v6_data=_data(number),
                backend_data=None)  # fmt: skip


def _data(number: int) -> BackendData:
    return BackendData(1, f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}")


def _plane(host: Any, family: int, **backend: Any) -> DataPlane:
    words = {"Network": NETWORK[4], "SubnetLen": 26} if family == 4 else {"IPv6Network": NETWORK[6]}
    document = {"EnableIPv4": family == 4, "EnableIPv6": family == 6, **words}
    backend = {"Type": "vxlan", **backend}
    config = NetworkConfig.from_json(json.dumps({**document, "Backend": backend}))
    return DataPlane(config, iface="eth0", netns=host.ns)


@pytest.mark.parametrize("direct", [False, True], ids=["vxlan", "direct"])
def test_a_static_route_protects_beside_ten_thousand_of_ours(
    host: Any, family: int, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the main table does, one of another table does not; and neither where the table is
    larger than is received in whole."""
    host.ip("link add eth1 type bridge")
    host.ip("link set eth1 up")
    inside, other = {
        4: ("10.240.1.128/25", "10.240.2.0/25"),
        6: ("fd00:10:6::/47", "fd00:10:8::/47"),
    }[family]
    own = {"public_ip": host.ipv4} if family == 4 else {"public_ipv6": host.ipv6}
    leases = [replaced(_small(family, 0), **own), *(_small(family, n) for n in range(1, MANY + 1))]
    rejected = [getattr(leases[n], "subnet" if family == 4 else "ipv6_subnet") for n in (6, 7)]
    with _plane(host, family, DirectRouting=direct) as dp:
        assert (dp.sync(leases).ok, dp.resync().writes) == (True, 0)
        host.ip(f"-{family} route add {inside} dev eth1 proto static")
        host.ip(f"-{family} route add {other} dev eth1 proto static table 100")

        report = dp.sync(leases)
        assert sorted(one.lease.replace("-", "/") for one in report.rejected) == sorted(rejected)
        assert report.tables["route"] == _counts(removed=2, unchanged=MANY - 2)
        assert dp.host.reads_main_table(family)

        monkeypatch.setattr(ahead, "_ROUTE", {4: 1, 6: 1})
        monkeypatch.setattr(ahead, "_OTHERS", 1 << 16)
        for report in (dp.sync(leases), dp.resync(), dp.sync(leases)):
            assert report.tables["route"] == _counts(unchanged=MANY - 2)
            assert not dp.host.reads_main_table(family)
        assert sorted(one.lease.replace("-", "/") for one in report.rejected) == sorted(rejected)

        host.ip(f"-{family} route del {inside} dev eth1")
        assert dp.sync(leases).tables["route"] == _counts(added=2, unchanged=MANY - 2)


def _counts(**counts: int) -> dict[str, int]:
    words = ("added", "replaced", "removed", "unchanged", "failed")
    return {word: counts.get(word, 0) for word in words}
