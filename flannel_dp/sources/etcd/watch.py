"""One watch of etcd: what changes in some ranges of keys, as it changes."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from typing import Any

from flannel_dp.errors import Compacted
from flannel_dp.sources.etcd import messages as pb
from flannel_dp.sources.etcd.errors import error_of, lost, rejected
from flannel_dp.sources.etcd.grpc import Connection, Metadata
from flannel_dp.sources.etcd.options import Endpoint, EtcdOptions
from flannel_dp.sources.etcd.position import Position
from flannel_dp.sources.etcd.reading import read
from flannel_dp.sources.etcd.rpc import (
    PERMISSION_DENIED,
    UNAUTHENTICATED,
    UNAVAILABLE,
    RpcError,
    RpcStatus,
)
from flannel_dp.sources.etcd.socket import Deadline, Lost
from flannel_dp.sources.limits import IDLE_ANSWERS, IDLE_ANSWERS_A_SECOND, Allowance

#: How long a ping or an acknowledgement may take to be sent, in seconds.
_SEND = 5.0


class KeyWatch:
    """Owns its connection. For one thread at a time.

    ``position`` is where the cluster was when the watch began. ``avoid`` is called with the
    member when the watch has failed.
    """

    def __init__(
        self,
        connection: Connection,
        what: str,
        options: EtcdOptions,
        stopped: Callable[[], bool],
        avoid: Callable[[Endpoint], object] = lambda member: None,
    ) -> None:
        self._connection = connection
        self._what = what
        self._options = options
        self._stopped = stopped
        self._avoid = avoid
        self._idle = Allowance(IDLE_ANSWERS, IDLE_ANSWERS_A_SECOND)
        self._stream = 0
        self._known = 0
        self._agreed: list[int] = []  # the ranges, by the number that etcd gave to each
        self._early: list[Any] = []
        self.position = Position(0, 0)

    def begin(
        self,
        ranges: Sequence[tuple[bytes, bytes]],
        known: int,
        metadata: Metadata,
        deadline: Deadline,
    ) -> None:
        """Ask for what came after the revision ``known``, and wait until etcd agrees to all ranges.

        It is asked for that revision again: where all before the next one was compacted, etcd up
        to 3.5.17 forgets what was deleted in it, and its watch says nothing (etcd issue 19179).

        Raises Lost, RpcError, Stopped, and Compacted.
        """
        self._known = known
        first, *others = [
            pb.WatchRequest(
                create_request=pb.WatchCreateRequest(
                    key=key,
                    range_end=end,
                    start_revision=known,
                    # Tells the revision every ten minutes, so that one that saw nothing for
                    # long can be resumed after a compaction.
                    progress_notify=True,
                )
            ).SerializeToString()
            for key, end in ranges
        ]
        path = "/etcdserverpb.Watch/Watch"
        self._stream = self._connection.open(path, first, metadata, deadline)
        for message in others:
            self._connection.send(self._stream, message, deadline)
        while len(self._agreed) < len(ranges):
            deadline.wait(self._connection.fileno(), select.POLLIN)
            self._connection.pump(deadline)
            responses, status = self._taken()
            for response in responses:
                self._check(response)
                if response.created:
                    if response.watch_id not in self._agreed:
                        self._agreed.append(response.watch_id)
                    header = response.header
                    self.position = Position(header.revision, header.cluster_id)
                else:
                    self._early.append(response)
            if status is not None:
                raise RpcError(status)

    def close(self) -> None:
        """Hang up, which ends the watch."""
        self._connection.close()

    def fileno(self) -> int:
        """Return the descriptor that can be read when there is something to ``receive``."""
        return self._connection.fileno()

    @property
    def seconds_left(self) -> float:
        """How many seconds from now ``receive`` has to be called at the latest."""
        return 0.0 if self._early else max(0.0, self._connection.due - time.monotonic())

    def receive(self) -> list[Any]:
        """Return the responses (etcdserverpb.WatchResponse) that have come, without waiting.

        Raises Compacted when the revision to start from is no longer known, AuthFailed,
        or Unavailable when the watch ended for another reason, such as no sign of life.
        """
        deadline = Deadline(time.monotonic() + _SEND, self._stopped)
        member = self._connection.endpoint
        try:
            self._connection.pump(deadline)
            self._connection.tick(deadline)
            responses, status = self._taken()
            for response in responses:
                self._check(response)
            if status is not None:
                raise RpcError(status)
        except Lost as error:
            self._avoid(member)
            raise error_of([lost(member, error)], self._what) from error
        except RpcError as error:
            self._avoid(member)
            raise error_of([rejected(member, error.status, self._options)], self._what) from error
        early, self._early = self._early, []
        return early + responses

    def reached(self, response: Any) -> int:
        """Return the revision up to which all changes of the first range are known after this
        response; 0 where it does not say.

        The header has that of the cluster, and an answer may hold a part of what happened until
        then (etcd's watchableStore sends a thousand revisions at a time), or be about another
        range. Without an event it says that there is nothing more to come.
        """
        if response.created or response.watch_id != self._agreed[0]:
            return 0
        if response.events:
            return max(int(event.kv.mod_revision) for event in response.events)
        return int(response.header.revision)

    def _taken(self) -> tuple[list[Any], RpcStatus | None]:
        messages, status = self._connection.take(self._stream)
        responses = [read(pb.WatchResponse, message) for message in messages]
        responses = [response for response in responses if not self._is_known(response)]
        idle = sum(not response.events for response in responses)
        if idle and not self._idle.spend(idle):
            raise Lost(
                f"it sends answers without an event, more than {IDLE_ANSWERS} of them",
                hint="check that the endpoint is an etcd member, and proxies on the path to it",
            )
        return responses, status

    def _is_known(self, response: Any) -> bool:
        """Whether all events of a response are of a revision that is known."""
        events = response.events
        return bool(events) and max(event.kv.mod_revision for event in events) <= self._known

    def _check(self, response: Any) -> None:
        if response.compact_revision:
            raise Compacted(
                f"{self._connection.endpoint}: {self._what}: what happened before revision"
                f" {response.compact_revision} was compacted",
                hint="list everything again",
            )
        if response.canceled:
            said = response.cancel_reason.decode("utf-8", "replace")
            text = said or "etcd ended the watch"
            code = UNAVAILABLE
            if "permission denied" in text:
                code = PERMISSION_DENIED
            elif "auth token" in text or "user name is empty" in text:
                code = UNAUTHENTICATED
            # "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
            raise RpcError(RpcStatus(code, text.rpartition("desc = ")[2]))
