"""Firewall rules and subnet.env for a DataPlane that does not compose resources yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from flannel_dp._core import Claims
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.host import Host
from flannel_dp.kernel.netns import NetNS
from flannel_dp.reconcile.plan import RulesChange
from flannel_dp.reconcile.reconciler import Reconciler
from flannel_dp.resources.device import vxlan
from flannel_dp.resources.firewall.options import RulesOptions
from flannel_dp.resources.firewall.resource import FirewallResource
from flannel_dp.resources.subnet_file import SubnetFileResource

if TYPE_CHECKING:
    from flannel_dp.node.view import Family
    from flannel_dp.reconcile.report import Report


class _View(NamedTuple):
    families: list[Family]
    errors: Mapping[int, FlannelDPError]


class _Changed(NamedTuple):
    family: Family
    old: Claims
    new: Claims
    peers: Claims


def _view(config: NetworkConfig, families: Iterable[Family]) -> _View:
    found = list(families)
    missing = {*vxlan.families_of(config)} - {family.number for family in found}
    return _View(found, {number: FlannelDPError("not resolved") for number in missing})


class HostRules:
    """The firewall rules of one data plane. Raises as ``FirewallResource``."""

    def __init__(self, options: RulesOptions, config: NetworkConfig, netns: NetNS) -> None:
        self.resource = FirewallResource(options, config)
        self._config, self._host = config, Host(netns)

    def plan(self, families: list[Family]) -> tuple[RulesChange | None, tuple[str, ...]]:
        """What would be written, and whose rules stop packets all the same."""
        self.resource.probe = True
        desired = self.resource.desired(_view(self._config, families))
        change = self.resource.compare(self._host, desired, {})
        return change.rules(), change.warnings + (change.blockers or ())

    def blockers(self, families: list[Family]) -> tuple[str, ...]:
        """The rules of others that stop packets although ours are in place."""
        return self.resource.blockers(self._host, _view(self._config, families))

    def follow(self, family: Family, old: Claims, new: Claims) -> None:
        """Let the guard's set follow a change of peers."""
        self.resource.update(self._host, _Changed(family, old, new, family.peers), {})


def sync_host(
    rules: HostRules | None,
    path: str,
    config: NetworkConfig,
    families: list[Family],
    report: Report,
    *,
    probe: bool,
    netns: NetNS = None,
) -> None:
    """Sync firewall rules and the subnet.env at ``path`` ("": none), and fill the report."""
    view = _view(config, families)
    resources: list[Any] = []
    if rules is not None:
        rules.resource.probe = probe
        resources.append(rules.resource)
    if path:
        masq = rules is not None and rules.resource.options.ip_masq
        resources.append(SubnetFileResource(path, config, ip_masq=masq))
    reconciler = Reconciler(Host(netns), resources)
    found = reconciler.sync(view)
    for one in reconciler.resources:
        one.record(report, found.changes.get(one.name), found.done[one.name])
    if not view.errors:
        report.looked |= {"firewall", "subnet file"} | ({"forwarding"} if rules is None else set())
