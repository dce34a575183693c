"""The compiled core when the kernel refuses, loses replies or is interrupted, and when other
processes write to its socket."""

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

from flannel_dp._core import SKIPPED, UNKNOWN, UNSENT, Channel, Table
from flannel_dp.errors import DumpInterrupted
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.kernel.tables import Kernel
from flannel_dp.tables import columns, scopes
from flannel_dp.tables.entries import Neighbour, Route, Scope
from tests.lib.core_overlay import Overlay
from tests.lib.leases import address, endpoint, mac, subnet

NO_DEVICE = 9999
NLMSG_ERROR, NLMSG_DONE, RTM_NEWROUTE, RTM_GETNEIGH = 2, 3, 24, 30
SOL_NETLINK, NETLINK_GET_STRICT_CHK = 270, 12


@pytest.fixture
def overlay(host: Any, family: int) -> Iterator[Overlay]:
    made = Overlay(host, family)
    with made.kernel:
        yield made


def _netlink(ns: str) -> socket.socket:
    return call_in_netns(
        ns, socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE
    )


def _message(kind: int, flags: int, seq: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, seq, 0) + body


def test_every_one_of_many_failures_is_reported(overlay: Overlay) -> None:
    """More than the 256 replies that a default receive buffer holds."""
    family = overlay.family
    table = Table("neighbour")
    for number in range(900):
        device = NO_DEVICE if number % 3 else overlay.index
        table.add(Neighbour(device, address(family, number), mac(family, number)))

    diff = overlay.kernel.diff(table, scopes.neighbour_scope(overlay.index, family))
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
    table.add(Route(subnet(family, 1), nexthop=4711))

    diff = overlay.kernel.diff(table, scopes.route_scope(family))
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
                gateway=address(family, 1),
                device=device,
                onlink=True,
            )
        )
    scope = scopes.route_scope(family)
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
        f"route add {subnet(family, 77)} via {address(family, 77)} dev {overlay.device} onlink"
    )

    results = overlay.sync(wanted)

    assert list(results.pop("neighbour").results) == [0, 0, 0, errno.ENODEV, 0, 0]
    for kind, result in results.items():
        assert list(result.results[:6]) == [0, 0, 0, SKIPPED, 0, 0], kind
    assert list(results["route"].results[6:]) == [0]
    assert {r[0] for r in overlay.observed()["route"]} == {
        subnet(family, n) for n in (1, 2, 3, 5, 6)
    }


def test_closed_channel(netns: str) -> None:
    kernel = Kernel(netns)
    scope = scopes.route_scope(4)
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


def test_without_the_right_to_write_nothing_is_written(overlay: Overlay) -> None:
    """A process of another user namespace may read this network namespace, not change it."""
    code = (
        "from flannel_dp import neighbour_scope, neighbour_table\n"
        "from flannel_dp.errors import NotPermitted\n"
        "from flannel_dp.kernel.tables import Kernel\n"
        f"table = neighbour_table({overlay.index}, {{'{address(overlay.family, 1)}': "
        f"'{mac(overlay.family, 1)}'}})\n"
        "with Kernel() as kernel:\n"
        f"    diff = kernel.diff(table, neighbour_scope({overlay.index}, "
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


def test_strict_get_of_an_fdb_entry_takes_the_mac_alone(overlay: Overlay) -> None:
    """Why the request for one FDB entry names no remote."""
    there, peer = endpoint(overlay.family, 1), mac(overlay.family, 1)
    lladdr = struct.pack("=HH6s2x", 10, 2, bytes.fromhex(peer.replace(":", "")))
    remote = socket.inet_pton(socket.AF_INET if overlay.family == 4 else socket.AF_INET6, there)
    dst = struct.pack("=HH", 4 + len(remote), 1) + remote
    overlay.bridge(f"fdb add {peer} dst {there} dev {overlay.device} self permanent")
    answers = []
    with _netlink(overlay.host.ns) as sock:
        sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        for attributes in (lladdr, lladdr + dst):
            body = struct.pack("=BxxxiHBB", socket.AF_BRIDGE, overlay.index, 0, 2, 0) + attributes
            sock.send(_message(RTM_GETNEIGH, 1, 1, body))
            kind, error = struct.unpack_from("=4xH10xi", sock.recv(65536))
            answers.append(error if kind == NLMSG_ERROR else 0)

    assert answers == [0, -errno.EINVAL]


# ---- a hostile or busy kernel side --------------------------------------------


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
    rogue.add(Route(subnet(family, 66), gateway=address(family, 66), device=overlay.index))
    body = rogue.encode(0, 1)[16:]
    with Kernel(overlay.host.ns) as fresh, _netlink(overlay.host.ns) as forger:
        port = _port(fresh.channel)
        forged = _message(RTM_NEWROUTE, 2, 1, body) + _message(NLMSG_DONE, 2, 1, bytes(4))
        forger.sendto(forged, (port, 0))
        held = fresh.read("route", scope)

        diff = fresh.diff(
            overlay.wanted(range(1, 5))[0][0], scopes.neighbour_scope(overlay.index, family)
        )
        refusal = struct.pack("=i", -errno.EINVAL) + bytes(16)
        forger.sendto(
            b"".join(_message(NLMSG_ERROR, 0, seq, refusal) for seq in range(16)), (port, 0)
        )
        (result,) = fresh.apply(diff)

    ours = {entry for number, entry in enumerate(held) if held.tag(number) == 1}
    assert ours == set(routes)
    assert list(result.results) == [0]
    assert (address(family, 4), mac(family, 4)) in overlay.observed()["neighbour"]


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
    stable = columns.nexthop_table(index, {n: address(family, n % 256) for n in range(1, 3001)})
    mine = scopes.nexthop_scope(index, family, ids=(1, 3000))
    overlay.kernel.apply(overlay.kernel.diff(stable, mine))
    restless = columns.nexthop_table(
        index, {n: address(family, n % 256) for n in range(5001, 5033)}
    )
    churned = scopes.nexthop_scope(index, family, ids=(5001, 5032))
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
        wait_until(look)
    finally:
        done.set()
        thread.join()
    assert overlay.kernel.diff(stable, mine).unchanged == 3000
