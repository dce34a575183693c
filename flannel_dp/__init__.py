"""Keep one Linux node's vxlan overlay in agreement with a cluster's leases.

The short way in::

    from flannel_dp import DataPlane, FileSource, NetworkConfig

    config = NetworkConfig.from_file("/etc/kube-flannel/net-conf.json")
    with DataPlane(config, iface="eth0") as dataplane:
        report = dataplane.sync(FileSource("leases.json").snapshot().claims)

Below it, for programs with peers of their own and no leases: ``Kernel``, the
``*_table``, ``*_columns`` and ``*_scope`` functions, ``Plan``, and
``VxlanDevice`` with ``plan_device``, ``apply_device`` and ``delete_device``.

Names are imported when they are first used (PEP 562), so ``import flannel_dp``
alone loads nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for True; importing typing costs milliseconds

if TYPE_CHECKING:
    from flannel_dp._core import Claims, Diff, Table, diff_tables
    from flannel_dp.agent.agent import Agent
    from flannel_dp.agent.status import Status, StatusBoard
    from flannel_dp.cluster.backend import Backend
    from flannel_dp.cluster.documents import decode_leases
    from flannel_dp.cluster.lease import BackendData, BadClaim, Identity, Lease, LeaseList
    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.cluster.rejections import Reason, Rejection
    from flannel_dp.dataplane import DataPlane
    from flannel_dp.errors import (
        AuthFailed,
        Busy,
        Compacted,
        ConfigError,
        Conflict,
        DeviceGone,
        DumpInterrupted,
        FlannelDPError,
        KernelError,
        LeaseRejected,
        NotPermitted,
        NotYet,
        Overrun,
        ShrinkRefused,
        SourceError,
        Unavailable,
        Unsupported,
    )
    from flannel_dp.kernel.host import Host
    from flannel_dp.kernel.links import LinkReader
    from flannel_dp.kernel.lock import DeviceLock
    from flannel_dp.kernel.tables import Kernel
    from flannel_dp.look.explanation import Explanation
    from flannel_dp.node.family import Family, View
    from flannel_dp.probe.life import LifeChange, PeerLife
    from flannel_dp.probe.prober import Prober
    from flannel_dp.reconcile.drift import Drift, Repair
    from flannel_dp.reconcile.keeper import Keeper, keep
    from flannel_dp.reconcile.plan import DeviceChange, Plan, TablePlan
    from flannel_dp.reconcile.report import Report
    from flannel_dp.reconcile.resource import Done, Resource, Result
    from flannel_dp.reconcile.watch import Watch
    from flannel_dp.reconcile.watch_all import watch_all
    from flannel_dp.resources.counters.store import Counters
    from flannel_dp.resources.device.change import apply_device, delete_device
    from flannel_dp.resources.device.plan import DevicePlan, plan_device
    from flannel_dp.resources.device.vxlan import VxlanDevice
    from flannel_dp.resources.firewall.options import RulesOptions
    from flannel_dp.resources.forwarding.program import Forwarding
    from flannel_dp.sources import (
        Call,
        Change,
        Delivery,
        FollowedSource,
        Inbox,
        Snapshot,
        Source,
    )
    from flannel_dp.sources.etcd.options import EtcdOptions
    from flannel_dp.sources.etcd.source import EtcdSource
    from flannel_dp.sources.file import FileSource
    from flannel_dp.sources.kube.config import KubeOptions
    from flannel_dp.sources.kube.source import KubeSource
    from flannel_dp.sources.push import PushSource
    from flannel_dp.tables.columns import (
        fdb_columns,
        fdb_table,
        ids_of,
        neighbour_columns,
        neighbour_table,
        nexthop_columns,
        nexthop_table,
        peer_table,
        route_columns,
        route_table,
    )
    from flannel_dp.tables.entries import PROTOCOL, Fdb, Neighbour, Nexthop, Peer, Route, Scope
    from flannel_dp.tables.results import Outcome, TableResult
    from flannel_dp.tables.scopes import (
        fdb_scope,
        neighbour_scope,
        nexthop_scope,
        peer_scope,
        route_scope,
    )
    from flannel_dp.tables.shape import entry_dict

    __version__: str

__all__ = [
    "PROTOCOL",
    "Agent",
    "AuthFailed",
    "Backend",
    "BackendData",
    "BadClaim",
    "Busy",
    "Call",
    "Change",
    "Claims",
    "Compacted",
    "ConfigError",
    "Conflict",
    "Counters",
    "DataPlane",
    "Delivery",
    "DeviceChange",
    "DeviceGone",
    "DeviceLock",
    "DevicePlan",
    "Diff",
    "Done",
    "Drift",
    "DumpInterrupted",
    "EtcdOptions",
    "EtcdSource",
    "Explanation",
    "Family",
    "Fdb",
    "FileSource",
    "FlannelDPError",
    "FollowedSource",
    "Forwarding",
    "Host",
    "Identity",
    "Inbox",
    "Keeper",
    "Kernel",
    "KernelError",
    "KubeOptions",
    "KubeSource",
    "Lease",
    "LeaseList",
    "LeaseRejected",
    "LifeChange",
    "LinkReader",
    "Neighbour",
    "NetworkConfig",
    "Nexthop",
    "NotPermitted",
    "NotYet",
    "Outcome",
    "Overrun",
    "Peer",
    "PeerLife",
    "Plan",
    "Prober",
    "PushSource",
    "Reason",
    "Rejection",
    "Repair",
    "Report",
    "Resource",
    "Result",
    "Route",
    "RulesOptions",
    "Scope",
    "ShrinkRefused",
    "Snapshot",
    "Source",
    "SourceError",
    "Status",
    "StatusBoard",
    "Table",
    "TablePlan",
    "TableResult",
    "Unavailable",
    "Unsupported",
    "View",
    "VxlanDevice",
    "Watch",
    "__version__",
    "apply_device",
    "decode_leases",
    "delete_device",
    "diff_tables",
    "entry_dict",
    "fdb_columns",
    "fdb_scope",
    "fdb_table",
    "ids_of",
    "keep",
    "neighbour_columns",
    "neighbour_scope",
    "neighbour_table",
    "nexthop_columns",
    "nexthop_scope",
    "nexthop_table",
    "peer_scope",
    "peer_table",
    "plan_device",
    "route_columns",
    "route_scope",
    "route_table",
    "watch_all",
]

_HOMES = {
    "_core": "Claims Diff Table diff_tables",
    "cluster.rejections": "Reason Rejection",
    "agent.agent": "Agent",
    "resources.device.vxlan": "VxlanDevice",
    "cluster.backend": "Backend",
    "cluster.network": "NetworkConfig",
    "resources.counters.store": "Counters",
    "dataplane": "DataPlane",
    "tables.entries": "PROTOCOL Fdb Neighbour Nexthop Peer Route Scope",
    "errors": "AuthFailed Busy Compacted ConfigError Conflict DeviceGone DumpInterrupted "
    "FlannelDPError KernelError LeaseRejected NotPermitted NotYet Overrun ShrinkRefused "
    "SourceError Unavailable Unsupported",
    "resources.forwarding.program": "Forwarding",
    "resources.firewall.options": "RulesOptions",
    "resources.device.plan": "DevicePlan plan_device",
    "resources.device.change": "apply_device delete_device",
    "kernel.host": "Host",
    "kernel.links": "LinkReader",
    "kernel.lock": "DeviceLock",
    "kernel.tables": "Kernel",
    "cluster.documents": "decode_leases",
    "cluster.lease": "BackendData BadClaim Identity Lease LeaseList",
    "reconcile.plan": "DeviceChange Plan TablePlan",
    "reconcile.report": "Report",
    "node.family": "Family View",
    "probe.life": "LifeChange PeerLife",
    "probe.prober": "Prober",
    "reconcile.resource": "Done Resource Result",
    "tables.results": "Outcome TableResult",
    "sources": "Call Change Delivery FollowedSource Inbox Snapshot Source",
    "sources.etcd.options": "EtcdOptions",
    "sources.etcd.source": "EtcdSource",
    "sources.file": "FileSource",
    "sources.kube.config": "KubeOptions",
    "sources.kube.source": "KubeSource",
    "sources.push": "PushSource",
    "look.explanation": "Explanation",
    "agent.status": "Status StatusBoard",
    "tables.columns": "fdb_columns fdb_table ids_of neighbour_columns neighbour_table "
    "nexthop_columns nexthop_table peer_table route_columns route_table",
    "tables.scopes": "fdb_scope neighbour_scope nexthop_scope peer_scope route_scope",
    "reconcile.drift": "Drift Repair",
    "reconcile.keeper": "Keeper keep",
    "tables.shape": "entry_dict",
    "reconcile.watch": "Watch",
    "reconcile.watch_all": "watch_all",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

#: Former public names: what they are called now, and the version that first warned
#: (flannel_dp/deprecation.py has the rule).
_RENAMED: dict[str, tuple[str, str]] = {}


if not TYPE_CHECKING:  # a checker that saw it would let every misspelt name pass

    def __getattr__(name: str) -> object:
        """Import a public name when it is first asked for, and keep it."""
        if name == "__version__":
            from importlib.metadata import PackageNotFoundError, version

            try:
                value: object = version("flannel-dp")
            except PackageNotFoundError:  # a source tree that was not installed
                value = "0+unknown"
        elif name in _HOME_OF:
            from importlib import import_module

            value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        elif name in _RENAMED:
            from flannel_dp.deprecation import warn_deprecated

            new, since = _RENAMED[name]
            warn_deprecated(f"flannel_dp.{name}", f"flannel_dp.{new}", since=since)
            return globals().get(new) or __getattr__(new)  # not kept: each use warns
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
