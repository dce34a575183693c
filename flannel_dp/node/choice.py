"""What the user says about this node: the interface, the addresses, the subnets."""

from __future__ import annotations

from msgspec import Struct, field

from flannel_dp._core import address_text, parse_address, parse_prefix
from flannel_dp.errors import ConfigError


class Choice(Struct, frozen=True):
    """What the user said about this node; the first that finds an interface decides.

    ``iface`` are names or addresses, ``regex`` patterns that an address or a name
    has to match, ``can_reach`` an address whose route leads out of the interface.
    An address that was named or matched is the one to publish, in its family.
    ``public`` maps families to the addresses that other nodes reach us at; with
    ``behind_nat`` they need not be this node's own.
    """

    iface: tuple[str, ...] = ()
    regex: tuple[str, ...] = ()
    can_reach: str = ""
    public: dict[int, str] = field(default_factory=dict)
    behind_nat: bool = False

    @property
    def is_open(self) -> bool:
        """Whether nothing was said."""
        return not (self.iface or self.regex or self.can_reach or self.public)


def canonical(address: str) -> str:
    """Return an address as the kernel prints it."""
    return address_text(parse_address(address)[1])


def is_address(text: str, family: int) -> bool:
    """Return whether a text is an address of the family, other than 0.0.0.0 and ::."""
    try:
        _, raw = parse_address(text)
    except ValueError:
        return False
    return len(raw) == (4 if family == 4 else 16) and any(raw)


def check_given(address: str, family: int) -> None:
    """Raise ConfigError for a ``--public-ip`` or ``--public-ipv6`` that no other node reaches."""
    if not is_address(address, family):
        flag = "--public-ip" if family == 4 else "--public-ipv6"
        raise ConfigError(
            f"{flag}: {address!r} is not an IPv{family} address",
            hint="give a plain address without a prefix length",
        )
    if reason := _unreachable(address):
        flag = "--public-ip" if family == 4 else "--public-ipv6"
        raise ConfigError(
            f"{flag}: {address} is {reason}: no other node reaches this one at it",
            hint="give an address of the network that the nodes have in common",
        )


def _unreachable(address: str) -> str:
    """Return why other nodes cannot send to an address, "" where they may."""
    _, raw = parse_address(address)
    if len(raw) == 4:
        return (
            "a loopback address" if raw[0] == 127 else "a multicast address" * (raw[0] >> 4 == 14)
        )
    if raw[0] == 0xFE and raw[1] & 0xC0 == 0x80:
        return "a link-local address"
    return (
        "a multicast address" if raw[0] == 0xFF else "a loopback address" * (raw[:15] == bytes(15))
    )


def read_subnets(text: str | None) -> dict[int, str]:
    """Return ``--subnet``: one prefix per family, separated by a comma; by family number.

    Raises ConfigError for a text that is no prefix.
    """
    found: dict[int, str] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        try:
            _, raw, length = parse_prefix(part.strip())
        except ValueError as error:
            raise ConfigError(f"--subnet: {error}", hint="write it like 10.244.3.0/24") from error
        address = canonical(part.strip().partition("/")[0])
        if address_text(raw) != address:
            raise ConfigError(
                f"--subnet: {part.strip()} has host bits set",
                hint=f"write {address_text(raw)}/{length}",
            )
        found[4 if len(raw) == 4 else 6] = f"{address}/{length}"
    return found
