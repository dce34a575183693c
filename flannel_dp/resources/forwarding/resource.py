"""How a program that forwards takes part in a sync: before, around and after the device.

``DataPlane`` asks here; where the kernel's own tables forward, every answer is "nothing to
do". A node changes from one kind of forwarding to the other by making its device anew, as
one UDP port serves one kind. Everything that can be is done before that: the peers are in
the map, and the routes that hang on the old device are gone, because the kernel would take
longer to flush them with it (46 us for each nexthop object that still has a route).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from msgspec.structs import replace

from flannel_dp._core import Table, parse_prefix
from flannel_dp.errors import ConfigError, FlannelDPError, KernelError, ShrinkRefused
from flannel_dp.reconcile.plan import DeviceChange
from flannel_dp.resources.device import vxlan
from flannel_dp.tables.results import add_counts
from flannel_dp.tables.scopes import nexthop_scope, route_scope

if TYPE_CHECKING:
    from flannel_dp.bpf.filters import Parent
    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.dataplane import DataPlane
    from flannel_dp.kernel.netns import NetNS
    from flannel_dp.node.view import Family
    from flannel_dp.reconcile.report import Report
    from flannel_dp.resources.forwarding.program import Dropped, Forwarding, Own

log = logging.getLogger(__name__)

#: Peers that room is made for in advance: 13 MB of maps for each family.
_MOST_RESERVED = 65536

#: Before a change of the kind of forwarding is tried again after it has failed.
_HOLD_SECONDS = 600.0

_HINT = "use '--forwarding kernel', which needs none of this"


class Program:
    """The part of one data plane. ``maps(family)`` is None where no program forwards."""

    def __init__(self, config: NetworkConfig, netns: NetNS, *, room: int) -> None:
        self._config, self._netns = config, netns
        self._families = vxlan.families_of(config)
        self._names = vxlan.other_devices(config) if config.backend.type == "vxlan" else ()
        self.forwarding: Forwarding | None = None
        self._lengths: dict[int, frozenset[int]] = {}
        self.hold = Hold()
        #: Why the maps are smaller than they had to be.
        self.cramped: FlannelDPError | None = None
        #: Why some peers are not found: their subnets have too many different lengths.
        self.crowded: ConfigError | None = None
        if config.backend.by_program:
            from flannel_dp.resources.forwarding.program import Forwarding

            device = vxlan.device_name(config, vxlan.families_of(config)[0])
            self.forwarding = Forwarding(device, netns, room=room)

    def close(self) -> None:
        if self.forwarding:
            self.forwarding.close()

    def maps(self, family: int) -> int | None:
        """The descriptor of a family's map, 0 where it is not there yet."""
        return self.forwarding.maps(family) if self.forwarding else None

    def may_convert(self) -> bool:
        """Whether a device that is ours but for its mode may be made anew: one of the kernel's
        mode always, one of the program's where a program of ours forwarded for it."""
        if self.forwarding:
            return True
        from flannel_dp.resources.forwarding.program import remains

        return any(remains(name, self._netns) for name in self._names)

    def ready(self, *, peers: int = 0, load: bool = True) -> bool:
        """Have the program, with room for so many ``peers`` of a family, or with ``load``
        False only find it. Whether the maps are others than before.

        Where larger maps cannot be had it goes on with those that there are, which take as
        many as they have room for (``warnings`` says so). Raises Unsupported, Conflict,
        KernelError, with a hint that the kernel's own tables would do.
        """
        if self.forwarding is None:
            return False
        wanted = dict.fromkeys(self._families, peers)
        with _offering():
            if not load:
                self.forwarding.look()
                return False
            self.forwarding.open(wanted)
        self.cramped = None
        if not self.forwarding.is_cramped(wanted):
            return False
        try:
            self.forwarding.grow(wanted)
        except FlannelDPError as error:
            self.cramped = error
            log.error("the maps of peers are too small, and cannot be made larger: %s", error)
            return False
        return True

    def reserve(self) -> None:
        """Have the program, with room for every peer that there may ever be: for a process
        that will not be permitted to make larger maps. Raises as ``ready``.

        That is four for each subnet of the length that the network's configuration names (they
        may be smaller), and twice as many as there are in a map that is nearly full.
        """
        if self.forwarding is None:
            return
        wanted = max(_subnets(self._config, family) for family in self._families)
        peers = min(4 * wanted, _MOST_RESERVED)
        self.ready(peers=peers)
        for family in self._families:
            held = self.forwarding.count(family)
            if held > self.forwarding.room_in(family) * 3 // 4:
                self.ready(peers=2 * held)

    def warnings(self) -> tuple[str, ...]:
        """What a person should know of the maps."""
        if self.cramped is None or self.forwarding is None:
            return ()
        room = min(map(self.forwarding.room_in, self._families))
        return (
            f"there are more peers than the {room} that the program's maps have room for, and "
            f"larger ones cannot be made: {self.cramped.message}; a new start of the agent makes "
            "them, or 'flannel-dp sync' as root",
        )

    def check(self) -> str:
        """For a plan: who forwards, and whether that can be. Raises as ``ready``."""
        if self.forwarding is None:
            return ""
        with _offering():
            return f"forwarding by eBPF: {self.forwarding.check()}"

    def lacking(self, family: Family) -> tuple[Parent, ...]:
        """Where on the family's device the program is not, and should be."""
        if self.forwarding is None or not family.index:
            return ()
        return tuple(self.forwarding.missing(family.index))

    def lacks(self, index: int) -> bool:
        """Whether the program should be on a device and is not."""
        return self.forwarding is not None and bool(self.forwarding.missing(index))

    def attach(self, index: int) -> None:
        """Put the program on a device, where it is not."""
        if self.forwarding:
            missing = self.forwarding.missing(index)
            if missing:
                self.forwarding.attach(index, missing)
                log.info("device=%d forwarding program attached=%s", index, ",".join(missing))

    def prepare(self, plane: DataPlane, families: Iterable[Family], report: Report) -> None:
        """Everything that can be done before devices are made: tell the program about the
        node, fill the maps, and clear what would hold up the end of an old device."""
        known = [family for family in families if family.device is not None]
        if self.forwarding and known:
            self._tell(plane, [*known, *plane.known.values()])
            self._lengths = {}
        replaced = [family for family in known if _goes(family)]
        _check_failing(plane, replaced, report)
        for family in known:
            if self.forwarding and (not family.index or family.lacking):
                _fill(plane, family, report)
        for family in replaced:
            for device in _goes(family):
                _clear(plane, family, plane.kernel.ifindex(device))

    def follow(self, plane: DataPlane, families: Iterable[Family]) -> None:
        """Tell the program about prefixes of another length than there were before. Before
        such a peer is written, as no packet would find it, and after others have gone."""
        if self.forwarding is None:
            return
        known = [*families]
        lengths = {family.number: frozenset(family.lengths) for family in known}
        if lengths != self._lengths:
            self._tell(plane, known)
            self._lengths = lengths

    def dropped(self) -> list[Dropped]:
        """What the program has dropped, by reason; nothing where none forwards, or where its
        maps cannot be read."""
        if self.forwarding is None:
            return []
        try:
            self.forwarding.look()
            return self.forwarding.dropped()
        except FlannelDPError as error:
            log.debug("drops of the program cannot be read: %s", error)
            return []

    def _tell(self, plane: DataPlane, known: list[Family]) -> None:
        """Tell the program what is known; packets of a family about which nothing is, as it
        cannot be synced now, go on by what was told before."""
        assert self.forwarding is not None
        missing = {*self._families} - {family.number for family in known}
        own, self.crowded = _own_of(plane, known)
        self.forwarding.tell(own, keep=missing)

    def settle(self) -> None:
        """A device was made: a program that forwarded before is not needed. Not only where a
        device was converted: who did that may not have come to its end."""
        if self.forwarding is None:
            try:
                self.remove()
            except FlannelDPError as error:
                log.warning("a program that forwarded before is still pinned: %s", error)

    def remove(self) -> list[str]:
        """Unpin whatever there is. Returns the pins' names. Raises as ``Forwarding.remove``."""
        self.close()
        from flannel_dp.resources.forwarding.program import Forwarding

        return [pin for name in self._names for pin in Forwarding(name, self._netns).remove()]


@contextmanager
def _offering() -> Iterator[None]:
    """Add to errors that the kernel's own tables would do."""
    try:
        yield
    except FlannelDPError as error:
        error.hint = f"{error.hint}; or {_HINT}" if error.hint else _HINT
        raise


class Hold:
    """Keeps a change of the kind of forwarding that failed from being tried again at once:
    each attempt takes the device down."""

    def __init__(self) -> None:
        self._reason: KernelError | None = None
        self._until = 0.0

    def begin(self, reason: KernelError) -> None:
        self._reason, self._until = reason, time.monotonic() + _HOLD_SECONDS

    @property
    def reason(self) -> KernelError | None:
        """Why it failed, for as long as it is not to be tried again."""
        return self._reason if time.monotonic() < self._until else None


class Unfinished(Exception):
    """A device was to be made anew for the other kind of forwarding, and could not be:
    ``reason`` says why. The old one is gone."""

    def __init__(self, reason: KernelError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def device_changes(families: Iterable[Family]) -> tuple[DeviceChange, ...]:
    """What happens to devices, and what is attached to them. One that serves both families
    is named once."""
    found: dict[str, DeviceChange] = {}
    for family in families:
        if family.device is None:
            continue
        plan = family.device
        lines = (
            *plan.changes,
            *(f"attach the forwarding program ({parent})" for parent in family.lacking),
        )
        before = found.get(plan.device.name, DeviceChange(plan.device.name, "none"))
        lines = (*before.changes, *(line for line in lines if line not in before.changes))
        action: str = plan.action if before.action == "none" else before.action
        action = "adopt" if lines and action == "none" else action
        found[plan.device.name] = DeviceChange(plan.device.name, action, lines)
    return tuple(found.values())


def _own_of(plane: DataPlane, families: Iterable[Family]) -> tuple[Own, ConfigError | None]:
    """What the program has to know. Of several states of a family the first says who this
    node is, and the lengths of all are in use, as far as there is room for them. What there
    is no room for comes as an error: the peers of other lengths go on."""
    from flannel_dp.resources.forwarding.program import LENGTHS, Own

    macs: dict[int, str] = {}
    sources: dict[int, str] = {}
    lengths: dict[int, Collection[int]] = {}
    crowded = None
    for family in families:
        if family.device is None:
            continue
        number = family.number
        first = number not in macs
        macs.setdefault(number, family.admission.node.mac)
        sources.setdefault(number, family.device.device.local)
        every = {*lengths.get(number, ()), *family.lengths}
        if len(every) <= LENGTHS:
            lengths[number] = every
        elif first or not lengths[number]:
            common = [n for n, _ in Counter(bytes(family.peers.lengths)).most_common()]
            lengths[number] = common[:LENGTHS]
            if len(common) > LENGTHS:
                crowded = ConfigError(
                    f"IPv{number} subnets have {len(common)} different lengths, and a program "
                    f"looks for {LENGTHS} at most: the least common ones are left out, "
                    f"{', '.join(f'/{n}' for n in sorted(common[LENGTHS:]))}",
                    hint="use '--forwarding kernel', or subnets of fewer lengths",
                )
    return Own(plane.config.backend.vni, macs, sources, lengths), crowded


def _subnets(config: NetworkConfig, family: int) -> int:
    """How many subnets of the configured length a network has."""
    length = config.subnet_len if family == 4 else config.ipv6_subnet_len
    return 1 << max(length - parse_prefix(vxlan.network_of(config, family))[2], 0)


def _fill(plane: DataPlane, family: Family, report: Report) -> None:
    """Write the peers before there is anything to forward to them. The sync that follows
    finds them, and must not count them again."""
    wanted = family.want(plane.nexthops)[0]
    diff = plane.kernel.diff(wanted.table, *wanted.scopes)
    (result,) = plane.kernel.apply(diff)
    counts = result.counts() | {"unchanged": 0, "failed": 0}
    add_counts(report.tables["peer"], counts)
    report.tables["peer"]["unchanged"] -= counts["added"] + counts["replaced"]


def _goes(family: Family) -> list[str]:
    """The devices that are deleted in favour of the family's."""
    steps = family.device.steps if family.device is not None else ()
    return [step.value for step in steps if step.op == "delete"]


def _check_failing(plane: DataPlane, replaced: list[Family], report: Report) -> None:
    """Raise the error of a family that cannot be synced, and that is forwarded by a device
    which would go: what is there is all that it has."""
    devices = {plane.kernel.ifindex(name) for family in replaced for name in _goes(family)}
    for number, error in report.family_errors.items():
        for device in devices:
            scope = route_scope(number, device=device, exclusive=True)
            if plane.kernel.diff(Table("route"), scope).removed:
                log.error("family=%d is on a device that would be replaced: %s", number, error)
                raise error


def _clear(plane: DataPlane, family: Family, device: int) -> None:
    """Remove the routes, then the nexthops, of a device that is about to be deleted."""
    every = route_scope(family.number, device=device, exclusive=True)
    plane.kernel.apply(plane.kernel.diff(Table("route"), every))
    if family.number == 4 and plane.nexthops is not None:
        plane.kernel.apply(plane.kernel.diff(Table("nexthop"), nexthop_scope(device)))


def stay(plane: DataPlane, leases: object) -> None:
    """Where a change of the kind of forwarding failed a short while ago: sync the kind that
    is there, and raise what it failed with. The device stays."""
    reason = plane.program.hold.reason
    if reason is not None:
        _sync_other(plane, leases, reason)
        raise reason


def roll_back(plane: DataPlane, leases: object, error: KernelError) -> None:
    """The new device could not be made, and the old one is gone: go back to the other kind
    of forwarding, and say so in ``error``."""
    log.error("forwarding=%s failed, going back: %s", plane.config.backend.forwarding, error)
    plane.program.hold.begin(error)
    _sync_other(plane, leases, error)


def _sync_other(plane: DataPlane, leases: object, error: KernelError) -> None:
    backend = plane.config.backend
    before = "kernel" if backend.by_program else "ebpf"
    config = replace(plane.config, backend=replace(backend, forwarding=before))
    try:
        with plane.sibling(config) as other:
            back = other.sync(leases).ok  # type: ignore[arg-type]
    except ShrinkRefused as held:  # what the list lacks is kept, and all else is done
        back = held.report is not None and held.report.ok
    except FlannelDPError as second:
        log.error("going back failed, too: %s", second)
        back = False
    error.hint = (
        f"the node forwards as before ('--forwarding {before}'); correct this and try again"
        if back
        else f"going back to '--forwarding {before}' has failed, too: sync with that"
    )
