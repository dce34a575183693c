"""Which firewall rules a node wants, said once for nftables and iptables. Pure: nothing is run.

The rules are flannel's (``pkg/trafficmngr/iptables``, function ``masqRules``), with the
iptables semantics for both engines. What flannel merely leaves alone (RETURN) is settled
here instead, so that a masquerade rule of another program that comes later cannot hide a
pod's address: iptables accepts, nftables translates the source to itself, which is what
the kernel does for a connection that no rule translates (``nf_nat_alloc_null_binding``).
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from ipaddress import ip_network
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from msgspec import Struct, field
from msgspec.structs import force_setattr

from flannel_dp.errors import ConfigError

Verdict: TypeAlias = Literal["leave", "keep", "masquerade", "accept", "drop"]
"""``leave``: our other rules are skipped and others decide. ``keep``: the source stays as it
is, whatever others say. ``accept`` and ``drop`` are for packets, the rest for sources."""

KUBE_MARK = 0x4000
"""kube-proxy marks what it will masquerade itself (``--iptables-masquerade-bit`` 14)."""

MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}
"""RFC 5771 and RFC 4291 section 2.7."""

H = TypeVar("H", bound=Hashable)

_SIZE = {4: 4, 6: 16}
AF = {4: socket.AF_INET, 6: socket.AF_INET6}


class Except(NamedTuple):
    """Every address but those of ``cidr``."""

    cidr: str


class Rule(Struct, frozen=True):
    """One rule: what it matches (``None`` is anything), what happens, and why.

    ``source`` and ``destination`` are CIDRs or ``Except(cidr)``, ``marked`` asks for
    kube-proxy's mark, ``port`` for UDP to that port, ``strangers`` for a source that is
    not in the set of peers.
    """

    verdict: Verdict
    why: str
    source: str | Except | None = None
    destination: str | Except | None = None
    marked: bool = False
    port: int | None = None
    strangers: bool = False


class FamilyRules(Struct, frozen=True):
    """One family's networks: the whole pod network and this node's own part (CIDRs).

    Raises ConfigError for what is no network.
    """

    network: str
    subnet: str

    def __post_init__(self) -> None:
        for name in ("network", "subnet"):
            text = getattr(self, name)
            try:
                # In the one spelling that the tools print, so that it can be compared.
                force_setattr(self, name, str(ip_network(text)))
            except ValueError as error:
                raise ConfigError(
                    f"firewall rules: {name} {text!r}: {error}",
                    hint="give a CIDR without host bits, such as 10.244.0.0/16",
                ) from error


class Underlay(NamedTuple):
    """The tunnel's way in: its UDP port, and who may use it.

    ``peers`` are addresses, as text or packed in one buffer (4 or 16 bytes each, such as
    ``Claims.endpoints``); ``None`` guards nothing, an empty one accepts no peer.
    """

    port: int
    peers: Any = None


class RulesWanted(Struct, frozen=True, kw_only=True):
    """Everything a node wants of its firewall, by family (4, 6).

    ``ip_masq`` masquerades what leaves the pod network. ``keep_sources`` shields traffic
    within it from the masquerade rules of other programs, also without ``ip_masq``. ``forward``
    accepts forwarded pod traffic. ``underlay`` names the tunnel's port: iptables lets it
    in first, and where it has peers all others are dropped. ``random_fully`` chooses source
    ports at random where the tools can. ``mark`` is a part of the names of tables and chains
    (``mark_of``). Raises ConfigError, naming the value, for networks
    of the wrong family and for ports that are none.
    """

    families: Mapping[int, FamilyRules] = field(default_factory=dict)
    ip_masq: bool = False
    keep_sources: bool = True
    forward: bool = True
    underlay: Mapping[int, Underlay] = field(default_factory=dict)
    random_fully: bool = True
    mark: str = ""

    def __post_init__(self) -> None:
        for family, rules in self.families.items():
            for text in (rules.network, rules.subnet):
                if ip_network(text).version != family:
                    raise ConfigError(
                        f"firewall rules: {text} is not IPv{family}",
                        hint="give each family its own networks",
                    )
        for family, (port, _) in self.underlay.items():
            if family not in _SIZE or not 0 < port < 65536:
                raise ConfigError(
                    f"firewall rules: UDP port {port} of IPv{family}", hint="use 1 to 65535"
                )

    @property
    def guarded(self) -> tuple[int, ...]:
        """The families whose underlay port is open to peers only."""
        return tuple(
            family for family, underlay in self.underlay.items() if underlay.peers is not None
        )

    def postrouting(self, family: int) -> tuple[Rule, ...]:
        """Return what happens to the source addresses of one family, in order; first match wins."""
        rules = self.families.get(family)
        if rules is None:
            return ()
        network, own = rules.network, rules.subnet
        kept = (
            Rule("leave", "kube-proxy masquerades what it marked", marked=True),
            # Nothing of it enters the overlay, and a hairpin (a pod that calls itself by a
            # published port) needs the masquerade rule that Docker or kube-proxy has for it.
            Rule("leave", "traffic on this node", own, own),
            Rule("keep", "pod to overlay keeps its source", own, network),
            Rule("keep", "overlay to local pod keeps its source", network, own),
        )
        if not self.ip_masq:
            return kept if self.keep_sources else ()
        outside = Rule(
            "masquerade", "pod to outside", source=network, destination=Except(MULTICAST[family])
        )
        return (
            *kept,
            Rule("keep", "outside to local pod keeps its source", Except(network), own),
            outside,
            Rule("masquerade", "host or outside to remote pod", Except(network), network),
        )

    def forwarding(self, family: int) -> tuple[Rule, ...]:
        """Return which forwarded packets of one family are accepted (flannel: ``forwardRules``)."""
        rules = self.families.get(family)
        if rules is None or not self.forward:
            return ()
        return (
            Rule("accept", "from pods", source=rules.network),
            Rule("accept", "to pods", destination=rules.network),
        )

    def welcome(self, family: int) -> tuple[Rule, ...]:
        """Return which incoming packets of an underlay family are accepted: the tunnel's."""
        underlay = self.underlay.get(family)
        return (Rule("accept", "tunnel", port=underlay.port),) if underlay else ()

    def guard(self, family: int) -> tuple[Rule, ...]:
        """Return which incoming packets of an underlay family are dropped: those of no peer."""
        if family not in self.guarded:
            return ()
        port = self.underlay[family].port
        return (Rule("drop", "tunnel, not from a peer", port=port, strangers=True),)

    def peers(self, family: int) -> frozenset[bytes]:
        """Return the peers of a guarded family, packed. Raises ConfigError for what is no
        address."""
        return pack_addresses(self.underlay[family].peers, family)


def pack_addresses(addresses: Any, family: int) -> frozenset[bytes]:
    """Addresses, as text or packed in one buffer, as a set of packed ones.

    Raises ConfigError, naming it, for an address of another family or of none, and for a
    buffer that is not whole.
    """
    return frozenset(_packed(addresses, family))


def _packed(addresses: Any, family: int) -> Iterator[bytes]:
    try:
        data = bytes(memoryview(addresses))
    except TypeError:
        data = None
    if data is not None:
        yield from _chunks(data, family)
        return
    for address in addresses:
        try:
            yield socket.inet_pton(AF[family], address)
        except (OSError, TypeError) as error:
            raise ConfigError(
                f"peer {address!r} is not an IPv{family} address", hint="give plain addresses"
            ) from error


def _chunks(data: bytes, family: int) -> Iterator[bytes]:
    size = _SIZE[family]
    if len(data) % size:
        raise ConfigError(
            f"{len(data)} bytes of peers are no whole number of IPv{family} addresses",
            hint=f"give {size} bytes for each",
        )
    for start in range(0, len(data), size):
        yield data[start : start + size]


def without(rules: Iterable[H], others: Iterable[H]) -> list[H]:
    """Return the rules that ``others`` lacks, in order. A rule that is there twice and in
    ``others`` once is returned once."""
    left = Counter(others)
    found = []
    for rule in rules:
        left[rule] -= 1
        if left[rule] < 0:
            found.append(rule)
    return found
