"""This node's part in a cluster: one of a file, of etcd or of Kubernetes; and how it joins.

A membership knows where the network's configuration is and where the leases are. ``join``
takes a subnet and publishes this node's lease; ``keep`` keeps it published. The program
that writes a file of leases joins the nodes in it.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from flannel_dp.backoff import Backoff
from flannel_dp.cluster.lease import BadClaim, Identity, Lease
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import ConfigError, SourceError
from flannel_dp.sources import Call, Change, FollowedSource, Inbox, Snapshot
from flannel_dp.sources.collision import Collides, check_collision, no_collision

if TYPE_CHECKING:
    from flannel_dp.sources.etcd.options import EtcdOptions
    from flannel_dp.sources.kube.config import KubeOptions

log = logging.getLogger(__name__)


class Membership(Protocol):
    """A node's part in one cluster. All methods raise SourceError and ConfigError."""

    @property
    def source(self) -> FollowedSource:
        """Where the leases of all nodes come from."""
        ...

    @property
    def published(self) -> dict[int, str]:
        """The public addresses, by family, that ``join`` published; {} before it, and where
        another program publishes this node's lease."""
        ...

    def config(self) -> NetworkConfig:
        """Return the network's configuration, as it is now."""
        ...

    def expirations(self) -> dict[str, str] | None:
        """Return when each lease ends unless it is renewed (RFC 3339), by its name; None where
        leases do not end."""
        ...

    def public(self) -> dict[int, str]:
        """Return the addresses, by family, that the cluster wants this node to be known by; they
        need not be on it."""
        ...

    def chosen(self) -> dict[int, str]:
        """Return the addresses, by family, that the cluster chooses the interface by."""
        ...

    def name(self) -> str:
        """Return the name of this node's lease where the cluster gives it one, "" else."""
        ...

    def former(self, previous: dict[int, str]) -> dict[int, str]:
        """Return the public addresses, by family, that this node's lease was published with last,
        as far as the cluster knows; ``previous`` are the subnets that the node had."""
        ...

    def join(
        self,
        identity: Identity,
        config: NetworkConfig,
        previous: dict[int, str],
        collides: Collides = no_collision,
    ) -> dict[int, str]:
        """Take a subnet, of ``previous`` where that can be, publish the lease, and return
        the subnets by family. ``collides`` says which would overlap what is connected to this
        node: those are not published."""
        ...

    def keep(self, inbox: Inbox) -> None:
        """Keep the lease until ``inbox`` says to stop; ``Call.REFRESH`` says that all peers
        are programmed. Errors go into the inbox."""
        ...

    def contest(self) -> None:
        """Another lease has the MAC of this node: show the peers that this node lives. For any
        thread, while ``keep`` runs."""
        ...

    def on_config_change(self, changed: Callable[[], None]) -> None:
        """Call ``changed()``, on any thread, when ``config`` would answer otherwise by now."""
        ...


class FileMembership:
    """Leases in a file, if one was named, and the configuration in another."""

    def __init__(self, source: FollowedSource | None, net_conf: str) -> None:
        self._source, self._net_conf = source, net_conf

    @property
    def source(self) -> FollowedSource:
        if self._source is None:
            raise SourceError("no source of leases was named", hint="name a file of leases")
        return self._source

    @property
    def published(self) -> dict[int, str]:
        return {}

    def config(self) -> NetworkConfig:
        return NetworkConfig.from_file(self._net_conf)

    def expirations(self) -> dict[str, str] | None:
        return None

    def public(self) -> dict[int, str]:
        return {}

    def chosen(self) -> dict[int, str]:
        return {}

    def name(self) -> str:
        return ""

    def former(self, previous: dict[int, str]) -> dict[int, str]:
        return {}

    def join(
        self,
        identity: Identity,
        config: NetworkConfig,
        previous: dict[int, str],
        collides: Collides = no_collision,
    ) -> dict[int, str]:
        return {}

    def keep(self, inbox: Inbox) -> None:
        inbox.healthy()
        while inbox.wait() is not Call.STOP:
            pass

    def contest(self) -> None:
        """Whoever writes the file knows."""

    def on_config_change(self, changed: Callable[[], None]) -> None:
        """Do nothing: a configuration file is read again on SIGHUP."""


class KubeMembership:
    """Nodes of Kubernetes: subnets are given by it, the lease is the own node's annotations.

    The file ``note``.store says for the next process how far the API server was; with "" there
    is none."""

    def __init__(self, options: KubeOptions, net_conf: str, note: str = "") -> None:
        from flannel_dp.sources.kube.own import OwnNode
        from flannel_dp.sources.kube.source import KubeSource

        self._node, self._net_conf = OwnNode(options), net_conf
        self._lock = threading.Lock()  # a second join may meet keep
        seen = f"{note}.store" if note else ""
        self._source = KubeSource(options, on_news=self._check_own_lease, note=seen)
        self._joined: tuple[str, Identity, dict[int, str]] | None = None
        self._ready = self._lost = False  # what ``keep`` has to do, also after a restart of it
        self._gone = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._gone)

    @property
    def source(self) -> FollowedSource:
        return self._source

    @property
    def published(self) -> dict[int, str]:
        return dict(self._joined[1].public) if self._joined else {}

    def config(self) -> NetworkConfig:
        return NetworkConfig.from_file(self._net_conf)

    def expirations(self) -> dict[str, str] | None:
        return None

    def public(self) -> dict[int, str]:
        return self._node.public_overrides() if self.name() else {}

    def chosen(self) -> dict[int, str]:
        return self._node.node_public() if self.name() else {}

    def name(self) -> str:
        """Return "" where the node's name is not known, as in a command run by hand; ``join``
        needs it, and raises ConfigError."""
        try:
            return self._node.node_name()
        except ConfigError:
            return ""

    def former(self, previous: dict[int, str]) -> dict[int, str]:
        lease = self._node.lease() if self.name() else None
        return lease.public_addresses if isinstance(lease, Lease) else {}

    def join(
        self,
        identity: Identity,
        config: NetworkConfig,
        previous: dict[int, str],
        collides: Collides = no_collision,
    ) -> dict[int, str]:
        with self._lock:
            subnets = self._node.own_subnets(config)
            check_collision(subnets, collides)
            identity = with_macs_of(identity, self._node.lease())
            self._node.publish(identity, subnets)
            self._joined = self._node.node_name(), identity, subnets
        return subnets

    def keep(self, inbox: Inbox) -> None:
        """Say, once, that pods may come; and publish again, and say it again, when the
        lease is gone, as after the node object was deleted and recreated."""
        pause, due = Backoff(first=1.0, most=60.0), self._ready or self._lost
        while True:
            call = inbox.wait(pause.next() if due else None, fds=[self._gone])
            if call is Call.STOP:
                return
            if call is Call.READY:
                os.eventfd_read(self._gone)
                self._lost = True
            self._ready = self._ready or call is Call.REFRESH
            try:
                with self._lock:
                    if self._lost:
                        self._publish_again()
                    if self._ready and self._node.mark_ready():
                        log.info("node is ready for pods")
                inbox.healthy()
                due = self._lost = False
                pause.reset()
            except (SourceError, ConfigError) as error:  # a kubeconfig or annotation that broke
                inbox.trouble(SourceError(error.message, hint=error.hint))
                due = True

    def _publish_again(self) -> None:
        assert self._joined is not None
        name, identity, subnets = self._joined
        if self._node.publish(identity, subnets):
            log.warning("node=%s annotations were missing; they are published again", name)

    def _check_own_lease(self, news: Snapshot | Change) -> None:
        """Check whether this node's lease is gone. One that differs stays: two agents with the name
        of one node would overwrite each other for ever."""
        if self._joined is None:
            return
        name = self._joined[0]
        if isinstance(news, Snapshot):
            gone = all(lease.name != name for lease in news.claims.leases)
        else:
            gone = name in news.removed or any(claim.name == name for claim in news.bad)
        if gone:
            os.eventfd_write(self._gone, 1)

    def contest(self) -> None:
        """Nodes have no revision that says so."""

    def on_config_change(self, changed: Callable[[], None]) -> None:
        """As with files."""


class EtcdMembership:
    """flannel's keys in etcd: the lease is one of them, and expires unless it is renewed,
    ``margin`` seconds before that. For the next process of this node, the file ``note``.lease says
    which one it holds, and ``note``.store how far the cluster was; with "" there are none."""

    def __init__(self, options: EtcdOptions, margin: float, note: str = "") -> None:
        from flannel_dp.sources.etcd.lease import EtcdLease
        from flannel_dp.sources.etcd.owner import Note
        from flannel_dp.sources.etcd.source import EtcdSource

        self._changed: Callable[[], None] = lambda: None
        held, seen = (f"{note}.lease", f"{note}.store") if note else ("", "")
        self._etcd = EtcdSource(options, on_config=lambda config: self._changed(), note=seen)
        self._lease = EtcdLease(options, margin=margin, note=Note(held))
        self._published: dict[int, str] = {}

    @property
    def source(self) -> FollowedSource:
        return self._etcd

    @property
    def published(self) -> dict[int, str]:
        return dict(self._published)

    def config(self) -> NetworkConfig:
        return self._etcd.network_config()

    def expirations(self) -> dict[str, str] | None:
        return self._etcd.expirations()

    def public(self) -> dict[int, str]:
        return {}

    def chosen(self) -> dict[int, str]:
        return {}

    def name(self) -> str:
        return ""

    def former(self, previous: dict[int, str]) -> dict[int, str]:
        return self._lease.former(previous)

    def join(
        self,
        identity: Identity,
        config: NetworkConfig,
        previous: dict[int, str],
        collides: Collides = no_collision,
    ) -> dict[int, str]:
        lease = self._lease.acquire(identity, config, previous, collides)
        self._published = identity.public
        found = {4: lease.subnet, 6: lease.ipv6_subnet}
        return {family: subnet for family, subnet in found.items() if subnet}

    def keep(self, inbox: Inbox) -> None:
        self._lease.keep(inbox)

    def contest(self) -> None:
        self._lease.contest()

    def on_config_change(self, changed: Callable[[], None]) -> None:
        self._changed = changed


def with_macs_of(identity: Identity, lease: Lease | BadClaim | None) -> Identity:
    """Return the identity with the MACs that the others know this node by already."""
    if not isinstance(lease, Lease):
        return identity
    data = {4: lease.backend_data, 6: lease.backend_v6_data}
    macs = {
        family: found.vtep_mac if (found := data[family]) and found.vtep_mac else mac
        for family, mac in identity.macs.items()
    }
    return Identity(identity.public, macs, identity.backend, identity.vni)
