"""The subcommands that keep running: sync --watch, show --watch, stats --watch."""

from __future__ import annotations

import contextlib
import logging
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING

import click

from flannel_dp.command.compose import (
    Composition,
    in_mode_of_node,
    make_dataplane,
    make_membership,
    start_log,
    with_addresses,
)

if TYPE_CHECKING:
    from flannel_dp.agent.probing import ProbeOptions
    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.command.request import Request, ServiceFlags
    from flannel_dp.dataplane import DataPlane
    from flannel_dp.look.live_turns import DriftLine
    from flannel_dp.look.show import Overview
    from flannel_dp.sources.membership import Membership

log = logging.getLogger(__name__)


def _enable_gc() -> None:
    """Collect garbage: the command keeps running (see __main__.py)."""
    import gc

    gc.enable()


def run_service(request: Request) -> None:
    """Run ``sync --watch`` until a signal ends it."""
    import os

    from msgspec.structs import replace

    from flannel_dp.agent.notify import Notifier
    from flannel_dp.agent.service import Service
    from flannel_dp.agent.service_options import ServiceOptions
    from flannel_dp.agent.starting import Starting
    from flannel_dp.agent.status import StatusBoard
    from flannel_dp.kernel.netns import enter_netns

    _enable_gc()
    if request.as_json:
        raise click.UsageError("--watch logs as it goes: use --log-json in place of --output json")
    if request.source.leases == "-":
        raise click.UsageError("--watch follows a file, and standard input does not change")
    start_log(request.verbose + 1, json=request.service.log_json)
    for note in request.notes:
        log.warning("%(note)s", {"note": note})
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
        run_dir=request.node.run_dir,
        probe=_probe_options(service) if service.probe else None,
        state_dir=service.state_dir,
        grace=service.lease_grace,
    )
    Service(build, options, notifier).run()


def _probe_options(service: ServiceFlags) -> ProbeOptions:
    from flannel_dp.agent.probing import ProbeOptions

    return ProbeOptions(
        service.probe_interval,
        when=service.ready_when,
        limit=service.ready_timeout,
        path_mtu=service.path_mtu,
    )


class ServiceBuild:
    """What a Service is made of, by the flags (service.Build)."""

    def __init__(self, request: Request) -> None:
        self._request, self._told = request, False

    @cached_property
    def _membership(self) -> Membership:
        return make_membership(self._request, note=True)

    def config(self) -> NetworkConfig:
        """Read the network's configuration, with what the flags say of it."""
        config = self._membership.config().with_forwarding(self._request.node.forwarding)
        present = in_mode_of_node(config, self._request)
        if present is not config and not self._told:
            self._told = True
            log.info(
                "An eBPF program forwards on this node, and goes on: no other mode is named; "
                "'--forwarding kernel' goes back to the kernel's tables"
            )
        return present

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
    from msgspec.structs import replace

    from flannel_dp.look.drift_viewer import DriftViewer
    from flannel_dp.look.history_tail import HistoryTail
    from flannel_dp.look.live_show import watch_json, watch_view
    from flannel_dp.resources.counters.traffic import Meter

    _enable_gc()
    with made.open_dataplane(alone=True, as_it_is=True) as dataplane:
        claims = made.claims()
        node = made.request.node
        tail = HistoryTail(made.request.service.state_dir or node.run_dir, node.netns)
        with DriftViewer(dataplane, claims) as viewer, contextlib.suppress(KeyboardInterrupt):

            def events(timeout: float | None) -> list[DriftLine]:
                return viewer.events(timeout) + tail.lines()

            def read() -> Overview:
                return replace(viewer.read(), lives=made.lives(dataplane.config))

            if made.request.as_json:
                watch_json(viewer.read, events, stop=lambda: False)
            else:
                source = made.membership.source.origin if claims else "the kernel alone"
                watch_view(
                    read,
                    events,
                    stop=lambda: False,
                    source=source,
                    rates=Meter(dataplane.counting.read).rates,
                    fileno=viewer.fileno(),
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
