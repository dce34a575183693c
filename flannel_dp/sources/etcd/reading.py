"""Read etcd's answers: from bytes to messages that say what an answer has to say.

This is the one place where bytes of a member become messages. What cannot be read, or
says what no etcd can say, is Lost, like a connection that broke: the request goes to the
next member, and a watch is resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flannel_dp.cluster.lease import printable
from flannel_dp.sources.etcd import messages as pb
from flannel_dp.sources.etcd.socket import Lost

#: What the implementations of protobuf raise for bytes they cannot read.
UNREADABLE = (
    pb.DecodeError,
    ArithmeticError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

#: Revisions count from 1; a cluster that writes a million times a second does not get here.
_REVISIONS = range(1, 1 << 62)
#: The longest time that a lease can live, in seconds: etcd's ``lease.MaxLeaseTTL``.
_TTL_MAX = 9_000_000_000

_SHOWN = 200


def unreadable(what: str) -> Lost:
    """Return the error for an answer that is not as etcd's are."""
    return Lost(
        f"unreadable answer: {what}",
        hint="check that the endpoint is an etcd member, and that no proxy changes its answers",
    )


def reason(error: BaseException) -> str:
    """Return a library's error in a message: printable, and not longer than a line."""
    text = " ".join(str(error).split())[:_SHOWN]
    return printable(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def read(kind: Any, data: bytes, request: Any = None) -> Any:
    """Decode one message of class ``kind``, the answer to ``request``.

    Raises Lost for bytes that are no such message, and for numbers and kinds in it that
    etcd never sends.
    """
    name = kind.DESCRIPTOR.name
    try:
        message = kind.FromString(data)
        wrong = _CHECKS[name](message, request) if name in _CHECKS else ""
    except UNREADABLE as error:
        raise unreadable(f"{name} of {len(data)} bytes: {reason(error)}") from error
    if wrong:
        raise unreadable(f"{name}: {wrong}")
    return message


def _header(message: Any, request: Any) -> str:
    revision = message.header.revision
    return "" if revision in _REVISIONS else f"header with revision {revision}"


def _range(message: Any, request: Any) -> str:
    for kv in message.kvs:
        if wrong := _key_value(kv):
            return wrong
    return _header(message, request) or _incomplete(message) or _misplaced(message, request)


def _incomplete(message: Any) -> str:
    """Return ``count`` is that of all keys in the range, those that the limit left out too: keys
    that are counted and not there are no empty cluster."""
    count, held = message.count, len(message.kvs)
    if count < held or message.more != (count > held) or (message.more and not held):
        return f"it counts {count} key{'' if count == 1 else 's'} and has {held}"
    return ""


def _misplaced(message: Any, request: Any) -> str:
    """Return keys that were not asked for, or not in their order, and a list as it was before the
    revision that was asked for."""
    if request is None:
        return ""
    if message.header.revision < request.revision:
        return f"revision {message.header.revision} where {request.revision} was asked for"
    first, end = request.key, request.range_end or request.key + b"\0"
    for kv in message.kvs:
        if not first <= kv.key < end:
            return f"key {printable(kv.key[:_SHOWN].decode('utf-8', 'replace'))} out of its place"
        first = kv.key + b"\0"
    return ""


def _watch(message: Any, request: Any) -> str:
    newest = message.header.revision or _REVISIONS[-1]
    for event in message.events:
        if event.type not in (pb.PUT, pb.DELETE):
            return f"event of type {event.type}"
        if not 0 <= event.kv.mod_revision <= newest:
            return f"event of revision {event.kv.mod_revision}"
        if event.type == pb.PUT:
            if wrong := _key_value(event.kv):
                return wrong
        elif not event.kv.key:
            return "event without a key"
    # An etcd proxy may leave it out, but of an answer that says nothing else.
    others = message.events or message.created or message.canceled or message.compact_revision
    return "" if others and not message.header.revision else _header(message, request)


def _key_value(kv: Any) -> str:
    if not kv.key:
        return "value without a key"
    if kv.create_revision not in _REVISIONS:
        shown = printable(kv.key[:_SHOWN].decode("utf-8", "replace"))
        return f"key {shown} with create_revision {kv.create_revision}"
    return ""


def _granted(message: Any, request: Any) -> str:
    return "" if message.ID > 0 else f"lease with ID {message.ID}"


def _lease(message: Any, request: Any) -> str:
    if request is not None and message.ID != request.ID:
        return f"asked for lease {request.ID}, got lease {message.ID}"
    return "" if message.TTL <= _TTL_MAX else f"lease {message.ID} with a TTL of {message.TTL} s"


def _token(message: Any, request: Any) -> str:
    try:
        text = message.token.decode("ascii")
    except UnicodeDecodeError:
        return "token that is no ASCII text"
    return "" if text and text.isprintable() else "no token"


_CHECKS: dict[str, Callable[[Any, Any], str]] = {
    "AuthenticateResponse": _token,
    "LeaseGrantResponse": _granted,
    "LeaseKeepAliveResponse": _lease,
    "LeaseTimeToLiveResponse": _lease,
    "RangeResponse": _range,
    "TxnResponse": _header,
    "WatchResponse": _watch,
}
