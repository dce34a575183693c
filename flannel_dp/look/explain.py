"""Whose an address is, what happens to a packet to it, and what is wrong with that.

The wanted side comes from leases, or from what the last sync worked out; the held side is what the
packet meets in the kernel (:mod:`flannel_dp.look.walk`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from flannel_dp._core import parse_address
from flannel_dp.errors import ConfigError
from flannel_dp.kernel.links import LinkReader
from flannel_dp.look.explanation import (
    Explanation,
    Owner,
    Step,
    find_holder,
    holds,
    owner_of,
)
from flannel_dp.look.path import PathOfPods
from flannel_dp.look.show import find_blockers
from flannel_dp.look.walk import Walk
from flannel_dp.look.words import SYNC, lease_step
from flannel_dp.node.choice import canonical
from flannel_dp.resources.peers.layouts import layout_of
from flannel_dp.tables.entries import PROTOCOL

if TYPE_CHECKING:
    from flannel_dp.cluster.lease import Leases
    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.look.overlay import Overlay
    from flannel_dp.node.family import Family

__all__ = ["Explanation", "Owner", "Step", "explain"]


def explain(overlay: Overlay, address: str, leases: Leases | None = None) -> Explanation:
    """Say what happens to a packet to ``address`` and why. Reads, never writes.

    The wanted side is ``leases``, else what the last sync was given, else nothing. Policy rules
    are followed as the kernel does, for packets of pods where these go another way.
    Equivalent: ``ip route get ADDRESS fibmatch``, ``ip nexthop get id ID``, ``ip
    neigh get GATEWAY dev DEVICE``, ``bridge fdb get MAC dev DEVICE`` and ``ip route
    get ENDPOINT``. Raises ConfigError for a text that is no address, KernelError when
    the kernel cannot be asked, and as :meth:`DataPlane.plan` for ``leases``.
    """
    try:
        address = canonical(address)
    except ValueError as error:
        raise ConfigError(
            f"{address!r} is not an IP address",
            hint="give one address, without a prefix length, a port or a zone",
        ) from error
    families, note = {n: state.family for n, state in overlay.state.items()}, ""
    number = 6 if ":" in address else 4
    if leases is not None:
        view = overlay.resolver.resolve(leases)
        families = {family.number: family for family in view.families}
        note = str(view.errors.get(number, ""))
    family = families.get(number)
    local = family.admission.node.public_ip if family else ""
    with LinkReader(overlay.host.netns) as fib:
        walk = Walk(overlay, fib, address, local)
        if note:
            walk.steps.append(Step("leases", "", "cannot be used", False, note))
        path = None
        if walk.network:
            device = walk.device if walk.device.name else None
            path = PathOfPods(overlay, fib, address, device, [*families.values()])
            walk.match = path.match(walk.match)
        answer = _Question(overlay.config, walk, family).explain()
        answer = path.applied(answer, walk.match) if path else answer
    return replace(answer, blockers=find_blockers(overlay, [family] if family else []))


class _Question:
    """One question: finds whose the address is, and has the packet followed there."""

    def __init__(self, config: NetworkConfig, walk: Walk, family: Family | None) -> None:
        self.config, self.walk, self.family = config, walk, family

    def explain(self) -> Explanation:
        walk = self.walk
        if not walk.network:
            walk.route("")
            text = f"IPv{walk.number} is switched off in the network configuration"
            return self._answer("outside-network", text)
        if walk.match and walk.match.local:
            walk.route("this node's own")
            return self._answer("own-address", "it is an address of this node itself")
        family = self.family
        own = family.admission.node.subnet if family else walk.own_subnet(self.config)
        if own and holds(own, walk.address):
            return self._own(own)
        return self._with_leases(family) if family else self._kernel_only()

    def _answer(self, verdict: str, summary: str, owner: Owner | None = None) -> Explanation:
        walk = self.walk
        return Explanation(
            walk.address, walk.number, verdict, summary, walk.way, owner, tuple(walk.steps)
        )

    def _own(self, subnet: str) -> Explanation:
        walk = self.walk
        if walk.in_tunnel and not walk.by_shared_route:
            text = f"a route sends this node's own pods into the tunnel: {SYNC}"
            walk.route("a device of this node", ok=False, text=text)
        else:
            local = bool(walk.match and not walk.match.gateway and not walk.in_tunnel)
            text = "" if local else "no device has this subnet yet; the CNI plugin makes it"
            walk.route("a device of this node", ok=True, text=text)
        return self._answer("own-subnet", f"it is in {subnet}, the subnet of this node")

    def _with_leases(self, known: Family) -> Explanation:
        address, network = self.walk.address, self.walk.network
        peers = known.admission.accepted
        number = find_holder(peers, address)
        if number >= 0:
            return self._peer(number, known)
        found = peers.find_endpoint(parse_address(address)[1])
        if found:
            return self._endpoint(owner_of(peers, found[0]))
        rejected = known.admission.rejected
        number = find_holder(rejected.claims, address)
        if number >= 0:
            refused = rejected[number]
            owner = owner_of(rejected.claims, number)
            self._not_ours(f"the lease is rejected ({refused.reason})")
            return self._answer(
                "refused",
                f"it is in {owner.subnet} of lease {owner.name} (node {owner.public_ip}), which is "
                f"rejected: {refused.reason}: {refused.detail}",
                owner,
            )
        if not holds(network, address):
            return self._outside()
        self._not_ours("no lease has this address")
        return self._answer("unclaimed", f"it is inside {network}, and in no lease")

    def _kernel_only(self) -> Explanation:
        walk, match = self.walk, self.walk.match
        if not holds(walk.network, walk.address):
            found = walk.peer_behind()
            return self._endpoint(found) if found else self._outside()
        subnet = walk.peer_subnet()
        if subnet:
            owner = walk.to_peer(subnet, "", "")
            text = f"it is inside {walk.network}, in {owner.subnet}"
            where = f"behind node {owner.public_ip or 'unknown'}"
            return self._answer("peer", f"{text}, {where}", owner)
        if match and match.gateway and match.protocol == PROTOCOL and not walk.in_tunnel:
            walk.route("")
            where = f"in {match.prefix}, behind node {match.gateway}"
            owner = Owner("", match.prefix, match.gateway)
            return self._answer("peer", f"it is inside {walk.network}, {where}", owner)
        walk.see_device()
        if walk.by_shared_route:
            self._not_ours("no peer in the program's map has this address")
        else:
            walk.route("", ok=True, text="no route leads into the tunnel; try with --leases")
        text = f"it is inside {walk.network}; without leases, nothing says whose it is"
        return self._answer("unknown", text)

    def _outside(self) -> Explanation:
        self._not_ours("it is outside the network")
        text = f"it is outside the network {self.walk.network}"
        return self._answer("outside-network", text)

    def _endpoint(self, owner: Owner) -> Explanation:
        inside = self.walk.in_tunnel
        text = f"the tunnel to {owner.public_ip} would run through itself: {SYNC}"
        self.walk.route("the underlay", ok=not inside, text=text if inside else "")
        name = owner.name or f"the node with MAC {owner.mac}"
        return self._answer(
            "peer-endpoint", f"it is the public address of {name}, outside the tunnel", owner
        )

    def _not_ours(self, why: str) -> None:
        walk = self.walk
        if walk.by_shared_route:
            walk.route(f"{walk.network} into the tunnel", text=f"{why}: the program drops it")
            return
        text = f"{why}, and the route leads into the tunnel: {SYNC}" if walk.in_tunnel else ""
        walk.route("not into the tunnel", ok=not walk.in_tunnel, text=text)

    def _peer(self, number: int, known: Family) -> Explanation:
        walk, owner = self.walk, owner_of(known.peers, number)
        walk.steps.append(lease_step(owner))
        paths = layout_of(self.config.backend).paths
        if paths.direct_if(lambda: walk.on_underlay(owner, known.uplink, known.iface)):
            walk.directly(owner, known.uplink)
        else:
            walk.to_peer(owner.subnet, owner.mac, owner.public_ip)
        return self._answer(
            "peer", f"it is in {owner.subnet} of lease {owner.name} (node {owner.public_ip})", owner
        )
