"""From leases to what the kernel should hold: admission, devices, tables, per family.

Reads the node, writes nothing, and keeps nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct, field
from msgspec.structs import replace

from flannel_dp._core import Claims, Table, parse_prefix
from flannel_dp.cluster import admission
from flannel_dp.cluster.admission import Admission, Node, Own, Rejection
from flannel_dp.cluster.lease import BadClaim, Identity, Lease
from flannel_dp.cluster.lease import Claims as LeaseList
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import ConfigError, FlannelDPError, NotYet, SourceError
from flannel_dp.kernel.links import LinkReader, NeighbourUse
from flannel_dp.kernel.netns import NetNS, call_in_netns
from flannel_dp.kernel.sysctls import forwarding_warnings
from flannel_dp.node.evidence import Known, decide_all, follow_leases, public_addresses
from flannel_dp.node.identity import Kept, Verdict
from flannel_dp.node.uplink import Choice, Uplink, canonical, discover
from flannel_dp.resources.device import vxlan
from flannel_dp.resources.device.plan import DevicePlan, plan_device
from flannel_dp.resources.device.wanted import VxlanDevice, default_mac
from flannel_dp.resources.peers.layouts import desired
from flannel_dp.resources.peers.place import DesiredTable, Placement

if TYPE_CHECKING:
    from flannel_dp.resources.forwarding.resource import Program

Leases = Iterable[Lease] | LeaseList
Ahead = Callable[[int, int, int], None]


class Family(Struct):
    """What is known of one family: between the stages of a sync, and after it.

    ``device`` is the vxlan device's plan, None in host-gw, and ``index`` its
    ifindex, 0 until it is made. ``uplink`` is the external interface's ifindex, ``iface`` its name;
    ``leftovers`` are devices of another layout that entries may be left on.
    ``mtu`` is what a pod's packet may measure.
    ``maps`` is the descriptor of the map that a program forwards by (0: not there yet), None
    where the kernel's own tables do; ``lacking`` is where on the device that program is not.
    ``ways`` says for each peer how it is reached, None where all are reached
    the same way; ``wanted`` are the peers' tables, once they were asked for, and
    ``aside`` those that no peer is in;
    ``macs`` finds a peer by its MAC (its tag) where the FDB does not, once somebody asked;
    ``lengths`` the lengths of the peers' subnets (of some that left, too).
    """

    admission: Admission
    device: DevicePlan | None
    uplink: int
    iface: str
    mtu: int
    index: int = 0
    leftovers: tuple[int, ...] = ()
    maps: int | None = None
    lacking: tuple[str, ...] = ()
    ways: bytearray | None = None
    wanted: list[DesiredTable] = field(default_factory=list)
    aside: list[DesiredTable] = field(default_factory=list)
    macs: Table | None = None
    lengths: set[int] = field(default_factory=set)

    @property
    def number(self) -> int:
        """4 or 6."""
        return self.admission.node.family

    @property
    def peers(self) -> Claims:
        return self.admission.accepted

    @property
    def routes(self) -> DesiredTable:
        """The table that everything else is there for; it is written last."""
        return self.wanted[-1]

    @property
    def roster(self) -> DesiredTable:
        """The table that has an entry for each peer, whatever their ways."""
        return self.routes if self.maps is None else self.wanted[0]

    @property
    def tables(self) -> list[DesiredTable]:
        """All tables, in the order in which they are written."""
        return [*self.aside, *self.wanted]

    @property
    def exists(self) -> bool:
        """Whether there is a device yet that entries could be on."""
        return self.device is None or self.index != 0

    @property
    def loses_neighbours(self) -> bool:
        """Whether what is planned for the device, a new MAC, takes its neighbours along
        (neigh_changeaddr in net/core/neighbour.c, the permanent ones included)."""
        return self.device is not None and any(step.op == "mac" for step in self.device.steps)

    def place(self, nexthops: bool | None, take_boot: bool = False) -> Placement:
        """Where this family's entries live."""
        return Placement(
            None if self.device is None else self.index,
            self.uplink,
            self.admission.node.network,
            nexthops,
            self.leftovers,
            take_boot,
            self.maps,
        )

    def keeping(self, before: Family | None) -> Family:
        """This family with the tables of ``before``, where they still are the right ones."""
        if before is None or self.admission is not before.admission or not before.wanted:
            return self
        place = (self.index, self.uplink, self.leftovers, self.device is None, self.maps)
        was = before.device is None, before.maps
        if place != (before.index, before.uplink, before.leftovers, *was):
            return self
        return replace(
            self,
            ways=before.ways,
            wanted=before.wanted,
            aside=before.aside,
            lengths=before.lengths,
        )

    def find_mac(self, mac: str) -> int:
        """The number of the peer with this MAC, -1 where there is none."""
        fdb = next((one.table for one in self.wanted if one.table.kind == "fdb"), None)
        index = self.index
        if fdb is None or self.ways is not None:  # direct peers are not in the FDB
            fdb, index = self.every_mac(), 0
        place = fdb.find((index, mac, ""))
        return place if place < 0 else fdb.tag(place)

    def every_mac(self) -> Table:
        """All peers by MAC: ``macs``, made when it is first asked for."""
        if self.macs is None:
            self.macs = mac_table(self.peers)
        return self.macs

    def find_subnet(self, subnet: str) -> int:
        """The number of the peer with this subnet, -1 where there is none. ValueError for a
        text that is no prefix."""
        table = self.roster.table
        key = (subnet,) if self.maps is None else (subnet, "::", "00:00:00:00:00:00", self.maps)
        place = table.find(key)
        return place if place < 0 else table.tag(place)

    def want(self, nexthops: bool | None, take_boot: bool = False) -> list[DesiredTable]:
        """The peers' tables as they should be."""
        return desired(self.peers, self.place(nexthops, take_boot), self.ways)


def mac_table(peers: Claims) -> Table:
    """Peers by MAC, as an FDB of no device."""
    table = Table("fdb")
    table.extend_fdb(0, peers.macs, peers.endpoints)
    return table


class Resolved(Struct, frozen=True):
    """Leases turned into what the kernel should hold, for each family that can be.

    ``refused`` are claims of broken form, ``errors`` why a family is missing,
    ``warnings`` what else about this node a person should know, ``neighbours`` how full
    the kernel's neighbour table is.
    """

    families: list[Family]
    refused: list[Rejection]
    errors: dict[int, Exception]
    warnings: tuple[str, ...] = ()
    neighbours: dict[int, NeighbourUse | None] = field(default_factory=dict)

    def rejections(self) -> list[Rejection]:
        """All refused claims."""
        found = list(self.refused)
        for family in self.families:
            found.extend(family.admission.rejected)
        return found


class Resolver(Struct, frozen=True):
    """The configuration and what the user said about this node. ``program`` knows about
    forwarding by a program: the map of a family, and whether a device may be converted.
    ``node_name`` is what the leases call this node where that is known (Kubernetes)."""

    config: NetworkConfig
    choice: Choice = field(default_factory=Choice)
    subnets: dict[int, str] = field(default_factory=dict)
    subnet_file: str = ""
    netns: NetNS = None
    take_over: bool = False
    program: Program | None = None
    node_name: str = ""

    @property
    def families(self) -> tuple[int, ...]:
        return vxlan.families_of(self.config)

    def device_name(self, family: int) -> str:
        return vxlan.device_name(self.config, family)

    def resolve(
        self, leases: Leases, ahead: Ahead | None = None, known: Iterable[Family] = ()
    ) -> Resolved:
        """Judge the leases and plan the devices.

        ``known`` are the families that are synced: the interface and the address that they work
        with are kept. ``ahead`` is told, before the leases are looked at, which device each
        family's entries are on: ``(family, ifindex, the uplink's ifindex)``.

        A family that cannot be is left out with its error. Raises ConfigError
        for the node itself, and the first family's error when none is left.
        """
        return call_in_netns(self.netns, self._resolve, leases, ahead, _kept(known))

    def _resolve(self, leases: Leases, ahead: Ahead | None, kept: tuple[Kept, ...]) -> Resolved:
        """The same, from inside the namespace: all that is read there is read by one thread."""
        listed, bad = _listed(leases)
        errors: dict[int, Exception] = {}
        found: list[Family] = []
        with LinkReader() as reader:
            uplink = self._discover(reader.remembering(), kept)
            if ahead and self.config.backend.type == "vxlan":
                for number in self.families:
                    device = reader.link(self.device_name(number))
                    if device and device.kind == "vxlan":
                        ahead(number, device.index, uplink.link.index)
            packed = {number: self.pack(listed, number) for number in self.families}
            verdicts = decide_all(self._known(), reader, uplink, packed, errors)
            verdicts, said = follow_leases(reader, uplink, verdicts, self.choice, self.subnets)
            if said:
                uplink = self._discover(reader, (*said, *kept))
            for number, verdict in verdicts.items():
                try:
                    claims = packed[number]
                    found.append(self._family(reader, uplink, number, claims, verdict, found))
                except FlannelDPError as error:
                    errors[number] = error
            neighbours = {f.number: reader.neighbour_use(f.number) for f in found}
        if not found:
            raise next(iter(errors.values()))
        return Resolved(
            found,
            admission.form_rejections(bad, listed, next(iter(packed.values())).orphans),
            errors,
            (
                *(text for family in found for text in verdicts[family.number].warnings),
                *forwarding_warnings(family.number for family in found),
            ),
            neighbours,
        )

    def again(self, known: Iterable[Family]) -> Resolved:
        """The same leases for the node as it is now; raises as ``resolve``.

        They are judged anew only where the node's addresses have changed.
        """
        return call_in_netns(self.netns, self._again, list(known))

    def _again(self, known: list[Family]) -> Resolved:
        errors: dict[int, Exception] = {}
        found: list[Family] = []
        with LinkReader() as reader:
            uplink = self._discover(reader.remembering(), _kept(known))
            for family in known:
                try:
                    judged = self._judge_again(family, uplink)
                    found.append(self._placed(reader, uplink, judged, found, family))
                except FlannelDPError as error:
                    errors[family.number] = error
        if not found:
            raise next(iter(errors.values()))
        warnings = tuple(forwarding_warnings(family.number for family in found))
        return Resolved(found, [], errors, warnings)

    def previous(self) -> dict[int, str]:
        """The subnets this node had, or is to have: those given, else those of subnet.env."""
        return self._remembered() | self.subnets

    def identity(self) -> Identity:
        """What this node has to publish so that others reach it: of each family that it has an
        address of. NotYet when it has none of any, ConfigError as ``resolve``."""
        return call_in_netns(self.netns, self._identity)

    def public_addresses(self) -> dict[int, tuple[str, ...]]:
        """The addresses by family that others may reach this node at, the preferred one first;
        a family that has none is left out. ConfigError as ``resolve``."""
        return call_in_netns(self.netns, self._public_addresses)

    def _public_addresses(self) -> dict[int, tuple[str, ...]]:
        with LinkReader() as reader:
            uplink = self._discover(reader.remembering())
        return {family: found for family, found in uplink.public.items() if found}

    def _identity(self) -> Identity:
        backend = self.config.backend
        with LinkReader() as reader:
            uplink = self._discover(reader.remembering())
            known = [n for n in self.families if uplink.public[n]] or self.families
            public = {n: public_addresses(uplink, n)[0] for n in known}
            names = {n: self.device_name(n) for n in known if backend.type == "vxlan"}
            macs = {
                n: _present_mac(reader, name) or default_mac(name, public[n])
                for n, name in names.items()
            }
        return Identity(public, macs, backend.type, backend.vni if macs else 0)

    def _known(self) -> Known:
        return Known(
            self.config, self.subnets, self._remembered(), self.subnet_file, self.node_name
        )

    def _remembered(self) -> dict[int, str]:
        """The subnets that subnet.env says this node has."""
        if not self.subnet_file:
            return {}
        from flannel_dp.cluster.subnet_env import previous_subnets

        return previous_subnets(self.subnet_file, self.config)

    def _discover(self, reader: LinkReader, kept: tuple[Kept, ...] = ()) -> Uplink:
        overlay = tuple(self.device_name(number) for number in self.families)
        return discover(reader, self.families, self.choice, overlay=overlay, kept=kept)

    def _family(
        self,
        reader: LinkReader,
        uplink: Uplink,
        number: int,
        claims: Claims,
        verdict: Verdict,
        others: list[Family],
    ) -> Family:
        own = None
        if verdict.own:
            own = Own(verdict.own.name, verdict.own.subnet, verdict.own.mac)
            claims.mark_own(verdict.own.number)
        node = Node(
            number,
            vxlan.network_of(self.config, number),
            verdict.public_ip,
            uplink.addresses[number],
            uplink.underlay[number],
            verdict.subnet,
            said_by=f"lease {own.name}" if own else verdict.said_by,
        )
        has_tunnel = self.config.backend.type == "vxlan"
        if has_tunnel:
            name = self.device_name(number)
            mac = own.mac if own and own.mac else _present_mac(reader, name)
            node = replace(node, mac=mac or default_mac(name, node.public_ip))
        if self.config.backend.by_program:
            _check_network(node.network, node.underlay)
        judged = admission.judge(claims, node, own=own, need_mac=has_tunnel)
        return self._placed(reader, uplink, judged, others)

    def _judge_again(self, family: Family, uplink: Uplink) -> Admission:
        before = family.admission
        if before.node.public_ip not in public_addresses(uplink, family.number):
            raise SourceError(
                f"{before.node.public_ip}, which this node's lease was published with, is not the "
                f"address of {uplink.link.name} any more",
                hint="publish a lease with the new address, or give the node its address back",
            )
        node = replace(
            before.node,
            addresses=uplink.addresses[family.number],
            underlay=uplink.underlay[family.number],
        )
        if node == before.node:
            return before
        claims = before.all_claims()
        return admission.judge(claims, node, own=before.own, need_mac=family.device is not None)

    def _placed(
        self,
        reader: LinkReader,
        uplink: Uplink,
        judged: Admission,
        others: list[Family],
        before: Family | None = None,
    ) -> Family:
        """The family where it is now; ``before`` is where it was. A device that ``others``
        have, too, has the MAC of the first."""
        node, lengths = judged.node, judged.accepted.lengths_in_use()
        link = uplink.link
        if self.config.backend.type != "vxlan":
            old = _old_devices(reader)
            made = Family(
                judged, None, link.index, link.name, link.mtu, leftovers=old, lengths=lengths
            )
            return made.keeping(before)
        want = vxlan.device(
            self.config,
            node.family,
            lower=link.index,
            lower_mtu=link.mtu,
            local=_source_address(uplink, node),
            subnet=node.subnet,
            mac=self._device_mac(reader, node, others),
        )
        device = self.plan_device(reader, want, before.index if before else 0)
        kept = device.ifindex if device.action in ("none", "adopt") else None
        maps = self.program.maps(node.family) if self.program else None
        made = Family(
            judged,
            device,
            link.index,
            link.name,
            device.mtu,
            kept or 0,
            maps=maps,
            lengths=lengths,
        )
        return made.keeping(before)

    def _device_mac(self, reader: LinkReader, node: Node, others: list[Family]) -> str:
        """The MAC of a family's device. One that both have has that of the first, and keeps it
        while the first cannot be: with another MAC it would lose its neighbours."""
        if not self.config.backend.by_program or node.family == self.families[0]:
            return node.mac
        if others:
            return others[0].admission.node.mac
        return _present_mac(reader, self.device_name(node.family)) or node.mac

    def plan_device(
        self, reader: LinkReader, want: VxlanDevice, known: int, netns: NetNS = None
    ) -> DevicePlan:
        """What it takes to have the device ``want``, whose ifindex was ``known`` (or 0)."""
        return plan_device(
            reader,
            want,
            take_over=self.take_over,
            netns=netns,
            known=known,
            may_convert=self.program.may_convert if self.program else None,
            others=vxlan.other_devices(self.config),
        )

    def pack(self, leases: Iterable[Lease], number: int) -> Claims:
        """The leases' halves of one family, packed."""
        backend = self.config.backend
        return admission.pack(leases, number, backend=backend.type, vni=backend.vni)


def _kept(known: Iterable[Family]) -> tuple[Kept, ...]:
    """What families that were synced work with."""
    return tuple(
        Kept(
            family.number,
            family.uplink,
            family.device.device.local if family.device else family.admission.node.public_ip,
        )
        for family in known
    )


def _check_network(network: str, underlay: Iterable[str]) -> None:
    """Raise ConfigError where one route for the whole network would take the underlay along."""
    _, inner, length = parse_prefix(network)
    for text in underlay:
        _, outer, shorter = parse_prefix(text)
        rest = 8 * len(inner) - shorter
        first, second = (int.from_bytes(raw, "big") >> rest for raw in (inner, outer))
        if len(inner) == len(outer) and shorter <= length and first == second:
            raise ConfigError(
                f"the network {network} lies within the underlay's {text}: the one route for all "
                "of it that forwarding by a program takes would lead other nodes into the tunnel",
                hint="use '--forwarding kernel', or choose another network",
            )


def _source_address(uplink: Uplink, node: Node) -> str:
    """Where tunnel packets leave from: the public address, unless it is not on this node."""
    if node.public_ip in node.addresses:
        return node.public_ip
    if not uplink.local[node.family]:
        raise NotYet(
            f"{uplink.link.name} has no IPv{node.family} address to send from",
            hint="add one, or name another --iface",
        )
    return uplink.local[node.family]


def read_subnets(text: str | None) -> dict[int, str]:
    """``--subnet``: one prefix per family, separated by a comma; by family number.

    Raises ConfigError for a text that is no prefix.
    """
    found: dict[int, str] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        try:
            _, raw, length = parse_prefix(part.strip())
        except ValueError as error:
            raise ConfigError(f"--subnet: {error}", hint="write it like 10.244.3.0/24") from error
        address = canonical(part.strip().partition("/")[0])
        if _masked(raw) != address:
            raise ConfigError(
                f"--subnet: {part.strip()} has host bits set",
                hint=f"write {_masked(raw)}/{length}",
            )
        found[4 if len(raw) == 4 else 6] = f"{address}/{length}"
    return found


def _masked(raw: bytes) -> str:
    from socket import AF_INET, AF_INET6, inet_ntop

    return inet_ntop(AF_INET if len(raw) == 4 else AF_INET6, raw)


def _present_mac(reader: LinkReader, device: str) -> str:
    """The MAC of a device that is there already, "" when there is none."""
    found = reader.link(device)
    return found.mac if found and found.kind == "vxlan" else ""


def _old_devices(reader: LinkReader) -> tuple[int, ...]:
    """vxlan devices with flannel's names: of a layout this node had before."""
    return tuple(
        link.index
        for link in reader.links("vxlan")
        if link.name.startswith(("flannel.", "flannel-v6."))
    )


def _listed(leases: Leases) -> tuple[list[Lease], list[BadClaim]]:
    if isinstance(leases, LeaseList):
        return leases.leases, leases.bad
    return (leases if isinstance(leases, list) else list(leases)), []


def sized(leases: Leases) -> Sequence[Lease]:
    """The leases as far as they can be counted."""
    if isinstance(leases, LeaseList):
        return leases.leases
    return leases if isinstance(leases, list) else ()
