"""Write the manual pages and the files for completion, from the texts of --help.

    .venv/bin/python scripts/manual.py

packaging/man has a page for flannel-dp, one for each command, and one for flannel-dpd;
packaging/completion a file for each shell. tests/unit/test_manual.py compares them with what this
script makes.
"""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import dedent

import click

from flannel_dp.command import flags
from flannel_dp.command.cli import COMPLETE, command
from flannel_dp.command.output import EXIT_CODES, Command

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "packaging"
NAME = "flannel-dp"

#: Files that the commands read or write by default.
FILES = {
    flags.NET_CONF: "flannel's network configuration (--net-conf).",
    flags.SUBNET_FILE: "This node's subnets and MTU, for flannel's CNI plugin (--subnet-file).",
    flags.RUN_DIR: "Locks, and what a process leaves to the next one (--run-dir).",
}

DAEMON = """\
Does what 'flannel-dp sync --watch' does, with the start line of flanneld: a start script, a unit or
a supervisor section of flanneld works with nothing but the program's name changed.

All flags of sync are accepted, with one dash or two. Other than there, --public-ip may name an
address that is not on this node, and a flag that has no effect with the others is ignored with a
note.
"""

# ---- roff ------------------------------------------------------------------------


def escaped(text: str) -> str:
    """Return text that roff prints as it is; hyphens are those that a shell wants."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti").replace("^", "\\(ha")
    text = text.replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{text}" if text.startswith(".") else text


def quoted(text: str) -> str:
    return '"' + escaped(text).replace('"', "\\(dq") + '"'


def paragraphs(text: str) -> Iterator[str]:
    """Yield the lines of text; paragraphs stand apart by empty lines."""
    for number, part in enumerate(re.split(r"\n\s*\n", dedent(text).strip())):
        if number:
            yield ".PP"
        yield escaped(" ".join(part.split()))


def terms(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, meaning in rows:
        yield from (".TP", f".B {quoted(term)}", escaped(" ".join(meaning.split())))


def page(name: str, short: str, synopsis: str, body: Iterable[str]) -> str:
    """Return a page of section 1."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    head = [
        '.\\" Made by scripts/manual.py ("make man") from the texts of --help.',
        f'.TH {name.upper().replace("-", chr(92) + "-")} 1 "" '
        f'"{NAME} {project["version"]}" "{NAME}"',
        ".SH NAME",
        f"{escaped(name)} \\- {escaped(short)}",
        ".SH SYNOPSIS",
        f".B {quoted(synopsis.partition('[')[0].strip())}",
        escaped("[" + synopsis.partition("[")[2]),
    ]
    return "\n".join([*head, *body]) + "\n"


# ---- the pages -------------------------------------------------------------------


def exit_status() -> Iterator[str]:
    yield ".SH EXIT STATUS"
    yield from terms(re.findall(r"^ +(\d+) +(.*)$", EXIT_CODES, re.MULTILINE))


def see_also(*own: str) -> Iterator[str]:
    names = [NAME, *(f"{NAME}-{one}" for one in sorted(command.commands)), f"{NAME}d"]
    others = [f".BR {escaped(one)} (1)" for one in names if one not in own]
    yield ".SH SEE ALSO"
    yield from (f"{one}," if one != others[-1] else one for one in others)


def main_page() -> str:
    context = click.Context(command, info_name=NAME, **command.context_settings)
    short, _, more = inspect.cleandoc(command.help or "").partition("\n\n")
    body = [".SH DESCRIPTION", *paragraphs(f"{short}\n\n{more}"), ".SH COMMANDS"]
    body += terms(
        (f"{NAME}-{name}(1)", one.get_short_help_str(limit=200))
        for name, one in sorted(command.commands.items())
    )
    body += [".SH OPTIONS", *terms(filter(None, map(_record, command.get_params(context))))]
    body += [".SH FILES", *terms(FILES.items()), *exit_status(), *see_also(NAME)]
    return page(NAME, short.rstrip("."), f"{NAME} [OPTIONS] COMMAND [ARGS]...", body)


def _record(one: click.Parameter) -> tuple[str, str] | None:
    context = click.Context(command, info_name=NAME, **command.context_settings)
    return one.get_help_record(context)


def command_page(name: str, one: Command) -> str:
    parent = click.Context(command, info_name=NAME, **command.context_settings)
    context = click.Context(one, parent, info_name=name)
    pieces = " ".join(one.collect_usage_pieces(context))
    body = [".SH DESCRIPTION", *paragraphs(inspect.cleandoc(one.help or "")), ".SH OPTIONS"]
    for title, parameters in one.sections(context).items():
        rows = [_row(each, context) for each in parameters]
        if shown := [row for row in rows if row]:
            body += [f".SS {quoted(title)}", *terms(shown)]
    if text := one.about_tolerated():
        body += [".PP", escaped(text)]
    examples = re.findall(rf"^  ({NAME} .*)$", one.epilog or "", re.MULTILINE)
    body += [".SH EXAMPLES", ".EX", *map(escaped, examples), ".EE"]
    own = f"{NAME}-{name}"
    body += [*exit_status(), *see_also(own)]
    return page(own, one.get_short_help_str(limit=200).rstrip("."), f"{NAME} {name} {pieces}", body)


def _row(one: click.Parameter, context: click.Context) -> tuple[str, str] | None:
    row = one.get_help_record(context)
    if row and isinstance(one, click.Option) and one.envvar:
        return row[0], f"{row[1].rstrip('.')}. Variable: {one.envvar}."
    return row


def daemon_page() -> str:
    short = "run flannel-dp sync --watch with the start line of flanneld"
    body = [".SH DESCRIPTION", *paragraphs(DAEMON), *exit_status(), *see_also(f"{NAME}d")]
    return page(f"{NAME}d", short, f"{NAME}d [OPTIONS]", body)


# ---- completion ------------------------------------------------------------------

#: Each asks the installed command for its completion: it fits the version of click that is there.
SHELLS = {
    "bash/flannel-dp": f"""\
# Completion of flannel-dp for bash. Installed in share/bash-completion/completions.
eval "$({COMPLETE}=bash_source flannel-dp)"
""",
    "zsh/_flannel-dp": f"""\
#compdef flannel-dp
# Completion of flannel-dp for zsh. Installed in share/zsh/site-functions.
eval "$({COMPLETE}=zsh_source flannel-dp)"
_flannel_dp_completion "$@"
""",
    "fish/flannel-dp.fish": f"""\
# Completion of flannel-dp for fish. Installed in share/fish/vendor_completions.d.
{COMPLETE}=fish_source flannel-dp | source
""",
}


def files() -> dict[str, str]:
    """Return the text of each file by its path below packaging/."""
    made = {f"man/{NAME}.1": main_page(), f"man/{NAME}d.1": daemon_page()}
    for name, one in command.commands.items():
        assert isinstance(one, Command)
        made[f"man/{NAME}-{name}.1"] = command_page(name, one)
    return made | {f"completion/{name}": text for name, text in SHELLS.items()}


if __name__ == "__main__":
    for path, text in files().items():
        if len(sys.argv) > 1 and not path.startswith(sys.argv[1]):
            continue
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_text(text)
        print(FOLDER / path, file=sys.stderr)
