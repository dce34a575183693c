"""What etcd and the network say, as errors that name the member, the request and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flannel_dp.cluster.lease import printable
from flannel_dp.errors import AuthFailed, Compacted, SourceError, Unavailable
from flannel_dp.sources.etcd.options import Endpoint, EtcdOptions
from flannel_dp.sources.etcd.rpc import (
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    NOT_FOUND,
    OUT_OF_RANGE,
    PERMISSION_DENIED,
    RESOURCE_EXHAUSTED,
    UNAUTHENTICATED,
    UNAVAILABLE,
    UNIMPLEMENTED,
    RpcStatus,
)
from flannel_dp.sources.etcd.socket import Lost

#: What etcd says of the request itself: another member would say the same. After any other
#: status, also one that no etcd sends, the next member is asked.
FINAL = frozenset(
    {
        FAILED_PRECONDITION,
        INVALID_ARGUMENT,
        NOT_FOUND,
        OUT_OF_RANGE,
        PERMISSION_DENIED,
        UNAUTHENTICATED,
    }
)


class NotFound(Unavailable):
    """etcd has no such lease."""


class Failure(NamedTuple):
    """Why one member was of no use."""

    member: Endpoint
    kind: type[SourceError]
    reason: str
    hint: str


def lost(member: Endpoint, error: Lost) -> Failure:
    """Return the member could not be reached, or is gone."""
    return Failure(member, AuthFailed if error.auth else Unavailable, str(error), error.hint)


def rejected(member: Endpoint, status: RpcStatus, options: EtcdOptions) -> Failure:
    """Return the member answered with ``status``."""
    said = printable(status.message.removeprefix("etcdserver: ")) or f"gRPC status {status.code}"
    kind, hint = _meaning(status, options)
    return Failure(member, kind, said, hint)


def _meaning(status: RpcStatus, options: EtcdOptions) -> tuple[type[SourceError], str]:
    code, text = status.code, status.message
    if "compacted" in text and code in (OUT_OF_RANGE, UNAVAILABLE):
        return Compacted, "list everything again"
    if code == PERMISSION_DENIED and not options.username:
        return AuthFailed, "name a user: --etcd-username and --etcd-password"
    if code == PERMISSION_DENIED:
        prefix = options.key("").decode()
        return AuthFailed, (
            f"give a role of {options.username!r} the right: "
            f"etcdctl role grant-permission ROLE --prefix=true readwrite {prefix}"
        )
    if code == UNAUTHENTICATED or (code == INVALID_ARGUMENT and "auth" in text):
        return AuthFailed, "check --etcd-username and --etcd-password"
    if code == INVALID_ARGUMENT and "user name is empty" in text:
        return AuthFailed, "etcd wants a login: give --etcd-username and --etcd-password"
    if code == NOT_FOUND:
        return NotFound, "make a new lease"
    if code == RESOURCE_EXHAUSTED and "space" in text:
        return Unavailable, "make room in etcd: compact, defragment, disarm the alarm"
    if code == UNIMPLEMENTED:
        return Unavailable, "it has to be etcd 3.3 or later, with API version 3"
    if "no leader" in text:
        return Unavailable, "the cluster has lost its quorum: check its other members"
    return Unavailable, "check etcd's own log"


def error_of(failures: Sequence[Failure], what: str) -> SourceError:
    """Return one error for all that failed; the kind is that of the first refusal, if any."""
    said = list(dict.fromkeys(failures))
    worst = next((one for one in said if one.kind is not Unavailable), said[0])
    if len(said) == 1:
        message = f"{worst.member}: {what}: {worst.reason}"
    else:
        message = f"etcd: {what}: " + "; ".join(f"{one.member}: {one.reason}" for one in said)
    return worst.kind(message, hint=worst.hint)
