"""Which lease is this node's: by subnet.env, --subnet, the node's name and the device that is
there, and never by a name or a revision that another node chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flannel_dp import BackendData, LeaseRejected, SourceError
from tests.lib.kernel import everything, expected, has_device, observed, stranger
from tests.lib.leases import DEVICE, mac, peer, peers, plane, subnet

PEERS = peers(range(1, 6))
OTHER = {4: "198.51.100.7", 6: "2001:db8:77::7"}
LENGTH = {4: 24, 6: 64}


def own(host: Any, number: int = 0, **changes: Any) -> Any:
    """A lease with this node's address, by name ``n<number>``."""
    fields = {"public_ip": host.ipv4, "public_ipv6": host.ipv6, "name": f"n{number}"}
    return peer(number, **(fields | changes))


def at(number: int, addresses: dict[int, str], **changes: Any) -> Any:
    fields = {"public_ip": addresses[4], "public_ipv6": addresses[6], "name": f"n{number}"}
    return peer(number, **(fields | changes))


def remember(path: Path, number: int) -> None:
    lines = (
        f"{key}={text.replace('0.0/', '0.1/')}\n"
        for key, text in (
            ("FLANNEL_SUBNET", subnet(4, number)),
            ("FLANNEL_IPV6_SUBNET", subnet(6, number)),
        )
    )
    path.write_text("".join(lines))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "subnet.env"


@pytest.fixture
def second(host: Any) -> Any:
    """A host with a second interface, whose addresses are OTHER."""
    stranger(host, "eth1")
    for family, address in OTHER.items():
        nodad = "nodad" if family == 6 else ""
        host.ip(f"-{family} address add {address}/{LENGTH[family]} dev eth1 {nodad}")
        gateway = {4: "192.0.2.254", 6: "2001:db8::fe"}[family]
        host.ip(f"-{family} route add default via {gateway} dev eth0")
    return host


def device(host: Any, family: int) -> tuple[str, str]:
    """Its MAC, and the interface below it."""
    shown = host.ip_json(f"link show {DEVICE[family]}")[0]
    return shown["address"], shown["linkinfo"]["info_data"]["link"]


def vteps(vni: int, text: str) -> dict[str, BackendData]:
    data = BackendData(vni, text)
    return {"backend_data": data, "backend_v6_data": data}


EVIL = {"name": "a-evil", "revision": 0}


@pytest.mark.parametrize("by", ["subnet.env", "--subnet", "the node's name", "the device"])
@pytest.mark.parametrize("running", [False, True], ids=["a first start", "a running node"])
def test_a_lease_that_sorts_first_does_not_become_ours(
    host: Any, path: Path, family: int, by: str, running: bool
) -> None:
    options: dict[str, Any] = {
        "subnet.env": {"subnet_file": str(path)},
        "--subnet": {"subnet": subnet(family, 0)},
        "the node's name": {"node_name": "n0"},
        "the device": {},
    }[by]
    remember(path, 0)
    honest, evil = [own(host, revision=7), *PEERS], own(host, 99, **EVIL)
    with plane(host, family, **options) as dp:
        if running or by == "the device":
            assert dp.sync(honest).ok
        report = dp.sync([evil, *honest])
        assert dp.sync([evil, *honest]).writes == 0

    assert report.ok
    (rejected,) = report.rejected
    assert (rejected.lease, str(rejected.reason)) == ("a-evil", "own-public-ip")
    assert "lease n0" in rejected.detail
    assert subnet(family, 0) in rejected.detail
    assert any("a-evil" in text and subnet(family, 0) in text for text in report.warnings)
    assert device(host, family)[0] == mac(family, 0)
    assert observed(host, family) == expected(PEERS, family)
    if by == "subnet.env":
        assert "10.240.0.1/24" in path.read_text() or family == 6


@pytest.mark.parametrize("evidence", [True, False], ids=["subnet.env", "nothing"])
def test_a_malformed_lease_with_our_address_stops_nothing(
    host: Any, path: Path, family: int, evidence: bool
) -> None:
    broken = [
        own(host, 99, **EVIL, backend_type="host-gw"),
        own(host, 98, name="b", **vteps(7, mac(family, 98))),
        own(host, 97, name="c", subnet="10.1.0.0/24", ipv6_subnet="fd11::/64"),
        own(host, 96, name="d", **vteps(1, "no MAC")),
    ]
    remember(path, 0)
    options = {"subnet_file": str(path)} if evidence else {}
    with plane(host, family, **options) as dp:
        report = dp.sync([*broken, own(host), *PEERS])

    assert report.ok
    reasons = {one.lease: str(one.reason) for one in report.rejected}
    assert reasons == {
        "a-evil": "wrong-backend",
        "b": "wrong-vni",
        "c": "outside-network",
        "d": "bad-mac",
    }
    assert observed(host, family) == expected(PEERS, family)


def test_only_a_malformed_lease_with_our_address(host: Any, path: Path, family: int) -> None:
    """The reason lies in the leases: an error of the source. With subnet.env the node goes on."""
    leases = [own(host, 99, **EVIL, backend_type="host-gw"), *PEERS]
    with plane(host, family) as dp, pytest.raises(LeaseRejected, match="a-evil") as caught:
        dp.sync(leases)
    assert isinstance(caught.value, SourceError)
    assert not has_device(host, family)

    remember(path, 0)
    with plane(host, family, subnet_file=str(path)) as dp:
        assert dp.sync(leases).ok
    assert observed(host, family) == expected(PEERS, family)


def test_several_leases_with_our_address_are_an_error_that_names_them(
    host: Any, family: int
) -> None:
    """As on Vagrant, where each machine has 10.0.2.15."""
    leases = [own(host, number) for number in (3, 1, 2)]
    before = everything(host)
    with plane(host, family) as dp, pytest.raises(SourceError) as caught:
        dp.sync(leases)

    said = str(caught.value)
    assert all(f"n{number} ({subnet(family, number)}" in said for number in (1, 2, 3))
    assert all(flag in caught.value.hint for flag in ("--subnet", "--iface", "--public-ip"))
    assert everything(host) == before

    with plane(host, family, subnet=subnet(family, 2)) as dp:
        assert dp.sync(leases).ok
    assert device(host, family)[0] == mac(family, 2)


def test_a_lease_of_another_interface_that_agrees_is_ours(
    second: Any, path: Path, family: int
) -> None:
    """The default route is on eth0; the lease and subnet.env agree on eth1's address."""
    remember(path, 0)
    leases = [at(0, OTHER), *PEERS]
    with plane(second, family, iface=None, subnet_file=str(path)) as dp:
        report = dp.sync(leases)
        assert dp.resync().writes == 0
        assert dp.sync(leases).writes == 0

    assert report.rejected == []
    assert device(second, family) == (mac(family, 0), "eth1")


def test_a_device_that_a_route_moved_goes_back_to_what_the_lease_says(
    second: Any, family: int
) -> None:
    leases = [own(second), *PEERS]
    with plane(second, family, iface=None) as dp:
        assert dp.sync(leases).ok
    local = OTHER[family]
    second.ip(f"link set {DEVICE[family]} type vxlan id 1 dev eth1 local {local}")
    with plane(second, family, iface=None) as dp:
        report = dp.sync(leases)

    assert any("eth1 -> eth0" in text for text in report.warnings)
    assert device(second, family) == (mac(family, 0), "eth0")


def test_a_stale_subnet_env_beside_a_lease_of_another_interface(
    second: Any, path: Path, family: int
) -> None:
    """n1 has the file's subnet, n2 has eth1's address: an error that names both."""
    leases = [*PEERS[1:], at(2, OTHER), at(1, {4: "198.51.100.1", 6: "2001:db8:77::1"})]
    remember(path, 1)
    before = everything(second)
    with (
        plane(second, family, iface=None, subnet_file=str(path)) as dp,
        pytest.raises(SourceError) as caught,
    ):
        dp.sync(leases)

    said = str(caught.value)
    for part in (subnet(family, 1), str(path), "lease n1", "lease n2", OTHER[family], "--iface"):
        assert part in said
    assert everything(second) == before

    with plane(second, family, iface=None) as dp, pytest.raises(SourceError, match="n2") as caught:
        dp.sync(leases)
    assert "--iface" in caught.value.hint


def test_flags_that_contradict_this_node_s_lease(second: Any, path: Path, family: int) -> None:
    remember(path, 0)
    with (
        plane(second, family, iface="eth0", subnet_file=str(path)) as dp,
        pytest.raises(SourceError, match=r"n0.*eth0") as caught,
    ):
        dp.sync([at(0, OTHER), *PEERS])
    assert OTHER[family] in str(caught.value)

    with plane(second, family, iface="eth0", subnet=subnet(family, 0)) as dp:
        report = dp.sync([at(0, OTHER), *PEERS])
    assert any("publish it" in text for text in report.warnings)
    assert device(second, family) == (mac(family, 0), "eth0")


def test_a_lease_whose_address_left_the_node_is_an_error(
    host: Any, path: Path, family: int
) -> None:
    """Others send to the old address: nothing is in sync, and nothing is changed."""
    with plane(host, family, subnet_file=str(path)) as dp:
        assert dp.sync([own(host), *PEERS]).ok
    before = everything(host)
    gone = {4: "192.0.2.77", 6: "2001:db8::77"}
    for options in ({"subnet_file": str(path)}, {}, {"node_name": "n0"}):
        with (
            plane(host, family, **options) as dp,
            pytest.raises(SourceError, match=gone[family]) as caught,
        ):
            dp.sync([at(0, gone), *PEERS])
        assert host.underlay(family) in str(caught.value)
        assert everything(host) == before


def test_another_subnet_on_purpose(host: Any, path: Path, family: int) -> None:
    """--subnet overrules subnet.env, the device and the old lease."""
    with plane(host, family, subnet_file=str(path)) as dp:
        assert dp.sync([own(host), *PEERS]).ok
    with plane(host, family, subnet_file=str(path), subnet=subnet(family, 50)) as dp:
        report = dp.sync([own(host), own(host, 50), *PEERS])

    assert [one.lease for one in report.rejected] == ["n0"]
    assert device(host, family)[0] == mac(family, 50)
    assert observed(host, family) == expected(PEERS, family)
