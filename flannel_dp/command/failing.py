"""From an error to what the command prints of it, and its exit code."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import click

from flannel_dp.look import terminal as out

FAILED, USAGE, NO_SOURCE, BUSY, NOT_PERMITTED = 1, 2, 4, 5, 77


def fail(error: Exception, arguments: Sequence[str]) -> int:
    """Print one line with the error and one with the hint on standard error."""
    code, message, hint = _exit_code_of(error, arguments)
    click.echo(f"flannel-dp: error: {message}" + (f"\nhint: {hint}" if hint else ""), err=True)
    if code == FAILED and {"-v", "-vv", "--verbose"} & {*arguments}:
        import traceback

        traceback.print_exception(error)
    if _wants_json(arguments):
        out.write_json(
            {
                "schema": 1,
                "ok": False,
                "error": {
                    "type": type(error).__name__,
                    "message": message,
                    "hint": hint,
                    "exit_code": code,
                },
            }
            | ({"report": report.to_json()} if (report := getattr(error, "report", None)) else {})
        )
        out.flush()
    return code


def _exit_code_of(error: Exception, arguments: Sequence[str]) -> tuple[int, str, str]:
    """Return exit code, message and hint of an error."""
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "flannel-dp"
        return USAGE, _usage(error, arguments), f"see '{where} --help'"
    from flannel_dp.errors import Busy, ConfigError, FlannelDPError, NotPermitted, SourceError

    if isinstance(error, FlannelDPError):
        codes = {
            ConfigError: USAGE,
            SourceError: NO_SOURCE,
            Busy: BUSY,
            NotPermitted: NOT_PERMITTED,
        }
        code = next((code for kind, code in codes.items() if isinstance(error, kind)), FAILED)
        return code, error.message, error.hint
    if isinstance(error, MemoryError):
        return FAILED, "out of memory", "give it more memory (MemoryMax= or ulimit -v)"
    name = type(error).__name__
    return FAILED, f"unexpected {name}: {error}", "run again with -v and report what it prints"


def _usage(error: click.UsageError, arguments: Sequence[str]) -> str:
    """Return the message of a usage error, with what was meant where a word is mistyped."""
    command = error.ctx.command if error.ctx else None
    if isinstance(error, click.NoSuchOption) and command:
        from flannel_dp.cluster.suggest import did_you_mean

        # click takes -iface for the letters -i, -f, -a, -c and -e.
        whole = (word.partition("=")[0] for word in arguments if not word.startswith("--"))
        letter = error.option_name
        word = next((one for one in whole if one.startswith(letter) and len(one) > 2), letter)
        shown = [one for one in command.params if not getattr(one, "hidden", False)]
        known = [name for one in shown for name in (*one.opts, *one.secondary_opts)]
        meant = did_you_mean(f"--{word.lstrip('-')}", [*known, "--help"])
        return f"No such option '{word}'.{meant}"
    message = " ".join(error.format_message().split())
    if isinstance(command, click.Group) and message.startswith("No such command"):
        from flannel_dp.cluster.suggest import did_you_mean

        word = message.split("'")[1]
        return f"No such command '{word}'.{did_you_mean(word, command.commands)}"
    return message


def _wants_json(arguments: Sequence[str]) -> bool:
    """Return whether ``--output json`` was given, also where the flags could not be parsed."""
    return "--output=json" in arguments or ("--output", "json") in pairwise(arguments)
