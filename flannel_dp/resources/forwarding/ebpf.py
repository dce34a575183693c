"""The eBPF program that forwards, for a data plane: loaded, large enough, informed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from msgspec import Struct

from flannel_dp._core import Claims, parse_prefix
from flannel_dp.bpf.loader import capabilities_for_pins
from flannel_dp.cluster.network import NetworkConfig, devices_of, families_of, network_of
from flannel_dp.errors import ConfigError, FlannelDPError
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
from flannel_dp.kernel.netns import NetNS
from flannel_dp.node.family import Family
from flannel_dp.resources.forwarding.forwarder import Forwarder
from flannel_dp.resources.forwarding.program import LENGTHS, Dropped, Forwarding, NodeState

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
    """Return the program's values for a family, from its facts."""
    return Known(family.mac, family.local, in_use(family.peers))


def in_use(peers: Claims, lengths: Iterable[int] = ()) -> tuple[int, ...]:
    """Return the lengths of the peers' subnets, the most common first, then other ``lengths``."""
    common = [n for n, _ in Counter(bytes(peers.lengths)).most_common()]
    return tuple(dict.fromkeys([*common, *sorted(lengths)]))


class ProgramForwarder(Forwarder):
    """The program of one data plane."""

    watches_filters = True

    @staticmethod
    def capabilities() -> frozenset[str]:
        return capabilities_for_pins()

    def __init__(
        self,
        config: NetworkConfig,
        netns: NetNS,
        *,
        room: int = 0,
        run_dir: str = DEFAULT_DIRECTORY,
    ) -> None:
        super().__init__(config, netns, run_dir=run_dir)
        self._families = families_of(config)
        self.forwarding = Forwarding(
            devices_of(config)[self._families[0]], netns, room=room, run_dir=run_dir
        )
        #: What the program knows of each family: its MAC, its source, the lengths in use.
        self._written_state: dict[int, Known] = {}
        #: Why the maps are smaller than they had to be.
        self.map_too_small: FlannelDPError | None = None
        #: Why some peers are not found: their subnets have too many different lengths.
        self.too_many_lengths: ConfigError | None = None

    def close(self) -> None:
        self.forwarding.close()

    def maps(self, family: int) -> int:
        return self.forwarding.maps(family)

    def may_convert(self) -> bool:
        """Return True: a device of the kernel's mode may always be replaced."""
        return True

    def find(self) -> None:
        with _offering():
            self.forwarding.open_pinned()

    def ready(self, *, peers: int) -> bool:
        """Load the program, with room for so many ``peers`` of a family. Return True if its maps
        were replaced by larger ones.

        Where larger maps are unavailable it goes on with the present ones, which take as many
        peers as they have room for (``warnings`` says so). Raises Unsupported, Conflict,
        KernelError, with a hint that the kernel's own tables would do.
        """
        wanted = dict.fromkeys(self._families, peers)
        with _offering():
            self.forwarding.open(wanted)
        self.map_too_small = None
        if not self.forwarding.is_too_small(wanted):
            return False
        try:
            self.forwarding.grow(wanted)
        except FlannelDPError as error:
            self.map_too_small = error
            log.error(
                "The maps of peers are too small, and cannot be made larger: %(error)s",
                {"error": error},
            )
            return False
        return True

    def reserve(self) -> None:
        """Load the program with room for four peers for each subnet of the length that the
        network's configuration names (they may be smaller), and for twice as many as there are
        in a map that is nearly full. Raises as ``ready``."""
        wanted = max(_subnets(self._config, family) for family in self._families)
        peers = min(4 * wanted, _MOST_RESERVED)
        self.ready(peers=peers)
        for family in self._families:
            held = self.forwarding.count(family)
            if held > self.forwarding.room_in(family) * 3 // 4:
                self.ready(peers=2 * held)

    def warnings(self) -> tuple[str, ...]:
        """Return what a person should know of the maps."""
        if self.map_too_small is None:
            return ()
        room = min(map(self.forwarding.room_in, self._families))
        return (
            f"there are more peers than the {room} that the program's maps have room for, and "
            f"larger ones cannot be made: {self.map_too_small.message}; a new start of the agent "
            "makes them, or 'flannel-dp sync' as root",
        )

    def check(self) -> str:
        """Raises as ``ready``."""
        with _offering():
            return f"forwarding by eBPF: {self.forwarding.check()}"

    def missing(self, index: int) -> tuple[str, ...]:
        return tuple(self.forwarding.missing(index))

    def attach(self, index: int) -> None:
        missing = self.forwarding.missing(index)
        if missing:
            self.forwarding.attach(index, missing)
            log.info(
                "The forwarding program was attached to the device with ifindex "
                "%(ifindex)d: %(filters)s",
                {"ifindex": index, "filters": ",".join(missing)},
            )

    def problem(self, index: int) -> str:
        self.find()
        if not self.forwarding.is_open:
            return "its forwarding program is not loaded: 'flannel-dp sync' loads it"
        missing = " and ".join(self.forwarding.missing(index))
        if not missing:
            return ""
        return f"its forwarding program is not attached ({missing}): 'flannel-dp sync' attaches it"

    def dropped(self) -> list[Dropped]:
        """Return the drops, none where the maps cannot be read."""
        try:
            self.forwarding.open_pinned()
            return self.forwarding.dropped()
        except FlannelDPError as error:
            log.debug("Drops of the program cannot be read: %(error)s", {"error": error})
            return []

    def write_node_state(self, known: Mapping[int, Known], *, beside: bool = False) -> None:
        """Write the facts of this node into the program's map, if they differ.

        With ``beside`` lengths that it knows are kept: peers that have them have yet to go.
        Packets of a family that is not ``known`` are forwarded by the former values.
        """
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
        """Return what the program knows, with the lengths of one family's peers as they are now.

        Which of them is the most common is found out where there is another one: that reads all
        peers. The order is of no effect but on time, and each sync sets it.
        """
        told = self._written_state.get(number)
        if told is None or {*told.lengths} == {*lengths}:
            return self._written_state
        return {**self._written_state, number: Known(told.mac, told.source, in_use(peers, lengths))}

    def forget(self) -> None:
        """Tell everything again the next time."""
        self._written_state = {}

    def remove_superseded(self, discard: Callable[[], object]) -> None:
        """The program is the one that forwards now: a process that was killed while it changed
        that may have left devices, which are deleted, once."""
        if not self._is_alone:
            discard()
            self._is_alone = True


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
    """Return what the program has to know of this node.

    Of more lengths than there is room for the most common ones are found, and the rest come
    as an error: the peers of other lengths go on.
    """
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
    """Return how many subnets of the configured length a network has."""
    length = config.subnet_len if family == 4 else config.ipv6_subnet_len
    return 1 << max(length - parse_prefix(network_of(config, family))[2], 0)
