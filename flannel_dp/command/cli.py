"""The ``flannel-dp`` command: flags in, one DataPlane call, text or JSON out, an exit code.

Nothing but click is imported before a subcommand runs, so that ``--help``
answers at once and a sync with nothing to do costs little more than its dumps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from flannel_dp.command import asking, flags, output
from flannel_dp.command.compose import Composition, stop_log
from flannel_dp.command.declaring import argument, option
from flannel_dp.command.output import EXIT_CODES, INTERRUPTED, USAGE, Command
from flannel_dp.command.spelling import normalise
from flannel_dp.look import terminal as out
from flannel_dp.wording import naming_flags

if TYPE_CHECKING:
    from flannel_dp.look.explain import Explanation
    from flannel_dp.look.myself import SelfExplanation

#: click's variable for shell completion, which comes without arguments.
COMPLETE = "_FLANNEL_DP_COMPLETE"


@click.group(
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=output.show_version,
    help="Show the version and exit.",
)
def command() -> None:
    """Keep this node's vxlan overlay in agreement with a flannel cluster's leases.

    Long options may be written with one dash, as flanneld has them.
    """


@command.command(
    cls=Command,
    short_help="Write leases to the kernel; --watch keeps it in sync.",
    epilog=output.epilog(
        "sync --leases leases.json --iface eth0",
        "sync --watch --etcd-endpoints http://192.0.2.1:2379 --iface eth0",
        "sync --watch --kube-subnet-mgr --ip-masq --healthz-port 8081",
    ),
)
@flags.leases
@flags.node
@flags.rules
@flags.counters
@flags.take_over
@flags.allow_shrink
@flags.watch
@flags.probing
@option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=output.show_version,
    hidden=True,
)
def sync(watch: bool, **given: Any) -> int:
    """Write exactly these leases to the kernel; with --watch, keep it in sync."""
    from flannel_dp.errors import ShrinkRefused
    from flannel_dp.look.text import ProgressBar

    made = Composition.of(given)
    if watch:
        from flannel_dp.command.running import run_service

        run_service(made.request)
        return 0
    context = click.get_current_context()
    if context.get_parameter_source("state_dir") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--state-dir has no effect without --watch")
    made.need_source()
    form = made.request.output
    with made.open_dataplane() as dataplane:
        dataplane.hold()
        snapshot = made.snapshot()
        held: ShrinkRefused | None = None
        try:
            with ProgressBar() as bar:
                report = dataplane.sync(snapshot.claims, progress=bar)
        except ShrinkRefused as error:  # all else is done
            held, report = error, error.report
        report.seconds["source"] = snapshot.seconds
        report.seconds["total"] += snapshot.seconds
        if held is not None:
            if form != "json":
                output.finish(report, form, "in sync but for removals")
            raise held
        return output.finish(report, form, "in sync")


@command.command(
    cls=Command,
    epilog=output.epilog(
        "plan --leases leases.json --iface eth0",
        "plan --exit-code --output json --etcd-endpoints http://192.0.2.1:2379",
    ),
)
@flags.leases
@flags.node
@flags.rules
@flags.counters
@flags.take_over
@flags.allow_shrink
@flags.start_line
@option("--exit-code", is_flag=True, help="Exit with 10 where sync would change something.")
def plan(exit_code: bool, **given: Any) -> int:
    """Show what sync would change, and change nothing."""
    made = Composition.of(given)
    made.need_source()
    with made.open_dataplane() as dataplane:
        planned = dataplane.plan(made.snapshot().claims)
    if made.request.as_json:
        out.write_json(planned.to_json())
    else:
        from flannel_dp.look.text import plan_lines

        output.write_lines(plan_lines(planned, out.stdout_paint()))
    return output.code_of_plan(planned) if exit_code else 0


@command.command(
    cls=Command,
    epilog=output.epilog(
        "show",
        "show --leases leases.json",
        "show --watch --etcd-endpoints http://192.0.2.1:2379",
    ),
)
@flags.leases
@flags.node
@flags.rules
@flags.start_line
@option("--watch", is_flag=True, help="Keep running: a screen (q ends it), or lines of events.")
@flags.showing
def show(watch: bool, **given: Any) -> int:
    """Show the overlay in the kernel, peer by peer.

    With a source of leases (--leases, --etcd-endpoints or --kube-subnet-mgr), also each
    peer's lease, what sync would change, and the rejected leases.
    """
    from msgspec.structs import replace

    from flannel_dp.look.show import show as look

    made = Composition.of(given)
    if watch:
        from flannel_dp.command.running import run_view

        run_view(made)
        return 0
    with made.open_dataplane(as_it_is=True) as dataplane:
        overview = replace(look(dataplane, made.claims()), lives=made.lives(dataplane.config))
    output.write(overview, made.request.output)
    return 0


@command.command(
    cls=Command,
    short_help="List leases: accepted, rejected and why, and expiry.",
    epilog=output.epilog(
        "leases --etcd-endpoints http://192.0.2.1:2379",
        "leases --kube-subnet-mgr --output json > leases.json",
    ),
)
@flags.leases
@flags.node
@flags.rules
@flags.start_line
def leases(**given: Any) -> int:
    """List leases: accepted, rejected (with the reason), and when each expires.

    --output json prints a list that --leases accepts.
    """
    from flannel_dp.look.leases import list_leases

    made = Composition.of(given)
    made.need_source()
    with made.open_dataplane(as_it_is=True) as dataplane:
        snapshot, ends = made.snapshot(), made.membership.expirations()
        output.write(list_leases(dataplane.config, snapshot, dataplane, ends), made.request.output)
    return 0


@command.command(
    cls=Command,
    short_help="Explain step by step what happens to a packet.",
    epilog=output.epilog(
        "explain 10.244.2.7",
        "explain 10.244.2.7 --leases leases.json",
        "explain --self --leases leases.json",
    ),
)
@argument("address", required=False)
@option("--self", "of_self", is_flag=True, help="Explain who this node is instead.")
@flags.leases
@flags.node
@flags.rules
@flags.start_line
def explain(address: str | None, of_self: bool, **given: Any) -> int:
    """Explain step by step what happens to a packet to ADDRESS, and why.

    With --self: which subnet, address, lease and interface are this node's, and from which
    evidence. Without a source of leases, the kernel's entries are all that is compared.
    """
    if of_self and address:
        raise click.UsageError("give either an ADDRESS or --self")
    if not (of_self or address):
        raise click.UsageError("Missing argument 'ADDRESS', or --self")
    made = Composition.of(given)
    with made.open_dataplane(as_it_is=True) as dataplane:
        explanation: Explanation | SelfExplanation
        if address:
            from msgspec.structs import replace

            from flannel_dp.look.explain import explain as look

            explanation = look(dataplane, address, made.claims())
            lives = made.lives(dataplane.config) if explanation.verdict == "peer" else None
            if lives and explanation.lease:
                explanation = replace(explanation, life=lives.of(explanation.lease.subnet))
        else:
            from flannel_dp.look.myself import explain_self

            explanation = explain_self(dataplane, made.claims())
    output.write(explanation, made.request.output)
    return 0


@command.command(
    cls=Command,
    short_help="Prove which peers forward packets back, and say why others do not.",
    epilog=output.epilog(
        "probe",
        "probe 10.244.2.7 --leases leases.json",
        "probe --count 100 --output json",
    ),
)
@flags.probes
@flags.leases
@flags.node
@flags.rules
@flags.start_line
def probe(peers: tuple[str, ...], fix_offload: bool, **given: Any) -> int:
    """Prove that peers are reachable: all, or each PEER (a subnet, an address, a lease's name).

    Each probe goes through the tunnel to the peer, whose kernel forwards it back to this node. The
    peer needs no program for it, and nodes with flanneld answer, too. Exits with 3 when not all
    peers are alive.
    """
    from flannel_dp.command.proving import prove

    return prove(given, peers, fix_offload=fix_offload)


@command.command(
    cls=Command,
    short_help="Show packets, bytes and drops per peer.",
    epilog=output.epilog(
        "stats",
        "stats --watch --interval 5 --leases leases.json",
    ),
)
@flags.leases
@flags.node
@flags.rules
@flags.start_line
@option("--watch", is_flag=True, help="Keep running: show rates (q ends it).")
@option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="With --watch: time between two readings.",
)
def stats(watch: bool, interval: float, **given: Any) -> int:
    """Show packets and bytes per peer, when it was last seen, and drops with the kernel's reason.

    Run 'sync --counters' first to count. With a source of leases, also each peer's lease.
    """
    from flannel_dp.look.stats import stats as look

    made = Composition.of(given)
    if watch:
        from flannel_dp.command.running import run_stats

        run_stats(made, interval)
        return 0
    with made.open_dataplane(as_it_is=True) as dataplane:
        found = look(dataplane, made.claims())
    output.write(found, made.request.output)
    return 0


@command.command(
    cls=Command,
    short_help="Remove the routes, devices and rules that flannel-dp made.",
    epilog=output.epilog(
        "clean",
        "clean --for-flanneld --leases leases.json --iface eth0",
        "clean --only-rules",
        "clean --stale",
    ),
)
@flags.leases
@flags.node
@flags.rules
@flags.modes_of_clean
@flags.start_line
def clean(**given: Any) -> int:
    """Remove what flannel-dp made: routes, nexthops, devices with their entries, firewall rules.

    With --stale, remove only what was left behind for network namespaces and devices that no
    longer exist.
    """
    from flannel_dp.command.cleaning import clean_as_asked

    return clean_as_asked(**given)


for _one in (asking.status, asking.history):
    command.add_command(_one)


# ---- from argv to an exit code ------------------------------------------------


@naming_flags()
def main(argv: Sequence[str] | None = None, *, lenient: bool = False) -> int:
    """Run the command and return its exit code; ``argv`` is without the program's name.
    ``lenient`` is a note in place of an error for a flag that has no effect with the others."""
    arguments = normalise(
        sys.argv[1:] if argv is None else argv, (command, *command.commands.values())
    )
    if not arguments and COMPLETE not in os.environ:  # versions of click report this differently
        settings = command.context_settings
        with click.Context(command, info_name="flannel-dp", **settings) as context:
            click.echo(command.get_help(context), err=True)
        return USAGE
    try:
        code = _invoke(arguments, lenient)
        out.flush()
        return code
    except (KeyboardInterrupt, click.Abort):
        click.echo("flannel-dp: interrupted", err=True)
        return INTERRUPTED
    except (BrokenPipeError, SystemExit):  # the reader of the help has gone
        return 0
    except Exception as error:
        from flannel_dp.command.failing import fail

        return fail(error, arguments)
    finally:
        stop_log()


def _invoke(arguments: Sequence[str], lenient: bool) -> int:
    """As click's own ``main`` does it, which prints an empty line when it is interrupted."""
    if COMPLETE in os.environ:
        return int(command.main([*arguments], "flannel-dp", standalone_mode=False) or 0)
    try:
        with command.make_context("flannel-dp", [*arguments], obj=lenient) as context:
            return int(command.invoke(context) or 0)
    except click.exceptions.Exit as done:
        return done.exit_code
