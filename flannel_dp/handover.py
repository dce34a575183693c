"""From forwarding by an eBPF program to the kernel's own tables, with traffic paused as briefly as
the kernel allows.

Devices of the two modes cannot be up at the same time, as they have one UDP port. While the
program forwards the new devices are made, down and under other names, and all is written that such
a device takes: its addresses, its FDB, its neighbours. Then the old one is set down, the new ones
get their names and are set up, and nexthops and routes follow. Nothing is read meanwhile, and the
old device is deleted when packets flow again. Most of the pause is what setting a device down
takes, some 20 ms, and not a matter of how many peers there are.

A change to the program's mode is not prepared: its one route costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import Diff, Table, diff_tables
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import FlannelDPError, KernelError
from flannel_dp.kernel.host import Host
from flannel_dp.kernel.netns import call_in_netns, call_on_thread
from flannel_dp.kernel.tables import timed
from flannel_dp.reconcile.report import Report
from flannel_dp.reconcile.resource import Difference, Unfinished
from flannel_dp.resources.device.resource import DeviceDifference, clear_device
from flannel_dp.resources.peers.layouts import Layout, layout_of
from flannel_dp.resources.peers.present import keep_entries
from flannel_dp.resources.peers.resource import PeersChange
from flannel_dp.tables.results import add_counts

log = logging.getLogger(__name__)


class Prepared(Struct, frozen=True):
    """A device that is down and filled: what it is for, its ifindex, and the entries that are
    written once it is up, in the form that is wanted or not."""

    change: DeviceDifference
    index: int
    diffs: tuple[Diff, ...] = ()
    is_final: bool = True


def hand_over(
    host: Host, config: NetworkConfig, changes: Mapping[str, Difference]
) -> Report | None:
    """Replace the device of a program by those of the kernel's mode, where this is what a pass has
    found; return what was done, None where it is something else. What remains to be written is
    found by comparing again.

    Raises Unfinished where the new devices cannot be made or be up; the old one has its name and
    is up again.
    """
    devices = [one for one in changes.values() if isinstance(one, DeviceDifference)]
    chosen = [
        one for one in devices if one.plan and one.plan.converts and not one.plan.device.external
    ]
    replaced = {name for one in chosen for name in one.goes}
    if len(replaced) != 1:
        return None  # or a change that was killed before has left others to remove
    peers = {
        one.state.number: one
        for one in changes.values()
        if isinstance(one, PeersChange) and one.state is not None
    }
    part, layout = Report(), layout_of(config.backend)
    with timed(part.seconds, "apply"):
        _replace(host, host.kernel.ifindex(replaced.pop()), layout, chosen, peers, part)
    part.devices = tuple(one.device for one in chosen)
    for row in part.tables.values():  # which are compared, and counted, once more
        row["unchanged"] = -row["added"]
    return part


def _replace(
    host: Host,
    old: int,
    layout: Layout,
    chosen: Iterable[DeviceDifference],
    peers: Mapping[int, PeersChange],
    part: Report,
) -> None:
    """Prepare the new devices, then let them take the place of the ``old`` one."""
    from flannel_dp.resources.device import switch

    ready: list[Prepared] = []
    try:
        for one in chosen:
            assert one.plan is not None
            index = call_in_netns(host.netns, call_on_thread, switch.prepare, one.plan)
            ready.append(Prepared(one, index))
            if (change := peers.get(one.number)) is not None:
                diffs = _fill(host, layout, index, change, part)
                ready[-1] = Prepared(one, index, diffs, _is_wanted(host, layout, change))
        for one in chosen:
            clear_device(host, one.number, old)
        switch.exchange(
            host.netns,
            old,
            [(one.index, one.change.plan.device) for one in ready if one.change.plan],
        )
    except FlannelDPError as error:
        for made in ready:
            switch.discard(host.netns, made.index)
        if isinstance(error, KernelError):
            raise Unfinished(error) from error
        raise
    for made in ready:
        _write(host, made.diffs, part if made.is_final else Report())
    switch.discard(host.netns, old)
    log.info(
        "The kernel's own tables forward now: %(devices)s in the place of ifindex %(old)d",
        {"devices": ", ".join(one.name for one in chosen), "old": old},
    )


def _fill(
    host: Host, layout: Layout, index: int, change: PeersChange, part: Report
) -> tuple[Diff, ...]:
    """Write the FDB and the neighbours of a device that is down; return the differences of what
    takes one that is up. Its routes use nexthop objects where the kernel has them, also where
    gateways are wanted, which take long to write and replace them afterwards."""
    state = change.state
    assert state is not None
    nexthops = host.keeps("nexthop", state.number)
    place = replace(state.place, device=index, is_made=True, nexthops=nexthops)
    tables = layout.desired(state.peers, place, state.paths.column)
    keep_entries(tables, state.family.kept.values(), place)
    on_device = ("fdb", "neighbour")
    _write(
        host,
        [diff_tables(t.table, Table(t.table.kind)) for t in tables if t.table.kind in on_device],
        part,
    )
    return tuple(
        host.kernel.diff(t.table, *t.scopes) for t in tables if t.table.kind not in on_device
    )


def _is_wanted(host: Host, layout: Layout, change: PeersChange) -> bool:
    """Return whether the routes that are written first are those that are wanted."""
    state = change.state
    assert state is not None
    return state.layout == layout and state.place.nexthops == host.keeps("nexthop", state.number)


def _write(host: Host, diffs: Iterable[Diff], part: Report) -> None:
    """Write the additions; what fails is tried again, and told, when all is compared again."""
    for result in host.kernel.apply(diffs):
        counts = result.counts()
        add_counts(part.tables[result.kind], {"added": counts["added"]})
