"""From leases to what the kernel should hold: admission, devices, tables, per family.

Reads the node, writes nothing, and keeps nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

from msgspec import Struct, field
from msgspec.structs import replace

from flannel_dp._core import Claims
from flannel_dp.cluster import admission
from flannel_dp.cluster.admission import Admission, Node, OwnLease, Protected
from flannel_dp.cluster.lease import Identity, Lease, Leases, split_leases
from flannel_dp.cluster.network import (
    NetworkConfig,
    device_name,
    devices_of,
    families_of,
    network_of,
)
from flannel_dp.errors import FlannelDPError, NotYet, SourceError
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import NetNS, call_in_netns
from flannel_dp.kernel.route_messages import StaticRoute
from flannel_dp.kernel.sysctls import forwarding_warnings
from flannel_dp.node.choice import Choice
from flannel_dp.node.connected import Connected, connected
from flannel_dp.node.evidence import (
    Deciding,
    GivenFacts,
    decide_all,
    place_by_leases,
    previous_subnets,
    public_addresses,
    said_by_leases,
)
from flannel_dp.node.family import Family, Purpose, View, addresses_in, kept_by, peers_of
from flannel_dp.node.identity import Verdict
from flannel_dp.node.interface import InUse
from flannel_dp.node.placing import PLACING, Direct, new_mac, our_device, present_mac
from flannel_dp.node.uplink import Uplink, discover, published_at

Ahead = Callable[[int, int, int], None]


class Resolver(Struct, frozen=True):
    """The configuration and what the user said about this node.

    ``node_name`` is what the leases call this node where that is known (Kubernetes). ``links``
    opens what reads the node's devices, in its namespace. An address of a flag that is not on
    this node is an error of the node, or, where it is ``patient``, of its family alone.
    """

    config: NetworkConfig
    choice: Choice = field(default_factory=Choice)
    subnets: dict[int, str] = field(default_factory=dict)
    subnet_file: str = ""
    netns: NetNS = None
    node_name: str = ""
    links: Callable[[], AbstractContextManager[LinkReader]] = LinkReader
    patient: bool = False

    @property
    def families(self) -> tuple[int, ...]:
        return families_of(self.config)

    def device_name(self, family: int) -> str:
        return device_name(self.config, family)

    @property
    def _placing(self) -> Direct:
        return PLACING[self.config.backend.mode](self.config)

    def resolve(
        self,
        leases: Leases,
        ahead: Ahead | None = None,
        known: Iterable[Family] = (),
        purpose: Purpose = "sync",
    ) -> View:
        """Validate the leases and plan the devices.

        ``known`` are the families that are synced: the interface and the address that they work
        with are kept. ``ahead`` is told, before the leases are read, which device each
        family's entries are on: ``(family, ifindex, the uplink's ifindex)``.

        A family that cannot be is left out with its error. Raises ConfigError
        for the node itself, and the first family's error when none is left.
        """
        return call_in_netns(self.netns, self._resolve, leases, ahead, kept_by(known), purpose)

    def _resolve(
        self, leases: Leases, ahead: Ahead | None, kept: tuple[InUse, ...], purpose: Purpose
    ) -> View:
        """Return the same, from inside the namespace: all that is read there is read by one
        thread."""
        listed, bad = split_leases(leases)
        found: list[Family] = []
        with self.links() as reader:
            made = self.decide(reader, listed, kept, ahead)
            uplink, packed, errors = made.uplink, made.packed, made.errors
            assert uplink is not None
            for number, verdict in made.verdicts.items():
                try:
                    claims = packed[number]
                    found.append(self._family(reader, uplink, number, claims, verdict, found))
                except FlannelDPError as error:
                    errors[number] = error
            # A process warns of it once, in its first sync.
            asked = found if purpose == "plan" or not kept else []
            neighbours = {f.number: reader.neighbour_use(f.number) for f in asked}
        if not found:
            raise next(iter(errors.values()))
        return View(
            self._placing.together(found),
            admission.form_rejections(bad, listed, next(iter(packed.values())).orphans),
            errors,
            (
                *(text for family in found for text in made.verdicts[family.number].warnings),
                *forwarding_warnings(family.number for family in found),
            ),
            neighbours,
            purpose,
        )

    def decide(
        self,
        reader: LinkReader,
        listed: list[Lease],
        kept: tuple[InUse, ...],
        ahead: Ahead | None = None,
    ) -> Deciding:
        """Decide where this node is, and which lease is its own. To be called in the namespace;
        raises as ``resolve`` for the node itself."""
        errors: dict[int, FlannelDPError] = {}
        uplink = self._place(reader.remembering(), listed, kept)
        if ahead:
            for number in self.families:
                if device := our_device(reader, self.config, number):
                    ahead(number, device.index, uplink.link.index)
        packed = {number: self.pack(listed, number) for number in self.families}
        verdicts = decide_all(self.facts(), reader, uplink, packed, errors)
        verdicts, said = place_by_leases(
            reader, uplink, verdicts, self.choice, self.subnets, errors
        )
        if said:
            uplink = self._discover(reader, (*said, *kept), addresses_in(listed))
        return Deciding(uplink, packed, verdicts, errors)

    def again(self, known: Iterable[Family]) -> View:
        """Return the same leases for the node as it is now; raises as ``resolve``.

        They are validated again only where the node's addresses have changed.
        """
        return call_in_netns(self.netns, self._again, list(known))

    def _again(self, known: list[Family]) -> View:
        errors: dict[int, FlannelDPError] = {}
        found: list[Family] = []
        with self.links() as reader:
            uplink = self._discover(reader.remembering(), kept_by(known), peers_of(known))
            for family in known:
                try:
                    statics = self._static_routes(reader, family.number, len(family.peers))
                    validated = self._validate_again(reader, family, uplink, statics)
                    placed = self._placed(reader, uplink, statics, validated, found)
                    found.append(replace(placed, kept=family.kept))
                except FlannelDPError as error:
                    errors[family.number] = error
        if not found:
            raise next(iter(errors.values()))
        warnings = tuple(forwarding_warnings(family.number for family in found))
        return View(self._placing.together(found), [], errors, warnings, purpose="resync")

    def previous(self) -> dict[int, str]:
        """Return the subnets this node had, or is to have: those given, else those of
        subnet.env."""
        before = previous_subnets(self.subnet_file, self.config) if self.subnet_file else {}
        return before | self.subnets

    def identity(self, published: Mapping[int, str] = {}) -> Identity:
        """Return what this node has to publish so that others reach it: of each family that it has
        an address of. An address that it has ``published`` before is kept while the node has it,
        and no virtual one takes its place. NotYet when it has none of any, and where no node of
        this network may have it; ConfigError as ``resolve``."""
        return call_in_netns(self.netns, self._identity, published)

    def collisions(self, subnets: Mapping[int, str], *, fresh: bool) -> dict[int, Protected]:
        """Return what is connected to this node and overlaps ``subnets``, by family, before they
        are published as its own. Devices inside of them are its pods', unless they are ``fresh``:
        of a subnet that was never this node's."""
        return call_in_netns(self.netns, self._collisions, subnets, fresh)

    def _collisions(self, subnets: Mapping[int, str], fresh: bool) -> dict[int, Protected]:
        found: dict[int, Protected] = {}
        with self.links() as reader:
            uplink = self._discover(reader.remembering())
            for number, subnet in subnets.items():
                statics = reader.static_routes(number, self._ours(reader))
                there = self._connected(reader, uplink, number, "" if fresh else subnet, statics)
                met = admission.first_met(there.protected, subnet)
                if met is not None:
                    found[number] = met
        return found

    def public_addresses(self, published: Mapping[int, str] = {}) -> dict[int, tuple[str, ...]]:
        """Return the addresses by family that others may reach this node at, the preferred one
        first; a family that has none is left out. ``published`` and errors as for ``identity``."""
        return call_in_netns(self.netns, self._public_addresses, published)

    def _public_addresses(self, published: Mapping[int, str]) -> dict[int, tuple[str, ...]]:
        with self.links() as reader:
            uplink = self._discover(reader.remembering(), published_at(published))
        return uplink.surely_public

    def _identity(self, published: Mapping[int, str]) -> Identity:
        backend = self.config.backend
        with self.links() as reader:
            uplink = self._discover(reader.remembering(), published_at(published))
            known = [*uplink.surely_public] or self.families
            public = {n: public_addresses(uplink, n)[0] for n in known}
            for number, address in public.items():
                admission.check_public(self.config, number, address)
            macs = {
                n: present_mac(reader, name) or new_mac(name, public[n])
                for n, name in devices_of(self.config).items()
                if n in known
            }
        return Identity(public, macs, backend.type, backend.vni if macs else 0)

    def facts(self) -> GivenFacts:
        """Return what is known of this node without the kernel."""
        previous: dict[int, str] = {}
        if self.subnet_file:
            previous = previous_subnets(self.subnet_file, self.config)
        return GivenFacts(self.config, self.subnets, previous, self.subnet_file, self.node_name)

    def _place(self, reader: LinkReader, listed: list[Lease], kept: tuple[InUse, ...]) -> Uplink:
        """Return where this node is; where no route says, the leases do: one has an address of
        it."""
        try:
            return self._discover(reader, kept, addresses_in(listed))
        except NotYet:
            if not self.choice.is_open:
                raise
            packed = {number: self.pack(listed, number) for number in self.families}
            said = said_by_leases(self.facts(), reader, packed)
            if not said:
                raise
            return self._discover(reader, said, addresses_in(listed))

    @property
    def _overlay(self) -> tuple[str, ...]:
        """The names of our own devices."""
        return tuple(self.device_name(number) for number in self.families)

    def _discover(
        self,
        reader: LinkReader,
        kept: tuple[InUse, ...] = (),
        peers_of: Callable[[int], Iterable[str]] = lambda number: (),
    ) -> Uplink:
        names = self._overlay
        found = discover(
            reader, self.families, self.choice, overlay=names, kept=kept, peers_of=peers_of
        )
        if found.missing and not self.patient:
            raise next(iter(found.missing.values()))
        return found

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
            own = OwnLease(verdict.own.name, verdict.own.subnet, verdict.own.mac)
            claims.mark_own(verdict.own.number)
        node = Node(
            number,
            network_of(self.config, number),
            verdict.public_ip,
            subnet=verdict.subnet,
            said_by=f"lease {own.name}" if own else verdict.said_by,
            pods=admission.pod_range(self.config, number),
            given=number in self.subnets,
            subnet_len=admission.known_length(self.config, claims, own),
        )
        statics = self._static_routes(reader, number, len(claims))
        node = self._placing.claim(reader, self._on_underlay(reader, uplink, node, statics), own)
        admission.check_own_subnet(node)
        validated = admission.validate(
            claims, node, own=own, need_mac=self.config.backend.needs_mac
        )
        return self._placed(reader, uplink, statics, validated, others)

    def _placed(
        self,
        reader: LinkReader,
        uplink: Uplink,
        statics: list[StaticRoute],
        validated: Admission,
        others: list[Family],
    ) -> Family:
        """Return the family where it is now, with the MTU of the paths to its peers."""
        family = self._placing.place(reader, uplink, validated, others)
        defaults, networks = uplink.defaults[family.number], uplink.on_devices[family.number]
        if not (any(one.mtu for one in defaults) or any(one.mtu for one in statics)):
            return family
        link = reader.link(family.uplink)
        if link is None:
            return family
        from flannel_dp.node.path_mtu import path_mtu  # few routes have one

        found = path_mtu(link, validated.accepted, networks, defaults, statics)
        return replace(family, uplink_mtu=found.mtu, mtu_said_by=found.said_by)

    def _static_routes(self, reader: LinkReader, number: int, leases: int) -> list[StaticRoute]:
        """Return routes that other programs configured. The main table is read in whole, for the
        routes of ``leases``, too."""
        reader.read_main_table(number, leases)
        return reader.static_routes(number, self._ours(reader))

    def _ours(self, reader: LinkReader) -> set[int]:
        """Return the ifindexes of our own devices."""
        names = dict.fromkeys(self._overlay)
        return {link.index for name in names if (link := reader.link(name))}

    def _on_underlay(
        self, reader: LinkReader, uplink: Uplink, node: Node, statics: list[StaticRoute]
    ) -> Node:
        """Return the node with what it has and reaches without the overlay, as it is now."""
        there = self._connected(reader, uplink, node.family, node.subnet, statics)
        return replace(
            node,
            addresses=uplink.addresses[node.family],
            protected=there.protected,
            no_hosts=there.no_hosts,
            around=there.around,
        )

    def _connected(
        self,
        reader: LinkReader,
        uplink: Uplink,
        number: int,
        subnet: str,
        statics: list[StaticRoute],
    ) -> Connected:
        return connected(
            reader,
            number,
            uplink.on_devices[number],
            statics,
            uplink.defaults[number],
            network=network_of(self.config, number),
            subnet=subnet,
            ours=self._ours(reader),
            pods=admission.pod_range(self.config, number),
        )

    def _validate_again(
        self, reader: LinkReader, family: Family, uplink: Uplink, statics: list[StaticRoute]
    ) -> Admission:
        before = family.admission
        if before.node.public_ip not in public_addresses(uplink, family.number):
            raise SourceError(
                f"{before.node.public_ip}, which this node's lease was published with, is not the "
                f"address of {uplink.link.name} any more",
                hint="publish a lease with the new address, or give the node its address back",
            )
        node = self._on_underlay(reader, uplink, before.node, statics)
        if node == before.node:
            return before
        admission.check_own_subnet(node)
        claims = before.all_claims()
        node = replace(node, ordinary=0)
        return admission.validate(
            claims, node, own=before.own, need_mac=self.config.backend.needs_mac
        )

    def pack(self, leases: Iterable[Lease], number: int) -> Claims:
        """Return the leases' halves of one family, packed."""
        backend = self.config.backend
        has_data = backend.needs_mac
        return admission.pack(
            leases, number, backend=backend.type, vni=backend.vni, has_data=has_data
        )
