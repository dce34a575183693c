"""Errors name parameters to Python callers, and flags to those of the command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flannel_dp
from flannel_dp import ConfigError, DataPlane, EtcdOptions, KubeOptions
from flannel_dp.command.cli import command
from flannel_dp.options import Options
from flannel_dp.wording import PARAMETERS, naming_flags, worded

PACKAGE = Path(flannel_dp.__file__).parent


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        (
            "name the interface with --iface, --public-ip or --public-ipv6",
            "name the interface with iface=, public_ip= or public_ipv6=",
        ),
        (
            "if it is stale say --subnet 10.9.0.0/24 once",
            "if it is stale say subnet=10.9.0.0/24 once",
        ),
        ("say --subnet fd00:9::/64 once", "say subnet=fd00:9::/64 once"),
        ("say so with --iface ADDRESS", "say so with iface=ADDRESS"),
        ("pass --allow-shrink to sync", "pass allow_shrink=True to DataPlane"),
        ("use '--forwarding kernel', or", 'use config.with_forwarding("kernel"), or'),
        (
            "--etcd-password is given without --etcd-username",
            "password= is given without username=",
        ),
        ("'flannel-dp show --netns h1' shows it", "'flannel-dp show --netns h1' shows it"),
        ("make it the --cluster-cidr of kubeadm", "make it the --cluster-cidr of kubeadm"),
        ("'ip link show' - none", "'ip link show' - none"),
    ],
)
def test_flags_are_parameters_to_python(text: str, reads: str) -> None:
    error = ConfigError("no interface", hint=text)

    assert worded(text) == reads
    assert (error.hint, str(error)) == (reads, f"no interface - {reads}")
    with naming_flags():
        assert (error.hint, str(error)) == (text, f"no interface - {text}")
    assert ConfigError(text).message == worded(text, bare=True)


def test_a_message_names_the_parameter_alone() -> None:
    assert str(ConfigError("--etcd-endpoints: 'x' is none")) == "endpoints: 'x' is none"
    assert ConfigError("--etcd-password is given").message == "password is given"
    assert ConfigError("--subnet 10.9.0.0/24 is taken").message == "subnet 10.9.0.0/24 is taken"


def test_a_hint_that_is_extended_stays_readable() -> None:
    error = ConfigError("no", hint="give --iface")
    error.hint = f"{error.hint}; or --subnet"

    assert error.hint == "give iface=; or subnet="


def test_the_parameters_exist_and_so_do_the_flags() -> None:
    known = {*Options.__struct_fields__, "path"}
    for options in (EtcdOptions, KubeOptions):
        known |= {*options.__dataclass_fields__}
    named = {re.split(r"=", one)[0] for one in PARAMETERS.values() if "." not in one}
    flags = {name for each in command.commands.values() for one in each.params for name in one.opts}
    flags |= {
        name for each in command.commands.values() for o in each.params for name in o.secondary_opts
    }

    assert named <= known
    assert {flag.strip("'").split()[0] for flag in PARAMETERS} <= flags
    assert DataPlane is not None


#: Flags in errors of the library that have no parameter: of other programs, or of commands.
OTHERS = {"--cluster-cidr", "--allocate-node-cidrs", "--pod-network-cidr", "--raw", "--prefix"}
OTHERS |= {"--auto-compaction-retention", "--subnet-lease-renew-margin", "--device", "--limit"}
OTHERS |= {"--state-dir", "--healthz-ip", "--healthz-port"}

_HINT = re.compile(r'hint=\(?f?"((?:[^"\\]|"\s*f?")*)"')


def test_every_flag_in_a_hint_of_the_library_has_a_parameter() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("command", "wording.py"):
            continue
        for hint in _HINT.findall(path.read_text()):
            text = re.sub(r"'flannel-dp [^']*'", "", re.sub(r'"\s*f?"', "", hint))
            found |= set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", worded(text)))

    assert found <= OTHERS
