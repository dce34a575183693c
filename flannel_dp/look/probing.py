"""``flannel-dp probe``: which peers forward packets back to this node, and why others do not.

The peers are those that ``show`` finds: what the kernel holds, and with leases what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import parse_address
from flannel_dp.errors import ConfigError, NotYet
from flannel_dp.kernel.arp import learned_macs
from flannel_dp.kernel.links import SCOPE_LINK, LinkReader
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.look.explanation import holds
from flannel_dp.look.held import PeerView
from flannel_dp.look.proof import PeerProof, Proof
from flannel_dp.look.show import FamilyView, show
from flannel_dp.probe.oneshot import ORDINARY, Effort, Result, echoes, probe_place
from flannel_dp.probe.target import Place, Target
from flannel_dp.probe.verdict import Evidence, judge
from flannel_dp.resources.device.view import DeviceView

if TYPE_CHECKING:
    from flannel_dp.cluster.lease import Leases
    from flannel_dp.look.overlay import Overlay


class _Group(Struct, frozen=True):
    """The peers of one family that are reached by one path; ``path`` is "tunnel" or "direct".
    ``problem`` says why this node cannot reach any, ``reason`` why they cannot be proven."""

    place: Place
    path: str
    targets: tuple[Target, ...]
    problem: str = ""
    reason: str = ""


def probe(
    overlay: Overlay,
    leases: Leases | None = None,
    chosen: Sequence[str] = (),
    effort: Effort = ORDINARY,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Proof:
    """Prove which peers of ``overlay`` forward packets back to this node. Writes nothing.

    ``chosen`` names peers by subnet, an address in it, public address or name of the lease
    (default: all). ``told(done, total)`` is called as peers are done. Each probe is a packet from
    this node's address in the overlay to itself that goes to the peer's MAC, as RFC 9747 has it
    for BFD, so that the peer needs no program. Equivalent: none; ``ping -I`` proves less. Raises
    ConfigError for a peer that there is none of, NotPermitted without CAP_NET_RAW, KernelError,
    and as :meth:`DataPlane.plan` for leases.
    """
    try:
        seen = show(overlay, leases)
    except NotYet:  # the interface is down and has lost its addresses: what is there is probed
        seen = show(overlay)
    rejected = tuple(seen.rejected)
    every = [peer for view in seen.families for peer in view.peers]
    named = {id(peer) for peer in _chosen(every, chosen)}
    groups = [
        group
        for view in seen.families
        for group in _groups(overlay, view, [peer for peer in view.peers if id(peer) in named])
    ]
    total, done, found = sum(len(group.targets) for group in groups), 0, list[PeerProof]()
    for group in groups:
        found += _proofs(overlay, group, effort, partial(_progress, told, done, total))
        done += len(group.targets)
        told(done, total)
    return Proof(tuple(found), rejected)


def _progress(told: Callable[[int, int], None], done: int, total: int, part: int, _: int) -> None:
    told(done + part, total)


def _chosen(peers: Sequence[PeerView], chosen: Sequence[str]) -> Sequence[PeerView]:
    """Return the peers that are named; all where none is. ConfigError for a name of none."""
    if not chosen:
        return peers
    found = []
    for text in chosen:
        these = [peer for peer in peers if _is_named(peer, text)]
        if not these:
            raise ConfigError(
                f"no peer is named {text!r}",
                hint="give a subnet, an address in one, a public address or a lease's name, as "
                "'flannel-dp show' prints them",
            )
        found += these
    return found


def _is_named(peer: PeerView, text: str) -> bool:
    if text in (peer.subnet, peer.endpoint, peer.lease, peer.mac):
        return True
    try:
        parse_address(text)
    except ValueError:
        return False
    return holds(peer.subnet, text)


# ---- where probes leave this node


def _groups(overlay: Overlay, view: FamilyView, peers: Sequence[PeerView]) -> Iterator[_Group]:
    """Yield the peers of one family by path, each with the place that its probes leave by."""
    tunnel = [peer for peer in peers if peer.way == "tunnel"]
    direct = [peer for peer in peers if peer.way == "direct"]
    with LinkReader(overlay.host.netns) as reader:
        source = _own_address(reader, view, peers)
        if tunnel:
            yield _by_tunnel(reader, view, tunnel, source)
        by_device: dict[tuple[int, str], list[PeerView]] = {}
        for peer in direct:
            answer = reader.route_to(peer.endpoint)
            key = (answer.oif, answer.prefsrc or "") if answer else (0, "")
            by_device.setdefault(key, []).append(peer)
        for (ifindex, local), group in by_device.items():
            yield _directly(overlay, reader, view, ifindex, local, group, source)


def _own_address(reader: LinkReader, view: FamilyView, peers: Sequence[PeerView]) -> str:
    """Return this node's address in the overlay: its vxlan device's, or one of its own subnet."""
    if view.device and view.device.addresses:
        return view.device.addresses[0].partition("/")[0]
    for one in reader.addresses(None, view.family):
        if one.scope == SCOPE_LINK or not holds(view.network, one.address):
            continue
        if not any(holds(peer.subnet, one.address) for peer in peers):
            return one.address
    return ""


def _by_tunnel(
    reader: LinkReader, view: FamilyView, peers: Sequence[PeerView], source: str
) -> _Group:
    device = view.device or DeviceView("", problem="there is no vxlan device")
    link = reader.link(view.index) if view.index else None
    targets = tuple(_target(peer, peer.mac) for peer in peers)
    if link is None:
        place = Place(view.family, view.device_name, 0, "", 0, "", "")
        return _Group(place, "tunnel", targets, problem=device.problem)
    local = device.local
    if not local:
        ends = [peer.endpoint for peer in peers if peer.endpoint]
        answer = reader.route_to(ends[0]) if ends else None
        local = answer.prefsrc or "" if answer else ""
    lower = reader.link(link.vxlan.lower) if link.vxlan and link.vxlan.lower else None
    problem = "" if device.up else f"{device.name} is down"
    if lower and not (lower.up and lower.carrier):
        problem = f"{lower.name} is down" if not lower.up else f"{lower.name} has no carrier"
    place = Place(
        view.family,
        device.name,
        device.index,
        device.mac,
        device.mtu,
        source,
        local,
        device.vni,
        device.port,
        device.external,
    )
    reason = "" if source else f"{device.name} has no overlay address"
    return _Group(place, "tunnel", targets, problem, reason)


def _directly(
    overlay: Overlay,
    reader: LinkReader,
    view: FamilyView,
    ifindex: int,
    local: str,
    peers: Sequence[PeerView],
    source: str,
) -> _Group:
    """Return the peers on one device of the underlay, with the MACs that the kernel knows of
    them; a packet to each has the kernel learn them."""
    link = reader.link(ifindex) if ifindex else None
    if link is None or not local:
        place = Place(view.family, "", 0, "", 0, "", "")
        targets = tuple(_target(peer, "") for peer in peers)
        return _Group(place, "direct", targets, problem="no route leads to its public address")
    problem = "" if link.up and link.carrier else f"{link.name} is down"
    ends = [peer.endpoint for peer in peers]
    if not problem:
        call_in_netns(overlay.host.netns, echoes, local, ends, 1.0)
    macs = learned_macs(overlay.host.netns, ifindex, 6 if ":" in local else 4)
    has_device = bool(view.device_name)  # host-gw has none, and no address of it
    targets = tuple(
        replace(_target(peer, macs.get(peer.endpoint, "")), vtep=_base(peer) if has_device else "")
        for peer in peers
    )
    place = Place(view.family, link.name, ifindex, link.mac, link.mtu, source, local)
    reason = (
        ""
        if source
        else "this node has no address in its own subnet yet; it has one once a pod runs here"
    )
    return _Group(place, "direct", targets, problem, reason)


def _base(peer: PeerView) -> str:
    """Return the first address of a peer's subnet, which its vxlan device has (flannel's
    pkg/backend/vxlan/device.go, Configure)."""
    return peer.subnet.partition("/")[0]


def _target(peer: PeerView, mac: str) -> Target:
    state = peer.state if peer.state not in ("ok", "foreign") else "ok"
    if state == "ok" and peer.difference:
        state = peer.difference
    return Target(peer.subnet, peer.endpoint, mac, _base(peer), peer.lease, state)


# ---- what came back


def _proofs(
    overlay: Overlay, group: _Group, effort: Effort, told: Callable[[int, int], None]
) -> Iterator[PeerProof]:
    place = group.place
    able = [one for one in group.targets if one.mac and one.endpoint and place.source]
    found: list[Result] = []
    if able and not group.problem:
        work = partial(probe_place, place, able, effort, told=told)
        found = call_in_netns(overlay.host.netns, work)
    by_subnet = {one.target.subnet: one for one in found}
    for target in group.targets:
        result = by_subnet.get(target.subnet)
        if result is None:
            yield _unproven(group, target)
            continue
        verdict = judge(result.evidence, target.endpoint, place.port, place.device)
        yield PeerProof.of(place.family, group.path, result, verdict)


def _unproven(group: _Group, target: Target) -> PeerProof:
    """Return the proof of a peer that could not be sent anything."""
    state = target.state
    evidence = Evidence((0, 0), state=state, own_problem=group.problem)
    if not group.problem and state == "ok":
        state = group.reason or "its MAC on the underlay is unknown: it does not answer ARP or ND"
        code = "not-proven" if group.reason else "unreachable"
        verdict = replace(
            judge(evidence, target.endpoint, group.place.port, group.place.device),
            code=code,
            text=state,
            side="this node" if group.reason else "peer or underlay",
        )
    else:
        verdict = judge(evidence, target.endpoint, group.place.port, group.place.device)
    result = Result(target, group.place, (), evidence)
    return PeerProof.of(group.place.family, group.path, result, verdict)
