"""The overlay in the kernel: devices, peers, and entries that no peer uses.

Everything is read back from the kernel, so ``show`` is right also about
what another program did. With leases, each peer has the name of its lease and
what a sync would change about it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field, to_builtins
from msgspec.structs import replace

from flannel_dp.errors import FlannelDPError
from flannel_dp.look.difference import rule_of_paths, with_differences
from flannel_dp.look.held import FamilyReader, HeldFamily, PeerView
from flannel_dp.look.terminal import Paint, count, plain
from flannel_dp.resources.device.view import DeviceView
from flannel_dp.resources.path.resource import PathChange
from flannel_dp.resources.peers.resource import PeersChange
from flannel_dp.tables.describe import describe, device_of
from flannel_dp.tables.entries import Entry

if TYPE_CHECKING:
    from flannel_dp.cluster.lease import Leases
    from flannel_dp.cluster.rejections import Rejection
    from flannel_dp.look.lives import Lives
    from flannel_dp.look.overlay import Overlay
    from flannel_dp.node.family import Family

log = logging.getLogger(__name__)

#: The resources whose differences are shown.
_OVERLAY = ("program", "device4", "device6", "peers4", "peers6", "path")


class FamilyView(Struct, frozen=True):
    """One family: ``device`` is None in host-gw; ``strays`` are entries on our device
    that no route uses, and routes with our mark that lead where none of ours should.
    ``ways`` says why some peers are reached directly and others not, ``error`` why
    leases were of no use, ``names`` the devices that strays are on, by ifindex."""

    family: int
    network: str
    device: DeviceView | None
    peers: tuple[PeerView, ...] = ()
    strays: tuple[Entry, ...] = ()
    ways: str = ""
    error: str = ""
    names: dict[int, str] = field(default_factory=dict)

    @property
    def device_name(self) -> str:
        """The vxlan device; "" in host-gw."""
        return self.device.name if self.device else ""

    @property
    def index(self) -> int:
        """The device's ifindex; 0 where there is none."""
        return self.device.index if self.device else 0

    @property
    def problem(self) -> str:
        """Why the device cannot carry the overlay; "" where it can, and in host-gw."""
        return self.device.problem if self.device else ""

    @property
    def lacks_device(self) -> bool:
        """Whether there should be a device and is none."""
        return bool(self.device) and not self.index

    @property
    def title(self) -> str:
        """The device in one line."""
        return (
            str(self.device)
            if self.device
            else f"host-gw: direct IPv{self.family} routes, no device"
        )

    def to_json(self, peers: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Plain values; each stray with the name of its device."""
        shown = to_builtins(replace(self, peers=(), strays=()))
        del shown["names"]
        shown["peers"] = [*peers]
        shown["strays"] = [
            {
                "table": type(entry).__name__.lower(),
                "entry": entry._asdict(),
                "dev": device_of(entry, self.names),
            }
            for entry in self.strays
        ]
        return dict(shown)


class Overview(Struct, frozen=True):
    """What :func:`show` found; ``blockers`` are firewall rules of other programs that stop pods or
    the tunnel, asked for with leases only; ``warnings`` say what else diverts packets of pods;
    ``lives`` are those of the peers, where an agent probes them and was asked.
    ``str()`` of it is what the command prints."""

    families: tuple[FamilyView, ...]
    rejected: Sequence[Rejection] = ()
    with_leases: bool = False
    blockers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    lives: Lives | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``"schema": 1``; keys are only ever added."""
        return {
            "schema": 1,
            "families": [
                view.to_json([self._peer(peer) for peer in view.peers]) for view in self.families
            ],
            "rejected": [rejection.to_json() for rejection in self.rejected],
            "blockers": list(self.blockers),
            "warnings": list(self.warnings),
        }

    def _peer(self, peer: PeerView) -> dict[str, Any]:
        shown: dict[str, Any] = {name: getattr(peer, name) for name in _PEER_KEYS}
        if not self.with_leases:
            del shown["lease"], shown["difference"]
        if self.lives is not None:
            shown["life"] = to_builtins(self.lives.of(peer.subnet))
        return shown

    def lines(self, paint: Paint = plain, width: int = 0) -> Iterator[str]:
        """Yield the overview line by line, for a terminal of so many columns (0: any)."""
        for number, view in enumerate(self.families):
            if number:
                yield ""
            yield from _family_lines(view, self.with_leases, paint, width, self.lives)
        if self.rejected:
            from flannel_dp.look.text import rejected_lines

            yield ""
            yield from rejected_lines(self.rejected, paint)
        if self.blockers:
            from flannel_dp.look.explanation import blocked_lines

            yield ""
            yield from blocked_lines(self.blockers, paint)
        if self.warnings:
            yield ""
            yield paint("warnings:", "yellow")
            yield from (f"  {warning}" for warning in self.warnings)

    def __str__(self) -> str:
        return "\n".join(self.lines())


_PEER_KEYS = PeerView.__match_args__


def show(
    overlay: Overlay, leases: Leases | None = None, held: Sequence[HeldFamily] | None = None
) -> Overview:
    """Read the overlay of ``overlay``'s configuration; write nothing. ``held`` is what the kernel
    holds of each family, where that was read already.

    With ``leases``, peers get names and differences, and rejected claims are
    listed. Equivalent: ``ip -d link show``, ``ip route show``, ``ip nexthop show``,
    ``ip neigh show`` and ``bridge fdb show``, each with ``dev flannel.VNI``, joined
    by hand, and ``ip rule show``. Raises KernelError when they cannot be read, and as
    :meth:`DataPlane.plan` for leases.
    """
    if held is None:
        held = [FamilyReader.of(overlay, number).held() for number in overlay.families]
    seen = [
        FamilyView(
            one.number, one.network, one.device, one.peers, one.strays, names=one.device_names
        )
        for one in held
    ]
    if leases is None:
        from flannel_dp.look.path import find_diversions

        path = find_diversions(overlay, {one.family: one.device for one in seen})
        return Overview(tuple(seen), warnings=path.warnings)
    view = overlay.resolver.resolve(leases)
    found = overlay.reconciler.compare(view, _OVERLAY)
    shown = []
    for one in seen:
        name = f"peers{one.family}"
        change = found.changes.get(name)
        if isinstance(change, PeersChange) and change.state is not None:
            peers = with_differences(one.peers, change.state, change.diffs)
            one = replace(one, peers=peers, ways=rule_of_paths(overlay, change.state))
        elif name in found.done:
            one = replace(one, error=str(found.done[name].error))
        shown.append(one)
    diverted = found.changes.get("path")
    return Overview(
        tuple(shown),
        view.rejections(),
        with_leases=True,
        blockers=find_blockers(overlay, view.families),
        warnings=diverted.warnings if isinstance(diverted, PathChange) else (),
    )


def find_blockers(overlay: Overlay, families: Sequence[Family]) -> tuple[str, ...]:
    """Return foreign firewall rules that stop pods or the tunnel; none, and a log line, where they
    cannot be read."""
    try:
        return overlay.blockers_of(families)
    except FlannelDPError as error:
        log.warning("Firewall rules cannot be read: %(error)s", {"error": error})
        return ()


# ---- text ----------------------------------------------------------------------

_COLOURS = {"ok": "green", "foreign": "yellow", "missing": "yellow"}
_COLOURS_OF_LIVES = {"dead": "red", "lossy": "yellow"}


def _family_lines(
    view: FamilyView, with_leases: bool, paint: Paint, width: int, lives: Lives | None
) -> Iterator[str]:
    yield paint(view.title, "red" if view.problem else "bold")
    if view.error:
        yield paint(f"  leases: {view.error}", "red")
    if view.ways:
        yield f"  {view.ways}"
    if view.peers:
        yield from _peer_lines(view.peers, with_leases, paint, width, lives)
    if view.strays:
        yield paint(f"  {len(view.strays)} that no route of a peer uses:", "yellow")
        yield from (f"    {describe(entry, view.names)}" for entry in view.strays)
    if view.lacks_device and not view.peers:
        return
    bad = sum(peer.state not in ("ok", "foreign") for peer in view.peers)
    yield f"  {count(len(view.peers), 'peer')}, {bad} out of sync"


def _peer_lines(
    peers: Sequence[PeerView], with_leases: bool, paint: Paint, width: int, lives: Lives | None
) -> Iterator[str]:
    from flannel_dp.look.fitting import Grid

    title = ["SUBNET", "VIA", "MAC", "ENDPOINT", "STATE"] + ["LIFE"] * (lives is not None)
    rows = [title + ["LEASE", "DIFFERENCE"] * with_leases]
    for peer in peers:
        details = [peer.detail] * bool(peer.detail) + ["direct"] * (peer.way == "direct")
        details += [f"mtu {peer.mtu}"] if peer.mtu else []
        state = f"{peer.state} ({', '.join(details)})" if details else peer.state
        row = [peer.subnet, peer.via or "-", peer.mac or "-", peer.endpoint or "-", state]
        if lives is not None:
            row.append(str(lives.of(peer.subnet) or "-"))
        rows.append(row + [peer.lease or "-", peer.difference] * with_leases)
    # VIA is the first address of SUBNET, and the lease says whose MAC and endpoint these are.
    drop = (1, 2, 3, len(title))
    lines = Grid(rows, indent="  ", drop=drop, last=39 * with_leases).lines(width)
    yield next(lines)
    for peer, line in zip(peers, lines, strict=True):
        colour = _COLOURS.get(peer.state, "red")
        life = lives.of(peer.subnet) if lives else None
        if life and life.life in _COLOURS_OF_LIVES and colour != "red":
            colour = _COLOURS_OF_LIVES[life.life]
        if with_leases and peer.difference and colour == "green":
            colour = "yellow"
        yield line if colour == "green" else paint(line, colour)
