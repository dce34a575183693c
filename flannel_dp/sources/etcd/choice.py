"""Which subnets a node may take: those of the configuration that no node has."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from ipaddress import ip_address, ip_network
from random import Random

from msgspec import Struct

from flannel_dp.cluster.lease import parse_subnet_key, printable, subnet_key
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import LeaseRejected, Unavailable

_BITS = {4: 32, 6: 128}
_NAME = {4: "", 6: "IPv6"}

Subnets = Mapping[int, str]
"""Prefixes by family (4, 6)."""

NO_SUBNETS: Subnets = {}


class _SubnetRange(Struct, frozen=True):
    """The subnets one family has: all addresses from ``first`` to ``last`` that are a
    multiple of ``size``."""

    family: int
    network: str
    first: int
    last: int
    length: int

    @property
    def size(self) -> int:
        return 1 << (_BITS[self.family] - self.length)

    def has(self, subnet: str) -> bool:
        """flannel's isSubnetConfigCompat."""
        start, end = _span(subnet)
        return self.first <= start <= self.last and end - start + 1 == self.size


def _ranges(config: NetworkConfig) -> dict[int, _SubnetRange]:
    found = {}
    for family, network, first, last, length in (
        (4, config.network, config.subnet_min, config.subnet_max, config.subnet_len),
        (6, config.ipv6_network, config.ipv6_subnet_min, config.ipv6_subnet_max,
         config.ipv6_subnet_len),
    ):  # fmt: skip
        if network is not None:
            assert first is not None
            assert last is not None
            found[family] = _SubnetRange(family, str(network), int(first), int(last), length)
    return found


def compatible(config: NetworkConfig, subnets: Subnets) -> bool:
    """Return whether these are subnets the configuration hands out, one for each of its
    families."""
    ranges = _ranges(config)
    return ranges.keys() == subnets.keys() and all(
        ranges[family].has(subnet) for family, subnet in subnets.items()
    )


def subnets_of(name: str) -> dict[int, str]:
    """Return the subnets that a key's last part stands for, {} when it is no subnet key."""
    try:
        v4, v6 = parse_subnet_key(name)
    except LeaseRejected:
        return {}
    return {family: subnet for family, subnet in ((4, v4), (6, v6)) if subnet}


def name_of(subnets: Subnets) -> str:
    """Return the subnet key: the last part of the lease's key in etcd."""
    return subnet_key(subnets.get(4, ""), subnets.get(6, ""))


class Taken:
    """The subnets that nodes have."""

    def __init__(self, all_subnets: Iterable[Subnets]) -> None:
        self._spans: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
        for subnets in all_subnets:
            for family, subnet in subnets.items():
                self._spans[family].append(_span(subnet))
        for spans in self._spans.values():
            spans.sort()

    def add(self, subnets: Subnets) -> None:
        """Note subnets that no node can have."""
        for family, subnet in subnets.items():
            insort(self._spans[family], _span(subnet))

    def free(self, subnets: Subnets) -> bool:
        """Return whether none of these overlaps with one that a node has."""
        return not any(
            start <= end_of_mine and start_of_mine <= end
            for family, subnet in subnets.items()
            for start_of_mine, end_of_mine in [_span(subnet)]
            for start, end in self._spans[family]
        )

    def choose(
        self, config: NetworkConfig, random: Random, kept: Subnets = NO_SUBNETS
    ) -> dict[int, str]:
        """Return a free subnet of each of the configuration's families, any one as likely as
        another; that of ``kept`` where it is free and the configuration hands it out.

        Raises Unavailable when there is none.
        """
        chosen: dict[int, str] = {}
        for family, range_ in _ranges(config).items():
            had = kept.get(family, "")
            usable = had and range_.has(had) and self.free({family: had})
            chosen[family] = had if usable else self._choose(range_, random)
        return chosen

    def _choose(self, range_: _SubnetRange, random: Random) -> str:
        size, end_of_all = range_.size, range_.last + range_.size
        gaps: list[tuple[int, int]] = []  # where it begins, how many subnets fit
        at = range_.first
        for start, end in [*self._spans[range_.family], (end_of_all, end_of_all)]:
            count = (min(start, end_of_all) - at) // size
            if count > 0:
                gaps.append((at, count))
            at = max(at, -(-(end + 1) // size) * size)
        total = sum(count for _, count in gaps)
        if not total:
            name = _NAME[range_.family]
            raise Unavailable(
                f"out of subnets: all /{range_.length} of {name}Network {range_.network} are taken",
                hint=f"delete leases of nodes that are gone, or configure a larger {name}Network "
                f"or {name}SubnetLen",
            )
        number = random.randrange(total)
        for start, count in gaps:
            if number < count:
                return f"{ip_address(_packed(range_, start + number * size))}/{range_.length}"
            number -= count
        raise AssertionError("unreachable")


def _packed(range_: _SubnetRange, address: int) -> bytes:
    return address.to_bytes(_BITS[range_.family] // 8, "big")


def _span(subnet: str) -> tuple[int, int]:
    """Return the first and last address; host bits count for the first one, so that a subnet that
    has any is never one that is handed out."""
    network = ip_network(subnet, strict=False)
    if str(network) != subnet:
        return int(ip_address(subnet.partition("/")[0])), int(network.broadcast_address)
    return int(network.network_address), int(network.broadcast_address)


def shown(subnets: Subnets) -> str:
    """Subnets in a message."""
    return printable(", ".join(subnets.values()))
