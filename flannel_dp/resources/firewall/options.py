"""Which firewall rules were asked for, and what follows from it for a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from flannel_dp.cluster.network import NetworkConfig, devices_of, families_of, network_of
from flannel_dp.errors import require

if TYPE_CHECKING:
    from flannel_dp.resources.firewall.rules import RulesWanted


#: What writes the rules; auto takes what the node has.
ENGINES = ("auto", "nft", "iptables", "iptables-nft", "iptables-legacy")

#: The VNI whose rules have no mark: flannel's default.
_FIRST_VNI = 1


class RulesOptions(Struct, frozen=True):
    """Which firewall rules are wanted.

    ``ip_masq`` translates what leaves the pod network, ``forward`` accepts
    forwarded pod traffic, ``guard`` opens the VXLAN port to the peers of the
    accepted leases only. ``engine`` is auto, nft or iptables (see
    flannel_dp.resources.firewall.choice). With ``required`` a machine where no such program
    works is a failure, else a warning. An agent also retries a program that is installed
    and fails, and is not ready until it works.
    """

    ip_masq: bool = False
    forward: bool = True
    guard: bool = False
    engine: str = "auto"
    random_fully: bool = True
    required: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError, which names the parameter, for values that it does not take."""
        require(self.engine in ENGINES, "engine", self.engine, ", ".join(ENGINES))
        for name in ("ip_masq", "forward", "guard", "random_fully", "required"):
            require(getattr(self, name) in (True, False), name, getattr(self, name), "a bool")


class DesiredRules(Struct, frozen=True):
    """The rules of a node, and what they are about.

    ``devices`` are, by family, those that the overlay's packets pass through, ``iface`` is the
    external interface. Families in ``kept`` cannot be synced now: they keep the rules they have.
    """

    rules: RulesWanted
    devices: Mapping[int, Sequence[str]]
    iface: str
    kept: frozenset[int] = frozenset()


def check_options(options: RulesOptions, config: NetworkConfig) -> None:
    """Raise ConfigError for a guard in a network without a tunnel."""
    if options.guard:
        config.backend.need_tunnel(
            "--guard-underlay guards the VXLAN port", "leave it out with host-gw"
        )


def desired_rules(options: RulesOptions, config: NetworkConfig, view: Any) -> DesiredRules:
    """Return the rules for the families of ``view``, as flanneld would have them (rules.py)."""
    from flannel_dp.resources.firewall.rules import FamilyRules, RulesWanted, Underlay

    port, devices = config.backend.effective_port, devices_of(config)
    rules = RulesWanted(
        families={
            family.number: FamilyRules(family.admission.node.network, family.admission.node.subnet)
            for family in view.families
        },
        ip_masq=options.ip_masq,
        forward=options.forward,
        underlay={
            family.number: Underlay(port, family.peers.endpoints if options.guard else None)
            for number in devices
            for family in view.families
            if family.number == number
        },
        random_fully=options.random_fully,
        mark=mark_of(config),
    )
    return DesiredRules(
        rules,
        {family.number: _devices(family, config) for family in view.families},
        view.families[0].iface if view.families else "",
        frozenset(view.errors),
    )


def mark_of(config: NetworkConfig) -> str:
    """Return what tells the firewall rules of this network from those of others on the node: its
    VNI, "" for VNI 1; with host-gw eight digits of its networks. At most nine characters."""
    if devices_of(config):
        return "" if config.backend.vni == _FIRST_VNI else str(config.backend.vni)
    from hashlib import blake2b

    networks = " ".join(network_of(config, family) for family in families_of(config))
    return blake2b(networks.encode(), digest_size=4).hexdigest()


def _devices(family: Any, config: NetworkConfig) -> list[str]:
    """Return the devices that packets of one family pass through."""
    tunnels = [name for number, name in devices_of(config).items() if number == family.number]
    return config.backend.carriers(tunnels, family.iface)
