"""Kubernetes nodes as leases, and the API's lists of them.

Of a node, which is some ten to thirty kilobytes of JSON, only its name, its version,
its annotations and its pod CIDRs are decoded.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from hashlib import blake2b
from typing import Self
from urllib.parse import quote

import msgspec
from msgspec.structs import replace

from flannel_dp.cluster.claims import lease_of_node
from flannel_dp.cluster.documents import readable
from flannel_dp.cluster.lease import (
    BadClaim,
    Lease,
    LeaseList,
    annotation_keys_prefix,
    printable,
)
from flannel_dp.errors import Compacted, Unavailable
from flannel_dp.sources.history import Moment
from flannel_dp.sources.kube.api import KubeApi, RequestRejected
from flannel_dp.sources.kube.config import KubeOptions, server_text
from flannel_dp.sources.limits import (
    ALL_PAGES_BYTES,
    LIST_BYTES,
    LIST_PAGES,
    LIST_SECONDS,
    MIB,
    PAGE_BYTES,
)

PATH = "/api/v1/nodes"

_ANNOTATIONS = (
    "kube-subnet-manager", "backend-type", "backend-data", "backend-v6-data",
    "public-ip", "public-ipv6",
)  # fmt: skip


class NodeMeta(msgspec.Struct, gc=False, rename="camel"):
    """The part of an object's metadata that matters here."""

    name: str = ""
    uid: str = ""
    resource_version: str = ""
    annotations: dict[str, str] | None = None


class NodeSpec(msgspec.Struct, gc=False, rename={"pod_cidr": "podCIDR", "pod_cidrs": "podCIDRs"}):
    """The part of a node's spec that matters here."""

    pod_cidr: str = ""
    pod_cidrs: list[str] | None = None

    @property
    def cidrs(self) -> list[str]:
        """Both forms; the newer one has the older one's value first."""
        return self.pod_cidrs or ([self.pod_cidr] if self.pod_cidr else [])


class KubeNode(msgspec.Struct, gc=False):
    """The part of a node that matters here."""

    metadata: NodeMeta = msgspec.field(default_factory=NodeMeta)
    spec: NodeSpec = msgspec.field(default_factory=NodeSpec)


class _PageMeta(
    msgspec.Struct,
    gc=False,
    rename={"version": "resourceVersion", "more": "continue", "left": "remainingItemCount"},
):
    version: str = ""
    more: str = ""
    left: int | None = None


class _NodePage(msgspec.Struct):
    kind: str
    metadata: _PageMeta
    items: list[KubeNode] | None


_list_decoder = msgspec.json.Decoder(_NodePage)
_node_decoder = msgspec.json.Decoder(KubeNode)
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What reading an answer raises when it is not what was asked for."""

#: The digest of a node that was flannel's, and is not marked as that any more.
UNMARKED = b"unmarked"

#: A resourceVersion goes into every watch's address; the API server's are short numbers.
VERSION_MOST = 256
#: What is none: a watch from there would begin with whatever the server has, events of earlier
#: states among them. https://kubernetes.io/docs/reference/using-api/api-concepts/
NO_VERSION = ("", "0")
#: A continue token goes into the next request's address; the API server's hold a name.
_CONTINUE_MOST = 8192


def place_of(node: KubeNode) -> bytes:
    """Return a node's uid and its pod CIDRs, packed: the API server lets these be given once, and
    only a node that was made again has others."""
    return "\n".join((node.metadata.uid, *node.spec.cidrs)).encode()


class NodeReader:
    """Make leases of nodes, and compare two versions of a node by their lease."""

    def __init__(self, annotation_prefix: str) -> None:
        self._prefix = annotation_keys_prefix(annotation_prefix)
        self._keys = [self._prefix + name for name in _ANNOTATIONS]

    def digest(self, node: KubeNode) -> bytes:
        """16 bytes that change when the node's claim may; b"" for a node without one."""
        notes = node.metadata.annotations
        if not notes or not self.is_marked(node) or not node.spec.cidrs:
            return b""
        told = (node.spec.cidrs, [notes.get(key) for key in self._keys])
        return blake2b(msgspec.json.encode(told), digest_size=16).digest()

    def is_marked(self, node: KubeNode) -> bool:
        """Return whether a node's annotations say that it is flannel's."""
        return (node.metadata.annotations or {}).get(self._keys[0]) == "true"

    def unmarked(self, node: KubeNode) -> BadClaim:
        """Return what is left of the lease of a node that is there, and not marked as flannel's
        any more."""
        detail = f"its annotation {self._keys[0]} is missing, or its podCIDRs are"
        name = printable(node.metadata.name)
        return BadClaim(name, "bad-claim", detail, tuple(node.spec.cidrs))

    def claim(self, node: KubeNode) -> Lease | BadClaim | None:
        """Return the node's lease; None for a node that is not flannel's."""
        notes = node.metadata.annotations or {}
        found = lease_of_node(node.metadata.name, notes, node.spec.cidrs, self._prefix)
        if isinstance(found, BadClaim):
            return replace(found, subnets=tuple(node.spec.cidrs))
        return found


class NodeListing:
    """A whole list of nodes: its claims, their digests by node, and the list's version."""

    def __init__(self, version: str = "") -> None:
        self.claims = LeaseList([], [])
        self.digests: dict[str, bytes] = {}
        #: Which subnets a node has, by name: see ``place_of``.
        self.places: dict[str, bytes] = {}
        #: Nodes that are not flannel's, or not any more, by name.
        self.others: dict[str, BadClaim] = {}
        self.version = version

    def add(self, nodes: list[KubeNode], reader: NodeReader) -> None:
        """Take one page in."""
        for node in nodes:
            digest = reader.digest(node)
            if not digest:
                self.others[node.metadata.name] = reader.unmarked(node)
            else:
                self.digests[node.metadata.name] = digest
                self.places[node.metadata.name] = place_of(node)
                claim = reader.claim(node)
                if isinstance(claim, Lease):
                    self.claims.leases.append(claim)
                elif claim is not None:
                    self.claims.bad.append(claim)

    def keep_known(self, known: Iterable[str]) -> None:
        """Add those of ``others`` that were flannel's before, as claims that cannot be read."""
        for name in known:
            if (claim := self.others.get(name)) is not None:
                self.digests[name] = UNMARKED
                self.claims.bad.append(claim)


def list_nodes(api: KubeApi, reader: NodeReader, options: KubeOptions) -> NodeListing:
    """Return all nodes, as of one moment; page by page, and nothing when a page is missing.

    A list that grew too old between two pages is started again, and the next time
    asked for in one piece. The pages are those of the API's limit and continue:
    https://kubernetes.io/docs/reference/using-api/api-concepts/ (retrieving large
    results sets in chunks). ``kubectl get nodes`` does the same.
    """
    for limit in (options.page_size, options.page_size, 0):
        try:
            return _list_once(api, reader, limit)
        except Compacted:
            if not limit:
                raise
    raise AssertionError("the last attempt returns or raises")


def get_node(api: KubeApi, name: str) -> KubeNode | None:
    """Return one node as it is now; None where there is none of that name.

    Equivalent: ``kubectl get node NAME -o json``.
    """
    path = f"{PATH}/{quote(name, safe='')}"
    try:
        node = _node_decoder.decode(api.get(path, rule='"get" of "nodes"'))
    except RequestRejected as error:
        if error.code == 404:
            return None
        raise
    except NOT_JSON as error:
        raise _not_nodes(api, f"no node: {error}", path) from error
    if node.metadata.name != name:
        raise _not_nodes(api, f"node {server_text(node.metadata.name)!r}", path)
    return node


def newest_version(api: KubeApi) -> str:
    """Return the resource version of the nodes now, by the smallest list there is."""
    return _page(api, {"limit": 1})[0].metadata.version


class ResourceVersion(Moment, frozen=True):
    """A moment in the history of an API server's store."""

    version: str

    def breaks_with(self, before: Self) -> str:
        """Return why this is an earlier state than ``before``; "" if it is not."""
        if not went_back(before.version, self.version):
            return ""
        return (
            f"its resourceVersion is {self.version} and was {before.version}: it started empty, "
            "or an earlier state was restored"
        )


def went_back(before: str, now: str) -> bool:
    """Return whether a resource version is lower than the one before it. Those that are no numbers
    cannot be compared."""
    return before.isdecimal() and now.isdecimal() and int(now) < int(before)


def _list_once(api: KubeApi, reader: NodeReader, limit: int) -> NodeListing:
    listing: NodeListing | None = None
    more = ""
    pages, size, until = 0, 0, time.monotonic() + LIST_SECONDS
    while True:
        params: dict[str, str | int] = {"limit": limit} if limit else {}
        if more:
            params["continue"] = more
        page, length = _page(api, params)
        pages, size = pages + 1, size + length
        listing = listing or NodeListing(page.metadata.version)
        if page.metadata.version != listing.version:
            raise Compacted(
                f"{api.origin}: GET {PATH}: a page as of {page.metadata.version}, of a list as of "
                f"{listing.version}",
                hint="it is begun again; if that goes on check what answers for the API server",
            )
        listing.add(page.items or [], reader)
        if page.metadata.more and page.metadata.more == more:
            raise _not_nodes(api, "the same page again and again")
        more = page.metadata.more
        if more and (too_long := _too_long(pages, size, until)):
            raise _not_nodes(api, too_long)
        if not more and page.metadata.left:
            nodes = f"{page.metadata.left} more node{'' if page.metadata.left == 1 else 's'}"
            raise _not_nodes(api, f"{nodes}, and no way to read them")
        if not more:
            readable(listing.claims, f"{api.origin}: GET {PATH}")
            return listing


def _too_long(pages: int, size: int, until: float) -> str:
    """Return why a listing that goes on is given up; "" if it is not."""
    if pages >= LIST_PAGES:
        return f"not complete after {LIST_PAGES} pages"
    if size > ALL_PAGES_BYTES:
        return f"not complete after {ALL_PAGES_BYTES // MIB} MiB"
    if time.monotonic() > until:
        return f"not complete after {LIST_SECONDS:g} s"
    return ""


def _page(api: KubeApi, params: dict[str, str | int]) -> tuple[_NodePage, int]:
    """Return one page of nodes, and its size in bytes."""
    most = PAGE_BYTES if params.get("limit") else LIST_BYTES
    data = api.get(PATH, params, rule='"list" of "nodes"', most=most)
    try:
        page = _list_decoder.decode(data)
    except NOT_JSON as error:
        raise _not_nodes(api, f"no list of nodes: {error}") from error
    if page.kind != "NodeList" or page.metadata.version in NO_VERSION:
        kind = server_text(page.kind)
        raise _not_nodes(api, f"a {kind!r} without its version, not a list of nodes")
    if len(page.metadata.version) > VERSION_MOST:
        raise _not_nodes(api, f"resourceVersion of {len(page.metadata.version)} characters")
    if len(page.metadata.more) > _CONTINUE_MOST:
        raise _not_nodes(api, f"continue of {len(page.metadata.more)} characters")
    return page, len(data)


def _not_nodes(api: KubeApi, reason: str, path: str = PATH) -> Unavailable:
    return Unavailable(
        f"{api.origin}: GET {path}: {reason}",
        hint="check that the address is that of a Kubernetes API server",
    )
