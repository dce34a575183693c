"""Requests to an etcd v3 cluster: whichever member answers, logged in where that is needed.

The methods are those of etcd's API that are used here. Every error is a SourceError
that names the member, the request and what to do.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from msgspec import Struct

from flannel_dp.cluster.lease import printable
from flannel_dp.errors import AuthFailed, Unavailable
from flannel_dp.sources.etcd import messages as pb
from flannel_dp.sources.etcd.errors import FINAL, Failure, NotFound, error_of, lost, rejected
from flannel_dp.sources.etcd.grpc import Connection, KeepAlive, Metadata
from flannel_dp.sources.etcd.options import Endpoint, EtcdOptions
from flannel_dp.sources.etcd.position import Position
from flannel_dp.sources.etcd.reading import read
from flannel_dp.sources.etcd.rpc import (
    INVALID_ARGUMENT,
    PERMISSION_DENIED,
    UNAUTHENTICATED,
    RpcError,
    RpcStatus,
)
from flannel_dp.sources.etcd.socket import Deadline, Lost, tls_context
from flannel_dp.sources.etcd.watch import KeyWatch
from flannel_dp.sources.limits import LISTING_BYTES, LISTING_PAGES, LISTING_SECONDS, MIB

log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: A connection that was not used for so many seconds may be gone without our knowing.
_STALE = 30.0
#: Keys of one range request; a longer list is read in several, all at one revision.
_PAGE = 20_000


class _Login(Struct):
    """The login at etcd. ``token`` is "" where no login is needed, None before it is known."""

    options: EtcdOptions
    token: str | None = None

    def metadata(self, connection: Connection, deadline: Deadline) -> Metadata:
        """Return the metadata of a request: that it fails when there is no leader instead of
        waiting for one (etcd's WithRequireLeader), and the token. Log in first if needed."""
        if self.options.username and self.token is None:
            self.token = self._authenticate(connection, deadline)
        leader = ("hasleader", "true")
        return (leader, ("token", self.token)) if self.token else (leader,)

    def forget(self, status: RpcStatus, *, watch: bool) -> bool:
        """Return whether a request that was rejected may succeed after a new login."""
        if not self.options.username:
            return False
        # A watch says of an unknown token that it has no permission.
        codes = (UNAUTHENTICATED, PERMISSION_DENIED) if watch else (UNAUTHENTICATED,)
        texts = ("user name is empty", "revision of auth store is old")
        old = status.code == INVALID_ARGUMENT and any(text in status.message for text in texts)
        if old or status.code in codes:
            self.token = None
            return True
        return False

    def _authenticate(self, connection: Connection, deadline: Deadline) -> str:
        request = pb.AuthenticateRequest(
            name=self.options.username, password=self.options.secret()
        ).SerializeToString()
        (answer,) = connection.unary("/etcdserverpb.Auth/Authenticate", [request], (), deadline)
        if isinstance(answer, bytes):
            token = read(pb.AuthenticateResponse, answer).token.decode("ascii")
            log.info(
                "Logged in to etcd %(etcd)s as %(user)s",
                {"etcd": connection.endpoint, "user": self.options.username},
            )
            return str(token)
        if "authentication is not enabled" in answer.message:
            return ""
        raise RpcError(answer)


class EtcdClient:
    """Talks to the members of a cluster, the last one that answered first.

    A request is tried on each member, within ``timeout`` seconds in all; a member that
    does not answer cannot use up the others' share. ``stopped`` is asked five times a
    second while something is waited for; once it is true, Stopped is raised. Requests
    may be made from any thread, one at a time is under way.
    """

    def __init__(
        self,
        options: EtcdOptions,
        *,
        timeout: float = 5.0,
        keepalive: KeepAlive | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._options = options
        self._members = options.members
        self._timeout = timeout
        self._keepalive = keepalive or KeepAlive()
        self._stopped = stopped
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._used = 0.0
        self._good = self._members[0]
        self._login = _Login(options)
        if options.username and not all(member.tls for member in self._members):
            log.warning(
                "The password for etcd %(etcd)s is sent unencrypted", {"etcd": options.members[0]}
            )

    def __enter__(self) -> EtcdClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; the next request connects again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    # ---- keys

    def get(self, key: bytes) -> tuple[Any | None, Position]:
        """Return one key (mvccpb.KeyValue) or None, like ``etcdctl get KEY``."""
        request = pb.RangeRequest(key=key)
        answer = self._call("KV/Range", request, pb.RangeResponse, f"read {shown(key)}")
        position = Position(answer.header.revision, answer.header.cluster_id)
        return (answer.kvs[0] if answer.kvs else None), position

    def pages(self, prefix: bytes) -> Iterator[tuple[Sequence[Any], Position]]:
        """Yield all keys with a prefix as they were at one moment, like ``etcdctl get --prefix``.

        They come in portions of 20,000. Raises Compacted when etcd forgets that moment
        before the last of them, Unavailable when an answer is not complete (``reading``)
        or they exceed a limit (``sources.limits``).
        """
        what = f"list {shown(prefix)}"
        start, revision, more = prefix, 0, True
        size, pages, until = 0, 0, time.monotonic() + LISTING_SECONDS
        while more:
            if too_long := _too_long(size, pages, until):
                member = self._good
                self.avoid(member)
                raise Unavailable(
                    f"{member}: {what}: {too_long}",
                    hint="check that the endpoint is an etcd member; the next one is asked",
                )
            request = pb.RangeRequest(
                key=start, range_end=range_end(prefix), limit=_PAGE, revision=revision
            )
            answer = self._call("KV/Range", request, pb.RangeResponse, what)
            revision = revision or answer.header.revision
            size, pages = size + answer.ByteSize(), pages + 1
            yield answer.kvs, Position(revision, answer.header.cluster_id)
            more = answer.more
            if more:
                start = answer.kvs[-1].key + b"\0"

    def create(
        self, key: bytes, value: bytes, lease: int, *, absent: tuple[bytes, bytes] | None = None
    ) -> int:
        """Write a key if it does not exist, nor any from ``absent[0]`` to before ``absent[1]``,
        and return the revision of that; 0 when one of them exists.

        A request whose answer was lost is made again, and then finds its own work: after
        0, see what the key says. Raises NotFound when there is no such lease.
        """
        compares = [pb.Compare(result=pb.EQUAL, target=pb.CREATE, key=key, create_revision=0)]
        if absent is not None:
            first, end = absent
            compares.append(
                pb.Compare(
                    result=pb.EQUAL, target=pb.CREATE, key=first, range_end=end, create_revision=0
                )
            )
        put = pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))
        return self._txn(compares, put, f"create {shown(key)}")

    def replace(self, kv: Any, value: bytes, lease: int) -> int:
        """Write the key of ``kv`` (mvccpb.KeyValue) if it is as it was then, ``lease`` 0
        attaching none; returns and raises as ``create``."""
        put = pb.RequestOp(request_put=pb.PutRequest(key=kv.key, value=value, lease=lease))
        return self._txn([_as_it_was(kv)], put, f"write {shown(kv.key)}")

    def delete(self, kv: Any) -> int:
        """Delete the key of ``kv`` if it is as it was then; returns as ``create``."""
        delete = pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=kv.key))
        return self._txn([_as_it_was(kv)], delete, f"delete {shown(kv.key)}")

    def _txn(self, compares: list[Any], operation: Any, what: str) -> int:
        request = pb.TxnRequest(compare=compares, success=[operation])
        answer = self._call("KV/Txn", request, pb.TxnResponse, what)
        return int(answer.header.revision) if answer.succeeded else 0

    # ---- leases

    def grant(self, ttl: int) -> int:
        """Make a lease of ``ttl`` seconds, like ``etcdctl lease grant``; returns its id."""
        request = pb.LeaseGrantRequest(TTL=ttl)
        return int(
            self._call("Lease/LeaseGrant", request, pb.LeaseGrantResponse, "grant a lease").ID
        )

    def keep_alive(self, lease: int) -> int:
        """Renew a lease, like ``etcdctl lease keep-alive --once``; returns the seconds it
        lives from now on, 0 when there is no such lease."""
        request = pb.LeaseKeepAliveRequest(ID=lease)
        answer = self._call(
            "Lease/LeaseKeepAlive", request, pb.LeaseKeepAliveResponse, "renew a lease"
        )
        return max(0, int(answer.TTL))

    def revoke(self, lease: int) -> None:
        """End a lease and delete the keys attached to it; one that is gone is a success."""
        request = pb.LeaseRevokeRequest(ID=lease)
        with contextlib.suppress(NotFound):
            self._call("Lease/LeaseRevoke", request, pb.LeaseRevokeResponse, "revoke a lease")

    def times_to_live(self, leases: Iterable[int]) -> dict[int, int]:
        """Return how many seconds each lease has left, like ``etcdctl lease timetolive``: one
        request each, many under way at once. Those that are gone are left out."""
        requests = [pb.LeaseTimeToLiveRequest(ID=lease) for lease in leases]
        method, what = "Lease/LeaseTimeToLive", "ask how long leases live"
        answers = self._calls(method, requests, pb.LeaseTimeToLiveResponse, what)
        return {answer.ID: answer.TTL for answer in answers if answer.TTL >= 0}

    # ---- watching

    def watch(self, ranges: Sequence[tuple[bytes, bytes]], known: int) -> KeyWatch:
        """Follow the keys in all ``ranges`` (the first, and the end; end b"" means the one
        key) from the revision after ``known`` on, over a connection of the watch's own.

        Raises Compacted, AuthFailed or Unavailable when etcd does not agree.
        """
        what = f"watch {shown(ranges[0][0])}"

        def begin(connection: Connection, deadline: Deadline) -> KeyWatch:
            metadata = self._login.metadata(connection, deadline)
            watch = KeyWatch(connection, what, self._options, self._stopped, self.avoid)
            watch.begin(ranges, known, metadata, deadline)
            return watch

        return self._on_some_member(what, begin, own=True)

    def avoid(self, member: Endpoint) -> None:
        """Ask another member first from now on: this one answers, but not as etcd does."""
        with self._lock:
            if self._good == member:
                self._good = self._members[(self._members.index(member) + 1) % len(self._members)]
            if self._connection is not None and self._connection.endpoint == member:
                self.close()

    # ---- how a request is made

    def _call(self, method: str, request: Any, kind: Any, what: str) -> Any:
        return self._calls(method, [request], kind, what)[0]

    def _calls(self, method: str, requests: Sequence[Any], kind: Any, what: str) -> list[Any]:
        messages = [request.SerializeToString() for request in requests]

        def ask(connection: Connection, deadline: Deadline) -> list[Any]:
            metadata = self._login.metadata(connection, deadline)
            answers = connection.unary(f"/etcdserverpb.{method}", messages, metadata, deadline)
            return [
                read(kind, _answer(answer), request)
                for answer, request in zip(answers, requests, strict=True)
            ]

        return self._on_some_member(what, ask, own=False)

    def _on_some_member(
        self, what: str, act: Callable[[Connection, Deadline], _T], *, own: bool
    ) -> _T:
        """Let ``act`` do its work with one member after the other until one has done it.

        ``own`` gives it a connection that it keeps.
        """
        failures: list[Failure] = []
        until = time.monotonic() + self._timeout
        with self._lock:
            order = self._order(own)
            for number, (member, connection) in enumerate(order):
                now = time.monotonic()
                share = now + (until - now) / (len(order) - number)
                deadline = Deadline(share, self._stopped)
                try:
                    if connection is None:
                        connection = self._connect(member, deadline)
                    result = self._logged_in(connection, deadline, act, watch=own)
                except BaseException as error:
                    if connection is not None:
                        connection.close()
                    if not own:
                        self._connection = None
                    failures.append(self._failure(member, error, what))
                    continue
                self._good = member
                if not own:
                    self._connection, self._used = connection, time.monotonic()
                return result
        raise error_of(failures, what)

    def _logged_in(
        self,
        connection: Connection,
        deadline: Deadline,
        act: Callable[[Connection, Deadline], _T],
        *,
        watch: bool,
    ) -> _T:
        """Return ``act``, and once more with a new token where that may help."""
        try:
            return act(connection, deadline)
        except RpcError as error:
            if not self._login.forget(error.status, watch=watch):
                raise
        return act(connection, deadline)

    def _failure(self, member: Endpoint, error: BaseException, what: str) -> Failure:
        """Return why to try the next member; raises if that would be of no use."""
        if isinstance(error, Lost):
            return lost(member, error)
        if isinstance(error, AuthFailed):  # a file of ours that cannot be read
            return Failure(member, AuthFailed, error.message, error.hint)
        if not isinstance(error, RpcError):
            raise error
        failure = rejected(member, error.status, self._options)
        if error.status.code in FINAL:
            raise error_of([failure], what) from None
        return failure

    def _order(self, own: bool) -> list[tuple[Endpoint, Connection | None]]:
        """Return the members to ask: over the open connection, then over new ones, the last one
        that answered first."""
        first = self._members.index(self._good)
        members = self._members[first:] + self._members[:first]
        order: list[tuple[Endpoint, Connection | None]] = [(member, None) for member in members]
        if not own and self._connection is not None:
            if time.monotonic() - self._used > _STALE:
                self.close()
            else:
                order.insert(0, (self._connection.endpoint, self._connection))
        return order

    def _connect(self, member: Endpoint, deadline: Deadline) -> Connection:
        context = tls_context(self._options) if member.tls else None
        return Connection(member, context, deadline, keepalive=self._keepalive)


def range_end(prefix: bytes) -> bytes:
    """Return the end of the range of all keys that begin with ``prefix``: clientv3's
    GetPrefixRangeEnd.

    ``prefix`` ends with a byte below 255.
    """
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _too_long(size: int, pages: int, until: float) -> str:
    if size > LISTING_BYTES:
        return f"it sent over {LISTING_BYTES // MIB} MiB"
    if pages >= LISTING_PAGES:
        return f"it was not complete after {LISTING_PAGES} answers"
    if pages and time.monotonic() > until:
        return f"it was not complete after {LISTING_SECONDS:g} s"
    return ""


def _as_it_was(kv: Any) -> Any:
    return pb.Compare(result=pb.EQUAL, target=pb.MOD, key=kv.key, mod_revision=kv.mod_revision)


def shown(key: bytes) -> str:
    """Return a key in a message."""
    return printable(key.decode("utf-8", "replace"))


def _answer(answer: bytes | RpcStatus) -> bytes:
    if isinstance(answer, RpcStatus):
        raise RpcError(answer)
    return answer
