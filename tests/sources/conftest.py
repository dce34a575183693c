"""Fixtures for the tests of sources: etcd servers and API servers that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lib.apiserver import Certificates
from tests.lib.etcd import CONFIG, EtcdServer, free_ports
from tests.lib.grpc_server import serve_fixture
from tests.lib.kube import (
    certificates_fixture,
    follow_fixture,
    make_server_fixture,
    options_fixture,
    server_certificate_fixture,
    server_fixture,
)

__all__ = [  # fixtures for the tests of this folder
    "certificates_fixture",
    "follow_fixture",
    "make_server_fixture",
    "options_fixture",
    "serve_fixture",
    "server_certificate_fixture",
    "server_fixture",
]


@pytest.fixture(name="etcds")
def etcds_fixture(tmp_path: Path) -> Iterator[Callable[..., list[EtcdServer]]]:
    """``etcds(3)``: a cluster that answers; every member has the same options."""
    made: list[EtcdServer] = []

    def make(count: int = 1, **how: Any) -> list[EtcdServer]:
        ports = free_ports(2 * count)
        cluster = [
            EtcdServer(tmp_path, ports[2 * i], ports[2 * i + 1], name=f"m{len(made) + i}", **how)
            for i in range(count)
        ]
        made.extend(cluster)
        for server in cluster:
            server.cluster = ",".join(member.peer for member in cluster)
            server.start()
        for server in cluster:
            server.await_ready()
        return cluster

    yield make
    for server in made:
        server.kill()


@pytest.fixture(name="etcd")
def etcd_fixture(etcds: Callable[..., list[EtcdServer]]) -> EtcdServer:
    """One etcd server with flannel's configuration in it."""
    (server,) = etcds()
    server.put("config", CONFIG)
    return server


@pytest.fixture(name="pki", scope="session")
def pki_fixture(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A certificate authority."""
    return Certificates(tmp_path_factory.mktemp("etcd-pki"))
