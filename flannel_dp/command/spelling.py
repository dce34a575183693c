"""flanneld's spelling of flags: one dash, values for switches, levels of its log."""

from __future__ import annotations

from collections.abc import Sequence

import click

#: What Go's flag package takes as the value of a switch.
_VALUES = ("true", "false", "1", "0", "t", "f")


def normalise(arguments: Sequence[str], commands: Sequence[click.Command]) -> list[str]:
    """Return flanneld's spelling as ours: ``-iface eth0`` is ``--iface eth0``, ``-iface=eth0`` too.

    Go's flag package takes one dash or two, and values for switches: ``-ip-masq=false``.
    ``-v=2`` and ``-v 2`` are levels of its log, of which 4 and more is all (``-v``).
    Everything after ``--`` stays as it is.
    """
    if not any(map(_may_be_foreign, arguments)):
        return list(arguments)  # the flags of all commands take longer to make than to parse
    switches = {
        name: {"true": name, "false": (parameter.secondary_opts or [""])[0]}
        for each in commands
        for parameter in each.params
        if isinstance(parameter, click.Option) and parameter.is_flag
        for name in parameter.opts
    }
    known = {name for each in commands for parameter in each.params for name in parameter.opts}
    known |= {"--help", "--version"}
    level = False  # whether a level may come next
    made: list[str] = []
    for number, argument in enumerate(arguments):
        if argument == "--":
            return made + list(arguments[number:])
        if level and argument.isdecimal():
            made[-1:] = _verbose(argument)
            level = False
            continue
        single = argument.startswith("-") and f"-{argument}".partition("=")[0] in known
        argument = f"-{argument}" if single else argument
        name, equals, value = argument.partition("=")
        if name in ("-v", "--v") and value.isdecimal():
            made += _verbose(value)
            continue
        level = argument in ("-v", "--v")
        argument = "-v" if level else argument
        if equals and name in switches and value.lower() in _VALUES:
            argument = switches[name]["true" if value.lower()[0] in "1t" else "false"]
        if argument:
            made.append(argument)
    return made


def _may_be_foreign(argument: str) -> bool:
    """Return whether an argument may be spelled otherwise than ours."""
    if argument.startswith("--"):
        value = argument.partition("=")[2].lower()
        return argument == "--v" or value in _VALUES or value.isdecimal()
    return not argument or (argument[0] == "-" and argument != "-")


def _verbose(level: str) -> list[str]:
    """Return klog's level as ours. Ordinary operation is level 2 by its convention, debugging is
    4."""
    return ["-v"] if int(level) >= 4 else []
