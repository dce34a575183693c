"""Flags as typed values: every flag of every subcommand arrives, and defaults are click's."""

from __future__ import annotations

import os
from typing import Any

import click
import pytest
from msgspec import structs

from flannel_dp.command.cli import command
from flannel_dp.command.request import NodeFlags, Request, RulesFlags, ServiceFlags, SourceFlags

GROUPS = {"source": SourceFlags, "node": NodeFlags, "rules": RulesFlags, "service": ServiceFlags}

#: Read by the subcommands themselves, or accepted for flanneld's sake alone.
ELSEWHERE = {
    *("watch", "version", "exit_code", "address", "of_self", "interval"),
    "keep_device",
    *("allow_incomplete", "only_rules", "stale"),
    *("peers", "count", "paths", "timeout", "no_path_mtu", "fix_offload"),
    *("iptables_resync", "vmodule", "log_backtrace_at"),
    *("peer", "device", "since", "limit"),
}


def parsed(name: str, *arguments: str) -> dict[str, Any]:
    subcommand = command.commands[name]
    with (
        command.make_context("flannel-dp", [name]) as parent,
        subcommand.make_context(name, list(arguments), parent=parent) as context,
    ):
        return context.params


def values(request: Request) -> dict[str, Any]:
    """All values of a request by the names of their flags."""
    flat = {n: getattr(request, n) for n in request.__struct_fields__ if n not in GROUPS}
    for name in GROUPS:
        flat |= structs.asdict(getattr(request, name))
    return flat


@pytest.mark.parametrize("name", sorted(command.commands))
def test_every_flag_is_in_one_group_with_clicks_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in [name for name in os.environ if name.startswith("FLANNELD_")]:
        monkeypatch.delenv(variable)
    given = parsed(name, *["192.0.2.1"] * (name == "explain"))

    found = values(Request.of(given))

    for flag, value in given.items():
        if flag not in ELSEWHERE:
            assert found[flag] == value, flag
    # That a subcommand does not know the flag is a value of its own.
    assert found == values(Request.of({flag: given[flag] for flag in ("probe",) if flag in given}))


def test_no_field_is_in_two_groups() -> None:
    fields = [field.name for group in GROUPS.values() for field in structs.fields(group)]
    fields += [field.name for field in structs.fields(Request)]

    assert len(fields) == len(set(fields))


def test_every_value_arrives() -> None:
    chosen = {
        option.name: f"some-{option.name}"
        for each in command.commands.values()
        for option in each.params
        if isinstance(option, click.Option) and option.type is click.STRING and not option.multiple
    }
    given = {name: value for name, value in chosen.items() if name and name not in ELSEWHERE}

    found = values(Request.of(given))

    assert {name: found[name] for name in given} == given
    assert len(given) > 15


def test_an_argument_that_is_no_text_arrives_as_it_is() -> None:
    assert Request.of({"leases": "/etc/\udcff"}).source.leases == "/etc/\udcff"


@pytest.mark.parametrize(
    ("flag", "chosen", "public", "expected", "nat"),
    [
        (None, {}, {}, None, False),
        (None, {4: "192.0.2.1"}, {}, "192.0.2.1", False),
        ("192.0.2.9", {4: "192.0.2.1"}, {}, "192.0.2.9", False),
        ("192.0.2.9", {4: "192.0.2.1"}, {4: "203.0.113.1"}, "203.0.113.1", True),
        (None, {}, {6: "2001:db8::1"}, None, True),
    ],
)
def test_addresses_of_the_cluster(
    flag: str | None,
    chosen: dict[int, str],
    public: dict[int, str],
    expected: str | None,
    nat: bool,
) -> None:
    node = NodeFlags(public_ip=flag).with_addresses(chosen, public)

    assert (node.public_ip, node.behind_nat) == (expected, nat)
    assert node.public_ipv6 == (public.get(6) or chosen.get(6))
