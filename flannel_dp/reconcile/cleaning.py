"""``DataPlane.clean``: take away exactly what is ours, and find it without any state."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flannel_dp._core import Table
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.links import Link, LinkReader
from flannel_dp.reconcile.plan import DeviceChange, RulesChange
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.device import vxlan
from flannel_dp.resources.device.resource import delete_device
from flannel_dp.resources.peers.nexthops import nexthop_ids
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.results import add_counts
from flannel_dp.tables.scopes import (
    fdb_scope,
    neighbour_scope,
    nexthop_scope,
    peer_scope,
    route_scope,
)

if TYPE_CHECKING:
    from flannel_dp.dataplane import DataPlane


def clean(plane: DataPlane, *, keep_device: bool, rules: bool) -> Report:
    """See ``DataPlane.clean``; with ``rules`` the firewall is cleaned, too."""
    started = time.perf_counter()
    report = Report()
    changes: list[DeviceChange] = []
    try:
        plane.program.ready(load=False)
    except FlannelDPError as error:  # somebody else's pins: they stay
        report.problems["program"] = error
    devices = {number: _device(plane, number) for number in plane.families}
    plane.counting.remove(report)
    for number, device in devices.items():
        _clean_tables(plane, number, device.index if device else 0, keep_device, report)
    every = {one.name: one for one in devices.values() if one}
    for left in _left_behind(plane):
        for number in plane.families:
            scope = route_scope(number, device=left.index, exclusive=True)
            for result in plane.kernel.apply(plane.kernel.diff(Table("route"), scope)):
                add_counts(report.tables["route"], result.counts())
        every[left.name] = left
    for device in every.values():
        if not keep_device:
            delete_device(device.name, netns=plane.netns)
            changes.append(DeviceChange(device.name, "delete", ("deleted",)))
    if not keep_device:
        try:
            plane.program.remove()
        except FlannelDPError as error:
            report.problems["program"] = error
    if rules:
        from flannel_dp.resources.firewall.engine import clean_rules

        try:
            removed = clean_rules(plane.netns)
            report.rules = RulesChange("", removed) if removed else None
        except FlannelDPError as error:
            report.problems["firewall"] = error
    report.devices = tuple(changes)
    report.seconds["total"] = time.perf_counter() - started
    return report


def _device(plane: DataPlane, number: int) -> Link | None:
    """The vxlan device of a family. Raises Conflict where its name is somebody else's."""
    if plane.config.backend.type != "vxlan":
        return None
    name = plane.resolver.device_name(number)
    with LinkReader(plane.netns) as reader:
        found = reader.link(name)
    if found is not None and found.kind != "vxlan":
        delete_device(name, netns=plane.netns)  # says what it is instead
    return found


def _left_behind(plane: DataPlane) -> list[Link]:
    """Devices that this node has with the other kind of forwarding, and not with this one."""
    if plane.config.backend.type != "vxlan":
        return []
    ours = {plane.resolver.device_name(number) for number in plane.families}
    with LinkReader(plane.netns) as reader:
        found = [reader.link(n) for n in vxlan.other_devices(plane.config) if n not in ours]
    return [link for link in found if link is not None and link.kind == "vxlan"]


def _clean_tables(
    plane: DataPlane, number: int, device: int, keep_device: bool, report: Report
) -> None:
    """Routes and nexthops first: with the device they would vanish, too, but without the
    events that tell a routing daemon of it. The rest goes with the device, if that goes."""
    for scope in _scopes(plane, number, device):
        diff = plane.kernel.diff(Table(scope.kind), scope)
        if scope.kind in ("neighbour", "fdb", "peer") and not keep_device:
            report.tables[scope.kind]["removed"] += diff.removed
            continue
        for result in plane.kernel.apply(diff):
            add_counts(report.tables[result.kind], result.counts())
            report.failures += result.failures()


def _scopes(plane: DataPlane, number: int, device: int) -> list[Scope]:
    """Everything of ours of one family, in the order in which it is removed; each is read
    when those before are gone, as routes on the device are in two of them."""
    network = vxlan.network_of(plane.config, number)
    scopes = [route_scope(number, device=device, exclusive=True)] if device else []
    scopes.append(route_scope(number, within=network))
    if number == 4 and plane.nexthops is not None:
        scopes.append(nexthop_scope(0, ids=nexthop_ids(network)))
    peers = plane.program.maps(number)
    if peers:
        scopes.append(peer_scope(peers, number))
    if device:
        scopes += [neighbour_scope(device, number), fdb_scope(device)]
    return scopes
