"""``flannel-dp explain --self``: who this node is, and from which evidence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.command.cli import main
from flannel_dp.look.myself import Myself, explain_self
from tests.lib.kernel import everything, stranger
from tests.lib.leases import DEVICE, lease_of, mac, network_config, peer, peers, plane, subnet

PEERS = peers(range(1, 4))
GATEWAY = {4: "192.0.2.254", 6: "2001:db8::fe"}
SECOND = {4: "198.51.100.7", 6: "2001:db8:77::7"}
LENGTH = {4: 24, 6: 64}


def named(host: Any, number: int, name: str, **changes: Any) -> Any:
    """A lease with this node's address."""
    fields = {"public_ip": host.ipv4, "public_ipv6": host.ipv6, "name": name}
    return peer(number, **(fields | changes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "subnet.env"


def remember(path: Path, number: int) -> None:
    keys = {4: "FLANNEL_SUBNET", 6: "FLANNEL_IPV6_SUBNET"}
    path.write_text("".join(f"{key}={subnet(n, number)}\n" for n, key in keys.items()))


def found(one: Myself) -> dict[str, tuple[bool | None, str]]:
    return {item.source: (item.agrees, item.says) for item in one.evidence}


def asked(host: Any, family: int, leases: Any = None, **options: Any) -> Myself:
    with plane(host, family, **options) as dp:
        (one,) = explain_self(dp, leases).families
    return one


def test_each_piece_of_evidence_is_listed(host: Any, family: int, path: Path) -> None:
    host.ip(f"-{family} route add default via {GATEWAY[family]} dev eth0")
    evil = named(host, 99, "a-evil")
    leases = [evil, named(host, 0, "n0"), *PEERS]
    options = {"subnet_file": str(path), "node_name": "n0", "iface": "eth0"}
    with plane(host, family, **options) as dp:
        assert dp.sync(leases).ok
    before = everything(host)

    one = asked(host, family, leases, **options)

    assert everything(host) == before
    here = host.underlay(family)
    assert (one.ok, one.subnet, one.public_ip, one.lease) == (True, subnet(family, 0), here, "n0")
    assert (one.interface, one.local, one.said_by) == ("eth0", here, "node n0")
    evidence = found(one)
    assert evidence["flag --iface"] == (True, "eth0")
    assert evidence["the node's name"] == (True, "n0")
    assert evidence[str(path)] == (True, subnet(family, 0))
    agrees, says = evidence[f"device {DEVICE[family]}"]
    assert agrees
    for part in (subnet(family, 0).partition("/")[0], mac(family, 0), "dev eth0", f"local {here}"):
        assert part in says
    assert evidence["default route"][0] is True
    assert f"via {GATEWAY[family]} dev eth0" in evidence["default route"][1]
    assert evidence["lease n0"][0] is True
    assert evidence["lease a-evil"][0] is False
    assert any("a-evil" in text for text in one.warnings)


def test_a_contradiction_is_the_error_of_a_sync(host: Any, family: int, path: Path) -> None:
    remember(path, 9)
    one = asked(host, family, [named(host, 0, "n0"), *PEERS], subnet_file=str(path))

    assert not one.ok
    assert one.subnet == ""
    for part in (str(path), subnet(family, 9), "n0", "subnet="):
        assert part in one.error
    assert found(one)[str(path)] == (None, subnet(family, 9))
    assert found(one)["lease n0"][0] is None


@pytest.mark.parametrize(
    ("by", "said_by"),
    [("--subnet", "--subnet or joining the cluster"), ("file", "subnet.env"), ("device", "device")],
)
def test_without_leases(host: Any, family: int, path: Path, by: str, said_by: str) -> None:
    options: dict[str, Any] = {}
    if by == "--subnet":
        options["subnet"] = subnet(family, 0)
    elif by == "file":
        remember(path, 0)
        options["subnet_file"] = str(path)
    else:
        with plane(host, family) as dp:
            assert dp.sync([lease_of(host), *PEERS]).ok

    one = asked(host, family, **options)

    assert (one.ok, one.subnet, one.lease) == (True, subnet(family, 0), "")
    assert said_by in one.said_by


def test_a_node_of_which_nothing_is_known(host: Any, family: int) -> None:
    one = asked(host, family)
    assert (one.ok, one.subnet) == (False, "")
    assert "--subnet" in one.error

    one = asked(host, family, PEERS)
    assert f"no lease was published with {host.underlay(family)}" in one.error


def test_no_interface(host: Any, family: int, path: Path) -> None:
    remember(path, 0)
    one = asked(host, family, [lease_of(host)], iface="eth9", subnet_file=str(path))

    assert "there is no interface 'eth9'" in one.error
    assert found(one)["flag --iface"] == (None, "eth9")
    assert found(one)[str(path)] == (None, subnet(family, 0))


def test_a_vpn_s_default_route_differs(host: Any, family: int) -> None:
    """fr24: it says where the tunnel is, and that the default route does not count."""
    host.ip(f"-{family} route add default via {GATEWAY[family]} dev eth0 metric 5000")
    with plane(host, family, iface=None) as dp:
        assert dp.sync([lease_of(host), *PEERS]).ok
    stranger(host, "eth1")
    nodad = "nodad" if family == 6 else ""
    host.ip(f"-{family} address add {SECOND[family]}/{LENGTH[family]} dev eth1 {nodad}")
    host.ip(f"-{family} route add default dev eth1 metric 1")

    one = asked(host, family, [lease_of(host), *PEERS], iface=None)

    assert (one.ok, one.interface, one.local) == (True, "eth0", host.underlay(family))
    agrees, says = found(one)["default route"]
    assert (agrees, "dev eth1" in says) == (False, True)
    assert found(one)[f"device {DEVICE[family]}"][0] is True


# ---- the command ------------------------------------------------------------------------


@pytest.fixture
def command(host: Any, tmp_path: Path) -> Callable[..., list[str]]:
    config, leases = tmp_path / "net-conf.json", tmp_path / "leases.json"
    config.write_text(network_config(4, 6).to_json())
    every = [lease_of(host), *PEERS]
    leases.write_text('{"leases": [' + ",".join(one.to_json() for one in every) + "]}")
    words = ["--netns", host.ns, "--net-conf", str(config), "--iface", "eth0"]
    return lambda *more: ["explain", *more, *words, "--leases", str(leases)]


def test_the_command_s_text_and_json(
    host: Any, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--self")) == 0
    text = capsys.readouterr().out
    for family in (4, 6):
        assert f"IPv{family}: this node is {subnet(family, 0)} at {host.underlay(family)}" in text
    assert "external interface: eth0, packets are sent from 192.0.2.1, MTU 1500" in text
    assert "agrees  flag --iface" in text

    assert main(command("--self", "--output", "json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["ok"]) == (1, True)
    four, six = document["families"]
    assert (four["family"], six["family"]) == (4, 6)
    assert {*four} == {
        *("family", "subnet", "public_ip", "lease", "interface", "local", "said_by", "error"),
        *("evidence", "warnings", "has_leases", "mtu", "ok"),
    }
    assert four["subnet"] == subnet(4, 0)
    assert {*four["evidence"][0]} == {"source", "says", "agrees"}


@pytest.mark.parametrize("words", [("--self", "10.240.1.5"), ()])
def test_the_command_takes_an_address_or_self(
    command: Callable[..., list[str]], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(*words)) == 2
    assert "--self" in capsys.readouterr().err
