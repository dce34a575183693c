"""What stops one family stops neither the other one nor what the node has as a whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import NotYet
from tests.lib.kernel import everything, expected, has_device, observed
from tests.lib.leases import lease_of, network_config, peers, plane

PEERS = peers(range(1, 4))
READ_ONLY = 'mount --bind -o ro /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && "$@"'
ELSEWHERE = {4: "192.0.2.77", 6: "2001:db8::77"}
FLAG = {4: "public_ip", 6: "public_ipv6"}


def test_what_is_not_permitted_for_ipv6_leaves_ipv4_rules_and_subnet_env(
    host: Any, tmp_path: Path
) -> None:
    """A container with a read-only /proc/sys where new devices have IPv6 switched off."""
    config, leases, file = (tmp_path / name for name in ("net-conf.json", "leases", "subnet.env"))
    config.write_text(network_config(4, 6).to_json())
    every = [lease_of(host), *PEERS]
    leases.write_text('{"leases": [' + ",".join(one.to_json() for one in every) + "]}")
    host.sysctl("ipv6/conf/default/disable_ipv6", 1)
    command = [sys.executable, "-m", "flannel_dp", "sync", "--leases", str(leases)]
    command += ["--net-conf", str(config), "--iface", "eth0", "--subnet-file", str(file)]
    command += ["--ip-masq", "--firewall", "nft", "--output", "json"]
    inside = ["ip", "netns", "exec", host.ns, "unshare", "--mount", "sh", "-c", READ_ONLY, "sh"]

    done = subprocess.run([*inside, *command], capture_output=True, text=True, check=False)

    report = json.loads(done.stdout)
    assert done.returncode == 3, done.stderr
    (failure,) = report["failures"]
    assert failure["table"] == "IPv6"
    assert "disable_ipv6" in failure["detail"]
    assert "hint" in failure["detail"] or "/proc/sys may be written" in failure["detail"]
    assert report["rules"]["changes"]
    assert "FLANNEL_SUBNET=10.240.0.1/24" in file.read_text()
    assert observed(host, 4) == expected(PEERS, 4)
    assert "table ip flannel-dp" in host.exec("nft", "list", "tables")
    assert observed(host, 6) == expected((), 6)


def test_a_public_address_that_is_not_there_leaves_the_other_family(
    host: Any, family: int, tmp_path: Path
) -> None:
    other, file = 10 - family, tmp_path / "subnet.env"
    options: dict[str, Any] = {FLAG[family]: ELSEWHERE[family], "subnet_file": str(file)}
    before = everything(host)
    with plane(host, **options) as dp, pytest.raises(NotYet, match=ELSEWHERE[family]):
        dp.sync([lease_of(host), *PEERS])  # a wrong flag, where nothing waits for the address
    assert everything(host) == before

    with plane(host, **options, patient=True) as dp:
        assert {*dp.identity().public} == {other}
        report = dp.sync([lease_of(host), *PEERS])

    assert {*report.family_errors} == {family}
    assert isinstance(report.family_errors[family], NotYet)
    assert ELSEWHERE[family] in str(report.family_errors[family])
    assert observed(host, other) == expected(PEERS, other)
    assert not has_device(host, family)
    key = {4: "FLANNEL_SUBNET=", 6: "FLANNEL_IPV6_SUBNET="}
    assert key[other] in file.read_text()
    assert key[family] not in file.read_text()


@pytest.mark.parametrize("both", [True, False])
def test_a_node_without_any_address_raises(host: Any, both: bool) -> None:
    host.ip("address flush dev eth0")
    families = (4, 6) if both else (4,)
    with plane(host, *families) as dp, pytest.raises(NotYet, match="eth0 has no IPv4 address"):
        dp.sync([lease_of(host), *PEERS])
