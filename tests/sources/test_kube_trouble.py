"""KubeSource.follow: servers that are down or busy, changed credentials, and its end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.errors import AuthFailed, Unavailable
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.sources import FollowedSource
from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.source import KubeSource
from tests.lib.apiserver import OVERLOADED, ApiServer, Certificates, status
from tests.lib.follower import Follower
from tests.lib.kube import (
    Follow,
    Options,
    hold,
    kubeconfig,
    node,
    started,
)
from tests.lib.waiting import LIMIT, NEVER

# ---- trouble


def test_server_down_at_the_start_and_up_later(
    server_certificate: tuple[Path, Path],
    make_server: Callable[..., ApiServer],
    options: Options,
    follow: Follow,
    server: ApiServer,
) -> None:
    server.close()
    follower = follow()
    follower.until(lambda: follower.error)

    assert isinstance(follower.error, Unavailable)
    assert server.url in follower.error.message
    assert "cannot connect" in follower.error.message

    again = make_server(address=("127.0.0.1", server.port), tokens={"secret"})
    again.put(node(1))
    follower.until(lambda: "node-00001" in follower.leases)
    assert follower.error is None


def test_a_restarted_server_with_the_same_nodes_is_no_news(
    make_server: Callable[..., ApiServer], follow: Follow, server: ApiServer
) -> None:
    server.put(node(1))
    follower = started(follow(), server)

    server.close()
    follower.until(lambda: follower.error)
    again = make_server(address=("127.0.0.1", server.port), tokens={"secret"})
    again.nodes, again.version = server.nodes, server.version
    follower.until(lambda: again.watching and follower.error is None)

    assert follower.snapshots == 1
    assert again.count("list") == 0


def test_the_same_trouble_is_told_once(server: ApiServer, follow: Follow) -> None:
    server.put(node(1))
    server.fail("watch", *[status(503, "ServiceUnavailable")] * 5)

    follower = started(follow(), server)
    follower.until(lambda: follower.error is None)

    assert server.count("watch") == 6
    assert server.count("list") == 1
    [told] = follower.errors
    assert "503" in told.message


@pytest.mark.parametrize(
    "answer",
    [status(429, "TooManyRequests", retryAfterSeconds=1), OVERLOADED],
    ids=["status", "plain text"],
)
def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(
    server: ApiServer, follow: Follow, answer: Any
) -> None:
    server.fail("watch", answer)

    started(follow(), server)

    first, second = [seen.at for seen in server.requests if seen.verb == "watch"]
    assert second - first >= 1.0


def test_a_server_that_ends_every_watch_at_once_is_not_stormed(
    server: ApiServer, follow: Follow
) -> None:
    def at_once(handler: Any) -> None:
        handler.start_stream()
        handler.end_stream()

    server.fail("watch", *[at_once] * 4)
    follower = started(follow(retry_seconds=5.0), server)

    times = [seen.at for seen in server.requests if seen.verb == "watch"]
    assert len(times) == 5
    # 0.2, 0.4, 0.8 and 1.6 seconds, less a quarter.
    assert times[-1] - times[0] > 2.2
    assert follower.failure is None


def test_forbidden_names_the_rule(server: ApiServer, follow: Follow) -> None:
    forbidden = status(403, "Forbidden", 'nodes is forbidden: User "u" cannot watch resource')
    server.fail("watch", *[forbidden] * 2)

    follower = follow(retry_seconds=0.5)
    follower.until(lambda: follower.error)

    assert isinstance(follower.error, AuthFailed)
    assert "cannot watch" in follower.error.message
    assert '"watch" of "nodes"' in follower.error.hint
    follower.until(lambda: server.watching and follower.error is None)


# ---- credentials


def test_a_rotated_token_file_is_read_again(
    server: ApiServer, certificates: Certificates, tmp_path: Path, follow: Follow
) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    path = kubeconfig(tmp_path / "k", server.url, certificates.ca, {"tokenFile": "token"})
    server.put(node(1))
    follower = started(follow(KubeOptions(kubeconfig=str(path))), server)

    token.write_text("rotated")
    server.tokens = {"rotated"}
    server.cut()
    server.put(node(2))
    follower.until(lambda: "node-00002" in follower.leases)

    assert follower.errors == []
    assert server.last("watch").authorization == "Bearer rotated"


def test_a_renewed_kubeconfig_ends_the_trouble(
    server: ApiServer, certificates: Certificates, tmp_path: Path, follow: Follow
) -> None:
    path = kubeconfig(tmp_path / "k", server.url, certificates.ca, {"token": "secret"})
    given = KubeOptions(kubeconfig=str(path), retry_seconds=0.1)
    follower = started(follow(given), server)

    server.tokens = {"other"}
    server.cut()
    follower.until(lambda: follower.error)
    assert isinstance(follower.error, AuthFailed)
    assert str(path) in follower.error.hint

    path.write_text("{")
    follower.until(lambda: "not usable as a kubeconfig" in str(follower.error))
    kubeconfig(path, server.url, certificates.ca, {"token": "other"})
    follower.until(lambda: follower.error is None and server.watching)
    assert follower.snapshots == 1


# ---- calls


def test_refresh_delivers_another_snapshot(server: ApiServer, follow: Follow) -> None:
    server.put(node(1))
    follower = started(follow(), server)

    follower.inbox.refresh()
    follower.until(lambda: follower.snapshots == 2)
    server.put(node(2))
    follower.until(lambda: "node-00002" in follower.leases)

    assert follower.changes[-1].removed == ()


@pytest.mark.parametrize("moment", ["watching", "listing", "connecting", "pausing"])
def test_stop_is_heard_at_any_moment(
    server: ApiServer, follow: Follow, options: Options, moment: str
) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    how: dict[str, Any] = {"retry_seconds": NEVER, "connect_timeout": NEVER}
    if moment == "listing":
        server.fail("list", hold)
    elif moment == "pausing":
        server.fail("list", status(429, "TooManyRequests", retryAfterSeconds=20))
    elif moment == "connecting":
        how["api_url"] = f"https://127.0.0.1:{silent.getsockname()[1]}"
    accepted: list[socket.socket] = []
    follower = follow(options(**how))
    reached: dict[str, Callable[[], object]] = {
        "watching": lambda: server.watching,
        "listing": lambda: server.count("list"),
        "connecting": lambda: accepted.append(silent.accept()[0]) or accepted,
        "pausing": lambda: follower.error,
    }
    follower.until(reached[moment])

    follower.stop()
    for each in (silent, *accepted):
        each.close()
    server.cut()


def test_nothing_is_left_open(server: ApiServer, options: Options) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    source = KubeSource(options())
    followed: FollowedSource = source
    assert followed.origin == f"Kubernetes API {server.url}"
    before = descriptors()
    for _ in range(3):
        follower = started(Follower(source).start(), server)
        follower.stop()
        server.send("cut")  # it does not notice by itself that a client has gone
        follower.until(lambda: not server.watching and not server._connections)

    assert descriptors() == before


def test_a_bug_ends_the_following_loudly(
    server: ApiServer, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("flannel_dp.sources.kube.source.list_nodes", broken)
    follower = Follower(KubeSource(options())).start()
    follower.thread.join(LIMIT)

    with pytest.raises(ZeroDivisionError):
        follower.stop()


def test_a_black_holed_connection_is_given_up(
    certificates: Certificates, make_host: Callable[..., Any], tmp_path: Path
) -> None:
    there, here = make_host(), make_host()
    certificate = certificates.issue("far", there.ipv4)
    server = call_in_netns(there.ns, lambda: ApiServer(certificate, address=(there.ipv4, 0)))
    path = kubeconfig(tmp_path / "k", server.url, certificates.ca, {"token": "any"})
    given = KubeOptions(
        kubeconfig=str(path), dead_after=2.0, connect_timeout=0.5, retry_seconds=0.2
    )
    follower = call_in_netns(here.ns, Follower(KubeSource(given)).start)
    try:
        server.put(node(1))
        started(follower, server)

        there.ip("link set eth0 down")
        follower.until(lambda: follower.error)
        assert isinstance(follower.error, Unavailable)
        there.ip("link set eth0 up")
        server.put(node(2))
        follower.until(lambda: "node-00002" in follower.leases)

        assert follower.snapshots == 1
    finally:
        follower.stop()
        server.close()
