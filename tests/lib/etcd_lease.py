"""Leases of this node in etcd: networks, identities, and the lease held and kept."""

from __future__ import annotations

import json
import pkgutil
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flannel_dp.cluster.lease import Identity
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import SourceError
from flannel_dp.sources import Inbox
from flannel_dp.sources.etcd.lease import EtcdLease
from tests.lib.etcd import CONFIG, PATIENT, EtcdServer
from tests.lib.waiting import LIMIT

NETWORK = NetworkConfig.from_json(CONFIG)
SMALL = NetworkConfig.from_json(
    '{"Network": "10.5.0.0/24", "SubnetLen": 28, "Backend": {"Type": "vxlan"}}'
)
DUAL = NetworkConfig.from_json(
    '{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48",'
    ' "Backend": {"Type": "vxlan"}}'
)
V6 = NetworkConfig.from_json(
    '{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48",'
    ' "Backend": {"Type": "vxlan"}}'
)
#: The smallest dual-stack network: collisions in one family and not the other are likely.
TINY_DUAL = NetworkConfig.from_json(
    '{"Network": "10.5.0.0/28", "SubnetLen": 30, "EnableIPv6": true,'
    ' "IPv6Network": "fd00:5::/60", "IPv6SubnetLen": 62, "Backend": {"Type": "vxlan"}}'
)


def identity(number: int, **how: Any) -> Identity:
    fields: dict[str, Any] = {
        "public": {4: f"192.0.2.{number}"},
        "macs": {4: f"02:00:00:00:00:{number:02x}"},
        "vni": 1,
    }
    return Identity(**(fields | how))


def dual(number: int) -> Identity:
    return identity(
        number,
        public={4: f"192.0.2.{number}", 6: f"2001:db8::{number:x}"},
        macs={4: f"02:00:00:00:00:{number:02x}", 6: f"02:00:00:00:06:{number:02x}"},
    )


def membership(etcd: EtcdServer, **how: Any) -> EtcdLease:
    return EtcdLease(
        etcd.options(), **({"timeout": LIMIT, "keepalive": PATIENT, "rng": random.Random(1)} | how)
    )


class Keeper:
    """Runs ``keep`` and collects the errors that it reports."""

    def __init__(self, held: EtcdLease) -> None:
        self.inbox = Inbox()
        self._thread = threading.Thread(target=held.keep, args=(self.inbox,), name="keep")

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.inbox.stop()
        self._thread.join(LIMIT)
        alive = self._thread.is_alive()
        self.inbox.close()
        assert not alive

    @property
    def error(self) -> SourceError | None:
        return self.inbox.take().error


@contextmanager
def kept(held: EtcdLease) -> Iterator[Keeper]:
    with Keeper(held) as keeper:
        yield keeper


def granted_ttl(etcd: EtcdServer, key: dict[str, Any]) -> int:
    document = json.loads(etcd.run("lease", "timetolive", f"{key['lease']:x}", "-w", "json"))
    return int(document["granted-ttl"])


def calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """The arguments of all calls of a method from now on."""
    seen: list[tuple[Any, ...]] = []
    method = pkgutil.resolve_name(name)

    def called(self: Any, *args: Any) -> Any:
        seen.append(args)
        return method(self, *args)

    monkeypatch.setattr(name, called)
    return seen
