"""Admission of claims as a model that knows only ``ipaddress``, and claims of peers that err."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from hypothesis import strategies as st

from flannel_dp.cluster.lease import Lease
from tests.lib.packed_claims import (
    NETWORK,
    OWN_ADDRESSES,
    OWN_MAC,
    OWN_SUBNET,
    UNDERLAY,
    lease,
)

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address


# ---- the model -------------------------------------------------------------------


@dataclass
class Claim:
    origin: int
    subnet: Network
    endpoint: Address
    mac: bytes
    name: bytes
    revision: int
    moved: int
    stale: bool = False
    odd: bool = False

    @property
    def priority(self) -> tuple[Any, ...]:
        subnet = self.subnet.network_address.packed, self.subnet.prefixlen
        return (
            self.odd,
            self.stale,
            self.revision,
            self.name,
            self.endpoint.packed,
            self.mac,
            subnet,
            -self.moved,
        )


def parsed(family: int, origin: int, one: Lease, need_mac: bool = True) -> Claim:
    subnet = one.subnet if family == 4 else one.ipv6_subnet
    endpoint = one.public_ip if family == 4 else one.public_ipv6
    data = one.backend_data if family == 4 else one.backend_v6_data
    assert data is not None
    mac = bytes.fromhex(data.vtep_mac.replace(":", "")) if need_mac else bytes(6)
    return Claim(
        origin,
        ip_network(subnet, strict=False),
        ip_address(endpoint),
        mac,
        one.name.encode(),
        one.revision,
        one.moved,
    )


def is_host(address: Address, rules: dict[str, Any]) -> bool:
    if isinstance(address, IPv4Address):
        if address.is_link_local:
            return bool(rules.get("link_local"))
        if address.packed[0] >= 240:
            return str(address) != "255.255.255.255"
        return 0 < address.packed[0] < 224 and address.packed[0] != 127
    return not (
        address.is_unspecified
        or address.is_loopback
        or address.is_multicast
        or address.is_link_local
        or address.ipv4_mapped
    )


def is_pods(address: Address, family: int, rules: dict[str, Any]) -> bool:
    if "pods" not in rules or address in ip_network(OWN_SUBNET[family]):
        return True
    first, last = (ip_address(text).packed for text in rules["pods"])
    return first <= address.packed <= last


def overrules(claim: Claim, route: str) -> bool:
    net: Any = ip_network(route)
    return claim.subnet.overlaps(net) and claim.subnet.prefixlen > net.prefixlen


def alone(claim: Claim, family: int, need_mac: bool, rules: dict[str, Any]) -> str:
    network: Any = ip_network(NETWORK[family])
    own = [ip_address(text) for text in OWN_ADDRESSES[family]]
    if claim.subnet == network or not claim.subnet.subnet_of(network):
        return "outside-network"
    if not is_host(claim.endpoint, rules):
        return "bad-public-ip"
    if claim.endpoint in network and is_pods(claim.endpoint, family, rules):
        return "endpoint-in-overlay"
    if claim.endpoint in own:
        return "own-public-ip"
    if str(claim.endpoint) in rules.get("no_hosts", ()):
        return "broadcast"
    if claim.subnet.overlaps(ip_network(OWN_SUBNET[family])):
        return "own-subnet"
    if any(address in claim.subnet for address in own) or any(
        claim.subnet.overlaps(ip_network(text)) for text in UNDERLAY[family]
    ):
        return "underlay"
    if any(overrules(claim, text) for text in rules.get("routes", ())):
        return "underlay"
    if need_mac and (claim.mac == bytes(6) or claim.mac[0] & 1):
        return "bad-mac"
    if need_mac and claim.mac == bytes.fromhex(OWN_MAC.replace(":", "")):
        return "own-mac"
    return "accepted"


def model(
    family: int, leases: list[Lease], need_mac: bool, **rules: Any
) -> tuple[list[Claim], dict[int, str]]:
    """The accepted claims in the order of their subnets, and a reason for each of all."""
    claims = [parsed(family, origin, one, need_mac) for origin, one in enumerate(leases)]
    reasons = {claim.origin: alone(claim, family, need_mac, rules) for claim in claims}
    if "subnet_length" in rules:
        for claim in claims:
            claim.odd = claim.subnet.prefixlen != rules["subnet_length"]
    if "pods" in rules:
        sane = [claim for claim in claims if reasons[claim.origin] == "accepted"]
        for claim in sane:
            if any(other.endpoint in claim.subnet for other in sane):
                reasons[claim.origin] = "holds-nodes"
    accepted: list[Claim] = []
    if need_mac:
        sane = [c for c in claims if reasons[c.origin] in ("accepted", "holds-nodes")]
        newest: dict[bytes, int] = {}
        for claim in sane:
            newest[claim.mac] = max(claim.revision, newest.get(claim.mac, 0))
        for claim in sane:
            claim.stale = claim.moved > 0 and max(claim.moved, claim.revision) < newest[claim.mac]
    for claim in sorted(claims, key=lambda claim: claim.priority):
        if reasons[claim.origin] != "accepted":
            continue
        if any(claim.subnet.overlaps(other.subnet) for other in accepted):
            reasons[claim.origin] = "overlap"
        elif need_mac and any(claim.mac == other.mac for other in accepted):
            reasons[claim.origin] = "duplicate-mac"
        else:
            accepted.append(claim)
    accepted.sort(key=lambda claim: (claim.subnet.network_address.packed, claim.subnet.prefixlen))
    return accepted, reasons


# ---- claims of peers that err, and of peers that mean harm -----------------------


@st.composite
def subnets(draw: st.DrawFn, family: int) -> str:
    """Mostly close together, so that they meet; also everything a node must not believe."""
    hostile = {
        4: (
            "0.0.0.0/0",
            "128.0.0.0/1",
            "0.0.0.0/1",
            "192.0.2.0/24",
            "192.0.2.3/32",
            "10.0.0.0/8",
            "10.244.0.0/16",
            "10.244.3.0/24",
            "10.244.3.128/25",
            "10.244.2.0/23",
            "10.244.128.0/17",
            "10.244.128.7/32",
            "10.244.200.9/32",
            "10.244.192.0/18",
            "10.244.201.0/24",
            "10.244.200.0/22",
            "10.244.2.0/25",
            "10.244.0.0/22",
        ),
        6: (
            "::/0",
            "8000::/1",
            "2001:db8::/64",
            "2001:db8::3/128",
            "fd00::/8",
            "fd00:10:244::/48",
            "fd00:10:244:3::/64",
            "fd00:10:244:3:8000::/65",
            "fd00:10:244:2::/63",
            "fd00:10:244:80::/57",
            "fd00:10:244:80::7/128",
            "fd00:10:244:c8::9/128",
            "fd00:10:244:c0::/58",
            "fd00:10:244:c9::/64",
            "fd00:10:244:c8::/62",
            "fd00:10:244:2::/65",
            "fd00:10:244::/62",
        ),
    }
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(hostile[family]))
    base = ip_network(NETWORK[family]).network_address.packed
    low = draw(st.integers(4, 9))
    at = 2 if family == 4 else 7
    raw = base[:at] + bytes([low]) + base[at + 1 :]
    length = draw(
        st.sampled_from(
            (22, 23, 24, 25, 28, 32) if family == 4 else (61, 62, 63, 64, 65, 72, 127, 128)
        )
    )
    return str(ip_network((raw, length), strict=False))


def endpoints(family: int) -> st.SearchStrategy[str]:
    good = st.integers(10, 14).map(lambda n: f"192.0.2.{n}" if family == 4 else f"2001:db8::{n:x}")
    hostile = {
        4: (
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.9.9.9",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
            "169.254.3.4",
            "192.0.2.0",
            "192.0.2.255",
            "192.0.2.3",
            "10.244.200.9",
            "10.244.201.9",
            "10.244.2.7",
            "10.244.4.7",
            "10.244.3.1",
        ),
        6: (
            "::",
            "::1",
            "ff02::1",
            "fe80::1",
            "febf::1",
            "::ffff:192.0.2.9",
            "2001:db8::",
            "2001:db8::3",
            "fd00:10:244:c8::9",
            "fd00:10:244:c9::9",
            "fd00:10:244:2::7",
            "fd00:10:244:4::7",
            "fd00:10:244:3::1",
        ),
    }
    return good | good | good | st.sampled_from(hostile[family])


MACS = st.sampled_from(
    (
        "02:00:00:00:00:11",
        "02:00:00:00:00:12",
        "02:00:00:00:00:13",
        "0e:ff:ff:ff:ff:ff",
        "00:00:00:00:00:00",
        "01:00:5e:00:00:01",
        "ff:ff:ff:ff:ff:ff",
        OWN_MAC,
    )
) | st.integers(0, 255).map(lambda n: f"02:00:00:00:01:{n:02x}")


def claims_of(family: int) -> st.SearchStrategy[list[Lease]]:
    names = st.sampled_from(("a", "b", "ab", "node", "\u00e9")) | st.text("abz", min_size=1)
    one = st.builds(
        lease,
        st.just(family),
        subnets(family),
        endpoints(family),
        MACS,
        names,
        st.sampled_from((0, 1, 2, 2**63 - 1)),
        moved=st.sampled_from((0, 1, 2, 3, 2**63 - 1)),
    )
    return st.lists(one, max_size=14)
