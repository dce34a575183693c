"""EtcdSource when etcd is killed, hangs, forgets, refuses, or vanishes behind a firewall."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.errors import AuthFailed, Unavailable
from flannel_dp.sources import Call
from flannel_dp.sources.etcd.grpc import KeepAlive
from flannel_dp.sources.etcd.source import EtcdSource, open_client
from flannel_dp.sources.etcd.trouble import Trouble
from tests.lib.apiserver import Certificates
from tests.lib.etcd import (
    CONFIG,
    PREFIX,
    QUICK,
    EtcdServer,
    attrs,
    follow,
    free_ports,
    subnet_name,
    wait_until,
)
from tests.lib.follower import Follower
from tests.lib.waiting import NEVER

SECRET = "s3cr3t-pass-w0rd"


def put(etcd: EtcdServer, number: int, mac: str = "") -> None:
    etcd.put(f"subnets/{subnet_name(number)}", attrs(number, mac))


def settle(follower: Follower, *numbers: int) -> None:
    """Wait until the follower has exactly these leases and no trouble."""
    names = {subnet_name(number) for number in numbers}
    follower.until(
        lambda: follower.snapshots and follower.leases.keys() == names and not follower.error
    )


def test_killed_and_restarted(etcd: EtcdServer) -> None:
    put(etcd, 1)
    with follow(etcd) as follower:
        settle(follower, 1)
        etcd.kill()
        follower.until(lambda: isinstance(follower.error, Unavailable))
        assert [*follower.leases] == [subnet_name(1)]

        etcd.start().await_ready()
        put(etcd, 2)
        settle(follower, 1, 2)

    assert follower.snapshots == 1  # the watch went on where it was


def test_trouble_is_told_once_per_state(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    wait = Trouble.pause

    def pause(trouble: Trouble) -> Call:
        began = time.monotonic()
        call = wait(trouble)
        pauses.append(time.monotonic() - began)
        return call

    with follow(etcd) as follower:
        settle(follower)
        etcd.kill()
        follower.until(lambda: "refused" in str(follower.error))
        told = len(follower.errors)
        monkeypatch.setattr(Trouble, "pause", pause)
        follower.until(lambda: len(pauses) == 3)

        assert len(follower.errors) == told
        assert min(pauses) >= 0.05  # no busy loop


def test_compacted_while_away(etcd: EtcdServer) -> None:
    """What changed, vanished or came meanwhile is in the new snapshot."""
    for number in (1, 2, 3):
        put(etcd, number)
    with follow(etcd) as follower:
        settle(follower, 1, 2, 3)
        with Away(etcd):
            put(etcd, 1, "02:00:00:00:ff:ff")
            etcd.delete(f"subnets/{subnet_name(2)}")
            put(etcd, 4)
            etcd.compact()
        follower.until(lambda: follower.snapshots == 2)
        settle(follower, 1, 3, 4)
        data = follower.leases[subnet_name(1)].backend_data
        assert data is not None
        assert data.vtep_mac == "02:00:00:00:ff:ff"
        put(etcd, 5)
        settle(follower, 1, 3, 4, 5)
    assert follower.changes[-1].removed == ()


class Away:
    """The watch is cut, and not begun again while this is open."""

    def __init__(self, etcd: EtcdServer) -> None:
        from flannel_dp.sources.etcd.client import EtcdClient

        self._type: Any = EtcdClient
        self._before = EtcdClient.watch
        self._open = threading.Event()
        self._etcd = etcd

    def __enter__(self) -> Away:
        def watch(client: Any, *args: Any) -> Any:
            while not self._open.wait(0.05):
                if client._stopped():
                    break
            return self._before(client, *args)

        self._type.watch = watch
        self._etcd.kill()
        self._etcd.start().await_ready()
        return self

    def __exit__(self, *exc: object) -> None:
        self._type.watch = self._before
        self._open.set()


def test_a_compaction_does_not_disturb_a_watch_that_is_up_to_date(etcd: EtcdServer) -> None:
    with follow(etcd) as follower:
        settle(follower)
        put(etcd, 1)
        settle(follower, 1)  # so the watch has begun
        for number in range(2, 10):
            put(etcd, number)
            etcd.compact()
        settle(follower, *range(1, 10))
    assert follower.snapshots == 1


def test_another_history_is_listed_again(etcds: Callable[..., list[EtcdServer]]) -> None:
    """A cluster restored from a backup, or made anew, has lower revisions than we know; a
    watch from a revision to come would wait for years."""
    (etcd,) = etcds()
    for number in range(1, 9):
        put(etcd, number)
    with follow(etcd) as follower:
        settle(follower, *range(1, 9))
        etcd.kill()
        etcd.name = "restored"
        etcd.cluster = ""
        etcd.start().await_ready()
        put(etcd, 20)
        settle(follower, 20)
    assert follower.snapshots == 2


def test_a_hanging_server_is_noticed(etcd: EtcdServer) -> None:
    """It takes connections and acknowledges data, but says nothing."""
    with follow(etcd, keepalive=QUICK) as follower:
        settle(follower)
        put(etcd, 2)
        settle(follower, 2)  # so it watches
        etcd.signal(signal.SIGSTOP)
        follower.until(lambda: follower.error is not None)

        assert "no sign of life" in str(follower.errors[0])
        etcd.signal(signal.SIGCONT)
        put(etcd, 1)
        settle(follower, 1, 2)


def test_a_black_hole_is_noticed(lab: Any, tmp_path: Path) -> None:
    """A firewall drops everything; nobody resets the connection."""
    node, there = lab.host(), lab.host()
    etcd = EtcdServer(tmp_path, 2379, 2380, address=there.ipv4, netns=there.ns)
    try:
        etcd.start().await_ready()
        put(etcd, 1)
        source = EtcdSource(etcd.options(), timeout=1.0, keepalive=QUICK)
        with Follower(source, netns=node.ns) as follower:
            settle(follower, 1)
            put(etcd, 3)
            settle(follower, 1, 3)  # so it watches
            there.exec("nft", "add table inet hole")
            there.exec(
                "nft",
                "add chain inet hole input { type filter hook input priority 0; policy accept; }",
            )
            there.exec("nft", "add rule inet hole input ip saddr", node.ipv4, "drop")
            follower.until(lambda: follower.error is not None)
            follower.until(lambda: "does not answer" in str(follower.error))
            put(etcd, 2)
            assert len(follower.leases) == 2

            there.exec("nft", "delete table inet hole")
            settle(follower, 1, 2, 3)
        assert follower.snapshots == 1
    finally:
        etcd.kill()


def test_stopping_does_not_wait_for_a_black_hole(lab: Any) -> None:
    node = lab.host()
    node.exec("ip", "route", "add", "203.0.113.0/24", "dev", "eth0")
    node.ip("neigh add 203.0.113.1 lladdr 02:00:00:00:00:99 dev eth0 nud permanent")
    options = EtcdServer(Path(), 2379, 0, address="203.0.113.1").options()
    with Follower(EtcdSource(options, timeout=NEVER), netns=node.ns) as follower:
        follower.until(lambda: "203.0.113.1" in node.exec("ss", "-tnH", "state", "syn-sent"))
    assert follower.errors == []  # it was still trying


def test_the_default_keepalive_finds_a_black_hole_within_thirty_seconds() -> None:
    keepalive = KeepAlive()
    assert keepalive.interval + keepalive.timeout <= 30
    assert keepalive.interval >= 5  # etcd's --grpc-keepalive-min-time


# ---- several members


def test_failover(etcds: Callable[..., list[EtcdServer]]) -> None:
    members = etcds(3)
    put(members[0], 1)
    endpoints = (members[0].url, members[1].url)
    source = EtcdSource(members[0].options(endpoints=endpoints), timeout=3, keepalive=QUICK)
    with Follower(source) as follower:
        settle(follower, 1)
        for dead, alive in ((0, 1), (1, 0)):
            members[dead].kill()
            put_when_possible(members[alive], 2 + dead)
            follower.until(
                lambda dead=dead: subnet_name(2 + dead) in follower.leases  # type: ignore[misc]
            )
            members[dead].start().await_ready()
        settle(follower, 1, 2, 3)
    assert follower.snapshots == 1


def put_when_possible(etcd: EtcdServer, number: int) -> None:
    key = f"{PREFIX}/subnets/{subnet_name(number)}"
    wait_until(lambda: etcd._etcdctl("put", key, attrs(number)).returncode == 0)


def test_a_dead_member_costs_others_nothing(etcds: Callable[..., list[EtcdServer]]) -> None:
    """The last good one is asked first."""
    (etcd,) = etcds()
    etcd.put("config", CONFIG)
    dead = EtcdServer(Path(), 1, 0)
    source = EtcdSource(etcd.options(endpoints=(dead.url, etcd.url)))

    assert source.network_config() == source.network_config()
    assert source._client._good == etcd.options().members[0]


def test_every_member_is_named_when_none_answers() -> None:
    source = EtcdSource(
        EtcdServer(Path(), 1, 0).options(endpoints=("http://127.0.0.1:1", "http://127.0.0.1:2"))
    )
    with pytest.raises(Unavailable) as caught:
        source.snapshot()

    assert "http://127.0.0.1:1: connection refused" in caught.value.message
    assert "http://127.0.0.1:2: connection refused" in caught.value.message
    assert "list /coreos.com/network/subnets/" in caught.value.message


def test_no_leader_ends_the_watch(etcds: Callable[..., list[EtcdServer]]) -> None:
    """A member that has lost the others would show an old state for ever."""
    members = etcds(3)
    put(members[0], 1)
    with follow(members[0]) as follower:
        settle(follower, 1)
        for member in members[1:]:
            member.kill()
        follower.until(lambda: follower.error is not None)
        assert isinstance(follower.error, Unavailable)
        for member in members[1:]:
            member.start()
        put_when_possible(members[0], 2)
        settle(follower, 1, 2)


# ---- TLS


def issue(pki: Certificates, etcds: Callable[..., list[EtcdServer]], **how: Any) -> EtcdServer:
    """A server with TLS that wants client certificates."""
    client, key = pki.issue("root")
    flags = [f"--cacert={pki.ca}", f"--cert={client}", f"--key={key}"]
    server = pki.issue("etcd", "127.0.0.1")
    (etcd,) = etcds(tls=server, ca=pki.ca, ctl=flags, **how)
    return etcd


def files(pki: Certificates, name: str = "node", days: int = 2) -> dict[str, str]:
    certificate, key = pki.issue(name, days=days)
    return {"certfile": str(certificate), "keyfile": str(key), "cafile": str(pki.ca)}


def test_tls(pki: Certificates, etcds: Callable[..., list[EtcdServer]]) -> None:
    etcd = issue(pki, etcds)
    put(etcd, 1)
    with follow(etcd, **files(pki)) as follower:
        settle(follower, 1)
        put(etcd, 2)
        settle(follower, 1, 2)


@pytest.mark.parametrize(
    ("change", "said", "hint"),
    [
        ({"certfile": "", "keyfile": ""}, "does not accept our certificate", "certfile="),
        ({"days": -1}, "does not accept our certificate", "expired"),
        ({"cafile": ""}, "its certificate is not accepted", "cafile="),
        ({"certfile": "/nowhere.pem"}, "/nowhere.pem", "this user may read"),
        ({"keyfile": "OTHER"}, "cannot be used", "belong together"),
        ({"cafile": "KEY"}, "cafile '", "PEM"),
    ],
)
def test_certificates_that_do_not_do(
    pki: Certificates,
    etcds: Callable[..., list[EtcdServer]],
    change: dict[str, Any],
    said: str,
    hint: str,
) -> None:
    etcd = issue(pki, etcds)
    given = files(pki, days=change.pop("days", 2))
    replaced = {"OTHER": str(pki.issue("other")[1]), "KEY": given["keyfile"]}
    given |= {key: replaced.get(value, value) for key, value in change.items()}
    source = EtcdSource(etcd.options(**given))

    for request in (source.snapshot, source.network_config):
        with pytest.raises(AuthFailed) as caught:
            request()

        assert said in caught.value.message
        assert etcd.url in caught.value.message
        assert hint in caught.value.hint


def test_a_certificate_of_another_server(pki: Certificates, tmp_path: Path) -> None:
    etcd = EtcdServer(tmp_path, *free_ports(2), tls=pki.issue("etcd6", "::1"))
    try:
        etcd.start()
        wait_until(lambda: listens(etcd.client_port))
        source = EtcdSource(etcd.options(cafile=str(pki.ca)))

        with pytest.raises(AuthFailed, match=r"not valid for .*127\.0\.0\.1"):
            source.snapshot()
    finally:
        etcd.kill()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_the_wrong_scheme(pki: Certificates, etcds: Callable[..., list[EtcdServer]]) -> None:
    etcd = issue(pki, etcds)
    (plain,) = etcds()
    wrong = etcd.url.replace("https", "http"), plain.url.replace("http", "https")
    for url in wrong:
        with pytest.raises(Unavailable) as caught:
            EtcdSource(etcd.options(endpoints=(url,), cafile=str(pki.ca))).snapshot()

        assert url in caught.value.message
        assert "https://" in caught.value.hint or "etcd runs" in caught.value.hint


def test_renewed_certificates_are_taken_up(
    pki: Certificates, etcds: Callable[..., list[EtcdServer]]
) -> None:
    etcd = issue(pki, etcds)
    given = files(pki, "renewed", days=-1)
    with follow(etcd, **given) as follower:
        follower.until(lambda: isinstance(follower.error, AuthFailed))
        pki.issue("renewed")  # writes the same files
        settle(follower)


# ---- authentication


@pytest.fixture(autouse=True)
def no_secrets(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test of this file may log a password."""
    caplog.set_level(logging.DEBUG)
    yield
    assert SECRET not in caplog.text


def test_a_user_logs_in(etcd: EtcdServer) -> None:
    etcd.enable_auth(SECRET)
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    with follow(etcd, username="node", password=SECRET) as follower:
        settle(follower, 1)
        put(etcd, 2)
        settle(follower, 1, 2)


def test_a_login_where_none_is_needed(etcd: EtcdServer) -> None:
    put(etcd, 1)
    with follow(etcd, username="node", password=SECRET) as follower:
        settle(follower, 1)


@pytest.mark.parametrize(
    ("who", "hint"),
    [
        ({}, "username="),
        ({"username": "node", "password": "wrong" + SECRET}, "password="),
        ({"username": "nobody", "password": SECRET}, "username="),
        ({"username": "other", "password": SECRET}, "grant-permission ROLE"),
    ],
)
def test_not_let_in(etcd: EtcdServer, who: dict[str, str], hint: str) -> None:
    etcd.run("user", "add", f"other:{SECRET}")
    etcd.enable_auth(SECRET)
    source = EtcdSource(etcd.options(**who))

    for request in (source.snapshot, source.network_config):
        with pytest.raises(AuthFailed) as caught:
            request()

        assert hint in caught.value.hint
        assert etcd.url in caught.value.message
        assert SECRET not in repr(caught.value) + str(caught.value) + repr(source._options)

    with follow(etcd, **who) as follower:
        follower.until(lambda: isinstance(follower.error, AuthFailed))
        assert follower.snapshots == 0


def test_permission_for_leases_but_not_to_watch_them_anew(etcd: EtcdServer) -> None:
    """Taken away while the watch runs, and given back."""
    etcd.enable_auth(SECRET)
    with follow(etcd, username="node", password=SECRET) as follower:
        settle(follower)
        etcd.run("user", "revoke-role", "node", "nodes")
        etcd.kill()
        etcd.start().await_ready()
        follower.until(lambda: isinstance(follower.error, AuthFailed))
        assert "watch" in str(follower.error)

        etcd.run("user", "grant-role", "node", "nodes")
        put(etcd, 1)
        settle(follower, 1)


def test_authentication_switched_on_under_way(etcd: EtcdServer) -> None:
    put(etcd, 1)
    with follow(etcd, username="node", password=SECRET) as follower:
        settle(follower, 1)
        etcd.enable_auth(SECRET)
        put(etcd, 2)
        settle(follower, 1, 2)
        follower.inbox.refresh()
        follower.until(lambda: follower.snapshots == 2)
        etcd.kill()
        etcd.start().await_ready()
        put(etcd, 3)
        settle(follower, 1, 2, 3)


def test_a_token_that_expired_is_replaced(
    etcds: Callable[..., list[EtcdServer]], caplog: pytest.LogCaptureFixture
) -> None:
    (etcd,) = etcds(flags=["--auth-token-ttl=1"])
    etcd.put("config", CONFIG)
    etcd.enable_auth(SECRET)
    client = open_client(etcd.options(username="node", password=SECRET))
    client.get(b"/coreos.com/network/config")
    first = client._login.token
    assert first
    client._login.token = first + "x"  # as good as expired, and no need to wait

    assert client.get(b"/coreos.com/network/config")[0] is not None
    assert client._login.token not in (first, None)
    client._login.token = first + "x"
    client.watch([(b"/coreos.com/network/config", b"")], 1).close()
    client.close()
    assert first not in caplog.text
    assert client._login.token not in caplog.text


def test_a_rotated_password(etcd: EtcdServer, tmp_path: Path) -> None:
    """The file is read again at each login."""
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n")
    etcd.enable_auth(SECRET)
    with follow(etcd, username="node", password_file=str(file)) as follower:
        settle(follower)
        etcd.run("user", "passwd", "node", "--interactive=false", stdin=f"new{SECRET}\n")
        etcd.kill()
        etcd.start().await_ready()
        follower.until(lambda: isinstance(follower.error, AuthFailed))

        file.write_text(f"new{SECRET}\n")
        put(etcd, 1)
        settle(follower, 1)


def test_a_password_file_that_is_missing(etcd: EtcdServer) -> None:
    etcd.enable_auth(SECRET)
    options = etcd.options(username="node", password_file="/nowhere/password")

    with pytest.raises(AuthFailed, match="/nowhere/password") as caught:
        EtcdSource(options).snapshot()
    assert etcd.url in caught.value.message
