"""Leases from etcd v3, where flannel keeps them: listed once, then watched.

The keys are flannel's (pkg/subnet/etcd): ``PREFIX/config`` is the network's
configuration, ``PREFIX/subnets/KEY`` one node's lease. Needs h2 and protobuf, the extra
``[etcd]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import ConfigError, require
from flannel_dp.later import Later
from flannel_dp.sources.base import Inbox, Snapshot
from flannel_dp.sources.etcd.listing import config_of, list_leases, name_below
from flannel_dp.sources.etcd.options import EtcdOptions
from flannel_dp.sources.etcd.position import Position
from flannel_dp.sources.history import History

if TYPE_CHECKING:
    from flannel_dp.sources.etcd import following, grpc
    from flannel_dp.sources.etcd.client import EtcdClient
else:
    following = Later("flannel_dp.sources.etcd.following")
    grpc = Later("flannel_dp.sources.etcd.grpc")

__all__ = ["EtcdOptions", "EtcdSource", "open_client"]


def open_client(
    options: EtcdOptions,
    *,
    timeout: float = 5.0,
    keepalive: grpc.KeepAlive | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> EtcdClient:
    """Return an EtcdClient; nothing is asked of the cluster yet.

    Raises ConfigError when the libraries that it needs are not installed.
    """
    try:
        from flannel_dp.sources.etcd.client import EtcdClient
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"etcd: the Python module {error.name} is not installed",
            hint="pip install 'flannel-dp[etcd]'",
        ) from error
    return EtcdClient(options, timeout=timeout, keepalive=keepalive, stopped=stopped)


class EtcdSource:
    """The leases below a prefix of an etcd cluster: ``EtcdOptions``, or its URLs alone.

    ``on_config`` is called on the follower's thread when the network's configuration
    was changed or deleted while it is followed, with the new one or with what is wrong
    with it. ``timeout`` is that of one request in seconds, over all endpoints. The file
    ``note`` keeps for the next process how far the cluster was.

    Raises ConfigError when the libraries that it needs are not installed. Nothing is
    asked of etcd yet.
    """

    def __init__(
        self,
        options: EtcdOptions | str | Iterable[str],
        *,
        timeout: float = 5.0,
        keepalive: grpc.KeepAlive | None = None,
        on_config: following.OnConfig | None = None,
        note: str = "",
    ) -> None:
        if not isinstance(options, EtcdOptions):
            given = isinstance(options, Iterable)
            require(given, "options", options, "EtcdOptions, or the URLs of an etcd cluster")
            endpoints = (options,) if isinstance(options, str) else tuple(options)
            options = EtcdOptions(endpoints=endpoints)
        self._options = options
        self._timeout = timeout
        self._keepalive = keepalive
        self._on_config = on_config
        self._config: bytes | None = None
        self._history = History(Position, note)
        self._client = self._open(lambda: False)

    @property
    def origin(self) -> str:
        """The name of this source in messages."""
        members = ",".join(str(member) for member in self._options.members)
        return f"etcd {members} {self._options.key('subnets').decode()}"

    def network_config(self) -> NetworkConfig:
        """Read the configuration, like ``etcdctl get PREFIX/config``.

        Raises ConfigError when it cannot be used, Unavailable when there is none or etcd
        cannot be reached, AuthFailed when it does not let us in.
        """
        with self._client:
            kv, _ = self._client.get(self._options.key("config"))
        self._config = kv.value if kv is not None else None
        return config_of(self._options, kv)

    def snapshot(self) -> Snapshot:
        """List all leases, like ``etcdctl get --prefix PREFIX/subnets/``.

        Raises Unavailable and AuthFailed.
        """
        with self._client:
            return list_leases(self._client, self._options, self.origin)[0]

    def expirations(self) -> dict[str, str]:
        """Return when each lease ends unless it is renewed (RFC 3339), by the lease's name.

        Reservations, which do not end, are left out. It takes a request for each lease.
        Raises Unavailable and AuthFailed.
        """
        prefix = self._options.key("subnets", "")
        held: dict[str, int] = {}
        with self._client:
            for kvs, _ in self._client.pages(prefix):
                held |= {name_below(kv.key, prefix): kv.lease for kv in kvs if kv.lease}
            left = self._client.times_to_live(set(held.values()))
        now = datetime.now(UTC).replace(microsecond=0)
        return {
            name: f"{now + timedelta(seconds=left[lease]):%Y-%m-%dT%H:%M:%SZ}"
            for name, lease in held.items()
            if lease in left
        }

    def follow(self, inbox: Inbox) -> None:
        """Deliver a snapshot, then all that changes, until ``inbox`` says to stop; see
        FollowedSource.

        A connection that broke is made again and the watch resumed where it was; a new
        snapshot comes when etcd does not know any more what happened since (compaction,
        or a restored backup). A lease that was only renewed is no news. A snapshot of
        another cluster than before, or of an earlier revision, says so (``afresh``).
        """
        from flannel_dp.sources.etcd.following import KeyFollower

        with self._open(lambda: inbox.stopping) as client:
            follower = KeyFollower(
                client, self._options, self.origin, inbox, self._on_config, self._history
            )
            follower.config = self._config
            try:
                follower.run()
            finally:
                self._history.write()

    def _open(self, stopped: Callable[[], bool]) -> EtcdClient:
        return open_client(
            self._options, timeout=self._timeout, keepalive=self._keepalive, stopped=stopped
        )
