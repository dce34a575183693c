"""Plan one vxlan device: what is wanted, what exists, and the steps from one to the other.

``plan_device`` reads and never writes; ``apply_device`` (resource.py) runs the steps and
decides nothing. A device with another program's tunnel is a Conflict; one that is
nearly ours is repaired in place, so that its ifindex, its routes and its FDB stay.

What Linux (drivers/net/vxlan/vxlan_core.c) changes on a live device: the local address
within its family, the external interface, learning, and like any device the MTU and the
MAC. What it cannot change makes a device foreign: kind, VNI, UDP port, the flags
GBP, GPE, collect-metadata, proxy, rsc, l2miss, l3miss, and the family of the tunnel.
One that differs from ours in collect-metadata alone is ours of another kind of forwarding:
it is deleted and recreated where the plan was asked to convert.
``tests/kernel/test_devices.py`` shows both.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import address_text, parse_address, prefix_holds
from flannel_dp.errors import ConfigError, Conflict, NotYet, kernel_error, require
from flannel_dp.kernel.links import SCOPE_LINK, Address, Link, LinkReader
from flannel_dp.kernel.messages import IFA_F_DADFAILED, IFA_F_TENTATIVE, VxlanInfo
from flannel_dp.kernel.netns import NetNS
from flannel_dp.kernel.sysctls import can_write_sysctl, read_sysctl
from flannel_dp.resources.device.vxlan import VxlanDevice, overlay_mtu

log = logging.getLogger(__name__)
MIN_MTU: Final = {4: 68, 6: 1280}

Action = Literal["none", "create", "adopt", "replace"]


class DeviceStep(Struct, frozen=True):
    """One thing to do to a device: ``op`` with its ``value``, and ``text`` for people."""

    op: str
    value: str
    text: str


class DevicePlan(Struct, frozen=True):
    """What ``apply_device`` will do.

    ``ifindex`` is that of the device found under the name, None when there is none. ``mtu`` is what
    the device will have, which is less than wanted where the external interface has no room for it.
    ``converts`` is set where a device of ours is to be recreated in the other collect-metadata
    mode."""

    device: VxlanDevice
    action: Action
    steps: tuple[DeviceStep, ...]
    ifindex: int | None
    mtu: int
    converts: bool = False

    @property
    def changes(self) -> tuple[str, ...]:
        """One line for each step, such as ``mtu 1400 -> 1450``; empty for action none."""
        return tuple(step.text for step in self.steps)


def plan_device(
    reader: LinkReader,
    want: VxlanDevice,
    *,
    take_over: bool = False,
    netns: NetNS = None,
    known: int = 0,
    may_convert: Callable[[], bool] | None = None,
    others: Collection[str] = (),
) -> DevicePlan:
    """Compare ``want`` with what there is and return what has to be done; write nothing.

    ``netns`` is the namespace ``reader`` was opened in. ``take_over`` allows to delete a
    foreign device of that name and make ours. ``known`` is the ifindex that our device had:
    where it goes by another name now, it gets its own back. ``may_convert`` is asked
    whether a device may be deleted that is ours but for its collect-metadata mode; with it go
    those of ``others`` that are the same: one UDP port serves one mode.

    Raises Conflict (errno EEXIST) when a device of that name is foreign and not to be
    taken over, or when another device already has this VNI and port; DeviceGone when the
    external interface is not there; NotYet when that has no room for the tunnel; ConfigError when
    ``want`` cannot work.
    """
    require(isinstance(want, VxlanDevice), "want", want, "a VxlanDevice")
    lower = reader.link(want.lower)
    if lower is not None:  # before the MTU that comes of it: the user set none
        _check_room(want, lower)
    _check(want)
    if lower is None:
        raise kernel_error(errno.ENODEV, f"find external interface {want.lower} of {want.name}")
    mtu = _possible_mtu(want, lower)
    found = reader.link(want.name)
    renaming: tuple[DeviceStep, ...] = ()
    if found is None and known:
        found = reader.link(known)
        if found is not None and differences(found, want):
            found = None  # the number means another device by now
        if found is not None:
            renaming = (DeviceStep("name", want.name, f"name {found.name} -> {want.name}"),)
    gone = _superseded(reader, want, others)
    converted = found is not None and is_other_mode(found, want)
    if (gone or converted) and not (may_convert and may_convert()):
        gone, converted = (), False
    replaces = bool(gone)
    left: tuple[DeviceStep, ...] = ()
    if found is None or converted or not found.up:
        left = _left_aside(reader, want)
        gone += left
    if found is None:
        check_no_rival(reader, want, [step.value for step in gone])
        action: Action = "replace" if replaces else "create"
        steps = (*gone, *_creation(want, lower, mtu))
        return DevicePlan(want, action, steps, None, mtu, replaces)
    if found.index == want.lower:
        raise ConfigError(
            f"{want.name} is both the vxlan device and its external interface",
            hint="name the interface that reaches the other nodes",
        )
    foreign = differences(found, want)
    if not foreign:
        steps = left + renaming + _repairs(reader, found, want, lower, mtu, netns)
        return DevicePlan(want, "adopt" if steps else "none", steps, found.index, mtu)
    if not take_over and not converted:
        raise Conflict(
            errno.EEXIST,
            f"set up device {want.name}",
            "; ".join(f"it {difference}" for difference in foreign),
            hint="delete or rename it, or pass --take-over to have it replaced",
        )
    check_no_rival(reader, want, [step.value for step in gone])
    text = f"delete the existing device: it {', '.join(foreign)}"
    steps = (DeviceStep("delete", want.name, text), *gone, *_creation(want, lower, mtu))
    return DevicePlan(want, "replace", steps, found.index, mtu, converted)


def differences(found: Link, want: VxlanDevice) -> list[str]:
    """Return how a device differs from ``want`` in what the kernel cannot change in place.

    Phrases such as ``has VNI 7, wanted 1``; [] when it can be adopted. This is flannel's
    vxlanLinksIncompat, less the external interface and local address, which can be
    changed, and with the flags that flanneld never sets.
    """
    have = found.vxlan
    if have is None:
        return [kind_text(found)]
    texts: list[str] = []
    if have.collect_metadata != want.external:
        mode = "is in collect-metadata (external) mode"
        texts.append(mode if have.collect_metadata else f"has VNI {have.vni}, wanted external")
    elif have.vni != want.vni and not want.external:
        texts.append(f"has VNI {have.vni}, wanted {want.vni}")
    if have.port != want.port:
        texts.append(f"has port {have.port}, wanted {want.port}")
    if have.gbp != want.gbp:
        texts.append("has gbp set, not wanted" if have.gbp else "has no gbp, wanted")
    if have.group is not None:
        texts.append(f"has group or remote {have.group}, none wanted")
    for flag in ("l2miss", "l3miss", "proxy", "rsc", "gpe"):
        if getattr(have, flag):
            texts.append(f"has {flag} set, not wanted")
    # A device that names no address is IPv4's (vxlan_config_validate): the kernel assumes so.
    family = 6 if ":" in (have.local or "") else 4
    if family != want.underlay_family and not (have.collect_metadata or want.external):
        texts.append(f"tunnels over IPv{family}, wanted IPv{want.underlay_family}")
    if found.lower_elsewhere:
        texts.append("has its external interface in another network namespace")
    return texts


def is_other_mode(found: Link, want: VxlanDevice) -> bool:
    """Return whether a device differs from ours in nothing but its collect-metadata mode."""
    have = found.vxlan
    if have is None or have.collect_metadata == want.external:
        return False
    if not have.collect_metadata and have.vni != want.vni:
        return False
    return not differences(
        found, replace(want, external=not want.external, local=have.local or (want.local))
    )


def _superseded(
    reader: LinkReader, want: VxlanDevice, others: Collection[str]
) -> tuple[DeviceStep, ...]:
    """Return devices of ours that are not wanted in this mode, and cannot be up beside ours."""
    steps = []
    for name in others:
        found = reader.link(name) if name != want.name else None
        if found is not None and is_other_mode(found, want):
            steps.append(
                DeviceStep("delete", name, f"delete {name}, of another mode of forwarding")
            )
    return tuple(steps)


def _left_aside(reader: LinkReader, want: VxlanDevice) -> tuple[DeviceStep, ...]:
    from flannel_dp.resources.device.aside import left_aside

    text = "left by an unfinished change of the mode"
    names = left_aside(reader, want.vni)
    return tuple(DeviceStep("delete", name, f"delete {name}, {text}") for name in names)


def kind_text(found: Link) -> str:
    return f"exists as {found.kind or 'a device of no kind'}"


@lru_cache(maxsize=8)
def _check(want: VxlanDevice) -> None:
    """Raise ConfigError, naming the value, for what the kernel would reject."""
    for what, value, parse in (
        ("local address", want.local, ipaddress.ip_address),
        ("address", want.address, ipaddress.ip_interface),
        ("network", want.network, ipaddress.ip_network),
    ):
        try:
            parse(value)
        except ValueError as error:
            raise ConfigError(f"{want.name}: {what}: {error}", hint="correct this value") from error
    for what, number, low, high in (
        ("VNI", want.vni, 0, 0xFFFFFF),
        ("port", want.port, 1, 0xFFFF),
        ("MTU", want.mtu, MIN_MTU[want.family], 0xFFFF),
    ):
        if not low <= number <= high:
            raise ConfigError(
                f"{want.name}: {what} {number} is out of range", hint=f"use {low} to {high}"
            )


def _check_room(want: VxlanDevice, lower: Link) -> None:
    """Raise NotYet where interface or path to the peers have no room for the family's least MTU."""
    room = overlay_mtu(lower.mtu, want.underlay_family)
    if room < MIN_MTU[want.family]:
        raise NotYet(
            f"{want.name}: {lower.name} has MTU {lower.mtu}, which leaves {room} bytes in the "
            f"tunnel; IPv{want.family} needs {MIN_MTU[want.family]}",
            hint=f"raise the MTU of {lower.name}",
        )
    if want.limit and want.mtu < MIN_MTU[want.family]:
        raise NotYet(
            f"{want.name}: {want.limit}, by which packets go to the peers, leaves {want.mtu} bytes "
            f"in the tunnel; IPv{want.family} needs {MIN_MTU[want.family]}",
            hint="raise the mtu of that route",
        )


def _possible_mtu(want: VxlanDevice, lower: Link) -> int:
    """Return the MTU the device will get: vxlan_config_apply() clamps to the room below."""
    room = overlay_mtu(lower.mtu, want.underlay_family)
    if room >= want.mtu:
        return want.mtu
    log.debug(
        "Device %(device)s gets MTU %(mtu)d, not %(wanted)d: %(lower)s has no room for more",
        {"device": want.name, "mtu": room, "wanted": want.mtu, "lower": lower.name},
    )
    return room


def _creation(want: VxlanDevice, lower: Link, mtu: int) -> tuple[DeviceStep, ...]:
    text = f"create vxlan id {want.vni} local {want.local} dev {lower.name} dstport {want.port}"
    if want.external:
        text = f"create vxlan external dstport {want.port}"
    text += (" learning" if want.learning else " nolearning") + (" gbp" if want.gbp else "")
    steps = [DeviceStep("create", want.name, f"{text} address {want.mac} mtu {mtu}")]
    if want.family == 6:
        steps.append(DeviceStep("disable_ipv6", "0", "disable_ipv6 = 0"))
    steps.append(DeviceStep("accept_ra", "0", "accept_ra = 0"))
    steps.append(DeviceStep("address+", want.address, f"address + {want.address}"))
    return (*steps, DeviceStep("up", "", "up"))


def _repairs(
    reader: LinkReader, found: Link, want: VxlanDevice, lower: Link, mtu: int, netns: NetNS
) -> tuple[DeviceStep, ...]:
    """Return the steps that make a compatible device ours; applied in this order."""
    have = found.vxlan
    steps = _vxlan_repairs(reader, have, want, lower) if have is not None else []
    if found.mtu != mtu:
        steps.append(DeviceStep("mtu", str(mtu), f"mtu {found.mtu} -> {mtu}"))
    if found.mac != want.mac.lower():
        steps.append(DeviceStep("mac", want.mac, f"mac {found.mac} -> {want.mac.lower()}"))
    steps += _sysctl_repairs(found, want, netns)
    steps += address_repairs(reader.addresses(found.index, want.family), want)
    if not found.up:
        steps.append(DeviceStep("up", "", "up"))
    return tuple(steps)


def _vxlan_repairs(
    reader: LinkReader, have: VxlanInfo, want: VxlanDevice, lower: Link
) -> list[DeviceStep]:
    steps: list[DeviceStep] = []
    if want.external:
        return steps
    if have.lower != want.lower:
        before = reader.link(have.lower) if have.lower else None
        old = before.name if before else str(have.lower or "none")
        steps.append(DeviceStep("lower", str(want.lower), f"dev {old} -> {lower.name}"))
    if have.local != address_text(parse_address(want.local)[1]):
        steps.append(
            DeviceStep("local", want.local, f"local {have.local or 'none'} -> {want.local}")
        )
    if have.learning != want.learning:
        words = {True: "learning", False: "nolearning"}
        text = f"{words[have.learning]} -> {words[want.learning]}"
        steps.append(DeviceStep("learning", str(int(want.learning)), text))
    return steps


def _sysctl_repairs(found: Link, want: VxlanDevice, netns: NetNS) -> list[DeviceStep]:
    steps: list[DeviceStep] = []
    where = ("ipv6", "conf", found.name)
    if want.family == 6:
        disabled = read_sysctl(*where, "disable_ipv6", netns=netns)
        if disabled not in (None, "0"):
            steps.append(DeviceStep("disable_ipv6", "0", f"disable_ipv6 {disabled} -> 0"))
    accept = read_sysctl(*where, "accept_ra", netns=netns)
    # Where /proc/sys is read-only, as in most containers, a plan must not promise this
    # again at every sync; flannel ignores the failure as well.
    if accept not in (None, "0") and can_write_sysctl(*where, "accept_ra", netns=netns):
        steps.append(DeviceStep("accept_ra", "0", f"accept_ra {accept} -> 0"))
    return steps


def address_repairs(present: list[Address], want: VxlanDevice) -> list[DeviceStep]:
    """Remove what blocks the wanted address, add it, and only then remove the rest.

    IPv4 loses all routes of a device with its last address (fib_disable_ip), so ours
    comes first. IPv6 rejects one address under two prefix lengths, so that goes before.
    """
    address, _, length = want.address.partition("/")
    raw = parse_address(address)[1]
    address, bits = address_text(raw), int(length or 8 * len(raw))
    before: list[DeviceStep] = []
    after: list[DeviceStep] = []
    there = False
    for each in present:
        text = f"{each.address}/{each.prefixlen}"
        removal = DeviceStep("address-", text, f"address - {text}")
        is_wanted = (each.address, each.prefixlen) == (address, bits)
        if is_wanted and not each.flags & (IFA_F_DADFAILED | IFA_F_TENTATIVE):
            there = True
        elif want.family == 6 and each.address == address:
            before.append(removal)
        elif (
            each.scope != SCOPE_LINK
            if want.family == 6
            else prefix_holds(want.network, each.address)
        ):
            after.append(removal)
    add = [] if there else [DeviceStep("address+", want.address, f"address + {want.address}")]
    return before + add + after


def check_no_rival(reader: LinkReader, want: VxlanDevice, going: Collection[str] = ()) -> None:
    """Raise Conflict when another device has our VNI and port; the kernel would say EEXIST.
    ``going`` are devices that will be deleted first.

    vxlan_config_validate() lets IPv4 and IPv6 devices share both. A collect-metadata
    device takes every VNI of its port, and one with other receive flags
    (VXLAN_F_RCV_FLAGS) cannot share the socket of a port while it is up.
    """
    for other in reader.links("vxlan"):
        have = other.vxlan
        if have is None or other.name == want.name or have.port != want.port:
            continue
        if other.name in going:
            continue
        family = 6 if ":" in (have.local or have.group or "") else 4
        if have.collect_metadata:
            holds = "has every VNI (external mode)"
        elif want.external:
            if not other.up:
                continue
            holds = f"has VNI {have.vni}, where ours would take every one,"
        elif family != want.underlay_family:
            continue
        elif have.vni == want.vni:
            holds = f"has VNI {have.vni}"
        elif other.up and (have.gbp, have.gpe) != (want.gbp, False):
            holds = "receives with other flags (gbp, gpe)"
        else:
            continue
        raise Conflict(
            errno.EEXIST,
            f"create device {want.name}",
            f"device {other.name} already {holds} on port {have.port}",
            hint=f"delete {other.name}, or choose another VNI or Port",
        )
