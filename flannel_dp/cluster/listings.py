"""Lists of leases as other programs write them: etcdctl's, kubectl's, and other spellings of ours.

etcd's keys are those of etcdserverpb.RangeResponse.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sized
from functools import partial
from typing import Any

import msgspec

from flannel_dp.cluster.claims import (
    Collector,
    Kv,
    NodeDocument,
    item_name,
    lease_of_document,
    lease_of_item,
    lease_of_kv,
    node_name,
)
from flannel_dp.cluster.json_text import fold_keys
from flannel_dp.cluster.lease import (
    I63,
    BadClaim,
    LeaseList,
    printable,
)
from flannel_dp.errors import Unavailable

_Count = I63 | None


class _EtcdHeader(msgspec.Struct):
    revision: I63 = 0


class _RangeDocument(msgspec.Struct):
    kvs: list[Kv] | None = None
    more: bool = False
    header: _EtcdHeader | None = None
    count: _Count = None


class _ListMeta(msgspec.Struct, rename={"next": "continue", "left": "remainingItemCount"}):
    next: str = ""
    left: _Count = None


class _NodeList(msgspec.Struct):
    items: list[NodeDocument]
    kind: str = "List"
    metadata: _ListMeta | None = None


_range_decoder = msgspec.json.Decoder(_RangeDocument)


_nodes_decoder = msgspec.json.Decoder(_NodeList)


_VALUES_HINT = "ask etcd for keys and values: without --keys-only, --count-only and --limit"


HINT = (
    'give a complete {"leases": [...]}, the output of "etcdctl get PREFIX/subnets --prefix'
    ' -w json" or that of "kubectl get nodes -o json"'
)


def decode_listing(data: bytes, first: bytes, origin: str, prefix: str) -> LeaseList | None:
    """Read the usual spelling of a list whose ``first`` key is etcdctl's or kubectl's.

    Return None where it is neither. Raises what typed decoders raise (NOT_TYPED).
    """
    if first in (b"header", b"kvs", b"count", b"more"):
        document = _range_decoder.decode(data)
        if not document.kvs:
            return None  # its keys may be there in another spelling
        return _claims_of_range(document, document.kvs, origin)
    if first in (b"apiVersion", b"items", b"kind", b"metadata"):
        nodes = _nodes_decoder.decode(data)
        return _claims_of_nodes(nodes.items, nodes.kind, nodes.metadata, origin, prefix)
    return None


def decode_patiently(document: object, origin: str, prefix: str) -> LeaseList:
    """Return any spelling Go would take, claim by claim."""
    if isinstance(document, list):
        return _claims_of_list(document)
    if not isinstance(document, dict):
        raise Unavailable(f"{origin}: neither an object nor a list", hint=HINT)
    folded = fold_keys(document)
    if "leases" in folded:
        return _claims_of_list(_items(folded["leases"], origin, "leases"))
    if "kvs" in document or "header" in document:
        kvs = folded.get("kvs")
        about = _RangeDocument(
            more=_top(bool, folded.get("more", False), origin, "more"),
            header=_top(_EtcdHeader | None, folded.get("header"), origin, "header", strict=False),
            count=_top(_Count, folded.get("count"), origin, "count", strict=False),
        )
        return _claims_of_range(about, _items([] if kvs is None else kvs, origin, "kvs"), origin)
    if "items" in document:
        meta = _top(_ListMeta, folded.get("metadata", {}), origin, "metadata")
        kind = _top(str, folded.get("kind", "List"), origin, "kind")
        items = _items(document["items"], origin, "items")
        return _claims_of_nodes(items, kind, meta, origin, prefix)
    if document.get("kind") == "Node":
        raise Unavailable(f"{origin}: it is a single node, not a list of nodes", hint=HINT)
    names = ", ".join(printable(key) for key in list(document)[:5]) or "none"
    raise Unavailable(f"{origin}: not a list of leases (its keys: {names})", hint=HINT)


def _items(value: object, origin: str, key: str) -> list[object]:
    if not isinstance(value, list):
        raise Unavailable(f"{origin}: {key}: expected a list", hint=HINT)
    return value


def _top(kind: Any, value: object, origin: str, key: str, *, strict: bool = True) -> Any:
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise Unavailable(f"{origin}: {key}: {error}", hint=HINT) from error


def _claims_of_list(items: Iterable[object]) -> LeaseList:
    found = Collector()
    for index, item in enumerate(items):
        found.add(partial(item_name, item, index), partial(lease_of_item, item))
    return found.claims()


def _check_range(about: _RangeDocument, kvs: Sized, origin: str) -> None:
    """Raise Unavailable for an answer that does not hold all keys that it is about."""
    if about.more:
        raise Unavailable(
            f"{origin}: etcd returned only a part of the keys (more: true)",
            hint="ask etcd without --limit",
        )
    if about.count is not None and about.count != len(kvs):
        raise Unavailable(
            f"{origin}: etcd counts {about.count} key{'' if about.count == 1 else 's'}, and "
            f"{len(kvs)} {'is' if len(kvs) == 1 else 'are'} in the list",
            hint=_VALUES_HINT,
        )
    if not len(kvs) and (about.header is None or not about.header.revision):
        raise Unavailable(
            f"{origin}: no keys, and a header without a revision: that is no answer of etcd",
            hint=HINT,
        )


def _claims_of_range(about: _RangeDocument, kvs: Collection[object], origin: str) -> LeaseList:
    _check_range(about, kvs, origin)
    found = Collector()
    valued = False
    for index, item in enumerate(kvs):
        if not isinstance(item, Kv):
            try:
                item = msgspec.convert(item, Kv, strict=False)
            except msgspec.ValidationError as error:
                found.bad.append(BadClaim(f"kvs[{index}]", "bad-claim", str(error)))
                continue
        path = item.key.decode(errors="replace")
        _, below, name = path.rpartition("/subnets/")
        valued = valued or bool(item.value)
        if below:
            found.add(partial(str, name), partial(lease_of_kv, name, item))
    if found.bad and not valued:
        raise Unavailable(f"{origin}: keys without values", hint=_VALUES_HINT)
    return found.claims()


def _claims_of_nodes(
    items: Iterable[object], kind: str, meta: _ListMeta | None, origin: str, prefix: str
) -> LeaseList:
    if kind not in ("List", "NodeList"):
        raise Unavailable(f"{origin}: a {printable(kind)}, not a list of nodes", hint=HINT)
    if meta is not None and meta.next:
        raise Unavailable(
            f"{origin}: only a part of the nodes (metadata.continue is set)",
            hint="list all nodes at once, without a limit",
        )
    if meta is not None and meta.left:
        raise Unavailable(
            f"{origin}: only a part of the nodes (metadata.remainingItemCount is {meta.left})",
            hint="list all nodes at once, without a limit",
        )
    found = Collector()
    for index, item in enumerate(items):
        node = item
        if not isinstance(node, NodeDocument):
            try:
                node = msgspec.convert(item, NodeDocument)
            except msgspec.ValidationError as error:
                name = node_name(item) or f"items[{index}]"
                found.bad.append(BadClaim(printable(name), "bad-claim", str(error)))
                continue
        if node.kind != "Node":
            raise Unavailable(
                f"{origin}: items[{index}] is a {printable(node.kind)}, not a Node", hint=HINT
            )
        label = node.metadata.name if node.metadata else ""
        found.add(
            partial(str, label or f"items[{index}]"), partial(lease_of_document, node, prefix)
        )
    return found.claims()
