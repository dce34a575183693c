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
)

MODES_OF_CLEAN = (
    click.option("--keep-device", is_flag=True, help="Empty the vxlan devices, but keep them."),
    click.option(
        "--for-flanneld",
        is_flag=True,
        help="Remove nothing that forwards: rewrite entries in place, as flanneld has them. "
        "Run it before flanneld is started.",
    ),
    click.option(
        "--only-rules",
        is_flag=True,
        help="Remove the firewall rules alone, once flanneld runs and has its own.",
    ),
    click.option(
        "--stale",
        is_flag=True,
        help="Remove instead what was left behind on this host for network namespaces and devices "
        "that are gone: locks, notes, pins.",
    ),
)
