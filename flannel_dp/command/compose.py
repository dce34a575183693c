"""From the command's flags to the objects that do the work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click

from flannel_dp.command import flags

if TYPE_CHECKING:
    import logging

    from flannel_dp.cluster.lease import LeaseList
    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.command.request import Request, RulesFlags, SourceFlags
    from flannel_dp.dataplane import DataPlane
    from flannel_dp.errors import Unavailable
    from flannel_dp.kernel.netns import NetNS
    from flannel_dp.options import Keywords
    from flannel_dp.resources.firewall.options import RulesOptions
    from flannel_dp.sources import Snapshot
    from flannel_dp.sources.etcd.options import EtcdOptions
    from flannel_dp.sources.membership import Membership

_logs: list[logging.Handler] = []


class Composition:
    """The objects that one call of the command works with, made of its flags when they are
    asked for; its methods raise ConfigError and SourceError."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._unanswered = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Composition:
        """Return the composition for the flags that click has parsed."""
        from flannel_dp.command.request import Request

        return cls(Request.of(given))

    @property
    def has_source(self) -> bool:
        """Whether the flags say where the leases are."""
        return self.request.source.is_named

    def need_source(self) -> None:
        """Raise a usage error where the flags do not say where the leases are."""
        if not self.has_source:
            raise click.UsageError(
                "where are the leases? give --leases, --etcd-endpoints or --kube-subnet-mgr"
            )

    @cached_property
    def membership(self) -> Membership:
        """The cluster that this node is part of: a file's where the flags name no other."""
        request = self.request
        if not request.source.is_named:
            from flannel_dp.sources.membership import FileMembership

            return FileMembership(None, request.node.net_conf)
        return make_membership(request)

    def config(self) -> NetworkConfig:
        """Return the network's configuration, with what the flags say of it."""
        from flannel_dp.errors import NotYet

        request = self.request
        try:
            return self.membership.config().with_forwarding(request.node.forwarding)
        except NotYet as error:
            if not request.source.etcd_endpoints and not os.path.exists(request.node.net_conf):
                error.hint = "give --net-conf FILE, or --etcd-endpoints if etcd has it"
            raise

    def snapshot(self) -> Snapshot:
        """Read all leases."""
        return self.membership.source.snapshot()

    def claims(self) -> LeaseList | None:
        """Read all leases where the flags say where they are, for a view: None where they do not,
        and where the cluster's server does not answer."""
        from flannel_dp.errors import Unavailable

        if not self.has_source or self._unanswered:
            return None
        try:
            return self.snapshot().claims
        except Unavailable as error:
            if self.request.source.leases:
                raise
            click.echo(f"flannel-dp: {error.message}; without leases", err=True)
            return None

    def _remembered(self, error: Unavailable) -> NetworkConfig:
        """Return the network as this node remembers it, where the cluster's server does not answer;
        from then on there are no leases. Raises ``error`` where the node remembers none."""
        from flannel_dp.look.remembered import remembered_config

        request, config = self.request, None
        path = request.subnet_file  # "" in a namespace that no file was named for
        if path and not request.source.leases:
            config = remembered_config(request.node.netns, path)
        if config is None:
            raise error
        self._unanswered = True
        text = f"{error.message}; without leases, in the network of {path}"
        click.echo(f"flannel-dp: {text}", err=True)
        return config.with_forwarding(request.node.forwarding)

    @contextmanager
    def open_dataplane(self, *, alone: bool = False, as_it_is: bool = False) -> Iterator[DataPlane]:
        """Open the data plane that the flags describe, and close it in the end. Where the cluster
        knows this node by other addresses it has these, unless it is to work ``alone``, without
        asking the cluster. With ``as_it_is`` it is in the mode of forwarding that the node is in,
        where neither flags nor configuration name one, and the cluster's server need not answer."""
        from flannel_dp.errors import Unavailable

        request = self.request
        if request.verbose:
            start_log(request.verbose)
        try:
            if self.has_source and not alone:
                request = with_addresses(request, self.membership, node_name=self.membership.name())
            config = self.config()
        except Unavailable as error:
            if not as_it_is:
                raise
            config = self._remembered(error)
        if as_it_is:
            from flannel_dp.resources.forwarding.view import in_present_mode

            config = in_present_mode(config, request.node.netns)
        with make_dataplane(request, config) as made:
            yield made


def make_dataplane(request: Request, config: NetworkConfig, *, patient: bool = False) -> DataPlane:
    """Make the data plane that the flags describe; it is ``patient`` where it waits for what may
    come later. Raises ConfigError."""
    from flannel_dp.dataplane import DataPlane

    node, rules = request.node, request.rules
    keywords: Keywords = {
        "iface": node.iface,
        "iface_regex": node.iface_regex,
        "iface_can_reach": node.iface_can_reach,
        "behind_nat": node.behind_nat,
        "public_ip": node.public_ip,
        "public_ipv6": node.public_ipv6,
        "subnet": node.subnet,
        "node_name": node.node_name,
        "netns": node.netns,
        "take_over": request.take_over,
        "allow_shrink": request.allow_shrink,
        "nexthops": not node.no_nexthops,
        "rules": _rules_options(rules),
        "subnet_file": request.subnet_file,
        "ip_blackhole_route": rules.ip_blackhole_route,
        "counters": request.counters,
    }
    if patient:
        keywords["patient"] = True
    return DataPlane(config, **keywords)


def with_addresses(request: Request, member: Membership, *, node_name: str = "") -> Request:
    """Return the flags with the addresses that the cluster has for this node."""
    from msgspec.structs import replace

    node = request.node.with_addresses(member.chosen(), member.public())
    return replace(request, node=replace(node, node_name=node_name or node.node_name))


def _rules_options(rules: RulesFlags) -> RulesOptions | None:
    """Return the firewall rules to keep, None for none. Where no firewall program is installed,
    only rules that a flag asks for are an error; flanneld's defaults are not."""
    from flannel_dp.resources.firewall.options import RulesOptions

    if rules.firewall == "none":
        for name, wanted in (("ip-masq", rules.ip_masq), ("guard-underlay", rules.guard_underlay)):
            if wanted:
                raise click.UsageError(f"--{name} needs a firewall, and --firewall is none")
        return None
    return RulesOptions(
        ip_masq=rules.ip_masq,
        forward=rules.iptables_forward_rules,
        guard=rules.guard_underlay,
        engine=rules.firewall,
        random_fully=not rules.ip_masq_fully_random_disable,
        required=rules.ip_masq or rules.guard_underlay or rules.firewall != "auto",
    )


def make_membership(request: Request, *, note: bool = False) -> Membership:
    """Make this node's part in the cluster that the flags name: etcd's where they name none, as
    flanneld does. ``note`` keeps for the next process which lease in etcd is this node's, and how
    far the store was."""
    from flannel_dp.sources.membership import EtcdMembership, FileMembership, KubeMembership

    source, net_conf = request.source, request.node.net_conf
    if source.leases:
        from flannel_dp.sources.file import FileSource

        file = FileSource(source.leases, annotation_prefix=source.kube_annotation_prefix)
        return FileMembership(file, net_conf)
    if source.kube_subnet_mgr:
        from flannel_dp.sources.kube.config import KubeOptions

        options = KubeOptions(
            node_name=request.node.node_name,
            kubeconfig=source.kubeconfig_file,
            api_url=source.kube_api_url,
            annotation_prefix=source.kube_annotation_prefix,
            set_node_network_unavailable=source.set_node_network_unavailable,
        )
        kept = _notes(source.kube_annotation_prefix) if note else ""
        return KubeMembership(options, net_conf, kept)
    margin = 60.0 * source.subnet_lease_renew_margin
    kept = _notes(source.etcd_prefix) if note else ""
    return EtcdMembership(etcd_options(source), margin, kept)


def etcd_options(source: SourceFlags) -> EtcdOptions:
    """Return how to reach etcd. Raises ConfigError."""
    from flannel_dp.sources.etcd.options import EtcdOptions

    return EtcdOptions(
        endpoints=tuple((source.etcd_endpoints or flags.ETCD_ENDPOINTS).split(",")),
        prefix=source.etcd_prefix,
        keyfile=source.etcd_keyfile,
        certfile=source.etcd_certfile,
        cafile=source.etcd_cafile,
        username=source.etcd_username,
        password=source.etcd_password,
        password_file=source.etcd_password_file,
    )


def _notes(prefix: str) -> str:
    """Return the path, without its suffix, of the files that a process leaves to the next one of
    this node: one of each kind for each network namespace and prefix, beside the locks."""
    from hashlib import blake2b

    from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
    from flannel_dp.kernel.netns import netns_identity

    mark = blake2b(prefix.encode(), digest_size=8).hexdigest()
    return f"{DEFAULT_DIRECTORY}/{netns_identity(None)[1]}-{mark}"


@contextmanager
def locked(config: NetworkConfig, netns: NetNS) -> Iterator[None]:
    """Lock every vxlan device of the configuration, in each mode of forwarding, against a second
    writer.

    Lock before reading the leases, so that the last writer is also the last reader.
    """
    from flannel_dp.cluster.network import other_devices
    from flannel_dp.errors import NotPermitted
    from flannel_dp.kernel.lock import DeviceLock

    with ExitStack() as stack:
        for name in other_devices(config):
            lock = DeviceLock(name, netns)
            try:
                stack.enter_context(lock)
            except NotPermitted as error:
                error.hint = f"run as root, or grant CAP_NET_ADMIN and the right to {lock.path}"
                raise
        yield


def _enable_gc() -> None:
    """Collect garbage: the command keeps running (see __main__.py)."""
    import gc

    gc.enable()


def run_service(request: Request) -> None:
    """Run ``sync --watch`` until a signal ends it."""
    import os

    from msgspec.structs import replace

    from flannel_dp.agent.notify import Notifier
    from flannel_dp.agent.service import Service, ServiceOptions
    from flannel_dp.agent.starting import Starting
    from flannel_dp.agent.status import StatusBoard
    from flannel_dp.kernel.netns import enter_netns

    _enable_gc()
    if request.as_json:
        raise click.UsageError("--watch logs as it goes: use --log-json in place of --output json")
    if request.source.leases == "-":
        raise click.UsageError("--watch follows a file, and standard input does not change")
    start_log(request.verbose + 1, json=request.service.log_json)
    notifier = Notifier.from_environment(os.environ)
    if netns := request.node.netns:
        # It may be made later in the boot, like all else; health has no place to be served yet.
        Starting(StatusBoard(), notifier).until(lambda: enter_netns(netns))
        request = replace(
            request,
            node=replace(request.node, netns=None),
            rules=replace(request.rules, subnet_file=request.subnet_file),
        )
    service, build = request.service, ServiceBuild(request)
    options = ServiceOptions(
        audit=service.audit_interval,
        healthz_ip=service.healthz_ip,
        healthz_port=service.healthz_port or None,
        keep=_capabilities(request, build),
    )
    Service(build, options, notifier).run()


class ServiceBuild:
    """What a Service is made of, by the flags (service.Build)."""

    def __init__(self, request: Request) -> None:
        self._request = request

    @cached_property
    def _membership(self) -> Membership:
        return make_membership(self._request, note=True)

    def config(self) -> NetworkConfig:
        """Read the network's configuration, with what the flags say of it."""
        return self._membership.config().with_forwarding(self._request.node.forwarding)

    def join(self, config: NetworkConfig) -> tuple[DataPlane, Membership]:
        """Join the cluster: the subnet that was taken is the data plane's."""
        from msgspec.structs import replace

        member = self._membership
        request = with_addresses(self._request, member)
        with make_dataplane(request, config, patient=True) as plane:
            node, previous = plane.resolver, plane.resolver.previous()
            subnets = member.join(
                node.identity(member.former(previous)),
                config,
                previous,
                lambda subnets, fresh: node.collisions(subnets, fresh=fresh),
            )
        if subnets:
            request = replace(
                request, node=replace(request.node, subnet=",".join(subnets.values()))
            )
        plane = make_dataplane(request, config, patient=True)
        with ExitStack() as stack:
            stack.callback(plane.close)
            plane.forwarder.reserve()  # while it is permitted
            stack.pop_all()
        return plane, member


def run_view(made: Composition) -> None:
    """Run ``show --watch`` until it is interrupted. Reads and never writes."""
    from flannel_dp.look.drift_viewer import DriftViewer
    from flannel_dp.look.live_show import watch_json, watch_view
    from flannel_dp.resources.counters.traffic import Meter

    _enable_gc()
    with made.open_dataplane(alone=True, as_it_is=True) as dataplane:
        claims = made.claims()
        with DriftViewer(dataplane, claims) as viewer, contextlib.suppress(KeyboardInterrupt):
            if made.request.as_json:
                watch_json(viewer.read, viewer.events, stop=lambda: False)
            else:
                source = made.membership.source.origin if claims else "the kernel alone"
                watch_view(
                    viewer.read,
                    viewer.events,
                    stop=lambda: False,
                    source=source,
                    rates=Meter(dataplane.counting.read).rates,
                )


def run_stats(made: Composition, interval: float) -> None:
    """Run ``stats --watch`` until it is interrupted. Reads and never writes."""
    import threading

    from flannel_dp.look.live_stats import watch_stats
    from flannel_dp.look.stats import StatsReader

    _enable_gc()
    with made.open_dataplane(alone=True, as_it_is=True) as dataplane:
        claims = made.claims()
        reader = StatsReader(dataplane, claims)
        wait, as_json = threading.Event().wait, made.request.as_json
        watch_stats(reader.read, wait, interval=interval, as_json=as_json)


def _capabilities(request: Request, build: ServiceBuild) -> frozenset[str]:
    """Return the capabilities to keep. iptables-legacy opens a raw socket."""
    from flannel_dp.errors import FlannelDPError
    from flannel_dp.resources.firewall.choice import needs_raw_socket

    wanted, firewall = {"CAP_NET_ADMIN"}, request.rules.firewall
    wanted |= _to_forward(build)
    try:
        legacy = firewall != "none" and needs_raw_socket(firewall)
    except FlannelDPError:  # the writing of the rules reports it
        legacy = False
    if legacy:
        wanted.add("CAP_NET_RAW")
    if request.counters:
        from flannel_dp.bpf.loader import capabilities_for_pins

        wanted |= capabilities_for_pins()
    return frozenset(wanted)


def _to_forward(build: ServiceBuild) -> frozenset[str]:
    """Return the capabilities that forwarding takes; all where the configuration is not known
    yet. It is only read where it matters: a source may be silent, and nothing is served yet."""
    from flannel_dp.bpf.loader import capabilities_for_pins
    from flannel_dp.composition import forwarder_of
    from flannel_dp.errors import FlannelDPError

    if not capabilities_for_pins():
        return frozenset()
    try:
        return forwarder_of(build.config()).capabilities()
    except FlannelDPError:
        return capabilities_for_pins()


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
