"""subnet.env: flannel's bytes, read back by flannel's rules and by those of its CNI plugin."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.cluster.subnet_env import (
    SubnetEnv,
    previous_subnets,
    read_subnet_env,
    subnet_env_text,
    write_subnet_env,
)
from flannel_dp.errors import ConfigError, KernelError

V4 = NetworkConfig.from_json('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}')
V6 = NetworkConfig.from_json(
    '{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48",'
    ' "Backend": {"Type": "vxlan"}}'
)
DUAL = NetworkConfig.from_json(
    '{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48",'
    ' "Backend": {"Type": "vxlan"}}'
)
TUTORIAL = NetworkConfig.from_json('{"Network": "172.7.0.0/16", "Backend": {"Type": "host-gw"}}')

SUBNETS = {4: "10.244.3.0/24", 6: "fd00:10:244:3::/64"}

GOLDEN_V4 = """\
FLANNEL_NETWORK=10.244.0.0/16
FLANNEL_SUBNET=10.244.3.1/24
FLANNEL_MTU=1450
FLANNEL_IPMASQ=true
"""
GOLDEN_V6 = """\
FLANNEL_IPV6_NETWORK=fd00:10:244::/48
FLANNEL_IPV6_SUBNET=fd00:10:244:3::1/64
FLANNEL_MTU=1430
FLANNEL_IPMASQ=false
"""
GOLDEN_DUAL = """\
FLANNEL_NETWORK=10.244.0.0/16
FLANNEL_SUBNET=10.244.3.1/24
FLANNEL_IPV6_NETWORK=fd00:10:244::/48
FLANNEL_IPV6_SUBNET=fd00:10:244:3::1/64
FLANNEL_MTU=1430
FLANNEL_IPMASQ=true
"""
BY_HAND = """\
FLANNEL_NETWORK=172.7.0.0/16
FLANNEL_SUBNET=172.7.21.1/24
FLANNEL_MTU=1500
FLANNEL_IPMASQ=false
"""


def load_for_cni(path: Path) -> dict[str, Any]:
    """Another reader, by the rules of the CNI plugin: what it needs, and what it makes of it."""
    found: dict[str, Any] = {"nws": [], "ip6Nws": [], "sn": None, "ip6Sn": None}
    for line in path.read_text().split("\n"):
        key, equals, value = line.partition("=")
        if not equals:
            continue
        if key in ("FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"):
            name = "nws" if key == "FLANNEL_NETWORK" else "ip6Nws"
            for item in value.split(","):
                network = ipaddress.ip_network(item, strict=False)
                if network not in found[name]:
                    found[name].append(network)
        elif key == "FLANNEL_SUBNET":
            found["sn"] = ipaddress.IPv4Interface(value)
        elif key == "FLANNEL_IPV6_SUBNET":
            found["ip6Sn"] = ipaddress.IPv6Interface(value)
        elif key == "FLANNEL_MTU":
            found["mtu"] = int(value)
        elif key == "FLANNEL_IPMASQ":
            found["ipmasq"] = value == "true"
    missing = [
        name
        for name, there in (
            ("FLANNEL_NETWORK", found["nws"] or found["ip6Nws"]),
            ("FLANNEL_SUBNET", found["sn"] or found["ip6Sn"]),
            ("FLANNEL_MTU", "mtu" in found),
            ("FLANNEL_IPMASQ", "ipmasq" in found),
        )
        if not there
    ]
    if missing:
        raise ValueError(f"{path} is missing {', '.join(missing)}")
    return found


@pytest.mark.parametrize(
    ("config", "families", "mtu", "ipmasq", "golden"),
    [
        (V4, [4], 1450, True, GOLDEN_V4),
        (V6, [6], 1430, False, GOLDEN_V6),
        (DUAL, [6, 4], 1430, True, GOLDEN_DUAL),
    ],
    ids=["ipv4", "ipv6", "dual"],
)
def test_bytes_are_flannels(
    tmp_path: Path,
    config: NetworkConfig,
    families: list[int],
    mtu: int,
    ipmasq: bool,
    golden: str,
) -> None:
    path = tmp_path / "flannel" / "subnet.env"
    subnets = {family: SUBNETS[family] for family in families}

    assert write_subnet_env(path, config=config, subnets=subnets, mtu=mtu, ipmasq=ipmasq)

    assert path.read_text() == golden
    assert path.stat().st_mode & 0o777 == 0o644
    assert read_subnet_env(path).subnets == subnets
    seen = load_for_cni(path)
    assert (seen["mtu"], seen["ipmasq"]) == (mtu, ipmasq)
    assert [str(network) for network in seen["nws"]] == (["10.244.0.0/16"] if 4 in families else [])
    assert str(seen["sn"]) == ("10.244.3.1/24" if 4 in families else "None")
    assert str(seen["ip6Sn"]) == ("fd00:10:244:3::1/64" if 6 in families else "None")
    assert [entry.name for entry in path.parent.iterdir()] == ["subnet.env"]


def test_directory_is_open_to_readers(tmp_path: Path) -> None:
    path = tmp_path / "run" / "flannel" / "subnet.env"

    write_subnet_env(path, config=V4, subnets={4: SUBNETS[4]}, mtu=1450, ipmasq=False)

    assert path.parent.stat().st_mode & 0o777 == 0o755


def test_same_content_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    write_subnet_env(path, config=V4, subnets={4: SUBNETS[4]}, mtu=1450, ipmasq=True)
    before = path.stat()

    assert not write_subnet_env(path, config=V4, subnets={4: SUBNETS[4]}, mtu=1450, ipmasq=True)
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)

    assert write_subnet_env(path, config=V4, subnets={4: SUBNETS[4]}, mtu=1400, ipmasq=True)
    assert path.stat().st_ino != before.st_ino


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(BY_HAND)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)

    with pytest.raises(KernelError, match=r"write .*/subnet\.env: No space left") as caught:
        write_subnet_env(path, config=V4, subnets={4: SUBNETS[4]}, mtu=1450, ipmasq=True)
    assert caught.value.errno == errno.ENOSPC
    assert "subnet_file=" in caught.value.hint
    assert path.read_text() == BY_HAND
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_directory_is_named() -> None:
    with pytest.raises(KernelError, match=r"write /proc/flannel/subnet\.env"):
        write_subnet_env(
            "/proc/flannel/subnet.env", config=V4, subnets={4: SUBNETS[4]}, mtu=1450, ipmasq=True
        )


@pytest.mark.parametrize(
    ("subnets", "says"),
    [
        ({}, "no subnet"),
        ({4: "10.244.3.0/33"}, "10.244.3.0/33"),
        ({4: "10.244.3.0/32"}, "room for pods"),
        ({4: SUBNETS[6]}, "no IPv4 subnet"),
        ({6: SUBNETS[6]}, "EnableIPv6"),
    ],
)
def test_bad_subnets_are_refused(tmp_path: Path, subnets: dict[int, str], says: str) -> None:
    path = tmp_path / "subnet.env"

    with pytest.raises(ConfigError, match=says):
        write_subnet_env(path, config=V4, subnets=subnets, mtu=1450, ipmasq=True)
    assert not path.exists()


def test_missing_file_is_empty(tmp_path: Path) -> None:
    assert read_subnet_env(tmp_path / "subnet.env") == SubnetEnv()
    assert previous_subnets(tmp_path / "none" / "subnet.env", V4) == {}


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=f"read {tmp_path}") as caught:
        read_subnet_env(tmp_path)
    assert caught.value.errno == errno.EISDIR


def test_file_written_by_hand_decides_the_subnet(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(BY_HAND)

    assert read_subnet_env(path) == SubnetEnv(
        {4: "172.7.0.0/16"}, {4: "172.7.21.0/24"}, mtu=1500, ipmasq=False
    )
    assert previous_subnets(path, TUTORIAL) == {4: "172.7.21.0/24"}
    assert previous_subnets(path, V4) == {}
    assert previous_subnets(path, V6) == {}


def test_whole_network_is_nobodys_subnet(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text("FLANNEL_SUBNET=10.244.0.1/16\n")

    assert previous_subnets(path, V4) == {}


@pytest.mark.parametrize(
    ("text", "subnets"),
    [
        ("FLANNEL_SUBNET=10.244.3.1/24,10.244.4.1/24\n", {}),
        ("FLANNEL_SUBNET=10.244.3.1/24,nonsense\n", {4: "10.244.3.0/24"}),
        ("FLANNEL_SUBNET=\n", {}),
        ("FLANNEL_SUBNET=10.244.3.1\n", {}),
        ("FLANNEL_SUBNET=10.244.3.1/255.255.255.0\n", {}),
        ("FLANNEL_SUBNET=300.244.3.1/24\n", {}),
        ("FLANNEL_SUBNET=fd00:10:244:3::1/64\n", {}),
        ("FLANNEL_IPV6_SUBNET=fd00:10:244:3::1/64\n", {6: "fd00:10:244:3::/64"}),
        ("FLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_SUBNET=10.244.5.1/24\n", {4: "10.244.5.0/24"}),
        ('export FLANNEL_SUBNET="10.244.3.1/24" # mine\n', {4: "10.244.3.0/24"}),
        ("FLANNEL_SUBNET = '10.244.3.1/24'\r\n", {4: "10.244.3.0/24"}),
        ("FLANNEL_SUBNET=10.244.3.1/24 # mine\n", {4: "10.244.3.0/24"}),
        ("#FLANNEL_SUBNET=10.244.3.1/24\n", {}),
        ("\x00\xff=\n", {}),
    ],
)
def test_reading_follows_flannel(tmp_path: Path, text: str, subnets: dict[int, str]) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(text)

    assert read_subnet_env(path).subnets == subnets
    assert previous_subnets(path, DUAL) == subnets


@pytest.mark.parametrize("mtu", ["", "-1", "x", "1e3", "999999", "²"])
def test_nonsense_mtu_is_none(tmp_path: Path, mtu: str) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(f"FLANNEL_MTU={mtu}\n")

    assert read_subnet_env(path).mtu is None


@given(st.binary(max_size=200))
def test_any_bytes_can_be_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.env"
    path.write_bytes(b"FLANNEL_SUBNET=" + data)

    found = read_subnet_env(path).subnets

    assert all(str(ipaddress.ip_network(subnet)) == subnet for subnet in found.values())


@given(st.integers(1, 255), st.integers(1, 255), st.integers(68, 65535), st.booleans())
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, v4: int, v6: int, mtu: int, ipmasq: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.env"
    subnets = {4: f"10.244.{v4}.0/24", 6: f"fd00:10:244:{v6:x}::/64"}
    text = subnet_env_text(DUAL, subnets=subnets, mtu=mtu, ipmasq=ipmasq)

    path.write_text(text)

    networks = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}
    assert read_subnet_env(path) == SubnetEnv(networks, subnets, mtu, ipmasq)
    assert load_for_cni(path)["mtu"] == mtu


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_what_is_no_regular_file_is_rejected_at_once(tmp_path: Path, kind: str) -> None:
    """Neither waited for nor replaced."""
    path = tmp_path / "subnet.env"
    bound = None
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(str(path))
    before = os.stat(path)

    error: type[Exception] = KernelError if kind == "socket" else ConfigError
    with pytest.raises(error, match=str(path)) as caught:
        read_subnet_env(path)
    assert "subnet_file=" in getattr(caught.value, "hint", "")
    assert os.stat(path) == before
    if bound is not None:
        bound.close()
