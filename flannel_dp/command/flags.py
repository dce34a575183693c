"""The flags of the command: click options that several subcommands share.

Those that flanneld has too carry its names, and its environment variables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from flannel_dp.command.declaring import option, options, without_effect

_F = TypeVar("_F", bound=Callable[..., Any])

NET_CONF = "/etc/kube-flannel/net-conf.json"
SUBNET_FILE = "/run/flannel/subnet.env"
RUN_DIR = "/run/flannel-dp"
ANNOTATION_PREFIX = "flannel.alpha.coreos.com"
ETCD_ENDPOINTS = "http://127.0.0.1:4001,http://127.0.0.1:2379"
ETCD_PREFIX = "/coreos.com/network"


node = options(
    click.option(
        "--net-conf",
        "--net-config-path",
        "net_conf",
        metavar="FILE",
        default=NET_CONF,
        show_default=True,
        envvar="FLANNELD_NET_CONFIG_PATH",
        help="flannel's network configuration, where it is not in etcd.",
    ),
    click.option(
        "--iface",
        metavar="NAME|ADDRESS",
        multiple=True,
        envvar="FLANNELD_IFACE",
        help="External interface; may be given more than once, and the first one that exists is "
        "used. An address is also published [default: the default route's].",
    ),
    click.option(
        "--iface-regex",
        metavar="REGEX",
        multiple=True,
        envvar="FLANNELD_IFACE_REGEX",
        help="External interface by a pattern for its name or one of its addresses; a matching "
        "address is published.",
    ),
    click.option(
        "--iface-can-reach",
        metavar="ADDRESS",
        default="",
        envvar="FLANNELD_IFACE_CAN_REACH",
        help="External interface by the route to this address.",
    ),
    click.option(
        "--public-ip",
        metavar="ADDRESS",
        envvar="FLANNELD_PUBLIC_IP",
        help="IPv4 address at which other nodes reach this node [default: the interface's].",
    ),
    click.option(
        "--public-ipv6",
        metavar="ADDRESS",
        envvar="FLANNELD_PUBLIC_IPV6",
        help="IPv6 address at which other nodes reach this node [default: the interface's].",
    ),
    click.option(
        "--behind-nat",
        is_flag=True,
        help="The public addresses are not on this node: NAT translates them.",
    ),
    click.option(
        "--subnet",
        metavar="PREFIX[,PREFIX]",
        help="This node's subnet; overrules subnet.env, the existing device and every lease.",
    ),
    click.option(
        "--node-name",
        metavar="NAME",
        default="",
        envvar="NODE_NAME",
        help="Name of this node's lease, as in 'kubectl get nodes'.",
    ),
    click.option(
        "--netns",
        metavar="NAME|PATH",
        help="Network namespace to work in [default: the current one].",
    ),
    click.option(
        "--run-dir",
        metavar="DIRECTORY",
        default=RUN_DIR,
        show_default=True,
        envvar="FLANNELD_RUN_DIR",
        help="Directory of locks, and of notes for the next process. For hosts whose /run is "
        "read-only; the same for every instance of this host.",
    ),
    click.option(
        "--no-nexthops",
        is_flag=True,
        help="Write plain IPv4 gateway routes instead of nexthop objects.",
    ),
    click.option(
        "--forwarding",
        type=click.Choice(["kernel", "ebpf"]),
        envvar="FLANNELD_FORWARDING",
        help="What forwards to peers of the vxlan backend: kernel tables, or an eBPF program with "
        "a map of peers [default: the network configuration's, else as it is; kernel on a fresh "
        "node].",
    ),
    click.option(
        "--output",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Output format.",
    ),
    click.option(
        "-v", "--verbose", count=True, help="Log to standard error; -v: info, -vv: debug."
    ),
)


leases = options(
    click.option(
        "--leases",
        metavar="FILE|-",
        help="All leases of the cluster in a file, as printed by 'flannel-dp leases --output "
        "json', 'etcdctl get PREFIX/subnets --prefix -w json' or 'kubectl get nodes -o json'. '-' "
        "is standard input.",
    ),
    click.option(
        "--etcd-endpoints",
        metavar="URL[,URL]",
        envvar="FLANNELD_ETCD_ENDPOINTS",
        help="Leases and network configuration in etcd v3 [default for sync --watch: "
        f"{ETCD_ENDPOINTS}].",
    ),
    click.option(
        "--etcd-prefix",
        metavar="PREFIX",
        default=ETCD_PREFIX,
        show_default=True,
        envvar="FLANNELD_ETCD_PREFIX",
        help="Prefix of flannel's keys in etcd.",
    ),
    click.option(
        "--etcd-keyfile",
        metavar="FILE",
        default="",
        envvar="FLANNELD_ETCD_KEYFILE",
        help="Key of the client certificate.",
    ),
    click.option(
        "--etcd-certfile",
        metavar="FILE",
        default="",
        envvar="FLANNELD_ETCD_CERTFILE",
        help="Client certificate.",
    ),
    click.option(
        "--etcd-cafile",
        metavar="FILE",
        default="",
        envvar="FLANNELD_ETCD_CAFILE",
        help="CA of etcd's certificate [default: the system's].",
    ),
    click.option(
        "--etcd-username",
        metavar="NAME",
        default="",
        envvar="FLANNELD_ETCD_USERNAME",
        help="User name for etcd.",
    ),
    click.option(
        "--etcd-password",
        metavar="TEXT",
        default="",
        envvar="FLANNELD_ETCD_PASSWORD",
        help="Password for etcd. Any user of this host can read arguments: prefer the variable or "
        "a file.",
    ),
    click.option(
        "--etcd-password-file",
        metavar="FILE",
        default="",
        envvar="FLANNELD_ETCD_PASSWORD_FILE",
        help="File with the password, read at each login.",
    ),
    click.option(
        "--kube-subnet-mgr/--no-kube-subnet-mgr",
        default=False,
        envvar="FLANNELD_KUBE_SUBNET_MGR",
        help="Leases in the annotations of Kubernetes' nodes, network configuration in --net-conf.",
    ),
    click.option(
        "--kube-api-url",
        metavar="URL",
        default="",
        envvar="FLANNELD_KUBE_API_URL",
        help="API server [default: the pod's or the kubeconfig's].",
    ),
    click.option(
        "--kubeconfig-file",
        metavar="FILE",
        default="",
        envvar="FLANNELD_KUBECONFIG_FILE",
        help="kubeconfig, when not running in a pod.",
    ),
    click.option(
        "--kube-annotation-prefix",
        metavar="PREFIX",
        default=ANNOTATION_PREFIX,
        show_default=True,
        envvar="FLANNELD_KUBE_ANNOTATION_PREFIX",
        help="Prefix of flannel's annotations of Kubernetes nodes.",
    ),
)

watch = options(
    click.option(
        "--watch", is_flag=True, help="Keep running: watch the leases and the kernel's events."
    ),
    click.option(
        "--audit-interval",
        metavar="SECONDS",
        type=click.FloatRange(min=0, min_open=True),
        default=60.0,
        show_default=True,
        help="With --watch: time between full comparisons with the kernel.",
    ),
    click.option(
        "--lease-grace",
        metavar="SECONDS",
        type=click.FloatRange(min=0),
        default=600.0,
        show_default=True,
        envvar="FLANNELD_LEASE_GRACE",
        help="With --watch: how long a peer stays whose lease became unreadable or incomplete.",
    ),
    click.option(
        "--healthz-ip",
        metavar="ADDRESS",
        default="0.0.0.0",
        show_default=True,
        envvar="FLANNELD_HEALTHZ_IP",
        help="With --watch: address for /healthz, /readyz and /metrics.",
    ),
    click.option(
        "--healthz-port",
        metavar="PORT",
        type=click.IntRange(0, 65535),
        default=0,
        envvar="FLANNELD_HEALTHZ_PORT",
        help="With --watch: port for them [default: 0, not served].",
    ),
    click.option(
        "--subnet-lease-renew-margin",
        metavar="MINUTES",
        type=click.IntRange(1, 1439),
        default=60,
        show_default=True,
        envvar="FLANNELD_SUBNET_LEASE_RENEW_MARGIN",
        help="With --watch and etcd: renew this node's lease this long before it expires.",
    ),
    click.option(
        "--set-node-network-unavailable/--no-set-node-network-unavailable",
        default=True,
        show_default=True,
        envvar="FLANNELD_SET_NODE_NETWORK_UNAVAILABLE",
        help="With --watch and Kubernetes: clear NodeNetworkUnavailable once peers are reachable.",
    ),
    click.option(
        "--iptables-resync",
        metavar="SECONDS",
        type=click.IntRange(0),
        envvar="FLANNELD_IPTABLES_RESYNC",
        hidden=True,
        help="flanneld's; here firewall rules are part of the audit (--audit-interval).",
    ),
    click.option(
        "--state-dir",
        metavar="DIRECTORY",
        default="",
        envvar="FLANNELD_STATE_DIR",
        help="With --watch: where the history of 'flannel-dp history' is kept [default: --run-dir, "
        "which is empty after a boot].",
    ),
    click.option("--log-json", is_flag=True, help="With --watch: log one JSON object per line."),
    click.option(
        "--vmodule",
        envvar="FLANNELD_VMODULE",
        hidden=True,
        help="flanneld's; nothing here is logged by the name of a source file.",
    ),
    click.option(
        "--log_backtrace_at",
        envvar="FLANNELD_LOG_BACKTRACE_AT",
        hidden=True,
        help="flanneld's; nothing here is logged by the line of a source file.",
    ),
)

rules = options(
    click.option(
        "--ip-masq/--no-ip-masq",
        default=False,
        envvar="FLANNELD_IP_MASQ",
        help="Masquerade packets that leave the pod network.",
    ),
    click.option(
        "--ip-masq-fully-random-disable/--no-ip-masq-fully-random-disable",
        default=False,
        envvar="FLANNELD_IP_MASQ_FULLY_RANDOM_DISABLE",
        help="With --ip-masq: do not choose source ports at random.",
    ),
    click.option(
        "--iptables-forward-rules/--no-iptables-forward-rules",
        default=True,
        show_default=True,
        envvar="FLANNELD_IPTABLES_FORWARD_RULES",
        help="Accept forwarded packets of the pod network.",
    ),
    click.option(
        "--ip-blackhole-route/--no-ip-blackhole-route",
        default=False,
        envvar="FLANNELD_IP_BLACKHOLE_ROUTE",
        help="Drop packets to addresses of this node's subnet that no pod has.",
    ),
    click.option(
        "--guard-underlay",
        is_flag=True,
        help="Accept packets to the VXLAN port from peers of accepted leases only.",
    ),
    click.option(
        "--firewall",
        type=click.Choice(["auto", "nft", "iptables", "iptables-nft", "iptables-legacy", "none"]),
        default="auto",
        show_default=True,
        help="Program that keeps these rules. auto: nft, or the kind of iptables whose other rules "
        "would drop pods' packets; none: change no rule.",
    ),
    click.option(
        "--subnet-file",
        metavar="FILE",
        envvar="FLANNELD_SUBNET_FILE",
        help="Write subnet.env here, and keep the subnet that it names "
        f"[default: {SUBNET_FILE}; none with --netns].",
    ),
)

counters = option(
    "--counters/--no-counters",
    default=None,
    envvar="FLANNELD_COUNTERS",
    help="Start or stop counting packets per peer (eBPF) [default: leave as it is].",
)

take_over = option(
    "--take-over",
    is_flag=True,
    help="Replace another program's device that has the overlay's name, and remove the direct "
    "routes that flanneld left behind.",
)

allow_shrink = option(
    "--allow-shrink",
    is_flag=True,
    help="Remove peers that the list lacks, even if these are most of them.",
)


def _own(name: str) -> Callable[[_F], _F]:
    """Declare flags that one subcommand alone has, by their name in ``own_flags``."""

    def declare(function: _F) -> _F:
        from flannel_dp.command import own_flags

        for one in getattr(own_flags, name):
            one(function)
        return function

    return options(declare)


probing, probes, showing = _own("PROBING"), _own("PROBES"), _own("SHOWING")
modes_of_clean = _own("MODES_OF_CLEAN")

#: The flags of sync that the other commands do not have: they are tried with its start line.
start_line = without_effect(watch, probing, counters, take_over, allow_shrink)
