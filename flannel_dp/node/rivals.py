"""Addresses and routes of others that divert packets of pods: decided from the evidence alone.

A device with an address in a peer's subnet answers for the peer's pods; an address on our own
device leads its network into the tunnel; the kernel prefers a route for a part of a peer's subnet
to ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from ipaddress import ip_interface

from flannel_dp.cluster.admission import Protected
from flannel_dp.kernel.links import SCOPE_LINK, Address, Link
from flannel_dp.node.path import Diversion, Ground, holds, length_of


def foreign_addresses(
    family: int, device: str, found: Iterable[Address], ours: Sequence[str], network: str
) -> Iterator[Diversion]:
    """Yield addresses of other programs on our device ``device``.

    Those that the next sync removes are left out: of IPv4 all inside ``network``, of IPv6 all
    (flannel's rule). ``ours`` are the networks whose addresses belong there.
    """
    for one in found:
        text, alone = f"{one.address}/{one.prefixlen}", f"{one.address}/{_bits(one)}"
        if any(holds(each, alone) for each in ours) or (
            one.family == 6 and one.scope == SCOPE_LINK
        ):
            continue
        if one.family == family and (family == 6 or holds(network, alone)):
            continue
        leads = f", which leads {network_of_address(text)} into the tunnel" if text != alone else ""
        yield Diversion(
            family,
            "address",
            f"device {device} has {text}, an address of another program{leads}",
            f"'ip address del {text} dev {device}' removes it",
            network_of_address(text),
            device=device,
        )


def rival_devices(
    ground: Ground,
    found: Sequence[Address],
    links: Mapping[int, Link],
    owners: Mapping[str, tuple[str, str]],
    *,
    uplink: int,
    networks: Sequence[str],
) -> Iterator[Diversion]:
    """Yield devices with an address in the network that is neither ours nor in this node's subnet.

    ``owners`` has the lease and its subnet of addresses that some peer's lease covers. Of others
    only a bridge with a pod subnet of its own counts: what is left of an earlier subnet. A bridge
    that has addresses outside of the cluster's ``networks`` serves something else, too, and stays.
    With an address of the external interface it is the lease that is wrong, and rejected.
    """
    if not ground.subnet:
        return
    for one in found:
        text, alone = f"{one.address}/{one.prefixlen}", f"{one.address}/{_bits(one)}"
        link = links.get(one.index)
        if link is None or not holds(ground.network, alone) or holds(ground.subnet, alone):
            continue
        if one.index == uplink:
            continue
        owner = owners.get(one.address)
        is_bridge = link.kind == "bridge"
        if owner is None and not (is_bridge and one.prefixlen > length_of(ground.network)):
            continue
        others = [a for a in found if a.index == one.index and a.scope < SCOPE_LINK]
        others = [
            a for a in others if not any(holds(n, f"{a.address}/{_bits(a)}") for n in networks)
        ]
        remove = (
            f"'ip link delete {link.name}' removes it"
            if is_bridge and not others
            else f"'ip address del {text} dev {link.name}' removes it, unless the lease is wrong"
        )
        what = f"{link.kind or 'device'} {link.name} has {text}"
        if owner:
            said = f"{what}, in {owner[1]} of lease {owner[0]}: packets to its pods stay here"
        else:
            said = f"{what}, which is not in {ground.subnet}, the subnet of this node"
        yield Diversion(
            ground.family,
            "device",
            said,
            remove,
            owner[1] if owner else network_of_address(text),
            device=link.name,
        )


def narrower_routes(
    ground: Ground, routes: Iterable[Protected], owners: Mapping[str, tuple[str, str]]
) -> Iterator[Diversion]:
    """Yield static routes of table main that the kernel prefers to ours: those for a part of a
    peer's subnet. ``owners`` has the lease and its subnet by the route's prefix."""
    for route in routes:
        if route.prefix not in owners:
            continue
        name, subnet = owners[route.prefix]
        yield Diversion(
            ground.family,
            "route",
            f"{route.what}, a part of {subnet} of lease {name}, diverts {ground.packets}",
            f"'{ground.ip} route del {route.prefix}' removes it",
            route.prefix,
            table="main",
        )


def _bits(address: Address) -> int:
    return 32 if address.family == 4 else 128


@lru_cache(256)
def network_of_address(text: str) -> str:
    """Return the network of an address with a prefix length: 192.0.2.0/24 of 192.0.2.1/24."""
    return str(ip_interface(text).network)
