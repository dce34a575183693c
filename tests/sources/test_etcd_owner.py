"""Which lease in a real etcd a node takes for its own: evidence, and what is no evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.cluster.lease import Identity
from flannel_dp.sources.etcd.owner import AttachedLease, Note
from tests.lib.etcd import EtcdServer, attrs, follow, wait_until
from tests.lib.etcd_lease import (
    DUAL,
    NETWORK,
    SMALL,
    V6,
    calls,
    dual,
    granted_ttl,
    identity,
    kept,
    membership,
)

MAC = "02:00:00:00:00:07"


def host_gw(number: int) -> Identity:
    return identity(number, macs={}, backend="host-gw", vni=0)


def moved(number: int, **how: Any) -> Identity:
    """Node 7 with the public address of node ``number``."""
    return identity(number, **({"macs": {4: MAC}} | how))


@pytest.mark.parametrize("previous", [True, False], ids=["subnet.env", "device"])
def test_a_new_address_is_written_into_the_former_lease(etcd: EtcdServer, previous: bool) -> None:
    first = membership(etcd).acquire(identity(7), NETWORK, {})
    before = etcd.leases()[first.name]

    again = membership(etcd).acquire(moved(9), NETWORK, {4: first.subnet} if previous else {})

    after = etcd.leases()
    assert [*after] == [again.name] == [first.name]
    assert json.loads(etcd.value(first.name))["PublicIP"] == "192.0.2.9"
    kept_fields = ("create_revision", "lease")
    assert [after[first.name][f] for f in kept_fields] == [before[f] for f in kept_fields]
    assert again.revision == first.revision


def test_a_former_lease_in_capital_letters(etcd: EtcdServer) -> None:
    etcd.put("subnets/10.5.34.0-24", attrs(8, "02:AA:00:00:00:07"))
    lease = membership(etcd).acquire(moved(9, macs={4: "02:aa:00:00:00:07"}), NETWORK, {})
    assert lease.name == "10.5.34.0-24"


def test_a_former_lease_that_was_about_to_end_lives_on(etcd: EtcdServer) -> None:
    granted = etcd.run("lease", "grant", "500").split()[1]
    etcd.put("subnets/10.5.34.0-24", attrs(7), f"--lease={granted}")

    membership(etcd).acquire(moved(9), NETWORK, {4: "10.5.34.0/24"})

    assert granted_ttl(etcd, etcd.leases()["10.5.34.0-24"]) == 86400


@pytest.mark.parametrize("first", [7, 8])
def test_swapped_addresses(etcd: EtcdServer, first: int) -> None:
    """Each goes on with the lease of its own MAC, whatever address the other's has."""
    leases = {n: membership(etcd).acquire(identity(n), NETWORK, {}) for n in (7, 8)}
    macs = {n: identity(n).macs for n in (7, 8)}

    for number, other in ((first, 15 - first), (15 - first, first)):
        lease = membership(etcd).acquire(identity(other, macs=macs[number]), NETWORK, {})
        assert lease.name == leases[number].name
        assert len(etcd.leases()) == 2

    for number, other in ((7, 8), (8, 7)):
        assert json.loads(etcd.value(leases[number].name)) == {
            "PublicIP": f"192.0.2.{other}",
            "PublicIPv6": None,
            "BackendType": "vxlan",
            "BackendData": {"VNI": 1, "VtepMAC": macs[number][4]},
        }


def test_the_lease_of_our_address_and_mac_comes_before_one_of_our_mac(etcd: EtcdServer) -> None:
    """Machines made from one image may have one MAC: the other one's lease is left alone."""
    etcd.put("subnets/10.5.33.0-24", attrs(8, MAC))
    etcd.put("subnets/10.5.34.0-24", attrs(7, MAC))

    assert membership(etcd).acquire(identity(7), NETWORK, {}).name == "10.5.34.0-24"
    assert etcd.value("10.5.33.0-24") == attrs(8, MAC)


def test_a_mac_that_two_leases_have_is_no_evidence(etcd: EtcdServer) -> None:
    for number in (8, 9):
        etcd.put(f"subnets/10.5.{number}.0-24", attrs(number, MAC))

    lease = membership(etcd).acquire(identity(7), NETWORK, {})

    assert lease.name not in ("10.5.8.0-24", "10.5.9.0-24")
    assert [etcd.value(f"10.5.{n}.0-24") for n in (8, 9)] == [attrs(n, MAC) for n in (8, 9)]


def test_the_subnet_alone_is_no_evidence(etcd: EtcdServer) -> None:
    """subnet.env is old, and another node has taken the subnet meanwhile."""
    etcd.put("subnets/10.5.34.0-24", attrs(8))

    lease = membership(etcd).acquire(identity(7), NETWORK, {4: "10.5.34.0/24"})

    assert lease.name != "10.5.34.0-24"
    assert etcd.value("10.5.34.0-24") == attrs(8)


def test_a_former_lease_of_another_network_is_deleted(etcd: EtcdServer) -> None:
    first = membership(etcd).acquire(identity(7), NETWORK, {4: "10.5.34.0/24"})

    lease = membership(etcd).acquire(moved(9), SMALL, {4: first.subnet})

    assert [*etcd.leases()] == [lease.name] != [first.name]


@pytest.mark.parametrize("family", [4, 6])
def test_of_two_families_one_address_changes(etcd: EtcdServer, family: int) -> None:
    first = membership(etcd).acquire(dual(7), DUAL, {})
    public = dual(7).public | {family: dual(9).public[family]}

    again = membership(etcd).acquire(Identity(public, dual(7).macs, vni=1), DUAL, {})

    assert [*etcd.leases()] == [first.name] == [again.name]
    said = json.loads(etcd.value(first.name))
    assert {4: said["PublicIP"], 6: said["PublicIPv6"]} == public


@pytest.mark.parametrize("by", ["the lease", "subnet.env"])
def test_ipv6_that_is_switched_on_leaves_ipv4_its_subnet(etcd: EtcdServer, by: str) -> None:
    """A subnet.env, or a lease, of IPv4 alone: pods keep their addresses."""
    previous = {4: "10.5.34.0/24"}
    if by == "the lease":
        membership(etcd).acquire(identity(7), NETWORK, previous)
        previous = {}

    lease = membership(etcd).acquire(dual(7), DUAL, previous)

    assert lease.subnet == "10.5.34.0/24"
    assert lease.ipv6_subnet
    assert [*etcd.leases()] == [lease.name]


def test_a_family_that_is_switched_off_leaves_the_other_its_subnet(etcd: EtcdServer) -> None:
    first = membership(etcd).acquire(dual(7), DUAL, {})

    lease = membership(etcd).acquire(identity(7), NETWORK, {})

    assert lease.subnet == first.subnet
    assert [*etcd.leases()] == [lease.name]


def test_a_subnet_of_one_family_that_another_node_has_is_not_kept(etcd: EtcdServer) -> None:
    other = membership(etcd).acquire(dual(8), DUAL, {})

    lease = membership(etcd).acquire(dual(7), DUAL, {4: other.subnet})

    assert lease.subnet != other.subnet


def test_ipv6_alone(etcd: EtcdServer) -> None:
    def who(address: str) -> Identity:
        return identity(7, public={6: address}, macs={6: "02:00:00:00:06:07"})

    first = membership(etcd).acquire(who("2001:db8::7"), V6, {})
    again = membership(etcd).acquire(who("2001:db8::9"), V6, {})

    assert [*etcd.leases()] == [first.name] == [again.name]
    assert json.loads(etcd.value(first.name))["PublicIPv6"] == "2001:db8::9"


def test_a_running_node_updates_the_lease_that_it_keeps(etcd: EtcdServer) -> None:
    """Without a MAC, too, and though another lease has the new address."""
    held = membership(etcd)
    first = held.acquire(host_gw(7), NETWORK, {})
    other = membership(etcd).acquire(host_gw(8), NETWORK, {})
    with kept(held) as keeper:
        again = held.acquire(host_gw(8), NETWORK, {})
        assert again.name == first.name
        assert json.loads(etcd.value(first.name))["PublicIP"] == "192.0.2.8"
        assert sorted(etcd.leases()) == sorted([first.name, other.name])
        etcd.delete(f"subnets/{first.name}")
        wait_until(lambda: first.name in etcd.leases())
        assert "192.0.2.8" in etcd.value(first.name)
        assert keeper.error is None


# ---- two nodes with one MAC


def test_a_node_shows_that_it_lives(etcd: EtcdServer) -> None:
    """Its key is written once more, and nothing in it or about it changes."""
    held = membership(etcd)
    first = held.acquire(identity(7), NETWORK, {})
    before = etcd.leases()[first.name]
    with kept(held) as keeper:
        held.contest()
        wait_until(lambda: etcd.leases()[first.name]["mod_revision"] > before["mod_revision"])
        wait_until(lambda: held.lease is not None and held.lease.moved > first.moved)
        after = etcd.leases()[first.name]
        assert keeper.error is None
    same = ("create_revision", "lease", "value")
    assert [after[name] for name in same] == [before[name] for name in same]


def test_a_renewal_is_news_where_another_lease_has_the_mac(etcd: EtcdServer) -> None:
    """flanneld renews by a put of the same value: of two nodes with one MAC it tells who lives."""
    names = [f"10.5.{number}.0-24" for number in (1, 2, 3)]
    macs = (MAC, MAC.replace("7", "8"), MAC)
    with follow(etcd) as follower:
        follower.until(lambda: follower.snapshots == 1)
        for number, name in enumerate(names):
            etcd.put(f"subnets/{name}", attrs(number + 1, macs[number]))
        follower.until(lambda: sorted(follower.leases) == names)
        for number in (1, 0):
            etcd.put(f"subnets/{names[number]}", attrs(number + 1, macs[number]))
        revision = etcd.leases()[names[0]]["mod_revision"]
        follower.until(lambda: follower.leases[names[0]].moved == revision)
    changed = [lease.name for change in follower.changes for lease in change.added]
    assert changed.count(names[1]) == 1
    assert changed.count(names[0]) == 2


# ---- the note that a process leaves to the next one


@pytest.mark.parametrize("swapped", [True, False])
def test_the_next_process_finds_a_lease_without_a_mac(
    etcd: EtcdServer, tmp_path: Path, swapped: bool
) -> None:
    note = Note(str(tmp_path / "note"))
    first = membership(etcd, note=note).acquire(host_gw(7), NETWORK, {})
    if swapped:
        membership(etcd).acquire(host_gw(9), NETWORK, {})
    count = len(etcd.leases())

    again = membership(etcd, note=note).acquire(host_gw(9), NETWORK, {4: first.subnet})

    assert again.name == first.name
    assert len(etcd.leases()) == count


def test_a_key_that_another_node_wrote_is_not_ours_by_the_note(
    etcd: EtcdServer, tmp_path: Path
) -> None:
    """flanneld there took the lease because it has our old address: the value stays the same."""
    note = Note(str(tmp_path / "note"))
    first = membership(etcd, note=note).acquire(host_gw(7), NETWORK, {})
    granted = etcd.run("lease", "grant", "86400").split()[1]
    etcd.put(f"subnets/{first.name}", etcd.value(first.name), f"--lease={granted}")

    again = membership(etcd, note=note).acquire(host_gw(9), NETWORK, {4: first.subnet})

    assert again.name != first.name
    assert "192.0.2.7" in etcd.value(first.name)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"name":5}', b"{}"])
def test_a_broken_note_is_no_evidence_and_is_replaced(
    etcd: EtcdServer, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "note"
    path.write_bytes(content)

    lease = membership(etcd, note=Note(str(path))).acquire(host_gw(7), NETWORK, {})

    assert Note(str(path)).read() == AttachedLease(lease.name, etcd.leases()[lease.name]["lease"])
    assert [*tmp_path.glob("note*")] == [path]


def test_a_note_that_cannot_be_written_is_no_error(etcd: EtcdServer, tmp_path: Path) -> None:
    note = Note(str(tmp_path / "nowhere" / "note"))

    assert membership(etcd, note=note).acquire(host_gw(7), NETWORK, {}).public_ip == "192.0.2.7"
    assert note.read() == AttachedLease()


def test_coming_back_without_a_mac_reads_one_key(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = membership(etcd).acquire(host_gw(7), NETWORK, {})
    listed = calls(monkeypatch, "flannel_dp.sources.etcd.client.EtcdClient.pages")

    assert membership(etcd).acquire(host_gw(7), NETWORK, {4: first.subnet}) == first
    assert listed == []


@pytest.mark.parametrize("late", [4, 6])
def test_a_family_that_has_no_address_yet_keeps_what_was_published(
    etcd: EtcdServer, late: int
) -> None:
    """At boot the families' addresses come one after the other."""
    both = dual(7)
    first = membership(etcd).acquire(both, DUAL, {})
    half = Identity(
        {family: text for family, text in both.public.items() if family != late},
        {family: mac for family, mac in both.macs.items() if family != late},
        both.backend,
        both.vni,
    )
    before = etcd.value(first.name)

    again = membership(etcd).acquire(half, DUAL, {})

    assert again.name == first.name
    assert etcd.value(first.name) == before


@pytest.mark.parametrize("late", [4, 6])
def test_a_family_that_is_published_later_stays_in_the_same_lease(
    etcd: EtcdServer, late: int
) -> None:
    both = dual(7)
    half = Identity(
        {family: text for family, text in both.public.items() if family != late},
        {family: mac for family, mac in both.macs.items() if family != late},
        both.backend,
        both.vni,
    )
    first = membership(etcd).acquire(half, DUAL, {})
    assert both.public[late] not in etcd.value(first.name)

    again = membership(etcd).acquire(both, DUAL, {})

    assert [*etcd.leases()] == [again.name] == [first.name]
    for address in both.public.values():
        assert address in etcd.value(first.name)
