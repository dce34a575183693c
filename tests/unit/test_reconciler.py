"""The rules of the loop over resources, with resources that are dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from flannel_dp.errors import DeviceGone, FlannelDPError, KernelError, NotPermitted, ShrinkRefused
from flannel_dp.reconcile.reconciler import Reconciler, in_order
from flannel_dp.reconcile.resource import Done, Resource, Result


class View:
    """What is wanted of each resource by its name, and families without facts."""

    def __init__(self, wanted: dict[str, dict[str, str]], **errors: FlannelDPError) -> None:
        self.wanted = wanted
        self.errors = {int(name[1:]): error for name, error in errors.items()}


class Difference:
    """What is missing, what differs and what is stale between two dictionaries."""

    def __init__(self, want: Mapping[str, str], held: Mapping[str, str]) -> None:
        self.write = {k: v for k, v in want.items() if held.get(k) != v}
        self.remove = [k for k in held if k not in want]
        self.facts = {"entries": len(held)}

    @property
    def is_empty(self) -> bool:
        return not (self.write or self.remove)

    def lines(self) -> Iterator[str]:
        yield from (f"+ {key} {value}" for key, value in self.write.items())
        yield from (f"- {key}" for key in self.remove)


class Node:
    """What the node holds, what was done to it in order, and faults to raise once each."""

    def __init__(self, **held: dict[str, str]) -> None:
        self.held: dict[str, dict[str, str]] = held
        self.log: list[str] = []
        self.faults: dict[str, list[FlannelDPError]] = {}

    def step(self, what: str, name: str) -> None:
        self.log.append(f"{what} {name}")
        faults = self.faults.get(f"{what} {name}")
        if faults:
            raise faults.pop(0)

    def writes(self) -> list[str]:
        return [line for line in self.log if not line.startswith("read")]


class Table(Resource[dict[str, str], Difference]):
    """A dictionary of the node, with the same name as the resource."""

    def __init__(
        self,
        name: str,
        *after: str,
        families: tuple[int, ...] = (),
        vital: bool = True,
        disturbs: bool = False,
    ) -> None:
        self.name, self.after, self.families, self.vital = name, after, families, vital
        self._disturbs = disturbs

    def desired(self, view: View) -> dict[str, str]:
        return view.wanted.get(self.name, {})

    def compare(self, host: Any, desired: dict[str, str] | None, done: Done) -> Difference:
        host.step("read", self.name)
        return Difference(desired or {}, host.held.setdefault(self.name, {}))

    def apply(self, host: Any, change: Difference) -> Result:
        host.step("write", self.name)
        host.held[self.name].update(change.write)
        for key in change.remove:
            del host.held[self.name][key]
        return Result(disturbs=self._disturbs, facts={"entries": len(host.held[self.name])})

    def finish(self, host: Any, change: Difference) -> None:
        host.step("finish", self.name)

    def update(self, host: Any, changed: dict[str, str], done: Done) -> Result | None:
        if self.name not in changed:
            return None
        host.step("update", self.name)
        return Result()

    def concerns(self, event: Any) -> bool:
        return bool(event == self.name)


DEVICE = {"device": {"flannel.1": "up"}, "peers": {"a": "1", "b": "2"}, "rules": {"masq": "on"}}


def device_and_peers() -> list[Table]:
    """A device, peers on it, and rules that depend on neither; in no useful order."""
    return [Table("rules", vital=False), Table("peers", "device"), Table("device", disturbs=True)]


def test_everything_is_compared_before_anything_is_written() -> None:
    node = Node()

    Reconciler(node, device_and_peers()).sync(View(DEVICE))  # type: ignore[arg-type]

    first = node.log.index("write rules")
    assert {*node.log[:first]} == {"read rules", "read device", "read peers"}
    assert node.held == DEVICE


def test_the_guard_sees_all_changes_and_nothing_is_written_when_it_raises() -> None:
    node = Node(peers={"a": "1", "b": "2"})

    def guard(changes: Mapping[str, Any]) -> None:
        assert {*changes} == {"rules", "device", "peers"}
        if len(changes["peers"].remove) == 2:
            raise ShrinkRefused("all peers would go", hint="check the source")

    with pytest.raises(ShrinkRefused):
        Reconciler(node, device_and_peers()).sync(View({}), guard=guard)  # type: ignore[arg-type]

    assert node.writes() == []


def test_writing_follows_the_order_and_finishing_reverses_it() -> None:
    steps = [Table("peers", "device"), Table("device", "map"), Table("map", "program")]
    node, wanted = Node(), {name: {"x": "1"} for name in ("peers", "device", "map", "program")}

    Reconciler(node, [*steps, Table("program")]).sync(View(wanted))  # type: ignore[arg-type]

    order = ["program", "map", "device", "peers"]
    assert node.writes() == [f"write {n}" for n in order] + [f"finish {n}" for n in order[::-1]]


def test_clean_is_the_pass_that_wants_nothing_in_reverse() -> None:
    node = Node(**{name: dict(rows) for name, rows in DEVICE.items()})

    Reconciler(node, device_and_peers()).clean()  # type: ignore[arg-type]

    assert node.writes().index("write peers") < node.writes().index("write device")
    assert not any(node.held.values())


def test_a_failure_stops_what_depends_on_it_and_nothing_else() -> None:
    node, error = Node(), KernelError(22, "create flannel.1")
    node.faults["write device"] = [error]

    done = Reconciler(node, device_and_peers()).sync(View(DEVICE)).done  # type: ignore[arg-type]

    assert (done["device"].error, done["device"].skipped) == (error, False)
    assert (done["peers"].error, done["peers"].skipped) == (error, True)
    assert node.held["rules"] == DEVICE["rules"]


def test_a_failure_of_one_family_does_not_stop_the_other() -> None:
    both = Table("map", families=(4, 6)), Table("device4", "map", families=(4,))
    peers = Table("peers6", "device4", families=(6,)), Table("peers4", "device4", families=(4,))
    node = Node()
    node.faults["write device4"] = [KernelError(22, "create flannel.1")]
    wanted = {one.name: {"x": "1"} for one in (*both, *peers)}

    done = Reconciler(node, [*both, *peers]).sync(View(wanted)).done  # type: ignore[arg-type]

    assert done["peers4"].skipped
    assert done["peers6"].error is None
    assert node.held["peers6"] == {"x": "1"}


def test_a_family_without_facts_is_left_as_it_is() -> None:
    node, error = Node(peers6={"old": "1"}), FlannelDPError("eth0 has no IPv6 address")
    resources = [Table("peers4", families=(4,)), Table("peers6", families=(6,))]

    done = Reconciler(node, resources).sync(View({}, f6=error)).done  # type: ignore[arg-type]

    assert (done["peers6"].error, done["peers6"].skipped) == (error, True)
    assert node.held["peers6"] == {"old": "1"}


@pytest.mark.parametrize("when", ["read", "write", "finish"])
def test_not_permitted_ends_the_pass(when: str) -> None:
    node = Node()
    node.faults[f"{when} device"] = [NotPermitted(1, "write", hint="run as root")]

    with pytest.raises(NotPermitted):
        Reconciler(node, device_and_peers()).sync(View(DEVICE))  # type: ignore[arg-type]


@pytest.mark.parametrize("when", ["read", "write", "finish"])
def test_not_permitted_of_what_is_not_vital_is_its_own_failure(when: str) -> None:
    node, error = Node(), NotPermitted(1, "load a program", hint="run as root")
    node.faults[f"{when} rules"] = [error]

    done = Reconciler(node, device_and_peers()).sync(View(DEVICE)).done  # type: ignore[arg-type]

    assert done["rules"].error is error
    assert node.held["peers"] == DEVICE["peers"]


def test_what_serves_the_node_goes_on_without_a_family_that_failed() -> None:
    devices = [Table(f"device{one}", families=(one,)) for one in (4, 6)]
    node = Node()
    node.faults["write device4"] = [KernelError(22, "create flannel.1")]
    wanted = {name: {"x": "1"} for name in ("device4", "device6", "file")}
    resources = [*devices, Table("file", "device4", "device6", vital=False)]

    done = Reconciler(node, resources).sync(View(wanted)).done  # type: ignore[arg-type]

    assert done["file"].error is None
    assert node.held["file"] == {"x": "1"}


def test_what_depends_on_a_disturbed_resource_is_compared_again() -> None:
    node = Node()

    Reconciler(node, device_and_peers()).sync(View(DEVICE))  # type: ignore[arg-type]

    assert node.log.count("read peers") == 2
    assert node.log.index("write device") < node.log.index("write peers")
    assert node.log.count("read rules") == 1


def test_nothing_is_compared_again_where_nothing_was_disturbed() -> None:
    node = Node()
    reconciler = Reconciler(node, device_and_peers())  # type: ignore[arg-type]
    reconciler.sync(View(DEVICE))
    node.log.clear()

    reconciler.sync(View(DEVICE))

    assert sorted(line for line in node.log if not line.startswith("finish")) == [
        "read device",
        "read peers",
        "read rules",
    ]


def test_a_device_that_is_gone_is_answered_by_comparing_once_more() -> None:
    node = Node(device={"flannel.1": "up"})
    node.faults["write peers"] = [DeviceGone(19, "write", hint="sync again")]

    done = Reconciler(node, device_and_peers()).sync(View(DEVICE)).done  # type: ignore[arg-type]

    assert done["peers"].error is None
    assert node.held["peers"] == DEVICE["peers"]
    assert node.log.count("read device") == 2


def test_a_device_that_stays_gone_is_an_error() -> None:
    node = Node(device={"flannel.1": "up"})
    gone = [DeviceGone(19, "write", hint="sync again") for _ in range(2)]
    node.faults["write peers"] = [*gone]

    done = Reconciler(node, device_and_peers()).sync(View(DEVICE)).done  # type: ignore[arg-type]

    assert done["peers"].error is gone[1]


def test_what_could_not_be_compared_is_not_written() -> None:
    node = Node()
    node.faults["read rules"] = [FlannelDPError("nft failed")]

    found = Reconciler(node, device_and_peers()).sync(View(DEVICE))  # type: ignore[arg-type]

    assert {*found.failed()} == {"rules"}
    assert "write rules" not in node.log
    assert node.held["peers"] == DEVICE["peers"]


def test_a_plan_is_the_same_without_writing() -> None:
    node = Node(peers={"b": "2", "c": "3"})

    changes = Reconciler(node, device_and_peers()).compare(View(DEVICE)).changes  # type: ignore[arg-type]

    assert [*changes["peers"].lines()] == ["+ a 1", "- c"]
    assert node.writes() == []


def test_an_update_asks_every_resource_and_reads_nothing() -> None:
    node = Node()

    done = Reconciler(node, device_and_peers()).update({"peers": "a"})  # type: ignore[arg-type]

    assert {*done} == {"peers"}
    assert node.log == ["update peers"]


def test_some_resources_alone_can_be_synced() -> None:
    node = Node()

    found = Reconciler(node, device_and_peers()).sync(View(DEVICE), only=["rules"])  # type: ignore[arg-type]

    assert {*found.done} == {"rules"}
    assert node.log == ["read rules", "write rules", "finish rules"]


def test_an_event_is_told_to_those_it_concerns() -> None:
    assert Reconciler(Node(), device_and_peers()).concerned("device") == ["device"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (lambda: [Table("a", "b"), Table("b", "a")], "depend on each other"),
        (lambda: [Table("a"), Table("a")], "two resources are named 'a'"),
    ],
)
def test_what_cannot_be_ordered_is_an_error(
    resources: Callable[[], list[Table]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        in_order(resources())


def test_names_that_are_not_composed_are_left_out_of_the_order() -> None:
    assert [one.name for one in in_order([Table("peers", "device", "map")])] == ["peers"]
