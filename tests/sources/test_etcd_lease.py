"""EtcdLease against a real etcd: the own lease is taken as flannel takes it, and kept."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.cluster.lease import Lease
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import AuthFailed, ConfigError, Unavailable
from flannel_dp.sources import Inbox
from flannel_dp.sources.etcd.grpc import KeepAlive
from flannel_dp.sources.etcd.lease import TTL, EtcdLease
from flannel_dp.sources.etcd.owner import AttachedLease, Note
from flannel_dp.sources.etcd.source import EtcdSource, open_client
from tests.lib.etcd import PREFIX, EtcdServer, attrs, wait_until
from tests.lib.etcd_lease import (
    DUAL,
    NETWORK,
    SMALL,
    TINY_DUAL,
    V6,
    calls,
    dual,
    granted_ttl,
    identity,
    kept,
    membership,
)
from tests.lib.follower import Follower
from tests.lib.waiting import LIMIT

# ---- taking one


def test_a_new_lease_is_flannels(etcd: EtcdServer) -> None:
    held = membership(etcd)

    lease = held.acquire(identity(7), NETWORK, {})

    ((name, key),) = etcd.leases().items()
    assert name == lease.name == lease.key
    assert etcd.value(name) == (
        '{"PublicIP":"192.0.2.7","PublicIPv6":null,"BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:07"}}'
    )
    assert granted_ttl(etcd, key) == TTL == 86400
    assert EtcdSource(etcd.options()).snapshot().claims.leases == [lease] == [held.lease]
    assert lease.revision == key["create_revision"]


def test_host_gw_publishes_no_data(etcd: EtcdServer) -> None:
    lease = membership(etcd).acquire(identity(7, macs={}, backend="host-gw", vni=0), NETWORK, {})

    assert etcd.value(lease.name) == (
        '{"PublicIP":"192.0.2.7","PublicIPv6":null,"BackendType":"host-gw"}'
    )


def test_dual_stack(etcd: EtcdServer) -> None:
    lease = membership(etcd).acquire(dual(7), DUAL, {4: "10.5.9.0/24", 6: "fd00:5:0:9::/64"})

    assert [*etcd.leases()] == [lease.name] == ["10.5.9.0-24&fd00:5:0:9::-64"]
    assert json.loads(etcd.value(lease.name)) == {
        "PublicIP": "192.0.2.7",
        "PublicIPv6": "2001:db8::7",
        "BackendType": "vxlan",
        "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:07"},
        "BackendV6Data": {"VNI": 1, "VtepMAC": "02:00:00:00:06:07"},
    }
    assert membership(etcd).acquire(dual(7), DUAL, {}) == lease


def test_ipv6_alone(etcd: EtcdServer) -> None:
    who = identity(7, public={6: "2001:db8::7"}, macs={6: "02:00:00:00:06:07"})
    lease = membership(etcd).acquire(who, V6, {})

    assert lease.subnet == ""
    assert [*etcd.leases()] == [lease.name]
    assert json.loads(etcd.value(lease.name))["PublicIP"] == "0.0.0.0"
    same = identity(7, public={6: "2001:0DB8::7"}, macs={6: "02:00:00:00:06:07"})
    assert membership(etcd).acquire(same, V6, {}).name == lease.name


def test_the_lease_with_our_address_is_taken_up(etcd: EtcdServer) -> None:
    """Before anything that subnet.env says; its data is brought up to date."""
    granted = etcd.run("lease", "grant", "86400").split()[1]
    etcd.put("subnets/10.5.34.0-24", attrs(7, "02:11:11:11:11:11"), f"--lease={granted}")
    etcd.put("subnets/10.5.35.0-24", attrs(8))

    lease = membership(etcd).acquire(identity(7), NETWORK, {4: "10.5.40.0/24"})

    assert lease.name == "10.5.34.0-24"
    assert sorted(etcd.leases()) == ["10.5.34.0-24", "10.5.35.0-24"]
    assert "02:00:00:00:00:07" in etcd.value("10.5.34.0-24")
    assert etcd.leases()["10.5.34.0-24"]["lease"] == int(granted, 16)


def test_taking_up_the_same_writes_nothing(etcd: EtcdServer) -> None:
    first = membership(etcd).acquire(identity(7), NETWORK, {})
    before = etcd.leases()

    again = membership(etcd).acquire(identity(7), NETWORK, {4: first.subnet})

    assert again == first
    assert etcd.leases() == before


def test_a_lease_of_another_length_of_life_gets_ours(etcd: EtcdServer) -> None:
    granted = etcd.run("lease", "grant", "500").split()[1]
    etcd.put("subnets/10.5.34.0-24", attrs(7), f"--lease={granted}")

    membership(etcd).acquire(identity(7), NETWORK, {})

    assert granted_ttl(etcd, etcd.leases()["10.5.34.0-24"]) == TTL


@pytest.mark.parametrize("name", ["10.6.34.0-24", "10.5.34.0-25", "10.5.34.0-24&fd00:5:0:1::-64"])
def test_our_lease_of_another_network_is_deleted(etcd: EtcdServer, name: str) -> None:
    etcd.put(f"subnets/{name}", attrs(7))
    etcd.put("subnets/10.6.35.0-24", attrs(8))

    lease = membership(etcd).acquire(identity(7), NETWORK, {})

    assert sorted(etcd.leases()) == sorted([lease.name, "10.6.35.0-24"])


def test_the_previous_subnet_is_taken_when_free(etcd: EtcdServer) -> None:
    assert membership(etcd).acquire(identity(7), NETWORK, {4: "10.5.40.0/24"}).name == (
        "10.5.40.0-24"
    )


@pytest.mark.parametrize("previous", ["10.6.40.0/24", "10.5.40.0/25", "10.5.0.0/24"])
def test_the_previous_subnet_has_to_fit(etcd: EtcdServer, previous: str) -> None:
    lease = membership(etcd).acquire(identity(7), NETWORK, {4: previous})

    assert lease.subnet != previous


@pytest.mark.parametrize(
    "name", ["10.5.40.0-24", "10.5.40.0-24&fd00::-64", "10.5.40.128-25", "10.5.32.0-20"]
)
def test_the_previous_subnet_has_to_be_free(etcd: EtcdServer, name: str) -> None:
    etcd.put(f"subnets/{name}", attrs(8))

    lease = membership(etcd).acquire(identity(7), NETWORK, {4: "10.5.40.0/24"})

    assert lease.subnet != "10.5.40.0/24"
    assert len(etcd.leases()) == 2


def test_a_reservation_stays_one(etcd: EtcdServer) -> None:
    """A key without etcd lease, put by a person for a node that is to come."""
    etcd.put("subnets/10.5.34.0-24", '{"PublicIP":"192.0.2.7"}')

    lease = membership(etcd).acquire(identity(7), NETWORK, {})

    assert lease.name == "10.5.34.0-24"
    assert "lease" not in etcd.leases()["10.5.34.0-24"]
    assert "02:00:00:00:00:07" in etcd.value("10.5.34.0-24")
    assert etcd.run("lease", "list").splitlines()[0] == "found 0 leases"


def test_keys_that_mean_nothing_are_in_nobodys_way(etcd: EtcdServer) -> None:
    for name in ("nonsense", "10.5.300.0-24", "10.5.40.0-24hi"):
        etcd.put(f"subnets/{name}", attrs(7))

    assert membership(etcd).acquire(identity(7), NETWORK, {4: "10.5.40.0/24"}).name == (
        "10.5.40.0-24"
    )


def test_a_broken_value_keeps_its_subnet(etcd: EtcdServer) -> None:
    etcd.put("subnets/10.5.40.0-24", "{")

    assert membership(etcd).acquire(identity(7), NETWORK, {4: "10.5.40.0/24"}).name != (
        "10.5.40.0-24"
    )


def test_out_of_subnets(etcd: EtcdServer) -> None:
    for number in range(1, 16):
        etcd.put(f"subnets/10.5.0.{16 * number}-28", attrs(number))

    with pytest.raises(Unavailable, match=r"out of subnets: all /28 of Network 10\.5\.0\.0/24"):
        membership(etcd).acquire(identity(99), SMALL, {})
    assert len(etcd.leases()) == 15


def test_two_nodes_race_for_a_subnet_again_and_again(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both choose by the same chance, and neither takes its choice before the other has chosen:
    they meet every time."""
    from flannel_dp.sources.etcd.client import EtcdClient

    before = EtcdClient.create
    chosen = threading.Barrier(2)
    waited: set[EtcdClient] = set()
    lost: list[bytes] = []

    def create(self: EtcdClient, key: bytes, *args: Any, **how: Any) -> int:
        if self not in waited:
            waited.add(self)
            chosen.wait(LIMIT)
        revision = before(self, key, *args, **how)
        if not revision:
            lost.append(key)
        return revision

    monkeypatch.setattr(EtcdClient, "create", create)
    for round_ in range(20):
        held = [membership(etcd, rng=random.Random(round_)) for _ in range(2)]
        leases = together(
            [
                lambda m=m, n=n: m.acquire(identity(n), SMALL, {})  # type: ignore[misc]
                for n, m in enumerate(held, 1)
            ]
        )

        assert len({lease.subnet for lease in leases}) == 2
        with open_client(etcd.options()) as client:
            ((kvs, _),) = client.pages(f"{PREFIX}/subnets/".encode())
            names = [kv.key.decode().rpartition("/")[2] for kv in kvs]
            assert sorted(names) == sorted(lease.name for lease in leases)
            for kv in kvs:
                client.delete(kv)
    assert len(lost) == 20


def together(functions: list[Callable[[], Lease]]) -> list[Lease]:
    """Run all at the same time; returns what they return."""
    barrier = threading.Barrier(len(functions))
    results: list[Lease | BaseException] = [AssertionError()] * len(functions)

    def run(number: int) -> None:
        barrier.wait()
        try:
            results[number] = functions[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if isinstance(result, Lease)]


def test_a_dual_stack_race_leaves_no_overlap(etcd: EtcdServer) -> None:
    """The keys differ although one of their subnets is the same."""
    for round_ in range(10):
        held = [membership(etcd, rng=random.Random(seed + round_)) for seed in range(3)]
        leases = together(
            [
                lambda m=m, n=n: m.acquire(dual(n), TINY_DUAL, {})  # type: ignore[misc]
                for n, m in enumerate(held, 1)
            ]
        )

        assert len({lease.subnet for lease in leases}) == 3
        assert len({lease.ipv6_subnet for lease in leases}) == 3
        etcd.run("del", "--prefix", f"{PREFIX}/subnets/")


def test_fifty_nodes_join_at_once_and_see_each_other(etcd: EtcdServer) -> None:
    config = NetworkConfig.from_json(
        '{"Network": "10.5.0.0/20", "SubnetLen": 26, "Backend": {"Type": "vxlan"}}'
    )
    held = [membership(etcd, rng=random.Random(5)) for _ in range(50)]
    with Follower(EtcdSource(etcd.options())) as follower:
        leases = together(
            [
                lambda m=m, n=n: m.acquire(identity(n), config, {})  # type: ignore[misc]
                for n, m in enumerate(held, 1)
            ]
        )
        assert len({lease.subnet for lease in leases}) == 50
        expected = {lease.name: lease for lease in leases}
        follower.until(lambda: follower.leases == expected)


def test_an_answer_that_was_lost(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is made again, and meets the key that it has made itself."""
    from flannel_dp.sources.etcd.client import EtcdClient

    before = EtcdClient.create
    monkeypatch.setattr(
        EtcdClient, "create", lambda self, *args, **how: before(self, *args, **how) and 0
    )

    lease = membership(etcd).acquire(identity(7), NETWORK, {})

    assert [*etcd.leases()] == [lease.name]
    assert lease.revision == etcd.leases()[lease.name]["create_revision"]


def test_etcd_down(etcd: EtcdServer) -> None:
    etcd.kill()

    with pytest.raises(Unavailable, match="connection refused"):
        membership(etcd).acquire(identity(7), NETWORK, {})


def test_not_allowed(etcd: EtcdServer) -> None:
    etcd.run("user", "add", "other:pw")
    etcd.enable_auth()
    options = etcd.options(username="other", password="pw")

    with pytest.raises(AuthFailed, match="permission denied") as caught:
        EtcdLease(options).acquire(identity(7), NETWORK, {})
    assert "grant-permission" in caught.value.hint


@pytest.mark.parametrize("margin", [0.0, -60.0, 86400.0, 1e9])
def test_a_margin_that_cannot_be(margin: float) -> None:
    with pytest.raises(ConfigError, match="--subnet-lease-renew-margin") as caught:
        EtcdLease(EtcdServer(None, 1, 2).options(), margin=margin)  # type: ignore[arg-type]
    assert "1 to 1439" in caught.value.hint


# ---- keeping it


def test_it_is_renewed_again_and_again(etcd: EtcdServer) -> None:
    """By its own etcd lease: the key is not written, so nobody is told anything."""
    held = membership(etcd, ttl=30, margin=28.0)
    lease = held.acquire(identity(7), NETWORK, {})
    key = etcd.leases()[lease.name]
    before = etcd.renewals()
    with kept(held) as keeper:
        wait_until(lambda: etcd.renewals() >= before + 3)
        assert keeper.error is None

    assert etcd.leases()[lease.name] == key


def test_renewal_goes_by_a_clock_that_nobody_sets(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    held = membership(etcd, clock=lambda: now)
    lease = held.acquire(identity(7), NETWORK, {})
    client = "flannel_dp.sources.etcd.client.EtcdClient"
    renewed, looked = (
        calls(monkeypatch, f"{client}.keep_alive"),
        calls(monkeypatch, f"{client}.get"),
    )
    with kept(held) as keeper:

        def look() -> None:
            """Have it look at the lease, and come to the end of that."""
            for _ in range(2):
                looked.clear()
                keeper.inbox.refresh()
                wait_until(lambda: looked)

        for wall in (0.0, 2e9, 5e9):
            monkeypatch.setattr(time, "time", lambda wall=wall: wall)
            look()
        now += TTL - 3600 - 1
        look()
        assert renewed == []

        now += 2
        look()
        assert len(renewed) == 1
        now += 100
        look()
        assert len(renewed) == 1
    assert etcd.leases()[lease.name]["create_revision"] == lease.revision


@pytest.mark.parametrize("how", ["delete", "revoke"])
def test_a_lost_lease_is_made_again(etcd: EtcdServer, how: str) -> None:
    held = membership(etcd)
    lease = held.acquire(identity(7), NETWORK, {})
    first = etcd.leases()[lease.name]
    with kept(held) as keeper:
        if how == "delete":
            etcd.delete(f"subnets/{lease.name}")
        else:
            etcd.run("lease", "revoke", f"{first['lease']:x}")
        wait_until(lambda: lease.name in etcd.leases())
        wait_until(lambda: held.lease and held.lease.revision > lease.revision)
        assert keeper.error is None

    again = etcd.leases()[lease.name]
    assert again["value"] == first["value"]
    assert granted_ttl(etcd, again) == TTL


def test_it_is_made_again_when_it_expired_while_etcd_was_away(etcd: EtcdServer) -> None:
    held = membership(etcd, ttl=60, margin=59.0)
    lease = held.acquire(identity(7), NETWORK, {})
    etcd.kill()
    with kept(held) as keeper:
        wait_until(lambda: isinstance(keeper.error, Unavailable))
        etcd.start().await_ready()
        etcd.run("lease", "revoke", f"{etcd.leases()[lease.name]['lease']:x}")
        wait_until(lambda: lease.name in etcd.leases() and keeper.error is None)


def test_somebody_else_has_taken_it(etcd: EtcdServer) -> None:
    """They keep it; we say so, go on as we are, and take it again when they are gone."""
    held = membership(etcd)
    lease = held.acquire(identity(7), NETWORK, {})
    with kept(held) as keeper:
        etcd.put(f"subnets/{lease.name}", attrs(8))
        wait_until(lambda: keeper.error is not None)
        error = keeper.error
        assert isinstance(error, Unavailable)
        assert "192.0.2.8" in error.message
        assert lease.subnet in error.message
        assert etcd.value(lease.name) == attrs(8)

        etcd.delete(f"subnets/{lease.name}")
        wait_until(lambda: keeper.error is None)
        assert "192.0.2.7" in etcd.value(lease.name)


def test_somebody_else_has_taken_a_part_of_it(etcd: EtcdServer) -> None:
    held = membership(etcd)
    lease = held.acquire(identity(7), NETWORK, {4: "10.5.9.0/24"})
    with kept(held) as keeper:
        wait_until(lambda: keeper.error is None)
        other = "subnets/10.5.9.0-24&fd00:5:0:1::-64"
        etcd.put(other, attrs(8))
        etcd.delete(f"subnets/{lease.name}")
        wait_until(lambda: "another node has taken a part" in str(keeper.error))
        etcd.delete(other)
        wait_until(lambda: lease.name in etcd.leases())


def test_what_others_write_over_it_is_put_right_but_not_for_ever(etcd: EtcdServer) -> None:
    held = membership(etcd)
    lease = held.acquire(identity(7), NETWORK, {})
    with kept(held) as keeper:
        etcd.put(f"subnets/{lease.name}", "nonsense")
        wait_until(lambda: "02:00:00:00:00:07" in etcd.value(lease.name))
        etcd.put(f"subnets/{lease.name}", attrs(7, "02:99:99:99:99:99"))
        wait_until(lambda: "keeps writing" in str(keeper.error))
        assert "02:99:99:99:99:99" in etcd.value(lease.name)


def test_fr13_a_node_leaves_the_lease_to_a_living_one_with_its_address(etcd: EtcdServer) -> None:
    """As on Vagrant: the first node writes its key again, and the second one leaves it alone, now
    and later."""
    first, second = membership(etcd), membership(etcd)
    lease = first.acquire(identity(7), NETWORK, {})
    other = identity(7, macs={4: "02:00:00:00:00:09"})
    with kept(first) as one:
        wait_until(lambda: one.error is None)
        with pytest.raises(Unavailable) as caught:
            _left(second, other)
        wait_until(lambda: one.error is None and etcd.value(lease.name) == attrs(7))
        revision = etcd.leases()[lease.name]["mod_revision"]
        with pytest.raises(Unavailable, match="02:00:00:00:00:07 again"):
            second.acquire(other, NETWORK, {})
        assert etcd.leases()[lease.name]["mod_revision"] == revision
    said = str(caught.value)
    sides = (lease.subnet, "192.0.2.7", "MAC 02:00:00:00:00:07", "02:00:00:00:00:09", lease.name)
    assert [side for side in sides if side not in said] == []
    assert all(flag in caught.value.hint for flag in ("iface=", "public_ip="))


def _left(held: EtcdLease, other: Any) -> None:
    """Take the lease, and keep it until it is left; raise why it was. The other node may take
    longer to write its key again than the start waits for that."""
    held.acquire(other, NETWORK, {})
    with kept(held) as keeper:
        wait_until(lambda: "is alive has" in str(keeper.error))
        assert keeper.error is not None
        raise keeper.error


def test_fr13_a_lease_that_is_taken_back_later_is_left(etcd: EtcdServer, tmp_path: Path) -> None:
    """The first node could not write when the second one came. Its next process does not go by
    what it remembers of the key either."""
    etcd.put("subnets/10.5.9.0-24", attrs(7))
    note = Note(str(tmp_path / "lease"))
    held = membership(etcd, note=note)
    other = identity(7, macs={4: "02:00:00:00:00:09"})
    assert held.acquire(other, NETWORK, {}).subnet == "10.5.9.0/24"
    assert note.read().name == "10.5.9.0-24"
    with kept(held) as keeper:
        wait_until(lambda: keeper.error is None)
        etcd.put("subnets/10.5.9.0-24", attrs(7))
        wait_until(lambda: "is alive has 192.0.2.7" in str(keeper.error))
        assert etcd.value("10.5.9.0-24") == attrs(7)
        assert note.read() == AttachedLease()


def test_of_two_nodes_with_one_address_the_second_leaves_the_lease_of_a_dead_one(
    etcd: EtcdServer,
) -> None:
    etcd.put("subnets/10.5.9.0-24", attrs(7))
    first, second = membership(etcd), membership(etcd)
    macs = {4: "02:00:00:00:00:08"}, {4: "02:00:00:00:00:09"}
    assert first.acquire(identity(7, macs=macs[0]), NETWORK, {}).subnet == "10.5.9.0/24"
    with kept(first) as one:
        wait_until(lambda: one.error is None)
        with pytest.raises(Unavailable, match="02:00:00:00:00:08 again"):
            _left(second, identity(7, macs=macs[1]))
        wait_until(lambda: one.error is None and etcd.value("10.5.9.0-24") == attrs(7, macs[0][4]))


def test_a_reservation_is_not_renewed_and_not_turned_into_a_lease(etcd: EtcdServer) -> None:
    etcd.put("subnets/10.5.34.0-24", '{"PublicIP":"192.0.2.7"}')
    held = membership(etcd, ttl=3, margin=2.9)
    held.acquire(identity(7), NETWORK, {})
    before = etcd.leases()
    with kept(held) as keeper:
        deadline = time.monotonic() + 0.5
        wait_until(lambda: time.monotonic() > deadline)
        assert keeper.error is None
    assert etcd.leases() == before


def test_a_changed_identity_is_published(etcd: EtcdServer) -> None:
    held = membership(etcd)
    first = held.acquire(identity(7), NETWORK, {})
    with kept(held) as keeper:
        other = identity(8, vni=5)
        lease = held.acquire(other, NETWORK, {})

        assert lease.name == first.name
        assert lease.revision == first.revision
        assert lease.public_ip == "192.0.2.8"
        assert '"VNI":5' in etcd.value(first.name)
        assert held.acquire(other, NETWORK, {}) == lease
        assert keeper.error is None
    assert len(etcd.leases()) == 1


def test_before_a_lease_there_is_nothing_to_keep() -> None:
    held = EtcdLease(EtcdServer(None, 1, 2).options())  # type: ignore[arg-type]

    assert held.lease is None
    with pytest.raises(RuntimeError):
        held.keep(Inbox())


def test_renewal_after_a_suspend(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """poll(2) does not count while the machine is suspended, so the lease is looked at again when
    it has resumed, and not when the rest of the wait is over."""
    now = 1000.0
    held = membership(etcd, clock=lambda: now, keepalive=KeepAlive(0.2, LIMIT))
    held.acquire(identity(7), NETWORK, {})
    renewed = calls(monkeypatch, "flannel_dp.sources.etcd.client.EtcdClient.keep_alive")
    watched = calls(monkeypatch, "flannel_dp.sources.etcd.watch.KeyWatch.receive")
    with kept(held):
        wait_until(lambda: len(watched) >= 3)
        assert renewed == []
        now += TTL - 60  # all but a minute of the lease's life

        wait_until(lambda: renewed)


def test_the_clock_counts_while_the_machine_is_suspended() -> None:
    """In a time namespace (time_namespaces(7)) that has been suspended for twelve days."""
    script = (
        "import time\n"
        "from flannel_dp.sources.etcd.lease import EtcdLease\n"
        "from flannel_dp.sources.etcd.options import EtcdOptions\n"
        "print(EtcdLease(EtcdOptions(endpoints=('http://127.0.0.1:1',)))._key._clock()"
        " - time.monotonic())\n"
    )
    command = ["unshare", "--time", "--boottime", "1000000", "--fork"]
    done = subprocess.run(
        [*command, sys.executable, "-c", script],
        capture_output=True, text=True, check=True, timeout=LIMIT,
    )  # fmt: skip

    assert float(done.stdout) > 999_000
