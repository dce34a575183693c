"""An API server behind the proxy that the environment names."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.source import KubeSource
from tests.lib.apiserver import ApiServer, Certificates
from tests.lib.follower import Follower
from tests.lib.kube import (
    beating,
    kubeconfig,
    node,
)
from tests.lib.waiting import LIMIT

Options = Callable[..., KubeOptions]


class Proxy:
    """Answers CONNECT (RFC 9110 section 9.3.6), one client at a time; ``asked`` are the targets.
    With a ``certificate`` it is asked over TLS."""

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*certificate)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: list[str] = []
        self._threads = [threading.Thread(target=self._run)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(LIMIT)
            assert not thread.is_alive()
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            if self._context is not None:
                client = self._context.wrap_socket(client, server_side=True)
            head = b""
            while b"\r\n\r\n" not in head and (data := client.recv(4096)):
                head += data
            target = head.split()[1].decode()
            self.asked.append(target)
            host, _, port = target.rpartition(":")
            server = socket.create_connection((host, int(port)))
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            for one, other in ((client, server), (server, client)):
                self._threads.append(threading.Thread(target=self._pass_on, args=(one, other)))
                self._threads[-1].start()

    @staticmethod
    def _pass_on(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for ended in (one, other):
            with suppress(OSError):
                ended.shutdown(socket.SHUT_RDWR)
        one.close()


@pytest.fixture(name="proxy")
def proxy_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    made = Proxy()
    yield made
    made.close()


def names(options: KubeOptions) -> list[str]:
    source = KubeSource(options)
    try:
        return [lease.name for lease in source.snapshot().claims.leases]
    finally:
        source.close()


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_requests_go_by_the_proxy(
    server: ApiServer,
    options: Options,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    server.put(node(1))
    monkeypatch.setenv(variable, f"http://{proxy.address}")

    assert names(options()) == ["node-00001"]
    assert proxy.asked == [f"127.0.0.1:{server.port}"]


@pytest.mark.parametrize(
    "environment",
    [{"HTTP_PROXY": "http://{}"}, {"HTTPS_PROXY": "http://{}", "NO_PROXY": "127.0.0.1"}, {}],
)
def test_and_do_not_where_none_is_named_for_the_server(
    server: ApiServer,
    options: Options,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
) -> None:
    server.put(node(1))
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(proxy.address))

    assert names(options()) == ["node-00001"]
    assert proxy.asked == []


def test_the_proxy_of_the_kubeconfig_comes_before_that_of_the_environment(
    server: ApiServer,
    certificates: Certificates,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    server.put(node(1))
    monkeypatch.setenv("HTTPS_PROXY", "http://192.0.2.1:1")
    where = {"proxy-url": f"http://{proxy.address}"}
    path = kubeconfig(tmp_path / "k", server.url, certificates.ca, {"token": "secret"}, **where)

    assert names(KubeOptions(kubeconfig=str(path))) == ["node-00001"]
    assert proxy.asked == [f"127.0.0.1:{server.port}"]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_watch_goes_by_the_proxy(
    server: ApiServer,
    certificates: Certificates,
    server_certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    scheme: str,
) -> None:
    """Whose socket is not the one that answers come from, where it is asked over TLS."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    proxy = Proxy(server_certificate if scheme == "https" else None)
    where = {"proxy-url": f"{scheme}://{proxy.address}"}
    path = kubeconfig(tmp_path / "k", server.url, certificates.ca, {"token": "secret"}, **where)
    server.put(node(1))
    try:
        with Follower(KubeSource(KubeOptions(kubeconfig=str(path)))) as follower:
            follower.until(lambda: follower.leases and server.watching)
            for beat in range(3):
                server.put(beating(node(1), beat))
            server.put(node(1, public_ip="192.0.2.99"))
            follower.until(lambda: follower.changes)
            assert follower.leases["node-00001"].public_ip == "192.0.2.99"
            assert follower.errors == []
        follower.source.close()
    finally:
        server.cut()
        proxy.close()
    assert {*proxy.asked} == {f"127.0.0.1:{server.port}"}
