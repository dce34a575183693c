"""Leases from etcd v3, where flannel keeps them: listed once, then watched.

The keys are flannel's (pkg/subnet/etcd): ``PREFIX/config`` is the network's
configuration, ``PREFIX/subnets/KEY`` one node's lease. Needs h2 and protobuf, the extra
``[etcd]``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from flannel_dp.cluster.claims import lease_of_key_value
from flannel_dp.cluster.documents import readable
from flannel_dp.cluster.lease import BadClaim, Lease, LeaseList, printable
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import Compacted, ConfigError, NotYet, SourceError, Unavailable
from flannel_dp.sources.base import Call, Change, Inbox, Snapshot
from flannel_dp.sources.etcd.options import EtcdOptions
from flannel_dp.sources.etcd.position import Position
from flannel_dp.sources.etcd.trouble import Trouble
from flannel_dp.sources.history import History

if TYPE_CHECKING:
    from flannel_dp.sources.etcd.client import EtcdClient
    from flannel_dp.sources.etcd.grpc import KeepAlive
    from flannel_dp.sources.etcd.watch import KeyWatch

__all__ = ["EtcdOptions", "EtcdSource", "open_client"]

log = logging.getLogger(__name__)

#: Responses that come within so many seconds of the last ones are read together.
_PACE = 0.015
#: A listing may be overtaken by a compaction, but hardly twice.
_LISTINGS = 3

OnConfig = Callable[[NetworkConfig | SourceError | ConfigError], None]


def open_client(
    options: EtcdOptions,
    *,
    timeout: float = 5.0,
    keepalive: KeepAlive | None = None,
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
    """The leases below a prefix of an etcd cluster.

    ``on_config`` is called on the follower's thread when the network's configuration
    was changed or deleted while it is followed, with the new one or with what is wrong
    with it. ``timeout`` is that of one request in seconds, over all endpoints. The file
    ``note`` keeps for the next process how far the cluster was.

    Raises ConfigError when the libraries that it needs are not installed. Nothing is
    asked of etcd yet.
    """

    def __init__(
        self,
        options: EtcdOptions,
        *,
        timeout: float = 5.0,
        keepalive: KeepAlive | None = None,
        on_config: OnConfig | None = None,
        note: str = "",
    ) -> None:
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
        return _config(self._options, kv)

    def snapshot(self) -> Snapshot:
        """List all leases, like ``etcdctl get --prefix PREFIX/subnets/``.

        Raises Unavailable and AuthFailed.
        """
        with self._client:
            return _list(self._client, self._options, self.origin)[0]

    def expirations(self) -> dict[str, str]:
        """Return when each lease ends unless it is renewed (RFC 3339), by the lease's name.

        Reservations, which do not end, are left out. It takes a request for each lease.
        Raises Unavailable and AuthFailed.
        """
        prefix = self._options.key("subnets", "")
        held: dict[str, int] = {}
        with self._client:
            for kvs, _ in self._client.pages(prefix):
                held |= {_name(kv.key, prefix): kv.lease for kv in kvs if kv.lease}
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
        with self._open(lambda: inbox.stopping) as client:
            follower = _KeyFollower(
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


class _Delivered:
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


class _KeyFollower:
    """One ``follow``, on its thread. ``config`` is the configuration's text where it was read
    before, else the first one seen is the one that others are changes of."""

    def __init__(
        self,
        client: EtcdClient,
        options: EtcdOptions,
        origin: str,
        inbox: Inbox,
        on_config: OnConfig | None,
        history: History[Position],
    ) -> None:
        self._client = client
        self._options = options
        self._origin = origin
        self._inbox = inbox
        self._on_config = on_config
        self._prefix = options.key("subnets", "")
        self._config_key = options.key("config")
        self.config: bytes | None = None
        self._gone = False
        self._trouble = Trouble(inbox)
        self._known = _Delivered()
        self._at: Position | None = None  # None: a new listing is needed
        self._history = history

    def run(self) -> None:
        """Follow until stopped."""
        from flannel_dp.sources.etcd.socket import Stopped

        call = Call.READY
        while call is not Call.STOP and not self._inbox.stopping:
            if call is Call.REFRESH:
                self._at = None
            with contextlib.suppress(Stopped):
                call = self._attempt()

    def _attempt(self) -> Call:
        """List if needed, and watch until something comes up; returns what to do."""
        try:
            at = self._at or self._list()
            return self._watch(at)
        except Compacted as error:
            log.info("etcd=relist reason=%s", error.message)
            self._at = None
        except SourceError as error:
            self._trouble.report(error)
        return self._trouble.pause()

    def _list(self) -> Position:
        known = _Delivered()
        snapshot, at = _list(self._client, self._options, self._origin, known)
        if self._on_config is not None:
            self._see_config(self._client.get(self._config_key)[0])
        self._client.close()  # it is not needed until the next listing
        afresh = self._history.listed(self._origin, at)
        if afresh:
            log.warning("etcd=afresh reason=%s", afresh)
        self._known, self._at = known, at
        self._inbox.put(replace(snapshot, afresh=afresh))
        self._trouble.delivered()
        return at

    def _watch(self, at: Position) -> Call:
        from flannel_dp.sources.etcd.client import range_end

        ranges = [(self._prefix, range_end(self._prefix))]
        if self._on_config is not None:
            ranges.append((self._config_key, b""))
        with contextlib.closing(self._client.watch(ranges, at.revision + 1)) as watch:
            if watch.position.cluster != at.cluster or watch.position.revision < at.revision:
                raise Compacted(
                    f"{self._origin}: its history differs from before: it was restored or replaced",
                    hint="list everything again",
                )
            self._trouble.began()
            return self._read(watch)

    def _read(self, watch: KeyWatch) -> Call:
        while True:
            left = min(watch.seconds_left, self._trouble.seconds_left)
            call = self._inbox.wait(left, (watch.fileno(),))
            if call in (Call.STOP, Call.REFRESH):
                return call
            responses = watch.receive()
            self._trouble.check()
            for response in responses:
                self._take(response)
            if any(response.events for response in responses):
                self._trouble.useful()
            if responses:
                call = self._inbox.wait(_PACE)
                if call in (Call.STOP, Call.REFRESH):
                    return call

    def _take(self, response: Any) -> None:
        """All of a response is one change: etcd does not split what one transaction did."""
        added: dict[str, Lease] = {}
        removed: dict[str, None] = {}
        bad: dict[str, BadClaim] = {}
        for event in response.events:
            if event.kv.key == self._config_key:
                self._see_config(None if event.type else event.kv)
                continue
            name = _name(event.kv.key, self._prefix)
            if event.type:  # deleted; there is no value
                if self._known.forget(name):
                    _only(printable(name), None, removed, added, bad)
            elif self._known.see(name, event.kv):
                claim = _claim(name, event.kv)
                if isinstance(claim, Lease):
                    self._known.see_macs(claim)
                    _only(name, claim, added, removed, bad)
                else:
                    _only(claim.name, claim, bad, added, removed)
        if added or removed or bad:
            self._inbox.put(Change(tuple(added.values()), tuple(removed), tuple(bad.values())))
        if response.header.revision and self._at is not None:
            revision = max(self._at.revision, response.header.revision)
            self._at = Position(revision, self._at.cluster)
            self._history.advanced(self._at)

    def _see_config(self, kv: Any | None) -> None:
        if self._on_config is None:
            return
        if kv is None:
            changed, self._gone = not self._gone, True
        else:
            changed = kv.value != self.config and (self._gone or self.config is not None)
            self.config, self._gone = kv.value, False
        if not changed:
            return
        try:
            self._on_config(_config(self._options, kv))
        except (SourceError, ConfigError) as error:
            self._on_config(error)


def _only(name: str, value: Any, here: dict[str, Any], *others: dict[str, Any]) -> None:
    """The last of several events of one key is what counts."""
    here[name] = value
    for other in others:
        other.pop(name, None)


def _config(options: EtcdOptions, kv: Any | None) -> NetworkConfig:
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


def _list(
    client: EtcdClient, options: EtcdOptions, origin: str, known: _Delivered | None = None
) -> tuple[Snapshot, Position]:
    """Return all leases as they were at one moment; ``known`` notes each key."""
    started = time.perf_counter()
    for attempt in range(_LISTINGS):
        try:
            claims, at = _claims(client.pages(options.key("subnets", "")), options, known)
            readable(claims, origin)
        except Compacted as error:
            log.info("etcd=relist attempt=%d reason=%s", attempt, error.message)
            continue
        return Snapshot(claims, origin, time.perf_counter() - started, consistent=True), at
    raise Unavailable(
        f"{origin}: it was compacted during each of {_LISTINGS} listings",
        hint="let etcd keep its history for some minutes (--auto-compaction-retention)",
    )


def _claims(
    pages: Iterable[tuple[Iterable[Any], Position]], options: EtcdOptions, known: _Delivered | None
) -> tuple[LeaseList, Position]:
    prefix = options.key("subnets", "")
    leases: list[Lease] = []
    bad: list[BadClaim] = []
    at: Position | None = None
    for kvs, position in pages:
        at = at or position
        for kv in kvs:
            name = _name(kv.key, prefix)
            if known is not None:
                known.see(name, kv)
            claim = _claim(name, kv)
            if isinstance(claim, Lease):
                leases.append(claim)
                if known is not None:
                    known.see_macs(claim)
            else:
                bad.append(claim)
    assert at is not None  # even an empty list is one page
    return LeaseList(leases, bad), at


def _claim(name: str, kv: Any) -> Lease | BadClaim:
    return lease_of_key_value(name, kv.value, kv.create_revision, kv.mod_revision)


def _name(key: bytes, prefix: bytes) -> str:
    return key[len(prefix) :].decode("utf-8", "backslashreplace")
