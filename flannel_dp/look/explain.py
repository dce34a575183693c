"""What happens to a packet to one address, step by step, and what is wrong with it.

The wanted side comes from leases, or from what the last sync worked out; the
held side is asked from the kernel, one entry at a time, in the order in which
a packet meets them: route, nexthop, neighbour, FDB, route of the outer packet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from flannel_dp._core import parse_address
from flannel_dp.cluster.network import network_of
from flannel_dp.errors import ConfigError, FlannelDPError
from flannel_dp.kernel.links import LinkReader, RouteMatch
from flannel_dp.look.explanation import (
    Explanation,
    Owner,
    Step,
    find_holder,
    holds,
    length_of,
    owner_of,
)
from flannel_dp.look.show import device_view, find_blockers, find_paths
from flannel_dp.look.terminal import count, human, human_time
from flannel_dp.node.uplink import canonical
from flannel_dp.resources.counters.traffic import DIRECTIONS
from flannel_dp.resources.device.view import DeviceView
from flannel_dp.resources.forwarding.view import held_peers
from flannel_dp.resources.peers.gateway import GATEWAY_MAC, GATEWAYS
from flannel_dp.resources.peers.nexthops import EVERY_ID
from flannel_dp.resources.peers.place import DIRECT
from flannel_dp.tables.describe import protocol_name
from flannel_dp.tables.entries import PROTOCOL, Fdb, Neighbour, Nexthop
from flannel_dp.tables.scopes import fdb_scope, neighbour_scope, nexthop_scope, route_scope

if TYPE_CHECKING:
    from flannel_dp.look.overlay import Overlay
    from flannel_dp.node.family import Family
    from flannel_dp.node.view import Leases

__all__ = ["Explanation", "Owner", "Step", "explain"]

SYNC = "run 'flannel-dp sync'"


def explain(overlay: Overlay, address: str, leases: Leases | None = None) -> Explanation:
    """Say what happens to a packet to ``address`` and why. Reads, never writes.

    The wanted side is ``leases``, else what the last sync was given, else nothing.
    Equivalent: ``ip route get ADDRESS fibmatch``, ``ip nexthop get id ID``, ``ip
    neigh get GATEWAY dev DEVICE``, ``bridge fdb get MAC dev DEVICE`` and ``ip route
    get ENDPOINT``. Raises ConfigError for a text that is no address, KernelError when
    the kernel cannot be asked, and as :meth:`DataPlane.plan` for ``leases``.
    """
    try:
        address = canonical(address)
    except ValueError as error:
        raise ConfigError(
            f"{address!r} is not an IP address",
            hint="give one address, without a prefix length, a port or a zone",
        ) from error
    families, note = {n: state.family for n, state in overlay.state.items()}, ""
    number = 6 if ":" in address else 4
    if leases is not None:
        view = overlay.resolver.resolve(leases)
        families = {family.number: family for family in view.families}
        note = str(view.errors.get(number, ""))
    with LinkReader(overlay.host.netns) as fib:
        made = _Explainer(overlay, fib, address, families.get(number))
        if note:
            made.steps.append(Step("leases", "", "cannot be used", False, note))
        known = [made.known] if made.known else []
        return replace(made.explain(), blockers=find_blockers(overlay, known))


class _Explainer:
    """One question; collects the steps of its answer."""

    def __init__(
        self, overlay: Overlay, fib: LinkReader, address: str, known: Family | None
    ) -> None:
        self.overlay, self.fib, self.address, self.known = overlay, fib, address, known
        self.number = 6 if ":" in address else 4
        self.steps: list[Step] = []
        self.match = fib.route_match(address)
        self.network = ""
        self.device = DeviceView("")
        if self.number in overlay.families:
            self.network = network_of(overlay.config, self.number)
            if overlay.config.backend.type == "vxlan":
                self.device = device_view(overlay, self.number)

    @property
    def in_tunnel(self) -> bool:
        return bool(self.match and self.device.index and self.match.device == self.device.index)

    @property
    def way(self) -> str:
        if self.match is None:
            return "none"
        if self.match.local:
            return "local"
        return "tunnel" if self.in_tunnel else "direct"

    def explain(self) -> Explanation:
        if not self.network:
            self._route("")
            text = f"IPv{self.number} is switched off in the network configuration"
            return self._answer("outside-network", text)
        if self.match and self.match.local:
            self._route("this node's own")
            return self._answer("own-address", "it is an address of this node itself")
        own = self._own_subnet()
        if own and holds(own, self.address):
            return self._own(own)
        return self._with_leases(self.known) if self.known else self._kernel_only()

    def _answer(self, verdict: str, summary: str, owner: Owner | None = None) -> Explanation:
        return Explanation(
            self.address, self.number, verdict, summary, self.way, owner, tuple(self.steps)
        )

    def _own_subnet(self) -> str:
        """From the lease, else from the device's address and flannel's subnet length."""
        if self.known:
            return self.known.admission.node.subnet
        config = self.overlay.config
        length = config.subnet_len if self.number == 4 else config.ipv6_subnet_len
        inside = [text.partition("/")[0] for text in self.device.addresses]
        found = [text for text in inside if holds(self.network, text)]
        return f"{found[0]}/{length}" if found else ""

    def _own(self, subnet: str) -> Explanation:
        if self.in_tunnel and not self.overlay.config.backend.by_program:
            text = f"a route sends this node's own pods into the tunnel: {SYNC}"
            self._route("a device of this node", ok=False, text=text)
        else:
            local = bool(self.match and not self.match.gateway and not self.in_tunnel)
            text = "" if local else "no device has this subnet yet; the CNI plugin makes it"
            self._route("a device of this node", ok=True, text=text)
        return self._answer("own-subnet", f"it is in {subnet}, the subnet of this node")

    def _with_leases(self, known: Family) -> Explanation:
        peers = known.admission.accepted
        number = find_holder(peers, self.address)
        if number >= 0:
            return self._peer(number, known)
        found = peers.find_endpoint(parse_address(self.address)[1])
        if found:
            return self._endpoint(owner_of(peers, found[0]))
        inside = holds(self.network, self.address)
        rejected = known.admission.rejected
        number = find_holder(rejected.claims, self.address)
        if number >= 0:
            refused = rejected[number]
            owner = owner_of(rejected.claims, number)
            self._not_ours(f"the lease is rejected ({refused.reason})")
            return self._answer(
                "refused",
                f"it is in {owner.subnet} of lease {owner.name} (node {owner.public_ip}), which is "
                f"rejected: {refused.reason}: {refused.detail}",
                owner,
            )
        self._not_ours("no lease has this address" if inside else "it is outside the network")
        if inside:
            return self._answer("unclaimed", f"it is inside {self.network}, and in no lease")
        return self._answer("outside-network", f"it is outside the network {self.network}")

    def _kernel_only(self) -> Explanation:
        if not holds(self.network, self.address):
            found = self._endpoint_in_fdb()
            if found:
                return self._endpoint(found)
            self._not_ours("it is outside the network")
            return self._answer("outside-network", f"it is outside the network {self.network}")
        subnet, match = self._held_subnet(), self.match
        if not subnet and match and match.gateway and match.protocol == PROTOCOL:
            self._route("")
            text = f"it is inside {self.network}, in {match.prefix}, behind node {match.gateway}"
            return self._answer("peer", text, Owner("", match.prefix, match.gateway))
        if not subnet:
            if self.device.name:
                self._device()
            self._route("", ok=True, text="no route leads into the tunnel; try with --leases")
            return self._answer(
                "unknown", f"it is inside {self.network}; without leases, nothing says whose it is"
            )
        owner = self._chain(subnet, "", "")
        text = f"it is inside {self.network}, in {owner.subnet}"
        return self._answer("peer", f"{text}, behind node {owner.public_ip or 'unknown'}", owner)

    def _held_subnet(self) -> str:
        """The longest prefix for the address that has a route into our device, or ""."""
        if not self.device.index:
            return ""
        if self.overlay.config.backend.by_program:
            peers = held_peers(self.overlay.host, self.overlay.forwarder, self.number)
            inside = [one.prefix for one in peers if holds(one.prefix, self.address)]
            return max(inside, key=length_of, default="")
        scope = route_scope(self.number, device=self.device.index, exclusive=True)
        table = self.overlay.host.kernel.read("route", scope)
        found = [route.prefix for route in table if holds(route.prefix, self.address)]
        return max(found, key=length_of, default="")

    def _endpoint_in_fdb(self) -> Owner | None:
        if not self.device.index:
            return None
        for one in held_peers(self.overlay.host, self.overlay.forwarder, self.number):
            if one.endpoint == self.address:
                return Owner("", one.prefix, self.address, one.mac)
        for entry in self.overlay.host.kernel.read("fdb", fdb_scope(self.device.index)):
            if entry.endpoint == self.address:
                return Owner("", "", self.address, entry.mac)
        return None

    def _endpoint(self, owner: Owner) -> Explanation:
        text = f"the tunnel to {owner.public_ip} would run through itself: {SYNC}"
        self._route("the underlay", ok=not self.in_tunnel, text=text if self.in_tunnel else "")
        name = owner.name or f"the node with MAC {owner.mac}"
        return self._answer(
            "peer-endpoint", f"it is the public address of {name}, outside the tunnel", owner
        )

    def _not_ours(self, why: str) -> None:
        if self.in_tunnel and self.overlay.config.backend.by_program:
            self._route(f"{self.network} into the tunnel", text=f"{why}: the program drops it")
            return
        text = f"{why}, and the route leads into the tunnel: {SYNC}" if self.in_tunnel else ""
        self._route("not into the tunnel", ok=not self.in_tunnel, text=text)

    def _peer(self, number: int, known: Family) -> Explanation:
        owner = owner_of(known.peers, number)
        paths = find_paths(self.overlay, known)
        self.steps.append(
            Step("lease", "", f"{owner.name}: {owner.subnet} at {owner.public_ip}", True)
        )
        if paths is not None:
            self._underlay(owner, known)
        if paths is not None and paths[number] == DIRECT:
            self._direct(owner, known.uplink)
        elif not known.has_tunnel:
            text = "host-gw needs all nodes in one layer 2 network, vxlan does not"
            self._route(f"via {owner.public_ip}, which is not on-link", ok=False, text=text)
        else:
            self._chain(owner.subnet, owner.mac, owner.public_ip)
        return self._answer(
            "peer", f"it is in {owner.subnet} of lease {owner.name} (node {owner.public_ip})", owner
        )

    def _underlay(self, owner: Owner, known: Family) -> None:
        """Why this way: what the underlay's routes say of the peer's public address."""
        match = self.fib.route_match(owner.public_ip)
        if match is None:
            held = f"no route carries {owner.public_ip}: not direct"
        elif match.gateway:
            held = (
                f"{owner.public_ip} is behind gateway {match.gateway} ({match.prefix}): not direct"
            )
        elif match.device != known.uplink:
            where = f"on {match.device_name}, not {known.iface}"
            held = f"{owner.public_ip} is on-link {where}: not direct"
        else:
            held = f"{owner.public_ip} is on-link on {known.iface} ({match.prefix}): direct"
        self.steps.append(Step("underlay", "", held, True))

    def _direct(self, owner: Owner, uplink: int) -> None:
        """A peer on our own network: a route by its public address, nothing else."""
        link = self.fib.link(uplink)
        wanted = f"{owner.subnet} via {owner.public_ip} dev {link.name if link else uplink}"
        match, text = self.match, f"there is no route: {SYNC}"
        right = (
            match is not None
            and (match.prefix, match.gateway) == (owner.subnet, owner.public_ip)
            and match.device == uplink
        )
        if self.in_tunnel:
            text = f"it goes through the tunnel, and need not: {SYNC}"
        elif match is not None:
            text = self._obstacle(match, owner.subnet)
        self._route(wanted, ok=right, text="" if right else text)

    # ---- the steps ---------------------------------------------------------

    def _device(self) -> None:
        held = str(self.device).partition(": ")[2] if self.device.index else ""
        problem = self.device.problem
        if self.device.index:
            held = held.removesuffix(f", {problem}") if problem else held
        self.steps.append(
            Step(
                "device",
                self.device.name,
                held and f"{self.device.name} {held}",
                not problem,
                problem,
            )
        )

    def _route(self, wanted: str, *, ok: bool = True, text: str = "") -> None:
        held = self._route_text(self.match) if self.match else ""
        self.steps.append(Step("route", wanted, held, ok, text))

    def _route_text(self, match: RouteMatch) -> str:
        words = [match.prefix]
        words += [f"nhid {match.nexthop}"] if match.nexthop else []
        words += [f"via {match.gateway}"] if match.gateway else []
        words += [f"dev {match.device_name or match.device}"]
        if match.protocol != PROTOCOL:
            words.append(f"proto {protocol_name(match.protocol)}")
        return " ".join(words)

    def _chain(self, subnet: str, mac: str, endpoint: str) -> Owner:
        """Device, route, nexthop, neighbour, FDB, outer packet; "" is not known."""
        self._device()
        if self.overlay.config.backend.by_program:
            return self._mapped(subnet, mac, endpoint)
        gateway = subnet.partition("/")[0]
        reached = self._overlay_route(subnet, gateway)
        held_gateway = self._gateway(gateway) if reached else ""
        held_mac = self._neighbour(held_gateway or gateway, mac)
        held_endpoint = self._fdb(held_mac or mac, endpoint)
        if held_endpoint:
            self._outer(held_endpoint)
        self._traffic(held_mac)
        prefix = subnet or (self.match.prefix if self.match else "")
        return Owner("", prefix, held_endpoint, held_mac)

    def _mapped(self, subnet: str, mac: str, endpoint: str) -> Owner:
        """The same where a program forwards: the route of all, and its map."""
        gateway = GATEWAYS[self.number]
        if self._overlay_route(self.network, gateway):
            self._gateway(gateway)
        self._neighbour(gateway, GATEWAY_MAC)
        held = [
            one
            for one in held_peers(self.overlay.host, self.overlay.forwarder, self.number)
            if one.prefix == subnet
        ]
        there = f"{held[0].endpoint} lladdr {held[0].mac}" if held else ""
        wanted = f"{endpoint} lladdr {mac}" if endpoint else ""
        self._step(
            "peer", f"{subnet} behind", there, wanted, bool(held) and there == (wanted or there)
        )
        if held:
            self._outer(held[0].endpoint)
            self._traffic(held[0].mac)
            return Owner("", subnet, held[0].endpoint, held[0].mac)
        return Owner("", subnet, endpoint, mac)

    def _traffic(self, mac: str) -> None:
        """What was counted of this peer, where anything is."""
        reading = self.overlay.counting.of_family(self.number) if mac else None
        if reading is None:
            return
        raw = bytes.fromhex(mac.replace(":", ""))
        words = []
        for direction in DIRECTIONS:
            traffic = reading.traffic(raw, self.number, direction)
            text = f"{direction} {count(traffic.packets, 'packet')} ({human(traffic.bytes)}B)"
            since = reading.seconds_since(traffic.last)
            words.append(text if since is None else f"{text}, last {human_time(since)} ago")
        drops = [one for one in reading.drops if (one.mac, one.family) == (mac, self.number)]
        words += [f"{one.packets} {one.reason} dropped {one.direction}" for one in drops]
        self.steps.append(Step("traffic", "", "; ".join(words), True))

    def _overlay_route(self, subnet: str, gateway: str) -> bool:
        """Whether the kernel's route is one into our device."""
        match, name = self.match, self.device.name
        wanted = f"{subnet} via {gateway} dev {name}" if subnet else f"dev {name}"
        if match is None:
            self._route(wanted, ok=False, text=f"there is no route: {SYNC}")
        elif not self.in_tunnel:
            self._route(wanted, ok=False, text=self._obstacle(match, subnet))
        elif subnet and match.prefix != subnet:
            text = f"the packet takes a route to another prefix: {SYNC}"
            self._route(wanted, ok=False, text=text)
        elif match.protocol != PROTOCOL:
            self._route(wanted, text="written by another program; a sync takes it over")
        else:
            self._route(wanted)
        return self.in_tunnel

    def _obstacle(self, match: RouteMatch, subnet: str) -> str:
        """What to do about a route that is not the one there should be."""
        if match.protocol == PROTOCOL or length_of(match.prefix) < length_of(subnet):
            return f"the route is missing or wrong: {SYNC}"
        # iproute2 finds a route on a nexthop object by its id only.
        which = f"nhid {match.nexthop}" if match.nexthop else f"dev {match.device_name}"
        return (
            "another program's route blocks it: remove it with "
            f"'ip route del {match.prefix} {which}', then {SYNC}"
        )

    def _gateway(self, wanted: str) -> str:
        """The gateway of the route, which may be in a nexthop object."""
        match = self.match
        assert match is not None
        if not match.nexthop:
            if wanted and match.gateway != wanted:
                text = f"the gateway is not the peer's: {SYNC}"
                self.steps.append(Step("gateway", wanted, match.gateway, False, text))
            return match.gateway
        found = self.overlay.host.kernel.get(
            nexthop_scope(self.device.index), Nexthop(match.nexthop, "0.0.0.0", self.device.index)
        )
        gateway = found.gateway if isinstance(found, Nexthop) else match.gateway
        held = f"{match.nexthop} via {gateway} dev {self.device.name}" if gateway else ""
        right = bool(gateway) and gateway == (wanted or gateway)
        ours = EVERY_ID[0] <= match.nexthop <= EVERY_ID[1]
        text = "" if right and ours else f"it is not the one a sync makes: {SYNC}"
        self.steps.append(
            Step("nexthop", f"via {wanted}" if wanted else "", held, right and ours, text)
        )
        return gateway

    def _neighbour(self, gateway: str, wanted: str) -> str:
        if not gateway or not self.device.index:
            return ""
        found = self.overlay.host.kernel.get(
            neighbour_scope(self.device.index, self.number),
            Neighbour(self.device.index, gateway, "00:00:00:00:00:00"),
        )
        mac = found.mac if isinstance(found, Neighbour) else ""
        right = bool(mac) and mac == (wanted or mac)
        self._step("neighbour", f"{gateway} lladdr", mac, wanted, right)
        return mac

    def _fdb(self, mac: str, wanted: str) -> str:
        if not mac or not self.device.index:
            return ""
        found = self.overlay.host.kernel.get(
            fdb_scope(self.device.index), Fdb(self.device.index, mac, "")
        )
        endpoint = found.endpoint if isinstance(found, Fdb) else ""
        right = bool(endpoint) and endpoint == (wanted or endpoint)
        self._step("fdb", f"{mac} dst", endpoint, wanted, right)
        return endpoint

    def _step(self, name: str, key: str, held: str, wanted: str, right: bool) -> None:
        text = "" if right else f"it is {'not the one of the lease' if held else 'missing'}: {SYNC}"
        self.steps.append(
            Step(
                name,
                f"{key} {wanted}" if wanted else "",
                f"{key} {held}" if held else "",
                right,
                text,
            )
        )

    def _outer(self, endpoint: str) -> None:
        """The encapsulated packet has to leave by the underlay."""
        device = self.device
        try:
            match = self.fib.route_match(endpoint)
        except FlannelDPError as error:
            self.steps.append(Step("packet", "", "", False, str(error)))
            return
        local = device.local or (self.known.admission.node.public_ip if self.known else "?")
        packet = f"{local} -> {endpoint}:{device.port} vni {device.vni}"
        if ":" in endpoint:
            packet = f"{local} -> [{endpoint}]:{device.port} vni {device.vni}"
        if match is None:
            text = f"the underlay has no route to {endpoint}: check the external interface"
            self.steps.append(Step("packet", packet, "", False, text))
            return
        where = f"by {self._route_text(match)}"
        loop = match.device == device.index
        text = f"the tunnel runs through itself: {SYNC}" if loop else ""
        self.steps.append(Step("packet", "", f"{packet}, {where}", not loop, text))
