"""The compiled core against a real kernel; iproute2 says what the kernel holds."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flannel_dp import tables
from flannel_dp._core import REMOVE, SKIPPED, UNKNOWN, UNSENT, Channel, Table
from flannel_dp.entries import Entry, Fdb, Neighbour, Nexthop, Route, Scope
from flannel_dp.errors import DumpInterrupted
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.kernel.tables import Kernel
from flannel_dp.plan import Plan, TablePlan
from flannel_dp.report import TableResult

PEERS = 20
NO_DEVICE = 9999
PROTOCOL = 138

NLMSG_ERROR, NLMSG_DONE, RTM_NEWROUTE, RTM_GETNEIGH = 2, 3, 24, 30
SOL_NETLINK, NETLINK_GET_STRICT_CHK = 270, 12


def subnet(family: int, number: int) -> str:
    return f"10.244.{number}.0" if family == 4 else f"fd00:10:244:{number:x}::"


def prefix(family: int, number: int) -> str:
    return f"{subnet(family, number)}/{24 if family == 4 else 64}"


def endpoint(family: int, number: int) -> str:
    return f"192.0.2.{number}" if family == 4 else f"2001:db8::{number:x}"


def mac(number: int) -> str:
    return f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"


class Overlay:
    """A vxlan device of one family in a host, the tables that ``peers`` need, and the
    kernel's idea of them."""

    def __init__(self, host: Any, family: int) -> None:
        self.host, self.family = host, family
        self.device = "flannel.1" if family == 4 else "flannel-v6.1"
        self.index = self.add_device(self.device, 1)
        self.kernel = Kernel(host.ns)

    def add_device(self, name: str, vni: int) -> int:
        local = self.host.underlay(self.family)
        self.host.ip(
            f"link add {name} type vxlan id {vni} dev eth0 local {local} "
            f"dstport {8471 + vni} nolearning"
        )
        self.host.ip(f"link set {name} addrgenmode none up")
        return int(self.host.ip_json(f"link show {name}")[0]["ifindex"])

    def ip(self, words: str) -> str:
        return str(self.host.ip(f"-{self.family}", words))

    def bridge(self, words: str) -> str:
        return str(self.host.bridge(words))

    def wanted(self, numbers: range, index: int = 0) -> list[tuple[Table, Scope]]:
        """The four tables (three for IPv6) of the peers ``numbers``, tagged by position."""
        family, index = self.family, index or self.index
        neighbours = tables.neighbour_table(index, {subnet(family, n): mac(n) for n in numbers})
        fdb = tables.fdb_table(index, {mac(n): endpoint(family, n) for n in numbers})
        found = [
            (neighbours, tables.neighbour_scope(index, family)),
            (fdb, tables.fdb_scope(index)),
        ]
        if family == 4:
            nexthops = tables.nexthop_table(index, {n: subnet(4, n) for n in numbers})
            routes = tables.route_table({prefix(4, n): n for n in numbers})
            found.append((nexthops, tables.nexthop_scope(index)))
        else:
            routes = tables.route_table({prefix(6, n): subnet(6, n) for n in numbers}, device=index)
        found.append((routes, tables.route_scope(family, device=index, exclusive=True)))
        return found

    def plan(self, wanted: list[tuple[Table, Scope]]) -> Plan:
        return Plan(
            tuple(
                TablePlan(self.kernel.diff(table, scope), (scope,), {self.index: self.device})
                for table, scope in wanted
            )
        )

    def sync(self, wanted: list[tuple[Table, Scope]]) -> dict[str, TableResult]:
        return {result.kind: result for result in self.kernel.apply(self.plan(wanted))}

    def observed(self) -> dict[str, set[Any]]:
        """What iproute2 shows of the device, the kernel's own routes and guesses left out."""
        routes = self.host.ip_json(f"-{self.family} route show dev {self.device}")
        neighbours = self.host.ip_json(f"-{self.family} neigh show dev {self.device} nud permanent")
        nexthops = self.host.ip_json(f"nexthop show dev {self.device} proto {PROTOCOL}")
        found: dict[str, set[Any]] = {
            "neighbour": {(n["dst"], n["lladdr"]) for n in neighbours},
            "fdb": {
                (f["mac"], f.get("dst"), f["state"])
                for f in self.host.bridge_json(f"fdb show dev {self.device}")
            },
            "nexthop": {(n["id"], n["gateway"], tuple(n["flags"])) for n in nexthops},
            "route": {
                (r["dst"], r.get("nhid"), r["gateway"], r["protocol"], tuple(r["flags"]))
                for r in routes
                if r["protocol"] != "kernel"
            },
        }
        return found

    def expected(self, numbers: range) -> dict[str, set[Any]]:
        family, v4 = self.family, self.family == 4
        return {
            "neighbour": {(subnet(family, n), mac(n)) for n in numbers},
            "fdb": {(mac(n), endpoint(family, n), "permanent") for n in numbers},
            "nexthop": {(n, subnet(4, n), ("onlink",)) for n in numbers} if v4 else set(),
            "route": {
                (prefix(family, n), n if v4 else None, subnet(family, n), "138", ("onlink",))
                for n in numbers
            },
        }


@pytest.fixture
def overlay(host: Any, family: int) -> Iterator[Overlay]:
    made = Overlay(host, family)
    with made.kernel:
        yield made


def test_what_was_applied_is_what_iproute2_shows(overlay: Overlay) -> None:
    numbers = range(1, PEERS + 1)
    wanted = overlay.wanted(numbers)
    steps: list[tuple[int, int]] = []

    plan = overlay.plan(wanted)
    results = overlay.kernel.apply(plan, progress=lambda done, total: steps.append((done, total)))

    assert overlay.observed() == overlay.expected(numbers)
    assert {result.counts()["added"] for result in results} == {PEERS}
    assert not [failure for result in results for failure in result.failures()]
    assert steps[-1] == (PEERS * len(wanted), PEERS * len(wanted))


def test_second_plan_is_empty(overlay: Overlay) -> None:
    wanted = overlay.wanted(range(1, PEERS + 1))
    overlay.sync(wanted)

    again = overlay.plan(wanted)

    assert again.is_empty
    assert {
        row["unchanged"]
        for kind, row in again.counts().items()
        if kind != "nexthop" or overlay.family == 4
    } == {PEERS}


def test_drift_is_repaired(overlay: Overlay) -> None:
    numbers = range(1, PEERS + 1)
    family, device = overlay.family, overlay.device
    wanted = overlay.wanted(numbers)
    # The device's own route is the kernel's and stays.
    overlay.ip(f"addr add {subnet(family, 0)}/{16 if family == 4 else 48} dev {device}")
    own = overlay.ip(f"route show dev {device} proto kernel")
    overlay.sync(wanted)

    overlay.ip(f"neigh replace {subnet(family, 1)} lladdr {mac(99)} dev {device} nud permanent")
    overlay.ip(f"neigh del {subnet(family, 2)} dev {device}")
    overlay.ip(f"neigh add {subnet(family, 77)} lladdr {mac(77)} dev {device} nud permanent")
    overlay.bridge(f"fdb replace {mac(1)} dst {endpoint(family, 99)} dev {device} self permanent")
    overlay.bridge(f"fdb del {mac(2)} dev {device}")
    overlay.bridge(f"fdb add {mac(77)} dst {endpoint(family, 77)} dev {device} self permanent")
    if family == 4:
        overlay.host.ip(f"nexthop replace id 1 via 10.244.99.0 dev {device} onlink proto 138")
        overlay.host.ip("nexthop del id 3")  # and its route with it
        overlay.host.ip(f"nexthop add id 77 via 10.244.77.0 dev {device} onlink proto 138")
    overlay.ip(
        f"route replace {prefix(family, 4)} via {subnet(family, 99)} dev {device} onlink"
        f"{' metric 1024' if family == 6 else ''}"
    )
    overlay.ip(f"route del {prefix(family, 2)}")
    overlay.ip(f"route add {prefix(family, 77)} via {subnet(family, 77)} dev {device} onlink")
    results = overlay.sync(wanted)

    assert overlay.observed() == overlay.expected(numbers)
    assert overlay.plan(wanted).is_empty
    assert overlay.ip(f"route show dev {device} proto kernel") == own != ""
    one_of_each = {"added": 1, "replaced": 1, "removed": 1, "unchanged": PEERS - 2, "failed": 0}
    lost = {"added": 2, "unchanged": PEERS - 3} if family == 4 else {}
    assert {kind: result.counts() for kind, result in results.items()} == {
        "neighbour": one_of_each,
        "fdb": one_of_each,
        **({"nexthop": one_of_each} if family == 4 else {}),
        "route": one_of_each | lost,
    }


def test_peers_that_left_are_removed(overlay: Overlay) -> None:
    overlay.sync(overlay.wanted(range(1, PEERS + 1)))

    results = overlay.sync(overlay.wanted(range(3, PEERS + 1)))

    assert overlay.observed() == overlay.expected(range(3, PEERS + 1))
    assert {result.counts()["removed"] for result in results.values()} == {2}


def test_other_remotes_of_one_mac_are_removed(overlay: Overlay) -> None:
    """The zero MAC and multicast ones may have several remotes, in any order."""
    family, device, index = overlay.family, overlay.device, overlay.index
    zero, group = "00:00:00:00:00:00", "01:00:5e:00:00:01"
    wanted = tables.fdb_table(index, {mac(1): endpoint(family, 1)})
    wanted.add(Fdb(index, zero, endpoint(family, 92), state=0xC0))  # as bridge(8) has it
    scope = tables.fdb_scope(index)
    for address in (zero, group):
        for number in (91, 92, 93):
            overlay.bridge(
                f"fdb append {address} dst {endpoint(family, number)} dev {device} self permanent"
            )

    counts = overlay.sync([(wanted, scope)])["fdb"].counts()

    assert counts == {"added": 1, "replaced": 0, "removed": 5, "unchanged": 1, "failed": 0}
    assert overlay.observed()["fdb"] == {
        (zero, endpoint(family, 92), "permanent"),
        (mac(1), endpoint(family, 1), "permanent"),
    }
    assert overlay.plan([(wanted, scope)]).is_empty


def test_other_routes_to_one_prefix_are_removed(host: Any) -> None:
    """IPv4 alone keeps several routes of one prefix and metric (``ip route append``)."""
    overlay = Overlay(host, 4)
    with overlay.kernel:
        wanted = overlay.wanted(range(1, 3))
        overlay.sync(wanted)
        words = f"via 10.244.9.0 dev {overlay.device} onlink proto 138"
        overlay.ip(f"route append {prefix(4, 1)} {words}")
        overlay.ip(f"route prepend {prefix(4, 2)} {words}")

        overlay.sync(wanted)

        assert overlay.observed() == overlay.expected(range(1, 3))
        assert overlay.plan(wanted).is_empty


def test_fdb_entry_on_a_nexthop_group_becomes_one_with_a_remote(overlay: Overlay) -> None:
    """Linux takes a replacement of one by the other as done and does nothing: the old
    entry is removed, and the next pass adds the right one."""
    fdb, scope = overlay.wanted(range(1, 3))[1]
    family, device = overlay.family, overlay.device
    overlay.ip(f"nexthop add id 1001 via {endpoint(family, 9)} fdb")
    overlay.host.ip("nexthop add id 1002 group 1001 fdb")
    overlay.bridge(f"fdb add {mac(1)} nhid 1002 dev {device} self permanent")

    first = overlay.sync([(fdb, scope)])["fdb"]
    overlay.sync([(fdb, scope)])

    assert first.counts()["removed"] == 1
    assert overlay.observed()["fdb"] == overlay.expected(range(1, 3))["fdb"]
    assert overlay.plan([(fdb, scope)]).is_empty


def test_foreign_route_is_left_alone_and_reported(overlay: Overlay) -> None:
    family = overlay.family
    via = endpoint(family, 200)
    overlay.ip(f"route add {prefix(family, 5)} via {via} dev eth0 proto static")
    before = overlay.ip("route show dev eth0 table all")
    wanted = overlay.wanted(range(1, PEERS + 1))

    plan = overlay.plan(wanted)
    routes = {result.kind: result for result in overlay.kernel.apply(plan)}["route"]

    assert plan.conflicts() == []  # the kernel was asked about the vxlan device alone
    (failure,) = routes.failures()
    assert failure.entry == wanted[-1][0][4]
    # IPv6 looks the gateway up first, and the foreign route leads it to another device.
    assert failure.error == (errno.EEXIST if family == 4 else errno.EINVAL)
    assert routes.counts()["added"] == PEERS - 1
    assert overlay.ip("route show dev eth0 table all") == before


def test_foreign_route_in_view_is_a_conflict(overlay: Overlay) -> None:
    family = overlay.family
    via = endpoint(family, 200)
    overlay.ip(f"route add {prefix(family, 5)} via {via} dev eth0 proto static")
    before = overlay.ip("route show dev eth0 table all")
    routes = overlay.wanted(range(5, 7))[-1][0]
    scope = tables.route_scope(family, within=prefix(family, 5))._replace(marked=False)

    overlay.sync(overlay.wanted(range(5, 7))[:-1])
    diff = overlay.kernel.diff(routes, scope)
    overlay.kernel.apply(diff)

    ((wanted, foreign),) = diff.conflicts()
    assert isinstance(wanted, Route)
    assert isinstance(foreign, Route)
    assert (wanted.prefix, wanted.protocol) == (prefix(family, 5), PROTOCOL)
    assert (foreign.prefix, foreign.gateway, foreign.protocol) == (prefix(family, 5), via, 4)
    assert (diff.added, diff.replaced, diff.removed) == (1, 0, 0)
    assert overlay.ip("route show dev eth0 table all") == before


def test_foreign_nexthop_is_not_overwritten(host: Any) -> None:
    overlay = Overlay(host, 4)
    with overlay.kernel:
        host.ip("nexthop add id 7 via 192.0.2.200 dev eth0 proto static")
        before = host.ip("nexthop show id 7")

        results = overlay.sync(overlay.wanted(range(6, 9)))

        assert [(o.entry, o.error) for o in results["nexthop"].failures()] == [
            (Nexthop(7, "10.244.7.0", overlay.index), errno.EEXIST)
        ]
        assert list(results["route"].results) == [0, SKIPPED, 0]
        assert host.ip("nexthop show id 7") == before


def test_every_one_of_many_failures_is_reported(overlay: Overlay) -> None:
    """More than the 256 replies that a default receive buffer holds."""
    family = overlay.family
    table = Table("neighbour")
    for number in range(900):
        address = f"10.244.{number >> 8}.{number & 255}" if family == 4 else f"fd00::{number:x}"
        table.add(Neighbour(NO_DEVICE if number % 3 else overlay.index, address, mac(number)))

    diff = overlay.kernel.diff(table, tables.neighbour_scope(overlay.index, family))
    (result,) = overlay.kernel.apply(diff)

    assert list(result.results) == [errno.ENODEV if n % 3 else 0 for n in range(900)]
    assert result.counts()["failed"] == 600
    assert {number for number, _, _ in result.complaints} <= set(range(900))
    assert [n for n, _, _ in result.complaints[:4]] == [1, 2, 4, 5]
    assert len(overlay.observed()["neighbour"]) == 300
    assert overlay.kernel.channel.overruns == 0


def test_the_kernels_words_are_kept(overlay: Overlay) -> None:
    family = overlay.family
    table = Table("route")
    table.add(Route(prefix(family, 1), nexthop=4711))

    diff = overlay.kernel.diff(table, tables.route_scope(family))
    (result,) = overlay.kernel.apply(diff)

    (outcome,) = result.failures()
    assert outcome.error == errno.EINVAL
    assert outcome.detail == "Nexthop id does not exist"


def test_lost_replies_are_unknown_and_the_next_pass_converges(overlay: Overlay) -> None:
    family, count = overlay.family, 300
    other = overlay.add_device("other", 2)
    overlay.host.ip("link set other down")
    table = Table("route")
    for number in range(count):
        device = other if number % 2 else overlay.index
        table.add(
            Route(
                f"10.{number >> 8}.{number & 255}.0/24" if family == 4 else f"fd00:{number:x}::/64",
                gateway=subnet(family, 1),
                device=device,
                onlink=True,
            )
        )
    scope = tables.route_scope(family)
    descriptor = os.open(f"/run/netns/{overlay.host.ns}", os.O_RDONLY)
    try:
        with Channel(descriptor, rcvbuf=1) as channel:
            diff = channel.diff(table, [scope])
            results = array("i", [UNSENT]) * count
            channel.apply(diff, 0, count, results)
            overruns = channel.overruns

            overlay.host.ip("link set other up")
            again = channel.diff(table, [scope])
            second = array("i", [UNSENT]) * len(again)
            channel.apply(again, 0, len(again), second)
    finally:
        os.close(descriptor)

    assert overruns >= 1
    assert UNKNOWN in results
    assert set(results) <= {0, UNKNOWN, errno.ENETDOWN}
    assert (again.added, again.unchanged) == (count // 2, count // 2)
    assert set(second) == {0}
    assert overlay.kernel.diff(table, scope).unchanged == count


def test_what_leans_on_a_failed_entry_is_skipped(overlay: Overlay) -> None:
    family = overlay.family
    wanted = overlay.wanted(range(1, 7))
    bad = Table("neighbour")
    for number, entry in enumerate(wanted[0][0]):
        bad.add(entry._replace(device=NO_DEVICE) if number == 3 else entry)
    wanted[0] = bad, wanted[0][1]
    # A removal belongs to no peer and is carried out whatever failed.
    overlay.ip(
        f"route add {prefix(family, 77)} via {subnet(family, 77)} dev {overlay.device} onlink"
    )

    results = overlay.sync(wanted)

    assert list(results.pop("neighbour").results) == [0, 0, 0, errno.ENODEV, 0, 0]
    for kind, result in results.items():
        assert list(result.results[:6]) == [0, 0, 0, SKIPPED, 0, 0], kind
    assert list(results["route"].results[6:]) == [0]
    assert {r[0] for r in overlay.observed()["route"]} == {
        prefix(family, n) for n in (1, 2, 3, 5, 6)
    }


def test_get_one_entry(overlay: Overlay) -> None:
    family, index = overlay.family, overlay.index
    kernel = overlay.kernel
    gateway = subnet(family, 1)
    entries: list[tuple[Scope, Entry, Entry]] = [
        (
            tables.neighbour_scope(index, family),
            Neighbour(index, gateway, mac(1)),
            Neighbour(index, subnet(family, 2), mac(1)),
        ),
        (
            tables.fdb_scope(index),
            Fdb(index, mac(1), endpoint(family, 1)),
            Fdb(index, mac(2), endpoint(family, 1)),
        ),
        (
            tables.nexthop_scope(index, family),
            Nexthop(1, gateway, index),
            Nexthop(2, gateway, index),
        ),
    ]
    for scope, entry, absent in entries:
        assert kernel.get(scope, entry) is None
        table = Table(scope.kind)
        table.add(entry)
        kernel.apply(kernel.diff(table, scope))

        assert kernel.get(scope, entry) == entry
        assert kernel.get(scope, absent) is None
    with pytest.raises(ValueError, match="routes"):
        kernel.get(tables.route_scope(family), Route(prefix(family, 1)))


def test_get_of_what_is_none_of_the_scope_does_not_wait(overlay: Overlay) -> None:
    """The kernel answers with an entry of another device: that is no entry, at once."""
    family, index = overlay.family, overlay.index
    overlay.sync(overlay.wanted(range(1, 2)))
    entry = Neighbour(index, subnet(family, 1), mac(1))

    assert overlay.kernel.get(tables.neighbour_scope(index + 100, family), entry) is None
    assert overlay.kernel.get(tables.neighbour_scope(index, family), entry) == entry


def test_closed_channel(netns: str) -> None:
    kernel = Kernel(netns)
    scope = tables.route_scope(4)
    with pytest.raises(ValueError, match="at least one attempt"):
        kernel.channel.read("route", [scope], 0)
    kernel.close()
    kernel.close()

    for use in (
        kernel.channel.fileno,
        lambda: kernel.read("route", scope),
        lambda: kernel.diff(Table("route"), scope),
    ):
        with pytest.raises(ValueError, match="the channel is closed"):
            use()


def test_strict_get_of_an_fdb_entry_takes_the_mac_alone(overlay: Overlay) -> None:
    """Why the request for one FDB entry names no remote."""
    lladdr = struct.pack("=HH6s2x", 10, 2, bytes.fromhex(mac(1).replace(":", "")))
    remote = socket.inet_pton(
        socket.AF_INET if overlay.family == 4 else socket.AF_INET6, endpoint(overlay.family, 1)
    )
    dst = struct.pack("=HH", 4 + len(remote), 1) + remote
    overlay.bridge(
        f"fdb add {mac(1)} dst {endpoint(overlay.family, 1)} dev {overlay.device} self permanent"
    )
    answers = []
    with _netlink(overlay.host.ns) as sock:
        sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        for attributes in (lladdr, lladdr + dst):
            body = struct.pack("=BxxxiHBB", socket.AF_BRIDGE, overlay.index, 0, 2, 0) + attributes
            sock.send(_message(RTM_GETNEIGH, 1, 1, body))
            kind, error = struct.unpack_from("=4xH10xi", sock.recv(65536))
            answers.append(error if kind == NLMSG_ERROR else 0)

    assert answers == [0, -errno.EINVAL]


def test_deleting_what_is_gone_is_a_success(overlay: Overlay) -> None:
    family, device = overlay.family, overlay.device
    numbers = range(1, 4)
    overlay.sync(overlay.wanted(numbers))
    plan = overlay.plan(overlay.wanted(range(0)))

    overlay.ip(f"route del {prefix(family, 1)}")
    overlay.ip(f"neigh del {subnet(family, 1)} dev {device}")
    overlay.bridge(f"fdb del {mac(1)} dev {device}")
    if family == 4:
        overlay.host.ip("nexthop del id 1")
    results = overlay.kernel.apply(plan)

    for result in results:
        (error,) = set(result.results) - {0}
        assert error in (errno.ENOENT, errno.ESRCH)
        assert list(result.results).count(0) == 2
        assert result.counts()["removed"] == 3
        assert list(result.failures()) == []
        assert result.complaints == ()


def test_deleting_from_a_device_that_is_gone_is_a_success(overlay: Overlay) -> None:
    overlay.sync(overlay.wanted(range(1, 4)))
    plan = overlay.plan(overlay.wanted(range(0)))
    operations = {op for t in plan.tables for op, _, _ in map(t.diff.operation, range(len(t.diff)))}

    overlay.host.ip(f"link del {overlay.device}")
    results = overlay.kernel.apply(plan)

    assert operations == {REMOVE}
    assert [result.counts()["failed"] for result in results] == [0] * len(results)


def test_routes_of_another_table_and_metric(overlay: Overlay) -> None:
    family, index = overlay.family, overlay.index
    table = Table("route")
    for metric in (50, 4096):
        table.add(
            Route(
                prefix(family, 1),
                gateway=subnet(family, 1),
                device=index,
                onlink=True,
                metric=metric,
                table=1000,
            )
        )
    scope = tables.route_scope(family, table=1000)

    first = overlay.kernel.diff(table, scope)  # nobody made table 1000 yet: it is empty
    overlay.kernel.apply(first)
    shown = overlay.host.ip_json(f"-{family} route show table 1000")

    assert (first.added, first.observed) == (2, 0)
    assert {(r["dst"], r["metric"]) for r in shown} == {
        (prefix(family, 1), 50),
        (prefix(family, 1), 4096),
    }
    assert overlay.kernel.diff(table, scope).unchanged == 2


def test_read_tells_who_owns_what(overlay: Overlay) -> None:
    family = overlay.family
    overlay.ip(f"route add {prefix(family, 1)} via {endpoint(family, 200)} dev eth0 proto 138")
    overlay.ip(f"route add {prefix(family, 2)} via {endpoint(family, 200)} dev eth0 proto static")
    scope = tables.route_scope(family)._replace(marked=False)

    held = overlay.kernel.read("route", scope)

    owners = {entry.prefix: held.tag(number) for number, entry in enumerate(held)}
    assert owners[prefix(family, 1)] == 1
    assert owners[prefix(family, 2)] == 2


def test_without_the_right_to_write_nothing_is_written(overlay: Overlay) -> None:
    """A process of another user namespace may read this network namespace, not change it."""
    code = (
        "from flannel_dp import tables\n"
        "from flannel_dp.errors import NotPermitted\n"
        "from flannel_dp.kernel.tables import Kernel\n"
        f"table = tables.neighbour_table({overlay.index}, {{'{subnet(overlay.family, 1)}': "
        f"'{mac(1)}'}})\n"
        "with Kernel() as kernel:\n"
        f"    diff = kernel.diff(table, tables.neighbour_scope({overlay.index}, "
        f"{overlay.family}))\n"
        "    try:\n"
        "        kernel.apply(diff)\n"
        "    except NotPermitted as error:\n"
        "        print(error)\n"
    )

    said = overlay.host.exec("unshare", "--user", "--map-root-user", sys.executable, "-c", code)

    assert "EPERM" in said
    assert "CAP_NET_ADMIN" in said
    assert overlay.observed()["neighbour"] == set()


# ---- a hostile or busy kernel side --------------------------------------------


def _netlink(ns: str) -> socket.socket:
    return call_in_netns(
        ns, socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE
    )


def _message(kind: int, flags: int, seq: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, seq, 0) + body


def _port(channel: Channel) -> int:
    with socket.socket(fileno=os.dup(channel.fileno())) as copy:
        return int(copy.getsockname()[0])


def test_messages_of_other_processes_are_not_believed(overlay: Overlay) -> None:
    """Whoever may send to our port could end a dump early, or answer for the kernel."""
    family = overlay.family
    wanted = overlay.wanted(range(1, 4))
    overlay.sync(wanted)
    routes, scope = wanted[-1]
    rogue = Table("route")
    rogue.add(Route(prefix(family, 66), gateway=subnet(family, 66), device=overlay.index))
    body = rogue.encode(0, 1)[16:]
    with Kernel(overlay.host.ns) as fresh, _netlink(overlay.host.ns) as forger:
        port = _port(fresh.channel)
        forged = _message(RTM_NEWROUTE, 2, 1, body) + _message(NLMSG_DONE, 2, 1, bytes(4))
        forger.sendto(forged, (port, 0))
        held = fresh.read("route", scope)

        diff = fresh.diff(
            overlay.wanted(range(1, 5))[0][0], tables.neighbour_scope(overlay.index, family)
        )
        refusal = struct.pack("=i", -errno.EINVAL) + bytes(16)
        forger.sendto(
            b"".join(_message(NLMSG_ERROR, 0, seq, refusal) for seq in range(16)), (port, 0)
        )
        (result,) = fresh.apply(diff)

    ours = {entry for number, entry in enumerate(held) if held.tag(number) == 1}
    assert ours == set(routes)
    assert list(result.results) == [0]
    assert (subnet(family, 4), mac(4)) in overlay.observed()["neighbour"]


def _churn(ns: str, table: Table, scope: Scope, done: threading.Event) -> None:
    empty = Table("nexthop")
    with Kernel(ns) as kernel:
        while not done.is_set():
            kernel.apply(kernel.diff(table, scope))
            kernel.apply(kernel.diff(empty, scope))


def test_interrupted_dumps_are_never_believed(
    overlay: Overlay, wait_until: Callable[..., None]
) -> None:
    """Under a writer that never rests a dump is whole, or it is DumpInterrupted."""
    index, family = overlay.index, overlay.family
    # 3,000 objects fill several pages, between which the writer gets its turn.
    stable = tables.nexthop_table(index, {n: subnet(family, n % 256) for n in range(1, 3001)})
    mine = tables.nexthop_scope(index, family, ids=(1, 3000))
    overlay.kernel.apply(overlay.kernel.diff(stable, mine))
    restless = tables.nexthop_table(index, {n: subnet(family, n % 256) for n in range(5001, 5033)})
    churned = tables.nexthop_scope(index, family, ids=(5001, 5032))
    seen = {"whole": 0, "interrupted": 0}
    done = threading.Event()
    thread = threading.Thread(target=_churn, args=(overlay.host.ns, restless, churned, done))

    def look() -> bool:
        for attempts in (1, 3):
            try:
                diff = overlay.kernel.channel.diff(stable, [mine], attempts)
            except DumpInterrupted:
                seen["interrupted"] += 1
            else:
                assert (diff.unchanged, len(diff)) == (3000, 0)
                seen["whole"] += 1
        return bool(seen["interrupted"])

    thread.start()
    try:
        wait_until(look, 60.0)
    finally:
        done.set()
        thread.join()
    assert overlay.kernel.diff(stable, mine).unchanged == 3000
