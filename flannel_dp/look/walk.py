"""What one packet meets on its way, entry by entry, as the kernel has it.

In the order in which a packet meets them: route, nexthop, neighbour, FDB, route of the outer
packet; where a program forwards, route and neighbour of all peers and the program's map.
:mod:`flannel_dp.look.words` says what is wrong with each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.links import LinkReader
from flannel_dp.look import words
from flannel_dp.look.explanation import Owner, Step, holds, length_of
from flannel_dp.look.held import FamilyReader
from flannel_dp.resources.counters.traffic import DIRECTIONS
from flannel_dp.resources.device.view import DeviceView
from flannel_dp.resources.peers.gateway import GATEWAY_MAC, GATEWAYS, is_shared_gateway
from flannel_dp.tables.entries import Fdb, Neighbour, Nexthop, Peer

if TYPE_CHECKING:
    from flannel_dp.look.overlay import Overlay

_NO_MAC = "00:00:00:00:00:00"


class Walk:
    """The way of packets to one address; ``network`` is "" where its family is switched off.

    ``steps`` are those that were made so far. ``local`` is the address that tunnel packets leave
    from, where the device does not say. Methods raise KernelError.
    """

    def __init__(self, overlay: Overlay, fib: LinkReader, address: str, local: str) -> None:
        self._overlay, self._fib, self._local = overlay, fib, local
        self.address, self.number = address, 6 if ":" in address else 4
        self.steps: list[Step] = []
        self.match = fib.route_match(address)
        self.network, self.device = "", DeviceView("")
        if self.number in overlay.families:
            self._reader = FamilyReader.of(overlay, self.number)
            self.network = self._reader.network
            self.device = self._reader.device or self.device

    @property
    def in_tunnel(self) -> bool:
        """Whether the packet's route leads into the vxlan device."""
        return bool(self.match and self.device.index and self.match.device == self.device.index)

    @property
    def by_shared_route(self) -> bool:
        """Whether that is the one route for all, to a program that forwards what it knows."""
        return self.in_tunnel and self.device.external

    @property
    def way(self) -> str:
        """How the kernel would send the packet now."""
        if self.match is None:
            return "none"
        if self.match.local:
            return "local"
        return "tunnel" if self.in_tunnel else "direct"

    # ---- whose an address is, as far as the kernel's entries tell

    def own_subnet(self, config: NetworkConfig) -> str:
        """Return this node's subnet: the device's address, with flannel's subnet length."""
        length = config.subnet_len if self.number == 4 else config.ipv6_subnet_len
        inside = [text.partition("/")[0] for text in self.device.addresses]
        found = [text for text in inside if holds(self.network, text)]
        return f"{found[0]}/{length}" if found else ""

    def peer_subnet(self) -> str:
        """Return the longest prefix for the address that leads to a peer through the tunnel, or
        ""."""
        if not self.device.index:
            return ""
        prefixes = [one.prefix for one in self._mapped()]
        prefixes += [
            route.prefix
            for route, ours in self._reader.read("route", on_device=True).entries()
            if ours and not is_shared_gateway(route, self.network, self.number)
        ]
        inside = [prefix for prefix in prefixes if holds(prefix, self.address)]
        return max(inside, key=length_of, default="")

    def peer_behind(self) -> Owner | None:
        """Return the peer whose public address it is."""
        if not self.device.index:
            return None
        for one in self._mapped():
            if one.endpoint == self.address:
                return Owner("", one.prefix, self.address, one.mac)
        for entry, _ in self._reader.read("fdb").entries():
            if entry.endpoint == self.address:
                return Owner("", "", self.address, entry.mac)
        return None

    def _mapped(self) -> list[Peer]:
        return [one for one, _ in self._reader.read("peer").entries()]

    # ---- steps

    def route(self, wanted: str, *, ok: bool = True, text: str = "") -> None:
        """The route, where it is all that there is to say."""
        self.steps.append(words.route_step(self.match, wanted, ok=ok, text=text))

    def on_underlay(self, owner: Owner, uplink: int, iface: str) -> bool:
        """Return why a peer is reached directly or not, and whether it is."""
        match = self._fib.route_match(owner.public_ip)
        self.steps.append(words.underlay_step(owner.public_ip, match, uplink, iface))
        return match is not None and not match.gateway and match.device == uplink

    def directly(self, owner: Owner, uplink: int) -> None:
        """A peer on our own network: a route by its public address, nothing else."""
        link = self._fib.link(uplink)
        name = link.name if link else ""
        self.steps.append(
            words.direct_route_step(self.match, owner, uplink, name, in_tunnel=self.in_tunnel)
        )

    def see_device(self) -> None:
        """The vxlan device, where there is to be one."""
        if self.device.name:
            self.steps.append(words.device_step(self.device))

    def to_peer(self, subnet: str, mac: str, endpoint: str) -> Owner:
        """Device, route, nexthop, neighbour, FDB, outer packet; "" is not known. Return what the
        packet gets to."""
        if not self.device.name:
            text = "host-gw needs all nodes in one layer 2 network, vxlan does not"
            self.route(f"via {endpoint}, which is not on-link", ok=False, text=text)
            return Owner("", subnet, endpoint, mac)
        self.see_device()
        if self.device.external:
            return self._by_map(subnet, mac, endpoint)
        gateway = subnet.partition("/")[0]
        reached = self._into_tunnel(subnet, gateway)
        held_gateway = self._gateway(gateway) if reached else ""
        held_mac = self._neighbour(held_gateway or gateway, mac)
        held_endpoint = self._fdb(held_mac or mac, endpoint)
        if held_endpoint:
            self._outer(held_endpoint)
        self._traffic(held_mac)
        prefix = subnet or (self.match.prefix if self.match else "")
        return Owner("", prefix, held_endpoint, held_mac)

    def _by_map(self, subnet: str, mac: str, endpoint: str) -> Owner:
        """Return the same where a program forwards: the route of all, and its map."""
        gateway = GATEWAYS[self.number]
        match = self.match
        narrow = match is not None and (match.prefix, match.gateway) == (subnet, gateway)
        if self._into_tunnel(subnet if narrow else self.network, gateway):
            self._gateway(gateway)
        self._neighbour(gateway, GATEWAY_MAC)
        held = next((one for one in self._mapped() if one.prefix == subnet), None)
        there = f"{held.endpoint} lladdr {held.mac}" if held else ""
        wanted = f"{endpoint} lladdr {mac}" if endpoint else ""
        self.steps.append(words.entry_step("peer", f"{subnet} behind", there, wanted))
        if held is None:
            return Owner("", subnet, endpoint, mac)
        self._outer(held.endpoint)
        self._traffic(held.mac)
        return Owner("", subnet, held.endpoint, held.mac)

    def _into_tunnel(self, subnet: str, gateway: str) -> bool:
        """Return whether the kernel's route is one into our device."""
        self.steps.append(words.tunnel_route_step(self.match, self.device, subnet, gateway))
        return self.in_tunnel

    def _gateway(self, wanted: str) -> str:
        """Return the gateway of the route, which may be in a nexthop object."""
        match = self.match
        assert match is not None
        if not match.nexthop:
            if wanted and match.gateway != wanted:
                self.steps.append(words.gateway_step(wanted, match.gateway))
            return match.gateway
        found = self._reader.get(Nexthop(match.nexthop, "0.0.0.0", self.device.index))
        gateway: str = found.gateway if found else match.gateway
        self.steps.append(words.nexthop_step(match.nexthop, wanted, gateway, self.device.name))
        return gateway

    def _neighbour(self, gateway: str, wanted: str) -> str:
        if not gateway or not self.device.index:
            return ""
        found = self._reader.get(Neighbour(self.device.index, gateway, _NO_MAC))
        mac: str = found.mac if found else ""
        self.steps.append(words.entry_step("neighbour", f"{gateway} lladdr", mac, wanted))
        return mac

    def _fdb(self, mac: str, wanted: str) -> str:
        if not mac or not self.device.index:
            return ""
        found = self._reader.get(Fdb(self.device.index, mac, ""))
        endpoint: str = found.endpoint if found else ""
        self.steps.append(words.entry_step("fdb", f"{mac} dst", endpoint, wanted))
        return endpoint

    def _outer(self, endpoint: str) -> None:
        """The encapsulated packet has to leave by the underlay."""
        try:
            match = self._fib.route_match(endpoint)
        except FlannelDPError as error:
            self.steps.append(Step("packet", "", "", False, str(error)))
            return
        local = self.device.local or self._local or "?"
        self.steps.append(words.packet_step(self.device, local, endpoint, match))

    def _traffic(self, mac: str) -> None:
        """What was counted of this peer, where anything is."""
        reading = self._overlay.counting.of_family(self.number) if mac else None
        if reading is None:
            return
        raw = bytes.fromhex(mac.replace(":", ""))
        found = {way: reading.traffic(raw, self.number, way) for way in DIRECTIONS}
        counted = {way: (one, reading.seconds_since(one.last)) for way, one in found.items()}
        drops = [
            (one.packets, one.reason, one.direction)
            for one in reading.drops
            if (one.mac, one.family) == (mac, self.number)
        ]
        self.steps.append(words.traffic_step(counted, drops))
