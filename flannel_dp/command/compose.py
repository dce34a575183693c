"""From the command's flags to the objects that do the work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from flannel_dp.command import flags

if TYPE_CHECKING:
    import logging

    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.dataplane import DataPlane
    from flannel_dp.resources.firewall.options import RulesOptions
    from flannel_dp.sources import Snapshot
    from flannel_dp.sources.membership import Membership

Given = dict[str, Any]

_logs: list[logging.Handler] = []


@contextmanager
def open_dataplane(
    given: Given, *, take_over: bool = False, allow_shrink: bool = False, alone: bool = False
) -> Iterator[DataPlane]:
    """The data plane that the flags describe, closed in the end. Where the cluster knows this
    node by other addresses it has these, unless it is to do without the cluster: ``alone``."""
    if given["verbose"]:
        start_log(given["verbose"])
    if has_source(given) and not alone:
        member = membership(given)
        given = _addressed(given, member) | {"node_name": member.name()}
    with make_dataplane(given, take_over=take_over, allow_shrink=allow_shrink) as made:
        yield made


def make_dataplane(
    given: Given, *, take_over: bool, allow_shrink: bool, config: NetworkConfig | None = None
) -> DataPlane:
    """The data plane that the flags describe. Raises ConfigError, and SourceError where the
    configuration is in etcd."""
    from flannel_dp.dataplane import DataPlane

    return DataPlane(
        config or network_config(given),
        iface=given["iface"],
        iface_regex=given["iface_regex"],
        iface_can_reach=given["iface_can_reach"],
        behind_nat=given["behind_nat"],
        public_ip=given["public_ip"],
        public_ipv6=given["public_ipv6"],
        subnet=given["subnet"],
        node_name=given.get("node_name", ""),
        netns=given["netns"],
        take_over=take_over,
        allow_shrink=allow_shrink,
        nexthops=not given["no_nexthops"],
        rules=_rules(given),
        subnet_file=_subnet_file(given),
        ip_blackhole_route=given["ip_blackhole_route"],
        counters=given.get("counters"),
    )


def network_config(given: Given) -> NetworkConfig:
    """The network's configuration, with what the flags say of it. Raises ConfigError,
    SourceError."""
    return membership(given).config().with_forwarding(given.get("forwarding"))


def _addressed(given: Given, member: Membership) -> Given:
    """The flags, and what the cluster says of this node's addresses."""
    given, flag = dict(given), {4: "public_ip", 6: "public_ipv6"}
    for family, address in member.chosen().items():
        given[flag[family]] = given[flag[family]] or address
    for family, address in member.public().items():
        given |= {flag[family]: address, "behind_nat": True}
    return given


def _rules(given: Given) -> RulesOptions | None:
    """The firewall rules to keep. Without a program for them only what was asked for in so
    many words is missed; flanneld's defaults are not."""
    from flannel_dp.resources.firewall.options import RulesOptions

    if given["firewall"] == "none":
        for flag in ("ip_masq", "guard_underlay"):
            if given[flag]:
                name = flag.replace("_", "-")
                raise click.UsageError(f"--{name} needs a firewall, and --firewall is none")
        return None
    return RulesOptions(
        ip_masq=given["ip_masq"],
        forward=given["iptables_forward_rules"],
        guard=given["guard_underlay"],
        engine=given["firewall"],
        random_fully=not given["ip_masq_fully_random_disable"],
        required=given["ip_masq"] or given["guard_underlay"] or given["firewall"] != "auto",
    )


def _subnet_file(given: Given) -> str:
    """One file serves one node: in another namespace it has to be named."""
    if given["subnet_file"] is not None:
        return str(given["subnet_file"])
    return "" if given["netns"] else flags.SUBNET_FILE


def has_source(given: Given) -> bool:
    """Whether the flags say where the leases are."""
    return bool(given["leases"] or given["etcd_endpoints"] or given["kube_subnet_mgr"])


def membership(given: Given) -> Membership:
    """The cluster that the flags say this node is part of: made once for one set of flags.

    etcd where they say nothing, as flanneld does.
    """
    if "membership" not in given:
        given["membership"] = _membership(given)
    made: Membership = given["membership"]
    return made


def _membership(given: Given) -> Membership:
    from flannel_dp.sources.membership import EtcdMembership, FileMembership, KubeMembership

    prefix = given.get("kube_annotation_prefix", flags.ANNOTATION_PREFIX)
    if given.get("leases"):
        from flannel_dp.sources.file import FileSource

        return FileMembership(
            FileSource(given["leases"], annotation_prefix=prefix), given["net_conf"]
        )
    if given.get("kube_subnet_mgr"):
        from flannel_dp.sources.kube.config import KubeOptions

        options = KubeOptions(
            kubeconfig=given["kubeconfig_file"],
            api_url=given["kube_api_url"],
            annotation_prefix=prefix,
            set_node_network_unavailable=given.get("set_node_network_unavailable", True),
        )
        return KubeMembership(options, given["net_conf"])
    if not given.get("etcd_endpoints") and not given.get("watching"):
        return FileMembership(None, given["net_conf"])
    from flannel_dp.sources.etcd.options import EtcdOptions

    etcd = EtcdOptions(
        endpoints=tuple((given["etcd_endpoints"] or flags.ETCD_ENDPOINTS).split(",")),
        prefix=given["etcd_prefix"],
        keyfile=given["etcd_keyfile"],
        certfile=given["etcd_certfile"],
        cafile=given["etcd_cafile"],
        username=given["etcd_username"],
        password=given["etcd_password"],
        password_file=given["etcd_password_file"],
    )
    note = _note(etcd.prefix) if given.get("watching") else ""
    return EtcdMembership(etcd, 60.0 * given.get("subnet_lease_renew_margin", 60), note)


def _note(prefix: str) -> str:
    """The file that tells the next process of this node which lease in etcd is its own: one for
    each network namespace and prefix, beside the locks."""
    from hashlib import blake2b

    from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
    from flannel_dp.kernel.netns import netns_identity

    mark = blake2b(prefix.encode(), digest_size=8).hexdigest()
    return f"{DEFAULT_DIRECTORY}/{netns_identity(None)[1]}-{mark}.lease"


def need_source(given: Given) -> None:
    """A usage error where the flags do not say where the leases are."""
    if not has_source(given):
        raise click.UsageError(
            "where are the leases? give --leases, --etcd-endpoints or --kube-subnet-mgr"
        )


def read_snapshot(given: Given) -> Snapshot:
    """All leases, now. Raises SourceError."""
    return membership(given).source.snapshot()


@contextmanager
def locked(dataplane: DataPlane) -> Iterator[None]:
    """Hold every vxlan device of the configuration, whoever forwards, so that two writers never
    meet.

    Taken before the leases are read: whoever writes last has read last.
    """
    from flannel_dp.errors import NotPermitted
    from flannel_dp.kernel.lock import DeviceLock
    from flannel_dp.resources.device.vxlan import other_devices

    with ExitStack() as stack:
        for name in other_devices(dataplane.config):
            lock = DeviceLock(name, dataplane.netns)
            try:
                stack.enter_context(lock)
            except NotPermitted as error:
                error.hint = f"run as root, or grant CAP_NET_ADMIN and the right to {lock.path}"
                raise
        yield


def _stay() -> None:
    """The command goes on for long, and what it leaves in circles has to be collected (see
    __main__.py)."""
    import gc

    gc.enable()


def run_service(given: Given, *, take_over: bool, allow_shrink: bool) -> None:
    """``sync --watch``: until a signal ends it."""
    import os

    from flannel_dp.agent.notify import Notifier
    from flannel_dp.agent.service import Service, ServiceOptions
    from flannel_dp.kernel.netns import enter_netns

    _stay()
    if given["output"] == "json":
        raise click.UsageError("--watch logs as it goes: use --log-json in place of --output json")
    if given["leases"] == "-":
        raise click.UsageError("--watch follows a file, and standard input does not change")
    start_log(given["verbose"] + 1, json=given["log_json"])
    given = given | {"subnet_file": _subnet_file(given), "watching": True}
    if given["netns"]:
        enter_netns(given["netns"])
        given["netns"] = None
    options = ServiceOptions(
        audit=given["audit_interval"],
        healthz_ip=given["healthz_ip"],
        healthz_port=given["healthz_port"] or None,
        keep=_capabilities(given),
    )
    node = _Node(given, take_over=take_over, allow_shrink=allow_shrink)
    Service(node, options, Notifier.from_environment(os.environ)).run()


class _Node:
    """What a Service is made of, by the flags (service.Build)."""

    def __init__(self, given: Given, *, take_over: bool, allow_shrink: bool) -> None:
        self._given = given
        self._take_over, self._allow_shrink = take_over, allow_shrink

    def config(self) -> NetworkConfig:
        return network_config(self._given)

    def join(self, config: NetworkConfig) -> tuple[DataPlane, Membership]:
        """Take part in the cluster: the subnet that was taken is the data plane's."""
        member = membership(self._given)
        given = _addressed(self._given, member)
        with self._plane(given, config) as plane:
            subnets = member.join(plane.identity(), config, plane.resolver.previous())
        if subnets:
            given = given | {"subnet": ",".join(subnets.values())}
        plane = self._plane(given, config)
        with ExitStack() as stack:
            stack.callback(plane.close)
            plane.program.reserve()  # while it is permitted
            stack.pop_all()
        return plane, member

    def _plane(self, given: Given, config: NetworkConfig) -> DataPlane:
        return make_dataplane(
            given, take_over=self._take_over, allow_shrink=self._allow_shrink, config=config
        )


def run_view(given: Given) -> None:
    """``show --watch``: until it is interrupted. Reads, and never writes."""
    from flannel_dp.look.drift_viewer import Onlooker
    from flannel_dp.look.live_show import watch_json, watch_view
    from flannel_dp.resources.counters.resource import Meter

    _stay()
    with open_dataplane(given, alone=True) as dataplane:
        claims = read_snapshot(given).claims if has_source(given) else None
        with Onlooker(dataplane, claims) as onlooker, contextlib.suppress(KeyboardInterrupt):
            if given["output"] == "json":
                watch_json(onlooker.look, onlooker.events, stop=lambda: False)
            else:
                source = membership(given).source.origin if claims else "the kernel alone"
                watch_view(
                    onlooker.look,
                    onlooker.events,
                    stop=lambda: False,
                    source=source,
                    rates=Meter(dataplane.counting).rates,
                )


def run_stats(given: Given, interval: float, *, as_json: bool) -> None:
    """``stats --watch``: until it is interrupted. Reads, and never writes."""
    import threading

    from flannel_dp.look.live_stats import watch_stats
    from flannel_dp.look.stats import StatsReader

    _stay()
    with open_dataplane(given, alone=True) as dataplane:
        claims = read_snapshot(given).claims if has_source(given) else None
        reader = StatsReader(dataplane, claims)
        watch_stats(reader.look, threading.Event().wait, interval=interval, as_json=as_json)


def _capabilities(given: Given) -> frozenset[str]:
    """What the work needs. iptables in its legacy form opens a raw socket, and before Linux 6.0
    who may not load BPF programs may not look into their maps either."""
    import os

    from flannel_dp.errors import FlannelDPError
    from flannel_dp.resources.firewall.choice import needs_raw_socket

    wanted, firewall = {"CAP_NET_ADMIN"}, given["firewall"]
    if int(os.uname().release.split(".")[0]) < 6 and _may_be_by_program(given):
        wanted.add("CAP_BPF")
    try:
        legacy = firewall != "none" and needs_raw_socket(firewall)
    except FlannelDPError:  # told when the rules are written
        legacy = False
    if legacy:
        wanted.add("CAP_NET_RAW")
    if given["counters"]:
        from flannel_dp.bpf.loader import capabilities_for_pins

        wanted |= capabilities_for_pins()
    return frozenset(wanted)


def _may_be_by_program(given: Given) -> bool:
    """Whether a program forwards; taken for granted where the configuration is not known yet."""
    from flannel_dp.errors import FlannelDPError

    try:
        return network_config(given).backend.by_program
    except FlannelDPError:
        return True


def start_log(level: int, json: bool = False) -> None:
    """Log to standard error: 1 what matters to an operator, 2 everything."""
    import logging

    from flannel_dp.agent.logs import configure

    _logs.append(configure(logging.INFO if level == 1 else logging.DEBUG, json))


def stop_log() -> None:
    """Undo ``start_log``: the command may have been called by a program that goes on."""
    if not _logs:
        return
    import logging

    while _logs:
        logging.getLogger().removeHandler(_logs.pop())
    logging.getLogger("flannel_dp").setLevel(logging.NOTSET)
