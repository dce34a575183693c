"""From one kind of forwarding to the other, on a node that is at work, and back when it fails."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from flannel_dp import ConfigError, Conflict, ShrinkRefused, SourceError
from flannel_dp.bpf.filters import COUNTERS_PRIORITY
from flannel_dp.bpf.pins import pin_directory
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.resources.forwarding.pinned import remains
from tests.lib.forwarding import DEVICES, Nodes, filters, reaches
from tests.lib.kernel import everything, expected, has_device, ifindex, observed
from tests.lib.leases import DEVICE, peer, peers
from tests.lib.traffic import Pings, pod_address

OTHERS = range(20, 60)


FAMILIES = pytest.mark.parametrize("families", [(4,), (6,), (4, 6)], ids=["ipv4", "ipv6", "dual"])


@FAMILIES
def test_a_node_changes_over_and_back_while_it_works(
    nodes: Nodes, families: tuple[int, ...]
) -> None:
    """The gap is that of one device's end and another's beginning; what is not on the device
    is not touched, and afterwards there is nothing of the kind before."""
    near, far = cluster = nodes(2)
    leases = [*(node.lease for node in cluster), *peers(OTHERS)]
    with far.plane(*families, forwarding="kernel") as dp:
        assert dp.sync(leases).ok
    with near.plane(*families, forwarding="kernel") as dp:
        assert dp.sync(leases).ok
    family = families[0]
    with Pings(near.pod, pod_address(family, far.number)) as pings:
        with near.plane(*families) as dp:
            plan = dp.plan(leases)
            assert "delete the existing device" in str(plan)
            report = dp.sync(leases)
            assert report.ok, report.to_json()
            assert report.devices[0].action == "replace"
            assert report.tables["peer"]["added"] == (1 + len(OTHERS)) * len(families)
            assert dp.sync(leases).writes == 0
        pings.await_answers(5)
        assert len(filters(near.host, DEVICE[family])) == 2
        assert not any(observed(near.host, n)["fdb"] for n in families)

        with near.plane(*families, forwarding="kernel") as dp:
            report = dp.sync(leases)
            assert report.ok, report.to_json()
            assert dp.sync(leases).writes == 0
        pings.await_answers(5)
    for family in families:
        assert observed(near.host, family) == expected(leases[1:], family)
        assert reaches(near.pod, pod_address(family, far.number))
        assert reaches(far.pod, pod_address(family, near.number))
    assert not any(remains(device, near.host.ns) for device in DEVICES)


def test_flannelds_device_is_taken_over(nodes: Nodes, family: int) -> None:
    """It is one of the kernel's kind; what flanneld wrote on it goes with it."""
    near, far = cluster = nodes(2)
    leases = [node.lease for node in cluster]
    with far.plane(family, forwarding="kernel") as dp:
        dp.sync(leases)
    net = near.lease.subnet if family == 4 else near.lease.ipv6_subnet
    data = near.lease.backend_data if family == 4 else near.lease.backend_v6_data
    assert data is not None
    near.host.ip(
        f"link add {DEVICE[family]} address {data.vtep_mac} type vxlan id 1 dev eth0 "
        f"local {near.host.underlay(family)} dstport 8472 nolearning"
    )
    near.host.ip(
        f"address add {net.partition('/')[0]}/{32 if family == 4 else 128} dev {DEVICE[family]}"
    )
    near.host.ip(f"link set {DEVICE[family]} up")

    with near.plane(family) as dp:
        assert dp.sync(leases).ok

    assert reaches(near.pod, pod_address(family, far.number))
    assert reaches(far.pod, pod_address(family, near.number))


@FAMILIES
def test_a_change_that_fails_is_rolled_back(nodes: Nodes, families: tuple[int, ...]) -> None:
    """A device in collect-metadata mode also takes the port of the family that nobody has
    configured: another program has that one."""
    near, far = cluster = nodes(2)
    leases = [*(node.lease for node in cluster), *peers(OTHERS)]
    for node in cluster:
        with node.plane(*families, forwarding="kernel") as dp:
            assert dp.sync(leases).ok

    def occupy() -> socket.socket:
        taken = socket.socket(socket.AF_INET6 if 6 not in families else socket.AF_INET, 2)
        if 6 not in families:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(("", 8472))
        return taken

    if families == (4, 6):
        occupant = None
        other = "link add vx9 type vxlan id 9 dstport 8472 local 192.0.2.1 dev eth0"
        near.host.ip(other)
        near.host.ip("link set vx9 up")
    else:
        occupant = call_in_netns(near.host.ns, occupy)
    with near.plane(*families) as dp, pytest.raises(Conflict) as caught:
        dp.sync(leases)

    assert occupant is None or "forwards as before" in caught.value.hint
    for family in families:
        assert observed(near.host, family) == expected(leases[1:], family)
        assert reaches(near.pod, pod_address(family, far.number))
        assert reaches(far.pod, pod_address(family, near.number))
    if occupant:
        occupant.close()


def test_a_change_that_failed_is_not_tried_at_once_again(nodes: Nodes, family: int) -> None:
    """Each attempt takes the device down. The kind that is there follows the leases."""
    near, far = cluster = nodes(2)
    leases = [*(node.lease for node in cluster), *peers(OTHERS)]
    for node in cluster:
        with node.plane(family, forwarding="kernel") as dp:
            assert dp.sync(leases).ok

    def occupy() -> socket.socket:
        taken = socket.socket(socket.AF_INET6 if family == 4 else socket.AF_INET, 2)
        if family == 4:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(("", 8472))
        return taken

    with call_in_netns(near.host.ns, occupy), near.plane(family) as dp:
        with pytest.raises(Conflict):
            dp.sync(leases)
        index = ifindex(near.host, DEVICE[family])
        with Pings(near.pod, pod_address(family, far.number)) as pings:
            with pytest.raises(Conflict, match="forwards as before"):
                dp.sync([*leases, peer(99)])
            with pytest.raises(Conflict):
                dp.resync()
            pings.await_answers(5)
        assert pings.lost == 0
        assert ifindex(near.host, DEVICE[family]) == index
        assert observed(near.host, family) == expected([*leases[1:], peer(99)], family)
    with near.plane(family) as dp:
        assert dp.sync(leases).ok, "another process tries"


@pytest.mark.parametrize("before", ["kernel", "ebpf"])
@pytest.mark.parametrize("failing", [4, 6])
def test_a_device_of_a_family_that_fails_is_not_replaced(
    nodes: Nodes, failing: int, before: str
) -> None:
    near, far = cluster = nodes(2)
    leases = [node.lease for node in cluster]
    for node in cluster:
        with node.plane(4, 6, forwarding=before) as dp:
            assert dp.sync(leases).ok
    for family in (4, 6):
        assert reaches(near.pod, pod_address(family, far.number)), "before"
    half = {"subnet": "", "public_ip": ""} if failing == 4 else {"ipv6_subnet": ""}

    with (
        near.plane(4, 6, forwarding="ebpf" if before == "kernel" else "kernel") as dp,
        pytest.raises(SourceError),
    ):
        dp.sync([replace(near.lease, **half), far.lease])

    for family in (4, 6):
        assert reaches(near.pod, pod_address(family, far.number)), family


@pytest.mark.parametrize("families", [(4,), (4, 6)], ids=["ipv4", "dual"])
@pytest.mark.parametrize("forwarding", ["kernel", "ebpf"])
def test_clean_finds_what_the_other_kind_left(
    nodes: Nodes, families: tuple[int, ...], forwarding: str
) -> None:
    (node,) = nodes(1)
    before = everything(node.host)
    with node.plane(*families, forwarding=forwarding) as dp:
        assert dp.sync([node.lease, *peers(OTHERS)]).ok
    other = "ebpf" if forwarding == "kernel" else "kernel"

    with node.plane(*families, forwarding=other) as dp:
        assert dp.clean().ok

    assert everything(node.host) == before
    assert not any(remains(device, node.host.ns) for device in DEVICES)


def test_what_a_killed_change_left_pinned_is_removed(nodes: Nodes, family: int) -> None:
    """The device had gone, and the process with it."""
    (node,) = nodes(1)
    with node.plane(family) as dp:
        assert dp.sync([node.lease, *peers(OTHERS)]).ok
    node.host.ip(f"link del {DEVICE[family]}")

    with node.plane(family, forwarding="kernel") as dp:
        assert dp.sync([node.lease, *peers(OTHERS)]).ok

    assert not any(remains(device, node.host.ns) for device in DEVICES)


def test_keeps_peers_that_a_list_lacks_when_the_device_is_replaced(
    nodes: Nodes, family: int
) -> None:
    (node,) = nodes(1)
    leases = [node.lease, *peers(OTHERS)]
    with node.plane(family, forwarding="kernel") as dp:
        dp.sync(leases)

    with node.plane(family) as dp, pytest.raises(ShrinkRefused, match="36 of 40"):
        dp.sync(leases[:5])

    assert len(filters(node.host, DEVICE[family])) == 2
    with node.plane(family) as dp:
        assert not dp.sync(leases).writes
    with (
        node.plane(family, forwarding="kernel") as dp,
        pytest.raises(ShrinkRefused, match="36 of 40"),
    ):
        dp.sync(leases[:5])
    assert observed(node.host, family) == expected(leases[1:], family)


def test_a_foreign_device_in_external_mode_is_not_converted(nodes: Nodes, family: int) -> None:
    """Nothing of ours was ever pinned for it."""
    (node,) = nodes(1)
    node.host.ip(f"link add {DEVICE[family]} type vxlan external dstport 8472")

    with (
        node.plane(family, forwarding="kernel") as dp,
        pytest.raises(Conflict, match="collect-metadata"),
    ):
        dp.sync([node.lease, peer(9)])

    assert has_device(node.host, family)


def test_a_network_inside_the_underlay_is_refused(nodes: Nodes, family: int) -> None:
    """One route for all of it would lead nodes into the tunnel."""
    (node,) = nodes(1)
    wide = "10.9.0.1/8" if family == 4 else "fd00::1/16"
    node.host.ip(f"-{family} address add {wide} dev eth0 {'nodad' if family == 6 else ''}")

    with (
        node.plane(family) as dp,
        pytest.raises(ConfigError, match=r"lies within.*with_forwarding"),
    ):
        dp.sync([node.lease, peer(2), peer(9)])

    assert not has_device(node.host, family)


def _step(frame: Any) -> str:
    """What a call is about to write, "" where it writes nothing."""
    module, values = frame.f_globals.get("__name__"), frame.f_locals
    match module, frame.f_code.co_name:
        case "flannel_dp.kernel.link_writer", "set":
            up = {True: "up", False: "down", None: ""}[values["up"]]
            return up or ("name" if values["name"] else "set")
        case "flannel_dp.kernel.link_writer", "add" | "delete" | "add_address":
            return str(frame.f_code.co_name)
        case "flannel_dp.kernel.tables", "apply":
            plan = values["plan"]
            diffs = [one for one in ([plan] if hasattr(plan, "kind") else [*plan]) if len(one)]
            if not diffs:
                return ""
            removes = all(one.removed == len(one) for one in diffs)
            one = "one " if all(len(one) == 1 for one in diffs) else ""
            return f"{'remove' if removes else 'write'} {one}{' '.join(d.kind for d in diffs)}"
    return ""


@contextmanager
def _before_each_write(stop: Callable[[str], None]) -> Iterator[None]:
    """Call ``stop`` with what is about to be written, on whichever thread."""

    def seen(frame: Any, event: str, what: Any) -> None:
        if event == "call" and (step := _step(frame)):
            stop(step)

    threading.setprofile(seen)
    sys.setprofile(seen)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.mark.parametrize("hand_back", [False, True], ids=["sync", "for-flanneld"])
def test_nothing_is_prepared_while_neither_mode_forwards(nodes: Nodes, hand_back: bool) -> None:
    """Stopped before each of its writes but those between the two devices, a node on the way from
    the program to the kernel's tables answers, and is answered. In between there are the fewest
    writes that the kernel permits, and one route of each family, however many peers there are."""
    near, far = cluster = nodes(2)
    leases = [*(node.lease for node in cluster), *peers(OTHERS)]
    for node in cluster:
        with node.plane(4, 6) as dp:
            assert dp.sync(leases).ok
    steps: list[str] = []

    def stop(step: str) -> None:
        steps.append(step)
        between = "remove one route" in steps and "delete" not in steps
        for family in (4, 6) if not between else ():
            assert reaches(near.pod, pod_address(family, far.number)), steps
            assert reaches(far.pod, pod_address(family, near.number)), steps

    with near.plane(4, 6, forwarding="kernel", hand_back=hand_back) as dp:
        with _before_each_write(stop):
            report = dp.sync(leases)
        assert report.ok, report.to_json()
        assert report.devices[0].action == "replace"
        counts = report.tables["neighbour"]
        assert (counts["added"], counts["unchanged"]) == (2 * (1 + len(OTHERS)), 0)
        assert dp.sync(leases).writes == 0

    begin, end = steps.index("remove one route"), steps.index("delete")
    assert steps[:begin] == [
        *("add", "add_address", "write fdb neighbour", "write one neighbour"),
        *("add", "add_address", "write fdb neighbour", "write one neighbour"),
    ]
    assert steps[begin:end] == [
        *("remove one route", "remove one route"),
        *("down", "name", "name", "name", "up", "up"),
        *("write one route", "write one route"),
    ]
    first = "write neighbour route" if hand_back else "write neighbour nexthop route"
    assert steps[end:] == ["delete", first, "write neighbour route"]
    for family in (4, 6):
        assert "clsact" not in near.host.exec("tc", "qdisc", "show", "dev", DEVICE[family])
        assert reaches(near.pod, pod_address(family, far.number))
        assert reaches(far.pod, pod_address(family, near.number))


def test_the_program_forwards_on_where_its_successor_cannot_be_up(nodes: Nodes) -> None:
    """Another program takes the UDP port in the moment in which neither device has it."""
    near, far = cluster = nodes(2)
    leases = [*(node.lease for node in cluster), *peers(OTHERS)]
    for node in cluster:
        with node.plane(4, 6) as dp:
            assert dp.sync(leases).ok
    index, taken = ifindex(near.host, DEVICE[4]), list[socket.socket]()

    def occupy(step: str) -> None:
        if step == "up" and not taken:
            taken.append(call_in_netns(near.host.ns, socket.socket, socket.AF_INET6, 2))
            taken[0].bind(("", 8472))
        elif step == "delete":
            taken[0].close()

    with (
        near.plane(4, 6, forwarding="kernel") as dp,
        _before_each_write(occupy),
        pytest.raises(Conflict, match="forwards as before"),
    ):
        dp.sync(leases)

    assert ifindex(near.host, DEVICE[4]) == index
    assert "fldp-" not in near.host.ip("link show type vxlan")
    for family in (4, 6):
        assert reaches(near.pod, pod_address(family, far.number))
        assert reaches(far.pod, pod_address(family, near.number))


def test_counters_of_the_new_device_outlive_the_program_on_it(nodes: Nodes) -> None:
    """They were attached beside it, and go with the qdisc that was made for both."""
    (node,) = nodes(1)
    leases = [node.lease, *peers(OTHERS)]
    with node.plane(4, 6) as dp:
        assert dp.sync(leases).ok
    with node.plane(4, 6, forwarding="kernel", counters=True) as dp:
        assert dp.sync(leases).counters == dict.fromkeys(DEVICES, "loaded")
    for device in DEVICES:
        assert {one[1] for one in filters(node.host, device)} == {COUNTERS_PRIORITY}

    with node.plane(4, 6, forwarding="kernel", counters=False) as dp:
        assert dp.sync(leases).counters == dict.fromkeys(DEVICES, "removed")
    for device in DEVICES:
        assert "clsact" not in node.host.exec("tc", "qdisc", "show", "dev", device)
        assert not pin_directory(device, node.host.ns).exists()


def test_a_program_that_cannot_be_found_delays_the_routes_alone(
    nodes: Nodes, family: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Another program has unpinned it: the kernel forwards from when all routes are written."""
    near, far = cluster = nodes(2)
    leases = [*(node.lease for node in cluster), *peers(OTHERS)]
    for node in cluster:
        with node.plane(family) as dp:
            assert dp.sync(leases).ok
    directory = pin_directory(DEVICE[family], near.host.ns)
    for path in directory.glob("forward-egress-*"):
        path.unlink()

    with near.plane(family, forwarding="kernel", hand_back=True) as dp:
        assert dp.sync(leases).ok
        assert dp.sync(leases).writes == 0

    assert "Traffic pauses until a route to each peer is written" in caplog.text
    assert reaches(near.pod, pod_address(family, far.number))
    assert not any(remains(device, near.host.ns) for device in DEVICES)


def test_a_node_is_handed_back_to_flanneld(nodes: Nodes) -> None:
    """The kernel forwards from then on, by entries as flanneld writes them."""
    near, far = cluster = nodes(2)
    leases = [*(node.lease for node in cluster), *peers(OTHERS)]
    for node in cluster:
        with node.plane(4, 6) as dp:
            assert dp.sync(leases).ok
    with near.plane(4, 6, forwarding="kernel", hand_back=True) as dp:
        assert dp.sync(leases).ok
        assert dp.plan(leases).is_empty

    for family in (4, 6):
        theirs = {
            (prefix, via, "boot", "gateway")
            for prefix, via, *_ in expected(leases[1:], family)["route"]
        }
        held = observed(near.host, family)
        assert held["route"] == theirs
        assert held["nexthop"] == set()
        assert len(held["fdb"]) == len(held["neighbour"]) == len(leases) - 1
        assert reaches(near.pod, pod_address(family, far.number))
    assert not any(remains(device, near.host.ns) for device in DEVICES)
