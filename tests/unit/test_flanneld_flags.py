"""Every flag and variable of flanneld, in all of Go's spellings, as ``flannel-dpd`` takes them.

The table is flanneld's (main.go of github.com/flannel-io/flannel).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import click
import pytest

from flannel_dp import __version__
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.command import flags
from flannel_dp.command.cli import command, main
from flannel_dp.command.compose import etcd_options
from flannel_dp.command.daemon import as_sync
from flannel_dp.command.request import SourceFlags
from flannel_dp.command.spelling import normalise
from flannel_dp.errors import ConfigError
from flannel_dp.sources.etcd.options import DEFAULT_ENDPOINTS, DEFAULT_PREFIX

SYNC = command.commands["sync"]


class Flag(NamedTuple):
    """One flag of flanneld: ``given`` is an example, ``arrives`` what it is to us.

    ``default`` is flanneld's, as it arrives; None where the command fills it in later.
    """

    name: str
    parameter: str
    given: str
    arrives: Any
    default: Any = ""

    @property
    def variable(self) -> str:
        return "FLANNELD_" + self.name.upper().replace("-", "_")


VALUES = (
    Flag("etcd-endpoints", "etcd_endpoints", "https://a:1,https://b:2", "https://a:1,https://b:2",
         None),
    Flag("etcd-prefix", "etcd_prefix", "/my/network", "/my/network", "/coreos.com/network"),
    Flag("etcd-keyfile", "etcd_keyfile", "./cert/client-key.pem", "./cert/client-key.pem"),
    Flag("etcd-certfile", "etcd_certfile", "./cert/client.pem", "./cert/client.pem"),
    Flag("etcd-cafile", "etcd_cafile", "./cert/ca.pem", "./cert/ca.pem"),
    Flag("etcd-username", "etcd_username", "node", "node"),
    Flag("etcd-password", "etcd_password", "s=cr et", "s=cr et"),
    Flag("iface", "iface", "eth0", ("eth0",), ()),
    Flag("iface-regex", "iface_regex", "^10\\.4\\.", ("^10\\.4\\.",), ()),
    Flag("iface-can-reach", "iface_can_reach", "192.0.2.1", "192.0.2.1"),
    Flag("subnet-file", "subnet_file", "./subnet.env", "./subnet.env", None),
    Flag("public-ip", "public_ip", "10.4.7.21", "10.4.7.21", None),
    Flag("public-ipv6", "public_ipv6", "2001:db8::1", "2001:db8::1", None),
    Flag("subnet-lease-renew-margin", "subnet_lease_renew_margin", "30", 30, 60),
    Flag("kube-api-url", "kube_api_url", "https://192.0.2.1:6443", "https://192.0.2.1:6443"),
    Flag("kube-annotation-prefix", "kube_annotation_prefix", "example.org/x", "example.org/x",
         "flannel.alpha.coreos.com"),
    Flag("kubeconfig-file", "kubeconfig_file", "/root/.kube/config", "/root/.kube/config"),
    Flag("healthz-ip", "healthz_ip", "127.0.0.1", "127.0.0.1", "0.0.0.0"),
    Flag("healthz-port", "healthz_port", "2401", 2401, 0),
    Flag("iptables-resync", "iptables_resync", "10", 10, None),
    Flag("net-config-path", "net_conf", "/etc/net-conf.json", "/etc/net-conf.json",
         "/etc/kube-flannel/net-conf.json"),
)  # fmt: skip
SWITCHES = (
    Flag("ip-masq", "ip_masq", "", True, False),
    Flag("ip-masq-fully-random-disable", "ip_masq_fully_random_disable", "", True, False),
    Flag("kube-subnet-mgr", "kube_subnet_mgr", "", True, False),
    Flag("iptables-forward-rules", "iptables_forward_rules", "", True, True),
    Flag("ip-blackhole-route", "ip_blackhole_route", "", True, False),
    Flag("set-node-network-unavailable", "set_node_network_unavailable", "", True, True),
)
#: klog's, of which a level alone means something here.
LOGGING = (("v", "2"), ("vmodule", "vxlan=5"), ("log_backtrace_at", "main.go:100"))
TRUE, FALSE = ("1", "t", "T", "true", "TRUE", "True"), ("0", "f", "F", "false", "FALSE", "False")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FLANNELD_"):
            monkeypatch.delenv(name)


def parsed(*arguments: str) -> dict[str, Any]:
    """The values that ``flannel-dpd ARGUMENTS`` would start with."""
    given = normalise(["--watch", *arguments], (command, *command.commands.values()))
    with (
        command.make_context("flannel-dp", ["sync"], obj=True) as parent,
        SYNC.make_context("sync", given, parent=parent) as context,
    ):
        assert context.params["watch"]
        return context.params


def spellings(name: str, value: str) -> Iterator[tuple[str, ...]]:
    """Go's flag package takes one dash or two, and the value behind ``=`` or a space."""
    for dashes in ("-", "--"):
        yield (f"{dashes}{name}={value}",)
        yield f"{dashes}{name}", value


def named(flag: Flag) -> str:
    return flag.name


@pytest.mark.parametrize("flag", VALUES, ids=named)
def test_a_value_arrives_however_it_is_spelt(flag: Flag) -> None:
    for words in spellings(flag.name, flag.given):
        assert parsed(*words)[flag.parameter] == flag.arrives, words


@pytest.mark.parametrize("flag", VALUES, ids=named)
def test_a_variable_counts_unless_the_flag_is_given(
    flag: Flag, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(flag.variable, flag.given)
    assert parsed()[flag.parameter] == flag.arrives

    other = "7" if flag.given.isdigit() else "other"
    arrived = parsed(f"-{flag.name}={other}")[flag.parameter]
    assert arrived in (other, 7, (other,))


@pytest.mark.parametrize("flag", VALUES + SWITCHES, ids=named)
def test_defaults_are_flannelds_and_an_empty_variable_changes_none(
    flag: Flag, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parsed()[flag.parameter] == flag.default

    monkeypatch.setenv(flag.variable, "")
    assert parsed()[flag.parameter] == flag.default


def test_defaults_that_are_filled_in_later_are_flannelds() -> None:
    assert flags.ETCD_ENDPOINTS == "http://127.0.0.1:4001,http://127.0.0.1:2379"
    assert ",".join(DEFAULT_ENDPOINTS) == flags.ETCD_ENDPOINTS
    assert DEFAULT_PREFIX == flags.ETCD_PREFIX
    assert flags.SUBNET_FILE == "/run/flannel/subnet.env"


@pytest.mark.parametrize("flag", SWITCHES, ids=named)
def test_a_switch_is_turned_on_and_off(flag: Flag, monkeypatch: pytest.MonkeyPatch) -> None:
    for dashes in ("-", "--"):
        name = f"{dashes}{flag.name}"
        assert parsed(name)[flag.parameter] is True
        for value in TRUE:
            assert parsed(f"{name}={value}")[flag.parameter] is True, value
        for value in FALSE:
            assert parsed(f"{name}={value}")[flag.parameter] is False, value
    for values, arrives in ((TRUE, True), (FALSE, False)):
        for value in values:
            monkeypatch.setenv(flag.variable, value)
            assert parsed()[flag.parameter] is arrives, value
    monkeypatch.setenv(flag.variable, "true")
    assert parsed(f"-{flag.name}=false")[flag.parameter] is False


@pytest.mark.parametrize("name", ["iface", "iface-regex"])
def test_what_may_be_repeated(name: str) -> None:
    words = [f"-{name}=eth1", f"--{name}", "10.4.7.21", f"--{name}=eth0"]

    assert parsed(*words)[name.replace("-", "_")] == ("eth1", "10.4.7.21", "eth0")


@pytest.mark.parametrize(("name", "value"), LOGGING, ids=[name for name, _ in LOGGING])
def test_flags_of_flannelds_log_are_taken(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in spellings(name, value):
        assert parsed(*words, "--ip-masq")["ip_masq"] is True, words
    monkeypatch.setenv(f"FLANNELD_{name.upper()}", value)
    assert parsed()["verbose"] == 0


def test_a_high_level_of_flannelds_log_logs_all() -> None:
    for words in spellings("v", "10"):
        assert parsed(*words)["verbose"] >= 1, words
    for words in spellings("v", "0"):
        assert parsed(*words)["verbose"] == 0, words
    assert parsed("-v")["verbose"] == 1
    assert parsed("-vv")["verbose"] == 2


@pytest.mark.parametrize("spelling", ["-version", "--version", "-version=true"])
def test_the_version(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", "--watch", spelling]) == 0

    assert capsys.readouterr().out.startswith("flannel-dp ")


@pytest.mark.parametrize("spelling", ["-h", "-help", "--help"])
def test_the_help(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", "--watch", spelling]) == 0

    said = capsys.readouterr().out
    for flag in VALUES + SWITCHES:
        assert f"--{flag.name}" in said or flag.name == "iptables-resync"


def test_all_flags_at_once() -> None:
    words = [f"-{flag.name}={flag.given}" for flag in VALUES]
    words += [f"-{flag.name}=true" for flag in SWITCHES]
    words += [f"--{name}={value}" for name, value in LOGGING]

    found = parsed(*words)

    assert {flag.name: found[flag.parameter] for flag in VALUES + SWITCHES} == {
        flag.name: flag.arrives for flag in VALUES + SWITCHES
    }


@pytest.mark.parametrize(
    "words",
    [
        ["-etcd-endpoint=http://192.0.2.1:2379"],
        ["-healthz-port=many"],
        ["-healthz-port=70000"],
        ["-subnet-lease-renew-margin=0"],
        ["-subnet-lease-renew-margin=1440"],
        ["-ip-masq=perhaps"],
        ["-v=high"],
    ],
    ids=" ".join,
)
def test_what_flanneld_would_refuse_is_refused(words: list[str]) -> None:
    with pytest.raises(click.UsageError):
        parsed(*words)


@pytest.mark.parametrize(
    "backend", ["wireguard", "udp", "ipip", "ipsec", "alloc", "extension", "tencent-vpc"]
)
def test_a_backend_that_is_not_here_says_so(backend: str) -> None:
    document = f'{{"Network": "10.5.0.0/16", "Backend": {{"Type": "{backend}"}}}}'

    with pytest.raises(ConfigError, match=backend) as caught:
        NetworkConfig.from_json(document)

    assert "vxlan" in str(caught.value)
    assert "host-gw" in str(caught.value)


# ---- flannel-dpd: nothing but the program's name is changed


@pytest.mark.parametrize(
    ("given", "made", "ignored"),
    [
        ("", "", ""),
        ("-iface=eth0 --ip-masq -v 4", "--iface=eth0 --ip-masq -v", ""),
        ("-ip-masq=false -iface eth0", "--no-ip-masq --iface eth0", ""),
        ("--public-ip 203.0.113.7", "--public-ip 203.0.113.7 --behind-nat", ""),
        ("-public-ipv6=2001:db8::7", "--public-ipv6=2001:db8::7 --behind-nat", ""),
        ("-iface eth0 start -ip-masq", "--iface eth0", "start --ip-masq"),
        ("-iface eth0 -- -ip-masq", "--iface eth0", "-- -ip-masq"),
        ("start", "", "start"),
        ("-no-such-flag 7", "-no-such-flag", "7"),
    ],
)
def test_a_start_line_of_flanneld(given: str, made: str, ignored: str) -> None:
    """A public address is published whether it is on the node or not, and what stands behind the
    first word that is no flag is ignored."""
    arguments, rest = as_sync(given.split(), {})

    assert arguments == ["sync", "--watch", *made.split()]
    assert rest == ignored.split()


def test_a_public_address_of_the_environment() -> None:
    for name in ("FLANNELD_PUBLIC_IP", "FLANNELD_PUBLIC_IPV6"):
        assert as_sync([], {name: "x"})[0] == ["sync", "--watch", "--behind-nat"]


def test_all_flags_of_flanneld_arrive_by_the_other_name() -> None:
    words = [f"-{flag.name}={flag.given}" for flag in VALUES]
    words += [f"-{flag.name}=true" for flag in SWITCHES]
    words += [f"--{name}={value}" for name, value in LOGGING]

    arguments, ignored = as_sync(words, {})

    assert ignored == []
    found = parsed(*arguments[2:])
    assert {flag.name: found[flag.parameter] for flag in VALUES + SWITCHES} == {
        flag.name: flag.arrives for flag in VALUES + SWITCHES
    }


def test_the_program_of_that_name() -> None:
    """It ends as the agent does where a flag is unknown, and has its version and its help."""
    script = "from flannel_dp.__main__ import run_daemon; run_daemon()"

    def run(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    assert run("-version") == (0, f"flannel-dp {__version__}\n", "")
    code, said, _ = run("-h")
    assert (code, "--etcd-endpoints" in said) == (0, True)
    code, _, said = run("-no-such-flag", "7")
    assert code == 2
    assert "No such option" in said
    assert "flannel-dpd: ignored, as by flanneld: 7" in said


def test_an_empty_endpoint_is_passed_over() -> None:
    options = etcd_options(SourceFlags(etcd_endpoints="http://192.0.2.1:2379,,https://b:1,"))

    assert [str(one) for one in options.members] == ["http://192.0.2.1:2379", "https://b:1"]
    with pytest.raises(ConfigError, match="endpoints is empty"):
        etcd_options(SourceFlags(etcd_endpoints=","))


@pytest.mark.parametrize("prefix", ["my/network", "/my/network", "/my//network/"])
def test_the_prefix_is_joined_as_go_joins_paths(prefix: str) -> None:
    """A leading slash is neither added nor removed."""
    options = etcd_options(SourceFlags(etcd_prefix=prefix))

    assert options.key("config").decode() == f"{'/' * prefix.startswith('/')}my/network/config"
