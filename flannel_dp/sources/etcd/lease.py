"""This node's lease in etcd: taken as flannel takes one, and kept.

The keys, values and the order of preference are those of flannel's pkg/subnet/etcd
(``tryAcquireLease``), except where that loses a lease or a race.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct, structs
from msgspec.structs import replace

from flannel_dp.cluster.claims import lease_of_key_value
from flannel_dp.cluster.lease import BackendData, Identity, Lease, lease_attrs_json, printable
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import Compacted, ConfigError, SourceError, Unavailable
from flannel_dp.sources.base import Call, Inbox
from flannel_dp.sources.collision import Collides, check_collision, no_collision
from flannel_dp.sources.etcd.choice import Taken, compatible, name_of, shown, subnets_of
from flannel_dp.sources.etcd.options import EtcdOptions
from flannel_dp.sources.etcd.owner import (
    AttachedLease,
    Note,
    OwnerEvidence,
    evidence,
    is_published_by,
    last_part,
    with_former,
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
_TAKEN_HINT = (
    "pods here keep running, but get no traffic from other nodes: restart this node's agent"
    " for another subnet, or delete the other node's key"
)
#: A value that another program wrote is overwritten once in so many seconds.
_REPAIR = 10.0


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
        self._ttl = ttl
        self._margin = margin
        self._timeout = timeout
        self._keepalive = keepalive
        self._random = rng or random.SystemRandom()
        self._clock = clock
        self._note = note
        self._lock = threading.RLock()
        self._own: HeldLease | None = None
        self._published: bytes | None = None
        self._etcd_lease = 0  # the id; 0 for a reservation
        self._renew_at = 0.0
        self._repaired: float | None = None
        self._keeper: Inbox | None = None
        self._contested = False
        self._client = self._open(lambda: False)

    def _open(self, stopped: Callable[[], bool]) -> EtcdClient:
        return open_client(
            self._options, timeout=self._timeout, keepalive=self._keepalive, stopped=stopped
        )

    @property
    def lease(self) -> Lease | None:
        """Our lease as it was last published, None before ``acquire``."""
        own = self._own
        return own.lease if own else None

    # ---- taking a lease

    def former(self, previous: Mapping[int, str]) -> dict[int, str]:
        """Return the public addresses by family in the lease that this node held last, else in that
        of the subnets that it had. Another node may have published either meanwhile.

        Raises Unavailable, AuthFailed.
        """
        names = dict.fromkeys((self._held.name, name_of(previous) if previous else ""))
        with self._lock, self._client:
            for name in filter(None, names):
                kv, _ = self._client.get(self._key(name))
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
        that has our address is a reservation, and stays one.

        ``collides`` says what is connected to this node and overlaps subnets. Fresh ones that
        are so are not chosen; nothing is published where the node had them before.

        Raises Unavailable when there is no free subnet or etcd cannot be reached,
        AuthFailed, and NotYet for a former lease that collides.
        """
        with self._lock, self._client:
            for _ in range(_RACES):
                own = self._take(identity, config, dict(previous), collides)
                if own is not None:
                    self._own = own
                    if self._keeper is not None:
                        self._keeper.refresh()
                    log.info("etcd=acquired subnet=%s", shown(own.subnets))
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
        held = self._held
        # Usually the node comes back to what it had, and need not read the others' leases.
        if compatible(config, previous):
            kv, _ = self._client.get(self._key(name_of(previous)))
            # Without a device, in host-gw, there is no MAC as further evidence.
            enough = OwnerEvidence.DEVICE if identity.macs else OwnerEvidence.ADDRESS
            if kv is not None and evidence(kv, identity, previous, held) >= enough:
                check_collision(previous, collides)
                return self._adopt(kv, previous, identity)
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
        for kv in _former(ours, previous):
            subnets = subnets_of(last_part(kv.key))
            if compatible(config, subnets):
                check_collision(subnets, collides)
                return self._adopt(kv, subnets, identity)
            log.warning(
                "etcd=delete subnet=%s: this node's lease is not in the configured network",
                shown(subnets),
            )
            self._client.delete(kv)
            previous = subnets | previous  # one of two families may fit
            ours = [(found, other) for found, other in ours if other.key != kv.key]
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
        own = self._create(self._client, HeldLease(name_of(subnets), subnets, identity))
        if own is not None and 6 in subnets and not self._is_first(own):
            self._client.revoke(self._etcd_lease)
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

    def _adopt(self, kv: Any, subnets: Mapping[int, str], identity: Identity) -> HeldLease | None:
        """Go on with a lease that is there, with what we have to publish now."""
        identity = with_former(identity, kv, subnets)
        own = HeldLease(last_part(kv.key), subnets, identity, kv.create_revision)
        moved = self._secure(self._client, own, kv)
        return replace(own, moved=moved) if moved else None

    def _create(self, client: EtcdClient, own: HeldLease) -> HeldLease | None:
        """Create the key. Return None when it exists."""
        key, value = self._key(own.name), own.value
        etcd_lease = client.grant(self._ttl)
        absent: tuple[bytes, bytes] | None = None
        if 4 in own.subnets:
            # The same IPv4 subnet with any IPv6 subnet beside it.
            v4 = self._key(name_of({4: own.subnets[4]}))
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

    def _secure(self, client: EtcdClient, own: HeldLease, kv: Any) -> int:
        """See to it that the key ``kv`` lives for the whole time from now, and says what it
        has to; returns its revision, 0 when it was changed meanwhile."""
        value, etcd_lease = own.value, kv.lease
        if etcd_lease and client.keep_alive(etcd_lease) != self._ttl:
            etcd_lease = client.grant(self._ttl)
        revision = int(kv.mod_revision)
        if self._contested or (value, etcd_lease) != (kv.value, kv.lease):
            revision = client.replace(kv, value, etcd_lease)
        if revision:
            self._contested = False
            self._hold(own, value, etcd_lease)
        return revision

    @property
    def _held(self) -> AttachedLease:
        """The lease that this process holds, else the one that the last process held."""
        if self._own is not None:
            return AttachedLease(self._own.name, self._etcd_lease)
        return self._note.read()

    def _hold(self, own: HeldLease, value: bytes, etcd_lease: int) -> None:
        self._note.write(AttachedLease(own.name, etcd_lease))
        self._published = value
        self._etcd_lease = etcd_lease
        self._renew_at = self._clock() + self._ttl - self._margin

    def _key(self, name: str) -> bytes:
        return self._options.key("subnets", name)

    # ---- keeping it

    def contest(self) -> None:
        """Have the key written once more, with what it says: another lease has the MAC of this
        node, and its peers go by who still writes. From any thread, while ``keep`` runs."""
        self._contested = True
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

        if self._own is None:
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
            assert self._own is not None
            key = self._key(self._own.name)
            at = self._ensure(client)
        with contextlib.closing(client.watch([(key, b"")], at.revision + 1)) as watch:
            trouble.began()
            client.close()
            while True:
                left = min(self._seconds_left, watch.seconds_left, trouble.seconds_left)
                call = inbox.wait(left, (watch.fileno(),))
                if call in (Call.STOP, Call.REFRESH):
                    return call
                changed = any(response.events for response in watch.receive())
                trouble.check()
                if changed or not self._seconds_left:
                    with self._lock:
                        self._ensure(client)
                    client.close()
                    trouble.useful()

    @property
    def _seconds_left(self) -> float:
        """Seconds until the lease has to be renewed; infinite for a reservation."""
        return max(0.0, self._renew_at - self._clock()) if self._etcd_lease else math.inf

    def _ensure(self, client: EtcdClient) -> Position:
        """See to it that the key is there, says what it has to and does not expire soon.

        Raises Unavailable when another node has the subnet.
        """
        for _ in range(_RACES):
            assert self._own is not None
            kv, at = client.get(self._key(self._own.name))
            if kv is None:
                if made := self._create(client, self._own):
                    self._own = made
                    log.warning("etcd=created-again subnet=%s", shown(self._own.subnets))
                elif client.get(self._key(self._own.name))[0] is None:
                    raise Unavailable(
                        f"subnet {shown(self._own.subnets)}: another node has taken a part of it",
                        hint=_TAKEN_HINT,
                    )
                continue
            self._check_owner(kv)
            if (
                not self._contested
                and kv.value == self._own.value
                and kv.lease == self._etcd_lease
                and (not kv.lease or self._clock() < self._renew_at)
            ):
                self._own = replace(self._own, revision=kv.create_revision, moved=kv.mod_revision)
                self._published = kv.value
                return at
            self._secure(client, self._own, kv)
        raise Unavailable(
            f"etcd {self._key(self._own.name).decode() if self._own else ''}: it is written to"
            " all the time",
            hint="find out who else writes to it, with etcdctl watch",
        )

    def _check_owner(self, kv: Any) -> None:
        """Raises Unavailable if we should not write to the key."""
        own = self._own
        if own is None or kv.value in (self._published, own.value):
            return
        name, key = shown(own.subnets), printable(kv.key.decode("utf-8", "replace"))
        claim = lease_of_key_value(own.name, kv.value, kv.create_revision)
        if isinstance(claim, Lease) and not is_published_by(kv, own.identity):
            raise Unavailable(
                f"subnet {name}: node {printable(claim.public_ip or claim.public_ipv6)} has taken"
                f" it, {key} is that node's now",
                hint=_TAKEN_HINT,
            )
        now = self._clock()
        if self._repaired is not None and now - self._repaired < _REPAIR:
            raise _contested(name, key, claim, own.identity)
        self._repaired = now
        log.warning("etcd=repair subnet=%s: another program rewrote its key", name)


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


def _former(ours: list[tuple[OwnerEvidence, Any]], previous: Mapping[int, str]) -> list[Any]:
    """Return the leases that are this node's by the strongest evidence there is, the one to go on
    with first. A MAC that several leases have is no evidence."""
    if sum(found is OwnerEvidence.MAC for found, _ in ours) > 1:
        ours = [(found, kv) for found, kv in ours if found is not OwnerEvidence.MAC]
    if not ours:
        return []
    best = max(found for found, _ in ours)
    of_best = [kv for found, kv in ours if found is best]
    return sorted(of_best, key=lambda kv: subnets_of(last_part(kv.key)) != dict(previous))
