"""From the command's flags to the objects that do the work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    from flannel_dp.errors import FlannelDPError
    from flannel_dp.look.lives import Lives
    from flannel_dp.look.remembered import Remembered
    from flannel_dp.options import Keywords
    from flannel_dp.resources.firewall.options import RulesOptions
    from flannel_dp.sources import Snapshot
    from flannel_dp.sources.etcd.options import EtcdOptions
    from flannel_dp.sources.membership import Membership

#: What is said where a sync keeps the mode of forwarding that no flag names.
KEPT_MODE = (
    "an eBPF program forwards on this node, and goes on: neither --forwarding nor the network "
    "configuration names another mode; '--forwarding kernel' goes back to the kernel's tables"
)

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

    def lives(self, config: NetworkConfig) -> Lives | None:
        """Return which peers are alive, for a view: None where no agent on this node probes."""
        from flannel_dp.cluster.network import devices_of
        from flannel_dp.look.lives import ask_lives

        node = self.request.node
        return ask_lives(node.run_dir, node.netns, devices_of(config).values())

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

    def _remembered(self, error: FlannelDPError) -> Remembered:
        """Return the network as a running agent or subnet.env has it, where no flag says where it
        is, or the cluster's server does not answer; from then on there are no leases. Raises
        ``error`` where neither knows it, and where a file was named."""
        from flannel_dp.errors import Unavailable
        from flannel_dp.look.remembered import remembered

        request = self.request
        node, named = request.node, self.has_source
        can_help = isinstance(error, Unavailable) if named else node.net_conf == flags.NET_CONF
        found = None
        if can_help and not request.source.leases:
            # No path of subnet.env is known in a namespace that none was named for.
            found = remembered(node.run_dir, node.netns, request.subnet_file)
        if found is None:
            raise error
        self._unanswered = named
        text = f"{error.message}; without leases, in" if named else "in"
        given = request.on_interface(found.iface) is not request
        flag = f", as with --iface {found.iface}" if given else ""
        click.echo(f"flannel-dp: {text} the network of {found.origin}{flag}", err=True)
        if found.notes:
            click.echo(f"flannel-dp: it has {found.notes}: see 'flannel-dp status'", err=True)
        return found

    @contextmanager
    def open_dataplane(self, *, alone: bool = False, as_it_is: bool = False) -> Iterator[DataPlane]:
        """Open the data plane that the flags describe, and close it in the end. Where the cluster
        knows this node by other addresses it has these, unless it is to work ``alone``, without
        asking the cluster. It is in the mode of forwarding that the node is in, where neither flags
        nor configuration name one; with ``as_it_is`` the cluster's server need not answer."""
        from flannel_dp.errors import NotYet, Unavailable

        request = self.request
        if request.verbose:
            start_log(request.verbose)
        for note in request.notes:
            click.echo(f"flannel-dp: {note}", err=True)
        try:
            if self.has_source and not alone:
                request = with_addresses(request, self.membership, node_name=self.membership.name())
            config = self.config()
        except (Unavailable, NotYet) as error:
            if not as_it_is:
                raise
            found = self._remembered(error)
            config = found.config.with_forwarding(request.node.forwarding)
            request = request.on_interface(found.iface)
        present = in_mode_of_node(config, request)
        if present is not config and not as_it_is:
            click.echo(f"flannel-dp: {KEPT_MODE}", err=True)
        with make_dataplane(request, present) as made:
            yield made


def in_mode_of_node(config: NetworkConfig, request: Request) -> NetworkConfig:
    """Return the network in the mode of forwarding that this node is in, where neither flags nor
    configuration name one: going back from an eBPF program takes --forwarding kernel."""
    from flannel_dp.kernel.lock import has_pins

    if config.names_forwarding or not has_pins(request.node.run_dir):
        return config
    from flannel_dp.resources.forwarding.view import in_present_mode

    return in_present_mode(config, request.node.netns, request.node.run_dir)


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
        "run_dir": node.run_dir,
        "path_mtus": request.service.keeps_mtus,
    }
    if patient:  # the service has locked the devices before it joins the cluster
        keywords["patient"], keywords["lock"] = True, False
    if request.for_flanneld:
        keywords |= {"hand_back": True, "rules": None, "counters": False}
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
    from flannel_dp.sources.membership import EtcdMembership, FileMembership

    source, net_conf, run_dir = request.source, request.node.net_conf, request.node.run_dir
    if source.leases:
        from flannel_dp.sources.file import FileSource

        file = FileSource(source.leases, annotation_prefix=source.kube_annotation_prefix)
        return FileMembership(file, net_conf)
    if source.kube_subnet_mgr:
        from flannel_dp.sources.kube.config import KubeOptions
        from flannel_dp.sources.kube.membership import KubeMembership

        options = KubeOptions(
            node_name=request.node.node_name,
            kubeconfig=source.kubeconfig_file,
            api_url=source.kube_api_url,
            annotation_prefix=source.kube_annotation_prefix,
            set_node_network_unavailable=source.set_node_network_unavailable,
        )
        kept = _notes(run_dir, source.kube_annotation_prefix) if note else ""
        return KubeMembership(options, net_conf, kept)
    margin = 60.0 * source.subnet_lease_renew_margin
    kept = _notes(run_dir, source.etcd_prefix) if note else ""
    return EtcdMembership(etcd_options(source), margin, kept)


def etcd_options(source: SourceFlags) -> EtcdOptions:
    """Return how to reach etcd. Raises ConfigError."""
    from flannel_dp.sources.etcd.options import EtcdOptions

    return EtcdOptions(
        # An empty one, as after a last comma, is passed over as by flanneld.
        endpoints=tuple(
            one for one in (source.etcd_endpoints or flags.ETCD_ENDPOINTS).split(",") if one.strip()
        ),
        prefix=source.etcd_prefix,
        keyfile=source.etcd_keyfile,
        certfile=source.etcd_certfile,
        cafile=source.etcd_cafile,
        username=source.etcd_username,
        password=source.etcd_password,
        password_file=source.etcd_password_file,
    )


def _notes(run_dir: str, prefix: str) -> str:
    """Return the path, without its suffix, of the files that a process leaves to the next one of
    this node: one of each kind for each network namespace and prefix, beside the locks."""
    from hashlib import blake2b

    from flannel_dp.kernel.netns import netns_identity

    mark = blake2b(prefix.encode(), digest_size=8).hexdigest()
    return f"{run_dir}/{netns_identity(None)[1]}-{mark}"


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
