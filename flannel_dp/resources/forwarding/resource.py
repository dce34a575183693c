"""Forwarding by a program as resources: the program, then the map of each family's peers.

Both come before the device: the maps are full and the program knows this node before the first
packet is forwarded by them. After a change of the lengths of peers' subnets the program looks for
old and new ones until the peers have changed, and for the new ones in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct, field

from flannel_dp._core import Diff, Table
from flannel_dp.cluster.network import NetworkConfig, devices_of, families_of
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.host import Host
from flannel_dp.node.family import Family, View
from flannel_dp.reconcile.reconciler import AnyResource
from flannel_dp.reconcile.report import Report
from flannel_dp.reconcile.resource import Done, Resource, Result
from flannel_dp.resources.forwarding.ebpf import Known, ProgramForwarder, known_of
from flannel_dp.resources.forwarding.forwarder import Forwarder
from flannel_dp.tables.scopes import peer_scope


class ProgramWanted(Struct, frozen=True):
    """What the program has to know of each family, and how many peers it needs room for."""

    known: Mapping[int, Known]
    peers: int


class ProgramChange(Struct, frozen=True):
    """The values of the program's map of this node; without ``wanted`` the program is removed."""

    wanted: ProgramWanted | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """False: whether something differs is known when it is written."""
        return False

    def lines(self) -> Iterator[str]:
        """Yield nothing that a plan shows as an entry."""
        yield from ()


class ProgramResource(Resource[ProgramWanted, ProgramChange]):
    """The program, its maps, and what it knows of this node."""

    name = "program"
    vital = True

    def __init__(
        self, config: NetworkConfig, forwarder: ProgramForwarder, *, keep: bool = False
    ) -> None:
        self.families = families_of(config)
        self._forwarder, self._keep = forwarder, keep

    def desired(self, view: View) -> ProgramWanted:
        known = {family.number: known_of(family) for family in view.families}
        return ProgramWanted(known, max((len(one.peers) for one in view.families), default=0))

    def compare(self, host: Host, desired: ProgramWanted | None, done: Done) -> ProgramChange:
        try:
            self._forwarder.find()
        except FlannelDPError:  # another program's pins: what is ours is removed all the same
            if desired is not None:
                raise
        return ProgramChange(desired, self._facts())

    def _facts(self) -> dict[str, Any]:
        return {"maps": {number: self._forwarder.maps(number) for number in self.families}}

    def apply(self, host: Host, change: ProgramChange) -> Result:
        if change.wanted is None:
            if not self._keep:
                self._forwarder.remove()
            return Result()
        renewed = self._forwarder.ready(peers=change.wanted.peers)
        if renewed:
            self._forwarder.forget()
        self._forwarder.write_node_state(change.wanted.known, beside=True)
        facts = self._facts()
        return Result(disturbs=renewed or facts != change.facts, facts=facts)

    def finish(self, host: Host, change: ProgramChange) -> None:
        if change.wanted is not None:
            self._forwarder.write_node_state(change.wanted.known)

    def update(self, host: Host, changed: Any, done: Done) -> Result | None:
        known = self._forwarder.with_lengths(changed.family.number, changed.peers, changed.lengths)
        self._forwarder.write_node_state(known)
        return Result()

    def record(self, report: Report, change: ProgramChange | None, outcome: Result) -> None:
        super().record(report, change, outcome)
        report.looked.add("program")
        report.warnings += self._forwarder.warnings()
        if self._forwarder.too_many_lengths:
            report.problems["program"] = self._forwarder.too_many_lengths


class RemainsResource(Resource[None, ProgramChange]):
    """What a program that forwarded before has left where the kernel's own tables forward now:
    its pins, which a pass that wants nothing removes."""

    name = "program"

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    def desired(self, view: View) -> None:
        return None

    def compare(self, host: Host, desired: None, done: Done) -> ProgramChange:
        return ProgramChange(None)

    def apply(self, host: Host, change: ProgramChange) -> Result:
        self._forwarder.remove()
        return Result()


class MapChange(Struct, frozen=True):
    """The difference of one map, None where the device forwards by it already: then it is
    compared with the peers' other tables."""

    diff: Diff | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has to be written."""
        return self.diff is None or not len(self.diff)

    def lines(self) -> Iterator[str]:
        """Nothing: the peers' tables show these entries."""
        yield from ()


class MapResource(Resource[Family, MapChange]):
    """The peers of one family in the program's map, before there is a device to forward by it."""

    vital = True

    def __init__(self, config: NetworkConfig, number: int, forwarder: ProgramForwarder) -> None:
        self.name, self.families, self.after = f"map{number}", (number,), ("program",)
        self.number = number
        self._device, self._forwarder = devices_of(config)[number], forwarder

    def desired(self, view: View) -> Family | None:
        return view.family(self.number) if view.purpose != "plan" else None

    def compare(self, host: Host, desired: Family | None, done: Done) -> MapChange:
        held = done["program"].facts["maps"].get(self.number, 0) if desired else 0
        if desired is None or not held or self._forwards(host):
            return MapChange()
        peers = desired.peers
        table = Table("peer")
        table.extend_peers(held, peers.subnets, peers.lengths, peers.macs, peers.endpoints)
        return MapChange(host.kernel.diff(table, peer_scope(held, self.number)))

    def _forwards(self, host: Host) -> bool:
        """Return whether the device is there in the right mode, and the program on it."""
        with host.links() as reader:
            link = reader.link(self._device)
        if link is None or link.vxlan is None or not link.vxlan.collect_metadata:
            return False
        return not self._forwarder.missing(link.index)

    def apply(self, host: Host, change: MapChange) -> Result:
        assert change.diff is not None
        (result,) = host.kernel.apply(change.diff)
        part = Report()
        counts = result.counts()
        row = part.tables["peer"]
        row["added"], row["replaced"] = counts["added"], counts["replaced"]
        row["removed"] = counts["removed"]
        # The peers' tables find these entries, and must not count them again.
        row["unchanged"] = -(counts["added"] + counts["replaced"])
        return Result(part=part)


def of_program(
    config: NetworkConfig, forwarder: ProgramForwarder, *, keep: bool, cleans: bool
) -> list[AnyResource]:
    """Return the resources of a program that forwards; ``keep`` leaves it where it is when
    everything else is removed."""
    maps = [MapResource(config, number, forwarder) for number in families_of(config)]
    return [ProgramResource(config, forwarder, keep=keep), *maps]


def what_remains(config: NetworkConfig, forwarder: Forwarder) -> list[AnyResource]:
    """Return what a program that forwarded before may have left."""
    return [RemainsResource(forwarder)]
