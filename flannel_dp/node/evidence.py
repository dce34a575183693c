"""Gather what says who this node is, and follow what was decided from it.

The decisions themselves are pure and in :mod:`flannel_dp.node.identity`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import Claims, parse_address, prefix_holds
from flannel_dp.cluster import admission
from flannel_dp.cluster.lease import printable
from flannel_dp.cluster.network import NetworkConfig, network_of
from flannel_dp.errors import FlannelDPError, NotYet, SourceError
from flannel_dp.kernel.links import Link, LinkReader
from flannel_dp.node.choice import Choice
from flannel_dp.node.identity import Claim, Evidence, Verdict, decide
from flannel_dp.node.interface import Interface, InUse, is_link_local, is_loopback
from flannel_dp.node.placing import our_device
from flannel_dp.node.uplink import Uplink

log = logging.getLogger(__name__)


class GivenFacts(Struct, frozen=True):
    """What is known of this node without the kernel: the subnets that were ``given``, by family,
    those ``remembered`` in ``file`` (subnet.env), and the ``name`` that leases have for it."""

    config: NetworkConfig
    given: Mapping[int, str]
    remembered: Mapping[int, str]
    file: str = ""
    name: str = ""


class Deciding(Struct, frozen=True):
    """Who this node is: where it is (None where that is not known), the leases packed by family,
    the verdict of each family that has one, and why the others have none."""

    uplink: Uplink | None
    packed: Mapping[int, Claims]
    verdicts: Mapping[int, Verdict]
    errors: dict[int, FlannelDPError]


def previous_subnets(path: str, config: NetworkConfig) -> dict[int, str]:
    """Return this node's subnets by family as the subnet.env at ``path`` remembers them.

    A file that cannot be read remembers nothing; a log line says why.
    """
    from flannel_dp.cluster import subnet_env

    try:
        return subnet_env.previous_subnets(path, config)
    except FlannelDPError as error:
        log.warning("%(file)s cannot be read: %(error)s", {"file": path, "error": error})
        return {}


def public_addresses(uplink: Uplink, number: int) -> tuple[str, ...]:
    """Return the addresses other nodes may reach this one at. NotYet when there is none, or none
    that is surely this node's."""
    if number in uplink.doubtful:
        raise uplink.doubtful[number]
    return _addresses(uplink, number)


def _addresses(uplink: Uplink, number: int) -> tuple[str, ...]:
    if number in uplink.missing:
        raise uplink.missing[number]
    if not uplink.public[number]:
        raise NotYet(
            f"{uplink.link.name} has no IPv{number} address that could be the public one",
            hint=f"add one, name another --iface, or switch IPv{number} off in the "
            "network configuration",
        )
    return uplink.public[number]


def decide_all(
    known: GivenFacts,
    reader: LinkReader,
    uplink: Uplink,
    packed: Mapping[int, Claims],
    errors: dict[int, FlannelDPError],
) -> dict[int, Verdict]:
    """Decide which lease is this node's, for each family; why not goes into ``errors``.

    A lease of both families is one node's: where one family cannot say, the lease of the other
    one does, and two families that are two nodes are an error of both.
    """
    verdicts: dict[int, Verdict] = {}
    for number in packed:
        try:
            verdicts[number] = _decide(known, reader, uplink, packed, number)
        except FlannelDPError as error:
            errors[number] = error
    for number in packed:
        unknown = number not in verdicts or not verdicts[number].subnet
        name = _name_in_other(verdicts, packed, number) if unknown else ""
        if name and number not in known.remembered:
            try:
                named = replace(known, name=name)
                verdicts[number] = _decide(named, reader, uplink, packed, number)
                errors.pop(number, None)
            except FlannelDPError as error:
                verdicts.pop(number, None)
                errors.setdefault(number, error)
    _check_one_node(verdicts, packed, known, errors)
    return verdicts


def _decide(
    known: GivenFacts,
    reader: LinkReader,
    uplink: Uplink,
    packed: Mapping[int, Claims],
    number: int,
) -> Verdict:
    claims = packed[number]
    evidence = evidence_of(known, reader, uplink, number)
    lengths = claims.lengths_in_use() if evidence.overlay else ()
    subnets = [evidence.given, evidence.remembered]
    subnets += [f"{one}/{length}" for one in evidence.overlay for length in lengths]
    about = claims_about(
        claims,
        network_of(known.config, number),
        dict.fromkeys((*evidence.public, *evidence.addresses, *evidence.duplicates)),
        filter(None, subnets),
        known.name,
        admission.pod_range(known.config, number),
    )
    verdict = decide(evidence, about)
    if number in uplink.doubtful and not (verdict.own and evidence.holds(verdict.own)):
        raise uplink.doubtful[number]
    return verdict


def _name_in_other(verdicts: Mapping[int, Verdict], packed: Mapping[int, Claims], n: int) -> str:
    """Return the name of this node's lease in another family, where it is a lease of family ``n``,
    too."""
    for other, verdict in verdicts.items():
        if verdict.own:
            name = packed[other].name(verdict.own.number)
            if packed[n].find_name(name) >= 0:
                return name
    return ""


def _check_one_node(
    verdicts: dict[int, Verdict],
    packed: Mapping[int, Claims],
    known: GivenFacts,
    errors: dict[int, FlannelDPError],
) -> None:
    """Drop the verdicts of families that are different nodes by the leases."""
    for number, verdict in [*verdicts.items()]:
        for other, against in [*verdicts.items()]:
            if other == number or verdict.own is None or other in known.given:
                continue
            claims = packed[other]
            place = claims.find_name(packed[number].name(verdict.own.number))
            if place < 0 or claims.subnet(place) == against.subnet:
                continue
            if admission.fault(claims, place, network_of(known.config, other)):
                continue
            error = SourceError(
                f"this node is {verdict.own} by {verdict.said_by}, which has "
                f"{claims.subnet(place)} for IPv{other}, but by {against.said_by} "
                f"it is {against.subnet}",
                hint="if subnet.env is stale remove it; name this node's subnets with --subnet, "
                "or its lease with --node-name",
            )
            for each in {other, number} - {*known.given}:
                errors[each] = error
                verdicts.pop(each, None)


def evidence_of(known: GivenFacts, reader: LinkReader, uplink: Uplink, number: int) -> Evidence:
    device = our_device(reader, known.config, number)
    return Evidence(
        _addresses(uplink, number),
        uplink.addresses[number],
        known.given.get(number, ""),
        known.name,
        known.remembered.get(number, ""),
        known.file,
        device.name if device else "",
        device.mac if device else "",
        _overlay_addresses(known.config, reader, device, number) if device else (),
        uplink.duplicates if number == 6 else (),
    )


def _overlay_addresses(
    config: NetworkConfig, reader: LinkReader, device: Link, number: int
) -> tuple[str, ...]:
    """Return the addresses of our device inside the network."""
    network = network_of(config, number)
    found = (one.address for one in reader.addresses(device.index, number))
    return tuple(address for address in found if prefix_holds(network, address))


def place_by_leases(
    reader: LinkReader,
    uplink: Uplink,
    verdicts: Mapping[int, Verdict],
    choice: Choice,
    given: Mapping[int, str],
    errors: dict[int, FlannelDPError],
) -> tuple[dict[int, Verdict], tuple[InUse, ...]]:
    """Return the verdicts, and where this node's leases say that it has to be instead.

    A lease that was published with an address of another interface takes the node there, unless
    a flag chose. Where one did, the address is the flag's if the subnet was ``given``; else
    neither can be followed, and why goes into ``errors``.
    """
    followed: dict[int, Verdict] = {}
    said: list[InUse] = []
    for number, verdict in verdicts.items():
        followed[number] = verdict
        address, public = verdict.public_ip, uplink.public[number]
        if verdict.own is None or address in public or address not in uplink.holders:
            continue
        if choice.is_open:
            said.append(InUse(number, _interface_of(reader, uplink, address), address))
        elif number in given:
            text = f"{verdict.own} is this node's, which has {public[0]} by its flags: publish it"
            warnings = (*verdict.warnings, text)
            followed[number] = replace(verdict, public_ip=public[0], warnings=warnings)
        else:
            del followed[number]
            errors[number] = SourceError(
                f"{verdict.own} is this node's by {verdict.said_by}, but the flags choose "
                f"{public[0]} of {uplink.link.name}",
                hint="publish a lease with that address, or name the one of the lease with "
                "--iface, --public-ip or --public-ipv6",
            )
    return followed, tuple(said)


def said_by_leases(
    known: GivenFacts, reader: LinkReader, packed: Mapping[int, Claims]
) -> tuple[InUse, ...]:
    """Return where the leases say that this node is, for families where one address of it is in
    one lease that agrees with what else is known, or in the only one."""
    said: list[InUse] = []
    for number, claims in packed.items():
        addresses = {
            one.address: one.index
            for one in reader.addresses(family=number)
            if not (is_loopback(one) or is_link_local(one) or _is_on_tunnel(reader, one.index))
        }
        about = claims_about(claims, network_of(known.config, number), addresses, (), known.name)
        about = tuple(one for one in about if one.endpoint in addresses and not one.fault)
        subnets = (known.given.get(number), known.remembered.get(number))
        agreeing = [one for one in about if one.subnet in subnets or one.name == known.name]
        at = {one.endpoint for one in agreeing or about}
        if len(at) == 1:
            address = at.pop()
            said.append(InUse(number, addresses[address], address))
    return tuple(said)


def _is_on_tunnel(reader: LinkReader, index: int) -> bool:
    link = reader.link(index)
    return link is None or Interface(link.index, link.name, link.kind, link.mac).is_tunnel


def _interface_of(reader: LinkReader, uplink: Uplink, address: str) -> int:
    """Return the interface with the address; the uplink where it is on the loopback or on a
    tunnel."""
    link = reader.link(uplink.holders[address])
    if link is None:
        return uplink.link.index
    found = Interface(link.index, link.name, link.kind, link.mac)
    return uplink.link.index if found.is_tunnel or found.is_local else link.index


def claims_about(
    claims: Claims,
    network: str,
    addresses: Iterable[str],
    subnets: Iterable[str],
    name: str = "",
    pods: tuple[str, str] | None = None,
) -> tuple[Claim, ...]:
    """Return the claims that say something about this node: with one of ``addresses``, to one of
    ``subnets``, or by ``name``; what cannot be this node's lease with its fault."""
    numbers: dict[int, None] = {}
    for address in addresses:
        numbers |= dict.fromkeys(claims.find_endpoint(parse_address(address)[1]))
    numbers |= dict.fromkeys(claims.find_subnet(subnet) for subnet in subnets)
    if name:
        numbers[claims.find_name(name)] = None
    numbers.pop(-1, None)
    return tuple(_claim(claims, number, network, pods) for number in numbers)


def _claim(claims: Claims, number: int, network: str, pods: tuple[str, str] | None) -> Claim:
    mac = claims.mac(number)
    return Claim(
        number,
        printable(claims.name(number)),
        claims.subnet(number),
        claims.endpoint(number),
        "" if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00" else mac,
        claims.revision(number),
        admission.fault(claims, number, network, pods),
    )
