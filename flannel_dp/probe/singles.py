"""Questions to peers that did not answer: one packet each, from the caller's network namespace.

Each question is put to all peers in question at once. Sockets raise OSError only where none can be
opened; a peer that cannot be sent to has not answered.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress

from flannel_dp.probe.packets import ECHO_REPLY, ICMP, echo_request, vxlan
from flannel_dp.probe.target import Place, Target, raw
from flannel_dp.probe.volleys import raw_mac

_EVERY_MAC = bytes([0xFF] * 6)
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_ETH_P_ALL = 3

#: A VXLAN header without the flag that says that it has a VNI: whoever listens drops it.
_NO_VNI = bytes(8)


def refusing(
    place: Place,
    targets: Sequence[Target],
    timeout: float,
    told: Callable[[], None] = lambda: None,
) -> list[bool]:
    """Return of each peer whether it answers that its UDP port of VXLAN is closed. ``told`` is
    called once all were asked. A host sends such errors once a second."""
    with ExitStack() as stack:
        asked: list[socket.socket] = []
        for target in targets:
            family = 6 if ":" in target.endpoint else 4
            one = stack.enter_context(socket.socket(_FAMILY[family], socket.SOCK_DGRAM))
            one.setblocking(False)
            with suppress(OSError):
                one.bind((place.local, 0))
                one.connect((target.endpoint, place.port))
                one.send(_NO_VNI)
            asked.append(one)
        told()
        return _errors(asked, timeout)


def _errors(asked: Sequence[socket.socket], timeout: float) -> list[bool]:
    """Wait for ICMP errors (port unreachable) of connected sockets."""
    refused: set[int] = set()
    poll, end = select.poll(), time.monotonic() + timeout
    for one in asked:
        poll.register(one, select.POLLERR)
    while len(refused) < len(asked) and (left := end - time.monotonic()) > 0:
        for fd, _ in poll.poll(int(left * 1000) + 1):
            found = next(one for one in asked if one.fileno() == fd)
            error = found.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                refused.add(fd)
                poll.unregister(fd)
    return [one.fileno() in refused for one in asked]


def answering_outside(place: Place, targets: Sequence[Target], timeout: float) -> list[bool]:
    """Return of each peer whether it answers over the underlay what it gets through the tunnel: an
    echo request of its vxlan device's address, from this node's address in the underlay.

    A peer that checks the paths of sources (rp_filter) does not answer.
    """
    answers = _ask(place, targets, timeout, place.local, lambda one: raw_mac(one.mac))
    return [bool(one) for one in answers]


def other_macs(place: Place, targets: Sequence[Target], timeout: float) -> list[str]:
    """Return the MAC of each peer that answers a frame to the broadcast MAC, and another one than
    its lease's; "" for others."""
    answers = _ask(place, targets, timeout, place.source, lambda one: _EVERY_MAC)
    return [
        mac if mac and mac != target.mac else ""
        for mac, target in zip(answers, targets, strict=True)
    ]


def _ask(
    place: Place,
    targets: Sequence[Target],
    timeout: float,
    source: str,
    mac_of: Callable[[Target], bytes],
) -> list[str]:
    """Send each peer an echo request through the tunnel; return what answered: the MAC of the frame
    where ``source`` is our address in the overlay, "yes" over the underlay, "" for nothing."""
    family, inside = place.family, source == place.source
    if family != (6 if ":" in place.local else 4):
        return ["" for _ in targets]
    mark = os.urandom(8)
    bodies = {mark + number.to_bytes(4, "big"): number for number in range(len(targets))}
    found = ["" for _ in targets]
    with ExitStack() as stack:
        if inside:
            listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            stack.enter_context(listener)
            listener.bind((place.device, _ETH_P_ALL))
        else:
            listener = socket.socket(_FAMILY[family], socket.SOCK_RAW, ICMP[family])
            stack.enter_context(listener)
            listener.bind((source, 0))
        sender = stack.enter_context(socket.socket(_FAMILY[family], socket.SOCK_DGRAM))
        sender.bind((place.local, 0))
        for body, number in bodies.items():
            target = targets[number]
            packet = echo_request(family, raw(source), raw(target.vtep), os.getpid() & 0xFFFF, body)
            frame = vxlan(place.vni, mac_of(target), raw_mac(place.mac), family, packet)
            with suppress(OSError):
                sender.sendto(frame, (target.endpoint, place.port))
        for packet in _received(listener, timeout, lambda: all(found)):
            at = packet.rfind(mark)
            number = bodies.get(packet[at : at + 12], -1) if at >= 8 else -1
            if number >= 0 and packet[at - 8] == ECHO_REPLY[family]:
                found[number] = packet[6:12].hex(":") if inside else "yes"
    return found


def _received(listener: socket.socket, timeout: float, done: Callable[[], bool]) -> Iterator[bytes]:
    """Yield packets until ``done`` or for ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not done() and (left := end - time.monotonic()) > 0:
        listener.settimeout(left)
        with suppress(TimeoutError):
            yield listener.recv(2048)
