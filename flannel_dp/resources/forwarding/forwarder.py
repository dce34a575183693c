"""The program that forwards, as far as a data plane needs it: loaded, large enough, informed.

Where the kernel's own tables forward, every answer is "nothing to do".
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from msgspec import Struct

from flannel_dp._core import Claims, parse_prefix
from flannel_dp.cluster.network import (
    NetworkConfig,
    device_name,
    families_of,
    network_of,
    other_devices,
)
from flannel_dp.errors import ConfigError, FlannelDPError
from flannel_dp.kernel.netns import NetNS
from flannel_dp.node.family import Family

if TYPE_CHECKING:
    from flannel_dp.resources.forwarding.program import Dropped, Forwarding, NodeState

log = logging.getLogger(__name__)

#: Peers that room is made for in advance: 13 MB of maps for each family.
_MOST_RESERVED = 65536

_HINT = "use '--forwarding kernel', which needs none of this"


class Known(Struct, frozen=True):
    """What the program knows of one family: the inner source MAC, the tunnel's own address, and
    the lengths of the peers' subnets, the most common ones first."""

    mac: str
    source: str
    lengths: tuple[int, ...]


def known_of(family: Family) -> Known:
    """What to tell about a family, from its facts."""
    return Known(family.mac, family.local, in_use(family.peers))


def in_use(peers: Claims, lengths: Iterable[int] = ()) -> tuple[int, ...]:
    """The lengths of the peers' subnets, the most common first, then other ``lengths``."""
    common = [n for n, _ in Counter(bytes(peers.lengths)).most_common()]
    return tuple(dict.fromkeys([*common, *sorted(lengths)]))


class Forwarder:
    """The program of one data plane; ``maps(family)`` is None where no program forwards."""

    def __init__(self, config: NetworkConfig, netns: NetNS, *, room: int) -> None:
        self._config, self._netns = config, netns
        self._families = families_of(config)
        self._names = other_devices(config) if config.backend.type == "vxlan" else ()
        self.forwarding: Forwarding | None = None
        #: What the program knows of each family: its MAC, its source, the lengths in use.
        self._written_state: dict[int, Known] = {}
        #: Why the maps are smaller than they had to be.
        self.map_too_small: FlannelDPError | None = None
        #: Why some peers are not found: their subnets have too many different lengths.
        self.too_many_lengths: ConfigError | None = None
        if config.backend.by_program:
            from flannel_dp.resources.forwarding.program import Forwarding

            device = device_name(config, families_of(config)[0])
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
                self.forwarding.open_pinned()
                return False
            self.forwarding.open(wanted)
        self.map_too_small = None
        if not self.forwarding.is_too_small(wanted):
            return False
        try:
            self.forwarding.grow(wanted)
        except FlannelDPError as error:
            self.map_too_small = error
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
        if self.map_too_small is None or self.forwarding is None:
            return ()
        room = min(map(self.forwarding.room_in, self._families))
        return (
            f"there are more peers than the {room} that the program's maps have room for, and "
            f"larger ones cannot be made: {self.map_too_small.message}; a new start of the agent "
            "makes them, or 'flannel-dp sync' as root",
        )

    def check(self) -> str:
        """For a plan: who forwards, and whether that can be. Raises as ``ready``."""
        if self.forwarding is None:
            return ""
        with _offering():
            return f"forwarding by eBPF: {self.forwarding.check()}"

    def not_attached(self, index: int) -> bool:
        """Whether the program should be on a device and is not."""
        return self.forwarding is not None and bool(self.forwarding.missing(index))

    def missing(self, index: int) -> tuple[str, ...]:
        """Where on a device the program is not, and should be."""
        return tuple(self.forwarding.missing(index)) if self.forwarding else ()

    def attach(self, index: int) -> None:
        """Put the program on a device, where it is not."""
        if self.forwarding:
            missing = self.forwarding.missing(index)
            if missing:
                self.forwarding.attach(index, missing)
                log.info("device=%d forwarding program attached=%s", index, ",".join(missing))

    def dropped(self) -> list[Dropped]:
        """What the program has dropped, by reason; nothing where none forwards, or where its
        maps cannot be read."""
        if self.forwarding is None:
            return []
        try:
            self.forwarding.open_pinned()
            return self.forwarding.dropped()
        except FlannelDPError as error:
            log.debug("drops of the program cannot be read: %s", error)
            return []

    def write_node_state(self, known: Mapping[int, Known], *, beside: bool = False) -> None:
        """Tell the program about this node, if that is news.

        With ``beside`` lengths that it knows are kept: peers that have them have yet to go.
        Packets of a family that is not ``known`` now go on by what was told before.
        """
        if self.forwarding is None:
            return
        wanted = dict(known)
        if beside:
            wanted = {
                n: Known(one.mac, one.source, (*one.lengths, *self._lengths_beside(n, one)))
                for n, one in known.items()
            }
        if wanted == self._written_state:
            return
        own, self.too_many_lengths = _own_of(self._config, wanted)
        self.forwarding.write_node_state(own, keep={*self._families} - {*wanted})
        self._written_state = wanted

    def _lengths_beside(self, number: int, one: Known) -> tuple[int, ...]:
        before = self._written_state.get(number)
        return tuple(n for n in before.lengths if n not in one.lengths) if before else ()

    def with_lengths(self, number: int, peers: Claims, lengths: Iterable[int]) -> dict[int, Known]:
        """What the program knows, with the lengths of one family's peers as they are now."""
        told = self._written_state.get(number)
        if told is None:
            return self._written_state
        return {**self._written_state, number: Known(told.mac, told.source, in_use(peers, lengths))}

    def forget(self) -> None:
        """Tell everything again the next time."""
        self._written_state = {}

    def remove_superseded(self) -> None:
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


def _own_of(
    config: NetworkConfig, known: Mapping[int, Known]
) -> tuple[NodeState, ConfigError | None]:
    """What the program has to know of this node.

    Of more lengths than there is room for the most common ones are looked up, and the rest come
    as an error: the peers of other lengths go on.
    """
    from flannel_dp.resources.forwarding.program import LENGTHS, NodeState

    too_many = None
    for number, one in known.items():
        if len(one.lengths) > LENGTHS:
            out = ", ".join(f"/{n}" for n in sorted(one.lengths[LENGTHS:]))
            too_many = ConfigError(
                f"IPv{number} subnets have {len(one.lengths)} different lengths, and a program "
                f"looks for {LENGTHS} at most: the least common ones are left out, {out}",
                hint="use '--forwarding kernel', or subnets of fewer lengths",
            )
    own = NodeState(
        config.backend.vni,
        {number: one.mac for number, one in known.items()},
        {number: one.source for number, one in known.items()},
        {number: one.lengths[:LENGTHS] for number, one in known.items()},
    )
    return own, too_many


def _subnets(config: NetworkConfig, family: int) -> int:
    """How many subnets of the configured length a network has."""
    length = config.subnet_len if family == 4 else config.ipv6_subnet_len
    return 1 << max(length - parse_prefix(network_of(config, family))[2], 0)
