"""This node's key in etcd: created, updated, and checked for other writers.

``lease`` decides which key that is and when it has to be renewed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from msgspec import Struct, structs
from msgspec.structs import replace

from flannel_dp.cluster.claims import lease_of_key_value
from flannel_dp.cluster.lease import BackendData, Identity, Lease, lease_attrs_json, printable
from flannel_dp.errors import Unavailable
from flannel_dp.sources.etcd.choice import name_of, shown
from flannel_dp.sources.etcd.options import EtcdOptions
from flannel_dp.sources.etcd.owner import (
    AttachedLease,
    Note,
    is_published_by,
    last_part,
    with_former,
)

if TYPE_CHECKING:
    from flannel_dp.sources.etcd.client import EtcdClient

log = logging.getLogger(__name__)

TAKEN_HINT = (
    "pods here keep running, but get no traffic from other nodes: restart this node's agent"
    " for another subnet, or delete the other node's key"
)
#: A value that another program wrote is overwritten once in so many seconds.
_REPAIR = 10.0
#: A node that lives and has lost its key to one with its address writes it again; so often, so
#: many seconds apart, the key is read for that.
_LOOKS, _LOOK_PAUSE = 4, 0.2


def since_boot() -> float:
    """Seconds since the boot, suspend included (CLOCK_BOOTTIME of clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class HeldLease(Struct, frozen=True):
    """What we hold: the key's last part, its subnets, and what we published."""

    name: str
    subnets: Mapping[int, str]
    identity: Identity
    revision: int = 0
    moved: int = 0

    @property
    def lease(self) -> Lease:
        made = self.identity.lease(dict(self.subnets), self.name)
        return structs.replace(made, revision=self.revision, moved=self.moved)

    @property
    def value(self) -> bytes:
        return lease_attrs_json(self.identity.lease(dict(self.subnets)))


class OwnKey:
    """The key that this node holds: what was published in it, by which etcd lease, and until when.

    Its caller holds a lock; ``contested`` alone may be set from any thread.
    """

    def __init__(
        self,
        options: EtcdOptions,
        *,
        ttl: int,
        margin: float,
        clock: Callable[[], float],
        note: Note,
    ) -> None:
        self._options = options
        self._ttl = ttl
        self._margin = margin
        self._clock = clock
        self._note = note
        self.own: HeldLease | None = None
        self.etcd_lease = 0  # the id; 0 for a reservation
        self.contested = False
        self._published: bytes | None = None
        self._renew_at = 0.0
        self._repaired: float | None = None
        #: MACs of nodes that have this node's public address, and had the key before it.
        self._former_macs: frozenset[str] = frozenset()
        self._left = 0  # the revision of the key that was left to another node last

    @property
    def held(self) -> AttachedLease:
        """The lease that this process holds, else the one that the last process held."""
        if self.own is not None:
            return AttachedLease(self.own.name, self.etcd_lease)
        return self._note.read()

    def _hold(self, own: HeldLease, value: bytes, etcd_lease: int) -> None:
        self._note.write(AttachedLease(own.name, etcd_lease))
        self._published = value
        self.etcd_lease = etcd_lease
        self._renew_at = self._clock() + self._ttl - self._margin

    def named(self, name: str) -> bytes:
        """Return the key of a lease."""
        return self._options.key("subnets", name)

    @property
    def seconds_left(self) -> float:
        """Seconds until the lease has to be renewed; infinite for a reservation."""
        return max(0.0, self._renew_at - self._clock()) if self.etcd_lease else math.inf

    def adopt(
        self, client: EtcdClient, kv: Any, subnets: Mapping[int, str], identity: Identity
    ) -> HeldLease | None:
        """Go on with a lease that is there, with what we have to publish now."""
        identity = with_former(identity, kv, subnets)
        own = HeldLease(last_part(kv.key), subnets, identity, kv.create_revision)
        moved = self.secure(client, own, kv)
        return replace(own, moved=moved) if moved else None

    def adopt_by_address(
        self, client: EtcdClient, kv: Any, subnets: Mapping[int, str], identity: Identity
    ) -> HeldLease | None:
        """Go on with a lease that has nothing of this node but its public address, and the MAC of
        another device: this node was reinstalled, or another one has its address, as on Vagrant.

        Raises Unavailable where that one lives: it writes its key again. It is left alone then.
        """
        theirs = _foreign_macs(kv, identity)
        if theirs & self._former_macs:
            raise _same_address(kv, subnets, identity, theirs)
        self._former_macs = theirs
        own = self.adopt(client, kv, subnets, identity)
        for _ in range(_LOOKS if own and theirs else 0):
            time.sleep(_LOOK_PAUSE)
            now, _ = client.get(kv.key)
            again = _foreign_macs(now, identity) if now is not None else frozenset()
            if again:
                self._former_macs |= again
                self._yield(now, subnets, identity, again)
        return own

    def _yield(
        self, kv: Any, subnets: Mapping[int, str], identity: Identity, theirs: frozenset[str]
    ) -> NoReturn:
        """Leave the key to the other node, for the next process, too."""
        self._note.write(AttachedLease())
        error = _same_address(kv, subnets, identity, theirs)
        if self._left != kv.mod_revision:
            self._left = kv.mod_revision
            log.error(
                "Leaving the lease of %(subnet)s in etcd to another node: %(error)s",
                {"subnet": shown(subnets), "error": error},
            )
        raise error

    def create(self, client: EtcdClient, own: HeldLease) -> HeldLease | None:
        """Create the key. Return None when it exists."""
        key, value = self.named(own.name), own.value
        etcd_lease = client.grant(self._ttl)
        absent: tuple[bytes, bytes] | None = None
        if 4 in own.subnets:
            # The same IPv4 subnet with any IPv6 subnet beside it.
            v4 = self.named(name_of({4: own.subnets[4]}))
            absent = v4 + b"&", v4 + b"'"
        revision = client.create(key, value, etcd_lease, absent=absent)
        if not revision:
            # It may be our own request, of which the answer was lost.
            kv, _ = client.get(key)
            if kv is not None and kv.lease == etcd_lease:
                revision = kv.create_revision
        if not revision:
            client.revoke(etcd_lease)
            return None
        self._hold(own, value, etcd_lease)
        return replace(own, revision=revision, moved=revision)

    def secure(self, client: EtcdClient, own: HeldLease, kv: Any) -> int:
        """See to it that the key ``kv`` lives for the whole time from now, and says what it
        has to; returns its revision, 0 when it was changed meanwhile."""
        value, etcd_lease = own.value, kv.lease
        if etcd_lease and client.keep_alive(etcd_lease) != self._ttl:
            etcd_lease = client.grant(self._ttl)
        revision = int(kv.mod_revision)
        if self.contested or (value, etcd_lease) != (kv.value, kv.lease):
            revision = client.replace(kv, value, etcd_lease)
        if revision:
            self.contested = False
            self._hold(own, value, etcd_lease)
        return revision

    def stands(self, kv: Any) -> bool:
        """Return whether the key says what it has to and does not expire soon, and remember its
        revision then."""
        if (
            self.own is None
            or self.contested
            or kv.value != self.own.value
            or kv.lease != self.etcd_lease
            or (kv.lease and self._clock() >= self._renew_at)
        ):
            return False
        self.own = replace(self.own, revision=kv.create_revision, moved=kv.mod_revision)
        self._published = kv.value
        return True

    def check_owner(self, kv: Any) -> None:
        """Raises Unavailable if we should not write to the key."""
        own = self.own
        if own is None or kv.value in (self._published, own.value):
            return
        name, key = shown(own.subnets), printable(kv.key.decode("utf-8", "replace"))
        claim = lease_of_key_value(own.name, kv.value, kv.create_revision)
        if isinstance(claim, Lease) and not is_published_by(kv, own.identity):
            raise Unavailable(
                f"subnet {name}: node {printable(claim.public_ip or claim.public_ipv6)} has taken"
                f" it, {key} is that node's now",
                hint=TAKEN_HINT,
            )
        theirs = _foreign_macs(kv, own.identity)
        if theirs & self._former_macs:
            self._yield(kv, own.subnets, own.identity, theirs)
        now = self._clock()
        if self._repaired is not None and now - self._repaired < _REPAIR:
            raise _contested(name, key, claim, own.identity)
        self._repaired = now
        log.warning(
            "Another program rewrote the key of this node's lease of %(subnet)s; writing it again",
            {"subnet": name},
        )


def _foreign_macs(kv: Any, identity: Identity) -> frozenset[str]:
    """Return the MACs of a key, where it has this node's public address and none of its MACs."""
    claim = lease_of_key_value(last_part(kv.key), kv.value, kv.create_revision)
    macs = {data.vtep_mac.lower() for data in _data_of(claim) if data and data.vtep_mac}
    ours = {mac.lower() for mac in identity.macs.values()}
    if not ours or macs & ours or not is_published_by(kv, identity):
        return frozenset()
    return frozenset(macs)


def _same_address(
    kv: Any, subnets: Mapping[int, str], identity: Identity, theirs: frozenset[str]
) -> Unavailable:
    key = printable(kv.key.decode("utf-8", "replace"))
    addresses, macs = ", ".join(identity.public.values()), ", ".join(sorted(theirs))
    ours = ", ".join(identity.macs.values())
    return Unavailable(
        f"subnet {shown(subnets)}: another node that is alive has {addresses}, too, which is this "
        f"node's public address: {key} has its MAC {printable(macs)} again, after this node wrote "
        f"its own, {ours}",
        hint="name an address or an interface that only this node has, with --iface, --public-ip "
        "or --public-ipv6",
    )


def _contested(name: str, key: str, claim: object, identity: Identity) -> Unavailable:
    """Return the error where two programs write one key with one public address: of one node, or
    of two nodes with that address, as on Vagrant."""
    text = f"subnet {name}: another program keeps writing {key}"
    hint = "stop the other agent of this node (flanneld?)"
    macs = [data.vtep_mac for data in _data_of(claim) if data]
    theirs = [mac for mac in macs if mac and mac.lower() not in identity.macs.values()]
    if identity.macs and theirs:
        text += f" with MAC {printable(theirs[0])}, which is not this node's"
        addresses = ", ".join(identity.public.values())
        hint = (
            f"if another node has {addresses}, too, name an address or interface that only this "
            f"node has with --iface, --public-ip or --public-ipv6; else {hint}"
        )
    return Unavailable(text, hint=hint)


def _data_of(claim: object) -> tuple[BackendData | None, ...]:
    return (claim.backend_data, claim.backend_v6_data) if isinstance(claim, Lease) else ()
