"""The traffic counters as a resource: compare, apply, concerns, and their removal."""

from __future__ import annotations

from collections.abc import Iterator
from threading import RLock
from typing import Any

import pytest

from flannel_dp import BackendData, Counters, Unsupported
from flannel_dp._core import BpfMap
from flannel_dp.bpf import pins
from flannel_dp.kernel import host as kernel
from flannel_dp.reconcile.reconciler import Reconciler
from flannel_dp.reconcile.report import Report
from flannel_dp.reconcile.resource import Done, FiltersChanged, Result
from flannel_dp.resources.counters import device as one_device
from flannel_dp.resources.counters.device import FILTER
from flannel_dp.resources.counters.resource import CountersResource
from flannel_dp.resources.counters.traffic import TrafficReader
from tests.lib.bpf import datagrams, tc, tunnel
from tests.lib.hosts import Host
from tests.lib.leases import DEVICE, network_config, peer, peers, subnet
from tests.lib.views import View, devices_done, facts, view

RTM_NEWTFILTER, RTM_NEWLINK = 44, 16
CONFIG = network_config()


class Node:
    """A host with vxlan devices of both families, and the resource that counts on them."""

    def __init__(self, host: Host, *families: int) -> None:
        self.host, self.kernel = host, kernel.Host(host.ns)
        self.index: dict[int, int] = {}
        for number in families or (4, 6):
            name, local = DEVICE[number], host.underlay(number)
            host.ip(f"link add {name} type vxlan id {number} dstport 8472 local {local}")
            host.ip(f"link set {name} up")
            self.index[number] = int(host.ip_json(f"link show {name}")[0]["ifindex"])
        self.store = Counters([*DEVICE.values()], host.ns)
        self.resource = CountersResource(self.store, wanted=True)

    @property
    def done(self) -> Done:
        return devices_done(**{f"device{n}": (DEVICE[n], i, 1450) for n, i in self.index.items()})

    def state(self) -> list[str]:
        """What the kernel has of filters, qdiscs and pins."""
        shown = [
            tc(self.host, f"{what} show dev {DEVICE[number]} {side}")
            for number in self.index
            for what, side in (("filter", "ingress"), ("filter", "egress"), ("qdisc", ""))
        ]
        folders = [pins.pin_directory(name, self.host.ns) for name in DEVICE.values()]
        pinned = [str(path) for folder in folders if folder.is_dir() for path in folder.iterdir()]
        return shown + sorted(pinned)

    def sync(self, wanted: View | None = None, resource: CountersResource | None = None) -> Report:
        return recorded(
            Reconciler(self.kernel, [resource or self.resource]), wanted or everything()
        )


def everything(*families: int) -> View:
    return view(CONFIG, peers([1, 2]), *(families or (4, 6)))


def recorded(reconciler: Reconciler, wanted: View | None) -> Report:
    """Sync, or clean where there is no view; the report."""
    found = reconciler.sync(wanted) if wanted is not None else reconciler.clean()
    report = Report()
    for one in reconciler.resources:
        one.record(report, found.changes.get(one.name), found.done[one.name])
    return report


@pytest.fixture
def node(host: Host) -> Iterator[Node]:
    made = Node(host)
    yield made
    made.store.remove()
    made.kernel.close()


def test_compare_writes_nothing_and_apply_leaves_nothing_to_do(node: Node) -> None:
    before, desired = node.state(), node.resource.desired(everything())

    change = node.resource.compare(node.kernel, desired, node.done)

    assert node.state() == before
    assert not any(FILTER in text for text in before)
    assert [line.partition(":")[0] for line in change.lines()] == [
        f"+ counters of {name}" for name in DEVICE.values()
    ]

    outcome = node.resource.apply(node.kernel, change)

    assert outcome.facts["counters"] == dict.fromkeys(DEVICE.values(), "loaded")
    assert sum(FILTER in text for text in node.state()) == 4
    assert node.resource.compare(node.kernel, desired, node.done).is_empty
    other = CountersResource(Counters([*DEVICE.values()], node.host.ns), wanted=True)
    assert other.compare(node.kernel, desired, {}).is_empty  # another process, no facts


def test_a_report_says_what_was_done(node: Node) -> None:
    first, second = node.sync(), node.sync()

    assert first.counters == dict.fromkeys(DEVICE.values(), "loaded")
    assert second.counters == {}
    assert first.looked == second.looked == {"counters"}


def test_a_filter_that_was_detached_is_attached_again(node: Node, family: int) -> None:
    node.sync()
    name = DEVICE[family]
    assert not node.resource.is_detached(node.index[family])
    tc(node.host, f"filter del dev {name} egress")

    change = node.resource.compare(node.kernel, node.resource.desired(everything()), node.done)

    assert [*change.lines()] == [f"+ counters of {name}: attach to egress"]
    assert node.resource.is_detached(node.index[family])
    assert not node.resource.is_detached(node.index[10 - family])
    assert node.sync().counters == {name: "attached"}
    assert not node.resource.is_detached(node.index[family])


def test_pins_that_went_are_pinned_again(node: Node, family: int) -> None:
    node.sync()
    pins.remove(pins.pin_directory(DEVICE[family], node.host.ns), "peers")

    change = node.resource.compare(node.kernel, node.resource.desired(everything()), node.done)
    node.resource.apply(node.kernel, change)

    assert [*change.lines()] == [f"+ counters of {DEVICE[family]}: pin the programs again"]
    fresh = Counters([*DEVICE.values()], node.host.ns)
    assert fresh.compare(fresh.indexes()) == {}


def test_a_device_that_was_made_again_is_counted_again(node: Node, family: int) -> None:
    node.sync()
    name = DEVICE[family]
    node.host.ip(f"link del {name}")
    planned = devices_done(**{f"device{family}": (name, 0, 1450)})
    desired = node.resource.desired(everything())

    before = node.resource.compare(node.kernel, desired, planned)
    node.host.ip(f"link add {name} type vxlan id {family} dstport 8472 local 127.0.0.1")
    node.host.ip(f"link set {name} up")
    node.index[family] = int(node.host.ip_json(f"link show {name}")[0]["ifindex"])
    after = node.resource.compare(node.kernel, desired, node.done)

    assert before.attach == {name: ("attach to ingress", "attach to egress")}
    assert node.resource.apply(node.kernel, before) == Result(facts={"counters": {}})
    assert after.attach == {
        name: ("attach to ingress", "attach to egress", "count drops of this device")
    }
    assert node.sync().counters == {name: "attached"}


@pytest.mark.parametrize("how", ["clean", "not wanted"])
def test_removal_takes_all_of_it(node: Node, how: str) -> None:
    before = node.state()
    node.sync()
    resource = CountersResource(node.store, wanted=how == "clean")
    counted = node.state()

    removal = resource.compare(node.kernel, None, {})

    assert node.state() == counted
    assert [*removal.lines()] == [f"- counters of {name}" for name in DEVICE.values()]

    wanted = None if how == "clean" else everything()
    report = recorded(Reconciler(node.kernel, [resource]), wanted)

    assert report.counters == dict.fromkeys(DEVICE.values(), "removed")
    assert node.state() == before
    assert resource.compare(node.kernel, None, {}).is_empty


def test_removal_finds_filters_without_pins(node: Node, family: int) -> None:
    node.sync()
    for name in DEVICE.values():
        pins.remove(pins.pin_directory(name, node.host.ns))
    tc(node.host, f"filter del dev {DEVICE[10 - family]} ingress")
    tc(node.host, f"filter del dev {DEVICE[10 - family]} egress")

    fresh = CountersResource(Counters([*DEVICE.values()], node.host.ns), wanted=False)

    assert fresh.compare(node.kernel, None, {}).remove == (DEVICE[family],)
    assert node.sync(resource=fresh).counters == {DEVICE[family]: "removed"}


def test_an_event_about_filters_of_our_devices_concerns_it(node: Node, family: int) -> None:
    node.sync()

    here, elsewhere = node.index[family], node.host.ifindex
    assert not node.resource.concerns(FiltersChanged(here)), "the filters are there"
    tc(node.host, f"filter del dev {DEVICE[family]} ingress")
    assert node.resource.concerns(FiltersChanged(here))
    assert not node.resource.concerns(FiltersChanged(elsewhere))
    assert not node.resource.concerns(object())


def test_what_is_pinned_in_our_place_stops_only_its_own_device(node: Node, family: int) -> None:
    directory = pins.pin_directory(DEVICE[family], node.host.ns, create=True)
    theirs = BpfMap.create(1, 4, 4, 8, name="theirs")
    theirs.pin(directory / "peers")

    report = node.sync()

    assert "the map theirs" in str(report.problems["counters"])
    other = DEVICE[10 - family]
    assert FILTER in tc(node.host, f"filter show dev {other} ingress")
    assert (directory / "peers").exists()
    pins.remove(directory)


def test_host_gw_has_nothing_to_count(node: Node) -> None:
    resource = CountersResource(Counters([], node.host.ns), wanted=True)

    report = node.sync(resource=resource)

    assert isinstance(report.problems["counters"], Unsupported)
    assert resource.compare(node.kernel, None, {}).is_empty


@pytest.mark.parametrize("complete", [True, False])
def test_room_is_made_where_a_map_is_full(
    make_host: Any, family: int, complete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right end is a peer no more; its counts go once another peer found no room, unless
    the peers of a family are not known now."""
    monkeypatch.setattr(one_device.DeviceCounters.__init__, "__kwdefaults__", {"max_peers": 1})
    left, right = tunnel(make_host(), make_host(), family)
    store = Counters(["flannel.1"], left.host.ns)
    resource = CountersResource(store, wanted=True)
    wanted = everything() if complete else everything(family)
    reconciler = Reconciler(kernel.Host(left.host.ns), [resource])
    recorded(reconciler, wanted)
    datagrams(left, right, 1)
    datagrams(right, left, 1)  # finds no room

    (change,) = reconciler.compare(wanted).changes.values()
    recorded(reconciler, wanted)

    assert [*change.lines()] == ["~ counters of flannel.1: forget former peers"] * complete
    assert len(store.read()["flannel.1"]) == (0 if complete else 1)
    assert all(one.is_empty for one in reconciler.compare(wanted).changes.values())
    store.remove()


def test_traffic_is_read_by_peer_without_a_data_plane(make_host: Any, family: int) -> None:
    left, right = tunnel(make_host(), make_host(), family)
    data = BackendData(1, right.mac)
    known = peer(1, name="right", **{{4: "backend_data", 6: "backend_v6_data"}[family]: data})
    claims = facts(network_config(family), family, [known, peer(2, name="other")]).peers
    store = Counters(["flannel.1"], left.host.ns)
    store.ensure()
    datagrams(left, right, 3)
    reader = TrafficReader(store, {family: "flannel.1"}, {family: claims}.get, RLock())

    found = {
        (one.peer, one.subnet, one.family, one.direction): one.traffic.packets
        for one in reader.by_peer(reader.read())
    }

    assert found == {
        ("right", subnet(family, 1), family, "sent"): 3,
        ("right", subnet(family, 1), family, "received"): 0,
        ("other", subnet(family, 2), family, "sent"): 0,
        ("other", subnet(family, 2), family, "received"): 0,
    }
    assert reader.of_family(10 - family) is None
    store.remove()
    assert [*reader.by_peer(reader.read())] == []
