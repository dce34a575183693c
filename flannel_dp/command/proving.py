"""What ``flannel-dp probe`` does: prove, and where it is asked to, mend what spoils packets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from flannel_dp.command.compose import Composition
from flannel_dp.command.output import INCOMPLETE, write
from flannel_dp.kernel.netns import NetNS, call_in_netns
from flannel_dp.kernel.offload import CHECKSUM, SEGMENTS, switch_off
from flannel_dp.look.probing import probe
from flannel_dp.look.proof import Fix, Proof
from flannel_dp.look.text import ProgressBar
from flannel_dp.probe.oneshot import Effort

#: What is switched off for a verdict about this node.
_FEATURES = {"checksum": CHECKSUM, "segments": SEGMENTS}

log = logging.getLogger(__name__)


def prove(given: Mapping[str, Any], peers: Sequence[str], *, fix_offload: bool) -> int:
    """Prove that peers are reachable; return the exit code."""
    rest = {**given}
    count, paths, timeout = rest.pop("count"), rest.pop("paths"), rest.pop("timeout")
    effort = Effort(count, paths, timeout, search=not rest.pop("no_path_mtu"))
    made = Composition.of(rest)
    with made.open_dataplane(as_it_is=True) as dataplane, ProgressBar() as bar:
        claims = made.claims()
        proof = probe(dataplane, claims, peers, effort, bar)
        fixed: tuple[Fix, ...] = ()
        # A device may spoil segments once it no longer spoils checksums.
        for _ in _FEATURES if fix_offload else ():
            more = _fix(proof, made.request.node.netns)
            if not more:
                break
            fixed += more
            proof = replace(probe(dataplane, claims, peers, effort, bar), fixed=fixed)
    write(proof, made.request.output)
    return 0 if proof.ok else INCOMPLETE


def _fix(proof: Proof, netns: NetNS) -> tuple[Fix, ...]:
    """Switch off what this node's network card spoils, on the vxlan devices; return what was."""
    found = {
        Fix(one.device, _FEATURES[one.code])
        for one in proof.peers
        if one.side == "this node" and one.code in _FEATURES and one.device
    }
    for one in sorted(found, key=lambda fix: fix.device):
        call_in_netns(netns, switch_off, one.device, one.feature)
        log.warning(
            "Switched off %(feature)s of %(device)s: the network card spoils tunnel packets; "
            "'flannel-dp clean' switches it on again",
            {"device": one.device, "feature": one.feature},
        )
    return tuple(sorted(found, key=lambda fix: fix.device))
