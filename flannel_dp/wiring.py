"""From the command's flags to the objects that do the work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from flannel_dp import flags

if TYPE_CHECKING:
    import logging

    from flannel_dp.dataplane import DataPlane
    from flannel_dp.hostrules import RulesOptions
    from flannel_dp.sources import FollowedSource, Snapshot

Given = dict[str, Any]

_logs: list[logging.Handler] = []


@contextmanager
def open_dataplane(
    given: Given, *, take_over: bool = False, allow_shrink: bool = False
) -> Iterator[DataPlane]:
    """The data plane that the flags describe, closed in the end."""
    if given["verbose"]:
        start_log(given["verbose"])
    with make_dataplane(given, take_over=take_over, allow_shrink=allow_shrink) as made:
        yield made


def make_dataplane(given: Given, *, take_over: bool, allow_shrink: bool) -> DataPlane:
    """The data plane that the flags describe. Raises ConfigError."""
    from flannel_dp.config import NetworkConfig
    from flannel_dp.dataplane import DataPlane

    return DataPlane(
        NetworkConfig.from_file(given["net_conf"]),
        iface=given["iface"],
        iface_regex=given["iface_regex"],
        iface_can_reach=given["iface_can_reach"],
        behind_nat=given["behind_nat"],
        public_ip=given["public_ip"],
        public_ipv6=given["public_ipv6"],
        subnet=given["subnet"],
        netns=given["netns"],
        take_over=take_over,
        allow_shrink=allow_shrink,
        nexthops=not given["no_nexthops"],
        rules=_rules(given),
        subnet_file=_subnet_file(given),
        ip_blackhole_route=given["ip_blackhole_route"],
    )


def _rules(given: Given) -> RulesOptions | None:
    """The firewall rules to keep. Without a program for them only what was asked for in so
    many words is missed; flanneld's defaults are not."""
    from flannel_dp.hostrules import RulesOptions

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


def make_source(given: Given) -> FollowedSource:
    """Where the flags say that the leases are."""
    from flannel_dp.sources.file import FileSource

    return FileSource(given["leases"], annotation_prefix=given["kube_annotation_prefix"])


def read_snapshot(given: Given) -> Snapshot:
    """All leases, now. Raises SourceError."""
    return make_source(given).snapshot()


@contextmanager
def locked(dataplane: DataPlane) -> Iterator[None]:
    """Hold every vxlan device of the configuration, so that two writers never meet.

    Taken before the leases are read: whoever writes last has read last.
    """
    from flannel_dp.errors import NotPermitted
    from flannel_dp.kernel.lock import DeviceLock

    with ExitStack() as stack:
        for family in dataplane.families:
            lock = DeviceLock(dataplane.resolver.device_name(family), dataplane.netns)
            try:
                stack.enter_context(lock)
            except NotPermitted as error:
                error.hint = f"run as root, or grant CAP_NET_ADMIN and the right to {lock.path}"
                raise
        yield


def run_service(given: Given, *, take_over: bool, allow_shrink: bool) -> None:
    """``sync --watch``: until a signal ends it."""
    from flannel_dp.kernel.netns import enter_netns
    from flannel_dp.notify import Notifier
    from flannel_dp.service import Service, ServiceOptions

    if given["output"] == "json":
        raise click.UsageError("--watch logs as it goes: use --log-json in place of --output json")
    if given["leases"] == "-":
        raise click.UsageError("--watch follows a file, and standard input does not change")
    start_log(given["verbose"] + 1, json=given["log_json"])
    given = given | {"subnet_file": _subnet_file(given)}
    if given["netns"]:
        enter_netns(given["netns"])
        given["netns"] = None

    def build() -> tuple[DataPlane, FollowedSource]:
        plane = make_dataplane(given, take_over=take_over, allow_shrink=allow_shrink)
        return plane, make_source(given)

    options = ServiceOptions(
        audit=given["audit_interval"],
        healthz_ip=given["healthz_ip"],
        healthz_port=given["healthz_port"] or None,
        keep=_capabilities(given["firewall"]),
    )
    import os

    Service(build, options, Notifier.from_environment(os.environ)).run()


def run_view(given: Given) -> None:
    """``show --watch``: until it is interrupted. Reads, and never writes."""
    from flannel_dp.live import watch_json, watch_view
    from flannel_dp.onlooker import Onlooker

    with open_dataplane(given) as dataplane:
        claims = read_snapshot(given).claims if given["leases"] else None
        with Onlooker(dataplane, claims) as onlooker, contextlib.suppress(KeyboardInterrupt):
            if given["output"] == "json":
                watch_json(onlooker.look, onlooker.events, stop=lambda: False)
            else:
                source = given["leases"] or "the kernel alone"
                watch_view(onlooker.look, onlooker.events, stop=lambda: False, source=source)


def _capabilities(firewall: str) -> frozenset[str]:
    """What the work needs. iptables in its legacy form opens a raw socket."""
    from flannel_dp.errors import FlannelDPError
    from flannel_dp.kernel.firewall import choose_engine

    wanted = {"CAP_NET_ADMIN"}
    try:
        legacy = firewall != "none" and "legacy" in choose_engine(firewall)
    except FlannelDPError:  # told when the rules are written
        legacy = False
    return frozenset(wanted | {"CAP_NET_RAW"} if legacy else wanted)


def start_log(level: int, json: bool = False) -> None:
    """Log to standard error: 1 what matters to an operator, 2 everything."""
    import logging

    from flannel_dp.logs import configure

    _logs.append(configure(logging.INFO if level == 1 else logging.DEBUG, json))


def stop_log() -> None:
    """Undo ``start_log``: the command may have been called by a program that goes on."""
    if not _logs:
        return
    import logging

    while _logs:
        logging.getLogger().removeHandler(_logs.pop())
    logging.getLogger("flannel_dp").setLevel(logging.NOTSET)
