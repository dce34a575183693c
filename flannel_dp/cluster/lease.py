"""A lease, and the forms flannel gives to one: attributes, subnet key, annotations.

The forms are those of flannel's pkg/lease (the value of an etcd key),
pkg/subnet (the last part of that key) and pkg/subnet/kube (a node's
annotations).
"""

# Annotations are types here, not text: msgspec would compile and evaluate the text of each.

import re
from collections.abc import Iterable
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Annotated, Literal, NamedTuple

import msgspec

from flannel_dp.errors import ConfigError, LeaseRejected

ANNOTATION_PREFIX = "flannel.alpha.coreos.com"
"""flannel's default prefix of node annotations (--kube-annotation-prefix)."""

U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
I63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class BackendData(
    msgspec.Struct,
    frozen=True,
    gc=False,
    forbid_unknown_fields=True,
    rename={"vni": "VNI", "vtep_mac": "VtepMAC"},
):
    """What a vxlan node publishes about one overlay device.

    ``vni`` is 0 when it is not stated (nodes of old flannel versions publish
    the MAC alone). flannel before 0.28 publishes it through 16 bits: of a VNI above 65535
    only the low 16 bits arrive. ``vtep_mac`` is as published, not checked.
    """

    vni: U32 = 0
    vtep_mac: str = ""


class Lease(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    gc=False,
    omit_defaults=True,
    forbid_unknown_fields=True,
    rename={
        "subnet": "Subnet",
        "ipv6_subnet": "IPv6Subnet",
        "public_ip": "PublicIP",
        "public_ipv6": "PublicIPv6",
        "backend_type": "BackendType",
        "backend_data": "BackendData",
        "backend_v6_data": "BackendV6Data",
        "name": "Name",
        "revision": "CreateRevision",
        "expiration": "Expiration",
        "moved": "ModRevision",
    },
):
    """One node's claim: its subnets, where to reach it, and how.

    Everything is text as published ("10.244.7.0/24", "192.0.2.7"), and empty
    where the node has nothing of the kind. ``backend_data`` is None for
    backends other than vxlan. ``name`` is the node's name or the etcd key's
    last part, ``revision`` etcd's create_revision (0: the source has none),
    ``expiration`` an RFC 3339 time, ``moved`` etcd's mod_revision: when the node last wrote
    its lease (0: the source has none).
    """

    subnet: str = ""
    ipv6_subnet: str = ""
    public_ip: str = ""
    public_ipv6: str = ""
    backend_type: str = ""
    backend_data: BackendData | None = None
    backend_v6_data: BackendData | None = None
    name: str = ""
    revision: I63 = 0
    expiration: str = ""
    moved: I63 = 0

    @property
    def key(self) -> str:
        """flannel's subnet key: "10.5.34.0-24", "10.12.13.0-24&fd00:12:13::-56"."""
        return subnet_key(self.subnet, self.ipv6_subnet)

    @property
    def label(self) -> str:
        """What to call this claim: its name, else its key, else an address of its node."""
        return self.name or self.key or self.public_ip or self.public_ipv6

    @property
    def public_addresses(self) -> dict[int, str]:
        """The public addresses by family (4, 6) that are addresses a host can have."""
        found: dict[int, str] = {}
        for family, af, text in ((4, AF_INET, self.public_ip), (6, AF_INET6, self.public_ipv6)):
            try:
                raw = inet_pton(af, text)
            except (OSError, ValueError):
                continue
            if any(raw):
                found[family] = inet_ntop(af, raw)
        return found

    def to_json(self) -> str:
        """Return one element of our own list form; ``decode_leases`` reads it back as an equal
        value."""
        return msgspec.json.encode(self).decode()


class Identity(msgspec.Struct, frozen=True):
    """What this node publishes of itself, by family (4, 6); absent where a family is off.

    ``public`` are the addresses other nodes reach it at, ``macs`` the VTEP MACs
    (none with host-gw), ``backend`` is the lease's BackendType ("vxlan",
    "host-gw") and ``vni`` the VNI, 0 with host-gw.
    """

    public: dict[int, str]
    macs: dict[int, str]
    backend: str = "vxlan"
    vni: int = 0

    def lease(self, subnets: dict[int, str], name: str = "") -> Lease:
        """Return this node's lease of ``subnets`` (prefixes by family)."""
        data = {family: BackendData(self.vni, mac) for family, mac in self.macs.items()}
        return Lease(
            subnet=subnets.get(4, ""),
            ipv6_subnet=subnets.get(6, ""),
            public_ip=self.public.get(4, ""),
            public_ipv6=self.public.get(6, ""),
            backend_type=self.backend,
            backend_data=data.get(4),
            backend_v6_data=data.get(6),
            name=name,
        )


class BadClaim(msgspec.Struct, frozen=True):
    """A claim whose form is broken; the other claims of the document are not affected.

    ``reason`` is "bad-key" (the etcd key is no subnet key) or "bad-claim". ``subnets`` are those
    that it is for, as far as they are known without its name.
    """

    name: str
    reason: Literal["bad-claim", "bad-key"]
    detail: str
    subnets: tuple[str, ...] = ()


class LeaseList(NamedTuple):
    """All claims of one complete document, in its order."""

    leases: list[Lease]
    bad: list[BadClaim]


Leases = Iterable[Lease] | LeaseList
"""Leases that a data plane is given."""

Listed = LeaseList | list[Lease]
"""The same, where they can be read more than once."""


def split_leases(leases: Leases) -> tuple[list[Lease], list[BadClaim]]:
    """Return the leases of a good form, and the claims that have none."""
    if isinstance(leases, LeaseList):
        return leases.leases, leases.bad
    return (leases if isinstance(leases, list) else list(leases)), []


def count_leases(leases: Leases) -> int:
    """Return how many leases there are; 0 for an iterator, which counting would use up."""
    if isinstance(leases, LeaseList):
        return len(leases.leases)
    return len(leases) if isinstance(leases, list) else 0


def subnet_key(subnet: str, ipv6_subnet: str) -> str:
    """Make flannel's subnet key (MakeSubnetKey), for instance "10.5.34.0-24".

    Both families are joined by ``&``; a node with IPv6 alone, which flannel
    cannot express, has the IPv6 part alone: "fd00:10:244:7::-64".
    """
    return "&".join(part.replace("/", "-") for part in (subnet, ipv6_subnet) if part)


_KEY = re.compile(
    r"([0-9.]{7,15})-([0-9]{1,2})(?:&([0-9a-f:.]{2,45})-([0-9]{1,3}))?"
    r"|([0-9a-f:.]{2,45})-([0-9]{1,3})"
)


def parse_subnet_key(key: str) -> tuple[str, str]:
    """Read a subnet key back into (subnet, IPv6 subnet); the missing one is "".

    Rejects what flannel's ParseSubnetKey rejects, and text before the key
    too; accepts /32 and /128, which flannel's parser cannot. Host bits are kept.

    Raises LeaseRejected with reason "bad-key".
    """
    match = _KEY.fullmatch(key)
    try:
        if match is None:
            raise ValueError(key)
        v4, v4_len, v6, v6_len, only_v6, only_v6_len = match.groups()
        if v4 is None:
            return "", _canonical(AF_INET6, only_v6, only_v6_len, 128)
        subnet = _canonical(AF_INET, v4, v4_len, 32)
        return subnet, _canonical(AF_INET6, v6, v6_len, 128) if v6 else ""
    except (OSError, ValueError) as error:
        raise LeaseRejected(
            f"{printable(key)}: not a subnet key",
            reason="bad-key",
            hint="a key looks like 10.5.34.0-24 or 10.5.34.0-24&fd00:5:34::-64",
        ) from error


def _canonical(family: int, address: str, length: str, most: int) -> str:
    packed = inet_pton(family, address)
    if int(length) > most:
        raise ValueError(length)
    return f"{inet_ntop(family, packed)}/{int(length)}"


def lease_attrs_json(lease: Lease) -> bytes:
    """Return the lease's attributes exactly as flannel stores them in etcd (LeaseAttrs).

    Both public addresses are always there, "0.0.0.0" and null when the node
    has none; the rest is left out when empty.
    """
    attrs: dict[str, object] = {
        "PublicIP": lease.public_ip or "0.0.0.0",
        "PublicIPv6": lease.public_ipv6 or None,
    }
    if lease.backend_type:
        attrs["BackendType"] = lease.backend_type
    if lease.backend_data is not None:
        attrs["BackendData"] = lease.backend_data
    if lease.backend_v6_data is not None:
        attrs["BackendV6Data"] = lease.backend_v6_data
    return msgspec.json.encode(attrs)


_PREFIX = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]+-)?")


def annotation_keys_prefix(prefix: str) -> str:
    """Complete an annotation prefix as flannel does: "org.com" is "org.com/", "org.com/a"
    is "org.com/a-".

    Raises ConfigError when it is not a lower-case domain name with at most one slash.
    """
    full = prefix if "/" in prefix else f"{prefix}/"
    if not full.endswith(("/", "-")):
        full += "-"
    if not _PREFIX.fullmatch(full):
        raise ConfigError(
            f"annotation prefix {prefix!r}: not a lower-case domain name with at most one slash",
            hint=f"write it like {ANNOTATION_PREFIX}",
        )
    return full


def printable(text: str, most: int = 100) -> str:
    """Return foreign text for a message: it cannot control a terminal, and is at most
    ``most`` characters long."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."
