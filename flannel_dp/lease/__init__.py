"""Leases in flannel's wire forms, and the documents that lists of them come in.

A *claim* is what some node published about itself. This package turns claims
into ``Lease`` values and checks their form only: whether a subnet, an address
or a MAC is believed is decided by admission.
"""

from __future__ import annotations

from flannel_dp.lease.documents import (
    decode_leases,
    lease_of_key_value,
    lease_of_node,
    readable,
)
from flannel_dp.lease.model import (
    ANNOTATION_PREFIX,
    BackendData,
    BadClaim,
    Claims,
    Identity,
    Lease,
    annotation_keys_prefix,
    lease_attrs_json,
    parse_subnet_key,
    printable,
    subnet_key,
)

__all__ = [
    "ANNOTATION_PREFIX",
    "BackendData",
    "BadClaim",
    "Claims",
    "Identity",
    "Lease",
    "annotation_keys_prefix",
    "decode_leases",
    "lease_attrs_json",
    "lease_of_key_value",
    "lease_of_node",
    "parse_subnet_key",
    "printable",
    "readable",
    "subnet_key",
]
