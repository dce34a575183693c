"""The subcommands that ask a running agent, or read what one has kept: status and history."""

from __future__ import annotations

from typing import Any

import click

from flannel_dp.command import flags, output
from flannel_dp.command.declaring import argument, options, without_effect
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
        help="Where the agent has its socket, beside its lock, and its history.",
    ),
    click.option(
        "--output",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Output format.",
    ),
)

_kept = options(
    click.option(
        "--state-dir",
        metavar="DIRECTORY",
        default="",
        envvar="FLANNELD_STATE_DIR",
        help="Where the agent keeps its history, if it was told to [default: --run-dir].",
    ),
    click.option(
        "--since",
        metavar="TIME",
        default="",
        help="Only events since then: '2h', '30min', '03:12' or '2026-11-27 03:12', local time.",
    ),
    click.option(
        "--limit",
        metavar="N",
        type=click.IntRange(0),
        default=50,
        show_default=True,
        help="The last events, so many; 0: all.",
    ),
)

#: All flags of sync: these commands are tried with its start line.
_start_line = without_effect(
    flags.leases,
    flags.node,
    flags.rules,
    flags.watch,
    flags.probing,
    flags.counters,
    flags.take_over,
    flags.allow_shrink,
)


@click.command(
    cls=Command,
    short_help="Ask a running agent how it is.",
    epilog=output.epilog("status", "status --output json", "status --device flannel.1"),
)
@_asked
@_start_line
def status(device: str, netns: str | None, run_dir: str, output: str, **_: Any) -> int:
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


@click.command(
    cls=Command,
    short_help="Show what happened to peers, when and why.",
    epilog=output.epilog("history", "history 10.244.7.5 --since 6h", "history node7 --output json"),
)
@argument("peer", metavar="[ADDRESS|PEER]", required=False, default="")
@_asked
@_kept
@_start_line
def history(
    peer: str,
    device: str,
    netns: str | None,
    run_dir: str,
    state_dir: str,
    since: str,
    limit: int,
    output: str,
    **_: Any,
) -> int:
    """Show what an agent (sync --watch) has kept: changes of peers, repairs, rejected leases and
    problems, with time and cause.

    ADDRESS is that of a pod or a node, or a subnet; PEER the name of a lease. Peers that are gone
    are found, too. It takes no agent that runs.
    """
    import time

    from flannel_dp.command.output import write
    from flannel_dp.look.history import Answer, since_of
    from flannel_dp.look.history_file import Kept

    now = time.time()
    after = since_of(since, now) if since else 0.0
    kept = Kept(state_dir or run_dir, netns, device)
    write(Answer(kept, peer, since=after, limit=limit, now=now), output)
    return 0
