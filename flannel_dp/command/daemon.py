"""The program ``flannel-dpd``: ``flannel-dp sync --watch`` under flanneld's start line.

A start script, unit or supervisor section of flanneld works with nothing but the program's name
changed. Flags are those of ``sync``; what differs in how flanneld reads them is here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

import click

from flannel_dp.command import cli
from flannel_dp.command.spelling import normalise

_PUBLIC = ("--public-ip", "--public-ipv6")


def main_of_daemon(
    argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ
) -> int:
    """Run ``sync --watch`` and return its exit code; ``argv`` is without the program's name."""
    given = sys.argv[1:] if argv is None else argv
    arguments, ignored = as_sync(given, environ)
    if ignored:
        text = " ".join(ignored)
        click.echo(f"flannel-dpd: ignored, as by flanneld: {text}", err=True)
    return cli.main(arguments, lenient=True)


def as_sync(given: Sequence[str], environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the arguments of ``flannel-dp`` that do what ``given`` would with flanneld, and
    those that flanneld ignores: all from the first that belongs to no flag.

    flanneld publishes any address that ``--public-ip`` names, and sends from the interface's own:
    that is ``--behind-nat``.
    """
    sync = cli.command.commands["sync"]
    words = normalise(given, (cli.command, *cli.command.commands.values()))
    takes = {
        name: not parameter.is_flag and not parameter.count
        for parameter in sync.params
        if isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    made, place = list[str](), 0
    while place < len(words) and words[place].startswith("-") and words[place] not in ("-", "--"):
        count = 2 if takes.get(words[place]) else 1
        made += words[place : place + count]
        place += count
    names = {word.partition("=")[0] for word in made}
    variables = ("FLANNELD_PUBLIC_IP", "FLANNELD_PUBLIC_IPV6")
    if names & {*_PUBLIC} or any(environ.get(name) for name in variables):
        made.append("--behind-nat")
    return ["sync", "--watch", *made], words[place:]
