"""Read the filters of a device's clsact qdisc (tc-bpf(8)): the programs on its packets' path.

This is a small reader of our own, because an unchanged sync has to know that the filters are
in place, and importing pyroute2 takes longer than all of it. :mod:`flannel_dp.bpf.attach`
changes filters.
"""

from __future__ import annotations

import errno
import struct
from typing import Final, Literal

from msgspec import Struct

from flannel_dp.errors import KernelError
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import NetNS

Parent = Literal["ingress", "egress"]

#: The forwarding program comes first: what it writes into a packet, and what it drops, is
#: what the counters are to see.
FORWARDING_PRIORITY: Final = 13800
COUNTERS_PRIORITY: Final = 13801

PARENTS: Final[dict[Parent, int]] = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
HANDLE: Final = 1

_RTM_GETQDISC, _RTM_NEWQDISC = 38, 36
_RTM_GETTFILTER, _RTM_NEWTFILTER = 46, 44
_TCMSG = struct.Struct("=BxxxiIII")
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_NAME, _TCA_BPF_ID = 7, 11


class Filter(Struct, frozen=True):
    """One filter as ``tc filter show dev NAME ingress|egress`` prints it.

    ``program`` is the id of its eBPF program, 0 for another kind of filter, whose name
    (``flower``) then is ``kind``; ``name`` is what the program was attached as.
    """

    parent: Parent
    priority: int
    handle: int
    kind: str
    name: str
    program: int


def read_filters(index: int, netns: NetNS = None) -> list[Filter]:
    """Return all filters on the device with ifindex ``index``, in the order in which they run.

    Empty for a device that has no clsact qdisc, or that is not there. Raises KernelError.
    Equivalent: ``tc filter show dev NAME ingress`` and ``egress``.
    """
    found: list[Filter] = []
    with LinkReader(netns) as reader:
        for parent, number in PARENTS.items():
            what = f"dump {parent} filters of device {index}"
            body = _TCMSG.pack(0, index, 0, number, 0)
            try:
                replies = reader.dump(_RTM_GETTFILTER, body, what)
            except KernelError as error:
                if error.errno in (errno.ENODEV, errno.EINVAL):  # the latter: no such qdisc
                    continue
                raise
            for kind, data in replies:
                if kind == _RTM_NEWTFILTER:
                    one = _parse(parent, data, what)
                    found += [one] if one else []
    return found


def _parse(parent: Parent, data: bytes, what: str) -> Filter | None:
    """Return a filter; None for the entry that stands for a priority as a whole."""
    if len(data) < _TCMSG.size:
        raise nl.malformed(what)
    _, _, handle, _, info = _TCMSG.unpack_from(data)
    attrs = nl.attributes(data, _TCMSG.size, what)
    if _TCA_OPTIONS not in attrs:
        return None
    options = nl.attributes(attrs[_TCA_OPTIONS], 0, what)
    kind = _text(attrs.get(_TCA_KIND, b""))
    bpf = kind == "bpf"
    name = _text(options.get(_TCA_BPF_NAME, b"")) if bpf else ""
    program = nl.u32(options.get(_TCA_BPF_ID)) if bpf else 0
    return Filter(parent, info >> 16, handle, kind, name, program)


def has_clsact(index: int, netns: NetNS = None) -> bool:
    """Return whether the device has a clsact qdisc (``tc qdisc show dev NAME clsact``)."""
    what = f"dump qdiscs of device {index}"
    with LinkReader(netns) as reader:
        for kind, data in reader.dump(_RTM_GETQDISC, _TCMSG.pack(0, index, 0, 0, 0), what):
            # The kernel does not filter: its answer has all devices' qdiscs.
            if kind == _RTM_NEWQDISC and len(data) >= _TCMSG.size:
                if _TCMSG.unpack_from(data)[1] != index:
                    continue
                if _text(nl.attributes(data, _TCMSG.size, what).get(_TCA_KIND, b"")) == "clsact":
                    return True
    return False


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("ascii", "replace")
