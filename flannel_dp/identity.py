"""Decide which interface, which address and which lease are this node's, from evidence.

All functions are pure: what was read from the kernel, from files and from the leases is handed
in as values, and nothing is read here. A wrong answer cuts the node off, or makes it another
node, so that what worked until now outweighs what a route look-up or another node says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

#: Kinds of devices that carry packets to other nodes inside other packets. The default route of
#: a VPN leads out of one; nodes that reach each other through one need ``--iface``.
_TUNNELS = frozenset({"geneve", "tun", "vxlan", "wireguard"})


class Interface(Struct, frozen=True):
    """A device of this node. ``kind`` is the kernel's word for it (``ip -d link``), ``mac`` ""
    where it has no layer 2; ``ours`` is set for flannel-dp's own devices."""

    index: int
    name: str
    kind: str = ""
    mac: str = ""
    ours: bool = False

    @property
    def is_tunnel(self) -> bool:
        """Whether it cannot be the external interface unless the user says so. A tap device
        is of kind tun as well, and has a MAC address: it may be a machine's only interface."""
        return self.ours or (self.kind in _TUNNELS and not (self.kind == "tun" and self.mac))


class Kept(Struct, frozen=True):
    """What one family works with: the interface ``link`` (ifindex) and the address that it
    sends from."""

    family: int
    link: int
    address: str


def still_there(
    kept: Iterable[Kept], links: Mapping[int, Interface], addresses: Iterable[str]
) -> tuple[Kept, ...]:
    """Return those of ``kept`` whose interface exists and whose address is on this node."""
    here = {*addresses}
    return tuple(
        one
        for one in kept
        if one.link in links and not links[one.link].ours and one.address in here
    )


def default_uplink(routes: Iterable[int], links: Mapping[int, Interface]) -> Interface | None:
    """Return the interface of the first default route that leads out of no tunnel.

    ``routes`` are the ifindexes of the default routes, the best first.
    """
    known = (links[index] for index in routes if index in links)
    return next((link for link in known if not link.is_tunnel), None)


def addresses_to_publish(
    usable: tuple[str, ...], named: tuple[str, ...], kept: str
) -> tuple[str, ...]:
    """Return the addresses of one family that other nodes may reach this one at, best first.

    ``named`` are those that a flag asked for, () for none; ``kept`` is the one in use, "" for
    none. It comes first unless the flags ask for others.
    """
    found = named or usable
    if kept and (kept in found or not named):
        return (kept, *(address for address in found if address != kept))
    return found
