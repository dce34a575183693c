"""``flannel-dp explain --self``: who this node is in each family, and from which evidence.

The decisions are those of a sync (:mod:`flannel_dp.node.evidence`); here each piece of evidence is
listed beside what was decided. Reads, never writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from msgspec import Struct, to_builtins

from flannel_dp.cluster.lease import split_leases
from flannel_dp.cluster.network import network_of
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.look.terminal import Paint, columns, plain
from flannel_dp.node.evidence import (
    Deciding,
    claims_about,
    evidence_of,
    public_addresses,
)
from flannel_dp.node.family import kept_by
from flannel_dp.node.path_mtu import PathMtu, path_mtu
from flannel_dp.node.placing import our_device
from flannel_dp.node.view import Resolver

if TYPE_CHECKING:
    from flannel_dp.cluster.lease import Lease, Leases
    from flannel_dp.look.overlay import Overlay
    from flannel_dp.node.identity import Claim, Verdict
    from flannel_dp.node.interface import InUse
    from flannel_dp.node.uplink import Uplink


class Item(Struct, frozen=True):
    """One piece of evidence: ``source`` is a flag, a file, a device, a route or a lease, ``says``
    what is in it. ``agrees`` with what was decided; None where nothing was."""

    source: str
    says: str
    agrees: bool | None = None


class Myself(Struct, frozen=True):
    """Who this node is in one family; "" is: not known.

    ``subnet`` is its part of the network and ``public_ip`` the address that other nodes reach it
    at; ``lease`` is the name of its lease, ``interface`` the external interface, ``local`` the
    address that it sends from, and ``said_by`` the evidence that decided. ``error`` says
    why nothing was decided, with the flag that decides. ``has_leases`` is False where none were
    given, so that this node may have one. ``mtu`` is that of the paths to the peers, before the
    tunnel's overhead; 0 is: not known.
    """

    family: int
    subnet: str = ""
    public_ip: str = ""
    lease: str = ""
    interface: str = ""
    local: str = ""
    said_by: str = ""
    error: str = ""
    evidence: tuple[Item, ...] = ()
    warnings: tuple[str, ...] = ()
    has_leases: bool = False
    mtu: int = 0

    @property
    def ok(self) -> bool:
        """Whether it is known who this node is."""
        return bool(self.subnet) and not self.error

    def lines(self, paint: Paint = plain, width: int = 0) -> Iterator[str]:
        """Yield the answer line by line."""
        if self.ok:
            lease = f", lease {self.lease}" if self.lease else ", without a lease"
            text = f"{self.subnet} at {self.public_ip}{lease if self.has_leases else ''}"
            yield f"{paint(f'IPv{self.family}', 'bold')}: this node is {text}"
            yield f"  decided by: {self.said_by}"
        else:
            yield f"{paint(f'IPv{self.family}', 'bold')}: {paint('unknown', 'red')}: {self.error}"
        if self.interface:
            local = f", packets are sent from {self.local}" if self.local else ""
            mtu = f", MTU {self.mtu}" if self.mtu else ""
            yield f"  external interface: {self.interface}{local}{mtu}"
        yield "  evidence:" if self.evidence else "  evidence: none"
        words = {True: "agrees", False: "differs", None: "-"}
        rows = [(words[item.agrees], item.source, item.says) for item in self.evidence]
        yield from columns(rows, indent="    ") if rows else ()
        yield from (f"  warning: {text}" for text in self.warnings)


class SelfExplanation(Struct, frozen=True):
    """Who this node is, by family; ``str()`` of it is what the command prints."""

    families: tuple[Myself, ...]

    @property
    def ok(self) -> bool:
        """Whether that is known of every family."""
        return all(one.ok for one in self.families)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``"schema": 1``; keys are only ever added."""
        families = [to_builtins(one) | {"ok": one.ok} for one in self.families]
        return {"schema": 1, "ok": self.ok, "families": families}

    def lines(self, paint: Paint = plain, width: int = 0) -> Iterator[str]:
        """Yield the answer line by line."""
        for one in self.families:
            yield from one.lines(paint)

    def __str__(self) -> str:
        return "\n".join(self.lines())


def explain_self(overlay: Overlay, leases: Leases | None = None) -> SelfExplanation:
    """Say who this node is, and from which evidence: flags, subnet.env, the device that exists, the
    default route and, where ``leases`` are given, those that concern this node.

    What a sync would raise because of contradictions is the ``error`` of a family. Raises
    KernelError where the kernel cannot be asked.
    """
    resolver = overlay.resolver
    kept = kept_by(state.family for state in overlay.known.values())
    return call_in_netns(resolver.netns, _explain, resolver, leases, kept)


def _explain(resolver: Resolver, leases: Leases | None, kept: tuple[InUse, ...]) -> SelfExplanation:
    listed = split_leases(leases)[0] if leases is not None else []
    with resolver.links() as reader:
        try:
            made = resolver.decide(reader, listed, kept)
        except FlannelDPError as error:
            made = Deciding(None, {}, {}, dict.fromkeys(resolver.families, error))
        families = tuple(
            _FamilyWords(resolver, reader, made, number, listed, leases is not None).explain()
            for number in resolver.families
        )
    return SelfExplanation(families)


class _FamilyWords:
    """What is known of one family."""

    def __init__(
        self,
        resolver: Resolver,
        reader: LinkReader,
        made: Deciding,
        number: int,
        listed: list[Lease],
        has_leases: bool,
    ) -> None:
        self.resolver, self.reader, self.number = resolver, reader, number
        self.uplink: Uplink | None = made.uplink
        self.verdict: Verdict | None = made.verdicts.get(number)
        error = made.errors.get(number)
        self.error = str(error) if error else ""
        self.claims = made.packed.get(number) or resolver.pack(listed, number)
        self.has_leases = has_leases
        self.subnet = self.verdict.subnet if self.verdict else ""
        self.said_by = self.verdict.said_by if self.verdict else ""
        self.public_ip = self.verdict.public_ip if self.verdict and not self.error else ""

    def explain(self) -> Myself:
        path = self._path()
        if not (self.subnet or self.error):
            self._by_device()
        if not (self.subnet or self.error):
            where = (
                f"no lease was published with {self.public_ip}"
                if self.has_leases
                else (
                    "neither a flag, nor subnet.env, nor a device says which subnet is this node's"
                )
            )
            self.error = f"{where} - give --leases, --subnet, or publish this node's lease"
        own = self.verdict.own if self.verdict else None
        return Myself(
            self.number,
            "" if self.error else self.subnet,
            self.public_ip,
            own.name if own else "",
            self.uplink.link.name if self.uplink else "",
            self._local(),
            "" if self.error else self.said_by,
            self.error,
            (
                *self._flags(),
                *self._file(),
                *self._device(),
                *self._routes(),
                *([Item("path to the peers", path.said_by)] if path and path.said_by else []),
                *self._leases(own),
            ),
            self.verdict.warnings if self.verdict and not self.error else (),
            self.has_leases,
            path.mtu if path else 0,
        )

    def _path(self) -> PathMtu | None:
        """Return the MTU of the paths to the nodes that published ``claims``."""
        if self.uplink is None:
            return None
        defaults, networks = self.uplink.defaults[self.number], self.uplink.on_devices[self.number]
        statics = self.reader.static_routes(self.number)
        return path_mtu(self.uplink.link, self.claims, networks, defaults, statics)

    def _agrees(self, subnet: str) -> bool | None:
        return subnet == self.subnet if self.subnet and not self.error else None

    def _flags(self) -> Iterator[Item]:
        choice, number = self.resolver.choice, self.number
        chosen = self.uplink.link.name if self.uplink else ""
        for flag, values in (
            ("--iface", choice.iface),
            ("--iface-regex", choice.regex),
            ("--iface-can-reach", (choice.can_reach,)),
        ):
            for value in filter(None, values):
                yield Item(f"flag {flag}", value, True if chosen else None)
        if number in choice.public:
            flag = "--public-ip" if number == 4 else "--public-ipv6"
            said = choice.public[number]
            yield Item(f"flag {flag}", said, said == self.public_ip if self.public_ip else None)
        if number in self.resolver.subnets:
            said = self.resolver.subnets[number]
            yield Item("flag --subnet, or joining the cluster", said, self._agrees(said))
        if name := self.resolver.node_name:
            own = self.verdict.own if self.verdict else None
            yield Item("the node's name", name, name == own.name if own else None)

    def _file(self) -> Iterator[Item]:
        facts = self.resolver.facts()
        if said := facts.remembered.get(self.number, ""):
            yield Item(facts.file, said, self._agrees(said))

    def _device(self) -> list[Item]:
        link = our_device(self.reader, self.resolver.config, self.number)
        if link is None:
            return []
        addresses = [one.address for one in self.reader.addresses(link.index, self.number)]
        said = [*(a for a in addresses if not a.startswith("fe80:")), f"MAC {link.mac}"]
        agrees = self.subnet.partition("/")[0] in addresses
        if link.vxlan and link.vxlan.local:
            lower = self.reader.link(link.vxlan.lower) if link.vxlan.lower else None
            said.append(f"dev {lower.name if lower else 'none'}")
            said.append(f"local {link.vxlan.local}")
            agrees = agrees and link.vxlan.local == self._local()
        known = bool(self.subnet) and not self.error
        return [Item(f"device {link.name}", ", ".join(said), agrees if known else None)]

    def _by_device(self) -> None:
        """Without leases, the device that exists says which subnet is this node's."""
        if self.has_leases or self.uplink is None:
            return
        evidence = evidence_of(self.resolver.facts(), self.reader, self.uplink, self.number)
        config = self.resolver.config
        length = config.subnet_len if self.number == 4 else config.ipv6_subnet_len
        if evidence.overlay:
            self.subnet = f"{evidence.overlay[0]}/{length}"
            self.said_by = f"device {evidence.device}"

    def _routes(self) -> Iterator[Item]:
        routes = self.uplink.defaults.get(self.number, ()) if self.uplink else ()
        for route in routes:
            link = self.reader.link(route.oif)
            name = link.name if link else str(route.oif)
            words = [f"via {route.gateway}"] if route.gateway else []
            words += [f"dev {name}", *([f"src {route.source}"] if route.source else [])]
            words.append(f"metric {route.metric}")
            agrees = self.uplink is not None and route.oif == self.uplink.link.index
            yield Item("default route", " ".join(words), agrees)

    def _leases(self, own: Claim | None) -> Iterator[Item]:
        if self.uplink is None:
            return
        addresses = self.uplink.addresses[self.number]
        subnets = (self.subnet, self.resolver.facts().remembered.get(self.number, ""))
        network = network_of(self.resolver.config, self.number)
        name = self.resolver.node_name or (own.name if own else "")
        about = claims_about(self.claims, network, addresses, filter(None, subnets), name)
        for claim in about:
            text = f"{claim.subnet} at {claim.endpoint}" + (
                f", MAC {claim.mac}" if claim.mac else ""
            )
            text += f": {claim.fault}" if claim.fault else ""
            known = bool(self.subnet) and not self.error
            is_own = own is not None and claim.number == own.number
            yield Item(f"lease {claim.name}", text, is_own if known else None)

    def _local(self) -> str:
        if self.uplink is None:
            return ""
        if self.public_ip and self.public_ip in self.uplink.addresses[self.number]:
            return self.public_ip
        if self.uplink.local.get(self.number):
            return self.uplink.local[self.number]
        try:
            return public_addresses(self.uplink, self.number)[0]
        except FlannelDPError:
            return ""
