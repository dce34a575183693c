"""The subcommands that ask a running agent: status."""

from __future__ import annotations

import click

from flannel_dp.command import output
from flannel_dp.command.declaring import options
from flannel_dp.command.flags import RUN_DIR
from flannel_dp.command.output import INCOMPLETE, Command

_asked = options(
    click.option(
        "--device",
        metavar="NAME",
        default="",
        help="Of several agents, the one with this vxlan device, such as flannel.1.",
    ),
    click.option(
        "--netns",
        metavar="NAME|PATH",
        help="Network namespace to work in [default: the current one].",
    ),
    click.option(
        "--run-dir",
        metavar="DIRECTORY",
        default=RUN_DIR,
        show_default=True,
        envvar="FLANNELD_RUN_DIR",
        help="Where the agent's socket is, beside its lock.",
    ),
    click.option(
        "--output",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Output format.",
    ),
)


@click.command(
    cls=Command,
    short_help="Ask a running agent how it is.",
    epilog=output.epilog("status", "status --output json", "status --device flannel.1"),
)
@_asked
def status(device: str, netns: str | None, run_dir: str, output: str) -> int:
    """Ask the running agent (sync --watch) how it is: this node, peers, problems, last repairs.

    Exits with 0 where all is well, with 3 where there are problems or it is not ready yet, and
    with 1 where no agent answers.
    """
    from flannel_dp.command.output import write
    from flannel_dp.look.asking import ask_agents
    from flannel_dp.look.status import AgentsStatus

    found = AgentsStatus(ask_agents(run_dir, netns, device))
    write(found, output)
    return 0 if found.ok else INCOMPLETE
