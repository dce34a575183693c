"""The messages of etcd's API (etcdserverpb, mvccpb) that are used here, no others.

The numbers are those of ``api/etcdserverpb/rpc.proto`` and ``api/mvccpb/kv.proto`` of
etcd 3.4; later versions only add fields, which are passed over. The classes are made
when this module is imported, in a pool of their own, so that they work with every
version of protobuf and beside any other etcd client in the process. Texts of answers are
``bytes`` here: whether they are UTF-8 is for their readers to see, and implementations of
protobuf differ in what they make of those that are not.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_SCHEMA = """
ResponseHeader: cluster_id=1 uint64, revision=3 int64
KeyValue: key=1 bytes, create_revision=2 int64, mod_revision=3 int64, value=5 bytes, lease=6 int64
Event: type=1 int32, kv=2 KeyValue

RangeRequest: key=1 bytes, range_end=2 bytes, limit=3 int64, revision=4 int64
RangeResponse: header=1 ResponseHeader, kvs=2 *KeyValue, more=3 bool, count=4 int64
PutRequest: key=1 bytes, value=2 bytes, lease=3 int64
DeleteRangeRequest: key=1 bytes
Compare: result=1 int32, target=2 int32, key=3 bytes, create_revision=5 int64,\
 mod_revision=6 int64, range_end=64 bytes
RequestOp: request_put=2 PutRequest, request_delete_range=3 DeleteRangeRequest
TxnRequest: compare=1 *Compare, success=2 *RequestOp
TxnResponse: header=1 ResponseHeader, succeeded=2 bool

WatchCreateRequest: key=1 bytes, range_end=2 bytes, start_revision=3 int64, progress_notify=4 bool
WatchRequest: create_request=1 WatchCreateRequest
WatchResponse: header=1 ResponseHeader, watch_id=2 int64, created=3 bool, canceled=4 bool,\
 compact_revision=5 int64, cancel_reason=6 bytes, events=11 *Event

LeaseGrantRequest: TTL=1 int64
LeaseGrantResponse: ID=2 int64, TTL=3 int64
LeaseRevokeRequest: ID=1 int64
LeaseRevokeResponse: header=1 ResponseHeader
LeaseKeepAliveRequest: ID=1 int64
LeaseKeepAliveResponse: ID=2 int64, TTL=3 int64
LeaseTimeToLiveRequest: ID=1 int64
LeaseTimeToLiveResponse: ID=2 int64, TTL=3 int64

AuthenticateRequest: name=1 string, password=2 string
AuthenticateResponse: token=2 bytes
"""

PUT, DELETE = 0, 1
"""``Event.type``."""

EQUAL, CREATE, MOD = 0, 1, 2
"""``Compare.result``, and two of ``Compare.target``."""


def _classes() -> dict[str, Any]:
    descriptor_pb2: Any = import_module("google.protobuf.descriptor_pb2")
    pools: Any = import_module("google.protobuf.descriptor_pool")
    factory: Any = import_module("google.protobuf.message_factory")
    kinds = descriptor_pb2.FieldDescriptorProto
    scalars = {
        "bool": kinds.TYPE_BOOL,
        "bytes": kinds.TYPE_BYTES,
        "int32": kinds.TYPE_INT32,
        "int64": kinds.TYPE_INT64,
        "string": kinds.TYPE_STRING,
        "uint64": kinds.TYPE_UINT64,
    }
    # Version 2 of the language sends a field that was set to zero, as etcd's own oneof does.
    file = descriptor_pb2.FileDescriptorProto(name="etcd.proto", package="etcd", syntax="proto2")
    for line in filter(None, _SCHEMA.splitlines()):
        name, _, fields = line.partition(": ")
        message = file.message_type.add(name=name)
        for text in fields.split(", "):
            label, _, kind = text.partition(" ")
            field, _, number = label.partition("=")
            added = message.field.add(name=field, number=int(number))
            many, kind = kind.startswith("*"), kind.lstrip("*")
            added.label = kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL
            if kind in scalars:
                added.type = scalars[kind]
            else:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".etcd.{kind}"
    pool = pools.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    names = [message.name for message in file.message_type]
    return {
        name: factory.GetMessageClass(pool.FindMessageTypeByName(f"etcd.{name}")) for name in names
    }


_made = _classes()

DecodeError: type[Exception] = import_module("google.protobuf.message").DecodeError
"""What is raised for bytes that are no message."""

RangeRequest: Any = _made["RangeRequest"]
RangeResponse: Any = _made["RangeResponse"]
PutRequest: Any = _made["PutRequest"]
DeleteRangeRequest: Any = _made["DeleteRangeRequest"]
Compare: Any = _made["Compare"]
RequestOp: Any = _made["RequestOp"]
TxnRequest: Any = _made["TxnRequest"]
TxnResponse: Any = _made["TxnResponse"]
WatchCreateRequest: Any = _made["WatchCreateRequest"]
WatchRequest: Any = _made["WatchRequest"]
WatchResponse: Any = _made["WatchResponse"]
LeaseGrantRequest: Any = _made["LeaseGrantRequest"]
LeaseGrantResponse: Any = _made["LeaseGrantResponse"]
LeaseRevokeRequest: Any = _made["LeaseRevokeRequest"]
LeaseRevokeResponse: Any = _made["LeaseRevokeResponse"]
LeaseKeepAliveRequest: Any = _made["LeaseKeepAliveRequest"]
LeaseKeepAliveResponse: Any = _made["LeaseKeepAliveResponse"]
LeaseTimeToLiveRequest: Any = _made["LeaseTimeToLiveRequest"]
LeaseTimeToLiveResponse: Any = _made["LeaseTimeToLiveResponse"]
AuthenticateRequest: Any = _made["AuthenticateRequest"]
AuthenticateResponse: Any = _made["AuthenticateResponse"]
