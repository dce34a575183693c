"""What ``flannel-dp clean`` does: remove, hand the node back to flanneld, or remove leftovers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flannel_dp.command.compose import Composition
from flannel_dp.command.output import INCOMPLETE, finish, write

if TYPE_CHECKING:
    from flannel_dp.reconcile.report import Report


def clean(given: Mapping[str, Any], *, keep_device: bool, only_rules: bool) -> int:
    """Remove what flannel-dp made; return the exit code."""
    made = Composition.of(given)
    with made.open_dataplane(alone=True, as_it_is=True) as dataplane:
        if only_rules:  # flanneld may run by now, and its device is no business of ours
            report = dataplane.clean(only_rules=True)
        else:
            report = dataplane.clean(keep_device=keep_device)
    return finish(report, made.request.output, "clean")


def clean_stale(given: Mapping[str, Any]) -> int:
    """Remove what was left behind on this host; return the exit code."""
    from flannel_dp.leftovers import sweep

    made = Composition.of(given)
    node = made.request.node
    found = sweep(node.run_dir, node.netns)
    write(found, made.request.output)
    return 0 if found.ok else INCOMPLETE


def clean_for_flanneld(given: Mapping[str, Any]) -> int:
    """Leave the node as flanneld would have it; return the exit code."""
    made, report = _hand_back(given)
    return finish(report, made.request.output, "ready for flanneld")


def _hand_back(given: Mapping[str, Any]) -> tuple[Composition, Report]:
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
