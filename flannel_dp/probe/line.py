"""The peers of one place that are probed again and again, and the sockets for it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Literal

from flannel_dp._core import LIFE_DEAD, LIFE_NEW, PeerProber, parse_mac
from flannel_dp.errors import kernel_error
from flannel_dp.kernel.arp import learned_macs
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import NetNS, call_in_netns
from flannel_dp.probe.life import LIVES, LifeChange, MtuChange, PeerLife
from flannel_dp.probe.volleys import SMALLEST
from flannel_dp.probe.wanted import Wanted

#: Peers on the underlay whose MACs are asked for at a time.
_LEARNED = 32

#: Bytes of a probe's headers: Ethernet, and IP, UDP, VXLAN and the inner Ethernet around it.
_ETHERNET, _AROUND = 14, {4: 20 + 8 + 8 + 14, 6: 40 + 8 + 8 + 14}

#: A VXLAN header without the flag that says that it has a VNI: whoever listens drops it.
_NO_VNI = bytes(8)

Key = tuple[int, str]

PathMtuMode = Literal["off", "warn", "fix"]
"""What is done about paths that take less than the device's MTU: "off" does not measure them,
"warn" tells, with "fix" the caller sees to it and such a peer is not lossy."""


class PacketSockets:
    """AF_PACKET sockets that are opened once, while it is permitted, and bound later.

    Raises NotPermitted without CAP_NET_RAW. ``netns`` is where they are opened.
    """

    def __init__(self, netns: NetNS = None) -> None:
        self._sockets: dict[Key, socket.socket] = {}
        try:
            for family in (4, 6):
                for path in ("tunnel", "direct"):
                    self._sockets[family, path] = call_in_netns(netns, _packet_socket)
        except OSError as error:
            self.close()
            made = kernel_error(error.errno or 0, "open a socket for probes")
            made.hint = "run as root or grant CAP_NET_RAW"
            raise made from error

    def of(self, key: Key) -> int:
        """Return the descriptor of the socket for a family and a path."""
        return self._sockets[key].fileno()

    def close(self) -> None:
        """Close them all."""
        for one in self._sockets.values():
            one.close()


def _packet_socket() -> socket.socket:
    return socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)


class Line:
    """The peers of one place. ``prober`` is the C unit's; for one thread.

    Opening raises KernelError; NotPermitted without CAP_NET_RAW where no socket is given.
    """

    def __init__(
        self,
        wanted: Wanted,
        netns: NetNS,
        *,
        paths: int,
        interval: float,
        most_used: float,
        sockets: PacketSockets | None,
        path_mtu: PathMtuMode = "warn",
    ) -> None:
        self.place, self.path, self._netns, self._paths = wanted.place, wanted.path, netns, paths
        place = wanted.place
        packet = sockets.of((place.family, wanted.path)) if sockets else -1

        def opened() -> PeerProber:
            return PeerProber(
                place.origin,
                SMALLEST[place.family],
                key=os.urandom(16),
                paths=paths,
                interval=interval,
                packet=packet,
                large=place.largest if path_mtu != "off" else 0,
                narrow_is_well=path_mtu == "fix",
                most_used=most_used,
            )

        self.prober: PeerProber = call_in_netns(netns, opened)

    @property
    def bits(self) -> int:
        """How many bits one probe has on the wire."""
        around = _AROUND[6 if ":" in self.place.local else 4] if self.place.is_tunnel else 0
        return 8 * (SMALLEST[self.place.family] + _ETHERNET + around)

    def keep(self, wanted: Wanted) -> None:
        """Have exactly these peers. MACs that were learned stay."""
        self.prober.keep(wanted.peers, wanted.ways or None, wanted.way)

    def peer(self, number: int) -> PeerLife:
        """Return what is known of a peer. IndexError."""
        known = self.prober.peer(number)
        subnet, endpoint, mac, life, rtt, loss, sent, came, age, silent, _, small, takes = known
        return PeerLife(
            self.place.family,
            subnet,
            endpoint,
            mac,
            self.place.device,
            self.path,
            LIVES[life],
            rtt or None,
            loss,
            sent,
            came,
            age if age >= 0 else None,
            self._paths,
            tuple(path for path in range(self._paths) if silent >> path & 1),
            self.place.largest if small else 0,
            takes,
            self.place.largest,
        )

    def changes(self) -> list[LifeChange]:
        """Return the peers whose life has changed since this was called last."""
        return [LifeChange(self.peer(n), LIVES[old]) for n, old, _ in self.prober.changes()]

    def mtu_changes(self) -> list[MtuChange]:
        """Return the peers whose path MTU has changed since this was called last."""
        return [MtuChange(self.peer(n)) for n in self.prober.mtu_changes()]

    def narrow(self, most: int | None = None) -> list[PeerLife]:
        """Return the peers whose path takes less than the device's MTU, ``most`` at most."""
        return [self.peer(n) for n in self.prober.narrow()[:most]]

    def note_mtus(self, known: Mapping[str, int]) -> None:
        """Take these path MTUs as known, by subnet, until they are measured."""
        for subnet, mtu in known.items():
            number = self.prober.find(subnet)
            if number >= 0 and not self.prober.peer(number)[-1]:
                self.prober.note_mtu(number, mtu)

    def own_problem(self, reader: LinkReader) -> str:
        """Return what is wrong with this node's devices, in words; "" for nothing."""
        place = self.place
        for index, name in ((place.ifindex, place.device), (place.lower, "")):
            link = reader.link(index) if index else None
            if link is None and name:
                return f"{name} is gone"
            if link is not None and not link.up:
                return f"{link.name} is down"
            if link is not None and not link.carrier and link.index == place.lower:
                return f"{link.name} has no carrier"
        return ""

    def silence(self, reader: LinkReader) -> str:
        """Return what the silence of all peers says of this node, in words."""
        link = reader.link(self.place.lower) if self.place.lower else None
        uplink = link.name if link else self.place.device
        through = f" through {self.place.device}" if self.place.is_tunnel else ""
        return (
            f"no peer answers{through} any more, and {uplink} is up: the network behind it is "
            "dead, or drops all of this node's probes"
        )

    # ---- peers on the underlay, whose MACs the kernel learns

    @property
    def lacks_macs(self) -> bool:
        """Whether there are peers whose MACs have to be learned, or learned again."""
        lives = self.prober.lives
        return self.path == "direct" and bool(lives[LIFE_NEW] or lives[LIFE_DEAD])

    def learn(self) -> None:
        """Take the MACs that the kernel has learned, and have it ask for those that it has not: a
        few, each with a packet that nobody answers."""
        numbers = [
            *self.prober.numbers(LIFE_NEW, _LEARNED),
            *self.prober.numbers(LIFE_DEAD, _LEARNED),
        ]
        lacking = {self.prober.peer(number)[1]: number for number in numbers}
        if self.place.port or not lacking:
            return
        family = 6 if ":" in self.place.local else 4
        macs = learned_macs(self._netns, self.place.ifindex, family)
        self._set_macs({end: macs[end] for end in lacking if end in macs})
        call_in_netns(self._netns, self._ask, [end for end in lacking if end not in macs])

    def _set_macs(self, macs: Mapping[str, str]) -> None:
        if not macs:
            return
        for number in self.prober.numbers():
            mac = macs.get(self.prober.peer(number)[1])
            if mac:
                self.prober.set_mac(number, parse_mac(mac))

    def _ask(self, endpoints: list[str]) -> None:
        family = socket.AF_INET6 if ":" in self.place.local else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
            with suppress(OSError):
                sender.bind((self.place.local, 0))
            for endpoint in endpoints:
                with suppress(OSError):
                    sender.sendto(_NO_VNI, (endpoint, 8472))

    def close(self) -> None:
        """Close the sockets."""
        self.prober.close()
