"""Decide which lease is this node's, from evidence.

All functions are pure: what was read from the kernel, from files and from the leases is handed
in as values, and nothing is read here. A wrong answer cuts the node off, or makes it another
node, so that what worked until now outweighs what a route look-up or another node says.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from flannel_dp.errors import LeaseRejected, SourceError


class Claim(Struct, frozen=True):
    """What one lease says of one family. ``mac`` is "" where it has none, ``fault`` says why
    the lease cannot be this node's, "" where it can. ``number`` is its place in the list."""

    number: int
    name: str
    subnet: str
    endpoint: str
    mac: str = ""
    revision: int = 0
    fault: str = ""

    @property
    def is_keyed(self) -> bool:
        """Whether it goes by its subnets, as in etcd, so that its name is no node's."""
        return self.subnet.replace("/", "-") in self.name.split("&")

    def __str__(self) -> str:
        if self.name == self.subnet.replace("/", "-"):
            return f"lease {self.name} (public address {self.endpoint})"
        return f"lease {self.name} ({self.subnet}, public address {self.endpoint})"


class Evidence(Struct, frozen=True):
    """What is known of this node in one family before any lease is read.

    ``public`` are the addresses that the flags or the interface in use name, the best first,
    and ``addresses`` all others of this node, too. ``given`` is the subnet of ``--subnet``, or
    the one that joining the cluster returned; ``name`` that of this node's Kubernetes node
    object; ``remembered`` the subnet of subnet.env, which is the file ``file``. ``device`` is our
    device that is there, with its MAC and its overlay addresses. ``duplicates`` are addresses that
    another host has, too. "" or () is: not known.
    """

    public: tuple[str, ...]
    addresses: tuple[str, ...] = ()
    given: str = ""
    name: str = ""
    remembered: str = ""
    file: str = ""
    device: str = ""
    mac: str = ""
    overlay: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()

    def holds(self, claim: Claim) -> bool:
        """Return whether the claim was published with an address of this node."""
        return claim.endpoint in self.public or claim.endpoint in self.addresses

    def device_agrees(self, claim: Claim) -> bool:
        """Return whether our device has the first address of the claim's subnet."""
        return claim.subnet.partition("/")[0] in self.overlay


class Verdict(Struct, frozen=True):
    """Who this node is in one family. ``own`` is its lease, None where it has none that can
    be used; ``subnet`` is "" where nothing says it; ``said_by`` names what decided."""

    own: Claim | None
    subnet: str
    public_ip: str
    said_by: str = ""
    warnings: tuple[str, ...] = ()


_CHOOSE = (
    "name this node's subnet with --subnet, its lease with --node-name, or the interface or "
    "address that distinguishes its lease from the others with --iface, --public-ip or "
    "--public-ipv6"
)


def decide(evidence: Evidence, claims: Iterable[Claim]) -> Verdict:
    """Decide which of ``claims`` is this node's lease.

    What agrees with the strongest evidence is: the subnet that was given, the node's name,
    subnet.env, the device. A claim with an address of this node that does not agree is
    another node's, whatever its name and revision. Without evidence the one claim with this
    node's public address is its lease. ``claims`` are those with an address of this node, with
    a subnet that the evidence names, or with its name.

    Raises SourceError, which names them, where several claims could be this node's, where
    leases and evidence contradict each other so that neither can be followed, and where this
    node's lease was published with an address that is not on this node; LeaseRejected where the
    only one cannot be used and nothing else says which subnet is this node's.
    """
    listed = [*claims]
    here = [claim for claim in listed if evidence.holds(claim)]
    sound = [claim for claim in here if not claim.fault]
    if evidence.given:
        agreeing = [claim for claim in sound if claim.subnet == evidence.given]
        by = "--subnet or joining the cluster"
        return _settled(evidence, agreeing, listed, evidence.given, by)
    named = [claim for claim in listed if evidence.name and claim.name == evidence.name]
    if named:
        return _by_name(evidence, named, listed)
    agreeing = [c for c in sound if evidence.remembered and c.subnet == evidence.remembered]
    if agreeing:
        return _settled(evidence, agreeing, listed, evidence.remembered, _file(evidence))
    agreeing = [c for c in sound if evidence.device_agrees(c)]
    if not agreeing and evidence.mac:
        agreeing = [c for c in sound if c.mac == evidence.mac]
    if len({claim.subnet for claim in agreeing}) == 1:
        _check_renumbered(evidence, agreeing[0])
        by = f"device {evidence.device}"
        return _settled(evidence, agreeing, listed, agreeing[0].subnet, by)
    for claim in listed:
        same = claim.subnet == evidence.remembered or evidence.device_agrees(claim)
        if same and evidence.mac and claim.mac == evidence.mac and not claim.fault:
            _check_published_here(evidence, claim, f"device {evidence.device}")
    if evidence.remembered:
        return _remembered(evidence, listed, sound)
    return _by_address(evidence, listed, here)


def _check_renumbered(evidence: Evidence, claim: Claim) -> None:
    """Raise where subnet.env and the address of the device agree, and this node's lease, by the MAC
    of the device, has another subnet: the pods that run have addresses of the former one."""
    subnet = evidence.remembered
    if subnet in ("", claim.subnet) or subnet.partition("/")[0] not in evidence.overlay:
        return
    raise SourceError(
        f"this node is {subnet} by {_file(evidence)} and the address of device {evidence.device}, "
        f"but {claim} has its public address and the MAC of that device",
        hint=f"if the node was renumbered say --subnet {claim.subnet} once, and recreate its pods; "
        f"else publish its lease with {subnet}",
    )


def _by_name(evidence: Evidence, named: list[Claim], listed: list[Claim]) -> Verdict:
    """Decide by name: the lease of this node's name is its own; all others are other nodes'."""
    for claim in named:
        if not claim.fault:
            by = f"node {evidence.name}"
            _check_published_here(evidence, claim, by)
            return _settled(evidence, [claim], listed, claim.subnet, by)
    if evidence.remembered:
        return _settled(evidence, [], listed, evidence.remembered, _file(evidence))
    raise _unusable(named[0])


def _remembered(evidence: Evidence, listed: list[Claim], sound: list[Claim]) -> Verdict:
    """Decide by subnet.env, which no lease agrees with."""
    subnet, file = evidence.remembered, _file(evidence)
    theirs = [c for c in listed if c.subnet == subnet and not evidence.holds(c) and not c.fault]
    against: list[str] = []
    if sound:
        verb = "has an address" if len(sound) == 1 else "have addresses"
        against.append(f"{_listed(sound)} {verb} of this node")
    if theirs:
        against.append(
            f"{_listed(theirs)} was published with an address that is not this node's "
            f"({', '.join(evidence.public)})"
        )
    if evidence.overlay and subnet.partition("/")[0] not in evidence.overlay:
        against.append(f"device {evidence.device} has {', '.join(evidence.overlay)}")
    if against:
        raise SourceError(
            f"this node is {subnet} by {file}, but {', and '.join(against)}",
            hint=f"if the file is stale remove it, if the address has changed publish the lease "
            f"with the new one; {_CHOOSE}",
        )
    return _settled(evidence, [], listed, subnet, file)


def _by_address(evidence: Evidence, listed: list[Claim], here: list[Claim]) -> Verdict:
    """Decide by the public address: there is no other evidence."""
    sound = [claim for claim in here if not claim.fault]
    reached = [claim for claim in sound if claim.endpoint in evidence.public]
    with_mac = [claim for claim in reached if claim.mac]
    if len(with_mac) == 1:  # no node can use a tunnel to one without
        reached = with_mac
    if reached and evidence.overlay:
        raise SourceError(
            f"device {evidence.device} has {', '.join(evidence.overlay)}, MAC {evidence.mac}, and "
            f"{_listed(reached)} has this node's address, but another subnet and another MAC",
            hint=f"{_CHOOSE}; 'flannel-dp clean' removes a device that is stale",
        )
    if len(reached) > 1:
        raise SourceError(
            f"{len(reached)} leases were published with this node's public address, and nothing "
            f"tells which one is its own: {_listed(reached)}",
            hint=_CHOOSE,
        )
    if evidence.name and any(not claim.is_keyed for claim in reached):
        raise SourceError(
            f"no lease is named {evidence.name}, which is this node's name, but "
            f"{_listed(reached)} has its address",
            hint="correct --node-name or NODE_NAME, or name this node's subnet with --subnet",
        )
    if reached:
        return _settled(evidence, reached, listed, reached[0].subnet, str(reached[0]))
    if sound:
        raise SourceError(
            f"no lease was published with {evidence.public[0]}, the public address of this node, "
            f"but {_listed(sound)} has another of its addresses",
            hint="name the interface or the address that it was published with: --iface, "
            "--public-ip or --public-ipv6",
        )
    faulty = [claim for claim in here if claim.endpoint in evidence.public]
    if faulty:
        raise _unusable(faulty[0])
    for claim in listed:
        if claim.endpoint in evidence.duplicates and not claim.fault:
            _check_published_here(evidence, claim, "its address")
    return Verdict(None, "", evidence.public[0])


def _unusable(claim: Claim) -> LeaseRejected:
    return LeaseRejected(
        f"the lease of this node, {claim.name}, cannot be used: {claim.fault}",
        reason="own-lease",
        hint="correct what this node published, or the network configuration",
    )


def _settled(
    evidence: Evidence, agreeing: list[Claim], listed: list[Claim], subnet: str, by: str
) -> Verdict:
    """Return the verdict for ``subnet``, as ``by`` says; the lease is the best of those that
    agree."""
    own = min(agreeing, key=lambda claim: _rank(evidence, claim)) if agreeing else None
    public = evidence.public[0]
    warnings: list[str] = []
    for claim in listed:
        what = "an address" if evidence.holds(claim) else "the subnet"
        if claim is not own and (evidence.holds(claim) or claim.subnet == subnet):
            warnings.append(
                f"{claim} has {what} of this node, which is {subnet} by {by}: it is rejected"
            )
    if own and evidence.holds(own):
        public = own.endpoint
    if own and evidence.remembered not in ("", subnet):
        warnings.append(f"this node is {subnet} by {by}, no longer {evidence.remembered}")
    if own and not own.is_keyed and evidence.name not in ("", own.name):
        warnings.append(f"{own} is this node's by {by}, but no lease is named {evidence.name}")
    return Verdict(own, subnet, public, by, tuple(warnings))


def _rank(evidence: Evidence, claim: Claim) -> tuple[object, ...]:
    """Of claims to one subnet: our MAC before others, the preferred address, then the order in
    which claims win."""
    reached = claim.endpoint in evidence.public
    place = evidence.public.index(claim.endpoint) if reached else len(evidence.public)
    return (claim.mac != evidence.mac, place, claim.revision, claim.name, claim.mac)


def _check_published_here(evidence: Evidence, claim: Claim, by: str) -> None:
    """Others send to the address that a lease names; a tunnel from another one is no use."""
    if evidence.holds(claim):
        return
    what = "is not an address of this node"
    if claim.endpoint in evidence.duplicates:
        what = "is another host's, too: duplicate address detection failed"
    raise SourceError(
        f"{claim} is this node's by {by}, but {claim.endpoint} {what} "
        f"(it has {', '.join(evidence.public)})",
        hint="publish a lease with the new address, give the node its address back, or say "
        "--public-ip or --public-ipv6 with --behind-nat if it is translated to this node",
    )


def _file(evidence: Evidence) -> str:
    return evidence.file or "subnet.env"


def _listed(claims: list[Claim]) -> str:
    return ", ".join(map(str, claims))
