"""Flags with one another: those without an effect, those of another command, those mistyped."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click
import pytest

from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.cluster.suggest import KEYS, about_key
from flannel_dp.command.cli import command, main
from flannel_dp.command.dependencies import BEATEN, NEEDS, OF_SOURCE, SOURCES, Idle, idle
from flannel_dp.command.output import CONDITIONAL, Command
from flannel_dp.command.request import Request

COMMANDS: dict[str, Any] = command.commands


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FLANNELD_"):
            monkeypatch.delenv(name)


# ---- the table ---------------------------------------------------------------------

FILE, ETCD, KUBE = {"leases": "f"}, {"etcd_endpoints": "e"}, {"kube_subnet_mgr": True}


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("etcd_endpoints", FILE | ETCD, "has no effect with --leases"),
        ("etcd_endpoints", KUBE | ETCD, "has no effect with --kube-subnet-mgr"),
        ("kube_subnet_mgr", FILE | KUBE, "has no effect with --leases"),
        ("etcd_prefix", FILE, "has no effect with --leases"),
        ("etcd_prefix", {}, "has no effect without --etcd-endpoints"),
        ("kubeconfig_file", ETCD, "has no effect with --etcd-endpoints"),
        ("kube_annotation_prefix", ETCD, "has no effect with --etcd-endpoints"),
        ("kube_annotation_prefix", {}, "has no effect without --kube-subnet-mgr or --leases"),
        ("net_conf", ETCD, "has no effect with --etcd-endpoints"),
        ("subnet_lease_renew_margin", ETCD | {"watch": False}, "has no effect without --watch"),
        ("subnet_lease_renew_margin", FILE | {"watch": True}, "has no effect with --leases"),
        ("set_node_network_unavailable", KUBE | {"watch": False}, "has no effect without --watch"),
        ("audit_interval", {"watch": False}, "has no effect without --watch"),
        ("lease_grace", {"watch": False}, "has no effect without --watch"),
        ("healthz_ip", {"watch": True, "healthz_port": 0}, "has no effect without --healthz-port"),
        ("log_json", {"watch": False}, "has no effect without --watch"),
        ("interval", {"watch": False}, "has no effect without --watch"),
        ("behind_nat", {"public_ip": None, "public_ipv6": None, "kube_subnet_mgr": False},
         "has no effect without --public-ip, --public-ipv6 or --kube-subnet-mgr"),
        ("etcd_password", ETCD | {"etcd_password_file": "f"},
         "has no effect with --etcd-password-file"),
        ("ip_masq_fully_random_disable", {"ip_masq": False}, "has no effect without --ip-masq"),
        ("guard_underlay", {"firewall": "none"}, "has no effect with --firewall none"),
        ("iptables_forward_rules", {"firewall": "none"}, "has no effect with --firewall none"),
    ],
)  # fmt: skip
def test_a_flag_without_an_effect(name: str, values: dict[str, Any], reason: str) -> None:
    spelt = {one.name: one.opts[0] for each in COMMANDS.values() for one in each.params}

    (found,) = idle([name], {name: True} | values)

    assert isinstance(found, Idle)
    assert (found.name, found.reason(spelt)) == (name, reason)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("etcd_prefix", ETCD),
        ("kube_annotation_prefix", FILE),
        ("net_conf", {}),
        ("net_conf", KUBE),
        ("healthz_ip", {"watch": True, "healthz_port": 1}),
        ("healthz_ip", {"healthz_port": 1}),  # a command without --watch
        ("behind_nat", {"public_ip": "192.0.2.1", "public_ipv6": None}),
        ("ip_masq", {"firewall": "nft"}),
        ("ip_masq", {"ip_masq": False, "firewall": "none"}),
        ("kube_subnet_mgr", FILE | {"kube_subnet_mgr": False}),
        ("set_node_network_unavailable", KUBE | {"watch": True}),
        ("iface", FILE),
    ],
)
def test_a_flag_with_an_effect(name: str, values: dict[str, Any]) -> None:
    assert [*idle([name], {name: True} | values)] == []


def test_a_default_source_counts_where_no_flag_names_one() -> None:
    assert [*idle(["etcd_prefix"], {"etcd_prefix": "/a"}, "etcd")] == []
    (found,) = idle(["net_conf"], {"net_conf": "f"}, "etcd")
    assert found == Idle("net_conf", "without", ("leases", "kube_subnet_mgr"))


def test_the_table_names_parameters_and_the_command_looks_for_all_of_them() -> None:
    """--net-conf is in use everywhere, and only what takes its effect away is looked for."""
    known = {one.name for each in COMMANDS.values() for one in each.params}
    needed = {name for names in NEEDS.values() for name in names}
    named = {*OF_SOURCE, *NEEDS, *BEATEN}

    assert named | needed | {name for name, _ in BEATEN.values()} <= known
    assert {*CONDITIONAL} == named - {"net_conf"} | {"watch"}
    assert {*SOURCES.values()} <= known


# ---- the command -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("plan --leases f --etcd-endpoints e", "--etcd-endpoints has no effect with --leases"),
        ("sync --etcd-endpoints e --net-conf f", "--net-conf has no effect with --etcd-endpoints"),
        ("sync --watch --net-conf f",
         "--net-conf has no effect without --leases or --kube-subnet-mgr"),
        ("sync --leases f --log-json", "--log-json has no effect without --watch"),
        ("sync -leases f -set-node-network-unavailable=false",
         "--no-set-node-network-unavailable has no effect with --leases"),
        ("plan --leases f --ip-masq --firewall none", "--ip-masq has no effect with --firewall"),
        ("stats --interval 5", "--interval has no effect without --watch"),
    ],
)  # fmt: skip
def test_the_error_names_both_flags(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2

    out, err = capsys.readouterr()
    assert (out, err.startswith(f"flannel-dp: error: {words}")) == ("", True), err
    assert "see 'flannel-dp " in err


def notes(line: str, *, lenient: bool = False) -> tuple[str, ...]:
    name, *words = line.split()
    with command.make_context("flannel-dp", [name], obj=lenient) as parent:
        made = COMMANDS[name].make_context(name, words, parent=parent).params
    return Request.of(made).notes


def test_a_variable_without_an_effect_is_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLANNELD_ETCD_PREFIX", "/a")
    monkeypatch.setenv("FLANNELD_IP_MASQ", "true")
    found = (
        "FLANNELD_ETCD_PREFIX has no effect with --leases",
        "FLANNELD_IP_MASQ has no effect with --firewall none",
    )

    assert notes("plan --leases f --firewall none") == found
    assert notes("plan --etcd-endpoints e") == ()
    monkeypatch.setenv("FLANNELD_ETCD_ENDPOINTS", "e")
    assert main(["plan", "--net-conf", "f", "--etcd-prefix", "/a"]) == 2
    said = "--net-conf has no effect with FLANNELD_ETCD_ENDPOINTS (environment)"
    assert said in capsys.readouterr().err
    monkeypatch.delenv("FLANNELD_ETCD_ENDPOINTS")
    assert main(["plan", "--leases", str(tmp_path / "f"), "--firewall", "none"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[:2] == [f"flannel-dp: {note}" for note in found]


def test_flannelds_start_line_is_accepted_with_notes() -> None:
    line = "sync --watch --kube-subnet-mgr --etcd-prefix /a --healthz-ip :: --net-conf f"

    assert notes(line, lenient=True) == (
        "--etcd-prefix has no effect with --kube-subnet-mgr",
        "--healthz-ip has no effect without --healthz-port",
    )
    with pytest.raises(click.UsageError):
        notes(line)


# ---- the start line of sync with another command ------------------------------------

#: Together, all flags of sync.
START_LINES = (
    "--watch --leases f --net-conf f --iface a --iface-regex b --iface-can-reach 192.0.2.1 "
    "--public-ip 192.0.2.1 --public-ipv6 2001:db8::1 --behind-nat --subnet 10.244.1.0/24 "
    "--node-name n --subnet-file s --run-dir r --netns n --no-nexthops --take-over --allow-shrink "
    "--ip-masq --ip-masq-fully-random-disable --iptables-forward-rules --ip-blackhole-route "
    "--guard-underlay --firewall nft --forwarding ebpf --counters --audit-interval 5 "
    "--lease-grace 5 "
    "--probe --probe-interval 2 --path-mtu warn --ready-when reachable --ready-timeout 9 "
    "--state-dir d "
    "--healthz-ip :: --healthz-port 1 --log-json -v --iptables-resync 5 --vmodule a=1 "
    "--log_backtrace_at a:1",
    "--watch --etcd-endpoints e --etcd-prefix p --etcd-keyfile k --etcd-certfile c "
    "--etcd-cafile c --etcd-username u --etcd-password-file f --subnet-lease-renew-margin 5",
    "--watch --kube-subnet-mgr --kube-api-url u --kubeconfig-file f --kube-annotation-prefix p "
    "--no-set-node-network-unavailable --output text",
    "--watch --etcd-username u --etcd-password p",
)


def test_the_start_lines_have_all_flags_of_sync() -> None:
    given = {word for line in START_LINES for word in line.split() if word[0] == "-"}
    flags = {
        one.name: {*one.opts, *one.secondary_opts}
        for one in COMMANDS["sync"].params
        if one.name != "version"
    }

    assert [name for name, names in flags.items() if not names & given] == []


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_accepts_the_start_line_of_sync(name: str) -> None:
    own = {"explain": ["10.244.2.7"]}.get(name, [])
    elsewhere = name in ("show", "stats")  # whose --watch is another
    for line in START_LINES[: -1 if elsewhere else None]:
        with (
            command.make_context("flannel-dp", [name]) as parent,
            COMMANDS[name].make_context(name, [*own, *line.split()], parent=parent) as context,
        ):
            request = Request.of(context.params)
        named = request.source.is_named
        assert named or name in ("sync", "status", "history"), "etcd is where an agent looks for it"


def test_plan_takes_what_sync_would_do_with_these_flags() -> None:
    words = ["--leases", "f", "--counters", "--allow-shrink", "--take-over"]
    with (
        command.make_context("flannel-dp", ["plan"]) as parent,
        COMMANDS["plan"].make_context("plan", words, parent=parent) as context,
    ):
        request = Request.of(context.params)

    assert (request.counters, request.allow_shrink, request.take_over) == (True, True, True)


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"sync"}))
def test_help_names_the_flags_that_are_accepted_and_have_no_effect(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = COMMANDS[name]
    assert isinstance(one, Command)
    sync = {each.name for each in COMMANDS["sync"].params if not each.hidden}
    shown = {each.name for each in one.params if not getattr(each, "hidden", False)}

    assert main([name, "--help"]) == 0

    told = capsys.readouterr().out.partition("accepted and have no effect:")[2].partition("\n\n")[0]
    joined = re.sub(r"-\n *", "-", told)  # click breaks lines at a hyphen
    idle, _, read = re.sub(r"\s+", " ", joined).partition(" Read as an agent reads them: ")
    names = [{word.strip(",.") for word in words.split()} for words in (idle, read)]
    few = [each for each in one.tolerated if len(one.tolerated) < 20]
    assert names == [
        {each.opts[0] for each in few if each.expose_value is kept} for kept in (False, True)
    ]
    assert {each.name for each in one.tolerated} == sync - shown


# ---- did you mean ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("snyc", "No such command 'snyc'. Did you mean 'sync'?"),
        ("fly", "No such command 'fly'."),
        ("sync --ifac eth0", "No such option '--ifac'. Did you mean '--iface'?"),
        ("sync -ifac=eth0", "No such option '-ifac'. Did you mean '--iface'?"),
        ("plan --etcd-endpoint x",
         "No such option '--etcd-endpoint'. Did you mean '--etcd-endpoints'?"),
        ("clean --keep-devices", "No such option '--keep-devices'. Did you mean '--keep-device'?"),
        ("sync --frobnicate", "No such option '--frobnicate'."),
        ("sync -x", "No such option '-x'."),
    ],
)  # fmt: skip
def test_a_mistyped_word(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2

    assert capsys.readouterr().err.startswith(f"flannel-dp: error: {message}")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("Netwrok", "Network"),
        ("Backend.DirectRoutng", "Backend.DirectRouting"),
        ("VNI", "Backend.VNI"),
        ("Backend.Network", "Network"),
        ("Frobnicate", ""),
    ],
)
def test_a_key_of_the_network_configuration_that_is_mistyped(key: str, meant: str) -> None:
    told = f" Did you mean '{meant}'?" if meant else ""

    assert about_key(key) == f"net-conf: key '{key}' is not known and has no effect.{told}"


def test_the_keys_that_are_suggested_are_read() -> None:
    document = {name: None for name in KEYS if "." not in name}
    backend = {name.partition(".")[2]: None for name in KEYS if "." in name}
    document |= {"Network": "10.244.0.0/16", "Backend": backend | {"Type": "vxlan"}}

    config = NetworkConfig.from_json(json.dumps(document))

    assert config.unknown_keys == ()
    made = json.loads(config.to_json())
    assert {*made, *(f"Backend.{name}" for name in made["Backend"])} <= {*KEYS}
