"""The keys below a prefix of etcd, followed: a listing, then a watch from its revision on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from flannel_dp.cluster.lease import BadClaim, Lease, printable
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import Compacted, ConfigError, SourceError
from flannel_dp.sources.base import Call, Change, Inbox
from flannel_dp.sources.etcd.listing import Delivered, claim_of, config_of, list_leases, name_below
from flannel_dp.sources.etcd.options import EtcdOptions
from flannel_dp.sources.etcd.position import Position
from flannel_dp.sources.etcd.trouble import Trouble
from flannel_dp.sources.history import History

if TYPE_CHECKING:
    from flannel_dp.sources.etcd.client import EtcdClient
    from flannel_dp.sources.etcd.watch import KeyWatch

log = logging.getLogger(__name__)

#: Responses that come within so many seconds of the last ones are read together.
_PACE = 0.015

OnConfig = Callable[[NetworkConfig | SourceError | ConfigError], None]


class KeyFollower:
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
        self._config_revision = 0  # what happened to it until then is known
        self._gone = False
        self._trouble = Trouble(inbox)
        self._known = Delivered()
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
            resumed = self._at is not None
            return self._watch(self._at or self._list(), resumed)
        except Compacted as error:
            log.info("Listing all leases in etcd again: %(reason)s", {"reason": error.message})
            self._at = None
        except SourceError as error:
            self._trouble.report(error)
        return self._trouble.pause()

    def _list(self) -> Position:
        known = Delivered()
        snapshot, at = list_leases(self._client, self._options, self._origin, known)
        self._read_config()
        afresh = self._history.listed(self._origin, at)
        if afresh:
            log.warning("etcd is not as it was before: %(reason)s", {"reason": afresh})
        self._known, self._at = known, at
        self._inbox.put(replace(snapshot, afresh=afresh))
        self._trouble.delivered()
        return at

    def _read_config(self) -> None:
        if self._on_config is not None:
            kv, at = self._client.get(self._config_key)
            self._config_revision = at.revision
            self._see_config(kv)
        self._client.close()  # it is not needed until the next listing

    def _watch(self, at: Position, resumed: bool) -> Call:
        from flannel_dp.sources.etcd.client import range_end

        ranges = [(self._prefix, range_end(self._prefix))]
        if self._on_config is not None:
            ranges.append((self._config_key, b""))
        with contextlib.closing(self._client.watch(ranges, at.revision)) as watch:
            if watch.position.cluster != at.cluster or watch.position.revision < at.revision:
                raise Compacted(
                    f"{self._origin}: its history differs from before: it was restored or replaced",
                    hint="list everything again",
                )
            if resumed:
                # Where the leases were is where both ranges are watched from, and of the
                # configuration that may have told less.
                self._read_config()
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
                self._advance(watch.reached(response))
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
                if event.kv.mod_revision > self._config_revision:
                    self._config_revision = event.kv.mod_revision
                    self._see_config(None if event.type else event.kv)
                continue
            name = name_below(event.kv.key, self._prefix)
            if event.type:  # deleted; there is no value
                if self._known.forget(name):
                    _only(printable(name), None, removed, added, bad)
            elif self._known.see(name, event.kv):
                claim = claim_of(name, event.kv)
                if isinstance(claim, Lease):
                    self._known.see_macs(claim)
                    _only(name, claim, added, removed, bad)
                else:
                    _only(claim.name, claim, bad, added, removed)
        if added or removed or bad:
            self._inbox.put(Change(tuple(added.values()), tuple(removed), tuple(bad.values())))

    def _advance(self, revision: int) -> None:
        """Resume from here on."""
        if self._at is not None and revision > self._at.revision:
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
            self._on_config(config_of(self._options, kv))
        except (SourceError, ConfigError) as error:
            self._on_config(error)


def _only(name: str, value: Any, here: dict[str, Any], *others: dict[str, Any]) -> None:
    """The last of several events of one key is what counts."""
    here[name] = value
    for other in others:
        other.pop(name, None)
