"""What a person may ask of one data plane. Frozen, so that it can be compared and repeated."""

# Annotations are types here, not text: TypedDict would compile the text of each at every start.

import os
from collections.abc import Sequence
from typing import TypedDict

from msgspec import Struct

from flannel_dp.errors import require
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
from flannel_dp.kernel.netns import NetNS, check_netns
from flannel_dp.node.choice import Choice
from flannel_dp.resources.firewall.options import RulesOptions


class Keywords(TypedDict, total=False):
    """The same as type checkers see them."""

    iface: str | Sequence[str] | None
    iface_regex: Sequence[str]
    iface_can_reach: str
    public_ip: str | None
    public_ipv6: str | None
    behind_nat: bool
    subnet: str | None
    node_name: str
    netns: NetNS
    take_over: bool
    allow_shrink: bool
    nexthops: bool
    rules: RulesOptions | None
    subnet_file: str
    ip_blackhole_route: bool | None
    room: int
    counters: bool | None
    patient: bool
    hand_back: bool
    lock: bool
    run_dir: str
    path_mtus: bool


_FLAGS = (
    *("behind_nat", "take_over", "allow_shrink", "nexthops", "patient", "hand_back", "lock"),
    "path_mtus",
)
_TEXTS = ("iface_can_reach", "node_name", "subnet_file", "run_dir")


class Options(Struct, frozen=True):
    """The keyword arguments of :class:`flannel_dp.DataPlane`, which explains them."""

    iface: str | Sequence[str] | None = None
    iface_regex: Sequence[str] = ()
    iface_can_reach: str = ""
    public_ip: str | None = None
    public_ipv6: str | None = None
    behind_nat: bool = False
    subnet: str | None = None
    node_name: str = ""
    netns: NetNS = None
    take_over: bool = False
    allow_shrink: bool = False
    nexthops: bool = True
    rules: RulesOptions | None = None
    subnet_file: str = ""
    ip_blackhole_route: bool | None = None
    room: int = 0
    counters: bool | None = None
    patient: bool = False
    hand_back: bool = False
    lock: bool = True
    run_dir: str = DEFAULT_DIRECTORY
    path_mtus: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError, which names the parameter, for values of other types."""
        for name in _FLAGS:
            require(getattr(self, name) in (True, False), name, getattr(self, name), "a bool")
        for name in ("ip_blackhole_route", "counters"):
            value = getattr(self, name)
            require(value in (True, False, None), name, value, "a bool or None")
        for name in _TEXTS:
            value = getattr(self, name)
            require(isinstance(value, (str, os.PathLike)), name, value, "a text")
        for name in ("public_ip", "public_ipv6", "subnet"):
            value = getattr(self, name)
            require(value is None or isinstance(value, str), name, value, "a text or None")
        for name, several in (("iface", self.iface), ("iface_regex", self.iface_regex)):
            whole = several is None or isinstance(several, str)
            fits = whole or (
                isinstance(several, Sequence) and all(isinstance(one, str) for one in several)
            )
            require(fits, name, several, "texts")
        require(
            isinstance(self.room, int) and self.room >= 0, "room", self.room, "a number of peers"
        )
        fits = self.rules is None or isinstance(self.rules, RulesOptions)
        require(fits, "rules", self.rules, "RulesOptions or None")
        check_netns(self.netns)

    @property
    def wants_objects(self) -> bool:
        """Whether routes are to use nexthop objects: flanneld knows none."""
        return (self.nexthops, self.hand_back) == (True, False)

    @property
    def choice(self) -> Choice:
        """What of this is about the external interface and the public addresses."""
        public = {4: self.public_ip, 6: self.public_ipv6}
        iface = (self.iface,) if isinstance(self.iface, str) else tuple(self.iface or ())
        return Choice(
            iface,
            tuple(self.iface_regex),
            self.iface_can_reach,
            {family: address for family, address in public.items() if address},
            self.behind_nat,
        )
