"""Network namespaces and what is in them at first, made by messages and not by programs.

Thousands are made in a run; ``ip`` takes ten times as long for each. What is made is what these
commands make: ``ip netns add NAME``, ``ip link set lo up``, ``ip link add``, ``ip address add``.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

FOLDER: Final = Path("/run/netns")

_CLONE_NEWNET, _MS_BIND, _MNT_DETACH = 0x40000000, 0x1000, 2
_NEWLINK, _DELLINK, _GETLINK, _NEWADDR, _GETROUTE = 16, 17, 18, 20, 26
_REQUEST, _ACK, _CREATE = 1, 4, 0x600  # NLM_F_CREATE | NLM_F_EXCL
_UP, _LOWER_UP, _NODAD, _LOCAL = 1, 1 << 16, 2, 2
_ADDRESS, _IFNAME, _MTU, _MASTER, _LINKINFO, _NS_FD = 1, 3, 4, 10, 18, 28

_libc = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


class Namespace:
    """One namespace; ``name`` is what ``ip -n`` takes."""

    def __init__(self, name: str) -> None:
        self.name, self._path = name, FOLDER / name
        self._path.touch()
        self._socket = _on_a_thread(self._make)
        self._change(1)  # lo up

    def _make(self) -> socket.socket:
        """On a thread that lives only for it: a thread has the namespace that it was given."""
        _call("unshare", _CLONE_NEWNET)
        own = b"/proc/thread-self/ns/net"
        _call("mount", own, os.fsencode(self._path), b"none", ctypes.c_ulong(_MS_BIND), None)
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)

    def close(self) -> None:
        """Give the descriptor back; the namespace stays."""
        self._socket.close()

    def add_bridge(self, name: str) -> int:
        """A bridge that is up and does no snooping; its ifindex."""
        # Snooping would withhold the first neighbour solicitations until a querier speaks.
        data = _attribute(2, _attribute(23, b"\0"))  # IFLA_INFO_DATA, IFLA_BR_MCAST_SNOOPING
        self._add_link(_text(_IFNAME, name) + _info("bridge", data))
        index = self.index(name)
        self._change(index)
        return index

    def add_veth(self, name: str, mtu: int, peer: str, other: Namespace) -> int:
        """A pair of which ``peer`` is in another namespace; the ifindex of ``name``."""
        with open(other._path) as there:
            far = _text(_IFNAME, peer) + _number(_MTU, mtu) + _number(_NS_FD, there.fileno())
            data = _attribute(2, _attribute(1, bytes(16) + far))  # VETH_INFO_PEER
            near = _text(_IFNAME, name) + _number(_MTU, mtu)
            self._add_link(near + _info("veth", data))
        return self.index(name)

    def add_address(self, index: int, address: str, bits: int) -> None:
        """An address without duplicate address detection."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        raw = socket.inet_pton(family, address)
        flags = _NODAD if ":" in address else 0
        head = struct.pack("=BBBBI", family, bits, flags, 0, index)
        self._ask(_NEWADDR, _CREATE, head + _attribute(2, raw) + _attribute(1, raw))

    def up(self, index: int) -> None:
        self._change(index)

    def join(self, index: int, bridge: int) -> None:
        """Make a device a port of a bridge."""
        self._change(index, _number(_MASTER, bridge))

    def remove(self, index: int) -> None:
        self._ask(_DELLINK, 0, struct.pack("=BxHiII", 0, 0, index, 0, 0))

    def index(self, name: str) -> int:
        return self._link(_text(_IFNAME, name))[0]

    def has_carrier(self, index: int) -> bool:
        return bool(self._link(b"", index)[1] & _LOWER_UP)

    def is_local(self, address: str) -> bool:
        """Whether the kernel takes packets to an IPv6 address: some time after the device had a
        carrier it makes the local route (``addrconf_dad_completed``)."""
        head = struct.pack("=8BI", socket.AF_INET6, 128, 0, 0, 0, 0, 0, 0, 0)
        try:
            answer = self._ask(
                _GETROUTE, 0, head + _attribute(1, socket.inet_pton(socket.AF_INET6, address))
            )
        except OSError:  # no route
            return False
        return answer[16 + 7] == _LOCAL

    def _link(self, attributes: bytes, index: int = 0) -> tuple[int, int]:
        """Index and flags."""
        answer = self._ask(_GETLINK, 0, struct.pack("=BxHiII", 0, 0, index, 0, 0) + attributes)
        _, _, found, flags = struct.unpack_from("=BxHiI", answer, 16)
        return found, flags

    def _add_link(self, attributes: bytes) -> None:
        self._ask(_NEWLINK, _CREATE, bytes(16) + attributes)

    def _change(self, index: int, attributes: bytes = b"") -> None:
        self._ask(_NEWLINK, 0, struct.pack("=BxHiII", 0, 0, index, _UP, _UP) + attributes)

    def _ask(self, kind: int, flags: int, body: bytes) -> bytes:
        """Send a request; its answer, or its acknowledgement. Raises OSError."""
        flags |= _REQUEST | (0 if kind in (_GETLINK, _GETROUTE) else _ACK)
        self._socket.sendall(struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body)
        answer = self._socket.recv(1 << 16)
        (said,) = struct.unpack_from("=H", answer, 4)
        if said == 2:  # NLMSG_ERROR
            (code,) = struct.unpack_from("=i", answer, 16)
            if code:
                raise OSError(-code, f"{self.name}: request {kind}: {os.strerror(-code)}")
        return answer


def delete(name: str) -> None:
    """``ip netns delete NAME``; nothing if there is none."""
    path = FOLDER / name
    if path.exists():
        _libc.umount2(os.fsencode(path), _MNT_DETACH)
        path.unlink(missing_ok=True)


def _on_a_thread(function: Callable[[], _T]) -> _T:
    results: list[_T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _info(kind: str, data: bytes) -> bytes:
    return _attribute(_LINKINFO, _text(1, kind) + data)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}{arguments}: {os.strerror(code)}")
