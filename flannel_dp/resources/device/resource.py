"""The vxlan device of one family as a resource.

``ip -d link show flannel.1`` and ``ip address show dev flannel.1`` show it. What is wanted comes
from the facts of the family (:mod:`flannel_dp.resources.device.vxlan`), what differs from
:mod:`flannel_dp.resources.device.plan`, and what writes is loaded when something has to be written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import Table
from flannel_dp.cluster.network import NetworkConfig, devices_of, other_devices
from flannel_dp.errors import KernelError
from flannel_dp.kernel.host import Host
from flannel_dp.kernel.links import Link, LinkReader
from flannel_dp.kernel.tables import timed
from flannel_dp.node.family import Family, View
from flannel_dp.reconcile.plan import DeviceChange
from flannel_dp.reconcile.report import Report
from flannel_dp.reconcile.resource import Done, FiltersChanged, Resource, Result, Unfinished
from flannel_dp.resources.device import vxlan
from flannel_dp.resources.device.plan import DevicePlan, plan_device
from flannel_dp.resources.device.vxlan import VxlanDevice
from flannel_dp.tables.scopes import nexthop_scope, route_scope

log = logging.getLogger(__name__)


class Filters(Protocol):
    """What has to be on the device before it is set up: the program that forwards, if any."""

    def may_convert(self) -> bool:
        """Return whether a device of the other mode of forwarding may be replaced."""
        ...

    def missing(self, index: int) -> tuple[str, ...]:
        """Return where on the device the program is not, and should be."""
        ...

    def not_attached(self, index: int) -> bool:
        """Return whether the program should be on a device and is not."""
        ...

    def attach(self, index: int) -> None:
        """Put the program on a device, where it is not."""
        ...

    def remove_superseded(self, discard: Callable[[], object]) -> None:
        """The device is as it should be: remove a program that forwarded before and is not
        needed, and before it, by ``discard``, devices of a change that was killed."""
        ...


class DeviceDifference(Struct, frozen=True):
    """What it takes to have the device: ``plan``, and ``missing`` filters; or, where no device is
    wanted, the one that is ``found``, and those ``left`` by the other mode of forwarding."""

    name: str
    number: int
    plan: DevicePlan | None = None
    missing: tuple[str, ...] = ()
    found: Link | None = None
    left: tuple[Link, ...] = ()
    kept: bool = False
    warnings: tuple[str, ...] = ()
    moves: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing has to be written."""
        if self.plan is None:
            return self.kept or not (self.found or self.left)
        return self.plan.action == "none" and not self.missing

    @property
    def goes(self) -> list[str]:
        """The devices that are deleted in favour of this one."""
        steps = self.plan.steps if self.plan else ()
        return [step.value for step in steps if step.op == "delete"]

    @property
    def index(self) -> int:
        """The ifindex the device has and keeps; 0 where it has yet to be made."""
        if self.plan is None:
            return self.found.index if self.found else 0
        return (self.plan.ifindex or 0) if self.plan.action in ("none", "adopt") else 0

    @property
    def facts(self) -> Mapping[str, Any]:
        """``index``, ``name``, the ``names`` by ifindex, ``mtu``, and whether it ``is_made``
        already; whether a new MAC takes the neighbours along (neigh_changeaddr in
        net/core/neighbour.c, the permanent ones included)."""
        steps = self.plan.steps if self.plan else ()
        return {
            "index": self.index,
            "name": self.name,
            "names": {self.index: self.name},
            "is_made": bool(self.index),
            "mtu": self.plan.mtu if self.plan else 0,
            "loses_neighbours": any(step.op == "mac" for step in steps),
            "kept": self.kept,
        }

    @property
    def device(self) -> DeviceChange:
        """As a plan and a report have it."""
        if self.plan is None:
            action = "none" if self.is_empty else "delete"
            return DeviceChange(self.name, action, ("deleted",) if action == "delete" else ())
        lines = (
            *self.plan.changes,
            *(f"attach the forwarding program ({parent})" for parent in self.missing),
        )
        adopts = lines and self.plan.action == "none"
        return DeviceChange(self.name, "adopt" if adopts else self.plan.action, lines)

    def lines(self) -> Iterator[str]:
        """Yield one line for the device."""
        sign = {"create": "+", "delete": "-"}.get(self.device.action, "~")
        if not self.is_empty:
            yield f"{sign} device {self.name}: {', '.join(self.device.changes)}"


class DeviceResource(Resource[VxlanDevice, DeviceDifference]):
    """The vxlan device of family ``number``; where a program forwards both families share one.

    ``keep`` leaves the device where it is when everything else is removed.
    """

    vital = True

    def __init__(
        self,
        config: NetworkConfig,
        number: int,
        filters: Filters,
        *,
        take_over: bool = False,
        keep: bool = False,
    ) -> None:
        self.name, self.families = f"device{number}", (number,)
        self.after = ("program", "map4", "map6", *(("device4",) if number == 6 else ()))
        self.number = number
        self._config, self._filters = config, filters
        self._take_over, self._keep = take_over, keep
        self._device = devices_of(config)[number]
        #: The ifindex that the device had: one that was renamed gets its own name back.
        self.index = 0
        #: The interface and the local address that it had, and that it is to have.
        self._place: tuple[str, str] | None = None
        self._wanted: tuple[str, str] | None = None

    def desired(self, view: View) -> VxlanDevice | None:
        family = view.family(self.number)
        return wanted_device(self._config, family) if family else None

    def compare(self, host: Host, desired: VxlanDevice | None, done: Done) -> DeviceDifference:
        if desired is None:
            return self._nothing_wanted(host)
        with host.links() as reader:
            plan = plan_device(
                reader,
                desired,
                take_over=self._take_over,
                netns=host.netns,
                known=self.index,
                may_convert=self._filters.may_convert,
                others=other_devices(self._config),
            )
            lower = reader.link(desired.lower)
        place = (lower.name if lower else "", desired.local)
        moves = _moves(plan, self._place, place)
        self._wanted = place
        change = DeviceDifference(
            desired.name, self.number, plan, warnings=(*moves, *_warnings(plan)), moves=moves
        )
        if plan.action == "none":
            self._place = place
        if not change.index:
            return change
        self.index = change.index
        return replace(change, missing=self._filters.missing(change.index))

    def apply(self, host: Host, change: DeviceDifference) -> Result:
        part = Report()
        with timed(part.seconds, "apply"):
            if change.plan is None:
                self._delete(host, change, part)
                return Result(disturbs=True, part=part)
            for name in change.goes:
                clear_device(host, self.number, host.kernel.ifindex(name))
            index = self._write(host, change.plan)
            if change.missing:
                self._filters.attach(index)
        self.index, self._place = index, self._wanted
        facts = {**change.facts, "index": index, "names": {index: self._device}, "is_made": True}
        return Result(disturbs=True, facts=facts, part=part)

    def _write(self, host: Host, plan: DevicePlan) -> int:
        from flannel_dp.resources.device.change import apply_device

        try:
            return apply_device(plan, netns=host.netns, before_up=self._filters.attach)
        except KernelError as error:
            if plan.converts:
                raise Unfinished(error) from error
            raise

    def finish(self, host: Host, change: DeviceDifference) -> None:
        if change.plan is not None:
            self._filters.remove_superseded(lambda: self._discard_left(host))

    def _discard_left(self, host: Host) -> None:
        from flannel_dp.resources.device.switch import discard_left

        for name in discard_left(host.netns, self._config.backend.vni):
            log.info("Deleted device %(device)s, left by a change of the mode", {"device": name})

    def concerns(self, event: Any) -> bool:
        """Return whether a program that has to be on the device is not there any more."""
        here = isinstance(event, FiltersChanged) and event.index == self.index
        return here and self._filters.not_attached(event.index)

    def record(self, report: Report, change: DeviceDifference | None, outcome: Result) -> None:
        super().record(report, None, outcome)
        if change is not None and change.plan is not None:
            part = Report()
            part.devices, part.warnings = (change.device,), change.warnings
            part.moves = change.moves
            report.add(part)

    # ---- clean

    def _nothing_wanted(self, host: Host) -> DeviceDifference:
        """Return the device to delete. Raises Conflict where its name is another program's."""
        with host.links() as reader:
            found = reader.link(self._device)
            left = [reader.link(name) for name in self._left_behind(reader)]
        if found is not None and found.kind != "vxlan":
            from flannel_dp.resources.device.change import delete_device

            delete_device(self._device, netns=host.netns)  # says what it is instead
        return DeviceDifference(
            self._device,
            self.number,
            found=found,
            left=tuple(one for one in left if one is not None and one.kind == "vxlan"),
            kept=self._keep,
        )

    def _left_behind(self, reader: LinkReader) -> list[str]:
        """Return the devices of other modes that this one, the first, stands for."""
        from flannel_dp.resources.device.aside import left_aside

        devices = devices_of(self._config)
        if self.number != next(iter(devices)):
            return []
        others = [n for n in other_devices(self._config) if n not in devices.values()]
        return others + left_aside(reader, self._config.backend.vni)

    def _delete(self, host: Host, change: DeviceDifference, part: Report) -> None:
        self.index, self._place = 0, None
        from flannel_dp.resources.device.change import delete_device

        for left in change.left:
            for number in (4, 6):
                clear_device(host, number, left.index)
            if delete_device(left.name, netns=host.netns):
                part.devices += (DeviceChange(left.name, "delete", ("deleted",)),)
        if change.found is not None and delete_device(self._device, netns=host.netns):
            part.devices += (change.device,)


def wanted_device(config: NetworkConfig, family: Family) -> VxlanDevice:
    """Return the vxlan device of a family, from its facts."""
    return vxlan.device(
        config,
        family.number,
        lower=family.uplink,
        lower_mtu=family.uplink_mtu,
        local=family.local,
        subnet=family.admission.node.subnet,
        mac=family.mac,
        limit=family.mtu_said_by,
    )


def _moves(
    plan: DevicePlan, before: tuple[str, str] | None, now: tuple[str, str]
) -> tuple[str, ...]:
    """Return what tells that a working tunnel is elsewhere now: by the device that is there, else
    by where this process had it ``before``."""
    steps = plan.steps if plan.action == "adopt" else ()
    moved = [step.text for step in steps if step.op in ("lower", "local")]
    if not moved and before:
        words = zip(("dev", "local"), before, now, strict=True)
        moved = [f"{word} {old} -> {new}" for word, old, new in words if old != new]
    if not moved:
        return ()
    return (
        f"{plan.device.name} moves on the underlay: {', '.join(moved)}: other "
        f"nodes see packets from {plan.device.local} now",
    )


def _warnings(plan: DevicePlan) -> tuple[str, ...]:
    """Return what a person should know of a device although nothing went wrong."""
    found: list[str] = []
    if plan.mtu < plan.device.mtu:
        found.append(
            f"{plan.device.name} gets MTU {plan.mtu}, not "
            f"{plan.device.mtu}: the external interface has no room for more"
        )
    return tuple(found)


def clear_device(host: Host, family: int, device: int) -> None:
    """Remove the routes, then the nexthops, of a device that is about to be deleted: the kernel
    would take longer to flush them with it (46 us for each nexthop object that has a route)."""
    routes, nexthops = route_scope(family, device=device, exclusive=True), nexthop_scope(device)
    for scope in host.readable(family, routes, nexthops):
        host.kernel.apply(host.kernel.diff(Table(scope.kind), scope))
