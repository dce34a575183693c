"""The keys below a prefix of etcd, read at one moment: network configuration and leases."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from flannel_dp.cluster.claims import lease_of_key_value
from flannel_dp.cluster.documents import readable
from flannel_dp.cluster.lease import BadClaim, Lease, LeaseList
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import Compacted, ConfigError, NotYet, Unavailable
from flannel_dp.sources.base import Snapshot
from flannel_dp.sources.etcd.options import EtcdOptions
from flannel_dp.sources.etcd.position import Position

if TYPE_CHECKING:
    from flannel_dp.sources.etcd.client import EtcdClient

log = logging.getLogger(__name__)

#: A listing may be overtaken by a compaction, but hardly twice.
_LISTINGS = 3


class Delivered:
    """What was delivered: a digest of each key's value and the revision it was created at.

    The digest has 16 bytes, so that a writer of leases cannot find two values of one.

    A renewal of a lease whose MAC another lease has, too, is a change: it shows which node lives.
    """

    def __init__(self) -> None:
        self._marks: dict[str, bytes] = {}
        self._by_mac: dict[int, str] = {}
        self._contested: set[str] = set()

    def see(self, name: str, kv: Any) -> bool:
        """Note a key that was put; False if it says what it said before."""
        mark = hashlib.blake2b(
            kv.value, digest_size=16, salt=kv.create_revision.to_bytes(8, "big")
        ).digest()
        if self._marks.get(name) == mark:
            return name in self._contested
        self._marks[name] = mark
        return True

    def see_macs(self, claim: Lease) -> None:
        """Note the MACs of a lease that is news."""
        for data in (claim.backend_data, claim.backend_v6_data):
            if data is not None and data.vtep_mac:
                other = self._by_mac.setdefault(hash(data.vtep_mac.lower()), claim.name)
                if other != claim.name:
                    self._contested |= {other, claim.name}

    def forget(self, name: str) -> bool:
        """Note that a key is gone; False if it was not there."""
        return self._marks.pop(name, None) is not None


def config_of(options: EtcdOptions, kv: Any | None) -> NetworkConfig:
    key = options.key("config").decode()
    if kv is None:
        raise Unavailable(
            f"etcd {','.join(str(member) for member in options.members)}: there is no key {key}",
            hint=f"check --etcd-prefix {options.prefix}, or write the network's configuration: "
            f'etcdctl put {key} \'{{"Network": "10.5.0.0/16", '
            '"Backend": {"Type": "vxlan"}}\'',
        )
    try:
        return NetworkConfig.from_json(kv.value, origin=f"etcd {key}")
    except ConfigError as error:  # one key of the whole cluster, which is corrected in one place
        raise NotYet(error.message, hint=error.hint) from error


def list_leases(
    client: EtcdClient, options: EtcdOptions, origin: str, known: Delivered | None = None
) -> tuple[Snapshot, Position]:
    """Return all leases as they were at one moment; ``known`` notes each key."""
    started = time.perf_counter()
    for attempt in range(_LISTINGS):
        try:
            claims, at = _claims(client.pages(options.key("subnets", "")), options, known)
            readable(claims, origin)
        except Compacted as error:
            log.info(
                "Listing all leases in etcd again (attempt %(attempt)d): %(reason)s",
                {"attempt": attempt, "reason": error.message},
            )
            continue
        return Snapshot(claims, origin, time.perf_counter() - started, consistent=True), at
    raise Unavailable(
        f"{origin}: it was compacted during each of {_LISTINGS} listings",
        hint="let etcd keep its history for some minutes (--auto-compaction-retention)",
    )


def _claims(
    pages: Iterable[tuple[Iterable[Any], Position]], options: EtcdOptions, known: Delivered | None
) -> tuple[LeaseList, Position]:
    prefix = options.key("subnets", "")
    leases: list[Lease] = []
    bad: list[BadClaim] = []
    at: Position | None = None
    for kvs, position in pages:
        at = at or position
        for kv in kvs:
            name = name_below(kv.key, prefix)
            if known is not None:
                known.see(name, kv)
            claim = claim_of(name, kv)
            if isinstance(claim, Lease):
                leases.append(claim)
                if known is not None:
                    known.see_macs(claim)
            else:
                bad.append(claim)
    assert at is not None  # even an empty list is one page
    return LeaseList(leases, bad), at


def claim_of(name: str, kv: Any) -> Lease | BadClaim:
    return lease_of_key_value(name, kv.value, kv.create_revision, kv.mod_revision)


def name_below(key: bytes, prefix: bytes) -> str:
    return key[len(prefix) :].decode("utf-8", "backslashreplace")
