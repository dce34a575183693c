"""What a subcommand prints and ends with: its help in sections, answers, reports, exit codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import click
from click.core import ParameterSource

from flannel_dp.command.declaring import made_of, made_without_effect
from flannel_dp.look import terminal as out

if TYPE_CHECKING:
    from flannel_dp.reconcile.plan import Plan
    from flannel_dp.reconcile.report import Report

USAGE, INCOMPLETE, HELD, CHANGES, INTERRUPTED = 2, 3, 4, 10, 130

EXIT_CODES = """\
\b
Exit codes:
  0    in sync; nothing went wrong
  1    failed
  2    wrong flag, network configuration or interface
  3    in sync except for the conflicts or failures that are listed
  4    leases unavailable or not trustworthy
  5    another instance owns this device
  10   sync would change something; with 'plan --exit-code'
  77   not permitted: CAP_NET_ADMIN is missing
  130  interrupted
"""


#: The sections of --help, and the parameters in each.
GROUPS = {
    "Leases and network configuration": "leases etcd_endpoints etcd_prefix etcd_keyfile "
    "etcd_certfile etcd_cafile etcd_username etcd_password etcd_password_file kube_subnet_mgr "
    "kube_api_url kubeconfig_file kube_annotation_prefix net_conf subnet_lease_renew_margin "
    "set_node_network_unavailable",
    "This node": "iface iface_regex iface_can_reach public_ip public_ipv6 behind_nat subnet "
    "node_name subnet_file run_dir netns device",
    "Entries in the kernel": "no_nexthops take_over allow_shrink keep_device "
    "for_flanneld allow_incomplete only_rules stale",
    "Firewall": "ip_masq ip_masq_fully_random_disable iptables_forward_rules ip_blackhole_route "
    "guard_underlay firewall",
    "eBPF": "forwarding counters",
    "Probes": "count paths timeout no_path_mtu fix_offload",
    "Running": "watch interval audit_interval lease_grace probe probe_interval path_mtu ready_when "
    "ready_timeout state_dir healthz_ip healthz_port",
    "Output": "since limit exit_code of_self output verbose log_json",
}


#: What may have no effect, or make another flag have none (dependencies.py).
CONDITIONAL = (
    "etcd_endpoints", "etcd_prefix", "etcd_keyfile", "etcd_certfile", "etcd_cafile",
    "etcd_username", "etcd_password", "etcd_password_file", "kube_subnet_mgr", "kube_api_url",
    "kubeconfig_file", "kube_annotation_prefix", "subnet_lease_renew_margin",
    "set_node_network_unavailable", "audit_interval", "lease_grace", "log_json", "healthz_port",
    "healthz_ip", "interval", "behind_nat", "ip_masq", "ip_masq_fully_random_disable",
    "iptables_forward_rules", "guard_underlay", "watch", "probe", "probe_interval", "path_mtu",
    "ready_when", "ready_timeout",
)  # fmt: skip

#: So many flags that have no effect are named.
_MANY = 20

_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


class Command(click.Command):
    """A command whose --help lists the flags in sections (``GROUPS``), and that rejects flags which
    have no effect with the others.

    Its flags are made when it is called: those of all commands take longer than an unchanged sync.
    """

    _given: Sequence[click.Parameter] = ()
    _made: list[click.Parameter] | None = None
    _tolerated: Sequence[click.Option] = ()

    def __init__(self, *arguments: Any, **given: Any) -> None:
        # click asks for these names once, in whichever context comes first.
        given.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        super().__init__(*arguments, **given)

    @property
    def params(self) -> list[click.Parameter]:
        """The flags and arguments, in the order in which they are written."""
        if self._made is None:
            own = [*self._given, *made_of(self.callback)]
            more = made_without_effect(self.callback, own)
            self._tolerated = [one for one in more if not one.hidden]
            for one in more:
                # --watch says where the leases are, if nothing else does, and --path-mtu whether
                # routes may have an MTU of their own.
                one.hidden, one.expose_value = True, one.name in ("watch", "path_mtu")
            self._made = [*own, *more]
        return self._made

    @params.setter
    def params(self, given: list[click.Parameter]) -> None:
        self._given, self._made = given, None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse them. Raises a usage error for a flag that has no effect with the others; of a
        variable that has none a note is left in the parameters. To a lenient program
        (``ctx.obj``) that applies to flags, too."""
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing and any(
            ctx.get_parameter_source(name) in _GIVEN for name in CONDITIONAL
        ):
            from flannel_dp.command.rejecting import reject_idle

            agent = self.name == "sync" or any(one.name == "watch" for one in self.tolerated)
            default = "etcd" if agent and ctx.params.get("watch") else ""
            if notes := reject_idle(ctx, default):
                ctx.params["notes"] = notes
        return rest

    @property
    def tolerated(self) -> Sequence[click.Option]:
        """The flags of sync that are accepted and have no effect."""
        return self._tolerated if self.params else ()

    def sections(self, ctx: click.Context) -> dict[str, list[click.Option]]:
        """Return the flags of each section of --help; those of no group (click's own --help) end
        the last one. Arguments are explained above them."""
        left = {one.name: one for one in self.get_params(ctx) if isinstance(one, click.Option)}
        made = {
            title: [left.pop(name) for name in names.split() if name in left]
            for title, names in GROUPS.items()
        }
        made["Output"] += left.values()
        return made

    def about_tolerated(self) -> str:
        """Return what --help says of these flags, "" where there are none."""
        names = [one.opts[0] for one in self.tolerated if not one.expose_value]
        counted = [one.opts[0] for one in self.tolerated if one.expose_value]
        listed = ", ".join(names)
        text = f"Flags of sync that are accepted and have no effect: {listed}." if names else ""
        if len(names) > _MANY:
            text = "All flags of sync are accepted; those that are not named here have no effect."
        if counted:
            text += f" Read as an agent reads them: {', '.join(counted)}."
        return text.strip()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, and the flags of sync that are accepted as well."""
        for title, parameters in self.sections(ctx).items():
            rows = [row for one in parameters if (row := one.get_help_record(ctx))]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        if text := self.about_tolerated():
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(text)


def show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the version and end."""
    if not wanted or context.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("flannel-dp")
    except PackageNotFoundError:
        number = "(not installed)"
    click.echo(f"flannel-dp {number}")
    context.exit()


class Answer(Protocol):
    """What a view found."""

    def to_json(self) -> dict[str, Any]: ...
    def lines(self, paint: out.Paint = ..., width: int = 0) -> Iterable[str]: ...


def epilog(*examples: str) -> str:
    """Return what stands below the flags in a command's --help."""
    lines = "".join(f"  flannel-dp {example}\n" for example in examples)
    return f"\b\nExamples:\n{lines}\n{EXIT_CODES}"


def write(answer: Answer, output: str) -> None:
    """Print an answer: ``output`` is "text" or "json"."""
    if output == "json":
        out.write_json(answer.to_json())
    else:
        write_lines(answer.lines(out.stdout_paint(), out.stdout_width()))


def write_lines(lines: Iterable[str]) -> None:
    """Write lines to standard output; on a terminal, those that are too long on several lines."""
    if width := out.stdout_width():
        from flannel_dp.look.fitting import folded

        lines = folded(lines, width)
    out.write_lines(lines)


def finish(report: Report, output: str, verdict: str, *, allowed: bool = False) -> int:
    """Print a report and return the exit code; ``verdict`` is said where all went well, or what did
    not was ``allowed``."""
    if output == "json":
        out.write_json(report.to_json())
    else:
        from flannel_dp.look.text import report_lines

        write_lines(report_lines(report, verdict, out.stdout_paint(), allowed=allowed))
    return 0 if report.ok or allowed else INCOMPLETE


def code_of_plan(planned: Plan) -> int:
    """Return the exit code of ``plan --exit-code``: CHANGES where sync would write something, else
    what sync would end with."""
    if not planned.is_empty:
        return CHANGES
    if any(planned.held.values()):  # removals that the brake holds back
        return HELD
    return 0 if planned.ok else INCOMPLETE
