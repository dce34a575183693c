"""One entry of each kernel table, for people and programs to read.

The tables themselves are packed (:class:`flannel_dp._core.Table`); these
objects are made one by one when an entry is asked for.
"""

# Annotations are types here, not text: NamedTuple would compile the text of each at every start.

from typing import NamedTuple

#: Routes and nexthops of ours carry this mark (``ip route show proto 138``).
#: Unassigned in /etc/iproute2/rt_protos and in the kernel's rtnetlink.h.
PROTOCOL = 138

#: The state of an entry that stays until it is removed (linux/neighbour.h).
NUD_PERMANENT = 0x80

#: The state of an FDB entry that ``bridge`` calls static: it stays, too.
NUD_NOARP = 0x40

#: Types of routes (linux/rtnetlink.h).
UNICAST, BLACKHOLE = 1, 6

#: The routing table ``main`` (linux/rtnetlink.h).
TABLE_MAIN = 254


class Neighbour(NamedTuple):
    """``ip neigh replace ADDRESS lladdr MAC dev DEVICE nud permanent``.

    ``other`` is set on an entry that was read and has more to it than a table can hold:
    "extern_learn", where another program keeps it.
    """

    device: int
    address: str
    mac: str
    state: int = NUD_PERMANENT
    other: str = ""


class Fdb(NamedTuple):
    """``bridge fdb replace MAC dst ENDPOINT dev DEVICE self permanent``.

    ``vni``, ``port`` and ``via`` (underlay ifindex) are 0 where the device's
    own hold; ``nexthop`` is the id of an fdb nexthop group or 0, with which ``endpoint`` is "".
    ``src_vni`` is the VNI that the entry is for, on a device of several VNIs. ``state`` is
    ``NUD_PERMANENT`` or ``NUD_NOARP`` (static); one that was read and has neither ages, or is
    "extern_learn". ``flags`` are words of "extern_learn", "router" and "sticky", in this order,
    with commas. State and flags are the MAC's: all destinations of one MAC have the same.

    With ``master`` (the ifindex of a bridge) it is an entry of that bridge for its port
    ``device``, with ``vlan`` or 0: ``bridge fdb add MAC dev DEVICE master static vlan VLAN``.

    The zero MAC and MACs of groups may have several destinations: an entry for each
    (``bridge fdb append``).

    ``other`` is set on entries that were read, to words that no program can set ("offload",
    "locked", "activity_notify", "inactive"), and, where a table of kind "fdb" was read, to
    those of ``flags``; no table can hold such an entry.
    """

    device: int
    mac: str
    endpoint: str = ""
    vni: int = 0
    port: int = 0
    via: int = 0
    nexthop: int = 0
    state: int = NUD_PERMANENT
    src_vni: int = 0
    other: str = ""
    flags: str = ""
    vlan: int = 0
    master: int = 0


class Nexthop(NamedTuple):
    """``ip nexthop replace id ID via GATEWAY dev DEVICE onlink proto PROTOCOL``.

    ``other`` is set on one that was read and that no table can hold: a "group", a
    "blackhole", one with "encap" or for the "fdb".
    """

    id: int
    gateway: str
    device: int
    onlink: bool = True
    protocol: int = PROTOCOL
    other: str = ""


class Route(NamedTuple):
    """``ip route replace PREFIX nhid NEXTHOP`` or ``... via GATEWAY dev DEVICE onlink``.

    ``mtu`` is that of the route itself, in bytes (``ip route replace ... mtu 1350``); 0 is the
    device's. ``type`` is that of rtnetlink(7); ``BLACKHOLE`` goes without a gateway and device.

    ``other`` is set on a route that was read and has more to it than a table can hold:
    "multipath", "encap", "from" (for some sources only), "via the other family" (an IPv4
    route through an IPv6 gateway), and "src or metrics" (other metrics than an MTU). Where it leads
    is known only if ``other`` is empty or "src or metrics".
    """

    prefix: str
    nexthop: int = 0
    gateway: str = ""
    device: int = 0
    onlink: bool = False
    metric: int = 0
    table: int = TABLE_MAIN
    protocol: int = PROTOCOL
    tos: int = 0
    type: int = UNICAST
    other: str = ""
    mtu: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether ``gateway``, ``device`` and ``nexthop`` say where the route leads."""
        return self.other in ("", "src or metrics")


class Peer(NamedTuple):
    """A peer in the map of the forwarding program: packets to ``prefix`` go to ``endpoint``,
    with ``mac`` inside, and only that endpoint may send from there.

    ``map`` is the descriptor of the BPF map, of this process.
    ``bpftool map update pinned PATH key ... value ...``.
    """

    prefix: str
    endpoint: str
    mac: str
    map: int = 0


Entry = Neighbour | Fdb | Nexthop | Route | Peer


class Scope(NamedTuple):
    """Which part of a kernel table is read, and what in it counts as ours.

    The kernel itself filters by ``device`` (ifindex, 0 = all), by ``table``, by
    ``type`` (of routes, 0 = any) and, when ``marked``, by our ``protocol``. Of
    what it sends, an entry is ours when it carries ``protocol`` and lies inside
    ``within`` (a prefix) or ``ids`` (a range of nexthop ids); with ``exclusive``
    everything on the device is, except what the kernel itself put there. For peers
    ``device`` is the descriptor of the map, all of which is ours.

    Of FDB entries ``side`` says which are read: those of the device ("self"), of the bridge
    that it is a port of ("master"), or both (""); ``ids`` is a range of ``src_vni``; and
    ``owner`` says which are ours: "all", those with "extern_learn", or "plain", those that
    have no flags and are not in a list of destinations ("": all where ``Kernel.strict`` is
    false, else plain). What the kernel learned by itself, and addresses of devices and
    bridges, belong to no program in any case.
    """

    kind: str
    family: int
    device: int = 0
    protocol: int = PROTOCOL
    exclusive: bool = False
    marked: bool = False
    within: str = ""
    table: int = TABLE_MAIN
    ids: tuple[int, int] = (0, 0xFFFFFFFF)
    type: int = 0
    owner: str = ""
    side: str = "self"


class EventFilter(NamedTuple):
    """Which of the kernel's events are let through; the rest costs us nothing.

    All on the vxlan devices ``tunnels`` (ifindexes), the state and addresses of
    ``uplinks`` (with ``every_link``: of all devices), and of routes and nexthops
    those with our ``protocol``, on ``tunnels``, into ``networks`` (a prefix per
    family) or with an id whose top four bits are ``id_nibble``. Addresses inside
    ``networks`` are let through whatever device they are on, and so are policy rules and, of
    tables other than main and local, routes into ``networks``, default routes and halves of one
    (0.0.0.0/1). What the netlink
    ``ports`` wrote is left out where the kernel says who wrote. With ``programs`` also the
    filters and qdiscs of ``tunnels``.
    """

    tunnels: tuple[int, ...] = ()
    uplinks: tuple[int, ...] = ()
    ports: tuple[int, ...] = ()
    networks: tuple[str, ...] = ()
    every_link: bool = False
    protocol: int = PROTOCOL
    id_nibble: int = 5
    programs: bool = False
