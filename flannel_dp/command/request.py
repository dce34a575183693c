"""What one call of the command asks for: its flags, as typed values.

click hands over a dict by the flags' names; ``Request.of`` is the only reader of it. A flag that a
subcommand does not have is at its default here.
"""

# Annotations are types here, not text: msgspec would compile and evaluate the text of each.

from collections.abc import Mapping
from typing import Any, Literal, Self

from msgspec import Struct, convert
from msgspec.structs import replace

from flannel_dp.command.flags import (
    ANNOTATION_PREFIX,
    ETCD_ENDPOINTS,
    ETCD_PREFIX,
    NET_CONF,
    RUN_DIR,
    SUBNET_FILE,
)


class SourceFlags(Struct, frozen=True):
    """Where the leases are, and how this node's lease is kept there."""

    leases: str | None = None
    etcd_endpoints: str | None = None
    etcd_prefix: str = ETCD_PREFIX
    etcd_keyfile: str = ""
    etcd_certfile: str = ""
    etcd_cafile: str = ""
    etcd_username: str = ""
    etcd_password: str = ""
    etcd_password_file: str = ""
    kube_subnet_mgr: bool = False
    kube_api_url: str = ""
    kubeconfig_file: str = ""
    kube_annotation_prefix: str = ANNOTATION_PREFIX
    subnet_lease_renew_margin: int = 60
    set_node_network_unavailable: bool = True

    @property
    def is_named(self) -> bool:
        """Whether the flags say where the leases are."""
        return bool(self.leases or self.etcd_endpoints or self.kube_subnet_mgr)


class NodeFlags(Struct, frozen=True):
    """This node: its interface, its addresses and its place in the network."""

    net_conf: str = NET_CONF
    iface: tuple[str, ...] = ()
    iface_regex: tuple[str, ...] = ()
    iface_can_reach: str = ""
    public_ip: str | None = None
    public_ipv6: str | None = None
    behind_nat: bool = False
    subnet: str | None = None
    netns: str | None = None
    no_nexthops: bool = False
    forwarding: str | None = None
    node_name: str = ""
    run_dir: str = RUN_DIR

    def with_addresses(self, chosen: Mapping[int, str], public: Mapping[int, str]) -> Self:
        """Return these flags with the addresses by family that the cluster has for this node:
        ``chosen`` where no flag says otherwise, ``public`` in any case and as translated ones."""
        v4 = public.get(4) or self.public_ip or chosen.get(4, self.public_ip)
        v6 = public.get(6) or self.public_ipv6 or chosen.get(6, self.public_ipv6)
        nat = self.behind_nat or bool(public)
        return replace(self, public_ip=v4, public_ipv6=v6, behind_nat=nat)


class RulesFlags(Struct, frozen=True):
    """What is kept on the node beside the overlay itself."""

    ip_masq: bool = False
    ip_masq_fully_random_disable: bool = False
    iptables_forward_rules: bool = True
    ip_blackhole_route: bool = False
    guard_underlay: bool = False
    firewall: str = "auto"
    subnet_file: str | None = None


class ServiceFlags(Struct, frozen=True):
    """How ``sync --watch`` runs."""

    audit_interval: float = 60.0
    lease_grace: float = 600.0
    healthz_ip: str = "0.0.0.0"
    healthz_port: int = 0
    log_json: bool = False
    probe: bool | None = None
    probe_interval: float = 1.0
    path_mtu: Literal["off", "warn", "fix"] = "warn"
    ready_when: Literal["programmed", "reachable"] = "programmed"
    ready_timeout: float = 60.0
    state_dir: str = ""

    @property
    def keeps_mtus(self) -> bool:
        """Whether routes may have an MTU of their own. Commands beside ``sync`` are tried with its
        start line, of which they do not know ``--probe`` (None)."""
        return self.path_mtu == "fix" and self.probe is not False


class Request(Struct, frozen=True):
    """All flags of one call."""

    source: SourceFlags
    node: NodeFlags
    rules: RulesFlags
    service: ServiceFlags
    counters: bool | None = None
    take_over: bool = False
    allow_shrink: bool = False
    for_flanneld: bool = False
    output: str = "text"
    verbose: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Return the flags that click has parsed. With the start line of an agent that names no
        source of leases, this is etcd where flanneld looks for it."""
        groups = dict.fromkeys(("source", "node", "rules", "service"), given)
        made = convert({**given, **groups}, cls)
        if given.get("watch") and not made.source.is_named:
            made = replace(made, source=replace(made.source, etcd_endpoints=ETCD_ENDPOINTS))
        return made

    def on_interface(self, name: str) -> Self:
        """Return the flags with this external interface, where it is known and none says another
        one."""
        node = self.node
        if not name or node.iface or node.iface_regex or node.iface_can_reach:
            return self
        return replace(self, node=replace(node, iface=(name,)))

    @property
    def as_json(self) -> bool:
        """Whether a program reads what is printed."""
        return self.output == "json"

    @property
    def subnet_file(self) -> str:
        """The path of subnet.env, "" for none. One file serves one node: in another network
        namespace it has to be named."""
        if self.rules.subnet_file is not None:
            return self.rules.subnet_file
        return "" if self.node.netns else SUBNET_FILE
