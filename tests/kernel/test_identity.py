"""Which lease is this node's: by subnet.env, --subnet, the node's name and the device that is
there, and never by a name or a revision that another node chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import BackendData, LeaseRejected, NotYet, SourceError
from flannel_dp.command.cli import main
from tests.lib.agents import Script, Watched
from tests.lib.kernel import everything, expected, has_device, observed, stranger
from tests.lib.kube_cluster import kube_node
from tests.lib.leases import DEVICE, mac, network_config, peer, peers, plane, subnet
from tests.lib.waiting import wait_until

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
    assert all(flag in caught.value.hint for flag in ("subnet=", "iface=", "public_ip="))
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
    for part in (subnet(family, 1), str(path), "lease n1", "lease n2", OTHER[family], "iface="):
        assert part in said
    assert everything(second) == before

    with plane(second, family, iface=None) as dp, pytest.raises(SourceError, match="n2") as caught:
        dp.sync(leases)
    assert "iface=" in caught.value.hint


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


def test_fr27_a_virtual_address_that_is_left_is_not_this_node_s(
    host: Any, path: Path, family: int
) -> None:
    """The DHCP address is gone, keepalived's is left: no command works with it, and nothing is
    published with it, unless a flag or this node's lease says that it is the node's."""
    virtual = {4: "192.0.2.99", 6: "2001:db8::99"}
    single = {4: 32, 6: 128}[family]
    with plane(host, family, subnet_file=str(path)) as dp:
        assert dp.sync([own(host), *PEERS]).ok
    nodad = "nodad" if family == 6 else ""
    host.ip(f"-{family} address add {virtual[family]}/{single} dev eth0 {nodad}")
    host.ip(f"-{family} address del {host.underlay(family)}/{LENGTH[family]} dev eth0")
    before = everything(host)

    said = f"{host.underlay(family)}, which this node was reached at, is gone, and "
    with plane(host, family, subnet_file=str(path)) as dp:
        with pytest.raises(NotYet, match=said) as caught:
            dp.identity()
        assert f"{virtual[family]}/{single}, which is left on eth0, may be a virtual" in str(
            caught.value
        )
        with pytest.raises(SourceError, match=host.underlay(family)):
            dp.sync([own(host), *PEERS])
        with pytest.raises(NotYet, match=said):
            dp.sync(PEERS)
        assert everything(host) == before
    with plane(host, family, iface=virtual[family]) as dp:
        assert dp.identity().public == {family: virtual[family]}
    with plane(host, family, subnet_file=str(path)) as dp:
        assert dp.sync([at(0, virtual), *PEERS]).ok
        assert dp.identity().public == {family: virtual[family]}


def test_fr31_an_address_that_another_host_has(make_host: Any) -> None:
    """Duplicate address detection failed: the kernel does not use it, and nor does the tunnel."""
    host, other = make_host(), make_host()
    twice = "2001:db8::77"
    other.ip(f"address add {twice}/64 dev eth0 nodad")
    host.ip(f"address add {twice}/64 dev eth0")
    wait_until(lambda: "dadfailed" in host.ip("address show dev eth0"))
    leases = [own(host, public_ipv6=twice), *PEERS]
    for options in ({}, {"node_name": "n0"}):
        with plane(host, 6, **options) as dp, pytest.raises(SourceError, match=twice) as caught:
            dp.sync(leases)
        assert "duplicate address detection failed" in str(caught.value)
    with (
        plane(host, 6, public_ipv6=twice) as dp,
        pytest.raises(NotYet, match="duplicate address detection failed"),
    ):
        dp.sync(leases)
    assert not has_device(host, 6)


def test_another_subnet_on_purpose(host: Any, path: Path, family: int) -> None:
    """--subnet overrules subnet.env, the device and the old lease."""
    with plane(host, family, subnet_file=str(path)) as dp:
        assert dp.sync([own(host), *PEERS]).ok
    with plane(host, family, subnet_file=str(path), subnet=subnet(family, 50)) as dp:
        report = dp.sync([own(host), own(host, 50), *PEERS])

    assert [one.lease for one in report.rejected] == ["n0"]
    assert device(host, family)[0] == mac(family, 50)
    assert observed(host, family) == expected(PEERS, family)


# ---- both families ----------------------------------------------------------------------


def test_one_family_tells_the_lease_where_the_other_cannot(host: Any) -> None:
    """fr13 in dual stack: three machines with one IPv4 address, each with an IPv6 of its own."""
    leases = [own(host, number, public_ipv6=f"2001:db8:5::{number}") for number in (1, 3)]
    leases.insert(1, own(host, 2))
    with plane(host) as dp:
        report = dp.sync([*leases, *PEERS[3:]])

    assert report.ok
    assert device(host, 4)[0] == mac(4, 2)
    assert device(host, 6)[0] == mac(6, 2)
    assert any("n1" in text and subnet(4, 2) in text for text in report.warnings)


def test_two_families_that_are_two_nodes_are_an_error(host: Any, path: Path) -> None:
    """A stale subnet.env of an IPv4-only node: n1 by IPv4, and n2 by IPv6."""
    path.write_text(f"FLANNEL_SUBNET={subnet(4, 1).replace('0/24', '1/24')}\n")
    leases = [own(host, 1, ipv6_subnet="", public_ipv6=""), own(host, 2), *PEERS[2:]]
    before = everything(host)
    with plane(host, subnet_file=str(path)) as dp, pytest.raises(SourceError) as caught:
        dp.sync(leases)

    said = str(caught.value)
    for part in ("n2", subnet(4, 1), subnet(4, 2), str(path), "subnet="):
        assert part in said
    assert everything(host) == before

    path.unlink()
    with plane(host, subnet_file=str(path), node_name="n2") as dp:
        assert dp.sync(leases).ok
    assert device(host, 4)[0] == mac(4, 2)
    assert "10.240.2.1/24" in path.read_text()


def test_an_address_that_left_in_one_family_leaves_the_other_in_place(
    host: Any, family: int
) -> None:
    """The other family names the lease, and this one was published with another address."""
    other = 10 - family
    gone = {4: "192.0.2.77", 6: "2001:db8::77"}
    key = {4: "public_ip", 6: "public_ipv6"}[family]
    with plane(host) as dp:
        report = dp.sync([own(host, **{key: gone[family]}), *PEERS])

    assert gone[family] in str(report.family_errors[family])
    assert observed(host, other) == expected(PEERS, other)
    assert not has_device(host, family)


# ---- the name ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--node-name", "NODE_NAME"])
@pytest.mark.parametrize("form", ["list", "kubectl"])
def test_fr13_the_name_tells_which_of_three_leases_is_ours(
    host: Any,
    family: int,
    tmp_path: Path,
    how: str,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, file = tmp_path / "net-conf.json", tmp_path / "leases.json"
    config.write_text(network_config(family).to_json())
    leases = [own(host, number) for number in (1, 2, 3)]
    if form == "list":
        file.write_text('{"leases": [' + ",".join(one.to_json() for one in leases) + "]}")
    else:
        nodes = [kube_node(number, one) for number, one in enumerate(leases, 1)]
        for number, node in enumerate(nodes, 1):
            node["metadata"]["name"] = f"n{number}"
        file.write_text(json.dumps({"kind": "NodeList", "items": nodes}))
    words = ["sync", "--netns", host.ns, "--net-conf", str(config), "--leases", str(file)]
    words += ["--iface", "eth0"]
    monkeypatch.delenv("NODE_NAME", raising=False)

    assert main(words) == 4
    said = capsys.readouterr().err
    assert all(f"n{number}" in said for number in (1, 2, 3))
    assert "--node-name" in said
    assert not has_device(host, family)

    if how == "NODE_NAME":
        monkeypatch.setenv("NODE_NAME", "n2")
    else:
        words += ["--node-name", "n2"]
    assert main(words) == 0, capsys.readouterr().err
    assert device(host, family)[0] == mac(family, 2)


# ---- update -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "removed"),
    [
        ({"number": 50, "macs": 0}, ["n0"]),
        ({"number": 50, "macs": 0}, []),
        ({"number": 0, "macs": 9}, []),
        ({"number": 0, "macs": 0, "name": "other", "elsewhere": True}, []),
        ({"number": 60, "macs": 60, "name": "n0", "elsewhere": True}, []),
        ({"number": 60, "macs": 60, "name": "a-evil"}, []),
        (None, ["n0"]),
    ],
    ids=[
        "renumbered",
        "renumbered-by-name",
        "another-mac",
        "our-subnet-elsewhere",
        "our-name-elsewhere",
        "our-address-in-another-lease",
        "gone",
    ],
)
def test_what_says_something_new_of_this_node_takes_a_sync(
    host: Any, family: int, changes: dict[str, Any] | None, removed: list[str]
) -> None:
    added = []
    if changes is not None:
        shape = vteps(1, mac(4, changes["macs"]))
        shape["backend_v6_data"] = BackendData(1, mac(6, changes["macs"]))
        where = OTHER if changes.get("elsewhere") else {4: host.ipv4, 6: host.ipv6}
        added = [at(changes["number"], where, name=changes.get("name", "n0"), **shape)]
    with plane(host, family) as dp:
        assert dp.sync([own(host), *PEERS]).ok
        before = everything(host)
        with pytest.raises(SourceError, match=r"the lease of this node.*sync"):
            dp.update([*added, peer(60, name="late")], removed)
        assert everything(host) == before
        assert dp.update([own(host), peer(70)], ["n0"]).ok, "gone and back is no change"


def test_a_renumbered_lease_contradicts_subnet_env_and_the_device(
    host: Any, path: Path, family: int
) -> None:
    """Nothing changes until a person decides, by --subnet."""
    renumbered = own(host, 50, name="n0", **vteps(1, mac(family, 0)))
    with plane(host, family, subnet_file=str(path)) as dp:
        assert dp.sync([own(host), *PEERS]).ok
        before, remembered = everything(host), path.read_text()
        with pytest.raises(SourceError):
            dp.update([renumbered])
        with pytest.raises(SourceError) as caught:
            dp.sync([renumbered, *PEERS])
    sides = (subnet(family, 0), str(path), DEVICE[family], "lease n0", subnet(family, 50))
    assert [one for one in sides if one not in str(caught.value)] == []
    assert f"subnet={subnet(family, 50)}" in caught.value.hint
    assert (everything(host), path.read_text()) == (before, remembered)

    with plane(host, family, subnet_file=str(path), subnet=subnet(family, 50)) as dp:
        report = dp.sync([renumbered, *PEERS])
        assert dp.sync([renumbered, *PEERS]).writes == 0
    assert report.ok
    assert report.rejected == []
    (said,) = [text for text in report.warnings if "no longer" in text]
    assert subnet(family, 50) in said
    assert subnet(family, 0) in said
    assert f"{subnet(family, 50)[:10]}" in path.read_text()
    assert observed(host, family) == expected(PEERS, family)


def test_a_lease_that_was_rejected_before_is_rejected_again_by_an_update(
    host: Any, family: int
) -> None:
    evil = own(host, 99, **EVIL)
    with plane(host, family, node_name="n0") as dp:
        assert dp.sync([own(host), evil, *PEERS]).ok
        assert dp.update([evil, peer(60)]).ok


def test_an_agent_keeps_its_subnet_against_a_renumbered_lease(
    host: Any, path: Path, family: int
) -> None:
    """The change comes as one of the source's, not as a list."""
    changed = own(host, 50, name="n0", **vteps(1, mac(family, 0)))
    script = Script([own(host), *PEERS])
    with Watched(plane(host, family, subnet_file=str(path)), script) as agent:
        before, remembered = everything(host), path.read_text()
        script.change([changed])
        said = f"this node is {subnet(family, 0)} by {path} and the address of device"
        wait_until(lambda: said in str(agent.status), describe=lambda: str(agent.status))
        assert (everything(host), path.read_text()) == (before, remembered)
        script.change([own(host)])
        wait_until(lambda: not agent.status.degraded)
