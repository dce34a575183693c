"""A node's part in a Kubernetes cluster: its subnets are given, its lease is its annotations."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable

from flannel_dp.backoff import Backoff
from flannel_dp.cluster.lease import BadClaim, Identity, Lease
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import ConfigError, SourceError
from flannel_dp.sources import Call, Change, FollowedSource, Inbox, Snapshot
from flannel_dp.sources.collision import Collides, check_collision, no_collision
from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.own import OtherSubnets, OwnNode
from flannel_dp.sources.kube.source import KubeSource

log = logging.getLogger(__name__)

#: Restorations in a row that show another program to write the same annotations.
_CONTESTED = 3


class KubeMembership:
    """Nodes of Kubernetes: it assigns the subnets, and this node's lease is the
    annotations of its node object.

    The file ``note``.store says for the next process how far the API server was; with "" there
    is none. See ``Membership``."""

    def __init__(self, options: KubeOptions, net_conf: str, note: str = "") -> None:
        self._node, self._net_conf = OwnNode(options), net_conf
        self._lock = threading.Lock()  # a second join may meet keep
        seen = f"{note}.store" if note else ""
        self._source = KubeSource(options, on_news=self._check_own_lease, note=seen)
        self._joined: tuple[str, Identity, dict[int, str]] | None = None
        # What ``keep`` has to do, also after a restart of it: to say that pods may come, and to
        # restore annotations.
        self._ready = self._differs = False
        self._restores = Restores()
        self._moved = False
        self._changed: Callable[[], None] = lambda: None
        self._alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._alarm)

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
            identity = _with_macs_of(identity, self._node.lease())
            self._node.publish(identity, subnets)
            self._joined = self._node.node_name(), identity, subnets
        return subnets

    # ---- keeping it

    def keep(self, inbox: Inbox) -> None:
        """Say, once, that pods may come; and restore annotations of ours that another program
        removed or changed, as when the node object was deleted and recreated, and say it again."""
        pause, owed, failed = Backoff(first=1.0, most=60.0), self._ready, False
        while True:
            seconds = self._restores.seconds_left(self._differs)
            if failed or owed:
                seconds = pause.next()
            call = inbox.wait(seconds, fds=[self._alarm])
            if call is Call.STOP:
                return
            if call is Call.READY:
                os.eventfd_read(self._alarm)
                self._differs = True
            if call is Call.REFRESH:
                self._ready = owed = True
            try:
                with self._lock:
                    if self._differs and self._restores.allowed:
                        owed = (self._restore() and self._ready) or owed
                        self._differs = False
                    if owed and self._node.mark_ready():
                        log.info("This node is ready for pods")
                owed = failed = False
                pause.reset()
                self._report(inbox)
            except OtherSubnets as error:
                log.warning("%(why)s: joining again with them", {"why": error.message})
                self._moved, self._differs = True, False
                self._changed()
            except (SourceError, ConfigError) as error:  # a kubeconfig or annotation that broke
                inbox.trouble(SourceError(error.message, hint=error.hint))
                failed = True

    def _restore(self) -> bool:
        """Write annotations that differ; return whether there were any."""
        assert self._joined is not None
        name, identity, subnets = self._joined
        written = self._node.publish(identity, subnets, fresh=True)
        if written:
            self._restores.add()
            log.warning(
                "Annotations of node %(node)s were missing or changed; they are "
                "published again: %(annotations)s",
                {"node": name, "annotations": ", ".join(written)},
            )
        return bool(written)

    def _report(self, inbox: Inbox) -> None:
        if not self._restores.contested:
            inbox.healthy()
            return
        name = self._joined[0] if self._joined else ""
        error = SourceError(
            f"node {name}: another program changes its flannel annotations again and again",
            hint="run one flannel on this node, and give no other node its name (NODE_NAME)",
        )
        inbox.trouble(error)

    def _check_own_lease(self, news: Snapshot | Change) -> None:
        """Have the annotations compared where this node's lease is gone, or another one than was
        published. On the source's thread."""
        if self._joined is None:
            return
        name = self._joined[0]
        claims = news.claims.leases if isinstance(news, Snapshot) else news.added
        found = next((lease for lease in claims if lease.name == name), None)
        if isinstance(news, Change) and found is None:
            gone = name in news.removed or any(claim.name == name for claim in news.bad)
            differs = gone
        else:
            differs = found != self._node.published
        if differs:
            os.eventfd_write(self._alarm, 1)

    def contest(self) -> None:
        """Nodes have no revision that says so."""

    @property
    def moved(self) -> bool:
        return self._moved

    def on_config_change(self, changed: Callable[[], None]) -> None:
        """Call it when the node has other podCIDRs; the configuration is read on SIGHUP."""
        self._changed = changed


class Restores:
    """How often annotations were restored, so that two programs that disagree do not overwrite each
    other as fast as they can: after a second, then ever later, once a minute at most."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        first: float = 1.0,
        calm: float = 300.0,
    ) -> None:
        self._clock, self._calm = clock, calm
        self._pause = Backoff(first=first, most=60.0)
        self._last = self._next = clock() - calm
        self._count = 0

    @property
    def allowed(self) -> bool:
        """Whether the next one may be made now."""
        return self._clock() >= self._next

    @property
    def contested(self) -> bool:
        """Whether there were several without a calm period between them."""
        return self._count >= _CONTESTED and not self._is_calm

    @property
    def _is_calm(self) -> bool:
        return self._clock() >= self._last + self._calm

    def add(self) -> None:
        """Note one."""
        if self._is_calm:
            self._count = 0
            self._pause.reset()
        self._count += 1
        self._last = self._clock()
        self._next = self._last + self._pause.next()

    def seconds_left(self, differs: bool) -> float | None:
        """Return when to look again: for what ``differs`` the time until it may be written, else
        until what was contested is calm; None for never."""
        now = self._clock()
        if differs:
            return max(0.0, self._next - now)
        return max(0.0, self._last + self._calm - now) if self.contested else None


def _with_macs_of(identity: Identity, lease: Lease | BadClaim | None) -> Identity:
    """Return the identity with the MACs that the others know this node by already."""
    if not isinstance(lease, Lease):
        return identity
    data = {4: lease.backend_data, 6: lease.backend_v6_data}
    macs = {
        family: found.vtep_mac if (found := data[family]) and found.vtep_mac else mac
        for family, mac in identity.macs.items()
    }
    return Identity(identity.public, macs, identity.backend, identity.vni)
