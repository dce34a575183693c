"""This node's lease in etcd: taken as flannel takes one, and kept.

The keys, values and the order of preference are those of flannel's pkg/subnet/etcd
(``tryAcquireLease``), except where that loses a lease or a race.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flannel_dp.cluster.claims import lease_of_key_value
from flannel_dp.cluster.lease import Identity, Lease
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import Compacted, ConfigError, SourceError, Unavailable
from flannel_dp.sources.base import Call, Inbox
from flannel_dp.sources.collision import Collides, check_collision, no_collision
from flannel_dp.sources.etcd.choice import Taken, compatible, name_of, shown, subnets_of
from flannel_dp.sources.etcd.options import EtcdOptions
from flannel_dp.sources.etcd.own_key import TAKEN_HINT, HeldLease, OwnKey, since_boot
from flannel_dp.sources.etcd.owner import (
    Note,
    OwnerEvidence,
    evidence,
    last_part,
)
from flannel_dp.sources.etcd.source import open_client
from flannel_dp.sources.etcd.trouble import Trouble

if TYPE_CHECKING:
    from flannel_dp.sources.etcd.client import EtcdClient
    from flannel_dp.sources.etcd.grpc import KeepAlive
    from flannel_dp.sources.etcd.position import Position

log = logging.getLogger(__name__)

TTL = 24 * 3600
"""How long a lease lives that is not renewed, in seconds: flannel's subnetTTL."""

#: Attempts at a subnet that others want as well.
_RACES = 100


class EtcdLease:
    """One node's membership in a cluster.

    ``acquire`` once, then ``keep`` on a thread of its own for as long as the node is a
    member. The lease stays until it expires, so that an agent that is restarted finds it.
    ``ttl`` is in seconds, and so is ``margin``, which flanneld's
    ``--subnet-lease-renew-margin`` gives in minutes: the lease is renewed that long
    before it expires. ``clock`` counts while the machine is suspended, as etcd does, and
    setting the machine's clock has no effect on it.
    ``note`` remembers for the next process which lease this node holds.

    An IPv6-only node has the key ``fd00:10:244:7::-64``, which flannel itself does not
    know; such a cluster is of flannel-dp nodes alone.

    Raises ConfigError for a margin that cannot be, and when the libraries that etcd
    needs are not installed.
    """

    def __init__(
        self,
        options: EtcdOptions,
        *,
        ttl: int = TTL,
        margin: float = 3600.0,
        timeout: float = 5.0,
        keepalive: KeepAlive | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = since_boot,
        note: Note = Note(),  # noqa: B008 (keeps nothing)
    ) -> None:
        if not 0 < margin < ttl:
            raise ConfigError(
                f"--subnet-lease-renew-margin {margin / 60:g}: not between 0 and {ttl / 60:g}",
                hint=f"it is in minutes: use 1 to {max(1, ttl // 60 - 1)}",
            )
        self._options = options
        self._timeout = timeout
        self._keepalive = keepalive
        self._random = rng or random.SystemRandom()
        self._lock = threading.RLock()
        self._key = OwnKey(options, ttl=ttl, margin=margin, clock=clock, note=note)
        self._keeper: Inbox | None = None
        self._client = self._open(lambda: False)

    def _open(self, stopped: Callable[[], bool]) -> EtcdClient:
        return open_client(
            self._options, timeout=self._timeout, keepalive=self._keepalive, stopped=stopped
        )

    @property
    def lease(self) -> Lease | None:
        """Our lease as it was last published, None before ``acquire``."""
        own = self._key.own
        return own.lease if own else None

    # ---- taking a lease

    def former(self, previous: Mapping[int, str]) -> dict[int, str]:
        """Return the public addresses by family in the lease that this node held last, else in that
        of the subnets that it had. Another node may have published either meanwhile.

        Raises Unavailable, AuthFailed.
        """
        names = dict.fromkeys((self._key.held.name, name_of(previous) if previous else ""))
        with self._lock, self._client:
            for name in filter(None, names):
                kv, _ = self._client.get(self._key.named(name))
                lease = lease_of_key_value(name, kv.value, kv.create_revision) if kv else None
                if isinstance(lease, Lease):
                    return lease.public_addresses
        return {}

    def acquire(
        self,
        identity: Identity,
        config: NetworkConfig,
        previous: Mapping[int, str],
        collides: Collides = no_collision,
    ) -> Lease:
        """Take a lease and publish ``identity`` in it; returns it.

        It is this node's former lease, if there is one: the key that this node wrote last and
        no other node since, else the one that has the MAC of this node's device (``identity``)
        and its address or the subnets of ``previous`` (prefixes by family, from subnet.env),
        else the one that has the MAC, else the one that has our public address (the IPv4 one,
        where IPv4 is on). It is updated in place: its key, which is the subnet, and its etcd
        lease stay. One whose subnets are not of ``config`` is deleted. Else the lease
        has, of each family, the subnet of ``previous``, or of the lease that was deleted, if it
        is free and of ``config``, else a free one, chosen by chance. A key without etcd lease
        that has our address is a reservation, and stays one. A lease that has our address and
        another MAC is a reinstalled node's, or that of another node with the address (Vagrant):
        where that one lives, which it shows by writing the key again, it keeps it.

        ``collides`` says what is connected to this node and overlaps subnets. Fresh ones that
        are so are not chosen; nothing is published where the node had them before.

        Raises Unavailable when there is no free subnet, when etcd cannot be reached, and when
        another node that lives has our address; AuthFailed; NotYet for a former lease that
        collides.
        """
        with self._lock, self._client:
            for _ in range(_RACES):
                own = self._take(identity, config, dict(previous), collides)
                if own is not None:
                    self._key.own = own
                    if self._keeper is not None:
                        self._keeper.refresh()
                    log.info(
                        "This node has the lease of %(subnet)s in etcd",
                        {"subnet": shown(own.subnets)},
                    )
                    return own.lease
        raise Unavailable(
            f"etcd {self._options.prefix}: others were faster at {_RACES} free subnets in a row",
            hint="start fewer nodes at once, or configure a larger Network",
        )

    def _take(
        self,
        identity: Identity,
        config: NetworkConfig,
        previous: dict[int, str],
        collides: Collides,
    ) -> HeldLease | None:
        """Try once. Return None when another node was faster."""
        held = self._key.held
        # Usually the node comes back to what it had, and need not read the others' leases.
        if compatible(config, previous):
            kv, _ = self._client.get(self._key.named(name_of(previous)))
            # Without a device, in host-gw, there is no MAC as further evidence.
            enough = OwnerEvidence.DEVICE if identity.macs else OwnerEvidence.ADDRESS
            if kv is not None and evidence(kv, identity, previous, held) >= enough:
                check_collision(previous, collides)
                return self._key.adopt(self._client, kv, previous, identity)
        taken: list[dict[int, str]] = []
        ours: list[tuple[OwnerEvidence, Any]] = []
        for kvs, _ in self._client.pages(self._options.key("subnets", "")):
            for kv in kvs:
                subnets = subnets_of(last_part(kv.key))
                found = evidence(kv, identity, previous, held) if subnets else OwnerEvidence.NONE
                if found:
                    ours.append((found, kv))
                else:
                    taken.append(subnets)
        for found, kv in _former(ours, previous):
            subnets = subnets_of(last_part(kv.key))
            if compatible(config, subnets):
                check_collision(subnets, collides)
                if found is OwnerEvidence.ADDRESS:
                    return self._key.adopt_by_address(self._client, kv, subnets, identity)
                return self._key.adopt(self._client, kv, subnets, identity)
            log.warning(
                "Deleting this node's lease of %(subnet)s in etcd: it is not in the "
                "configured network",
                {"subnet": shown(subnets)},
            )
            self._client.delete(kv)
            previous = subnets | previous  # one of two families may fit
            ours = [one for one in ours if one[1].key != kv.key]
        taken += [subnets_of(last_part(kv.key)) for _, kv in ours]
        others = Taken(taken)
        subnets = previous
        if not (
            compatible(config, previous) and others.free(previous) and not collides(previous, False)
        ):
            # A family that is switched on, or off, leaves the other one its subnet.
            kept = {n: s for n, s in previous.items() if not collides({n: s}, False)}
            subnets = others.choose(config, self._random, kept)
            while met := collides(subnets, True):
                others.add({family: one.prefix for family, one in met.items()})
                subnets = others.choose(config, self._random, kept)
        own = self._key.create(self._client, HeldLease(name_of(subnets), subnets, identity))
        if own is not None and 6 in subnets and not self._is_first(own):
            self._client.revoke(self._key.etcd_lease)
            return None
        return own

    def _is_first(self, own: HeldLease) -> bool:
        """Return whether no other node took a part of our subnets before us. A transaction
        sees keys that begin alike; the IPv6 subnet stands at the end of a key."""
        prefix = self._options.key("subnets", "")
        before = [
            subnets_of(last_part(kv.key))
            for kvs, _ in self._client.pages(prefix)
            for kv in kvs
            if kv.create_revision < own.revision
        ]
        return Taken(before).free(own.subnets)

    # ---- keeping it

    def contest(self) -> None:
        """Have the key written once more, with what it says: another lease has the MAC of this
        node, and its peers go by who still writes. From any thread, while ``keep`` runs."""
        self._key.contested = True
        if self._keeper is not None:
            self._keeper.refresh()

    def keep(self, inbox: Inbox) -> None:
        """Renew the lease, and recreate it when it was lost, until ``inbox`` says to stop.

        Errors go to the inbox and are retried for ever: the subnet stays ours as far as known, and
        nothing that forwards its traffic is touched. Nothing is put into the inbox.
        ``Call.REFRESH`` checks the lease at once. Returns within half a second of
        ``Call.STOP``. Raises RuntimeError before ``acquire``.
        """
        from flannel_dp.sources.etcd.socket import Stopped

        if self._key.own is None:
            raise RuntimeError("keep() before acquire()")
        trouble = Trouble(inbox)
        self._keeper = inbox
        client = self._open(lambda: inbox.stopping)
        call = Call.READY
        with client:
            while call is not Call.STOP and not inbox.stopping:
                try:
                    call = self._guard(client, inbox, trouble)
                except Stopped:
                    return
                except SourceError as error:
                    if not isinstance(error, Compacted):  # the key is read again anyway
                        trouble.report(error)
                    call = trouble.pause()

    def _guard(self, client: EtcdClient, inbox: Inbox, trouble: Trouble) -> Call:
        with self._lock:
            assert self._key.own is not None
            key = self._key.named(self._key.own.name)
            at = self._ensure(client)
        with contextlib.closing(client.watch([(key, b"")], at.revision)) as watch:
            trouble.began()
            client.close()
            while True:
                left = min(self._key.seconds_left, watch.seconds_left, trouble.seconds_left)
                call = inbox.wait(left, (watch.fileno(),))
                if call in (Call.STOP, Call.REFRESH):
                    return call
                changed = any(response.events for response in watch.receive())
                trouble.check()
                if changed or not self._key.seconds_left:
                    with self._lock:
                        self._ensure(client)
                    client.close()
                    trouble.useful()

    def _ensure(self, client: EtcdClient) -> Position:
        """See to it that the key is there, says what it has to and does not expire soon.

        Raises Unavailable when another node has the subnet.
        """
        for _ in range(_RACES):
            own = self._key.own
            assert own is not None
            kv, at = client.get(self._key.named(own.name))
            if kv is None:
                if made := self._key.create(client, own):
                    self._key.own = made
                    log.warning(
                        "This node's lease of %(subnet)s had gone from etcd; created it again",
                        {"subnet": shown(own.subnets)},
                    )
                elif client.get(self._key.named(own.name))[0] is None:
                    raise Unavailable(
                        f"subnet {shown(own.subnets)}: another node has taken a part of it",
                        hint=TAKEN_HINT,
                    )
                continue
            self._key.check_owner(kv)
            if self._key.stands(kv):
                return at
            self._key.secure(client, own, kv)
        own = self._key.own
        raise Unavailable(
            f"etcd {self._key.named(own.name).decode() if own else ''}: it is written to"
            " all the time",
            hint="find out who else writes to it, with etcdctl watch",
        )


def _former(
    ours: list[tuple[OwnerEvidence, Any]], previous: Mapping[int, str]
) -> list[tuple[OwnerEvidence, Any]]:
    """Return the leases that are this node's by the strongest evidence there is, with that, the one
    to go on with first. A MAC that several leases have is no evidence."""
    if sum(found is OwnerEvidence.MAC for found, _ in ours) > 1:
        ours = [(found, kv) for found, kv in ours if found is not OwnerEvidence.MAC]
    if not ours:
        return []
    best = max(found for found, _ in ours)
    of_best = [one for one in ours if one[0] is best]
    return sorted(of_best, key=lambda one: subnets_of(last_part(one[1].key)) != dict(previous))
