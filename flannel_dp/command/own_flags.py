"""The flags that one subcommand alone has; they are imported when it is called."""

from __future__ import annotations

import click

PROBES = (
    click.argument("peers", metavar="[PEER]...", nargs=-1),
    click.option(
        "--count",
        metavar="N",
        default=8,
        show_default=True,
        type=click.IntRange(1, 1000),
        help="Probes to each peer.",
    ),
    click.option(
        "--paths",
        metavar="N",
        default=8,
        show_default=True,
        type=click.IntRange(1, 16),
        help="UDP source ports, one for each of several equal-cost paths.",
    ),
    click.option(
        "--timeout",
        metavar="SECONDS",
        default=1.0,
        show_default=True,
        type=click.FloatRange(0.01, 60),
        help="Seconds for an answer.",
    ),
    click.option("--no-path-mtu", is_flag=True, help="Do not search for the path MTU of a peer."),
    click.option(
        "--fix-offload",
        is_flag=True,
        help="Where the network card spoils checksums or segments of tunnel packets, switch that "
        "offload off on our own vxlan device, until 'flannel-dp clean', and probe again.",
    ),
)

PROBING = (
    click.option(
        "--probe/--no-probe",
        default=False,
        envvar="FLANNELD_PROBE",
        help="With --watch: prove again and again that packets to each peer come back.",
    ),
    click.option(
        "--probe-interval",
        metavar="SECONDS",
        type=click.FloatRange(0.1, 3600),
        default=1.0,
        show_default=True,
        help="With --probe: time between two probes of a peer; longer for over 1000 peers.",
    ),
    click.option(
        "--path-mtu",
        type=click.Choice(["off", "warn", "fix"]),
        default="warn",
        show_default=True,
        envvar="FLANNELD_PATH_MTU",
        help="With --probe: measure the path MTU of each peer; where it is less than the device's, "
        "tell, or give the peer's route that MTU.",
    ),
    click.option(
        "--ready-when",
        type=click.Choice(["programmed", "reachable"]),
        default="programmed",
        show_default=True,
        envvar="FLANNELD_READY_WHEN",
        help="With --watch: when /readyz and Kubernetes call the node ready; 'reachable' (with "
        "--probe) is when half of the peers have answered.",
    ),
    click.option(
        "--ready-timeout",
        metavar="SECONDS",
        type=click.FloatRange(min=0),
        default=60.0,
        show_default=True,
        help="With --ready-when reachable: be ready after this long in any case.",
    ),
)

MODES_OF_CLEAN = (
    click.option("--keep-device", is_flag=True, help="Empty the vxlan devices, but keep them."),
    click.option(
        "--for-flanneld",
        is_flag=True,
        help="Remove nothing that forwards: rewrite all entries in place, in the form that "
        "flanneld writes. For handing the node back; run it before flanneld is started.",
    ),
    click.option(
        "--allow-incomplete",
        is_flag=True,
        help="With --for-flanneld: end with 0 although some peers are not as the leases have them, "
        "which are listed: they conflict with a route of another program, which flanneld replaces, "
        "cannot be reached, or are missing from the leases and kept.",
    ),
    click.option(
        "--only-rules",
        is_flag=True,
        help="Remove the firewall rules alone, once flanneld runs and has its own.",
    ),
    click.option(
        "--stale",
        is_flag=True,
        help="Remove only what was left behind on this host for network namespaces and devices "
        "that no longer exist: locks, notes, pins of eBPF.",
    ),
)

SHOWING = (
    click.option(
        "--state-dir",
        metavar="DIRECTORY",
        default="",
        envvar="FLANNELD_STATE_DIR",
        help="With --watch: where the agent keeps its history, if it was told to "
        "[default: --run-dir].",
    ),
)
