"""This node's part in a cluster: one of a file, of etcd or of Kubernetes; and how it joins.

A membership knows where the network's configuration is and where the leases are. ``join``
takes a subnet and publishes this node's lease; ``keep`` keeps it published. The program
that writes a file of leases joins the nodes in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from flannel_dp.cluster.lease import Identity
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import SourceError
from flannel_dp.sources import Call, FollowedSource, Inbox
from flannel_dp.sources.collision import Collides, no_collision

if TYPE_CHECKING:
    from flannel_dp.sources.etcd.options import EtcdOptions

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

    @property
    def moved(self) -> bool:
        """Whether the cluster gave this node other subnets since ``join``: it has to join again."""
        ...

    def on_config_change(self, changed: Callable[[], None]) -> None:
        """Call ``changed()``, on any thread, when ``config`` would answer otherwise by now, and
        when the node ``moved``."""
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
        """Do nothing: the program that writes the file decides."""

    @property
    def moved(self) -> bool:
        return False

    def on_config_change(self, changed: Callable[[], None]) -> None:
        """Do nothing: a configuration file is read again on SIGHUP."""


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

    @property
    def moved(self) -> bool:
        return False

    def on_config_change(self, changed: Callable[[], None]) -> None:
        self._changed = changed
