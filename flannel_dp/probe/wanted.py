"""Which peers are to be probed, and by which place: of a data plane, or of a caller's own list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from msgspec import Struct

from flannel_dp._core import Claims, Table
from flannel_dp.errors import ConfigError
from flannel_dp.kernel.links import SCOPE_LINK, LinkReader
from flannel_dp.probe.target import Place, raw

#: What stands for a path in the column of a data plane (resources.peers.place).
_TUNNEL, _DIRECT = 0, 1


class Paths(Protocol):
    """How each peer is reached: a byte for each, none where all are reached the same way."""

    @property
    def ways(self) -> bytes: ...
    @property
    def apart(self) -> bool: ...


class Written(Protocol):
    """What a data plane has written for the peers of one family."""

    @property
    def number(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def uplink(self) -> int: ...
    @property
    def local(self) -> str: ...
    @property
    def subnet(self) -> str: ...
    @property
    def peers(self) -> Claims: ...
    @property
    def paths(self) -> Paths: ...


class Wanted(Struct, frozen=True):
    """The peers of one family that are reached by one path ("tunnel" or "direct").

    ``peers`` is a table of peers, without MACs where they have to be learned from the underlay.
    Where ``ways`` has any, of them those whose byte there is ``way``.
    """

    place: Place
    path: str
    peers: Table
    ways: bytes = b""
    way: int = 0

    @property
    def key(self) -> tuple[int, str, str]:
        """What is probed together."""
        return self.place.family, self.path, self.place.device


def table_of(claims: Claims, *, with_macs: bool = True) -> Table:
    """Return accepted leases as a table of peers."""
    table = Table("peer")
    if count := len(claims):
        macs = claims.macs if with_macs else memoryview(bytes(6 * count)).cast("B", (count, 6))
        table.extend_peers(0, claims.subnets, claims.lengths, macs, claims.endpoints)
    return table


def wanted_of(states: Mapping[int, Written], reader: LinkReader, vni: int) -> list[Wanted]:
    """Return what is to be probed of a data plane that has written ``states``, by what the kernel
    says of its devices. ``vni`` is the network's. Raises KernelError."""
    return [one for state in states.values() for one in _of_family(state, reader, vni)]


def _of_family(state: Written, reader: LinkReader, vni: int) -> Iterator[Wanted]:
    ways = state.paths.ways
    source = _own_address(state, reader)
    if not source:
        return  # no peer could send anything back
    if state.index and (not ways or _TUNNEL in ways):
        place = tunnel_place(
            reader, state.index, state.number, source, vni, state.uplink, state.local
        )
        if place is not None:
            yield Wanted(place, "tunnel", table_of(state.peers), ways, _TUNNEL)
    if (not state.index or _DIRECT in ways) and len(state.peers):
        link = reader.link(state.uplink)
        answer = reader.route_to(state.peers.endpoint(0)) if link else None
        if link and answer and answer.prefsrc:
            place = Place(
                state.number,
                link.name,
                link.index,
                link.mac,
                link.mtu,
                source,
                answer.prefsrc,
                lower=link.index,
            )
            table = table_of(state.peers, with_macs=False)
            yield Wanted(place, "direct", table, ways if state.index else b"", _DIRECT)


def _own_address(state: Written, reader: LinkReader) -> str:
    """Return this node's address in the overlay: its vxlan device's, or one of its own subnet."""
    if state.index:
        for one in reader.addresses(state.index, state.number):
            if one.scope != SCOPE_LINK:
                return one.address
        return ""
    from flannel_dp._core import prefix_holds

    for one in reader.addresses(None, state.number):
        if one.scope != SCOPE_LINK and prefix_holds(state.subnet, one.address):
            return one.address
    return ""


def tunnel_place(
    reader: LinkReader,
    device: int | str,
    family: int,
    source: str,
    vni: int = 0,
    uplink: int = 0,
    local: str = "",
) -> Place | None:
    """Return where probes leave by a vxlan device, None where there is none. ``vni``, ``uplink``
    and ``local`` are those of a device in collect-metadata mode, which has none itself."""
    link = reader.link(device)
    if link is None or link.vxlan is None:
        return None
    info = link.vxlan
    return Place(
        family,
        link.name,
        link.index,
        link.mac,
        link.mtu,
        source,
        info.local or local,
        info.vni or vni,
        info.port,
        info.collect_metadata,
        info.lower or uplink,
    )


def wanted_from(peers: Iterable[tuple[str, str, str]], reader: LinkReader) -> list[Wanted]:
    """Return what is to be probed of a list of (address, MAC, device): the peer's address in the
    overlay and the MAC that frames to it have, as ``ip neigh`` shows them, and the device.

    Raises ConfigError for a device that is missing or has no address of that family, and for what
    is no address or MAC.
    """
    tables: dict[tuple[str, int], Table] = {}
    for given in peers:
        address, mac, device = _checked(given)
        family = 6 if ":" in address else 4
        table = tables.setdefault((device, family), Table("peer"))
        table.add((f"{address}/{32 if family == 4 else 128}", address, mac))
    found = []
    for (device, family), table in tables.items():
        place = _place_of(reader, device, family)
        found.append(Wanted(place, "tunnel" if place.is_tunnel else "direct", table))
    return found


def _checked(given: tuple[str, str, str]) -> tuple[str, str, str]:
    try:
        address, mac, device = given
        raw(address)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"this is no peer: {given!r}: {error}",
            hint="give (address, MAC, device) for each, as 'ip neigh' shows them",
        ) from error
    return address, mac, device


def _place_of(reader: LinkReader, device: str, family: int) -> Place:
    link = reader.link(device)
    if link is None:
        raise ConfigError(
            f"there is no device {device!r}", hint="'ip link' shows those that there are"
        )
    found = (one for one in reader.addresses(link.index, family) if one.scope != SCOPE_LINK)
    address = next(found, None)
    if address is None:
        raise ConfigError(
            f"{device} has no IPv{family} address that peers could send packets back to",
            hint=f"ip address add ADDRESS dev {device}",
        )
    place = tunnel_place(reader, link.index, family, address.address)
    if place is not None and place.external:
        raise ConfigError(
            f"{device} is in collect-metadata mode: a MAC alone does not say where a peer is",
            hint="give the DataPlane in place of a list",
        )
    return place or Place(
        family,
        link.name,
        link.index,
        link.mac,
        link.mtu,
        address.address,
        address.address,
        lower=link.index,
    )
