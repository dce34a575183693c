"""What of other programs diverts packets of pods, for show and explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

from msgspec.structs import replace

from flannel_dp.cluster.network import families_of, network_of
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.links import LinkReader, RouteMatch
from flannel_dp.kernel.messages import RT_TABLE_MAIN
from flannel_dp.look.explanation import Explanation, Step, holds, length_of
from flannel_dp.resources.path.place import Place
from flannel_dp.resources.path.resource import (
    PathChange,
    are_usual,
    places_of,
    read_path,
    shortest_route,
)

if TYPE_CHECKING:
    from flannel_dp.look.overlay import Overlay
    from flannel_dp.node.family import Family
    from flannel_dp.node.path import Diversion
    from flannel_dp.resources.device.view import DeviceView


def find_diversions(
    overlay: Overlay,
    devices: Mapping[int, DeviceView | None],
    families: Sequence[Family] = (),
) -> PathChange:
    """Read policy rules, their tables and addresses, for families by number.

    ``families`` are those of which leases are known. Without, this node's subnet is that of its
    device or of subnet.env; where neither is there, devices with a pod network's address are not
    compared. Raises FlannelDPError as ``Host.links``.
    """
    return read_path(overlay.host, places(overlay, devices, families).values())


def places(
    overlay: Overlay,
    devices: Mapping[int, DeviceView | None],
    families: Sequence[Family] = (),
) -> dict[int, Place]:
    """Return what ``find_diversions`` asks about, by family."""
    known = {place.number: place for place in places_of(overlay.config, families)}
    unknown = {number: one for number, one in devices.items() if number not in known}
    if unknown:
        known |= _without_leases(overlay, unknown)
    found = {}
    for number, device in devices.items():
        where = {"device": device.index, "device_name": device.name} if device else {}
        found[number] = replace(known[number], **where)
    return found


def _without_leases(overlay: Overlay, devices: Mapping[int, DeviceView | None]) -> dict[int, Place]:
    config = overlay.config
    subnets: dict[int, str] = {}
    with suppress(FlannelDPError):
        subnets |= overlay.resolver.previous()
    for number, device in devices.items():
        if held := subnet_of_device(overlay, number, device.addresses if device else ()):
            subnets[number] = held
    networks = {number: network_of(config, number) for number in families_of(config)}
    uplinks = {device.lower for device in devices.values() if device and device.lower}
    with overlay.host.links() as reader:
        indexes = {name: link.index for name in uplinks if (link := reader.link(name))}
    return {
        number: Place(
            number,
            networks,
            subnets,
            shortest_route(config, number, subnets.get(number, "")),
            uplink=indexes.get(device.lower, 0) if device else 0,
            local=device.local if device else "",
        )
        for number, device in devices.items()
    }


def subnet_of_device(overlay: Overlay, number: int, addresses: Sequence[str]) -> str:
    """Return this node's subnet by the address of its device and flannel's subnet length, ""
    without."""
    config = overlay.config
    length = config.subnet_len if number == 4 else config.ipv6_subnet_len
    inside = [text.partition("/")[0] for text in addresses]
    found = [text for text in inside if holds(network_of(config, number), text)]
    return f"{found[0]}/{length}" if found else ""


class PathOfPods:
    """What policy rules, and what diverts, mean for the answer about one address.

    ``match`` is the route that packets of pods take where that is not the node's own; ``rule`` the
    policy rule that answers, "" on a node with the usual three.
    """

    def __init__(
        self,
        overlay: Overlay,
        reader: LinkReader,
        address: str,
        device: DeviceView | None,
        families: Sequence[Family],
    ) -> None:
        number = 6 if ":" in address else 4
        self._address = address
        place = places(overlay, {number: device}, families)[number]
        found = read_path(overlay.host, [place]).found.get(number, ())
        self._found = found
        self.diversion = self._of(address, of_tunnel=False)
        self.rules = reader.rules(number)
        self._place, self._reader = place, reader

    def match(self, own: RouteMatch | None) -> RouteMatch | None:
        """Return the route of packets of pods; ``own`` is the node's own, and theirs unless a
        policy rule diverts them. None where one drops them.

        The kernel is asked for a pod that is behind a device with an address in this node's subnet;
        before the first pod has one, for the address of our device in that subnet.
        """
        if self.diversion is None or self.diversion.rule < 0 or not self._place.subnet:
            return own
        subnet = ip_network(self._place.subnet)
        known = self._reader.addresses(family=self._place.number)
        inside = [one for one in known if ip_address(one.address) in subnet]
        for one in inside:
            if one.index != self._place.device:
                pod = str(subnet[-2])  # none of the node's own
                return self._reader.route_match(self._address, source=pod, iif=one.index)
        if self.diversion.kind == "rule":  # which needs no route to drop
            return None
        for one in inside:
            return self._reader.route_match(self._address, source=one.address)
        return own

    def applied(self, answer: Explanation, match: RouteMatch | None) -> Explanation:
        """Return the answer with the rule that was followed, and with what diverts in place of
        advice that cannot work."""
        diversion = self.diversion
        if answer.verdict == "own-address" and diversion and diversion.table != "local":
            diversion = None  # table local answers first
        if answer.verdict == "peer-endpoint":
            diversion = self._of(self._address, of_tunnel=True)
        elif answer.verdict == "outside-network" and answer.way != "tunnel":
            diversion = None
        outer = self._of(answer.lease.public_ip, of_tunnel=True) if answer.lease else None
        steps: list[Step] = []
        for step in answer.steps:
            if step.name == "route":
                steps += self._rule_step(match, diversion)
            told = {"route": diversion, "packet": outer}.get(step.name)
            if told:  # the entry itself may be the wanted one
                wanted = "" if step.ok else step.wanted
                step = replace(step, wanted=wanted, ok=False, text=str(told))
            steps.append(step)
        return replace(answer, steps=tuple(steps))

    def _of(self, address: str, *, of_tunnel: bool) -> Diversion | None:
        for one in self._found:
            if address and one.of_tunnel == of_tunnel and holds(one.prefix, address):
                return one
        return None

    def _rule_step(self, match: RouteMatch | None, diversion: Diversion | None) -> list[Step]:
        """Return the policy rule that answers, where there are others than the kernel's own."""
        if are_usual(tuple(self.rules)):
            return []
        from flannel_dp.resources.path.evidence import rule_that_answers

        rule = rule_that_answers(
            self._reader,
            self._place,
            self.rules,
            match.table if match else 0,
            length_of(match.prefix) if match else 0,
            diversion.rule if diversion else -1,
        )
        right = match is not None and match.table == RT_TABLE_MAIN
        return [Step("rule", "" if right else "lookup main", rule, right)] if rule else []
