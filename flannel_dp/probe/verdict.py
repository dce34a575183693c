"""What follows from the probes of one peer: a pure function of the evidence."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from flannel_dp.kernel.offload import CHECKSUM, SEGMENTS


class Evidence(Struct, frozen=True):
    """What came back from one peer. ``None`` stands for what was not tried.

    ``loop``: probes that the peer forwards back to this node, as (sent, answered); ``paths`` the
    same by source port. ``echo``: ICMP echo of its vxlan device's address, by this node's routes.
    ``path_mtu``: the largest inner packet that came back, of ``mtu`` bytes that the device takes.
    ``state``: this node's entries for the peer, "ok" where nothing is wrong.

    Asked where the loop has no answer: ``underlay``, ICMP echo of its public address; ``refused``,
    whether it said that its UDP port of VXLAN is closed; ``outside``, an answer over the underlay
    to a packet through the tunnel; ``inside``, an answer through the tunnel to a packet over the
    underlay; ``detour``, whether another node forwarded to this one what the peer had sent it;
    ``other_mac``, the MAC that answers where a frame is for every MAC, "" for none.

    Asked of some that answer: whether what was left to the device came back whole, a ``checksum``,
    and ``segments`` of a packet that it was to cut; ``spoiled_by_all`` whether it did from none of
    those that were asked.
    """

    loop: tuple[int, int]
    echo: tuple[int, int] | None = None
    paths: tuple[tuple[int, int], ...] = ()
    mtu: int = 0
    path_mtu: int | None = None
    state: str = "ok"
    tunnel: bool = True
    underlay: bool | None = None
    refused: bool | None = None
    outside: bool | None = None
    inside: bool | None = None
    detour: bool | None = None
    other_mac: str | None = None
    own_problem: str = ""
    checksum: bool | None = None
    segments: bool | None = None
    spoiled_by_all: bool = False


class Verdict(Struct, frozen=True):
    """Whether a peer is alive, and if not, which side is at fault.

    ``side`` is "this node", "peer", "underlay", "peer or underlay", or "" where nothing is wrong.
    ``next`` is what to do or to run.
    """

    code: str
    alive: bool
    side: str
    text: str
    next: str = ""


def judge(evidence: Evidence, endpoint: str, port: int, device: str) -> Verdict:
    """Return the verdict about the peer at ``endpoint``, whose VXLAN ``port`` and ``device`` are
    named in it."""
    sent, came = evidence.loop
    if evidence.own_problem:
        return Verdict(
            "uplink-down",
            False,
            "this node",
            evidence.own_problem,
            "ip link show; the peers may be well",
        )
    if came:
        return _answering(evidence, sent, came, endpoint, device)
    if evidence.state != "ok":
        return Verdict(
            "not-programmed",
            False,
            "this node",
            f"this node's entries for it are incomplete: {evidence.state}",
            "flannel-dp sync",
        )
    if evidence.detour:
        return Verdict(
            "detour",
            False,
            "peer",
            "it sends what is for this node to another node, which has this node's subnet or MAC "
            "there",
            f"on {endpoint}: ip route get, bridge fdb show; flannel-dp leases shows two leases of "
            "one subnet",
        )
    if evidence.echo and evidence.echo[1]:
        return Verdict(
            "peer-does-not-forward",
            False,
            "peer",
            "its vxlan device answers, and it forwards no packets back",
            f"on {endpoint}: sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding; "
            "iptables -nvL FORWARD; nft list ruleset",
        )
    if evidence.refused:
        return Verdict(
            "no-vtep",
            False,
            "peer",
            f"UDP port {port} is closed there: its vxlan device is missing or down",
            f"on {endpoint}: ip -d link show type vxlan",
        )
    if evidence.other_mac:
        return Verdict(
            "wrong-mac",
            False,
            "peer",
            f"its vxlan device has the MAC {evidence.other_mac}, which its lease does not say",
            f"on {endpoint}: restart the agent, which publishes the lease again",
        )
    return _silent(evidence, endpoint, port)


def _answering(evidence: Evidence, sent: int, came: int, endpoint: str, device: str) -> Verdict:
    """Return the verdict about a peer that forwards at least some probes back."""
    dead = [number for number, path in enumerate(evidence.paths) if path[0] > 1 and not path[1]]
    whole = [path for path in evidence.paths if path[0] and path[0] == path[1]]
    if dead and len(dead) + len(whole) == len(evidence.paths):
        return Verdict(
            "path-dead",
            False,
            "underlay",
            f"{len(dead)} of {len(evidence.paths)} source ports get no answer and the others lose "
            "nothing: one of several equal-cost paths is dead",
            f"traceroute by several ports: traceroute -U -p PORT {endpoint}",
        )
    if came < sent:
        return Verdict(
            "loss",
            True,
            "peer or underlay",
            f"{sent - came} of {sent} probes are lost",
            f"ping -f -c 1000 {endpoint}",
        )
    if evidence.checksum is False or evidence.segments is False:
        return _spoiled(evidence, endpoint, device)
    if evidence.path_mtu is not None and evidence.path_mtu < evidence.mtu:
        return Verdict(
            "mtu",
            False,
            "underlay",
            f"packets of over {evidence.path_mtu} bytes are lost, and {device} takes "
            f"{evidence.mtu}",
            f"raise the MTU of the underlay by {evidence.mtu - evidence.path_mtu} bytes, or lower "
            "that of the external interface on every node",
        )
    if evidence.state != "ok":
        return Verdict(
            "not-programmed",
            False,
            "this node",
            f"the peer answers, and this node's entries for it are incomplete: {evidence.state}",
            "flannel-dp sync",
        )
    return Verdict("alive", True, "", "alive")


def _spoiled(evidence: Evidence, endpoint: str, device: str) -> Verdict:
    """Return the verdict about a peer whose packets are spoiled where something is left to a
    network card: pods' connections fail or are slow, and pings pass."""
    side = "this node" if evidence.spoiled_by_all else "peer"
    whose = "from all peers" if evidence.spoiled_by_all else "from this peer alone"
    mend = "flannel-dp probe --fix-offload, which is: " if evidence.spoiled_by_all else ""
    mend = mend or f"on {endpoint}: "
    if evidence.checksum is False:
        return Verdict(
            "checksum",
            False,
            side,
            "packets whose inner checksum is left to the network card come back spoiled, "
            f"{whose} ({CHECKSUM})",
            f"{mend}ethtool -K {device} {CHECKSUM} off",
        )
    return Verdict(
        "segments",
        False,
        side,
        "packets that are left to the network card to be cut into segments are lost or come back "
        f"spoiled, {whose} (tx-udp_tnl-segmentation, tx-udp_tnl-csum-segmentation)",
        f"{mend}ethtool -K {device} {SEGMENTS} off",
    )


def _silent(evidence: Evidence, endpoint: str, port: int) -> Verdict:
    """Return the verdict about a peer of which nothing came back."""
    if evidence.outside:
        return Verdict(
            "no-way-back",
            False,
            "peer or underlay",
            "packets reach it through the tunnel and its answers do not come back: it has no "
            f"route, neighbour or FDB entry for this node, or UDP {port} from it is dropped",
            f"on {endpoint}: ip route get, bridge fdb show; flannel-dp explain ADDRESS",
        )
    if evidence.inside:
        return Verdict(
            "no-way-out",
            False,
            "peer or underlay",
            "its packets reach this node through the tunnel and this node's do not reach it: "
            f"UDP {port} to it is dropped, or NAT between changes the source address, which a peer "
            "that forwards by eBPF does not accept",
            f"check firewalls, security groups and NAT between for UDP {port} to {endpoint}",
        )
    if evidence.underlay:
        text = (
            f"it answers over the underlay and not through the tunnel: UDP {port} is dropped, or "
            "it has no entries for this node"
            if evidence.tunnel
            else "it answers itself and forwards no packets back to this node"
        )
        return Verdict(
            "tunnel-dead" if evidence.tunnel else "peer-does-not-forward",
            False,
            "peer or underlay" if evidence.tunnel else "peer",
            text,
            f"on {endpoint}: tcpdump -ni any udp port {port}"
            if evidence.tunnel
            else f"on {endpoint}: ip route; sysctl net.ipv4.ip_forward; iptables -nvL FORWARD",
        )
    return Verdict(
        "unreachable",
        False,
        "peer or underlay",
        "it answers neither through the tunnel nor over the underlay",
        f"ping {endpoint}; ip route get {endpoint}",
    )


def share(paths: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return (sent, answered) of all paths together."""
    return sum(one[0] for one in paths), sum(one[1] for one in paths)
