"""Where a family is on this node: its device, that device's MAC, and the address it sends from.

One class for each mode of a network's backend, chosen once for a :class:`Resolver`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import parse_prefix
from flannel_dp.cluster.admission import Admission, Node, OwnLease
from flannel_dp.cluster.backend import Mode
from flannel_dp.cluster.network import NetworkConfig, devices_of
from flannel_dp.errors import ConfigError, NotYet
from flannel_dp.kernel.links import Link, LinkReader
from flannel_dp.node.family import Family
from flannel_dp.node.uplink import Uplink

#: RT_SCOPE_LINK: an address of this scope or a narrower one says nothing of a network.
_SCOPE_LINK = 253


class Direct(Struct, frozen=True):
    """host-gw: no device, and what an earlier layout left on one has to go."""

    config: NetworkConfig

    def claim(self, reader: LinkReader, node: Node, own: OwnLease | None) -> Node:
        """Return the node with its VTEP MAC, and check that the network can be.

        Raises ConfigError.
        """
        return node

    def place(
        self, reader: LinkReader, uplink: Uplink, validated: Admission, others: Sequence[Family]
    ) -> Family:
        """Return the family where it is now; ``others`` were placed before. Raises NotYet."""
        link = _leading_out(uplink.link)
        left = flannel_devices(reader, validated.node)
        return Family(validated, link.index, link.name, link.mtu, leftovers=left)

    def together(self, families: list[Family]) -> list[Family]:
        """Return the families as they can be beside each other."""
        return families


class Tunnel(Direct, frozen=True):
    """vxlan: a device of its own for each family."""

    def claim(self, reader: LinkReader, node: Node, own: OwnLease | None) -> Node:
        name = devices_of(self.config)[node.family]
        mac = own.mac if own and own.mac else present_mac(reader, name)
        return replace(node, mac=mac or new_mac(name, node.public_ip))

    def place(
        self, reader: LinkReader, uplink: Uplink, validated: Admission, others: Sequence[Family]
    ) -> Family:
        node, link = validated.node, _leading_out(uplink.link)
        local = _source_address(uplink, node)
        mac = self.mac(reader, node, others)
        return Family(validated, link.index, link.name, link.mtu, local, mac)

    def mac(self, reader: LinkReader, node: Node, others: Sequence[Family]) -> str:
        """Return the MAC of the family's device."""
        return node.mac


class SharedTunnel(Tunnel, frozen=True):
    """ebpf: one device for both families, and one route for the whole network."""

    def claim(self, reader: LinkReader, node: Node, own: OwnLease | None) -> Node:
        networks = (*node.around, *(one for one in node.protected if not one.route))
        _check_network(node.network, (one.prefix for one in networks))
        return super().claim(reader, node, own)

    def mac(self, reader: LinkReader, node: Node, others: Sequence[Family]) -> str:
        """Return the first family's, kept while that one cannot be: with another MAC the device
        would lose its neighbours."""
        devices = devices_of(self.config)
        if node.family == next(iter(devices)):
            return node.mac
        if others:
            return others[0].admission.node.mac
        return present_mac(reader, devices[node.family]) or node.mac

    def together(self, families: list[Family]) -> list[Family]:
        """Return the families with one MTU, that of their device."""
        least = min(families, key=lambda one: one.uplink_mtu)
        mtu, said_by = least.uplink_mtu, least.mtu_said_by
        return [replace(one, uplink_mtu=mtu, mtu_said_by=said_by) for one in families]


PLACING: dict[Mode, type[Direct]] = {
    "host-gw": Direct,
    "vxlan": Tunnel,
    "ebpf": SharedTunnel,
}


def our_device(reader: LinkReader, config: NetworkConfig, family: int) -> Link | None:
    """Return the vxlan device that a family has, if it is there."""
    names = [name for number, name in devices_of(config).items() if number == family]
    found = [link for link in map(reader.link, names) if link and link.kind == "vxlan"]
    return found[0] if found else None


def present_mac(reader: LinkReader, device: str) -> str:
    """Return the MAC of a vxlan device that is there already, "" when there is none."""
    found = reader.link(device)
    return found.mac if found and found.kind == "vxlan" else ""


def new_mac(device: str, public_ip: str) -> str:
    """Return the MAC that a device gets that is not there yet."""
    from flannel_dp.node.mac import default_mac  # not needed once the device was made

    return default_mac(device, public_ip)


def flannel_devices(reader: LinkReader, node: Node) -> tuple[int, ...]:
    """Return the vxlan devices with flannel's names: of a layout this node had before. One with an
    address elsewhere, and none in this network, is that of another network of this node."""
    from ipaddress import ip_address, ip_network

    network = ip_network(node.network)

    def is_elsewhere(index: int) -> bool:
        found = [one for one in reader.addresses(index) if one.scope < _SCOPE_LINK]
        return bool(found) and all(ip_address(one.address) not in network for one in found)

    return tuple(
        link.index
        for link in reader.links("vxlan")
        if link.name.startswith(("flannel.", "flannel-v6.")) and not is_elsewhere(link.index)
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


def _leading_out(link: Link) -> Link:
    """Return the external interface. Raises NotYet for lo, which leads to no other node: its
    address is announced, and no route out of another interface is there yet."""
    if link.name != "lo":
        return link
    raise NotYet(
        "the public address is on lo, and no route leads to the other nodes or anywhere else",
        hint="add a route to them, or name their interface with --iface and the address with "
        "--public-ip or --public-ipv6",
    )


def _source_address(uplink: Uplink, node: Node) -> str:
    """Return where tunnel packets leave from: the public address, unless it is not on this node."""
    if node.public_ip in node.addresses:
        return node.public_ip
    if not uplink.local[node.family]:
        raise NotYet(
            f"{uplink.link.name} has no IPv{node.family} address to send from",
            hint="add one, or name another --iface",
        )
    return uplink.local[node.family]
