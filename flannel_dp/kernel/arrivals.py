"""Notice that a link, an address or a route has come or changed, without reading which one."""

from __future__ import annotations

import socket
from contextlib import suppress

#: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR and
#: RTMGRP_IPV6_ROUTE of include/uapi/linux/rtnetlink.h.
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400


class Arrivals:
    """Becomes readable when something of the network has changed since it was made.

    For select, poll and epoll, in the namespace of the calling thread. Nothing is read:
    make another one to wait for what comes next. ``fileno()`` is -1 where the kernel gives
    no socket. Equivalent: ``ip monitor link address route``.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        with suppress(OSError):
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
            )
            self._socket.bind((0, _GROUPS))

    def fileno(self) -> int:
        return self._socket.fileno() if self._socket is not None else -1

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
