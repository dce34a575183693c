"""From forwarding by an eBPF program to the kernel's own tables, with traffic paused as briefly as
the kernel allows, and not longer for more peers.

Devices of the two modes cannot be up at the same time, as they have one UDP port. While the
program forwards the new devices are made, down and under other names, and all is written that such
a device takes: its addresses, its FDB, its neighbours, and the program on the way out. Then the old
one is set down, the new ones get their names and are set up, and one route leads all packets out,
whose peers the program finds as before. The pass that follows writes a route for each peer, and
removes that one and the program in the end. The pause is what setting a device down takes: two
grace periods of RCU, some 20 ms.

A change to the program's mode is not prepared: its one route costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import Table, diff_tables
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import FlannelDPError, KernelError
from flannel_dp.kernel.host import Host
from flannel_dp.kernel.netns import call_in_netns, call_on_thread
from flannel_dp.kernel.tables import timed
from flannel_dp.reconcile.report import Report
from flannel_dp.reconcile.resource import Difference, Unfinished
from flannel_dp.resources.device.resource import DeviceDifference, clear_device
from flannel_dp.resources.peers.gateway import shared_gateway
from flannel_dp.resources.peers.layouts import Layout, layout_of
from flannel_dp.resources.peers.place import DesiredTable, Placement
from flannel_dp.resources.peers.present import keep_entries
from flannel_dp.resources.peers.resource import PeersChange
from flannel_dp.tables.results import add_counts

log = logging.getLogger(__name__)

#: What a device takes while it is down, and keeps when it is set up.
_WHILE_DOWN = frozenset({"fdb", "neighbour"})


class Prepared(Struct, frozen=True):
    """A device that is down and filled: what it is for, its ifindex, and the tables of the one
    route for all peers."""

    change: DeviceDifference
    index: int
    gateway: Sequence[DesiredTable] = ()


def hand_over(
    host: Host, config: NetworkConfig, changes: Mapping[str, Difference], run_dir: str
) -> Report | None:
    """Replace the device of a program by those of the kernel's mode, where this is what a pass has
    found; return what was done, None where it is something else. What remains to be written is
    found by comparing again; until then the program of that device finds the peers.

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
        _replace(host, replaced.pop(), layout, chosen, peers, part, run_dir)
    part.devices = tuple(one.device for one in chosen)
    for row in part.tables.values():  # which are compared, and counted, once more
        row["unchanged"] = -row["added"]
    return part


def _replace(
    host: Host,
    name: str,
    layout: Layout,
    chosen: Iterable[DeviceDifference],
    peers: Mapping[int, PeersChange],
    part: Report,
    run_dir: str,
) -> None:
    """Prepare the new devices, then let them take the place of the old one, ``name``."""
    from flannel_dp.resources.device import switch
    from flannel_dp.resources.forwarding.interim import attach_interim

    old = host.kernel.ifindex(name)
    ready: list[Prepared] = []
    try:
        for one in chosen:
            assert one.plan is not None
            index = call_in_netns(host.netns, call_on_thread, switch.prepare, one.plan)
            ready.append(Prepared(one, index))
            if (change := peers.get(one.number)) is not None:
                ready[-1] = Prepared(one, index, _fill(host, layout, index, change, part))
        forwards = attach_interim(name, [one.index for one in ready], host.netns, run_dir)
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
    for made in ready if forwards else ():
        _write(host, made.gateway, Report())
    switch.discard(host.netns, old)
    log.info(
        "The kernel's own tables forward now: %(devices)s in the place of ifindex %(old)d",
        {"devices": ", ".join(one.name for one in chosen), "old": old},
    )


def _fill(
    host: Host, layout: Layout, index: int, change: PeersChange, part: Report
) -> list[DesiredTable]:
    """Write the FDB and the neighbours of a device that is down, that of the gateway of all peers
    among them; return what leads packets to it and takes a device that is up."""
    state = change.state
    assert state is not None
    place: Placement = replace(state.place, device=index, is_made=True)
    tables = layout.desired(state.peers, place, state.paths.column)
    keep_entries(tables, state.family.kept.values(), place)
    _write(host, [one for one in tables if one.table.kind in _WHILE_DOWN], part)
    gateway = shared_gateway(place, state.number)
    _write(host, [one for one in gateway if one.table.kind in _WHILE_DOWN], Report())
    return [one for one in gateway if one.table.kind not in _WHILE_DOWN]


def _write(host: Host, tables: Iterable[DesiredTable], part: Report) -> None:
    """Write the additions; what fails is tried again, and told, when all is compared again."""
    diffs = [diff_tables(one.table, Table(one.table.kind)) for one in tables]
    for result in host.kernel.apply(diffs):
        counts = result.counts()
        add_counts(part.tables[result.kind], {"added": counts["added"]})
