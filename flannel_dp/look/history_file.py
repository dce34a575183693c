"""Read the files in which agents keep their events (``look/events.py``), and find a peer in them.

Lists of all peers are compared with what was known before, so that changes show that came too many
at once to be kept one by one, or while no agent ran.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from typing import NamedTuple

import msgspec

from flannel_dp.errors import ConfigError, FlannelDPError, NotPermitted
from flannel_dp.kernel.netns import NetNS, netns_identity
from flannel_dp.look.events import BEFORE, HISTORY, Event, PeerList

_NO_MAC = "00:00:00:00:00:00"


class Peer(NamedTuple):
    """A peer as it was last known; ``present`` says whether it is one now."""

    name: str
    subnet: str
    endpoint: str = ""
    mac: str = ""
    present: bool = False

    @property
    def described(self) -> str:
        """For people, as the log has it."""
        text = f"{self.subnet} at {self.endpoint}" if self.endpoint else self.subnet
        return text + (f", MAC {self.mac}" if self.mac else "")


class Kept:
    """What the agents of one network namespace have kept, the oldest first.

    ``peers`` are all that are named there by (family, subnet), also those that are gone. Raises
    NotPermitted, and FlannelDPError where nothing was kept.
    """

    def __init__(self, directory: str, netns: NetNS = None, device: str = "") -> None:
        self.peers: dict[tuple[int, str], Peer] = {}
        self.events: list[Event] = []
        self._listed: set[int] = set()
        prefix = f"{netns_identity(netns)[1]}-"
        files = [
            f"{directory}/{name}"
            for name in _listed(directory)
            if name.startswith(prefix)
            and name.endswith(HISTORY)
            and device in ("", name[len(prefix) : -len(HISTORY)])
        ]
        if not files:
            where = f"of device {device} " if device else ""
            raise FlannelDPError(
                f"no history {where}in {directory}",
                hint="'flannel-dp sync --watch' keeps one; give the --run-dir or --state-dir of "
                "its start line",
            )
        for path in files:
            self._listed.clear()
            for one in (path + BEFORE, path):
                for row in _rows(one):
                    self._take(row)
        self.events.sort(key=lambda event: event.time)

    @property
    def since(self) -> float | None:
        """The time of the first event; None where there is none."""
        return self.events[0].time if self.events else None

    def _take(self, row: Event | PeerList) -> None:
        if isinstance(row, PeerList):
            self.events += self._compared(row)
            return
        self.events.append(row)
        if row.kind in ("added", "removed", "changed"):
            self._know(row)

    def _know(self, row: Event) -> None:
        """Note a peer that one event names."""
        for text in (row.before, row.after):
            subnet, _, rest = text.partition(" at ")
            endpoint, _, mac = rest.partition(", MAC ")
            key = row.family, subnet
            if text == row.after and text:
                self.peers[key] = Peer(row.peer, subnet, endpoint, mac, present=True)
            elif text:
                self.peers[key] = Peer(row.peer, subnet, endpoint, mac)

    def _compared(self, row: PeerList) -> Iterator[Event]:
        """Yield what a list says is other than before; nothing for the first one of a file."""
        now = {(row.family, peer.subnet): peer for peer in _peers(row)}
        before = {
            key: peer
            for key, peer in self.peers.items()
            if key[0] == row.family and peer.present and row.family in self._listed
        }
        cause = "found when the agent started" if row.cause else ""
        for key, was in before.items():
            if key not in now:
                self.peers[key] = was._replace(present=False)
                yield Event(
                    row.time, "removed", row.family, was.name, was.subnet, cause, was.described
                )
        for key, peer in now.items():
            known = before.get(key)
            self.peers[key] = peer
            if row.family not in self._listed or known == peer:
                continue
            kind = "changed" if known else "added"
            yield Event(
                row.time,
                kind,
                row.family,
                peer.name,
                peer.subnet,
                cause,
                known.described if known else "",
                peer.described,
            )
        self._listed.add(row.family)

    def find(self, query: str) -> list[Peer]:
        """Return the peers that an address, a prefix or the name of a lease means: by the longest
        prefix that holds it, else those with this endpoint. Raises ConfigError where there is
        none."""
        try:
            wanted = ip_network(query, strict=False)
        except ValueError:
            found = [one for one in self.peers.values() if one.name.lower() == query.lower()]
            found = found or self._leases(query)
            if not found:
                raise _unknown(query) from None
            return found
        holding = [
            (network.prefixlen, peer)
            for (family, subnet), peer in self.peers.items()
            if family == wanted.version
            and (network := ip_network(subnet)).prefixlen <= wanted.prefixlen
            and wanted.network_address in network
        ]
        if holding:
            longest = max(length for length, _ in holding)
            return [peer for length, peer in holding if length == longest]
        address = str(wanted.network_address)
        if found := [one for one in self.peers.values() if one.endpoint == address]:
            return found
        raise _unknown(query)

    def _leases(self, name: str) -> list[Peer]:
        """Return a lease that never was a peer's: it was rejected."""
        found = {one.subnet for one in self.events if one.peer.lower() == name.lower()}
        return [Peer(name, subnet) for subnet in sorted(found) if subnet] or [
            Peer(name, "") for _ in found
        ][:1]


def _unknown(query: str) -> ConfigError:
    return ConfigError(
        f"{query!r}: no peer with this address, prefix or name is in the history",
        hint="give an address of a pod or a node, a subnet, or the name of a lease; without one, "
        "all events are shown",
    )


def _rows(path: str) -> Iterator[Event | PeerList]:
    """Yield the lines of a file; what is no event, such as a line that was cut off, is left out."""
    event, peers = msgspec.json.Decoder(Event), msgspec.json.Decoder(PeerList)
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    row = event.decode(line)
                    yield peers.decode(line) if row.kind == "peers" else row
                except (msgspec.DecodeError, ValueError):
                    continue
    except FileNotFoundError:
        return
    except PermissionError as error:
        raise _not_permitted(error, path) from error


def _peers(row: PeerList) -> Iterator[Peer]:
    size = 4 if row.family == 4 else 16
    for number, name in enumerate(row.names):
        subnet = row.subnets[size * number : size * (number + 1)]
        endpoint = row.endpoints[size * number : size * (number + 1)]
        mac = row.macs[6 * number : 6 * (number + 1)].hex(":")
        if len(endpoint) < size or number >= len(row.lengths):
            return
        yield Peer(
            name,
            f"{ip_address(subnet)}/{row.lengths[number]}",
            str(ip_address(endpoint)),
            "" if mac == _NO_MAC else mac,
            present=True,
        )


def _listed(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise _not_permitted(error, directory) from error


def _not_permitted(error: PermissionError, path: str) -> NotPermitted:
    return NotPermitted(error.errno or 13, f"read {path}", hint="run as root: it belongs to it")
