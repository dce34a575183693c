"""How full the kernel's neighbour table is: one table for all devices and namespaces."""

from __future__ import annotations

import struct
from typing import NamedTuple

from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.links import LinkReader

_RTM_GETNEIGHTBL = 66
_NDTA_NAME, _NDTA_THRESH3, _NDTA_CONFIG = 1, 4, 5
_NDTMSG = struct.Struct("=BxH")
_CONFIG = struct.Struct("=HHI")  # struct ndt_config: key_len, entry_size, entries


class NeighbourTable(NamedTuple):
    """``entries`` of any kind that there are, and ``limit`` (gc_thresh3), the number of
    dynamic ones that there may be."""

    entries: int
    limit: int


def neighbour_table(reader: LinkReader, family: int) -> NeighbourTable | None:
    """The table of family 4 or 6: ``ip ntable show name arp_cache``. None where the kernel
    does not tell."""
    what = "look at the neighbour table"
    for _, data in reader.dump(_RTM_GETNEIGHTBL, _NDTMSG.pack(nl.af(family), 0), what):
        attrs = nl.attributes(data, _NDTMSG.size, what)
        config, limit = attrs.get(_NDTA_CONFIG), nl.u32(attrs.get(_NDTA_THRESH3))
        if config is not None and len(config) >= _CONFIG.size and limit:
            return NeighbourTable(_CONFIG.unpack_from(config)[2], limit)
    return None


def is_full(table: NeighbourTable | None, permanent: int) -> bool:
    """Whether dynamic entries are at their limit, ``permanent`` ones of ours taken off: those
    are exempt from it (neigh_alloc in net/core/neighbour.c)."""
    return table is not None and table.entries - permanent >= table.limit
