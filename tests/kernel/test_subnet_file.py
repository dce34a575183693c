"""subnet.env through a sync: what it says, when it is written, whose word counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import DataPlane, KernelError, NetworkConfig, SourceError
from flannel_dp.resources.firewall.options import RulesOptions
from tests.lib.kernel import everything, expected, observed
from tests.lib.leases import DEVICE, lease_of, network_config, peer, peers, plane, subnet

PEERS = range(1, 4)
KEYS = {4: "FLANNEL_SUBNET", 6: "FLANNEL_IPV6_SUBNET"}

LINES = {
    4: "FLANNEL_NETWORK=10.240.0.0/12\nFLANNEL_SUBNET=10.240.0.1/24\n",
    6: "FLANNEL_IPV6_NETWORK=fd00:10::/32\nFLANNEL_IPV6_SUBNET=fd00:10::1/64\n",
}


NINE = "FLANNEL_SUBNET=10.240.9.1/24\nFLANNEL_IPV6_SUBNET=fd00:10:9::1/64\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "subnet.env"


def cluster(host: Any) -> list[Any]:
    return [lease_of(host), *peers(PEERS)]


def subnet_in(path: Path, family: int) -> str:
    """What the file says is this node's subnet."""
    values = dict(line.split("=", 1) for line in path.read_text().splitlines())
    return values[KEYS[family]]


def own_subnet(host: Any, family: int) -> str:
    """The first address of the own subnet, as the vxlan device has it."""
    shown = host.ip_json(f"address show dev {DEVICE[family]}")[0]["addr_info"]
    return next(str(one["local"]) for one in shown if one["scope"] == "global")


@pytest.mark.parametrize(
    ("families", "masq", "text"),
    [
        ((4,), False, f"{LINES[4]}FLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"),
        ((6,), True, f"{LINES[6]}FLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"),
        ((4, 6), True, f"{LINES[4]}{LINES[6]}FLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"),
    ],
)
def test_the_file_is_flannel_s(
    host: Any, path: Path, families: tuple[int, ...], masq: bool, text: str
) -> None:
    rules = RulesOptions(ip_masq=masq)
    with plane(host, *families, subnet_file=str(path), rules=rules) as dp:
        report = dp.sync(cluster(host))

    assert report.ok
    assert report.subnet_file == report.to_json()["subnet_file"] == str(path)
    assert path.read_text() == text
    assert path.stat().st_mode & 0o777 == 0o644


def test_host_gw_keeps_the_mtu_of_the_interface(host: Any, path: Path, family: int) -> None:
    own = lease_of(host)
    fields = {name: getattr(own, name) for name in own.__struct_fields__}
    leases = [type(own)(**fields | {"backend_type": "host-gw"})]
    config = network_config(family, Type="host-gw")
    with DataPlane(config, iface="eth0", netns=host.ns, subnet_file=str(path)) as dp:
        assert dp.sync(leases).ok

    assert path.read_text() == f"{LINES[family]}FLANNEL_MTU=1500\nFLANNEL_IPMASQ=false\n"


def test_a_plan_writes_no_file(host: Any, path: Path, family: int) -> None:
    with plane(host, family, subnet_file=str(path)) as dp:
        dp.plan(cluster(host))

    assert not path.parent.exists()


def test_a_file_that_is_right_is_left_alone(host: Any, path: Path, family: int) -> None:
    with plane(host, family, subnet_file=str(path)) as dp:
        dp.sync(cluster(host))
        before = path.stat()
        report = dp.sync(cluster(host))

    after = path.stat()
    assert report.subnet_file == ""
    assert report.to_json()["subnet_file"] is None
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_file_that_somebody_changed_is_put_right(host: Any, path: Path, family: int) -> None:
    with plane(host, family, subnet_file=str(path)) as dp:
        dp.sync(cluster(host))
        good = path.read_text()
        path.write_text(good.replace("MTU=14", "MTU=9"))
        report = dp.sync(cluster(host))

    assert report.subnet_file == str(path)
    assert path.read_text() == good


def test_a_family_that_cannot_be_looked_at_keeps_its_lines(host: Any, path: Path) -> None:
    with plane(host, subnet_file=str(path)) as dp:
        assert dp.sync(cluster(host)).ok
        before = path.read_text()
        host.ip(f"-6 address flush dev {host.iface}")

        report = dp.sync(cluster(host))

    assert set(report.family_errors) == {6}
    assert report.problems == {}
    assert KEYS[6] in before
    assert path.read_text() == before


# ---- a place that cannot be written --------------------------------------------------


def test_a_directory_in_the_way_does_not_stop_the_tables(
    host: Any, path: Path, family: int
) -> None:
    path.mkdir(parents=True)
    with plane(host, family, subnet_file=str(path)) as dp:
        report = dp.sync(cluster(host))

    assert not report.ok
    error = report.problems["subnet file"]
    assert isinstance(error, KernelError)
    assert str(path) in str(error)
    assert report.subnet_file == ""
    assert observed(host, family) == expected(peers(PEERS), family)
    assert os.listdir(path.parent) == [path.name]  # no temporary file is left


@pytest.mark.parametrize(
    ("spoil", "code"),
    [("mount -o remount,ro disk", "EROFS"), ("dd if=/dev/zero of=disk/full bs=4k", "ENOSPC")],
    ids=["read-only", "full"],
)
def test_the_old_file_survives_a_disk_that_takes_no_more(
    host: Any, tmp_path: Path, family: int, spoil: str, code: str
) -> None:
    """In a mount namespace of its own, so that nothing is left mounted."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "net-conf.json").write_text(network_config(family).to_json())
    members = [json.loads(lease.to_json()) for lease in cluster(host)]
    (tmp_path / "leases.json").write_text(json.dumps({"leases": members}))
    script = f"""
        mount -t tmpfs -o size=8k none disk || exit 99
        echo old > disk/subnet.env
        {spoil} 2>/dev/null
        "$@" > report.json 2>/dev/null
        echo $?
        cat disk/subnet.env
        ls -A disk | grep -v full
    """
    command = [sys.executable, "-m", "flannel_dp", "sync", "--netns", host.ns, "--iface", "eth0"]
    command += ["--net-conf", "net-conf.json", "--leases", "leases.json", "--output", "json"]
    command += ["--subnet-file", "disk/subnet.env", "--firewall", "none"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout.splitlines() == ["3", "old", "subnet.env"], done
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is False
    assert report["subnet_file"] is None
    (failure,) = report["failures"]
    assert failure["table"] == "subnet file"
    assert code in failure["detail"]
    assert "disk/subnet.env" in failure["detail"]
    assert observed(host, family) == expected(peers(PEERS), family)


# ---- the file decides the subnet, unless somebody knows better -------------------------


def test_the_file_keeps_the_subnet_without_an_own_lease(host: Any, path: Path, family: int) -> None:
    with plane(host, family, subnet_file=str(path)) as dp:
        dp.sync([peer(7, public_ip=host.ipv4, public_ipv6=host.ipv6), *peers(PEERS)])
    written = path.read_text()
    host.ip(f"link delete {DEVICE[family]}")

    with plane(host, family, subnet_file=str(path)) as fresh:
        assert fresh.sync(peers(PEERS)).ok

    assert path.read_text() == written
    assert own_subnet(host, family) == {4: "10.240.7.0", 6: "fd00:10:7::"}[family]


def test_no_file_and_no_lease_is_no_subnet(host: Any, path: Path, family: int) -> None:
    with plane(host, family, subnet_file=str(path)) as dp, pytest.raises(SourceError):
        dp.sync(peers(PEERS))

    assert not path.exists()


BY_HAND = """\
FLANNEL_NETWORK=172.7.0.0/16
FLANNEL_SUBNET=172.7.21.1/24
FLANNEL_MTU=1500
FLANNEL_IPMASQ=false
"""


def test_a_file_written_by_hand_decides(host: Any, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(BY_HAND)
    config = NetworkConfig.from_json('{"Network": "172.7.0.0/16", "Backend": {"Type": "vxlan"}}')
    with DataPlane(config, iface="eth0", netns=host.ns, subnet_file=str(path)) as dp:
        assert dp.sync([peer(1, subnet="172.7.22.0/24", ipv6_subnet="")]).ok

    assert own_subnet(host, 4) == "172.7.21.0"
    assert path.read_text() == BY_HAND.replace("1500", "1450")
    assert "172.7.22.0/24" in host.ip("route show")


def test_a_file_of_another_network_is_ignored(
    host: Any, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_text(BY_HAND)
    with plane(host, 4, subnet_file=str(path)) as dp, pytest.raises(SourceError):
        dp.sync(peers(PEERS))

    assert path.read_text() == BY_HAND
    assert "172.7.21.0/24 is ignored" in caplog.text


def test_a_file_and_a_lease_of_this_address_that_disagree(
    host: Any, path: Path, family: int
) -> None:
    """One of the two is stale, and nothing tells which one: nothing is written."""
    path.parent.mkdir()
    path.write_text(NINE)
    before = everything(host)
    with plane(host, family, subnet_file=str(path)) as dp, pytest.raises(SourceError) as caught:
        dp.sync(cluster(host))

    for part in (str(path), subnet(family, 9), subnet(family, 0), "subnet="):
        assert part in str(caught.value)
    assert everything(host) == before
    assert path.read_text() == NINE

    with plane(host, family, subnet_file=str(path), subnet=subnet(family, 0)) as dp:
        report = dp.sync(cluster(host))
    assert report.ok
    assert any(f"no longer {subnet(family, 9)}" in text for text in report.warnings)
    assert observed(host, family) == expected(peers(PEERS), family)


def test_a_lease_with_the_device_s_mac_beats_a_stale_file(
    host: Any, path: Path, family: int
) -> None:
    """The device has the lease's address and MAC; what the file said is told."""
    with plane(host, family, subnet_file=str(path)) as dp:
        assert dp.sync(cluster(host)).ok
        stale = path.read_text()
        for old, new in (("10.240.0.1/24", "10.240.9.1/24"), ("fd00:10::1/64", "fd00:10:9::1/64")):
            stale = stale.replace(old, new)
        path.write_text(stale)
        report = dp.sync(cluster(host))

    assert subnet_in(path, family) == {4: "10.240.0.1/24", 6: "fd00:10::1/64"}[family]
    assert any(f"no longer {subnet(family, 9)}" in warning for warning in report.warnings)


def test_the_flag_beats_the_file(host: Any, path: Path, family: int) -> None:
    path.parent.mkdir()
    path.write_text("FLANNEL_SUBNET=10.240.9.1/24\nFLANNEL_IPV6_SUBNET=fd00:10:9::1/64\n")
    told = "10.240.8.0/24,fd00:10:8::/64"
    with plane(host, family, subnet_file=str(path), subnet=told) as dp:
        assert dp.sync(peers(PEERS)).ok

    assert subnet_in(path, family) == {4: "10.240.8.1/24", 6: "fd00:10:8::1/64"}[family]
    assert own_subnet(host, family) == {4: "10.240.8.0", 6: "fd00:10:8::"}[family]


def test_a_file_that_cannot_be_read_is_as_good_as_none(
    host: Any, path: Path, family: int, caplog: pytest.LogCaptureFixture
) -> None:
    path.mkdir(parents=True)
    with plane(host, family, subnet_file=str(path)) as dp, pytest.raises(SourceError):
        dp.sync(peers(PEERS))

    assert f"{path} cannot be read" in caplog.text
