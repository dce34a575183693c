"""EtcdSource against a real etcd: one list, one watch, and nothing lost between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from flannel_dp.cluster.lease import BackendData, Lease
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import AuthFailed, ConfigError, Unavailable
from flannel_dp.sources import FollowedSource
from flannel_dp.sources.etcd import client as etcd_client_module
from flannel_dp.sources.etcd.source import EtcdSource, open_client
from tests.lib.etcd import (
    CONFIG,
    PREFIX,
    EtcdServer,
    attrs,
    follow,
    free_ports,
    subnet_name,
    wait_until,
)


def lease(number: int, revision: int, mac: str = "", moved: int = 0) -> Lease:
    """What ``attrs(number)`` stands for."""
    return Lease(
        subnet=f"10.5.{number}.0/24",
        public_ip=f"192.0.2.{number}",
        backend_type="vxlan",
        backend_data=BackendData(1, mac or f"02:00:00:00:00:{number:02x}"),
        name=subnet_name(number),
        revision=revision,
        moved=moved or revision,
    )


def requests_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of all requests that are made from now on."""
    seen: list[str] = []
    before = etcd_client_module.EtcdClient._calls

    def calls(self: Any, method: str, requests: Sequence[Any], kind: Any, what: str) -> list[Any]:
        seen.extend(method for _ in requests)
        return before(self, method, requests, kind, what)

    monkeypatch.setattr(etcd_client_module.EtcdClient, "_calls", calls)
    return seen


def put_many(etcd: EtcdServer, numbers: Sequence[int]) -> None:
    from flannel_dp.sources.etcd.client import EtcdClient

    client = EtcdClient(etcd.options())
    for number in numbers:
        key = f"{PREFIX}/subnets/10.{6 + number // 256}.{number % 256}.0-24".encode()
        client.create(key, attrs(number % 250).encode(), 0)
    client.close()


def test_leases_are_listed_with_one_request(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        etcd.put(f"subnets/{subnet_name(number)}", attrs(number))
    source: FollowedSource = EtcdSource(etcd.options())
    requests = requests_of(monkeypatch)

    snapshot = source.snapshot()

    assert [claim.name for claim in snapshot.claims.leases] == ["10.5.1.0-24", "10.5.2.0-24"]
    keys = etcd.leases()
    assert snapshot.claims.leases == [
        lease(number, int(keys[subnet_name(number)]["create_revision"])) for number in (1, 2)
    ]
    assert snapshot.claims.bad == []
    assert snapshot.origin == source.origin == f"etcd {etcd.url} {PREFIX}/subnets"
    assert requests == ["KV/Range"]


def test_a_long_list_is_read_in_portions_of_one_revision(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_many(etcd, range(50))
    requests = requests_of(monkeypatch)
    monkeypatch.setattr(etcd_client_module, "_PAGE", 20)
    source = EtcdSource(etcd.options())
    with open_client(etcd.options()) as client:
        pages = client.pages(f"{PREFIX}/subnets/".encode())

        first = next(pages)
        etcd.put("subnets/10.9.9.0-24", attrs(9))  # too late for this list
        rest = list(pages)

    assert [len(kvs) for kvs, _ in [first, *rest]] == [20, 20, 10]
    assert len({position for _, position in [first, *rest]}) == 1
    assert requests == ["KV/Range"] * 3
    assert len(source.snapshot().claims.leases) == 51


def test_a_list_overtaken_by_a_compaction_is_begun_again(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_many(etcd, range(30))
    monkeypatch.setattr(etcd_client_module, "_PAGE", 20)
    source = EtcdSource(etcd.options())
    client_type = type(source._client)
    before = client_type._call
    compactions = iter([True, False, False])

    def call(self: Any, *args: Any) -> Any:
        answer = before(self, *args)
        if next(compactions, False):
            etcd.put("subnets/10.9.9.0-24", attrs(9))
            etcd.compact()
        return answer

    monkeypatch.setattr(client_type, "_call", call)

    assert len(source.snapshot().claims.leases) == 31


def test_no_lease_is_an_empty_cluster(etcd: EtcdServer) -> None:
    assert EtcdSource(etcd.options()).snapshot().claims.leases == []


def test_the_configuration_is_read(etcd: EtcdServer) -> None:
    assert EtcdSource(etcd.options()).network_config() == NetworkConfig.from_json(CONFIG)


def test_a_missing_configuration_says_how_to_write_it(etcd: EtcdServer) -> None:
    with pytest.raises(Unavailable) as caught:
        EtcdSource(etcd.options(prefix="/other/prefix")).network_config()

    assert "/other/prefix/config" in caught.value.message
    assert etcd.url in caught.value.message
    assert "etcdctl put /other/prefix/config '{" in caught.value.hint
    assert "prefix=" in caught.value.hint


def test_a_broken_configuration_names_its_key(etcd: EtcdServer) -> None:
    etcd.put("config", '{"Network": "10.5.0.0/33"}')

    with pytest.raises(ConfigError, match=f"{PREFIX}/config"):
        EtcdSource(etcd.options()).network_config()


def test_changes_follow_the_snapshot(etcd: EtcdServer) -> None:
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    with follow(etcd) as follower:
        follower.until(lambda: follower.snapshots == 1)
        assert [*follower.leases] == [subnet_name(1)]

        etcd.put(f"subnets/{subnet_name(2)}", attrs(2))
        follower.until(lambda: subnet_name(2) in follower.leases)
        revision = int(etcd.leases()[subnet_name(2)]["create_revision"])
        assert follower.leases[subnet_name(2)] == lease(2, revision)

        etcd.put(f"subnets/{subnet_name(2)}", attrs(2, "02:00:00:00:ff:ff"))
        moved = int(etcd.leases()[subnet_name(2)]["mod_revision"])
        expected = lease(2, revision, "02:00:00:00:ff:ff", moved)
        follower.until(lambda: follower.leases[subnet_name(2)] == expected)

        etcd.delete(f"subnets/{subnet_name(1)}")
        follower.until(lambda: [*follower.leases] == [subnet_name(2)])

    assert follower.snapshots == 1
    assert [change.removed for change in follower.changes] == [(), (), (subnet_name(1),)]
    assert follower.errors == []


def test_an_expired_lease_is_removed_and_only_that(etcd: EtcdServer) -> None:
    granted = etcd.run("lease", "grant", "1").split()[1]
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1), f"--lease={granted}")
    etcd.put(f"subnets/{subnet_name(2)}", attrs(2))
    with follow(etcd) as follower:
        follower.until(lambda: len(follower.leases) == 2)

        follower.until(lambda: [*follower.leases] == [subnet_name(2)])

    assert [change.removed for change in follower.changes] == [(subnet_name(1),)]


def test_a_renewal_is_no_news(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """flanneld renews with a new etcd lease and a put of the same value."""
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    with follow(etcd) as follower:
        follower.until(lambda: follower.snapshots == 1)
        requests = requests_of(monkeypatch)
        for _ in range(20):
            granted = etcd.run("lease", "grant", "100").split()[1]
            etcd.put(f"subnets/{subnet_name(1)}", attrs(1), f"--lease={granted}")

        etcd.put(f"subnets/{subnet_name(2)}", attrs(2))
        follower.until(lambda: subnet_name(2) in follower.leases)

    assert [[made.name for made in change.added] for change in follower.changes] == [
        [subnet_name(2)]
    ]
    assert requests == []


def test_a_key_made_anew_is_news_although_it_says_the_same(etcd: EtcdServer) -> None:
    """Its create_revision decides between claims that cannot stand together."""
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    with follow(etcd) as follower:
        follower.until(lambda: follower.snapshots == 1)
        before = follower.leases[subnet_name(1)].revision

        etcd.delete(f"subnets/{subnet_name(1)}")
        etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
        follower.until(lambda: follower.leases.get(subnet_name(1), lease(1, 0)).revision > before)


def test_what_one_transaction_did_is_one_change(etcd: EtcdServer) -> None:
    from flannel_dp.sources.etcd import messages as pb
    from flannel_dp.sources.etcd.client import EtcdClient

    for number in (1, 2):
        etcd.put(f"subnets/{subnet_name(number)}", attrs(number))
    keys = {number: f"{PREFIX}/subnets/{subnet_name(number)}".encode() for number in (1, 2, 3)}
    delete = pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=keys[1]))
    puts = [
        pb.RequestOp(request_put=pb.PutRequest(key=keys[number], value=attrs(9).encode()))
        for number in (2, 3)
    ]
    with follow(etcd) as follower:
        follower.until(lambda: follower.snapshots == 1)
        client = EtcdClient(etcd.options())
        client._call("KV/Txn", pb.TxnRequest(success=[delete, *puts]), pb.TxnResponse, "test")
        client.close()
        follower.until(lambda: follower.changes)

    (change,) = follower.changes
    assert change.removed == (subnet_name(1),)
    assert [made.name for made in change.added] == [subnet_name(2), subnet_name(3)]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("10.5.300.0-24", attrs(1), "bad-key"),
        ("10.5.3.0-24/sub", attrs(1), "bad-key"),
        ("..", attrs(1), "bad-key"),
        ("\x1b[2J", attrs(1), "bad-key"),
        ("10.5.3.0-24", "{", "bad-claim"),
        ("10.5.3.0-24", '{"PublicIP": 5}', "bad-claim"),
    ],
)
def test_a_bad_key_stands_alone(etcd: EtcdServer, name: str, value: str, reason: str) -> None:
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    with follow(etcd) as follower:
        follower.until(lambda: follower.snapshots == 1)

        etcd.put(f"subnets/{name}", value)
        follower.until(lambda: follower.bad)
        ((shown, bad),) = follower.bad.items()
        assert bad.reason == reason
        assert shown.isprintable()
        assert [*follower.leases] == [subnet_name(1)]

        etcd.delete(f"subnets/{name}")
        follower.until(lambda: not follower.bad)
        assert [*follower.leases] == [subnet_name(1)]

    etcd.put(f"subnets/{name}", value)
    claims = EtcdSource(etcd.options()).snapshot().claims
    assert [claim.name for claim in claims.leases] == [subnet_name(1)]
    assert [claim.reason for claim in claims.bad] == [reason]


def test_a_lease_that_turns_bad_is_no_lease_any_more(etcd: EtcdServer) -> None:
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    with follow(etcd) as follower:
        follower.until(lambda: follower.snapshots == 1)

        etcd.put(f"subnets/{subnet_name(1)}", "nonsense")
        follower.until(lambda: [*follower.bad] == [subnet_name(1)] and not follower.leases)
        etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
        follower.until(lambda: [*follower.leases] == [subnet_name(1)] and not follower.bad)


def test_other_keys_below_the_prefix_are_not_seen(etcd: EtcdServer) -> None:
    with follow(etcd) as follower:
        follower.until(lambda: follower.snapshots == 1)
        etcd.put("subnetsX/10.5.9.0-24", attrs(9))
        etcd.put("other", "x")
        etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
        follower.until(lambda: follower.leases)

    assert len(follower.changes) == 1


def test_refresh_lists_again(etcd: EtcdServer) -> None:
    with follow(etcd) as follower:
        follower.until(lambda: follower.snapshots == 1)
        follower.inbox.refresh()
        follower.until(lambda: follower.snapshots == 2)
        etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
        follower.until(lambda: follower.leases)


def test_a_changed_configuration_is_told(etcd: EtcdServer) -> None:
    told: list[Any] = []
    source = EtcdSource(etcd.options(), on_config=told.append)
    read = source.network_config()
    other = CONFIG.replace("10.5", "10.6")
    from tests.lib.follower import Follower

    with Follower(source) as follower:
        follower.until(lambda: follower.snapshots == 1)
        assert told == []

        etcd.put("config", CONFIG)  # the same
        etcd.put("config", other)
        wait_until(lambda: told)
        assert told == [NetworkConfig.from_json(other)] != [read]

        etcd.put("config", "{")
        wait_until(lambda: len(told) == 2)
        assert isinstance(told[1], ConfigError)

        etcd.delete("config")
        wait_until(lambda: len(told) == 3)
        assert isinstance(told[2], Unavailable)

        etcd.put("config", CONFIG)
        wait_until(lambda: len(told) == 4)
        assert told[3] == read
    assert follower.changes == []


def test_a_configuration_that_changed_before_it_was_followed_is_told(etcd: EtcdServer) -> None:
    from tests.lib.follower import Follower

    told: list[Any] = []
    source = EtcdSource(etcd.options(), on_config=told.append)
    source.network_config()
    etcd.put("config", CONFIG.replace("10.5", "10.6"))

    with Follower(source) as follower:
        follower.until(lambda: follower.snapshots == 1)

        assert [str(config.network) for config in told] == ["10.6.0.0/16"]


def test_expirations(etcd: EtcdServer) -> None:
    granted = etcd.run("lease", "grant", "5000").split()[1]
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1), f"--lease={granted}")
    etcd.put(f"subnets/{subnet_name(2)}", attrs(2))

    found = EtcdSource(etcd.options()).expirations()

    assert [*found] == [subnet_name(1)]
    from datetime import UTC, datetime

    left = datetime.fromisoformat(found[subnet_name(1)]) - datetime.now(UTC)
    assert 4980 < left.total_seconds() <= 5000


def test_a_list_of_etcdctl_reads_the_same(etcd: EtcdServer) -> None:
    """``--leases`` of the etcdctl form and this source agree."""
    from flannel_dp.cluster.documents import decode_leases

    for number in (1, 2):
        etcd.put(f"subnets/{subnet_name(number)}", attrs(number))
    etcd.put("subnets/10.5.7.0-24&fd00:7::-64", json.dumps({"PublicIP": "192.0.2.7"}))
    document = etcd.run("get", "--prefix", f"{PREFIX}/subnets", "-w", "json").encode()

    assert EtcdSource(etcd.options()).snapshot().claims == decode_leases(document, origin="etcd")


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from flannel_dp.sources.etcd.options import EtcdOptions

    (port,) = free_ports(1)
    source = EtcdSource(EtcdOptions(endpoints=(f"http://127.0.0.1:{port}",)))

    for request, name in ((source.snapshot, "list"), (source.network_config, "read")):
        with pytest.raises(Unavailable, match="connection refused") as caught:
            request()
        assert f"http://127.0.0.1:{port}: {name} /coreos.com/network/" in caught.value.message
        assert "etcd runs" in caught.value.hint


def test_down_at_start_is_told_once_and_over_when_it_is_up(
    etcds: Callable[..., list[EtcdServer]],
) -> None:
    (etcd,) = etcds()
    etcd.kill()
    with follow(etcd) as follower:
        follower.until(lambda: follower.error is not None)
        etcd.start().await_ready()
        follower.until(lambda: follower.snapshots == 1 and follower.error is None)

    assert isinstance(follower.errors[0], Unavailable)
    assert "connection refused" in str(follower.errors[0])
    assert not any(isinstance(error, AuthFailed) for error in follower.errors)
