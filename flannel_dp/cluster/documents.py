"""The documents that lists of leases come in: ours, etcdctl's and kubectl's.

A document is decoded twice at most: by a typed decoder that knows the usual
spelling and costs about a microsecond a lease, and, when that one objects to
anything, by a patient one that matches keys without case as Go does and sets
bad claims aside one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from functools import partial
from typing import Any

import msgspec

from flannel_dp.cluster.lease import (
    ANNOTATION_PREFIX,
    I63,
    U32,
    BackendData,
    BadClaim,
    Lease,
    LeaseList,
    annotation_keys_prefix,
    parse_subnet_key,
    printable,
)
from flannel_dp.cluster.network import fold_keys, read_json
from flannel_dp.errors import LeaseRejected, Unavailable

# The documents as their writers spell them. etcd's keys are those of etcdserverpb.RangeResponse.


class _Attrs(
    msgspec.Struct,
    gc=False,
    forbid_unknown_fields=True,
    rename={
        "public_ip": "PublicIP",
        "public_ipv6": "PublicIPv6",
        "backend_type": "BackendType",
        "backend_data": "BackendData",
        "backend_v6_data": "BackendV6Data",
    },
):
    public_ip: str | None = None
    public_ipv6: str | None = None
    backend_type: str = ""
    backend_data: BackendData | None = None
    backend_v6_data: BackendData | None = None


class _LeaseDocument(msgspec.Struct, forbid_unknown_fields=True):
    leases: list[Lease]
    schema: int = 1
    # What ``flannel-dp leases`` says of them besides.
    rejected: msgspec.Raw = msgspec.Raw(b"[]")
    own: msgspec.Raw = msgspec.Raw(b"null")
    notes: msgspec.Raw = msgspec.Raw(b"[]")


class _Kv(msgspec.Struct, gc=False):
    key: bytes
    create_revision: I63 = 0
    mod_revision: I63 = 0
    value: bytes = b""


_Count = I63 | None


class _EtcdHeader(msgspec.Struct):
    revision: I63 = 0


class _RangeDocument(msgspec.Struct):
    kvs: list[_Kv] | None = None
    more: bool = False
    header: _EtcdHeader | None = None
    count: _Count = None


class _Meta(msgspec.Struct, gc=False):
    name: str = ""
    annotations: dict[str, str] | None = None


class _Spec(msgspec.Struct, gc=False, rename={"pod_cidr": "podCIDR", "pod_cidrs": "podCIDRs"}):
    pod_cidr: str = ""
    pod_cidrs: list[str] | None = None


class _NodeDocument(msgspec.Struct, gc=False):
    kind: str = "Node"
    metadata: _Meta | None = None
    spec: _Spec | None = None


class _ListMeta(msgspec.Struct, rename={"next": "continue", "left": "remainingItemCount"}):
    next: str = ""
    left: _Count = None


class _NodeList(msgspec.Struct):
    items: list[_NodeDocument]
    kind: str = "List"
    metadata: _ListMeta | None = None


_list_decoder = msgspec.json.Decoder(_LeaseDocument)
_bare_decoder = msgspec.json.Decoder(list[Lease])
_range_decoder = msgspec.json.Decoder(_RangeDocument)
_nodes_decoder = msgspec.json.Decoder(_NodeList)
_attrs_decoder = msgspec.json.Decoder(_Attrs)
_data_decoder = msgspec.json.Decoder(BackendData)

_NOT_TYPED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_FIRST_KEY = re.compile(rb'\s*(?:\[|\{\s*"([^"\\]{0,32})")')
_VALUES_HINT = "ask etcd for keys and values: without --keys-only, --count-only and --limit"
_HINT = (
    'give a complete {"leases": [...]}, the output of "etcdctl get PREFIX/subnets --prefix'
    ' -w json" or that of "kubectl get nodes -o json"'
)


def decode_leases(
    data: bytes, *, origin: str, annotation_prefix: str = ANNOTATION_PREFIX
) -> LeaseList:
    """Read a whole list of leases, in any of three forms, recognised by their content.

    - ours: ``{"leases": [{"Subnet": ..., "PublicIP": ...}]}`` or the list alone;
    - ``etcdctl get PREFIX/subnets --prefix -w json``; keys that are not
      ``.../subnets/KEY`` are ignored; no keys at all is an empty cluster, if the
      header has a revision;
    - ``kubectl get nodes -o json``; nodes without a pod CIDR, or not marked
      as flannel's by the kube-subnet-manager annotation, are ignored.

    A claim that cannot be read becomes a BadClaim, the others are returned
    all the same. A flannel node without IPv4 publishes PublicIP "0.0.0.0",
    which is read as none when there is no IPv4 subnet.

    Raises Unavailable, naming ``origin`` and where known line and column,
    when the document is not JSON, not complete or none of the three, when etcd's count
    contradicts its keys, and when there are leases and none can be read; and
    ConfigError for an ``annotation_prefix`` that cannot be one.
    """
    prefix = annotation_keys_prefix(annotation_prefix)
    try:
        claims = _decode_typed(data, origin, prefix)
    except _NOT_TYPED:
        claims = None
    if claims is None:
        document = read_json(data, origin, Unavailable, hint=_HINT)
        claims = _decode_patiently(document, origin, prefix)
    return readable(claims, origin)


def readable(claims: LeaseList, origin: str) -> LeaseList:
    """Return ``claims``. Raises Unavailable when there are some and not one is a lease: a
    list in which nothing is readable is not an empty cluster."""
    if claims.bad and not claims.leases:
        first, bad = claims.bad[0], len(claims.bad)
        which = "its only lease" if bad == 1 else f"none of its {bad} leases"
        done = "cannot be read:" if bad == 1 else "can be read; the first,"
        raise Unavailable(
            f"{origin}: {which} {done} {first.name}: {first.detail}",
            hint="check what writes them, and that the list was read with its values",
        )
    return claims


def _decode_typed(data: bytes, origin: str, prefix: str) -> LeaseList | None:
    """Return the usual spelling only; None or a decoder's error mean that it is another one."""
    start = _FIRST_KEY.match(data)
    first = start[1] if start else b""
    if start is None:
        return None
    if first in (None, b"leases", b"schema"):
        leases = _bare_decoder.decode(data) if first is None else _list_decoder.decode(data).leases
        if b'"0.0.0.0"' in data:
            leases = [_without_zero_address(lease) for lease in leases]
        return LeaseList(leases, [])
    if first in (b"header", b"kvs", b"count", b"more"):
        document = _range_decoder.decode(data)
        if not document.kvs:
            return None  # its keys may be there in another spelling
        return _claims_of_range(document, document.kvs, origin)
    if first in (b"apiVersion", b"items", b"kind", b"metadata"):
        nodes = _nodes_decoder.decode(data)
        return _claims_of_nodes(nodes.items, nodes.kind, nodes.metadata, origin, prefix)
    return None


def _without_zero_address(lease: Lease) -> Lease:
    if lease.public_ip == "0.0.0.0" and not lease.subnet:
        return msgspec.structs.replace(lease, public_ip="")
    return lease


def _decode_patiently(document: object, origin: str, prefix: str) -> LeaseList:
    """Return any spelling Go would take, claim by claim."""
    if isinstance(document, list):
        return _claims_of_list(document)
    if not isinstance(document, dict):
        raise Unavailable(f"{origin}: neither an object nor a list", hint=_HINT)
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
        raise Unavailable(f"{origin}: it is a single node, not a list of nodes", hint=_HINT)
    names = ", ".join(printable(key) for key in list(document)[:5]) or "none"
    raise Unavailable(f"{origin}: not a list of leases (its keys: {names})", hint=_HINT)


def _items(value: object, origin: str, key: str) -> list[object]:
    if not isinstance(value, list):
        raise Unavailable(f"{origin}: {key}: expected a list", hint=_HINT)
    return value


def _top(kind: Any, value: object, origin: str, key: str, *, strict: bool = True) -> Any:
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise Unavailable(f"{origin}: {key}: {error}", hint=_HINT) from error


class _Bad(Exception):
    """One claim cannot be read; the text says why."""


class _Collector:
    """Gathers leases, and bad claims beside them."""

    def __init__(self) -> None:
        self.leases: list[Lease] = []
        self.bad: list[BadClaim] = []

    def add(self, name: Callable[[], str], read: Callable[[], Lease | None]) -> None:
        try:
            lease = read()
        except LeaseRejected as error:
            self.bad.append(BadClaim(printable(name()), "bad-key", str(error)))
        except (_Bad, msgspec.ValidationError, Unavailable) as error:
            detail = error.message if isinstance(error, Unavailable) else str(error)
            self.bad.append(BadClaim(printable(name()), "bad-claim", detail))
        else:
            if lease is not None:
                self.leases.append(lease)

    def claims(self) -> LeaseList:
        return LeaseList(self.leases, self.bad)


def _claims_of_list(items: Iterable[object]) -> LeaseList:
    found = _Collector()
    for index, item in enumerate(items):
        found.add(partial(_item_name, item, index), partial(_lease_of_item, item))
    return found.claims()


def _item_name(item: object, index: int) -> str:
    if isinstance(item, dict):
        folded = fold_keys(item)
        for key in ("name", "subnet", "ipv6subnet"):
            if isinstance(value := folded.get(key), str) and value:
                return value.replace("/", "-")
    return f"leases[{index}]"


def _lease_of_item(item: object) -> Lease:
    values = _folded(item)
    attrs = _attrs_of(values)
    subnet = _text(values, "Subnet")
    revision = values.get("createrevision", 0)
    return _lease(
        attrs,
        subnet=subnet,
        ipv6_subnet=_text(values, "IPv6Subnet"),
        name=_text(values, "Name"),
        revision=_convert(I63, revision, "CreateRevision"),
        expiration=_text(values, "Expiration"),
        moved=_convert(I63, values.get("modrevision", 0), "ModRevision"),
    )


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
            hint=_HINT,
        )


def _claims_of_range(about: _RangeDocument, kvs: Collection[object], origin: str) -> LeaseList:
    _check_range(about, kvs, origin)
    found = _Collector()
    valued = False
    for index, item in enumerate(kvs):
        if not isinstance(item, _Kv):
            try:
                item = msgspec.convert(item, _Kv, strict=False)
            except msgspec.ValidationError as error:
                found.bad.append(BadClaim(f"kvs[{index}]", "bad-claim", str(error)))
                continue
        path = item.key.decode(errors="replace")
        _, below, name = path.rpartition("/subnets/")
        valued = valued or bool(item.value)
        if below:
            found.add(partial(str, name), partial(_lease_of_kv, name, item))
    if found.bad and not valued:
        raise Unavailable(f"{origin}: keys without values", hint=_VALUES_HINT)
    return found.claims()


def lease_of_key_value(name: str, value: bytes, revision: int, moved: int = 0) -> Lease | BadClaim:
    """Return the lease under one etcd key, a BadClaim when it cannot be read.

    ``name`` is the key's last part, ``revision`` its create_revision, ``moved`` its
    mod_revision.
    """
    kv = _Kv(b"", revision, moved, value)
    try:
        return _lease_of_kv(name, kv)
    except (LeaseRejected, _Bad, msgspec.ValidationError, Unavailable):
        # Seldom, so it may be done twice.
        found = _Collector()
        found.add(partial(str, name), partial(_lease_of_kv, name, kv))
        return found.bad[0]


def _lease_of_kv(name: str, kv: _Kv) -> Lease:
    subnet, ipv6_subnet = parse_subnet_key(name)
    try:
        attrs = _attrs_decoder.decode(kv.value)
    except _NOT_TYPED:
        attrs = _attrs_of(_folded(read_json(kv.value, "its value", Unavailable, hint="")))
    return _lease(
        attrs,
        subnet=subnet,
        ipv6_subnet=ipv6_subnet,
        name=name,
        revision=kv.create_revision,
        moved=kv.mod_revision,
    )


def _claims_of_nodes(
    items: Iterable[object], kind: str, meta: _ListMeta | None, origin: str, prefix: str
) -> LeaseList:
    if kind not in ("List", "NodeList"):
        raise Unavailable(f"{origin}: a {printable(kind)}, not a list of nodes", hint=_HINT)
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
    found = _Collector()
    for index, item in enumerate(items):
        node = item
        if not isinstance(node, _NodeDocument):
            try:
                node = msgspec.convert(item, _NodeDocument)
            except msgspec.ValidationError as error:
                name = _node_name(item) or f"items[{index}]"
                found.bad.append(BadClaim(printable(name), "bad-claim", str(error)))
                continue
        if node.kind != "Node":
            raise Unavailable(
                f"{origin}: items[{index}] is a {printable(node.kind)}, not a Node", hint=_HINT
            )
        label = node.metadata.name if node.metadata else ""
        found.add(partial(str, label or f"items[{index}]"), partial(_lease_of_node, node, prefix))
    return found.claims()


def _node_name(item: object) -> str:
    meta = item.get("metadata") if isinstance(item, dict) else None
    name = meta.get("name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else ""


def lease_of_node(
    name: str, annotations: Mapping[str, str], pod_cidrs: list[str], keys_prefix: str
) -> Lease | BadClaim | None:
    """Return the lease that one Kubernetes node publishes, a BadClaim when it cannot be read.

    ``annotations`` are all of the node's, ``keys_prefix`` is what
    ``annotation_keys_prefix`` made. None for a node without a pod CIDR, and for one that
    is not marked as flannel's by its kube-subnet-manager annotation.
    """
    node = _NodeDocument(metadata=_Meta(name, dict(annotations)), spec=_Spec(pod_cidrs=pod_cidrs))
    found = _Collector()
    found.add(partial(str, name), partial(_lease_of_node, node, keys_prefix))
    claims = found.claims()
    return claims.leases[0] if claims.leases else claims.bad[0] if claims.bad else None


def _lease_of_node(node: _NodeDocument, prefix: str) -> Lease | None:
    """Return a node's lease, as flannel's nodeToLease; None for a node that is not flannel's."""
    notes = (node.metadata.annotations if node.metadata else None) or {}
    spec = node.spec or _Spec()
    cidrs = spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else [])
    if not cidrs or notes.get(f"{prefix}kube-subnet-manager") != "true":
        return None
    v4 = [cidr for cidr in cidrs if ":" not in cidr]
    v6 = [cidr for cidr in cidrs if ":" in cidr]
    if len(v4) > 1 or len(v6) > 1:
        raise _Bad("spec.podCIDRs: more than one of a family")
    kind = notes.get(f"{prefix}backend-type", "")
    attrs = _Attrs(
        public_ip=notes.get(f"{prefix}public-ip"),
        public_ipv6=notes.get(f"{prefix}public-ipv6"),
        backend_type=kind,
        backend_data=_annotated_data(notes, f"{prefix}backend-data", kind),
        backend_v6_data=_annotated_data(notes, f"{prefix}backend-v6-data", kind),
    )
    name = node.metadata.name if node.metadata else ""
    return _lease(attrs, subnet="".join(v4), ipv6_subnet="".join(v6), name=name)


def _annotated_data(notes: Mapping[str, str], key: str, kind: str) -> BackendData | None:
    text = notes.get(key)
    if not text or text == "null":
        return None
    try:
        return _data_decoder.decode(text)
    except _NOT_TYPED:
        return _data_of(read_json(text, key, Unavailable, hint=""), key, kind)


def _lease(
    attrs: _Attrs,
    *,
    subnet: str,
    ipv6_subnet: str,
    name: str,
    revision: int = 0,
    expiration: str = "",
    moved: int = 0,
) -> Lease:
    public_ip = attrs.public_ip or ""
    return Lease(
        subnet=subnet,
        ipv6_subnet=ipv6_subnet,
        public_ip="" if public_ip == "0.0.0.0" and not subnet else public_ip,
        public_ipv6=attrs.public_ipv6 or "",
        backend_type=attrs.backend_type,
        backend_data=attrs.backend_data,
        backend_v6_data=attrs.backend_v6_data,
        name=name,
        revision=revision,
        expiration=expiration,
        moved=moved,
    )


def _attrs_of(values: Mapping[str, object]) -> _Attrs:
    kind = _text(values, "BackendType")
    return _Attrs(
        public_ip=_text(values, "PublicIP"),
        public_ipv6=_text(values, "PublicIPv6"),
        backend_type=kind,
        backend_data=_data_of(values.get("backenddata"), "BackendData", kind),
        backend_v6_data=_data_of(values.get("backendv6data"), "BackendV6Data", kind),
    )


def _data_of(value: object, key: str, kind: str) -> BackendData | None:
    """Return the vxlan form, None for the data of another backend."""
    if value is None or kind.lower() != "vxlan":
        return None
    values = _folded(value, key)
    vni = _convert(U32, values.get("vni", 0), f"{key}.VNI")
    return BackendData(vni, _text(values, "VtepMAC", f"{key}."))


def _folded(value: object, key: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return fold_keys(value)
    where = f"{key}: " if key else ""
    raise _Bad(f"{where}expected an object, got {_kind(value)}")


def _text(values: Mapping[str, object], key: str, where: str = "") -> str:
    value = values.get(key.casefold(), "")
    if not isinstance(value, str):
        raise _Bad(f"{where}{key}: expected a string, got {_kind(value)}")
    return value


def _convert(kind: object, value: object, key: str) -> int:
    try:
        number = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _Bad(f"{key}: {error}") from error
    return int(number)


def _kind(value: object) -> str:
    names = {bool: "true or false", dict: "an object", list: "a list", str: "a string"}
    return "null" if value is None else names.get(type(value), "a number")
