"""What ``flannel-dp clean`` does: remove, hand the node back to flanneld, or remove leftovers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from flannel_dp.command.compose import Composition
from flannel_dp.command.output import INCOMPLETE, finish, write

if TYPE_CHECKING:
    from flannel_dp.reconcile.report import Report


def clean_as_asked(
    *,
    keep_device: bool,
    for_flanneld: bool,
    allow_incomplete: bool,
    only_rules: bool,
    stale: bool,
    **given: Any,
) -> int:
    """Do what the flags say; return the exit code. Raises a usage error for two modes at once."""
    if keep_device + for_flanneld + only_rules + stale > 1:
        raise click.UsageError(
            "give one of --keep-device, --for-flanneld, --only-rules and --stale"
        )
    if allow_incomplete and not for_flanneld:
        raise click.UsageError("--allow-incomplete has no effect without --for-flanneld")
    if for_flanneld:
        return _hand_back(given, allow_incomplete=allow_incomplete)
    if stale:
        return _clean_stale(given)
    return _clean(given, keep_device=keep_device, only_rules=only_rules)


def _clean(given: Mapping[str, Any], *, keep_device: bool, only_rules: bool) -> int:
    """Remove what flannel-dp made; return the exit code."""
    made = Composition.of(given)
    with made.open_dataplane(alone=True, as_it_is=True) as dataplane:
        if only_rules:  # flanneld may run by now, and its device is no business of ours
            report = dataplane.clean(only_rules=True)
        else:
            report = dataplane.clean(keep_device=keep_device)
    return finish(report, made.request.output, "clean")


def _clean_stale(given: Mapping[str, Any]) -> int:
    """Remove what was left behind on this host; return the exit code."""
    from flannel_dp.leftovers import sweep

    made = Composition.of(given)
    node = made.request.node
    found = sweep(node.run_dir, node.netns)
    write(found, made.request.output)
    return 0 if found.ok else INCOMPLETE


def _hand_back(given: Mapping[str, Any], *, allow_incomplete: bool) -> int:
    """Rewrite all entries in place, in the form that flanneld writes, and remove the counters'
    filters; return the exit code. Firewall rules stay, as packets need them until flanneld has its
    own.

    flanneld can neither delete nor replace a route that uses a nexthop object: the kernel does not
    match its gateway. Where an eBPF program forwards the kernel does from then on. Raises as
    ``DataPlane.sync``, and Busy where an agent still runs.
    """
    from flannel_dp.cluster.network import devices_of
    from flannel_dp.errors import ShrinkRefused
    from flannel_dp.kernel.offload import all_on_again

    made = Composition.of({**given, "for_flanneld": True, "forwarding": "kernel"})
    made.need_source()
    with made.open_dataplane() as dataplane:
        dataplane.hold()
        try:
            report = dataplane.sync(made.snapshot().claims)
        except ShrinkRefused as error:  # what the list lacks is kept, as flanneld would have it
            if not allow_incomplete or error.report is None:
                error.hint = (
                    "check the source; --allow-incomplete keeps these peers and ends with 0"
                )
                raise
            report = error.report
            report.warnings += (error.message,)
        all_on_again(dataplane.host.netns, devices_of(dataplane.config).values())
    allowed = _nothing_of_ours_stays(report)
    code = finish(
        report, made.request.output, "ready for flanneld", allowed=allowed and allow_incomplete
    )
    if code and allowed:
        click.echo(
            "flannel-dp: flanneld replaces other programs' routes to its peers: "
            "with --allow-incomplete this is no error",
            err=True,
        )
    return code


def _nothing_of_ours_stays(report: Report) -> bool:
    """Return whether all that is there of ours has flanneld's form: what failed was to be added."""
    return not (report.family_errors or report.problems) and all(
        one.op == "add" for one in report.failures
    )
