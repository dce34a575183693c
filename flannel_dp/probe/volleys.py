"""Volleys: one probe each to many peers, paced, and the answers waited for."""

from __future__ import annotations

import errno
import os
import time
from array import array
from collections.abc import Iterable, Sequence

from flannel_dp._core import PROBE_ECHO, ProbeOrigin, ProbeSocket
from flannel_dp.errors import KernelError
from flannel_dp.probe.target import Place, Target, packed, raw

#: Packets a second, at most: a few per cent of what one processor can send.
RATE = 80_000

#: Peers that are sent to before answers are read.
_SLICE = 128

#: Seconds of sending that are made up for after the machine did something else.
_BEHIND = 0.05

#: Bytes of the smallest inner packet: headers of IP and UDP (or ICMP), and the payload.
SMALLEST = {4: 52, 6: 72}


class Volleys:
    """Probes of the same kind to a list of peers. Opens sockets in the caller's network namespace.

    ``most`` is how many volleys there may be, the memory of which is four bytes for each peer.
    Raises KernelError; NotPermitted without CAP_NET_RAW.
    """

    def __init__(self, opened: ProbeSocket, family: int, most: int, rate: float = RATE) -> None:
        self._socket, self._most, self._rate = opened, most, rate
        self._smallest = SMALLEST[family]
        self._volleys: list[array[int]] = []
        self._due = self._last = time.monotonic()

    @classmethod
    def through(
        cls,
        place: Place,
        targets: Sequence[Target],
        most: int,
        *,
        paths: int,
        rate: float = RATE,
        hops: int = 1,
    ) -> Volleys:
        """Return volleys that the peers forward back, by one of ``paths`` source ports each. With 2
        ``hops`` another node forwards what the peer has sent it."""
        peers = b"".join(packed(one.mac, one.endpoint) for one in targets)
        opened = ProbeSocket(
            place.origin, peers, most, key=os.urandom(16), paths=paths, ttl=hops + 1, hops=hops
        )
        return cls(opened, place.family, most, rate)

    @classmethod
    def echo(
        cls, source: str, addresses: Sequence[str], most: int, *, rate: float = RATE
    ) -> Volleys:
        """Return ICMP echo requests to ``addresses`` by the kernel's routes: ``ping -I SOURCE``."""
        opened = ProbeSocket(
            ProbeOrigin(PROBE_ECHO, raw(source)),
            b"".join(packed("", address) for address in addresses),
            most,
            key=os.urandom(16),
        )
        return cls(opened, 6 if ":" in source else 4, most, rate)

    def __enter__(self) -> Volleys:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def __len__(self) -> int:
        return len(self._socket)

    @property
    def left(self) -> int:
        """How many more volleys there may be."""
        return self._most - len(self._volleys)

    def send(self, which: Iterable[int] | None = None, *, size: int = 0, path: int = 0) -> int:
        """Send one volley to the peers numbered in ``which`` (default: all) and return its number.

        ``size`` is that of the inner packet in bytes (default: the smallest). A packet that is too
        large for the device, or a device that is down, is a probe without an answer. Raises
        KernelError.
        """
        numbers = array("I", range(len(self)) if which is None else which)
        volley = len(self._volleys)
        self._volleys.append(numbers)
        done = 0
        while done < len(numbers):
            part = numbers[done : done + _SLICE]
            try:
                sent = self._socket.send(part, volley, max(size, self._smallest), path)
            except KernelError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ENETDOWN, errno.ENXIO, errno.ENODEV):
                    raise
                break
            done += sent
            self._due = max(self._due, time.monotonic() - _BEHIND) + sent / self._rate
            self._pause(0.0 if sent else 0.001)
        self._last = time.monotonic()
        return volley

    def _pause(self, least: float) -> None:
        """Read answers until the next packet is due, or for ``least`` seconds."""
        due = max(self._due, time.monotonic() + least)
        self._socket.receive(0)
        while (left := int((due - time.monotonic()) * 1000)) > 0:
            self._socket.receive(left)

    def settle(self, volleys: Iterable[int], timeout: float) -> None:
        """Read answers until all of ``volleys`` have theirs, or for ``timeout`` seconds after the
        last probe was sent."""
        waiting = [*volleys]
        end = self._last + timeout
        while True:
            while waiting and self._socket.is_complete(self._volleys[waiting[-1]], waiting[-1]):
                waiting.pop()
            left = end - time.monotonic()
            if not waiting or left <= 0:
                return
            self._socket.receive(max(1, int(min(left, 0.05) * 1000)))

    def counts(self, volleys: Iterable[int]) -> list[int]:
        """Return how many of ``volleys`` each peer has answered."""
        return self._socket.counts(array("I", volleys))

    def trips(self, peer: int, volleys: Iterable[int]) -> list[float]:
        """Return the round trips of a peer in seconds, of those of ``volleys`` it answered."""
        return sorted(self._socket.trips(peer, array("I", volleys)))


def raw_mac(text: str) -> bytes:
    """Return a MAC as 6 bytes."""
    return bytes.fromhex(text.replace(":", ""))
