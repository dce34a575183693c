"""The rules of the loop over resources, with resources that are dictionaries: those of
reconciler.txt, which says how they are read, and some that are no tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from flannel_dp.errors import DeviceGone, FlannelDPError, KernelError, NotPermitted, ShrinkRefused
from flannel_dp.reconcile.reconciler import Pass, Reconciler, in_order
from flannel_dp.reconcile.resource import Done, Resource, Result
from tests.lib.script import Script, each_script


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


SECTIONS = (
    *("resources", "before", "wanted", "cannot be synced", "fails", "fails, one in each run"),
    *("run", "plan", "steps", "after", "results", "raises"),
)
#: What "default" stands for in the scripts.
WANTED = ["device  flannel.1  up", "peers  a  1", "peers  b  2", "rules  masq  on"]
ERRORS: dict[str, Callable[[], FlannelDPError]] = {
    "KernelError": lambda: KernelError(22, "create flannel.1"),
    "NotPermitted": lambda: NotPermitted(1, "write", hint="run as root"),
    "DeviceGone": lambda: DeviceGone(19, "write", hint="sync again"),
    "FlannelDPError": lambda: FlannelDPError("nft failed"),
}


def device_and_peers() -> list[Table]:
    """A device, peers on it, and rules that depend on neither; in no useful order."""
    return [Table("rules", vital=False), Table("peers", "device"), Table("device", disturbs=True)]


def resources(script: Script) -> list[Table]:
    if "resources" not in script:
        return device_and_peers()
    return [
        Table(
            row["name"],
            *row["after"].split(),
            families=tuple(map(int, row.get("families", "").split())),
            vital="not vital" not in row.get("more", ""),
            disturbs="disturbs" in row.get("more", ""),
        )
        for row in script["resources"].table()
    ]


def tables(lines: list[str]) -> dict[str, dict[str, str]]:
    """Lines such as "peers  a  1", by table."""
    found: dict[str, dict[str, str]] = {}
    for line in WANTED if lines == ["default"] else lines:
        name, key, value = line.split()
        found.setdefault(name, {})[key] = value
    return found


def reconciler(node: Node, resources: Iterable[Table]) -> Any:
    """A reconciler of what stands in for a host; its views are stand-ins, too."""
    return Reconciler(cast(Any, node), resources)


class Run:
    """One script that is run, with these of its lines about failures."""

    def __init__(self, script: Script, faults: list[str]) -> None:
        self.script = script
        self.node = Node(**tables(script.lines("before")))
        self.reconciler = reconciler(self.node, resources(script))
        self.errors: dict[str, FlannelDPError] = {}
        for step, error in (line.rsplit(maxsplit=1) for line in faults):
            made = self.node.faults.setdefault(step.strip(), [])
            made.append(ERRORS[error]())
            again = ", the second time" if len(made) == 2 else ""
            self.errors[step.strip() + again] = made[-1]
        for line in script.lines("cannot be synced"):
            family, why = line.split(maxsplit=1)
            self.errors[f"family {family}"] = FlannelDPError(why)
        self.view = View(
            tables(script.lines("wanted")),
            **{f"f{n[-1]}": error for n, error in self.errors.items() if n.startswith("family")},
        )
        self.changes: Mapping[str, Any] = {}
        self.done: Mapping[str, Result] = {}

    def run(self) -> None:
        for line in self.script.lines("run"):
            self.node.log.clear()
            what, *names = line.split()
            match what:
                case "sync":
                    found = self.reconciler.sync(self.view, only=names or None)
                case "plan":
                    found = self.reconciler.compare(self.view)
                case "clean":
                    found = self.reconciler.clean()
                case "update":
                    self.done = self.reconciler.update(dict.fromkeys(names, "a"))
                    continue
                case _:
                    raise AssertionError(f"{self.script.origin}: cannot run {line!r}")
            self.changes, self.done = found.changes, found.done

    def plan(self) -> list[str]:
        return sorted(
            f"{name}  {line}" for name, change in self.changes.items() for line in change.lines()
        )

    def results(self) -> dict[str, tuple[str, str]]:
        """For each resource how it went, and the failure it is due to."""
        known = {id(error): name for name, error in self.errors.items()}
        return {
            name: ("done", "")
            if one.error is None
            else ("left alone" if one.skipped else "failed", known.get(id(one.error), "another"))
            for name, one in self.done.items()
        }


@each_script(Path(__file__).with_name("reconciler.txt"))
def test_rule(script: Script) -> None:
    script.check_names(*SECTIONS)
    alternatives = script.lines("fails, one in each run")
    for faults in [[line] for line in alternatives] or [script.lines("fails")]:
        made = Run(script, faults)
        if "raises" in script:
            with pytest.raises(FlannelDPError) as caught:
                made.run()
            assert [type(caught.value).__name__] == script.lines("raises")
            assert caught.value in made.errors.values()
        else:
            made.run()
        if "plan" in script:
            assert made.plan() == [re.sub(r"\s{2,}", "  ", n) for n in script.lines("plan")]
        if "steps" in script:
            assert made.node.log == script.lines("steps")
        if "after" in script:
            held = {name: rows for name, rows in made.node.held.items() if rows}
            assert held == tables(script.lines("after"))
        if "results" in script:
            rows = script["results"].table()
            assert made.results() == {
                row["resource"]: (row["result"], row["because of"]) for row in rows
            }


def test_the_guard_sees_all_changes_and_nothing_is_written_when_it_raises() -> None:
    node = Node(peers={"a": "1", "b": "2"})

    def guard(found: Pass) -> None:
        assert {*found.changes} == {"rules", "device", "peers"}
        if len(cast(Difference, found.changes["peers"]).remove) == 2:
            raise ShrinkRefused("all peers would go", hint="check the source")

    with pytest.raises(ShrinkRefused):
        reconciler(node, device_and_peers()).sync(View({}), guard=guard)

    assert node.writes() == []


def test_a_guard_may_have_all_compared_with_another_view_and_is_asked_again() -> None:
    node = Node(peers={"a": "1", "b": "2"})
    kept, asked = View({"peers": {"a": "1", "b": "2", "c": "3"}}), list[object]()

    def guard(found: Pass) -> View | None:
        asked.append(found.view)
        return None if found.view is kept else kept

    found = reconciler(node, device_and_peers()).sync(View({"peers": {"c": "3"}}), guard=guard)

    assert len(asked) == 2
    assert found.view is kept
    assert node.held["peers"] == {"a": "1", "b": "2", "c": "3"}
    first = node.log.index("write peers")
    assert not [line for line in node.log[:first] if line.startswith(("write peers", "finish"))]


def test_an_event_is_told_to_those_it_concerns() -> None:
    assert reconciler(Node(), device_and_peers()).concerned("device") == ["device"]


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
