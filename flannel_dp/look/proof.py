"""What probes have proven: values, text, JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, to_builtins

from flannel_dp.look.terminal import Paint, count, plain

if TYPE_CHECKING:
    from flannel_dp.cluster.rejections import Rejection
    from flannel_dp.probe.oneshot import Result
    from flannel_dp.probe.verdict import Evidence, Verdict


class RoundTrip(Struct, frozen=True):
    """Round trips of one peer, in seconds."""

    min: float
    median: float
    p99: float


class PeerProof(Struct, frozen=True):
    """What is proven of one peer.

    ``path`` is "tunnel" or "direct". ``sent`` and ``received`` are probes of the smallest size that
    the peer forwards back; ``path_mtu`` is the largest inner packet that came back, in bytes, of
    ``mtu`` that the device takes; 0 where none was tried. ``code`` is a word for the verdict,
    ``side`` what is at fault: "this node", "peer", "underlay", "peer or underlay" or "". ``text``
    says it, ``next`` what to run; ``evidence`` is all that it follows from.
    ``device`` is the one that probes leave by.
    """

    family: int
    subnet: str
    name: str
    endpoint: str
    mac: str
    path: str
    alive: bool
    code: str
    side: str
    text: str
    next: str
    sent: int
    received: int
    rtt: RoundTrip | None
    path_mtu: int
    mtu: int
    evidence: Evidence
    device: str = ""

    @classmethod
    def of(cls, family: int, path: str, result: Result, verdict: Verdict) -> PeerProof:
        target, evidence, trips = result.target, result.evidence, result.trips
        trip = None
        if trips:
            last = len(trips) - 1
            trip = RoundTrip(trips[0], trips[last // 2], trips[round(last * 0.99)])
        return cls(
            family,
            target.subnet,
            target.name,
            target.endpoint,
            target.mac,
            path,
            verdict.alive,
            verdict.code,
            verdict.side,
            verdict.text,
            verdict.next,
            *evidence.loop,
            trip,
            evidence.path_mtu or 0,
            evidence.mtu,
            evidence,
            result.place.device,
        )


class Fix(Struct, frozen=True):
    """What ``--fix-offload`` has switched off: a feature of ``ethtool -k DEVICE``."""

    device: str
    feature: str


class Proof(Struct, frozen=True):
    """What :func:`flannel_dp.look.probing.probe` found. ``str()`` of it is what the command
    prints. ``fixed`` was switched off before it was found."""

    peers: tuple[PeerProof, ...]
    rejected: Sequence[Rejection] = ()
    fixed: tuple[Fix, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every peer is alive."""
        return all(peer.alive for peer in self.peers)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``"schema": 1``; keys are only ever added."""
        return {
            "schema": 1,
            "ok": self.ok,
            "peers": [to_builtins(peer) for peer in self.peers],
            "rejected": [rejection.to_json() for rejection in self.rejected],
            "fixed": [to_builtins(one) for one in self.fixed],
        }

    def lines(self, paint: Paint = plain, width: int = 0) -> Iterator[str]:
        """Yield the proof line by line: a table, then each fault with what to do."""
        if self.peers:
            from flannel_dp.look.fitting import Grid

            rows = [["SUBNET", "ENDPOINT", "PATH", "RTT", "LOSS", "MTU", "VERDICT"]]
            rows += [_row(peer) for peer in self.peers]
            lines = Grid(rows, right=(3, 4, 5), drop=(2, 1, 5)).lines(width)
            yield next(lines)
            for peer, line in zip(self.peers, lines, strict=True):
                yield line if peer.code == "alive" else paint(line, _colour(peer))
        for peer in self.peers:
            if peer.code == "alive":
                continue
            side = f" ({peer.side})" if peer.side else ""
            yield paint(f"{peer.name or peer.subnet}{side}: {peer.text}", _colour(peer))
            if peer.next:
                yield f"  next: {peer.next}"
        if self.rejected:
            from flannel_dp.look.text import rejected_lines

            yield from rejected_lines(self.rejected, paint)
        for fix in self.fixed:
            text = f"switched off {fix.feature} of {fix.device}; 'flannel-dp clean' undoes it"
            yield paint(text, "yellow")
        alive = sum(peer.alive for peer in self.peers)
        yield f"{alive} of {count(len(self.peers), 'peer')} alive"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _colour(peer: PeerProof) -> str:
    return "yellow" if peer.alive else "red"


def _row(peer: PeerProof) -> list[str]:
    rtt = f"{peer.rtt.median * 1000:.2f} ms" if peer.rtt else "-"
    loss = f"{100 * (1 - peer.received / peer.sent):.0f} %" if peer.sent else "-"
    mtu = str(peer.path_mtu) if peer.path_mtu else "-"
    return [peer.subnet, peer.endpoint or "-", peer.path, rtt, loss, mtu, peer.code]
