"""Flags that have no effect with the others: an error, or a note where a variable set them."""

from __future__ import annotations

import click
from click.core import ParameterSource

from flannel_dp.command.dependencies import idle


def reject_idle(context: click.Context, default: str) -> tuple[str, ...]:
    """Raise a usage error for a flag that has no effect with the others. Return a note for each
    variable that has none, and to a lenient program (``context.obj``) for each flag. ``default``
    is the source of leases where no flag names one."""
    options = {one.name: one for one in context.command.params if isinstance(one, click.Option)}
    sources = {name: context.get_parameter_source(name) for name in context.params}
    by_variable = {name for name, one in sources.items() if one is ParameterSource.ENVIRONMENT}
    by_flag = {name for name, one in sources.items() if one is ParameterSource.COMMANDLINE}
    spelt = {str(name): one.opts[0] for name, one in options.items()}
    meant = spelt | {name: f"{options[name].envvar} (environment)" for name in by_variable}
    off = [name for name in by_flag if context.params[name] is False]
    spoken = spelt | {name: options[name].secondary_opts[0] for name in off}
    notes = list[str]()
    for one in idle(sorted(by_flag | by_variable), context.params, default):
        reason = one.reason(meant)
        if one.name in by_variable:
            notes.append(f"{options[one.name].envvar} {reason}")
        elif context.obj:
            notes.append(f"{spoken[one.name]} {reason}")
        else:
            raise click.UsageError(f"{spoken[one.name]} {reason}", context)
    return tuple(notes)
