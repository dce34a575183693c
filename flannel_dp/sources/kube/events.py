"""The events of a watch of nodes: their lines, what they say, and what is another than was known.

Nearly all of them are heartbeats, which change nothing for us; such a one costs one look at its
raw annotations. The API server is asked for the metadata alone, some two kilobytes of ten to
thirty, where it can give them (``METADATA_ONLY``). What these lack are the pod CIDRs, which a node
is given once: they are known from the list, or asked for with the node.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import Protocol

import msgspec

from flannel_dp.cluster.lease import BadClaim, Lease
from flannel_dp.errors import SourceError
from flannel_dp.sources.base import Change
from flannel_dp.sources.kube.api import ApiStatus, RequestRejected
from flannel_dp.sources.kube.nodes import (
    NO_VERSION,
    NOT_JSON,
    PATH,
    UNMARKED,
    VERSION_MOST,
    KubeNode,
    NodeListing,
    NodeReader,
    NodeSpec,
    place_of,
)
from flannel_dp.sources.limits import ANSWER_SECONDS, IDLE_EVENTS, MIB, OBJECT_BYTES

#: The Accept header for objects without spec and status, and whole ones from a server that cannot.
#: https://kubernetes.io/docs/reference/using-api/api-concepts/
METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"

_PARTIAL = "PartialObjectMetadata"

#: Returns a node as it is now, None where there is none any more.
Fetch = Callable[[str], KubeNode | None]


class _EventObject(KubeNode, gc=False):
    """A node, its metadata, a bookmark's node (nothing but a version), or a Status."""

    kind: str = ""
    code: int = 0
    reason: str = ""
    message: str = ""


class Event(msgspec.Struct, gc=False):
    """One line of a watch."""

    type: str
    object: _EventObject

    @property
    def status(self) -> ApiStatus:
        """What an ERROR says."""
        return ApiStatus(self.object.code, self.object.reason, self.object.message)


_NONE = msgspec.Raw(b"")


class _BriefMeta(msgspec.Struct, gc=False, rename="camel"):
    name: str = ""
    uid: str = ""
    resource_version: str = ""
    annotations: msgspec.Raw = _NONE


class _BriefSpec(msgspec.Struct, gc=False, rename={"one": "podCIDR", "all": "podCIDRs"}):
    one: msgspec.Raw = _NONE
    all: msgspec.Raw = _NONE


class _BriefObject(msgspec.Struct, gc=False):
    metadata: _BriefMeta = msgspec.field(default_factory=_BriefMeta)
    spec: _BriefSpec = msgspec.field(default_factory=_BriefSpec)


class _Brief(msgspec.Struct, gc=False):
    """A line of which nothing is decoded but what tells whether it has to be."""

    type: str
    object: _BriefObject

    @property
    def seal(self) -> bytes:
        """16 bytes that change when anything does that a lease is made of."""
        meta, spec = self.object.metadata, self.object.spec
        parts = (meta.uid.encode(), meta.annotations, spec.one, spec.all)
        return blake2b(b"\0".join(parts), digest_size=16).digest()


_event_decoder = msgspec.json.Decoder(Event)
_brief_decoder = msgspec.json.Decoder(_Brief)


class Sender(Protocol):
    """The API server that sent an event, as far as errors about it name it."""

    @property
    def origin(self) -> str: ...
    def refusal(self, status: ApiStatus, what: str, rule: str) -> SourceError: ...


def decode_event(api: Sender, line: bytes) -> Event:
    """Read one line of a watch.

    Raises what an ERROR event stands for, RequestRejected for a line that is no event.
    """
    try:
        event = _event_decoder.decode(line)
    except NOT_JSON as error:
        raise _rejected(api, f"not an event: {error}") from error
    _check_version(api, event.object.metadata.resource_version)
    if event.type == "ERROR":
        raise api.refusal(event.status, f"GET {PATH}?watch", '"watch" of "nodes"')
    return event


def _check_version(api: Sender, version: str) -> None:
    if len(version) > VERSION_MOST:
        raise _rejected(api, f"not an event: resourceVersion of {len(version)} characters")


def _rejected(api: Sender, reason: str) -> RequestRejected:
    """Return the error for what came in a watch and is no event of a node."""
    return RequestRejected(
        f"{api.origin}: GET {PATH}?watch: {reason}",
        code=0,
        hint="check that the address is that of a Kubernetes API server, and that nothing between "
        "here and the server changes its answers",
    )


class Changes:
    """Compares events with what ``listing`` has, and gathers what differs into one Change.

    ``known`` holds a digest by node and is kept up to date, ``version`` is that of the last event.
    ``fetch`` asks for a node of which an event has the metadata only, and no pod CIDRs are known;
    what it raises, ``see`` does, and the event can be seen once more.
    """

    def __init__(
        self, listing: NodeListing, reader: NodeReader, fetch: Fetch = lambda name: None
    ) -> None:
        self.known, self._places = listing.digests, listing.places
        self.version = listing.version
        self._reader, self._fetch = reader, fetch
        # What was last seen of a node and is part of ``known``.
        self._seals: dict[str, bytes] = {}
        self._claims: dict[str, Lease | BadClaim | None] = {}

    def see(self, api: Sender, line: bytes) -> bool:
        """Take in an ADDED, MODIFIED or DELETED event; of others nothing is kept. Return whether
        it is one of these, of a node that has a name. Raises as ``decode_event``."""
        try:
            brief = _brief_decoder.decode(line)
        except NOT_JSON as error:
            raise _rejected(api, f"not an event: {error}") from error
        meta = brief.object.metadata
        changed = brief.type in ("MODIFIED", "ADDED")
        seal = brief.seal if changed else b""
        if changed and self._seals.get(meta.name) == seal:
            _check_version(api, meta.resource_version)
        else:
            event = decode_event(api, line)
            if event.type not in ("ADDED", "MODIFIED", "DELETED"):
                self._advance(meta.resource_version)
                return False
            self._seals.pop(meta.name, None)
            if not changed:
                self._places.pop(meta.name, None)
                self._compare(event.object, deleted=True)
            elif self._complete(event.object):
                self._seals[meta.name] = seal
        self._advance(meta.resource_version)
        return bool(meta.name)

    def _advance(self, version: str) -> None:
        """An event without a version leaves the last one: the next watch begins there."""
        if version not in NO_VERSION:
            self.version = version

    def _complete(self, node: _EventObject) -> bool:
        """Compare a node, with its pod CIDRs. Return whether there is no more to it: a node that is
        marked as flannel's before it has pod CIDRs is asked for at its next event."""
        name = node.metadata.name
        asks = self._reader.is_marked(node) or name in self.known
        if node.kind == _PARTIAL and asks:
            uid, *cidrs = self._places.get(name, b"").decode().split("\n")
            if uid != node.metadata.uid or not cidrs:
                whole = self._fetch(name)
                if whole is None or whole.metadata.uid != node.metadata.uid:
                    return False  # it is gone meanwhile: an event will say so
                cidrs = whole.spec.cidrs
            node.spec = NodeSpec(pod_cidrs=cidrs)
        if asks and node.spec.cidrs:
            self._places[name] = place_of(node)
        self._compare(node)
        return bool(node.spec.cidrs) or not asks

    def _compare(self, node: KubeNode, *, deleted: bool = False) -> None:
        name = node.metadata.name
        digest = b"" if deleted else self._reader.digest(node)
        if digest == self.known.get(name, b""):
            return
        if digest:
            self.known[name] = digest
            self._claims[name] = self._reader.claim(node)
        elif not deleted:
            if self.known[name] != UNMARKED:
                self.known[name] = UNMARKED
                self._claims[name] = self._reader.unmarked(node)
        else:
            del self.known[name]
            self._claims[name] = None

    def take(self) -> Change | None:
        """Return what has changed since the last time, the last word on each node; None:
        nothing."""
        if not self._claims:
            return None
        claims, self._claims = self._claims, {}
        return Change(
            added=tuple(claim for claim in claims.values() if isinstance(claim, Lease)),
            removed=tuple(name for name, claim in claims.items() if claim is None),
            bad=tuple(claim for claim in claims.values() if isinstance(claim, BadClaim)),
        )


def lines_of(api: Sender, chunks: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield the lines that each piece that arrives completes; half a line at the end is dropped,
    as the watch resumes before it. Raises RequestRejected for one that is too long or too slow."""
    rest: list[bytes] = []
    size, until = 0, math.inf
    for chunk in chunks:
        first, *lines = chunk.split(b"\n")
        if not size:  # an event begins
            until = time.monotonic() + ANSWER_SECONDS
        rest.append(first)
        size += len(first)
        if size > OBJECT_BYTES:
            raise _rejected(api, f"an event of over {OBJECT_BYTES // MIB} MiB")
        if not lines:
            if time.monotonic() > until:
                reason = f"an event that was not complete after {ANSWER_SECONDS:g} s"
                raise _rejected(api, reason)
            continue
        whole = b"".join(rest)
        rest, size = [lines[-1]], len(lines[-1])
        until = time.monotonic() + ANSWER_SECONDS
        yield [whole, *lines[:-1]]


def flooding(api: Sender) -> RequestRejected:
    """Return the error for a watch that says nothing, again and again."""
    return _rejected(api, f"over {IDLE_EVENTS} events that say nothing of a node")
