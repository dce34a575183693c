"""One lease, in each form that leases are published in: ours, an etcd key, a Kubernetes node.

A claim that cannot be read becomes a BadClaim. Where the typed decoder objects, keys match without
case, as in Go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import msgspec

from flannel_dp.cluster.json_text import NOT_TYPED, fold_keys, read_json
from flannel_dp.cluster.lease import (
    I63,
    U32,
    BackendData,
    BadClaim,
    Lease,
    LeaseList,
    parse_subnet_key,
    printable,
)
from flannel_dp.errors import LeaseRejected, Unavailable


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


class Kv(msgspec.Struct, gc=False):
    key: bytes
    create_revision: I63 = 0
    mod_revision: I63 = 0
    value: bytes = b""


class _Meta(msgspec.Struct, gc=False):
    name: str = ""
    annotations: dict[str, str] | None = None


class _Spec(msgspec.Struct, gc=False, rename={"pod_cidr": "podCIDR", "pod_cidrs": "podCIDRs"}):
    pod_cidr: str = ""
    pod_cidrs: list[str] | None = None


class NodeDocument(msgspec.Struct, gc=False):
    kind: str = "Node"
    metadata: _Meta | None = None
    spec: _Spec | None = None


_attrs_decoder = msgspec.json.Decoder(_Attrs)


_data_decoder = msgspec.json.Decoder(BackendData)


class _Bad(Exception):
    """One claim cannot be read; the text says why."""


class Collector:
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


def item_name(item: object, index: int) -> str:
    if isinstance(item, dict):
        folded = fold_keys(item)
        for key in ("name", "subnet", "ipv6subnet"):
            if isinstance(value := folded.get(key), str) and value:
                return value.replace("/", "-")
    return f"leases[{index}]"


def lease_of_item(item: object) -> Lease:
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


def lease_of_key_value(name: str, value: bytes, revision: int, moved: int = 0) -> Lease | BadClaim:
    """Return the lease under one etcd key, a BadClaim when it cannot be read.

    ``name`` is the key's last part, ``revision`` its create_revision, ``moved`` its
    mod_revision.
    """
    kv = Kv(b"", revision, moved, value)
    try:
        return lease_of_kv(name, kv)
    except (LeaseRejected, _Bad, msgspec.ValidationError, Unavailable):
        # Seldom, so it may be done twice.
        found = Collector()
        found.add(partial(str, name), partial(lease_of_kv, name, kv))
        return found.bad[0]


def lease_of_kv(name: str, kv: Kv) -> Lease:
    subnet, ipv6_subnet = parse_subnet_key(name)
    try:
        attrs = _attrs_decoder.decode(kv.value)
    except NOT_TYPED:
        attrs = _attrs_of(_folded(read_json(kv.value, "its value", Unavailable, hint="")))
    return _lease(
        attrs,
        subnet=subnet,
        ipv6_subnet=ipv6_subnet,
        name=name,
        revision=kv.create_revision,
        moved=kv.mod_revision,
    )


def node_name(item: object) -> str:
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
    node = NodeDocument(metadata=_Meta(name, dict(annotations)), spec=_Spec(pod_cidrs=pod_cidrs))
    found = Collector()
    found.add(partial(str, name), partial(lease_of_document, node, keys_prefix))
    claims = found.claims()
    return claims.leases[0] if claims.leases else claims.bad[0] if claims.bad else None


def lease_of_document(node: NodeDocument, prefix: str) -> Lease | None:
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
    except NOT_TYPED:
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
