"""The flags of the command: click options that several subcommands share.

Those that flanneld has too carry its names, and its environment variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

NET_CONF = "/etc/kube-flannel/net-conf.json"
ANNOTATION_PREFIX = "flannel.alpha.coreos.com"

_F = TypeVar("_F", bound=Callable[..., Any])


def _options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Several click options as one decorator, listed in --help in this order."""

    def decorate(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


node = _options(
    click.option(
        "--net-conf",
        "--net-config-path",
        "net_conf",
        metavar="FILE",
        default=NET_CONF,
        show_default=True,
        envvar="FLANNELD_NET_CONFIG_PATH",
        help="flannel's network configuration.",
    ),
    click.option(
        "--iface",
        metavar="NAME|ADDRESS",
        multiple=True,
        envvar="FLANNELD_IFACE",
        help="External interface; of several, the first that is there [default: that of the "
        "default route].",
    ),
    click.option(
        "--iface-regex",
        metavar="REGEX",
        multiple=True,
        envvar="FLANNELD_IFACE_REGEX",
        help="Find it by a pattern that one of its addresses or its name matches.",
    ),
    click.option(
        "--iface-can-reach",
        metavar="ADDRESS",
        default="",
        envvar="FLANNELD_IFACE_CAN_REACH",
        help="Find it by the route to this address.",
    ),
    click.option(
        "--public-ip",
        metavar="ADDRESS",
        envvar="FLANNELD_PUBLIC_IP",
        help="IPv4 address other nodes reach this one at [default: the interface's].",
    ),
    click.option(
        "--public-ipv6",
        metavar="ADDRESS",
        envvar="FLANNELD_PUBLIC_IPV6",
        help="IPv6 address other nodes reach this one at [default: the interface's].",
    ),
    click.option(
        "--behind-nat",
        is_flag=True,
        help="The public addresses are translated to this node, and not its own.",
    ),
    click.option(
        "--subnet",
        metavar="PREFIX[,PREFIX]",
        help="This node's own subnet, where no lease says it.",
    ),
    click.option(
        "--netns", metavar="NAME|PATH", help="Network namespace to work in [default: this one]."
    ),
    click.option(
        "--no-nexthops",
        is_flag=True,
        help="Write plain IPv4 gateway routes instead of nexthop objects.",
    ),
    click.option(
        "--output",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="For people, or for programs.",
    ),
    click.option("-v", "--verbose", count=True, help="Log to standard error; twice: all."),
)


def leases(required: bool) -> Callable[[_F], _F]:
    return _options(
        click.option(
            "--leases",
            metavar="FILE|-",
            required=required,
            help="All leases of the cluster: our own list, 'etcdctl get PREFIX/subnets --prefix "
            "-w json' or 'kubectl get nodes -o json'. '-' is standard input.",
        ),
        click.option(
            "--kube-annotation-prefix",
            metavar="PREFIX",
            default=ANNOTATION_PREFIX,
            show_default=True,
            envvar="FLANNELD_KUBE_ANNOTATION_PREFIX",
            help="Of flannel's annotations in a list of Kubernetes nodes.",
        ),
    )


take_over = click.option(
    "--take-over",
    is_flag=True,
    help="Replace a foreign device that has the name of ours, and remove the direct routes that "
    "flanneld left behind.",
)


def normalise(arguments: Sequence[str], commands: Iterable[click.Command]) -> list[str]:
    """flanneld's spelling as ours: ``-iface eth0`` is ``--iface eth0``, ``-iface=eth0`` too.

    Go's flag package takes one dash or two. Everything after ``--`` stays as it is.
    """
    known = {name for each in commands for parameter in each.params for name in parameter.opts}
    made: list[str] = []
    for number, argument in enumerate(arguments):
        if argument == "--":
            return made + list(arguments[number:])
        single = argument.startswith("-") and f"-{argument}".partition("=")[0] in known
        made.append(f"-{argument}" if single else argument)
    return made
