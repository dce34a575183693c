"""``flannel-dp clean --for-flanneld``: leave the node as flanneld would have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flannel_dp.command.compose import Composition

if TYPE_CHECKING:
    from flannel_dp.reconcile.report import Report


def hand_back(given: Mapping[str, Any]) -> tuple[Composition, Report]:
    """Rewrite all entries in place, in the form that flanneld writes, and remove the counters'
    filters. Firewall rules stay, as packets need them until flanneld has its own.

    flanneld can neither delete nor replace a route that uses a nexthop object: the kernel does not
    match its gateway. Where an eBPF program forwards the kernel does from then on. Raises as
    ``DataPlane.sync``, and Busy where an agent still runs.
    """
    made = Composition.of({**given, "for_flanneld": True, "forwarding": "kernel"})
    made.need_source()
    with made.open_dataplane() as dataplane:
        dataplane.hold()
        return made, dataplane.sync(made.snapshot().claims)
